//! Whose turn it is with the control thread: endpoints in turn, and in turn what is ready of each.
//! What is idle is not in here, and costs nothing.

use std::collections::VecDeque;

use freeflow_session::Handle;
use rustc_hash::FxHashMap;

/// What is ready, in the order in which it is served.
#[derive(Debug)]
pub(crate) struct Turns<T> {
    /// Endpoints of which something is ready, each once.
    line: VecDeque<Handle>,
    /// What is ready of each of them, never nothing.
    ready: FxHashMap<Handle, VecDeque<T>>,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Turns {
            line: VecDeque::new(),
            ready: FxHashMap::default(),
        }
    }
}

impl<T> Turns<T> {
    /// Something of an endpoint is ready: its turn comes after all else of that endpoint.
    pub(crate) fn add(&mut self, endpoint: Handle, what: T) {
        let ready = self.ready.entry(endpoint).or_default();
        if ready.is_empty() {
            self.line.push_back(endpoint);
        }
        ready.push_back(what);
    }

    /// What is served next, and whose it is. The endpoint's next turn comes after one of each
    /// other endpoint that waits now.
    pub(crate) fn next(&mut self) -> Option<(Handle, T)> {
        let endpoint = self.line.pop_front()?;
        let ready = self.ready.get_mut(&endpoint)?;
        let what = ready.pop_front()?;
        if ready.is_empty() {
            self.ready.remove(&endpoint);
        } else {
            self.line.push_back(endpoint);
        }
        Some((endpoint, what))
    }

    /// Turns until each endpoint of which something is ready has had one.
    pub(crate) fn round(&self) -> usize {
        self.line.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOD: Handle = Handle(1);
    const CALM: Handle = Handle(2);
    const OTHER: Handle = Handle(3);

    fn all(turns: &mut Turns<u32>) -> Vec<(Handle, u32)> {
        std::iter::from_fn(|| turns.next()).collect()
    }

    #[test]
    fn endpoints_take_turns_whatever_is_ready_of_each() {
        let mut turns = Turns::default();
        (0..4).for_each(|n| turns.add(FLOOD, n));
        turns.add(CALM, 10);
        turns.add(OTHER, 20);
        turns.add(OTHER, 21);
        assert_eq!(turns.round(), 3);
        let order = [
            (FLOOD, 0),
            (CALM, 10),
            (OTHER, 20),
            (FLOOD, 1),
            (OTHER, 21),
            (FLOOD, 2),
            (FLOOD, 3),
        ];
        assert_eq!(all(&mut turns), order);
        assert_eq!(turns.round(), 0);
        assert!(turns.ready.is_empty());
    }

    #[test]
    fn whoever_comes_late_waits_for_one_turn_of_each() {
        let mut turns = Turns::default();
        (0..100).for_each(|n| turns.add(FLOOD, n));
        for n in 0..50 {
            assert_eq!(turns.next(), Some((FLOOD, 2 * n)));
            turns.add(CALM, n);
            assert_eq!(turns.next(), Some((FLOOD, 2 * n + 1)));
            assert_eq!(turns.next(), Some((CALM, n)));
            // As connections do that are asked again at once.
            turns.add(FLOOD, 2 * n + 100);
            turns.add(FLOOD, 2 * n + 101);
        }
    }

    #[test]
    fn connections_of_an_endpoint_take_turns() {
        let mut turns = Turns::default();
        (0..3).for_each(|n| turns.add(FLOOD, n));
        let mut served = [0; 3];
        for _ in 0..30 {
            let (endpoint, n) = turns.next().unwrap();
            served[n as usize] += 1;
            turns.add(endpoint, n);
        }
        assert_eq!(served, [10; 3]);
    }
}
