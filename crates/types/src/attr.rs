//! Queue pair attributes, as `ibv_modify_qp` and `ibv_query_qp` exchange them.

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use crate::{Access, Gid, Mtu, QpState};

bitflags! {
    /// Which fields of a [`QpAttr`] are meant (`enum ibv_qp_attr_mask`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
    pub struct QpAttrMask: u32 {
        /// `qp_state`
        const STATE = 1;
        /// `cur_qp_state`
        const CUR_STATE = 1 << 1;
        /// `en_sqd_async_notify`
        const EN_SQD_ASYNC_NOTIFY = 1 << 2;
        /// `qp_access_flags`
        const ACCESS_FLAGS = 1 << 3;
        /// `pkey_index`
        const PKEY_INDEX = 1 << 4;
        /// `port_num`
        const PORT = 1 << 5;
        /// `qkey`
        const QKEY = 1 << 6;
        /// `ah_attr`
        const AV = 1 << 7;
        /// `path_mtu`
        const PATH_MTU = 1 << 8;
        /// `timeout`
        const TIMEOUT = 1 << 9;
        /// `retry_cnt`
        const RETRY_CNT = 1 << 10;
        /// `rnr_retry`
        const RNR_RETRY = 1 << 11;
        /// `rq_psn`
        const RQ_PSN = 1 << 12;
        /// `max_rd_atomic`
        const MAX_QP_RD_ATOMIC = 1 << 13;
        /// `alt_ah_attr` and its companions
        const ALT_PATH = 1 << 14;
        /// `min_rnr_timer`
        const MIN_RNR_TIMER = 1 << 15;
        /// `sq_psn`
        const SQ_PSN = 1 << 16;
        /// `max_dest_rd_atomic`
        const MAX_DEST_RD_ATOMIC = 1 << 17;
        /// `path_mig_state`
        const PATH_MIG_STATE = 1 << 18;
        /// `cap`
        const CAP = 1 << 19;
        /// `dest_qp_num`
        const DEST_QPN = 1 << 20;
        /// `rate_limit`
        const RATE_LIMIT = 1 << 25;
    }
}

/// Capacities of a queue pair (`struct ibv_qp_cap`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct QpCap {
    /// Send work requests outstanding.
    pub max_send_wr: u32,
    /// Receive work requests outstanding.
    pub max_recv_wr: u32,
    /// Elements of a send request.
    pub max_send_sge: u32,
    /// Elements of a receive request.
    pub max_recv_sge: u32,
    /// Inline bytes of a send request.
    pub max_inline: u32,
}

/// Where a connected QP's peer is, or where a datagram goes (`struct ibv_ah_attr`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct AddressVector {
    /// Destination GID; RoCE always has one.
    pub dgid: Gid,
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Index of the source GID.
    pub sgid_index: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Traffic class.
    pub traffic_class: u8,
    /// Destination LID; kept for queries, meaningless on RoCE.
    pub dlid: u16,
    /// Service level.
    pub sl: u8,
    /// Source path bits.
    pub src_path_bits: u8,
    /// Static rate.
    pub static_rate: u8,
    /// Whether the GRH fields are valid.
    pub is_global: bool,
    /// Port, from 1.
    pub port_num: u8,
}

/// Attributes of a queue pair (`struct ibv_qp_attr`), each meaningful only if its mask bit is set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct QpAttr {
    /// Next state (modify) or present state (query).
    pub state: QpState,
    /// State the caller believes the QP is in.
    pub cur_state: QpState,
    /// Path MTU.
    pub path_mtu: Mtu,
    /// Q_Key of datagrams.
    pub qkey: u32,
    /// First PSN expected.
    pub rq_psn: u32,
    /// First PSN sent.
    pub sq_psn: u32,
    /// Peer's QP number.
    pub dest_qpn: u32,
    /// What peers may do through this QP.
    pub access: Access,
    /// Capacities.
    pub cap: QpCap,
    /// Peer's address.
    pub av: AddressVector,
    /// P_Key table index.
    pub pkey_index: u16,
    /// Report when the send queue has drained.
    pub en_sqd_async_notify: bool,
    /// Send queue is draining (query only).
    pub sq_draining: bool,
    /// Reads and atomics outstanding as requester.
    pub max_rd_atomic: u8,
    /// Reads and atomics outstanding as responder.
    pub max_dest_rd_atomic: u8,
    /// RNR NAK timer code, 5 bits.
    pub min_rnr_timer: u8,
    /// Port, from 1.
    pub port_num: u8,
    /// Local ACK timeout code, 5 bits.
    pub timeout: u8,
    /// Transport retries, 3 bits.
    pub retry_cnt: u8,
    /// RNR retries, 3 bits; 7 is for ever.
    pub rnr_retry: u8,
    /// Path migration state (`enum ibv_mig_state`); only `MIGRATED` (0) is offered.
    pub path_mig_state: u8,
}

impl Default for QpAttr {
    fn default() -> Self {
        QpAttr {
            state: QpState::Reset,
            cur_state: QpState::Reset,
            path_mtu: Mtu::B1024,
            qkey: 0,
            rq_psn: 0,
            sq_psn: 0,
            dest_qpn: 0,
            access: Access::empty(),
            cap: QpCap::default(),
            av: AddressVector::default(),
            pkey_index: 0,
            en_sqd_async_notify: false,
            sq_draining: false,
            max_rd_atomic: 0,
            max_dest_rd_atomic: 0,
            min_rnr_timer: 0,
            port_num: 0,
            timeout: 0,
            retry_cnt: 0,
            rnr_retry: 0,
            path_mig_state: 0,
        }
    }
}
