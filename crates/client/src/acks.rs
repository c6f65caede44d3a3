//! Events that a program was given and has not acknowledged: they keep their object alive
//! (`ibv_get_cq_event(3)`, `ibv_get_async_event(3)`).

use std::sync::{Condvar, Mutex, PoisonError};

#[derive(Debug, Default)]
pub(crate) struct Acks {
    outstanding: Mutex<u64>,
    none: Condvar,
}

impl Acks {
    /// An event is given to the program.
    pub(crate) fn delivered(&self) {
        *self
            .outstanding
            .lock()
            .unwrap_or_else(PoisonError::into_inner) += 1;
    }

    /// The program acknowledges `n` events.
    pub(crate) fn acknowledge(&self, n: u32) {
        let mut outstanding = self
            .outstanding
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *outstanding = outstanding.saturating_sub(n.into());
        if *outstanding == 0 {
            self.none.notify_all();
        }
    }

    /// Waits until all are acknowledged, as destroying an object must.
    pub(crate) fn wait(&self) {
        let outstanding = self
            .outstanding
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        drop(self.none.wait_while(outstanding, |n| *n != 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_ends_with_the_last_acknowledgement() {
        let acks = Acks::default();
        acks.wait();
        acks.delivered();
        acks.delivered();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| acks.wait());
            acks.acknowledge(1);
            assert!(!waiter.is_finished());
            acks.acknowledge(1);
        });
    }
}
