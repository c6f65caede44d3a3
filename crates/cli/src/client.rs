//! The connection to a router's control socket.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use freeflow_api::{
    CONTROL_VERSION, ControlAnswer, ControlRequest, MAX_CONTROL_BYTES, Operation, RouterStatus,
    RuntimeDir,
};
use freeflow_shm::{recv_packet, send_packet};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect,
    socket_with,
};

/// A router that does not answer for so long has a problem.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// No router serves the runtime directory.
#[derive(Debug)]
pub(crate) struct NoRouter(PathBuf);

impl fmt::Display for NoRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no router runs in {} (start one with: freeflow router, or freeflow run)",
            self.0.display()
        )
    }
}

impl std::error::Error for NoRouter {}

/// A router does not answer.
#[derive(Debug)]
pub(crate) struct NoAnswer(Duration);

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        write!(
            f,
            "the router does not answer within {seconds} s; is it stopped?"
        )
    }
}

impl std::error::Error for NoAnswer {}

/// A connection to a router.
pub(crate) struct Client {
    socket: OwnedFd,
    /// How long each answer may take.
    time: Duration,
}

impl Client {
    /// Connects to the router of a runtime directory; `None` if there is none.
    pub(crate) fn try_connect(dir: &RuntimeDir) -> Result<Option<Self>> {
        Self::try_connect_for(dir, ANSWER_TIME)
    }

    /// As [`Self::try_connect`], to a router that answers each time within so long.
    pub(crate) fn try_connect_for(dir: &RuntimeDir, time: Duration) -> Result<Option<Self>> {
        let path = dir.control_socket();
        if let Some(bytes) = RuntimeDir::excess(&path) {
            bail!(
                "runtime directory {} is {bytes} bytes too long for its sockets; choose a shorter \
                 one with --runtime-dir",
                dir.path().display()
            );
        }
        let socket = match dial(&path, time) {
            Ok(socket) => socket,
            Err(Errno::NOENT | Errno::CONNREFUSED) => return Ok(None),
            Err(Errno::AGAIN) => bail!(NoAnswer(time)),
            Err(Errno::ACCESS) => bail!(
                "cannot reach {}: it is another user's; run as that user, or choose another \
                 directory with --runtime-dir",
                path.display()
            ),
            Err(e) => return Err(e).with_context(|| format!("cannot reach {}", path.display())),
        };
        // Whoever made the socket could have programs use memory and devices of theirs.
        let own = rustix::process::geteuid();
        let served_by = socket_peercred(&socket)
            .context("cannot identify the router")?
            .uid;
        if served_by != own && !served_by.is_root() && !own.is_root() {
            bail!(
                "the router in {} is run by user {}; choose another directory with --runtime-dir",
                dir.path().display(),
                served_by.as_raw()
            );
        }
        Ok(Some(Client { socket, time }))
    }

    /// Connects to the router of a runtime directory, which must be there.
    pub(crate) fn connect(dir: &RuntimeDir) -> Result<Self> {
        match Self::try_connect(dir)? {
            Some(client) => Ok(client),
            None => Err(NoRouter(dir.path().to_owned()).into()),
        }
    }

    /// Asks for something. A router that ends meanwhile answers [`ControlAnswer::Ending`].
    pub(crate) fn call(&self, body: Operation, fds: &[BorrowedFd<'_>]) -> Result<ControlAnswer> {
        let request = ControlRequest {
            version: CONTROL_VERSION,
            body,
        };
        let bytes = serde_json::to_vec(&request)?;
        let mut buffer = vec![0; MAX_CONTROL_BYTES];
        let answer = send_packet(&self.socket, &bytes, fds, SendFlags::empty())
            .and_then(|()| recv_packet(&self.socket, &mut buffer, RecvFlags::empty()));
        let len = match answer {
            Ok(packet) if packet.len != 0 => packet.len,
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => return Ok(ControlAnswer::Ending),
            Err(Errno::AGAIN) => bail!(NoAnswer(self.time)),
            Err(e) => return Err(e).context("cannot ask the router"),
        };
        match serde_json::from_slice(&buffer[..len])
            .context("the router's answer is not understood; is it of another release?")?
        {
            ControlAnswer::Error(message) => bail!(message),
            answer => Ok(answer),
        }
    }

    /// Asks for something that only succeeds or fails.
    pub(crate) fn tell(&self, body: Operation, fds: &[BorrowedFd<'_>]) -> Result<()> {
        match self.call(body, fds)? {
            ControlAnswer::Done => Ok(()),
            other => unexpected(other),
        }
    }

    /// Asks for the status.
    pub(crate) fn status(&self) -> Result<RouterStatus> {
        match self.call(Operation::Status, &[])? {
            ControlAnswer::Status(status) => Ok(status),
            other => unexpected(other),
        }
    }

    /// Waits until the router has closed the connection; not for ever.
    pub(crate) fn wait_for_end(self) {
        let mut buffer = [0];
        while let Ok(packet) = recv_packet(&self.socket, &mut buffer, RecvFlags::empty()) {
            if packet.len == 0 {
                return;
            }
        }
    }
}

/// Tells the user what a router warns of.
pub(crate) fn warn(warning: Option<String>) {
    if let Some(warning) = warning {
        eprintln!("freeflow: warning: {warning}");
    }
}

/// An answer that does not fit the question.
pub(crate) fn unexpected<T>(answer: ControlAnswer) -> Result<T> {
    match answer {
        ControlAnswer::Ending => bail!("the router ended before it answered"),
        other => bail!("the router's answer does not fit the question: {other:?}"),
    }
}

fn dial(path: &Path, time: Duration) -> Result<OwnedFd, Errno> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    // To connect takes as long, if others wait to be accepted.
    set_socket_timeout(&socket, Timeout::Recv, Some(time))?;
    set_socket_timeout(&socket, Timeout::Send, Some(time))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
