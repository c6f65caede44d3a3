//! Memory regions.

use std::sync::{Arc, Mutex};

use freeflow_convert::{Backing, Registration};
use freeflow_session::{
    AdviseMr, AdvisedRange, Handle, MAX_ADVISED, MAX_PIECES, PieceDesc, PieceKind, RegMr,
    RegionSlot, Reply, Request, ReregMr, Translation, may_be_in_table,
};
use freeflow_shm::{RegionEntry, Sge};
use freeflow_types::{Access, Key};
use rustix::io::Errno;
use rustix::mm::Advice;

use crate::context::Pd;
use crate::session::{Pages, Session, unpoisoned};

/// Memory region.
#[derive(Debug)]
pub struct Mr {
    session: Arc<Session>,
    key: Key,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    holder: Holder,
    /// `None`: no memory of the program's is in it.
    place: Option<Place>,
}

/// Where a region is recorded.
#[derive(Clone, Copy, Debug)]
enum Holder {
    /// The router has it.
    Router(Handle),
    /// It is in this slot of the session's table.
    Slot(u32),
}

/// A region as it is registered.
#[derive(Clone, Copy, Debug)]
struct Range {
    addr: u64,
    len: u64,
    iova: u64,
    access: Access,
}

#[derive(Debug)]
struct Place {
    range: Range,
    pages: Pinned,
}

/// The pages behind a region.
#[derive(Debug)]
enum Pinned {
    /// Shared with the router, as the converter knows.
    Shared(Registration),
    /// The program's own, whatever they are when they are used.
    OnDemand,
}

/// What `ibv_rereg_mr(3)` changes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rereg<'a> {
    /// Protection domain.
    pub pd: Option<&'a Pd>,
    /// Address, also for work requests, and length.
    pub range: Option<(u64, u64)>,
    /// Rights.
    pub access: Option<Access>,
}

/// What `ibv_advise_mr(3)` advises.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Advise {
    /// Fetch pages to be read.
    Prefetch,
    /// Fetch pages to be written.
    PrefetchWrite,
    /// Take note of pages that are there.
    PrefetchNoFault,
}

impl Range {
    /// The request's address of the first byte, as rights and addresses say.
    fn settle(mut self) -> Self {
        if self.access.contains(Access::ZERO_BASED) {
            self.iova = 0;
        }
        self
    }

    /// Whether it is all addresses, and asked for as the implicit region of them.
    fn is_everything(&self) -> bool {
        let all = (self.addr, self.len, self.iova) == (0, u64::MAX, 0);
        all && self.access.contains(Access::ON_DEMAND)
    }

    /// Whether the device may write there.
    fn needs_write(&self) -> bool {
        let writes = Access::LOCAL_WRITE | Access::REMOTE_CHANGE | Access::MW_BIND;
        self.access.intersects(writes)
    }
}

impl Session {
    /// Makes the pages of a range reachable for the router.
    fn pin(&self, range: &Range) -> Result<(Pinned, Translation), Errno> {
        if range.is_everything() {
            self.attach_memory()?;
            return Ok((Pinned::OnDemand, Translation::everything()));
        }
        let (addr, len) = (range.addr, range.len);
        let largest = self.info.limits.max_mr_size;
        if len == 0 || len > largest || addr.checked_add(len).is_none() {
            return Err(Errno::INVAL);
        }
        let translation = |pieces| Translation {
            iova: range.iova,
            len,
            pieces,
        };
        if range.access.contains(Access::ON_DEMAND) {
            // Mappings may change while the region lives: only the process itself knows them.
            self.attach_memory()?;
            let kind = PieceKind::Foreign { addr };
            return Ok((Pinned::OnDemand, translation(vec![PieceDesc { len, kind }])));
        }
        let made = freeflow_convert::lock()
            .register(&mut Pages::of(self), addr, len, range.needs_write())
            .map_err(|e| e.errno())?;
        match self.describe(&made) {
            Ok(pieces) => Ok((Pinned::Shared(made), translation(pieces))),
            Err(errno) => {
                self.unpin(Pinned::Shared(made));
                Err(errno)
            }
        }
    }

    /// A region's handle at the router, which takes it over from the table if it is there.
    fn handle(&self, holder: &mut Holder) -> Result<Handle, Errno> {
        let slot = match *holder {
            Holder::Router(handle) => return Ok(handle),
            Holder::Slot(slot) => slot,
        };
        let mr = self.slots.adopt(self, slot)?;
        *holder = Holder::Router(mr);
        Ok(mr)
    }

