//! What an endpoint's sessions hold of the router: its descriptors, its address space, its heap.
//! An endpoint has a share of each, so that none leaves others without.

use std::ops::{Add, Sub};

use freeflow_policy::Usage;
use freeflow_session::Handle;
use rustix::io::Errno;

use crate::engine::Engine;
use crate::memory::Areas;
use crate::objects::Session;

/// Descriptors of a session that has made nothing: its socket, its process, its doorbell. (Its
/// first slab is counted with the others.)
const OF_A_SESSION: u64 = 3;

/// Pieces of all memory regions of an endpoint, and free ranges between what its sessions have of
/// shared memory: each is some 40 bytes of the router's heap.
pub(crate) const MAX_PIECES: u64 = 1 << 22;

/// An amount of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Descriptors.
    pub(crate) descriptors: u64,
    /// Bytes of address space.
    pub(crate) mapped: u64,
    /// Pieces of memory regions, and free ranges of shared memory.
    pub(crate) pieces: u64,
}

impl Add for Held {
    type Output = Held;

    fn add(self, other: Held) -> Held {
        Held {
            descriptors: self.descriptors.saturating_add(other.descriptors),
            mapped: self.mapped.saturating_add(other.mapped),
            pieces: self.pieces.saturating_add(other.pieces),
        }
    }
}

impl Sub for Held {
    type Output = Held;

    fn sub(self, other: Held) -> Held {
        Held {
            descriptors: self.descriptors.saturating_sub(other.descriptors),
            mapped: self.mapped.saturating_sub(other.mapped),
            pieces: self.pieces.saturating_sub(other.pieces),
        }
    }
}

impl Held {
    /// A descriptor.
    pub(crate) const DESCRIPTOR: Held = Held {
        descriptors: 1,
        mapped: 0,
        pieces: 0,
    };

    /// Pieces of a memory region.
    pub(crate) fn pieces(n: usize) -> Held {
        Held {
            pieces: n as u64,
            ..Held::default()
        }
    }

    /// What handing out `len` bytes takes: a new area, if none has room.
    pub(crate) fn range(areas: &Areas, len: u64) -> Held {
        match areas.growth(len) {
            0 => Held::default(),
            mapped => Held {
                descriptors: 1,
                mapped,
                pieces: 0,
            },
        }
    }

    /// What a new session takes.
    pub(crate) fn session(slabs: &Areas) -> Held {
        let own = Held {
            descriptors: OF_A_SESSION,
            ..Held::default()
        };
        own + Held::range(slabs, 1)
    }
}

/// An event of the connection manager that waits takes as much of the heap as so many pieces of
/// regions.
pub(crate) const PIECES_OF_AN_EVENT: u64 = 8;

impl Session {
    pub(crate) fn held(&self) -> Held {
        let channels = self.counts.channels + self.counts.cm_channels;
        let contexts = self.counts.contexts;
        let areas = self.slabs.count() + self.segments.count();
        Held {
            descriptors: OF_A_SESSION + u64::from(contexts) + u64::from(channels) + areas,
            mapped: self.slabs.mapped() + self.segments.mapped(),
            pieces: self.counts.pieces
                + self.slabs.free_ranges()
                + self.segments.free_ranges()
                + PIECES_OF_AN_EVENT * u64::from(self.counts.cm_events),
        }
    }
}

impl Engine {
    /// Whether an endpoint may hold so much more. EMFILE: no more descriptors; ENOMEM: no more of
    /// the rest.
    pub(crate) fn check_held(&self, endpoint: Handle, more: Held) -> Result<(), Errno> {
        let e = self.endpoints.get(endpoint).ok_or(Errno::NODEV)?;
        let total = e.held + more;
        if more.descriptors != 0 && total.descriptors > self.max_descriptors {
            return Err(Errno::MFILE);
        }
        let shared = more.mapped != 0 && total.mapped > self.limits.max_shared_bytes;
        if shared || (more.pieces != 0 && total.pieces > self.max_pieces) {
            return Err(Errno::NOMEM);
        }
        Ok(())
    }

    /// As [`Self::check_held`], of a session's endpoint.
    pub(crate) fn check_session(&self, session: Handle, more: Held) -> Result<(), Errno> {
        let s = self.sessions.get(session).ok_or(Errno::INVAL)?;
        self.check_held(s.endpoint, more)
    }

    /// Counts anew what a session holds, after it asked for something.
    pub(crate) fn account(&mut self, session: Handle) {
        let Some(s) = self.sessions.get_mut(session) else {
            return;
        };
        let now = s.held();
        let before = std::mem::replace(&mut s.held, now);
        let usage = s.usage();
        let old = std::mem::replace(&mut s.usage, usage);
        if let Some(e) = self.endpoints.get_mut(s.endpoint) {
            e.count(&old, &usage);
            e.held = e.held + now - before;
        }
    }

    /// A session is gone, with what it held.
    pub(crate) fn settle(&mut self, session: &Session) {
        if let Some(e) = self.endpoints.get_mut(session.endpoint) {
            e.held = e.held - session.held;
            e.count(&session.usage, &Usage::default());
        }
    }
}
