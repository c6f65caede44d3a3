//! Completion channels.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};

use freeflow_session::{Event, Handle, Request};
use freeflow_shm::recv_packet_interruptible;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::cq::Cq;
use crate::session::{Session, unpoisoned};

/// Completion channel.
#[derive(Debug)]
pub struct CompChannel {
    session: Arc<Session>,
    pub(crate) handle: Handle,
    events: OwnedFd,
    cqs: Mutex<Vec<Weak<Cq>>>,
}

impl CompChannel {
    pub(crate) fn new(session: Arc<Session>, handle: Handle, events: OwnedFd) -> Self {
        CompChannel {
            session,
            handle,
            events,
            cqs: Mutex::default(),
        }
    }

    pub(crate) fn attach(&self, cq: &Arc<Cq>) {
        let mut cqs = unpoisoned(&self.cqs);
        cqs.retain(|cq| cq.strong_count() != 0);
        cqs.push(Arc::downgrade(cq));
    }

    /// Descriptor that is readable when there is an event.
    pub fn fd(&self) -> RawFd {
        self.events.as_raw_fd()
    }

    /// The next event: the number that its completion queue was given when it was created. Waits
    /// unless the descriptor is non-blocking (then EAGAIN). EINTR: a signal handler ran. If the
    /// router is gone, every queue of the channel has one event, so that its flushed requests are
    /// found; then EIO.
    pub fn get_event(&self) -> Result<usize, Errno> {
        loop {
            if let Some(cq) = self.left_behind() {
                cq.completion.delivered();
                return Ok(cq.user);
            }
            let mut bytes = [0; Event::BYTES];
            let cq = match recv_packet_interruptible(&self.events, &mut bytes, RecvFlags::empty()) {
                Ok(packet) if packet.len != 0 => match Event::decode(&bytes[..packet.len]) {
                    Some(Event::Completion(cq)) => unpoisoned(&self.session.cqs)
                        .get(&cq.0)
                        .and_then(|cq| cq.upgrade()),
                    _ => None,
                },
                Err(errno) if errno != Errno::CONNRESET => return Err(errno),
                _ => {
                    let cqs = unpoisoned(&self.cqs);
                    // Relaxed: only who comes first matters.
                    let told = |cq: &Arc<Cq>| cq.told_of_death.swap(true, Ordering::Relaxed);
                    let next = cqs.iter().filter_map(Weak::upgrade).find(|cq| !told(cq));
                    Some(next.ok_or(Errno::IO)?)
                }
            };
            // An event of a queue that is destroyed has nobody to go to.
            if let Some(cq) = cq {
                cq.completion.delivered();
                return Ok(cq.user);
            }
        }
    }

    /// A queue that is armed though completions are left in it.
    fn left_behind(&self) -> Option<Arc<Cq>> {
        unpoisoned(&self.cqs)
            .iter()
            .filter_map(Weak::upgrade)
            .find(|cq| cq.event_for_the_rest())
    }

    /// Destroys it. EBUSY: a completion queue uses it.
    pub fn destroy(&self) -> Result<(), Errno> {
        self.session.destroy(&Request::DestroyChannel {
            channel: self.handle,
        })
    }
}
