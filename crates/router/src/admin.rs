//! The control socket: creating, listing and removing endpoints.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freeflow_api::{
    CONTROL_VERSION, ControlAnswer, ControlRequest, MAX_CONTROL_BYTES, NewEndpoint, Operation,
    RouterStatus, RuntimeDir,
};
use freeflow_link::Identity;
use freeflow_shm::{recv_packet, send_packet};
use freeflow_types::VirtualIp;
use rustix::fs::FlockOperation;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use crate::bridges::{Bridges, MakeBridge};
use crate::hosts::is_tenant;
use crate::{EndpointSpec, Hosts, Router, RouterError};

/// Connections served at once.
const MAX_CONNECTIONS: usize = 4096;

/// Stack of a connection's thread.
const STACK_BYTES: usize = 256 << 10;

/// A directory's last router that is about to end gets this time for it.
const PREDECESSOR: Duration = Duration::from_secs(10);

/// Time between looks whether it has.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// An embedded router waits so long for another endpoint before it ends.
const LINGER: Duration = Duration::from_secs(1);

/// An embedded router that never had an endpoint ends after this time.
const FIRST_ENDPOINT: Duration = Duration::from_secs(20);

/// Time between looks whether the engine is stuck.
const LOOK: Duration = Duration::from_secs(1);

/// Addresses are given out of 10.77.0.0/16.
const POOL: [u8; 2] = [10, 77];

/// A router's control plane on one runtime directory.
pub struct Admin {
    router: Router,
    dir: RuntimeDir,
    /// Whether it ends with its last endpoint.
    embedded: bool,
    listener: OwnedFd,
    /// Held as long as the directory is served.
    lock: OwnedFd,
    bridges: Bridges,
    connections: AtomicUsize,
    /// One change at a time: what is free must stay free until it is taken.
    turn: Mutex<()>,
    /// Held for moments only: [`Admin::wait`] also watches an engine that does not answer.
    state: Mutex<State>,
    /// Of the state.
    changed: Condvar,
}

struct State {
    /// Endpoints by name, with the number of their creation.
    endpoints: HashMap<String, u64>,
    created: u64,
    /// Endpoints that are being created.
    coming: usize,
    /// When the last endpoint went, or the router came.
    since: Instant,
    had_any: bool,
    /// Nothing is created any more.
    ending: bool,
    stop: bool,
}

/// An endpoint that was created.
struct Created {
    name: String,
    ip: IpAddr,
    underlay: Option<IpAddr>,
    socket: PathBuf,
    warning: Option<String>,
}

fn io_error(what: &str, path: &Path, source: impl Into<io::Error>) -> RouterError {
    RouterError::Io {
        what: format!("{what} {}", path.display()),
        source: source.into(),
    }
}

