//! Where a work request's bytes are, and moving them: one copy, from the sender's shared pages
//! to the receiver's.

use std::time::Instant;

use freeflow_session::Handle;
use freeflow_shm::Sge;
use freeflow_types::Access;

use crate::EndReason;
use crate::copier::{Failed, Job};
use crate::engine::Engine;
use crate::keys::Named;
use crate::objects::{Backing, Mr, Piece};

/// Bytes of the buffer for copies between two memories that are both foreign.
const BOUNCE_BYTES: usize = 64 << 10;

/// A run of bytes in one backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    session: Handle,
    backing: Backing,
    len: u64,
}

/// Which side of a copy could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Source,
    Destination,
}

/// Where bytes come from.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    Spans(&'a [Span]),
    Bytes(&'a [u8]),
}

impl Span {
    fn advance(&mut self, n: u64) {
        self.len -= n;
        match &mut self.backing {
            Backing::Pool { offset, .. } => *offset += n,
            Backing::Foreign { addr } => *addr += n,
            Backing::Null => {}
        }
    }

    /// Whether it is one aligned word of 8 bytes, whatever its address in requests.
    pub(crate) fn is_word(&self) -> bool {
        let at = match self.backing {
            Backing::Pool { offset, .. } => offset,
            Backing::Foreign { addr } => addr,
            Backing::Null => 0,
        };
        self.len == 8 && at.is_multiple_of(8)
    }
}

/// Offset of a range in a region; `None` if it is not all inside.
fn offset_in((iova, size): (u64, u64), addr: u64, len: u64) -> Option<u64> {
    let offset = addr.checked_sub(iova)?;
    (offset.checked_add(len)? <= size).then_some(offset)
}

impl Mr {
    /// Offset of a range in the region; `None` if it is not all inside.
    pub(crate) fn offset(&self, addr: u64, len: u64) -> Option<u64> {
        offset_in((self.iova, self.len), addr, len)
    }

    fn reached(&self) -> Reached<'_> {
        Reached {
            session: self.session,
            iova: self.iova,
            len: self.len,
            access: self.access,
            pieces: Pieces::Of(&self.pieces),
        }
    }
}

/// The pieces of a region.
enum Pieces<'a> {
    Of(&'a [Piece]),
    One(Piece),
}

/// A region that a key led to.
pub(crate) struct Reached<'a> {
    session: Handle,
    pub(crate) iova: u64,
    pub(crate) len: u64,
    pub(crate) access: Access,
    pieces: Pieces<'a>,
}

impl Reached<'_> {
    /// A region of one piece.
    pub(crate) fn one(
        session: Handle,
        (iova, len): (u64, u64),
        access: Access,
        piece: Piece,
    ) -> Self {
        Reached {
            session,
            iova,
            len,
            access,
            pieces: Pieces::One(piece),
        }
    }

    pub(crate) fn pieces(&self) -> &[Piece] {
        match &self.pieces {
            Pieces::Of(pieces) => pieces,
            Pieces::One(piece) => std::slice::from_ref(piece),
        }
    }

    fn offset(&self, addr: u64, len: u64) -> Option<u64> {
        offset_in((self.iova, self.len), addr, len)
    }

    /// Appends the spans of a range that lies in the region.
    fn spans(&self, mut offset: u64, mut len: u64, out: &mut Vec<Span>) {
        let pieces = self.pieces();
        let first = pieces.partition_point(|p| p.start + p.len <= offset);
        for piece in &pieces[first..] {
            if len == 0 {
                return;
            }
            let skip = offset - piece.start;
            let n = len.min(piece.len - skip);
            let mut span = Span {
                session: self.session,
                backing: piece.backing,
                len: piece.len,
            };
            span.advance(skip);
            span.len = n;
            out.push(span);
            offset += n;
            len -= n;
        }
    }
}

impl Engine {
    /// What a key names to work of a protection domain.
    fn named(&self, pd: Handle, key: u32) -> Option<Named> {
        let session = self.sessions.get(self.pds.get(pd)?.session)?;
        session.keys.get(key)
    }

    /// The region of the router's that has this key and this protection domain.
    pub(crate) fn keyed_region(&self, pd: Handle, key: u32) -> Option<(Handle, &Mr)> {
        let Named::Region(handle) = self.named(pd, key)? else {
            return None;
        };
        let mr = self.mrs.get(handle)?;
        (mr.key.0 == key && mr.pd == pd).then_some((handle, mr))
    }

