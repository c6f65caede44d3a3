//! A session spoken by hand: the protocol's messages and rings without the network library, so
//! that a test can say and write what the library never would.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use freeflow_session::{
    Errno as WireErrno, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Reply, Request, RingLocation, Welcome,
    decode_reply, encode_request,
};
use freeflow_shm::{DirtyMap, Doorbell, Mapping, Region, recv_packet, send_packet};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect,
    socket_with,
};

/// A router that has not answered by then hangs.
const ANSWER: Duration = Duration::from_secs(30);

/// A connection to an endpoint's socket on which nothing was said.
pub fn dial(endpoint: &Path) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(endpoint)?)
        .with_context(|| format!("cannot connect to {}", endpoint.display()))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER))?;
    set_socket_timeout(&socket, Timeout::Send, Some(ANSWER))?;
    Ok(socket)
}

/// What came back.
#[derive(Debug)]
pub enum Answer {
    /// A reply and its descriptors.
    Reply(Box<Reply>, Vec<OwnedFd>),
    /// The request was refused.
    Refused(Errno),
    /// The router closed the connection.
    Closed,
}

/// Sends bytes as one message.
pub fn say(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    send_packet(socket, bytes, fds, SendFlags::empty())
}

/// Waits for an answer.
pub fn hear(socket: impl AsFd) -> Result<Answer> {
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    let packet = match recv_packet(socket, &mut buffer, RecvFlags::empty()) {
        Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Answer::Closed),
        Err(Errno::AGAIN) => bail!("no answer in {ANSWER:?}: the router hangs"),
        other => other?,
    };
    if packet.len == 0 {
        return Ok(Answer::Closed);
    }
    let reply = decode_reply(&buffer[..packet.len]).context("an answer is no message")?;
    Ok(match reply {
        Ok(reply) => Answer::Reply(Box::new(reply), packet.fds),
        Err(WireErrno(raw)) => Answer::Refused(Errno::from_raw_os_error(raw)),
    })
}

/// Asks; an answer is also that the router closed the connection.
pub fn ask(socket: impl AsFd, request: &Request) -> Result<Answer> {
    let bytes = encode_request(request).context("the request is too long")?;
    match say(&socket, &bytes, &[]) {
        Err(Errno::PIPE | Errno::CONNRESET) => Ok(Answer::Closed),
        Err(errno) => Err(errno).context("cannot send a request"),
        Ok(()) => hear(socket),
    }
}

/// A session.
pub struct Raw {
    /// Its connection.
    pub socket: OwnedFd,
    /// What the router said of itself.
    pub welcome: Welcome,
    /// Its doorbell.
    pub doorbell: Doorbell,
    /// Its dirty map.
    pub dirty: Region,
    slabs: HashMap<u32, Arc<Mapping>>,
    segments: HashMap<u32, (OwnedFd, Arc<Mapping>)>,
}

impl Raw {
    /// Begins a session.
    pub fn connect(endpoint: &Path) -> Result<Raw> {
        let socket = dial(endpoint)?;
        let hello = Request::Hello {
            version: PROTOCOL_VERSION,
        };
        let (welcome, fds) = match ask(&socket, &hello)? {
            Answer::Reply(reply, fds) => (*reply, fds),
            other => bail!("the answer to hello is {other:?}"),
        };
        let Reply::Welcome(welcome) = welcome else {
            bail!("the answer to hello is {welcome:?}");
        };
        let mut fds = fds.into_iter();
        let doorbell = Doorbell::from_fd(fds.next().context("no doorbell")?);
        let slab = fds.next().context("no slab")?;
        let slab = Arc::new(Mapping::new(&slab, welcome.region.slab_len)?);
        let region = &welcome.region;
        let dirty = Region::new(slab.clone(), region.offset, region.len)
            .map_err(|e| anyhow::anyhow!("{e:?}"))?;
        Ok(Raw {
            socket,
            slabs: HashMap::from([(region.slab, slab)]),
            welcome,
            doorbell,
            dirty,
            segments: HashMap::new(),
        })
    }

    /// Asks.
    pub fn ask(&self, request: &Request) -> Result<Answer> {
        ask(&self.socket, request)
    }

    /// Asks for what must be granted; the descriptors that came beside it are returned.
    pub fn call(&self, request: &Request) -> Result<(Reply, Vec<OwnedFd>)> {
        match self.ask(request)? {
            Answer::Reply(reply, fds) => Ok((*reply, fds)),
            other => bail!("{request:?} is answered with {other:?}"),
        }
    }

    /// Asks for what must be refused.
    pub fn refused(&self, request: &Request) -> Result<Errno> {
        match self.ask(request)? {
            Answer::Refused(errno) => Ok(errno),
            other => bail!("{request:?} is answered with {other:?}"),
        }
    }

    /// Memory of a ring that the router made.
    pub fn ring(&mut self, at: &RingLocation, fds: Vec<OwnedFd>) -> Result<Region> {
        if let Some(fd) = fds.first() {
            self.slabs
                .insert(at.slab, Arc::new(Mapping::new(fd, at.slab_len)?));
        }
        let slab = self.slabs.get(&at.slab).context("an unknown slab")?;
        Region::new(slab.clone(), at.offset, at.len).map_err(|e| anyhow::anyhow!("{e:?}"))
    }

    /// The first slab, whole.
    pub fn first_slab(&self) -> Option<&Arc<Mapping>> {
        self.slabs.get(&self.welcome.region.slab)
    }

    /// Shared pages: segment and offset.
    pub fn pages(&mut self, len: u64) -> Result<(u32, u64)> {
        let (reply, fds) = self.call(&Request::AllocPages { len })?;
        let Reply::Pages {
            segment,
            segment_len,
            offset,
        } = reply
        else {
            bail!("pages: {reply:?}");
        };
        if let Some(fd) = fds.into_iter().next() {
            let mapping = Arc::new(Mapping::new(&fd, segment_len)?);
            self.segments.insert(segment, (fd, mapping));
        }
        Ok((segment, offset))
    }

    /// The mapping and the descriptor of a segment.
    pub fn segment(&self, segment: u32) -> Option<(&Arc<Mapping>, BorrowedFd<'_>)> {
        let (fd, mapping) = self.segments.get(&segment)?;
        Some((mapping, fd.as_fd()))
    }

    /// Tells the router that a queue pair has work.
    pub fn mark(&self, slot: u32) {
        if let Some(map) = DirtyMap::new(self.dirty.words())
            && map.mark(slot)
        {
            self.doorbell.ring();
        }
    }
}
