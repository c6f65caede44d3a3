//! The converter: registering, deregistering, collecting what is no longer used.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap, mremap_fixed, munmap};

use crate::maps::{Maps, Vma, each_touched, holds_stack, is_single_threaded};
use crate::records::{Intervals, Place, Users};
use crate::uffd::Uffd;
use crate::{Backing, ConvertError, PageSource, Piece, PoolRange, Registration, page_size};

/// Unused converted bytes below which nobody looks for ranges to give back.
const COLLECT_ABOVE: u64 = 64 << 20;

/// What a converter has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Ranges converted.
    pub conversions: u64,
    /// Bytes converted.
    pub converted_bytes: u64,
    /// Bytes registered that could not be shared.
    pub foreign_bytes: u64,
    /// Of these, because userfaultfd is refused and the process has several threads.
    pub unsafe_bytes: u64,
}

/// A pool segment as this process maps it.
#[derive(Debug)]
pub(crate) struct Segment {
    /// The source's number of it.
    pub(crate) number: u32,
    pub(crate) fd: OwnedFd,
    device: (u32, u32),
    inode: u64,
    /// Its router serves it.
    pub(crate) alive: bool,
}

#[derive(Debug)]
enum Uffds {
    Untried,
    Open(Uffd),
    Refused,
}

/// Converts pages and remembers which are. One per process: see [`crate::lock`].
#[derive(Debug)]
pub struct Converter {
    pub(crate) segments: Vec<Segment>,
    /// By address: what we mapped there.
    pub(crate) mapped: Intervals<Place>,
    /// By segment and offset: who uses it. Everything that was allocated is there.
    pub(crate) users: Vec<Intervals<Users>>,
    maps: Option<Maps>,
    uffd: Uffds,
    pub(crate) idle: u64,
    idle_at_last_collect: u64,
    live: u64,
    stats: Stats,
}

impl Default for Converter {
    fn default() -> Self {
        Self::new()
    }
}

fn os(errno: Errno) -> ConvertError {
    ConvertError::Os(errno)
}

impl Converter {
    /// One that has converted nothing.
    pub const fn new() -> Self {
        Converter {
            segments: Vec::new(),
            mapped: Intervals::new(),
            users: Vec::new(),
            maps: None,
            uffd: Uffds::Untried,
            idle: 0,
            idle_at_last_collect: 0,
            live: 0,
            stats: Stats {
                conversions: 0,
                converted_bytes: 0,
                foreign_bytes: 0,
                unsafe_bytes: 0,
            },
        }
    }

    /// What it has done.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Registers `len` bytes at `addr`: converts what can be converted, and says what backs each
    /// part. `need_write`: the device may write there.
    pub fn register(
        &mut self,
        source: &mut dyn PageSource,
        addr: u64,
        len: u64,
        need_write: bool,
    ) -> Result<Registration, ConvertError> {
        let page = page_size();
        let end = addr.checked_add(len).filter(|&end| end > addr);
        let end = end.and_then(|end| end.checked_next_multiple_of(page));
        let end = end.ok_or(ConvertError::Range { addr, len })?;
        let mut made = Registration {
            addr,
            len,
            pieces: Vec::new(),
            uses: Vec::new(),
        };
        let mut at = addr & !(page - 1);
        while at < end {
            let vma = self.maps()?.at_or_after(at);
            let vma = vma.filter(|vma| vma.start <= at && vma.read && (vma.write || !need_write));
            let Some(vma) = vma else {
                self.drop_uses(&made.uses);
                return Err(ConvertError::Fault { addr: at });
            };
            let until = vma.end.min(end);
            if let Err(e) = self.register_in(source, &vma, at, until, &mut made) {
                self.drop_uses(&made.uses);
                return Err(e);
            }
            at = until;
        }
        made.pieces = trim(&made.pieces, addr, addr + len);
        let foreign = made.pieces.iter().filter(|p| p.backing == Backing::Foreign);
        self.stats.foreign_bytes += foreign.map(|p| p.len).sum::<u64>();
        self.collect_if_due(source);
        Ok(made)
    }

