//! The converter: registering, deregistering, collecting what is no longer used.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mm::{
    Advice, MapFlags, MlockFlags, MremapFlags, ProtFlags, madvise, mlock_with, mmap, mremap_fixed,
    munmap,
};

use crate::content::{Content, PART, Pagemap, Part};
use crate::maps::{Maps, Vma, begins_with_arena, is_single_threaded, locked, thread_memory};
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
    /// Of these, because the system refused to replace the pages.
    pub failed_bytes: u64,
}

/// A pool segment as this process maps it.
#[derive(Debug)]
pub(crate) struct Segment {
    /// The source's number of it.
    pub(crate) number: u32,
    /// `None`: its router is gone, and it is mapped nowhere.
    pub(crate) fd: Option<OwnedFd>,
    device: (u32, u32),
    inode: u64,
    /// Its router serves it.
    pub(crate) alive: bool,
}

#[derive(Debug)]
pub(crate) enum Uffds {
    Untried,
    Open(Uffd),
    Refused,
}

/// Converts pages and remembers which are. One per process: see [`crate::lock`].
#[derive(Debug)]
pub struct Converter {
    pub(crate) segments: Vec<Segment>,
    /// By segment and offset: who uses it. Everything that was allocated is there.
    pub(crate) users: Vec<Intervals<Users>>,
    pub(crate) maps: Option<Maps>,
    pub(crate) uffd: Uffds,
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
                failed_bytes: 0,
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
            match self.register_in(source, &vma, at, vma.end.min(end), &mut made) {
                Ok(until) => at = until,
                Err(e) => {
                    self.drop_uses(&made.uses);
                    return Err(e);
                }
            }
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

