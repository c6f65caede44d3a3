//! The connection to the router: one question, one answer.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use freeflow_session::{MAX_MESSAGE_BYTES, Reply, Request, decode_reply, encode_request};
use freeflow_shm::{recv_packet, send_packet};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect,
    socket_with,
};

/// A router that does not answer a control verb for so long is taken for dead.
const ANSWER_TIME: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(crate) struct Link {
    socket: OwnedFd,
    /// One question at a time; the buffer of its answer.
    turn: Mutex<Vec<u8>>,
    dead: AtomicBool,
}

impl Link {
    pub(crate) fn connect(path: &Path) -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIME))?;
        set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_TIME))?;
        let turn = Mutex::new(vec![0; MAX_MESSAGE_BYTES]);
        Ok(Link {
            socket,
            turn,
            dead: AtomicBool::new(false),
        })
    }

    /// Asks the router. EIO: it is gone.
    pub(crate) fn call(&self, request: &Request) -> Result<(Reply, Vec<OwnedFd>), Errno> {
        let bytes = encode_request(request).ok_or(Errno::NOMEM)?;
        let mut buffer = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_dead() {
            return Err(Errno::IO);
        }
        let packet = send_packet(&self.socket, &bytes, &[], SendFlags::empty())
            .and_then(|()| recv_packet(&self.socket, &mut buffer, RecvFlags::empty()));
        let packet = match packet {
            Ok(packet) if packet.len != 0 && !packet.truncated => packet,
            // After a failure in the middle of an exchange nothing can be asked any more.
            _ => {
                self.set_dead();
                return Err(Errno::IO);
            }
        };
        match decode_reply(&buffer[..packet.len]) {
            Ok(Ok(reply)) => Ok((reply, packet.fds)),
            Ok(Err(errno)) => Err(Errno::from_raw_os_error(errno.0)),
            Err(_) => {
                self.set_dead();
                Err(Errno::IO)
            }
        }
    }

    /// The socket.
    pub(crate) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// The router's process.
    pub(crate) fn router(&self) -> Result<rustix::process::Pid, Errno> {
        Ok(rustix::net::sockopt::socket_peercred(&self.socket)?.pid)
    }

    fn set_dead(&self) {
        // Release: pairs with `is_dead`.
        self.dead.store(true, Ordering::Release);
    }

    /// Whether the router is known to be gone.
    pub(crate) fn is_dead(&self) -> bool {
        // Acquire: what the router wrote before it died is visible.
        self.dead.load(Ordering::Acquire)
    }

    /// Looks whether the router is gone.
    pub(crate) fn check(&self) -> bool {
        let mut byte = [0u8; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        // The end of the stream: nothing else is zero bytes long, as no message is empty.
        if let Ok((_, 0)) | Err(Errno::CONNRESET) =
            rustix::net::recv(self.socket.as_fd(), &mut byte[..], flags)
        {
            self.set_dead();
        }
        self.is_dead()
    }
}