    /// Ends a registration. The pages stay as they are: they are the application's memory.
    pub fn deregister(&mut self, source: &mut dyn PageSource, registration: Registration) {
        self.drop_uses(&registration.uses);
        self.collect_if_due(source);
    }

    /// The router is gone: what was converted stays mapped, and is not shared with anybody.
    pub fn forget_source(&mut self) {
        for segment in &mut self.segments {
            segment.alive = false;
        }
        for users in &mut self.users {
            users.clear();
        }
        (self.idle, self.live, self.idle_at_last_collect) = (0, 0, 0);
    }

    /// In a child of `fork`, whose converted pages were replaced by copies: nothing is converted.
    pub(crate) fn reset(&mut self) {
        *self = Converter::new();
    }

    fn maps(&mut self) -> Result<&mut Maps, ConvertError> {
        if self.maps.is_none() {
            self.maps = Some(Maps::open().map_err(os)?);
        }
        self.maps.as_mut().ok_or(ConvertError::Os(Errno::IO))
    }

    /// Registers the pages of one mapping.
    fn register_in(
        &mut self,
        source: &mut dyn PageSource,
        vma: &Vma,
        start: u64,
        end: u64,
        made: &mut Registration,
    ) -> Result<(), ConvertError> {
        if let Some(place) = self.ours(vma, start) {
            self.add_use(place, end - start, made);
            push(made, start, end, self.backing(place));
            return Ok(());
        }
        // Whatever we had there is gone: the application has mapped something else.
        self.mapped.remove(start, end);
        let private = !vma.shared && vma.inode == 0 && vma.write && !vma.execute;
        if !private || !vma.small_pages || holds_stack(vma) {
            push(made, start, end, Backing::Foreign);
            return Ok(());
        }
        match self.convert(source, start, end) {
            Ok(Some(place)) => {
                self.add_use(place, end - start, made);
                push(made, start, end, self.backing(place));
                Ok(())
            }
            Ok(None) => {
                self.stats.unsafe_bytes += end - start;
                push(made, start, end, Backing::Foreign);
                Ok(())
            }
            Err(errno) => Err(os(errno)),
        }
    }

    fn backing(&self, place: Place) -> Backing {
        match self.segments.get(place.segment) {
            Some(segment) => Backing::Pool {
                segment: segment.number,
                offset: place.offset,
            },
            None => Backing::Foreign,
        }
    }

    /// The pool pages that a mapping shows at an address, if it is one of ours: asked of the
    /// kernel, not of our records.
    pub(crate) fn ours(&self, vma: &Vma, start: u64) -> Option<Place> {
        if !vma.shared || !vma.write {
            return None;
        }
        self.shows(vma, start)
            .filter(|place| self.segments[place.segment].alive)
    }

    /// The pool pages that a mapping shows at an address, of whatever segment.
    pub(crate) fn shows(&self, vma: &Vma, start: u64) -> Option<Place> {
        let same = |s: &Segment| s.inode == vma.inode && s.device == vma.device;
        let segment = self.segments.iter().position(same)?;
        Some(Place {
            segment,
            offset: vma.offset + (start - vma.start),
        })
    }

    fn add_use(&mut self, place: Place, len: u64, made: &mut Registration) {
        let (start, end) = (place.offset, place.offset + len);
        if let Some(users) = self.users.get_mut(place.segment) {
            let fresh: u64 = users
                .within(start, end)
                .iter()
                .filter(|(_, _, users)| users.0 == 0)
                .map(|(s, e, _)| e - s)
                .sum();
            users.update(start, end, |users| Users(users.0.saturating_add(1)));
            self.idle -= fresh.min(self.idle);
            self.live += fresh;
            made.uses.push((place.segment, start, end));
        }
    }

    fn drop_uses(&mut self, uses: &[(usize, u64, u64)]) {
        for &(segment, start, end) in uses {
            let alive = self.segments.get(segment).is_some_and(|s| s.alive);
            let Some(users) = self.users.get_mut(segment).filter(|_| alive) else {
                continue;
            };
            users.update(start, end, |users| Users(users.0.saturating_sub(1)));
            let unused: u64 = users
                .within(start, end)
                .iter()
                .filter(|(_, _, users)| users.0 == 0)
                .map(|(s, e, _)| e - s)
                .sum();
            self.idle += unused;
            self.live -= unused.min(self.live);
        }
    }

