//! What is mapped where in this process.
//!
//! Nothing here allocates unless it says so: it is used while other threads are held, which may
//! hold the allocator's locks, and in children of `fork` that still share pages with their parent.

use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

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
    file: OwnedFd,
    /// Whether the kernel answers single questions.
    query: bool,
}

pub(crate) fn open(path: &std::ffi::CStr) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

impl Maps {
    pub(crate) fn open() -> Result<Self, Errno> {
        let file = open(c"/proc/self/maps")?;
        Ok(Maps { file, query: true })
    }

    /// The mapping that contains `addr`, or the next one after it.
    pub(crate) fn at_or_after(&mut self, addr: u64) -> Option<Vma> {
        let mut found = None;
        self.each(addr, |vma| {
            found = Some(vma);
            ControlFlow::Break(())
        });
        found
    }

    /// Calls `each` with the mappings that contain `addr` or come after it, in order.
    pub(crate) fn each(&mut self, addr: u64, mut each: impl FnMut(Vma) -> ControlFlow<()>) {
        let mut at = addr;
        while self.query {
            match self.ask(at) {
                Ok(vma) => {
                    at = vma.end;
                    if each(vma).is_break() {
                        return;
                    }
                }
                Err(Errno::NOENT) => return,
                Err(_) => self.query = false,
            }
        }
        let _ = each_line(self.file.as_fd(), |line| match parse(line) {
            Some(vma) if vma.end > at => each(vma),
            _ => ControlFlow::Continue(()),
        });
    }

    fn ask(&self, addr: u64) -> Result<Vma, Errno> {
        let mut q = ProcmapQuery {
            size: size_of::<ProcmapQuery>() as u64,
            query_flags: COVERING_OR_NEXT,
            query_addr: addr,
            ..ProcmapQuery::default()
        };
        // SAFETY: the kernel reads and writes the structure whose size it is told.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), PROCMAP_QUERY, &mut q) };
        if done != 0 {
            // SAFETY: libc gives the address of this thread's errno.
            return Err(Errno::from_raw_os_error(unsafe {
                *libc::__errno_location()
            }));
        }
        Ok(Vma {
            start: q.vma_start,
            end: q.vma_end,
            offset: q.vma_offset,
            inode: q.inode,
            device: (q.dev_major, q.dev_minor),
            read: q.vma_flags & 1 != 0,
            write: q.vma_flags & 2 != 0,
            execute: q.vma_flags & 4 != 0,
            shared: q.vma_flags & 8 != 0,
        })
    }

    /// All mappings, as they were at one moment; `None` if others change them all the time.
    /// Allocates.
    pub(crate) fn at_one_moment(&self) -> Option<Vec<Vma>> {
        // They are not read at once: one that moves meanwhile may be missing. Then the sum of
        // their sizes is not the process's size.
        (0..8).find_map(|_| {
            let before = mapped_bytes()?;
            let all = self.all().ok()?;
            let sum: u64 = all
                .iter()
                .filter(|vma| vma.start < KERNEL)
                .map(|vma| vma.end - vma.start)
                .sum();
            (before == sum && mapped_bytes()? == sum).then_some(all)
        })
    }

    /// All mappings. Allocates.
    pub(crate) fn all(&self) -> Result<Vec<Vma>, Errno> {
        let mut all = Vec::new();
        each_line(self.file.as_fd(), |line| {
            all.extend(parse(line));
            ControlFlow::Continue(())
        })?;
        Ok(all)
    }
}

/// Above it is the kernel's half of the address space, of which the map shows a page.
const KERNEL: u64 = 1 << 63;

/// Bytes that are mapped, by proc_pid_statm(5).
fn mapped_bytes() -> Option<u64> {
    let mut text = [0; 64];
    let n = rustix::io::pread(open(c"/proc/self/statm").ok()?, &mut text, 0).ok()?;
    let pages = text[..n].split(|&b| b == b' ').next()?;
    let pages: u64 = std::str::from_utf8(pages).ok()?.parse().ok()?;
    Some(pages * page_size())
}

/// Calls `each` with the beginning of every line of a file.
fn each_line(
    file: BorrowedFd<'_>,
    mut each: impl FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<(), Errno> {
    let mut at = 0;
    let mut buffer = [0; 4096];
    let mut line = [0; 128];
    let mut len = 0;
    loop {
        let n = rustix::io::pread(file, &mut buffer, at)?;
        at += n as u64;
        for &byte in &buffer[..n] {
            if byte == b'\n' {
                if each(&line[..len]).is_break() {
                    return Ok(());
                }
                len = 0;
            } else if let Some(place) = line.get_mut(len) {
                *place = byte;
                len += 1;
            }
        }
        if n == 0 {
            return Ok(());
        }
    }
}

fn parse(line: &[u8]) -> Option<Vma> {
    // A name that is not of UTF-8 comes after all that matters.
    let line = line.utf8_chunks().next().map_or("", |chunk| chunk.valid());
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
    })
}

