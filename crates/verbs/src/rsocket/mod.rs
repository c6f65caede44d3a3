//! librdmacm's rsockets (`rsocket(7)`): sockets' functions over queue pairs, for streams and
//! datagrams. The protocol is [`freeflow_rsocket`]'s.
//!
//! librspreload puts these functions in place of libc's, so nothing here may come back to itself
//! through one of those: what touches sockets are system calls.
//!
//! There are no threads but the program's. Whoever waits for a socket, in any function, takes in
//! what has arrived and does what is due, keep-alive included; a socket that nobody waits for owes
//! nobody a reaction.

mod config;
mod data;
mod datagram;
mod device;
mod epoll;
mod io;
mod link;
mod memory;
mod options;
mod path;
mod poll;
mod stream;
mod table;
mod wait;

use core::ffi::{c_int, c_long, c_void};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use freeflow_client::Errno;

use crate::objects::minus_one;
use crate::rdma_cm::address::{socket_address, storage};
use datagram::DatagramSocket;
use epoll::Epoll;
use options::{SOL_RDMA, Value};
use poll::{Sets, timeout};
use stream::{LEAVE, StreamSocket};
use table::{Descriptor, find, insert, remove};
use wait::Waits;

pub(crate) use data::*;
pub(crate) use table::prepare_for_fork;

extern "C" fn unloaded() {
    let streams = table::streams();
    let streams = streams.iter().filter_map(|found| stream(found).ok());
    streams.clone().for_each(StreamSocket::part);
    let deadline = Instant::now() + LEAVE;
    streams.for_each(|socket| socket.leave(deadline));
}

/// Called when the program ends by `exit(3)`.
#[used]
// SAFETY: the section holds functions of this type; it needs nothing of libraries that are unloaded
// earlier.
#[unsafe(link_section = ".fini_array")]
static UNLOADED: extern "C" fn() = unloaded;

/// The rsocket of that number. EBADF: there is none.
fn socket(fd: RawFd) -> Result<Arc<Descriptor>, Errno> {
    match find(fd) {
        Some(found) if matches!(*found, Descriptor::Stream(_) | Descriptor::Datagram(_)) => {
            Ok(found)
        }
        _ => Err(Errno::BADF),
    }
}

fn stream(descriptor: &Descriptor) -> Result<&StreamSocket, Errno> {
    match descriptor {
        Descriptor::Stream(socket) => Ok(socket),
        _ => Err(Errno::OPNOTSUPP),
    }
}

/// A number, or -1 with errno set.
fn number<T: TryInto<c_int>>(result: Result<T, Errno>) -> c_int {
    match result {
        Ok(n) => n.try_into().unwrap_or(c_int::MAX),
        Err(errno) => minus_one(Err(errno)),
    }
}

/// Writes an address as far as there is room for it, and its length.
///
/// # Safety
///
/// `len` is null, or says how much room there is at `to`.
unsafe fn give_address(addr: SocketAddr, to: *mut libc::sockaddr, len: *mut libc::socklen_t) {
    if len.is_null() {
        return;
    }
    let size = match addr {
        SocketAddr::V4(_) => size_of::<libc::sockaddr_in>(),
        SocketAddr::V6(_) => size_of::<libc::sockaddr_in6>(),
    };
    let from = storage(addr);
    // SAFETY: by the caller's promise; what is copied fits both sides.
    unsafe {
        if !to.is_null() {
            let n = size.min(*len as usize);
            std::ptr::copy_nonoverlapping(from.0.as_ptr(), to.cast(), n);
        }
        *len = size as libc::socklen_t;
    }
}

/// A program's address of a given length. EINVAL: it is too short.
///
/// # Safety
///
/// Null, or so many bytes.
unsafe fn address(addr: *const libc::sockaddr, len: libc::socklen_t) -> Result<SocketAddr, Errno> {
    if addr.is_null() || (len as usize) < size_of::<libc::sockaddr_in>() {
        return Err(Errno::INVAL);
    }
    // SAFETY: by the caller's promise, and the length was checked.
    let family = unsafe { (&raw const (*addr).sa_family).read_unaligned() };
    let short = (len as usize) < size_of::<libc::sockaddr_in6>();
    if i32::from(family) == libc::AF_INET6 && short {
        return Err(Errno::INVAL);
    }
    // SAFETY: it is as long as its family's.
    unsafe { socket_address(addr) }
}

