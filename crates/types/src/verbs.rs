//! Enumerations and flags of the verbs, with the numeric values of `<infiniband/verbs.h>`.

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

macro_rules! c_enum {
    ($(#[$m:meta])* $name:ident { $($(#[$vm:meta])* $variant:ident = $value:literal,)+ }) => {
        $(#[$m])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
        #[repr(u8)]
        pub enum $name { $($(#[$vm])* $variant = $value,)+ }

        impl $name {
            /// The variant with this C value, if there is one.
            pub const fn from_raw(v: u32) -> Option<Self> {
                match v { $($value => Some(Self::$variant),)+ _ => None }
            }

            /// The C value.
            pub const fn raw(self) -> u32 {
                self as u32
            }
        }
    };
}

c_enum! {
    /// Transport service of a queue pair (`enum ibv_qp_type`).
    QpType {
        /// Reliable connection.
        Rc = 2,
        /// Unreliable connection.
        Uc = 3,
        /// Unreliable datagram.
        Ud = 4,
        /// Extended reliable connection, sending side.
        XrcSend = 9,
        /// Extended reliable connection, receiving side.
        XrcRecv = 10,
    }
}

impl QpType {
    /// Whether a QP of this type has one fixed peer.
    pub const fn is_connected(self) -> bool {
        !matches!(self, QpType::Ud)
    }

    /// Whether the transport acknowledges (and so retries and reports remote errors).
    pub const fn is_reliable(self) -> bool {
        matches!(self, QpType::Rc | QpType::XrcSend | QpType::XrcRecv)
    }
}

c_enum! {
    /// State of a queue pair (`enum ibv_qp_state`, IBTA volume 1, 10.3.1).
    QpState {
        /// Just created; nothing may be posted.
        Reset = 0,
        /// Receives may be posted.
        Init = 1,
        /// Ready to receive.
        Rtr = 2,
        /// Ready to send.
        Rts = 3,
        /// Send queue drained.
        Sqd = 4,
        /// Send queue in error (UC and UD).
        Sqe = 5,
        /// Error: everything is flushed.
        Err = 6,
    }
}

c_enum! {
    /// Operation of a send work request (`enum ibv_wr_opcode`).
    Opcode {
        /// RDMA WRITE.
        RdmaWrite = 0,
        /// RDMA WRITE with immediate data.
        RdmaWriteImm = 1,
        /// SEND.
        Send = 2,
        /// SEND with immediate data.
        SendImm = 3,
        /// RDMA READ.
        RdmaRead = 4,
        /// Compare and swap of 8 bytes.
        CompareSwap = 5,
        /// Fetch and add of 8 bytes.
        FetchAdd = 6,
        /// Invalidates a memory window of type 2 of the poster's own.
        LocalInv = 7,
        /// Binds a memory window.
        BindMw = 8,
        /// SEND that invalidates a memory window of the receiver.
        SendInv = 9,
        /// RDMA FLUSH (IBTA annex A19).
        Flush = 14,
        /// ATOMIC WRITE of 8 bytes (IBTA annex A19).
        AtomicWrite = 15,
    }
}

impl Opcode {
    /// Whether the request is between the poster and its own device: nothing is sent.
    pub const fn is_local(self) -> bool {
        matches!(self, Opcode::LocalInv | Opcode::BindMw)
    }

    /// Whether the request carries immediate data.
    pub const fn has_imm(self) -> bool {
        matches!(self, Opcode::RdmaWriteImm | Opcode::SendImm)
    }

    /// Whether the request consumes a receive work request of the peer.
    pub const fn consumes_recv(self) -> bool {
        matches!(
            self,
            Opcode::Send | Opcode::SendImm | Opcode::SendInv | Opcode::RdmaWriteImm
        )
    }

    /// Whether the request names remote memory.
    pub const fn has_remote(self) -> bool {
        !self.is_local() && !matches!(self, Opcode::Send | Opcode::SendImm | Opcode::SendInv)
    }

    /// Whether data flows from the peer into local memory.
    pub const fn is_read_like(self) -> bool {
        matches!(
            self,
            Opcode::RdmaRead | Opcode::CompareSwap | Opcode::FetchAdd
        )
    }

    /// Whether the request is an 8-byte atomic that returns the old value.
    pub const fn is_atomic(self) -> bool {
        matches!(self, Opcode::CompareSwap | Opcode::FetchAdd)
    }

    /// Whether the request names one aligned word of 8 bytes in the peer's memory.
    pub const fn is_word(self) -> bool {
        self.is_atomic() || matches!(self, Opcode::AtomicWrite)
    }

    /// Whether the responder answers the request with more than an acknowledgement, out of the
    /// resources that `max_dest_rd_atomic` grants.
    pub const fn takes_responder_resources(self) -> bool {
        self.is_read_like() || matches!(self, Opcode::AtomicWrite)
    }

    /// Whether a QP of this type may post the request (IBTA volume 1, table 61; annex A19;
    /// `ibv_post_send(3)`).
    pub const fn allowed_on(self, qp: QpType) -> bool {
        match qp {
            QpType::Rc | QpType::XrcSend => true,
            QpType::Uc => {
                !self.is_read_like() && !matches!(self, Opcode::Flush | Opcode::AtomicWrite)
            }
            QpType::Ud => matches!(self, Opcode::Send | Opcode::SendImm),
            QpType::XrcRecv => false,
        }
    }

    /// What the peer's memory, and its queue pair, must allow. Of a flush it depends on what is
    /// asked for: see [`FlushSpec::types`].
    pub const fn remote_rights(self) -> Access {
        match self {
            Opcode::RdmaWrite | Opcode::RdmaWriteImm | Opcode::AtomicWrite => Access::REMOTE_WRITE,
            Opcode::RdmaRead => Access::REMOTE_READ,
            Opcode::CompareSwap | Opcode::FetchAdd => Access::REMOTE_ATOMIC,
            Opcode::Send
            | Opcode::SendImm
            | Opcode::SendInv
            | Opcode::LocalInv
            | Opcode::BindMw
            | Opcode::Flush => Access::empty(),
        }
    }

    /// The completion opcode at the requester (`enum ibv_wc_opcode`).
    pub const fn wc(self) -> WcOpcode {
        match self {
            Opcode::RdmaWrite | Opcode::RdmaWriteImm => WcOpcode::RdmaWrite,
            Opcode::Send | Opcode::SendImm | Opcode::SendInv => WcOpcode::Send,
            Opcode::RdmaRead => WcOpcode::RdmaRead,
            Opcode::CompareSwap => WcOpcode::CompareSwap,
            Opcode::FetchAdd => WcOpcode::FetchAdd,
            Opcode::LocalInv => WcOpcode::LocalInv,
            Opcode::BindMw => WcOpcode::BindMw,
            Opcode::Flush => WcOpcode::Flush,
            Opcode::AtomicWrite => WcOpcode::AtomicWrite,
        }
    }
}

c_enum! {
    /// Operation of a completion (`enum ibv_wc_opcode`).
    WcOpcode {
        /// A send completed.
        Send = 0,
        /// An RDMA write completed.
        RdmaWrite = 1,
        /// An RDMA read completed.
        RdmaRead = 2,
        /// A compare and swap completed.
        CompareSwap = 3,
        /// A fetch and add completed.
        FetchAdd = 4,
        /// A memory window was bound.
        BindMw = 5,
        /// A local invalidate completed.
        LocalInv = 6,
        /// A flush completed.
        Flush = 8,
        /// An atomic write completed.
        AtomicWrite = 9,
        /// A receive completed.
        Recv = 128,
        /// A receive was consumed by an RDMA write with immediate data.
        RecvRdmaWithImm = 129,
    }
}

c_enum! {
    /// Status of a completion (`enum ibv_wc_status`).
    WcStatus {
        /// Success.
        Success = 0,
        /// Local length error.
        LocLenErr = 1,
        /// Local QP operation error.
        LocQpOpErr = 2,
        /// Local end-to-end context error.
        LocEecOpErr = 3,
        /// Local protection error.
        LocProtErr = 4,
        /// Work request flushed.
        WrFlushErr = 5,
        /// Memory window bind error.
        MwBindErr = 6,
        /// Bad response.
        BadRespErr = 7,
        /// Local access error (receive side, RDMA write with immediate).
        LocAccessErr = 8,
        /// Remote invalid request.
        RemInvReqErr = 9,
        /// Remote access error.
        RemAccessErr = 10,
        /// Remote operation error.
        RemOpErr = 11,
        /// Transport retry counter exceeded.
        RetryExcErr = 12,
        /// RNR retry counter exceeded.
        RnrRetryExcErr = 13,
        /// General error.
        GeneralErr = 21,
    }
}

c_enum! {
    /// Path MTU (`enum ibv_mtu`).
    Mtu {
        /// 256 bytes.
        B256 = 1,
        /// 512 bytes.
        B512 = 2,
        /// 1024 bytes.
        B1024 = 3,
        /// 2048 bytes.
        B2048 = 4,
        /// 4096 bytes.
        B4096 = 5,
    }
}

impl Mtu {
    /// Payload bytes of one packet.
    pub const fn bytes(self) -> u32 {
        128 << (self as u32)
    }
}

c_enum! {
    /// Asynchronous event (`enum ibv_event_type`).
    AsyncEventType {
        /// CQ overrun or protection error.
        CqErr = 0,
        /// Error on a QP that cannot be reported in a completion.
        QpFatal = 1,
        /// Invalid request at the responder.
        QpReqErr = 2,
        /// Access violation at the responder.
        QpAccessErr = 3,
        /// First packet arrived on a QP in RTR.
        CommEst = 4,
        /// Send queue drained.
        SqDrained = 5,
        /// Path migrated.
        PathMig = 6,
        /// Path migration failed.
        PathMigErr = 7,
        /// The device is gone.
        DeviceFatal = 8,
        /// Port became active.
        PortActive = 9,
        /// Port error.
        PortErr = 10,
        /// LID change.
        LidChange = 11,
        /// P_Key change.
        PkeyChange = 12,
        /// Subnet manager change.
        SmChange = 13,
        /// SRQ error.
        SrqErr = 14,
        /// SRQ limit reached.
        SrqLimitReached = 15,
        /// Last work request of a QP on an SRQ.
        QpLastWqeReached = 16,
        /// Client reregistration.
        ClientReregister = 17,
        /// GID table change.
        GidChange = 18,
        /// Work queue fatal.
        WqFatal = 19,
    }
}

bitflags! {
    /// Access rights of a memory region or a QP (`enum ibv_access_flags`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
    pub struct Access: u32 {
        /// The device may write locally.
        const LOCAL_WRITE = 1;
        /// Peers may write.
        const REMOTE_WRITE = 1 << 1;
        /// Peers may read.
        const REMOTE_READ = 1 << 2;
        /// Peers may run atomics.
        const REMOTE_ATOMIC = 1 << 3;
        /// Memory windows may be bound.
        const MW_BIND = 1 << 4;
        /// Addresses start at zero.
        const ZERO_BASED = 1 << 5;
        /// On-demand paging.
        const ON_DEMAND = 1 << 6;
        /// Huge pages.
        const HUGETLB = 1 << 7;
        /// Peers may ask for global visibility of what they wrote.
        const FLUSH_GLOBAL = 1 << 8;
        /// Peers may ask for persistence of what they wrote.
        const FLUSH_PERSISTENT = 1 << 9;
    }
}

impl Access {
    /// `IBV_ACCESS_OPTIONAL_RANGE`: flags a device may ignore.
    pub const OPTIONAL_RANGE: u32 = 0x3FF0_0000;

    /// Rights of peers that change memory: they need [`Access::LOCAL_WRITE`] too (IBTA volume 1,
    /// 11.2.8.2).
    pub const REMOTE_CHANGE: Access = Access::REMOTE_WRITE.union(Access::REMOTE_ATOMIC);

    /// What a memory window may be bound with (`ibv_bind_mw(3)`).
    pub const WINDOW: Access = Access::REMOTE_CHANGE
        .union(Access::LOCAL_WRITE)
        .union(Access::REMOTE_READ)
        .union(Access::ZERO_BASED)
        .union(Access::FLUSH_GLOBAL);
}

c_enum! {
    /// Kind of a memory window (`enum ibv_mw_type`).
    MwType {
        /// Bound by `ibv_bind_mw(3)`; all queue pairs of the domain accept its key.
        One = 1,
        /// Type 2B: bound by a work request to the queue pair that executes it.
        Two = 2,
    }
}

/// What an RDMA FLUSH asks for (IBTA annex A19): placement types and selectivity level, in one
/// word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlushSpec {
    /// Placement types: [`Access::FLUSH_GLOBAL`], [`Access::FLUSH_PERSISTENT`] or both.
    pub types: Access,
    /// The whole memory region, not a range of it.
    pub whole_region: bool,
}

impl FlushSpec {
    /// From `enum ibv_placement_type` and `enum ibv_selectivity_level`; `None`: no such types or
    /// level.
    pub fn new(types: u32, level: u32) -> Option<Self> {
        let known = types != 0 && types & !3 == 0 && level <= 1;
        known.then_some(FlushSpec {
            types: Access::from_bits_truncate(types << 8),
            whole_region: level == 1,
        })
    }

    /// As one word of a work request.
    pub fn raw(self) -> u64 {
        u64::from(self.types.bits() >> 8) | u64::from(self.whole_region) << 8
    }

    /// From one word of a work request; `None` if it is none.
    pub fn from_raw(word: u64) -> Option<Self> {
        let level = u32::try_from(word >> 8).ok()?;
        Self::new((word & 0xFF) as u32, level)
    }
}

bitflags! {
    /// Flags of a send work request (`enum ibv_send_flags`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
    pub struct SendFlags: u8 {
        /// Wait for earlier reads and atomics.
        const FENCE = 1;
        /// Ask for a completion.
        const SIGNALED = 1 << 1;
        /// Raise a solicited event at the peer.
        const SOLICITED = 1 << 2;
        /// Data is in the request.
        const INLINE = 1 << 3;
    }
}

bitflags! {
    /// Flags of a completion (`enum ibv_wc_flags`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct WcFlags: u8 {
        /// A GRH precedes the data.
        const GRH = 1;
        /// Immediate data is valid.
        const WITH_IMM = 1 << 1;
        /// A key was invalidated.
        const WITH_INV = 1 << 3;
    }
}

/// What the virtual device offers (`ibv_query_device`); the router enforces the same numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeviceLimits {
    /// Largest memory region in bytes.
    pub max_mr_size: u64,
    /// Bytes of memory that the processes of an endpoint share with the router: rings and pages.
    /// They take the router's address space even where nobody touches them.
    pub max_shared_bytes: u64,
    /// Queue pairs of a session.
    pub max_qp: u32,
    /// Work requests of one queue.
    pub max_qp_wr: u32,
    /// Scatter/gather elements of a request.
    pub max_sge: u32,
    /// Inline bytes of a request.
    pub max_inline: u32,
    /// Completion queues of a session.
    pub max_cq: u32,
    /// Entries of a completion queue.
    pub max_cqe: u32,
    /// Memory regions of a session.
    pub max_mr: u32,
    /// Memory windows of a session.
    pub max_mw: u32,
    /// Bytes of device memory of a session.
    pub max_dm_size: u64,
    /// Protection domains of a session.
    pub max_pd: u32,
    /// Outstanding reads and atomics of a QP, each way.
    pub max_rd_atomic: u8,
    /// Address handles of a session.
    pub max_ah: u32,
    /// Completion vectors.
    pub comp_vectors: u32,
    /// Multicast groups of a tenant on this host.
    pub max_mcast_grp: u32,
    /// Queue pairs attached to one multicast group.
    pub max_mcast_qp_attach: u32,
    /// Shared receive queues of a session.
    pub max_srq: u32,
    /// Work requests of a shared receive queue.
    pub max_srq_wr: u32,
    /// XRC domains that a session has open.
    pub max_xrcd: u32,
}

impl Default for DeviceLimits {
    fn default() -> Self {
        DeviceLimits {
            max_mr_size: 1 << 42,
            max_shared_bytes: 1 << 42,
            max_qp: 65_536,
            max_qp_wr: 16_384,
            max_sge: 30,
            max_inline: 1024,
            max_cq: 65_536,
            max_cqe: 1 << 20,
            max_mr: 1 << 20,
            max_mw: 1 << 20,
            max_dm_size: 16 << 20,
            max_pd: 65_536,
            max_rd_atomic: 16,
            max_ah: 65_536,
            comp_vectors: 1,
            max_mcast_grp: 8192,
            max_mcast_qp_attach: 1024,
            max_srq: 65_536,
            max_srq_wr: 16_384,
            max_xrcd: 65_536,
        }
    }
}

/// Nanoseconds of an RNR NAK timer code of 5 bits (IBTA volume 1, table 45).
pub const fn rnr_timer_ns(code: u8) -> u64 {
    // In units of 10 us, as the standard lists them; code 0 is the longest.
    const TABLE: [u32; 32] = [
        65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024,
        1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
    ];
    TABLE[(code & 31) as usize] as u64 * 10_000
}

/// Nanoseconds of a local ACK timeout code of 5 bits: 4.096 us times 2^code; `None` for 0, which
/// means no timeout (IBTA volume 1, 9.9.2.1.2).
pub const fn timeout_ns(code: u8) -> Option<u64> {
    match code & 31 {
        0 => None,
        c => Some(4096 << c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_follow_the_standard() {
        assert_eq!(rnr_timer_ns(0), 655_360_000);
        assert_eq!(rnr_timer_ns(1), 10_000);
        assert_eq!(rnr_timer_ns(12), 640_000);
        assert_eq!(rnr_timer_ns(31), 491_520_000);
        assert_eq!(timeout_ns(0), None);
        assert_eq!(timeout_ns(14), Some(67_108_864));
    }

    #[test]
    fn flushes_round_trip() {
        for (types, level) in [(1, 0), (2, 1), (3, 0)] {
            let spec = FlushSpec::new(types, level).unwrap();
            assert_eq!(FlushSpec::from_raw(spec.raw()), Some(spec));
        }
        assert_eq!(FlushSpec::new(1, 0).unwrap().types, Access::FLUSH_GLOBAL);
        assert_eq!(
            FlushSpec::new(2, 0).unwrap().types,
            Access::FLUSH_PERSISTENT
        );
        for bad in [(0, 0), (4, 0), (1, 2)] {
            assert_eq!(FlushSpec::new(bad.0, bad.1), None);
        }
        assert_eq!(FlushSpec::from_raw(u64::MAX), None);
    }

    #[test]
    fn opcodes_per_service() {
        assert!(Opcode::RdmaRead.allowed_on(QpType::Rc));
        assert!(!Opcode::RdmaRead.allowed_on(QpType::Uc));
        assert!(!Opcode::RdmaWrite.allowed_on(QpType::Ud));
        for local in [Opcode::BindMw, Opcode::LocalInv, Opcode::SendInv] {
            assert!(local.allowed_on(QpType::Uc) && !local.allowed_on(QpType::Ud));
        }
        for newer in [Opcode::Flush, Opcode::AtomicWrite] {
            assert!(newer.allowed_on(QpType::XrcSend) && !newer.allowed_on(QpType::Uc));
        }
        assert_eq!(Mtu::B4096.bytes(), 4096);
        assert_eq!(Mtu::from_raw(9), None);
    }
}
