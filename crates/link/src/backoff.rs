//! When to try again.

/// The first pause, and the longest, in nanoseconds.
const PAUSES: (u64, u64) = (100_000_000, 5_000_000_000);

/// Pauses that double, of random length, so that many hosts do not come at once.
#[derive(Debug)]
pub(crate) struct Backoff {
    pause: u64,
    random: fastrand::Rng,
}

impl Backoff {
    pub(crate) fn new(seed: u64) -> Self {
        Backoff {
            pause: PAUSES.0,
            random: fastrand::Rng::with_seed(seed),
        }
    }

    /// How long to wait now: from half to all of the pause, which then grows.
    pub(crate) fn next(&mut self) -> u64 {
        let pause = self.pause;
        self.pause = pause.saturating_mul(2).min(PAUSES.1);
        self.random.u64(pause / 2..=pause)
    }

    /// It has worked.
    pub(crate) fn reset(&mut self) {
        self.pause = PAUSES.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_differ() {
        let mut one = Backoff::new(1);
        let mut least = PAUSES.0 / 2;
        for _ in 0..20 {
            let pause = one.next();
            assert!((least..=2 * least).contains(&pause), "{pause}");
            least = (2 * least).min(PAUSES.1 / 2);
        }
        one.reset();
        assert!(one.next() <= PAUSES.0);
        let of = |seed| {
            let mut backoff = Backoff::new(seed);
            [(); 4].map(|()| backoff.next())
        };
        assert_ne!(of(1), of(2));
    }
}
