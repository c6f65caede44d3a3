//! The system calls that rustix does not have: messages with segment sizes and TOS bytes, and the
//! options that ask for them.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_void, iovec, mmsghdr, sockaddr_storage, socklen_t};

use crate::Ecn;

/// Messages of one system call.
pub(crate) const BATCH: usize = 16;

/// Bytes for control messages: TOS, segment size and overflows take 24 each at most.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 96]);

/// A train to send.
pub(crate) struct Outgoing<'a> {
    pub(crate) dst: SocketAddr,
    pub(crate) ecn: Ecn,
    /// Bytes of each datagram, if there are several.
    pub(crate) segment: Option<u16>,
    pub(crate) bytes: &'a [u8],
}

/// Sends up to [`BATCH`] messages; returns how many went. An error is that of the first.
pub(crate) fn send(fd: BorrowedFd<'_>, messages: &[Outgoing<'_>]) -> io::Result<usize> {
    let messages = &messages[..messages.len().min(BATCH)];
    let mut names: [sockaddr_storage; BATCH] = zeroed();
    let mut parts: [iovec; BATCH] = zeroed();
    let mut controls = [Control([0; 96]); BATCH];
    let mut headers: [mmsghdr; BATCH] = zeroed();
    for (i, message) in messages.iter().enumerate() {
        let name_len = store(&message.dst, &mut names[i]);
        parts[i] = iovec {
            // The kernel only reads what it sends.
            iov_base: message.bytes.as_ptr().cast_mut().cast(),
            iov_len: message.bytes.len(),
        };
        let header = &mut headers[i].msg_hdr;
        header.msg_name = (&raw mut names[i]).cast();
        header.msg_namelen = name_len;
        header.msg_iov = &mut parts[i];
        header.msg_iovlen = 1;
        header.msg_control = (&raw mut controls[i]).cast();
        header.msg_controllen = size_of::<Control>();
        let mut len = 0;
        // SAFETY: the header's control buffer is there and zeroed.
        unsafe {
            let tos = c_int::from(message.ecn as u8);
            match message.dst {
                // What sockets do by themselves.
                _ if tos == 0 => {}
                SocketAddr::V4(_) => attach(header, &mut len, libc::IPPROTO_IP, libc::IP_TOS, tos),
                SocketAddr::V6(_) => {
                    attach(header, &mut len, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, tos);
                }
            }
            if let Some(segment) = message.segment {
                attach(header, &mut len, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
            }
        }
        header.msg_controllen = len;
        if len == 0 {
            header.msg_control = std::ptr::null_mut();
        }
    }
    // SAFETY: the first messages.len() headers are filled in, and all that they point to lives
    // until the call returns.
    let sent = unsafe {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        libc::sendmmsg(
            fd.as_raw_fd(),
            headers.as_mut_ptr(),
            messages.len() as u32,
            flags as _,
        )
    };
    count(sent)
}

/// Adds a control message after the first `len` bytes of them.
///
/// # Safety
/// The header has a control buffer, zeroed after `len`, which ends at a control message.
unsafe fn attach<T: Copy>(
    header: &mut libc::msghdr,
    len: &mut usize,
    level: c_int,
    kind: c_int,
    value: T,
) {
    let size = size_of::<T>() as u32;
    // SAFETY: CMSG_SPACE computes only.
    let space = unsafe { libc::CMSG_SPACE(size) } as usize;
    if *len + space > header.msg_controllen {
        return;
    }
    // SAFETY: the message lies within the buffer, which is aligned to 8 bytes, as is every
    // message's space; its data may be unaligned.
    unsafe {
        let message: *mut libc::cmsghdr = header.msg_control.byte_add(*len).cast();
        (*message).cmsg_level = level;
        (*message).cmsg_type = kind;
        (*message).cmsg_len = libc::CMSG_LEN(size) as _;
        libc::CMSG_DATA(message).cast::<T>().write_unaligned(value);
    }
    *len += space;
}

/// What was received into one slot.
#[derive(Clone, Copy)]
pub(crate) struct Incoming {
    pub(crate) src: SocketAddr,
    pub(crate) ecn: Ecn,
    pub(crate) len: usize,
    /// Bytes of each datagram, if there are several.
    pub(crate) segment: Option<usize>,
    /// Longer than the slot.
    pub(crate) truncated: bool,
    /// Datagrams that the socket dropped so far, modulo 2^32, if it dropped any.
    pub(crate) overflows: Option<u32>,
}

/// Receives into slots of `slot` bytes, as many as there are up to [`BATCH`]; calls `each` with the
/// slot's index; returns how many.
pub(crate) fn receive(
    fd: BorrowedFd<'_>,
    slots: &mut [u8],
    slot: usize,
    mut each: impl FnMut(usize, Incoming),
) -> io::Result<usize> {
    let mut names: [sockaddr_storage; BATCH] = zeroed();
    let mut parts: [iovec; BATCH] = zeroed();
    let mut controls = [Control([0; 96]); BATCH];
    let mut headers: [mmsghdr; BATCH] = zeroed();
    let mut ready = 0;
    for (i, room) in slots.chunks_exact_mut(slot).take(BATCH).enumerate() {
        parts[i] = iovec {
            iov_base: room.as_mut_ptr().cast(),
            iov_len: room.len(),
        };
        let header = &mut headers[i].msg_hdr;
        header.msg_name = (&raw mut names[i]).cast();
        header.msg_namelen = size_of::<sockaddr_storage>() as socklen_t;
        header.msg_iov = &mut parts[i];
        header.msg_iovlen = 1;
        header.msg_control = (&raw mut controls[i]).cast();
        header.msg_controllen = size_of::<Control>();
        ready += 1;
    }
    // SAFETY: the first `ready` headers are filled in, and all that they point to lives until the
    // call returns.
    let got = count(unsafe {
        libc::recvmmsg(
            fd.as_raw_fd(),
            headers.as_mut_ptr(),
            ready,
            libc::MSG_DONTWAIT as _,
            std::ptr::null_mut(),
        )
    })?;
    for (i, header) in headers.iter().take(got).enumerate() {
        let Some(src) = load(&names[i]) else { continue };
        let mut incoming = Incoming {
            src,
            ecn: Ecn::NotCapable,
            len: header.msg_len as usize,
            segment: None,
            truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            overflows: None,
        };
        // SAFETY: the kernel has filled in the header and its control messages, which the macros
        // walk within msg_controllen; each value has the type that its kind says.
        unsafe {
            let mut message = libc::CMSG_FIRSTHDR(&header.msg_hdr);
            while !message.is_null() {
                let data = libc::CMSG_DATA(message);
                match ((*message).cmsg_level, (*message).cmsg_type) {
                    (libc::IPPROTO_IP, libc::IP_TOS) => incoming.ecn = Ecn::from_tos(*data),
                    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                        let class = data.cast::<c_int>().read_unaligned();
                        incoming.ecn = Ecn::from_tos(class as u8);
                    }
                    (libc::SOL_UDP, libc::UDP_GRO) => {
                        let size = data.cast::<c_int>().read_unaligned();
                        incoming.segment = usize::try_from(size).ok().filter(|&size| size > 0);
                    }
                    (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => {
                        incoming.overflows = Some(data.cast::<u32>().read_unaligned());
                    }
                    _ => {}
                }
                message = libc::CMSG_NXTHDR(&header.msg_hdr, message);
            }
        }
        each(i, incoming);
    }
    Ok(got)
}

/// Sets an option that is a number.
pub(crate) fn set(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the value is read for its size.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast::<c_void>(),
            size_of::<c_int>() as socklen_t,
        )
    };
    count(result).map(drop)
}

