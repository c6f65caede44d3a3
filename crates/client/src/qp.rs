//! Queue pairs: posting.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use freeflow_session::{CreateQp, Handle, Reply, Request, XrcQpOpened};
use freeflow_shm::{Bind, QpGeometry, QpRings, RecvEntry, Region, SendEntry, Sge};
use freeflow_types::{
    AddressVector, Gid, Opcode, QpAttr, QpAttrMask, QpCap, QpState, QpType, SendFlags, WcOpcode,
};
use rustix::io::Errno;

use crate::acks::Acks;
use crate::context::Pd;
use crate::cq::{Cq, FLUSHED_RECV, load};
use crate::session::{Retired, Session, unpoisoned};
use crate::srq::Srq;

/// What a queue pair is to be (`struct ibv_qp_init_attr`).
#[derive(Clone, Copy, Debug)]
pub struct QpInit<'a> {
    /// Transport service.
    pub qp_type: QpType,
    /// Where send requests complete.
    pub send_cq: &'a Arc<Cq>,
    /// Where receive requests complete; [`QpType::XrcSend`] has none.
    pub recv_cq: Option<&'a Arc<Cq>>,
    /// Where receive requests come from, if not from a queue of its own.
    pub srq: Option<&'a Arc<Srq>>,
    /// Capacities asked for.
    pub cap: QpCap,
    /// Every send request is signaled.
    pub sq_sig_all: bool,
}

/// Where a datagram goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct UdTarget {
    /// Address.
    pub av: AddressVector,
    /// Queue pair number.
    pub qpn: u32,
    /// Q_Key.
    pub qkey: u32,
}

/// A send work request without its data (`struct ibv_send_wr`).
#[derive(Clone, Copy, Debug)]
pub struct SendWr {
    /// The program's own number.
    pub wr_id: u64,
    /// Operation.
    pub opcode: Opcode,
    /// Flags.
    pub flags: SendFlags,
    /// Immediate data, big endian as the program gives it; or the key to invalidate.
    pub imm: u32,
    /// Remote address.
    pub remote_addr: u64,
    /// Remote key.
    pub rkey: u32,
    /// Atomics: compare or add operand. Flush: bytes.
    pub compare_add: u64,
    /// Atomics: swap operand. Flush: [`freeflow_types::FlushSpec`].
    pub swap: u64,
    /// Datagrams: destination.
    pub ud: UdTarget,
    /// XRC: number of the shared receive queue that is meant.
    pub remote_srqn: u32,
}

impl SendWr {
    /// A request that binds a memory window.
    pub fn bind(wr_id: u64, flags: SendFlags, bind: &Bind) -> Self {
        let entry = SendEntry::from_bind(bind);
        SendWr {
            wr_id,
            opcode: Opcode::BindMw,
            flags,
            imm: entry.imm,
            rkey: entry.rkey,
            remote_addr: entry.remote_addr,
            compare_add: entry.compare_add,
            swap: entry.swap,
            ..SendWr::default()
        }
    }
}

impl Default for SendWr {
    fn default() -> Self {
        SendWr {
            wr_id: 0,
            opcode: Opcode::Send,
            flags: SendFlags::empty(),
            imm: 0,
            remote_addr: 0,
            rkey: 0,
            compare_add: 0,
            swap: 0,
            ud: UdTarget::default(),
            remote_srqn: 0,
        }
    }
}

/// What the router has of a queue pair.
#[derive(Debug)]
enum Own {
    /// All of it.
    Queues(Box<Queues>),
    /// An opening of an XRC receive queue pair, which has no queues.
    Opening(Handle),
}

#[derive(Debug)]
struct Queues {
    handle: Handle,
    slot: u32,
    send_cq: Arc<Cq>,
    recv_cq: Option<Arc<Cq>>,
    srq: Option<Arc<Srq>>,
    region: Region,
    geometry: QpGeometry,
}

