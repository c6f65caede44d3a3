//! A stream's queue pair, and how its requests are posted and polled.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use freeflow_client::{
    CmId, CmParam, CmQp, CmUp, CompChannel, Completion, Cq, Errno, Opcode, Qp, QpAttr, QpAttrMask,
    QpCap, QpInit, QpState, QpType, Qpn, SendFlags, SendWr, Sge, WcStatus,
};
use freeflow_rsocket::{Config, Place, Post, Stream, Write};

use super::device::Shared;
use super::io::Mapped;
use super::memory::{Memory, Vectors};
use super::table::Beside;
use super::wait::now;

/// Completions that are taken at once.
const BATCH: usize = 16;

/// Marks the number of a receive request.
const RECEIVE: u64 = 1 << 63;

/// A stream and what carries it.
pub(super) struct Link {
    pub(super) stream: Stream,
    memory: Memory,
    _beside: Beside,
    events: Arc<CompChannel>,
    cq: Arc<Cq>,
    qp: Arc<Qp>,
    /// An event will come with the next completion.
    armed: bool,
    /// What the program has mapped.
    pub(super) mapped: Vec<Mapped>,
}

/// Makes a descriptor non-blocking.
pub(super) fn set_nonblocking(fd: RawFd) -> Result<(), Errno> {
    // SAFETY: the caller's descriptor is open.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = rustix::fs::fcntl_getfl(fd)?;
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
}

/// Takes the events of a completion queue, which is not armed then; whether there were any. EIO: the
/// router is gone.
pub(super) fn take_events(events: &CompChannel, cq: &Cq, armed: &mut bool) -> Result<bool, Errno> {
    let mut some = false;
    loop {
        match events.get_event() {
            Ok(_) => {
                cq.ack_events(1);
                *armed = false;
                some = true;
            }
            Err(Errno::AGAIN | Errno::INTR) => return Ok(some),
            Err(errno) => return Err(errno),
        }
    }
}

impl Link {
    /// Makes the queue pair of an id, ready to receive the peer's first message when it is
    /// connected.
    pub(super) fn new(shared: &Shared, id: &CmId, config: Config) -> Result<Self, Errno> {
        let limits = &shared.context.info().limits;
        let config = config.settle(limits.max_qp_wr, limits.max_inline);
        let events = shared.context.create_channel()?;
        let made = Self::with_events(shared, id, config, events.clone());
        if made.is_err() {
            // Of a router that is gone.
            let _ = events.destroy();
        }
        made
    }

    fn with_events(
        shared: &Shared,
        id: &CmId,
        config: Config,
        events: Arc<CompChannel>,
    ) -> Result<Self, Errno> {
        set_nonblocking(events.fd())?;
        let requests = u32::from(config.send_requests) + u32::from(config.recv_requests);
        let cq = shared.context.create_cq(requests, Some(&events), 0, 0)?;
        let undo = |errno, qp: Option<&Qp>| {
            // As above.
            let _ = (qp.map(Qp::destroy), cq.destroy());
            errno
        };
        let init = QpInit {
            qp_type: QpType::Rc,
            send_cq: &cq,
            recv_cq: Some(&cq),
            srq: None,
            cap: QpCap {
                max_send_wr: config.send_requests.into(),
                max_recv_wr: config.recv_requests.into(),
                max_send_sge: 2,
                max_recv_sge: 1,
                max_inline: config.inline,
            },
            sq_sig_all: true,
        };
        let qp = shared.pd.create_qp(&init, 0).map_err(|e| undo(e, None))?;
        let memory = Memory::new(&shared.pd, &config).map_err(|e| undo(e, Some(&qp)))?;
        let link = Link {
            stream: Stream::new(config, memory.local()),
            memory,
            _beside: Beside::new(events.fd()),
            events,
            cq: cq.clone(),
            qp,
            armed: false,
            mapped: Vec::new(),
        };
        let ready = id
            .bring_up(&CmUp::new(&link.qp, QpState::Init))
            .and_then(|()| link.receive(config.recv_requests.into()));
        if let Err(errno) = ready {
            link.memory.free();
            return Err(undo(errno, Some(&link.qp)));
        }
        Ok(link)
    }

    /// Makes the queue pair one with the peer's, who is known by now.
    pub(super) fn begin(&self, id: &CmId) -> Result<(), Errno> {
        id.bring_up(&CmUp::new(&self.qp, QpState::Rts))
    }

    /// The peer is gone: what is under way ends.
    pub(super) fn flush(&mut self) {
        let attr = QpAttr {
            state: QpState::Err,
            ..QpAttr::default()
        };
        // If it fails, the router is gone, and polling flushes.
        let _ = self.qp.modify(&attr, QpAttrMask::STATE);
    }

    /// What to connect with.
    pub(super) fn param(&self) -> CmParam {
        CmParam {
            qp: CmQp {
                qpn: Qpn::new(self.qp.qpn()),
                qp_type: QpType::Rc,
                srq: false,
            },
            private_data: self.stream.conn_data().to_bytes().to_vec(),
            responder_resources: 0,
            initiator_depth: 0,
            flow_control: true,
            retry_count: 7,
            rnr_retry_count: 7,
            qkey: None,
            ece: None,
        }
    }

    fn receive(&self, requests: u32) -> Result<(), Errno> {
        let mut queue = self.qp.lock_recv();
        for _ in 0..requests {
            queue.push(RECEIVE, &[])?;
        }
        queue.commit();
        Ok(())
    }

