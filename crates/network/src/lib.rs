//! Private networks: a bridge for each tenant, an interface for each endpoint.
//!
//! A tenant's bridge lives in a network namespace that holds nothing else. What keeps that
//! namespace alive is one `rtnetlink` socket that was opened in it ([`Bridge`]): when its owner
//! dies, in whatever way, the namespace, the bridge and all interfaces attached to it are gone.
//! An endpoint's program has a network namespace of its own, with one end of a veth pair in it
//! ([`configure`]); the bridge's owner makes the pair ([`Bridge::attach`]).
//!
//! The kernel grants requests on a netlink socket by the sender's capabilities in the user
//! namespaces that own the two network namespaces. The user who made a user namespace has all
//! capabilities in it and in its descendants (`user_namespaces(7)`), so that a bridge's owner
//! without any privilege attaches the programs of its own user, wherever they are nested.

#![forbid(unsafe_code)]

mod netlink;

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    BridgeStpState, InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::netlink::{CREATE, MODIFY, Netlink};

/// Name of an endpoint's interface in its program's namespace.
pub const INTERFACE: &str = "eth0";

/// MTU of all interfaces, in bytes: nothing but memory lies between them.
pub const MTU: u32 = 9000;

/// Name of the bridge in its namespace.
const BRIDGE: &str = "freeflow";

/// What the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub struct NetworkError {
    what: String,
    source: rustix::io::Errno,
}

/// A bridge, and the network namespace that it lives in.
#[derive(Debug)]
pub struct Bridge {
    netlink: Netlink,
    /// Ports made so far; names are not used again.
    ports: u64,
}

/// A port of a bridge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Port(String);

impl Bridge {
    /// Makes a bridge in the network namespace of the calling thread, which has to have
    /// CAP_NET_ADMIN over it.
    pub fn create() -> Result<Bridge, NetworkError> {
        let netlink = Netlink::open().map_err(refused("open a netlink socket"))?;
        // No loops are possible: a port forwards at once. Without a multicast querier, snooping
        // would only lose what neighbour discovery needs.
        let options = vec![
            InfoBridge::StpState(BridgeStpState::Disabled),
            InfoBridge::ForwardDelay(0),
            InfoBridge::MulticastSnooping(false),
        ];
        let bridge = new_link(
            vec![
                LinkAttribute::IfName(BRIDGE.to_owned()),
                LinkAttribute::Mtu(MTU),
            ],
            InfoKind::Bridge,
            InfoData::Bridge(options),
        );
        netlink
            .request(RouteNetlinkMessage::NewLink(bridge), CREATE)
            .map_err(refused("make a bridge"))?;
        Ok(Bridge { netlink, ports: 0 })
    }

    /// A bridge whose socket came from the process that made it.
    pub fn from_fd(socket: OwnedFd) -> Bridge {
        let netlink = Netlink::from_fd(socket);
        Bridge { netlink, ports: 0 }
    }

    /// The socket, to hand it to the bridge's owner.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.netlink.as_fd()
    }

    /// Puts [`INTERFACE`] into a network namespace, attached to the bridge; it is still down.
    pub fn attach(&mut self, namespace: BorrowedFd<'_>) -> Result<Port, NetworkError> {
        let bridge = rustix::net::netdevice::name_to_index(self.netlink.as_fd(), BRIDGE)
            .map_err(refused("find the tenant's bridge"))?;
        self.ports += 1;
        let name = format!("port{}", self.ports);
        let mut inside = LinkMessage::default();
        inside.attributes = vec![
            LinkAttribute::IfName(INTERFACE.to_owned()),
            LinkAttribute::Mtu(MTU),
            LinkAttribute::NetNsFd(namespace.as_raw_fd()),
        ];
        let pair = new_link(
            vec![
                LinkAttribute::IfName(name.clone()),
                LinkAttribute::Mtu(MTU),
                LinkAttribute::Controller(bridge),
            ],
            InfoKind::Veth,
            InfoData::Veth(InfoVeth::Peer(inside)),
        );
        self.netlink
            .request(RouteNetlinkMessage::NewLink(pair), CREATE)
            .map_err(refused("attach an interface to the tenant's bridge"))?;
        Ok(Port(name))
    }

    /// Removes a port and the interface at its other end. That it is gone already, with its
    /// program's namespace, is no error.
    pub fn detach(&mut self, port: &Port) -> Result<(), NetworkError> {
        let mut link = LinkMessage::default();
        link.attributes = vec![LinkAttribute::IfName(port.0.clone())];
        match self
            .netlink
            .request(RouteNetlinkMessage::DelLink(link), MODIFY)
        {
            Err(rustix::io::Errno::NODEV) => Ok(()),
            other => other.map_err(refused("remove an interface from the tenant's bridge")),
        }
    }
}

/// Gives the attached [`INTERFACE`] of the calling thread's network namespace its address, and
/// brings it and the loopback interface up.
///
/// The address is the only one of its prefix, and every other is looked for on the bridge:
/// endpoints of a tenant reach each other whatever their addresses.
pub fn configure(ip: IpAddr) -> Result<(), NetworkError> {
    let netlink = Netlink::open().map_err(refused("open a netlink socket"))?;
    let up = |name: &str| {
        let mut link = LinkMessage::default();
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        link.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        netlink
            .request(RouteNetlinkMessage::NewLink(link), MODIFY)
            .map_err(refused(format!("bring {name} up")))
    };
    up("lo")?;
    let index = rustix::net::netdevice::name_to_index(netlink.as_fd(), INTERFACE)
        .map_err(refused(format!("find {INTERFACE}")))?;
    let (family, prefix) = match ip {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    let mut address = AddressMessage::default();
    address.header.family = family;
    address.header.prefix_len = prefix;
    address.header.scope = AddressScope::Universe;
    address.header.index = index;
    // The router saw to it that nobody else has it; to find that out again would take a second.
    address.header.flags = AddressHeaderFlags::Nodad;
    address.attributes = vec![
        AddressAttribute::Local(ip),
        AddressAttribute::Address(ip),
        AddressAttribute::Flags(AddressFlags::Nodad),
    ];
    netlink
        .request(RouteNetlinkMessage::NewAddress(address), CREATE)
        .map_err(refused(format!("give {INTERFACE} the address {ip}")))?;
    up(INTERFACE)?;
    let mut route = RouteMessage::default();
    route.header = RouteHeader {
        address_family: family,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::Link,
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    route.attributes = vec![RouteAttribute::Oif(index)];
    netlink
        .request(RouteNetlinkMessage::NewRoute(route), CREATE)
        .map_err(refused(format!("route to {INTERFACE}")))
}

/// A request for a new link that is up.
fn new_link(attributes: Vec<LinkAttribute>, kind: InfoKind, data: InfoData) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes = attributes;
    let info = vec![LinkInfo::Kind(kind), LinkInfo::Data(data)];
    link.attributes.push(LinkAttribute::LinkInfo(info));
    link
}

fn refused(what: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> NetworkError {
    let what = what.into();
    move |source| NetworkError { what, source }
}