/// `rsocket`. ENOTSUP: rsockets do not offer that family, type or protocol.
pub(crate) unsafe extern "C" fn rsocket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    let flags = kind & (libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK);
    let nonblocking = flags & libc::SOCK_NONBLOCK != 0;
    let fd_flags = match flags & libc::SOCK_CLOEXEC {
        0 => 0,
        _ => libc::FD_CLOEXEC,
    };
    if !matches!(domain, libc::AF_INET | libc::AF_INET6) {
        return minus_one(Err(Errno::NOTSUP));
    }
    number(match (kind & !flags, protocol) {
        (libc::SOCK_STREAM, 0 | libc::IPPROTO_TCP) => StreamSocket::new(domain).and_then(|s| {
            s.nonblocking.store(nonblocking, Ordering::Relaxed);
            s.fd_flags.store(fd_flags, Ordering::Relaxed);
            insert(s.fd, Descriptor::Stream(Box::new(s)))
        }),
        (libc::SOCK_DGRAM, 0 | libc::IPPROTO_UDP) => DatagramSocket::new(domain).and_then(|s| {
            s.nonblocking.store(nonblocking, Ordering::Relaxed);
            s.fd_flags.store(fd_flags, Ordering::Relaxed);
            insert(s.fd, Descriptor::Datagram(Box::new(s)))
        }),
        _ => Err(Errno::NOTSUP),
    })
}

/// `rbind`.
pub(crate) unsafe extern "C" fn rbind(
    fd: c_int,
    addr: *const libc::sockaddr,
    len: libc::socklen_t,
) -> c_int {
    // SAFETY: the caller gives an address of that length.
    let addr = unsafe { address(addr, len) };
    let bind = |addr| match &*socket(fd)? {
        Descriptor::Stream(socket) => socket.bind(addr),
        Descriptor::Datagram(socket) => socket.bind(addr),
        _ => Err(Errno::BADF),
    };
    minus_one(addr.and_then(bind))
}

/// `rlisten`.
pub(crate) unsafe extern "C" fn rlisten(fd: c_int, backlog: c_int) -> c_int {
    minus_one(socket(fd).and_then(|s| stream(&s)?.listen(backlog)))
}

/// `raccept`.
pub(crate) unsafe extern "C" fn raccept(
    fd: c_int,
    addr: *mut libc::sockaddr,
    len: *mut libc::socklen_t,
) -> c_int {
    let accept = |listener: Arc<Descriptor>| {
        let child = stream(&listener)?.accept()?;
        let peer = child.lock().info.and_then(|info| info.dst);
        if let (Some(peer), false) = (peer, addr.is_null()) {
            // SAFETY: the caller says how much room there is.
            unsafe { give_address(peer, addr, len) };
        }
        insert(child.fd, Descriptor::Stream(Box::new(child)))
    };
    number(socket(fd).and_then(accept))
}

/// `rconnect`.
pub(crate) unsafe extern "C" fn rconnect(
    fd: c_int,
    addr: *const libc::sockaddr,
    len: libc::socklen_t,
) -> c_int {
    // SAFETY: the caller gives an address of that length.
    let addr = unsafe { address(addr, len) };
    let connect = |addr| match &*socket(fd)? {
        Descriptor::Stream(socket) => socket.connect(addr),
        Descriptor::Datagram(socket) => socket.connect(addr),
        _ => Err(Errno::BADF),
    };
    minus_one(addr.and_then(connect))
}

/// `rshutdown`.
pub(crate) unsafe extern "C" fn rshutdown(fd: c_int, how: c_int) -> c_int {
    minus_one(socket(fd).and_then(|s| match &*s {
        Descriptor::Stream(socket) => socket.shutdown(how),
        // As stock: datagrams have no connection to end.
        _ => Ok(()),
    }))
}

/// `rclose`.
pub(crate) unsafe extern "C" fn rclose(fd: c_int) -> c_int {
    let Some(closing) = remove(fd) else {
        return minus_one(Err(Errno::BADF));
    };
    match &*closing {
        Descriptor::Stream(socket) => socket.close(),
        Descriptor::Datagram(socket) => socket.close(),
        Descriptor::Epoll(_) => {}
        Descriptor::Inherited(file) => {
            if let Some(file) = file {
                file.close_inherited();
            }
        }
    }
    0
}

