//! What both halves of a queue pair on the wire know about their connection.

use freeflow_types::{Psn, QpAttr, QpType, timeout_ns};
use freeflow_wire::Service;
use serde::{Deserialize, Serialize};

/// Longest segment: a UDP datagram over IPv4 less all headers, in units that keep pad at zero.
pub const MAX_SEGMENT: u32 = 65_536 - 256;

/// Shortest local ACK timeout that is kept, in nanoseconds: codes below 8 ask for less than
/// software that shares its processor can promise (IBTA volume 1, 9.9.2.1.2, lets the time be up
/// to four times the nominal one; this floor is more than that for codes below 6).
const MIN_TIMEOUT_NS: u64 = 1_000_000;

/// Sequence numbers are 64 bits inside, and the low 24 go on the wire. They begin here so that
/// what is older than the first has a number too.
const FIRST_EPOCH: u64 = 1 << 32;

/// The parameters of a connected queue pair's traffic: a plain value.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Connection {
    /// Transport service: RC, UC or a side of XRC.
    pub qp_type: QpType,
    /// The peer's queue pair number, 24 bits.
    pub dest_qp: u32,
    /// Payload bytes of every packet but a message's last: the path MTU, or between FreeFlow
    /// routers whatever they agreed on, up to [`MAX_SEGMENT`].
    pub segment: u32,
    /// First sequence number sent.
    pub sq_psn: u32,
    /// First sequence number expected.
    pub rq_psn: u32,
    /// Local ACK timeout code, 5 bits.
    pub timeout: u8,
    /// Retries when nobody answers, 3 bits.
    pub retry_cnt: u8,
    /// Retries when the receiver is not ready, 3 bits; 7 is for ever.
    pub rnr_retry: u8,
    /// RNR NAK timer code that the responder sends, 5 bits.
    pub min_rnr_timer: u8,
    /// READ and atomic requests outstanding as requester.
    pub max_rd_atomic: u8,
    /// READ and atomic requests that the responder answers at once and remembers.
    pub max_dest_rd_atomic: u8,
    /// The peer is a FreeFlow router that agreed on selective retransmission; see
    /// [`selective`](crate::selective).
    pub selective: bool,
}

impl Connection {
    /// A standard connection with these attributes.
    pub fn new(qp_type: QpType, attr: &QpAttr) -> Self {
        Connection {
            qp_type,
            dest_qp: attr.dest_qpn,
            segment: attr.path_mtu.bytes(),
            sq_psn: attr.sq_psn,
            rq_psn: attr.rq_psn,
            timeout: attr.timeout,
            retry_cnt: attr.retry_cnt,
            rnr_retry: attr.rnr_retry,
            min_rnr_timer: attr.min_rnr_timer,
            max_rd_atomic: attr.max_rd_atomic,
            max_dest_rd_atomic: attr.max_dest_rd_atomic,
            selective: false,
        }
    }

    pub(crate) fn service(&self) -> Service {
        match self.qp_type {
            QpType::Rc => Service::Rc,
            QpType::Uc => Service::Uc,
            QpType::Ud => Service::Ud,
            QpType::XrcSend | QpType::XrcRecv => Service::Xrc,
        }
    }

    /// The segment, within what the arithmetic can bear whatever the caller wrote.
    pub(crate) fn segment(&self) -> u32 {
        self.segment.clamp(1, MAX_SEGMENT)
    }

    /// Local ACK timeout in nanoseconds; `None`: no end.
    pub(crate) fn timeout_ns(&self) -> Option<u64> {
        timeout_ns(self.timeout).map(|t| t.max(MIN_TIMEOUT_NS))
    }

    /// Packets that `len` bytes take: a message of none takes one too.
    pub(crate) fn packets(&self, len: u32) -> u32 {
        len.div_ceil(self.segment()).max(1)
    }
}

/// A sequence number of 64 bits from the first that a side uses.
pub(crate) fn first(psn: u32) -> u64 {
    FIRST_EPOCH | u64::from(Psn::new(psn).get())
}

/// On the wire.
pub(crate) fn psn(extended: u64) -> Psn {
    Psn::new(extended as u32)
}

/// The sequence number of 64 bits nearest to `reference` that has these 24.
pub(crate) fn extend(reference: u64, psn: Psn) -> u64 {
    let distance = psn.distance(Psn::new(reference as u32));
    reference.wrapping_add_signed(distance.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_numbers_extend_to_the_nearest() {
        let start = first(0xFF_FFFE);
        assert_eq!(psn(start + 3), Psn::new(1));
        assert_eq!(extend(start, Psn::new(1)), start + 3);
        assert_eq!(extend(start + 3, Psn::new(0xFF_FFFE)), start);
        assert_eq!(extend(first(0), Psn::new(0xFF_FFFF)), first(0) - 1);
    }

    #[test]
    fn short_timeouts_have_a_floor() {
        let mut c = Connection::new(QpType::Rc, &QpAttr::default());
        assert_eq!(c.timeout_ns(), None);
        c.timeout = 1;
        assert_eq!(c.timeout_ns(), Some(MIN_TIMEOUT_NS));
        c.timeout = 14;
        assert_eq!(c.timeout_ns(), Some(67_108_864));
    }
}
