//! Messages that set up and end connections.

use freeflow_types::{Gid, Psn};

use super::{CmError, MASK24, fits};
use crate::bytes::{Reader, Writer};

/// Request for communication (IBTA volume 1, 12.6.5).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Req {
    /// The sender's name for the connection.
    pub local_id: u32,
    /// Vendor of the sender's device, 24 bits, if it has enhancements to offer; which, says the
    /// datagram's modifier.
    pub vendor_id: u32,
    /// Whom it wants.
    pub service_id: u64,
    /// GUID of the sender's device.
    pub ca_guid: u64,
    /// Q_Key, of datagrams only.
    pub qkey: u32,
    /// The sender's queue pair, 24 bits.
    pub qpn: u32,
    /// READs and atomics that the sender takes at a time.
    pub responder_resources: u8,
    /// End-to-end context, of reliable datagrams only, 24 bits.
    pub local_eecn: u32,
    /// READs and atomics that the sender wants to have under way.
    pub initiator_depth: u8,
    /// As `local_eecn`.
    pub remote_eecn: u32,
    /// Code of the time in which the receiver must answer, 5 bits: 4.096 us times 2^code.
    pub remote_response_timeout: u8,
    /// Transport service.
    pub transport: TransportType,
    /// Whether the sender's receive queue counts credits.
    pub end_to_end_flow_control: bool,
    /// First sequence number that the receiver is to send.
    pub psn: Psn,
    /// Code of the time in which the sender answers, 5 bits.
    pub local_response_timeout: u8,
    /// Retries after timeouts, 3 bits.
    pub retry_count: u8,
    /// Partition.
    pub pkey: u16,
    /// Code of the path's MTU, 4 bits: 128 bytes times 2^code.
    pub path_mtu: u8,
    /// Of reliable datagrams only.
    pub rdc_exists: bool,
    /// Retries after RNR NAKs, 3 bits; 7: for ever.
    pub rnr_retry_count: u8,
    /// How often the message may be sent again, 4 bits.
    pub max_cm_retries: u8,
    /// Whether the sender's queue pair has a shared receive queue.
    pub srq: bool,
    /// With [`TransportType::Extended`], which.
    pub extended: ExtendedTransport,
    /// The path.
    pub primary: Path,
    /// The other path, where there is one.
    pub alternate: Option<Path>,
    /// The application's, after what the IP service has for itself.
    pub private: [u8; 92],
}

/// Transport service of a connection, 2 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TransportType {
    /// Reliable connection.
    Rc,
    /// Unreliable connection.
    Uc,
    /// Reliable datagram.
    Rd,
    /// As [`ExtendedTransport`] says.
    Extended,
}

/// Transport services that came later, 3 bits (annex A14).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ExtendedTransport(pub u8);

impl ExtendedTransport {
    /// Extended reliable connection.
    pub const XRC: ExtendedTransport = ExtendedTransport(1);
}

/// A path between two ports, 44 bytes of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Path {
    /// The sender's port on InfiniBand; of RoCE it does not matter.
    pub local_lid: u16,
    /// As `local_lid`, of the receiver.
    pub remote_lid: u16,
    /// The sender's address.
    pub local_gid: Gid,
    /// The receiver's address.
    pub remote_gid: Gid,
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Code of the packet rate, 6 bits.
    pub rate: u8,
    /// Traffic class.
    pub traffic_class: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Service level, 4 bits.
    pub service_level: u8,
    /// Whether both are in one subnet.
    pub subnet_local: bool,
    /// Code of the local ACK timeout, 5 bits: 4.096 us times 2^code.
    pub ack_timeout: u8,
}

impl Req {
    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, CmError> {
        let local_id = r.u32_or_0();
        let (_, [a, b, c]) = (r.array::<1>(), r.array::<3>());
        let vendor_id = u32::from_be_bytes([0, a, b, c]);
        let service_id = r.u64_or_0();
        let ca_guid = r.u64_or_0();
        r.skip(4);
        let qkey = r.u32_or_0();
        let (qpn, responder_resources) = split24(r.u32_or_0());
        let (local_eecn, initiator_depth) = split24(r.u32_or_0());
        let (remote_eecn, timeout) = split24(r.u32_or_0());
        let (psn, retry) = split24(r.u32_or_0());
        let pkey = r.u16_or_0();
        let [mtu, srq] = r.array();
        let primary = Path::read(r);
        let alternate = Some(Path::read(r)).filter(|path| *path != Path::default());
        Ok(Req {
            local_id,
            vendor_id,
            service_id,
            ca_guid,
            qkey,
            qpn,
            responder_resources,
            local_eecn,
            initiator_depth,
            remote_eecn,
            remote_response_timeout: timeout >> 3,
            transport: match timeout >> 1 & 3 {
                0 => TransportType::Rc,
                1 => TransportType::Uc,
                2 => TransportType::Rd,
                _ => TransportType::Extended,
            },
            end_to_end_flow_control: timeout & 1 != 0,
            psn: Psn::new(psn),
            local_response_timeout: retry >> 3,
            retry_count: retry & 7,
            pkey,
            path_mtu: mtu >> 4,
            rdc_exists: mtu & 8 != 0,
            rnr_retry_count: mtu & 7,
            max_cm_retries: srq >> 4,
            srq: srq & 8 != 0,
            extended: ExtendedTransport(srq & 7),
            primary,
            alternate,
            private: r.array(),
        })
    }

