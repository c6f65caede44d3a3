//! The router: one process per host that carries the verbs of all its endpoints.
//!
//! [`Router::start`] makes threads. One serves sockets: it accepts sessions on endpoints' sockets and
//! executes control verbs. One polls the engine, which owns every object and executes work requests
//! (see ARCHITECTURE.md). Others open clients' memory, copy what may come late, and keep the links to
//! other hosts' routers. Clients are hostile: what they send or write
//! into shared memory is copied once and then checked; a session that breaks a rule ends with an
//! [`EndReason`], and all others go on.

#![forbid(unsafe_code)]

mod admin;
mod bridges;
mod cm;
mod completions;
mod connections;
mod control;
mod copier;
mod data;
mod datagram;
mod engine;
mod events;
mod exec;
mod foreign;
mod held;
mod hosts;
mod keys;
mod lifecycle;
#[cfg(test)]
mod lifecycle_tests;
mod links;
mod mcast;
mod memory;
#[cfg(test)]
mod memory_tests;
mod notices;
mod objects;
#[cfg(test)]
mod peers_tests;
mod posted;
#[cfg(test)]
mod posted_tests;
mod quota;
mod receive;
mod regions;
mod remote;
#[cfg(test)]
mod rollback_tests;
mod sandbox;
mod serve;
mod server;
#[cfg(test)]
mod server_tests;
mod srq;
#[cfg(test)]
mod srq_tests;
#[cfg(test)]
mod stock_tests;
mod table;
#[cfg(test)]
mod testbed;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod testing;
mod turns;
mod watch;
mod windows;
mod xrc;

pub use admin::Admin;
pub use bridges::MakeBridge;
pub use hosts::{Hosts, HostsError};

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use freeflow_api::{EndpointStatus, PathStatus, RouterStatus, RuntimeDir};
use freeflow_link::{Identity, LinkError, Links};
use freeflow_policy::Setting;
use freeflow_session::Handle;
use freeflow_types::{DeviceLimits, VirtualIp};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::foreign::Opener;
use crate::remote::Map;
use crate::serve::Shared;
use crate::server::{Listeners, Server};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// How a router behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// What the virtual devices offer, and what a session may have.
    pub limits: DeviceLimits,
    /// Descriptors that one endpoint may have the router hold, so that others have some.
    pub max_descriptors: u64,
    /// How long a session is watched after its last work, before the router waits for its
    /// doorbell.
    pub spin: Duration,
    /// The same while other hosts talk to this one.
    pub network_spin: Duration,
    /// Rounds without work before the router yields its processor between rounds.
    pub yield_after: u32,
    /// This host's address in the network between hosts, if it takes part.
    pub underlay: Option<IpAddr>,
    /// How it knows other routers, if it takes part and is to know any.
    pub links: Option<LinkConfig>,
    /// Whether threads that handle clients' input give up what they do not need of the kernel.
    pub sandbox: bool,
}

impl Default for Config {
    fn default() -> Self {
        // With a core to spare for the router, spinning a while costs nobody anything.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Config {
            limits: DeviceLimits::default(),
            max_descriptors: descriptor_limit() / 4,
            spin: Duration::from_micros(200),
            network_spin: Duration::from_micros(if cores > 4 { 50 } else { 5 }),
            yield_after: if cores > 4 { 2000 } else { 20 },
            underlay: None,
            links: None,
            sandbox: true,
        }
    }
}

/// How a router knows others.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// TCP port of all routers' control connections.
    pub port: u16,
    /// What it shows others, and whom it believes; without one, whoever speaks from a host's address
    /// is believed to be that host.
    pub identity: Option<Identity>,
}

/// Descriptors that this process may have.
fn descriptor_limit() -> u64 {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current.unwrap_or(u64::MAX)
}

/// A container's virtual NIC, as it is to be.
#[derive(Clone, Debug)]
pub struct EndpointSpec {
    /// Name, unique on this host.
    pub name: String,
    /// Tenant: endpoints of different tenants never reach each other.
    pub tenant: String,
    /// Virtual IP, unique in the tenant; the device's GID.
    pub ip: VirtualIp,
    /// Where the endpoint's socket is made.
    pub socket: PathBuf,
    /// Limits other than the usual ones.
    pub quota: Vec<Setting>,
    /// Whether the device has the router's underlay address as its second GID: by it the endpoint
    /// reaches any host that speaks RoCEv2, whatever its tenant may.
    pub underlay_gid: bool,
}

