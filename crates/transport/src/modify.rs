//! Which modifications of a queue pair are legal (`ibv_modify_qp(3)`; IBTA volume 1, 11.2.5.2).

use freeflow_types::{Access, Mtu, QpAttr, QpAttrMask as Mask, QpState, QpType};

/// What the device can do.
#[derive(Clone, Copy, Debug)]
pub struct ModifyLimits {
    /// Outstanding reads and atomics of a queue pair, each way.
    pub max_rd_atomic: u8,
    /// The port's MTU.
    pub active_mtu: Mtu,
    /// Entries of the GID table.
    pub gids: u8,
}

/// Why a modification is refused; the errno is EINVAL in each case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModifyError {
    /// No such transition.
    #[error("no transition from {from:?} to {to:?}")]
    Transition {
        /// State before.
        from: QpState,
        /// State asked for.
        to: QpState,
    },
    /// The caller believes the queue pair to be in another state.
    #[error("current state is {is:?}, not {believed:?}")]
    CurrentState {
        /// True state.
        is: QpState,
        /// State in the attributes.
        believed: QpState,
    },
    /// Attributes that the transition needs.
    #[error("attributes {0:?} are missing")]
    Missing(Mask),
    /// Attributes that the transition does not take.
    #[error("attributes {0:?} do not belong here")]
    Unexpected(Mask),
    /// A value out of range.
    #[error("attribute {0:?} is out of range")]
    Value(Mask),
}

const ACCESS_AND_PORT: Mask = Mask::PKEY_INDEX.union(Mask::PORT).union(Mask::ACCESS_FLAGS);
const UD_INIT: Mask = Mask::PKEY_INDEX.union(Mask::PORT).union(Mask::QKEY);
const CONNECT: Mask = Mask::AV
    .union(Mask::PATH_MTU)
    .union(Mask::DEST_QPN)
    .union(Mask::RQ_PSN);
const RESPOND: Mask = Mask::MAX_DEST_RD_ATOMIC.union(Mask::MIN_RNR_TIMER);
const REQUEST: Mask = Mask::TIMEOUT
    .union(Mask::RETRY_CNT)
    .union(Mask::RNR_RETRY)
    .union(Mask::SQ_PSN)
    .union(Mask::MAX_QP_RD_ATOMIC);
const PATH: Mask = Mask::ALT_PATH
    .union(Mask::ACCESS_FLAGS)
    .union(Mask::PATH_MIG_STATE);
const NONE: Mask = Mask::empty();

/// Attributes that a transition must and may have; `None` if there is no such transition.
fn masks(qp: QpType, from: QpState, to: QpState) -> Option<(Mask, Mask)> {
    use QpState::{Err, Init, Reset, Rtr, Rts, Sqd, Sqe};
    let ud = qp == QpType::Ud;
    let uc = qp == QpType::Uc;
    // Reliable queue pairs that respond, and those that request.
    let responds = matches!(qp, QpType::Rc | QpType::XrcRecv);
    let requests = matches!(qp, QpType::Rc | QpType::XrcSend);
    let rnr_timer = if responds { Mask::MIN_RNR_TIMER } else { NONE };
    let running = if ud {
        Mask::CUR_STATE | Mask::QKEY
    } else {
        Mask::CUR_STATE | PATH | rnr_timer
    };
    Some(match (from, to) {
        (_, Reset) | (_, Err) if from != Reset || to == Reset => (NONE, NONE),
        (Reset, Init) => (if ud { UD_INIT } else { ACCESS_AND_PORT }, NONE),
        (Init, Init) => (NONE, if ud { UD_INIT } else { ACCESS_AND_PORT }),
        (Init, Rtr) if ud => (NONE, Mask::PKEY_INDEX | Mask::QKEY),
        (Init, Rtr) => {
            let optional = Mask::ALT_PATH | Mask::ACCESS_FLAGS | Mask::PKEY_INDEX;
            (if responds { CONNECT | RESPOND } else { CONNECT }, optional)
        }
        (Rtr, Rts) => {
            let required = match qp {
                _ if requests => REQUEST,
                QpType::XrcRecv => Mask::TIMEOUT | Mask::SQ_PSN,
                _ => Mask::SQ_PSN,
            };
            (required, running)
        }
        (Rts, Rts) | (Sqd, Rts) => (NONE, running),
        (Rts, Sqd) => (NONE, Mask::EN_SQD_ASYNC_NOTIFY),
        (Sqd, Sqd) if ud => (NONE, Mask::PKEY_INDEX | Mask::QKEY),
        (Sqd, Sqd) => {
            let requester = Mask::RETRY_CNT | Mask::RNR_RETRY | Mask::MAX_QP_RD_ATOMIC;
            let both = Mask::TIMEOUT | Mask::PORT;
            let mut optional = Mask::AV | Mask::PKEY_INDEX | PATH;
            if requests {
                optional |= both | requester;
            }
            if responds {
                optional |= both | RESPOND;
            }
            (NONE, optional)
        }
        (Sqe, Rts) if ud => (NONE, Mask::CUR_STATE | Mask::QKEY),
        (Sqe, Rts) if uc => (NONE, Mask::CUR_STATE | Mask::ACCESS_FLAGS),
        _ => return None,
    })
}

