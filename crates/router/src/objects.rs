//! The objects that the engine owns.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use freeflow_policy::Usage;
use freeflow_session::Handle;
use freeflow_shm::{
    AtomicU64, CqRing, DirtyMap, Doorbell, MAX_SLOTS, QpGeometry, QpRings, Region, Sge,
};
use freeflow_transport::{Datagrams, Qp};
use freeflow_types::{Access, Gid, Key, QpType, Qpn, TenantId, VirtualIp};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;

use crate::EndReason;
use crate::completions::{HeldBack, Moderation};
use crate::copier::Patience;
use crate::events::Stream;
use crate::foreign::ForeignMemory;
use crate::held::Held;
use crate::keys::Keys;
use crate::memory::{Areas, Range};
use crate::posted::Posted;
use crate::quota::Allowance;
use crate::remote::Remote;
use crate::srq::Ticket;
use crate::table::{NONE, Owned};
use crate::xrc::XrcRecv;

/// A container's virtual NIC on this host.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) name: String,
    pub(crate) tenant: TenantId,
    pub(crate) tenant_name: String,
    pub(crate) ip: VirtualIp,
    pub(crate) gid: Gid,
    /// This host's address in the network between hosts, if it is the second GID.
    pub(crate) underlay: Option<IpAddr>,
    pub(crate) socket: std::path::PathBuf,
    pub(crate) counters: freeflow_api::Counters,
    /// Queue pairs that have something to do.
    pub(crate) ready: VecDeque<Handle>,
    /// Whether it is in line for a turn.
    pub(crate) in_line: bool,
    /// What its sessions hold of the router.
    pub(crate) held: Held,
    /// How long its memory may still have the engine wait.
    pub(crate) patience: Patience,
    /// What it may have, and what it has.
    pub(crate) allowance: Allowance,
    /// Its memory came late: what cannot be shared is not used any more.
    pub(crate) late: bool,
    /// It is there for what is left of its sessions alone.
    pub(crate) removed: bool,
}

impl Endpoint {
    /// The second GID, if there is one.
    pub(crate) fn underlay_gid(&self) -> Option<Gid> {
        self.underlay.map(|ip| Gid::from(VirtualIp(ip)))
    }

    /// The device's GIDs, by index.
    pub(crate) fn gids(&self) -> Vec<Gid> {
        [self.gid].into_iter().chain(self.underlay_gid()).collect()
    }
}

/// Who is at the other end of a session, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// 0 if it is outside of the router's process id namespace.
    pub(crate) pid: u32,
    pub(crate) uid: u32,
}

/// A doorbell that the engine's thread waits for.
#[derive(Debug)]
pub(crate) struct Watched {
    doorbell: Doorbell,
    set: Arc<OwnedFd>,
}

impl Watched {
    /// Adds a doorbell to an epoll set; `data` comes when it rings.
    pub(crate) fn new(doorbell: Doorbell, set: Arc<OwnedFd>, data: u64) -> Result<Self, Errno> {
        let edge = EventFlags::IN | EventFlags::ET;
        epoll::add(&*set, &doorbell, EventData::new_u64(data), edge)?;
        Ok(Watched { doorbell, set })
    }

    /// A descriptor of it for the library.
    pub(crate) fn share(&self) -> Result<OwnedFd, Errno> {
        rustix::io::fcntl_dupfd_cloexec(&self.doorbell, 0)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // The library may still hold the doorbell: it would stay in the set.
        let _ = epoll::delete(&*self.set, &self.doorbell);
    }
}