    pub(super) fn write(&self, w: &mut Writer<'_>) -> Result<(), CmError> {
        w.u32(self.local_id);
        w.u32(fits("vendor", self.vendor_id, 24)?);
        w.u64(self.service_id);
        w.u64(self.ca_guid);
        w.u32(0);
        w.u32(self.qkey);
        w.u32(join24("QPN", self.qpn, self.responder_resources)?);
        w.u32(join24("local EECN", self.local_eecn, self.initiator_depth)?);
        let timeout = fits("remote response timeout", self.remote_response_timeout, 5)? << 3
            | (self.transport as u32) << 1
            | u32::from(self.end_to_end_flow_control);
        w.u32(join24("remote EECN", self.remote_eecn, timeout as u8)?);
        let retry = fits("local response timeout", self.local_response_timeout, 5)? << 3
            | fits("retry count", self.retry_count, 3)?;
        w.u32(join24("PSN", self.psn.get(), retry as u8)?);
        w.u16(self.pkey);
        let mtu = fits("path MTU", self.path_mtu, 4)? << 4
            | u32::from(self.rdc_exists) << 3
            | fits("RNR retry count", self.rnr_retry_count, 3)?;
        w.u8(mtu as u8);
        let srq = fits("maximum of CM retries", self.max_cm_retries, 4)? << 4
            | u32::from(self.srq) << 3
            | fits("extended transport", self.extended.0, 3)?;
        w.u8(srq as u8);
        self.primary.write(w)?;
        self.alternate.unwrap_or_default().write(w)?;
        w.put(&self.private);
        Ok(())
    }
}

impl Path {
    fn read(r: &mut Reader<'_>) -> Self {
        let (local_lid, remote_lid) = (r.u16_or_0(), r.u16_or_0());
        let (local_gid, remote_gid) = (Gid(r.array()), Gid(r.array()));
        let flow = r.u32_or_0();
        let [traffic_class, hop_limit, level, ack] = r.array();
        Path {
            local_lid,
            remote_lid,
            local_gid,
            remote_gid,
            flow_label: flow >> 12,
            rate: (flow & 0x3F) as u8,
            traffic_class,
            hop_limit,
            service_level: level >> 4,
            subnet_local: level & 8 != 0,
            ack_timeout: ack >> 3,
        }
    }

    fn write(&self, w: &mut Writer<'_>) -> Result<(), CmError> {
        w.u16(self.local_lid);
        w.u16(self.remote_lid);
        w.put(&self.local_gid.0);
        w.put(&self.remote_gid.0);
        w.u32(fits("flow label", self.flow_label, 20)? << 12 | fits("rate", self.rate, 6)?);
        w.u8(self.traffic_class);
        w.u8(self.hop_limit);
        let level =
            fits("service level", self.service_level, 4)? << 4 | u32::from(self.subnet_local) << 3;
        w.u8(level as u8);
        w.u8((fits("ACK timeout", self.ack_timeout, 5)? << 3) as u8);
        Ok(())
    }
}

/// Reply to a request (IBTA volume 1, 12.6.8).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rep {
    /// The sender's name for the connection.
    pub local_id: u32,
    /// The receiver's name for it.
    pub remote_id: u32,
    /// Q_Key, of datagrams only.
    pub qkey: u32,
    /// The sender's queue pair, 24 bits; of XRC it is in `local_eecn`.
    pub qpn: u32,
    /// End-to-end context, 24 bits; of XRC, the sender's queue pair that initiates.
    pub local_eecn: u32,
    /// First sequence number that the receiver is to send.
    pub psn: Psn,
    /// Vendor of the sender's device, 24 bits, if it has enhancements to offer; which, says the
    /// datagram's modifier.
    pub vendor_id: u32,
    /// READs and atomics that the sender takes at a time.
    pub responder_resources: u8,
    /// READs and atomics that the sender wants to have under way.
    pub initiator_depth: u8,
    /// Code of the delay of the sender's acknowledgements, 5 bits.
    pub target_ack_delay: u8,
    /// Whether the alternate path was accepted, 2 bits.
    pub failover: u8,
    /// Whether the sender's receive queue counts credits.
    pub end_to_end_flow_control: bool,
    /// Retries after RNR NAKs, 3 bits; 7: for ever.
    pub rnr_retry_count: u8,
    /// Whether the sender's queue pair has a shared receive queue.
    pub srq: bool,
    /// GUID of the sender's device.
    pub ca_guid: u64,
    /// The application's.
    pub private: [u8; 196],
}

