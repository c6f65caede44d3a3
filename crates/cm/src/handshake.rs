//! What the messages of a connection say.

use freeflow_session::{CmDetail, CmParam, CmQp};
use freeflow_types::{Gid, Psn, QpType};
use freeflow_wire::DEFAULT_PKEY;
use freeflow_wire::cm::{
    Drep, Dreq, ExtendedTransport, IpCm, Message, Path, Rej, Rejected, Rep, Req, Rtu, SidrRep,
    SidrReq, TransportType,
};

use crate::connection::{
    Agreed, Connection, MAX_RETRIES, PACKET_LIFETIME, RESPONSE_TIMEOUT, State, timeout_ns,
};
use crate::error::Refused;
use crate::id::Port;

/// LIDs of paths that have none (`IB_LID_PERMISSIVE`).
const NO_LID: u16 = 0xFFFF;

/// Code of 10 Gb/s; on RoCE nobody heeds it.
const RATE: u8 = 3;

pub(crate) const HOP_LIMIT: u8 = 64;

/// Private data of a message: what the application has, and zeroes.
pub(crate) fn private<const N: usize>(
    head: Option<&IpCm>,
    data: &[u8],
) -> Result<[u8; N], Refused> {
    let mut private = [0; N];
    let start = if head.is_some() { IpCm::BYTES } else { 0 };
    let limit = N - start;
    let what = "private_data_len";
    let value = data.len();
    let bounds = Refused::Bounds { what, value, limit };
    let room = private.get_mut(start..start + value).ok_or(bounds)?;
    room.copy_from_slice(data);
    if let Some(head) = head {
        head.emit(&mut private).map_err(|_| Refused::Families)?;
    }
    Ok(private)
}

/// Vendor and options, if a message has some.
pub(crate) fn ece(vendor: u32, modifier: u32) -> Option<(u32, u32)> {
    (vendor != 0 || modifier != 0).then_some((vendor, modifier))
}

/// The transport service that a request is for, as its receiver sees it.
pub(crate) fn qp_type_of(req: &Req) -> Option<QpType> {
    match req.transport {
        TransportType::Rc => Some(QpType::Rc),
        TransportType::Uc => Some(QpType::Uc),
        TransportType::Extended if req.extended == ExtendedTransport::XRC => Some(QpType::XrcRecv),
        TransportType::Extended | TransportType::Rd => None,
    }
}

/// A connection that this side asks for.
pub(crate) struct Begin<'a> {
    pub(crate) local: u32,
    pub(crate) id: u32,
    pub(crate) port: Port,
    pub(crate) peer: Gid,
    pub(crate) service_id: u64,
    pub(crate) addresses: &'a IpCm,
    pub(crate) psn: u32,
    pub(crate) traffic_class: u8,
    pub(crate) ack_timeout: Option<u8>,
}

fn connection(local: u32, id: u32, port: Port, peer: Gid, agreed: Agreed) -> Connection {
    Connection {
        local,
        remote: 0,
        id: Some(id),
        port,
        peer,
        state: State::Closed,
        active: true,
        transaction: u64::from(local),
        local_qpn: 0,
        agreed,
        message: Vec::new(),
        retries: MAX_RETRIES,
        interval: timeout_ns(RESPONSE_TIMEOUT),
        deadline: None,
        receipt: false,
        armed: None,
    }
}

