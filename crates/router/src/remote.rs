//! Queue pairs whose peers are on other hosts: the transport's requester and responder decide what
//! goes over the wire, and this executes it against rings and memory.

pub(crate) mod cm;
mod datagrams;
mod departed;
mod map;
mod peers;
mod requests;
mod responses;
mod stock;

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::os::fd::AsFd;

use freeflow_api::FabricStatus;
use freeflow_fabric_udp::{Datagrams, Ecn, Fabric, Link, Progress, PushError, To, Udp, UdpOptions};
use freeflow_link::Agreed;
use freeflow_session::Handle;
use freeflow_transport::{Connection, MAX_SEGMENT, Requester, RequesterEvent, Responder};
use freeflow_types::{Gid, Mtu, QpState, QpType};
use freeflow_wire::{DEFAULT_PKEY, Headers, tenant_pkey};
use rustc_hash::FxHashSet;
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::data::Span;
use crate::engine::Engine;
use crate::exec::{Request, Step};
pub(crate) use crate::remote::map::Map;
use crate::remote::peers::{Peers, Standing};

/// What the fabric's descriptor is known by in the engine's epoll set.
pub(crate) const FABRIC: u64 = u64::MAX - 1;

/// Requests of a queue pair that are on their way at once.
const MAX_UNDER_WAY: usize = 512;

/// Packets that are sent in one step.
const PACKETS_PER_STEP: u32 = 64;

/// A shorter payload is covered by the packet's CRC, which costs next to nothing.
const MIN_UNCOVERED: usize = 256;

/// How long a network is lively after a packet, in nanoseconds.
const LIVELY_NS: u64 = 1_000_000;

/// Numbers that a router gives its packets in IPv4's identification, of which the packet's CRC
/// tells: any other is taken for damage.
const ROUTERS_IDS: u16 = 64;

/// Emptied requests kept for the next ones.
const MAX_SPARE: usize = 1024;

pub(crate) type RoceFabric = Fabric<Box<dyn Link + Send>>;

/// A queue pair's connection to its peer on another host.
#[derive(Debug)]
pub(crate) struct Remote {
    host: IpAddr,
    /// There is a router like this one, not any device.
    is_router: bool,
    standing: Standing,
    /// What its router and this one agreed on, if it is bound to one.
    agreed: Option<Agreed>,
    /// Whether anything has come from the peer.
    heard: bool,
    /// The partition that its packets are of.
    pkey: u16,
    flow: u32,
    requester: Option<Requester>,
    responder: Responder,
    /// What is on its way, in the order of posting.
    requests: VecDeque<Request>,
    /// The requester's number of the first of them.
    first: u64,
    /// Index in the ring of the next request to post.
    next: u64,
    /// Packets that came early.
    held: BTreeMap<u64, (Headers, Vec<u8>)>,
    /// Bytes of these.
    held_bytes: usize,
    events: Vec<RequesterEvent>,
}

impl Remote {
    /// The peer's host.
    pub(crate) fn host(&self) -> IpAddr {
        self.host
    }

    /// Forgets what is on its way: the queue pair flushes it.
    fn forget(&mut self) {
        self.requester = None;
        self.requests.clear();
        self.events.clear();
    }

    /// Headers as they go on the wire with a payload of `len` bytes.
    pub(crate) fn stamp(&self, headers: &Headers, len: usize) -> Headers {
        let mut headers = stamp(self.pkey, headers);
        headers.bth.header_crc = len >= MIN_UNCOVERED && self.may_leave_payload_uncovered();
        headers
    }

    /// Whether both routers trust UDP's checksum with payloads.
    pub(super) fn may_leave_payload_uncovered(&self) -> bool {
        self.agreed.is_some_and(|agreed| agreed.header_crc)
    }

    fn to(&self) -> To {
        To {
            dst: self.host,
            flow: self.flow,
            ecn: Ecn::Capable0,
        }
    }
}

/// Packets that were dropped, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Drops {
    /// No queue pair has that number.
    pub(crate) unknown_qp: u64,
    /// The queue pair is not connected to that host.
    pub(crate) wrong_host: u64,
    /// The queue pair belongs to another tenant than the packet.
    pub(crate) wrong_tenant: u64,
    /// The packet's CRC is not one that this queue pair's peer makes.
    pub(crate) damaged: u64,
    /// The queue pair is not ready to receive, or in error.
    pub(crate) not_receiving: u64,
    /// The host has not proved that it is one, or the queue pair still waits for its router.
    pub(crate) no_link: u64,
    /// The queue pair was connected to an earlier router of the host.
    pub(crate) old_incarnation: u64,
    /// Nothing that the connection has a use for: late, repeated, or out of its order.
    pub(crate) useless: u64,
    /// A request for what its sender may not have: a key that does not allow it, memory that is not
    /// the region's, or what the standard has no such request for.
    pub(crate) refused: u64,
    /// A datagram without the addresses of endpoints in front of its data.
    pub(crate) no_address: u64,
    /// A datagram that nobody whom it is for takes: no receive request, another Q_Key.
    pub(crate) not_taken: u64,
    /// A packet of this host's for which the sockets had no room.
    pub(crate) no_room: u64,
}

