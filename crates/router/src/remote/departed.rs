//! Queue pairs that are gone while their peers on other hosts may not know yet that their last
//! messages have arrived.
//!
//! A program ends as soon as it has what it wants. If the acknowledgement of the last message is
//! lost then, its sender would be told of a failure that there was not. So a repeat of what was
//! executed is acknowledged for a while longer; anything new is met with silence, as by a host
//! without such a queue pair.

use std::collections::VecDeque;
use std::net::IpAddr;

use freeflow_fabric_udp::{Ecn, Received, To};
use freeflow_transport::{Dropped, Responder, Verdict};
use rustc_hash::FxHashMap;

use crate::engine::Engine;
use crate::remote::{Payload, Remote, RoceFabric, stamp};

/// How long they are remembered, in nanoseconds: several of a peer's timeouts.
const LINGER_NS: u64 = 5_000_000_000;

/// How many are remembered.
const MAX_DEPARTED: usize = 4096;

#[derive(Default)]
pub(super) struct Departed {
    by_qpn: FxHashMap<u32, Last>,
    /// When each is forgotten, the first one first.
    due: VecDeque<(u64, u32)>,
}

struct Last {
    host: IpAddr,
    flow: u32,
    pkey: u16,
    /// Whether the CRC of its peer's packets may cover their headers alone.
    header_crc: bool,
    responder: Responder,
}

impl Departed {
    fn add(&mut self, qpn: u32, last: Last, now: u64) {
        self.forget(now);
        if self.due.len() >= MAX_DEPARTED
            && let Some((_, oldest)) = self.due.pop_front()
        {
            self.by_qpn.remove(&oldest);
        }
        // A number is not given again while it is here: that takes many more queue pairs.
        if self.by_qpn.insert(qpn, last).is_none() {
            self.due.push_back((now.saturating_add(LINGER_NS), qpn));
        }
    }

    /// Forgets those whose peers are a host's.
    pub(super) fn forget_host(&mut self, host: IpAddr) {
        self.by_qpn.retain(|_, last| last.host != host);
        let by_qpn = &self.by_qpn;
        self.due.retain(|(_, qpn)| by_qpn.contains_key(qpn));
    }

    fn forget(&mut self, now: u64) {
        while let Some(&(at, qpn)) = self.due.front()
            && at <= now
        {
            self.due.pop_front();
            self.by_qpn.remove(&qpn);
        }
    }
}

impl Engine {
    /// A queue pair is gone.
    pub(crate) fn depart(&mut self, qpn: u32, reliable: bool, remote: Option<Box<Remote>>) {
        let now = self.now;
        if let Some(remote) = remote.filter(|remote| reliable && remote.may_send()) {
            let header_crc = remote.may_leave_payload_uncovered();
            let Remote {
                host,
                flow,
                pkey,
                responder,
                ..
            } = *remote;
            let last = Last {
                host,
                flow,
                pkey,
                header_crc,
                responder,
            };
            self.network.departed.add(qpn, last, now);
        }
    }

    /// A packet has come for a queue pair that is not here; whether it was here lately.
    pub(super) fn on_late_packet(
        &mut self,
        packet: &Received<'_>,
        fabric: &mut RoceFabric,
    ) -> bool {
        let headers = &packet.headers;
        self.network.departed.forget(self.now);
        let last = self.network.departed.by_qpn.get_mut(&headers.bth.dest_qp);
        let Some(last) =
            last.filter(|last| last.host == packet.src && last.pkey == headers.bth.pkey)
        else {
            return false;
        };
        if headers.bth.header_crc && !last.header_crc {
            return false;
        }
        let verdict = last.responder.on_request(headers, packet.payload.len());
        let to = To {
            dst: last.host,
            flow: last.flow,
            ecn: Ecn::Capable0,
        };
        let pkey = last.pkey;
        let known = matches!(verdict, Verdict::Drop(Dropped::Duplicate | Dropped::Failed));
        // Data that a READ asked for is gone with its region.
        let reply = last.responder.next_reply().filter(|r| r.data.is_none());
        if let Some(reply) = reply.filter(|_| known) {
            let headers = stamp(pkey, &reply.headers);
            let _ = self.push(fabric, &to, &headers, Payload::Bytes(&[]));
        }
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freeflow_transport::Connection;
    use freeflow_types::{QpAttr, QpType};

    fn last() -> Last {
        let connection = Connection::new(QpType::Rc, &QpAttr::default());
        Last {
            host: IpAddr::from([192, 0, 2, 1]),
            flow: 0,
            pkey: 0xFFFF,
            header_crc: false,
            responder: Responder::new(&connection),
        }
    }

    #[test]
    fn they_are_remembered_for_a_while_and_not_without_number() {
        let mut departed = Departed::default();
        let other = IpAddr::from([192, 0, 2, 2]);
        departed.add(1, last(), 0);
        departed.add(2, last(), 1);
        departed.add(
            3,
            Last {
                host: other,
                ..last()
            },
            1,
        );
        departed.forget_host(other);
        assert!(!departed.by_qpn.contains_key(&3) && departed.due.len() == 2);
        departed.forget(LINGER_NS);
        assert!(!departed.by_qpn.contains_key(&1) && departed.by_qpn.contains_key(&2));
        for qpn in 0..2 * MAX_DEPARTED as u32 {
            departed.add(qpn, last(), 2);
        }
        assert_eq!(departed.by_qpn.len(), departed.due.len());
        assert_eq!(departed.due.len(), MAX_DEPARTED);
    }
}
