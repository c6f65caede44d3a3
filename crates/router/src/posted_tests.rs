//! The table of regions against an engine without threads.

use freeflow_session::{
    AdviseMr, AdvisedRange, AllocMw, ExchangeSlots, Handle, MAX_SLOTS_AT_ONCE, REGION_SLOTS,
    RegionSlot, Reply, Request, ReregMr,
};
use freeflow_shm::{CompletionEntry, Region, RegionEntry, RegionTable, SendEntry, Sge};
use freeflow_types::{Access, DeviceLimits, Key, MwType, Opcode, WcStatus};
use proptest::prelude::*;
use rustix::io::Errno;

use crate::memory_tests::{Host, PAGE};

const IOVA: u64 = 0x1000;

fn exchange(host: &mut Host, back: Vec<u32>, want: u32) -> Vec<RegionSlot> {
    match host.ask(Request::ExchangeSlots(ExchangeSlots { back, want })) {
        Ok(Reply::Slots(made)) => {
            assert!(made.slots.iter().all(|s| s.slot < REGION_SLOTS));
            made.slots
        }
        other => panic!("{other:?}"),
    }
}

fn slot(host: &mut Host) -> RegionSlot {
    exchange(host, Vec::new(), 1)[0]
}

/// The table's memory, as the library maps it.
fn memory(host: &mut Host) -> Region {
    let asked = host.ask(Request::ExchangeSlots(ExchangeSlots {
        back: Vec::new(),
        want: 0,
    }));
    let Ok(Reply::Slots(made)) = asked else {
        panic!("{asked:?}")
    };
    let s = host.engine.sessions.get(host.session).unwrap();
    let slab = s.slabs.mapping(made.table.slab).unwrap().clone();
    Region::new(slab, made.table.offset, made.table.len).unwrap()
}

fn table(memory: &Region) -> RegionTable<'_> {
    RegionTable::new(memory.words(), REGION_SLOTS).unwrap()
}

/// All of the host's page.
fn whole(host: &Host, access: Access) -> RegionEntry {
    RegionEntry {
        pd: host.pd.0,
        access: access.bits(),
        iova: IOVA,
        len: PAGE,
        segment: host.segment,
        offset: host.offset,
    }
}

fn rights() -> Access {
    Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ
}

/// Registers a region in a fresh slot.
fn register(host: &mut Host, entry: &RegionEntry) -> RegionSlot {
    let at = slot(host);
    table(&memory(host)).register(at.slot, at.key.0, entry);
    at
}

/// Writes 8 bytes from the start of one region to the middle of another.
fn write(host: &mut Host, qp: Handle, from: Key, to: Key) -> Option<WcStatus> {
    let entry = SendEntry {
        opcode: Opcode::RdmaWrite.raw() as u8,
        num_sge: 1,
        rkey: to.0,
        remote_addr: IOVA + PAGE / 2,
        ..SendEntry::default()
    };
    let sge = Sge {
        addr: IOVA,
        length: 8,
        lkey: from.0,
    };
    let before = completions(host, qp).len();
    host.post(qp, &entry, &[sge]);
    host.engine.reap();
    host.engine.sessions.get(host.session)?;
    let after = completions(host, qp);
    assert_eq!(after.len(), before + 1);
    WcStatus::from_raw(after[before].status.into())
}

fn completions(host: &Host, qp: Handle) -> Vec<CompletionEntry> {
    let cq = host.engine.qps.get(qp).unwrap().send_cq;
    let ring = host.engine.cqs.get(cq).unwrap().ring().unwrap();
    (0..ring.produced()).map(|at| ring.read(at)).collect()
}

/// 8 bytes of the host's page.
fn bytes(host: &Host, at: u64) -> [u8; 8] {
    let s = host.engine.sessions.get(host.session).unwrap();
    let segment = s.segments.mapping(host.segment).unwrap();
    let mut bytes = [0; 8];
    segment.read(host.offset + at, &mut bytes).unwrap();
    bytes
}

fn fill(host: &Host, at: u64, bytes: &[u8]) {
    let s = host.engine.sessions.get(host.session).unwrap();
    let segment = s.segments.mapping(host.segment).unwrap();
    segment.write(host.offset + at, bytes).unwrap();
}

