//! The connections that the control thread serves: each has a number that is not given again, so
//! that an event of a connection that is closed meets no other one.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freeflow_session::Handle;
use freeflow_shm::PeerProcess;

use crate::control::Answer;

/// A connection must say hello within this time.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// Connections of an endpoint that have not said hello.
const MAX_SILENT: u32 = 64;

/// A connection.
pub(crate) struct Connection {
    pub(crate) socket: Arc<OwnedFd>,
    pub(crate) endpoint: Handle,
    pub(crate) process: PeerProcess,
    pub(crate) session: Option<Handle>,
    /// It has waited for its next message's token.
    pub(crate) granted: bool,
    /// The answer to its last message, which is not worked off yet.
    pub(crate) answer: Option<Answer>,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Connections {
    by_number: HashMap<u32, Connection>,
    next: u32,
    /// Those that have not said hello, of each endpoint.
    silent: HashMap<Handle, u32>,
    /// When they came, oldest first; some have said hello, or are gone.
    arrivals: VecDeque<(Instant, u32)>,
}

impl Connections {
    /// Whether an endpoint may have another connection.
    pub(crate) fn has_room(&self, endpoint: Handle) -> bool {
        self.silent.get(&endpoint).copied().unwrap_or(0) < MAX_SILENT
    }

    /// Adds one; returns its number.
    pub(crate) fn add(&mut self, connection: Connection, now: Instant) -> u32 {
        let number = loop {
            let number = self.next;
            self.next = self.next.wrapping_add(1);
            if !self.by_number.contains_key(&number) {
                break number;
            }
        };
        *self.silent.entry(connection.endpoint).or_default() += 1;
        self.arrivals.push_back((now, number));
        self.by_number.insert(number, connection);
        number
    }

    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut Connection> {
        self.by_number.get_mut(&number)
    }

    pub(crate) fn get(&self, number: u32) -> Option<&Connection> {
        self.by_number.get(&number)
    }

    /// It has said hello.
    pub(crate) fn begin(&mut self, number: u32, session: Handle) {
        if let Some(connection) = self.by_number.get_mut(&number)
            && connection.session.replace(session).is_none()
        {
            let endpoint = connection.endpoint;
            self.spoke(endpoint);
        }
    }

    pub(crate) fn remove(&mut self, number: u32) -> Option<Connection> {
        let connection = self.by_number.remove(&number)?;
        if connection.session.is_none() {
            self.spoke(connection.endpoint);
        }
        Some(connection)
    }

    fn spoke(&mut self, endpoint: Handle) {
        if let Some(count) = self.silent.get_mut(&endpoint) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.silent.remove(&endpoint);
            }
        }
    }

    fn is_silent(&self, number: u32) -> bool {
        self.get(number).is_some_and(|c| c.session.is_none())
    }

    /// One that has been silent for too long.
    pub(crate) fn overdue(&mut self, now: Instant) -> Option<u32> {
        while let Some(&(arrived, number)) = self.arrivals.front() {
            let silent = self.is_silent(number);
            if silent && now.saturating_duration_since(arrived) < HELLO_TIME {
                return None;
            }
            self.arrivals.pop_front();
            if silent {
                return Some(number);
            }
        }
        None
    }

    /// When to ask [`Self::overdue`] again.
    pub(crate) fn next_due(&mut self) -> Option<Instant> {
        while let Some(&(arrived, number)) = self.arrivals.front() {
            if self.is_silent(number) {
                return Some(arrived + HELLO_TIME);
            }
            self.arrivals.pop_front();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(endpoint: u32) -> Connection {
        let (socket, _) = freeflow_shm::event_pair().unwrap();
        let process = freeflow_shm::peer_process(&socket).unwrap();
        Connection {
            socket: Arc::new(socket),
            endpoint: Handle(endpoint),
            process,
            session: None,
            granted: false,
            answer: None,
        }
    }

    #[test]
    fn numbers_are_not_given_again() {
        let mut all = Connections {
            next: u32::MAX,
            ..Connections::default()
        };
        let now = Instant::now();
        let a = all.add(connection(1), now);
        let b = all.add(connection(1), now);
        assert_eq!((a, b), (u32::MAX, 0));
        all.remove(a).unwrap();
        all.next = u32::MAX;
        assert_eq!(all.add(connection(1), now), u32::MAX);
        // Number 0 is still in use.
        assert_eq!(all.add(connection(1), now), 1);
    }

    #[test]
    fn only_so_many_are_silent_and_not_for_long() {
        let mut all = Connections::default();
        let now = Instant::now();
        let numbers: Vec<_> = (0..MAX_SILENT)
            .map(|_| all.add(connection(1), now))
            .collect();
        assert!(!all.has_room(Handle(1)) && all.has_room(Handle(2)));
        all.begin(numbers[0], Handle(7));
        assert!(all.has_room(Handle(1)));
        all.remove(numbers[1]).unwrap();
        assert_eq!(all.next_due(), Some(now + HELLO_TIME));
        assert_eq!(all.overdue(now), None);
        let later = now + HELLO_TIME;
        for &number in &numbers[2..] {
            assert_eq!(all.overdue(later), Some(number));
            all.remove(number).unwrap();
        }
        assert_eq!(all.overdue(later), None);
        assert_eq!(all.next_due(), None);
        assert!(all.silent.is_empty() && all.arrivals.is_empty());
        assert_eq!(all.get(numbers[0]).unwrap().session, Some(Handle(7)));
    }
}
