//! An engine without threads, in virtual time, and what tests do with it: nothing happens because
//! a timer fired unless a test says so.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_session::{
    CreateCq, CreateQp, CreateSrq, Event, Handle, PieceDesc, PieceKind, RegMr, Reply, Request,
    Translation, XrcSrq,
};
use freeflow_shm::{CompletionEntry, RecvEntry, SendEntry, Sge, event_pair};
use freeflow_types::{
    Access, AddressVector, DeviceLimits, Gid, Key, Mtu, Opcode, QpAttr, QpAttrMask as Mask, QpCap,
    QpState, QpType, SendFlags, VirtualIp, WcStatus,
};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::EndpointSpec;
use crate::engine::{Engine, Polled};
use crate::foreign::Opener;
use crate::objects::Peer;
use crate::watch::Progress;

/// Long, so that no test waits it out by chance: 655 ms.
pub(crate) const RNR_TIMER: u8 = 0;
pub(crate) const RNR_RETRIES: u8 = 2;

pub(crate) struct Host {
    pub(crate) engine: Engine,
    pub(crate) now: u64,
}

/// A process: one session with one context.
pub(crate) struct Process {
    pub(crate) session: Handle,
    pub(crate) context: Handle,
    pub(crate) pd: Handle,
    pub(crate) gid: Gid,
    pub(crate) events: Arc<OwnedFd>,
    pub(crate) _socket: OwnedFd,
}

#[derive(Clone, Copy)]
pub(crate) struct Cq {
    pub(crate) handle: Handle,
    pub(crate) read: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Made {
    pub(crate) handle: Handle,
    pub(crate) qpn: u32,
    pub(crate) slot: u32,
}

#[derive(Clone, Copy)]
pub(crate) struct Srq {
    pub(crate) handle: Handle,
    pub(crate) slot: u32,
    pub(crate) max_wr: u32,
    pub(crate) number: Option<u32>,
    pub(crate) posted: u64,
}

/// The attributes that a connected queue pair must be given on its way from RESET to RTS (IBTA volume 1,
/// 11.2.5.2).
pub(crate) fn steps_to_rts(qp_type: QpType) -> [(QpState, Mask); 3] {
    let (to_rtr, to_rts) = match qp_type {
        QpType::Uc => (Mask::empty(), Mask::empty()),
        _ => (
            Mask::MAX_DEST_RD_ATOMIC | Mask::MIN_RNR_TIMER,
            Mask::TIMEOUT | Mask::RETRY_CNT | Mask::RNR_RETRY | Mask::MAX_QP_RD_ATOMIC,
        ),
    };
    let init = Mask::PKEY_INDEX | Mask::PORT | Mask::ACCESS_FLAGS;
    let rtr = Mask::AV | Mask::PATH_MTU | Mask::DEST_QPN | Mask::RQ_PSN;
    [
        (QpState::Init, init),
        (QpState::Rtr, rtr | to_rtr),
        (QpState::Rts, Mask::SQ_PSN | to_rts),
    ]
}

impl Host {
    pub(crate) fn new() -> Host {
        let set = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        let engine = Engine::new(DeviceLimits::default(), 0, Opener::Direct, set);
        Host { engine, now: 0 }
    }

    pub(crate) fn endpoint(&mut self, ip: &str) -> Handle {
        let spec = EndpointSpec {
            name: ip.to_owned(),
            tenant: "t".to_owned(),
            ip: VirtualIp(ip.parse().unwrap()),
            socket: "/nowhere".into(),
            quota: Vec::new(),
            underlay_gid: false,
        };
        self.engine.add_endpoint(&spec).unwrap()
    }

    pub(crate) fn process(&mut self, endpoint: Handle, uid: u32) -> Process {
        let pid = std::process::id();
        let (socket, other) = event_pair().unwrap();
        let peer = Peer { pid, uid };
        let begun = self.engine.begin_session(endpoint, peer, Arc::new(socket));
        let (session, ..) = begun.unwrap();
        let answer = self.engine.handle(session, Request::OpenContext);
        let Ok(Reply::Created(context)) = answer.reply else {
            panic!("{:?}", answer.reply);
        };
        let events = answer.fds.into_iter().next().unwrap();
        let Ok(Reply::Created(pd)) = self.ask(session, Request::AllocPd { context }) else {
            panic!("no domain");
        };
        let gid = self.engine.endpoints.get(endpoint).unwrap().gid;
        Process {
            session,
            context,
            pd,
            gid,
            events,
            _socket: other,
        }
    }

