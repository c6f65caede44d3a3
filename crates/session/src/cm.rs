//! Messages of the connection manager (`rdma_cm(7)`).
//!
//! An *id* is one end of a communication, a listener, or a datagram service; the router owns its
//! state. Events of an id wait in the router, in its *event channel*, in order. The descriptor of
//! a channel shows that something waits, and no more: for each event that is put in line the
//! router sends one packet of one byte, which the library takes out before it asks for the event
//! ([`CmRequest::GetEvent`]). So an id with the events that it has can change its channel.

use std::net::SocketAddr;

use freeflow_types::{Gid, Mtu, Psn, QpAttr, QpAttrMask, QpState, QpType, Qpn};
use serde::{Deserialize, Serialize};

use crate::Handle;
use crate::message::{Invalid, at_most};

/// Most bytes of private data in any message of the connection manager (IBTA volume 1, 12.6:
/// RTU and DREP have 224).
pub const MAX_PRIVATE_DATA: usize = 224;

/// Port space of an id, with the numbers of `<rdma/rdma_cma.h>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[repr(u16)]
pub enum PortSpace {
    /// `RDMA_PS_IPOIB`: datagrams of multicast groups.
    Ipoib = 0x0002,
    /// `RDMA_PS_TCP`: connections.
    Tcp = 0x0106,
    /// `RDMA_PS_UDP`: datagrams.
    Udp = 0x0111,
    /// `RDMA_PS_IB`: any service.
    Ib = 0x013F,
}

/// Queue pair that an id connects with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CmQp {
    /// Number.
    pub qpn: Qpn,
    /// Service.
    pub qp_type: QpType,
    /// Whether it has a shared receive queue.
    pub srq: bool,
}

/// Parameters of a connection: `struct rdma_conn_param`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CmParam {
    /// The program's queue pair; of an id that has one, or as the program says.
    pub qp: CmQp,
    /// For the other side; at most [`MAX_PRIVATE_DATA`] bytes, and what the message takes.
    pub private_data: Vec<u8>,
    /// READs and atomics that this side takes at a time; 0xFF: as many as the device does.
    pub responder_resources: u8,
    /// READs and atomics that this side has under way; 0xFF: as many as the device does.
    pub initiator_depth: u8,
    /// End-to-end flow control.
    pub flow_control: bool,
    /// Retries after timeouts, 0 to 7.
    pub retry_count: u8,
    /// Retries after RNR NAKs, 0 to 7; 7: for ever.
    pub rnr_retry_count: u8,
    /// Of datagrams: the Q_Key to tell, if not the port space's.
    pub qkey: Option<u32>,
    /// `rdma_set_local_ece(3)`: vendor and options, carried unread.
    pub ece: Option<(u32, u32)>,
}

/// Options of an id (`rdma_set_option(3)`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CmOption {
    /// Type of service of the connection's packets.
    Tos(u8),
    /// Others may bind the same port, if they have it set too.
    ReuseAddr(bool),
    /// A wildcard of IPv6 is not one of IPv4.
    AfOnly(bool),
    /// Code of the local ACK timeout, 5 bits: 4.096 us times 2^code; 0: never.
    AckTimeout(u8),
}

/// A queue pair is brought to a state through those before it, with the attributes that
/// [`CmRequest::InitQpAttr`] says; what is here goes before them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CmBringUp {
    /// The queue pair.
    pub qp: Handle,
    /// The state: INIT, RTR or RTS.
    pub state: QpState,
    /// READs and atomics that it takes at a time.
    pub max_dest_rd_atomic: Option<u8>,
    /// READs and atomics that it has under way.
    pub max_rd_atomic: Option<u8>,
}