/// The first part of a mapping, beyond an address, that holds stacks or threads' control blocks.
/// They are never converted: the kernel writes there (signal frames, rseq, the word that
/// `pthread_join` waits for), and a child of `fork` runs on one before any handler does.
/// Allocates.
pub(crate) fn thread_memory(vma: &Vma, beyond: u64) -> Option<(u64, u64)> {
    let page = page_size();
    let here = std::ptr::from_ref(&page) as u64;
    // The kernel put the auxiliary vector's random bytes on the main thread's stack.
    // SAFETY: it reads the auxiliary vector.
    let main_stack = unsafe { libc::getauxval(libc::AT_RANDOM) };
    let range = vma.start..vma.end;
    if range.contains(&main_stack) {
        return Some((vma.start, vma.end));
    }
    // The list of a thread's robust mutexes is in its control block.
    let list = |thread: libc::pid_t| {
        let mut head = 0u64;
        let mut len = 0usize;
        // SAFETY: the kernel writes a pointer and a size.
        let got = unsafe {
            let thread = libc::c_long::from(thread);
            libc::syscall(libc::SYS_get_robust_list, thread, &mut head, &mut len)
        };
        (got == 0).then_some((thread, head))
    };
    // Before Linux 6.7, the kernel merges these mappings with others beside them.
    let part = |(thread, head): (libc::pid_t, u64)| {
        if thread == rustix::process::getpid().as_raw_pid() {
            // Somewhere in memory of the loader's. The block is of 2 to 3 KiB.
            let start = (head - 1024) & !(page - 1);
            (start.max(vma.start), (head + 3072).next_multiple_of(page))
        } else {
            // On the last page of its stack.
            (vma.start, (head + 1).next_multiple_of(page))
        }
    };
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let threads = tasks.filter_map(|t| t.ok()?.file_name().to_str()?.parse::<libc::pid_t>().ok());
    let parts = threads
        .filter_map(list)
        .filter(|(_, head)| range.contains(head))
        .map(part);
    // Another libc's thread.
    let unknown = range.contains(&here).then_some((vma.start, vma.end));
    let mut all: Vec<_> = parts.collect();
    if all
        .iter()
        .all(|(start, end)| !(*start..*end).contains(&here))
    {
        all.extend(unknown);
    }
    all.into_iter()
        .filter(|&(_, end)| end > beyond)
        .min_by_key(|&(start, _)| start)
}

/// Where glibc puts the heaps of its arenas (`HEAP_MAX_SIZE`).
const ARENA_ALIGN: u64 = 64 << 20;

/// Whether a mapping begins with the head of a malloc arena of glibc. In a child, `fork` itself
/// writes there, before any handler runs. The mapping must be readable.
pub(crate) fn begins_with_arena(vma: &Vma) -> bool {
    if !vma.start.is_multiple_of(ARENA_ALIGN) {
        return false;
    }
    // SAFETY: the caller has found it mapped and readable, and the application is about to
    // register it.
    let arena = unsafe { std::ptr::read_volatile(vma.start as *const u64) };
    // `heap_info.ar_ptr` of an arena's first heap points right behind the `heap_info`.
    (vma.start + 1..vma.start + 256).contains(&arena)
}

/// Whether this is the only thread of the process.
pub(crate) fn is_single_threaded() -> bool {
    // Two links are the directory itself.
    rustix::fs::stat(c"/proc/self/task").is_ok_and(|stat| stat.st_nlink == 3)
}

/// The parts of a range that are locked in memory. Allocates.
pub(crate) fn locked(start: u64, end: u64) -> Vec<(u64, u64)> {
    let mut parts = Vec::new();
    let mut any = false;
    let Ok(status) = open(c"/proc/self/status") else {
        return parts;
    };
    // The long way only for those who use `mlock` at all.
    let looked = each_line(status.as_fd(), |line| {
        any = line.starts_with(b"VmLck:") && line != b"VmLck:\t       0 kB";
        if any {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    if looked.is_err() || !any {
        return parts;
    }
    let Ok(smaps) = open(c"/proc/self/smaps") else {
        return parts;
    };
    let mut current = None;
    let _ = each_line(smaps.as_fd(), |line| {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            if let Some(Vma {
                start: s, end: e, ..
            }) = current
                && s < end
                && e > start
                && flags.split(|&b| b == b' ').any(|flag| flag == b"lo")
            {
                parts.push((start.max(s), end.min(e)));
            }
        } else if let Some(vma) = parse(line) {
            current = Some(vma);
            if vma.start >= end {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    });
    parts
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
        assert!(maps.all().unwrap().contains(&asked));
        assert!(asked.start <= addr && addr < asked.end && asked.write && !asked.shared);
        assert!(maps.at_or_after(u64::MAX - 8191).is_none());
    }

    #[test]
    fn lines_are_parsed() {
        let line = b"7f00-7fff rw-s 00001000 00:1a 77 /memfd:\xff (deleted)";
        let vma = parse(line).unwrap();
        assert_eq!(
            (vma.start, vma.end, vma.offset, vma.inode),
            (0x7f00, 0x7fff, 0x1000, 77)
        );
        assert_eq!(vma.device, (0, 0x1a));
        assert!(vma.read && vma.write && vma.shared && !vma.execute);
        assert_eq!(parse(b"nonsense"), None);
        assert_eq!(parse(b"Size:                4 kB"), None);
    }

    #[test]
    fn other_threads_stacks_are_known() {
        let (tell, told) = std::sync::mpsc::channel();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let here = 0u8;
            tell.send(std::ptr::from_ref(&here) as u64).unwrap();
            let _ = stopped.recv();
        });
        let addr = told.recv().unwrap();
        let vma = Maps::open().unwrap().at_or_after(addr).unwrap();
        let (start, end) = thread_memory(&vma, 0).unwrap();
        assert!((start..end).contains(&addr));
        drop(stop);
        thread.join().unwrap();
        let heap = vec![0u8; 64 << 20];
        let vma = Maps::open()
            .unwrap()
            .at_or_after(heap.as_ptr() as u64 + 4096)
            .unwrap();
        let there = heap.as_ptr() as u64 + 4096;
        assert!(
            thread_memory(&vma, there).is_none_or(|(start, end)| !(start..end).contains(&there))
        );
    }
}