#[test]
fn a_region_of_the_table_is_used_as_others_until_it_dies() {
    let mut host = Host::new(DeviceLimits::default());
    let qp = host.qp();
    let entry = whole(&host, rights());
    let (from, to) = (register(&mut host, &entry), register(&mut host, &entry));
    assert_ne!(from.key, to.key);
    fill(&host, 0, b"payload!");
    assert_eq!(
        write(&mut host, qp, from.key, to.key),
        Some(WcStatus::Success)
    );
    assert_eq!(&bytes(&host, PAGE / 2), b"payload!");

    let memory = memory(&mut host);
    assert_eq!(table(&memory).in_use(), None);
    assert!(table(&memory).deregister(to.slot, to.key.0));
    fill(&host, PAGE / 2, &[0; 8]);
    assert_eq!(
        write(&mut host, qp, from.key, to.key),
        Some(WcStatus::RemAccessErr)
    );
    assert_eq!(bytes(&host, PAGE / 2), [0; 8]);
}

#[test]
fn a_local_key_of_a_dead_region_is_refused() {
    let mut host = Host::new(DeviceLimits::default());
    let qp = host.qp();
    let entry = whole(&host, rights());
    let (from, to) = (register(&mut host, &entry), register(&mut host, &entry));
    assert!(table(&memory(&mut host)).deregister(from.slot, from.key.0));
    let status = write(&mut host, qp, from.key, to.key);
    assert_eq!(status, Some(WcStatus::LocProtErr));
}

#[test]
fn rights_and_domains_are_those_of_the_slot() {
    let mut host = Host::new(DeviceLimits::default());
    let local = whole(&host, Access::LOCAL_WRITE);
    let local = register(&mut host, &local);
    let context = host.context;
    let other = host.make(Request::AllocPd { context });
    let elsewhere = RegionEntry {
        pd: other.0,
        ..whole(&host, rights())
    };
    let elsewhere = register(&mut host, &elsewhere);
    let wrong_tag = Key(local.key.0 ^ 1);
    let unused = slot(&mut host).key;
    for to in [local.key, elsewhere.key, unused] {
        let qp = host.qp();
        let status = write(&mut host, qp, local.key, to);
        assert_eq!(status, Some(WcStatus::RemAccessErr), "{to:?}");
    }
    for from in [elsewhere.key, wrong_tag, unused] {
        let qp = host.qp();
        let status = write(&mut host, qp, from, local.key);
        assert_eq!(status, Some(WcStatus::LocProtErr), "{from:?}");
    }
}

#[test]
fn what_the_router_would_not_register_ends_the_session() {
    let with = |change: fn(&mut RegionEntry)| change;
    let bad = [
        with(|e| e.access = 1 << 30),
        with(|e| e.access = Access::REMOTE_WRITE.bits()),
        with(|e| e.access |= Access::MW_BIND.bits()),
        with(|e| e.access |= Access::ON_DEMAND.bits()),
        with(|e| e.len = 0),
        with(|e| e.len = u64::MAX),
        with(|e| e.iova = u64::MAX - 8),
        with(|e| e.segment = 1),
        with(|e| e.segment = u32::MAX),
        with(|e| e.offset = (16 << 30) - 8),
        with(|e| e.offset = u64::MAX - 8),
    ];
    for (n, change) in bad.into_iter().enumerate() {
        let mut host = Host::new(DeviceLimits::default());
        let others = host.another_session();
        let qp = host.qp();
        let good = whole(&host, rights());
        let mut entry = good;
        change(&mut entry);
        let (good, bad) = (register(&mut host, &good), register(&mut host, &entry));
        assert_eq!(write(&mut host, qp, good.key, bad.key), None, "{n}");
        let ended = host.engine.ended.back().unwrap();
        let expected = format!("slot {} of the table of regions", bad.slot);
        assert!(ended.reason.starts_with(&expected), "{}", ended.reason);
        assert!(host.engine.sessions.get(others).is_some());
        assert!(host.engine.mrs.iter().next().is_none());
    }
}

#[test]
fn a_use_is_told_from_the_first_look_to_the_end_of_the_turn() {
    let mut host = Host::new(DeviceLimits::default());
    let entry = whole(&host, rights());
    let at = register(&mut host, &entry);
    let memory = memory(&mut host);
    let table = table(&memory);
    let mut last = 0;
    for _ in 0..3 {
        assert_eq!(table.in_use(), None);
        let mut look = || {
            host.engine
                .posted_region(host.pd, at.slot, at.key.0)
                .is_some()
        };
        assert!(look());
        let number = table.in_use().unwrap();
        assert!(number > last);
        last = number;
        assert!(look());
        assert_eq!(table.in_use(), Some(number));
        // Also one that finds nothing: it may have found it a moment ago.
        let wrong = host.engine.posted_region(host.pd, at.slot, at.key.0 ^ 1);
        assert!(wrong.is_none());
        assert!(!table.is_over(number));
        host.engine.end_uses();
        assert!(table.is_over(number));
    }
}

