//! Sealed memfds and their mappings.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::sync::{AtomicU64, Ordering};

/// Seals that every shared memory carries: its size is fixed, so that no access within it can
/// raise SIGBUS, and nobody may take a seal away.
const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// An access reaches beyond the memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfBounds;

/// Makes a memfd of `len` bytes of zeroes, sealed against shrinking and growing. It takes memory
/// only where it is touched.
pub fn sealed_memfd(name: &str, len: u64) -> Result<OwnedFd, Errno> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, len)?;
    fcntl_add_seals(&fd, SEALS)?;
    Ok(fd)
}

/// A shared mapping of a sealed memfd or of a part of it, readable and writable.
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory that lives until drop; access goes through atomics or
// through copies that are opaque to the compiler, from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of a memfd; EINVAL if it is not sealed or is shorter.
    pub fn new(fd: impl AsFd, len: u64) -> Result<Self, Errno> {
        Self::part(fd, 0, len)
    }

    /// Maps `len` bytes of a memfd from `offset`, a multiple of the page size; EINVAL if it is
    /// not sealed or does not have them.
    pub fn part(fd: impl AsFd, offset: u64, len: u64) -> Result<Self, Errno> {
        let size = u64::try_from(rustix::fs::fstat(&fd)?.st_size).unwrap_or(0);
        let sealed = fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK);
        let fits = offset.checked_add(len).is_some_and(|end| end <= size);
        let len = usize::try_from(len).map_err(|_| Errno::INVAL)?;
        if !sealed || !fits || len == 0 {
            return Err(Errno::INVAL);
        }
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe { mmap(std::ptr::null_mut(), len, prot, flags, fd, offset)? };
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Mapping { base, len })
    }

    /// Bytes mapped.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never: an empty mapping cannot be made.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Keeps the mapping out of children of `fork`, which must not touch the rings.
    pub fn exclude_from_fork(&self) -> Result<(), Errno> {
        let advice = rustix::mm::Advice::LinuxDontFork;
        // SAFETY: the range is this mapping, which nobody else unmaps; the advice does not change
        // it in this process.
        unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.len, advice) }
    }

    fn at(&self, offset: u64, len: u64) -> Result<*mut u8, OutOfBounds> {
        let end = offset.checked_add(len).ok_or(OutOfBounds)?;
        if end > self.len as u64 {
            return Err(OutOfBounds);
        }
        // SAFETY: offset <= end <= len, so the result is within the mapping or one past its end.
        Ok(unsafe { self.base.as_ptr().add(offset as usize) })
    }

    /// The memory as words; `offset` is a multiple of 8.
    pub fn words(&self, offset: u64, len: u64) -> Result<&[AtomicU64], OutOfBounds> {
        let at = self.at(offset, len)?;
        if !offset.is_multiple_of(8) {
            return Err(OutOfBounds);
        }
        // SAFETY: in bounds by `at`; aligned because the base is page-aligned; the memory stays
        // mapped and of fixed size (sealed) as long as `self`; AtomicU64 has the layout of u64,
        // allows any bit pattern and concurrent writers, also in a hostile process.
        Ok(unsafe { std::slice::from_raw_parts(at.cast(), (len / 8) as usize) })
    }

    /// Copies bytes out.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), OutOfBounds> {
        let from = self.at(offset, out.len() as u64)?;
        // SAFETY: `from` is valid for the length by `at`, `out` by its type; they do not overlap,
        // as a Rust buffer is never inside a Mapping. Others may write the source meanwhile: the
        // copy is done by C code that the compiler does not see through, and any bytes will do.
        unsafe { libc::memcpy(out.as_mut_ptr().cast(), from.cast(), out.len()) };
        Ok(())
    }

    /// Copies bytes in.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), OutOfBounds> {
        let to = self.at(offset, bytes.len() as u64)?;
        // SAFETY: as in `read`, with the roles exchanged.
        unsafe { libc::memcpy(to.cast(), bytes.as_ptr().cast(), bytes.len()) };
        Ok(())
    }

    /// Copies `len` bytes from one place in shared memory to another, possibly overlapping one.
    pub fn copy(
        &self,
        offset: u64,
        from: &Mapping,
        from_offset: u64,
        len: u64,
    ) -> Result<(), OutOfBounds> {
        let to = self.at(offset, len)?;
        let from = from.at(from_offset, len)?;
        // SAFETY: both are valid for the length by `at`; memmove allows overlap; concurrent
        // access by others is as in `read`.
        unsafe { libc::memmove(to.cast(), from.cast(), len as usize) };
        Ok(())
    }

    /// Atomic compare and swap of the 8 aligned bytes at `offset`; returns the old value.
    pub fn compare_swap(&self, offset: u64, compare: u64, swap: u64) -> Result<u64, OutOfBounds> {
        let word = self.words(offset, 8)?.first().ok_or(OutOfBounds)?;
        // SeqCst: the strongest order a peer may expect of a remote atomic.
        Ok(
            match word.compare_exchange(compare, swap, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(old) | Err(old) => old,
            },
        )
    }

    /// Atomic write of the 8 aligned bytes at `offset`.
    pub fn store(&self, offset: u64, value: u64) -> Result<(), OutOfBounds> {
        let word = self.words(offset, 8)?.first().ok_or(OutOfBounds)?;
        // SeqCst: as in `compare_swap`.
        word.store(value, Ordering::SeqCst);
        Ok(())
    }

    /// Atomic fetch and add of the 8 aligned bytes at `offset`; returns the old value.
    pub fn fetch_add(&self, offset: u64, add: u64) -> Result<u64, OutOfBounds> {
        let word = self.words(offset, 8)?.first().ok_or(OutOfBounds)?;
        // SeqCst: as in `compare_swap`.
        Ok(word.fetch_add(add, Ordering::SeqCst))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is our own mapping, and no borrow of it outlives `self`. An error
        // would mean that it is gone already.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl std::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mapping({} bytes)", self.len)
    }
}

