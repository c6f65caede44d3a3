//! A datagram socket: a UDP socket, and a queue pair for each local address.
//!
//! The first datagrams to an address go over UDP, with a header that tells the sender's queue pair
//! and asks for the receiver's; those that follow go from queue pair to queue pair. librdmacm
//! answers in a thread of its own; here whoever uses the socket does, so that a peer that only
//! waits is answered too.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freeflow_client::Errno;
use freeflow_rsocket::{Config, DatagramHeader, UdpHeader, UdpOp};
use libc::{POLLERR, POLLIN, POLLOUT, pollfd};
use rustix::net::{
    self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recvfrom, sendto,
};

use super::config::defaults;
use super::device::shared;
use super::io::How;
use super::memory::Vectors;
use super::options::deadline;
use super::path::{Arrived, MAX_DATAGRAM, Path, Remote, resolve};
use super::poll::Ready;
use super::wait::{self, Source, Waits, Wake, input, now, wait_for};

/// Most peers that are remembered though the program has sent them nothing.
const STRANGERS: usize = 1024;

/// Most UDP datagrams that are taken in at once.
const UDP_BATCH: usize = 64;

/// Looks at the queue pairs alone between two looks at the UDP socket, which cost a system call:
/// newcomers get their turn where the queue pairs always have something.
const UDP_TURNS: u32 = 64;

/// Nanoseconds between two looks whether the router lives, by a program that never sleeps.
const LIFE_NS: u64 = 1_000_000;

/// How long the way to a peer that the program has sent something may take to be found, and to
/// another.
const RESOLVE: Duration = Duration::from_secs(2);
const RESOLVE_STRANGER: Duration = Duration::from_millis(100);

/// Where a peer is reached.
struct Destination {
    /// By index of the paths.
    path: usize,
    /// Its queue pair, once that is known.
    remote: Option<Remote>,
    /// The program has sent it nothing.
    stranger: bool,
    /// The way to this stranger was not found: it is not looked for again.
    unreachable: bool,
}

pub(super) struct DatagramSocket {
    /// The UDP socket's, which is the program's name for it.
    pub(super) fd: RawFd,
    pub(super) nonblocking: AtomicBool,
    pub(super) fd_flags: AtomicI32,
    inner: Mutex<Inner>,
}

pub(super) struct Inner {
    udp: OwnedFd,
    family: AddressFamily,
    pub(super) config: Config,
    paths: Vec<Path>,
    destinations: HashMap<SocketAddr, Destination>,
    /// How many of them are strangers.
    strangers: usize,
    peer: Option<SocketAddr>,
    /// `SO_SNDTIMEO` and `SO_RCVTIMEO`.
    pub(super) send_time: Option<Duration>,
    pub(super) receive_time: Option<Duration>,
    /// What was received and not read, and from whom.
    queue: VecDeque<(SocketAddr, Vec<u8>)>,
    watchers: Vec<Arc<Wake>>,
    error: Option<Errno>,
    /// The router is gone: nothing is sent or received any more.
    lost: Option<Errno>,
    /// Looks since the last one at the UDP socket.
    turns: u32,
    /// When it was last looked whether the router lives.
    lived: u64,
    gone: bool,
    pub(super) activity: u64,
}

