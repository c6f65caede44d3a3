//! Regions that are registered without asking the router: see [`freeflow_shm::RegionTable`].
//!
//! Only who deregisters at all gains by it. So the first few regions of a session are asked for,
//! and then slots and keys are fetched, more with each time.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use freeflow_session::{
    ExchangeSlots, Handle, MAX_SLOTS_AT_ONCE, REGION_SLOTS, RegionSlot, Reply, Request,
    SlotsExchanged,
};
use freeflow_shm::{Region, RegionEntry, RegionTable};
use freeflow_types::Key;
use rustix::io::Errno;

use crate::session::{Session, unpoisoned};

/// Regions that a session deregisters before it fetches slots.
const ASKED_FOR: u32 = 16;

/// Slots that are fetched first; each time after that twice as many.
const FETCHED_FIRST: u32 = 64;

/// Registrations that are asked for, after the router had no slots to give.
const PAUSE: u32 = 256;

/// Looks at a use of the table before the router is asked when it is over. A turn of the router's
/// engine is shorter, unless it was interrupted; from [`YIELD_AFTER`] on it gets this processor.
const LOOKS: u32 = 256;
const YIELD_AFTER: u32 = 64;

/// Slots of the table of regions that the library may use.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    table: OnceLock<Region>,
    /// Held from the choice of a slot until it is live, and while the router gives slots out or
    /// takes them back: it never takes back one that somebody is about to use.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Regions to be asked for before slots are.
    ask: u32,
    fetch: u32,
    free: Vec<RegionSlot>,
    dead: Vec<u32>,
    /// Live regions by slot.
    live: Vec<Option<Live>>,
}

#[derive(Debug)]
struct Live {
    key: Key,
    context: Handle,
    /// Counts the regions of their protection domain.
    users: Users,
}

/// Regions of a protection domain that the router does not count.
pub(crate) type Users = Arc<AtomicU32>;

impl State {
    /// A region is not in its slot any more.
    fn remove(&mut self, slot: u32) {
        if let Some(live) = self.live.get_mut(slot as usize).and_then(Option::take) {
            // Relaxed: the program orders what it does with the domain.
            live.users.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Default for State {
    fn default() -> Self {
        State {
            ask: ASKED_FOR,
            fetch: FETCHED_FIRST,
            free: Vec::new(),
            dead: Vec::new(),
            live: Vec::new(),
        }
    }
}

impl Slots {
    fn table(&self) -> Option<RegionTable<'_>> {
        RegionTable::new(self.table.get()?.words(), REGION_SLOTS)
    }

    /// Registers a region of a context; `None` if the router must be asked.
    pub(crate) fn register(
        &self,
        session: &Session,
        (context, users): (Handle, &Users),
        entry: &RegionEntry,
    ) -> Option<RegionSlot> {
        let mut state = unpoisoned(&self.state);
        if state.free.is_empty() {
            if state.ask != 0 {
                return None;
            }
            let want = state.fetch;
            self.exchange(session, &mut state, want);
            state.fetch = (want * 2).min(MAX_SLOTS_AT_ONCE);
            if state.free.is_empty() {
                state.ask = PAUSE;
            }
        }
        let table = self.table()?;
        let slot = state.free.pop()?;
        let at = slot.slot as usize;
        if state.live.len() <= at {
            state.live.resize_with(at + 1, || None);
        }
        users.fetch_add(1, Ordering::Relaxed);
        state.live[at] = Some(Live {
            key: slot.key,
            context,
            users: users.clone(),
        });
        table.register(slot.slot, slot.key.0, entry);
        Some(slot)
    }

    /// Deregisters a region; then the router does not access its memory any more.
    pub(crate) fn deregister(&self, session: &Session, slot: u32, key: Key) {
        let Some(table) = self.table() else { return };
        if !table.deregister(slot, key.0) {
            // Its context was closed before.
            return;
        }
        wait_for_router(session, &table);
        let mut state = unpoisoned(&self.state);
        state.remove(slot);
        state.dead.push(slot);
    }

    /// Deregisters what is left in a context that was closed.
    pub(crate) fn close(&self, session: &Session, context: Handle) {
        let Some(table) = self.table() else { return };
        let mut state = unpoisoned(&self.state);
        let left = |(slot, live): (usize, &Option<Live>)| {
            let live = live.as_ref().filter(|live| live.context == context)?;
            Some((slot as u32, live.key))
        };
        let left: Vec<_> = state.live.iter().enumerate().filter_map(left).collect();
        for &(slot, key) in &left {
            if table.deregister(slot, key.0) {
                state.remove(slot);
                state.dead.push(slot);
            }
        }
        wait_for_router(session, &table);
    }

    /// Has the router take a region over, and its slot back.
    pub(crate) fn adopt(&self, session: &Session, slot: u32) -> Result<Handle, Errno> {
        // Held over the call: the slot may be given out again at once.
        let mut state = unpoisoned(&self.state);
        let (Reply::Mr(made), _) = session.call(&Request::AdoptMr { slot })? else {
            return Err(Errno::PROTO);
        };
        if let Some(table) = self.table() {
            table.uncount(slot);
        }
        state.remove(slot);
        Ok(made.mr)
    }

    /// A region that was asked for is gone.
    pub(crate) fn note_deregistration(&self) {
        let mut state = unpoisoned(&self.state);
        state.ask = state.ask.saturating_sub(1);
    }

    /// Gives all slots back that are not used; false if there are none.
    pub(crate) fn give_back(&self, session: &Session) -> bool {
        let mut state = unpoisoned(&self.state);
        let free = std::mem::take(&mut state.free);
        state.dead.extend(free.iter().map(|slot| slot.slot));
        (state.ask, state.fetch) = (PAUSE, FETCHED_FIRST);
        let any = !state.dead.is_empty();
        while !state.dead.is_empty() && self.exchange(session, &mut state, 0) {}
        any
    }

    /// Gives dead slots back and fetches others; false if the router refuses.
    fn exchange(&self, session: &Session, state: &mut State, want: u32) -> bool {
        let left = state.dead.len().saturating_sub(MAX_SLOTS_AT_ONCE as usize);
        let back = state.dead.split_off(left);
        let request = Request::ExchangeSlots(ExchangeSlots { back, want });
        let Ok((Reply::Slots(SlotsExchanged { slots, .. }), Some(table))) =
            session.call_for_ring(&request)
        else {
            // What was to be given back is lost until the session ends.
            return false;
        };
        self.table.get_or_init(|| table);
        // The last one is used first.
        state.free.extend(slots.into_iter().rev());
        true
    }
}

/// Waits until the router has done with what it found before. One that is gone accesses nothing.
fn wait_for_router(session: &Session, table: &RegionTable<'_>) {
    if let Some(number) = table.in_use()
        && !ends_soon(table, number)
    {
        let _ = session.tell(&Request::Settle);
    }
}

/// Waits a little for the end of a use.
fn ends_soon(table: &RegionTable<'_>, number: u64) -> bool {
    (0..LOOKS).any(|look| {
        if look < YIELD_AFTER {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
        table.is_over(number)
    })
}
