//! Conversion of an application's pages, in place, to pages of a shared memfd.
//!
//! The router and the application must see the same physical pages, yet the application has
//! allocated its buffer as it liked. [`Converter::register`] replaces private anonymous pages by
//! pages of a memfd that the router made (a *pool segment*): hold, copy, and `mremap` the copy
//! over the original. Readers never notice; writers on other threads wait in a page fault, which
//! userfaultfd holds until the new pages are in place, so that no write is lost. Pages that were
//! never touched are neither copied nor allocated.
//!
//! What cannot be converted is described as [`Backing::Foreign`]: the router copies it across
//! processes. That is so for file mappings, memory that is shared already, read-only or
//! executable memory, stacks, the head of a malloc arena, pages that the system refuses to
//! replace, and for everything where userfaultfd is refused and the process has more than one
//! thread. userfaultfd is taken from the system call, or from `/dev/userfaultfd`, which an
//! administrator may hand to a container whose seccomp profile refuses the call.
//!
//! # Known limits
//!
//! * `madvise(MADV_DONTNEED)` on converted memory does not zero it, as it would private memory.
//!   Allocators that take such memory for zeroes (jemalloc, tcmalloc; not glibc) may then hand it
//!   out by `calloc`.
//! * With `UFFD_USER_MODE_ONLY` (all that an unprivileged process may have), a system call of
//!   another thread fails with EFAULT if it writes to a page at the moment of its conversion, or
//!   to a converted page while a `fork` of a process of several threads copies it, or reads from
//!   32 MiB or more that were never touched at the moment of their conversion.
//! * I/O in flight that has pinned pages (O_DIRECT, io_uring's registered buffers) goes on with
//!   the pages from before the conversion. So do futexes that are waited for there and are not
//!   private.
//! * Children made by a bare `clone` system call or `_Fork` share converted pages; those of
//!   `fork` do not ([`lock`] installs the handlers), those of `vfork` and `posix_spawn` replace
//!   themselves. Until the handler runs in a child of `fork`, it shares them, too: what libc and
//!   handlers that were installed earlier write there (locks of open streams, say) is seen by the
//!   parent, if it lies on a page with registered bytes.
//! * Where userfaultfd is refused, before Linux 5.19, or when no descriptor is left, nobody is
//!   held for a `fork` of a process of several threads: its child may see a page torn that
//!   another thread writes to.
//! * `MADV_DONTFORK`, `MADV_DONTDUMP`, other advice and NUMA policies given before registration
//!   are lost with the old pages: a child has a copy. What is given afterwards holds. `mlock`
//!   holds in any case.

mod buffer;
mod content;
mod converter;
mod fork;
mod maps;
mod records;
mod uffd;

use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

pub use buffer::Buffer;
pub use converter::{Converter, Stats};
pub use fork::around_fork;
pub use uffd::{UffdMode, probe as probe_userfaultfd};

/// A range of a pool segment, in whole pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolRange {
    /// The segment.
    pub segment: u32,
    /// Offset in it, in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Where pool ranges come from.
pub trait PageSource {
    /// A range of fresh zero pages (holes of the memfd); `len` is a multiple of the page size.
    fn alloc(&mut self, len: u64) -> Result<PoolRange, Errno>;
    /// Gives a range, or a part of one, back.
    fn free(&mut self, range: PoolRange);
    /// The memfd of a segment.
    fn fd(&self, segment: u32) -> Option<BorrowedFd<'_>>;
}

/// What backs a piece of registered memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// A pool segment, from this offset.
    Pool {
        /// The segment.
        segment: u32,
        /// Offset in it, in bytes.
        offset: u64,
    },
    /// The application's own memory.
    Foreign,
}

/// A piece of registered memory. Pieces cover a registration in order, without gaps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Address in the application.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// What backs it.
    pub backing: Backing,
}

/// Registered memory, to be handed to [`Converter::deregister`].
#[derive(Debug)]
pub struct Registration {
    pub(crate) addr: u64,
    pub(crate) len: u64,
    pub(crate) pieces: Vec<Piece>,
    /// Whole pages that the pieces use, by internal segment.
    pub(crate) uses: Vec<(usize, u64, u64)>,
}

impl Registration {
    /// First address.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// What backs it.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }
}

/// Why memory cannot be registered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConvertError {
    /// The range is empty or wraps around.
    #[error("{len} bytes at {addr:#x} are no range")]
    Range {
        /// First address.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// Nothing is mapped there, or it may not be read, or not written although it must be.
    #[error("memory at {addr:#x} is not mapped as it is to be used")]
    Fault {
        /// Where.
        addr: u64,
    },
    /// The operating system refused.
    #[error("cannot share pages: {0}")]
    Os(Errno),
}

impl ConvertError {
    /// The errno value that `ibv_reg_mr(3)` fails with.
    pub fn errno(&self) -> Errno {
        match *self {
            ConvertError::Range { .. } => Errno::INVAL,
            ConvertError::Fault { .. } => Errno::FAULT,
            ConvertError::Os(errno) => errno,
        }
    }
}

static CONVERTER: Mutex<Converter> = Mutex::new(Converter::new());

/// The process's converter: pages are converted once, whoever registers them. The first call
/// installs the handlers that give children of `fork` copies of converted pages.
///
/// Signals of this thread wait until it is dropped.
pub fn lock() -> Locked {
    fork::install();
    Locked::new()
}

/// The locked converter.
#[derive(Debug)]
pub struct Locked {
    // It goes before the mask does.
    converter: MutexGuard<'static, Converter>,
    _signals: BlockedSignals,
}

impl Locked {
    pub(crate) fn new() -> Self {
        let signals = BlockedSignals::new();
        // No code that holds it panics; a poisoned lock would still hold true records.
        let converter = CONVERTER.lock().unwrap_or_else(PoisonError::into_inner);
        Locked {
            converter,
            _signals: signals,
        }
    }
}

impl Deref for Locked {
    type Target = Converter;

    fn deref(&self) -> &Converter {
        &self.converter
    }
}

impl DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut Converter {
        &mut self.converter
    }
}

/// No signal handler runs on this thread: it might write to a page that this thread holds, or call
/// `fork`, and wait for ever.
struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    fn new() -> Self {
        let mut all = MaybeUninit::uninit();
        let mut old = MaybeUninit::uninit();
        // SAFETY: both functions fill the sets that they are given, and do not fail for these
        // arguments.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr());
            BlockedSignals(old.assume_init())
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set was filled by the same function.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

impl std::fmt::Debug for BlockedSignals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlockedSignals")
    }
}

/// Page size in bytes.
pub(crate) fn page_size() -> u64 {
    rustix::param::page_size() as u64
}
