//! Messages of other managers.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use freeflow_session::{CmDetail, CmEventType, Handle, PortSpace};
use freeflow_types::{Gid, QpType};
use freeflow_wire::cm::{
    CmError, Drep, IpCm, Mad, Message, Rej, Rejected, Rep, Req, SidrRep, SidrReq, port_of,
};

use crate::connection::{State, emit};
use crate::handshake::{self, ece};
use crate::id::{Event, Id, IdState, Port, gid};
use crate::manager::{Arrival, Manager, Output, remote_key};

/// Makes an id for a request to a listener: its handle and 64 random bits; none if there can be
/// no more.
pub type NewId<'a> = dyn FnMut(Handle) -> Option<(Handle, u64)> + 'a;

/// A request for a connection or a datagram service, as far as both are the same.
struct Asked<'a> {
    service_id: u64,
    private: &'a [u8],
    qp_type: Option<QpType>,
}

/// What becomes of a request.
enum Found {
    /// A listener takes it.
    Listener {
        listener: u32,
        port: Port,
        addresses: IpCm,
        number: u16,
    },
    /// Nobody listens there.
    Nobody,
    /// Who listens there does not take such requests.
    Unfit,
    /// Too many wait.
    Full,
}

impl Manager {
    /// A datagram has come. `new_id` makes an id for a request that a listener takes.
    pub fn receive(
        &mut self,
        now: u64,
        arrival: &Arrival,
        mad: &[u8],
        new_id: &mut NewId<'_>,
    ) -> Result<(), CmError> {
        let mad = Mad::parse(mad)?;
        match &mad.message {
            Message::Req(req) => self.on_req(now, arrival, &mad, req, new_id),
            Message::SidrReq(req) => self.on_sidr_req(now, arrival, &mad, req, new_id),
            Message::Rep(rep) => {
                if !self.pass(now, arrival, rep.remote_id, &mad) {
                    self.reject_reply(arrival, mad.transaction, rep);
                }
            }
            Message::Rej(rej) => {
                let waited = rej.reason == Rej::TIMEOUT && rej.remote_id == 0;
                if waited {
                    // Who gave up waiting does not know the name that the connection has here.
                    if let Some(local) = self.asked_before(arrival, false, rej.local_id) {
                        self.with(local, |c, out| c.on_message(now, &mad, out));
                    }
                } else {
                    self.pass(now, arrival, rej.remote_id, &mad);
                }
            }
            Message::Dreq(dreq) => {
                // What is not known any more has ended, and that is the answer.
                if !self.pass(now, arrival, dreq.remote_id, &mad) {
                    let drep = Drep::new(dreq.remote_id, dreq.local_id);
                    self.answer(arrival, mad.transaction, Message::Drep(drep));
                }
            }
            Message::Rtu(rtu) => {
                self.pass(now, arrival, rtu.remote_id, &mad);
            }
            Message::Mra(mra) => {
                self.pass(now, arrival, mra.remote_id, &mad);
            }
            Message::Drep(drep) => {
                self.pass(now, arrival, drep.remote_id, &mad);
            }
            Message::SidrRep(rep) => {
                self.pass(now, arrival, rep.request_id, &mad);
            }
        }
        Ok(())
    }

    /// Gives a message to the connection that it names; false if that is not known, or not one
    /// with the message's sender.
    fn pass(&mut self, now: u64, arrival: &Arrival, local: u32, mad: &Mad) -> bool {
        let Some(c) = self.connections.get(&local) else {
            return false;
        };
        let here = |port: &Port| port.endpoint == c.port.endpoint && port.index == c.port.index;
        let sidr = matches!(mad.message, Message::SidrRep(_));
        if c.peer != arrival.source || !arrival.ports.iter().any(here) || sidr != c.is_datagram() {
            return false;
        }
        // A message that is late may be of an end that the other side had before.
        let named = match &mad.message {
            Message::Rtu(m) => Some(m.local_id),
            Message::Dreq(m) => Some(m.local_id),
            Message::Drep(m) => Some(m.local_id),
            Message::Rej(m) if c.remote != 0 && m.local_id != 0 => Some(m.local_id),
            _ => None,
        };
        if named.is_some_and(|name| name != c.remote) {
            return false;
        }
        self.with(local, |c, out| c.on_message(now, mad, out));
        true
    }

