//! The sockets.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use freeflow_wire::{ICRC_BYTES, MAX_HEADER_BYTES, UDP_PORT};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use crate::batch::{Datagrams, Trains};
use crate::link::{Link, Progress, SendCounters};
use crate::sys::{self, BATCH, Outgoing};

/// First of the ports that RoCEv2 sends from (IBTA volume 1, annex A17.9.2).
const FIRST_SOURCE_PORT: u16 = 0xC000;

/// Bytes of the longest UDP payload, which several datagrams that arrive together may fill.
const SLOT: usize = 1 << 16;
/// Messages received at a time: as much as a second-level cache holds.
const SLOTS: usize = 8;

/// How to open sockets.
#[derive(Clone, Debug)]
pub struct UdpOptions {
    /// The address to send from and to receive at: one of this host, not a link's own.
    pub local: IpAddr,
    /// Sockets to send from besides that of the port 4791. Each has its own source port, by which
    /// routers and network cards spread flows over their paths and queues.
    pub sources: usize,
    /// Bytes of each socket's send buffer, as far as the system allows.
    pub send_buffer: usize,
    /// Bytes of the receive buffer, as far as the system allows.
    pub receive_buffer: usize,
    /// Whether the kernel may be given trains of packets, and may give them, at a time.
    pub offload: bool,
}

impl UdpOptions {
    /// The usual ones.
    pub fn new(local: IpAddr) -> Self {
        UdpOptions {
            local,
            sources: 4,
            send_buffer: 4 << 20,
            receive_buffer: 16 << 20,
            offload: true,
        }
    }
}

struct Source {
    socket: UdpSocket,
    port: u16,
    /// Full when last tried, and waited for.
    blocked: bool,
}

/// Sockets of RoCEv2's port at one address.
pub struct Udp {
    local: IpAddr,
    /// The first is that of the port 4791; it alone receives.
    sources: Vec<Source>,
    epoll: OwnedFd,
    offload: bool,
    checksum: bool,
    sent: SendCounters,
    overflows: u64,
    last_overflows: u32,
}

