//! How many packets of a queue pair may be under way.
//!
//! A window as TCP's CUBIC has it (RFC 9438), with slow start that ends when delay grows
//! (as RFC 9406 does) and round-trip times estimated as RFC 6298 does: so queue pairs share a
//! link fairly with each other and with TCP. It counts bytes, in units of full packets, and the
//! responses that a READ asks for count when it is sent; so each queue pair has one window for both
//! directions of data.

use serde::{Deserialize, Serialize};

/// Window of a new connection (RFC 6928 says 10, for paths slower than a data centre's).
const INITIAL: f64 = 16.0;
/// A window never falls below this.
const MIN: f64 = 2.0;
/// Nor grows above.
const MAX: u32 = 4096;
/// A window that was not used for so long begins anew: the network may be another (RFC 5681, 4.1,
/// with the shortest timeout of RFC 6298, 2.4). Programs that send in bursts pause more shortly.
const IDLE_NS: u64 = 1_000_000_000;
/// Multiplicative decrease (RFC 9438, 4.6).
const BETA: f64 = 0.7;
/// Growth of the cubic function (RFC 9438, 5.1), per second cubed.
const C: f64 = 0.4;

/// Before there is a sample of the round-trip time, in nanoseconds.
const INITIAL_PROBE_NS: u64 = 5_000_000;
/// The shortest time until an answer is missed: both ends are processes that may lose their
/// processor for about so long. Where a probe is of one packet, less will do.
const MIN_PROBE_NS: u64 = 1_000_000;
const MIN_SELECTIVE_PROBE_NS: u64 = 250_000;
/// What an answer after probes makes of it at most.
const MAX_FLOOR_NS: u64 = 1_000_000_000;
/// Nanoseconds from one acknowledgement to the next, and how many there are in a round trip at
/// least and at most.
const ACK_SPACING_NS: u64 = 100_000;
const MIN_ACKS: u64 = 4;
const MAX_ACKS: u64 = 64;
/// Growth of delay that ends slow start, at least and at most (RFC 9406, 4.2, for the round-trip
/// times of a data centre).
const MIN_DELAY_STEP_NS: u64 = 100_000;
const MAX_DELAY_STEP_NS: u64 = 4_000_000;

/// A queue pair's congestion window and round-trip estimate.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Window {
    cwnd: f64,
    /// Slow start below it.
    threshold: f64,
    /// Window when the last loss came, and since when it has grown after it.
    before_loss: f64,
    epoch: Option<u64>,
    /// When the last answer came, or the first packet after all were answered was sent.
    used: u64,
    /// Seconds until the cubic function is at the window that there was before the loss.
    plateau: f64,
    /// What Reno would have by now (RFC 9438, 4.3).
    reno: f64,
    srtt: u64,
    rttvar: u64,
    min_rtt: u64,
    /// What a round trip took at most, and a little more, as long as it could not be measured.
    floor: u64,
}

impl Default for Window {
    fn default() -> Self {
        Window {
            cwnd: INITIAL,
            threshold: f64::from(MAX),
            before_loss: 0.0,
            epoch: None,
            used: 0,
            plateau: 0.0,
            reno: 0.0,
            srtt: 0,
            rttvar: 0,
            min_rtt: u64::MAX,
            floor: 0,
        }
    }
}

impl Window {
    /// Full packets that may be under way.
    pub(crate) fn packets(&self) -> f64 {
        self.cwnd
    }

    /// Acknowledgements that a window is worth, at least: what one allows is sent at once, and a
    /// queue that is nearly full loses more of long bursts than of the packets of others between
    /// them. Where round trips are short a burst is, too.
    pub(crate) fn acks(&self) -> u64 {
        (self.srtt / ACK_SPACING_NS).clamp(MIN_ACKS, MAX_ACKS)
    }

    /// Smoothed round-trip time in nanoseconds; 0: none yet.
    pub(crate) fn srtt(&self) -> u64 {
        self.srtt
    }

    /// A round trip took so long.
    pub(crate) fn on_rtt(&mut self, sample: u64) {
        self.floor = 0;
        if self.srtt == 0 {
            self.srtt = sample.max(1);
            self.rttvar = sample / 2;
        } else {
            self.rttvar = (3 * self.rttvar + self.srtt.abs_diff(sample)) / 4;
            self.srtt = ((7 * self.srtt + sample) / 8).max(1);
        }
        self.min_rtt = self.min_rtt.min(sample);
        let step = (self.min_rtt / 8).clamp(MIN_DELAY_STEP_NS, MAX_DELAY_STEP_NS);
        if self.cwnd < self.threshold && sample > self.min_rtt.saturating_add(step) {
            self.threshold = self.cwnd;
        }
    }

