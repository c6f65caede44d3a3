//! Ids: what a program sees of the connection manager.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use freeflow_session::{CmDetail, CmEventType, CmIdInfo, CmPort, Handle, PortSpace};
use freeflow_types::{Gid, Mtu, QpType, VirtualIp};
use serde::{Deserialize, Serialize};

/// Q_Key of datagrams that the connection manager sets up (`RDMA_UDP_QKEY`).
pub(crate) const UDP_QKEY: u32 = 0x0123_4567;

/// A GID of an endpoint, where messages leave and arrive.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Port {
    /// The endpoint.
    pub endpoint: Handle,
    /// Its GID.
    pub gid: Gid,
    /// Index of it: 0 is the virtual address, 1 the underlay's.
    pub index: u8,
    /// The port's MTU.
    pub mtu: Mtu,
    /// GUID of the device.
    pub guid: u64,
}

/// What an id's program is to be told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// What happened.
    pub event: CmEventType,
    /// 0, a negative errno, or the reason of a rejection.
    pub status: i32,
    /// With a request for a connection: its id.
    pub new_id: Option<Handle>,
    /// Particulars.
    pub detail: CmDetail,
    /// The other side's private data.
    pub private_data: Vec<u8>,
    /// The other side's vendor and options, unread.
    pub ece: Option<(u32, u32)>,
}

impl Event {
    pub(crate) fn new(event: CmEventType, status: i32) -> Self {
        Event {
            event,
            status,
            new_id: None,
            detail: CmDetail::None,
            private_data: Vec::new(),
            ece: None,
        }
    }
}

/// States, as `rdma_cm` of Linux has them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum IdState {
    Idle,
    Bound,
    AddrResolved,
    RouteResolved,
    Listening,
    /// Connecting, or connected.
    Connect,
    Disconnected,
}

/// An id.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Id {
    pub(crate) endpoint: Handle,
    pub(crate) space: PortSpace,
    pub(crate) qp_type: QpType,
    pub(crate) state: IdState,
    /// Unspecified until it is bound.
    pub(crate) src: SocketAddr,
    pub(crate) dst: Option<SocketAddr>,
    /// None while it is bound to no address, or to a wildcard.
    pub(crate) port: Option<Port>,
    pub(crate) dgid: Option<Gid>,
    /// Whether it is among the owners of its port number.
    pub(crate) owns_port: bool,
    pub(crate) reuse: bool,
    pub(crate) afonly: bool,
    /// The program has set it.
    pub(crate) afonly_set: bool,
    pub(crate) tos: u8,
    /// Code of the local ACK timeout, if the program has set it.
    pub(crate) ack_timeout: Option<u8>,
    /// Requests for connections that may still wait to be taken.
    pub(crate) backlog: u32,
    /// Random: sequence number, name of the connection, first port to try.
    pub(crate) entropy: u64,
    /// Its connection's name, once it has one.
    pub(crate) connection: Option<u32>,
    pub(crate) qkey: Option<u32>,
    /// Nothing is told of it: its program has not accepted it yet.
    pub(crate) silent: bool,
}

impl Id {
    pub(crate) fn new(endpoint: Handle, space: PortSpace, qp_type: QpType, entropy: u64) -> Self {
        // Of the port spaces of services that have one transport each, that counts.
        let qp_type = match space {
            PortSpace::Tcp => QpType::Rc,
            PortSpace::Udp | PortSpace::Ipoib => QpType::Ud,
            PortSpace::Ib => qp_type,
        };
        Id {
            endpoint,
            space,
            qp_type,
            state: IdState::Idle,
            src: (Ipv4Addr::UNSPECIFIED, 0).into(),
            dst: None,
            port: None,
            dgid: None,
            owns_port: false,
            reuse: false,
            afonly: false,
            afonly_set: false,
            tos: 0,
            ack_timeout: None,
            backlog: 0,
            entropy,
            connection: None,
            qkey: None,
            silent: false,
        }
    }

    pub(crate) fn is_datagram(&self) -> bool {
        self.qp_type == QpType::Ud
    }

    /// First sequence number of its connection, 24 bits.
    pub(crate) fn psn(&self) -> u32 {
        self.entropy as u32 & 0x00FF_FFFF
    }

    /// Q_Key of its datagrams.
    pub(crate) fn qkey(&self) -> u32 {
        self.qkey.unwrap_or(UDP_QKEY)
    }

    pub(crate) fn info(&self) -> CmIdInfo {
        let port = self.port.map(|port| CmPort {
            sgid: port.gid,
            sgid_index: port.index,
            dgid: self.dgid,
            mtu: port.mtu,
            tos: self.tos,
        });
        CmIdInfo {
            src: self.src,
            dst: self.dst,
            port,
        }
    }

    /// Whether a request to this address is for it, if it listens.
    pub(crate) fn takes(&self, port: &Port, to: IpAddr) -> bool {
        let own = self.src.ip();
        let family = own.is_ipv4() == to.is_ipv4();
        if is_any(own) {
            return family || !self.afonly;
        }
        let here = |own: Port| own.index == port.index && own.gid == port.gid;
        family && own == to && self.port.is_some_and(here)
    }
}

/// Whether an address is none of a device's but means any, as a wildcard does and one of loopback
/// (Linux: `cma_any_addr`).
pub fn is_any(ip: IpAddr) -> bool {
    ip.is_unspecified() || ip.is_loopback()
}

/// The GID of an address.
pub(crate) fn gid(ip: IpAddr) -> Gid {
    VirtualIp(ip).into()
}