    /// The connection of a request that came before.
    fn asked_before(&self, arrival: &Arrival, datagram: bool, name: u32) -> Option<u32> {
        let of = |port| {
            let key = remote_key(port, arrival.source, datagram, name);
            self.by_remote.get(&key).copied()
        };
        arrival.ports.iter().find_map(of)
    }

    fn answer(&mut self, arrival: &Arrival, transaction: u64, message: Message) {
        if let (Some(&from), Some(mad)) = (arrival.ports.first(), emit(transaction, 0, message)) {
            let to = arrival.source;
            self.out.push(Output::Send { from, to, mad });
        }
    }

    fn refuse(&mut self, arrival: &Arrival, mad: &Mad, name: u32, reason: u16) {
        let rej = Rej::new(0, name, Rejected::Req, reason);
        self.answer(arrival, mad.transaction, Message::Rej(rej));
    }

    /// A reply to a connection that is not there any more.
    fn reject_reply(&mut self, arrival: &Arrival, transaction: u64, rep: &Rep) {
        let (local, remote) = (rep.remote_id, rep.local_id);
        let rej = Rej::new(local, remote, Rejected::Rep, Rej::INVALID_COMM_ID);
        self.answer(arrival, transaction, Message::Rej(rej));
    }

    fn find(&self, arrival: &Arrival, asked: &Asked<'_>) -> Found {
        let Some((space, number)) = port_of(asked.service_id) else {
            return Found::Nobody;
        };
        let space = match space {
            freeflow_wire::cm::PortSpace::Ipoib => PortSpace::Ipoib,
            freeflow_wire::cm::PortSpace::Tcp => PortSpace::Tcp,
            freeflow_wire::cm::PortSpace::Udp => PortSpace::Udp,
            freeflow_wire::cm::PortSpace::Ib => PortSpace::Ib,
        };
        let addresses = IpCm::parse(asked.private).ok();
        let mut found = Found::Nobody;
        for port in &arrival.ports {
            // Whoever names no address, or another one, means the port's.
            let own = Ipv6Addr::from(port.gid.0).to_canonical();
            let to = addresses.map(|a| a.dst).filter(|&ip| gid(ip) == port.gid);
            let owners = self.ports.owners(port.endpoint, space, number);
            for listener in owners {
                let Some(id) = self.ids.get(listener) else {
                    continue;
                };
                if id.state != IdState::Listening || !id.takes(port, to.unwrap_or(own)) {
                    continue;
                }
                let Some(addresses) = addresses else {
                    found = Found::Unfit;
                    continue;
                };
                if asked.qp_type != Some(id.qp_type) {
                    found = Found::Unfit;
                    continue;
                }
                if id.backlog == 0 {
                    return Found::Full;
                }
                return Found::Listener {
                    listener: *listener,
                    port: *port,
                    addresses: IpCm {
                        dst: to.unwrap_or(own),
                        ..addresses
                    },
                    number,
                };
            }
        }
        found
    }

    fn on_req(
        &mut self,
        now: u64,
        arrival: &Arrival,
        mad: &Mad,
        req: &Req,
        new_id: &mut NewId<'_>,
    ) {
        if let Some(local) = self.asked_before(arrival, false, req.local_id) {
            return self.with(local, |c, out| c.on_message(now, mad, out));
        }
        // One queue pair is in one connection: of an older one the other side knows nothing any
        // more, or it would not ask.
        let stale = |port| {
            self.by_qp
                .get(&remote_key(port, arrival.source, false, req.qpn))
        };
        if let Some(&local) = arrival.ports.iter().find_map(stale) {
            self.refuse(arrival, mad, req.local_id, Rej::STALE_CONNECTION);
            return self.disconnect_connection(now, local);
        }
        let asked = Asked {
            service_id: req.service_id,
            private: &req.private,
            qp_type: handshake::qp_type_of(req),
        };
        let (listener, port, addresses, number) = match self.find(arrival, &asked) {
            Found::Listener {
                listener,
                port,
                addresses,
                number,
            } => (listener, port, addresses, number),
            Found::Nobody => {
                return self.refuse(arrival, mad, req.local_id, Rej::INVALID_SERVICE_ID);
            }
            Found::Unfit => return self.refuse(arrival, mad, req.local_id, Rej::CONSUMER),
            // It will be asked again.
            Found::Full => return,
        };
        let Some((handle, entropy)) = new_id(Handle(listener)) else {
            return;
        };
        let qp_type = asked.qp_type.unwrap_or(QpType::Rc);
        let local = self.free_name(entropy);
        let mut id = self.new_peer(listener, &port, &addresses, number, arrival.source, entropy);
        id.qp_type = qp_type;
        id.tos = req.primary.traffic_class;
        id.connection = Some(local);
        let names = (local, handle.0, id.psn());
        let ends = (port, arrival.source);
        let (connection, detail) = handshake::requested(names, ends, req, qp_type, mad.transaction);
        self.ids.insert(handle.0, id);
        self.insert(connection);
        let private = req.private.get(IpCm::BYTES..).unwrap_or_default().to_vec();
        let ece = ece(req.vendor_id, mad.modifier);
        self.request(listener, handle, detail, private, ece);
    }

