//! A process for each test, a pool as the router makes one, and memory to register.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "every test binary uses a part of it"
)]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};

use freeflow_convert::{Backing, PageSource, PoolRange, Registration, UffdMode};
use freeflow_shm::{Mapping, sealed_memfd};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

const VARIABLE: &str = "FREEFLOW_CONVERT_TEST";
/// The child says by it that the machine lacks something.
const SKIPPED: i32 = 77;
const NOBODY: u32 = 65534;
const DEADLINE_SECONDS: i64 = 180;

/// What the process may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// userfaultfd that also holds system calls.
    Full,
    /// userfaultfd as unprivileged processes have it.
    UserModeOnly,
    /// No userfaultfd.
    Refused,
}

pub const ALL: &[Mode] = &[Mode::Full, Mode::UserModeOnly, Mode::Refused];
pub const HELD: &[Mode] = &[Mode::Full, Mode::UserModeOnly];

/// A test: its name, the modes it runs in, what it does.
pub type Test = (&'static str, &'static [Mode], fn(Mode));

/// Lists functions as tests.
macro_rules! tests {
    ($($name:ident: $modes:expr,)*) => {
        fn main() {
            common::run(&[$((stringify!($name), $modes, $name),)*]);
        }
    };
}
pub(crate) use tests;

/// Runs each test in processes of its own, one for each mode: conversions and the handlers of
/// `fork` are process-wide. Where userfaultfd is refused, it has one thread, else a second one.
pub fn run(tests: &'static [Test]) {
    if let Ok(role) = std::env::var(VARIABLE) {
        for &(name, modes, work) in tests {
            for &mode in modes {
                if role == format!("{name} {mode:?}") {
                    enter(mode);
                    return work(mode);
                }
            }
        }
        panic!("no test {role}");
    }
    let mut trials = Vec::new();
    for &(name, modes, _) in tests {
        for &mode in modes {
            let title = format!("{name}_with_userfaultfd_{mode:?}").to_lowercase();
            trials.push(Trial::test(title, move || isolated(name, mode)));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn isolated(name: &str, mode: Mode) -> Result<(), Failed> {
    let mut child = Command::new(std::env::current_exe()?)
        .env(VARIABLE, format!("{name} {mode:?}"))
        .stdin(Stdio::null())
        .spawn()?;
    let pid = Pid::from_raw(child.id() as i32).ok_or("no process")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Timespec {
        tv_sec: DEADLINE_SECONDS,
        tv_nsec: 0,
    };
    if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&deadline))? == 0 {
        child.kill()?;
        child.wait()?;
        return Err("it hangs".into());
    }
    match child.wait()? {
        status if status.success() || status.code() == Some(SKIPPED) => Ok(()),
        status => Err(status.to_string().into()),
    }
}

/// Ends a test that cannot run here.
pub fn skip(why: &str) -> ! {
    eprintln!("SKIPPED: {why}");
    std::process::exit(SKIPPED);
}

fn enter(mode: Mode) {
    // Other threads would be waited for.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        std::process::abort();
    }));
    assert_eq!(threads(), 1, "the test must have the process to itself");
    if mode != Mode::Full && rustix::process::geteuid().is_root() {
        become_nobody();
    }
    // A test that was given up leaves nothing behind.
    // SAFETY: it takes no pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    if mode == Mode::Refused {
        refuse_userfaultfd();
    }
    let wanted = match mode {
        Mode::Full => UffdMode::Full,
        Mode::UserModeOnly => UffdMode::UserModeOnly,
        Mode::Refused => UffdMode::None,
    };
    let (found, works) = freeflow_convert::probe_userfaultfd();
    if found != wanted || works != (wanted != UffdMode::None) {
        skip(&format!(
            "needs userfaultfd {wanted:?}, has {found:?} (works: {works})"
        ));
    }
    if mode != Mode::Refused {
        // Who is alone holds nobody.
        accompany();
    }
}

