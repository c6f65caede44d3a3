//! One TCP connection to another router, with TLS around it if there is an identity.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustls::Error as TlsError;

use crate::identity::explain;
use crate::message::Hello;
use crate::talk::{Ended, Heard, Talk};

/// Bytes that wait to be sent, at most: who does not read them is not heard out either.
const MAX_WAITING: usize = 64 << 10;

/// Reads of one turn, so that no connection keeps the others waiting.
const READS_PER_TURN: u32 = 8;

/// Why a connection is over.
#[derive(Debug)]
pub(crate) enum Closed {
    /// It did not come about.
    Connect(io::Error),
    /// The other side ended it.
    End,
    Io(io::Error),
    Tls(TlsError),
    Talk(Ended),
    /// The other side takes nothing in.
    Unread,
}

impl std::fmt::Display for Closed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Closed::Connect(e) => write!(
                f,
                "cannot connect: {e}; does a router run there, and is its control port open?"
            ),
            Closed::End => {
                f.write_str("the other host has closed the connection; its log says why")
            }
            Closed::Io(e) => write!(f, "the connection is lost: {e}"),
            Closed::Tls(e) => write!(f, "TLS: {}", explain(e)),
            Closed::Talk(e) => e.fmt(f),
            Closed::Unread => f.write_str("the other host does not read"),
        }
    }
}

impl From<Ended> for Closed {
    fn from(ended: Ended) -> Self {
        Closed::Talk(ended)
    }
}

/// A connection.
pub(crate) struct Connection {
    socket: TcpStream,
    tls: Option<rustls::Connection>,
    pub(crate) talk: Talk,
    /// The other side's host.
    pub(crate) host: IpAddr,
    /// Whether this side has begun it.
    pub(crate) dialed: bool,
    connecting: bool,
    out: Vec<u8>,
    /// Whether the socket has no room.
    full: bool,
}

impl Connection {
    /// Begins to connect from an address of this host.
    pub(crate) fn dial(
        local: IpAddr,
        to: SocketAddr,
        tls: Option<rustls::Connection>,
        offer: Hello,
        now: u64,
    ) -> Result<Self, Closed> {
        let socket = connect(local, to).map_err(|e| Closed::Connect(e.into()))?;
        Ok(Connection {
            connecting: true,
            dialed: true,
            ..Self::accepted(socket, to.ip(), tls, offer, now)
        })
    }

    /// One that has come from a host.
    pub(crate) fn accepted(
        socket: TcpStream,
        host: IpAddr,
        tls: Option<rustls::Connection>,
        offer: Hello,
        now: u64,
    ) -> Self {
        // What is said is short, and waits for an answer. Without it, that takes longer.
        let _ = socket.set_nodelay(true);
        Connection {
            socket,
            tls,
            talk: Talk::new(offer, now),
            host,
            dialed: false,
            connecting: false,
            out: Vec::new(),
            full: false,
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether to look for room.
    pub(crate) fn waits_for_room(&self) -> bool {
        self.connecting || self.full
    }

    /// Looks at the time.
    pub(crate) fn on_time(&mut self, now: u64) -> Result<(), Closed> {
        self.talk.on_time(now).map_err(|ended| {
            if self.connecting {
                Closed::Connect(io::ErrorKind::TimedOut.into())
            } else {
                Closed::Talk(ended)
            }
        })
    }

    /// Takes in what has come.
    pub(crate) fn receive(&mut self, now: u64, heard: &mut Vec<Heard>) -> Result<(), Closed> {
        if self.connecting {
            if let Some(e) = self.socket.take_error().map_err(Closed::Io)? {
                return Err(Closed::Connect(e));
            }
            match self.socket.peer_addr() {
                Ok(_) => self.connecting = false,
                Err(e) if e.kind() == io::ErrorKind::NotConnected => return Ok(()),
                Err(e) => return Err(Closed::Connect(e)),
            }
        }
        for _ in 0..READS_PER_TURN {
            let mut buffer = [0; 4096];
            let read = match &mut self.tls {
                Some(tls) => tls.read_tls(&mut &self.socket),
                None => (&self.socket).read(&mut buffer),
            };
            let read = match read {
                Ok(0) => return Err(Closed::End),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Closed::Io(e)),
            };
            let Some(tls) = &mut self.tls else {
                let bytes = buffer.get(..read).unwrap_or_default();
                self.talk.receive(bytes, now, heard)?;
                continue;
            };
            let state = tls.process_new_packets().map_err(|e| {
                // The other side is told why, if that is possible at once.
                let _ = tls.write_tls(&mut &self.socket);
                Closed::Tls(e)
            })?;
            let mut bytes = vec![0; state.plaintext_bytes_to_read()];
            tls.reader().read_exact(&mut bytes).map_err(Closed::Io)?;
            self.talk.receive(&bytes, now, heard)?;
            if state.peer_has_closed() {
                return Err(Closed::End);
            }
        }
        Ok(())
    }

    /// Sends what there is to send.
    pub(crate) fn flush(&mut self) -> Result<(), Closed> {
        if self.connecting {
            return Ok(());
        }
        self.full = false;
        let new = self.talk.take_output();
        if let Some(tls) = &mut self.tls {
            if tls.writer().write_all(&new).is_err() {
                return Err(Closed::Unread);
            }
            while tls.wants_write() {
                if let Err(e) = tls.write_tls(&mut &self.socket) {
                    return self.blocked(e);
                }
            }
            return Ok(());
        }
        self.out.extend(&new);
        if self.out.len() > MAX_WAITING {
            return Err(Closed::Unread);
        }
        while !self.out.is_empty() {
            match (&self.socket).write(&self.out) {
                Ok(n) => drop(self.out.drain(..n)),
                Err(e) => return self.blocked(e),
            }
        }
        Ok(())
    }

    fn blocked(&mut self, e: io::Error) -> Result<(), Closed> {
        match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {
                self.full = true;
                Ok(())
            }
            _ => Err(Closed::Io(e)),
        }
    }
}

fn connect(local: IpAddr, to: SocketAddr) -> Result<TcpStream, Errno> {
    let family = match local {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // By its address the other side knows this host.
    rustix::net::bind(&socket, &SocketAddr::new(local, 0))?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket.into()),
        Err(e) => Err(e),
    }
}
