//! What the operator is to know: noted by threads that must not wait for a log, written by one that
//! may.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Notices kept until somebody takes them; the oldest go first.
const KEPT: usize = 256;

/// Notices; all clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notices(Arc<Mutex<VecDeque<String>>>);

impl Notices {
    pub(crate) fn push(&self, notice: String) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= KEPT {
            all.pop_front();
        }
        all.push_back(notice);
    }

    /// All there are, oldest first; they are gone then.
    pub(crate) fn take(&self) -> Vec<String> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_are_kept() {
        let notices = Notices::default();
        for n in 0..=KEPT {
            notices.clone().push(n.to_string());
        }
        let all = notices.take();
        assert_eq!((all.len(), all[0].as_str()), (KEPT, "1"));
        assert!(notices.take().is_empty());
    }
}
