//! The queue pair of a datagram socket at one of its addresses.

use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freeflow_client::{
    Access, AddressVector, Buf, CmChannel, CmEventType, CmPort, CompChannel, Completion, Cq, Errno,
    Mr, Opcode, PortSpace, Qp, QpAttr, QpAttrMask, QpCap, QpInit, QpState, QpType, SendFlags,
    SendWr, Sge, UdTarget, WcStatus,
};
use freeflow_rsocket::DatagramHeader;

use super::device::Shared;
use super::link::{set_nonblocking, take_events};
use super::memory::Vectors;
use super::table::Beside;
use super::wait;

/// Bytes of a datagram with its header.
pub(super) const MAX_DATAGRAM: usize = 2048;

/// In front of a datagram that was received.
const GRH: usize = 40;

/// Of a receive request's part of the buffer.
const RECEIVE_BYTES: usize = MAX_DATAGRAM + 64;

/// `RDMA_UDP_QKEY`.
const QKEY: u32 = 0x0123_4567;

/// Marks the number of a receive request.
const RECEIVE: u64 = 1 << 63;

/// A peer's queue pair.
#[derive(Clone, Copy)]
pub(super) struct Remote {
    pub(super) av: AddressVector,
    pub(super) qpn: u32,
}

/// A queue pair, and its buffers.
pub(super) struct Path {
    /// Where its datagrams come from.
    pub(super) local: SocketAddr,
    header: Vec<u8>,
    pages: Buf,
    mr: Mr,
    _beside: Beside,
    events: Arc<CompChannel>,
    cq: Arc<Cq>,
    qp: Arc<Qp>,
    receives: usize,
    /// Parts of the send buffer that are free.
    free: Vec<usize>,
    armed: bool,
}

/// A datagram that has arrived: which part of the buffer it is in, and its bytes.
pub(super) struct Arrived {
    pub(super) slot: usize,
    pub(super) len: usize,
}

impl Path {
    pub(super) fn new(
        shared: &Shared,
        local: SocketAddr,
        (sends, receives): (usize, usize),
        inline: u32,
    ) -> Result<Self, Errno> {
        let events = shared.context.create_channel()?;
        let entries = (sends + receives) as u32;
        let cq = set_nonblocking(events.fd())
            .and_then(|()| shared.context.create_cq(entries, Some(&events), 0, 0));
        let undo = || {
            // As in `destroy`.
            let _ = events.destroy();
        };
        let cq = cq.inspect_err(|_| undo())?;
        let init = QpInit {
            qp_type: QpType::Ud,
            send_cq: &cq,
            recv_cq: Some(&cq),
            srq: None,
            cap: QpCap {
                max_send_wr: sends as u32,
                max_recv_wr: receives as u32,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline: inline.min(shared.context.info().limits.max_inline),
            },
            sq_sig_all: true,
        };
        let undo = || {
            let _ = cq.destroy();
            undo();
        };
        let qp = shared.pd.create_qp(&init, 0).inspect_err(|_| undo())?;
        let undo = || {
            let _ = qp.destroy();
            undo();
        };
        let size = (receives * RECEIVE_BYTES + sends * MAX_DATAGRAM) as u64;
        let pages = shared.pd.alloc_buf(size).inspect_err(|_| undo())?;
        let mr = shared
            .pd
            .reg_mr(pages.addr(), size, pages.addr(), Access::LOCAL_WRITE)
            .inspect_err(|_| {
                undo();
                pages.free();
            })?;
        let mut header = Vec::new();
        DatagramHeader(local).write(&mut header);
        let path = Path {
            local,
            header,
            pages,
            mr,
            _beside: Beside::new(events.fd()),
            events,
            cq: cq.clone(),
            qp: qp.clone(),
            receives,
            free: (0..sends).collect(),
            armed: false,
        };
        match path.start() {
            Ok(()) => Ok(path),
            Err(errno) => {
                path.destroy();
                Err(errno)
            }
        }
    }

