//! The thread that keeps a link to each peer.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use rustls::Error as TlsError;

use crate::connection::{Closed, Connection};
use crate::identity::{Identity, server_name};
use crate::message::{Hello, MAX_SEGMENT, MIN_SEGMENT};
use crate::peer::{Peer, dials};
use crate::talk::{Agreed, Heard};

const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// Connections of one host that have not yet become its link.
const MAX_PENDING: usize = 4;

/// Connections that are accepted in one turn.
const ACCEPTS_PER_TURN: u32 = 16;

/// A listener that cannot accept is left alone for so long, in nanoseconds.
const PAUSE: u64 = 100_000_000;

/// How a router takes part.
#[derive(Clone, Debug)]
pub struct Config {
    /// This host's address in the network between hosts.
    pub local: IpAddr,
    /// TCP port of this router and of all its peers.
    pub port: u16,
    /// What the router shows and believes; without one, whoever speaks from an address is believed.
    pub identity: Option<Identity>,
    /// The router's, new at each start, not 0.
    pub incarnation: u64,
    /// What it can do beside the standard, such as [`SELECTIVE`](crate::SELECTIVE).
    pub features: u32,
}

/// A peer, as the map has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSpec {
    /// Its address in the network between hosts.
    pub address: IpAddr,
    /// Its name in its certificate, if that is not its address.
    pub name: Option<String>,
    /// Payload bytes of the longest packet that the path to it takes. It is said to the peer for as
    /// long as this router lives, so that both sides always agree on the same: a later value counts
    /// for nothing.
    pub segment: u32,
}

/// What there is to know of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The peer's address.
    pub address: IpAddr,
    /// Its name.
    pub name: Option<String>,
    /// Whether the link is up.
    pub up: bool,
    /// For how long it is, or is not, in milliseconds.
    pub since_ms: u64,
    /// Why it is down.
    pub reason: Option<String>,
    /// What was agreed last.
    pub agreed: Option<Agreed>,
}

/// Who is told what happens. It is called by the thread of the links, which waits for it.
pub trait Observer: Send + 'static {
    /// A host has said in which incarnation it is. When this returns, nothing that belongs to an
    /// earlier one may be sent to it.
    fn greeted(&mut self, host: IpAddr, incarnation: u64);
    /// A host's link is up: it sends nothing that belongs to an earlier incarnation of this router.
    fn up(&mut self, host: IpAddr, agreed: Agreed);
    /// A host's link is down.
    fn down(&mut self, host: IpAddr);
    /// A host's link has been down for so long, or for such a reason, that it is not believed any
    /// more.
    fn lapsed(&mut self, host: IpAddr);
    /// The operator is to know.
    fn notice(&mut self, line: String);
}

/// Why links cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Another process has the port.
    #[error(
        "TCP port {port} of {address} is in use, perhaps by another router; choose another with \
         --control-port, the same on all hosts"
    )]
    InUse {
        /// The address.
        address: IpAddr,
        /// The port.
        port: u16,
    },
    /// The system refused.
    #[error("cannot listen for other routers: {0}")]
    Io(#[from] io::Error),
}

impl From<Errno> for LinkError {
    fn from(e: Errno) -> Self {
        LinkError::Io(e.into())
    }
}

#[derive(Debug, Default)]
struct Orders {
    stop: bool,
    peers: Option<Vec<PeerSpec>>,
    identity: Option<Identity>,
}

struct Shared {
    wake: OwnedFd,
    start: Instant,
    orders: Mutex<Orders>,
    /// Of each peer, and when that was.
    status: Mutex<(u64, Vec<Status>)>,
}