    fn unpin(&self, pages: Pinned) {
        if let Pinned::Shared(registration) = pages
            && self.is_own()
        {
            freeflow_convert::lock().deregister(&mut Pages::of(self), registration);
        }
    }

    fn describe(&self, made: &Registration) -> Result<Vec<PieceDesc>, Errno> {
        if made.pieces().len() > MAX_PIECES {
            return Err(Errno::NOMEM);
        }
        let foreign = |p: &freeflow_convert::Piece| p.backing == Backing::Foreign;
        if made.pieces().iter().any(foreign) {
            self.attach_memory()?;
        }
        let describe = |piece: &freeflow_convert::Piece| PieceDesc {
            len: piece.len,
            kind: match piece.backing {
                Backing::Pool { segment, offset } => PieceKind::Pool { segment, offset },
                Backing::Foreign => PieceKind::Foreign { addr: piece.addr },
            },
        };
        Ok(made.pieces().iter().map(describe).collect())
    }
}

impl Pd {
    /// Registers `len` bytes at `addr`; work requests name the first one `iova`, or 0 with
    /// [`Access::ZERO_BASED`]. Of shared pages, the router need not be asked. `u64::MAX` bytes at 0
    /// are all addresses, with [`Access::ON_DEMAND`]; ENOMEM: an endpoint whose registered bytes are
    /// limited may not have that.
    pub fn reg_mr(&self, addr: u64, len: u64, iova: u64, access: Access) -> Result<Mr, Errno> {
        let session = &self.context.session;
        session.check_own()?;
        let range = Range {
            addr,
            len,
            iova,
            access,
        };
        let range = range.settle();
        let (pages, translation) = session.pin(&range)?;
        if let Some(slot) = self.reg_in_table(&translation, access) {
            let place = Some(Place { range, pages });
            return Ok(Mr::new(session, Holder::Slot(slot.slot), slot.key, place));
        }
        let request = Request::RegMr(RegMr {
            pd: self.handle,
            translation,
            access,
        });
        match self.make(&request) {
            Ok(mr) => {
                unpoisoned(&mr.state).place = Some(Place { range, pages });
                Ok(mr)
            }
            Err(errno) => {
                session.unpin(pages);
                Err(errno)
            }
        }
    }

    /// Registers one piece of shared pages without asking, if that may be.
    fn reg_in_table(&self, translation: &Translation, access: Access) -> Option<RegionSlot> {
        let [piece] = translation.pieces[..] else {
            return None;
        };
        let PieceKind::Pool { segment, offset } = piece.kind else {
            return None;
        };
        // What the router would refuse, it shall refuse.
        let refused = translation.iova.checked_add(translation.len).is_none();
        let session = &self.context.session;
        if refused || !may_be_in_table(access) || session.link.check() {
            return None;
        }
        let entry = RegionEntry {
            pd: self.handle.0,
            access: access.bits(),
            iova: translation.iova,
            len: translation.len,
            segment,
            offset,
        };
        let owner = (self.context.handle, &self.users);
        session.slots.register(session, owner, &entry)
    }

    /// A region that swallows what is written and reads as zeroes (`ibv_alloc_null_mr(3)`).
    pub fn alloc_null_mr(&self) -> Result<Mr, Errno> {
        self.make(&Request::AllocNullMr { pd: self.handle })
    }

    /// Asks the router for a region.
    pub(crate) fn make(&self, request: &Request) -> Result<Mr, Errno> {
        let session = &self.context.session;
        let answer = match session.call(request) {
            // Slots count as regions.
            Err(Errno::NOMEM) if session.slots.give_back(session) => session.call(request),
            answer => answer,
        };
        match answer? {
            (Reply::Mr(made), _) => Ok(Mr::new(session, Holder::Router(made.mr), made.key, None)),
            _ => Err(Errno::PROTO),
        }
    }

