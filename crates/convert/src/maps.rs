//! What is mapped where in this process, and which of its pages exist.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::page_size;

/// A mapping of the process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Vma {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) offset: u64,
    pub(crate) inode: u64,
    pub(crate) device: (u32, u32),
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) execute: bool,
    pub(crate) shared: bool,
    /// Pages are of the ordinary size (not known from the text form: taken to be).
    pub(crate) small_pages: bool,
}

/// `struct procmap_query` of `<linux/fs.h>` (Linux 6.11).
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const PROCMAP_QUERY: libc::c_ulong = 0xC068_6611;
const COVERING_OR_NEXT: u64 = 0x10;

/// The process's memory map.
#[derive(Debug)]
pub(crate) struct Maps {
    file: File,
    /// Whether the kernel answers single questions.
    query: bool,
}

impl Maps {
    pub(crate) fn open() -> Result<Self, Errno> {
        let file = File::open("/proc/self/maps")
            .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        Ok(Maps { file, query: true })
    }

    /// The mapping that contains `addr`, or the next one after it.
    pub(crate) fn at_or_after(&mut self, addr: u64) -> Option<Vma> {
        if self.query {
            let mut q = ProcmapQuery {
                size: size_of::<ProcmapQuery>() as u64,
                query_flags: COVERING_OR_NEXT,
                query_addr: addr,
                ..ProcmapQuery::default()
            };
            // SAFETY: the kernel reads and writes the structure whose size it is told.
            let done = unsafe { libc::ioctl(self.file.as_raw_fd(), PROCMAP_QUERY, &mut q) };
            if done == 0 {
                return Some(Vma {
                    start: q.vma_start,
                    end: q.vma_end,
                    offset: q.vma_offset,
                    inode: q.inode,
                    device: (q.dev_major, q.dev_minor),
                    read: q.vma_flags & 1 != 0,
                    write: q.vma_flags & 2 != 0,
                    execute: q.vma_flags & 4 != 0,
                    shared: q.vma_flags & 8 != 0,
                    small_pages: q.vma_page_size == page_size(),
                });
            }
            // SAFETY: libc gives the address of this thread's errno.
            if unsafe { *libc::__errno_location() } == libc::ENOENT {
                return None;
            }
            self.query = false;
        }
        self.all().into_iter().find(|vma| vma.end > addr)
    }

    /// All mappings.
    pub(crate) fn all(&self) -> Vec<Vma> {
        let Ok(file) = File::open("/proc/self/maps") else {
            return Vec::new();
        };
        BufReader::new(file)
            .lines()
            .map_while(Result::ok)
            .filter_map(|l| parse(&l))
            .collect()
    }
}

fn parse(line: &str) -> Option<Vma> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let flags = fields.next()?.as_bytes();
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let offset = hex(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    Some(Vma {
        start: hex(start)?,
        end: hex(end)?,
        offset,
        inode: fields.next()?.parse().ok()?,
        device: (hex(major)? as u32, hex(minor)? as u32),
        read: flags.first() == Some(&b'r'),
        write: flags.get(1) == Some(&b'w'),
        execute: flags.get(2) == Some(&b'x'),
        shared: flags.get(3) == Some(&b's'),
        small_pages: !fields.next().unwrap_or_default().contains("hugepage"),
    })
}

/// Whether a mapping holds the main thread's stack, which grows (the kernel put the auxiliary
/// vector's random bytes on it), or this thread's, which cannot be held while it copies itself.
pub(crate) fn holds_stack(vma: &Vma) -> bool {
    let here = 0u8;
    // SAFETY: it reads the auxiliary vector.
    let main = unsafe { libc::getauxval(libc::AT_RANDOM) };
    let range = vma.start..vma.end;
    range.contains(&main) || range.contains(&(std::ptr::from_ref(&here) as u64))
}

/// Whether this is the only thread of the process.
pub(crate) fn is_single_threaded() -> bool {
    // Two links are the directory itself.
    rustix::fs::stat("/proc/self/task").is_ok_and(|stat| stat.st_nlink == 3)
}

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

/// Calls `each` with the parts of a range of private memory that were ever written. Where the
/// kernel cannot tell, that is the whole range.
///
/// It allocates nothing: the range may hold the allocator's own records, which must not change
/// while they are copied.
pub(crate) fn each_touched(
    start: u64,
    end: u64,
    mut each: impl FnMut(u64, u64) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let Ok(pagemap) = rustix::fs::open(c"/proc/self/pagemap", flags, Mode::empty()) else {
        return each(start, end);
    };
    // Write-protection of a page that does not exist looks like a swapped page.
    let wanted = if is_swapping() {
        PRESENT | SWAPPED
    } else {
        PRESENT
    };
    let mut regions = [PageRegion::default(); 64];
    let mut at = start;
    while at < end {
        let mut arg = PagemapScan {
            size: size_of::<PagemapScan>() as u64,
            start: at,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: ZERO,
            category_mask: ZERO,
            category_anyof_mask: wanted,
            return_mask: wanted,
            ..PagemapScan::default()
        };
        // SAFETY: the kernel reads and writes the structure whose size it is told, and writes at
        // most `vec_len` regions.
        let n = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
        let found = usize::try_from(n).ok().and_then(|n| regions.get(..n));
        let Some(found) = found.filter(|_| arg.walk_end > at) else {
            return each(at, end);
        };
        for region in found {
            each(region.start, region.end)?;
        }
        at = arg.walk_end;
    }
    Ok(())
}

/// Whether any page of the process is swapped out, or it cannot be told. Allocates nothing.
fn is_swapping() -> bool {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let Ok(status) = rustix::fs::open(c"/proc/self/status", flags, Mode::empty()) else {
        return true;
    };
    let mut buffer = [0; 4096];
    let Ok(n) = rustix::io::read(&status, &mut buffer) else {
        return true;
    };
    const NONE: &[u8] = b"VmSwap:\t       0 kB";
    !buffer[..n].windows(NONE.len()).any(|window| window == NONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_map_agree() {
        let page = vec![1u8; 64 << 10];
        let addr = page.as_ptr() as u64;
        let mut maps = Maps::open().unwrap();
        let asked = maps.at_or_after(addr).unwrap();
        let listed = Maps {
            query: false,
            ..Maps::open().unwrap()
        }
        .at_or_after(addr)
        .unwrap();
        assert_eq!(asked, listed);
        assert!(asked.start <= addr && addr < asked.end && asked.write && !asked.shared);
        assert!(maps.at_or_after(u64::MAX - 8191).is_none());
    }

    #[test]
    fn the_kernel_says_whether_pages_are_swapped() {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmSwap:"))
            .unwrap();
        assert_eq!(is_swapping(), !line.ends_with(" 0 kB"), "{line}");
    }

    #[test]
    fn lines_are_parsed() {
        let line = "7f00-7fff rw-s 00001000 00:1a 77 /memfd:x (deleted)";
        let vma = parse(line).unwrap();
        assert_eq!(
            (vma.start, vma.end, vma.offset, vma.inode),
            (0x7f00, 0x7fff, 0x1000, 77)
        );
        assert_eq!(vma.device, (0, 0x1a));
        assert!(vma.read && vma.write && vma.shared && !vma.execute);
        assert_eq!(parse("nonsense"), None);
    }
}
