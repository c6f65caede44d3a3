//! The connection to the router: one question, one answer.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use freeflow_session::{MAX_MESSAGE_BYTES, Reply, Request, decode_reply, encode_request};
use freeflow_shm::{recv_packet, send_packet};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect,
    socket_with,
};
use rustix::time::Timespec;

/// A router that does not answer a control verb for so long is taken for dead.
const ANSWER_TIME: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(crate) struct Link {
    socket: OwnedFd,
    /// One question at a time; the buffer of its answer.
    turn: Mutex<Vec<u8>>,
    answer_time: Duration,
    dead: AtomicBool,
}

impl Link {
    pub(crate) fn connect(path: &Path) -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::over(socket, ANSWER_TIME)
    }

    fn over(socket: OwnedFd, answer_time: Duration) -> Result<Self, Errno> {
        set_socket_timeout(&socket, Timeout::Recv, Some(answer_time))?;
        set_socket_timeout(&socket, Timeout::Send, Some(answer_time))?;
        let turn = Mutex::new(vec![0; MAX_MESSAGE_BYTES]);
        Ok(Link {
            socket,
            turn,
            answer_time,
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
        let sent = self.until_ready(PollFlags::OUT, || {
            send_packet(&self.socket, &bytes, &[], SendFlags::empty())
        });
        let packet = sent.and_then(|()| {
            self.until_ready(PollFlags::IN, || {
                recv_packet(&self.socket, &mut buffer, RecvFlags::empty())
            })
        });
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

    /// Tries until the socket is ready, as long as an answer may take: somebody may have made it
    /// non-blocking.
    fn until_ready<T>(
        &self,
        ready: PollFlags,
        mut attempt: impl FnMut() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let until = Instant::now() + self.answer_time;
        loop {
            match attempt() {
                Err(Errno::AGAIN) => {}
                other => return other,
            }
            // A socket that blocks has waited so long already.
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Errno::AGAIN);
            }
            let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
            match poll(&mut [PollFd::new(&self.socket, ready)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
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

#[cfg(test)]
mod tests {
    use std::thread::scope;

    use freeflow_session::{decode_request, encode_reply};
    use freeflow_shm::event_pair;
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

    use super::*;

    fn pair(answer_time: Duration) -> (Link, OwnedFd) {
        let (ours, theirs) = event_pair().unwrap();
        (Link::over(ours, answer_time).unwrap(), theirs)
    }

    fn set_blocking(link: &Link, blocking: bool) {
        let mut flags = fcntl_getfl(&link.socket).unwrap();
        flags.set(OFlags::NONBLOCK, !blocking);
        fcntl_setfl(&link.socket, flags).unwrap();
    }

    /// Answers so many questions.
    fn answer(router: &OwnedFd, questions: u32) {
        let done = encode_reply(&Ok(Reply::Done)).unwrap();
        for _ in 0..questions {
            let mut buffer = [0; 256];
            let packet = recv_packet(router, &mut buffer, RecvFlags::empty()).unwrap();
            assert_eq!(decode_request(&buffer[..packet.len]), Ok(Request::Settle));
            send_packet(router, &done, &[], SendFlags::empty()).unwrap();
        }
    }

    #[test]
    fn a_socket_that_does_not_block_is_waited_for() {
        const QUESTIONS: u32 = 200;
        let (link, router) = pair(ANSWER_TIME);
        set_blocking(&link, false);
        scope(|s| {
            s.spawn(|| answer(&router, QUESTIONS));
            for _ in 0..QUESTIONS {
                assert!(matches!(link.call(&Request::Settle), Ok((Reply::Done, _))));
            }
        });
        assert!(!link.is_dead());
    }

    #[test]
    fn a_router_that_does_not_answer_is_dead() {
        for blocking in [false, true] {
            let (link, _router) = pair(Duration::from_millis(50));
            set_blocking(&link, blocking);
            assert_eq!(link.call(&Request::Settle).unwrap_err(), Errno::IO);
            assert!(link.is_dead());
        }
    }

    #[test]
    fn a_router_that_goes_is_dead_at_once() {
        let (link, router) = pair(ANSWER_TIME);
        set_blocking(&link, false);
        drop(router);
        assert_eq!(link.call(&Request::Settle).unwrap_err(), Errno::IO);
        assert!(link.is_dead());
    }
}
