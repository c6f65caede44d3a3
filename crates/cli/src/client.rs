//! The connection to a router's control socket.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use freeflow_api::{
    CONTROL_VERSION, ControlAnswer, ControlRequest, MAX_CONTROL_BYTES, Operation, RouterStatus,
    RuntimeDir,
};
use freeflow_shm::{recv_packet, send_packet};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect,
    socket_with,
};

/// A router that does not answer for so long has a problem.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// A connection to a router.
pub(crate) struct Client(OwnedFd);

impl Client {
    /// Connects to the router of a runtime directory; `None` if there is none.
    pub(crate) fn try_connect(dir: &RuntimeDir) -> Result<Option<Self>> {
        let path = dir.control_socket();
        match dial(&path) {
            Ok(socket) => Ok(Some(Client(socket))),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => Ok(None),
            Err(e) => Err(e).with_context(|| format!("cannot reach {}", path.display())),
        }
    }

    /// Connects to the router of a runtime directory, which must be there.
    pub(crate) fn connect(dir: &RuntimeDir) -> Result<Self> {
        match Self::try_connect(dir)? {
            Some(client) => Ok(client),
            None => bail!(
                "no router runs in {} (start one with: freeflow router, or freeflow run)",
                dir.path().display()
            ),
        }
    }

    /// Asks for something.
    pub(crate) fn call(&self, body: Operation) -> Result<ControlAnswer> {
        let request = ControlRequest {
            version: CONTROL_VERSION,
            body,
        };
        let bytes = serde_json::to_vec(&request)?;
        send_packet(&self.0, &bytes, &[], SendFlags::empty()).context("the router is gone")?;
        let mut buffer = vec![0; MAX_CONTROL_BYTES];
        let packet = recv_packet(&self.0, &mut buffer, RecvFlags::empty())
            .context("the router does not answer")?;
        if packet.len == 0 {
            bail!("the router closed the connection; is it run by another user?");
        }
        match serde_json::from_slice(&buffer[..packet.len])
            .context("the router's answer is not understood; is it of another release?")?
        {
            ControlAnswer::Error(message) => bail!(message),
            answer => Ok(answer),
        }
    }

    /// Asks for the status.
    pub(crate) fn status(&self) -> Result<RouterStatus> {
        match self.call(Operation::Status)? {
            ControlAnswer::Status(status) => Ok(status),
            other => bail!("unexpected answer {other:?}"),
        }
    }
}

fn dial(path: &Path) -> Result<OwnedFd, rustix::io::Errno> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIME))?;
    set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_TIME))?;
    Ok(socket)
}
