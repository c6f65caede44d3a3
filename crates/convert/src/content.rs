//! Which pages of a range have content, and copying them to a memfd.
//!
//! What runs while other threads are held allocates nothing: they may hold the allocator's locks,
//! and the range may hold its records, which must not change while they are copied.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::maps::open;
use crate::page_size;

/// Untouched memory of this size or more is held without page tables.
pub(crate) const GAP: u64 = 32 << 20;

/// Memory with content is replaced in parts of about this size. Nobody waits for long, and the
/// pages that one part frees, which are in the cache, take the next one.
pub(crate) const PART: u64 = 4 << 20;

/// `struct pm_scan_arg` of `<linux/fs.h>` (Linux 6.7).
#[repr(C)]
#[derive(Default)]
struct PagemapScan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const ZERO: u64 = 1 << 5;

/// What a range shows.
pub(crate) enum Content<'a> {
    /// Private anonymous memory.
    Anonymous(Pagemap),
    /// A shared mapping of a memfd: which, and what offset is at what address.
    Shared {
        fd: BorrowedFd<'a>,
        offset: u64,
        addr: u64,
    },
}

/// Who knows which private pages exist.
pub(crate) enum Pagemap {
    /// `/proc/self/pagemap` of Linux 6.7.
    Scan(OwnedFd),
    /// That of older kernels: a word for each page.
    Words(OwnedFd),
    /// `mincore`, which is faster, but does not see what is swapped out: only where there is no
    /// swap space.
    Resident,
    /// Nobody: all pages are taken to exist.
    Unknown,
}

impl Pagemap {
    pub(crate) fn open() -> Self {
        let pagemap = open(c"/proc/self/pagemap");
        if let Ok(fd) = &pagemap {
            let mut arg = PagemapScan {
                size: size_of::<PagemapScan>() as u64,
                return_mask: PRESENT,
                ..PagemapScan::default()
            };
            // SAFETY: the kernel reads and writes the structure whose size it is told; the range
            // and the vector are empty.
            if unsafe { libc::ioctl(fd.as_raw_fd(), PAGEMAP_SCAN, &mut arg) } == 0
                && let Ok(fd) = pagemap
            {
                return Pagemap::Scan(fd);
            }
        }
        Self::without_scan(pagemap.ok(), rustix::system::sysinfo().totalswap != 0)
    }

    fn without_scan(pagemap: Option<OwnedFd>, swap: bool) -> Self {
        match pagemap {
            _ if !swap => Pagemap::Resident,
            Some(fd) => Pagemap::Words(fd),
            None => Pagemap::Unknown,
        }
    }
}

/// What pages show.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Content.
    Data,
    /// Content or zeroes: who knows that a page exists does not know which.
    DataOrZeroes,
    /// Zeroes, by the page that all share. A first write to it is none to a page that does not
    /// exist.
    Zeroes,
    /// What is swapped out, or a protected page that does not exist: they look alike.
    Perhaps,
}

/// What continues a walk over a range.
type Step<'a> = dyn FnMut(u64, u64, Kind) -> Result<bool, Errno> + 'a;

impl Content<'_> {
    /// Calls `each` with the parts of a range that exist, in order, as long as it says so.
    fn walk(&self, start: u64, end: u64, each: &mut Step<'_>) -> Result<(), Errno> {
        match self {
            Content::Anonymous(Pagemap::Scan(fd)) => scan(fd, start, end, each),
            Content::Anonymous(Pagemap::Words(fd)) => words(fd, start, end, each),
            Content::Anonymous(Pagemap::Resident) => resident(start, end, each),
            Content::Anonymous(Pagemap::Unknown) => {
                each(start, end, Kind::DataOrZeroes).map(|_| ())
            }
            Content::Shared { fd, offset, addr } => {
                let (from, to) = (offset + (start - addr), offset + (end - addr));
                each_extent(*fd, from, to, |s, e| {
                    each(addr + (s - offset), addr + (e - offset), Kind::Data)
                })
            }
        }
    }

    /// The next part of a range that is to be replaced at once, and the pages of it that exist
    /// (none: it is untouched). Allocates; to be called while nobody is held.
    pub(crate) fn next_part(&self, start: u64, end: u64) -> Result<Part, Errno> {
        let mut pages: Vec<(u64, u64)> = Vec::new();
        let mut until = None;
        self.walk(start, end, &mut |s, e, _| {
            let last = pages.last().map_or(start, |&(_, e)| e);
            if s - last >= GAP {
                // A gap at the beginning is a part of its own; so is one behind some content.
                until = Some(if pages.is_empty() { s } else { last });
                return Ok(false);
            }
            if e - start > PART {
                let cut = e.min((start + PART).max(s + page_size()));
                pages.push((s, cut));
                until = Some(cut);
                return Ok(false);
            }
            pages.push((s, e));
            Ok(true)
        })?;
        let end = until.unwrap_or(match pages.last() {
            Some(&(_, last)) if end - last >= GAP => last,
            _ => end,
        });
        Ok(Part { start, end, pages })
    }

    /// Whether nothing in a range exists.
    pub(crate) fn is_untouched(&self, start: u64, end: u64) -> Result<bool, Errno> {
        let mut untouched = true;
        self.walk(start, end, &mut |_, _, _| {
            untouched = false;
            Ok(false)
        })?;
        Ok(untouched)
    }

    /// Copies a part to a memfd. Other threads' writes are held, or there are no other threads.
    pub(crate) fn copy(&self, part: &Part, to: &OwnedFd, offset: u64) -> Result<(), Errno> {
        let place = |at: u64| offset + (at - part.start);
        let mut known = part.pages.iter().peekable();
        self.walk(part.start, part.end, &mut |s, e, kind| {
            match kind {
                Kind::Data => return copy(s, e, to, place(s)).map(|()| true),
                Kind::DataOrZeroes => return copy_data(s, e, to, place(s)).map(|()| true),
                Kind::Zeroes => return Ok(true),
                Kind::Perhaps => {}
            }
            // It existed before it was protected, or it does not.
            while known.next_if(|&&(_, ke)| ke <= s).is_some() {}
            for &(ks, ke) in known.clone().take_while(|&&(ks, _)| ks < e) {
                copy(ks.max(s), ke.min(e), to, place(ks.max(s)))?;
            }
            Ok(true)
        })
    }
}