impl Begin<'_> {
    fn agreed(&self, qp_type: QpType) -> Agreed {
        Agreed {
            qp_type,
            remote_qpn: 0,
            rq_psn: self.psn,
            sq_psn: 0,
            responder_resources: 0,
            initiator_depth: 0,
            retry_count: 0,
            rnr_retry_count: 0,
            path_mtu: self.port.mtu as u8,
            traffic_class: self.traffic_class,
            flow_label: 0,
            ack_timeout: self.ack_timeout.unwrap_or(PACKET_LIFETIME + 1),
        }
    }

    /// The connection, and its request.
    pub(crate) fn connect(
        &self,
        qp_type: QpType,
        param: &CmParam,
        (responder_resources, initiator_depth): (u8, u8),
    ) -> Result<(Connection, Message), Refused> {
        let (transport, extended) = match qp_type {
            QpType::Rc => (TransportType::Rc, ExtendedTransport::default()),
            QpType::Uc => (TransportType::Uc, ExtendedTransport::default()),
            QpType::XrcSend => (TransportType::Extended, ExtendedTransport::XRC),
            QpType::Ud | QpType::XrcRecv => return Err(Refused::State),
        };
        let mut agreed = self.agreed(qp_type);
        agreed.responder_resources = responder_resources;
        agreed.initiator_depth = initiator_depth;
        agreed.retry_count = param.retry_count;
        let primary = Path {
            local_lid: NO_LID,
            remote_lid: NO_LID,
            local_gid: self.port.gid,
            remote_gid: self.peer,
            flow_label: 0,
            rate: RATE,
            traffic_class: self.traffic_class,
            hop_limit: HOP_LIMIT,
            service_level: 0,
            subnet_local: false,
            ack_timeout: agreed.ack_timeout,
        };
        let reliable = qp_type.is_reliable();
        let req = Req {
            local_id: self.local,
            vendor_id: param.ece.map_or(0, |(vendor, _)| vendor),
            service_id: self.service_id,
            ca_guid: self.port.guid,
            qkey: 0,
            qpn: param.qp.qpn.get(),
            responder_resources,
            local_eecn: 0,
            initiator_depth,
            remote_eecn: 0,
            remote_response_timeout: RESPONSE_TIMEOUT,
            transport,
            end_to_end_flow_control: param.flow_control,
            psn: Psn::new(self.psn),
            local_response_timeout: RESPONSE_TIMEOUT,
            retry_count: if reliable { param.retry_count } else { 0 },
            pkey: DEFAULT_PKEY,
            path_mtu: agreed.path_mtu,
            rdc_exists: false,
            rnr_retry_count: if reliable { param.rnr_retry_count } else { 0 },
            max_cm_retries: MAX_RETRIES,
            srq: param.qp.srq,
            extended,
            primary,
            alternate: None,
            private: private(Some(self.addresses), &param.private_data)?,
        };
        let mut c = connection(self.local, self.id, self.port, self.peer, agreed);
        c.state = State::ReqSent;
        c.local_qpn = param.qp.qpn.get();
        // The path there and back, on top of the other side's time.
        c.interval = timeout_ns(RESPONSE_TIMEOUT) + 2 * timeout_ns(PACKET_LIFETIME);
        Ok((c, Message::Req(req)))
    }

    /// The look-up of a datagram service, and its request.
    pub(crate) fn look_up(&self, data: &[u8]) -> Result<(Connection, Message), Refused> {
        let req = SidrReq {
            request_id: self.local,
            pkey: DEFAULT_PKEY,
            service_id: self.service_id,
            private: private(Some(self.addresses), data)?,
        };
        let agreed = self.agreed(QpType::Ud);
        let mut c = connection(self.local, self.id, self.port, self.peer, agreed);
        c.state = State::SidrReqSent;
        Ok((c, Message::SidrReq(req)))
    }
}

/// The connection that another side asks for, and what its request says.
pub(crate) fn requested(
    (local, id, psn): (u32, u32, u32),
    (port, peer): (Port, Gid),
    req: &Req,
    qp_type: QpType,
    transaction: u64,
) -> (Connection, CmDetail) {
    let agreed = Agreed {
        qp_type,
        remote_qpn: req.qpn,
        rq_psn: psn,
        sq_psn: req.psn.get(),
        // What one side has under way the other takes.
        responder_resources: req.initiator_depth,
        initiator_depth: req.responder_resources,
        retry_count: req.retry_count,
        rnr_retry_count: req.rnr_retry_count,
        path_mtu: req.path_mtu.clamp(1, 5),
        traffic_class: req.primary.traffic_class,
        flow_label: req.primary.flow_label,
        ack_timeout: req.primary.ack_timeout,
    };
    let mut c = connection(local, id, port, peer, agreed);
    c.active = false;
    c.remote = req.local_id;
    c.state = State::ReqRcvd;
    c.transaction = transaction;
    c.retries = req.max_cm_retries.min(MAX_RETRIES);
    c.interval = timeout_ns(req.local_response_timeout);
    let detail = CmDetail::Connection {
        responder_resources: req.initiator_depth,
        initiator_depth: req.responder_resources,
        flow_control: req.end_to_end_flow_control,
        retry_count: req.retry_count,
        rnr_retry_count: req.rnr_retry_count,
        srq: req.srq,
        qpn: freeflow_types::Qpn::new(req.qpn),
        psn: req.psn,
    };
    (c, detail)
}