    /// An answer came so long after the first of several copies: to which of them is not known, so
    /// it measures nothing (Karn's algorithm, RFC 6298, 3). But who waits so long for the next
    /// answer will measure it, if what the copies were sent for was not a loss.
    pub(crate) fn on_rtt_at_most(&mut self, sample: u64) {
        self.floor = sample.saturating_add(sample / 8).min(MAX_FLOOR_NS);
    }

    /// An answer came while there was room in the window: time that was not made use of is none in
    /// which it could grow (RFC 9438, 5.8).
    pub(crate) fn on_unused(&mut self, now: u64) {
        let unused = now.saturating_sub(self.used);
        self.epoch = self.epoch.map(|at| at.saturating_add(unused));
        self.used = now;
    }

    /// A packet is sent while no other is under way.
    pub(crate) fn on_start(&mut self, now: u64) {
        if now.saturating_sub(self.used) >= IDLE_NS && self.cwnd > INITIAL {
            self.threshold = self.threshold.max(self.cwnd * 0.75);
            self.cwnd = INITIAL;
            (self.epoch, self.reno) = (None, 0.0);
        }
        self.on_unused(now);
    }

    /// So many full packets were acknowledged while the window was what held the sender back.
    pub(crate) fn on_ack(&mut self, acked: f64, now: u64) {
        self.used = now;
        if self.cwnd < self.threshold {
            self.cwnd += acked;
        } else {
            let start = *self.epoch.get_or_insert(now);
            if self.reno == 0.0 {
                self.reno = self.cwnd;
                self.before_loss = self.before_loss.max(self.cwnd);
                self.plateau = cube_root(self.before_loss * (1.0 - BETA) / C);
            }
            let elapsed = now.saturating_sub(start).saturating_add(self.srtt);
            let t = elapsed as f64 / 1e9;
            let since = t - self.plateau;
            let target = C * since * since * since + self.before_loss;
            // Reno with CUBIC's decrease gains alpha a round trip (RFC 9438, 4.3).
            let alpha = if self.reno < self.before_loss {
                3.0 * (1.0 - BETA) / (1.0 + BETA)
            } else {
                1.0
            };
            self.reno += alpha * acked / self.cwnd;
            let cubic =
                self.cwnd + (target - self.cwnd).clamp(0.0, self.cwnd / 2.0) * acked / self.cwnd;
            self.cwnd = cubic.max(self.reno);
        }
        self.cwnd = self.cwnd.clamp(MIN, f64::from(MAX));
    }

    /// Packets were lost, or marked: once a round trip.
    pub(crate) fn on_loss(&mut self) {
        // Fast convergence (RFC 9438, 4.7).
        self.before_loss = if self.cwnd < self.before_loss {
            self.cwnd * (1.0 + BETA) / 2.0
        } else {
            self.cwnd
        };
        self.cwnd = (self.cwnd * BETA).max(MIN);
        self.threshold = self.cwnd;
        self.epoch = None;
        self.reno = 0.0;
    }

    /// Nothing came back for long: begin anew.
    pub(crate) fn on_timeout(&mut self) {
        self.on_loss();
        self.cwnd = MIN;
    }

    /// When an answer is missed, in nanoseconds after the request, after so many probes in vain.
    pub(crate) fn probe_ns(&self, probes: u8, selective: bool) -> u64 {
        let base = match selective {
            _ if self.srtt == 0 => INITIAL_PROBE_NS,
            true => (self.srtt + 4 * self.rttvar).max(MIN_SELECTIVE_PROBE_NS),
            false => (self.srtt + 4 * self.rttvar).max(MIN_PROBE_NS),
        };
        // Where queues are full, the first packets of a connection need many tries.
        let doublings = if self.srtt == 0 { 2 } else { 6 };
        base.saturating_mul(1 << probes.min(doublings))
            .max(self.floor)
    }
}