    fn start(&self) -> Result<(), Errno> {
        let attr = QpAttr {
            state: QpState::Init,
            port_num: 1,
            qkey: QKEY,
            ..QpAttr::default()
        };
        let mask = QpAttrMask::STATE | QpAttrMask::PKEY_INDEX | QpAttrMask::PORT | QpAttrMask::QKEY;
        self.qp.modify(&attr, mask)?;
        let state = |state| QpAttr { state, ..attr };
        self.qp.modify(&state(QpState::Rtr), QpAttrMask::STATE)?;
        let mask = QpAttrMask::STATE | QpAttrMask::SQ_PSN;
        self.qp.modify(&state(QpState::Rts), mask)?;
        (0..self.receives).try_for_each(|slot| self.receive(slot))
    }

    pub(super) fn qpn(&self) -> u32 {
        self.qp.qpn()
    }

    /// Makes a part of the buffer ready for the next datagram.
    pub(super) fn receive(&self, slot: usize) -> Result<(), Errno> {
        let sge = Sge {
            addr: self.pages.addr() + (slot * RECEIVE_BYTES) as u64,
            length: (GRH + MAX_DATAGRAM) as u32,
            lkey: self.mr.key().0,
        };
        let mut queue = self.qp.lock_recv();
        queue.push(RECEIVE | slot as u64, &[sge])?;
        queue.commit();
        Ok(())
    }

    /// A copy of what has arrived.
    pub(super) fn bytes(&self, arrived: &Arrived) -> Vec<u8> {
        assert!(arrived.slot < self.receives && arrived.len <= MAX_DATAGRAM);
        let at = self.pages.addr() as usize + arrived.slot * RECEIVE_BYTES + GRH;
        let mut bytes = vec![0; arrived.len];
        // SAFETY: the part is inside the buffer, and no receive request is posted for it.
        unsafe { std::ptr::copy_nonoverlapping(at as *const u8, bytes.as_mut_ptr(), arrived.len) };
        bytes
    }

    /// Whether a datagram can be sent.
    pub(super) fn can_send(&self) -> bool {
        !self.free.is_empty()
    }

    /// Sends a datagram, if [`Self::can_send`]. EMSGSIZE: it is too long.
    pub(super) fn send(&mut self, to: &Remote, from: &mut Vectors<'_>) -> Result<usize, Errno> {
        let len = from.left();
        if self.header.len() + len > MAX_DATAGRAM {
            return Err(Errno::MSGSIZE);
        }
        let slot = self.free.pop().ok_or(Errno::AGAIN)?;
        let offset = self.receives * RECEIVE_BYTES + slot * MAX_DATAGRAM;
        let addr = self.pages.addr() + offset as u64;
        let start = addr as *mut u8;
        let header = self.header.len();
        // SAFETY: the part is inside the buffer and long enough for the header and the datagram; no
        // request that is not complete is in it. The vectors are memory of the program's that may
        // be read.
        unsafe {
            std::ptr::copy_nonoverlapping(self.header.as_ptr(), start, header);
            from.each(len, |from, part| {
                let to = start.add(header + part.offset as usize);
                std::ptr::copy_nonoverlapping(from, to, part.length as usize);
            });
        }
        let sge = Sge {
            addr,
            length: (header + len) as u32,
            lkey: self.mr.key().0,
        };
        let wr = SendWr {
            wr_id: slot as u64,
            opcode: Opcode::Send,
            flags: if sge.length <= self.qp.cap().max_inline {
                SendFlags::INLINE
            } else {
                SendFlags::empty()
            },
            ud: UdTarget {
                av: to.av,
                qpn: to.qpn,
                qkey: QKEY,
            },
            ..SendWr::default()
        };
        let mut queue = self.qp.lock_send();
        // SAFETY: the element lies in the buffer.
        if let Err(errno) = unsafe { queue.push(&wr, &[sge]) } {
            self.free.push(slot);
            return Err(errno);
        }
        queue.commit();
        Ok(len)
    }