#[test]
fn slots_count_as_regions_and_leave_room_for_others() {
    let limits = DeviceLimits {
        max_mr: 10,
        ..DeviceLimits::default()
    };
    let mut host = Host::new(limits);
    let slots = exchange(&mut host, Vec::new(), MAX_SLOTS_AT_ONCE);
    assert_eq!(slots.len(), 5);
    let pd = host.pd;
    let asked: Vec<_> = (0..5)
        .map(|_| host.make(Request::AllocNullMr { pd }))
        .collect();
    let null = Request::AllocNullMr { pd };
    assert_eq!(host.ask(null.clone()), Err(Errno::NOMEM));
    assert!(exchange(&mut host, Vec::new(), 1).is_empty());
    // What was never given out, and what was given back already, is nobody's to give back.
    let back: Vec<_> = slots.iter().map(|s| s.slot).collect();
    let twice = [&back[..], &back[..], &[7, REGION_SLOTS, u32::MAX]].concat();
    assert!(exchange(&mut host, twice, 0).is_empty());
    for _ in 0..5 {
        host.make(null.clone());
    }
    assert_eq!(host.ask(null), Err(Errno::NOMEM));
    for mr in asked {
        host.ask(Request::DeregMr { mr }).unwrap();
    }
    let again = exchange(&mut host, Vec::new(), 512);
    assert_eq!(again.len(), 2);
    assert!(again.iter().all(|a| slots.iter().all(|s| s.key != a.key)));
}

#[test]
fn all_slots_are_given_out_once() {
    let mut host = Host::new(DeviceLimits::default());
    let mut slots = Vec::new();
    loop {
        let more = exchange(&mut host, Vec::new(), MAX_SLOTS_AT_ONCE);
        if more.is_empty() {
            break;
        }
        slots.extend(more);
    }
    assert_eq!(slots.len(), REGION_SLOTS as usize);
    let numbers: std::collections::BTreeSet<_> = slots.iter().map(|s| s.slot).collect();
    assert_eq!(numbers.len(), slots.len());
    // The one that rested longest comes first.
    let back = exchange(&mut host, vec![9, 4], 1);
    assert_eq!(back.len(), 1);
    assert_eq!(back[0].slot, 9);
}

#[test]
fn what_is_left_is_dead_with_its_domain() {
    let mut host = Host::new(DeviceLimits::default());
    let context = host.context;
    let pd = host.make(Request::AllocPd { context });
    let entry = RegionEntry {
        pd: pd.0,
        ..whole(&host, rights())
    };
    let (a, b) = (register(&mut host, &entry), register(&mut host, &entry));
    host.ask(Request::DeallocPd { pd }).unwrap();
    let qp = host.qp();
    let good = whole(&host, rights());
    let good = register(&mut host, &good);
    let status = write(&mut host, qp, good.key, a.key);
    assert_eq!(status, Some(WcStatus::RemAccessErr));
    for slot in [a.slot, b.slot] {
        assert_eq!(host.ask(Request::AdoptMr { slot }), Err(Errno::INVAL));
    }
    let counts = host.engine.sessions.get(host.session).unwrap().counts;
    assert_eq!((counts.mrs, counts.slots), (0, 3));
    host.ask(Request::CloseContext { context }).unwrap();
    exchange(&mut host, vec![a.slot, b.slot, good.slot], 0);
    let counts = host.engine.sessions.get(host.session).unwrap().counts;
    assert_eq!(counts.slots, 0);
}

#[test]
fn the_status_tells_what_the_library_counts_within_what_it_has() {
    let mut host = Host::new(DeviceLimits::default());
    let told = |host: &Host| {
        let status = host.engine.status();
        let session = &status[0].0.sessions[0];
        (session.mrs, session.registered_bytes)
    };
    let entry = whole(&host, rights());
    let at = register(&mut host, &entry);
    register(&mut host, &entry);
    assert_eq!(told(&host), (2, 2 * PAGE));
    let memory = memory(&mut host);
    assert!(table(&memory).deregister(at.slot, at.key.0));
    assert_eq!(told(&host), (1, PAGE));
    for _ in 0..9 {
        table(&memory).uncount(at.slot);
    }
    assert_eq!(told(&host).0, 2);
}