impl Queues {
    fn purge(&self, qpn: u32) {
        self.send_cq.purge(self.slot, qpn);
        if let Some(recv_cq) = &self.recv_cq
            && !Arc::ptr_eq(&self.send_cq, recv_cq)
        {
            recv_cq.purge(self.slot, qpn);
        }
    }

    fn rings(&self) -> Result<QpRings<'_>, Errno> {
        QpRings::new(self.region.words(), self.geometry).ok_or(Errno::IO)
    }
}

/// Queue pair.
#[derive(Debug)]
pub struct Qp {
    session: Arc<Session>,
    own: Own,
    qpn: u32,
    qp_type: QpType,
    cap: QpCap,
    /// `enum ibv_qp_state`, as the program last set or saw it.
    state: AtomicU32,
    /// Index behind the last request published.
    send: Mutex<u64>,
    recv: Mutex<u64>,
    retired: Arc<Retired>,
    pub(crate) user: usize,
    pub(crate) asynchronous: Acks,
}

impl Pd {
    /// Creates a queue pair. `user` is what events name it by.
    pub fn create_qp(self: &Arc<Self>, init: &QpInit<'_>, user: usize) -> Result<Arc<Qp>, Errno> {
        let session = &self.context.session;
        let mut cap = init.cap;
        if init.srq.is_some() || init.recv_cq.is_none() {
            (cap.max_recv_wr, cap.max_recv_sge) = (0, 0);
        }
        let request = Request::CreateQp(CreateQp {
            pd: self.handle,
            qp_type: init.qp_type,
            send_cq: init.send_cq.handle,
            recv_cq: init.recv_cq.map(|cq| cq.handle),
            srq: init.srq.map(|srq| srq.handle),
            cap,
            sq_sig_all: init.sq_sig_all,
        });
        let (Reply::Qp(made), Some(region)) = session.call_for_ring(&request)? else {
            return Err(Errno::PROTO);
        };
        let geometry = QpGeometry::new(
            cap.max_send_wr,
            cap.max_recv_wr,
            cap.max_send_sge.max(1),
            cap.max_recv_sge,
            cap.max_inline,
        );
        QpRings::new(region.words(), geometry).ok_or(Errno::PROTO)?;
        let retired = Arc::new(Retired {
            qpn: made.qpn.get(),
            ..Retired::default()
        });
        session.set_retired(made.slot, Some(retired.clone()));
        let queues = Queues {
            handle: made.qp,
            slot: made.slot,
            send_cq: init.send_cq.clone(),
            recv_cq: init.recv_cq.cloned(),
            srq: init.srq.cloned(),
            region,
            geometry,
        };
        let qp = Arc::new(Qp {
            session: session.clone(),
            own: Own::Queues(Box::new(queues)),
            qpn: made.qpn.get(),
            qp_type: init.qp_type,
            cap: made.cap,
            state: AtomicU32::new(QpState::Reset.raw()),
            send: Mutex::new(0),
            recv: Mutex::new(0),
            retired,
            user,
            asynchronous: Acks::default(),
        });
        if let (Some(_), Some(recv_cq)) = (init.srq, init.recv_cq) {
            recv_cq.set_shared();
        }
        unpoisoned(&session.qps).insert(made.qp.0, Arc::downgrade(&qp));
        init.send_cq.attach(&qp);
        if let Some(recv_cq) = init.recv_cq
            && !Arc::ptr_eq(init.send_cq, recv_cq)
        {
            recv_cq.attach(&qp);
        }
        Ok(qp)
    }
}

impl Qp {
    /// An XRC receive queue pair that this process has opened.
    pub(crate) fn receiver(session: &Arc<Session>, made: &XrcQpOpened, user: usize) -> Arc<Qp> {
        let qp = Arc::new(Qp {
            session: session.clone(),
            own: Own::Opening(made.open),
            qpn: made.qpn.get(),
            qp_type: QpType::XrcRecv,
            cap: QpCap::default(),
            state: AtomicU32::new(QpState::Reset.raw()),
            send: Mutex::new(0),
            recv: Mutex::new(0),
            retired: Arc::default(),
            user,
            asynchronous: Acks::default(),
        });
        unpoisoned(&session.xrc_qps).insert(made.open.0, Arc::downgrade(&qp));
        qp
    }

