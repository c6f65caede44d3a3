//! Garbage in the table of regions that a session registers itself.

use std::sync::atomic::Ordering;

use freeflow_session::{ExchangeSlots, REGION_SLOTS, RegionSlot, Reply, Request};
use freeflow_shm::{Region, RegionEntry, RegionTable};
use freeflow_tests::DEADLINE;
use freeflow_tests::rig::{CAP, IOVA, Rig, all_rights, join, write};
use freeflow_types::{Access, QpType, WcStatus};

use crate::rings::Numbers;
use crate::scene::Scene;

/// Slots and the memory of the table.
fn exchange(rig: &mut Rig, back: Vec<u32>, want: u32) -> (Vec<RegionSlot>, Region) {
    let request = Request::ExchangeSlots(ExchangeSlots { back, want });
    let (reply, fds) = rig.raw.call(&request).unwrap();
    let Reply::Slots(made) = reply else {
        panic!("{reply:?}");
    };
    let memory = rig.raw.ring(&made.table, fds).unwrap();
    (made.slots, memory)
}

fn table(memory: &Region) -> RegionTable<'_> {
    RegionTable::new(memory.words(), REGION_SLOTS).unwrap()
}

/// All pages of a rig.
fn whole(rig: &Rig) -> RegionEntry {
    RegionEntry {
        pd: rig.pd.0,
        access: all_rights().bits(),
        iova: IOVA,
        len: rig.len,
        segment: rig.pages.0,
        offset: rig.pages.1,
    }
}

#[test]
fn a_region_that_cannot_be_ends_the_session() {
    let scene = Scene::new();
    let bad: [fn(&mut RegionEntry); 5] = [
        |e| e.segment = 77,
        |e| e.len = u64::MAX,
        |e| e.offset = u64::MAX - 4096,
        |e| e.access |= Access::MW_BIND.bits(),
        |e| e.iova = u64::MAX - 4096,
    ];
    for change in bad {
        let mut rig = scene.rig();
        let (mut a, _b) = rig.pair().unwrap();
        let (slots, memory) = exchange(&mut rig, Vec::new(), 1);
        let mut entry = whole(&rig);
        change(&mut entry);
        table(&memory).register(slots[0].slot, slots[0].key.0, &entry);
        let sge = rig.sge(0, 64);
        rig.send(&mut a, &write(slots[0].key.0, IOVA), &[sge])
            .unwrap();
        let RegionEntry { len, offset, .. } = entry;
        scene.ended(&format!("one of {len} bytes")).unwrap();
        scene.ended(&format!("offset {offset:#x}")).unwrap();
    }
    scene.end();
}

/// A domain, and a key, of another session lead nowhere.
#[test]
fn a_region_of_the_table_is_its_own_sessions() {
    let scene = Scene::new();
    let mut sender = Rig::new(&scene.victims[0].socket, 4096).unwrap();
    let mut peer = Rig::new(&scene.victims[1].socket, 4096).unwrap();
    let mut bad = scene.rig();
    let (slots, memory) = exchange(&mut bad, Vec::new(), 2);
    // A domain of theirs in a table of ours.
    let entry = RegionEntry {
        pd: peer.pd.0,
        ..whole(&bad)
    };
    table(&memory).register(slots[0].slot, slots[0].key.0, &entry);
    let mut a = sender.qp(QpType::Rc, CAP).unwrap();
    let b = peer.qp(QpType::Rc, CAP).unwrap();
    join((&sender, &a), (&peer, &b)).unwrap();
    let sge = sender.sge(0, 64);
    sender
        .send(&mut a, &write(slots[0].key.0, IOVA), &[sge])
        .unwrap();
    let failed = sender.completion(DEADLINE).unwrap();
    assert_eq!(failed.status, WcStatus::RemAccessErr.raw() as u8);
    drop((sender, peer, bad));
    scene.end();
}

#[test]
fn any_words_in_the_table_harm_nobody_else() {
    let scene = Scene::new();
    let mut numbers = Numbers(11);
    for round in 0..16 {
        let mut rig = scene.rig();
        let (mut a, _b) = rig.pair().unwrap();
        let (slots, memory) = exchange(&mut rig, Vec::new(), 64);
        for slot in &slots {
            table(&memory).register(slot.slot, slot.key.0, &whole(&rig));
        }
        for (at, word) in memory.words().iter().enumerate().take(16 + 64 * 8) {
            let random = numbers.next();
            let is_state = at >= 16 && at.is_multiple_of(8);
            // Those whose state is destroyed too are not looked at.
            if random % 4 < round % 4 && (!is_state || round < 4) {
                let value = if random.is_multiple_of(3) {
                    random
                } else {
                    random >> 50
                };
                word.store(value, Ordering::SeqCst);
            }
        }
        for slot in slots.iter().take(32) {
            let sge = rig.sge(0, 64);
            let _ = rig.send(&mut a, &write(slot.key.0, IOVA), &[sge]);
        }
        // It may be ended or not, but the router answers.
        let back = slots.iter().map(|s| s.slot).chain([REGION_SLOTS, 9, 9]);
        let request = ExchangeSlots {
            back: back.collect(),
            want: 64,
        };
        let _ = rig.raw.ask(&Request::ExchangeSlots(request)).unwrap();
        let _ = rig.raw.ask(&Request::Settle).unwrap();
    }
    scene.end();
}
