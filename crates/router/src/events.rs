//! Event streams towards programs: completion events of a channel, asynchronous events of a
//! context. What a program does not read waits here, each stream for itself, until its socket has
//! room again; the engine's thread is woken for that, and never looks in vain.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use freeflow_session::{Event, Handle};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::SendFlags;
use rustix::net::sockopt::set_socket_send_buffer_size;

use crate::engine::Engine;

/// Events that wait for one stream's program; it gets no more after that.
const MAX_WAITING: usize = 4096;

/// Events that wait for all streams of a session.
const MAX_WAITING_SESSION: u32 = 65_536;

/// Bytes of the kernel's memory that unread events may take: some ten events.
const SOCKET_BYTES: usize = 4096;

const KIND_SHIFT: u32 = 32;

/// Which stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StreamId {
    /// Asynchronous events of a context.
    Context(Handle),
    /// Events of a completion channel.
    Channel(Handle),
    /// Events of the connection manager's channel.
    Cm(Handle),
}

impl StreamId {
    /// What its socket is known by in the engine's epoll set, beside sessions' doorbells.
    pub(crate) fn data(self) -> u64 {
        let (kind, handle) = match self {
            StreamId::Context(handle) => (1, handle),
            StreamId::Channel(handle) => (2, handle),
            StreamId::Cm(handle) => (3, handle),
        };
        kind << KIND_SHIFT | u64::from(handle.0)
    }

    /// The stream that data of the epoll set names, if it does.
    pub(crate) fn from_data(data: u64) -> Option<Self> {
        let handle = Handle(data as u32);
        match data >> KIND_SHIFT {
            1 => Some(StreamId::Context(handle)),
            2 => Some(StreamId::Channel(handle)),
            3 => Some(StreamId::Cm(handle)),
            _ => None,
        }
    }
}

/// The router's end of a socket to a program. It never waits for the program: what there is no
/// room for comes when the engine's thread is told of room.
#[derive(Debug)]
pub(crate) struct Outlet {
    socket: OwnedFd,
    /// Whether it is in the epoll set.
    known: bool,
}

impl Outlet {
    pub(crate) fn new(socket: OwnedFd) -> Result<Self, Errno> {
        set_socket_send_buffer_size(&socket, SOCKET_BYTES)?;
        let known = false;
        Ok(Outlet { socket, known })
    }

    /// Sends a packet; false if there is no room. A reader that is gone wants none.
    pub(crate) fn pass(&self, bytes: &[u8]) -> bool {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = rustix::net::send(&self.socket, bytes, flags);
        !matches!(sent, Err(Errno::AGAIN | Errno::NOBUFS))
    }

    /// Has the engine's thread woken once, when there is room.
    pub(crate) fn watch(&mut self, set: &OwnedFd, data: u64) {
        let flags = EventFlags::OUT | EventFlags::ONESHOT;
        let data = EventData::new_u64(data);
        let watched = if self.known {
            epoll::modify(set, &self.socket, data, flags)
        } else {
            epoll::add(set, &self.socket, data, flags)
        };
        self.known |= watched.is_ok();
    }
}

/// A stream of events.
#[derive(Debug)]
pub(crate) struct Stream {
    outlet: Outlet,
    waiting: VecDeque<[u8; Event::BYTES]>,
}

impl Stream {
    pub(crate) fn new(socket: OwnedFd) -> Result<Self, Errno> {
        let outlet = Outlet::new(socket)?;
        let waiting = VecDeque::new();
        Ok(Stream { outlet, waiting })
    }

    /// Events that wait.
    pub(crate) fn waiting(&self) -> u32 {
        self.waiting.len() as u32
    }

    /// Sends an event, or keeps it if there is room for one more.
    fn send(&mut self, event: Event, more: bool, set: &OwnedFd, data: u64) {
        let bytes = event.encode();
        if self.waiting.is_empty() {
            if self.outlet.pass(&bytes) {
                return;
            }
            self.outlet.watch(set, data);
        }
        if more && self.waiting.len() < MAX_WAITING {
            self.waiting.push_back(bytes);
        }
    }

