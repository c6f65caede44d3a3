//! The control socket: creating, listing and removing endpoints.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use freeflow_api::{
    CONTROL_VERSION, ControlAnswer, ControlRequest, MAX_CONTROL_BYTES, NewEndpoint, Operation,
    RuntimeDir,
};
use freeflow_shm::{recv_packet, send_packet};
use freeflow_types::VirtualIp;
use rustix::fs::FlockOperation;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use crate::{EndpointSpec, Router, RouterError};

/// Connections served at once.
const MAX_CONNECTIONS: usize = 4096;

/// Stack of a connection's thread.
const STACK_BYTES: usize = 256 << 10;

/// An embedded router waits so long for another endpoint before it ends.
const LINGER: Duration = Duration::from_secs(1);

/// An embedded router that never had an endpoint ends after this time.
const FIRST_ENDPOINT: Duration = Duration::from_secs(20);

/// Time between looks whether an embedded router may end, and whether the engine is stuck.
const LOOK_EMBEDDED: Duration = Duration::from_millis(200);
const LOOK: Duration = Duration::from_secs(1);

/// Addresses are given out of 10.77.0.0/16.
const POOL: [u8; 2] = [10, 77];

/// A router's control plane on one runtime directory.
pub struct Admin {
    router: Router,
    dir: RuntimeDir,
    listener: OwnedFd,
    /// Held as long as the directory is served.
    _lock: OwnedFd,
    connections: AtomicUsize,
    /// Endpoints, and when the last one went (or the router came).
    endpoints: Mutex<(HashSet<String>, Instant, bool)>,
    stop: Mutex<bool>,
    stopped: Condvar,
}

fn io_error(what: &str, path: &Path, source: impl Into<io::Error>) -> RouterError {
    RouterError::Io {
        what: format!("{what} {}", path.display()),
        source: source.into(),
    }
}

impl Admin {
    /// Takes a runtime directory and serves it with a router, until [`Self::stop`].
    pub fn start(router: Router, dir: RuntimeDir) -> Result<Arc<Admin>, RouterError> {
        let lock = take(&dir)?;
        let path = dir.control_socket();
        let listener = crate::listen(&path).map_err(|e| io_error("cannot serve", &path, e))?;
        rustix::io::ioctl_fionbio(&listener, false)
            .map_err(|e| io_error("cannot serve", &path, e))?;
        let admin = Arc::new(Admin {
            router,
            dir,
            listener,
            _lock: lock,
            connections: AtomicUsize::new(0),
            endpoints: Mutex::new((HashSet::new(), Instant::now(), false)),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
        });
        let server = admin.clone();
        std::thread::Builder::new()
            .name("ff-admin".into())
            .spawn(move || server.serve())
            .map_err(|e| io_error("cannot start a thread for", &path, e))?;
        Ok(admin)
    }

    /// Waits until the router is to end: somebody says so, or it is embedded and its last
    /// endpoint is gone.
    pub fn wait(&self, embedded: bool) {
        // An idle router is woken as rarely as its work allows.
        let wait = if embedded { LOOK_EMBEDDED } else { LOOK };
        let mut told = false;
        let mut stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        while !*stop {
            stop = match self.stopped.wait_timeout(stop, wait) {
                Ok((stop, _)) => stop,
                Err(e) => e.into_inner().0,
            };
            match self.router.stuck() {
                Some((lasted, qpn)) if !std::mem::replace(&mut told, true) => eprintln!(
                    "freeflow: the engine has been busy with one round for {} ms, at queue pair \
                     {qpn:#x}",
                    lasted.as_millis()
                ),
                Some(_) => {}
                None => told = false,
            }
            if embedded && self.is_lonely() {
                return;
            }
        }
    }

    /// Ends [`Self::wait`].
    pub fn stop(&self) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stopped.notify_all();
    }

    /// Ends service: no socket of the directory leads anywhere any more. Who asks the router for
    /// something from now on starts another.
    pub fn close(&self) {
        let _ = std::fs::remove_file(self.dir.control_socket());
        let endpoints = self
            .endpoints
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .clone();
        for name in endpoints {
            let _ = self.remove(&name);
        }
    }

    fn is_lonely(&self) -> bool {
        let endpoints = self
            .endpoints
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (names, since, had_any) = &*endpoints;
        let patience = if *had_any { LINGER } else { FIRST_ENDPOINT };
        names.is_empty() && since.elapsed() > patience
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
                    self.execute(request.body, &mut ephemeral)
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
        for name in ephemeral {
            let _ = self.remove(&name);
        }
    }

    fn execute(&self, operation: Operation, ephemeral: &mut Vec<String>) -> ControlAnswer {
        let result = match operation {
            Operation::Status => Ok(ControlAnswer::Status(self.router.status())),
            Operation::CreateEndpoint(new) => self.create(new, ephemeral),
            Operation::RemoveEndpoint { name } => self.remove(&name).map(|()| ControlAnswer::Done),
        };
        result.unwrap_or_else(|e| ControlAnswer::Error(e.to_string()))
    }

    fn create(
        &self,
        new: NewEndpoint,
        ephemeral: &mut Vec<String>,
    ) -> Result<ControlAnswer, RouterError> {
        // One at a time: what is free must stay free until it is taken.
        let mut endpoints = self
            .endpoints
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let tenant = new.tenant.unwrap_or_else(|| "default".to_owned());
        let existing = self.router.status().endpoints;
        let taken: HashSet<_> = existing
            .iter()
            .filter(|e| e.tenant == tenant)
            .map(|e| e.ip)
            .collect();
        let ip = match new.ip {
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
            tenant,
            ip: VirtualIp(ip),
            socket: socket.clone(),
        };
        self.router.add_endpoint(spec)?;
        endpoints.0.insert(name.clone());
        endpoints.2 = true;
        if new.ephemeral {
            ephemeral.push(name.clone());
        }
        Ok(ControlAnswer::Created { name, ip, socket })
    }

    fn remove(&self, name: &str) -> Result<(), RouterError> {
        let mut endpoints = self
            .endpoints
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.router.remove_endpoint(name)?;
        let _ = std::fs::remove_dir_all(self.dir.sysfs(name));
        endpoints.0.remove(name);
        endpoints.1 = Instant::now();
        Ok(())
    }
}

/// Makes a runtime directory and locks it.
fn take(dir: &RuntimeDir) -> Result<OwnedFd, RouterError> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    for path in [dir.path(), &dir.endpoints()] {
        builder
            .create(path)
            .map_err(|e| io_error("cannot make", path, e))?;
    }
    let path = dir.path();
    let meta = std::fs::symlink_metadata(path).map_err(|e| io_error("cannot read", path, e))?;
    let own = rustix::process::geteuid().as_raw();
    use std::os::unix::fs::MetadataExt;
    if !meta.is_dir() || meta.uid() != own {
        let e = io::Error::new(
            io::ErrorKind::PermissionDenied,
            "it belongs to another user",
        );
        return Err(io_error("cannot use runtime directory", path, e));
    }
    let _ = std::fs::set_permissions(path, PermissionsExt::from_mode(0o700));
    let path = dir.lock();
    let file = std::fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| io_error("cannot open", &path, e))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file.into()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(RouterError::AlreadyServed {
            dir: dir.path().to_owned(),
        }),
        Err(e) => Err(io_error("cannot lock", &path, e)),
    }
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
        let first = take(&dir).unwrap();
        assert!(matches!(take(&dir), Err(RouterError::AlreadyServed { .. })));
        drop(first);
        drop(take(&dir).unwrap());
        std::fs::remove_dir_all(dir.path()).unwrap();
    }
}