impl Waits for DatagramSocket {
    type Inner = Inner;

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic aborts the process.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DatagramSocket {
    pub(super) fn new(domain: i32) -> Result<Self, Errno> {
        let family = match domain {
            libc::AF_INET6 => AddressFamily::INET6,
            _ => AddressFamily::INET,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let udp = net::socket_with(family, SocketType::DGRAM, flags, None)?;
        Ok(DatagramSocket {
            fd: udp.as_raw_fd(),
            nonblocking: AtomicBool::new(false),
            fd_flags: AtomicI32::new(0),
            inner: Mutex::new(Inner {
                udp,
                family,
                config: defaults().config,
                paths: Vec::new(),
                destinations: HashMap::new(),
                strangers: 0,
                peer: None,
                send_time: None,
                receive_time: None,
                queue: VecDeque::new(),
                watchers: Vec::new(),
                error: None,
                lost: None,
                turns: 0,
                lived: 0,
                gone: false,
                activity: 0,
            }),
        })
    }

    fn waits(&self, how: How) -> bool {
        // Relaxed: the program orders what it does with the socket.
        !self.nonblocking.load(Ordering::Relaxed) && !how.dont_wait
    }

    /// `bind(2)`.
    pub(super) fn bind(&self, addr: SocketAddr) -> Result<(), Errno> {
        net::bind(&self.lock().udp, &addr)
    }

    /// `connect(2)`: where datagrams go, and come from.
    pub(super) fn connect(&self, addr: SocketAddr) -> Result<(), Errno> {
        let mut inner = self.lock();
        net::connect(&inner.udp, &addr)?;
        inner.acquaint(addr)?;
        inner.peer = Some(addr);
        Ok(())
    }

    pub(super) fn local(&self) -> Result<SocketAddr, Errno> {
        name(net::getsockname(&self.lock().udp)?)
    }

    pub(super) fn peer(&self) -> Result<SocketAddr, Errno> {
        self.lock().peer.ok_or(Errno::NOTCONN)
    }

    /// `sendto(2)`.
    pub(super) fn send(
        &self,
        from: &mut Vectors<'_>,
        how: How,
        to: Option<SocketAddr>,
    ) -> Result<usize, Errno> {
        let attempt = |inner: &mut Inner| inner.send(from, to).transpose();
        self.attempt(how, |inner| inner.send_time, attempt)
    }

    /// `recvfrom(2)`: the whole length is not told if it is cut; and from where it came.
    pub(super) fn receive(
        &self,
        to: &mut Vectors<'_>,
        how: How,
    ) -> Result<(usize, SocketAddr), Errno> {
        self.attempt(
            how,
            |inner| inner.receive_time,
            |inner| {
                if inner.gone {
                    return Some(Err(Errno::BADF));
                }
                if let Some(errno) = inner.error.take() {
                    return Some(Err(errno));
                }
                let Some((from, bytes)) = inner.queue.front() else {
                    return inner.lost.map(Err);
                };
                let (from, len) = (*from, bytes.len().min(to.left()));
                to.each(len, |addr, part| {
                    let part = &bytes[part.offset as usize..][..part.length as usize];
                    // SAFETY: the vectors are memory of the program's that may be written.
                    unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), addr, part.len()) };
                });
                if !how.peek {
                    inner.queue.pop_front();
                }
                Some(Ok((len, from)))
            },
        )
    }

    /// Tries until it is done; EAGAIN if that may not take time, or not so long.
    fn attempt<T>(
        &self,
        how: How,
        time: impl Fn(&Inner) -> Option<Duration>,
        mut attempt: impl FnMut(&mut Inner) -> Option<Result<T, Errno>>,
    ) -> Result<T, Errno> {
        if self.waits(how) {
            let deadline = deadline(time(&self.lock()));
            return wait_for(self, deadline, attempt)?;
        }
        let mut inner = self.lock();
        inner.advance(true);
        attempt(&mut inner).unwrap_or(Err(Errno::AGAIN))
    }

    /// `close(2)`: when what was sent is.
    pub(super) fn close(&self) {
        let deadline = Instant::now() + Duration::from_secs(1);
        let flushed = |inner: &mut Inner| {
            let done = inner.lost.is_some() || inner.is_flushed();
            done.then_some(())
        };
        while wait_for(self, Some(deadline), flushed) == Err(Errno::INTR) {}
        let mut inner = self.lock();
        inner.gone = true;
        inner.paths.drain(..).for_each(|path| path.destroy());
        inner.destinations.clear();
        inner.strangers = 0;
        inner.changed();
    }
}

fn name(addr: net::SocketAddrAny) -> Result<SocketAddr, Errno> {
    SocketAddr::try_from(addr).map_err(|_| Errno::AFNOSUPPORT)
}

impl Inner {
    /// Send and receive requests of a queue pair: as many as the buffers take.
    fn requests(&self) -> (usize, usize) {
        let take = |requests: u16, buffer: u32| {
            let most = (buffer as usize / MAX_DATAGRAM).max(1);
            usize::from(requests).clamp(1, most)
        };
        let config = &self.config;
        (
            take(config.send_requests, config.send_buffer),
            take(config.recv_requests, config.recv_buffer),
        )
    }

    pub(super) fn has_paths(&self) -> bool {
        !self.paths.is_empty()
    }

    fn is_flushed(&self) -> bool {
        let (sends, _) = self.requests();
        self.paths.iter().all(|path| path.is_flushed(sends))
    }

    fn changed(&mut self) {
        self.activity += 1;
        self.watchers.iter().for_each(|wake| wake.wake());
    }

    /// Where datagrams to a peer come from.
    fn source(&self, to: SocketAddr) -> Result<SocketAddr, Errno> {
        let mut local = name(net::getsockname(&self.udp)?)?;
        let vague = match local.ip() {
            IpAddr::V4(ip) => ip == Ipv4Addr::UNSPECIFIED,
            IpAddr::V6(ip) => ip == Ipv6Addr::UNSPECIFIED,
        };
        if vague {
            // The system knows which of its addresses is on the way.
            let flags = SocketFlags::CLOEXEC;
            let probe = net::socket_with(self.family, SocketType::DGRAM, flags, None)?;
            net::connect(&probe, &to)?;
            local.set_ip(name(net::getsockname(&probe)?)?.ip());
        }
        Ok(local)
    }

