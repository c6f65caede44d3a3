//! Completion queues.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use freeflow_session::{CreateCq, Handle, Reply, Request};
use freeflow_shm::{ARM_ANY, ARM_SOLICITED, CompletionEntry, CqRing, Region};
use freeflow_types::{WcOpcode, WcStatus};
use rustix::io::Errno;

use crate::acks::Acks;
use crate::channel::CompChannel;
use crate::context::Context;
use crate::qp::Qp;
use crate::session::{Session, unpoisoned};

/// Empty polls between looks whether the router still lives.
const POLLS_PER_CHECK: u32 = 4096;

/// A completion, with the numbers of `struct ibv_wc`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Completion {
    /// The work request's number.
    pub wr_id: u64,
    /// `enum ibv_wc_status`.
    pub status: u32,
    /// `enum ibv_wc_opcode`.
    pub opcode: u32,
    /// Vendor's error code.
    pub vendor_err: u32,
    /// Bytes received, or read.
    pub byte_len: u32,
    /// Immediate data, bytes as the sender gave them.
    pub imm: u32,
    /// The local QP.
    pub qpn: u32,
    /// Datagrams: the sender's QP.
    pub src_qp: u32,
    /// `enum ibv_wc_flags`.
    pub wc_flags: u32,
    /// Service level.
    pub sl: u8,
    /// Nanoseconds of the router's monotonic clock.
    pub timestamp: u64,
}

impl From<&CompletionEntry> for Completion {
    fn from(entry: &CompletionEntry) -> Self {
        Completion {
            wr_id: entry.wr_id,
            status: entry.status.into(),
            opcode: entry.opcode.into(),
            vendor_err: entry.vendor_err,
            byte_len: entry.byte_len,
            imm: entry.imm,
            qpn: entry.qpn,
            src_qp: entry.src_qp,
            wc_flags: entry.wc_flags.into(),
            sl: entry.sl,
            timestamp: entry.timestamp,
        }
    }
}

#[derive(Debug, Default)]
struct Poller {
    consumed: u64,
    empty: u32,
}

/// Completion queue.
#[derive(Debug)]
pub struct Cq {
    session: Arc<Session>,
    pub(crate) handle: Handle,
    region: Region,
    entries: u32,
    poller: Mutex<Poller>,
    /// Whose requests complete here.
    qps: Mutex<Vec<Weak<Qp>>>,
    pub(crate) user: usize,
    pub(crate) completion: Acks,
    pub(crate) asynchronous: Acks,
    pub(crate) told_of_death: AtomicBool,
}

impl Context {
    /// Creates a completion queue with at least `cqe` entries. `user` is what events name it by.
    pub fn create_cq(
        self: &Arc<Self>,
        cqe: u32,
        channel: Option<&Arc<CompChannel>>,
        comp_vector: u32,
        user: usize,
    ) -> Result<Arc<Cq>, Errno> {
        let session = &self.session;
        let request = Request::CreateCq(CreateCq {
            context: self.handle,
            cqe,
            channel: channel.map(|c| c.handle),
            comp_vector,
        });
        let (Reply::Cq(made), fds) = session.call(&request)? else {
            return Err(Errno::PROTO);
        };
        let region = session.ring(&made.ring, fds)?;
        CqRing::new(region.words(), made.entries).ok_or(Errno::PROTO)?;
        let cq = Arc::new(Cq {
            session: session.clone(),
            handle: made.cq,
            region,
            entries: made.entries,
            poller: Mutex::default(),
            qps: Mutex::default(),
            user,
            completion: Acks::default(),
            asynchronous: Acks::default(),
            told_of_death: AtomicBool::new(false),
        });
        unpoisoned(&session.cqs).insert(made.cq.0, Arc::downgrade(&cq));
        if let Some(channel) = channel {
            channel.attach(&cq);
        }
        Ok(cq)
    }
}

impl Cq {
    /// Entries it holds.
    pub fn capacity(&self) -> u32 {
        self.entries
    }