/// `rgetpeername`.
pub(crate) unsafe extern "C" fn rgetpeername(
    fd: c_int,
    addr: *mut libc::sockaddr,
    len: *mut libc::socklen_t,
) -> c_int {
    let peer = socket(fd).and_then(|s| match &*s {
        Descriptor::Stream(socket) => {
            let peer = socket.lock().info.and_then(|info| info.dst);
            peer.ok_or(Errno::NOTCONN)
        }
        Descriptor::Datagram(socket) => socket.peer(),
        _ => Err(Errno::BADF),
    });
    // SAFETY: the caller says how much room there is.
    minus_one(peer.map(|peer| unsafe { give_address(peer, addr, len) }))
}

/// `rgetsockname`.
pub(crate) unsafe extern "C" fn rgetsockname(
    fd: c_int,
    addr: *mut libc::sockaddr,
    len: *mut libc::socklen_t,
) -> c_int {
    let name = socket(fd).and_then(|s| match &*s {
        Descriptor::Stream(socket) => {
            let known = socket.lock().info.map(|info| info.src);
            Ok(known.unwrap_or_else(|| socket.unspecified()))
        }
        Descriptor::Datagram(socket) => socket.local(),
        _ => Err(Errno::BADF),
    });
    // SAFETY: the caller says how much room there is.
    minus_one(name.map(|name| unsafe { give_address(name, addr, len) }))
}

/// `rsetsockopt`.
pub(crate) unsafe extern "C" fn rsetsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    len: libc::socklen_t,
) -> c_int {
    let bytes = match value.is_null() {
        true => &[],
        // SAFETY: the caller gives so many bytes.
        false => unsafe { std::slice::from_raw_parts(value.cast::<u8>(), len as usize) },
    };
    let set = |s: Arc<Descriptor>| match &*s {
        Descriptor::Stream(socket) => socket.set_option(level, name, &Value(bytes)),
        Descriptor::Datagram(socket) => {
            if level != SOL_RDMA {
                // SAFETY: as above; the descriptor is the UDP socket.
                unsafe { system_setsockopt(socket.fd, level, name, value, len)? };
            }
            socket.set_size(level, name, &Value(bytes))
        }
        _ => Err(Errno::BADF),
    };
    minus_one(socket(fd).and_then(set))
}

/// `rgetsockopt`.
pub(crate) unsafe extern "C" fn rgetsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    len: *mut libc::socklen_t,
) -> c_int {
    let get = |s: Arc<Descriptor>| match &*s {
        Descriptor::Stream(socket) => {
            let bytes = socket.option(level, name)?;
            // SAFETY: the caller says how much room there is.
            unsafe { options::give(&bytes, value, len) }
        }
        Descriptor::Datagram(socket) => match socket.size(level, name) {
            // SAFETY: as above.
            Some(bytes) => unsafe { options::give(&bytes, value, len) },
            // SAFETY: as above; the descriptor is the UDP socket.
            None => unsafe { system_getsockopt(socket.fd, level, name, value, len) },
        },
        _ => Err(Errno::BADF),
    };
    minus_one(socket(fd).and_then(get))
}

/// What a system call answered.
fn answer(status: c_long) -> Result<(), Errno> {
    match status {
        0.. => Ok(()),
        // SAFETY: libc gives the address of this thread's errno.
        _ => Err(Errno::from_raw_os_error(unsafe {
            *libc::__errno_location()
        })),
    }
}

/// # Safety
///
/// As for `setsockopt(2)`.
unsafe fn system_setsockopt(
    fd: RawFd,
    level: c_int,
    name: c_int,
    value: *const c_void,
    len: libc::socklen_t,
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    answer(unsafe { libc::syscall(libc::SYS_setsockopt, fd, level, name, value, len) })
}

/// # Safety
///
/// As for `getsockopt(2)`.
unsafe fn system_getsockopt(
    fd: RawFd,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    len: *mut libc::socklen_t,
) -> Result<(), Errno> {
    // SAFETY: by the caller's promise.
    answer(unsafe { libc::syscall(libc::SYS_getsockopt, fd, level, name, value, len) })
}

