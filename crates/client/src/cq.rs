//! Completion queues.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

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

/// How long at most the router gets to take up what the session has posted, before a queue is resized
/// to what it holds. Taken up is not completed, and what is posted to other queues meanwhile counts
/// too: what completes later needs room in the new ring, as with a device that is at work.
const TAKE_UP_TIME: Duration = Duration::from_millis(10);

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
    /// Nanoseconds of the monotonic clock.
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

#[derive(Debug)]
struct Poller {
    region: Region,
    entries: u32,
    consumed: u64,
    empty: u32,
    /// Whether the last poll since it was armed left completions in it.
    left: bool,
    /// What was in the ring when it was resized, or cleared of a queue pair's completions.
    carried: VecDeque<CompletionEntry>,
}

impl Poller {
    fn new(region: Region, entries: u32) -> Result<Self, Errno> {
        CqRing::new(region.words(), entries).ok_or(Errno::PROTO)?;
        Ok(Poller {
            region,
            entries,
            consumed: 0,
            empty: 0,
            left: false,
            carried: VecDeque::new(),
        })
    }

    fn ring(&self) -> Option<CqRing<'_>> {
        CqRing::new(self.region.words(), self.entries)
    }

    /// The next completion.
    fn next(&mut self, produced: u64) -> Option<CompletionEntry> {
        if let Some(entry) = self.carried.pop_front() {
            return Some(entry);
        }
        if self.consumed == produced {
            return None;
        }
        let entry = self.ring()?.read(self.consumed);
        self.consumed = self.consumed.wrapping_add(1);
        Some(entry)
    }
}