    fn on_sidr_req(
        &mut self,
        now: u64,
        arrival: &Arrival,
        mad: &Mad,
        req: &SidrReq,
        new_id: &mut NewId<'_>,
    ) {
        if let Some(local) = self.asked_before(arrival, true, req.request_id) {
            return self.with(local, |c, out| c.on_message(now, mad, out));
        }
        let asked = Asked {
            service_id: req.service_id,
            private: &req.private,
            qp_type: Some(QpType::Ud),
        };
        let (listener, port, addresses, number) = match self.find(arrival, &asked) {
            Found::Listener {
                listener,
                port,
                addresses,
                number,
            } => (listener, port, addresses, number),
            Found::Full => return,
            found => {
                let status = match found {
                    Found::Unfit => SidrRep::REJECTED,
                    _ => SidrRep::UNSUPPORTED,
                };
                let rep = SidrRep::without_qp(req, status);
                return self.answer(arrival, mad.transaction, Message::SidrRep(rep));
            }
        };
        let Some((handle, entropy)) = new_id(Handle(listener)) else {
            return;
        };
        let local = self.free_name(entropy);
        let mut id = self.new_peer(listener, &port, &addresses, number, arrival.source, entropy);
        id.qp_type = QpType::Ud;
        id.connection = Some(local);
        let ends = (port, arrival.source);
        let connection = handshake::looked_up((local, handle.0), ends, req, mad.transaction);
        self.ids.insert(handle.0, id);
        self.insert(connection);
        let detail = CmDetail::Datagram {
            qpn: freeflow_types::Qpn::default(),
            qkey: 0,
            gid: arrival.source,
            sgid_index: port.index,
            cookie: 0,
        };
        let private = req.private.get(IpCm::BYTES..).unwrap_or_default().to_vec();
        self.request(listener, handle, detail, private, None);
    }

    /// The id of a request.
    fn new_peer(
        &self,
        listener: u32,
        port: &Port,
        addresses: &IpCm,
        number: u16,
        source: Gid,
        entropy: u64,
    ) -> Id {
        let space = self.ids.get(&listener).map_or(PortSpace::Ib, |l| l.space);
        let mut id = Id::new(port.endpoint, space, QpType::Rc, entropy);
        id.state = IdState::Connect;
        id.src = SocketAddr::new(addresses.dst, number);
        // What it says of itself counts only if it is true.
        let from = if gid(addresses.src) == source {
            addresses.src
        } else {
            IpAddr::V6(source.0.into()).to_canonical()
        };
        id.dst = Some(SocketAddr::new(from, addresses.src_port));
        (id.port, id.dgid) = (Some(*port), Some(source));
        id.silent = true;
        id
    }

    fn request(
        &mut self,
        listener: u32,
        new_id: Handle,
        detail: CmDetail,
        private_data: Vec<u8>,
        ece: Option<(u32, u32)>,
    ) {
        if let Some(id) = self.ids.get_mut(&listener) {
            id.backlog = id.backlog.saturating_sub(1);
        }
        let event = Event {
            new_id: Some(new_id),
            detail,
            private_data,
            ece,
            ..Event::new(CmEventType::ConnectRequest, 0)
        };
        self.tell(listener, event);
    }

    /// Begins to disconnect, if it is connected.
    pub(crate) fn disconnect_connection(&mut self, now: u64, local: u32) {
        self.with(local, |c, out| {
            if c.state == State::Established {
                c.begin_disconnect(now, out);
            }
            None
        });
    }
}