impl Rep {
    pub(super) fn read(r: &mut Reader<'_>) -> Self {
        let (local_id, remote_id) = (r.u32_or_0(), r.u32_or_0());
        let qkey = r.u32_or_0();
        // Each of these has a byte of the vendor's number behind it.
        let fields = [(); 3].map(|()| split24(r.u32_or_0()));
        let [(qpn, high), (local_eecn, middle), (psn, low)] = fields;
        let [responder_resources, initiator_depth, delay, rnr] = r.array();
        Rep {
            local_id,
            remote_id,
            qkey,
            qpn,
            local_eecn,
            psn: Psn::new(psn),
            vendor_id: u32::from_be_bytes([0, high, middle, low]),
            responder_resources,
            initiator_depth,
            target_ack_delay: delay >> 3,
            failover: delay >> 1 & 3,
            end_to_end_flow_control: delay & 1 != 0,
            rnr_retry_count: rnr >> 5,
            srq: rnr & 0x10 != 0,
            ca_guid: r.u64_or_0(),
            private: r.array(),
        }
    }

    pub(super) fn write(&self, w: &mut Writer<'_>) -> Result<(), CmError> {
        w.u32(self.local_id);
        w.u32(self.remote_id);
        w.u32(self.qkey);
        let [_, high, middle, low] = fits("vendor", self.vendor_id, 24)?.to_be_bytes();
        w.u32(join24("QPN", self.qpn, high)?);
        w.u32(join24("local EECN", self.local_eecn, middle)?);
        w.u32(join24("PSN", self.psn.get(), low)?);
        w.u8(self.responder_resources);
        w.u8(self.initiator_depth);
        let delay = fits("target ACK delay", self.target_ack_delay, 5)? << 3
            | fits("failover", self.failover, 2)? << 1
            | u32::from(self.end_to_end_flow_control);
        w.u8(delay as u8);
        let rnr = fits("RNR retry count", self.rnr_retry_count, 3)? << 5 | u32::from(self.srq) << 4;
        w.u8(rnr as u8);
        w.u64(self.ca_guid);
        w.put(&self.private);
        Ok(())
    }
}

/// What message was rejected, or takes longer to answer, 2 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rejected {
    /// A request.
    Req,
    /// A reply.
    Rep,
    /// Of a rejection: none, for example when the time is over. Of a receipt: a LAP.
    Other,
}

impl Rejected {
    fn read(byte: u8) -> Result<Self, CmError> {
        Ok(match byte >> 6 {
            0 => Rejected::Req,
            1 => Rejected::Rep,
            2 => Rejected::Other,
            value => {
                return Err(CmError::Field {
                    field: "message answered",
                    value: value.into(),
                });
            }
        })
    }
}

/// Reject (IBTA volume 1, 12.6.7).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rej {
    /// The sender's name for the connection, or 0.
    pub local_id: u32,
    /// The receiver's name for it, or 0.
    pub remote_id: u32,
    /// What is rejected.
    pub message: Rejected,
    /// Bytes of `info` that count, 7 bits.
    pub info_len: u8,
    /// Why (12.6.7.2), for example [`Rej::INVALID_SERVICE_ID`].
    pub reason: u16,
    /// More about the reason.
    pub info: [u8; 72],
    /// The application's.
    pub private: [u8; 148],
}

impl Rej {
    /// No queue pair can be had.
    pub const NO_QP: u16 = 1;
    /// No resources.
    pub const NO_RESOURCES: u16 = 3;
    /// The other side did not answer in time.
    pub const TIMEOUT: u16 = 4;
    /// The request is not one that is supported.
    pub const UNSUPPORTED: u16 = 5;
    /// The names are not those of a connection.
    pub const INVALID_COMM_ID: u16 = 6;
    /// Nobody listens there.
    pub const INVALID_SERVICE_ID: u16 = 8;
    /// The transport is not that of the service.
    pub const INVALID_TRANSPORT_TYPE: u16 = 9;
    /// The connection exists, or the other side has forgotten it.
    pub const STALE_CONNECTION: u16 = 10;
    /// The address is not the receiver's.
    pub const INVALID_GID: u16 = 12;
    /// The application does not want it.
    pub const CONSUMER: u16 = 28;

