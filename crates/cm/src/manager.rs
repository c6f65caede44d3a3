//! All ids and connections of a host.

use std::collections::{BTreeMap, BTreeSet};

use freeflow_session::{CmDetail, CmEventType, CmIdInfo, Handle};
use freeflow_types::{Gid, QpType};
use serde::{Deserialize, Serialize};

use crate::connection::{Connection, State, Told};
use crate::error::Refused;
use crate::id::{Event, Id, IdState, Port};
use crate::ports::Ports;

/// Connections whose time has come that are looked at at a time.
const DUE_AT_ONCE: usize = 256;

/// Connections of an endpoint whose ids are gone, and whose other side is still to be told. Of
/// those that are too many, the other side is told once.
const MAX_LEFT_BEHIND: u32 = 4096;

/// What comes of a call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// A datagram to queue pair 1 of another port, [`freeflow_wire::cm::MAD_BYTES`] long.
    Send {
        /// Where it leaves.
        from: Port,
        /// The other port.
        to: Gid,
        /// The datagram.
        mad: Vec<u8>,
    },
    /// An id's program is to be told.
    Tell {
        /// The id.
        id: Handle,
        /// What.
        event: Box<Event>,
    },
}

/// Where a datagram has come.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The ports that it may be for: the one that it names, or all that share its address.
    pub ports: Vec<Port>,
    /// Whose it is.
    pub source: Gid,
}

/// What tells connections of other sides apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub(crate) struct RemoteKey {
    endpoint: u32,
    index: u8,
    peer: [u8; 16],
    datagram: bool,
    name: u32,
}

pub(crate) fn remote_key(port: &Port, peer: Gid, datagram: bool, name: u32) -> RemoteKey {
    RemoteKey {
        endpoint: port.endpoint.0,
        index: port.index,
        peer: peer.0,
        datagram,
        name,
    }
}

impl Connection {
    pub(crate) fn is_datagram(&self) -> bool {
        self.agreed.qp_type == QpType::Ud
    }

    fn remote_key(&self) -> RemoteKey {
        remote_key(&self.port, self.peer, self.is_datagram(), self.remote)
    }

    /// The key of its other side's queue pair, which can be in one connection at a time.
    fn qp_key(&self) -> RemoteKey {
        remote_key(&self.port, self.peer, false, self.agreed.remote_qpn)
    }
}

/// The connection manager of a host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manager {
    /// Most READs and atomics of a queue pair, each way.
    pub(crate) max_rd_atomic: u8,
    pub(crate) ids: BTreeMap<u32, Id>,
    pub(crate) ports: Ports,
    pub(crate) connections: BTreeMap<u32, Connection>,
    /// Connections that other sides asked for, by their names there.
    pub(crate) by_remote: BTreeMap<RemoteKey, u32>,
    /// Connections that live, by the other sides' queue pairs.
    pub(crate) by_qp: BTreeMap<RemoteKey, u32>,
    timers: BTreeSet<(u64, u32)>,
    /// Connections without ids, of each endpoint.
    left_behind: BTreeMap<u32, u32>,
    #[serde(skip)]
    pub(crate) out: Vec<Output>,
}

impl Manager {
    /// A manager of no ids, for devices of which queue pairs have so many READs and atomics under
    /// way.
    pub fn new(max_rd_atomic: u8) -> Self {
        Manager {
            max_rd_atomic,
            ids: BTreeMap::new(),
            ports: Ports::default(),
            connections: BTreeMap::new(),
            by_remote: BTreeMap::new(),
            by_qp: BTreeMap::new(),
            timers: BTreeSet::new(),
            left_behind: BTreeMap::new(),
            out: Vec::new(),
        }
    }

