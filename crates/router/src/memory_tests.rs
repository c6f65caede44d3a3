//! Memory verbs against an engine without threads: quotas, ownership, cleaning up, and rings
//! with any content.

use std::sync::Arc;

use freeflow_session::{
    AllocMw, CreateCq, CreateQp, Handle, PieceDesc, PieceKind, RegDmMr, RegMr, Reply, Request,
    ReregMr, Translation,
};
use freeflow_shm::{Bind, SendEntry, Sge, event_pair};
use freeflow_types::{
    Access, AddressVector, DeviceLimits, Gid, Key, MwType, Opcode, QpAttr, QpAttrMask as Mask,
    QpCap, QpState, QpType, Qpn, WcStatus,
};
use proptest::prelude::*;
use rustix::event::epoll;
use rustix::io::Errno;

use crate::EndpointSpec;
use crate::engine::Engine;
use crate::foreign::{ForeignMemory, Opener};
use crate::objects::Peer;
use crate::testbed::steps_to_rts;
use crate::watch::Progress;

pub(crate) const PAGE: u64 = 4096;

pub(crate) struct Host {
    pub(crate) engine: Engine,
    pub(crate) session: Handle,
    pub(crate) context: Handle,
    pub(crate) pd: Handle,
    pub(crate) segment: u32,
    pub(crate) offset: u64,
    now: u64,
}

impl Host {
    pub(crate) fn new(limits: DeviceLimits) -> Host {
        let set = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        let mut engine = Engine::new(limits, 0, Opener::Direct, set);
        let ip = freeflow_types::VirtualIp("10.0.0.1".parse().unwrap());
        let spec = EndpointSpec {
            name: "e".to_owned(),
            tenant: "t".to_owned(),
            ip,
            socket: "/nowhere".into(),
            quota: Vec::new(),
            underlay_gid: false,
        };
        engine.add_endpoint(&spec).unwrap();
        let nobody = Handle(0);
        let mut host = Host {
            engine,
            session: nobody,
            context: nobody,
            pd: nobody,
            segment: 0,
            offset: 0,
            now: 0,
        };
        host.session = host.another_session();
        host.context = host.make(Request::OpenContext);
        let context = host.context;
        host.pd = host.make(Request::AllocPd { context });
        match host.ask(Request::AllocPages { len: PAGE }) {
            Ok(Reply::Pages {
                segment, offset, ..
            }) => (host.segment, host.offset) = (segment, offset),
            other => panic!("{other:?}"),
        }
        host
    }

    pub(crate) fn another_session(&mut self) -> Handle {
        let (endpoint, _) = self.engine.endpoints.iter().next().unwrap();
        let peer = Peer {
            pid: std::process::id(),
            uid: 0,
        };
        let (socket, _) = event_pair().unwrap();
        let session = self.engine.begin_session(endpoint, peer, Arc::new(socket));
        session.unwrap().0
    }

    pub(crate) fn ask(&mut self, request: Request) -> Result<Reply, Errno> {
        let session = self.session;
        let reply = self.engine.handle(session, request).reply;
        while self.engine.work_off(session) {}
        reply.map_err(|e| Errno::from_raw_os_error(e.0))
    }