/// One process's connection.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) endpoint: Handle,
    pub(crate) peer: Peer,
    pub(crate) since: Instant,
    pub(crate) socket: Arc<OwnedFd>,
    /// There from the moment that the session has a handle.
    pub(crate) doorbell: Option<Watched>,
    pub(crate) dirty: Region,
    /// Where the next look at the dirty map begins.
    pub(crate) marks_from: u32,
    pub(crate) slabs: Areas,
    pub(crate) segments: Areas,
    pub(crate) memory: Option<ForeignMemory>,
    /// That was found to be no more: the process is dead, and its session will end.
    pub(crate) memory_gone: bool,
    /// Queues by their slot in the dirty map.
    pub(crate) slots: Vec<Option<Slot>>,
    pub(crate) free_slots: VecDeque<u32>,
    pub(crate) keys: Keys,
    /// Regions that the library registers itself; there once it has asked for slots.
    pub(crate) posted: Option<Posted>,
    /// Events that wait for the program to read others.
    pub(crate) events_waiting: u32,
    pub(crate) counts: Counts,
    /// A context that is being closed.
    pub(crate) closing: Option<Handle>,
    /// What it holds of the router, as last counted.
    pub(crate) held: Held,
    /// What it has against quotas, as last counted.
    pub(crate) usage: Usage,
    /// Whether the engine looks at the dirty map without being asked to.
    pub(crate) hot: bool,
    pub(crate) last_active: u64,
    pub(crate) ending: Option<EndReason>,
    /// It has ended, and what it had is being removed: nothing of it works any more.
    pub(crate) ended: bool,
    /// While queue pairs of completion queues that overran are looked for.
    pub(crate) overruns: Option<Overruns>,
}

/// How far a session's queue pairs have been looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Overruns {
    /// The next slot.
    pub(crate) next: usize,
    /// Another completion queue overran meanwhile: once more from the beginning.
    pub(crate) again: bool,
}

/// What a slot of the dirty map stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Slot {
    /// A queue pair.
    Qp(Handle),
    /// A shared receive queue.
    Srq(Handle),
}

/// Objects of a session, against its limits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) contexts: u32,
    pub(crate) pds: u32,
    pub(crate) mrs: u32,
    /// Slots of the table of regions that the library has: each counts as a region.
    pub(crate) slots: u32,
    pub(crate) mws: u32,
    /// Bytes of device memory, in whole pages.
    pub(crate) device: u64,
    pub(crate) channels: u32,
    pub(crate) cqs: u32,
    pub(crate) qps: u32,
    pub(crate) srqs: u32,
    pub(crate) xrcds: u32,
    /// Ids and event channels of the connection manager.
    pub(crate) cm_ids: u32,
    /// Of these, who listens.
    pub(crate) cm_listeners: u32,
    pub(crate) cm_channels: u32,
    /// Events of these that wait.
    pub(crate) cm_events: u32,
    /// Work requests that its queues can hold.
    pub(crate) outstanding: u64,
    /// Pieces of all memory regions.
    pub(crate) pieces: u64,
    pub(crate) registered: u64,
    pub(crate) foreign: u64,
}

impl Session {
    pub(crate) fn dirty_map(&self) -> Option<DirtyMap<'_>> {
        DirtyMap::new(self.dirty.words())
    }

    /// A slot of the dirty map; `None` if there is none left.
    pub(crate) fn take_slot(&mut self) -> Option<u32> {
        if let Some(slot) = self.free_slots.pop_front() {
            return Some(slot);
        }
        let slot = u32::try_from(self.slots.len()).ok()?;
        (slot < MAX_SLOTS).then(|| {
            self.slots.push(None);
            slot
        })
    }

    pub(crate) fn set_slot(&mut self, slot: u32, to: Slot) {
        if let Some(entry) = self.slots.get_mut(slot as usize) {
            *entry = Some(to);
        }
    }

    pub(crate) fn free_slot(&mut self, slot: u32) {
        if let Some(entry) = self.slots.get_mut(slot as usize) {
            *entry = None;
            self.free_slots.push_back(slot);
        }
    }
}

/// An open device.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) session: Handle,
    /// Where asynchronous events go.
    pub(crate) events: Stream,
}

/// Protection domain.
#[derive(Debug)]
pub(crate) struct Pd {
    pub(crate) session: Handle,
    pub(crate) context: Handle,
    pub(crate) users: u32,
}

/// Completion channel.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(crate) session: Handle,
    pub(crate) context: Handle,
    pub(crate) events: Stream,
    pub(crate) users: u32,
}

