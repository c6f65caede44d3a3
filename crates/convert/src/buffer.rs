//! Buffers of pool pages: shared from the start, so that registering them converts nothing.

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::converter::Converter;
use crate::records::{Place, Users};
use crate::{PageSource, PoolRange, page_size};

/// A mapping of pool pages, to be handed to [`Converter::release`].
#[derive(Debug)]
pub struct Buffer {
    addr: u64,
    len: u64,
    /// What it shows.
    place: Place,
}

impl Buffer {
    /// Its address, at the start of a page.
    pub fn addr(&self) -> u64 {
        self.addr
    }
}

impl Converter {
    /// Maps a fresh range of zeroes of at least `len` bytes. ENOMEM: no such range.
    pub fn allocate(&mut self, source: &mut dyn PageSource, len: u64) -> Result<Buffer, Errno> {
        let len = len.checked_next_multiple_of(page_size());
        let len = len.filter(|&len| len != 0).ok_or(Errno::NOMEM)?;
        let range = source.alloc(len)?;
        let mapped = self.segment(source, range.segment).and_then(|segment| {
            let fd = self.segments[segment].fd.as_ref().ok_or(Errno::BADF)?;
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            let size = usize::try_from(len).map_err(|_| Errno::NOMEM)?;
            let (any, shared) = (std::ptr::null_mut(), MapFlags::SHARED);
            // SAFETY: a fresh mapping at an address of the kernel's choice.
            let addr = unsafe { mmap(any, size, prot, shared, fd.as_fd(), range.offset)? };
            Ok((segment, addr as u64))
        });
        match mapped {
            Ok((segment, addr)) => {
                let offset = range.offset;
                let place = Place { segment, offset };
                self.users[segment].insert(offset, offset + len, Users(0));
                self.idle += len;
                Ok(Buffer { addr, len, place })
            }
            Err(errno) => {
                source.free(range);
                Err(errno)
            }
        }
    }

    /// Unmaps a buffer. Pages that no registration uses are given back at once, the others when
    /// they are collected.
    pub fn release(&mut self, source: &mut dyn PageSource, buffer: Buffer) {
        let Buffer { addr, len, place } = buffer;
        // SAFETY: the program gives up the mapping that `allocate` made for it.
        let unmapped = unsafe { munmap(addr as *mut _, len as usize) };
        // In a child of `fork`, and with another router, the pages are not ours to give back.
        let segment = self.segments.get(place.segment).filter(|s| s.alive);
        let (Ok(()), Some(segment)) = (unmapped, segment) else {
            return;
        };
        let number = segment.number;
        let Some(users) = self.users.get_mut(place.segment) else {
            return;
        };
        for (from, to, users_of_it) in users.within(place.offset, place.offset + len) {
            if users_of_it.0 == 0 {
                users.remove(from, to);
                self.idle -= (to - from).min(self.idle);
                source.free(PoolRange {
                    segment: number,
                    offset: from,
                    len: to - from,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{BorrowedFd, OwnedFd};

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use crate::Backing;

    struct Pool {
        fd: OwnedFd,
        next: u64,
        given: u64,
    }

    impl PageSource for Pool {
        fn alloc(&mut self, len: u64) -> Result<PoolRange, Errno> {
            let offset = self.next;
            self.next += len;
            self.given += len;
            ftruncate(&self.fd, self.next)?;
            Ok(PoolRange {
                segment: 3,
                offset,
                len,
            })
        }

        fn free(&mut self, range: PoolRange) {
            self.given -= range.len;
        }

        fn fd(&self, segment: u32) -> Option<BorrowedFd<'_>> {
            (segment == 3).then(|| self.fd.as_fd())
        }
    }

    #[test]
    fn a_buffer_is_registered_as_it_is_and_given_back() {
        let mut converter = Converter::new();
        let mut pool = Pool {
            fd: memfd_create("t", MemfdFlags::CLOEXEC).unwrap(),
            next: 0,
            given: 0,
        };
        let page = page_size();
        let buffer = converter.allocate(&mut pool, page + 1).unwrap();
        assert_eq!(pool.given, 2 * page);
        let addr = buffer.addr();
        let made = converter.register(&mut pool, addr + 1, page, true).unwrap();
        let backing = Backing::Pool {
            segment: 3,
            offset: 1,
        };
        assert_eq!(made.pieces().len(), 1);
        assert_eq!(made.pieces()[0].backing, backing);
        assert_eq!(converter.stats().conversions, 0);
        converter.deregister(&mut pool, made);
        converter.release(&mut pool, buffer);
        assert_eq!(pool.given, 0);

        // Registered pages are kept until they are not.
        let buffer = converter.allocate(&mut pool, 2 * page).unwrap();
        let made = converter
            .register(&mut pool, buffer.addr(), page, true)
            .unwrap();
        converter.release(&mut pool, buffer);
        assert_eq!(pool.given, page);
        converter.deregister(&mut pool, made);
        converter.collect(&mut pool);
        assert_eq!(pool.given, 0);
        assert!(converter.allocate(&mut pool, u64::MAX).is_err());
    }
}
