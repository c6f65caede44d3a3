//! One message and its descriptors over a `SOCK_SEQPACKET` socket.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// What was received.
#[derive(Debug)]
pub struct Packet {
    /// Bytes of the message; 0 at the end of the stream.
    pub len: usize,
    /// Whether the message was longer than the buffer, or had more descriptors than expected
    /// (which the kernel then closed).
    pub truncated: bool,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// Sends a message; it goes as a whole or not at all.
pub fn send_packet(
    socket: impl AsFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL);
    }
    let flags = flags | SendFlags::NOSIGNAL;
    loop {
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
            Ok(_) => return Ok(()),
        }
    }
}

/// Receives a message, and at most four descriptors, close-on-exec.
pub fn recv_packet(
    socket: impl AsFd,
    buffer: &mut [u8],
    flags: RecvFlags,
) -> Result<Packet, Errno> {
    retry_on_intr(|| recv_packet_interruptible(&socket, buffer, flags))
}

/// As [`recv_packet`], but a signal handler ends it with EINTR, as it ends a `read(2)`.
pub fn recv_packet_interruptible(
    socket: impl AsFd,
    buffer: &mut [u8],
    flags: RecvFlags,
) -> Result<Packet, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    let truncated = got
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    Ok(Packet {
        len: got.bytes,
        truncated,
        fds,
    })
}

/// Receives a message from a stranger, who may send no descriptors: should there be some, none is
/// taken in, and the message counts as truncated.
pub fn recv_plain(socket: impl AsFd, buffer: &mut [u8], flags: RecvFlags) -> Result<Packet, Errno> {
    let mut none = RecvAncillaryBuffer::default();
    let got = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut none, flags) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let truncated = got
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    Ok(Packet {
        len: got.bytes,
        truncated,
        fds: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{event_pair, sealed_memfd};

    #[test]
    fn a_message_and_its_descriptors_arrive_together() {
        let (a, b) = event_pair().unwrap();
        let fd = sealed_memfd("t", 4096).unwrap();
        send_packet(&a, b"hello", &[fd.as_fd(), b.as_fd()], SendFlags::empty()).unwrap();
        let mut buffer = [0; 16];
        let packet = recv_packet(&b, &mut buffer, RecvFlags::empty()).unwrap();
        assert_eq!(
            (&buffer[..packet.len], packet.fds.len()),
            (&b"hello"[..], 2)
        );
        assert!(!packet.truncated);
        send_packet(&a, b"hello", &[], SendFlags::empty()).unwrap();
        let packet = recv_packet(&b, &mut buffer[..2], RecvFlags::empty()).unwrap();
        assert!(packet.truncated);
        send_packet(&a, b"hello", &[fd.as_fd()], SendFlags::empty()).unwrap();
        let packet = recv_plain(&b, &mut buffer, RecvFlags::empty()).unwrap();
        assert!(packet.truncated && packet.fds.is_empty());
        send_packet(&a, b"hello", &[], SendFlags::empty()).unwrap();
        let packet = recv_plain(&b, &mut buffer, RecvFlags::empty()).unwrap();
        assert_eq!((packet.len, packet.truncated), (5, false));
        drop(a);
        assert_eq!(
            recv_packet(&b, &mut buffer, RecvFlags::empty())
                .unwrap()
                .len,
            0
        );
    }
}