/// `rfcntl`: its variable argument is always a long one. ENOTSUP: not for rsockets.
pub(crate) unsafe extern "C" fn rfcntl(fd: c_int, command: c_int, argument: c_long) -> c_int {
    let found = match socket(fd) {
        Ok(found) => found,
        Err(errno) => return minus_one(Err(errno)),
    };
    let (nonblocking, fd_flags) = match &*found {
        Descriptor::Stream(socket) => (&socket.nonblocking, &socket.fd_flags),
        Descriptor::Datagram(socket) => (&socket.nonblocking, &socket.fd_flags),
        _ => return minus_one(Err(Errno::BADF)),
    };
    // Relaxed: the program orders what it does with the socket.
    match command {
        libc::F_GETFL => match nonblocking.load(Ordering::Relaxed) {
            true => libc::O_RDWR | libc::O_NONBLOCK,
            false => libc::O_RDWR,
        },
        libc::F_SETFL => {
            let on = argument as c_int & libc::O_NONBLOCK != 0;
            nonblocking.store(on, Ordering::Relaxed);
            0
        }
        libc::F_GETFD => fd_flags.load(Ordering::Relaxed),
        libc::F_SETFD => {
            fd_flags.store(argument as c_int, Ordering::Relaxed);
            0
        }
        _ => minus_one(Err(Errno::NOTSUP)),
    }
}

/// `rpoll`.
pub(crate) unsafe extern "C" fn rpoll(
    fds: *mut libc::pollfd,
    count: libc::nfds_t,
    ms: c_int,
) -> c_int {
    let fds = match (fds.is_null(), count) {
        (_, 0) => &mut [],
        (true, _) => return minus_one(Err(Errno::FAULT)),
        // SAFETY: the caller gives so many entries.
        (false, _) => unsafe { std::slice::from_raw_parts_mut(fds, count as usize) },
    };
    number(poll::poll(fds, timeout(ms)))
}

/// `rselect`.
pub(crate) unsafe extern "C" fn rselect(
    count: c_int,
    read: *mut libc::fd_set,
    write: *mut libc::fd_set,
    except: *mut libc::fd_set,
    time: *const libc::timeval,
) -> c_int {
    // SAFETY: the caller gives sets and a time, or null; no set is given twice.
    let (mut sets, time) = unsafe {
        let sets = Sets([read.as_mut(), write.as_mut(), except.as_mut()]);
        (sets, time.as_ref())
    };
    let timeout = match time {
        None => None,
        Some(time) => {
            let parts = (u64::try_from(time.tv_sec), u64::try_from(time.tv_usec));
            let (Ok(seconds), Ok(micros)) = parts else {
                return minus_one(Err(Errno::INVAL));
            };
            Some(Duration::from_secs(seconds) + Duration::from_micros(micros))
        }
    };
    number(poll::select(count, &mut sets, timeout))
}

/// `repoll_create`: the flags are those of `epoll_create1(2)`.
pub(crate) unsafe extern "C" fn repoll_create(flags: c_int) -> c_int {
    number(Epoll::new(flags).and_then(|epoll| insert(epoll.fd(), Descriptor::Epoll(epoll))))
}

/// The epoll instance of that number. EINVAL: it is none.
fn with_epoll<T>(fd: RawFd, work: impl FnOnce(&Epoll) -> Result<T, Errno>) -> Result<T, Errno> {
    match find(fd).as_deref() {
        Some(Descriptor::Epoll(epoll)) => work(epoll),
        Some(_) => Err(Errno::INVAL),
        None => Err(Errno::BADF),
    }
}

/// `repoll_ctl`.
pub(crate) unsafe extern "C" fn repoll_ctl(
    epoll: c_int,
    op: c_int,
    fd: c_int,
    event: *const libc::epoll_event,
) -> c_int {
    // SAFETY: the caller gives an event, or null.
    let event = (!event.is_null()).then(|| unsafe { event.read_unaligned() });
    minus_one(with_epoll(epoll, |epoll| epoll.control(op, fd, event)))
}

/// `repoll_wait`.
pub(crate) unsafe extern "C" fn repoll_wait(
    epoll: c_int,
    events: *mut libc::epoll_event,
    count: c_int,
    ms: c_int,
) -> c_int {
    let room = match usize::try_from(count) {
        Ok(n @ 1..) if !events.is_null() => n,
        _ => return minus_one(Err(Errno::INVAL)),
    };
    // SAFETY: the caller gives room for so many events; the structure is packed, so that any address
    // is aligned for it.
    let events = unsafe { std::slice::from_raw_parts_mut(events, room) };
    number(with_epoll(epoll, |epoll| epoll.wait(events, timeout(ms))))
}
