//! What a router says about itself.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use freeflow_policy::Resource;
use serde::{Deserialize, Serialize};

/// A router and everything it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterStatus {
    /// Process id.
    pub pid: u32,
    /// Version of the software.
    pub version: String,
    /// Milliseconds since it started.
    pub uptime_ms: u64,
    /// Whether it is one that `freeflow run` has started, which ends with its last endpoint.
    #[serde(default)]
    pub embedded: bool,
    /// How its threads that handle clients' input are confined.
    pub sandbox: String,
    /// The network between hosts, if this one takes part.
    #[serde(default)]
    pub fabric: Option<FabricStatus>,
    /// Endpoints, by name.
    pub endpoints: Vec<EndpointStatus>,
    /// The sessions that ended last, oldest first.
    pub ended_sessions: Vec<EndedSession>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointStatus {
    /// Name, unique on the host.
    pub name: String,
    /// Tenant.
    pub tenant: String,
    /// Virtual IP.
    pub ip: IpAddr,
    /// GID of its device.
    pub gid: String,
    /// Second GID of its device, by which hosts without FreeFlow are reached.
    #[serde(default)]
    pub underlay_gid: Option<String>,
    /// Its socket.
    pub socket: PathBuf,
    /// Processes connected to it.
    pub sessions: Vec<SessionStatus>,
    /// What it has done.
    pub counters: Counters,
    /// What it may have, and has.
    pub quota: Vec<QuotaStatus>,
}

/// One limit of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaStatus {
    /// Of what.
    pub resource: Resource,
    /// How much its sessions have; of a rate, nothing.
    pub used: u64,
    /// The most they may have, `null` if it is not limited; of a rate, per second.
    pub limit: Option<u64>,
    /// Requests refused because of it.
    pub refused: u64,
}

/// A process connected to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Process id, as the router sees it.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// Open devices.
    pub contexts: u32,
    /// Protection domains.
    pub pds: u32,
    /// Completion queues.
    pub cqs: u32,
    /// Queue pairs.
    pub qps: u32,
    /// How its connected queue pairs reach their peers.
    #[serde(default)]
    pub paths: Vec<PathStatus>,
    /// Shared receive queues.
    pub srqs: u32,
    /// Ids of the connection manager.
    #[serde(default)]
    pub cm_ids: u32,
    /// Of these, those that listen.
    #[serde(default)]
    pub cm_listeners: u32,
    /// Memory regions.
    pub mrs: u32,
    /// Bytes of all memory regions.
    pub registered_bytes: u64,
    /// Of these, bytes that could not be shared: they are copied across processes, slower.
    pub foreign_bytes: u64,
    /// Bytes of shared pages handed out.
    pub shared_bytes: u64,
    /// Milliseconds since it connected.
    pub connected_for_ms: u64,
}

/// How connected queue pairs reach their peers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// The peers' host, over RoCEv2; none if it is this one, over shared memory.
    pub host: Option<IpAddr>,
    /// Queue pairs.
    pub qps: u32,
}

impl std::fmt::Display for PathStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host {
            Some(host) => write!(f, "RoCEv2 to {host}"),
            None => f.write_str("shared memory"),
        }
    }
}

/// The network between hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FabricStatus {
    /// This host's address.
    pub address: IpAddr,
    /// MTU of the endpoints' devices, in bytes of a packet's data.
    pub mtu: u32,
    /// The other hosts.
    pub hosts: Vec<IpAddr>,
    /// Whether other hosts' routers must prove who they are.
    #[serde(default)]
    pub authenticated: bool,
    /// This router's incarnation, new at each start, in hexadecimal digits; none if it knows no
    /// others.
    #[serde(default)]
    pub incarnation: Option<String>,
    /// The links to other hosts' routers.
    #[serde(default)]
    pub links: Vec<LinkStatus>,
    /// Packets sent.
    pub sent_packets: u64,
    /// Their bytes, without IP and UDP headers.
    pub sent_bytes: u64,
    /// Packets received whose CRC and headers are right.
    pub received_packets: u64,
    /// Their bytes, without IP and UDP headers.
    pub received_bytes: u64,
    /// Of the packets received, those that met a full queue (ECN).
    pub congested: u64,
    /// How often the socket was full when packets were to be sent.
    pub blocked: u64,
    /// Packets dropped, by reason.
    pub drops: BTreeMap<String, u64>,
}

/// The link to another host's router.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// The host's address.
    pub host: IpAddr,
    /// The name in its certificate, if that is not its address.
    pub name: Option<String>,
    /// Whether the link is up.
    pub up: bool,
    /// For how long it is, or is not, in milliseconds.
    pub since_ms: u64,
    /// Why it is down, and what to do.
    pub reason: Option<String>,
    /// The incarnation of the host's router that was linked last, in hexadecimal digits.
    pub incarnation: Option<String>,
    /// Version of the protocol between the two routers.
    pub version: Option<u16>,
    /// Payload of the longest packet between the two, in bytes.
    pub segment: Option<u32>,
    /// Whether single packets are sent again.
    pub selective: Option<bool>,
    /// Whether the CRC of packets covers their headers alone, and UDP's checksum the rest.
    pub header_crc: Option<bool>,
}

/// What an endpoint has done since it was created.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Send requests executed.
    pub sent_messages: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Messages of peers executed here.
    pub received_messages: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Send requests that completed with an error other than a flush.
    pub failed_requests: u64,
    /// Datagrams dropped because nobody could take them.
    pub dropped_datagrams: u64,
    /// Copies of memory that cannot be shared given up because it did not come in time, or others
    /// did not.
    pub late_memory: u64,
}

/// A session that ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedSession {
    /// Its endpoint.
    pub endpoint: String,
    /// Its process.
    pub pid: u32,
    /// Why it ended.
    pub reason: String,
}
