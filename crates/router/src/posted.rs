//! Memory regions that the library registers itself, in a table of shared memory: see
//! [`freeflow_shm::RegionTable`]. The router gives out slots and keys by message, and reads a slot
//! when a request names its key.

use std::collections::VecDeque;

use freeflow_session::{
    ExchangeSlots, Handle, REGION_SLOTS, RegionSlot, Reply, RingLocation, SlotsExchanged,
    may_be_in_table,
};
use freeflow_shm::{Region, RegionEntry, RegionTable};
use freeflow_types::{Access, Key};
use rustix::io::Errno;

use crate::EndReason;
use crate::control::{Outcome, Ring};
use crate::data::Reached;
use crate::engine::Engine;
use crate::keys::Named;
use crate::memory::Areas;
use crate::objects::{Backing, Piece, bytes_of_words};

/// A session's table of regions.
#[derive(Debug)]
pub(crate) struct Posted {
    region: Region,
    location: RingLocation,
    /// Keys of the slots that the library has, by slot.
    keys: Vec<Option<Key>>,
    /// Slots that it has given back.
    spare: VecDeque<u32>,
    /// Number of the present use, which is odd, or of the end of the last one.
    use_number: u64,
}

impl Posted {
    fn new(ring: &Ring) -> Self {
        Posted {
            region: ring.region.clone(),
            location: ring.location,
            keys: Vec::new(),
            spare: VecDeque::new(),
            use_number: 0,
        }
    }

    fn table(&self) -> Option<RegionTable<'_>> {
        RegionTable::new(self.region.words(), REGION_SLOTS)
    }

    /// What lives in a slot under a key.
    pub(crate) fn found(&self, slot: u32, key: Key) -> Option<RegionEntry> {
        if self.keys.get(slot as usize).copied().flatten() != Some(key) {
            return None;
        }
        self.table()?.lookup(slot, key.0)
    }

    /// Regions and their bytes, as the library claims them.
    pub(crate) fn weight(&self) -> (u32, u64) {
        let (regions, bytes) = self.table().map_or((0, 0), |table| table.counts());
        let most = self.keys.len().saturating_sub(self.spare.len()) as u64;
        (regions.min(most) as u32, bytes)
    }

    /// Slots that the library has.
    #[cfg(feature = "testing")]
    pub(crate) fn given(&self) -> usize {
        self.keys.iter().flatten().count()
    }

    /// Bytes of ring memory that the table takes.
    #[cfg(feature = "testing")]
    pub(crate) fn memory(&self) -> u64 {
        self.location
            .len
            .next_multiple_of(crate::memory::page_size())
    }

    /// Begins a use of the table; false if one has begun.
    fn begin_use(&mut self) -> bool {
        if !self.use_number.is_multiple_of(2) {
            return false;
        }
        self.use_number += 1;
        if let Some(table) = self.table() {
            table.begin_use(self.use_number);
        }
        true
    }

    fn end_use(&mut self) {
        if !self.use_number.is_multiple_of(2) {
            self.use_number += 1;
            if let Some(table) = self.table() {
                table.end_use(self.use_number);
            }
        }
    }

    /// A slot to give out; `None` if the library has all.
    fn take_spare(&mut self) -> Option<u32> {
        self.spare.pop_front().or_else(|| {
            let slot = u32::try_from(self.keys.len()).ok()?;
            (slot < REGION_SLOTS).then(|| {
                self.keys.push(None);
                slot
            })
        })
    }

    /// Takes a slot back, with the key that it had; `None` if the library does not have it.
    fn take_back(&mut self, slot: u32) -> Option<Key> {
        let key = self.keys.get_mut(slot as usize)?.take()?;
        if let Some(table) = self.table() {
            table.clear(slot);
        }
        self.spare.push_back(slot);
        Some(key)
    }
}

/// The region in a slot, if it is one that would have been registered.
fn checked(
    session: Handle,
    entry: &RegionEntry,
    segments: &Areas,
    max_len: u64,
) -> Option<Reached<'static>> {
    let access = Access::from_bits(entry.access).filter(|&access| may_be_in_table(access))?;
    let end = entry.offset.checked_add(entry.len)?;
    let sound = entry.len != 0
        && entry.len <= max_len
        && end <= segments.size(entry.segment)
        && entry.iova.checked_add(entry.len).is_some();
    let piece = Piece {
        start: 0,
        len: entry.len,
        backing: Backing::Pool {
            segment: entry.segment,
            offset: entry.offset,
        },
    };
    sound.then(|| Reached::one(session, (entry.iova, entry.len), access, piece))
}