#[test]
fn an_adopted_region_keeps_its_key() {
    let mut host = Host::new(DeviceLimits::default());
    let qp = host.qp();
    let entry = whole(&host, rights());
    let at = register(&mut host, &entry);
    let Ok(Reply::Mr(made)) = host.ask(Request::AdoptMr { slot: at.slot }) else {
        panic!("not adopted");
    };
    assert_eq!(made.key, at.key);
    assert_eq!(
        write(&mut host, qp, at.key, at.key),
        Some(WcStatus::Success)
    );
    // It is the router's: no longer the slot's.
    assert!(!table(&memory(&mut host)).deregister(at.slot, at.key.0));
    let change = Request::ReregMr(ReregMr {
        mr: made.mr,
        pd: None,
        translation: None,
        access: Some(Access::LOCAL_WRITE),
    });
    host.ask(change).unwrap();
    assert_eq!(
        write(&mut host, qp, at.key, at.key),
        Some(WcStatus::RemAccessErr)
    );
    let mr = made.mr;
    host.ask(Request::DeregMr { mr }).unwrap();
    let counts = host.engine.sessions.get(host.session).unwrap().counts;
    let left = (counts.mrs, counts.slots, counts.registered, counts.pieces);
    assert_eq!(left, (0, 0, 0, 0));

    let nothing = [
        at.slot,
        slot(&mut host).slot,
        REGION_SLOTS - 1,
        REGION_SLOTS,
        u32::MAX,
    ];
    for slot in nothing {
        assert_eq!(host.ask(Request::AdoptMr { slot }), Err(Errno::INVAL));
    }
    let entry = RegionEntry {
        len: u64::MAX,
        ..whole(&host, rights())
    };
    let slot = register(&mut host, &entry).slot;
    assert_eq!(host.ask(Request::AdoptMr { slot }), Err(Errno::INVAL));
}

#[test]
fn windows_and_advice_know_regions_of_the_table() {
    let mut host = Host::new(DeviceLimits::default());
    let entry = whole(&host, rights());
    let at = register(&mut host, &entry);
    let pd = host.pd;
    let advise = |pd, key| {
        let ranges = vec![AdvisedRange {
            addr: IOVA,
            len: 8,
            key,
        }];
        Request::AdviseMr(AdviseMr {
            pd,
            write: false,
            ranges,
        })
    };
    assert_eq!(host.ask(advise(pd, at.key)), Err(Errno::INVAL));
    let context = host.context;
    let other = host.make(Request::AllocPd { context });
    assert_eq!(host.ask(advise(other, at.key)), Err(Errno::PERM));
    assert!(table(&memory(&mut host)).deregister(at.slot, at.key.0));
    assert_eq!(host.ask(advise(pd, at.key)), Err(Errno::NOENT));

    let at = register(&mut host, &entry);
    let window = host.make(Request::AllocMw(AllocMw {
        pd,
        kind: MwType::One,
    }));
    let qp = host.qp();
    let bind = freeflow_shm::Bind {
        window: window.0,
        rkey: 0,
        lkey: at.key.0,
        addr: IOVA,
        len: 8,
        access: Access::REMOTE_READ.bits(),
    };
    let request = SendEntry {
        opcode: Opcode::BindMw.raw() as u8,
        ..SendEntry::from_bind(&bind)
    };
    host.post(qp, &request, &[]);
    let last = completions(&host, qp).pop().unwrap();
    assert_eq!(last.status, WcStatus::MwBindErr.raw() as u8);
}

#[test]
fn a_session_that_ends_takes_its_table_with_it() {
    let mut host = Host::new(DeviceLimits::default());
    let entry = whole(&host, rights());
    register(&mut host, &entry);
    let first = host.session;
    host.session = host.another_session();
    host.engine.end_session(first, crate::EndReason::Closed);
    host.engine.take_dead();
    assert_eq!(host.engine.status()[0].0.sessions.len(), 1);
    assert!(host.engine.pds.iter().next().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Any words in a slot: the request succeeds or fails, or the session ends for that.
    #[test]
    fn any_content_harms_nobody_else(
        words in proptest::collection::vec(prop_oneof![
            Just(0u64), Just(u64::MAX), any::<u64>(), 0..64u64, (0..64u64).prop_map(|n| 1 << n)
        ], 8),
        sound in 0u8..64,
    ) {
        let mut host = Host::new(DeviceLimits::default());
        let qp = host.qp();
        let entry = whole(&host, rights());
        let at = register(&mut host, &entry);
        let memory = memory(&mut host);
        // The words of the slot behind its state: some of them as they should be.
        let start = 16 + at.slot as usize * 8;
        for (n, word) in words.iter().enumerate().skip(1) {
            if sound >> n & 1 == 0
                && let Some(place) = memory.words().get(start + n)
            {
                place.store(*word, std::sync::atomic::Ordering::SeqCst);
            }
        }
        let status = write(&mut host, qp, at.key, at.key);
        if status.is_some() {
            let slots = vec![at.slot];
            exchange(&mut host, slots, 0);
            let counts = host.engine.sessions.get(host.session).unwrap().counts;
            prop_assert_eq!(counts.slots, 0);
        } else {
            prop_assert!(host.engine.ended.back().unwrap().reason.starts_with("slot "));
        }
    }
}