    /// # Safety
    ///
    /// With [`SendFlags::INLINE`], as for `SendQueue::push`.
    unsafe fn write(
        &self,
        (addr, key): (u64, u32),
        imm: Option<u32>,
        flags: SendFlags,
        sges: &[Sge],
    ) -> Result<(), Errno> {
        let wr = SendWr {
            opcode: match imm {
                Some(_) => Opcode::RdmaWriteImm,
                None => Opcode::RdmaWrite,
            },
            flags,
            imm: imm.unwrap_or(0).to_be(),
            remote_addr: addr,
            rkey: key,
            ..SendWr::default()
        };
        let mut queue = self.qp.lock_send();
        // SAFETY: by the caller's promise.
        unsafe { queue.push(&wr, sges)? };
        queue.commit();
        Ok(())
    }

    fn post(&self, post: &Post) -> Result<(), Errno> {
        let bytes = post.bytes();
        let sge = [Sge {
            addr: bytes.as_ptr() as u64,
            length: bytes.len() as u32,
            lkey: 0,
        }];
        let (flags, sges) = match bytes {
            [] => (SendFlags::empty(), &[][..]),
            _ => (SendFlags::INLINE, &sge[..]),
        };
        // SAFETY: the element is a slice that lives until then.
        unsafe { self.write((post.addr, post.key), post.imm, flags, sges) }
    }

    /// Posts the next bytes of the program's.
    pub(super) fn send(&mut self, write: &Write, from: &mut Vectors<'_>) -> Result<(), Errno> {
        let at = (write.addr, write.key);
        let length = write.length as usize;
        match write.place {
            Place::Inline => {
                let mut sges = Vec::new();
                from.each(length, |addr, part| {
                    sges.push(Sge {
                        addr: addr as u64,
                        length: part.length,
                        lkey: 0,
                    });
                });
                // SAFETY: the vectors are memory of the program's that may be read.
                unsafe { self.write(at, write.imm, SendFlags::INLINE, &sges) }
            }
            Place::Ring(ranges) => {
                for range in ranges {
                    from.each(range.length as usize, |addr, part| {
                        let to = freeflow_rsocket::Range {
                            offset: range.offset + part.offset,
                            length: part.length,
                        };
                        // SAFETY: as above.
                        unsafe { self.memory.fill(to, addr) };
                    });
                }
                let sges = ranges.map(|range| self.memory.sge(range));
                let used = if ranges[1].length == 0 { 1 } else { 2 };
                // SAFETY: nothing is inline.
                unsafe { self.write(at, write.imm, SendFlags::empty(), &sges[..used]) }
            }
        }
    }

    /// Copies bytes that were received to the program; how many.
    pub(super) fn read(&mut self, to: &mut Vectors<'_>) -> usize {
        let mut done = 0;
        for range in self.stream.unread_ranges() {
            let length = to.left().min(range.length as usize);
            to.each(length, |addr, part| {
                let from = freeflow_rsocket::Range {
                    offset: range.offset + part.offset,
                    length: part.length,
                };
                // SAFETY: the vectors are memory of the program's that may be written.
                unsafe { self.memory.drain(from, addr) };
            });
            done += length;
        }
        done
    }

    /// Takes completions, and does what is due; whether there were any.
    pub(super) fn poll(&mut self) -> Result<bool, Errno> {
        let mut some = false;
        let mut completions = [Completion::default(); BATCH];
        loop {
            let n = self.cq.poll(&mut completions)?;
            for completion in &completions[..n] {
                self.take(completion)?;
            }
            self.settle()?;
            if n == 0 {
                return Ok(some);
            }
            some = true;
        }
    }

    fn take(&mut self, completion: &Completion) -> Result<(), Errno> {
        let success = completion.status == WcStatus::Success.raw();
        if completion.wr_id & RECEIVE == 0 {
            self.stream.sent(success);
        } else if success {
            let imm = u32::from_be(completion.imm);
            self.stream.received(imm).map_err(|_| Errno::PROTO)?;
        } else {
            // The queue pair has failed, if the stream has not ended.
            self.stream.fail();
        }
        Ok(())
    }

    /// Does what is due.
    pub(super) fn settle(&mut self) -> Result<(), Errno> {
        let taken = self.stream.taken();
        if taken != 0 {
            self.receive(taken)?;
        }
        while let Some(index) = self.stream.wanted_segment() {
            self.stream.segment(self.memory.take_segment(index));
        }
        while let Some(index) = self.stream.wanted_map() {
            self.stream.map(index, self.memory.map(index));
        }
        while let Some(post) = self.stream.control() {
            self.post(&post)?;
        }
        Ok(())
    }

    /// Has the next completion raise an event; false: that was so already.
    pub(super) fn arm(&mut self) -> Result<bool, Errno> {
        if std::mem::replace(&mut self.armed, true) {
            return Ok(false);
        }
        self.cq.req_notify(false)?;
        Ok(true)
    }

    /// Readable when there is an event.
    pub(super) fn fd(&self) -> RawFd {
        self.events.fd()
    }

    /// Takes the events that there are; whether there were any. EIO: the router is gone.
    pub(super) fn take_events(&mut self) -> Result<bool, Errno> {
        take_events(&self.events, &self.cq, &mut self.armed)
    }

    /// Tells the stream the time.
    pub(super) fn take_time(&mut self) {
        if self.stream.deadline().is_some() {
            self.stream.tick(now());
        }
    }

    /// Ends it.
    pub(super) fn destroy(&self) {
        // A router that is gone has nothing of it any more.
        let _ = self.qp.destroy();
        let _ = self.cq.destroy();
        let _ = self.events.destroy();
        self.mapped.iter().for_each(Mapped::dereg);
        self.memory.free();
    }
}