impl Engine {
    /// The region in a slot, for one request: the memory that it names is accessed before the
    /// turn is over, or not at all.
    pub(crate) fn posted_region(
        &mut self,
        pd: Handle,
        slot: u32,
        key: u32,
    ) -> Option<Reached<'static>> {
        let session = self.pds.get(pd)?.session;
        let max_len = self.limits.max_mr_size;
        let s = self.sessions.get_mut(session)?;
        let posted = s.posted.as_mut()?;
        if posted.begin_use() {
            self.using.push(session);
        }
        let entry = posted.found(slot, Key(key))?;
        let region = checked(session, &entry, &s.segments, max_len);
        if region.is_none() {
            let RegionEntry {
                access,
                len,
                segment,
                offset,
                ..
            } = entry;
            let reason = EndReason::PostedRegion {
                slot,
                access,
                len,
                segment,
                offset,
            };
            self.condemn(session, reason);
        }
        region.filter(|_| entry.pd == pd.0)
    }

    /// What was found in tables of regions is not used any more.
    pub(crate) fn end_uses(&mut self) {
        while let Some(session) = self.using.pop() {
            if let Some(posted) = self
                .sessions
                .get_mut(session)
                .and_then(|s| s.posted.as_mut())
            {
                posted.end_use();
            }
        }
    }

    /// Takes slots back and gives others out. As many as are asked for, but no more than half of
    /// the regions that the session may still have: others shall find room, too.
    pub(crate) fn exchange_slots(&mut self, session: Handle, request: &ExchangeSlots) -> Outcome {
        let mut fds = Vec::new();
        if self.session_mut(session)?.posted.is_none() {
            let ring =
                self.alloc_ring(session, bytes_of_words(RegionTable::words(REGION_SLOTS)))?;
            self.session_mut(session)?.posted = Some(Posted::new(&ring));
            fds = ring.fds;
        }
        let limit = self.limits.max_mr;
        let allowed = self.region_room(session);
        let s = self.session_mut(session)?;
        let posted = s.posted.as_mut().ok_or(Errno::NOMEM)?;
        for &slot in &request.back {
            if let Some(key) = posted.take_back(slot) {
                s.keys.remove(key);
                s.counts.slots -= 1;
            }
        }
        let room = limit.saturating_sub(s.counts.mrs + s.counts.slots) / 2;
        let room = room.min(allowed / 2);
        let mut slots = Vec::new();
        for _ in 0..request.want.min(room) {
            let Some(slot) = posted.take_spare() else {
                break;
            };
            // Without a key it is none.
            let Ok(key) = s.keys.choose() else {
                posted.spare.push_front(slot);
                break;
            };
            if let Some(place) = posted.keys.get_mut(slot as usize) {
                *place = Some(key);
            }
            s.keys.insert(key, Named::Slot(slot));
            s.counts.slots += 1;
            slots.push(RegionSlot { slot, key });
        }
        let table = posted.location;
        Ok((Reply::Slots(SlotsExchanged { table, slots }), fds))
    }

    /// Makes a region of the table one of the router's, with the same key. EINVAL: there is none,
    /// or it is none that the router would register.
    pub(crate) fn adopt_mr(&mut self, session: Handle, slot: u32) -> Outcome {
        let max_len = self.limits.max_mr_size;
        let s = self.session_mut(session)?;
        let posted = s.posted.as_ref().ok_or(Errno::INVAL)?;
        let key = posted.keys.get(slot as usize).copied().flatten();
        let key = key.ok_or(Errno::INVAL)?;
        let entry = posted.found(slot, key).ok_or(Errno::INVAL)?;
        let region = checked(session, &entry, &s.segments, max_len).ok_or(Errno::INVAL)?;
        let (range, access) = ((region.iova, region.len), region.access);
        let pieces = region.pieces().to_vec();
        // It is counted as one region all the time.
        s.counts.slots -= 1;
        let pd = Handle(entry.pd);
        let made = self.add_mr(session, pd, access, range, pieces, None, Some(key));
        let s = self.session_mut(session)?;
        match &made {
            Ok(_) => {
                s.posted.as_mut().and_then(|p| p.take_back(slot));
            }
            Err(_) => s.counts.slots += 1,
        }
        made
    }
}