    /// The region a local key names, and the offset in it, if work of this protection domain may
    /// use it so.
    fn local_region(&mut self, pd: Handle, sge: &Sge, need: Access) -> Option<(Reached<'_>, u64)> {
        let region = match self.named(pd, sge.lkey)? {
            Named::Region(_) => self.keyed_region(pd, sge.lkey)?.1.reached(),
            Named::Slot(slot) => self.posted_region(pd, slot, sge.lkey)?,
            Named::Window(_) => return None,
        };
        let offset = region.offset(sge.addr, sge.length.into())?;
        region.access.contains(need).then_some((region, offset))
    }

    /// The region that a remote key leads to, and the offset in it, if requests to a queue pair
    /// that are meant for a protection domain may use it so; without a range, whether they may use
    /// the whole of it.
    pub(crate) fn remote_region(
        &mut self,
        (qp, pd): (Handle, Handle),
        key: u32,
        range: Option<(u64, u64)>,
        need: Access,
    ) -> Option<(Reached<'_>, u64)> {
        let region = match self.named(pd, key)? {
            Named::Region(_) => self.keyed_region(pd, key)?.1.reached(),
            Named::Slot(slot) => self.posted_region(pd, slot, key)?,
            Named::Window(mw) => {
                let (mr, offset) = self.through_window((qp, pd), mw, key, range, need)?;
                return Some((mr.reached(), offset));
            }
        };
        let (addr, len) = range.unwrap_or((region.iova, 0));
        let offset = region.offset(addr, len)?;
        region.access.contains(need).then_some((region, offset))
    }

    /// Appends the spans of a remote range; `None` if the key does not allow it.
    pub(crate) fn remote_spans(
        &mut self,
        to: (Handle, Handle),
        key: u32,
        range: (u64, u64),
        need: Access,
        (skip, n): (u64, u64),
        out: &mut Vec<Span>,
    ) -> Option<()> {
        let (region, offset) = self.remote_region(to, key, Some(range), need)?;
        region.spans(offset + skip, n, out);
        Some(())
    }

    /// Checks all elements and appends the spans of `n` bytes after the first `skip`; `None` if a
    /// key does not allow it. Elements of no bytes are not looked at.
    pub(crate) fn local_spans(
        &mut self,
        pd: Handle,
        sges: &[Sge],
        need: Access,
        (mut skip, mut n): (u64, u64),
        out: &mut Vec<Span>,
    ) -> Option<()> {
        for sge in sges.iter().filter(|sge| sge.length != 0) {
            let len = u64::from(sge.length);
            let (region, offset) = self.local_region(pd, sge, need)?;
            let from = skip.min(len);
            let take = n.min(len - from);
            if take != 0 {
                region.spans(offset + from, take, out);
            }
            skip -= from;
            n -= take;
        }
        Some(())
    }

    /// Copies all bytes of the source to the start of the destination, which is as long.
    pub(crate) fn copy(&mut self, to: &[Span], from: Source<'_>) -> Result<(), Fault> {
        let mut bounce = std::mem::take(&mut self.bounce);
        let result = match from {
            Source::Bytes(bytes) => self.copy_bytes(to, bytes),
            Source::Spans(from) => self.copy_spans(to, from, &mut bounce),
        };
        self.bounce = bounce;
        result
    }

    fn copy_bytes(&mut self, to: &[Span], mut bytes: &[u8]) -> Result<(), Fault> {
        for span in to {
            let (now, later) = bytes.split_at((span.len as usize).min(bytes.len()));
            self.write(span, now).ok_or(Fault::Destination)?;
            bytes = later;
        }
        Ok(())
    }

    fn copy_spans(
        &mut self,
        to: &[Span],
        from: &[Span],
        bounce: &mut Vec<u8>,
    ) -> Result<(), Fault> {
        let mut to = to.iter().copied();
        let Some(mut dst) = to.next() else {
            return Ok(());
        };
        for span in from {
            let mut src = *span;
            while src.len != 0 {
                while dst.len == 0 {
                    dst = to.next().ok_or(Fault::Destination)?;
                }
                let n = self.copy_run(&dst, &src, src.len.min(dst.len), bounce)?;
                src.advance(n);
                dst.advance(n);
            }
        }
        Ok(())
    }

