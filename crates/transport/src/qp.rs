//! A queue pair's state, its retries and its sequence numbers.

use freeflow_types::{
    Access, AsyncEventType, Mtu, Opcode, Psn, QpAttr, QpAttrMask, QpCap, QpState, QpType, WcStatus,
    rnr_timer_ns, timeout_ns,
};
use serde::{Deserialize, Serialize};

use crate::modify::{ModifyError, ModifyLimits, apply, check_modify, meant};

/// RNR retry count that means "for ever" (`ibv_modify_qp(3)`).
const RNR_FOR_EVER: u8 = 7;

/// What came of a send request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was executed, and the peer has acknowledged it if the service is reliable.
    Delivered,
    /// The peer had no receive request; its RNR timer code.
    ReceiverNotReady {
        /// Code of 5 bits.
        timer_code: u8,
    },
    /// Nobody answered: no such peer, or one that does not listen to us.
    NoResponse,
    /// The peer refused the access.
    RemoteAccess,
    /// The peer found the request invalid.
    RemoteInvalidRequest,
    /// The peer could not execute it.
    RemoteOperation,
    /// A local key does not allow it.
    LocalProtection,
    /// The message is longer than the service carries.
    LocalLength,
    /// The request is not legal on this queue pair.
    LocalQpOperation,
    /// A memory window cannot be bound so.
    BindRefused,
}

/// What a requester does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Complete the request; go on with the next.
    Complete,
    /// Try it again at this time, in nanoseconds.
    RetryAt(u64),
    /// Try it again when the peer is ready; no time ends the wait.
    Never,
    /// Complete it with this error; what follows is flushed.
    Fail(WcStatus),
}

/// Why a responder refuses a request (IBTA volume 1, 9.7.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nak {
    /// The queue pair does not take such requests, or this one is malformed.
    InvalidRequest,
    /// The key does not open that memory for it.
    RemoteAccess,
}

impl Nak {
    /// What the requester learns.
    pub fn outcome(self) -> Outcome {
        match self {
            Nak::InvalidRequest => Outcome::RemoteInvalidRequest,
            Nak::RemoteAccess => Outcome::RemoteAccess,
        }
    }

    /// What the responder's program learns.
    pub fn event(self) -> Option<AsyncEventType> {
        Some(match self {
            Nak::InvalidRequest => AsyncEventType::QpReqErr,
            Nak::RemoteAccess => AsyncEventType::QpAccessErr,
        })
    }
}

/// A change of state that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// State before.
    pub from: QpState,
    /// State now.
    pub to: QpState,
}

/// A queue pair.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Qp {
    qp_type: QpType,
    attr: QpAttr,
    /// Attempts without an answer, and answers "not ready", for the request at the head.
    timeouts: u8,
    rnr_naks: u8,
}

impl Qp {
    /// A queue pair in RESET.
    pub fn new(qp_type: QpType, cap: QpCap) -> Self {
        // A datagram queue pair has no path of its own: its packets are as long as the port's.
        let path_mtu = if qp_type == QpType::Ud {
            Mtu::B4096
        } else {
            Mtu::B1024
        };
        let attr = QpAttr {
            cap,
            path_mtu,
            ..QpAttr::default()
        };
        Qp {
            qp_type,
            attr,
            timeouts: 0,
            rnr_naks: 0,
        }
    }

    /// Its state.
    pub fn state(&self) -> QpState {
        self.attr.state
    }

    /// Its attributes, as the state machine uses them.
    pub fn attr(&self) -> &QpAttr {
        &self.attr
    }

    /// Its attributes, as `ibv_query_qp(3)` shows them.
    pub fn query(&self) -> QpAttr {
        QpAttr {
            cur_state: self.attr.state,
            ..self.attr
        }
    }

    /// Modifies it as the program asks.
    pub fn modify(
        &mut self,
        attr: &QpAttr,
        mask: QpAttrMask,
        limits: &ModifyLimits,
    ) -> Result<Transition, ModifyError> {
        let mask = meant(self.qp_type, mask);
        let from = self.attr.state;
        let to = check_modify(self.qp_type, from, attr, mask, limits)?;
        if to == QpState::Reset {
            *self = Qp::new(self.qp_type, self.attr.cap);
        } else {
            apply(&mut self.attr, attr, mask);
            self.attr.state = to;
            self.forget_attempts();
        }
        Ok(Transition { from, to })
    }

    fn forget_attempts(&mut self) {
        self.timeouts = 0;
        self.rnr_naks = 0;
    }

    /// Moves it to the error state.
    pub fn fail(&mut self) {
        self.attr.state = QpState::Err;
    }