    /// A rejection that says no more than why.
    pub fn new(local_id: u32, remote_id: u32, message: Rejected, reason: u16) -> Self {
        Rej {
            local_id,
            remote_id,
            message,
            info_len: 0,
            reason,
            info: [0; 72],
            private: [0; 148],
        }
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, CmError> {
        let (local_id, remote_id) = (r.u32_or_0(), r.u32_or_0());
        let [message, len] = r.array();
        Ok(Rej {
            local_id,
            remote_id,
            message: Rejected::read(message)?,
            info_len: len >> 1,
            reason: r.u16_or_0(),
            info: r.array(),
            private: r.array(),
        })
    }

    pub(super) fn write(&self, w: &mut Writer<'_>) -> Result<(), CmError> {
        w.u32(self.local_id);
        w.u32(self.remote_id);
        w.u8((self.message as u8) << 6);
        w.u8((fits("length of the reject information", self.info_len, 7)? << 1) as u8);
        w.u16(self.reason);
        w.put(&self.info);
        w.put(&self.private);
        Ok(())
    }
}

/// Message receipt acknowledgement (IBTA volume 1, 12.6.6).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mra {
    /// The sender's name for the connection.
    pub local_id: u32,
    /// The receiver's name for it.
    pub remote_id: u32,
    /// What was received.
    pub message: Rejected,
    /// Code of the time in which the answer comes, 5 bits.
    pub service_timeout: u8,
    /// The application's.
    pub private: [u8; 222],
}

impl Mra {
    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, CmError> {
        let (local_id, remote_id) = (r.u32_or_0(), r.u32_or_0());
        let [message, timeout] = r.array();
        Ok(Mra {
            local_id,
            remote_id,
            message: Rejected::read(message)?,
            service_timeout: timeout >> 3,
            private: r.array(),
        })
    }

    pub(super) fn write(&self, w: &mut Writer<'_>) -> Result<(), CmError> {
        w.u32(self.local_id);
        w.u32(self.remote_id);
        w.u8((self.message as u8) << 6);
        w.u8((fits("service timeout", self.service_timeout, 5)? << 3) as u8);
        w.put(&self.private);
        Ok(())
    }
}

/// Ready to use (IBTA volume 1, 12.6.9).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rtu {
    /// The sender's name for the connection.
    pub local_id: u32,
    /// The receiver's name for it.
    pub remote_id: u32,
    /// The application's.
    pub private: [u8; 224],
}

impl Rtu {
    pub(super) fn read(r: &mut Reader<'_>) -> Self {
        Rtu {
            local_id: r.u32_or_0(),
            remote_id: r.u32_or_0(),
            private: r.array(),
        }
    }

    pub(super) fn write(&self, w: &mut Writer<'_>) -> Result<(), CmError> {
        w.u32(self.local_id);
        w.u32(self.remote_id);
        w.put(&self.private);
        Ok(())
    }
}

/// Disconnection request (IBTA volume 1, 12.6.10).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dreq {
    /// The sender's name for the connection.
    pub local_id: u32,
    /// The receiver's name for it.
    pub remote_id: u32,
    /// The receiver's queue pair, 24 bits.
    pub qpn: u32,
    /// The application's.
    pub private: [u8; 220],
}

impl Dreq {
    pub(super) fn read(r: &mut Reader<'_>) -> Self {
        Dreq {
            local_id: r.u32_or_0(),
            remote_id: r.u32_or_0(),
            qpn: split24(r.u32_or_0()).0,
            private: r.array(),
        }
    }

    pub(super) fn write(&self, w: &mut Writer<'_>) -> Result<(), CmError> {
        w.u32(self.local_id);
        w.u32(self.remote_id);
        w.u32(join24("QPN", self.qpn, 0)?);
        w.put(&self.private);
        Ok(())
    }
}

/// Reply to a disconnection request (IBTA volume 1, 12.6.11).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Drep {
    /// The sender's name for the connection.
    pub local_id: u32,
    /// The receiver's name for it.
    pub remote_id: u32,
    /// The application's.
    pub private: [u8; 224],
}

impl Drep {
    /// An answer without a word of the application's.
    pub fn new(local_id: u32, remote_id: u32) -> Self {
        Drep {
            local_id,
            remote_id,
            private: [0; 224],
        }
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Self {
        Drep {
            local_id: r.u32_or_0(),
            remote_id: r.u32_or_0(),
            private: r.array(),
        }
    }

    pub(super) fn write(&self, w: &mut Writer<'_>) -> Result<(), CmError> {
        w.u32(self.local_id);
        w.u32(self.remote_id);
        w.put(&self.private);
        Ok(())
    }
}

/// A word of 24 and 8 bits.
pub(super) fn split24(word: u32) -> (u32, u8) {
    (word >> 8, word as u8)
}

/// The reverse.
pub(super) fn join24(field: &'static str, value: u32, low: u8) -> Result<u32, CmError> {
    if value > MASK24 {
        return Err(CmError::Field { field, value });
    }
    Ok(value << 8 | u32::from(low))
}
