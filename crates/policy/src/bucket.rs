//! Token buckets.

const NS_PER_S: i128 = 1_000_000_000;

/// A rate with bursts: tokens come evenly, and up to a second's worth of them are kept. Who takes a
/// token that is not there yet is told when it will be, and has it then: each takes one, in turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TokenBucket {
    /// Tokens per second; `u64::MAX` is without limit.
    rate: u64,
    /// Tokens times 10^9, so that slow rates lose nothing between calls; negative if some are
    /// promised.
    level: i128,
    at: u64,
}

impl TokenBucket {
    /// A full bucket.
    pub fn new(rate: u64, now: u64) -> Self {
        TokenBucket {
            rate,
            level: Self::full(rate),
            at: now,
        }
    }

    fn full(rate: u64) -> i128 {
        i128::from(rate.max(1)) * NS_PER_S
    }

    /// Changes the rate; what was promised stays so.
    pub fn set_rate(&mut self, rate: u64, now: u64) {
        self.refill(now);
        self.rate = rate;
        self.level = self.level.min(Self::full(rate));
    }

    fn refill(&mut self, now: u64) {
        let passed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        let more = i128::from(passed).saturating_mul(i128::from(self.rate));
        self.level = self.level.saturating_add(more).min(Self::full(self.rate));
    }

    /// Takes a token; when it is there, [`u64::MAX`] if never.
    pub fn take(&mut self, now: u64) -> u64 {
        if self.rate == u64::MAX {
            return now;
        }
        self.refill(now);
        if self.level < NS_PER_S && self.rate == 0 {
            return u64::MAX;
        }
        self.level = self.level.saturating_sub(NS_PER_S);
        if self.level >= 0 {
            return now;
        }
        let wait = (-self.level).div_euclid(i128::from(self.rate));
        let rest = (-self.level).rem_euclid(i128::from(self.rate)) != 0;
        let wait = u64::try_from(wait).unwrap_or(u64::MAX);
        self.at.saturating_add(wait).saturating_add(rest.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_burst_then_the_rate() {
        let mut bucket = TokenBucket::new(1000, 0);
        assert!((0..1000).all(|_| bucket.take(0) == 0));
        assert_eq!(bucket.take(0), 1_000_000);
        assert_eq!(bucket.take(0), 2_000_000);
        assert_eq!(bucket.take(1_500_000), 3_000_000);
        // Both promises are kept at the old rate; then the new one counts.
        bucket.set_rate(u64::MAX, 2_000_000);
        assert_eq!(bucket.take(2_000_000), 2_000_000);
    }

    #[test]
    fn a_rate_of_nothing_gives_nothing_after_its_burst() {
        let mut bucket = TokenBucket::new(0, 0);
        assert_eq!(bucket.take(5), 5);
        assert_eq!(bucket.take(u64::MAX - 1), u64::MAX);
    }

    proptest! {
        #[test]
        fn never_more_than_rate_and_burst(
            rate in 1u64..1000, waits in proptest::collection::vec(0u64..10_000_000, 1..2000)
        ) {
            let mut bucket = TokenBucket::new(rate, 0);
            let mut now = 0;
            let mut last = 0;
            for (taken, wait) in waits.into_iter().enumerate() {
                now += wait;
                let at = bucket.take(now);
                prop_assert!(at >= now && at >= last);
                last = at;
                let most = u128::from(rate) + u128::from(at) * u128::from(rate) / 1_000_000_000;
                prop_assert!((taken as u128) < most, "{taken} by {at}");
            }
        }

        #[test]
        fn clocks_that_go_back_or_far_do_no_harm(
            rate in any::<u64>(), times in proptest::collection::vec(any::<u64>(), 1..50)
        ) {
            let mut bucket = TokenBucket::new(rate, 0);
            for now in times {
                let _ = bucket.take(now);
            }
        }
    }
}