impl Udp {
    /// Opens the sockets.
    ///
    /// Errors: `AddrInUse` if something on this host has the port at that address (as the kernel's
    /// rxe has at all addresses); `InvalidInput` for an address that is not one host's.
    pub fn open(options: &UdpOptions) -> io::Result<Udp> {
        let local = options.local;
        if local.is_unspecified() || local.is_multicast() {
            let what = format!("{local} is not the address of a host, which packets' CRC needs");
            return Err(io::Error::new(ErrorKind::InvalidInput, what));
        }
        let main = UdpSocket::bind((local, UDP_PORT))?;
        prepare(&main, local, options)?;
        let fd = main.as_fd();
        if options.offload {
            // Without it (before Linux 5.0), datagrams come one by one.
            let _ = sys::set(fd, libc::SOL_UDP, libc::UDP_GRO, 1);
        }
        let (level, name) = match local {
            IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_RECVTOS),
            IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
        };
        sys::set(fd, level, name, 1)?;
        sys::set(fd, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)?;
        buffer(
            fd,
            libc::SO_RCVBUFFORCE,
            libc::SO_RCVBUF,
            options.receive_buffer,
        )?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN)?;
        let mut sources = vec![Source {
            socket: main,
            port: UDP_PORT,
            blocked: false,
        }];
        let mut ports = FIRST_SOURCE_PORT..=u16::MAX;
        while sources.len() <= options.sources {
            let Some(port) = ports.next() else {
                let what = format!("{local} has no free port of those that RoCEv2 sends from");
                return Err(io::Error::new(ErrorKind::AddrInUse, what));
            };
            let socket = match UdpSocket::bind((local, port)) {
                Err(e) if e.kind() == ErrorKind::AddrInUse => continue,
                socket => socket?,
            };
            prepare(&socket, local, options)?;
            // It receives nothing; what comes all the same is to take no memory.
            sys::set(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, 0)?;
            let data = EventData::new_u64(sources.len() as u64);
            epoll::add(&epoll, &socket, data, EventFlags::empty())?;
            sources.push(Source {
                socket,
                port,
                blocked: false,
            });
        }
        // Of IPv4, it can be switched off.
        let checksum = sources.iter().all(|source| {
            let off = sys::get(source.socket.as_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK);
            off.is_ok_and(|off| off == 0)
        });
        Ok(Udp {
            local,
            checksum,
            sources,
            epoll,
            offload: options.offload,
            sent: SendCounters::default(),
            overflows: 0,
            last_overflows: 0,
        })
    }

    /// Sends the trains of one source.
    fn send_from(&mut self, index: usize, trains: &mut Trains) -> io::Result<Progress> {
        // A pending error of the socket is reported once, by whatever comes next.
        let mut again = true;
        while let Some(source) = self.sources.get(index) {
            let mut places = [0; BATCH];
            let mut messages = Vec::with_capacity(BATCH);
            let of_source = trains.left().filter(|(_, t)| t.src_port == source.port);
            for ((place, train), to) in of_source.zip(&mut places) {
                *to = place;
                messages.push(Outgoing {
                    dst: SocketAddr::new(train.dst, UDP_PORT),
                    ecn: train.ecn,
                    segment: (train.packets() > 1).then_some(train.packet_size() as u16),
                    bytes: trains.bytes(train),
                });
            }
            let Some(first) = messages.first() else {
                return Ok(Progress::Done);
            };
            let (dst, joined) = (first.dst.ip(), first.segment.is_some());
            self.sent.calls += 1;
            match sys::send(source.socket.as_fd(), &messages) {
                Ok(n) => {
                    for message in messages.iter().take(n) {
                        let bytes = message.bytes.len();
                        let size = message.segment.map_or(bytes, usize::from);
                        self.sent.bytes += bytes as u64;
                        self.sent.packets += bytes.div_ceil(size) as u64;
                    }
                    places
                        .iter()
                        .take(n)
                        .for_each(|&place| trains.finish(place));
                    again = true;
                    continue;
                }
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR) => continue,
                    // ENOBUFS: the device's queue is full, which the socket cannot be waited for:
                    // the network has lost the packet, as networks do.
                    Some(libc::EAGAIN) => {
                        self.sent.blocked += 1;
                        return Ok(Progress::Blocked);
                    }
                    Some(libc::EMSGSIZE) if !joined => {
                        self.sent.too_big += packets_of(trains, places[0]);
                        self.sent.last_too_big = Some(dst);
                    }
                    // The segments are too big, or the kernel or the device cannot make them.
                    Some(libc::EMSGSIZE | libc::EINVAL | libc::EIO | libc::EOPNOTSUPP)
                        if joined =>
                    {
                        let size = trains.left().find(|&(place, _)| place == places[0]);
                        let size = size.map_or(0, |(_, train)| train.packet_size());
                        self.offload &= !fits(self.local, dst, size);
                        // Smaller packets of the train may go.
                        trains.split(self.local);
                        continue;
                    }
                    Some(libc::ECONNREFUSED) if again => {
                        again = false;
                        continue;
                    }
                    Some(libc::EBADF | libc::ENOTSOCK | libc::EFAULT) => return Err(e),
                    _ => self.sent.unreachable += packets_of(trains, places[0]),
                },
            }
            trains.finish(places[0]);
        }
        Ok(Progress::Done)
    }

    /// Waits for a source to have room, or no longer.
    fn wait_for(&mut self, index: usize, blocked: bool) -> io::Result<()> {
        let Some(source) = self.sources.get_mut(index) else {
            return Ok(());
        };
        if source.blocked != blocked {
            let mut events = EventFlags::empty();
            events.set(EventFlags::IN, index == 0);
            events.set(EventFlags::OUT, blocked);
            let data = EventData::new_u64(index as u64);
            epoll::modify(&self.epoll, &source.socket, data, events)?;
            source.blocked = blocked;
        }
        Ok(())
    }
}

fn packets_of(trains: &Trains, place: usize) -> u64 {
    let train = trains.left().find(|&(p, _)| p == place);
    train.map_or(0, |(_, train)| train.packets() as u64)
}

/// Whether a packet of `size` bytes of UDP payload fits in the path's MTU; yes if it is not known.
fn fits(local: IpAddr, dst: IpAddr, size: usize) -> bool {
    path_mtu(local, dst).map_or(true, |mtu| size + ip_udp_bytes(local) <= mtu)
}

fn ip_udp_bytes(address: IpAddr) -> usize {
    let ip = if address.is_ipv4() { 20 } else { 40 };
    ip + 8
}

impl Link for Udp {
    fn local(&self) -> IpAddr {
        self.local
    }

