//! Messages of the connection manager: a manager with some ids, and datagrams from another one
//! that are made up, or are its own answers, changed.

use std::net::{IpAddr, Ipv4Addr};

use arbitrary::{Result, Unstructured};
use freeflow_cm::{Arrival, Manager, Output, Port};
use freeflow_session::{CmRequest, Handle, PortSpace};
use freeflow_types::{Gid, Mtu, QpType, VirtualIp};
use freeflow_wire::cm::{MAD_BYTES, Mad};

use crate::ids;

const STEPS: usize = 128;
/// Ids that may be.
const MAX_IDS: u32 = 64;
/// No state lasts that long, in nanoseconds.
const FOR_EVER: u64 = 86_400_000_000_000;

struct World {
    manager: Manager,
    ports: [Port; 2],
    ids: u32,
    now: u64,
    /// Messages that have been sent.
    sent: Vec<(usize, Vec<u8>)>,
}

fn ip(n: usize) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, n as u8 + 1).into()
}

/// Bytes as requests, datagrams and time. What is understood is what would have been said; each
/// datagram has few consequences; and when all ids are gone, so is everything else, in the end.
pub fn manager(data: &[u8]) {
    let port = |n: usize| Port {
        endpoint: Handle(n as u32 + 1),
        gid: Gid::from(VirtualIp(ip(n))),
        index: 0,
        mtu: Mtu::B1024,
        guid: n as u64,
    };
    let mut world = World {
        manager: Manager::new(16),
        ports: [port(0), port(1)],
        ids: 0,
        now: 0,
        sent: Vec::new(),
    };
    let mut input = Unstructured::new(data);
    let program = world.run(&mut input);
    // The input may end anywhere.
    let _ = program;
    for id in 1..=world.ids {
        world.manager.destroy(world.now, Handle(id));
        world.manager.take_output();
    }
    while let Some(due) = world.manager.next_timeout() {
        assert!(due < world.now + FOR_EVER, "something waits for ever");
        world.manager.on_timeout(due);
        world.manager.take_output();
    }
    assert_eq!(world.manager.connections(), 0);
}

impl World {
    fn run(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        // Somebody listens, so that there is something to ask for.
        self.create(u, 0)?;
        let to = (ip(0), 1).into();
        let listening = self.manager.bind(Handle(1), to, Some(self.ports[0]));
        assert_eq!(listening, Ok(()));
        assert_eq!(self.manager.listen(Handle(1), 0), Ok(()));
        for _ in 0..STEPS {
            if u.is_empty() {
                return Ok(());
            }
            match u.int_in_range(0..=9)? {
                0 => self.later(u)?,
                1 => self.made_up(u)?,
                2 | 3 => self.again(u)?,
                4 if self.ids < MAX_IDS => self.create(u, 1)?,
                _ => self.ask(u)?,
            }
            self.collect();
        }
        Ok(())
    }

    fn collect(&mut self) {
        for output in self.manager.take_output() {
            if let Output::Send { from, mad, .. } = output {
                let again = Mad::parse(&mad).expect("a message").emit();
                assert_eq!(again.expect("a datagram")[..], mad[..]);
                let side = usize::from(from.endpoint == self.ports[1].endpoint);
                self.sent.push((side, mad));
            }
        }
    }

    fn create(&mut self, u: &mut Unstructured<'_>, side: usize) -> Result<()> {
        self.ids += 1;
        let entropy = u.arbitrary()?;
        let endpoint = self.ports[side].endpoint;
        let (space, qp_type) = (PortSpace::Tcp, QpType::Rc);
        self.manager
            .create(Handle(self.ids), endpoint, space, qp_type, entropy);
        Ok(())
    }

    fn later(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let most = if u.ratio(1, 4)? { 100_000 } else { 7000 };
        self.now += u.int_in_range(0..=most)? * 1_000_000;
        self.manager.on_timeout(self.now);
        Ok(())
    }

    fn give(&mut self, to: usize, mad: &[u8]) {
        let arrival = Arrival {
            ports: vec![self.ports[to]],
            source: self.ports[1 - to].gid,
        };
        let ids = &mut self.ids;
        let new_id = &mut |_| {
            *ids += 1;
            (*ids <= MAX_IDS).then_some((Handle(*ids), u64::from(*ids) << 33))
        };
        if self
            .manager
            .receive(self.now, &arrival, mad, new_id)
            .is_err()
        {
            assert!(self.manager.take_output().is_empty());
        }
        let output = self.manager.take_output();
        assert!(output.len() <= 3, "{output:?}");
        for one in output {
            if let Output::Send { mad, .. } = one {
                self.sent.push((to, mad));
            }
        }
    }

    /// A datagram with a header that is right, most likely.
    fn made_up(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let mut mad = [0; MAD_BYTES];
        u.fill_buffer(&mut mad)?;
        if u.ratio(7, 8)? {
            mad[..4].copy_from_slice(&[1, 7, 2, 3]);
            mad[16] = 0;
            mad[17] = u.int_in_range(0x10..=0x1A)?;
        }
        let to = u.int_in_range(0..=1)?;
        self.give(to, &mad);
        Ok(())
    }

    /// A message that was sent, to the other side or back, as it was or with a few bytes changed.
    fn again(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        if self.sent.is_empty() {
            return Ok(());
        }
        let at = u.int_in_range(0..=self.sent.len() - 1)?;
        let (from, mut mad) = self.sent[at].clone();
        for _ in 0..u.int_in_range(0..=2)? {
            let at = u.int_in_range(0..=mad.len() - 1)?;
            mad[at] = u.arbitrary()?;
        }
        let back = u.ratio(1, 16)?;
        self.give(if back { from } else { 1 - from }, &mad);
        Ok(())
    }

    /// Something that a program asks for.
    fn ask(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let most = self.ids;
        let any = |u: &mut Unstructured<'_>| Ok(Handle(u.int_in_range(1..=most)?));
        let request = ids::request(u, &[ip(0), ip(1)], any)?;
        let (now, m) = (self.now, &mut self.manager);
        // Whatever it is refused for.
        let _ = match request {
            CmRequest::DestroyId { id } if id != Handle(1) => {
                m.destroy(now, id);
                Ok(())
            }
            CmRequest::ResolveAddr { id, dst, .. } => {
                let way = Ok((self.ports[1], ip(1)));
                m.resolve_addr(id, (None, None), dst, way)
            }
            CmRequest::ResolveRoute { id, .. } => m.resolve_route(id),
            CmRequest::Connect { id, param } => m.connect(now, now, id, &param),
            CmRequest::Accept { id, param, .. } => m.accept(now, id, param.as_ref()),
            CmRequest::Reject { id, for_ece, .. } => m.reject(now, id, &[], for_ece),
            CmRequest::Disconnect { id, .. } => m.disconnect(now, id),
            CmRequest::Notify { id, event } => m.notify(id, event),
            CmRequest::SetOption { id, option } => m.set_option(id, option),
            CmRequest::InitQpAttr { id, state } => m.init_qp_attr(id, state).map(|_| ()),
            _ => Ok(()),
        };
        Ok(())
    }
}
