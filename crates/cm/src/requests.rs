//! What programs ask for. Each request is refused in the states in which Linux refuses it.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use freeflow_session::{CmDetail, CmEventType, CmOption, CmParam, CmQpAttr, Handle, PortSpace};
use freeflow_types::{AsyncEventType, Gid, QpState, QpType, Qpn};
use freeflow_wire::cm::{IpCm, Rej, SidrRep, service_id};

use crate::connection::{Connection, MAX_RETRIES, RESPONSE_TIMEOUT, State, timeout_ns};
use crate::error::Refused;
use crate::handshake::Begin;
use crate::id::{Event, Id, IdState, Port, UDP_QKEY, gid, is_any};
use crate::manager::{Manager, Output};

/// Requests that may wait at a listener (Linux: `max_backlog` of `rdma_ucm`).
const MAX_BACKLOG: u32 = 1024;

/// As many READs and atomics as the device does.
const DEVICE_MAXIMUM: u8 = 0xFF;

/// Reason of a rejection: the vendor's enhancements do not fit (IBTA volume 1, 12.6.7.2).
const VENDOR_OPTION: u16 = 35;

impl Connection {
    pub(crate) fn begin_disconnect(&mut self, now: u64, out: &mut Vec<Output>) {
        self.state = State::DreqSent;
        self.transaction = u64::from(self.local) | 1 << 32;
        self.retries = MAX_RETRIES;
        self.interval = timeout_ns(RESPONSE_TIMEOUT);
        let dreq = self.dreq();
        self.send_until_answered((now, now), (dreq, 0), out);
    }

    /// Its id is gone: the other side is told, in whatever way the state has for that.
    fn abandon(&mut self, now: u64, service: u64, out: &mut Vec<Output>) {
        let reason = match self.state {
            State::ReqSent => Rej::TIMEOUT,
            State::ReqRcvd | State::RepSent | State::RepRcvd => Rej::CONSUMER,
            State::Established => return self.begin_disconnect(now, out),
            State::DreqRcvd => {
                let drep = self.drep();
                self.send(drep, out);
                return self.enter_time_wait(now);
            }
            // The other side has still to be told, or may still ask.
            State::DreqSent | State::TimeWait => return,
            State::SidrReqRcvd => {
                if let Ok(rep) = self.sidr_rep(service, SidrRep::REJECTED, (0, 0), &[]) {
                    self.send(rep, out);
                }
                self.state = State::SidrAnswered;
                return self.keep_answer(now);
            }
            State::SidrAnswered => return self.keep_answer(now),
            State::SidrReqSent | State::Closed => return self.close(),
        };
        if let Ok(rej) = self.rej(reason, &[]) {
            self.send(rej, out);
        }
        self.wait_out(now);
    }

    fn keep_answer(&mut self, now: u64) {
        self.deadline = Some(now.saturating_add(timeout_ns(RESPONSE_TIMEOUT)));
    }
}

impl Manager {
    /// Creates an id; `entropy` is 64 random bits.
    pub fn create(
        &mut self,
        id: Handle,
        endpoint: Handle,
        space: PortSpace,
        qp_type: QpType,
        entropy: u64,
    ) {
        let new = Id::new(endpoint, space, qp_type, entropy);
        self.ids.insert(id.0, new);
    }

    /// Destroys an id; the other side of its connection is told.
    pub fn destroy(&mut self, now: u64, id: Handle) {
        let Some(old) = self.ids.remove(&id.0) else {
            return;
        };
        self.ports.release(id.0, &old);
        if let Some(local) = old.connection {
            let service = own_service(&old);
            if let Some(c) = self.connections.get_mut(&local) {
                c.abandon(now, service, &mut self.out);
            }
            self.leave_behind(local);
        }
    }

    /// Gives an id an address, on the port that has it: none if that is no address of the
    /// endpoint's, or means any (see [`is_any`]).
    pub fn bind(
        &mut self,
        id: Handle,
        addr: SocketAddr,
        port: Option<Port>,
    ) -> Result<(), Refused> {
        let old = self.id(id)?;
        if old.state != IdState::Idle {
            return Err(Refused::State);
        }
        let mut new = old.clone();
        new.src = addr;
        if !is_any(addr.ip()) {
            new.port = Some(port.ok_or(Refused::NoDevice)?);
        }
        if !new.afonly_set {
            new.afonly = addr.is_ipv4();
        }
        self.ports.bind(&self.ids, id.0, &mut new)?;
        new.state = IdState::Bound;
        self.ids.insert(id.0, new);
        Ok(())
    }