    /// Replaces private pages by pool pages. `None`: it cannot be done safely.
    fn convert(
        &mut self,
        source: &mut dyn PageSource,
        start: u64,
        end: u64,
    ) -> Result<Option<Place>, Errno> {
        if let Uffds::Untried = self.uffd {
            self.uffd = Uffd::open().map_or(Uffds::Refused, Uffds::Open);
        }
        // Nobody else can write if there is nobody else.
        if matches!(self.uffd, Uffds::Refused) && !is_single_threaded() {
            return Ok(None);
        }
        let len = end - start;
        let range = source.alloc(len)?;
        let result = self.segment(source, range.segment).and_then(|segment| {
            self.replace(segment, range.offset, start, len)?;
            Ok(Place {
                segment,
                offset: range.offset,
            })
        });
        match result {
            Ok(place) => {
                self.mapped.insert(start, end, place);
                self.users[place.segment].insert(range.offset, range.offset + len, Users(0));
                self.idle += len;
                self.stats.conversions += 1;
                self.stats.converted_bytes += len;
                Ok(Some(place))
            }
            Err(errno) => {
                source.free(range);
                Err(errno)
            }
        }
    }

    /// Our own index of a segment.
    pub(crate) fn segment(&mut self, source: &dyn PageSource, number: u32) -> Result<usize, Errno> {
        let known = self
            .segments
            .iter()
            .position(|s| s.alive && s.number == number);
        if let Some(known) = known {
            return Ok(known);
        }
        let fd = source.fd(number).ok_or(Errno::BADF)?;
        let stat = rustix::fs::fstat(fd)?;
        let device = (
            rustix::fs::major(stat.st_dev),
            rustix::fs::minor(stat.st_dev),
        );
        let fd = rustix::io::fcntl_dupfd_cloexec(fd, 0)?;
        self.segments.push(Segment {
            number,
            fd,
            device,
            inode: stat.st_ino,
            alive: true,
        });
        self.users.push(Intervals::new());
        Ok(self.segments.len() - 1)
    }

    fn replace(&self, segment: usize, offset: u64, start: u64, len: u64) -> Result<(), Errno> {
        let fd = &self.segments[segment].fd;
        let uffd = match &self.uffd {
            Uffds::Open(uffd) => Some(uffd),
            _ => None,
        };
        if let Some(uffd) = uffd {
            uffd.protect(start, len)?;
        }
        let moved = copy(fd, offset, start, len).and_then(|()| map_over(fd, offset, start, len));
        if let Some(uffd) = uffd {
            match moved {
                // The new mapping is not registered: only those who wait must be told.
                Ok(()) => uffd.wake(start, len),
                Err(_) => uffd.release(start, len),
            }
        }
        moved
    }

    /// Makes writers to converted pages wait, before a fork; and lets them go on, after it.
    pub(crate) fn hold_writers(&self, hold: bool) {
        if let Uffds::Open(uffd) = &self.uffd {
            for (start, end, _) in self.mapped.iter() {
                if hold {
                    // Where it fails, a child may see a page while it is written, no more.
                    let _ = uffd.protect(start, end - start);
                } else {
                    uffd.release(start, end - start);
                }
            }
        }
    }

    fn collect_if_due(&mut self, source: &mut dyn PageSource) {
        let grown = self.idle >= self.idle_at_last_collect + self.idle_at_last_collect / 2;
        if self.idle > COLLECT_ABOVE.max(self.live) && grown {
            self.collect(source);
        }
    }