    /// Copies at most `n` bytes that are contiguous on both sides; returns how many.
    fn copy_run(
        &mut self,
        to: &Span,
        from: &Span,
        n: u64,
        bounce: &mut Vec<u8>,
    ) -> Result<u64, Fault> {
        if let (
            Backing::Pool {
                segment: ts,
                offset: to_offset,
            },
            Backing::Pool {
                segment: fs,
                offset: from_offset,
            },
        ) = (to.backing, from.backing)
        {
            let from = self.segment(from.session, fs).ok_or(Fault::Source)?;
            let to = self.segment(to.session, ts).ok_or(Fault::Destination)?;
            to.copy(to_offset, from, from_offset, n)
                .map_err(|_| Fault::Destination)?;
            return Ok(n);
        }
        if to.backing == Backing::Null && from.backing == Backing::Null {
            return Ok(n);
        }
        bounce.resize(BOUNCE_BYTES, 0);
        let buffer = &mut bounce[..(n as usize).min(BOUNCE_BYTES)];
        self.read(from, buffer).ok_or(Fault::Source)?;
        self.write(to, buffer).ok_or(Fault::Destination)?;
        Ok(buffer.len() as u64)
    }

    fn segment(&self, session: Handle, segment: u32) -> Option<&freeflow_shm::Mapping> {
        Some(self.sessions.get(session)?.segments.mapping(segment)?)
    }

    fn read(&mut self, span: &Span, out: &mut [u8]) -> Option<()> {
        match span.backing {
            Backing::Pool { segment, offset } => {
                self.segment(span.session, segment)?.read(offset, out).ok()
            }
            Backing::Foreign { addr } => {
                let mut buffer = std::mem::take(&mut self.foreign_bytes);
                buffer.resize(out.len(), 0);
                let buffer = self.reach(span.session, addr, buffer, false)?;
                out.copy_from_slice(&buffer);
                self.foreign_bytes = buffer;
                Some(())
            }
            Backing::Null => {
                out.fill(0);
                Some(())
            }
        }
    }

    fn write(&mut self, span: &Span, bytes: &[u8]) -> Option<()> {
        match span.backing {
            Backing::Pool { segment, offset } => self
                .segment(span.session, segment)?
                .write(offset, bytes)
                .ok(),
            Backing::Foreign { addr } => {
                let mut buffer = std::mem::take(&mut self.foreign_bytes);
                buffer.clear();
                buffer.extend_from_slice(bytes);
                self.foreign_bytes = self.reach(span.session, addr, buffer, true)?;
                Some(())
            }
            Backing::Null => Some(()),
        }
    }

    /// Reads or writes a session's own memory; its buffer comes back, as long as it was. `None` if
    /// that fails; a session whose memory does not come in time ends, and its endpoint goes on
    /// without such memory.
    fn reach(
        &mut self,
        session: Handle,
        addr: u64,
        buffer: Vec<u8>,
        write: bool,
    ) -> Option<Vec<u8>> {
        let s = self.sessions.get(session)?;
        let memory = s.memory.clone()?;
        let e = self.endpoints.get_mut(s.endpoint).filter(|e| !e.late)?;
        let job = Job {
            memory,
            addr,
            buffer,
            write,
            gone: false,
        };
        let began = Instant::now();
        let result = self.copiers.copy(job, &mut e.patience);
        self.waited += began.elapsed();
        match result {
            Ok(buffer) => Some(buffer),
            Err(Failed::Fault) => None,
            Err(Failed::Gone) => {
                self.sessions.get_mut(session)?.memory_gone = true;
                None
            }
            Err(Failed::NoCopier) => {
                e.counters.late_memory += 1;
                None
            }
            Err(Failed::Late) => {
                e.late = true;
                e.counters.late_memory += 1;
                self.notices.push(format!(
                    "endpoint \"{}\": memory of process {} that cannot be shared did not come in \
                     time; its session ends, and the endpoint may not register such memory any \
                     more",
                    e.name, s.peer.pid
                ));
                self.condemn(session, EndReason::LateMemory { addr });
                None
            }
        }
    }

    /// Fills a buffer with the bytes of spans after the first `skip`, of which there are enough.
    pub(crate) fn gather(
        &mut self,
        from: &[Span],
        mut skip: u64,
        mut out: &mut [u8],
    ) -> Option<()> {
        for &(mut span) in from {
            let skipped = skip.min(span.len);
            skip -= skipped;
            span.advance(skipped);
            let n = span.len.min(out.len() as u64);
            let (part, rest) = out.split_at_mut(n as usize);
            out = rest;
            if n != 0 {
                self.read(&span, part)?;
            }
        }
        out.is_empty().then_some(())
    }