/// Cube root of what is not negative, by Newton's method: the same on every machine, so that the
/// simulator is too.
fn cube_root(x: f64) -> f64 {
    if x < 1e-9 {
        return 0.0;
    }
    let mut root = x.max(1.0);
    for _ in 0..64 {
        let next = (2.0 * root + x / (root * root)) / 3.0;
        if (next - root).abs() <= 1e-9 * root {
            return next;
        }
        root = next;
    }
    root
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_start_doubles_and_loss_shrinks() {
        let mut w = Window::default();
        w.on_rtt(50_000);
        w.on_ack(16.0, 0);
        assert_eq!(w.packets(), 32.0);
        w.on_loss();
        assert_eq!(w.packets() as u32, 22);
        for _ in 0..100 {
            w.on_loss();
        }
        assert_eq!(w.packets(), 2.0);
        w.on_timeout();
        assert_eq!(w.packets(), 2.0);
    }

    #[test]
    fn growth_after_loss_is_bounded_and_comes_back() {
        let mut w = Window::default();
        w.on_rtt(50_000);
        w.on_ack(84.0, 0);
        w.on_loss();
        let mut now = 0;
        while w.packets() < 100.0 {
            let before = w.packets();
            w.on_ack(before, now);
            assert!(w.packets() <= before * 1.5 + 1.0);
            now += 50_000;
            assert!(now < 10_000_000_000, "at {} only", w.packets());
        }
        for _ in 0..1_000_000 {
            w.on_ack(64.0, now);
            now += 50_000;
        }
        assert_eq!(w.packets(), f64::from(MAX));
    }

    #[test]
    fn time_without_use_does_not_count() {
        let grown = |pauses: u64| {
            let mut w = Window::default();
            w.on_rtt(50_000);
            w.on_ack(84.0, 0);
            w.on_loss();
            let mut now = 0;
            for _ in 0..1000 {
                w.on_ack(w.packets(), now);
                w.on_unused(now + pauses);
                now += 50_000 + pauses;
            }
            w.packets()
        };
        let steady = grown(0);
        assert!(steady > 70.0);
        assert_eq!(grown(10_000_000), steady);
    }

    #[test]
    fn a_window_begins_anew_after_a_second_and_grows_back() {
        let mut w = Window::default();
        w.on_rtt(50_000);
        w.on_ack(184.0, 5);
        w.on_loss();
        let before = w.packets();
        w.on_start(IDLE_NS + 4);
        assert_eq!(w.packets(), before);
        w.on_start(2 * IDLE_NS + 4);
        assert_eq!(w.packets(), INITIAL);
        for now in 0..4 {
            w.on_ack(w.packets(), 2 * IDLE_NS + now);
        }
        assert!(w.packets() >= 0.75 * before);
    }

    #[test]
    fn growing_delay_ends_slow_start() {
        let mut w = Window::default();
        w.on_rtt(50_000);
        w.on_ack(100.0, 0);
        w.on_rtt(500_000);
        let before = w.packets();
        w.on_ack(before, 0);
        assert!(w.packets() <= before + 2.0);
    }

    #[test]
    fn cube_roots_are_right() {
        for x in [0.0, 1e-6, 0.5, 1.0, 27.0, 3072.0, 1e9] {
            assert!(
                (cube_root(x) - f64::cbrt(x)).abs() < 1e-6 * (1.0 + x),
                "{x}"
            );
        }
    }

    #[test]
    fn long_round_trips_have_more_acknowledgements() {
        let mut w = Window::default();
        assert_eq!(w.acks(), MIN_ACKS);
        w.on_rtt(50_000);
        assert_eq!(w.acks(), MIN_ACKS);
        let mut w = Window::default();
        w.on_rtt(2_000_000);
        assert_eq!(w.acks(), 20);
        w.on_rtt(1_000_000_000);
        assert_eq!(w.acks(), MAX_ACKS);
    }

    #[test]
    fn probes_back_off() {
        let mut w = Window::default();
        assert_eq!(w.probe_ns(0, true), INITIAL_PROBE_NS);
        w.on_rtt(10_000);
        assert_eq!(w.probe_ns(0, false), MIN_PROBE_NS);
        assert_eq!(w.probe_ns(3, true), 8 * MIN_SELECTIVE_PROBE_NS);
        assert!(w.probe_ns(255, false) > w.probe_ns(3, false));
        w.on_rtt_at_most(8_000_000);
        assert_eq!(w.probe_ns(0, true), 9_000_000);
        w.on_rtt_at_most(u64::MAX);
        assert_eq!(w.probe_ns(0, true), MAX_FLOOR_NS);
        w.on_rtt(10_000);
        assert_eq!(w.probe_ns(0, true), MIN_SELECTIVE_PROBE_NS);
    }
}