    /// Gives pool ranges back that no registration uses and that are mapped nowhere any more.
    /// The application may have moved a mapping (`realloc` does): all mappings are looked at.
    pub fn collect(&mut self, source: &mut dyn PageSource) {
        let Some(maps) = &self.maps else { return };
        let all = maps.all();
        for (index, segment) in self.segments.iter().enumerate().filter(|(_, s)| s.alive) {
            let users = &mut self.users[index];
            let mut unmapped = Intervals::<Users>::new();
            for (start, end, count) in users.iter().filter(|(_, _, users)| users.0 == 0) {
                unmapped.insert(start, end, count);
            }
            let shows = |v: &&Vma| v.inode == segment.inode && v.device == segment.device;
            for vma in all.iter().filter(shows) {
                unmapped.remove(vma.offset, vma.offset + (vma.end - vma.start));
            }
            for (start, end, _) in unmapped.iter() {
                let len = end - start;
                source.free(PoolRange {
                    segment: segment.number,
                    offset: start,
                    len,
                });
                users.remove(start, end);
                self.idle -= len.min(self.idle);
            }
        }
        // Records of ranges that are mapped elsewhere now are of no use.
        let stale: Vec<_> = self
            .mapped
            .iter()
            .filter(|&(s, _, p)| !self.shown(&all, s, p))
            .collect();
        for (start, end, _) in stale {
            self.mapped.remove(start, end);
        }
        self.idle_at_last_collect = self.idle;
    }

    fn shown(&self, all: &[Vma], start: u64, place: Place) -> bool {
        let vma = all.iter().find(|vma| (vma.start..vma.end).contains(&start));
        vma.and_then(|vma| self.ours(vma, start)) == Some(place)
    }
}

fn push(made: &mut Registration, start: u64, end: u64, backing: Backing) {
    if let Some(last) = made.pieces.last_mut() {
        let follows = match (last.backing, backing) {
            (Backing::Foreign, Backing::Foreign) => true,
            (
                Backing::Pool {
                    segment: a,
                    offset: from,
                },
                Backing::Pool {
                    segment: b,
                    offset: to,
                },
            ) => a == b && from + last.len == to,
            _ => false,
        };
        if follows {
            last.len += end - start;
            return;
        }
    }
    made.pieces.push(Piece {
        addr: start,
        len: end - start,
        backing,
    });
}

/// Cuts pieces of whole pages to the bytes that are registered.
fn trim(pieces: &[Piece], start: u64, end: u64) -> Vec<Piece> {
    pieces
        .iter()
        .map(|piece| {
            let from = piece.addr.max(start);
            let to = (piece.addr + piece.len).min(end);
            let skip = from - piece.addr;
            let backing = match piece.backing {
                Backing::Pool { segment, offset } => Backing::Pool {
                    segment,
                    offset: offset + skip,
                },
                Backing::Foreign => Backing::Foreign,
            };
            Piece {
                addr: from,
                len: to - from,
                backing,
            }
        })
        .collect()
}

/// Copies the pages that exist into the memfd. It must not allocate: see [`each_touched`].
fn copy(fd: &OwnedFd, offset: u64, start: u64, len: u64) -> Result<(), Errno> {
    each_touched(start, start + len, |from, to| {
        let at = offset + (from - start);
        // All pages at once: five times faster than one after the other.
        rustix::fs::fallocate(fd, rustix::fs::FallocateFlags::KEEP_SIZE, at, to - from)?;
        // SAFETY: the caller has found the range mapped and readable; other threads' writes are
        // held, or there are no other threads. If the application unmaps it meanwhile, the system
        // call fails.
        let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, (to - from) as usize) };
        let mut done = 0;
        while done < bytes.len() {
            done += rustix::io::pwrite(fd, &bytes[done..], at + done as u64)?;
        }
        Ok(())
    })
}

/// Maps a part of a memfd in place of what is at an address.
fn map_over(fd: &OwnedFd, offset: u64, start: u64, len: u64) -> Result<(), Errno> {
    let len = len as usize;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice; then it moves, atomically,
    // over pages of the same content that the application has registered.
    unsafe {
        let new = mmap(
            std::ptr::null_mut(),
            len,
            prot,
            MapFlags::SHARED,
            fd.as_fd(),
            offset,
        )?;
        let over = mremap_fixed(new, len, len, MremapFlags::MAYMOVE, start as *mut _);
        if let Err(errno) = over {
            let _ = munmap(new, len);
            return Err(errno);
        }
    }
    Ok(())
}
