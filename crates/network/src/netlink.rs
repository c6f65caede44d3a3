//! One request, one acknowledgement: all of `rtnetlink(7)` that is needed here.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

/// Flags to make what must not be there yet.
pub(crate) const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;
/// Flags to change or remove what is there.
pub(crate) const MODIFY: u16 = 0;

/// Room for an acknowledgement, which carries the request's header or the whole request.
const ANSWER_BYTES: usize = 8 << 10;

/// A socket that speaks to the kernel of the network namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct Netlink(OwnedFd);

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub(crate) fn open() -> Result<Self, Errno> {
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        // No protocol is protocol 0, NETLINK_ROUTE.
        socket_with(family, kind, SocketFlags::CLOEXEC, None).map(Netlink)
    }

    pub(crate) fn from_fd(socket: OwnedFd) -> Self {
        Netlink(socket)
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Has the kernel do something. The errno is the kernel's; EPROTO: its answer is none.
    pub(crate) fn request(&self, body: RouteNetlinkMessage, flags: u16) -> Result<(), Errno> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(body));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        // With the kernel's address the sender's capabilities count; without it, also those of
        // whoever opened the socket, who knew nothing of the other namespace.
        let kernel = SocketAddrNetlink::new(0, 0);
        sendto(&self.0, &bytes, SendFlags::empty(), &kernel)?;
        let mut answer = vec![0; ANSWER_BYTES];
        let (len, _) = loop {
            match recv(&self.0, &mut answer[..], RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                other => break other?,
            }
        };
        let answer = answer.get(..len).ok_or(Errno::PROTO)?;
        match NetlinkMessage::<RouteNetlinkMessage>::deserialize(answer) {
            Ok(NetlinkMessage {
                payload: NetlinkPayload::Error(e),
                ..
            }) => match e.code {
                None => Ok(()),
                Some(code) => Err(Errno::from_raw_os_error(code.get().saturating_abs())),
            },
            _ => Err(Errno::PROTO),
        }
    }
}