    /// Its number.
    pub fn qpn(&self) -> u32 {
        self.qpn
    }

    /// Its capacities.
    pub fn cap(&self) -> QpCap {
        self.cap
    }

    /// Its transport service.
    pub fn qp_type(&self) -> QpType {
        self.qp_type
    }

    /// Its state, as last set or queried by the program.
    pub fn state(&self) -> QpState {
        // Relaxed: the router's state is the one that counts.
        QpState::from_raw(self.state.load(Ordering::Relaxed)).unwrap_or(QpState::Err)
    }

    fn set_state(&self, state: QpState) {
        self.state.store(state.raw(), Ordering::Relaxed);
    }

    /// Its queues. EINVAL: it has none.
    fn queues(&self) -> Result<&Queues, Errno> {
        match &self.own {
            Own::Queues(queues) => Ok(queues),
            Own::Opening(_) => Err(Errno::INVAL),
        }
    }

    /// Modifies attributes (`ibv_modify_qp(3)`).
    pub fn modify(&self, attr: &QpAttr, mask: QpAttrMask) -> Result<(), Errno> {
        let attr = *attr;
        self.session.tell(&match &self.own {
            Own::Queues(own) => Request::ModifyQp {
                qp: own.handle,
                attr,
                mask,
            },
            &Own::Opening(open) => Request::ModifyXrcQp { open, attr, mask },
        })?;
        if !mask.contains(QpAttrMask::STATE) {
            return Ok(());
        }
        if attr.state == QpState::Reset {
            // What was posted is forgotten, and so are its completions.
            let (send, recv) = (unpoisoned(&self.send), unpoisoned(&self.recv));
            // Release: as a completion's.
            self.retired.send.store(*send, Ordering::Release);
            self.retired.recv.store(*recv, Ordering::Release);
            if let Ok(queues) = self.queues() {
                queues.purge(self.qpn);
            }
        }
        self.set_state(attr.state);
        Ok(())
    }

    /// The router's name for it; none of an opening, which has another kind of name.
    pub(crate) fn handle(&self) -> Option<Handle> {
        Some(self.queues().ok()?.handle)
    }

    /// The router was asked for something that brings it to a state: after a refusal, how far it got.
    pub(crate) fn follow(&self, to: QpState, told: Result<(), Errno>) -> Result<(), Errno> {
        match told {
            Ok(()) => self.set_state(to),
            Err(_) => drop(self.query()),
        }
        told
    }

    /// All attributes as they are (`ibv_query_qp(3)`).
    pub fn query(&self) -> Result<QpAttr, Errno> {
        let request = match &self.own {
            Own::Queues(own) => Request::QueryQp { qp: own.handle },
            &Own::Opening(open) => Request::QueryXrcQp { open },
        };
        let (Reply::QpQueried(now), _) = self.session.call(&request)? else {
            return Err(Errno::PROTO);
        };
        self.set_state(now.attr.state);
        Ok(now.attr)
    }

    /// Attaches it to a multicast group, or detaches it (`ibv_attach_mcast(3)`).
    pub fn multicast(&self, gid: Gid, attach: bool) -> Result<(), Errno> {
        let qp = self.queues()?.handle;
        self.session.tell(&Request::Multicast { qp, gid, attach })
    }

    /// Destroys it, when all its events are acknowledged.
    pub fn destroy(&self) -> Result<(), Errno> {
        match &self.own {
            Own::Queues(queues) => self.destroy_queues(queues)?,
            &Own::Opening(open) => {
                self.session.destroy(&Request::CloseXrcQp { open })?;
                unpoisoned(&self.session.xrc_qps).remove(&open.0);
            }
        }
        self.asynchronous.wait();
        Ok(())
    }