/// The way to other hosts.
#[derive(Default)]
pub(crate) struct Network {
    fabric: Option<RoceFabric>,
    map: Map,
    /// Whether there was a map with other hosts, this one or one before.
    had_others: bool,
    pub(crate) peers: Peers,
    batch: Datagrams,
    /// Whether the sockets are looked at in each round.
    hot: bool,
    last_active: u64,
    /// Whether the sockets have no room.
    full: bool,
    /// Queue pairs that wait until the sockets have room.
    blocked: FxHashSet<Handle>,
    spare: Vec<Request>,
    departed: departed::Departed,
    pub(crate) drops: Drops,
}

impl Network {
    /// Whether the engine is to look at the sockets without being asked to.
    pub(crate) fn is_hot(&mut self, now: u64, spin: u64) -> bool {
        self.hot = self.hot && now.saturating_sub(self.last_active) < spin;
        self.hot
    }

    /// Whether other hosts have talked to us just now.
    pub(crate) fn is_lively(&self, now: u64) -> bool {
        self.fabric.is_some() && now.saturating_sub(self.last_active) < LIVELY_NS
    }

    /// This host's address in the network between hosts.
    pub(crate) fn local(&self) -> Option<IpAddr> {
        self.fabric.as_ref().map(Fabric::local)
    }

    /// Whether UDP's checksum covers what goes to other hosts.
    pub(crate) fn has_checksums(&self) -> bool {
        self.fabric.as_ref().is_some_and(Fabric::has_checksum)
    }

    pub(crate) fn next_timeout(&self) -> Option<u64> {
        self.fabric.as_ref()?.next_timeout()
    }

    /// Whether its sockets are watched, or have to be for what is still to be sent.
    pub(crate) fn wants_a_round(&self) -> bool {
        self.hot || self.fabric.as_ref().is_some_and(Fabric::has_unsent)
    }

    /// The MTU of the virtual devices' port: each packet of so much data goes to every host.
    pub(crate) fn mtu(&self) -> Mtu {
        self.map.mtu
    }

    /// Whether a queue pair must wait until the sockets have room; it is told when they have.
    pub(crate) fn waits_for_room(&mut self, qp: Handle) -> bool {
        if self.full {
            self.blocked.insert(qp);
        }
        self.full
    }

    /// The host that has an endpoint of a tenant, if it is another one.
    pub(crate) fn find(&self, tenant: &str, gid: Gid) -> Option<IpAddr> {
        self.fabric.as_ref()?;
        self.map.find(tenant, gid)
    }

    /// What there is to know, if there is a network.
    pub(crate) fn status(&self) -> Option<FabricStatus> {
        let fabric = self.fabric.as_ref()?;
        let (received, sent, drops) = (fabric.received(), fabric.sent(), &self.drops);
        let named = [
            ("unknown_qp", drops.unknown_qp),
            ("wrong_host", drops.wrong_host),
            ("wrong_tenant", drops.wrong_tenant),
            ("no_link", drops.no_link),
            ("old_incarnation", drops.old_incarnation),
            ("not_receiving", drops.not_receiving),
            ("useless", drops.useless),
            ("refused", drops.refused),
            ("no_address", drops.no_address),
            ("not_taken", drops.not_taken),
            ("no_room", drops.no_room),
            ("damaged", drops.damaged),
            ("bad_icrc", received.bad_icrc),
            ("truncated", received.truncated),
            ("version", received.version),
            ("opcode", received.opcode),
            ("length", received.length),
            ("overflow", fabric.overflows()),
            ("too_big", sent.too_big),
            ("unreachable", sent.unreachable),
        ];
        Some(FabricStatus {
            address: fabric.local(),
            mtu: self.map.mtu.bytes(),
            hosts: self.map.segments.keys().copied().collect(),
            authenticated: self.peers.authenticated,
            incarnation: None,
            links: Vec::new(),
            sent_packets: sent.packets,
            sent_bytes: sent.bytes,
            received_packets: received.packets,
            received_bytes: received.bytes,
            congested: received.congested,
            blocked: sent.blocked,
            drops: named.map(|(why, n)| (why.to_owned(), n)).into(),
        })
    }