    /// A send request failed: a reliable queue pair is in error, of an unreliable one the send
    /// queue alone (IBTA volume 1, 10.3.1.6).
    pub fn fail_send(&mut self) {
        let reliable = self.qp_type.is_reliable() || self.attr.state == QpState::Err;
        self.attr.state = if reliable { QpState::Err } else { QpState::Sqe };
    }

    /// Whether messages that arrive are looked at.
    pub fn may_receive(&self) -> bool {
        matches!(
            self.attr.state,
            QpState::Rtr | QpState::Rts | QpState::Sqd | QpState::Sqe
        )
    }

    /// Responder: whether the queue pair takes such a request, which asks for `rights`. An
    /// operation that its access flags do not enable is invalid, as is a read or atomic beyond the
    /// resources granted: only a key can be an access error (IBTA volume 1, table 57, "unsupported
    /// or reserved opcode"; 11.6.2).
    pub fn check_request(&self, opcode: Opcode, rights: Access) -> Result<(), Nak> {
        let granted = !opcode.takes_responder_resources() || self.attr.max_dest_rd_atomic != 0;
        if self.attr.access.contains(rights) && granted {
            Ok(())
        } else {
            Err(Nak::InvalidRequest)
        }
    }

    /// Requester: what to do after an attempt at the request at the head.
    pub fn conclude(&mut self, outcome: Outcome, now: u64) -> Next {
        let reliable = self.qp_type.is_reliable();
        let status = match outcome {
            Outcome::Delivered => {
                self.forget_attempts();
                return Next::Complete;
            }
            // An unreliable message is sent, whatever becomes of it.
            Outcome::ReceiverNotReady { .. } | Outcome::NoResponse if !reliable => {
                return Next::Complete;
            }
            Outcome::ReceiverNotReady { timer_code } => {
                // The peer answers: it is not lost (IBTA volume 1, 9.7.5.2.8).
                self.timeouts = 0;
                if self.attr.rnr_retry == RNR_FOR_EVER || self.rnr_naks < self.attr.rnr_retry {
                    self.rnr_naks = self.rnr_naks.saturating_add(1);
                    return Next::RetryAt(now.saturating_add(rnr_timer_ns(timer_code)));
                }
                WcStatus::RnrRetryExcErr
            }
            Outcome::NoResponse => {
                // Each attempt has its time, the last one too (IBTA volume 1, 9.9.2.1.2).
                let Some(timeout) = timeout_ns(self.attr.timeout) else {
                    return Next::Never;
                };
                if self.timeouts <= self.attr.retry_cnt {
                    self.timeouts += 1;
                    return Next::RetryAt(now.saturating_add(timeout));
                }
                WcStatus::RetryExcErr
            }
            Outcome::RemoteAccess => WcStatus::RemAccessErr,
            Outcome::RemoteInvalidRequest => WcStatus::RemInvReqErr,
            Outcome::RemoteOperation => WcStatus::RemOpErr,
            Outcome::LocalProtection => WcStatus::LocProtErr,
            Outcome::LocalLength => WcStatus::LocLenErr,
            Outcome::LocalQpOperation => WcStatus::LocQpOpErr,
            Outcome::BindRefused => WcStatus::MwBindErr,
        };
        self.forget_attempts();
        Next::Fail(status)
    }

    /// Packets of a message: a message of no bytes takes one too, what is not sent none.
    fn packets(&self, opcode: Opcode, len: u64) -> u32 {
        if opcode.is_local() {
            return 0;
        }
        if opcode.is_word() {
            return 1;
        }
        len.div_ceil(self.attr.path_mtu.bytes().into()).max(1) as u32
    }

    /// Requester: a message was sent. Sequence numbers go on.
    pub fn sent(&mut self, opcode: Opcode, len: u64) {
        let n = if self.qp_type == QpType::Ud {
            1
        } else {
            self.packets(opcode, len)
        };
        self.attr.sq_psn = Psn::new(self.attr.sq_psn).add(n).get();
    }