    fn source_port(&self, flow: u32) -> u16 {
        // The first is left to those that have no flows, unless there is no other.
        let others = self.sources.get(1..).filter(|others| !others.is_empty());
        let sources = others.unwrap_or(&self.sources);
        // Neighbouring numbers, as queue pairs have, go to different sources.
        let index = flow as usize % sources.len().max(1);
        sources.get(index).map_or(UDP_PORT, |source| source.port)
    }

    fn send(&mut self, _now: u64, trains: &mut Trains) -> io::Result<Progress> {
        if !self.offload {
            trains.keep_apart();
            trains.split(self.local);
        }
        let mut all = Progress::Done;
        for index in 0..self.sources.len() {
            if trains.is_empty() {
                self.wait_for(index, false)?;
                continue;
            }
            let progress = self.send_from(index, trains)?;
            self.wait_for(index, progress == Progress::Blocked)?;
            if progress == Progress::Blocked {
                all = Progress::Blocked;
            }
        }
        Ok(all)
    }

    fn receive(&mut self, _now: u64, into: &mut Datagrams) -> io::Result<()> {
        let slots = into.slots(SLOTS * SLOT);
        let Some(main) = self.sources.first() else {
            return Ok(());
        };
        let mut messages = [None; SLOTS];
        let fd = main.socket.as_fd();
        let mut again = true;
        loop {
            let got = sys::receive(fd, slots, SLOT, |slot, incoming| {
                if let Some(message) = messages.get_mut(slot) {
                    *message = Some(incoming);
                }
            });
            match got {
                Ok(_) => break,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // Some peer's port was closed when it was sent to; reported once.
                Err(e) if e.kind() == ErrorKind::ConnectionRefused && again => again = false,
                Err(e) => return Err(e),
            }
        }
        for (slot, message) in messages.into_iter().enumerate() {
            let Some(message) = message else { break };
            if let Some(total) = message.overflows {
                self.overflows += u64::from(total.wrapping_sub(self.last_overflows));
                self.last_overflows = total;
            }
            // A slot holds the longest datagram.
            if message.truncated {
                continue;
            }
            let start = slot * SLOT;
            let size = message.segment.unwrap_or(message.len);
            into.split(message.src, message.ecn, start..start + message.len, size);
        }
        Ok(())
    }

    fn next_timeout(&self) -> Option<u64> {
        None
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    fn has_checksum(&self) -> bool {
        self.checksum
    }

    fn sent(&self) -> SendCounters {
        self.sent
    }

    fn overflows(&self) -> u64 {
        self.overflows
    }
}

/// What all sockets have.
fn prepare(socket: &UdpSocket, local: IpAddr, options: &UdpOptions) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    let fd = socket.as_fd();
    let (level, name, value) = match local {
        IpAddr::V4(_) => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DO,
        ),
        IpAddr::V6(_) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DO,
        ),
    };
    sys::set(fd, level, name, value)?;
    buffer(
        fd,
        libc::SO_SNDBUFFORCE,
        libc::SO_SNDBUF,
        options.send_buffer,
    )
}

/// Sets a buffer's size, beyond the system's limit where that is allowed.
fn buffer(fd: BorrowedFd<'_>, force: i32, plain: i32, bytes: usize) -> io::Result<()> {
    let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
    sys::set(fd, libc::SOL_SOCKET, force, bytes)
        .or_else(|_| sys::set(fd, libc::SOL_SOCKET, plain, bytes))
}

/// MTU of the path from one of this host's addresses to another host, in bytes of IP packets: that
/// of the route, or less where the network has said so.
pub fn path_mtu(local: IpAddr, dst: IpAddr) -> io::Result<usize> {
    let socket = UdpSocket::bind((local, 0))?;
    socket.connect((dst, UDP_PORT))?;
    let (level, name) = match dst {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mtu = sys::get(socket.as_fd(), level, name)?;
    Ok(usize::try_from(mtu).unwrap_or(0))
}

/// Longest payload, in bytes, that fits in a path's MTU to `dst` behind any transport headers: an
/// MTU of 1500 bytes takes RoCE's path MTU 1024, one of 4200 takes 4096.
pub fn largest_payload(mtu: usize, dst: IpAddr) -> usize {
    mtu.saturating_sub(ip_udp_bytes(dst) + MAX_HEADER_BYTES + ICRC_BYTES) & !3
}