/// A part of a mapping that holds one object.
#[derive(Clone, Debug)]
pub struct Region {
    /// Keeps the words where they are.
    _mapping: Arc<Mapping>,
    words: NonNull<[AtomicU64]>,
}

// SAFETY: the words are atomics in memory that the mapping, which may be sent and shared itself,
// keeps mapped; there is no other state.
unsafe impl Send for Region {}
// SAFETY: see above.
unsafe impl Sync for Region {}

impl Region {
    /// The part at `offset`, in whole words.
    pub fn new(mapping: Arc<Mapping>, offset: u64, len: u64) -> Result<Self, OutOfBounds> {
        let words = NonNull::from(mapping.words(offset, len)?);
        Ok(Region {
            _mapping: mapping,
            words,
        })
    }

    /// Its words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: checked when made; the mapping does not move, and lives as long as `self`.
        unsafe { self.words.as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sealed_memory_is_mapped() {
        let open = memfd_create("t", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&open, 4096).unwrap();
        assert_eq!(Mapping::new(&open, 4096).unwrap_err(), Errno::INVAL);
        let fd = sealed_memfd("t", 4096).unwrap();
        assert_eq!(Mapping::new(&fd, 8192).unwrap_err(), Errno::INVAL);
        assert!(ftruncate(&fd, 0).is_err());
        assert!(ftruncate(&fd, 8192).is_err());
        assert!(Mapping::new(&fd, 4096).is_ok());
    }

    #[test]
    fn a_part_is_a_window_on_the_whole() {
        let page = rustix::param::page_size() as u64;
        let fd = sealed_memfd("t", 2 * page).unwrap();
        let whole = Mapping::new(&fd, 2 * page).unwrap();
        let part = Mapping::part(&fd, page, page).unwrap();
        part.write(0, b"here").unwrap();
        let mut out = [0; 4];
        whole.read(page, &mut out).unwrap();
        assert_eq!(&out, b"here");
        for (offset, len) in [(page, page + 1), (u64::MAX - page + 1, page), (page, 0)] {
            assert_eq!(Mapping::part(&fd, offset, len).unwrap_err(), Errno::INVAL);
        }
    }

    #[test]
    fn accesses_are_bounded() {
        let fd = sealed_memfd("t", 8192).unwrap();
        let a = Mapping::new(&fd, 8192).unwrap();
        let b = Mapping::new(&fd, 8192).unwrap();
        a.write(8190, b"xy").unwrap();
        assert_eq!(a.write(8191, b"xy"), Err(OutOfBounds));
        assert_eq!(a.write(u64::MAX, b"xy"), Err(OutOfBounds));
        let mut out = [0; 2];
        b.read(8190, &mut out).unwrap();
        assert_eq!(&out, b"xy");
        assert_eq!(b.copy(8000, &a, 0, 193), Err(OutOfBounds));
        b.copy(0, &a, 8190, 2).unwrap();
        a.read(0, &mut out).unwrap();
        assert_eq!(&out, b"xy");
        assert!(a.words(4, 8).is_err());
        assert_eq!(a.fetch_add(16, 5), Ok(0));
        assert_eq!(b.compare_swap(16, 5, 9), Ok(5));
        assert_eq!(b.compare_swap(16, 5, 1), Ok(9));
        assert_eq!(b.compare_swap(8192, 0, 1), Err(OutOfBounds));
        assert_eq!(b.fetch_add(12, 1), Err(OutOfBounds));
        b.store(16, 7).unwrap();
        assert_eq!(a.fetch_add(16, 0), Ok(7));
        assert_eq!(b.store(20, 7), Err(OutOfBounds));
    }
}