/// A request about the connection manager.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CmRequest {
    /// Creates an event channel. [`crate::Reply::Created`]; descriptor: its socket.
    CreateChannel,
    /// Destroys it; EBUSY while an id uses it. [`crate::Reply::Done`].
    DestroyChannel {
        /// The channel.
        channel: Handle,
    },
    /// Takes the first event out of a channel. [`crate::Reply::CmEvent`].
    GetEvent {
        /// The channel.
        channel: Handle,
    },
    /// Creates an id. [`crate::Reply::Created`].
    CreateId {
        /// Where its events go.
        channel: Handle,
        /// Port space.
        port_space: PortSpace,
        /// Service.
        qp_type: QpType,
    },
    /// Destroys it, with what waits of its events. [`crate::Reply::CmDestroyed`].
    DestroyId {
        /// The id.
        id: Handle,
    },
    /// Moves an id and its events to another channel. [`crate::Reply::CmMigrated`].
    MigrateId {
        /// The id.
        id: Handle,
        /// The channel.
        channel: Handle,
    },
    /// What is known of an id. [`crate::Reply::CmId`].
    QueryId {
        /// The id.
        id: Handle,
    },
    /// Gives it an address; port 0: a free one. ENODEV: the address is not the endpoint's;
    /// EADDRINUSE. [`crate::Reply::CmId`].
    BindAddr {
        /// The id.
        id: Handle,
        /// The address, or the wildcard.
        addr: SocketAddr,
    },
    /// Finds the way to an address; an event tells. [`crate::Reply::Done`].
    ResolveAddr {
        /// The id.
        id: Handle,
        /// The address to come from.
        src: Option<SocketAddr>,
        /// The address to go to.
        dst: SocketAddr,
        /// How long that may take.
        timeout_ms: u32,
    },
    /// Finds the route; an event tells. [`crate::Reply::Done`].
    ResolveRoute {
        /// The id.
        id: Handle,
        /// How long that may take.
        timeout_ms: u32,
    },
    /// Waits for others to connect. [`crate::Reply::CmId`], with the port.
    Listen {
        /// The id.
        id: Handle,
        /// Most requests that wait for an answer; 0: as many as the router allows.
        backlog: u32,
    },
    /// Connects, or looks a datagram service up. [`crate::Reply::Done`].
    Connect {
        /// The id.
        id: Handle,
        /// With what.
        param: CmParam,
    },
    /// Accepts a request. [`crate::Reply::Done`].
    Accept {
        /// The id that came with the request; or one that got a reply (`CONNECT_RESPONSE`), to
        /// finish it.
        id: Handle,
        /// With what; of a reply it is not needed.
        param: Option<CmParam>,
        /// What is done first, as by [`CmRequest::BringUp`].
        up: Option<CmBringUp>,
    },
    /// Rejects a request or a reply. [`crate::Reply::Done`].
    Reject {
        /// The id.
        id: Handle,
        /// For the other side.
        private_data: Vec<u8>,
        /// For the reason of IBTA volume 1, 12.6.7.2: true if this side's ECE is not acceptable.
        for_ece: bool,
    },
    /// Ends a connection, or answers that the other side ended it. [`crate::Reply::Done`].
    Disconnect {
        /// The id.
        id: Handle,
        /// A queue pair that goes to ERR first.
        fail: Option<Handle>,
    },
    /// Tells of an event of the id's queue pair; [`freeflow_types::AsyncEventType::CommEst`]
    /// counts as the last message of the hand-shake. [`crate::Reply::Done`].
    Notify {
        /// The id.
        id: Handle,
        /// The event.
        event: freeflow_types::AsyncEventType,
    },
    /// Attributes to bring the id's queue pair to a state with. [`crate::Reply::CmQpAttr`].
    InitQpAttr {
        /// The id.
        id: Handle,
        /// The state: INIT, RTR or RTS.
        state: QpState,
    },
    /// Brings a queue pair up; if that fails, it may have got to a state on the way.
    /// [`crate::Reply::Done`].
    BringUp {
        /// The id.
        id: Handle,
        /// The queue pair.
        up: CmBringUp,
    },
    /// Sets an option. [`crate::Reply::Done`].
    SetOption {
        /// The id.
        id: Handle,
        /// The option.
        option: CmOption,
    },
    /// Joins a multicast group; an event tells. [`crate::Reply::Done`].
    Join {
        /// The id.
        id: Handle,
        /// The group: a multicast address, or the wildcard for one of its own.
        addr: SocketAddr,
        /// To send to it alone.
        send_only: bool,
        /// The library's name for it, which the event carries.
        cookie: u64,
    },
    /// Leaves a multicast group. [`crate::Reply::CmDestroyed`].
    Leave {
        /// The id.
        id: Handle,
        /// The library's name for it.
        cookie: u64,
    },
    /// Puts an event of the program's own in line (`rdma_write_cm_event(3)`).
    /// [`crate::Reply::Done`].
    WriteEvent {
        /// The id.
        id: Handle,
        /// Status.
        status: i32,
        /// Argument.
        arg: u64,
    },
}

