//! What is known of one peer.

use std::net::IpAddr;

use crate::backoff::Backoff;
use crate::links::{PeerSpec, Status};
use crate::talk::Agreed;

/// A host that was here is believed for so long after its link is lost, in nanoseconds: connections
/// break that packets survive.
pub(crate) const BELIEVED: u64 = 60_000_000_000;

/// A link that lived for so long has worked, in nanoseconds: the next one is tried at once.
const LASTING: u64 = 1_000_000_000;

/// Reasons that change all the time are told of no more often, in nanoseconds.
const QUIET: u64 = 1_000_000_000;

/// A peer's side of the state.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) spec: PeerSpec,
    /// When this side tries to connect, if that is its part and it is not connected.
    pub(crate) dial_at: Option<u64>,
    /// The connection that is its link.
    pub(crate) link: Option<u64>,
    /// What was agreed last.
    pub(crate) agreed: Option<Agreed>,
    /// Since when the link is up or down.
    pub(crate) since: u64,
    /// Why it is down.
    pub(crate) reason: String,
    /// When the host is not believed any more.
    pub(crate) lapses_at: Option<u64>,
    backoff: Backoff,
    /// The reason that the operator was told.
    told: String,
    /// Until when the operator is told of no other.
    quiet: u64,
}

impl Peer {
    pub(crate) fn new(spec: PeerSpec, dials: bool, seed: u64, now: u64) -> Self {
        let reason = if dials {
            "connecting"
        } else {
            "it has not connected yet, as is its part (its address is the lower one); does a router \
             run there whose map (--hosts) has this host?"
        };
        Peer {
            spec,
            dial_at: dials.then_some(now),
            link: None,
            agreed: None,
            since: now,
            reason: reason.to_owned(),
            lapses_at: None,
            backoff: Backoff::new(seed),
            told: String::new(),
            quiet: 0,
        }
    }

    /// What it is called where people read it.
    pub(crate) fn title(&self) -> String {
        match &self.spec.name {
            Some(name) => format!("{name} ({})", self.spec.address),
            None => self.spec.address.to_string(),
        }
    }

    /// Tries again, later and later.
    pub(crate) fn retry(&mut self, now: u64) {
        self.dial_at = Some(now.saturating_add(self.backoff.next()));
    }

    /// Its link is a connection now.
    pub(crate) fn up(&mut self, link: u64, agreed: Agreed, now: u64) {
        self.told.clear();
        self.reason.clear();
        if self.link.replace(link).is_none() {
            self.since = now;
        }
        (self.agreed, self.lapses_at, self.dial_at) = (Some(agreed), None, None);
    }

    /// Its link is lost.
    pub(crate) fn down(&mut self, now: u64) {
        if now.saturating_sub(self.since) >= LASTING {
            self.backoff.reset();
        }
        self.link = None;
        self.since = now;
        self.lapses_at = Some(now.saturating_add(BELIEVED));
    }

    /// Notes why there is no link; what the operator is to be told, if that is new.
    pub(crate) fn because(&mut self, reason: String, now: u64) -> Option<String> {
        self.reason = reason;
        if self.told == self.reason || now < self.quiet {
            return None;
        }
        self.quiet = now.saturating_add(QUIET);
        self.told.clone_from(&self.reason);
        Some(format!("no link to host {}: {}", self.title(), self.reason))
    }

    pub(crate) fn status(&self, now: u64) -> Status {
        let up = self.link.is_some();
        Status {
            address: self.spec.address,
            name: self.spec.name.clone(),
            up,
            since_ms: now.saturating_sub(self.since) / 1_000_000,
            reason: (!up).then(|| self.reason.clone()),
            agreed: self.agreed,
        }
    }
}

/// Which of two hosts connects to the other: so there are never two connections.
pub(crate) fn dials(local: IpAddr, peer: IpAddr) -> bool {
    local < peer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_told_once() {
        let spec = PeerSpec {
            address: [192, 0, 2, 2].into(),
            name: Some("node2".to_owned()),
            segment: 1024,
        };
        let mut peer = Peer::new(spec, true, 1, 0);
        let told = peer.because("refused".to_owned(), 0).unwrap();
        assert_eq!(told, "no link to host node2 (192.0.2.2): refused");
        assert_eq!(peer.because("refused".to_owned(), QUIET), None);
        assert_eq!(peer.because("silent".to_owned(), QUIET - 1), None);
        assert!(peer.because("silent".to_owned(), QUIET).is_some());
        let agreed = Agreed {
            incarnation: 1,
            version: 1,
            segment: 1024,
            selective: true,
            header_crc: true,
        };
        peer.up(5, agreed, 10);
        assert_eq!(peer.status(11_000_010).since_ms, 11);
        assert_eq!((peer.status(10).up, peer.status(10).reason), (true, None));
        peer.down(20);
        assert!(peer.because("silent".to_owned(), 2 * QUIET).is_some());
        assert_eq!(peer.lapses_at, Some(20 + BELIEVED));
    }

    #[test]
    fn one_of_two_hosts_connects() {
        let hosts: Vec<IpAddr> = ["10.0.0.1", "10.0.0.2", "fd00::1", "::1"]
            .map(|text| text.parse().unwrap())
            .into();
        for &a in &hosts {
            for &b in &hosts {
                assert_eq!(dials(a, b) || dials(b, a), a != b);
                assert!(!(dials(a, b) && dials(b, a)));
            }
        }
    }
}