/// Completion queue.
#[derive(Debug)]
pub struct Cq {
    session: Arc<Session>,
    pub(crate) handle: Handle,
    poller: Mutex<Poller>,
    /// Whose requests complete here.
    qps: Mutex<Vec<Weak<Qp>>>,
    pub(crate) user: usize,
    pub(crate) completion: Acks,
    pub(crate) asynchronous: Acks,
    pub(crate) told_of_death: AtomicBool,
    /// Whether receives of a shared queue complete here.
    shared: AtomicBool,
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
        let (Reply::Cq(made), Some(region)) = session.call_for_ring(&request)? else {
            return Err(Errno::PROTO);
        };
        let cq = Arc::new(Cq {
            session: session.clone(),
            handle: made.cq,
            poller: Mutex::new(Poller::new(region, made.entries)?),
            qps: Mutex::default(),
            user,
            completion: Acks::default(),
            asynchronous: Acks::default(),
            told_of_death: AtomicBool::new(false),
            shared: AtomicBool::new(false),
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
        unpoisoned(&self.poller).entries
    }

    pub(crate) fn set_shared(&self) {
        // Relaxed: see `poll_empty`.
        self.shared.store(true, Ordering::Relaxed);
    }

    pub(crate) fn attach(&self, qp: &Arc<Qp>) {
        let mut qps = unpoisoned(&self.qps);
        qps.retain(|qp| qp.strong_count() != 0);
        qps.push(Arc::downgrade(qp));
    }

    /// Takes completions; returns how many. An error means that the queue is unusable: it
    /// overran, or the router is gone and receives of a shared queue, which nobody flushes, will
    /// never complete here (`ibv_poll_cq(3)`).
    pub fn poll(&self, out: &mut [Completion]) -> Result<usize, Errno> {
        let mut poller = unpoisoned(&self.poller);
        let produced = poller.ring().ok_or(Errno::IO)?.produced();
        if produced == poller.consumed && poller.carried.is_empty() {
            return self.poll_empty(poller, out);
        }
        let mut n = 0;
        {
            let retired = self
                .session
                .retired
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            for to in &mut *out {
                let Some(entry) = poller.next(produced) else {
                    break;
                };
                Session::retire(&retired, &entry);
                *to = Completion::from(&entry);
                n += 1;
            }
        }
        let ring = poller.ring().ok_or(Errno::IO)?;
        ring.consume(poller.consumed);
        poller.left = !poller.carried.is_empty() || ring.produced() != poller.consumed;
        poller.empty = 0;
        Ok(n)
    }

    fn poll_empty(
        &self,
        mut poller: std::sync::MutexGuard<'_, Poller>,
        out: &mut [Completion],
    ) -> Result<usize, Errno> {
        let ring = poller.ring().ok_or(Errno::IO)?;
        if ring.overrun() && ring.produced() == poller.consumed {
            return Err(Errno::IO);
        }
        let empty = poller.empty.wrapping_add(1);
        let dead = self.session.link.is_dead()
            || (empty.is_multiple_of(POLLS_PER_CHECK) && self.session.link.check());
        if dead && ring.produced() == poller.consumed {
            let flushed = self.flush(out);
            // Relaxed: set before the program could wait for such a receive.
            let in_vain = flushed == 0 && self.shared.load(Ordering::Relaxed);
            return if in_vain { Err(Errno::IO) } else { Ok(flushed) };
        }
        poller.empty = empty;
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

    /// A queue pair is destroyed or reset: its completions that were not polled are gone.
    pub(crate) fn purge(&self, slot: u32, qpn: u32) {
        // Its receives from a shared queue carry no slot; its number is nobody else's.
        self.drop_if(|entry| {
            entry.qpn == qpn && (entry.slot == slot || entry.slot == CompletionEntry::SHARED)
        });
    }

    /// As [`Self::purge`], for a shared receive queue of XRC.
    pub(crate) fn purge_srq(&self, srq: Handle) {
        self.drop_if(|entry| {
            entry.slot == CompletionEntry::SHARED && entry.retired == u64::from(srq.0)
        });
    }

    /// Drops completions. The others move to our side of the ring, so that those that are dropped
    /// take none of its room either.
    fn drop_if(&self, is_gone: impl Fn(&CompletionEntry) -> bool) {
        let mut poller = unpoisoned(&self.poller);
        poller.carried.retain(|entry| !is_gone(entry));
        let Some(ring) = poller.ring() else { return };
        let (start, end) = (poller.consumed, ring.produced());
        let entries: Vec<_> = (0..end.wrapping_sub(start))
            .map(|n| ring.read(start.wrapping_add(n)))
            .collect();
        if entries.iter().any(&is_gone) {
            ring.consume(end);
            poller.consumed = end;
            let kept = entries.into_iter().filter(|entry| !is_gone(entry));
            poller.carried.extend(kept);
        }
    }

    /// Asks for one event on the channel (`ibv_req_notify_cq(3)`).
    pub fn req_notify(&self, solicited_only: bool) -> Result<(), Errno> {
        let mut poller = unpoisoned(&self.poller);
        poller.left = false;
        let ring = poller.ring().ok_or(Errno::IO)?;
        ring.arm(if solicited_only {
            ARM_SOLICITED
        } else {
            ARM_ANY
        });
        Ok(())
    }

    /// Takes the arming for any completion back, if the program has polled since and left
    /// completions; whether it did.
    ///
    /// A program that arms, polls a batch of limited size and waits for an event again would wait
    /// for ever if nothing more came (perftest with several queue pairs does so). Devices whose
    /// arming names the consumer's index raise the event in that case; so do we.
    pub(crate) fn event_for_the_rest(&self) -> bool {
        let poller = unpoisoned(&self.poller);
        poller.left && poller.ring().is_some_and(|ring| ring.disarm())
    }

    /// Acknowledges completion events.
    pub fn ack_events(&self, n: u32) {
        self.completion.acknowledge(n);
    }

    /// Acknowledges asynchronous events.
    pub fn ack_async(&self, n: u32) {
        self.asynchronous.acknowledge(n);
    }

    /// Changes the number of entries to at least `cqe`; completions stay. EINVAL: they would not
    /// fit.
    pub fn resize(&self, cqe: u32) -> Result<(), Errno> {
        let request = Request::ResizeCq {
            cq: self.handle,
            cqe,
        };
        self.session.check_own()?;
        self.session.wait_until_taken_up(TAKE_UP_TIME);
        // Nobody polls or arms the old ring while the router changes over.
        let mut poller = unpoisoned(&self.poller);
        let (Reply::Cq(made), Some(region)) = self.session.call_for_ring(&request)? else {
            return Err(Errno::PROTO);
        };
        let mut new = Poller::new(region, made.entries)?;
        let produced = poller.ring().ok_or(Errno::IO)?.produced();
        while let Some(entry) = poller.next(produced) {
            new.carried.push_back(entry);
        }
        *poller = new;
        Ok(())
    }

    /// Moderates its events: once armed it raises one after `count` completions, or `period`
    /// microseconds after the first of them, whichever is first. A count below 2, or a period of 0,
    /// ends that (`ibv_modify_cq(3)`).
    pub fn moderate(&self, count: u16, period: u16) -> Result<(), Errno> {
        self.session.tell(&Request::ModifyCq {
            cq: self.handle,
            count,
            period,
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