impl CmRequest {
    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        let private = |data: &[u8]| {
            at_most(
                "private_data_len",
                data.len() as u64,
                MAX_PRIVATE_DATA as u64,
            )
        };
        let param = |p: &CmParam| {
            private(&p.private_data)?;
            at_most("retry_count", p.retry_count.into(), 7)?;
            at_most("rnr_retry_count", p.rnr_retry_count.into(), 7)
        };
        match self {
            CmRequest::Connect { param: p, .. } | CmRequest::Accept { param: Some(p), .. } => {
                param(p)
            }
            CmRequest::Reject { private_data, .. } => private(private_data),
            CmRequest::SetOption {
                option: CmOption::AckTimeout(code),
                ..
            } => at_most("timeout", (*code).into(), 31),
            _ => Ok(()),
        }
    }
}

/// What is known of an id.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CmIdInfo {
    /// Its address; unspecified before it is bound.
    pub src: SocketAddr,
    /// The other side's, once it is known.
    pub dst: Option<SocketAddr>,
    /// The device it is bound to; none with a wildcard.
    pub port: Option<CmPort>,
}

/// Where an id is bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CmPort {
    /// Its GID.
    pub sgid: Gid,
    /// Index of it.
    pub sgid_index: u8,
    /// The other side's GID, once it is known.
    pub dgid: Option<Gid>,
    /// MTU of the path.
    pub mtu: Mtu,
    /// Type of service.
    pub tos: u8,
}

/// Events, with the numbers of `<rdma/rdma_cma.h>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[repr(u32)]
#[allow(missing_docs)] // the field's names
pub enum CmEventType {
    AddrResolved = 0,
    AddrError = 1,
    RouteResolved = 2,
    RouteError = 3,
    ConnectRequest = 4,
    ConnectResponse = 5,
    ConnectError = 6,
    Unreachable = 7,
    Rejected = 8,
    Established = 9,
    Disconnected = 10,
    DeviceRemoval = 11,
    MulticastJoin = 12,
    MulticastError = 13,
    AddrChange = 14,
    TimewaitExit = 15,
    AddrInfoResolved = 16,
    AddrInfoError = 17,
    User = 18,
    Internal = 19,
}

/// What an event carries beside its status.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CmDetail {
    /// Nothing.
    None,
    /// Of a connection: the other side's parameters, as this side sees them (its responder
    /// resources are what this side may have under way, and the other way round).
    Connection {
        /// READs and atomics that the other side wants to have under way here.
        responder_resources: u8,
        /// READs and atomics that the other side takes at a time.
        initiator_depth: u8,
        /// End-to-end flow control.
        flow_control: bool,
        /// Retries after timeouts.
        retry_count: u8,
        /// Retries after RNR NAKs.
        rnr_retry_count: u8,
        /// Whether the other side's queue pair has a shared receive queue.
        srq: bool,
        /// The other side's queue pair.
        qpn: Qpn,
        /// First sequence number of the other side.
        psn: Psn,
    },
    /// Of datagrams: where to send to. Also of a group that could not be joined, then with its
    /// cookie alone.
    Datagram {
        /// The other side's queue pair; of a group, all ones.
        qpn: Qpn,
        /// Q_Key.
        qkey: u32,
        /// GID of the other side or the group.
        gid: Gid,
        /// For an address handle.
        sgid_index: u8,
        /// The library's name for the group that was joined.
        cookie: u64,
    },
    /// The program's own.
    User {
        /// Argument.
        arg: u64,
    },
}

/// An event.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CmEvent {
    /// The id it is of; with a request for a connection, the listener.
    pub id: Handle,
    /// With a request for a connection: the id of it, in the listener's channel.
    pub new_id: Option<Handle>,
    /// What happened.
    pub event: CmEventType,
    /// 0, a negative errno, or the reason of a rejection (IBTA volume 1, 12.6.7.2).
    pub status: i32,
    /// Particulars.
    pub detail: CmDetail,
    /// The other side's private data, with the zeroes that fill its message.
    pub private_data: Vec<u8>,
    /// The other side's ECE.
    pub ece: Option<(u32, u32)>,
    /// The id, `new_id` if there is one, as it is since.
    pub info: CmIdInfo,
}

/// Answer to [`CmRequest::InitQpAttr`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CmQpAttr {
    /// Attributes.
    pub attr: QpAttr,
    /// Which of them.
    pub mask: QpAttrMask,
}