    /// Takes completions; what has arrived.
    pub(super) fn poll(&mut self, arrived: &mut Vec<Arrived>) -> Result<bool, Errno> {
        let mut some = false;
        let mut completions = [Completion::default(); 16];
        loop {
            let n = self.cq.poll(&mut completions)?;
            for completion in &completions[..n] {
                let slot = (completion.wr_id & !RECEIVE) as usize;
                if completion.wr_id & RECEIVE == 0 {
                    self.free.push(slot);
                } else if completion.status == WcStatus::Success.raw() {
                    let len = (completion.byte_len as usize).saturating_sub(GRH);
                    arrived.push(Arrived {
                        slot,
                        len: len.min(MAX_DATAGRAM),
                    });
                }
            }
            if n == 0 {
                return Ok(some);
            }
            some = true;
        }
    }

    /// Has the next completion raise an event; false: that was so already.
    pub(super) fn arm(&mut self) -> bool {
        // If it fails, the router is gone, and the channel tells.
        !std::mem::replace(&mut self.armed, true) && self.cq.req_notify(false).is_ok()
    }

    pub(super) fn fd(&self) -> RawFd {
        self.events.fd()
    }

    /// Takes the events that there are; whether there were any. EIO: the router is gone.
    pub(super) fn take_events(&mut self) -> Result<bool, Errno> {
        take_events(&self.events, &self.cq, &mut self.armed)
    }

    /// Whether all was sent.
    pub(super) fn is_flushed(&self, sends: usize) -> bool {
        self.free.len() == sends
    }

    pub(super) fn destroy(&self) {
        // A router that is gone has nothing of it any more.
        let _ = self.qp.destroy();
        let _ = self.cq.destroy();
        let _ = self.events.destroy();
        let _ = self.mr.dereg();
        self.pages.free();
    }
}

/// Finds the way from an address to another, for a queue pair that is known, in at most that time.
pub(super) fn resolve(
    from: SocketAddr,
    to: SocketAddr,
    qpn: u32,
    time: Duration,
) -> Result<Remote, Errno> {
    let channel = CmChannel::create()?;
    let found = find(&channel, from, to, time);
    // A router that is gone has it no more.
    let _ = channel.destroy();
    let port = found?;
    let av = AddressVector {
        dgid: port.dgid.ok_or(Errno::HOSTUNREACH)?,
        sgid_index: port.sgid_index,
        hop_limit: 64,
        traffic_class: port.tos,
        is_global: true,
        port_num: 1,
        ..AddressVector::default()
    };
    Ok(Remote { av, qpn })
}

fn find(
    channel: &Arc<CmChannel>,
    mut from: SocketAddr,
    to: SocketAddr,
    time: Duration,
) -> Result<CmPort, Errno> {
    set_nonblocking(channel.fd())?;
    let _beside = Beside::new(channel.fd());
    let id = channel.create_id(PortSpace::Udp, QpType::Ud, 0)?;
    // The port is the socket's.
    from.set_port(0);
    let resolved = id
        .resolve_addr(Some(from), to, time.as_millis() as u32)
        .and_then(|()| answer(channel, time));
    let _ = id.destroy();
    resolved
}

fn answer(channel: &Arc<CmChannel>, time: Duration) -> Result<CmPort, Errno> {
    let deadline = Instant::now() + time;
    loop {
        match channel.get_event(|_, _| 0) {
            Ok(report) => {
                report.acknowledge();
                let event = &report.event;
                return match (event.event, event.info.port) {
                    (CmEventType::AddrResolved, Some(port)) => Ok(port),
                    _ => Err(Errno::HOSTUNREACH),
                };
            }
            Err(Errno::AGAIN) => {
                let left = wait::until(Some(deadline)).map_err(|_| Errno::TIMEDOUT)?;
                match wait::poll(&mut [wait::input(channel.fd())], left) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno),
                }
            }
            Err(errno) => return Err(errno),
        }
    }
}