    /// Removes the endpoint that a process is on.
    pub(crate) fn remove_endpoint_of(&mut self, p: &Process) {
        let endpoint = self.engine.sessions.get(p.session).unwrap().endpoint;
        self.engine.remove_endpoint(endpoint);
    }

    pub(crate) fn ask(&mut self, session: Handle, request: Request) -> Result<Reply, Errno> {
        let reply = self.engine.handle(session, request).reply;
        while self.engine.work_off(session) {}
        reply.map_err(|e| Errno::from_raw_os_error(e.0))
    }

    pub(crate) fn cq(&mut self, p: &Process) -> Cq {
        let request = CreateCq {
            context: p.context,
            cqe: 256,
            channel: None,
            comp_vector: 0,
        };
        match self.ask(p.session, Request::CreateCq(request)) {
            Ok(Reply::Cq(made)) => Cq {
                handle: made.cq,
                read: 0,
            },
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn srq(&mut self, p: &Process, max_wr: u32, xrc: Option<XrcSrq>) -> Srq {
        let request = CreateSrq {
            pd: p.pd,
            max_wr,
            max_sge: 1,
            xrc,
        };
        match self.ask(p.session, Request::CreateSrq(request)) {
            Ok(Reply::Srq(made)) => Srq {
                handle: made.srq,
                slot: made.slot,
                max_wr: made.max_wr,
                number: made.number,
                posted: 0,
            },
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn qp(
        &mut self,
        p: &Process,
        qp_type: QpType,
        cqs: (Cq, Option<Cq>),
        srq: Option<Srq>,
    ) -> Made {
        let request = CreateQp {
            pd: p.pd,
            qp_type,
            send_cq: cqs.0.handle,
            recv_cq: cqs.1.map(|cq| cq.handle),
            srq: srq.map(|srq| srq.handle),
            cap: QpCap {
                max_send_wr: 64,
                max_send_sge: 1,
                ..QpCap::default()
            },
            sq_sig_all: true,
        };
        match self.ask(p.session, Request::CreateQp(request)) {
            Ok(Reply::Qp(made)) => Made {
                handle: made.qp,
                qpn: made.qpn.get(),
                slot: made.slot,
            },
            other => panic!("{other:?}"),
        }
    }

    /// Brings a queue pair that an own request names to RTS.
    pub(crate) fn connect(
        &mut self,
        p: &Process,
        to: (Gid, u32),
        modify: impl Fn(QpAttr, Mask) -> Request,
    ) {
        let attr = QpAttr {
            port_num: 1,
            access: Access::REMOTE_WRITE,
            path_mtu: Mtu::B4096,
            dest_qpn: to.1,
            av: AddressVector {
                dgid: to.0,
                is_global: true,
                port_num: 1,
                ..AddressVector::default()
            },
            min_rnr_timer: RNR_TIMER,
            max_dest_rd_atomic: 1,
            rnr_retry: RNR_RETRIES,
            retry_cnt: 7,
            timeout: 10,
            ..QpAttr::default()
        };
        for (state, mask) in steps_to_rts(QpType::Rc) {
            let request = modify(QpAttr { state, ..attr }, mask | Mask::STATE);
            assert_eq!(self.ask(p.session, request), Ok(Reply::Done), "{state:?}");
        }
    }

    pub(crate) fn set_rnr_retry(&mut self, p: &Process, qp: Made, rnr_retry: u8) {
        self.set_state(p, qp, QpState::Sqd);
        let qp = qp.handle;
        let attr = QpAttr {
            rnr_retry,
            ..QpAttr::default()
        };
        let mask = Mask::RNR_RETRY;
        let request = Request::ModifyQp { qp, attr, mask };
        assert_eq!(self.ask(p.session, request), Ok(Reply::Done));
    }

    pub(crate) fn connect_own(&mut self, p: &Process, qp: Made, to: (Gid, u32)) {
        let qp = qp.handle;
        self.connect(p, to, |attr, mask| Request::ModifyQp { qp, attr, mask });
    }

    pub(crate) fn set_state(&mut self, p: &Process, qp: Made, state: QpState) {
        let attr = QpAttr {
            state,
            ..QpAttr::default()
        };
        let request = Request::ModifyQp {
            qp: qp.handle,
            attr,
            mask: Mask::STATE,
        };
        assert_eq!(self.ask(p.session, request), Ok(Reply::Done));
    }

    pub(crate) fn mark(&mut self, p: &Process, slot: u32) {
        let map = self.engine.sessions.get(p.session).unwrap().dirty_map();
        if map.unwrap().mark(slot) {
            self.engine.wake(p.session);
        }
    }

    /// What a library does, if the ring has room.
    pub(crate) fn try_post(
        &mut self,
        p: &Process,
        srq: &mut Srq,
        wr_id: u64,
        sges: &[Sge],
    ) -> bool {
        let ring = self.engine.srqs.get(srq.handle).unwrap().ring().unwrap();
        if srq.posted - ring.consumed() == u64::from(srq.max_wr) {
            return false;
        }
        RecvEntry::store(wr_id, sges, ring.slot(srq.posted));
        srq.posted += 1;
        if ring.publish(srq.posted) {
            self.mark(p, srq.slot);
        }
        true
    }

    pub(crate) fn post(&mut self, p: &Process, srq: &mut Srq, wr_id: u64) {
        assert!(self.try_post(p, srq, wr_id, &[]), "the queue is full");
    }

    pub(crate) fn send(
        &mut self,
        p: &Process,
        qp: Made,
        wr_id: u64,
        sges: &[Sge],
        remote_srqn: u32,
    ) {
        let q = self.engine.qps.get(qp.handle).unwrap();
        let (qp_type, rings) = (q.qp_type, q.rings().unwrap());
        let at = rings.send_produced();
        let entry = SendEntry {
            wr_id,
            opcode: Opcode::Send.raw() as u8,
            flags: SendFlags::SIGNALED.bits(),
            num_sge: sges.len() as u16,
            remote_srqn,
            ..SendEntry::default()
        };
        entry.store(qp_type, rings.send_slot(at));
        SendEntry::store_sges(rings.send_slot(at), sges);
        rings.publish_send(at + 1);
        self.mark(p, qp.slot);
    }

    pub(crate) fn round(&mut self) -> Polled {
        self.engine.poll(self.now, &Progress::default())
    }

    /// Polls until there is nothing to do at this time.
    pub(crate) fn settle(&mut self) {
        for _ in 0..100_000 {
            if self.round() != Polled::Busy {
                return;
            }
            self.engine.reap();
        }
        panic!("the engine does not come to rest");
    }

    pub(crate) fn completions(&mut self, cq: &mut Cq) -> Vec<CompletionEntry> {
        let ring = self.engine.cqs.get(cq.handle).unwrap().ring().unwrap();
        let all = (cq.read..ring.produced()).map(|at| ring.read(at)).collect();
        cq.read = ring.produced();
        ring.consume(cq.read);
        all
    }

    pub(crate) fn ids(&mut self, cq: &mut Cq) -> Vec<u64> {
        let all = self.completions(cq);
        let good = |c: &CompletionEntry| u32::from(c.status) == WcStatus::Success.raw();
        assert!(all.iter().all(good), "{all:?}");
        all.iter().map(|c| c.wr_id).collect()
    }

    pub(crate) fn reg(&mut self, p: &Process, len: u64) -> Key {
        let Ok(Reply::Pages {
            segment, offset, ..
        }) = self.ask(p.session, Request::AllocPages { len })
        else {
            panic!("no pages");
        };
        let kind = PieceKind::Pool { segment, offset };
        let request = RegMr {
            pd: p.pd,
            translation: Translation {
                iova: 0,
                len,
                pieces: vec![PieceDesc { len, kind }],
            },
            access: Access::LOCAL_WRITE,
        };
        match self.ask(p.session, Request::RegMr(request)) {
            Ok(Reply::Mr(made)) => made.key,
            other => panic!("{other:?}"),
        }
    }
}

impl Process {
    pub(crate) fn events(&self) -> Vec<Event> {
        let mut all = Vec::new();
        let mut bytes = [0; Event::BYTES];
        let fd = &*self.events;
        while let Ok((_, n)) = rustix::net::recv(fd, &mut bytes[..], RecvFlags::DONTWAIT)
            && n != 0
        {
            all.push(Event::decode(&bytes[..n]).unwrap());
        }
        all
    }
}