    /// What came of the calls so far, in order; each is given once.
    pub fn take_output(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.out)
    }

    /// When [`Self::on_timeout`] is to be called.
    pub fn next_timeout(&self) -> Option<u64> {
        self.timers.first().map(|&(at, _)| at)
    }

    /// The time has come that [`Self::next_timeout`] names. If very much is due, that is still in
    /// the past afterwards: others have their turn between.
    pub fn on_timeout(&mut self, now: u64) {
        for _ in 0..DUE_AT_ONCE {
            let Some(&(at, local)) = self.timers.first().filter(|&&(at, _)| at <= now) else {
                return;
            };
            self.with(local, |c, out| c.on_timeout(now, out));
            // A deadline that stands still would be looked at for ever.
            self.timers.remove(&(at, local));
        }
    }

    /// What is known of an id.
    pub fn info(&self, id: Handle) -> Option<CmIdInfo> {
        self.ids.get(&id.0).map(Id::info)
    }

    /// Where an id is bound, unless to a wildcard or not at all.
    pub fn port(&self, id: Handle) -> Option<Port> {
        self.ids.get(&id.0)?.port
    }

    /// Whether an id is as far as [`Self::connect`] wants it.
    pub fn may_connect(&self, id: Handle) -> bool {
        let id = self.ids.get(&id.0);
        id.is_some_and(|id| id.state == IdState::RouteResolved)
    }

    /// Whether an id waits for others to connect.
    pub fn is_listening(&self, id: Handle) -> bool {
        let id = self.ids.get(&id.0);
        id.is_some_and(|id| id.state == IdState::Listening)
    }

    /// Connections, also those that have no id any more.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// An endpoint is gone: so are its connections, without a word.
    pub fn forget(&mut self, endpoint: Handle) {
        if !self.left_behind.contains_key(&endpoint.0) {
            return;
        }
        let of = |c: &&Connection| c.port.endpoint == endpoint;
        let gone: Vec<_> = self.connections.values().filter(of).collect();
        let gone: Vec<_> = gone.iter().map(|c| c.local).collect();
        for local in gone {
            self.drop_connection(local);
        }
        self.left_behind.remove(&endpoint.0);
    }

    pub(crate) fn id(&self, id: Handle) -> Result<&Id, Refused> {
        self.ids.get(&id.0).ok_or(Refused::Unknown)
    }

    pub(crate) fn id_mut(&mut self, id: Handle) -> Result<&mut Id, Refused> {
        self.ids.get_mut(&id.0).ok_or(Refused::Unknown)
    }

    pub(crate) fn tell(&mut self, id: u32, event: Event) {
        self.out.push(Output::Tell {
            id: Handle(id),
            event: Box::new(event),
        });
    }

    /// A name that no connection has.
    pub(crate) fn free_name(&self, entropy: u64) -> u32 {
        let mut name = (entropy >> 32) as u32;
        while name == 0 || self.connections.contains_key(&name) {
            name = name.wrapping_add(1);
        }
        name
    }

    pub(crate) fn insert(&mut self, connection: Connection) {
        let local = connection.local;
        if !connection.active {
            self.by_remote.insert(connection.remote_key(), local);
        }
        self.connections.insert(local, connection);
        self.settle(local);
    }

    /// Lets something happen to a connection, and everything that follows from it.
    pub(crate) fn with(
        &mut self,
        local: u32,
        f: impl FnOnce(&mut Connection, &mut Vec<Output>) -> Option<Told>,
    ) {
        let Some(c) = self.connections.get_mut(&local) else {
            return;
        };
        let told = f(c, &mut self.out);
        let id = c.id;
        self.settle(local);
        if let (Some(told), Some(id)) = (told, id) {
            self.on_told(id, told);
        }
    }

    /// Brings in order what is kept about a connection beside it.
    pub(crate) fn settle(&mut self, local: u32) {
        let Some(c) = self.connections.get_mut(&local) else {
            return;
        };
        if c.armed != c.deadline {
            if let Some(at) = c.armed {
                self.timers.remove(&(at, local));
            }
            if let Some(at) = c.deadline {
                self.timers.insert((at, local));
            }
            c.armed = c.deadline;
        }
        let key = c.qp_key();
        match c.state {
            State::ReqRcvd
            | State::RepSent
            | State::RepRcvd
            | State::Established
            | State::DreqRcvd
            | State::DreqSent => {
                // An XRC queue pair may receive from many.
                if matches!(c.agreed.qp_type, QpType::Rc | QpType::Uc) {
                    self.by_qp.entry(key).or_insert(local);
                }
            }
            _ => {
                if self.by_qp.get(&key) == Some(&local) {
                    self.by_qp.remove(&key);
                }
            }
        }
        if c.id.is_none() && c.deadline.is_none() {
            self.drop_connection(local);
        }
    }

    /// An id is gone; its connection stays while the other side is to be told something.
    pub(crate) fn leave_behind(&mut self, local: u32) {
        let Some(c) = self.connections.get_mut(&local) else {
            return;
        };
        c.id = None;
        let count = self.left_behind.entry(c.port.endpoint.0).or_default();
        *count += 1;
        if *count > MAX_LEFT_BEHIND {
            return self.drop_connection(local);
        }
        self.settle(local);
    }

    fn drop_connection(&mut self, local: u32) {
        let Some(c) = self.connections.remove(&local) else {
            return;
        };
        if let Some(at) = c.armed {
            self.timers.remove(&(at, local));
        }
        for (map, key) in [
            (&mut self.by_remote, c.remote_key()),
            (&mut self.by_qp, c.qp_key()),
        ] {
            if map.get(&key) == Some(&local) {
                map.remove(&key);
            }
        }
        let endpoint = c.port.endpoint.0;
        if c.id.is_none()
            && let Some(count) = self.left_behind.get_mut(&endpoint)
        {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.left_behind.remove(&endpoint);
            }
        }
    }

    /// A connection has something for its id (Linux: `cma_ib_handler`).
    fn on_told(&mut self, name: u32, told: Told) {
        let Some(id) = self.ids.get_mut(&name) else {
            return;
        };
        let expected = match told {
            Told::TimewaitExit => IdState::Disconnected,
            _ => IdState::Connect,
        };
        if id.state != expected {
            return;
        }
        let event = match told {
            Told::Response {
                detail,
                private,
                ece,
            } => Event {
                detail,
                private_data: private,
                ece,
                ..Event::new(CmEventType::ConnectResponse, 0)
            },
            Told::Established => Event::new(CmEventType::Established, 0),
            Told::Service { qpn, qkey, private } => {
                id.qkey = Some(qkey);
                let detail = CmDetail::Datagram {
                    qpn,
                    qkey,
                    gid: id.dgid.unwrap_or_default(),
                    sgid_index: id.port.map_or(0, |port| port.index),
                    cookie: 0,
                };
                Event {
                    detail,
                    private_data: private,
                    ..Event::new(CmEventType::Established, 0)
                }
            }
            Told::Rejected { reason, private } => Event {
                private_data: private,
                ..Event::new(CmEventType::Rejected, reason.into())
            },
            Told::Unreachable { status, private } => {
                let status = status.map_or(crate::status::ETIMEDOUT, i32::from);
                Event {
                    private_data: private,
                    ..Event::new(CmEventType::Unreachable, status)
                }
            }
            Told::Disconnected { answered } => {
                id.state = IdState::Disconnected;
                let status = if answered {
                    0
                } else {
                    crate::status::ETIMEDOUT
                };
                Event::new(CmEventType::Disconnected, status)
            }
            Told::TimewaitExit => Event::new(CmEventType::TimewaitExit, 0),
        };
        if !id.silent {
            self.tell(name, event);
        }
    }
}
