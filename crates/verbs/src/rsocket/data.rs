//! The functions that move data.

use core::ffi::{c_int, c_void};
use std::net::SocketAddr;

use freeflow_client::Errno;
use libc::{iovec, msghdr, off_t, size_t, sockaddr, socklen_t, ssize_t};

use super::io::How;
use super::memory::Vectors;
use super::table::{Descriptor, find};
use super::wait::Waits;
use super::{address, give_address, socket, stream};
use crate::objects::{code, set_errno};

fn size(result: Result<usize, Errno>) -> ssize_t {
    match result {
        Ok(n) => n as ssize_t,
        Err(errno) => {
            set_errno(code(errno));
            -1
        }
    }
}

/// One part of memory.
fn part(at: *const c_void, len: size_t) -> [iovec; 1] {
    [iovec {
        iov_base: at.cast_mut(),
        iov_len: len,
    }]
}

/// The parts of a vector. EINVAL: their number is out of range.
///
/// # Safety
///
/// The program's vector of so many parts.
unsafe fn parts<'a>(iov: *const iovec, count: usize) -> Result<&'a [iovec], Errno> {
    match (iov.is_null(), count) {
        (_, 0) => Ok(&[]),
        // SAFETY: by the caller's promise.
        (false, 1..=1024) => Ok(unsafe { std::slice::from_raw_parts(iov, count) }),
        _ => Err(Errno::INVAL),
    }
}

/// Receives into the parts; how many bytes, and of a datagram, or with `name`, from where.
///
/// # Safety
///
/// Memory of the program's that may be written.
unsafe fn receive(
    fd: c_int,
    parts: &[iovec],
    flags: c_int,
    name: bool,
) -> Result<(usize, Option<SocketAddr>), Errno> {
    // SAFETY: by the caller's promise.
    let mut to = unsafe { Vectors::new(parts)? };
    let how = How::from_flags(flags);
    match &*socket(fd)? {
        Descriptor::Stream(socket) => {
            let n = socket.receive(&mut to, how)?;
            let from = match name && n != 0 {
                true => socket.lock().info.and_then(|info| info.dst),
                false => None,
            };
            Ok((n, from))
        }
        Descriptor::Datagram(socket) => {
            let (n, from) = socket.receive(&mut to, how)?;
            Ok((n, Some(from)))
        }
        _ => Err(Errno::BADF),
    }
}

/// Sends the parts; how many bytes.
///
/// # Safety
///
/// Memory of the program's that may be read.
unsafe fn send(
    fd: c_int,
    parts: &[iovec],
    flags: c_int,
    to: Option<SocketAddr>,
) -> Result<usize, Errno> {
    // SAFETY: by the caller's promise.
    let mut from = unsafe { Vectors::new(parts)? };
    let how = How::from_flags(flags);
    match &*socket(fd)? {
        Descriptor::Stream(_) if to.is_some() => Err(Errno::ISCONN),
        Descriptor::Stream(socket) => socket.send(&mut from, how),
        Descriptor::Datagram(socket) => socket.send(&mut from, how, to),
        _ => Err(Errno::BADF),
    }
}

/// `rrecv`.
pub(crate) unsafe extern "C" fn rrecv(
    fd: c_int,
    buf: *mut c_void,
    len: size_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: the caller gives a buffer of that length.
    size(unsafe { receive(fd, &part(buf, len), flags, false) }.map(|(n, _)| n))
}

/// `rrecvfrom`.
pub(crate) unsafe extern "C" fn rrecvfrom(
    fd: c_int,
    buf: *mut c_void,
    len: size_t,
    flags: c_int,
    addr: *mut sockaddr,
    addr_len: *mut socklen_t,
) -> ssize_t {
    // SAFETY: the caller gives a buffer of that length, and room for an address or null.
    size(unsafe {
        receive(fd, &part(buf, len), flags, !addr.is_null()).map(|(n, from)| {
            if let (Some(from), false) = (from, addr.is_null()) {
                give_address(from, addr, addr_len);
            }
            n
        })
    })
}

/// `rrecvmsg`. ENOTSUP: control messages are asked for.
pub(crate) unsafe extern "C" fn rrecvmsg(fd: c_int, msg: *mut msghdr, flags: c_int) -> ssize_t {
    if msg.is_null() {
        return size(Err(Errno::FAULT));
    }
    // SAFETY: the caller gives a message header whose parts may be written.
    size(unsafe {
        let msg = &mut *msg;
        msg.msg_flags = 0;
        if !msg.msg_control.is_null() && msg.msg_controllen != 0 {
            return size(Err(Errno::NOTSUP));
        }
        parts(msg.msg_iov, msg.msg_iovlen).and_then(|parts| {
            let (n, from) = receive(fd, parts, flags, !msg.msg_name.is_null())?;
            match from {
                Some(from) if !msg.msg_name.is_null() => {
                    give_address(from, msg.msg_name.cast(), &mut msg.msg_namelen);
                }
                _ => msg.msg_namelen = 0,
            }
            Ok(n)
        })
    })
}