impl Admin {
    /// Takes a runtime directory and serves it with a router, until [`Self::close`]. The directory's
    /// last router gets ten seconds to end, as long as `ends` says that it is about to. An `embedded`
    /// router ends with its last endpoint.
    pub fn start(
        router: Router,
        dir: RuntimeDir,
        make_bridge: MakeBridge,
        embedded: bool,
        ends: &dyn Fn() -> bool,
    ) -> Result<Arc<Admin>, RouterError> {
        let lock = take(&dir, ends)?;
        let path = dir.control_socket();
        let listener = crate::listen(&path).map_err(|e| io_error("cannot serve", &path, e))?;
        rustix::io::ioctl_fionbio(&listener, false)
            .map_err(|e| io_error("cannot serve", &path, e))?;
        let admin = Arc::new(Admin {
            router,
            dir,
            embedded,
            listener,
            lock,
            bridges: Bridges::new(make_bridge),
            connections: AtomicUsize::new(0),
            turn: Mutex::default(),
            state: Mutex::new(State {
                endpoints: HashMap::new(),
                created: 0,
                coming: 0,
                since: Instant::now(),
                had_any: false,
                ending: false,
                stop: false,
            }),
            changed: Condvar::new(),
        });
        let server = admin.clone();
        std::thread::Builder::new()
            .name("ff-admin".into())
            .spawn(move || server.serve())
            .map_err(|e| io_error("cannot start a thread for", &path, e))?;
        Ok(admin)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Router::set_hosts`].
    pub fn set_hosts(&self, hosts: Hosts) {
        self.router.set_hosts(hosts);
    }

    /// As [`Router::set_identity`].
    pub fn set_identity(&self, identity: Identity) {
        self.router.set_identity(identity);
    }

    /// Has [`Self::wait`] tell the operator something, in one line.
    pub fn notice(&self, line: String) {
        self.router.shared.notices.push(line);
        self.changed.notify_all();
    }

    /// Waits until the router is to end: somebody says so, or it is embedded and its last
    /// endpoint is gone. Nothing is created any more then.
    pub fn wait(&self) {
        let mut told = false;
        let mut state = self.state();
        loop {
            for notice in self.router.notices() {
                tell(&notice);
            }
            let lonely = self.embedded && state.endpoints.is_empty() && state.coming == 0;
            let patience = if state.had_any {
                LINGER
            } else {
                FIRST_ENDPOINT
            };
            let left = patience.saturating_sub(state.since.elapsed());
            if state.stop || lonely && left.is_zero() {
                state.ending = true;
                return;
            }
            let look = if lonely { left.min(LOOK) } else { LOOK };
            state = match self.changed.wait_timeout(state, look) {
                Ok((state, _)) => state,
                Err(e) => e.into_inner().0,
            };
            match self.router.stuck() {
                Some((lasted, qpn)) if !std::mem::replace(&mut told, true) => tell(&format!(
                    "the engine has been busy with one round for {} ms, at queue pair {qpn:#x}",
                    lasted.as_millis()
                )),
                Some(_) => {}
                None => told = false,
            }
        }
    }

    /// Ends [`Self::wait`].
    pub fn stop(&self) {
        self.state().stop = true;
        self.changed.notify_all();
    }

    /// Ends service: no socket of the directory leads anywhere any more. Who asks the router for
    /// something from now on starts another.
    pub fn close(&self) {
        self.state().ending = true;
        // A last endpoint may be on its way.
        drop(self.turn());
        let _ = std::fs::remove_file(self.dir.control_socket());
        let endpoints = self.state().endpoints.clone();
        for (name, number) in endpoints {
            let _ = self.remove(&name, Some(number));
        }
        // The next router need not wait for this one's threads.
        let _ = rustix::fs::flock(&self.lock, FlockOperation::Unlock);
    }

    fn serve(self: Arc<Self>) {
        loop {
            let socket = match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Ok(socket) => socket,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
                Err(_) => {
                    // Out of descriptors: others must end first.
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            // Relaxed: a bound, not an order.
            if self.connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
                self.connections.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let admin = self.clone();
            let served = std::thread::Builder::new()
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    admin.connection(&socket);
                    admin.connections.fetch_sub(1, Ordering::Relaxed);
                });
            if served.is_err() {
                self.connections.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    fn connection(&self, socket: &OwnedFd) {
        let own = rustix::process::geteuid();
        let allowed = rustix::net::sockopt::socket_peercred(socket)
            .is_ok_and(|peer| peer.uid == own || peer.uid.is_root());
        if !allowed {
            return;
        }
        let mut ephemeral = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let Ok(packet) = recv_packet(socket, &mut buffer, RecvFlags::empty()) else {
                break;
            };
            if packet.len == 0 {
                break;
            }
            let answer = match serde_json::from_slice::<ControlRequest>(&buffer[..packet.len]) {
                Ok(request) if request.version == CONTROL_VERSION && !packet.truncated => {
                    self.execute(request.body, &packet.fds, &mut ephemeral)
                }
                Ok(request) => ControlAnswer::Error(format!(
                    "this router speaks control version {CONTROL_VERSION}, not {}; use the \
                     freeflow command of the same release",
                    request.version
                )),
                Err(e) => ControlAnswer::Error(format!("request is not understood: {e}")),
            };
            let Ok(bytes) = serde_json::to_vec(&answer) else {
                break;
            };
            let fits = bytes.len() <= MAX_CONTROL_BYTES;
            if !fits || send_packet(socket, &bytes, &[], SendFlags::empty()).is_err() {
                break;
            }
        }
        for (name, number) in ephemeral {
            let _ = self.remove(&name, Some(number));
        }
    }

    fn execute(
        &self,
        operation: Operation,
        fds: &[OwnedFd],
        ephemeral: &mut Vec<(String, u64)>,
    ) -> ControlAnswer {
        let done = |result: Result<(), RouterError>| result.map(|()| ControlAnswer::Done);
        let result = match operation {
            Operation::Status => Ok(ControlAnswer::Status(RouterStatus {
                embedded: self.embedded,
                ..self.router.status()
            })),
            Operation::CreateEndpoint(new) => self.create(new, ephemeral),
            Operation::RemoveEndpoint { name } => {
                // Whoever created one means that one.
                let own = ephemeral.iter().find(|(of, _)| *of == name);
                done(self.remove(&name, own.map(|&(_, number)| number)))
            }
            Operation::SetQuota { name, settings } => done(self.router.set_quota(&name, &settings)),
            Operation::AttachNetwork { name } => done(self.attach(&name, fds)),
        };
        result.unwrap_or_else(|e| ControlAnswer::Error(e.to_string()))
    }

    fn create(
        &self,
        new: NewEndpoint,
        ephemeral: &mut Vec<(String, u64)>,
    ) -> Result<ControlAnswer, RouterError> {
        let _turn = self.turn();
        {
            let mut state = self.state();
            if state.ending {
                return Ok(ControlAnswer::Ending);
            }
            state.coming += 1;
        }
        let ends_with_us = new.ephemeral;
        let created = self.create_now(new);
        let mut state = self.state();
        state.coming -= 1;
        state.since = Instant::now();
        let created = created?;
        state.had_any = true;
        state.created += 1;
        let number = state.created;
        state.endpoints.insert(created.name.clone(), number);
        drop(state);
        if ends_with_us {
            ephemeral.push((created.name.clone(), number));
        }
        let Created {
            name,
            ip,
            underlay,
            socket,
            warning,
        } = created;
        if let Some(warning) = &warning {
            self.notice(format!("warning: {warning}"));
        }
        Ok(ControlAnswer::Created {
            name,
            ip,
            underlay,
            socket,
            warning,
        })
    }

    fn create_now(&self, new: NewEndpoint) -> Result<Created, RouterError> {
        let tenant = new.tenant.unwrap_or_else(|| "default".to_owned());
        if !is_tenant(&tenant) {
            return Err(RouterError::BadTenant { name: tenant });
        }
        let existing = self.router.status().endpoints;
        let taken: HashSet<_> = existing
            .iter()
            .filter(|e| e.tenant == tenant)
            .map(|e| e.ip)
            .collect();
        // An IPv4 address in an IPv6 address's clothes has the same GID.
        let ip = match new.ip.map(|ip| ip.to_canonical()) {
            Some(ip) if is_pool_edge(ip) => {
                return Err(RouterError::BadAddress { ip: VirtualIp(ip) });
            }
            Some(ip) => ip,
            None => next_address(&taken).ok_or(RouterError::TooMany)?,
        };
        let names: HashSet<_> = existing.iter().map(|e| e.name.as_str()).collect();
        let name = match new.name {
            Some(name) => name,
            None => next_name(&names),
        };
        if !is_name(&name) {
            return Err(RouterError::BadName { name });
        }
        let socket = self.dir.endpoint_socket(&name);
        let spec = EndpointSpec {
            name: name.clone(),
            tenant: tenant.clone(),
            ip: VirtualIp(ip),
            socket: socket.clone(),
            quota: new.quota,
            underlay_gid: new.underlay_gid,
        };
        self.router.add_endpoint(spec)?;
        let elsewhere = self.router.elsewhere(&tenant, VirtualIp(ip));
        Ok(Created {
            warning: elsewhere.map(|host| {
                format!(
                    "endpoint \"{name}\" has address {ip} of tenant {tenant}, which the map (--hosts) \
                     gives to host {host}: endpoints on other hosts do not reach it"
                )
            }),
            underlay: self.router.underlay().filter(|_| new.underlay_gid),
            name,
            ip,
            socket,
        })
    }

    fn attach(&self, name: &str, fds: &[OwnedFd]) -> Result<(), RouterError> {
        let [namespace] = fds else {
            return Err(RouterError::NoNamespace { got: fds.len() });
        };
        // The endpoint is not removed meanwhile.
        let _turn = self.turn();
        let tenant = self
            .router
            .tenant(name)
            .ok_or_else(|| RouterError::NoEndpoint {
                name: name.to_owned(),
            })?;
        self.bridges.attach(name, &tenant, namespace.as_fd())
    }

    /// Removes an endpoint; with a number, only if it is that one and not a later one that has
    /// its name.
    fn remove(&self, name: &str, number: Option<u64>) -> Result<(), RouterError> {
        let _turn = self.turn();
        let found = self.state().endpoints.get(name).copied();
        if found.is_none() || number.is_some() && found != number {
            return Err(RouterError::NoEndpoint {
                name: name.to_owned(),
            });
        }
        self.router.remove_endpoint(name)?;
        self.bridges.detach(name);
        let _ = std::fs::remove_dir_all(self.dir.sysfs(name));
        let mut state = self.state();
        state.endpoints.remove(name);
        state.since = Instant::now();
        drop(state);
        self.changed.notify_all();
        Ok(())
    }
}

/// Writes a line to the log; a terminal that is gone is no reason to end.
fn tell(line: &str) {
    let _ = writeln!(io::stderr(), "freeflow: {line}");
}

/// Makes a runtime directory, locks it, and removes what a router that was killed left in it.
fn take(dir: &RuntimeDir, ends: &dyn Fn() -> bool) -> Result<OwnedFd, RouterError> {
    let path = dir.path();
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder
        .create(path)
        .map_err(|e| io_error("cannot make runtime directory", path, e))?;
    let meta = std::fs::symlink_metadata(path).map_err(|e| io_error("cannot read", path, e))?;
    let own = rustix::process::geteuid().as_raw();
    if !meta.is_dir() || meta.uid() != own {
        return Err(RouterError::NotOurs {
            dir: path.to_owned(),
            owner: meta.uid(),
        });
    }
    let _ = std::fs::set_permissions(path, PermissionsExt::from_mode(0o700));
    let lock = lock(dir, ends)?;
    for stale in [dir.endpoints(), dir.sysfs_root()] {
        let _ = std::fs::remove_dir_all(stale);
    }
    let path = dir.endpoints();
    builder
        .create(&path)
        .map_err(|e| io_error("cannot make", &path, e))?;
    Ok(lock)
}

fn lock(dir: &RuntimeDir, ends: &dyn Fn() -> bool) -> Result<OwnedFd, RouterError> {
    let path = dir.lock();
    let file = std::fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| io_error("cannot open", &path, e))?;
    let deadline = Instant::now() + PREDECESSOR;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file.into()),
            // It does not say when it ends.
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline && ends() => {
                std::thread::sleep(LOOK_AGAIN);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(RouterError::AlreadyServed {
                    dir: dir.path().to_owned(),
                });
            }
            Err(e) => return Err(io_error("cannot lock", &path, e)),
        }
    }
}

/// The addresses of the pool's network itself and of all its hosts at once.
fn is_pool_edge(ip: IpAddr) -> bool {
    let [a, b] = POOL;
    let edges = [Ipv4Addr::new(a, b, 0, 0), Ipv4Addr::new(a, b, 255, 255)];
    edges.iter().any(|&edge| ip == IpAddr::V4(edge))
}

/// The lowest address of the pool that nobody has; networks end in neither 0 nor 255.
fn next_address(taken: &HashSet<IpAddr>) -> Option<IpAddr> {
    (1..=u16::MAX)
        .map(|n| n.to_be_bytes())
        .filter(|low| !matches!(low[1], 0 | 255))
        .map(|low| IpAddr::V4(Ipv4Addr::new(POOL[0], POOL[1], low[0], low[1])))
        .find(|ip| !taken.contains(ip))
}

fn next_name(taken: &HashSet<&str>) -> String {
    (1u64..)
        .map(|n| format!("ep{n}"))
        .find(|name| !taken.contains(name.as_str()))
        .unwrap_or_default()
}

/// Names are parts of file names.
fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && name.len() <= 63 && !name.starts_with('.') && name.chars().all(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_the_lowest_free() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(next_address(&HashSet::new()), Some(ip("10.77.0.1")));
        let taken = HashSet::from([ip("10.77.0.1"), ip("10.77.0.3")]);
        assert_eq!(next_address(&taken), Some(ip("10.77.0.2")));
        let full: HashSet<_> = (1..=254).map(|n| ip(&format!("10.77.0.{n}"))).collect();
        assert_eq!(next_address(&full), Some(ip("10.77.1.1")));
    }

    #[test]
    fn a_network_is_no_host() {
        assert!(is_pool_edge("10.77.0.0".parse().unwrap()));
        assert!(is_pool_edge("10.77.255.255".parse().unwrap()));
        assert!(!is_pool_edge("10.77.1.0".parse().unwrap()));
    }

    #[test]
    fn names_stay_in_their_directory() {
        assert!(is_name("web-1.a_b"));
        for bad in ["", ".", "..", "a/b", "a b", "\u{e9}", &"x".repeat(64)] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn a_directory_has_one_router() {
        let dir = std::env::temp_dir().join(format!("ff-admin-{}", std::process::id()));
        let dir = RuntimeDir::at(dir);
        let first = take(&dir, &|| false).unwrap();
        let second = take(&dir, &|| false);
        assert!(matches!(second, Err(RouterError::AlreadyServed { .. })));
        let heir = dir.clone();
        let (asked, looked) = std::sync::mpsc::channel();
        let patient = std::thread::spawn(move || {
            take(&heir, &|| {
                let _ = asked.send(());
                true
            })
        });
        looked.recv().unwrap();
        drop(first);
        drop(patient.join().unwrap().unwrap());
        std::fs::remove_dir_all(dir.path()).unwrap();
    }
}
