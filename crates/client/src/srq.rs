//! Shared receive queues.

use std::sync::{Arc, Mutex, MutexGuard};

use freeflow_session::{CreateSrq, Handle, ModifySrq, Reply, Request, SrqCreated, XrcSrq};
use freeflow_shm::{RecvEntry, Region, Sge, SrqGeometry, SrqRing};
use rustix::io::Errno;

use crate::acks::Acks;
use crate::context::Pd;
use crate::cq::Cq;
use crate::session::{Session, unpoisoned};
use crate::xrc::Xrcd;

/// Attributes of a shared receive queue (`struct ibv_srq_attr`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SrqAttr {
    /// Requests it holds.
    pub max_wr: u32,
    /// Elements of a request.
    pub max_sge: u32,
    /// Requests left below which the limit event comes; 0 if disarmed.
    pub limit: u32,
}

/// The ring, and how far it is filled; a resize replaces it.
#[derive(Debug)]
struct Posted {
    region: Region,
    geometry: SrqGeometry,
    /// Index behind the last request published.
    next: u64,
}

/// Shared receive queue.
#[derive(Debug)]
pub struct Srq {
    session: Arc<Session>,
    pub(crate) handle: Handle,
    number: Option<u32>,
    slot: u32,
    max_sge: u32,
    posted: Mutex<Posted>,
    /// Of XRC: where its receives complete.
    cq: Option<Arc<Cq>>,
    pub(crate) user: usize,
    pub(crate) asynchronous: Acks,
}

impl Posted {
    fn new(made: &SrqCreated, region: Region, next: u64) -> Result<Self, Errno> {
        let geometry = SrqGeometry::new(made.max_wr, made.max_sge);
        SrqRing::new(region.words(), geometry).ok_or(Errno::PROTO)?;
        Ok(Posted {
            region,
            geometry,
            next,
        })
    }

    fn ring(&self) -> Result<SrqRing<'_>, Errno> {
        SrqRing::new(self.region.words(), self.geometry).ok_or(Errno::IO)
    }
}

impl Pd {
    /// Creates a shared receive queue for at least `max_wr` requests of `max_sge` elements; of
    /// XRC, with its domain and completion queue. `user` is what events name it by.
    pub fn create_srq(
        self: &Arc<Self>,
        max_wr: u32,
        max_sge: u32,
        xrc: Option<(&Xrcd, &Arc<Cq>)>,
        user: usize,
    ) -> Result<Arc<Srq>, Errno> {
        let session = &self.context.session;
        let request = Request::CreateSrq(CreateSrq {
            pd: self.handle,
            max_wr,
            max_sge,
            xrc: xrc.map(|(xrcd, cq)| XrcSrq {
                xrcd: xrcd.handle,
                cq: cq.handle,
            }),
        });
        let (Reply::Srq(made), Some(region)) = session.call_for_ring(&request)? else {
            return Err(Errno::PROTO);
        };
        let srq = Arc::new(Srq {
            session: session.clone(),
            handle: made.srq,
            number: made.number,
            slot: made.slot,
            max_sge: made.max_sge,
            posted: Mutex::new(Posted::new(&made, region, 0)?),
            cq: xrc.map(|(_, cq)| cq.clone()),
            user,
            asynchronous: Acks::default(),
        });
        if let Some((_, cq)) = xrc {
            cq.set_shared();
        }
        unpoisoned(&session.srqs).insert(made.srq.0, Arc::downgrade(&srq));
        Ok(srq)
    }
}

impl Srq {
    /// Its number, if it is one of XRC.
    pub fn number(&self) -> Option<u32> {
        self.number
    }

    /// Requests it holds, and elements of each.
    pub fn size(&self) -> (u32, u32) {
        let entries = unpoisoned(&self.posted).geometry.entries();
        (entries, self.max_sge)
    }

    /// Its attributes as they are (`ibv_query_srq(3)`).
    pub fn query(&self) -> Result<SrqAttr, Errno> {
        let (Reply::SrqQueried(now), _) =
            self.session.call(&Request::QuerySrq { srq: self.handle })?
        else {
            return Err(Errno::PROTO);
        };
        Ok(SrqAttr {
            max_wr: now.max_wr,
            max_sge: now.max_sge,
            limit: now.limit,
        })
    }

    /// Changes the size, arms the limit event, or both (`ibv_modify_srq(3)`). EINVAL: more
    /// requests are outstanding, or the limit is more than the queue holds.
    pub fn modify(&self, max_wr: Option<u32>, limit: Option<u32>) -> Result<(), Errno> {
        self.session.check_own()?;
        // Nobody posts while the router moves the ring.
        let mut posted = unpoisoned(&self.posted);
        let srq = self.handle;
        let request = Request::ModifySrq(ModifySrq { srq, max_wr, limit });
        if let (Reply::Srq(made), Some(region)) = self.session.call_for_ring(&request)? {
            *posted = Posted::new(&made, region, posted.next)?;
        }
        Ok(())
    }

    /// Locks the queue to post.
    pub fn lock(&self) -> SrqQueue<'_> {
        let posted = unpoisoned(&self.posted);
        SrqQueue {
            srq: self,
            next: posted.next,
            posted,
        }
    }

    /// Acknowledges asynchronous events.
    pub fn ack_async(&self, n: u32) {
        self.asynchronous.acknowledge(n);
    }

    /// Destroys it, when all its events are acknowledged. EBUSY: a queue pair uses it.
    pub fn destroy(&self) -> Result<(), Errno> {
        self.session
            .destroy(&Request::DestroySrq { srq: self.handle })?;
        if let Some(cq) = &self.cq {
            cq.purge_srq(self.handle);
        }
        unpoisoned(&self.session.srqs).remove(&self.handle.0);
        self.asynchronous.wait();
        Ok(())
    }
}

/// A shared receive queue, locked: requests are pushed, then published together.
#[derive(Debug)]
pub struct SrqQueue<'a> {
    srq: &'a Srq,
    next: u64,
    posted: MutexGuard<'a, Posted>,
}

impl SrqQueue<'_> {
    /// Adds a request. EINVAL: too many elements; ENOMEM: the queue is full.
    pub fn push(&mut self, wr_id: u64, sges: &[Sge]) -> Result<(), Errno> {
        if sges.len() > self.srq.max_sge as usize {
            return Err(Errno::INVAL);
        }
        let ring = self.posted.ring()?;
        let outstanding = self.next.wrapping_sub(ring.consumed());
        if outstanding >= self.posted.geometry.entries().into() {
            return Err(Errno::NOMEM);
        }
        RecvEntry::store(wr_id, sges, ring.slot(self.next));
        self.next = self.next.wrapping_add(1);
        Ok(())
    }

    /// Publishes what was pushed, and tells the router if it waits for it.
    pub fn commit(mut self) {
        if self.posted.next == self.next {
            return;
        }
        self.posted.next = self.next;
        if let Ok(ring) = self.posted.ring()
            && ring.publish(self.next)
        {
            self.srq.session.mark(self.srq.slot);
        }
    }
}