    /// Responder: a message was executed. Sequence numbers go on.
    pub fn received(&mut self, opcode: Opcode, len: u64) {
        let n = self.packets(opcode, len);
        self.attr.rq_psn = Psn::new(self.attr.rq_psn).add(n).get();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn qp(qp_type: QpType, timeout: u8, retry_cnt: u8, rnr_retry: u8) -> Qp {
        let mut qp = Qp::new(qp_type, QpCap::default());
        qp.attr = QpAttr {
            state: QpState::Rts,
            timeout,
            retry_cnt,
            rnr_retry,
            ..qp.attr
        };
        qp
    }

    /// Runs retries in virtual time until the request is over.
    fn exhaust(qp: &mut Qp, outcome: Outcome) -> (u64, u32, WcStatus) {
        let (mut now, mut attempts) = (0, 0);
        loop {
            attempts += 1;
            match qp.conclude(outcome, now) {
                Next::RetryAt(at) => now = at,
                Next::Fail(status) => return (now, attempts, status),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn silence_ends_after_all_retries_had_their_time() {
        for retries in 0..=7 {
            let mut qp = qp(QpType::Rc, 10, retries, 0);
            let (now, _, status) = exhaust(&mut qp, Outcome::NoResponse);
            assert_eq!(now, (u64::from(retries) + 1) * timeout_ns(10).unwrap());
            assert_eq!(status, WcStatus::RetryExcErr);
        }
        assert_eq!(
            qp(QpType::Rc, 0, 7, 7).conclude(Outcome::NoResponse, 5),
            Next::Never
        );
    }

    #[test]
    fn receiver_not_ready_has_its_own_count() {
        let rnr = Outcome::ReceiverNotReady { timer_code: 1 };
        for retries in 0..7 {
            let mut qp = qp(QpType::Rc, 10, 7, retries);
            let (now, attempts, status) = exhaust(&mut qp, rnr);
            assert_eq!(now, u64::from(retries) * 10_000);
            assert_eq!(attempts, u32::from(retries) + 1);
            assert_eq!(status, WcStatus::RnrRetryExcErr);
        }
        let mut patient = qp(QpType::Rc, 10, 7, 7);
        for _ in 0..1000 {
            assert!(matches!(patient.conclude(rnr, 0), Next::RetryAt(_)));
        }
        // Progress gives all retries back.
        let mut qp = qp(QpType::Rc, 10, 0, 1);
        assert!(matches!(qp.conclude(rnr, 0), Next::RetryAt(_)));
        assert_eq!(qp.conclude(Outcome::Delivered, 0), Next::Complete);
        assert!(matches!(qp.conclude(rnr, 0), Next::RetryAt(_)));
        assert_eq!(qp.conclude(rnr, 0), Next::Fail(WcStatus::RnrRetryExcErr));
    }

    #[test]
    fn unreliable_services_lose_in_silence_but_not_locally() {
        for qp_type in [QpType::Uc, QpType::Ud] {
            let mut qp = qp(qp_type, 10, 0, 0);
            assert_eq!(qp.conclude(Outcome::NoResponse, 0), Next::Complete);
            assert_eq!(
                qp.conclude(Outcome::ReceiverNotReady { timer_code: 0 }, 0),
                Next::Complete
            );
            let next = qp.conclude(Outcome::LocalProtection, 0);
            assert_eq!(next, Next::Fail(WcStatus::LocProtErr));
            qp.fail_send();
            assert_eq!(qp.state(), QpState::Sqe);
        }
        let mut rc = qp(QpType::Rc, 10, 0, 0);
        rc.fail_send();
        assert_eq!(rc.state(), QpState::Err);
    }

    #[test]
    fn access_flags_and_resources_are_checked() {
        let mut qp = qp(QpType::Rc, 10, 0, 0);
        let check = |qp: &Qp, opcode: Opcode| qp.check_request(opcode, opcode.remote_rights());
        assert_eq!(check(&qp, Opcode::Send), Ok(()));
        assert_eq!(check(&qp, Opcode::RdmaWrite), Err(Nak::InvalidRequest));
        qp.attr.access = Access::all() - Access::FLUSH_PERSISTENT;
        assert_eq!(check(&qp, Opcode::RdmaWrite), Ok(()));
        assert_eq!(check(&qp, Opcode::RdmaRead), Err(Nak::InvalidRequest));
        assert_eq!(check(&qp, Opcode::AtomicWrite), Err(Nak::InvalidRequest));
        qp.attr.max_dest_rd_atomic = 1;
        assert_eq!(check(&qp, Opcode::RdmaRead), Ok(()));
        assert_eq!(check(&qp, Opcode::AtomicWrite), Ok(()));
        let flush = |types| qp.check_request(Opcode::Flush, types);
        assert_eq!(flush(Access::FLUSH_GLOBAL), Ok(()));
        assert_eq!(flush(Access::FLUSH_PERSISTENT), Err(Nak::InvalidRequest));
    }

    #[test]
    fn sequence_numbers_count_packets() {
        let mut qp = qp(QpType::Rc, 0, 0, 0);
        qp.attr.sq_psn = 0xFF_FFFF;
        qp.sent(Opcode::Send, 0);
        assert_eq!(qp.query().sq_psn, 0);
        qp.sent(Opcode::RdmaWrite, 1025);
        assert_eq!(qp.query().sq_psn, 2);
        qp.sent(Opcode::FetchAdd, 8);
        qp.received(Opcode::RdmaRead, 4096);
        assert_eq!((qp.query().sq_psn, qp.query().rq_psn), (3, 4));
        // What is not sent has no number.
        qp.sent(Opcode::BindMw, 0);
        qp.sent(Opcode::LocalInv, 0);
        assert_eq!(qp.query().sq_psn, 3);
        qp.sent(Opcode::Flush, 0);
        assert_eq!(qp.query().sq_psn, 4);
    }

    #[test]
    fn reset_forgets_all_but_capacities() {
        let cap = QpCap {
            max_send_wr: 9,
            ..QpCap::default()
        };
        let mut qp = Qp::new(QpType::Rc, cap);
        qp.attr.state = QpState::Err;
        qp.attr.qkey = 5;
        let limits = ModifyLimits {
            max_rd_atomic: 1,
            active_mtu: freeflow_types::Mtu::B4096,
            gids: 1,
        };
        let attr = QpAttr::default();
        let change = qp.modify(&attr, QpAttrMask::STATE, &limits).unwrap();
        assert_eq!(
            change,
            Transition {
                from: QpState::Err,
                to: QpState::Reset
            }
        );
        assert_eq!(qp, Qp::new(QpType::Rc, cap));
    }

    #[test]
    fn the_other_sides_attributes_of_xrc_are_ignored() {
        let limits = ModifyLimits {
            max_rd_atomic: 16,
            active_mtu: freeflow_types::Mtu::B4096,
            gids: 1,
        };
        use QpAttrMask as Mask;
        let rtr = Mask::STATE
            | Mask::AV
            | Mask::PATH_MTU
            | Mask::DEST_QPN
            | Mask::RQ_PSN
            | Mask::MAX_DEST_RD_ATOMIC
            | Mask::MIN_RNR_TIMER;
        let rts = Mask::STATE
            | Mask::TIMEOUT
            | Mask::SQ_PSN
            | Mask::RETRY_CNT
            | Mask::RNR_RETRY
            | Mask::MAX_QP_RD_ATOMIC;
        let mut attr = QpAttr {
            state: QpState::Rtr,
            max_rd_atomic: 3,
            max_dest_rd_atomic: 5,
            retry_cnt: 2,
            min_rnr_timer: 9,
            ..QpAttr::default()
        };
        (attr.av.is_global, attr.av.port_num) = (true, 1);
        let run = |qp_type| {
            let mut qp = Qp::new(qp_type, QpCap::default());
            qp.attr.state = QpState::Init;
            qp.modify(&attr, rtr, &limits).unwrap();
            let attr = QpAttr {
                state: QpState::Rts,
                ..attr
            };
            qp.modify(&attr, rts, &limits).unwrap();
            let now = qp.query();
            let requester = (now.max_rd_atomic, now.retry_cnt);
            (requester, (now.max_dest_rd_atomic, now.min_rnr_timer))
        };
        assert_eq!(run(QpType::Rc), ((3, 2), (5, 9)));
        assert_eq!(run(QpType::XrcSend), ((3, 2), (0, 0)));
        assert_eq!(run(QpType::XrcRecv), ((0, 0), (5, 9)));
    }

    proptest! {
        #[test]
        fn any_modification_leaves_a_legal_state(
            steps in proptest::collection::vec((0u32..7, any::<u32>(), any::<u8>()), 1..50)
        ) {
            let limits = ModifyLimits {
                max_rd_atomic: 16, active_mtu: freeflow_types::Mtu::B4096, gids: 1 };
            let mut qp = Qp::new(QpType::Rc, QpCap::default());
            for (state, mask, value) in steps {
                let attr = QpAttr {
                    state: QpState::from_raw(state).unwrap(),
                    timeout: value, retry_cnt: value, rnr_retry: value, port_num: value & 1,
                    ..QpAttr::default()
                };
                let before = qp.clone();
                let mask = QpAttrMask::from_bits_truncate(mask) | QpAttrMask::STATE;
                match qp.modify(&attr, mask, &limits) {
                    Ok(change) => prop_assert_eq!(change.to, qp.state()),
                    Err(_) => prop_assert_eq!(&before, &qp),
                }
                prop_assert!(qp.attr.timeout <= 31 && qp.attr.retry_cnt <= 7);
            }
        }
    }
}