/// Checks a modification of a queue pair in state `from`; returns the state it leads to.
pub fn check_modify(
    qp: QpType,
    from: QpState,
    attr: &QpAttr,
    mask: Mask,
    limits: &ModifyLimits,
) -> Result<QpState, ModifyError> {
    // A send queue may have entered its error state behind the caller's back.
    let believable =
        attr.cur_state == from || (attr.cur_state == QpState::Rts && from == QpState::Sqe);
    if mask.contains(Mask::CUR_STATE) && !believable {
        return Err(ModifyError::CurrentState {
            is: from,
            believed: attr.cur_state,
        });
    }
    let to = if mask.contains(Mask::STATE) {
        attr.state
    } else {
        from
    };
    let (required, optional) = masks(qp, from, to).ok_or(ModifyError::Transition { from, to })?;
    let missing = required - mask;
    if !missing.is_empty() {
        return Err(ModifyError::Missing(missing));
    }
    let unexpected = mask - required - optional - Mask::STATE - Mask::CUR_STATE;
    if !unexpected.is_empty() {
        return Err(ModifyError::Unexpected(unexpected));
    }
    check_values(attr, mask, limits)?;
    Ok(to)
}

fn check_values(attr: &QpAttr, mask: Mask, limits: &ModifyLimits) -> Result<(), ModifyError> {
    let known = Access::all().bits();
    let av = &attr.av;
    let checks = [
        (Mask::PORT, attr.port_num == 1),
        (Mask::PKEY_INDEX, attr.pkey_index == 0),
        (Mask::ACCESS_FLAGS, attr.access.bits() & !known == 0),
        (
            Mask::PATH_MTU,
            attr.path_mtu.raw() <= limits.active_mtu.raw(),
        ),
        (
            Mask::AV,
            av.is_global && av.port_num == 1 && av.sgid_index < limits.gids,
        ),
        (Mask::TIMEOUT, attr.timeout <= 31),
        (Mask::RETRY_CNT, attr.retry_cnt <= 7),
        (Mask::RNR_RETRY, attr.rnr_retry <= 7),
        (Mask::MIN_RNR_TIMER, attr.min_rnr_timer <= 31),
        (
            Mask::MAX_QP_RD_ATOMIC,
            attr.max_rd_atomic <= limits.max_rd_atomic,
        ),
        (
            Mask::MAX_DEST_RD_ATOMIC,
            attr.max_dest_rd_atomic <= limits.max_rd_atomic,
        ),
        // No alternate path is offered, so that the only migration state is "migrated".
        (Mask::ALT_PATH, false),
        (Mask::PATH_MIG_STATE, attr.path_mig_state == 0),
    ];
    match checks
        .into_iter()
        .find(|&(bit, good)| mask.contains(bit) && !good)
    {
        Some((bit, _)) => Err(ModifyError::Value(bit)),
        None => Ok(()),
    }
}

