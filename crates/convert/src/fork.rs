//! Children of `fork` get copies of converted pages, as they would have of private ones.
//!
//! Before the fork, writers to converted pages are held; the child replaces each converted range
//! by a private copy while the parent waits; then writers go on. What peers write by RDMA in
//! that moment may or may not be in the child's copy, as with a NIC.
//!
//! `fork` itself takes locks after our handler (malloc's, those of streams, those of other
//! handlers). A writer that is held may own one of them: [`Breaker`] lets it go on.

use std::cell::UnsafeCell;
use std::ffi::CString;
use std::mem::ManuallyDrop;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::mm::{
    MapFlags, MprotectFlags, MremapFlags, ProtFlags, mmap_anonymous, mprotect, mremap_fixed,
};

use crate::Locked;
use crate::content::{GAP, each_extent};
use crate::converter::{Converter, Uffds};
use crate::maps::{Maps, Vma, is_single_threaded, open};
use crate::page_size;
use crate::uffd::Uffd;

/// What `prepare` hands to the other two.
struct Forking {
    converter: Locked,
    /// The child says that it is done by writing, or by dying.
    done: Option<(OwnedFd, OwnedFd)>,
    /// Mappings of converted pages.
    ours: Vec<Vma>,
    /// While it is there, their writers are held.
    breaker: Option<Breaker>,
}

struct Slot(UnsafeCell<Option<Forking>>);

// SAFETY: glibc calls the handlers of one fork one after the other on one thread, and `prepare`
// holds the converter's lock until the others have taken what it left: no other thread is between
// its own `prepare` and them.
unsafe impl Sync for Slot {}

static FORKING: Slot = Slot(UnsafeCell::new(None));

type Around = (fn(), fn());

/// What else is done around a fork: before it, and after it in both processes.
static AROUND: OnceLock<Around> = OnceLock::new();

/// Installs the handlers, and has `before` called first before each fork, and `after` last after
/// it, in both processes and by the thread that forks. Only the first call's functions count. Meant
/// for when the library is loaded: no other thread forks then.
///
/// A lock that is held around each fork, and taken before the converter's, is free in the child.
pub fn around_fork(before: fn(), after: fn()) {
    let _ = AROUND.set((before, after));
    install();
}

/// Installs the handlers, once.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handlers are functions of this library, which is never unloaded while the
        // process has converted pages. It fails only for want of memory; then children share.
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    });
}

/// `fork` sets errno only if it fails.
fn keeping_errno(work: impl FnOnce()) {
    // SAFETY: libc gives the address of this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    work();
    // SAFETY: as above.
    unsafe { *errno = before };
}

unsafe extern "C" fn prepare() {
    keeping_errno(|| {
        if let Some((before, _)) = AROUND.get() {
            before();
        }
        let mut forking = Forking {
            converter: Locked::new(),
            done: None,
            ours: Vec::new(),
            breaker: None,
        };
        if !forking.converter.segments.is_empty() {
            forking.done = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).ok();
            forking.ours = mappings(&forking.converter);
            if let Uffds::Open(uffd) = &forking.converter.uffd
                && uffd.holds_shared()
                && !is_single_threaded()
            {
                // Without it nobody is held: better a torn copy than a parent that hangs.
                let stack = forking.converter.maps.as_ref().and_then(stack);
                forking.breaker = Breaker::start(uffd, stack);
                if forking.breaker.is_some() {
                    for vma in &forking.ours {
                        hold(uffd, vma, &forking.converter);
                    }
                }
            }
        }
        // SAFETY: see `Slot`.
        unsafe { *FORKING.0.get() = Some(forking) };
    });
}

