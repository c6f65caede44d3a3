//! Memory that queue pairs read and write: pages of the process, reached through raw pointers
//! alone, as others change them at any time.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::suite::{Outcome, Stop, fail};

/// Anonymous pages.
pub(crate) struct Buf {
    at: *mut u8,
    len: usize,
}

// SAFETY: the memory is reached by copies and atomics through the pointer, from any thread.
unsafe impl core::marker::Send for Buf {}
// SAFETY: as above.
unsafe impl Sync for Buf {}

impl Buf {
    /// Zeroed memory, page aligned. Pages are made when they are touched.
    pub(crate) fn new(len: usize) -> Outcome<Self> {
        Buf::with(len, libc::PROT_READ | libc::PROT_WRITE)
    }

    pub(crate) fn with(len: usize, protection: i32) -> Outcome<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { libc::mmap(core::ptr::null_mut(), len.max(1), protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(Stop::Fail(format!(
                "mmap of {len} bytes: {}",
                super::name_of(super::errno())
            )));
        }
        Ok(Buf { at: at.cast(), len })
    }

    pub(crate) fn addr(&self) -> u64 {
        self.at as u64
    }

    fn check(&self, at: usize, len: usize) -> Outcome<*mut u8> {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            fail!(
                "the test reaches {at} + {len} of a buffer of {} bytes",
                self.len
            );
        }
        // SAFETY: within the mapping.
        Ok(unsafe { self.at.add(at) })
    }

    pub(crate) fn put(&self, at: usize, bytes: &[u8]) -> Outcome {
        let to = self.check(at, bytes.len())?;
        // SAFETY: `to` has room for the bytes; the source is ordinary memory elsewhere.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    pub(crate) fn get(&self, at: usize, len: usize) -> Outcome<Vec<u8>> {
        let from = self.check(at, len)?;
        let mut bytes = vec![0; len];
        // SAFETY: `from` is `len` bytes of the mapping; the vector has room for them.
        unsafe { core::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len) };
        Ok(bytes)
    }

    pub(crate) fn fill(&self, byte: u8) {
        // SAFETY: the whole mapping.
        unsafe { core::ptr::write_bytes(self.at, byte, self.len) };
    }

    /// An aligned word, as CPUs and queue pairs change it together.
    pub(crate) fn word(&self, at: usize) -> Outcome<&AtomicU64> {
        let at = self.check(at, 8)?;
        if !(at as usize).is_multiple_of(8) {
            fail!("the test's word is not aligned");
        }
        // SAFETY: aligned, within the mapping, which lives as long as `self`.
        Ok(unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    pub(crate) fn load(&self, at: usize) -> Outcome<u64> {
        // SeqCst: tests compare words that others write; none is worth a weaker order.
        Ok(self.word(at)?.load(Ordering::SeqCst))
    }

    pub(crate) fn store(&self, at: usize, value: u64) -> Outcome {
        self.word(at)?.store(value, Ordering::SeqCst);
        Ok(())
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and its registrations are gone: they hold the buffer.
        unsafe { libc::munmap(self.at.cast(), self.len.max(1)) };
    }
}

/// Bytes that differ with the seed and the place.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