    /// Puts a map in place of the one that there was.
    pub(crate) fn set_map(&mut self, map: Map) {
        self.had_others |= map.peers().next().is_some();
        self.map = map;
    }
}

fn stamp(pkey: u16, headers: &Headers) -> Headers {
    let mut headers = *headers;
    headers.bth.pkey = pkey;
    headers
}

/// The sockets of an address of this host.
pub(crate) fn open(local: IpAddr) -> std::io::Result<RoceFabric> {
    let link: Box<dyn Link + Send> = Box::new(Udp::open(&UdpOptions::new(local))?);
    Ok(Fabric::new(link))
}

impl Engine {
    /// Joins the network between hosts.
    pub(crate) fn join(&mut self, fabric: RoceFabric) -> rustix::io::Result<()> {
        let data = EventData::new_u64(FABRIC);
        epoll::add(&*self.doorbells, fabric.as_fd(), data, EventFlags::IN)?;
        self.network.fabric = Some(fabric);
        Ok(())
    }

    /// A connected queue pair has got its attributes: if its peer's address is of another host, or it
    /// is to use the underlay's, it goes over the wire. Which host that is stays so until it is
    /// reset.
    pub(crate) fn connect_remote(&mut self, qp: Handle) {
        let Some(q) = self.qps.get_mut(qp) else {
            return;
        };
        let Some(e) = self.endpoints.get(q.endpoint) else {
            return;
        };
        let (attr, qp_type) = (q.transport.attr(), q.qp_type);
        if !qp_type.is_connected() {
            return;
        }
        let here = self.by_gid.contains_key(&(e.tenant, attr.av.dgid));
        let way = match &q.remote {
            Some(remote) => Some((remote.host, !remote.is_router)),
            None if attr.av.sgid_index == stock::GID_INDEX => {
                stock::host(e, &attr.av).map(|host| (host, true))
            }
            None if here => None,
            None => {
                let host = self.network.find(&e.tenant_name, attr.av.dgid);
                host.map(|host| (host, false))
            }
        };
        let Some((host, stock)) = way else { return };
        let agreed = match &q.remote {
            Some(remote) => remote.agreed,
            None => self.network.peers.agreed(host).filter(|_| !stock),
        };
        let mut connection = Connection::new(qp_type, attr);
        if let Some(agreed) = agreed {
            connection.segment = agreed.segment.min(MAX_SEGMENT);
            connection.selective = agreed.selective && qp_type.is_reliable();
        }
        let state = attr.state;
        let (flow, next) = (q.qpn.get() ^ attr.dest_qpn, q.send_head);
        let remote = q.remote.get_or_insert_with(|| {
            Box::new(Remote {
                host,
                is_router: !stock,
                standing: if stock || agreed.is_some() {
                    Standing::Bound
                } else {
                    Standing::Waiting { until: None }
                },
                agreed,
                heard: false,
                pkey: if stock {
                    DEFAULT_PKEY
                } else {
                    tenant_pkey(&e.tenant_name)
                },
                flow,
                requester: None,
                responder: Responder::new(&connection),
                requests: VecDeque::new(),
                first: 0,
                next,
                held: BTreeMap::new(),
                held_bytes: 0,
                events: Vec::new(),
            })
        });
        remote.responder.reconfigure(&connection);
        let waits = matches!(remote.standing, Standing::Waiting { .. });
        if state != QpState::Rts || qp_type == QpType::XrcRecv || waits {
            return;
        }
        match &mut remote.requester {
            Some(requester) => requester.reconfigure(&connection),
            None => {
                remote.requester = Some(Requester::new(&connection));
                (remote.first, remote.next) = (0, next);
            }
        }
    }

    /// The sockets have something to read, or room.
    pub(crate) fn wake_network(&mut self) {
        self.network.hot = true;
        self.network.last_active = self.now;
        self.flush_network();
    }

    /// Sends what waits to be sent.
    pub(crate) fn flush_network(&mut self) {
        let now = self.now;
        let Some(fabric) = self.network.fabric.as_mut() else {
            return;
        };
        // An error of the socket itself is as good as loss: the transport tries again.
        self.network.full = matches!(fabric.flush(now), Ok(Progress::Blocked));
        if !self.network.full {
            for qp in std::mem::take(&mut self.network.blocked) {
                self.make_ready(qp);
            }
        }
    }