/// What backs a part of a memory region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// A pool segment of the owner's session, from this offset.
    Pool { segment: u32, offset: u64 },
    /// The owner's own memory, from this address.
    Foreign { addr: u64 },
    /// Nothing: reads as zeroes, swallows what is written.
    Null,
}

/// A part of a memory region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Offset of its first byte in the region.
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) backing: Backing,
}

/// Memory region.
#[derive(Debug)]
pub(crate) struct Mr {
    pub(crate) session: Handle,
    pub(crate) context: Handle,
    pub(crate) pd: Handle,
    pub(crate) key: Key,
    pub(crate) iova: u64,
    pub(crate) len: u64,
    pub(crate) access: Access,
    pub(crate) pieces: Vec<Piece>,
    /// The device memory it is in.
    pub(crate) dm: Option<Handle>,
    /// Windows bound to it.
    pub(crate) windows: u32,
}

impl Mr {
    /// Bytes registered and, of these, foreign ones, as the session's counts have them.
    pub(crate) fn weight(&self) -> (u64, u64) {
        weight(&self.pieces)
    }
}

/// Bytes of a region's pieces and, of these, foreign ones. A region of all addresses counts as none:
/// it holds no memory, and how much there is behind it is not known.
pub(crate) fn weight(pieces: &[Piece]) -> (u64, u64) {
    let sum = |of: fn(&Backing) -> bool| {
        let pieces = pieces.iter().filter(|p| p.len != u64::MAX);
        pieces.filter(|p| of(&p.backing)).map(|p| p.len).sum()
    };
    let registered = sum(|b| !matches!(b, Backing::Null));
    (registered, sum(|b| matches!(b, Backing::Foreign { .. })))
}

/// Bytes that an endpoint has to be allowed for a region of these pieces: for all addresses, any
/// number of bytes.
pub(crate) fn claim(pieces: &[Piece]) -> u64 {
    let everything = |p: &Piece| p.len == u64::MAX && matches!(p.backing, Backing::Foreign { .. });
    if pieces.iter().any(everything) {
        return u64::MAX;
    }
    weight(pieces).0
}

/// Device memory: pages of a pool segment that the program reaches by copying alone.
#[derive(Debug)]
pub(crate) struct Dm {
    pub(crate) session: Handle,
    pub(crate) context: Handle,
    pub(crate) range: Range,
    pub(crate) len: u64,
    /// Regions in it.
    pub(crate) users: u32,
}

/// Completion queue.
#[derive(Debug)]
pub(crate) struct Cq {
    pub(crate) session: Handle,
    pub(crate) context: Handle,
    pub(crate) channel: Option<Handle>,
    pub(crate) users: u32,
    pub(crate) memory: Range,
    /// The ring before it was resized, which the library may still read.
    pub(crate) before: Option<Range>,
    pub(crate) region: Region,
    pub(crate) entries: u32,
    pub(crate) produced: u64,
    pub(crate) overrun: bool,
    /// If events may come later than the first completion.
    pub(crate) moderation: Option<Moderation>,
    /// Completions that the library waits for and has not been told of yet.
    pub(crate) held_back: Option<HeldBack>,
}

impl Cq {
    pub(crate) fn ring(&self) -> Option<CqRing<'_>> {
        CqRing::new(self.region.words(), self.entries)
    }
}

/// Why a queue pair's next send request is not executed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// It may be executed.
    No,
    /// The receiver had no receive request.
    Receiver,
    /// No peer answered.
    Peer,
}

/// A receive request that a message has begun to fill.
#[derive(Debug)]
pub(crate) struct TakenRecv {
    pub(crate) wr_id: u64,
    /// Domain of its elements.
    pub(crate) pd: Handle,
    /// Where it completes.
    pub(crate) cq: Handle,
    /// What its completion says to the library.
    pub(crate) slot: u32,
    pub(crate) retired: u64,
    pub(crate) sges: Vec<Sge>,
}

/// A message that takes more than one turn.
#[derive(Debug)]
pub(crate) struct Current {
    pub(crate) request: crate::exec::Request,
    pub(crate) done: u64,
}