/// Why a router did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// Another endpoint of the tenant has the address.
    #[error("address {ip} is in use by endpoint \"{by}\"; choose another with --ip")]
    AddressInUse {
        /// The address.
        ip: VirtualIp,
        /// Who has it.
        by: String,
    },
    /// Another endpoint has the name.
    #[error(
        "an endpoint \"{name}\" exists already; choose another name (`freeflow run --name`, `freeflow \
         endpoint create NAME`)"
    )]
    NameInUse {
        /// The name.
        name: String,
    },
    /// Not an address that an endpoint may own.
    #[error("{ip} is not an address that an endpoint can own; choose a unicast address with --ip")]
    BadAddress {
        /// The address.
        ip: VirtualIp,
    },
    /// No such endpoint.
    #[error("there is no endpoint \"{name}\" (freeflow endpoint ls shows them)")]
    NoEndpoint {
        /// The name.
        name: String,
    },
    /// Not a name that can be part of a file name.
    #[error("\"{name}\" is no name for an endpoint: up to 63 letters, digits, '-', '_' and '.'")]
    BadName {
        /// The name.
        name: String,
    },
    /// Not a tenant that the map of hosts could name.
    #[error(
        "{name:?} is no name for a tenant: 1 to 255 bytes without white space, control characters and \
         '#', so that the map of hosts and messages between hosts can hold it"
    )]
    BadTenant {
        /// The name.
        name: String,
    },
    /// An endpoint is to have the router's underlay address, and there is none.
    #[error(
        "the router has no address in the network between hosts: start it with `freeflow router \
         --underlay ADDRESS`, or leave out --underlay-gid"
    )]
    NoUnderlay,
    /// Another router serves the runtime directory.
    #[error("a router already serves {}; use it, or choose another directory", dir.display())]
    AlreadyServed {
        /// The directory.
        dir: PathBuf,
    },
    /// The runtime directory is another user's.
    #[error("runtime directory {} belongs to user {owner}; choose another with --runtime-dir", dir.display())]
    NotOurs {
        /// The directory.
        dir: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// The endpoint has a program with a private network.
    #[error("endpoint \"{name}\" is attached to its network already")]
    AttachedAlready {
        /// The name.
        name: String,
    },
    /// The request needs exactly one descriptor.
    #[error("the request comes with {got} descriptors, not with one of a network namespace")]
    NoNamespace {
        /// How many came.
        got: usize,
    },
    /// The system refused a private network.
    #[error(transparent)]
    Network(#[from] freeflow_network::NetworkError),
    /// The address is not one of this host's.
    #[error("{address} is not an address of this host; choose one of `ip addr` with --underlay")]
    NotHere {
        /// The address.
        address: IpAddr,
    },
    /// Something has RoCEv2's port already.
    #[error(
        "UDP port 4791 of {address} is in use: by another router, or by the kernel's rxe (`rdma link`)"
    )]
    FabricInUse {
        /// The address.
        address: IpAddr,
    },
    /// No control connections to other routers.
    #[error(transparent)]
    Links(#[from] LinkError),
    /// The router's tables are full.
    #[error("the router has no room for another endpoint")]
    TooMany,
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndReason {
    /// The library closed the connection.
    #[error("connection closed")]
    Closed,
    /// The process is gone.
    #[error("process exited")]
    ProcessExited,
    /// Its endpoint was removed.
    #[error("endpoint removed")]
    EndpointRemoved,
    /// Bytes that are no message.
    #[error("bad message: {0}")]
    Message(freeflow_session::DecodeError),
    /// A library of another version.
    #[error(
        "library speaks protocol version {theirs}, this router {}",
        freeflow_session::PROTOCOL_VERSION
    )]
    Version {
        /// The library's version.
        theirs: u16,
    },
    /// A message that does not belong there.
    #[error("message out of order")]
    OutOfOrder,
    /// A message with descriptors, or one that is too long.
    #[error("oversized message or unexpected descriptors")]
    UnexpectedDescriptors,
    /// It asks, but does not read the answers.
    #[error("does not read its answers")]
    DoesNotRead,
    /// A region that the router would not have registered.
    #[error(
        "slot {slot} of the table of regions has one of {len} bytes with rights {access:#x} at \
         offset {offset:#x} of segment {segment}, which cannot be"
    )]
    PostedRegion {
        /// The slot.
        slot: u32,
        /// Rights that it claims.
        access: u32,
        /// Bytes.
        len: u64,
        /// Segment.
        segment: u32,
        /// Offset in it.
        offset: u64,
    },
    /// Its memory did not come when the router reached for it.
    #[error(
        "memory at {addr:#x}, which cannot be shared, did not come in time (a file system that is \
         slow or does not answer?)"
    )]
    LateMemory {
        /// Where the router reached for.
        addr: u64,
    },
    /// A send ring's index ran away.
    #[error("send ring of QP {qpn:#x} claims {waiting} requests, more than it holds")]
    SendIndex {
        /// The queue pair.
        qpn: u32,
        /// The claim.
        waiting: u64,
    },
    /// A shared receive queue's index ran away.
    #[error("ring of shared receive queue claims {waiting} requests, more than it holds")]
    SrqIndex {
        /// The claim.
        waiting: u64,
    },
    /// A receive ring's index ran away.
    #[error("receive ring of QP {qpn:#x} claims {waiting} requests, more than it holds")]
    RecvIndex {
        /// The queue pair.
        qpn: u32,
        /// The claim.
        waiting: u64,
    },
}

