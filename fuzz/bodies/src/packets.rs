//! Two hosts, and a network between them that does to their packets what it likes, and makes up its
//! own.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use arbitrary::{Result, Unstructured};
use freeflow_fabric_udp::Ecn;
use freeflow_router::Hosts;
use freeflow_router::testing::Host;
use freeflow_shm::SendEntry;
use freeflow_types::{Gid, Opcode, Psn, QpType, SendFlags, VirtualIp};
use freeflow_wire::{
    Addresses, Aeth, AtomicEth, Bth, BthOpcode, DEFAULT_PKEY, Deth, Feth, Flow, Headers,
    ICRC_BYTES, Reth, Syndrome, icrc, tenant_pkey,
};

use crate::cable::{Cable, Packet};
use crate::cast::{Bystander, IOVA, PAGES, Party, QKEY, finish, host};
use crate::rings::entry;

const STEPS: usize = 96;
/// Packets that are remembered, to be sent again or changed.
const REMEMBERED: usize = 64;
/// Exchanges of packets after which two hosts have said all they have to say at one time.
const EXCHANGES: usize = 10_000;

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));
const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2));
/// A host of the map that has none of the tenant's endpoints.
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 3));
/// A host that is not of the map.
const STOCK: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));

const MAP: &str = "
    t 10.0.0.0/24 198.51.100.1
    t 10.0.1.0/24 198.51.100.2
    u 10.0.0.0/24 198.51.100.1
    u 10.0.2.0/24 198.51.100.3
    v 10.0.0.0/24 198.51.100.1
";

/// Services of the connections between the hosts, in the order of the parties' queue pairs; the
/// last one's receives are of a shared queue on this host.
const SERVICES: [QpType; 4] = [QpType::Rc, QpType::Uc, QpType::Ud, QpType::Rc];

struct World {
    hosts: [Host; 2],
    cables: [Cable; 2],
    /// Connected with each other.
    parties: [Party; 2],
    /// On this host, and connected with a host that is not of the map.
    stock: Party,
    /// What is on its way.
    air: VecDeque<Packet>,
    /// What was.
    past: VecDeque<Packet>,
}

/// Bytes as what a network does and makes up between two hosts whose programs are honest.
///
/// No packet ends a session or changes what is another tenant's; one that does not come from the
/// peer's host changes nothing and completes nothing; and when the network has become good, new
/// connections work.
pub fn packets(data: &[u8]) {
    let mut world = World::new();
    let third = world.hosts[0].endpoint("c", "u", ip([10, 0, 0, 1]));
    let mut bystander = Bystander::new(&mut world.hosts[0], third.expect("an endpoint"));
    let mut input = Unstructured::new(data);
    // The input may end anywhere.
    let _ = world.run(&mut input);
    bystander.check(&mut world.hosts[0]);
    world.heals();
    let World {
        hosts: [here, there],
        parties: [a, b],
        stock,
        ..
    } = world;
    for (host, session) in [(&here, &a), (&here, &stock), (&there, &b)] {
        assert!(
            host.is_alive(session.process.session),
            "a packet ended a session: {:?}",
            host.ended()
        );
    }
    let sessions = [
        a.process.session,
        stock.process.session,
        bystander.session(),
    ];
    finish(here, &sessions);
    finish(there, &[b.process.session]);
}

fn ip(ip: [u8; 4]) -> VirtualIp {
    VirtualIp(IpAddr::from(ip))
}

fn number(party: &Party, qp: usize) -> u32 {
    party.qps.get(qp).map_or(0, |q| q.made.qpn.get())
}

