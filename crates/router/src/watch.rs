//! Watching the engine: a round that takes too long is told of, with what it is at.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// A round is over by then, unless something is wrong: a turn is at most a few hundred kilobytes.
pub(crate) const ROUND_LIMIT: Duration = Duration::from_millis(500);

/// How far the engine is. Written by its thread, read by who watches; every access is relaxed, as
/// the numbers order nothing.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Nanoseconds of the engine's clock at which the present round began, plus one; 0 between
    /// rounds.
    since: AtomicU64,
    qpn: AtomicU32,
}

impl Progress {
    pub(crate) fn begin(&self, now: u64) {
        self.since.store(now.saturating_add(1), Ordering::Relaxed);
    }

    pub(crate) fn end(&self) {
        self.since.store(0, Ordering::Relaxed);
    }

    /// The queue pair whose turn it is.
    pub(crate) fn at(&self, qpn: u32) {
        self.qpn.store(qpn, Ordering::Relaxed);
    }

    /// For how long the present round has lasted and at which queue pair it is, if that is too
    /// long.
    pub(crate) fn stuck(&self, now: u64) -> Option<(Duration, u32)> {
        let since = self.since.load(Ordering::Relaxed).checked_sub(1)?;
        let lasted = Duration::from_nanos(now.saturating_sub(since));
        (lasted > ROUND_LIMIT).then(|| (lasted, self.qpn.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_long_round_is_stuck() {
        let progress = Progress::default();
        let limit = ROUND_LIMIT.as_nanos() as u64;
        assert_eq!(progress.stuck(10 * limit), None);
        progress.begin(5);
        progress.at(77);
        assert_eq!(progress.stuck(5 + limit), None);
        let (lasted, qpn) = progress.stuck(6 + limit).unwrap();
        assert_eq!((lasted, qpn), (ROUND_LIMIT + Duration::from_nanos(1), 77));
        progress.end();
        assert_eq!(progress.stuck(10 * limit), None);
    }
}