/// A part of a range, and its pages that exist.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) pages: Vec<(u64, u64)>,
}

fn scan(pagemap: &OwnedFd, start: u64, end: u64, each: &mut Step<'_>) -> Result<(), Errno> {
    let mut regions = [PageRegion::default(); 64];
    let mut at = start;
    while at < end {
        let mut arg = PagemapScan {
            size: size_of::<PagemapScan>() as u64,
            start: at,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            // Whoever wants one part does not pay for the whole range.
            max_pages: PART / page_size(),
            category_anyof_mask: PRESENT | SWAPPED,
            return_mask: PRESENT | SWAPPED | ZERO,
            ..PagemapScan::default()
        };
        // SAFETY: the kernel reads and writes the structure whose size it is told, and writes at
        // most `vec_len` regions.
        let n = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
        let found = usize::try_from(n).ok().and_then(|n| regions.get(..n));
        let found = found.filter(|_| arg.walk_end > at).ok_or(Errno::IO)?;
        for region in found {
            let kind = match region.categories {
                of if of & ZERO != 0 => Kind::Zeroes,
                of if of & PRESENT != 0 => Kind::Data,
                _ => Kind::Perhaps,
            };
            if !each(region.start, region.end, kind)? {
                return Ok(());
            }
        }
        at = arg.walk_end;
    }
    Ok(())
}

fn words(pagemap: &OwnedFd, start: u64, end: u64, each: &mut Step<'_>) -> Result<(), Errno> {
    const PRESENT: u8 = 1 << 7;
    const SWAPPED: u8 = 1 << 6;
    let page = page_size();
    let mut buffer = [0u8; 4096];
    let mut at = start;
    while at < end {
        let len = ((end - at) / page * 8).min(buffer.len() as u64) as usize;
        let n = rustix::io::pread(pagemap, &mut buffer[..len], at / page * 8)?;
        let (words, []) = buffer[..n].as_chunks::<8>() else {
            return Err(Errno::IO);
        };
        if words.is_empty() {
            return Err(Errno::IO);
        }
        // The highest byte has what matters.
        let kind = |word: &[u8; 8]| word[7] & (PRESENT | SWAPPED);
        let mut from = at;
        for run in words.chunk_by(|a, b| kind(a) == kind(b)) {
            let to = from + run.len() as u64 * page;
            let go_on = match kind(&run[0]) {
                0 => true,
                SWAPPED => each(from, to, Kind::Perhaps)?,
                _ => each(from, to, Kind::DataOrZeroes)?,
            };
            if !go_on {
                return Ok(());
            }
            from = to;
        }
        at = from;
    }
    Ok(())
}

fn resident(start: u64, end: u64, each: &mut Step<'_>) -> Result<(), Errno> {
    let page = page_size();
    let mut present = [0u8; 4096];
    let mut at = start;
    while at < end {
        let len = (end - at).min(present.len() as u64 * page);
        // SAFETY: the kernel writes one byte for each page of the range.
        if unsafe { libc::mincore(at as *mut _, len as usize, present.as_mut_ptr()) } != 0 {
            return Err(Errno::FAULT);
        }
        let pages = &present[..(len / page) as usize];
        let mut from = at;
        for run in pages.chunk_by(|a, b| a & 1 == b & 1) {
            let to = from + run.len() as u64 * page;
            if run[0] & 1 != 0 && !each(from, to, Kind::DataOrZeroes)? {
                return Ok(());
            }
            from = to;
        }
        at += len;
    }
    Ok(())
}