    /// Finds the way to an address: `way` is the port that leads there with this side's address
    /// on it, or the status of its not being found. An id that is not bound is bound first, to
    /// `src`, which is on `own`, or to any address of the destination's family.
    pub fn resolve_addr(
        &mut self,
        id: Handle,
        (src, own): (Option<SocketAddr>, Option<Port>),
        dst: SocketAddr,
        way: Result<(Port, std::net::IpAddr), i32>,
    ) -> Result<(), Refused> {
        if self.id(id)?.state == IdState::Idle {
            let any = match dst {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            self.bind(id, src.unwrap_or(SocketAddr::new(any, 0)), own)?;
        }
        let i = self.id_mut(id)?;
        if i.src.is_ipv4() != dst.is_ipv4() {
            return Err(Refused::Families);
        }
        if i.state != IdState::Bound {
            return Err(Refused::State);
        }
        let event = match way {
            Ok((port, ip)) => {
                i.state = IdState::AddrResolved;
                i.src.set_ip(ip);
                i.dst = Some(dst);
                let dgid = match is_any(dst.ip()) {
                    true => port.gid,
                    false => gid(dst.ip()),
                };
                (i.port, i.dgid) = (Some(port), Some(dgid));
                Event::new(CmEventType::AddrResolved, 0)
            }
            Err(status) => Event::new(CmEventType::AddrError, status),
        };
        self.tell(id.0, event);
        Ok(())
    }

    /// Finds the route: there is one.
    pub fn resolve_route(&mut self, id: Handle) -> Result<(), Refused> {
        let i = self.id_mut(id)?;
        if i.state != IdState::AddrResolved {
            return Err(Refused::State);
        }
        i.state = IdState::RouteResolved;
        self.tell(id.0, Event::new(CmEventType::RouteResolved, 0));
        Ok(())
    }

    /// Has an id listen, with at most `backlog` requests that wait to be taken; 0: as many as
    /// there may be.
    pub fn listen(&mut self, id: Handle, backlog: u32) -> Result<(), Refused> {
        if self.id(id)?.state == IdState::Idle {
            let any = (Ipv4Addr::UNSPECIFIED, 0).into();
            self.bind(id, any, None)?;
        }
        let i = self.id(id)?;
        if i.state != IdState::Bound {
            return Err(Refused::State);
        }
        if i.reuse {
            self.ports.may_listen(&self.ids, id.0, i)?;
        }
        let i = self.id_mut(id)?;
        i.state = IdState::Listening;
        i.backlog = match backlog {
            0 => MAX_BACKLOG,
            some => some.min(MAX_BACKLOG),
        };
        Ok(())
    }

    /// The program has taken a request out of a listener's events.
    pub fn request_taken(&mut self, listener: Handle) {
        if let Ok(i) = self.id_mut(listener) {
            i.backlog = i.backlog.saturating_add(1).min(MAX_BACKLOG);
        }
    }

    /// Connects, or looks a datagram service up; the first message goes at `at`.
    pub fn connect(
        &mut self,
        now: u64,
        at: u64,
        id: Handle,
        param: &CmParam,
    ) -> Result<(), Refused> {
        let depths = self.depths(param, (DEVICE_MAXIMUM, DEVICE_MAXIMUM))?;
        let i = self.id(id)?;
        let (Some(port), Some(peer), Some(dst)) = (i.port, i.dgid, i.dst) else {
            return Err(Refused::State);
        };
        if i.state != IdState::RouteResolved {
            return Err(Refused::State);
        }
        let addresses = IpCm {
            src_port: i.src.port(),
            src: i.src.ip(),
            dst: dst.ip(),
        };
        let begin = Begin {
            local: self.free_name(i.entropy),
            id: id.0,
            port,
            peer,
            service_id: service_id(wire_space(i.space), dst.port()),
            addresses: &addresses,
            psn: i.psn(),
            traffic_class: i.tos,
            ack_timeout: i.ack_timeout,
        };
        let (mut connection, message) = if i.is_datagram() {
            begin.look_up(&param.private_data)?
        } else {
            begin.connect(i.qp_type, param, depths)?
        };
        let modifier = param.ece.map_or(0, |(_, options)| options);
        connection.send_until_answered((now, at), (message, modifier), &mut self.out);
        let i = self.id_mut(id)?;
        i.state = IdState::Connect;
        i.connection = Some(connection.local);
        self.insert(connection);
        Ok(())
    }

    /// READs and atomics that a program takes and has under way.
    fn depths(&self, param: &CmParam, most: (u8, u8)) -> Result<(u8, u8), Refused> {
        let limit = self.max_rd_atomic;
        let one = |what, asked: u8, most: u8| match asked {
            DEVICE_MAXIMUM => Ok(most.min(limit)),
            some if some > limit => Err(Refused::Bounds {
                what,
                value: some.into(),
                limit: limit.into(),
            }),
            some => Ok(some),
        };
        Ok((
            one("responder_resources", param.responder_resources, most.0)?,
            one("initiator_depth", param.initiator_depth, most.1)?,
        ))
    }

    /// Accepts a request, or a reply to an own one.
    pub fn accept(&mut self, now: u64, id: Handle, param: Option<&CmParam>) -> Result<(), Refused> {
        let i = self.id(id)?;
        if i.state != IdState::Connect {
            return Err(Refused::State);
        }
        let local = i.connection.ok_or(Refused::State)?;
        let accepted = match param {
            _ if i.is_datagram() => self.accept_datagrams(id, local, param),
            Some(param) => self.accept_request(now, local, param),
            None => self.accept_reply(local),
        };
        if accepted.is_err() {
            // As Linux has it: who cannot accept rejects, if there is still somebody to reject.
            let _ = self.reject(now, id, &[], false);
        } else if let Ok(i) = self.id_mut(id) {
            i.silent = false;
        }
        accepted
    }

    fn accept_request(&mut self, now: u64, local: u32, param: &CmParam) -> Result<(), Refused> {
        let c = self.connections.get(&local).ok_or(Refused::State)?;
        if c.state != State::ReqRcvd {
            return Err(Refused::State);
        }
        let asked = (c.agreed.responder_resources, c.agreed.initiator_depth);
        let depths = self.depths(param, asked)?;
        let rep = c.rep(&param.qp, param, depths)?;
        let modifier = param.ece.map_or(0, |(_, options)| options);
        self.with(local, |c, out| {
            c.state = State::RepSent;
            c.local_qpn = param.qp.qpn.get();
            (c.agreed.responder_resources, c.agreed.initiator_depth) = depths;
            c.send_until_answered((now, now), (rep, modifier), out);
            None
        });
        Ok(())
    }

    fn accept_reply(&mut self, local: u32) -> Result<(), Refused> {
        let c = self.connections.get(&local).ok_or(Refused::State)?;
        if c.state != State::RepRcvd {
            return Err(Refused::State);
        }
        self.with(local, |c, out| {
            c.state = State::Established;
            let rtu = c.rtu();
            c.send(rtu, out);
            None
        });
        Ok(())
    }

    fn accept_datagrams(
        &mut self,
        id: Handle,
        local: u32,
        param: Option<&CmParam>,
    ) -> Result<(), Refused> {
        let i = self.id_mut(id)?;
        let asked = param.and_then(|p| p.qkey).filter(|&qkey| qkey != 0);
        match (i.qkey, asked) {
            (Some(has), Some(asked)) if has != asked => return Err(Refused::State),
            (_, Some(asked)) => i.qkey = Some(asked),
            (None, None) => i.qkey = Some(UDP_QKEY),
            (Some(_), None) => {}
        }
        let qpn = param.map_or(0, |p| p.qp.qpn.get());
        let to = (qpn, i.qkey());
        let data = param.map_or(&[][..], |p| &p.private_data);
        self.answer_datagrams(id, local, SidrRep::VALID, to, data)
    }

    fn answer_datagrams(
        &mut self,
        id: Handle,
        local: u32,
        status: u8,
        to: (u32, u32),
        data: &[u8],
    ) -> Result<(), Refused> {
        let service = own_service(self.id(id)?);
        let c = self.connections.get(&local).ok_or(Refused::State)?;
        if c.state != State::SidrReqRcvd {
            return Err(Refused::State);
        }
        let rep = c.sidr_rep(service, status, to, data)?;
        self.with(local, |c, out| {
            c.state = State::SidrAnswered;
            c.send(rep, out);
            None
        });
        Ok(())
    }

    /// Rejects a request or a reply, or gives up a request.
    pub fn reject(
        &mut self,
        now: u64,
        id: Handle,
        data: &[u8],
        for_ece: bool,
    ) -> Result<(), Refused> {
        let i = self.id(id)?;
        let local = i.connection.ok_or(Refused::State)?;
        if i.is_datagram() {
            return self.answer_datagrams(id, local, SidrRep::REJECTED, (0, 0), data);
        }
        let c = self.connections.get(&local).ok_or(Refused::State)?;
        let reason = match c.state {
            // The other side does not know yet what is rejected, but by its sender's name.
            State::ReqSent => Rej::TIMEOUT,
            _ if for_ece => VENDOR_OPTION,
            _ => Rej::CONSUMER,
        };
        if !matches!(
            c.state,
            State::ReqSent | State::ReqRcvd | State::RepRcvd | State::RepSent
        ) {
            return Err(Refused::State);
        }
        let rej = c.rej(reason, data)?;
        self.with(local, |c, out| {
            c.send(rej, out);
            c.wait_out(now);
            None
        });
        Ok(())
    }

    /// Disconnects, or answers that the other side did.
    pub fn disconnect(&mut self, now: u64, id: Handle) -> Result<(), Refused> {
        let local = self.id(id)?.connection.ok_or(Refused::State)?;
        self.with(local, |c, out| {
            match c.state {
                State::Established => c.begin_disconnect(now, out),
                State::DreqRcvd => {
                    let drep = c.drep();
                    c.send(drep, out);
                    c.enter_time_wait(now);
                }
                _ => {}
            }
            None
        });
        Ok(())
    }

    /// An event of the id's queue pair: if it has received something, the connection is
    /// established.
    pub fn notify(&mut self, id: Handle, event: AsyncEventType) -> Result<(), Refused> {
        let local = self.id(id)?.connection.ok_or(Refused::State)?;
        let c = self.connections.get(&local).ok_or(Refused::State)?;
        match (event, c.state) {
            (AsyncEventType::CommEst, State::RepSent) => {}
            (AsyncEventType::CommEst, State::Established) => return Err(Refused::Established),
            _ => return Err(Refused::State),
        }
        self.with(local, |c, _| {
            c.state = State::Established;
            c.deadline = None;
            Some(crate::connection::Told::Established)
        });
        Ok(())
    }

    /// Attributes to bring an id's queue pair to a state with.
    pub fn init_qp_attr(&self, id: Handle, state: QpState) -> Result<CmQpAttr, Refused> {
        let i = self.id(id)?;
        let connection = i.connection.and_then(|local| self.connections.get(&local));
        crate::attr::init(i, connection, state)
    }

    /// Sets an option.
    pub fn set_option(&mut self, id: Handle, option: CmOption) -> Result<(), Refused> {
        let i = self.id_mut(id)?;
        match option {
            CmOption::Tos(tos) => i.tos = tos,
            CmOption::ReuseAddr(reuse) => {
                let bound = i.state != IdState::Idle;
                if bound && (!reuse || i.state == IdState::Listening) {
                    return Err(Refused::State);
                }
                i.reuse = reuse;
            }
            CmOption::AfOnly(only) => {
                if !matches!(i.state, IdState::Idle | IdState::Bound) {
                    return Err(Refused::State);
                }
                (i.afonly, i.afonly_set) = (only, true);
            }
            CmOption::AckTimeout(code) => {
                if !matches!(i.qp_type, QpType::Rc | QpType::XrcSend) {
                    return Err(Refused::State);
                }
                i.ack_timeout = Some(code);
            }
        }
        Ok(())
    }

    /// Joins a multicast group; the library attaches the queue pair. Its GID.
    pub fn join(&mut self, id: Handle, addr: SocketAddr, cookie: u64) -> Result<Gid, Refused> {
        let i = self.id_mut(id)?;
        let Some(port) = i.port else {
            return Err(Refused::State);
        };
        if !i.is_datagram() || !matches!(i.state, IdState::Bound | IdState::AddrResolved) {
            return Err(Refused::State);
        }
        let group = gid(addr.ip());
        if !group.is_multicast() {
            return Err(Refused::Address);
        }
        let qkey = *i.qkey.get_or_insert(UDP_QKEY);
        let detail = CmDetail::Datagram {
            qpn: Qpn::MULTICAST,
            qkey,
            gid: group,
            sgid_index: port.index,
            cookie,
        };
        let event = Event {
            detail,
            ..Event::new(CmEventType::MulticastJoin, 0)
        };
        self.tell(id.0, event);
        Ok(group)
    }

    /// Tells an id's program what it wants to be told.
    pub fn write_event(&mut self, id: Handle, status: i32, arg: u64) -> Result<(), Refused> {
        self.id(id)?;
        let event = Event {
            detail: CmDetail::User { arg },
            ..Event::new(CmEventType::User, status)
        };
        self.tell(id.0, event);
        Ok(())
    }
}

fn wire_space(space: PortSpace) -> freeflow_wire::cm::PortSpace {
    match space {
        PortSpace::Ipoib => freeflow_wire::cm::PortSpace::Ipoib,
        PortSpace::Tcp => freeflow_wire::cm::PortSpace::Tcp,
        PortSpace::Udp => freeflow_wire::cm::PortSpace::Udp,
        PortSpace::Ib => freeflow_wire::cm::PortSpace::Ib,
    }
}

/// The service that the id of a request was asked for.
fn own_service(id: &Id) -> u64 {
    service_id(wire_space(id.space), id.src.port())
}
