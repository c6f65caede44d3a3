//! A stream's memory: the table that the peer writes, the receive buffer, the send buffer.

use core::ffi::c_void;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use freeflow_client::{Access, Buf, Errno, Mr, Pd, Sge};
use freeflow_rsocket::{Config, IoMap, Local, Range, Segment};

const PAGE: u64 = 4096;

/// Pages that are shared with the router from the start.
pub(super) struct Memory {
    pages: Buf,
    table: Mr,
    receive: Mr,
    send: Mr,
    receive_at: u64,
    send_at: u64,
    receive_size: u32,
    send_size: u32,
    maps: u16,
}

impl Memory {
    pub(super) fn new(pd: &std::sync::Arc<Pd>, config: &Config) -> Result<Self, Errno> {
        let table = config.table_bytes() as u64;
        let receive_at = table.next_multiple_of(PAGE);
        let receive = u64::from(config.recv_buffer);
        let send_at = receive_at + receive.next_multiple_of(PAGE);
        let send = u64::from(config.send_buffer);
        let pages = pd.alloc_buf(send_at + send)?;
        let base = pages.addr();
        let written = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
        let mut made = Vec::new();
        let parts = [
            (base, table, written),
            (base + receive_at, receive, written),
            (base + send_at, send, Access::empty()),
        ];
        for (addr, len, access) in parts {
            match pd.reg_mr(addr, len, addr, access) {
                Ok(mr) => made.push(mr),
                Err(errno) => {
                    for mr in &made {
                        // As in `free`.
                        let _ = mr.dereg();
                    }
                    pages.free();
                    return Err(errno);
                }
            }
        }
        let made = <[Mr; 3]>::try_from(made).map_err(|_| Errno::INVAL)?;
        let [table, receive, send] = made;
        Ok(Memory {
            pages,
            table,
            receive,
            send,
            receive_at: base + receive_at,
            send_at: base + send_at,
            receive_size: config.recv_buffer,
            send_size: config.send_buffer,
            maps: config.maps,
        })
    }

    /// As the peer is to name it.
    pub(super) fn local(&self) -> Local {
        Local {
            table_addr: self.pages.addr(),
            table_key: self.table.key().0,
            buffer_addr: self.receive_at,
            buffer_key: self.receive.key().0,
        }
    }

    /// Part of the send buffer, for a work request.
    pub(super) fn sge(&self, range: Range) -> Sge {
        Sge {
            addr: self.send_at + u64::from(range.offset),
            length: range.length,
            lkey: self.send.key().0,
        }
    }

    /// Copies bytes of the program's to a part of the send buffer.
    ///
    /// # Safety
    ///
    /// `from` points at as many bytes that may be read.
    pub(super) unsafe fn fill(&self, range: Range, from: *const u8) {
        assert!(range.offset <= self.send_size && range.length <= self.send_size - range.offset);
        let to = (self.send_at + u64::from(range.offset)) as *mut u8;
        // SAFETY: the part is inside the buffer, which lives as long as `self`; the caller promises
        // the source. The router only reads there, and not before the request is posted.
        unsafe { std::ptr::copy_nonoverlapping(from, to, range.length as usize) };
    }

    /// Copies a part of the receive buffer to the program.
    ///
    /// # Safety
    ///
    /// `to` points at room for as many bytes.
    pub(super) unsafe fn drain(&self, range: Range, to: *mut u8) {
        let size = self.receive_size;
        assert!(range.offset <= size && range.length <= size - range.offset);
        let from = (self.receive_at + u64::from(range.offset)) as *const u8;
        // SAFETY: the part is inside the buffer, and the caller promises the room. A peer that keeps
        // the protocol does not write there now; one that does not hurts what the program reads of
        // it, nothing else.
        unsafe { std::ptr::copy_nonoverlapping(from, to, range.length as usize) };
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        let at = (self.pages.addr() + offset as u64) as *mut u32;
        // SAFETY: the callers stay inside the table, at multiples of 4; it lives as long as `self`,
        // and this process accesses it by atomics alone.
        unsafe { AtomicU32::from_ptr(at) }
    }

    fn double(&self, offset: usize) -> u64 {
        let at = (self.pages.addr() + offset as u64) as *mut u64;
        // SAFETY: as in `word`, at multiples of 8.
        unsafe { AtomicU64::from_ptr(at) }.load(Ordering::Relaxed)
    }

    fn segment(&self, offset: usize) -> Segment {
        // Acquire: the peer's WRITE puts the length last, and what was in front of it is visible.
        let length = self.word(offset + 12).load(Ordering::Acquire);
        Segment {
            addr: self.double(offset),
            key: self.word(offset + 8).load(Ordering::Relaxed),
            length,
        }
    }

    /// Takes a segment out of the table.
    pub(super) fn take_segment(&self, index: u32) -> Segment {
        let offset = Config::segment_offset(index);
        assert!(offset < Config::map_offset(0));
        let found = self.segment(offset);
        if found.length != 0 {
            // Relaxed: the peer writes there again only after what is sent from now on arrived.
            self.word(offset + 12).store(0, Ordering::Relaxed);
        }
        found
    }

    /// Reads a mapping of the peer's.
    pub(super) fn map(&self, index: u16) -> IoMap {
        assert!(index < self.maps);
        let offset = Config::map_offset(index);
        IoMap {
            offset: self.double(offset),
            segment: self.segment(offset + 8),
        }
    }

    /// Deregisters and unmaps it; the queue pair that uses it is gone.
    pub(super) fn free(&self) {
        for mr in [&self.table, &self.receive, &self.send] {
            // A router that is gone has none any more.
            let _ = mr.dereg();
        }
        self.pages.free();
    }
}

/// Bytes of the program's, in one or several parts, to read from or write to, in order.
pub(super) struct Vectors<'a> {
    parts: &'a [libc::iovec],
    /// What is done of the first part.
    done: usize,
    left: usize,
}

impl<'a> Vectors<'a> {
    /// # Safety
    ///
    /// Each part is memory of the program's that may be read, or written if that is meant, while
    /// the value lives.
    pub(super) unsafe fn new(parts: &'a [libc::iovec]) -> Result<Self, Errno> {
        let mut left = 0_usize;
        for part in parts {
            left = left.checked_add(part.iov_len).ok_or(Errno::INVAL)?;
        }
        if isize::try_from(left).is_err() {
            return Err(Errno::INVAL);
        }
        let done = 0;
        Ok(Vectors { parts, done, left })
    }

    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Hands out the next bytes, at most so many, as one piece.
    fn next(&mut self, most: usize) -> (*mut c_void, usize) {
        while let [first, rest @ ..] = self.parts {
            let len = (first.iov_len - self.done).min(most);
            if len == 0 && most != 0 {
                (self.parts, self.done) = (rest, 0);
                continue;
            }
            let at = first.iov_base.wrapping_byte_add(self.done);
            self.done += len;
            self.left -= len;
            return (at, len);
        }
        (std::ptr::null_mut(), 0)
    }

    /// Calls with each piece of the next bytes, and their place among them.
    pub(super) fn each(&mut self, bytes: usize, mut work: impl FnMut(*mut u8, Range)) {
        let mut at = 0;
        while at < bytes {
            let (addr, len) = self.next(bytes - at);
            if len == 0 {
                break;
            }
            let range = Range {
                offset: at as u32,
                length: len as u32,
            };
            work(addr.cast(), range);
            at += len;
        }
    }

    /// A second look at the same bytes.
    pub(super) fn peek(&self) -> Vectors<'a> {
        Vectors { ..*self }
    }
}
