//! A stream socket: its data.

use std::time::Instant;

use freeflow_client::{Access, Errno, Mr};
use freeflow_rsocket::{IoMap, Phase, Segment, Stream};

use super::device::shared;
use super::link::Link;
use super::memory::Vectors;
use super::stream::{Inner, Phase as State, StreamSocket};
use super::wait::{Source, Waits, wait_for};

/// A buffer that the peer may write, or that is only registered.
pub(super) struct Mapped {
    addr: u64,
    len: u64,
    mr: Mr,
    /// In the peer's table.
    index: Option<u16>,
}

impl Mapped {
    pub(super) fn dereg(&self) {
        // A router that is gone has it no more.
        let _ = self.mr.dereg();
    }
}

/// What a call may do.
#[derive(Clone, Copy, Default)]
pub(super) struct How {
    /// `MSG_DONTWAIT`.
    pub(super) dont_wait: bool,
    /// `MSG_PEEK`.
    pub(super) peek: bool,
    /// `MSG_WAITALL`.
    pub(super) all: bool,
}

impl How {
    /// From the flags of `recv(2)` and `send(2)`; others change nothing.
    pub(super) fn from_flags(flags: i32) -> Self {
        How {
            dont_wait: flags & libc::MSG_DONTWAIT != 0,
            peek: flags & libc::MSG_PEEK != 0,
            all: flags & libc::MSG_WAITALL != 0,
        }
    }
}

/// What became of an attempt.
enum Attempt {
    Done,
    /// Nothing more can be done now.
    Wait,
}

/// What was done before an error is what the call returns.
fn count(result: Result<(), Errno>, done: usize) -> Result<usize, Errno> {
    match result {
        Err(_) if done != 0 => Ok(done),
        result => result.map(|()| done),
    }
}

impl StreamSocket {
    /// Tries until it is done; EAGAIN if that may not take time, or not so long.
    fn attempt(
        &self,
        how: How,
        time: impl Fn(&Inner) -> Option<Instant>,
        mut attempt: impl FnMut(&mut Inner) -> Result<Attempt, Errno>,
    ) -> Result<(), Errno> {
        let mut inner = self.lock();
        if inner.is_opening() {
            drop(inner);
            self.opened(self.is_nonblocking() || how.dont_wait)?;
            inner = self.lock();
        }
        if matches!(attempt(&mut inner)?, Attempt::Done) {
            return Ok(());
        }
        if self.is_nonblocking() || how.dont_wait {
            let look = inner.look_is_due();
            inner.advance(look);
            if matches!(attempt(&mut inner)?, Attempt::Done) {
                return Ok(());
            }
            drop(inner);
            // A program that tries again and again must let the router, and the peer, run.
            rustix::thread::sched_yield();
            return Err(Errno::AGAIN);
        }
        let deadline = time(&inner);
        drop(inner);
        wait_for(self, deadline, |inner| match attempt(inner) {
            Ok(Attempt::Wait) => None,
            Ok(Attempt::Done) => Some(Ok(())),
            Err(errno) => Some(Err(errno)),
        })?
    }

    /// `recv(2)`: how many bytes; 0 at the end.
    pub(super) fn receive(&self, to: &mut Vectors<'_>, how: How) -> Result<usize, Errno> {
        let wanted = to.left();
        let time = |inner: &Inner| inner.options.receive_deadline();
        let mut done = 0;
        let result = self.attempt(how, time, |inner| {
            let link = inner.connected()?;
            if link.stream.unread() != 0 || wanted == 0 {
                if how.peek {
                    done = link.read(&mut to.peek());
                    return Ok(Attempt::Done);
                }
                let read = link.read(to);
                link.stream.consume(read as u32);
                done += read;
                if let Err(errno) = link.settle() {
                    return Err(inner.broke(errno));
                }
                if to.left() == 0 || !how.all {
                    return Ok(Attempt::Done);
                }
            }
            if link.stream.is_readable() {
                return Ok(Attempt::Wait);
            }
            match (link.stream.phase(), inner.error.take()) {
                (Phase::Broken, Some(errno)) => Err(errno),
                _ => Ok(Attempt::Done),
            }
        });
        count(result, done)
    }

    /// `send(2)`: how many bytes.
    pub(super) fn send(&self, from: &mut Vectors<'_>, how: How) -> Result<usize, Errno> {
        let wanted = from.left();
        let time = |inner: &Inner| inner.options.send_deadline();
        let mut step = Stream::FIRST_STEP;
        let result = self.attempt(how, time, |inner| {
            let link = inner.writable()?;
            while from.left() != 0 {
                let want = from.left().min(step as usize) as u32;
                let Some(write) = link.stream.send(want) else {
                    return Ok(Attempt::Wait);
                };
                if let Err(errno) = link.send(&write, from) {
                    return Err(inner.broke(errno));
                }
                step = (step * 2).min(Stream::MAX_STEP);
            }
            Ok(Attempt::Done)
        });
        count(result, wanted - from.left())
    }