    pub(crate) fn make(&mut self, request: Request) -> Handle {
        match self.ask(request).unwrap() {
            Reply::Created(handle) => handle,
            Reply::Mr(made) => made.mr,
            Reply::Mw(made) => made.mw,
            Reply::Dm(made) => made.dm,
            Reply::Cq(made) => made.cq,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn translation(&self) -> Translation {
        let (segment, offset) = (self.segment, self.offset);
        let kind = PieceKind::Pool { segment, offset };
        Translation {
            iova: 0x1000,
            len: PAGE,
            pieces: vec![PieceDesc { len: PAGE, kind }],
        }
    }

    pub(crate) fn reg(&mut self, access: Access) -> Request {
        Request::RegMr(RegMr {
            pd: self.pd,
            translation: self.translation(),
            access,
        })
    }

    pub(crate) fn mw(&self, kind: MwType) -> Request {
        Request::AllocMw(AllocMw { pd: self.pd, kind })
    }

    fn dm(&self, len: u64) -> Request {
        let context = self.context;
        Request::AllocDm { context, len }
    }

    fn dm_mr(&self, dm: Handle) -> Request {
        Request::RegDmMr(RegDmMr {
            pd: self.pd,
            dm,
            offset: 0,
            len: 8,
            access: Access::ZERO_BASED,
        })
    }

    /// A queue pair connected to itself.
    pub(crate) fn qp(&mut self) -> Handle {
        let cq = self.make(Request::CreateCq(CreateCq {
            context: self.context,
            cqe: 4096,
            channel: None,
            comp_vector: 0,
        }));
        let cap = QpCap {
            max_send_wr: 64,
            max_recv_wr: 64,
            max_send_sge: 2,
            max_recv_sge: 2,
            max_inline: 0,
        };
        let made = self.ask(Request::CreateQp(CreateQp {
            pd: self.pd,
            qp_type: QpType::Rc,
            send_cq: cq,
            recv_cq: Some(cq),
            srq: None,
            cap,
            sq_sig_all: true,
        }));
        let Ok(Reply::Qp(made)) = made else {
            panic!("{made:?}")
        };
        self.connect(made.qp, made.qpn);
        made.qp
    }

    fn connect(&mut self, qp: Handle, peer: Qpn) {
        let gid = Gid::from(freeflow_types::VirtualIp("10.0.0.1".parse().unwrap()));
        let attr = QpAttr {
            access: Access::all(),
            port_num: 1,
            dest_qpn: peer.get(),
            max_dest_rd_atomic: 1,
            max_rd_atomic: 1,
            timeout: 10,
            av: AddressVector {
                dgid: gid,
                is_global: true,
                port_num: 1,
                ..AddressVector::default()
            },
            ..QpAttr::default()
        };
        let reset = [(QpState::Reset, Mask::empty())];
        for (state, mask) in reset.into_iter().chain(steps_to_rts(QpType::Rc)) {
            let attr = QpAttr { state, ..attr };
            let mask = mask | Mask::STATE;
            self.ask(Request::ModifyQp { qp, attr, mask }).unwrap();
        }
    }

    /// Executes one request of a queue pair.
    pub(crate) fn post(&mut self, qp: Handle, entry: &SendEntry, sges: &[Sge]) {
        let rings = self.engine.qps.get(qp).unwrap().rings().unwrap();
        let at = rings.send_produced();
        entry.store(QpType::Rc, rings.send_slot(at));
        SendEntry::store_sges(rings.send_slot(at), sges);
        rings.publish_send(at + 1);
        self.engine.make_ready(qp);
        for _ in 0..8 {
            self.now += 1_000_000_000;
            self.engine.poll(self.now, &Progress::default());
        }
    }

    /// Windows that regions say are bound to them.
    fn bound(&self) -> u32 {
        self.engine.mrs.iter().map(|(_, mr)| mr.windows).sum()
    }
}

fn small() -> DeviceLimits {
    DeviceLimits {
        max_mr: 2,
        max_mw: 2,
        max_dm_size: 2 * PAGE,
        ..DeviceLimits::default()
    }
}

#[test]
fn address_space_is_bounded_for_all_sessions_of_an_endpoint() {
    let limits = DeviceLimits {
        max_shared_bytes: 1 << 40,
        ..DeviceLimits::default()
    };
    let mut host = Host::new(limits);
    let len = limits.max_shared_bytes / 4;
    let mut ranges = 0;
    for _ in 0..3 {
        while host.ask(Request::AllocPages { len }).is_ok() {
            ranges += 1;
            assert!(ranges <= 4);
        }
        // Another session of the endpoint finds as little.
        host.session = host.another_session();
    }
    assert_eq!(ranges, 3);
    let refused = host.ask(Request::AllocPages { len });
    assert_eq!(refused, Err(Errno::NOMEM));
}

#[test]
fn quotas_are_exact_and_come_back() {
    let mut host = Host::new(small());
    for _ in 0..3 {
        let window = host.mw(MwType::One);
        let mws = [window.clone(), window.clone()].map(|w| host.make(w));
        assert_eq!(host.ask(window), Err(Errno::NOMEM));
        for mw in mws {
            host.ask(Request::DeallocMw { mw }).unwrap();
        }
        let pd = host.pd;
        let mrs = [host.reg(Access::empty()), Request::AllocNullMr { pd }].map(|r| host.make(r));
        assert_eq!(host.ask(host.dm_mr(Handle(0))), Err(Errno::INVAL));
        assert_eq!(host.ask(Request::AllocNullMr { pd }), Err(Errno::NOMEM));
        for mr in mrs {
            host.ask(Request::DeregMr { mr }).unwrap();
        }
        let dms = [host.dm(PAGE), host.dm(1)].map(|d| host.make(d));
        assert_eq!(host.ask(host.dm(1)), Err(Errno::NOMEM));
        let used = host
            .engine
            .sessions
            .get(host.session)
            .unwrap()
            .segments
            .used();
        assert_eq!(used, 3 * PAGE);
        for dm in dms {
            host.ask(Request::FreeDm { dm }).unwrap();
        }
    }
    let counts = host.engine.sessions.get(host.session).unwrap().counts;
    let left = (counts.mrs, counts.mws, counts.device, counts.registered);
    assert_eq!(left, (0, 0, 0, 0));
}

#[test]
fn objects_of_others_are_not_to_be_had() {
    let mut host = Host::new(DeviceLimits::default());
    let mr = host.reg(Access::LOCAL_WRITE);
    let mr = host.make(mr);
    let (mw, dm) = (host.mw(MwType::Two), host.dm(8));
    let (mw, dm) = (host.make(mw), host.make(dm));
    let (theirs_pd, theirs_dm) = (host.pd, host.dm_mr(dm));
    host.session = host.another_session();
    let rereg = Request::ReregMr(ReregMr {
        mr,
        pd: None,
        translation: None,
        access: Some(Access::empty()),
    });
    for request in [
        rereg,
        Request::DeregMr { mr },
        Request::DeallocMw { mw },
        Request::FreeDm { dm },
        Request::AllocNullMr { pd: theirs_pd },
        host.mw(MwType::One),
        host.dm(8),
        theirs_dm,
    ] {
        assert_eq!(host.ask(request.clone()), Err(Errno::INVAL), "{request:?}");
    }
    // Device memory of theirs in a domain of ours.
    host.context = host.make(Request::OpenContext);
    let context = host.context;
    host.pd = host.make(Request::AllocPd { context });
    assert_eq!(host.ask(host.dm_mr(dm)), Err(Errno::INVAL));
}

#[test]
fn a_refused_change_changes_nothing() {
    let mut host = Host::new(DeviceLimits::default());
    let mr = host.reg(Access::LOCAL_WRITE);
    let mr = host.make(mr);
    let before = format!("{:?}", host.engine.mrs.get(mr).unwrap());
    let other = host.make(Request::OpenContext);
    let foreign_pd = host.make(Request::AllocPd { context: other });
    let mut beyond = host.translation();
    beyond.pieces[0].kind = PieceKind::Pool {
        segment: 0,
        offset: 1 << 40,
    };
    let mut foreign = host.translation();
    foreign.pieces[0].kind = PieceKind::Foreign { addr: 0 };
    let good = Some(host.translation());
    let persistent = Access::FLUSH_PERSISTENT;
    for (pd, translation, access, errno) in [
        (Some(foreign_pd), good.clone(), None, Errno::INVAL),
        (Some(Handle(0)), good.clone(), None, Errno::INVAL),
        (None, Some(beyond), Some(Access::empty()), Errno::INVAL),
        (None, Some(foreign), None, Errno::PERM),
        (None, good.clone(), Some(Access::REMOTE_WRITE), Errno::INVAL),
        (None, good, Some(persistent), Errno::OPNOTSUPP),
        (
            None,
            None,
            Some(Access::from_bits_retain(1 << 30)),
            Errno::INVAL,
        ),
    ] {
        let request = Request::ReregMr(ReregMr {
            mr,
            pd,
            translation,
            access,
        });
        assert_eq!(host.ask(request.clone()), Err(errno), "{request:?}");
        assert_eq!(format!("{:?}", host.engine.mrs.get(mr).unwrap()), before);
    }
    let pd = host.pd;
    assert_eq!(host.engine.pds.get(pd).unwrap().users, 1);
}

#[test]
fn a_context_goes_with_all_that_is_bound() {
    let mut host = Host::new(DeviceLimits::default());
    let qp = host.qp();
    let access = Access::LOCAL_WRITE | Access::MW_BIND;
    let reg = host.reg(access);
    let Ok(Reply::Mr(made)) = host.ask(reg) else {
        panic!()
    };
    for kind in [MwType::One, MwType::Two] {
        let mw = host.mw(kind);
        let mw = host.make(mw);
        let bind = Bind {
            window: mw.0,
            rkey: 5,
            lkey: made.key.0,
            addr: 0x1000,
            len: 8,
            access: Access::REMOTE_WRITE.bits(),
        };
        let entry = SendEntry {
            opcode: Opcode::BindMw.raw() as u8,
            ..SendEntry::from_bind(&bind)
        };
        host.post(qp, &entry, &[]);
    }
    assert_eq!(host.bound(), 2);
    let dm = host.dm(8);
    let dm = host.make(dm);
    let dm_mr = host.dm_mr(dm);
    host.make(dm_mr);
    let context = host.context;
    host.ask(Request::CloseContext { context }).unwrap();
    let engine = &host.engine;
    assert!(engine.windows.iter().next().is_none());
    assert!(engine.mrs.iter().next().is_none());
    assert!(engine.dms.iter().next().is_none());
    let session = engine.sessions.get(host.session).unwrap();
    assert_eq!(session.segments.used(), PAGE);
    assert_eq!((session.counts.mws, session.counts.device), (0, 0));
}

#[test]
fn all_addresses_are_had_where_bytes_are_not_limited() {
    let mut host = Host::new(DeviceLimits::default());
    let (session, pd) = (host.session, host.pd);
    let access = Access::ON_DEMAND | Access::LOCAL_WRITE;
    let everything = Request::RegMr(RegMr {
        pd,
        translation: Translation::everything(),
        access,
    });
    // Not before the router reaches the process's memory.
    assert_eq!(host.ask(everything.clone()), Err(Errno::PERM));
    let (pid, uid) = (std::process::id(), rustix::process::getuid().as_raw());
    let memory = ForeignMemory::open(pid, uid).unwrap();
    host.engine.sessions.get_mut(session).unwrap().memory = Some(memory);
    let counts = |host: &Host| {
        let counts = &host.engine.sessions.get(session).unwrap().counts;
        (counts.mrs, counts.registered, counts.foreign)
    };
    let plain = host.reg(Access::LOCAL_WRITE);
    host.make(plain);
    let first = host.make(everything.clone());
    let second = host.make(everything.clone());
    assert_eq!(counts(&host), (3, PAGE, 0));
    let endpoint = host.engine.sessions.get(session).unwrap().endpoint;
    host.engine
        .set_quota(endpoint, &["registered=1G".parse().unwrap()]);
    assert_eq!(host.ask(everything.clone()), Err(Errno::NOMEM));
    // What there is stays, and may change.
    let change = Request::ReregMr(ReregMr {
        mr: first,
        pd: None,
        translation: Some(Translation::everything()),
        access: Some(access | Access::REMOTE_WRITE),
    });
    assert_eq!(host.ask(change), Ok(Reply::Done));
    // It does not become one of more bytes than there may be, nor one that must be there.
    let mut large = host.translation();
    (large.len, large.pieces[0].len) = (2 << 30, 2 << 30);
    large.pieces[0].kind = PieceKind::Foreign { addr: 0x1000 };
    let rereg = |translation, access| {
        Request::ReregMr(ReregMr {
            mr: second,
            pd: None,
            translation,
            access: Some(access),
        })
    };
    assert_eq!(host.ask(rereg(Some(large), access)), Err(Errno::NOMEM));
    let pinned = rereg(None, Access::LOCAL_WRITE);
    assert_eq!(host.ask(pinned), Err(Errno::INVAL));
    // A region of less does not become one of all.
    let mut small = host.translation();
    small.pieces[0].kind = PieceKind::Foreign { addr: 0x1000 };
    let small = host.make(Request::RegMr(RegMr {
        pd,
        translation: small,
        access,
    }));
    let grow = Request::ReregMr(ReregMr {
        mr: small,
        pd: None,
        translation: Some(Translation::everything()),
        access: Some(access),
    });
    assert_eq!(host.ask(grow), Err(Errno::NOMEM));
    assert_eq!(counts(&host), (4, 2 * PAGE, PAGE));
    for mr in [first, second, small] {
        assert_eq!(host.ask(Request::DeregMr { mr }), Ok(Reply::Done));
    }
    assert_eq!(counts(&host), (1, PAGE, 0));
}

/// What a write to own memory of a process completes with.
fn status_of_foreign_write(pid: u32, before: impl FnOnce()) -> WcStatus {
    let mut host = Host::new(DeviceLimits::default());
    let uid = rustix::process::getuid().as_raw();
    let memory = ForeignMemory::open(pid, uid).unwrap();
    let near = host.reg(Access::LOCAL_WRITE);
    let session = host.session;
    host.engine.sessions.get_mut(session).unwrap().memory = Some(memory);
    let Ok(Reply::Mr(near)) = host.ask(near) else {
        panic!()
    };
    let mut far = host.translation();
    // Nothing is mapped there.
    far.pieces[0].kind = PieceKind::Foreign { addr: 0 };
    let far = host.ask(Request::RegMr(RegMr {
        pd: host.pd,
        translation: far,
        access: Access::LOCAL_WRITE | Access::REMOTE_WRITE,
    }));
    let Ok(Reply::Mr(far)) = far else {
        panic!("{far:?}")
    };
    let qp = host.qp();
    before();
    let entry = SendEntry {
        opcode: Opcode::RdmaWrite.raw() as u8,
        remote_addr: 0x1000,
        rkey: far.key.0,
        num_sge: 1,
        ..SendEntry::default()
    };
    let sge = Sge {
        addr: 0x1000,
        length: 8,
        lkey: near.key.0,
    };
    host.post(qp, &entry, &[sge]);
    let cq = host.engine.qps.get(qp).unwrap().send_cq;
    let cq = host.engine.cqs.get(cq).unwrap();
    assert_eq!(cq.produced, 1);
    let status = cq.ring().unwrap().read(0).status;
    WcStatus::from_raw(status.into()).unwrap()
}

#[test]
fn who_has_died_does_not_answer_though_nobody_was_told() {
    let own = std::process::id();
    let status = status_of_foreign_write(own, || ());
    assert_eq!(status, WcStatus::RemOpErr);
    let mut child = std::process::Command::new("cat")
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let status = status_of_foreign_write(pid, || {
        child.kill().unwrap();
        child.wait().unwrap();
    });
    assert_eq!(status, WcStatus::RetryExcErr);
}

/// A descriptor of which any part may be valid.
#[derive(Clone, Debug)]
struct Wild {
    opcode: u8,
    flags: u8,
    sges: u16,
    key: usize,
    lkey: usize,
    tag: u8,
    window: usize,
    access: u32,
    addr: u64,
    len: u64,
}

fn wild() -> impl Strategy<Value = Wild> {
    let number = || {
        prop_oneof![
            Just(0u64),
            Just(8),
            Just(0x1000),
            Just(0x1FF8),
            any::<u64>()
        ]
    };
    let access = prop_oneof![Just(2u32), Just(4), Just(0x22), Just(0x6), any::<u32>()];
    let opcodes = prop_oneof![Just(7u8), Just(8), Just(9), Just(14), Just(15), 0u8..=16];
    let parts = (opcodes, any::<u8>(), 0u16..3, 0usize..8, 0usize..4);
    (parts, any::<u8>(), 0usize..4, access, number(), number()).prop_map(
        |((opcode, flags, sges, key, lkey), tag, window, access, addr, len)| Wild {
            opcode,
            flags,
            sges,
            key,
            lkey,
            tag,
            window,
            access,
            addr,
            len,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_ring_content_leaves_counts_true(entries in proptest::collection::vec(wild(), 1..60)) {
        let mut host = Host::new(DeviceLimits::default());
        let qp = host.qp();
        let rights = Access::all() - Access::FLUSH_PERSISTENT - Access::ZERO_BASED;
        let mut keys = vec![Key(0)];
        for access in [rights, rights - Access::MW_BIND] {
            let reg = host.reg(access);
            let Ok(Reply::Mr(made)) = host.ask(reg) else { panic!() };
            keys.push(made.key);
        }
        let mut windows = vec![0];
        for kind in [MwType::One, MwType::Two, MwType::Two] {
            let Ok(Reply::Mw(made)) = host.ask(host.mw(kind)) else { panic!() };
            windows.push(made.mw.0);
            keys.push(made.key);
        }
        for wild in entries {
            let key = |at: usize| keys.get(at).map_or(u32::MAX, |k| k.0 & !0xFF | u32::from(wild.tag));
            let exact = |at: usize| keys.get(at).map_or(u32::MAX, |k| k.0);
            let word = u64::from(wild.access) << 32
                | u64::from(windows.get(wild.window).copied().unwrap_or(u32::MAX));
            let entry = SendEntry {
                opcode: wild.opcode,
                flags: wild.flags,
                num_sge: wild.sges,
                inline_len: wild.len as u32,
                imm: if wild.opcode == 8 { exact(wild.lkey) } else { key(wild.key) },
                rkey: key(wild.key),
                remote_addr: wild.addr,
                compare_add: wild.len,
                swap: if wild.opcode == 14 { u64::from(wild.access) } else { word },
                ..SendEntry::default()
            };
            let sge = Sge { addr: 0x1000, length: 8, lkey: exact(wild.lkey) };
            host.post(qp, &entry, &[sge, sge]);
            prop_assert_eq!(host.bound(), host.engine.bound_windows());
            let qpn = host.engine.qps.get(qp).unwrap().qpn;
            host.connect(qp, qpn);
        }
        prop_assert!(host.engine.ending.is_empty());
        let context = host.context;
        host.ask(Request::CloseContext { context }).unwrap();
        prop_assert_eq!(host.bound(), 0);
    }
}

#[test]
fn pages_that_are_freed_one_by_one_do_not_fill_the_routers_heap() {
    const MOST: u64 = 100;
    let mut host = Host::new(DeviceLimits::default());
    let len = 1000 * PAGE;
    let Ok(Reply::Pages {
        segment, offset, ..
    }) = host.ask(Request::AllocPages { len })
    else {
        panic!("no pages");
    };
    host.engine.max_pieces = MOST;
    let free = |page: u64| Request::FreePages {
        segment,
        offset: offset + page * PAGE,
        len: PAGE,
    };
    // Every other one: none has a free neighbour.
    let errno = (0..500)
        .find_map(|n| host.ask(free(2 * n)).err().map(|errno| (n, errno)))
        .unwrap();
    assert_eq!(errno.1, Errno::NOMEM);
    let refused = 2 * errno.0;
    let s = host.engine.sessions.get(host.session).unwrap();
    let ranges = s.slabs.free_ranges() + s.segments.free_ranges();
    assert_eq!((s.held.pieces, ranges), (MOST, MOST));
    // Another session of the endpoint has no more either.
    let first = std::mem::replace(&mut host.session, Handle(0));
    host.session = host.another_session();
    let Ok(Reply::Pages {
        segment, offset, ..
    }) = host.ask(Request::AllocPages { len: 4 * PAGE })
    else {
        panic!("no pages for another session");
    };
    let middle = Request::FreePages {
        segment,
        offset: offset + PAGE,
        len: PAGE,
    };
    assert_eq!(host.ask(middle), Err(Errno::NOMEM));
    host.session = first;
    // What fills a gap is taken back, and makes room for what was refused and is still handed out.
    for gap in [1, 3, 5] {
        assert_eq!(host.ask(free(gap)), Ok(Reply::Done));
    }
    assert_eq!(host.ask(free(refused)), Ok(Reply::Done));
    assert_eq!(host.ask(free(refused)), Err(Errno::INVAL));
}