impl World {
    fn new() -> World {
        let mut hosts = [host(), host()];
        let cables = [Cable::new(HERE), Cable::new(THERE)];
        for (host, cable) in hosts.iter_mut().zip(&cables) {
            let map = Hosts::parse(MAP).expect("a map");
            host.join(Box::new(cable.clone()), map)
                .expect("the network");
        }
        let [here, there] = &mut hosts;
        let a = here.endpoint("a", "t", ip([10, 0, 0, 1]));
        let b = there.endpoint("b", "t", ip([10, 0, 1, 1]));
        let s = here.underlay_endpoint("s", "v", ip([10, 0, 0, 3]));
        let mut a = Party::new(here, a.expect("an endpoint"));
        let mut b = Party::new(there, b.expect("an endpoint"));
        let mut stock = Party::new(here, s.expect("an endpoint"));
        let srq = a.srq(here);
        for (n, qp_type) in SERVICES.into_iter().enumerate() {
            let shared = (n == SERVICES.len() - 1).then_some(srq);
            connect(here, &mut a, shared, there, &mut b, qp_type);
        }
        let peer = Gid::from(VirtualIp(STOCK));
        for qp_type in [QpType::Rc, QpType::Uc, QpType::Ud] {
            let qp = stock.qp(here, qp_type, None);
            stock.connect_from(here, qp, 1, peer, 0x77);
        }
        World {
            hosts,
            cables,
            parties: [a, b],
            stock,
            air: VecDeque::new(),
            past: VecDeque::new(),
        }
    }

    /// Runs both hosts until they have nothing more to do by themselves.
    fn settle(&mut self) {
        for (host, cable) in self.hosts.iter_mut().zip(&self.cables) {
            assert!(host.settle(), "the engine does not come to rest");
            for packet in cable.take_sent() {
                if self.past.len() == REMEMBERED {
                    self.past.pop_front();
                }
                self.past.push_back(packet.clone());
                self.air.push_back(packet);
            }
        }
    }

    /// Brings a packet to the host that it is for, if it is one of the two.
    fn bring(&mut self, packet: Packet) {
        let to = self.cables.iter().find(|c| c.is(packet.to));
        let Some(cable) = to else { return };
        cable.bring(packet);
    }

    /// Brings all packets where they are to go until there are none.
    fn exchange(&mut self) {
        for _ in 0..EXCHANGES {
            self.settle();
            if self.air.is_empty() {
                return;
            }
            for packet in std::mem::take(&mut self.air) {
                self.bring(packet);
            }
        }
        panic!("two hosts talk without end");
    }

    /// A packet that this host has not been sent by its peer.
    fn intrude(&mut self, packet: Packet) {
        self.settle();
        // What is of the endpoint with the underlay's GID may come from anywhere.
        let host_of_peer = packet.from.ip() == THERE;
        let [a, _] = &mut self.parties;
        while a.poll().is_some() {}
        let before = a.bytes();
        self.bring(packet);
        self.settle();
        if host_of_peer {
            return;
        }
        let [a, _] = &mut self.parties;
        assert!(
            a.poll().is_none(),
            "a stranger's packet completed a request"
        );
        assert!(a.bytes() == before, "a stranger's packet changed memory");
    }

