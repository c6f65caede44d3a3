//! Conversion of an application's pages, in place, to pages of a shared memfd.
//!
//! The router and the application must see the same physical pages, yet the application has
//! allocated its buffer as it liked. [`Converter::register`] replaces private anonymous pages by
//! pages of a memfd that the router made (a *pool segment*): write-protect, copy, and `mremap`
//! the copy over the original. Readers never notice; writers on other threads wait in a page
//! fault, which userfaultfd holds until the new pages are in place, so that no write is lost.
//! Pages that were never touched are neither copied nor allocated.
//!
//! What cannot be converted is described as [`Backing::Foreign`]: the router copies it across
//! processes. That is so for file mappings, memory that is shared already, read-only memory, the
//! main thread's stack, and for everything where userfaultfd is refused and the process has more
//! than one thread.
//!
//! # Known limits
//!
//! * `madvise(MADV_DONTNEED)` on converted memory does not zero it, as it would private memory.
//! * With `UFFD_USER_MODE_ONLY` (all that an unprivileged process may have), a system call of
//!   another thread that writes to a page at the moment of its conversion fails with EFAULT.
//! * Children made by a bare `clone` system call share converted pages; those of `fork` do not
//!   ([`lock`] installs the handlers), those of `vfork` and `posix_spawn` replace themselves.
//! * `MADV_DONTFORK` and `MADV_DONTDUMP` given before registration are lost with the old pages.

mod buffer;
mod converter;
mod fork;
mod maps;
mod records;
mod uffd;

use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

pub use buffer::Buffer;
pub use converter::{Converter, Stats};
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
pub fn lock() -> MutexGuard<'static, Converter> {
    fork::install();
    locked()
}

pub(crate) fn locked() -> MutexGuard<'static, Converter> {
    // No code that holds it panics; a poisoned lock would still hold true records.
    CONVERTER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Page size in bytes.
pub(crate) fn page_size() -> u64 {
    rustix::param::page_size() as u64
}