    /// Looks at the sockets, if that is due; whether something has come.
    pub(crate) fn receive_network(&mut self) -> bool {
        let due = self.network.next_timeout().is_some_and(|at| at <= self.now);
        if !self.network.hot && !due {
            return false;
        }
        let now = self.now;
        let Some(mut fabric) = self.network.fabric.take() else {
            return false;
        };
        let mut batch = std::mem::take(&mut self.network.batch);
        if fabric.receive(now, &mut batch).is_err() {
            batch.clear();
        }
        for datagram in batch.iter() {
            if let Some(packet) = fabric.check(datagram) {
                self.on_packet(&packet, Some(&mut fabric));
            }
        }
        self.end_uses();
        let some = !batch.is_empty();
        self.network.fabric = Some(fabric);
        self.network.batch = batch;
        if some {
            self.network.last_active = now;
        }
        some
    }

    /// Does the next thing there is to do for a queue pair whose peer is on another host.
    pub(crate) fn remote_step(&mut self, qp: Handle) -> Step {
        let Some(q) = self.qps.get_mut(qp) else {
            return Step::Nothing;
        };
        let Some(mut fabric) = self.network.fabric.take() else {
            return Step::Nothing;
        };
        let Some(mut remote) = q.remote.take() else {
            self.network.fabric = Some(fabric);
            return Step::Nothing;
        };
        let mut step;
        if matches!(remote.standing, Standing::Waiting { .. }) {
            step = self.wait_for_link(qp, &mut remote);
        } else {
            // Time passes for who waits for room, too.
            step = self.time_out(qp, &mut remote);
            if !self.network.waits_for_room(qp) {
                let sent = self.answer(qp, &mut remote, &mut fabric).or(step);
                step = self.request(qp, &mut remote, &mut fabric).or(sent);
            }
        }
        self.network.fabric = Some(fabric);
        let Some(q) = self.qps.get_mut(qp) else {
            return Step::Nothing;
        };
        let due = remote.requester.as_ref().and_then(Requester::next_timeout);
        q.under_way = remote.requests.len();
        let (state, timer) = (q.transport.state(), q.timer);
        if matches!(state, QpState::Err | QpState::Sqe) {
            remote.forget();
            q.under_way = 0;
        }
        q.remote = Some(remote);
        match due {
            // One that fires too early finds that out.
            Some(at) if timer.is_none_or(|t| t > at) => self.start_timer(qp, at),
            _ => {}
        }
        match (step, state) {
            (Step::Nothing, QpState::Err) => self.flush(qp, true),
            (Step::Nothing, QpState::Sqe) => self.flush(qp, false),
            _ => step,
        }
    }

    /// Adds a packet to what is sent after this round. One for which there is no room, or no way, is
    /// as good as lost.
    fn push(
        &mut self,
        fabric: &mut RoceFabric,
        to: &To,
        headers: &Headers,
        bytes: Payload<'_>,
    ) -> Result<(), Unreadable> {
        let len = bytes.len();
        for _ in 0..2 {
            let pushed = fabric.push(to, headers, len, |room| self.fill(bytes, room));
            match pushed {
                Err(PushError::Full) => {
                    self.network.full = matches!(fabric.flush(self.now), Ok(Progress::Blocked));
                }
                Err(PushError::Payload(unreadable)) => return Err(unreadable),
                _ => return Ok(()),
            }
        }
        self.network.drops.no_room += 1;
        Ok(())
    }

    fn fill(&mut self, payload: Payload<'_>, room: &mut [u8]) -> Result<(), Unreadable> {
        match payload {
            Payload::Spans(spans, skip, _) => self.gather(spans, skip, room).ok_or(Unreadable),
            Payload::Bytes(bytes) => {
                room.copy_from_slice(bytes);
                Ok(())
            }
            Payload::Behind(head, rest) => {
                let (front, back) = room.split_at_mut_checked(head.len()).ok_or(Unreadable)?;
                front.copy_from_slice(head);
                self.fill(*rest, back)
            }
        }
    }
}

/// What a packet carries.
#[derive(Clone, Copy)]
enum Payload<'a> {
    /// Of the bytes of spans, so many after the first so many.
    Spans(&'a [Span], u64, usize),
    Bytes(&'a [u8]),
    /// Bytes, and what comes behind them.
    Behind(&'a [u8], &'a Payload<'a>),
}

impl Payload<'_> {
    fn len(&self) -> usize {
        match self {
            Payload::Spans(_, _, len) => *len,
            Payload::Bytes(bytes) => bytes.len(),
            Payload::Behind(head, rest) => head.len() + rest.len(),
        }
    }
}

/// Memory that could not be read.
struct Unreadable;