    fn run(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        for _ in 0..STEPS {
            if u.is_empty() {
                break;
            }
            self.step(u)?;
        }
        Ok(())
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=13)? {
            0 => {
                let later = [0, 1_000, 100_000, 10_000_000, 6_000_000_000];
                let later = *u.choose(&later)?;
                self.hosts.iter_mut().for_each(|host| host.round(later));
            }
            1 => self.exchange(),
            2 | 3 => self.post(u)?,
            4 => {
                let (side, qp) = (u.int_in_range(0..=1)?, u.int_in_range(0..=2)?);
                let len = if u.arbitrary()? { 4096 } else { 64 };
                let at = u.int_in_range(0..=PAGES - len)?;
                let [a, b] = &mut self.parties;
                let party = if side == 0 { a } else { b };
                let sge = party.sge(at, len as u32);
                party.recv(qp, 1, &[sge]);
            }
            // One of those on their way: it comes, is lost, comes twice, or comes later.
            what @ 5..=8 => {
                self.settle();
                let Some(last) = self.air.len().checked_sub(1) else {
                    return Ok(());
                };
                let Some(packet) = self.air.remove(u.int_in_range(0..=last)?) else {
                    return Ok(());
                };
                match what {
                    5 => self.bring(packet),
                    6 => {}
                    7 => {
                        self.bring(packet.clone());
                        self.bring(packet);
                    }
                    _ => self.air.push_back(packet),
                }
            }
            // An old one, as it was.
            9 => {
                if let Some(packet) = self.old(u)? {
                    self.intrude(packet);
                }
            }
            10 => {
                if let Some(packet) = self.old(u)? {
                    let changed = change(u, packet)?;
                    self.intrude(changed);
                }
            }
            11 => {
                let packet = self.invent(u)?;
                self.intrude(packet);
            }
            12 => {
                let len = u.int_in_range(0..=200)?;
                let bytes = u.bytes(len.min(u.len()))?.to_vec();
                let from = sender(u)?;
                let bytes = if u.arbitrary()? {
                    seal(from, HERE, bytes, 0)
                } else {
                    bytes
                };
                self.intrude(Packet {
                    from,
                    to: HERE,
                    ecn: Ecn::NotCapable,
                    bytes,
                });
            }
            _ => {
                for party in &mut self.parties {
                    while party.poll().is_some() {}
                }
                while self.stock.poll().is_some() {}
            }
        }
        Ok(())
    }

    fn post(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let [a, b] = &mut self.parties;
        let (from, to) = if u.arbitrary()? { (a, b) } else { (b, a) };
        let qp = u.int_in_range(0..=SERVICES.len() - 1)?;
        let mut entry = entry(u, from, to, qp)?;
        entry.flags &= !SendFlags::INLINE.bits();
        let len = u.int_in_range(0..=6000)?;
        let sge = from.sge(u.int_in_range(0..=PAGES - 6000)?, len);
        entry.num_sge = 1;
        entry.inline_len = 0;
        from.send(qp, &entry, &[sge], b"");
        Ok(())
    }

    fn old(&self, u: &mut Unstructured<'_>) -> Result<Option<Packet>> {
        let Some(last) = self.past.len().checked_sub(1) else {
            return Ok(None);
        };
        Ok(self.past.get(u.int_in_range(0..=last)?).cloned())
    }

    /// A packet of a kind that exists, with what somebody who knows much may write into it.
    fn invent(&self, u: &mut Unstructured<'_>) -> Result<Packet> {
        let [a, b] = &self.parties;
        let opcode = opcode(u)?;
        let parties = [a, b, &self.stock];
        let to = *u.choose(&parties)?;
        let number = match to.qps.len().checked_sub(1) {
            Some(last) if !u.ratio(1, 8)? => number(to, u.int_in_range(0..=last)?),
            _ => u.int_in_range(0..=0xFF_FFFF)?,
        };
        let mut headers = Headers::new(Bth::new(opcode, number, psn(u)?));
        headers.bth.ack_req = u.arbitrary()?;
        headers.bth.solicited = u.arbitrary()?;
        headers.bth.pkey = match u.int_in_range(0..=3)? {
            0 => DEFAULT_PKEY,
            1 => u.arbitrary()?,
            _ => tenant_pkey("t"),
        };
        complete(u, &mut headers, to)?;
        let mut payload = payload(u)?;
        if opcode.has_deth() && u.arbitrary()? {
            // The addresses that stand in front of a router's datagram.
            let mut front = vec![0; 40];
            front[20] = 0x45;
            front[32..36].copy_from_slice(&[10, 0, 1, 1]);
            front[36..].copy_from_slice(&[10, 0, 0, 1]);
            front.extend(payload);
            payload = front;
        }
        let from = sender(u)?;
        let to = if u.ratio(1, 8)? { THERE } else { HERE };
        Ok(Packet {
            from,
            to,
            ecn: Ecn::from_tos(u.arbitrary()?),
            bytes: packet(&headers, &payload, from, to),
        })
    }

    /// The network is good again: messages on new connections arrive.
    fn heals(&mut self) {
        self.exchange();
        let [here, there] = &mut self.hosts;
        let [a, b] = &mut self.parties;
        while a.poll().is_some() {}
        while b.poll().is_some() {}
        let (x, y) = connect(here, a, None, there, b, QpType::Rc);
        let into = b.sge(0, 4096);
        b.recv(y, 77, &[into]);
        let entry = SendEntry {
            wr_id: 78,
            opcode: Opcode::Send.raw() as u8,
            num_sge: 1,
            ..SendEntry::default()
        };
        let sge = a.sge(0, 4096);
        a.send(x, &entry, &[sge], b"");
        self.exchange();
        for (party, wr_id) in self.parties.iter_mut().zip([78, 77]) {
            let done = std::iter::from_fn(|| party.poll()).find(|c| c.wr_id == wr_id);
            assert_eq!(done.map(|c| c.status), Some(0), "an honest message");
        }
    }
}