/// A look-up of a datagram service by another side.
pub(crate) fn looked_up(
    (local, id): (u32, u32),
    (port, peer): (Port, Gid),
    req: &SidrReq,
    transaction: u64,
) -> Connection {
    let begin = Begin {
        local,
        id,
        port,
        peer,
        service_id: req.service_id,
        addresses: &IpCm {
            src_port: 0,
            src: std::net::Ipv4Addr::UNSPECIFIED.into(),
            dst: std::net::Ipv4Addr::UNSPECIFIED.into(),
        },
        psn: 0,
        traffic_class: 0,
        ack_timeout: None,
    };
    let mut c = connection(local, id, port, peer, begin.agreed(QpType::Ud));
    c.active = false;
    c.remote = req.request_id;
    c.state = State::SidrReqRcvd;
    c.transaction = transaction;
    c
}

impl Connection {
    pub(crate) fn rep(
        &self,
        qp: &CmQp,
        param: &CmParam,
        (responder_resources, initiator_depth): (u8, u8),
    ) -> Result<Message, Refused> {
        let qpn = qp.qpn.get();
        let (qpn, local_eecn) = match self.agreed.qp_type {
            QpType::XrcRecv => (0, qpn),
            _ => (qpn, 0),
        };
        Ok(Message::Rep(Rep {
            local_id: self.local,
            remote_id: self.remote,
            qkey: 0,
            qpn,
            local_eecn,
            psn: Psn::new(self.agreed.rq_psn),
            vendor_id: param.ece.map_or(0, |(vendor, _)| vendor),
            responder_resources,
            initiator_depth,
            target_ack_delay: 0,
            failover: 0,
            end_to_end_flow_control: param.flow_control,
            rnr_retry_count: param.rnr_retry_count,
            srq: qp.srq,
            ca_guid: self.port.guid,
            private: private(None, &param.private_data)?,
        }))
    }

    pub(crate) fn rtu(&self) -> Message {
        Message::Rtu(Rtu {
            local_id: self.local,
            remote_id: self.remote,
            private: [0; 224],
        })
    }

    /// A rejection of what was received, or, of who waits in vain, of what was sent.
    pub(crate) fn rej(&self, reason: u16, data: &[u8]) -> Result<Message, Refused> {
        let message = match self.state {
            State::ReqRcvd => Rejected::Req,
            State::RepRcvd => Rejected::Rep,
            _ => Rejected::Other,
        };
        let mut info = [0; 72];
        let timeout = reason == Rej::TIMEOUT;
        if timeout {
            // The sender's GUID: the receiver may not know the name that it has here.
            let (guid, _) = info.split_at_mut(8);
            guid.copy_from_slice(&self.port.guid.to_be_bytes());
        }
        Ok(Message::Rej(Rej {
            local_id: self.local,
            remote_id: self.remote,
            message,
            info_len: if timeout { 8 } else { 0 },
            reason,
            info,
            private: private(None, data)?,
        }))
    }

    pub(crate) fn dreq(&self) -> Message {
        Message::Dreq(Dreq {
            local_id: self.local,
            remote_id: self.remote,
            qpn: self.agreed.remote_qpn,
            private: [0; 220],
        })
    }

    pub(crate) fn drep(&self) -> Message {
        Message::Drep(Drep::new(self.local, self.remote))
    }

    /// The answer to a look-up.
    pub(crate) fn sidr_rep(
        &self,
        service_id: u64,
        status: u8,
        (qpn, qkey): (u32, u32),
        data: &[u8],
    ) -> Result<Message, Refused> {
        Ok(Message::SidrRep(SidrRep {
            request_id: self.remote,
            status,
            info_len: 0,
            qpn,
            service_id,
            qkey,
            info: [0; 72],
            private: private(None, data)?,
        }))
    }
}