    /// Registers pages of one mapping, as far as they are backed alike; returns how far it came.
    fn register_in(
        &mut self,
        source: &mut dyn PageSource,
        vma: &Vma,
        start: u64,
        end: u64,
        made: &mut Registration,
    ) -> Result<u64, ConvertError> {
        let shown = self.shows(vma, start);
        let alive = |place: &Place| self.segments[place.segment].alive;
        if let Some(place) = shown.filter(alive) {
            self.add_use(place, end - start, made);
            push(made, start, end, self.backing(place));
            return Ok(end);
        }
        // Pages that a router shared which is gone are converted again.
        let ours = shown.filter(|_| vma.write);
        let private = !vma.shared && vma.inode == 0 && vma.write && !vma.execute;
        if !private && ours.is_none() {
            push(made, start, end, Backing::Foreign);
            return Ok(end);
        }
        // What was converted once is neither; and to look would touch a shared page.
        let mut end = end;
        if private {
            let arena = || {
                let found = start == vma.start && begins_with_arena(vma);
                found.then(|| (start, start + page_size()))
            };
            match thread_memory(vma, start).or_else(arena) {
                Some((from, to)) if from <= start => {
                    let until = to.min(end);
                    push(made, start, until, Backing::Foreign);
                    return Ok(until);
                }
                Some((from, _)) => end = end.min(from),
                None => {}
            }
        }
        let mut until = start;
        match self.convert(source, ours, start, end).map_err(os)? {
            Converted::Unsafe => self.stats.unsafe_bytes += end - start,
            Converted::Until(at, place) => {
                until = at;
                self.stats.failed_bytes += end - until;
                if until > start {
                    self.add_use(place, until - start, made);
                    push(made, start, until, self.backing(place));
                }
            }
        }
        if until < end {
            push(made, until, end, Backing::Foreign);
        }
        Ok(end)
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

    /// The pool pages that a mapping shows at an address: asked of the kernel, for the application
    /// may have unmapped, moved or replaced what we mapped.
    pub(crate) fn shows(&self, vma: &Vma, start: u64) -> Option<Place> {
        if !vma.shared || vma.inode == 0 {
            return None;
        }
        let segment = self.segments.iter().position(|s| s.is(vma))?;
        Some(Place {
            segment,
            offset: vma.offset + (start - vma.start),
        })
    }

    /// The memfd whose pages a mapping shows, if it is one of ours.
    pub(crate) fn memfd(&self, vma: &Vma) -> Option<BorrowedFd<'_>> {
        let place = self.shows(vma, vma.start)?;
        Some(self.segments.get(place.segment)?.fd.as_ref()?.as_fd())
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

    /// Replaces private pages, or pages of a segment whose router is gone, by pool pages.
    fn convert(
        &mut self,
        source: &mut dyn PageSource,
        ours: Option<Place>,
        start: u64,
        end: u64,
    ) -> Result<Converted, Errno> {
        if let Uffds::Untried = self.uffd {
            self.uffd = Uffd::open().map_or(Uffds::Refused, Uffds::Open);
        }
        // Nobody needs to be held if there is nobody else.
        let alone = is_single_threaded();
        let can_hold = match &self.uffd {
            Uffds::Open(uffd) => ours.is_none() || uffd.holds_shared(),
            _ => false,
        };
        if !alone && !can_hold {
            return Ok(Converted::Unsafe);
        }
        let len = end - start;
        let range = source.alloc(len)?;
        let segment = self
            .segment(source, range.segment)
            .inspect_err(|_| source.free(range))?;
        let until = self.replace(alone, segment, range.offset, ours, start, end);
        let done = until - start;
        if done < len {
            source.free(PoolRange {
                offset: range.offset + done,
                len: len - done,
                ..range
            });
        }
        if done > 0 {
            let users = &mut self.users[segment];
            users.insert(range.offset, range.offset + done, Users(0));
            self.idle += done;
            self.stats.conversions += 1;
            self.stats.converted_bytes += done;
            self.close_unmapped();
        }
        let place = Place {
            segment,
            offset: range.offset,
        };
        Ok(Converted::Until(until, place))
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
            fd: Some(fd),
            device,
            inode: stat.st_ino,
            alive: true,
        });
        self.users.push(Intervals::new());
        Ok(self.segments.len() - 1)
    }

    /// Replaces a range part by part, each atomically; returns how far it came.
    fn replace(
        &self,
        alone: bool,
        segment: usize,
        offset: u64,
        ours: Option<Place>,
        start: u64,
        end: u64,
    ) -> u64 {
        let Some(fd) = &self.segments[segment].fd else {
            return start;
        };
        let content = match ours {
            None => Content::Anonymous(Pagemap::open()),
            Some(place) => match &self.segments[place.segment].fd {
                Some(fd) => Content::Shared {
                    fd: fd.as_fd(),
                    offset: place.offset,
                    addr: start,
                },
                None => return start,
            },
        };
        let uffd = match &self.uffd {
            Uffds::Open(uffd) if !alone => Some(uffd),
            _ => None,
        };
        let lock = locked(start, end);
        let mut at = start;
        while at < end {
            let Ok(mut part) = content.next_part(at, end) else {
                break;
            };
            if replace_part(uffd, &content, &mut part, fd, offset + (at - start)).is_err() {
                break;
            }
            for &(from, to) in &lock {
                keep_locked(&part, from.max(part.start), to.min(part.end));
            }
            at = part.end;
        }
        at
    }

    /// Closes segments of routers that are gone, if nothing shows them any more.
    fn close_unmapped(&mut self) {
        if self.segments.iter().any(|s| !s.alive && s.fd.is_some())
            && let Some(all) = self.maps.as_ref().and_then(Maps::at_one_moment)
        {
            for segment in self.segments.iter_mut().filter(|s| !s.alive) {
                if !all.iter().any(|vma| segment.is(vma)) {
                    segment.fd = None;
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
        self.idle_at_last_collect = self.idle;
        let all = self.maps.as_ref().and_then(Maps::at_one_moment);
        let Some(all) = all else { return };
        for (index, segment) in self.segments.iter().enumerate().filter(|(_, s)| s.alive) {
            // The source of another session cannot take it back.
            let inode = |fd| rustix::fs::fstat(fd).ok().map(|stat| stat.st_ino);
            if source.fd(segment.number).and_then(inode) != Some(segment.inode) {
                continue;
            }
            let users = &mut self.users[index];
            let mut unmapped = Intervals::<Users>::new();
            for (start, end, count) in users.iter().filter(|(_, _, users)| users.0 == 0) {
                unmapped.insert(start, end, count);
            }
            for vma in all.iter().filter(|vma| segment.is(vma)) {
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
        self.idle_at_last_collect = self.idle;
    }
}

impl Segment {
    fn is(&self, vma: &Vma) -> bool {
        self.inode == vma.inode && self.device == vma.device
    }
}

/// What became of a range that was to be converted.
enum Converted {
    /// Nothing was done: a write might be lost.
    Unsafe,
    /// It is converted up to this address, to pool pages from this one.
    Until(u64, Place),
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

/// Replaces one part of a range, or its beginning, by the pages of a memfd at `offset`.
fn replace_part(
    uffd: Option<&Uffd>,
    content: &Content<'_>,
    part: &mut Part,
    fd: &OwnedFd,
    offset: u64,
) -> Result<(), Errno> {
    let (start, mut len) = (part.start, part.end - part.start);
    let Some(uffd) = uffd else {
        content.copy(part, fd, offset)?;
        return map_over(fd, offset, start, len);
    };
    if part.pages.is_empty() {
        uffd.hold_first_touch(start, len)?;
        if content.is_untouched(start, part.end) == Ok(true) {
            let moved = map_over(fd, offset, start, len);
            match moved {
                Ok(()) => uffd.wake(start, len),
                Err(_) => uffd.release(start, len),
            }
            return moved;
        }
        // Somebody was faster. To hold writers takes page tables: not for all of it.
        uffd.release(start, len);
        len = len.min(PART);
        part.end = start + len;
    }
    match content {
        Content::Anonymous(_) => uffd.hold_writers(start, len)?,
        Content::Shared { .. } => uffd.hold_shared_writers(start, len)?,
    }
    let moved = content
        .copy(part, fd, offset)
        .and_then(|()| map_over(fd, offset, start, len));
    match moved {
        // The new mapping is not registered: only those who wait must be told.
        Ok(()) => uffd.wake(start, len),
        Err(_) => uffd.release(start, len),
    }
    moved
}

/// Locks in memory what was locked before its pages were replaced.
fn keep_locked(part: &Part, from: u64, to: u64) {
    if from >= to {
        return;
    }
    // Where it fails, the pages can be swapped out: slower, no more. What was never touched is
    // locked when it is.
    // SAFETY: locking and reading ahead change no content.
    unsafe {
        let _ = mlock_with(from as *mut _, (to - from) as usize, MlockFlags::ONFAULT);
        for &(s, e) in &part.pages {
            let (s, e) = (s.max(from), e.min(to));
            if s < e {
                let _ = madvise(s as *mut _, (e - s) as usize, Advice::LinuxPopulateWrite);
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use super::*;

    /// A pool that only grows.
    struct Pool(OwnedFd, u64);

    impl PageSource for Pool {
        fn alloc(&mut self, len: u64) -> Result<PoolRange, Errno> {
            let offset = self.1;
            self.1 += len;
            Ok(PoolRange {
                segment: 0,
                offset,
                len,
            })
        }

        fn free(&mut self, _: PoolRange) {}

        fn fd(&self, _: u32) -> Option<BorrowedFd<'_>> {
            Some(self.0.as_fd())
        }
    }

    #[test]
    fn kernels_that_protect_no_missing_pages_lose_no_write_either() {
        let Some(uffd) = Uffd::without_unpopulated() else {
            eprintln!("SKIPPED: needs userfaultfd");
            return;
        };
        let mut converter = Converter::new();
        converter.uffd = Uffds::Open(uffd);
        let mut pool = Pool(freeflow_shm::sealed_memfd("t", 1 << 30).unwrap(), 0);
        let len = 16 * page_size() as usize;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        for _ in 0..100 {
            // SAFETY: a fresh mapping at an address of the kernel's choice.
            let addr = unsafe {
                rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE)
            }
            .unwrap();
            // SAFETY: it stays mapped until the threads have ended; zeroes are atomics.
            let words = unsafe { std::slice::from_raw_parts(addr.cast::<AtomicU64>(), len / 8) };
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let mut turns = 0;
                    while !stop.load(Ordering::Relaxed) || turns < 2 {
                        turns += 1;
                        for word in words {
                            word.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    turns
                });
                let made = converter.register(&mut pool, addr as u64, len as u64, true);
                stop.store(true, Ordering::Relaxed);
                let turns = writer.join().unwrap();
                assert!(words.iter().all(|w| w.load(Ordering::Relaxed) == turns));
                let made = made.unwrap();
                assert!(matches!(
                    made.pieces()[..],
                    [Piece {
                        backing: Backing::Pool { .. },
                        ..
                    }]
                ));
                converter.deregister(&mut pool, made);
            });
            // SAFETY: nobody uses it any more.
            unsafe { munmap(addr, len).unwrap() };
        }
    }
}