/// The mask without the attributes that are the other side's of an XRC connection: programs set
/// up both sides as they do a reliable connection, and the kernel's uverbs ignores the half that
/// does not apply.
pub(crate) fn meant(qp: QpType, mask: Mask) -> Mask {
    match qp {
        QpType::XrcSend => mask - RESPOND,
        QpType::XrcRecv => mask - Mask::MAX_QP_RD_ATOMIC - Mask::RETRY_CNT - Mask::RNR_RETRY,
        _ => mask,
    }
}

/// Copies the attributes that are meant.
pub(crate) fn apply(to: &mut QpAttr, from: &QpAttr, mask: Mask) {
    macro_rules! copy {
        ($($bit:ident => $($field:ident),+;)+) => {
            $(if mask.contains(Mask::$bit) { $(to.$field = from.$field;)+ })+
        };
    }
    copy! {
        EN_SQD_ASYNC_NOTIFY => en_sqd_async_notify;
        ACCESS_FLAGS => access;
        PKEY_INDEX => pkey_index;
        PORT => port_num;
        QKEY => qkey;
        AV => av;
        PATH_MTU => path_mtu;
        TIMEOUT => timeout;
        RETRY_CNT => retry_cnt;
        RNR_RETRY => rnr_retry;
        RQ_PSN => rq_psn;
        MAX_QP_RD_ATOMIC => max_rd_atomic;
        MIN_RNR_TIMER => min_rnr_timer;
        SQ_PSN => sq_psn;
        MAX_DEST_RD_ATOMIC => max_dest_rd_atomic;
        DEST_QPN => dest_qpn;
        PATH_MIG_STATE => path_mig_state;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freeflow_types::AddressVector;

    const STATES: [QpState; 7] = [
        QpState::Reset,
        QpState::Init,
        QpState::Rtr,
        QpState::Rts,
        QpState::Sqd,
        QpState::Sqe,
        QpState::Err,
    ];
    const TYPES: [QpType; 5] = [
        QpType::Rc,
        QpType::Uc,
        QpType::Ud,
        QpType::XrcSend,
        QpType::XrcRecv,
    ];
    const LIMITS: ModifyLimits = ModifyLimits {
        max_rd_atomic: 16,
        active_mtu: Mtu::B4096,
        gids: 1,
    };

    fn good(to: QpState, from: QpState) -> QpAttr {
        QpAttr {
            state: to,
            cur_state: from,
            port_num: 1,
            av: AddressVector {
                is_global: true,
                port_num: 1,
                ..Default::default()
            },
            ..Default::default()
        }
    }

    #[test]
    fn each_transition_takes_its_attributes_and_no_others() {
        let mut legal = 0;
        for qp in TYPES {
            for from in STATES {
                for to in STATES {
                    let attr = good(to, from);
                    let check = |mask| check_modify(qp, from, &attr, mask, &LIMITS);
                    let Some((required, optional)) = masks(qp, from, to) else {
                        assert_eq!(
                            check(Mask::STATE),
                            Err(ModifyError::Transition { from, to }),
                            "{qp:?}"
                        );
                        continue;
                    };
                    legal += 1;
                    let base = required | Mask::STATE;
                    assert_eq!(check(base), Ok(to), "{qp:?} {from:?} {to:?}");
                    for bit in required.iter() {
                        assert_eq!(check(base - bit), Err(ModifyError::Missing(bit)));
                    }
                    for bit in (Mask::all() - base - Mask::CUR_STATE).iter() {
                        let expected = match bit {
                            _ if !optional.contains(bit) => Err(ModifyError::Unexpected(bit)),
                            Mask::ALT_PATH => Err(ModifyError::Value(bit)),
                            _ => Ok(to),
                        };
                        assert_eq!(check(base | bit), expected, "{qp:?} {from:?} {to:?}");
                    }
                }
            }
        }
        // 21 for each type, and SQE to RTS for the unreliable two.
        assert_eq!(legal, 5 * 21 + 2);
    }

    #[test]
    fn the_usual_path_of_a_connection() {
        let rc = |from, to, mask| check_modify(QpType::Rc, from, &good(to, from), mask, &LIMITS);
        use QpState::{Init, Reset, Rtr, Rts};
        let init = Mask::STATE | Mask::PKEY_INDEX | Mask::PORT | Mask::ACCESS_FLAGS;
        assert_eq!(rc(Reset, Init, init), Ok(Init));
        let rtr = Mask::STATE
            | Mask::AV
            | Mask::PATH_MTU
            | Mask::DEST_QPN
            | Mask::RQ_PSN
            | Mask::MAX_DEST_RD_ATOMIC
            | Mask::MIN_RNR_TIMER;
        assert_eq!(rc(Init, Rtr, rtr), Ok(Rtr));
        let rts = Mask::STATE
            | Mask::TIMEOUT
            | Mask::RETRY_CNT
            | Mask::RNR_RETRY
            | Mask::SQ_PSN
            | Mask::MAX_QP_RD_ATOMIC;
        assert_eq!(rc(Rtr, Rts, rts), Ok(Rts));
        assert!(rc(Reset, Rtr, rtr).is_err());
        assert!(rc(Init, Rts, rts).is_err());
    }

    #[test]
    fn each_side_of_xrc_has_its_half_of_a_reliable_connections_attributes() {
        let responder = RESPOND | Mask::TIMEOUT | Mask::PORT;
        let requester =
            Mask::TIMEOUT | Mask::PORT | Mask::RETRY_CNT | Mask::RNR_RETRY | Mask::MAX_QP_RD_ATOMIC;
        let common = Mask::AV | Mask::PKEY_INDEX | PATH;
        let drained = |qp| masks(qp, QpState::Sqd, QpState::Sqd);
        assert_eq!(drained(QpType::XrcRecv), Some((NONE, common | responder)));
        assert_eq!(drained(QpType::XrcSend), Some((NONE, common | requester)));
        let both = common | responder | requester;
        assert_eq!(drained(QpType::Rc), Some((NONE, both)));
        assert_eq!(drained(QpType::Uc), Some((NONE, common)));
        let running = |qp| masks(qp, QpState::Rtr, QpState::Rts).unwrap();
        assert_eq!(running(QpType::XrcRecv).0, Mask::TIMEOUT | Mask::SQ_PSN);
        assert!(running(QpType::XrcRecv).1.contains(Mask::MIN_RNR_TIMER));
        assert!(!running(QpType::XrcSend).1.contains(Mask::MIN_RNR_TIMER));
    }

    #[test]
    fn values_are_checked_only_if_they_are_meant() {
        let mut attr = good(QpState::Init, QpState::Reset);
        attr.retry_cnt = 8;
        let mask = Mask::STATE | ACCESS_AND_PORT;
        let check = |attr: &QpAttr| check_modify(QpType::Rc, QpState::Reset, attr, mask, &LIMITS);
        assert_eq!(check(&attr), Ok(QpState::Init));
        attr.port_num = 2;
        assert_eq!(check(&attr), Err(ModifyError::Value(Mask::PORT)));
        let mut rts = good(QpState::Rts, QpState::Rtr);
        rts.retry_cnt = 8;
        let got = check_modify(
            QpType::Rc,
            QpState::Rtr,
            &rts,
            REQUEST | Mask::STATE,
            &LIMITS,
        );
        assert_eq!(got, Err(ModifyError::Value(Mask::RETRY_CNT)));
    }

    #[test]
    fn only_masked_attributes_are_copied() {
        let mut to = QpAttr::default();
        let from = QpAttr {
            qkey: 7,
            timeout: 9,
            dest_qpn: 3,
            ..QpAttr::default()
        };
        apply(&mut to, &from, Mask::QKEY | Mask::DEST_QPN);
        assert_eq!((to.qkey, to.timeout, to.dest_qpn), (7, 0, 3));
    }
}