    /// Remembers a peer that the program names.
    fn acquaint(&mut self, to: SocketAddr) -> Result<(), Errno> {
        self.destination(to)?;
        if let Some(destination) = self.destinations.get_mut(&to)
            && std::mem::take(&mut destination.stranger)
        {
            destination.unreachable = false;
            self.strangers -= 1;
        }
        Ok(())
    }

    /// Remembers a peer, as a stranger if it is new.
    fn destination(&mut self, to: SocketAddr) -> Result<(), Errno> {
        if self.destinations.contains_key(&to) {
            return Ok(());
        }
        if name(net::getsockname(&self.udp)?)?.port() == 0 {
            // The header tells where to answer.
            let any: IpAddr = match self.family {
                AddressFamily::INET6 => Ipv6Addr::UNSPECIFIED.into(),
                _ => Ipv4Addr::UNSPECIFIED.into(),
            };
            net::bind(&self.udp, &SocketAddr::from((any, 0)))?;
        }
        let local = self.source(to)?;
        let known = self.paths.iter().position(|path| path.local == local);
        let path = match known {
            Some(path) => path,
            None => {
                let inline = self.config.inline;
                let made = Path::new(&shared()?, local, self.requests(), inline)?;
                self.paths.push(made);
                self.paths.len() - 1
            }
        };
        let destination = Destination {
            path,
            remote: None,
            stranger: true,
            unreachable: false,
        };
        self.destinations.insert(to, destination);
        self.strangers += 1;
        Ok(())
    }

    /// Sends a datagram. `None`: there is no room now.
    fn send(
        &mut self,
        from: &mut Vectors<'_>,
        to: Option<SocketAddr>,
    ) -> Result<Option<usize>, Errno> {
        if self.gone {
            return Err(Errno::BADF);
        }
        if let Some(errno) = self.error.take().or(self.lost) {
            return Err(errno);
        }
        let to = to.or(self.peer).ok_or(Errno::DESTADDRREQ)?;
        self.acquaint(to)?;
        let Some(destination) = self.destinations.get(&to) else {
            return Err(Errno::HOSTUNREACH);
        };
        let path = &mut self.paths[destination.path];
        if let Some(remote) = &destination.remote {
            return match path.can_send() {
                true => path.send(remote, from).map(Some),
                false => Ok(None),
            };
        }
        let header = UdpHeader {
            op: UdpOp::Data,
            qpn: path.qpn(),
            addr: path.local.ip(),
        };
        let mut bytes = Vec::new();
        header.write(&mut bytes);
        let (start, len) = (bytes.len(), from.left());
        if start + len > MAX_DATAGRAM {
            return Err(Errno::MSGSIZE);
        }
        bytes.resize(start + len, 0);
        from.each(len, |addr, part| {
            let to = &mut bytes[start + part.offset as usize..][..part.length as usize];
            // SAFETY: the vectors are memory of the program's that may be read.
            unsafe { std::ptr::copy_nonoverlapping(addr, to.as_mut_ptr(), to.len()) };
        });
        sendto(&self.udp, &bytes, SendFlags::NOSIGNAL, &to)?;
        Ok(Some(len))
    }

    /// Takes in a datagram of the program's peer.
    fn arrived(&mut self, from: SocketAddr, bytes: &[u8]) {
        let (_, most) = self.requests();
        // Datagrams may be lost.
        if self.queue.len() < most {
            self.queue.push_back((from, bytes.to_vec()));
        }
    }

    /// Takes in a UDP datagram; whether the way to its sender was looked for, which takes time. Anybody
    /// may have sent it: what fails for its sake is no error of the program's.
    fn over_udp(&mut self, from: SocketAddr, bytes: &[u8]) -> bool {
        let Some((header, payload)) = UdpHeader::split(bytes) else {
            return false;
        };
        let mut looked = false;
        let answer = self.met(from, header.qpn, &mut looked);
        if header.op == UdpOp::Data {
            if let Some(answer) = answer {
                let mut bytes = Vec::new();
                answer.write(&mut bytes);
                // If it is lost, the next datagram asks again.
                let _ = sendto(&self.udp, &bytes, SendFlags::NOSIGNAL, &from);
            }
            self.arrived(from, payload);
        }
        looked
    }