    fn ring(&self) -> Option<CqRing<'_>> {
        CqRing::new(self.region.words(), self.entries)
    }

    pub(crate) fn attach(&self, qp: &Arc<Qp>) {
        let mut qps = unpoisoned(&self.qps);
        qps.retain(|qp| qp.strong_count() != 0);
        qps.push(Arc::downgrade(qp));
    }

    /// Takes completions; returns how many. An error means that the queue overran and is
    /// unusable (`ibv_poll_cq(3)`).
    pub fn poll(&self, out: &mut [Completion]) -> Result<usize, Errno> {
        let ring = self.ring().ok_or(Errno::IO)?;
        let mut poller = unpoisoned(&self.poller);
        let produced = ring.produced();
        if produced == poller.consumed {
            return self.poll_empty(&ring, poller, out);
        }
        let mut n = 0;
        let mut consumed = poller.consumed;
        {
            let retired = self
                .session
                .retired
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            while n < out.len() && consumed != produced {
                let entry = ring.read(consumed);
                consumed += 1;
                if entry.void {
                    continue;
                }
                Session::retire(&retired, entry.slot, entry.is_send, entry.retired);
                out[n] = Completion::from(&entry);
                n += 1;
            }
        }
        ring.consume(consumed);
        poller.consumed = consumed;
        poller.empty = 0;
        Ok(n)
    }

    fn poll_empty(
        &self,
        ring: &CqRing<'_>,
        mut poller: std::sync::MutexGuard<'_, Poller>,
        out: &mut [Completion],
    ) -> Result<usize, Errno> {
        if ring.overrun() && ring.produced() == poller.consumed {
            return Err(Errno::IO);
        }
        poller.empty = poller.empty.wrapping_add(1);
        let empty = poller.empty;
        let dead = self.session.link.is_dead()
            || (empty.is_multiple_of(POLLS_PER_CHECK) && self.session.link.check());
        if dead && ring.produced() == poller.consumed {
            return Ok(self.flush(out));
        }
        drop(poller);
        // A program that polls must let the router, and the peer, run.
        if empty > self.session.yield_after {
            rustix::thread::sched_yield();
        }
        Ok(0)
    }

    /// The router is gone: completes what is outstanding.
    fn flush(&self, out: &mut [Completion]) -> usize {
        let qps: Vec<_> = unpoisoned(&self.qps)
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        let mut n = 0;
        for qp in qps {
            while n < out.len() {
                let Some((wr_id, opcode)) = qp.flush_one(self) else {
                    break;
                };
                out[n] = Completion {
                    wr_id,
                    opcode: opcode.raw(),
                    status: WcStatus::WrFlushErr.raw(),
                    qpn: qp.qpn(),
                    ..Completion::default()
                };
                n += 1;
            }
        }
        n
    }

    /// A queue pair is destroyed or reset: its completions that were not polled are void.
    pub(crate) fn purge(&self, slot: u32, qpn: u32) {
        let Some(ring) = self.ring() else { return };
        let poller = unpoisoned(&self.poller);
        let mut at = poller.consumed;
        let end = ring.produced();
        while at != end {
            let entry = ring.read(at);
            if entry.slot == slot && entry.qpn == qpn {
                ring.void(at);
            }
            at += 1;
        }
    }

    /// Asks for one event on the channel (`ibv_req_notify_cq(3)`).
    pub fn req_notify(&self, solicited_only: bool) -> Result<(), Errno> {
        let ring = self.ring().ok_or(Errno::IO)?;
        ring.arm(if solicited_only {
            ARM_SOLICITED
        } else {
            ARM_ANY
        });
        Ok(())
    }

    /// Acknowledges completion events.
    pub fn ack_events(&self, n: u32) {
        self.completion.acknowledge(n);
    }

    /// Acknowledges asynchronous events.
    pub fn ack_async(&self, n: u32) {
        self.asynchronous.acknowledge(n);
    }

    /// Changes the number of entries. Not offered yet: EOPNOTSUPP.
    pub fn resize(&self, cqe: u32) -> Result<(), Errno> {
        self.session.tell(&Request::ResizeCq {
            cq: self.handle,
            cqe,
        })
    }

    /// Destroys it, when all its events are acknowledged. EBUSY: a queue pair uses it.
    pub fn destroy(&self) -> Result<(), Errno> {
        self.session
            .destroy(&Request::DestroyCq { cq: self.handle })?;
        unpoisoned(&self.session.cqs).remove(&self.handle.0);
        self.completion.wait();
        self.asynchronous.wait();
        Ok(())
    }
}

/// The completion opcode of a receive that was flushed.
pub(crate) const FLUSHED_RECV: WcOpcode = WcOpcode::Recv;

/// Reads how far a queue is done.
pub(crate) fn load(retired: &std::sync::atomic::AtomicU64) -> u64 {
    // Acquire: pairs with the store when a completion is polled, so that the slots below may be
    // written again.
    retired.load(Ordering::Acquire)
}