    fn destroy_queues(&self, own: &Queues) -> Result<(), Errno> {
        // Before the router gives the slot to another.
        let mine = Arc::downgrade(&self.retired);
        self.session
            .destroy(&Request::DestroyQp { qp: own.handle })?;
        own.purge(self.qpn);
        {
            let mut all = self
                .session
                .retired
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(slot) = all.get_mut(own.slot as usize)
                && slot
                    .as_ref()
                    .is_some_and(|r| std::ptr::eq(Arc::as_ptr(r), mine.as_ptr()))
            {
                *slot = None;
            }
        }
        unpoisoned(&self.session.qps).remove(&own.handle.0);
        Ok(())
    }

    /// Acknowledges asynchronous events.
    pub fn ack_async(&self, n: u32) {
        self.asynchronous.acknowledge(n);
    }

    /// Locks the send queue to post.
    pub fn lock_send(&self) -> SendQueue<'_> {
        let published = unpoisoned(&self.send);
        SendQueue {
            qp: self,
            next: *published,
            published,
        }
    }

    /// Locks the receive queue to post.
    pub fn lock_recv(&self) -> RecvQueue<'_> {
        let published = unpoisoned(&self.recv);
        RecvQueue {
            qp: self,
            next: *published,
            published,
        }
    }

    /// The router is gone: takes the oldest request that would have completed in `cq`.
    pub(crate) fn flush_one(&self, cq: &Cq) -> Option<(u64, WcOpcode)> {
        let queues = self.queues().ok()?;
        let rings = queues.rings().ok()?;
        if std::ptr::eq(cq, &*queues.send_cq) {
            let send = unpoisoned(&self.send);
            let at = load(&self.retired.send);
            if at != *send {
                let entry = SendEntry::load(self.qp_type, rings.send_slot(at));
                // Release: as a completion's.
                self.retired.send.store(at + 1, Ordering::Release);
                let opcode = Opcode::from_raw(entry.opcode.into()).unwrap_or(Opcode::Send);
                return Some((entry.wr_id, opcode.wc()));
            }
        }
        let recv_cq = queues.recv_cq.as_ref()?;
        if queues.srq.is_none() && std::ptr::eq(cq, &**recv_cq) {
            let recv = unpoisoned(&self.recv);
            let at = load(&self.retired.recv);
            if at != *recv {
                let mut sges = Vec::new();
                let entry = RecvEntry::load(rings.recv_slot(at), &mut sges);
                self.retired.recv.store(at + 1, Ordering::Release);
                return Some((entry.wr_id, FLUSHED_RECV));
            }
        }
        None
    }
}

/// A send queue, locked: requests are pushed, then published together.
#[derive(Debug)]
pub struct SendQueue<'a> {
    qp: &'a Qp,
    next: u64,
    published: MutexGuard<'a, u64>,
}