/// A running router. Dropping it ends all sessions.
pub struct Router {
    shared: Arc<Shared>,
    listeners: Listeners,
    endpoints: Mutex<HashMap<String, (Handle, PathBuf)>>,
    underlay: Option<IpAddr>,
    links: Option<Links>,
    stop: Option<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Router {
    /// Starts a router with no endpoints.
    pub fn start(config: Config) -> Result<Router, RouterError> {
        let io = |what: &str| {
            let what = what.to_owned();
            move |e: io::Error| RouterError::Io { what, source: e }
        };
        let confined = config.sandbox;
        let opener = Opener::thread(confined).map_err(io("cannot start a thread"))?;
        let shared =
            Shared::new(&config, opener).map_err(|e| io("cannot make doorbells")(e.into()))?;
        let shared = Arc::new(shared);
        if let Some(local) = config.underlay {
            let fabric = remote::open(local).map_err(|e| match e.kind() {
                io::ErrorKind::AddrNotAvailable => RouterError::NotHere { address: local },
                io::ErrorKind::AddrInUse => RouterError::FabricInUse { address: local },
                _ => io("cannot open sockets to other hosts")(e),
            })?;
            shared
                .with(|engine| engine.join(fabric))
                .map_err(|e| io("cannot watch sockets")(e.into()))?;
        }
        let links = match (config.underlay, config.links) {
            (Some(local), Some(links)) => Some(links::start(&shared, local, links, confined)?),
            _ => None,
        };
        let (stopped, stop) =
            freeflow_shm::event_pair().map_err(|e| io("cannot make a socket")(e.into()))?;
        let (server, listeners) = Server::new(shared.clone(), stopped)
            .map_err(|e| io("cannot watch sockets")(e.into()))?;
        let engine = shared.clone();
        let threads = vec![
            std::thread::Builder::new()
                .name("ff-engine".into())
                .spawn(move || engine.run_engine(confined))
                .map_err(io("cannot start a thread"))?,
            std::thread::Builder::new()
                .name("ff-control".into())
                .spawn(move || server.run(confined))
                .map_err(io("cannot start a thread"))?,
        ];
        Ok(Router {
            shared,
            listeners,
            endpoints: Mutex::default(),
            underlay: config.underlay,
            links,
            stop: Some(stop),
            threads,
        })
    }

    fn endpoints(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Handle, PathBuf)>> {
        self.endpoints
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an endpoint and serves its socket, which is readable and writable by its owner alone.
    /// A socket that a dead router left at the same place is replaced.
    pub fn add_endpoint(&self, spec: EndpointSpec) -> Result<(), RouterError> {
        let mut endpoints = self.endpoints();
        let handle = self.shared.with(|engine| engine.add_endpoint(&spec))?;
        self.shared.set_rate(handle, &spec.quota);
        let served = listen(&spec.socket)
            .map_err(|e| match Errno::from_io_error(&e) {
                Some(Errno::MFILE) => io::Error::other(
                    "the router has no descriptor left; start it with a higher limit (ulimit -n)",
                ),
                _ => e,
            })
            .and_then(|socket| self.listeners.add(handle, socket).map_err(io::Error::from));
        if let Err(source) = served {
            self.shared.forget_rate(handle);
            self.shared.with(|engine| engine.remove_endpoint(handle));
            let what = format!(
                "cannot serve the endpoint's socket {}",
                spec.socket.display()
            );
            return Err(RouterError::Io { what, source });
        }
        endpoints.insert(spec.name, (handle, spec.socket));
        Ok(())
    }

    /// Says where other hosts' endpoints are, in place of what was said before. Queue pairs that are
    /// connected stay so.
    pub fn set_hosts(&self, hosts: Hosts) {
        if let Some(local) = self.underlay {
            let map = Map::new(hosts, local);
            let peers = links::peers(&map);
            self.shared.with(|engine| engine.network.set_map(map));
            if let Some(links) = &self.links {
                links.set_peers(peers);
            }
        }
    }

    /// What the router shows other hosts from now on, if it shows anything at all: they must show
    /// theirs again.
    pub fn set_identity(&self, identity: Identity) {
        if let Some(links) = &self.links {
            links.set_identity(identity);
        }
    }

    /// This host's address in the network between hosts.
    pub(crate) fn underlay(&self) -> Option<IpAddr> {
        self.underlay
    }

    /// The other host to which the map gives an address of a tenant.
    pub(crate) fn elsewhere(&self, tenant: &str, ip: VirtualIp) -> Option<IpAddr> {
        self.shared
            .with(|engine| engine.network.find(tenant, ip.into()))
    }

    /// Tenant of an endpoint.
    pub(crate) fn tenant(&self, endpoint: &str) -> Option<String> {
        self.shared.with(|engine| engine.tenant(endpoint))
    }

    /// Changes an endpoint's quota, from now on: what is in use above it stays.
    pub fn set_quota(&self, name: &str, settings: &[Setting]) -> Result<(), RouterError> {
        let endpoints = self.endpoints();
        let Some(&(handle, _)) = endpoints.get(name) else {
            return Err(RouterError::NoEndpoint {
                name: name.to_owned(),
            });
        };
        self.shared.set_rate(handle, settings);
        self.shared
            .with(|engine| engine.set_quota(handle, settings));
        Ok(())
    }

    /// Removes an endpoint: its sessions end, its socket is gone, its address is free.
    pub fn remove_endpoint(&self, name: &str) -> Result<(), RouterError> {
        let Some((handle, socket)) = self.endpoints().remove(name) else {
            return Err(RouterError::NoEndpoint {
                name: name.to_owned(),
            });
        };
        self.listeners.remove(handle);
        let _ = std::fs::remove_file(socket);
        self.shared.forget_rate(handle);
        self.shared.with(|engine| engine.remove_endpoint(handle));
        Ok(())
    }

    /// For how long the engine has been busy with one round, and with which queue pair, if that is
    /// longer than it may be.
    pub fn stuck(&self) -> Option<(Duration, u32)> {
        self.shared.progress.stuck(self.shared.now())
    }

    /// What the operator was not told yet, one line each.
    pub fn notices(&self) -> Vec<String> {
        self.shared.notices.take()
    }

    /// How a session's connected queue pairs reach their peers. There may be many, and others want
    /// the engine.
    fn paths(&self, session: Handle) -> Vec<PathStatus> {
        let mut paths = BTreeMap::new();
        let mut from = Some(0);
        while let Some(at) = from {
            from = self.shared.with(|e| e.count_paths(session, at, &mut paths));
        }
        let path = |(host, qps)| PathStatus { host, qps };
        paths.into_iter().map(path).collect()
    }

    /// Everything there is to know.
    pub fn status(&self) -> RouterStatus {
        let (endpoints, ended_sessions, mut fabric) = self.shared.with(|e| {
            let ended = e.ended.iter().cloned().collect();
            (e.status(), ended, e.network.status())
        });
        let with_paths = |(mut endpoint, handles): (EndpointStatus, Vec<Handle>)| {
            for (session, handle) in endpoint.sessions.iter_mut().zip(handles) {
                session.paths = self.paths(handle);
            }
            endpoint
        };
        let endpoints = endpoints.into_iter().map(with_paths).collect();
        if let (Some(fabric), Some(links)) = (&mut fabric, &self.links) {
            fabric.incarnation = Some(format!("{:016x}", self.shared.incarnation));
            fabric.links = links.status().into_iter().map(links::status).collect();
        }
        RouterStatus {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: self.shared.start.elapsed().as_millis() as u64,
            embedded: false,
            sandbox: self.shared.confinement(),
            fabric,
            endpoints,
            ended_sessions,
        }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.links = None;
        let names: Vec<_> = self.endpoints().keys().cloned().collect();
        for name in names {
            let _ = self.remove_endpoint(&name);
        }
        self.stop = None;
        self.shared.request_stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn listen(path: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    rustix::net::bind(&socket, &address(path)?)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A socket's address; a path that is too long for one is an error that says so.
fn address(path: &std::path::Path) -> io::Result<SocketAddrUnix> {
    SocketAddrUnix::new(path).map_err(|e| match RuntimeDir::excess(path) {
        Some(bytes) => io::Error::new(
            io::ErrorKind::InvalidFilename,
            format!(
                "its path is {bytes} bytes too long for a socket; choose a shorter runtime \
                 directory (--runtime-dir) or name"
            ),
        ),
        None => e.into(),
    })
}