/// Starts a thread that does nothing. Signals are the test's: it is born with all of them blocked,
/// for until it had blocked them itself, a handler could run on it.
fn accompany() {
    // SAFETY: the sets are this function's own, and filled before they are used.
    unsafe {
        let (mut all, mut old) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        assert_eq!(libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old), 0);
        std::thread::spawn(|| {
            loop {
                std::thread::park();
            }
        });
        let back = libc::pthread_sigmask(libc::SIG_SETMASK, &old, std::ptr::null_mut());
        assert_eq!(back, 0);
    }
}

fn become_nobody() {
    // SAFETY: system calls without pointers. A process that changes its user loses access to its
    // own /proc unless it is dumpable.
    unsafe {
        assert_eq!(libc::setresgid(NOBODY, NOBODY, NOBODY), 0);
        assert_eq!(libc::setresuid(NOBODY, NOBODY, NOBODY), 0);
        assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0), 0);
    }
}

/// As a container's seccomp profile does it.
pub fn refuse_userfaultfd() {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    let filter = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_userfaultfd, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

/// Threads of this process.
pub fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// The pool of a router: one segment. What the router sees is read and written through the
/// descriptor: a second mapping in this process would be one more place where pages are in use.
#[derive(Clone)]
pub struct Pool(Arc<Mutex<Inner>>);

struct Inner {
    fd: OwnedFd,
    size: u64,
    free: BTreeMap<u64, u64>,
    refuse_after: Option<u32>,
    freed: u64,
}

impl Pool {
    pub fn new(size: u64) -> Self {
        let fd = sealed_memfd("test-pages", size).unwrap();
        Pool(Arc::new(Mutex::new(Inner {
            fd,
            size,
            free: BTreeMap::from([(0, size)]),
            refuse_after: None,
            freed: 0,
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    pub fn source(&self) -> Source<'_> {
        Source(self.inner())
    }

    /// Refuses all allocations after the next `n`.
    pub fn refuse_after(&self, n: u32) {
        self.inner().refuse_after = Some(n);
    }

    pub fn allow(&self) {
        self.inner().refuse_after = None;
    }

    /// Bytes handed out.
    pub fn used(&self) -> u64 {
        let inner = self.inner();
        inner.size - inner.free.values().sum::<u64>()
    }

    /// Bytes that were given back, ever.
    pub fn freed(&self) -> u64 {
        self.inner().freed
    }

    /// Bytes of memory that the segment takes.
    pub fn resident(&self) -> u64 {
        rustix::fs::fstat(&self.inner().fd).unwrap().st_blocks as u64 * 512
    }

    /// A second mapping, as the router has one. While it is there, all pages are in use.
    pub fn view(&self) -> Mapping {
        let inner = self.inner();
        Mapping::new(&inner.fd, inner.size).unwrap()
    }

    pub fn register(&self, addr: u64, len: u64) -> Registration {
        self.try_register(addr, len, true).unwrap()
    }

    pub fn try_register(
        &self,
        addr: u64,
        len: u64,
        write: bool,
    ) -> Result<Registration, freeflow_convert::ConvertError> {
        freeflow_convert::lock().register(&mut self.source(), addr, len, write)
    }

    pub fn deregister(&self, registration: Registration) {
        freeflow_convert::lock().deregister(&mut self.source(), registration);
    }

    pub fn collect(&self) {
        freeflow_convert::lock().collect(&mut self.source());
    }

    /// What the router reads of a registration that is wholly shared.
    pub fn read(&self, registration: &Registration, offset: u64, len: u64) -> Bytes {
        let mut out = vec![0; len as usize];
        let inner = self.inner();
        each_piece(registration, offset, len, |at, part| {
            let n = rustix::io::pread(&inner.fd, &mut out[part.clone()], at).unwrap();
            assert_eq!(n, part.len());
        });
        Bytes(out)
    }

    /// What the router writes to a registration that is wholly shared.
    pub fn write(&self, registration: &Registration, offset: u64, bytes: &[u8]) {
        let inner = self.inner();
        each_piece(registration, offset, bytes.len() as u64, |at, part| {
            let n = rustix::io::pwrite(&inner.fd, &bytes[part.clone()], at).unwrap();
            assert_eq!(n, part.len());
        });
    }
}

/// Calls `each` with the pool offset and the index of each part of a range of a registration.
fn each_piece(
    registration: &Registration,
    offset: u64,
    len: u64,
    mut each: impl FnMut(u64, std::ops::Range<usize>),
) {
    let start = registration.addr() + offset;
    let end = start + len;
    let mut done = 0;
    for piece in registration.pieces() {
        let (from, to) = (piece.addr.max(start), (piece.addr + piece.len).min(end));
        if from < to {
            let Backing::Pool { segment: 0, offset } = piece.backing else {
                panic!("{piece:x?} is not shared");
            };
            let part = (from - start) as usize..(to - start) as usize;
            each(offset + (from - piece.addr), part);
            done += to - from;
        }
    }
    assert_eq!(done, len, "pieces leave gaps: {registration:x?}");
}

/// A pool in use.
pub struct Source<'a>(MutexGuard<'a, Inner>);

impl PageSource for Source<'_> {
    fn alloc(&mut self, len: u64) -> Result<PoolRange, Errno> {
        assert!(len != 0 && len.is_multiple_of(PAGE), "{len}");
        if let Some(left) = &mut self.0.refuse_after {
            *left = left.checked_sub(1).ok_or(Errno::NOMEM)?;
        }
        let found = self.0.free.iter().find(|&(_, &have)| have >= len);
        let (&offset, &have) = found.ok_or(Errno::NOMEM)?;
        self.0.free.remove(&offset);
        if have > len {
            self.0.free.insert(offset + len, have - len);
        }
        Ok(PoolRange {
            segment: 0,
            offset,
            len,
        })
    }

    fn free(&mut self, range: PoolRange) {
        let PoolRange { offset, len, .. } = range;
        let before = self.0.free.range(..offset + len).next_back();
        let was_used = before.is_none_or(|(&o, &l)| o + l <= offset);
        assert!(
            was_used && offset + len <= self.0.size,
            "{range:?} was free"
        );
        self.0.free.insert(offset, len);
        self.0.freed += len;
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.0.fd, punch, offset, len).unwrap();
    }

    fn fd(&self, segment: u32) -> Option<BorrowedFd<'_>> {
        (segment == 0).then(|| self.0.fd.as_fd())
    }
}

/// Whether all of a registration is shared.
pub fn is_shared(registration: &Registration) -> bool {
    let shared = |p: &freeflow_convert::Piece| matches!(p.backing, Backing::Pool { .. });
    registration.pieces().iter().all(shared)
}

/// Whether nothing of a registration is shared.
pub fn is_foreign(registration: &Registration) -> bool {
    registration
        .pieces()
        .iter()
        .all(|p| p.backing == Backing::Foreign)
}

/// A mapping of the test.
#[derive(Debug)]
pub struct Memory {
    pub addr: u64,
    pub len: u64,
}

impl Memory {
    /// Private, anonymous, untouched.
    pub fn new(len: u64) -> Self {
        Self::with(len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
    }

    /// Private, anonymous, of distinct bytes.
    pub fn filled(len: u64) -> Self {
        let memory = Self::new(len);
        memory.write(0, &pattern(memory.addr, len));
        memory
    }

    pub fn with(len: u64, prot: ProtFlags, flags: MapFlags) -> Self {
        let flags = flags | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let addr = unsafe { mmap_anonymous(std::ptr::null_mut(), len as usize, prot, flags) };
        let addr = addr.unwrap() as u64;
        let memory = Memory { addr, len };
        // A page that is touched is one page. It fails where there are no others.
        memory.advise(libc::MADV_NOHUGEPAGE);
        memory
    }

    /// At an address that nothing is mapped at.
    pub fn at(addr: u64, len: u64) -> Self {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE | MapFlags::NORESERVE;
        // SAFETY: it replaces nothing.
        let at = unsafe { mmap_anonymous(addr as *mut _, len as usize, prot, flags) };
        assert_eq!(at.unwrap() as u64, addr);
        Memory { addr, len }
    }

    /// Of a file.
    pub fn file(fd: &OwnedFd, len: u64, prot: ProtFlags, flags: MapFlags) -> Self {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let addr = unsafe { mmap(std::ptr::null_mut(), len as usize, prot, flags, fd, 0) };
        Memory {
            addr: addr.unwrap() as u64,
            len,
        }
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.len);
        store(self.addr + offset, bytes);
    }

    pub fn read(&self, offset: u64, len: u64) -> Bytes {
        assert!(offset + len <= self.len);
        load(self.addr + offset, len)
    }

    pub fn protect(&self, offset: u64, len: u64, prot: rustix::mm::MprotectFlags) {
        let addr = (self.addr + offset) as *mut _;
        // SAFETY: nobody holds a reference to this memory.
        unsafe { rustix::mm::mprotect(addr, len as usize, prot).unwrap() };
    }

    pub fn unmap(&self, offset: u64, len: u64) {
        // SAFETY: nobody holds a reference to this memory.
        unsafe { munmap((self.addr + offset) as *mut _, len as usize).unwrap() };
    }

    pub fn advise(&self, advice: libc::c_int) -> bool {
        self.advise_part(0, self.len, advice)
    }

    pub fn advise_part(&self, offset: u64, len: u64, advice: libc::c_int) -> bool {
        // SAFETY: nobody holds a reference to this memory.
        unsafe { libc::madvise((self.addr + offset) as *mut _, len as usize, advice) == 0 }
    }
}

/// Bytes that are not all printed.
#[derive(Clone)]
pub struct Bytes(pub Vec<u8>);

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl std::ops::DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl<T: AsRef<[u8]> + ?Sized> PartialEq<T> for Bytes {
    fn eq(&self, other: &T) -> bool {
        self.0 == other.as_ref()
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = &self.0[..self.0.len().min(32)];
        write!(f, "{} bytes: {shown:02x?} ...", self.0.len())
    }
}

/// Distinct bytes for an address, none of them zero.
pub fn pattern(addr: u64, len: u64) -> Bytes {
    let byte = |at: u64| ((at / 8u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 | 1;
    Bytes((addr..addr + len).map(byte).collect())
}

pub fn store(addr: u64, bytes: &[u8]) {
    // SAFETY: the tests map what they write to.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), addr as *mut u8, bytes.len()) };
}

pub fn load(addr: u64, len: u64) -> Bytes {
    let mut out = vec![0; len as usize];
    // SAFETY: the tests map what they read.
    unsafe { std::ptr::copy_nonoverlapping(addr as *const u8, out.as_mut_ptr(), out.len()) };
    Bytes(out)
}

/// A word of memory that several threads use.
pub fn word(addr: u64) -> &'static std::sync::atomic::AtomicU64 {
    assert!(addr.is_multiple_of(8));
    // SAFETY: the tests map what they use, for as long as threads use it.
    unsafe { &*(addr as *const std::sync::atomic::AtomicU64) }
}

/// Forks; the child runs `work`, without allocating more than it must, and exits with 0 if it
/// returns true. Returns the child's process id.
pub fn fork(work: impl FnOnce() -> bool) -> i32 {
    // SAFETY: the child runs code of this test alone and never returns.
    match unsafe { libc::fork() } {
        0 => {
            let good = work();
            // SAFETY: it ends the process.
            unsafe { libc::_exit(if good { 0 } else { 1 }) }
        }
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        pid => pid,
    }
}

/// Waits for a child of [`fork`] and checks that it was content.
pub fn reap(pid: i32) {
    let mut status = 0;
    // SAFETY: the kernel writes the status.
    let reaped = unsafe { libc::waitpid(pid, &mut status, 0) };
    assert_eq!(
        (reaped, status),
        (pid, 0),
        "the child failed: status {status:#x}"
    );
}