impl SendQueue<'_> {
    /// Adds a request. EINVAL: the queue pair's state, type or capacities forbid it; ENOMEM: the
    /// queue is full.
    ///
    /// # Safety
    ///
    /// With [`SendFlags::INLINE`], every element points at memory of this process that may be
    /// read.
    pub unsafe fn push(&mut self, wr: &SendWr, sges: &[Sge]) -> Result<(), Errno> {
        let qp = self.qp;
        let state = qp.state();
        if matches!(state, QpState::Reset | QpState::Init | QpState::Rtr)
            || !wr.opcode.allowed_on(qp.qp_type)
        {
            return Err(Errno::INVAL);
        }
        let inline = wr.flags.contains(SendFlags::INLINE);
        let total: u64 = sges.iter().map(|s| u64::from(s.length)).sum();
        let fits = if inline {
            total <= qp.cap.max_inline.into() && !wr.opcode.is_read_like()
        } else {
            sges.len() <= qp.cap.max_send_sge as usize
        };
        let one = sges.len() == 1 || (inline && !wr.opcode.is_atomic());
        let word = !wr.opcode.is_word() || (one && total == 8);
        let bare = wr.opcode.is_local() || wr.opcode == Opcode::Flush;
        let length = if wr.opcode == Opcode::Flush {
            wr.compare_add
        } else {
            total
        };
        if !fits || !word || (bare && !sges.is_empty()) || length > freeflow_types::MAX_MESSAGE {
            return Err(Errno::INVAL);
        }
        if self.next - load(&qp.retired.send) >= qp.cap.max_send_wr.into() {
            return Err(Errno::NOMEM);
        }
        let rings = qp.queues()?.rings()?;
        let slot = rings.send_slot(self.next);
        let entry = SendEntry {
            wr_id: wr.wr_id,
            opcode: wr.opcode.raw() as u8,
            flags: wr.flags.bits(),
            num_sge: if inline { 0 } else { sges.len() as u16 },
            inline_len: if inline { total as u32 } else { 0 },
            imm: wr.imm,
            rkey: wr.rkey,
            remote_addr: wr.remote_addr,
            compare_add: wr.compare_add,
            swap: wr.swap,
            av: wr.ud.av,
            remote_qpn: wr.ud.qpn,
            remote_qkey: wr.ud.qkey,
            remote_srqn: wr.remote_srqn,
        };
        entry.store(qp.qp_type, slot);
        if inline {
            let mut at = 0;
            for sge in sges.iter().filter(|s| s.length != 0) {
                let len = sge.length as usize;
                // SAFETY: the caller promises that the element may be read; the slice lives for
                // this copy only, and no peer can write the program's private memory.
                let bytes = unsafe { std::slice::from_raw_parts(sge.addr as *const u8, len) };
                if !SendEntry::store_inline(slot, at, bytes) {
                    return Err(Errno::INVAL);
                }
                at += len;
            }
        } else {
            SendEntry::store_sges(slot, sges);
        }
        self.next += 1;
        Ok(())
    }

    /// Publishes what was pushed, and wakes the router if it sleeps.
    pub fn commit(mut self) {
        if *self.published != self.next {
            *self.published = self.next;
            if let Ok(queues) = self.qp.queues()
                && let Ok(rings) = queues.rings()
            {
                rings.publish_send(self.next);
                self.qp.session.mark(queues.slot);
            }
        }
    }
}

/// A receive queue, locked: requests are pushed, then published together.
#[derive(Debug)]
pub struct RecvQueue<'a> {
    qp: &'a Qp,
    next: u64,
    published: MutexGuard<'a, u64>,
}

impl RecvQueue<'_> {
    /// Adds a request. EINVAL: the queue pair is in RESET or has no receive queue of its own, or
    /// there are too many elements; ENOMEM: the queue is full.
    pub fn push(&mut self, wr_id: u64, sges: &[Sge]) -> Result<(), Errno> {
        let qp = self.qp;
        let queues = qp.queues()?;
        let has_ring = queues.srq.is_none() && queues.recv_cq.is_some();
        let fits = sges.len() <= qp.cap.max_recv_sge as usize;
        if !has_ring || !fits || qp.state() == QpState::Reset {
            return Err(Errno::INVAL);
        }
        if self.next - load(&qp.retired.recv) >= qp.cap.max_recv_wr.into() {
            return Err(Errno::NOMEM);
        }
        RecvEntry::store(wr_id, sges, queues.rings()?.recv_slot(self.next));
        self.next += 1;
        Ok(())
    }

    /// Publishes what was pushed.
    pub fn commit(mut self) {
        if *self.published != self.next {
            *self.published = self.next;
            if let Ok(queues) = self.qp.queues()
                && let Ok(rings) = queues.rings()
                && rings.publish_recv(self.next)
            {
                self.qp.session.mark(queues.slot);
            }
        }
    }
}