impl Shared {
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn order(&self, f: impl FnOnce(&mut Orders)) {
        f(&mut lock(&self.orders));
        // A counter that is full wakes, too.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The links of a router. Dropping them ends their thread.
pub struct Links {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Links {
    /// Listens, and starts a thread that first calls `confine`.
    pub fn start(
        config: Config,
        observer: impl Observer,
        confine: impl FnOnce() + Send + 'static,
    ) -> Result<Links, LinkError> {
        let (address, port) = (config.local, config.port);
        let listener = TcpListener::bind((address, port)).map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => LinkError::InUse { address, port },
            _ => LinkError::Io(e),
        })?;
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let edge = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), edge)?;
        let data = EventData::new_u64(LISTENER);
        epoll::add(&epoll, &listener, data, EventFlags::IN)?;
        let shared = Arc::new(Shared {
            wake,
            start: Instant::now(),
            orders: Mutex::default(),
            status: Mutex::default(),
        });
        let mut keeper = Keeper {
            shared: shared.clone(),
            config,
            epoll,
            listener,
            paused: None,
            peers: BTreeMap::new(),
            offers: HashMap::new(),
            connections: BTreeMap::new(),
            next: FIRST_CONNECTION,
            observer: Box::new(observer),
            changed: false,
        };
        let thread = std::thread::Builder::new()
            .name("ff-links".into())
            .spawn(move || {
                confine();
                keeper.run();
            })?;
        Ok(Links {
            shared,
            thread: Some(thread),
        })
    }

    /// The peers there are from now on.
    pub fn set_peers(&self, peers: Vec<PeerSpec>) {
        self.shared.order(|orders| orders.peers = Some(peers));
    }

    /// What is shown and believed from now on. If that is something new, every peer must show its
    /// certificate again.
    pub fn set_identity(&self, identity: Identity) {
        self.shared.order(|orders| orders.identity = Some(identity));
    }

    /// All links, by address.
    pub fn status(&self) -> Vec<Status> {
        let (at, mut all) = lock(&self.shared.status).clone();
        let passed = self.shared.now().saturating_sub(at) / 1_000_000;
        for status in &mut all {
            status.since_ms += passed;
        }
        all
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.shared.order(|orders| orders.stop = true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread has.
struct Keeper {
    shared: Arc<Shared>,
    config: Config,
    epoll: OwnedFd,
    listener: TcpListener,
    /// Until when the listener is left alone.
    paused: Option<u64>,
    peers: BTreeMap<IpAddr, Peer>,
    /// What each host was ever offered.
    offers: HashMap<IpAddr, u32>,
    /// By number, the oldest first.
    connections: BTreeMap<u64, Connection>,
    next: u64,
    observer: Box<dyn Observer>,
    /// Whether the status is not what it was.
    changed: bool,
}

impl Keeper {
    fn run(&mut self) {
        while self.obey() {
            let now = self.shared.now();
            self.on_time(now);
            self.publish(now);
            let mut events = [const { std::mem::MaybeUninit::uninit() }; 64];
            let timeout = self.next_timeout().map(|at| {
                // Not a little too early, to find nothing due.
                let left = at
                    .saturating_sub(self.shared.now())
                    .saturating_add(1_000_000);
                Timespec {
                    tv_sec: (left / 1_000_000_000) as i64,
                    tv_nsec: (left % 1_000_000_000) as i64,
                }
            });
            let ready: Vec<_> = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
                Ok((ready, _)) => ready.iter().map(|event| event.data.u64()).collect(),
                Err(Errno::INTR) => continue,
                Err(e) => {
                    let line = format!("links to other hosts end: {e}; restart the router");
                    return self.observer.notice(line);
                }
            };
            let now = self.shared.now();
            for data in ready {
                match data {
                    WAKE => {}
                    LISTENER => self.accept(now),
                    id => self.serve(id, now),
                }
            }
        }
    }

    /// Does what was ordered; whether to go on.
    fn obey(&mut self) -> bool {
        let orders = std::mem::take(&mut *lock(&self.shared.orders));
        let now = self.shared.now();
        let shown = self.config.identity.as_ref();
        let new = |identity: &Identity| !shown.is_some_and(|shown| shown.is(identity));
        if let Some(identity) = orders.identity.filter(new) {
            self.config.identity = Some(identity);
            let all: Vec<_> = self.connections.keys().copied().collect();
            for id in all {
                self.end(id, "this host's certificates have changed", now);
            }
            for peer in self.peers.values_mut().filter(|p| p.dial_at.is_some()) {
                peer.dial_at = Some(now);
            }
        }
        if let Some(specs) = orders.peers {
            self.set_peers(specs, now);
        }
        !orders.stop
    }

    fn set_peers(&mut self, specs: Vec<PeerSpec>, now: u64) {
        let local = self.config.local;
        let mut before = std::mem::take(&mut self.peers);
        let mut renamed = Vec::new();
        for mut spec in specs.into_iter().filter(|spec| spec.address != local) {
            let host = spec.address;
            let segment = spec.segment.clamp(MIN_SEGMENT, MAX_SEGMENT);
            spec.segment = *self.offers.entry(host).or_insert(segment);
            let peer = match before.remove(&host) {
                Some(mut peer) => {
                    if peer.spec.name != spec.name {
                        renamed.push(host);
                    }
                    peer.spec = spec;
                    peer
                }
                None => {
                    // Hosts that come at once do not try again at once.
                    let seed = self.config.incarnation ^ self.offers.len() as u64;
                    Peer::new(spec, dials(local, host), seed, now)
                }
            };
            self.peers.insert(host, peer);
        }
        let of = |hosts: &[IpAddr]| -> Vec<u64> {
            let all = self.connections.iter();
            let all = all.filter(|(_, c)| hosts.contains(&c.host));
            all.map(|(&id, _)| id).collect()
        };
        let gone: Vec<_> = before.into_keys().collect();
        let (renamed, lost) = (of(&renamed), of(&gone));
        for id in renamed {
            self.end(id, "the map has another name for it", now);
        }
        for id in lost {
            self.connections.remove(&id);
        }
        for host in gone {
            self.observer.down(host);
            self.observer.lapsed(host);
        }
        self.changed = true;
    }

    fn next_timeout(&self) -> Option<u64> {
        let connections = self.connections.values().map(|c| c.talk.next_timeout());
        let peers = self.peers.values();
        let peers = peers.flat_map(|peer| [peer.dial_at, peer.lapses_at]);
        connections
            .chain(peers.chain([self.paused]).flatten())
            .min()
    }

    fn on_time(&mut self, now: u64) {
        if self.paused.take_if(|until| *until <= now).is_some() {
            self.listen(EventFlags::IN);
        }
        let due = self.connections.iter_mut();
        let due = due.filter(|(_, c)| c.talk.next_timeout() <= now);
        let due: Vec<_> = due.map(|(&id, _)| id).collect();
        for id in due {
            self.act(id, |connection| connection.on_time(now));
        }
        let due = |at: &mut Option<u64>| at.take_if(|at| *at <= now).is_some();
        let (mut to_dial, mut lapsed) = (Vec::new(), Vec::new());
        for (&host, peer) in &mut self.peers {
            if due(&mut peer.dial_at) {
                to_dial.push(host);
            }
            if due(&mut peer.lapses_at) {
                lapsed.push(host);
            }
        }
        for host in lapsed {
            self.observer.lapsed(host);
        }
        for host in to_dial {
            self.dial(host, now);
        }
    }

    fn publish(&mut self, now: u64) {
        if std::mem::take(&mut self.changed) {
            let all = self.peers.values().map(|peer| peer.status(now)).collect();
            *lock(&self.shared.status) = (now, all);
        }
    }

    fn offer(&self, segment: u32) -> Hello {
        Hello {
            incarnation: self.config.incarnation,
            segment,
            features: self.config.features,
        }
    }

    fn dial(&mut self, host: IpAddr, now: u64) {
        let Some(peer) = self.peers.get(&host) else {
            return;
        };
        let (offer, to) = (
            self.offer(peer.spec.segment),
            SocketAddr::new(host, self.config.port),
        );
        let name = peer.spec.name.as_deref();
        let tls = self.config.identity.as_ref();
        let tls = tls.map(|identity| identity.connect(server_name(name, host)?));
        let tls: Result<_, TlsError> = tls.transpose();
        let dialed = tls.map_err(Closed::Tls).and_then(|tls| {
            let tls = tls.map(rustls::Connection::from);
            Connection::dial(self.config.local, to, tls, offer, now)
        });
        match dialed.and_then(|connection| self.add(connection)) {
            Ok(_) => {}
            Err(closed) => self.failed(host, true, &closed.to_string(), now),
        }
    }

    fn add(&mut self, connection: Connection) -> Result<u64, Closed> {
        let (id, data) = (self.next, EventData::new_u64(self.next));
        let flags = flags(&connection);
        epoll::add(&self.epoll, connection.fd(), data, flags).map_err(|e| Closed::Io(e.into()))?;
        self.next += 1;
        self.connections.insert(id, connection);
        Ok(id)
    }

    fn listen(&mut self, flags: EventFlags) {
        let data = EventData::new_u64(LISTENER);
        let _ = epoll::modify(&self.epoll, &self.listener, data, flags);
    }

    fn accept(&mut self, now: u64) {
        for _ in 0..ACCEPTS_PER_TURN {
            let (socket, from) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) =>
                {
                    continue;
                }
                Err(_) => {
                    // Out of descriptors: others must end first.
                    self.listen(EventFlags::empty());
                    self.paused = Some(now.saturating_add(PAUSE));
                    return;
                }
            };
            let host = from.ip().to_canonical();
            // Only a host of the map may connect, and only if it is not this one's part.
            let Some(peer) = self
                .peers
                .get(&host)
                .filter(|_| dials(host, self.config.local))
            else {
                continue;
            };
            if socket.set_nonblocking(true).is_err() {
                continue;
            }
            let offer = self.offer(peer.spec.segment);
            let name = peer.spec.name.as_deref();
            let tls = self.config.identity.as_ref();
            let tls = tls.map(|identity| identity.accept(server_name(name, host)?));
            let tls: Result<_, TlsError> = tls.transpose();
            let Ok(tls) = tls else { continue };
            let tls = tls.map(rustls::Connection::from);
            self.make_room(host);
            let _ = self.add(Connection::accepted(socket, host, tls, offer, now));
        }
    }

    /// Of a host's connections that are not its link, the oldest goes if there are too many: who has
    /// something to say says it at once.
    fn make_room(&mut self, host: IpAddr) {
        let pending = |c: &Connection| c.host == host && !c.talk.is_up();
        let mut all = self.connections.iter().filter(|(_, c)| pending(c));
        let oldest = all.next().map(|(&id, _)| id);
        if all.count() + 1 >= MAX_PENDING
            && let Some(oldest) = oldest
        {
            self.connections.remove(&oldest);
        }
    }

    fn serve(&mut self, id: u64, now: u64) {
        let mut heard = Vec::new();
        self.act(id, |connection| connection.receive(now, &mut heard));
        for what in heard {
            self.hear(id, what, now);
        }
    }

    /// Does something with a connection, sends what comes of it, and ends it if it is over.
    fn act(&mut self, id: u64, f: impl FnOnce(&mut Connection) -> Result<(), Closed>) {
        // One event may have ended what the next is of.
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let waited = connection.waits_for_room();
        let acted = f(connection);
        // What is over may have a last word to say.
        let flushed = connection.flush();
        if let Err(closed) = acted.and(flushed) {
            let early = connection.dialed && !connection.talk.is_up();
            let reason = match closed {
                // What we have said may have come after its end.
                Closed::End | Closed::Io(_) if early => {
                    "the other host has closed the connection; does its map (--hosts) have this host?"
                        .to_owned()
                }
                closed => closed.to_string(),
            };
            let now = self.shared.now();
            return self.end(id, &reason, now);
        }
        if waited != connection.waits_for_room() {
            let (data, flags) = (EventData::new_u64(id), flags(connection));
            let _ = epoll::modify(&self.epoll, connection.fd(), data, flags);
        }
    }

    fn hear(&mut self, id: u64, what: Heard, now: u64) {
        let Some(host) = self.connections.get(&id).map(|c| c.host) else {
            return;
        };
        match what {
            Heard::Hello { incarnation } => {
                // Whatever comes of this connection: the one that is up is another router's.
                let other = self.peers.get(&host).and_then(|peer| {
                    let agreed = peer.agreed.filter(|a| a.incarnation != incarnation);
                    peer.link.filter(|&link| link != id && agreed.is_some())
                });
                if let Some(other) = other {
                    self.end(other, "another router has begun there", now);
                }
                self.observer.greeted(host, incarnation);
                self.act(id, |connection| {
                    connection.talk.ready(incarnation, now);
                    Ok(())
                });
            }
            Heard::Up(agreed) => {
                let Some(peer) = self.peers.get_mut(&host) else {
                    return;
                };
                // The other side has given an earlier one up.
                if let Some(earlier) = peer.link.filter(|&earlier| earlier != id) {
                    self.connections.remove(&earlier);
                }
                peer.up(id, agreed, now);
                let tls = match self.config.identity {
                    Some(_) => "authenticated by TLS",
                    None => "not authenticated",
                };
                let line = format!(
                    "link to host {} is up, {tls}: incarnation {:016x}, packets of up to {} bytes",
                    peer.title(),
                    agreed.incarnation,
                    agreed.segment
                );
                self.changed = true;
                self.observer.up(host, agreed);
                self.observer.notice(line);
            }
        }
    }

    fn end(&mut self, id: u64, reason: &str, now: u64) {
        let Some(connection) = self.connections.remove(&id) else {
            return;
        };
        let (host, dialed) = (connection.host, connection.dialed);
        let Some(peer) = self.peers.get_mut(&host) else {
            return;
        };
        if peer.link == Some(id) {
            peer.down(now);
            self.observer.down(host);
        } else if peer.link.is_some() {
            return;
        }
        self.failed(host, dialed, reason, now);
    }

    fn failed(&mut self, host: IpAddr, dialed: bool, reason: &str, now: u64) {
        let Some(peer) = self.peers.get_mut(&host) else {
            return;
        };
        if dialed {
            peer.retry(now);
        }
        self.changed = true;
        if let Some(line) = peer.because(reason.to_owned(), now) {
            self.observer.notice(line);
        }
    }
}

fn flags(connection: &Connection) -> EventFlags {
    if connection.waits_for_room() {
        EventFlags::IN | EventFlags::OUT
    } else {
        EventFlags::IN
    }
}