/// The part of this thread's stack that `fork` is about to write to.
fn stack(maps: &Maps) -> Option<(u64, u64)> {
    const BELOW: u64 = 64 << 10;
    const ABOVE: u64 = 16 << 10;
    let page = page_size();
    let local = 0u8;
    let here = std::ptr::from_ref(&local) as u64;
    let all = maps.all().ok()?;
    let vma = all
        .iter()
        .find(|vma| (vma.start..vma.end).contains(&here))?;
    let start = ((here - BELOW) & !(page - 1)).max(vma.start);
    let end = ((here + ABOVE) & !(page - 1)).min(vma.end);
    // The kernel writes to the control block (rseq), and kills whose it cannot write to.
    // SAFETY: it returns the address of this thread's control block.
    let control = unsafe { libc::pthread_self() } as u64 & !(page - 1);
    let end = if control >= start {
        end.min(control)
    } else {
        end
    };
    let private = !vma.shared && vma.inode == 0;
    (private && start < end).then_some((start, end))
}

/// All mappings of converted pages, wherever the application has moved them.
fn mappings(converter: &Converter) -> Vec<Vma> {
    // This process may have no descriptor left to open another one.
    let all = converter.maps.as_ref().and_then(|maps| maps.all().ok());
    let mut all = all.unwrap_or_default();
    all.retain(|vma| converter.shows(vma, vma.start).is_some());
    all
}

/// Holds the writers of a mapping, but for large untouched parts of it. Where it fails, a child may see a page while it is written, no
/// more. Allocates nothing.
fn hold(uffd: &Uffd, vma: &Vma, converter: &Converter) {
    let Some(fd) = converter.memfd(vma) else {
        return;
    };
    let address = |offset: u64| vma.start + (offset - vma.offset);
    let end = vma.offset + (vma.end - vma.start);
    // What lies between two pages that exist, if it is not too much, is held with them.
    let mut run: Option<(u64, u64)> = None;
    let flush = |run: Option<(u64, u64)>| {
        if let Some((start, end)) = run {
            let _ = uffd.hold_shared_writers(address(start), end - start);
        }
    };
    let _ = each_extent(fd, vma.offset, end, |s, e| {
        run = match run {
            Some((start, last)) if s - last < GAP => Some((start, e)),
            other => {
                flush(other);
                Some((s, e))
            }
        };
        Ok(true)
    });
    flush(run);
}

fn take() -> Option<Forking> {
    // SAFETY: see `Slot`.
    unsafe { (*FORKING.0.get()).take() }
}

fn after() {
    if let Some((_, after)) = AROUND.get() {
        after();
    }
}

unsafe extern "C" fn parent() {
    keeping_errno(|| {
        resume_parent();
        after();
    });
}

fn resume_parent() {
    let Some(mut forking) = take() else {
        return;
    };
    // Relaxed: see `watch`.
    FORKED.store(true, Ordering::Relaxed);
    if let Some((read, write)) = forking.done {
        drop(write);
        let mut byte = [0];
        while rustix::io::read(&read, &mut byte) == Err(Errno::INTR) {}
    }
    if let Some(breaker) = &forking.breaker
        && let Converter {
            uffd: Uffds::Open(uffd),
            maps: Some(maps),
            ..
        } = &mut *forking.converter
    {
        breaker.stop();
        release(uffd, maps, &forking.ours);
    }
    if let Some(breaker) = forking.breaker {
        breaker.join();
    }
}

/// Lets writers go on, also where the application has unmapped a part of a mapping.
fn release(uffd: &Uffd, maps: &mut Maps, held: &[Vma]) {
    let mut held = held.iter().peekable();
    maps.each(0, |vma| {
        while held.next_if(|held| held.end <= vma.start).is_some() {}
        for held in held.clone().take_while(|held| held.start < vma.end) {
            let (start, end) = (vma.start.max(held.start), vma.end.min(held.end));
            uffd.release(start, end - start);
        }
        ControlFlow::Continue(())
    });
}

unsafe extern "C" fn child() {
    keeping_errno(|| {
        begin_child();
        after();
    });
}

