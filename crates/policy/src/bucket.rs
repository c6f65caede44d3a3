//! Token buckets.

use serde::{Deserialize, Serialize};

const NS_PER_S: u128 = 1_000_000_000;

/// A rate with bursts: tokens come evenly, and up to `burst` of them are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TokenBucket {
    /// Tokens per second; 0 is without limit.
    rate: u64,
    burst: u64,
    /// Tokens times 10^9, so that slow rates lose nothing between calls.
    level: u128,
    at: u64,
}

impl TokenBucket {
    /// A full bucket.
    pub fn new(rate: u64, burst: u64, now: u64) -> Self {
        let burst = burst.max(1);
        TokenBucket {
            rate,
            burst,
            level: u128::from(burst) * NS_PER_S,
            at: now,
        }
    }

    /// Tokens per second; 0 is without limit.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    fn refill(&mut self, now: u64) {
        let passed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        let full = u128::from(self.burst) * NS_PER_S;
        let more = u128::from(passed) * u128::from(self.rate);
        self.level = self.level.saturating_add(more).min(full);
    }

    /// Takes a token. If there is none, the error is when there will be one.
    pub fn take(&mut self, now: u64) -> Result<(), u64> {
        if self.rate == 0 {
            return Ok(());
        }
        self.refill(now);
        match self.level.checked_sub(NS_PER_S) {
            Some(left) => {
                self.level = left;
                Ok(())
            }
            None => {
                let missing = NS_PER_S - self.level;
                let wait = missing.div_ceil(u128::from(self.rate));
                Err(self
                    .at
                    .saturating_add(u64::try_from(wait).unwrap_or(u64::MAX)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_burst_then_the_rate() {
        let mut bucket = TokenBucket::new(1000, 3, 0);
        for _ in 0..3 {
            assert_eq!(bucket.take(0), Ok(()));
        }
        assert_eq!(bucket.take(0), Err(1_000_000));
        assert_eq!(bucket.take(999_999), Err(1_000_000));
        assert_eq!(bucket.take(1_000_000), Ok(()));
        assert_eq!(bucket.take(1_000_000), Err(2_000_000));
    }

    #[test]
    fn no_rate_is_no_limit() {
        let mut bucket = TokenBucket::new(0, 1, 0);
        assert!((0..1000).all(|_| bucket.take(0).is_ok()));
    }

    proptest! {
        #[test]
        fn never_more_than_rate_and_burst(
            rate in 1u64..100_000, burst in 1u64..100, waits in proptest::collection::vec(0u64..10_000_000, 1..200)
        ) {
            let mut bucket = TokenBucket::new(rate, burst, 0);
            let (mut now, mut taken) = (0u64, 0u64);
            for wait in waits {
                now += wait;
                match bucket.take(now) {
                    Ok(()) => taken += 1,
                    Err(at) => {
                        prop_assert!(at > now);
                        // At that time there is one, and not a nanosecond earlier.
                        prop_assert!(bucket.take(at - 1).is_err());
                        prop_assert!(bucket.take(at).is_ok());
                        taken += 1;
                        now = at;
                    }
                }
                let most = u128::from(burst) + u128::from(now) * u128::from(rate) / NS_PER_S;
                prop_assert!(u128::from(taken) <= most);
            }
        }

        #[test]
        fn clocks_that_go_back_or_far_do_no_harm(times in proptest::collection::vec(any::<u64>(), 1..50)) {
            let mut bucket = TokenBucket::new(u64::MAX, u64::MAX, 0);
            for now in times {
                let _ = bucket.take(now);
            }
        }
    }
}