    /// Advises on ranges of on-demand regions (`ibv_advise_mr(3)`).
    pub fn advise_mr(&self, advice: Advise, ranges: &[Sge]) -> Result<(), Errno> {
        for ranges in ranges.chunks(MAX_ADVISED) {
            let described = |sge: &Sge| AdvisedRange {
                addr: sge.addr,
                len: sge.length.into(),
                key: Key(sge.lkey),
            };
            self.context.session.tell(&Request::AdviseMr(AdviseMr {
                pd: self.handle,
                write: advice == Advise::PrefetchWrite,
                ranges: ranges.iter().map(described).collect(),
            }))?;
        }
        let populate = match advice {
            Advise::Prefetch => Advice::LinuxPopulateRead,
            Advise::PrefetchWrite => Advice::LinuxPopulateWrite,
            Advise::PrefetchNoFault => return Ok(()),
        };
        for sge in ranges {
            fetch(sge, populate);
        }
        Ok(())
    }
}

/// Has the kernel make pages present. It is advice: where it fails, they come when they are used.
fn fetch(sge: &Sge, populate: Advice) {
    let page = rustix::param::page_size() as u64;
    let start = sge.addr & !(page - 1);
    let Some(end) = sge.addr.checked_add(sge.length.into()) else {
        return;
    };
    let len = (end - start) as usize;
    // SAFETY: populating changes neither mappings nor contents.
    let _ = unsafe { rustix::mm::madvise(start as *mut _, len, populate) };
}

impl Mr {
    fn new(session: &Arc<Session>, holder: Holder, key: Key, place: Option<Place>) -> Mr {
        Mr {
            session: session.clone(),
            key,
            state: Mutex::new(State { holder, place }),
        }
    }

    /// Its number: that at the router, or its key.
    pub fn number(&self) -> u32 {
        match unpoisoned(&self.state).holder {
            Holder::Router(handle) => handle.0,
            Holder::Slot(_) => self.key.0,
        }
    }

    /// Its key, local and remote.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Whether memory of the program's is in it: neither a null region nor one of device memory.
    pub fn has_memory(&self) -> bool {
        unpoisoned(&self.state).place.is_some()
    }

    /// Changes it; on an error it is as it was. Its key stays. EBUSY: a window is bound to it;
    /// EINVAL: it has no memory of the program's.
    pub fn rereg(&self, change: &Rereg<'_>) -> Result<(), Errno> {
        let session = &self.session;
        session.check_own()?;
        let mut state = unpoisoned(&self.state);
        let State { holder, place } = &mut *state;
        let place = place.as_mut().ok_or(Errno::INVAL)?;
        let mut range = place.range;
        if let Some(access) = change.access {
            let was_zero_based = range.access.contains(Access::ZERO_BASED);
            range.access = access;
            if was_zero_based {
                range.iova = range.addr;
            }
        }
        if let Some((addr, len)) = change.range {
            (range.addr, range.len, range.iova) = (addr, len, addr);
        }
        let range = range.settle();
        // Other rights may need other pages: of memory that the device may write now, or of
        // memory that is to be there on demand.
        let moves = change.range.is_some() || change.access.is_some();
        let (pages, translation) = match moves.then(|| session.pin(&range)).transpose()? {
            Some((pages, translation)) => (Some(pages), Some(translation)),
            None => (None, None),
        };
        let told = session.handle(holder).and_then(|mr| {
            session.tell(&Request::ReregMr(ReregMr {
                mr,
                pd: change.pd.map(|pd| pd.handle),
                translation,
                access: change.access,
            }))
        });
        let unused = match (told, pages) {
            (Ok(()), Some(new)) => {
                place.range = range;
                Some(std::mem::replace(&mut place.pages, new))
            }
            (Ok(()), None) => None,
            (Err(errno), new) => {
                if let Some(new) = new {
                    session.unpin(new);
                }
                return Err(errno);
            }
        };
        if let Some(unused) = unused {
            session.unpin(unused);
        }
        Ok(())
    }

    /// Deregisters it; then nothing is accessed any more by its key. EBUSY: a window is bound to
    /// it.
    pub fn dereg(&self) -> Result<(), Errno> {
        let session = &self.session;
        let holder = unpoisoned(&self.state).holder;
        match holder {
            Holder::Router(mr) => {
                session.destroy(&Request::DeregMr { mr })?;
                session.slots.note_deregistration();
            }
            Holder::Slot(slot) if session.is_own() => {
                session.slots.deregister(session, slot, self.key);
            }
            // The parent's region.
            Holder::Slot(_) => return Err(Errno::INVAL),
        }
        if let Some(place) = unpoisoned(&self.state).place.take() {
            session.unpin(place.pages);
        }
        Ok(())
    }
}