    /// Copies one word out of spans of 8 bytes.
    pub(crate) fn word(&mut self, from: &[Span]) -> Option<u64> {
        let mut bytes = [0; 8];
        self.gather(from, 0, &mut bytes)?;
        Some(u64::from_ne_bytes(bytes))
    }

    /// Runs an 8-byte atomic on one span; returns the old value, or the new one if it is written
    /// without a look at the old. On foreign memory it is atomic
    /// towards all other requests, which this engine executes one after the other
    /// (`IBV_ATOMIC_HCA`).
    pub(crate) fn atomic(&mut self, span: &Span, update: Atomic) -> Option<u64> {
        if span.len != 8 {
            // It straddles two pieces.
            return None;
        }
        match span.backing {
            Backing::Pool { segment, offset } => {
                let mapping = self.segment(span.session, segment)?;
                match update {
                    Atomic::CompareSwap { compare, swap } => {
                        mapping.compare_swap(offset, compare, swap).ok()
                    }
                    Atomic::FetchAdd { add } => mapping.fetch_add(offset, add).ok(),
                    Atomic::Write { value } => mapping.store(offset, value).ok().map(|()| value),
                }
            }
            Backing::Foreign { .. } => {
                let mut bytes = [0; 8];
                self.read(span, &mut bytes)?;
                let old = u64::from_ne_bytes(bytes);
                let new = match update {
                    Atomic::CompareSwap { compare, swap } if old == compare => swap,
                    Atomic::CompareSwap { .. } => old,
                    Atomic::FetchAdd { add } => old.wrapping_add(add),
                    Atomic::Write { value } => value,
                };
                self.write(span, &new.to_ne_bytes())?;
                Some(old)
            }
            // Peers have no rights on a null region.
            Backing::Null => None,
        }
    }
}

/// An atomic operation's operands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Atomic {
    CompareSwap { compare: u64, swap: u64 },
    FetchAdd { add: u64 },
    Write { value: u64 },
}

#[cfg(test)]
mod tests {
    use super::*;
    use freeflow_types::Key;

    fn region() -> Mr {
        let pool = |segment, offset| Backing::Pool { segment, offset };
        Mr {
            session: Handle(1),
            context: Handle(1),
            pd: Handle(1),
            key: Key(1),
            iova: 1000,
            len: 30,
            access: Access::empty(),
            dm: None,
            windows: 0,
            pieces: vec![
                Piece {
                    start: 0,
                    len: 10,
                    backing: pool(0, 4096),
                },
                Piece {
                    start: 10,
                    len: 5,
                    backing: Backing::Foreign { addr: 77 },
                },
                Piece {
                    start: 15,
                    len: 15,
                    backing: pool(1, 0),
                },
            ],
        }
    }

    #[test]
    fn ranges_are_checked_without_overflow() {
        let mr = region();
        assert_eq!(mr.offset(1000, 30), Some(0));
        assert_eq!(mr.offset(1030, 0), Some(30));
        assert_eq!(mr.offset(1029, 2), None);
        assert_eq!(mr.offset(999, 1), None);
        assert_eq!(mr.offset(1001, u64::MAX), None);
        assert_eq!(mr.offset(u64::MAX, 1), None);
    }

    #[test]
    fn spans_follow_the_pieces() {
        let mr = region();
        let mr = mr.reached();
        let span = |backing, len| Span {
            session: Handle(1),
            backing,
            len,
        };
        let mut out = Vec::new();
        mr.spans(8, 10, &mut out);
        assert_eq!(
            out,
            [
                span(
                    Backing::Pool {
                        segment: 0,
                        offset: 4104
                    },
                    2
                ),
                span(Backing::Foreign { addr: 77 }, 5),
                span(
                    Backing::Pool {
                        segment: 1,
                        offset: 0
                    },
                    3
                ),
            ]
        );
        out.clear();
        mr.spans(29, 1, &mut out);
        assert_eq!(
            out,
            [span(
                Backing::Pool {
                    segment: 1,
                    offset: 14
                },
                1
            )]
        );
        out.clear();
        mr.spans(30, 0, &mut out);
        assert!(out.is_empty());
    }
}