    /// A peer has told its queue pair: what to answer, unless it is not to be remembered.
    fn met(&mut self, from: SocketAddr, qpn: u32, looked: &mut bool) -> Option<UdpHeader> {
        if !self.destinations.contains_key(&from) && self.strangers >= STRANGERS {
            return None;
        }
        self.destination(from).ok()?;
        let destination = self.destinations.get_mut(&from)?;
        let path = &self.paths[destination.path];
        let known = destination.remote.is_some_and(|r| r.qpn == qpn);
        if !known && !destination.unreachable {
            let time = match destination.stranger {
                true => RESOLVE_STRANGER,
                false => RESOLVE,
            };
            *looked = true;
            destination.remote = resolve(path.local, from, qpn, time).ok();
            destination.unreachable = destination.stranger && destination.remote.is_none();
        }
        Some(UdpHeader {
            op: UdpOp::Control,
            qpn: path.qpn(),
            addr: path.local.ip(),
        })
    }

    /// Takes in UDP datagrams, not without end, and no more behind one whose sender had to be looked
    /// for: others wait for the lock. Whether there were any.
    fn take_udp(&mut self) -> bool {
        let mut some = false;
        let mut buffer = [0; MAX_DATAGRAM + UdpHeader::MAX_BYTES];
        for _ in 0..UDP_BATCH {
            match recvfrom(&self.udp, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((len, _, Some(from))) => {
                    if let Ok(from) = name(from)
                        && self.over_udp(from, &buffer[..len])
                    {
                        return true;
                    }
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return some,
                Err(errno) => {
                    self.error = Some(errno);
                    return true;
                }
            }
            some = true;
        }
        some
    }

    fn take_arrived(&mut self, at: usize) -> bool {
        let mut arrived = Vec::new();
        let some = match self.paths[at].poll(&mut arrived) {
            Ok(some) => some,
            Err(errno) => {
                self.error = Some(errno);
                true
            }
        };
        for datagram in &arrived {
            let Arrived { slot, .. } = *datagram;
            let bytes = self.paths[at].bytes(datagram);
            if let Some((DatagramHeader(from), payload)) = DatagramHeader::split(&bytes) {
                self.arrived(from, payload);
            }
            if let Err(errno) = self.paths[at].receive(slot) {
                self.error = Some(errno);
            }
        }
        some
    }

    /// Takes the events of completions; that there will be none tells that the router is gone.
    fn take_events(&mut self) {
        let mut taken = false;
        let mut lost = None;
        for path in &mut self.paths {
            match path.take_events() {
                Ok(some) => taken |= some,
                Err(errno) => lost = Some(errno),
            }
        }
        if self.lost.is_none() && lost.is_some() {
            self.lost = lost;
            self.changed();
        } else if taken {
            // No completion raises an event now: who still sleeps has to arm it again.
            self.watchers.iter().for_each(|wake| wake.wake());
        }
    }
}

impl Source for Inner {
    fn advance(&mut self, look: bool) {
        let mut some = false;
        for path in 0..self.paths.len() {
            some |= self.take_arrived(path);
        }
        self.turns += 1;
        if (look || self.turns >= UDP_TURNS) && !self.gone {
            self.turns = 0;
            some |= self.take_udp();
        }
        if some {
            self.changed();
        }
        if look && self.lost.is_none() {
            let now = now();
            if now.saturating_sub(self.lived) >= LIFE_NS {
                self.lived = now;
                self.take_events();
            }
        }
    }

    fn arm(&mut self) -> bool {
        let newly = self.paths.iter_mut().map(Path::arm);
        newly.fold(false, |some, newly| some | newly)
    }

    fn watch(&mut self, _events: i16, wake: &Arc<Wake>, fds: &mut Vec<pollfd>) {
        self.watchers.push(wake.clone());
        if self.lost.is_some() {
            // The descriptors would be ready for ever.
            return;
        }
        fds.push(input(self.udp.as_raw_fd()));
        fds.extend(self.paths.iter().map(|path| input(path.fd())));
    }

    fn unwatch(&mut self, wake: &Arc<Wake>, ready: bool) {
        wait::forget(&mut self.watchers, wake);
        if ready {
            self.take_events();
        }
    }
}

impl Ready for Inner {
    fn ready(&self) -> i16 {
        let mut ready = 0;
        if !self.queue.is_empty() {
            ready |= POLLIN;
        }
        if self.paths.iter().all(Path::can_send) {
            ready |= POLLOUT;
        }
        if self.error.is_some() || self.lost.is_some() {
            ready |= POLLERR | POLLIN;
        }
        ready
    }
}