    /// Sends what waits, as far as there is room; the rest when there is room again.
    fn flush(&mut self, set: &OwnedFd, data: u64) {
        while let Some(bytes) = self.waiting.front() {
            if !self.outlet.pass(bytes) {
                return self.outlet.watch(set, data);
            }
            self.waiting.pop_front();
        }
    }
}

impl Engine {
    /// Sends an event to a program.
    pub(crate) fn send_event(&mut self, to: StreamId, event: Event) {
        let (session, stream) = match to {
            StreamId::Context(context) => match self.contexts.get_mut(context) {
                Some(c) => (c.session, &mut c.events),
                None => return,
            },
            StreamId::Channel(channel) => match self.channels.get_mut(channel) {
                Some(c) => (c.session, &mut c.events),
                None => return,
            },
            // Its events wait in the channel itself.
            StreamId::Cm(_) => return,
        };
        let Some(s) = self.sessions.get_mut(session) else {
            return;
        };
        let before = stream.waiting();
        let more = s.events_waiting < MAX_WAITING_SESSION;
        stream.send(event, more, &self.doorbells, to.data());
        s.events_waiting += stream.waiting() - before;
    }

    /// A stream's socket has room.
    pub(crate) fn flush_events(&mut self, of: StreamId) {
        let (session, stream) = match of {
            StreamId::Context(context) => match self.contexts.get_mut(context) {
                Some(c) => (c.session, &mut c.events),
                None => return,
            },
            StreamId::Channel(channel) => match self.channels.get_mut(channel) {
                Some(c) => (c.session, &mut c.events),
                None => return,
            },
            StreamId::Cm(channel) => return self.show_cm_events(channel),
        };
        let before = stream.waiting();
        stream.flush(&self.doorbells, of.data());
        let sent = before - stream.waiting();
        if let Some(s) = self.sessions.get_mut(session) {
            s.events_waiting = s.events_waiting.saturating_sub(sent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freeflow_shm::{event_pair, recv_packet};
    use rustix::net::RecvFlags;

    /// Whether the stream's socket is reported to have room.
    fn has_room(set: &OwnedFd) -> bool {
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 4];
        let timeout = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let (events, _) = epoll::wait(set, &mut events, Some(&timeout)).unwrap();
        assert!(events.iter().all(|e| e.data.u64() == 7));
        !events.is_empty()
    }

    #[test]
    fn what_is_not_read_waits_in_order_and_is_not_asked_after_in_vain() {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let (router, program) = event_pair().unwrap();
        let mut stream = Stream::new(router).unwrap();
        let count = 1000u32;
        for n in 0..count {
            stream.send(Event::Completion(Handle(n)), true, &set, 7);
        }
        assert!(stream.waiting() > 900 && !has_room(&set));
        let mut seen = 0;
        let mut bytes = [0; Event::BYTES];
        while seen < count {
            while let Ok(packet) = recv_packet(&program, &mut bytes, RecvFlags::DONTWAIT) {
                assert_eq!(packet.len, Event::BYTES);
                let expected = Event::Completion(Handle(seen));
                assert_eq!(Event::decode(&bytes), Some(expected));
                seen += 1;
            }
            assert!(seen == count || has_room(&set), "{seen}");
            stream.flush(&set, 7);
        }
        assert_eq!(stream.waiting(), 0);
        assert!(!has_room(&set));
    }

    #[test]
    fn only_so_many_wait_and_none_for_a_reader_that_is_gone() {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let (router, program) = event_pair().unwrap();
        let mut stream = Stream::new(router).unwrap();
        for _ in 0..2 * MAX_WAITING {
            stream.send(Event::Completion(Handle(1)), true, &set, 7);
        }
        assert_eq!(stream.waiting(), MAX_WAITING as u32);
        drop(program);
        stream.flush(&set, 7);
        assert_eq!(stream.waiting(), 0);
    }
}