/// Connects new queue pairs of two parties on two hosts; the first's receives may be of a shared
/// queue.
fn connect(
    here: &mut Host,
    a: &mut Party,
    srq: Option<freeflow_session::Handle>,
    there: &mut Host,
    b: &mut Party,
    qp_type: QpType,
) -> (usize, usize) {
    let (x, y) = (a.qp(here, qp_type, srq), b.qp(there, qp_type, None));
    a.connect(here, x, b.gid(), number(b, y));
    b.connect(there, y, a.gid(), number(a, x));
    (x, y)
}

fn opcode(u: &mut Unstructured<'_>) -> Result<BthOpcode> {
    let known: Vec<_> = (0..=255).map(BthOpcode).filter(|o| o.is_known()).collect();
    u.choose(&known).copied()
}

/// Near what is due, for all connections begin at 0.
fn psn(u: &mut Unstructured<'_>) -> Result<Psn> {
    Ok(Psn::new(match u.int_in_range(0..=3)? {
        0 => u.arbitrary()?,
        1 => u.int_in_range(0..=8u32)?.wrapping_neg(),
        _ => u.int_in_range(0..=16)?,
    }))
}

fn sender(u: &mut Unstructured<'_>) -> Result<SocketAddr> {
    let ip = *u.choose(&[THERE, THERE, STRANGER, STOCK, HERE])?;
    Ok(SocketAddr::new(ip, u.arbitrary()?))
}

/// Adds the headers that the opcode has.
fn complete(u: &mut Unstructured<'_>, h: &mut Headers, to: &Party) -> Result<()> {
    let opcode = h.bth.opcode;
    let rkey = if u.ratio(1, 4)? {
        u.arbitrary()?
    } else {
        to.key
    };
    let va = match u.int_in_range(0..=3)? {
        0 => u.arbitrary()?,
        1 => IOVA + PAGES - u.int_in_range(0..=8)?,
        _ => IOVA + 8 * u.int_in_range(0..=8)?,
    };
    let low = |word: u32| word & 0xFF_FFFF;
    if opcode.has_xrc_srq() {
        h.xrc_srq = Some(low(u.arbitrary()?));
    }
    if opcode.has_deth() {
        let qkey = if u.ratio(1, 4)? { u.arbitrary()? } else { QKEY };
        let src_qp = low(u.arbitrary()?);
        h.deth = Some(Deth { qkey, src_qp });
    }
    if opcode.has_feth() {
        h.feth = Some(Feth(u.int_in_range(0..=0x3F)?));
    }
    if opcode.has_reth() {
        let len = match u.int_in_range(0..=3)? {
            0 => u.arbitrary()?,
            _ => u.int_in_range(0..=8192)?,
        };
        h.reth = Some(Reth { va, rkey, len });
    }
    if opcode.has_atomic() {
        h.atomic = Some(AtomicEth {
            va,
            rkey,
            swap_add: u.arbitrary()?,
            compare: u.arbitrary()?,
        });
    }
    if opcode.has_aeth() {
        h.aeth = Some(Aeth {
            syndrome: Syndrome::from_byte(u.arbitrary()?),
            msn: u.int_in_range(0..=16)?,
        });
    }
    if opcode.has_atomic_ack() {
        h.atomic_ack = Some(u.arbitrary()?);
    }
    if opcode.has_imm() {
        h.imm = Some(u.arbitrary()?);
    }
    if opcode.has_ieth() {
        h.ieth = Some(rkey);
    }
    Ok(())
}