/// Calls `each` with the parts of a memfd's range that are not holes, as long as it says so.
pub(crate) fn each_extent(
    fd: BorrowedFd<'_>,
    start: u64,
    end: u64,
    mut each: impl FnMut(u64, u64) -> Result<bool, Errno>,
) -> Result<(), Errno> {
    let mut at = start;
    while at < end {
        let data = match rustix::fs::seek(fd, SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno),
        };
        let hole = rustix::fs::seek(fd, SeekFrom::Hole(data))?.min(end);
        if !each(data, hole)? {
            break;
        }
        at = hole;
    }
    Ok(())
}

/// Copies the pages that are not all zeroes, as the memfd's are.
fn copy_data(start: u64, end: u64, to: &OwnedFd, offset: u64) -> Result<(), Errno> {
    let page = page_size();
    let pages = (start..end).step_by(page as usize);
    let is_zeroes = |at: u64| {
        let words = at as *const u64;
        // A page that begins with a zero and is the same one word further on.
        // SAFETY: as in `copy`; the page is aligned.
        unsafe {
            let rest = page as usize - size_of::<u64>();
            *words == 0 && libc::memcmp(words.cast(), words.add(1).cast(), rest) == 0
        }
    };
    let mut from = start;
    for at in pages {
        if is_zeroes(at) {
            if from < at {
                copy(from, at, to, offset + (from - start))?;
            }
            from = at + page;
        }
    }
    if from < end {
        copy(from, end, to, offset + (from - start))?;
    }
    Ok(())
}

fn copy(start: u64, end: u64, to: &OwnedFd, offset: u64) -> Result<(), Errno> {
    // SAFETY: the caller has found the range mapped and readable, and nobody writes to it. If the
    // application unmaps it meanwhile, the system call fails.
    let bytes = unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) };
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pwrite(to.as_fd(), &bytes[done..], offset + done as u64)? {
            0 => return Err(Errno::IO),
            n => done += n,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    use super::*;

    /// Copies memory of which the pages 1, 5 and 6 were written, 6 with zeroes, and 3 was read.
    fn copied(pagemap: Pagemap) -> Vec<(u64, u64)> {
        let page = page_size();
        let len = 16 * page;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice, used here alone.
        let addr = unsafe {
            let addr = mmap_anonymous(std::ptr::null_mut(), len as usize, prot, MapFlags::PRIVATE);
            let addr = addr.unwrap();
            rustix::mm::madvise(addr, len as usize, rustix::mm::Advice::LinuxNoHugepage).unwrap();
            let byte = |page_index: u64| addr.cast::<u8>().add((page_index * page) as usize);
            byte(1).write_volatile(1);
            byte(5).write_volatile(5);
            byte(6).write_volatile(0);
            byte(3).read_volatile();
            addr
        };
        let start = addr as u64;
        let content = Content::Anonymous(pagemap);
        let part = content.next_part(start, start + len).unwrap();
        assert_eq!((part.start, part.end), (start, start + len));
        assert!(
            !content
                .is_untouched(start + 4 * page, start + 6 * page)
                .unwrap()
        );
        let fd = freeflow_shm::sealed_memfd("t", len).unwrap();
        content.copy(&part, &fd, 0).unwrap();
        let mut bytes = vec![0; len as usize];
        assert_eq!(rustix::io::pread(&fd, &mut bytes, 0), Ok(len as usize));
        for (at, &byte) in bytes.iter().enumerate() {
            let wanted = match at as u64 {
                at if at == page => 1,
                at if at == 5 * page => 5,
                _ => 0,
            };
            assert_eq!(byte, wanted, "at {at}");
        }
        let mut extents = Vec::new();
        each_extent(fd.as_fd(), 0, len, |s, e| {
            extents.push((s / page, e / page));
            Ok(true)
        })
        .unwrap();
        // SAFETY: nobody uses it any more.
        unsafe { munmap(addr, len as usize).unwrap() };
        extents
    }

    #[test]
    fn every_way_to_know_finds_the_same_pages() {
        let pagemap = || open(c"/proc/self/pagemap").ok();
        for known in [
            Pagemap::without_scan(pagemap(), true),
            Pagemap::without_scan(None, true),
        ] {
            assert_eq!(copied(known), [(1, 2), (5, 6)]);
        }
        if rustix::system::sysinfo().totalswap == 0 {
            assert_eq!(copied(Pagemap::without_scan(None, false)), [(1, 2), (5, 6)]);
        } else {
            eprintln!("SKIPPED: mincore, which needs a machine without swap space");
        }
        match Pagemap::open() {
            // It does not look at what was written.
            known @ Pagemap::Scan(_) => assert_eq!(copied(known), [(1, 2), (5, 7)]),
            _ => eprintln!("SKIPPED: PAGEMAP_SCAN, which needs Linux 6.7"),
        }
    }
}