fn begin_child() {
    let Some(mut forking) = take() else {
        return;
    };
    // Before that, nothing may be allocated or freed: the heap may be shared.
    separate(&forking.converter, &forking.ours);
    if let Some((_, write)) = forking.done {
        let _ = rustix::io::write(&write, &[1]);
    }
    forking.converter.reset();
}

/// Replaces every mapping of our pages by private copies. Other threads may have moved one since
/// the list was made: the kernel is asked, unless no descriptor is left for that.
fn separate(converter: &Converter, ours: &[Vma]) {
    if ours.is_empty() {
        return;
    }
    let Ok(mut maps) = Maps::open() else {
        return ours.iter().for_each(|vma| separate_one(converter, vma));
    };
    maps.each(0, |vma| {
        separate_one(converter, &vma);
        ControlFlow::Continue(())
    });
}

fn separate_one(converter: &Converter, vma: &Vma) {
    if let Some(fd) = converter.memfd(vma)
        && privatise(fd, vma).is_err()
    {
        // For want of memory. A child that shares would corrupt its parent.
        let size = (vma.end - vma.start) as usize;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: it replaces our own pages, in a process of one thread.
        let _ = unsafe { mmap_anonymous(vma.start as *mut _, size, ProtFlags::empty(), flags) };
    }
}

fn privatise(fd: BorrowedFd<'_>, vma: &Vma) -> Result<(), Errno> {
    let size = (vma.end - vma.start) as usize;
    let both = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let copy = unsafe { mmap_anonymous(std::ptr::null_mut(), size, both, flags)? };
    // SAFETY: nobody else knows the new mapping.
    let bytes = unsafe { std::slice::from_raw_parts_mut(copy.cast::<u8>(), size) };
    // What was never touched reads as zeroes in both.
    let offset = vma.offset;
    let copied = each_extent(fd, offset, offset + size as u64, |data, hole| {
        let part = &mut bytes[(data - offset) as usize..(hole - offset) as usize];
        let mut done = 0;
        while done < part.len() {
            match rustix::io::pread(fd, &mut part[done..], data + done as u64)? {
                0 => return Err(Errno::IO),
                n => done += n,
            }
        }
        Ok(true)
    });
    let mut prot = MprotectFlags::empty();
    prot.set(MprotectFlags::READ, vma.read);
    prot.set(MprotectFlags::WRITE, vma.write);
    prot.set(MprotectFlags::EXEC, vma.execute);
    // SAFETY: it changes our own mapping, which then moves over our own pages, of the same
    // content, in a process of one thread.
    unsafe {
        let moved = copied
            .and_then(|()| mprotect(copy, size, prot))
            .and_then(|()| {
                mremap_fixed(copy, size, size, MremapFlags::MAYMOVE, vma.start as *mut _)
            });
        if moved.is_err() {
            let _ = rustix::mm::munmap(copy, size);
        }
        moved.map(|_| ())
    }
}

/// How long a writer that is let go has for its write. If that is too short, it waits again.
const LET_GO: Duration = Duration::from_micros(30);

/// `fork` has come back in the parent.
static FORKED: AtomicBool = AtomicBool::new(false);

/// A thread that lives as long as writers are held for a fork, and lets those go on whose locks
/// the forking thread waits for. It sleeps unless a writer waits.
///
/// In the child, where the thread does not exist, dropping it closes its descriptors.
struct Breaker {
    thread: ManuallyDrop<JoinHandle<()>>,
    /// Tells it to end.
    stop: OwnedFd,
    /// It tells that it has begun, and that it has ended.
    told: OwnedFd,
    /// `/proc/self/task/N/stat` of the forking thread.
    _stat: OwnedFd,
}

