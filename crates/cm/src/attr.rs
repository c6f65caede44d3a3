//! Attributes that a connection's queue pair gets (Linux: `ib_cm_init_qp_attr`,
//! `rdma_init_qp_attr`).

use freeflow_session::CmQpAttr;
use freeflow_types::{
    Access, AddressVector, Gid, Mtu, QpAttr, QpAttrMask as Mask, QpState, QpType,
};

use crate::connection::{Connection, State};
use crate::error::Refused;
use crate::handshake::HOP_LIMIT;
use crate::id::Id;

/// The devices' only port.
const PORT: u8 = 1;

/// Attributes for a queue pair of an id that is bound, with its connection if there is one.
pub(crate) fn init(
    id: &Id,
    connection: Option<&Connection>,
    state: QpState,
) -> Result<CmQpAttr, Refused> {
    if id.port.is_none() {
        return Err(Refused::State);
    }
    let attr = QpAttr {
        state,
        port_num: PORT,
        ..QpAttr::default()
    };
    let first = Mask::STATE | Mask::PKEY_INDEX | Mask::PORT;
    if id.is_datagram() {
        let attr = QpAttr {
            qkey: id.qkey(),
            ..attr
        };
        let mask = first | Mask::QKEY;
        return Ok(CmQpAttr { attr, mask });
    }
    let Some(c) = connection else {
        let mask = first | Mask::ACCESS_FLAGS;
        return Ok(CmQpAttr { attr, mask });
    };
    let (before, begun) = match c.state {
        State::ReqSent => (true, false),
        State::ReqRcvd | State::RepRcvd | State::RepSent | State::Established => (true, true),
        _ => (false, false),
    };
    match state {
        QpState::Init if before => Ok(to_init(c, attr)),
        QpState::Rtr if begun => Ok(to_rtr(c, attr)),
        QpState::Rts if begun => Ok(to_rts(c, attr)),
        _ => Err(Refused::State),
    }
}

fn to_init(c: &Connection, mut attr: QpAttr) -> CmQpAttr {
    attr.access = Access::REMOTE_WRITE;
    if c.agreed.responder_resources != 0 {
        attr.access |= Access::REMOTE_READ | Access::REMOTE_ATOMIC;
    }
    let mask = Mask::STATE | Mask::ACCESS_FLAGS | Mask::PKEY_INDEX | Mask::PORT;
    CmQpAttr { attr, mask }
}

fn to_rtr(c: &Connection, mut attr: QpAttr) -> CmQpAttr {
    let agreed = &c.agreed;
    let mut mask = Mask::STATE | Mask::AV | Mask::PATH_MTU | Mask::DEST_QPN | Mask::RQ_PSN;
    attr.av = address(c, c.peer);
    attr.path_mtu = Mtu::from_raw(agreed.path_mtu.into()).unwrap_or(c.port.mtu);
    attr.dest_qpn = agreed.remote_qpn;
    attr.rq_psn = agreed.rq_psn;
    if matches!(agreed.qp_type, QpType::Rc | QpType::XrcRecv) {
        mask |= Mask::MAX_DEST_RD_ATOMIC | Mask::MIN_RNR_TIMER;
        attr.max_dest_rd_atomic = agreed.responder_resources;
        attr.min_rnr_timer = 0;
    }
    CmQpAttr { attr, mask }
}

fn to_rts(c: &Connection, mut attr: QpAttr) -> CmQpAttr {
    let agreed = &c.agreed;
    let mut mask = Mask::STATE | Mask::SQ_PSN;
    attr.sq_psn = agreed.sq_psn;
    if matches!(agreed.qp_type, QpType::Rc | QpType::XrcSend) {
        mask |= Mask::RETRY_CNT | Mask::RNR_RETRY | Mask::MAX_QP_RD_ATOMIC;
        attr.retry_cnt = agreed.retry_count;
        attr.rnr_retry = agreed.rnr_retry_count;
        attr.max_rd_atomic = agreed.initiator_depth;
    }
    if agreed.qp_type.is_reliable() {
        mask |= Mask::TIMEOUT;
        attr.timeout = agreed.ack_timeout;
    }
    CmQpAttr { attr, mask }
}

fn address(c: &Connection, dgid: Gid) -> AddressVector {
    AddressVector {
        dgid,
        flow_label: c.agreed.flow_label,
        sgid_index: c.port.index,
        hop_limit: HOP_LIMIT,
        traffic_class: c.agreed.traffic_class,
        is_global: true,
        port_num: PORT,
        ..AddressVector::default()
    }
}