/// `rread`.
pub(crate) unsafe extern "C" fn rread(fd: c_int, buf: *mut c_void, len: size_t) -> ssize_t {
    // SAFETY: the caller gives a buffer of that length.
    unsafe { rrecv(fd, buf, len, 0) }
}

/// `rreadv`.
pub(crate) unsafe extern "C" fn rreadv(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: the caller gives a vector of so many parts that may be written.
    size(unsafe {
        parts(iov, count.try_into().unwrap_or(usize::MAX))
            .and_then(|parts| receive(fd, parts, 0, false))
            .map(|(n, _)| n)
    })
}

/// `rsend`.
pub(crate) unsafe extern "C" fn rsend(
    fd: c_int,
    buf: *const c_void,
    len: size_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: the caller gives a buffer of that length.
    size(unsafe { send(fd, &part(buf, len), flags, None) })
}

/// `rsendto`.
pub(crate) unsafe extern "C" fn rsendto(
    fd: c_int,
    buf: *const c_void,
    len: size_t,
    flags: c_int,
    addr: *const sockaddr,
    addr_len: socklen_t,
) -> ssize_t {
    // SAFETY: the caller gives a buffer and an address of these lengths, or no address.
    size(unsafe {
        let to = match addr.is_null() {
            true => Ok(None),
            false => address(addr, addr_len).map(Some),
        };
        to.and_then(|to| send(fd, &part(buf, len), flags, to))
    })
}

/// `rsendmsg`. ENOTSUP: it has control messages.
pub(crate) unsafe extern "C" fn rsendmsg(fd: c_int, msg: *const msghdr, flags: c_int) -> ssize_t {
    if msg.is_null() {
        return size(Err(Errno::FAULT));
    }
    // SAFETY: the caller gives a message header whose parts may be read.
    size(unsafe {
        let msg = &*msg;
        if !msg.msg_control.is_null() && msg.msg_controllen != 0 {
            return size(Err(Errno::NOTSUP));
        }
        let datagram = matches!(find(fd).as_deref(), Some(Descriptor::Datagram(_)));
        let to = match datagram && !msg.msg_name.is_null() {
            true => address(msg.msg_name.cast(), msg.msg_namelen).map(Some),
            // As `sendmsg(2)`, a stream that is connected does not look at it.
            false => Ok(None),
        };
        to.and_then(|to| send(fd, parts(msg.msg_iov, msg.msg_iovlen)?, flags, to))
    })
}

/// `rwrite`.
pub(crate) unsafe extern "C" fn rwrite(fd: c_int, buf: *const c_void, len: size_t) -> ssize_t {
    // SAFETY: the caller gives a buffer of that length.
    unsafe { rsend(fd, buf, len, 0) }
}

/// `rwritev`.
pub(crate) unsafe extern "C" fn rwritev(fd: c_int, iov: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: the caller gives a vector of so many parts that may be read.
    size(unsafe {
        parts(iov, count.try_into().unwrap_or(usize::MAX))
            .and_then(|parts| send(fd, parts, 0, None))
    })
}

/// `riomap`: the offset by which the peer writes the buffer; of -1, its address.
pub(crate) unsafe extern "C" fn riomap(
    fd: c_int,
    buf: *mut c_void,
    len: size_t,
    prot: c_int,
    _flags: c_int,
    offset: off_t,
) -> off_t {
    let map = || {
        if prot & !libc::PROT_WRITE != 0 {
            return Err(Errno::INVAL);
        }
        let for_peer = prot & libc::PROT_WRITE != 0;
        let offset = (offset != -1).then_some(offset as u64);
        stream(&*socket(fd)?)?.map(buf as u64, len as u64, for_peer, offset)
    };
    size(map().map(|offset| offset as usize)) as off_t
}

/// `riounmap`.
pub(crate) unsafe extern "C" fn riounmap(fd: c_int, buf: *mut c_void, len: size_t) -> c_int {
    let unmap = || stream(&*socket(fd)?)?.unmap(buf as u64, len as u64);
    crate::objects::minus_one(unmap())
}

/// `riowrite`.
pub(crate) unsafe extern "C" fn riowrite(
    fd: c_int,
    buf: *const c_void,
    len: size_t,
    offset: off_t,
    flags: c_int,
) -> size_t {
    let part = part(buf, len);
    let write = || {
        // SAFETY: the caller gives a buffer of that length.
        let mut from = unsafe { Vectors::new(&part)? };
        let how = How::from_flags(flags);
        stream(&*socket(fd)?)?.write_at(&mut from, offset as u64, how)
    };
    size(write()) as size_t
}