impl Breaker {
    /// Starts it; from now on it allocates nothing.
    fn start(uffd: &Uffd, stack: Option<(u64, u64)>) -> Option<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).ok()?;
        let told = eventfd(0, EventfdFlags::CLOEXEC).ok()?;
        let thread = rustix::thread::gettid();
        let path = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
        let stat = open(&CString::new(path).ok()?).ok()?;
        // SAFETY: the thread uses these until it has told that it ended, for which `stop` waits
        // before they go. The descriptors are fields of the result, and the userfaultfd is the
        // static converter's, whose lock is held until then.
        let (uffd, fds) = unsafe {
            let borrow = |fd: &OwnedFd| BorrowedFd::borrow_raw(fd.as_raw_fd());
            let uffd: &'static Uffd = &*std::ptr::from_ref(uffd);
            (uffd, [borrow(&stop), borrow(&told), borrow(&stat)])
        };
        FORKED.store(false, Ordering::Relaxed);
        let work = move || {
            let [stop, told, stat] = fds;
            tell(told);
            watch(uffd, stop, stat, stack);
            tell(told);
        };
        // It inherits that all signals are blocked.
        let thread = std::thread::Builder::new()
            .name("freeflow-fork".into())
            .stack_size(64 << 10)
            .spawn(work)
            .ok()?;
        await_told(&told);
        Some(Breaker {
            thread: ManuallyDrop::new(thread),
            stop,
            told,
            _stat: stat,
        })
    }

    /// Waits until it holds and releases nobody any more.
    fn stop(&self) {
        tell(self.stop.as_fd());
        await_told(&self.told);
    }

    /// Waits for its end. It may allocate by now: no writer must be held.
    fn join(self) {
        let _ = ManuallyDrop::into_inner(self.thread).join();
    }
}

fn tell(event: BorrowedFd<'_>) {
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

fn await_told(event: &OwnedFd) {
    while rustix::io::read(event, &mut [0; 8]) == Err(Errno::INTR) {}
}

/// The breaker's work. Allocates nothing: writers are held.
///
/// `stack` is where the forking thread cannot but write before it forks: while others are let go,
/// it is held, too, lest it forks in that moment.
fn watch(uffd: &Uffd, stop: BorrowedFd<'_>, stat: BorrowedFd<'_>, stack: Option<(u64, u64)>) {
    let page = page_size();
    let mut waiters = [0; 64];
    let mut count = 0;
    loop {
        // While somebody waits, look again soon whether the forking thread does.
        let soon = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000,
        };
        let mut fds = [
            PollFd::new(&stop, PollFlags::IN),
            PollFd::new(uffd, PollFlags::IN),
        ];
        let timeout = (count > 0).then_some(&soon);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        while let Some(place) = waiters.get_mut(count)
            && let Some(address) = uffd.next_waiter()
        {
            if !stack.is_some_and(|(start, end)| (start..end).contains(&address)) {
                *place = address;
                count += 1;
            }
        }
        // Relaxed: a thread that was seen asleep after it had stored is seen to have stored, as
        // the kernel's run queue lock lies between. Then it sleeps for the child, not for a lock.
        let waits_for_lock = || sleeps(stat) && !FORKED.load(Ordering::Relaxed);
        if count == 0 || !waits_for_lock() {
            continue;
        }
        let held = stack.filter(|(start, end)| uffd.hold_writers(*start, end - start).is_ok());
        if waits_for_lock() {
            for &address in &waiters[..count] {
                uffd.release(address, page);
            }
            std::thread::sleep(LET_GO);
            for &address in &waiters[..count] {
                let _ = uffd.hold_shared_writers(address, page);
            }
            count = 0;
        }
        if let Some((start, end)) = held {
            uffd.release(start, end - start);
        }
    }
}

/// Whether a thread sleeps, by its `stat` file (proc_pid_stat(5)).
fn sleeps(stat: BorrowedFd<'_>) -> bool {
    let mut buffer = [0; 128];
    let n = rustix::io::pread(stat, &mut buffer, 0).unwrap_or(0);
    let text = &buffer[..n];
    let after_name = text.iter().rposition(|&b| b == b')');
    after_name.and_then(|at| text.get(at + 2)) == Some(&b'S')
}