/// A queue pair's rings.
#[derive(Debug)]
pub(crate) struct Rings {
    pub(crate) memory: Range,
    pub(crate) region: Region,
    pub(crate) geometry: QpGeometry,
}

/// Queue pair: the transport's value, and where it lives.
#[derive(Debug)]
pub(crate) struct QpObject {
    pub(crate) session: Handle,
    pub(crate) endpoint: Handle,
    pub(crate) context: Handle,
    pub(crate) pd: Handle,
    pub(crate) qp_type: QpType,
    pub(crate) qpn: Qpn,
    pub(crate) slot: u32,
    pub(crate) send_cq: Handle,
    pub(crate) recv_cq: Handle,
    /// Where its receive requests come from, if not from its own ring.
    pub(crate) srq: Option<Handle>,
    /// If it is an XRC receive queue pair: it has no session, no rings and no slot then.
    pub(crate) xrc: Option<XrcRecv>,
    pub(crate) sq_sig_all: bool,
    pub(crate) transport: Qp,
    pub(crate) rings: Option<Rings>,
    /// Index of the next send request.
    pub(crate) send_head: u64,
    /// Index of the next receive request.
    pub(crate) recv_head: u64,
    /// The peer of a connected QP, as last found.
    pub(crate) path: Option<Handle>,
    pub(crate) current: Option<Box<Current>>,
    /// Its connection, if the peer is on another host.
    pub(crate) remote: Option<Box<Remote>>,
    /// Of a datagram queue pair, what numbers its packets to other hosts.
    pub(crate) datagrams: Option<Datagrams>,
    /// Requests that are on their way to another host.
    pub(crate) under_way: usize,
    /// A receive request of this QP that the peer's current message has begun to fill.
    pub(crate) taken: Option<TakenRecv>,
    pub(crate) waiting: Waiting,
    /// Its place among those who wait for a receive request of a shared receive queue.
    pub(crate) ticket: Option<Ticket>,
    /// When its timer fires.
    pub(crate) timer: Option<u64>,
    pub(crate) queued: bool,
    pub(crate) established: bool,
    /// The program knows that no more requests of the shared receive queue will complete here.
    pub(crate) last_wqe_told: bool,
    /// The program wants to know when the send queue has drained.
    pub(crate) draining: bool,
    /// Multicast groups it is attached to.
    pub(crate) groups: Vec<Gid>,
}

impl QpObject {
    pub(crate) fn rings(&self) -> Option<QpRings<'_>> {
        let rings = self.rings.as_ref()?;
        QpRings::new(rings.region.words(), rings.geometry)
    }

    /// Work requests that its rings hold.
    pub(crate) fn capacity(&self) -> u64 {
        self.rings.as_ref().map_or(0, |r| capacity(&r.geometry))
    }

    /// Send requests the ring holds.
    pub(crate) fn send_entries(&self) -> u64 {
        let entries = |r: &Rings| r.geometry.send_entries().into();
        self.rings.as_ref().map_or(0, entries)
    }
}

/// Work requests that rings of this geometry hold.
pub(crate) fn capacity(geometry: &QpGeometry) -> u64 {
    u64::from(geometry.send_entries()) + u64::from(geometry.recv_entries())
}

/// Objects end with the context that they were made in, contexts with their session, sessions
/// with their endpoint.
macro_rules! owned {
    ($($object:ident by $owner:ident,)+) => {
        $(impl Owned for $object {
            fn owner(&self) -> Handle {
                self.$owner
            }
        })+
    };
}

owned! {
    Session by endpoint,
    Context by session,
    Pd by context,
    Channel by context,
    Mr by context,
    Dm by context,
    Cq by context,
    QpObject by context,
}

impl Owned for Endpoint {
    fn owner(&self) -> Handle {
        NONE
    }
}

/// Words of shared memory, none if there are none.
pub(crate) fn bytes_of_words(words: usize) -> u64 {
    words as u64 * size_of::<AtomicU64>() as u64
}