    /// `riowrite`: how many bytes.
    pub(super) fn write_at(
        &self,
        from: &mut Vectors<'_>,
        offset: u64,
        how: How,
    ) -> Result<usize, Errno> {
        let wanted = from.left();
        let time = |inner: &Inner| inner.options.send_deadline();
        let mut step = Stream::FIRST_STEP;
        let mut looked = false;
        let result = self.attempt(how, time, |inner| {
            if !std::mem::replace(&mut looked, true) {
                // The peer's mappings that have been told.
                inner.advance(false);
            }
            let link = inner.writable()?;
            while from.left() != 0 {
                let want = from.left().min(step as usize) as u32;
                let at = offset.wrapping_add((wanted - from.left()) as u64);
                let write = link.stream.write_at(at, want);
                let Some(write) = write.map_err(|_| Errno::INVAL)? else {
                    return Ok(Attempt::Wait);
                };
                if let Err(errno) = link.send(&write, from) {
                    return Err(inner.broke(errno));
                }
                step = (step * 2).min(Stream::MAX_STEP);
            }
            Ok(Attempt::Done)
        });
        count(result, wanted - from.left())
    }

    /// Waits for a peer that is being accepted to be there.
    fn settled(&self) -> Result<(), Errno> {
        let accepting = matches!(self.lock().phase, State::Accepting(_));
        if accepting {
            self.opened(false)
        } else {
            Ok(())
        }
    }

    /// `shutdown(2)`.
    pub(super) fn shutdown(&self, how: i32) -> Result<(), Errno> {
        let (reads, sends) = match how {
            libc::SHUT_RD => (true, false),
            libc::SHUT_WR => (false, true),
            libc::SHUT_RDWR => (true, true),
            _ => return Err(Errno::INVAL),
        };
        self.settled()?;
        let mut inner = self.lock();
        inner.advance(true);
        let link = inner.connected()?;
        match (reads, sends) {
            (true, true) => link.stream.disconnect(),
            (true, false) => link.stream.shutdown_receive(),
            _ => link.stream.shutdown_send(),
        }
        link.settle()?;
        inner.sent_last |= sends;
        inner.changed();
        Ok(())
    }

    /// `riomap`: the offset by which the peer writes the buffer.
    pub(super) fn map(
        &self,
        addr: u64,
        len: u64,
        for_peer: bool,
        offset: Option<u64>,
    ) -> Result<u64, Errno> {
        let mut access = Access::LOCAL_WRITE;
        if for_peer {
            access |= Access::REMOTE_WRITE;
        }
        let length = u32::try_from(len).map_err(|_| Errno::INVAL)?;
        self.settled()?;
        let mut inner = self.lock();
        inner.advance(true);
        // EINVAL: it has no protection domain before.
        let link = inner.connected().map_err(|_| Errno::INVAL)?;
        let mr = shared()?.pd.reg_mr(addr, len, addr, access)?;
        let offset = offset.unwrap_or(addr);
        let key = mr.key().0;
        let mut index = None;
        if for_peer {
            let segment = Segment { addr, key, length };
            index = link.stream.map_own(IoMap { offset, segment });
            if index.is_none() {
                let _ = mr.dereg();
                return Err(Errno::NOMEM);
            }
        }
        let settled = link.settle();
        link.mapped.push(Mapped {
            addr,
            len,
            mr,
            index,
        });
        settled.map(|()| offset)
    }

    /// `riounmap`.
    pub(super) fn unmap(&self, addr: u64, len: u64) -> Result<(), Errno> {
        let mut inner = self.lock();
        let link = inner.connected()?;
        let same = |mapped: &Mapped| mapped.addr == addr && mapped.len == len;
        let at = link.mapped.iter().position(same).ok_or(Errno::INVAL)?;
        let mapped = link.mapped.swap_remove(at);
        if let Some(index) = mapped.index {
            link.stream.unmap_own(index);
        }
        mapped.mr.dereg()
    }
}

impl Inner {
    /// What the stream has accounted for could not be posted: it is unusable, which later calls
    /// tell too.
    fn broke(&mut self, errno: Errno) -> Errno {
        if let Some(link) = &mut self.link {
            link.stream.fail();
        }
        self.error = Some(errno);
        self.changed();
        errno
    }

    /// The stream. ENOTCONN: there is none.
    fn connected(&mut self) -> Result<&mut Link, Errno> {
        match self.phase {
            State::Open => self.link.as_mut().ok_or(Errno::NOTCONN),
            State::Gone => Err(Errno::BADF),
            _ => Err(self.error.take().unwrap_or(Errno::NOTCONN)),
        }
    }

    /// The stream, if it may be sent to. EPIPE: the program has ended it; ECONNRESET: the peer
    /// has.
    fn writable(&mut self) -> Result<&mut Link, Errno> {
        let ended = self.sent_last;
        let link = self.connected()?;
        if link.stream.is_writable() {
            Ok(link)
        } else if ended {
            Err(Errno::PIPE)
        } else {
            Err(Errno::CONNRESET)
        }
    }
}