fn payload(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let len = match u.int_in_range(0..=4)? {
        0 => 0,
        1 => 1024,
        2 => u.int_in_range(0..=9000)?,
        _ => u.int_in_range(0..=64)?,
    };
    Ok(vec![0xEE; len])
}

/// Changes a packet, and mostly makes its CRC right again.
fn change(u: &mut Unstructured<'_>, old: Packet) -> Result<Packet> {
    let mut new = old;
    if u.ratio(1, 3)? {
        new.from = sender(u)?;
    }
    if u.ratio(1, 8)? {
        new.to = if new.to == HERE { THERE } else { HERE };
    }
    new.ecn = Ecn::from_tos(u.arbitrary()?);
    let end = new.bytes.len().saturating_sub(ICRC_BYTES);
    new.bytes.truncate(end);
    match u.int_in_range(0..=5)? {
        // A byte of the headers.
        0 | 1 if end != 0 => {
            let at = u.int_in_range(0..=end.min(44) - 1)?;
            if let Some(byte) = new.bytes.get_mut(at) {
                *byte = u.arbitrary()?;
            }
        }
        2 => new.bytes.truncate(u.int_in_range(0..=end)?),
        3 => new.bytes.resize(end + u.int_in_range(0..=2000)?, 0xDD),
        _ => {
            if let Ok((mut headers, payload)) = Headers::parse(&new.bytes) {
                let payload = new.bytes.get(payload).unwrap_or_default().to_vec();
                let by: u32 = match u.int_in_range(0..=2)? {
                    0 => u.arbitrary()?,
                    1 => u.int_in_range(1..=300)?,
                    _ => u.int_in_range(1..=300u32)?.wrapping_neg(),
                };
                headers.bth.psn = Psn::new(headers.bth.psn.get().wrapping_add(by));
                new.bytes = packet(&headers, &payload, new.from, new.to);
                return Ok(new);
            }
        }
    }
    let ip_id = if u.ratio(1, 8)? { u.arbitrary()? } else { 0 };
    let right = !u.ratio(1, 8)?;
    let sealed = seal(new.from, new.to, new.bytes, ip_id);
    new.bytes = sealed;
    if !right && let Some(last) = new.bytes.last_mut() {
        *last ^= 1;
    }
    Ok(new)
}

fn packet(headers: &Headers, payload: &[u8], from: SocketAddr, to: IpAddr) -> Vec<u8> {
    let headers = headers.with_payload(payload.len());
    let mut bytes = vec![0; headers.len()];
    headers.emit(&mut bytes).expect("headers of their opcode");
    bytes.extend(payload);
    bytes.resize(bytes.len() + usize::from(headers.bth.pad), 0);
    seal(from, to, bytes, 0)
}

/// Adds the CRC.
fn seal(from: SocketAddr, to: IpAddr, mut bytes: Vec<u8>, ip_id: u16) -> Vec<u8> {
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (from.ip(), to) else {
        return bytes;
    };
    let flow = Flow {
        addresses: Addresses::V4 { src, dst },
        src_port: from.port(),
    };
    let crc = icrc(&flow, ip_id, &bytes);
    bytes.extend(crc);
    bytes
}
