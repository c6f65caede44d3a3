//! Where a work request's bytes are, and moving them: one copy, from the sender's shared pages
//! to the receiver's.

use freeflow_session::Handle;
use freeflow_shm::Sge;
use freeflow_types::Access;

use crate::engine::Engine;
use crate::objects::{Backing, Mr};

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
        }
    }
}

impl Mr {
    /// Offset of a range in the region; `None` if it is not all inside.
    fn offset(&self, addr: u64, len: u64) -> Option<u64> {
        let offset = addr.checked_sub(self.iova)?;
        (offset.checked_add(len)? <= self.len).then_some(offset)
    }

    /// Appends the spans of a range that lies in the region.
    fn spans(&self, mut offset: u64, mut len: u64, out: &mut Vec<Span>) {
        let first = self.pieces.partition_point(|p| p.start + p.len <= offset);
        for piece in &self.pieces[first..] {
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
    /// The region a key names, if work of this protection domain may use it so.
    fn region(
        &self,
        pd: Handle,
        key: u32,
        addr: u64,
        len: u64,
        need: Access,
    ) -> Option<(&Mr, u64)> {
        let session = self.sessions.get(self.pds.get(pd)?.session)?;
        let mr = self.mrs.get(*session.keys.get(&key)?)?;
        let offset = mr.offset(addr, len)?;
        (mr.pd == pd && mr.access.contains(need)).then_some((mr, offset))
    }

    /// Appends the spans of a remote range; `None` if the key does not allow it.
    pub(crate) fn remote_spans(
        &self,
        pd: Handle,
        key: u32,
        (addr, len): (u64, u64),
        need: Access,
        (skip, n): (u64, u64),
        out: &mut Vec<Span>,
    ) -> Option<()> {
        let (mr, offset) = self.region(pd, key, addr, len, need)?;
        mr.spans(offset + skip, n, out);
        Some(())
    }

    /// Checks all elements and appends the spans of `n` bytes after the first `skip`; `None` if a
    /// key does not allow it. Elements of no bytes are not looked at.
    pub(crate) fn local_spans(
        &self,
        pd: Handle,
        sges: &[Sge],
        need: Access,
        (mut skip, mut n): (u64, u64),
        out: &mut Vec<Span>,
    ) -> Option<()> {
        for sge in sges.iter().filter(|sge| sge.length != 0) {
            let len = u64::from(sge.length);
            let (mr, offset) = self.region(pd, sge.lkey, sge.addr, len, need)?;
            let from = skip.min(len);
            let take = n.min(len - from);
            if take != 0 {
                mr.spans(offset + from, take, out);
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

    fn copy_bytes(&self, to: &[Span], mut bytes: &[u8]) -> Result<(), Fault> {
        for span in to {
            let (now, later) = bytes.split_at((span.len as usize).min(bytes.len()));
            self.write(span, now).ok_or(Fault::Destination)?;
            bytes = later;
        }
        Ok(())
    }

    fn copy_spans(&self, to: &[Span], from: &[Span], bounce: &mut Vec<u8>) -> Result<(), Fault> {
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
    fn copy_run(&self, to: &Span, from: &Span, n: u64, bounce: &mut Vec<u8>) -> Result<u64, Fault> {
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
        bounce.resize(BOUNCE_BYTES, 0);
        let buffer = &mut bounce[..(n as usize).min(BOUNCE_BYTES)];
        self.read(from, buffer).ok_or(Fault::Source)?;
        self.write(to, buffer).ok_or(Fault::Destination)?;
        Ok(buffer.len() as u64)
    }

    fn segment(&self, session: Handle, segment: u32) -> Option<&freeflow_shm::Mapping> {
        Some(self.sessions.get(session)?.segments.mapping(segment)?)
    }

    fn read(&self, span: &Span, out: &mut [u8]) -> Option<()> {
        match span.backing {
            Backing::Pool { segment, offset } => {
                self.segment(span.session, segment)?.read(offset, out).ok()
            }
            Backing::Foreign { addr } => {
                let memory = self.sessions.get(span.session)?.memory.as_ref()?;
                memory.read(addr, out).then_some(())
            }
        }
    }

    fn write(&self, span: &Span, bytes: &[u8]) -> Option<()> {
        match span.backing {
            Backing::Pool { segment, offset } => self
                .segment(span.session, segment)?
                .write(offset, bytes)
                .ok(),
            Backing::Foreign { addr } => {
                let memory = self.sessions.get(span.session)?.memory.as_ref()?;
                memory.write(addr, bytes).then_some(())
            }
        }
    }

    /// Runs an 8-byte atomic on one span; returns the old value. On foreign memory it is atomic
    /// towards all other requests, which this engine executes one after the other
    /// (`IBV_ATOMIC_HCA`).
    pub(crate) fn atomic(&self, span: &Span, update: Atomic) -> Option<u64> {
        match span.backing {
            Backing::Pool { segment, offset } => {
                let mapping = self.segment(span.session, segment)?;
                match update {
                    Atomic::CompareSwap { compare, swap } => {
                        mapping.compare_swap(offset, compare, swap).ok()
                    }
                    Atomic::FetchAdd { add } => mapping.fetch_add(offset, add).ok(),
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
                };
                self.write(span, &new.to_ne_bytes())?;
                Some(old)
            }
        }
    }
}

/// An atomic operation's operands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Atomic {
    CompareSwap { compare: u64, swap: u64 },
    FetchAdd { add: u64 },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::Piece;
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