/// Gets an option that is a number.
pub(crate) fn get(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> io::Result<c_int> {
    let mut value: c_int = 0;
    let mut len = size_of::<c_int>() as socklen_t;
    // SAFETY: the value is written for its size at most.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast::<c_void>(),
            &mut len,
        )
    };
    count(result).map(|_| value)
}

fn count(result: c_int) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Structures of the kernel, empty.
fn zeroed<T: Zeroes>() -> T {
    // SAFETY: by the trait, zeroes are a value.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// Types of which zeroes are a value.
///
/// # Safety
/// They are.
unsafe trait Zeroes {}
// SAFETY: numbers only.
unsafe impl Zeroes for [sockaddr_storage; BATCH] {}
// SAFETY: a null pointer and a length.
unsafe impl Zeroes for [iovec; BATCH] {}
// SAFETY: null pointers and numbers.
unsafe impl Zeroes for [mmsghdr; BATCH] {}

fn store(address: &SocketAddr, to: &mut sockaddr_storage) -> socklen_t {
    match address {
        SocketAddr::V4(v4) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as _,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is large and aligned enough for every family's address.
            unsafe {
                (to as *mut sockaddr_storage)
                    .cast::<libc::sockaddr_in>()
                    .write(raw)
            };
            size_of::<libc::sockaddr_in>() as socklen_t
        }
        SocketAddr::V6(v6) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as _,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe {
                (to as *mut sockaddr_storage)
                    .cast::<libc::sockaddr_in6>()
                    .write(raw)
            };
            size_of::<libc::sockaddr_in6>() as socklen_t
        }
    }
}

fn load(from: &sockaddr_storage) -> Option<SocketAddr> {
    let at: *const sockaddr_storage = from;
    match c_int::from(from.ss_family) {
        libc::AF_INET => {
            // SAFETY: the kernel has written an address of the family that it names.
            let raw = unsafe { at.cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(raw.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddr::new(IpAddr::V4(ip), u16::from_be(raw.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let raw = unsafe { at.cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
            let port = u16::from_be(raw.sin6_port);
            Some(SocketAddrV6::new(ip, port, 0, raw.sin6_scope_id).into())
        }
        _ => None,
    }
}
