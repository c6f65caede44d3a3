//! The thread that serves endpoints' sockets.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freeflow_session::{
    Errno as WireErrno, Handle, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Reply, Request,
    decode_request, encode_reply,
};
use freeflow_shm::{is_alive, peer_process, recv_plain, refuse_descriptors, send_packet};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use crate::EndReason;
use crate::connections::{Connection, Connections};
use crate::control::Answer;
use crate::objects::Peer;
use crate::sandbox::Job;
use crate::serve::Shared;
use crate::turns::Turns;

/// Descriptors kept for connections when there are no others, so that they can be told.
const RESERVE: usize = 16;

/// A socket whose connections cannot be accepted is left alone for so long.
const PAUSE: Duration = Duration::from_millis(100);

/// When there are no tokens for control verbs at all, somebody may have changed that.
const ASK_AGAIN: Duration = Duration::from_secs(1);

const NO_TIME: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// Bytes of answers that wait to be read: a few, as the library reads one before it asks for the
/// next. (The kernel makes more of it.)
const ANSWER_BYTES: usize = 1;

enum Watched {
    Stop,
    Listener(Handle),
    Connection(u32),
    Process(u32),
}

const KIND_SHIFT: u32 = 32;

impl Watched {
    fn data(&self) -> EventData {
        let (kind, value) = match *self {
            Watched::Stop => (0, 0),
            Watched::Listener(endpoint) => (1, endpoint.0),
            Watched::Connection(number) => (2, number),
            Watched::Process(number) => (3, number),
        };
        EventData::new_u64(kind << KIND_SHIFT | u64::from(value))
    }

    fn from_data(data: u64) -> Self {
        let value = data as u32;
        match data >> KIND_SHIFT {
            1 => Watched::Listener(Handle(value)),
            2 => Watched::Connection(value),
            3 => Watched::Process(value),
            _ => Watched::Stop,
        }
    }
}

/// Something that an endpoint's turn is for.
enum Ready {
    /// Somebody connects to its socket.
    Connect,
    /// A connection has a message, or ended.
    Message(u32),
    /// The process at the other end of a connection is gone.
    Exit(u32),
}

/// An event comes once, until it is asked for again: what waits for its turn is not told of anew.
const ONCE: EventFlags = EventFlags::IN.union(EventFlags::ONESHOT);

/// Events that are taken out of the kernel at once.
const EVENTS: usize = 256;

type Sockets = Arc<Mutex<HashMap<Handle, OwnedFd>>>;

/// Where endpoints' sockets are added to a running server.
#[derive(Clone)]
pub(crate) struct Listeners {
    epoll: Arc<OwnedFd>,
    sockets: Sockets,
}

impl Listeners {
    fn lock(&self) -> MutexGuard<'_, HashMap<Handle, OwnedFd>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, endpoint: Handle, socket: OwnedFd) -> Result<(), Errno> {
        // Connections inherit it. An older kernel passes them; they are refused on arrival.
        let _ = refuse_descriptors(&socket);
        let data = Watched::Listener(endpoint).data();
        epoll::add(&*self.epoll, &socket, data, ONCE)?;
        self.lock().insert(endpoint, socket);
        Ok(())
    }

    pub(crate) fn remove(&self, endpoint: Handle) {
        self.lock().remove(&endpoint);
    }

    fn accept(&self, endpoint: Handle) -> Result<OwnedFd, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let sockets = self.lock();
        // Its events may come before it is here, or after it is gone.
        let listener = sockets.get(&endpoint).ok_or(Errno::AGAIN)?;
        rustix::net::accept_with(listener, flags)
    }

    /// Looks for the next connection to an endpoint.
    fn watch(&self, endpoint: Handle) {
        if let Some(listener) = self.lock().get(&endpoint) {
            let data = Watched::Listener(endpoint).data();
            let _ = epoll::modify(&*self.epoll, listener, data, ONCE);
        }
    }
}

/// The thread that serves sockets.
pub(crate) struct Server {
    shared: Arc<Shared>,
    epoll: Arc<OwnedFd>,
    /// Readable when the thread is to end.
    _stop: OwnedFd,
    listeners: Listeners,
    connections: Connections,
    turns: Turns<Ready>,
    reserve: Vec<OwnedFd>,
    /// Endpoints whose sockets are left alone until then.
    paused: Option<(Instant, Vec<Handle>)>,
    /// Connections that are not read from before a time, and whether their token is there then.
    delayed: BTreeSet<(u64, u32, bool)>,
    buffer: Vec<u8>,
}

impl Server {
    /// A server that ends when `stop` becomes readable.
    pub(crate) fn new(shared: Arc<Shared>, stop: OwnedFd) -> Result<(Self, Listeners), Errno> {
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        epoll::add(&*epoll, &stop, Watched::Stop.data(), EventFlags::IN)?;
        let listeners = Listeners {
            epoll: epoll.clone(),
            sockets: Sockets::default(),
        };
        let mut server = Server {
            shared,
            epoll,
            _stop: stop,
            listeners: listeners.clone(),
            connections: Connections::default(),
            turns: Turns::default(),
            reserve: Vec::new(),
            paused: None,
            delayed: BTreeSet::new(),
            buffer: vec![0; MAX_MESSAGE_BYTES + 1],
        };
        server.fill_reserve();
        Ok((server, listeners))
    }

    pub(crate) fn run(mut self, confined: bool) {
        if confined {
            self.shared.confine(Job::Control);
        }
        while self.collect() {
            // What comes meanwhile has its turn in the next round: nobody waits for more than one
            // thing of each other endpoint that is done, and one of each that waits.
            for _ in 0..self.turns.round() {
                match self.turns.next() {
                    Some((endpoint, Ready::Connect)) => self.accept(endpoint),
                    Some((_, Ready::Message(number))) => self.serve(number),
                    Some((_, Ready::Exit(number))) => self.close(number, EndReason::ProcessExited),
                    None => break,
                }
            }
            let now = Instant::now();
            while let Some(number) = self.connections.overdue(now) {
                self.close(number, EndReason::Closed);
            }
            self.resume(now);
            self.undelay();
        }
    }

    /// Gives a turn to all that is ready, and waits for that if nothing has one; false if the
    /// thread is to end.
    fn collect(&mut self) -> bool {
        let mut timeout = match self.turns.round() {
            0 => self.timeout(),
            _ => Some(NO_TIME),
        };
        let mut events = [const { std::mem::MaybeUninit::uninit() }; EVENTS];
        loop {
            let ready = match epoll::wait(&*self.epoll, &mut events, timeout.as_ref()) {
                Ok((ready, _)) => ready,
                Err(Errno::INTR) => continue,
                Err(_) => return false,
            };
            for event in ready.iter() {
                let of = |number| self.connections.get(number).map(|c| c.endpoint);
                let turn = match Watched::from_data(event.data.u64()) {
                    Watched::Stop => return false,
                    Watched::Listener(endpoint) => Some((endpoint, Ready::Connect)),
                    Watched::Connection(number) => of(number).map(|e| (e, Ready::Message(number))),
                    Watched::Process(number) => of(number).map(|e| (e, Ready::Exit(number))),
                };
                if let Some((endpoint, ready)) = turn {
                    self.turns.add(endpoint, ready);
                }
            }
            if ready.len() < EVENTS {
                return true;
            }
            timeout = Some(NO_TIME);
        }
    }

    /// Reads no more from a connection for now: not even its end is looked at, but its process's.
    fn delay(&mut self, number: u32, at: u64, now: u64) {
        // A rate of nothing may be changed.
        let again = now.saturating_add(ASK_AGAIN.as_nanos() as u64);
        let never = at == u64::MAX;
        let at = if never { again } else { at };
        self.delayed.insert((at, number, !never));
    }

    fn undelay(&mut self) {
        let now = self.shared.now();
        while let Some(&(at, number, granted)) = self.delayed.first()
            && at <= now
        {
            self.delayed.pop_first();
            let Some(connection) = self.connections.get_mut(number) else {
                continue;
            };
            connection.granted = granted;
            self.turns.add(connection.endpoint, Ready::Message(number));
        }
    }

    fn timeout(&mut self) -> Option<Timespec> {
        let silent = self.connections.next_due();
        let paused = self.paused.as_ref().map(|(until, _)| *until);
        // Not a little too early, to find nothing due.
        let due = silent.into_iter().chain(paused).min();
        let due = due.map(|due| due + Duration::from_millis(1));
        let delayed = self.delayed.first().map(|&(at, ..)| {
            let left = Duration::from_nanos(at.saturating_sub(self.shared.now()));
            Instant::now()
                .checked_add(left)
                .unwrap_or_else(|| Instant::now() + ASK_AGAIN)
        });
        let due = due.into_iter().chain(delayed).min()?;
        let left = due.saturating_duration_since(Instant::now());
        Some(Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        })
    }

    /// Whether there are descriptors for more than to say that there are none.
    fn fill_reserve(&mut self) -> bool {
        while self.reserve.len() < RESERVE {
            match self.epoll.try_clone() {
                Ok(fd) => self.reserve.push(fd),
                Err(_) => return false,
            }
        }
        true
    }

    fn accept(&mut self, endpoint: Handle) {
        let mut accepted = self.listeners.accept(endpoint);
        if let Err(Errno::MFILE | Errno::NFILE) = accepted
            && !self.reserve.is_empty()
        {
            self.reserve.clear();
            accepted = self.listeners.accept(endpoint);
        }
        match accepted {
            Ok(socket) if self.connections.has_room(endpoint) => {
                // Whoever is dead already needs no answer.
                let _ = self.add(endpoint, socket);
            }
            Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(_) => {
                let until = Instant::now() + PAUSE;
                let (_, paused) = self.paused.get_or_insert_with(|| (until, Vec::new()));
                paused.push(endpoint);
                return;
            }
        }
        self.listeners.watch(endpoint);
    }

    fn resume(&mut self, now: Instant) {
        if let Some((_, endpoints)) = self.paused.take_if(|(until, _)| *until <= now) {
            for endpoint in endpoints {
                self.listeners.watch(endpoint);
            }
        }
    }

    fn add(&mut self, endpoint: Handle, socket: OwnedFd) -> Result<(), Errno> {
        set_socket_send_buffer_size(&socket, ANSWER_BYTES)?;
        let process = peer_process(&socket)?;
        let connection = Connection {
            socket: Arc::new(socket),
            endpoint,
            process,
            session: None,
            granted: false,
            answer: None,
        };
        let number = self.connections.add(connection, Instant::now());
        let Some(connection) = self.connections.get(number) else {
            return Ok(());
        };
        let watched = [
            // Its death ends the session even if a child still holds the socket.
            (connection.process.pidfd.as_fd(), Watched::Process(number)),
            (connection.socket.as_fd(), Watched::Connection(number)),
        ];
        let all = watched
            .into_iter()
            .try_for_each(|(fd, what)| epoll::add(&*self.epoll, fd, what.data(), ONCE));
        if all.is_err() {
            self.close(number, EndReason::Closed);
        }
        all
    }

    /// Serves one message of a connection, or goes on with it.
    fn serve(&mut self, number: u32) {
        let Some(connection) = self.connections.get_mut(number) else {
            return;
        };
        if let (Some(session), Some(answer)) = (connection.session, connection.answer.take()) {
            let more = self.shared.with(|engine| engine.work_off(session));
            return self.finish(number, answer, more);
        }
        if !std::mem::take(&mut connection.granted) {
            let now = self.shared.now();
            let at = self.shared.take_token(connection.endpoint, now);
            if at > now {
                return self.delay(number, at, now);
            }
        }
        let (socket, session) = (connection.socket.clone(), connection.session);
        let packet = match recv_plain(&*socket, &mut self.buffer, RecvFlags::DONTWAIT) {
            Ok(packet) => packet,
            Err(Errno::AGAIN) => return self.watch(number),
            Err(_) => return self.close(number, EndReason::Closed),
        };
        if packet.len == 0 {
            return self.close(number, EndReason::Closed);
        }
        if packet.truncated {
            return self.close(number, EndReason::UnexpectedDescriptors);
        }
        let request = match decode_request(self.buffer.get(..packet.len).unwrap_or_default()) {
            Ok(request) => request,
            Err(e) => return self.close(number, EndReason::Message(e)),
        };
        match (session, request) {
            (None, Request::Hello { version }) => self.hello(number, &socket, version),
            (Some(session), request) if !matches!(request, Request::Hello { .. }) => {
                let attaches = matches!(request, Request::AttachMemory);
                let (answer, more) = self.shared.with(|engine| {
                    let answer = engine.handle(session, request);
                    (answer, engine.work_off(session))
                });
                // Its process id may be another's by now, unless it still lives.
                if attaches && !self.lives(number) {
                    return self.close(number, EndReason::ProcessExited);
                }
                self.finish(number, answer, more);
            }
            _ => self.close(number, EndReason::OutOfOrder),
        }
    }

    /// Answers a connection's message and looks for the next one; first its endpoint has more turns,
    /// if there is more to do for this one.
    fn finish(&mut self, number: u32, answer: Answer, more: bool) {
        let Some(connection) = self.connections.get_mut(number) else {
            return;
        };
        if more {
            connection.answer = Some(answer);
            return self.turns.add(connection.endpoint, Ready::Message(number));
        }
        // The library waits for each answer before it asks again: there is room for it.
        match send_answer(&connection.socket, &answer) {
            Ok(()) => self.watch(number),
            Err(reason) => self.close(number, reason),
        }
    }

    /// Looks for a connection's next message.
    fn watch(&mut self, number: u32) {
        if let Some(connection) = self.connections.get(number) {
            let data = Watched::Connection(number).data();
            let _ = epoll::modify(&*self.epoll, &connection.socket, data, ONCE);
        }
    }

    fn lives(&self, number: u32) -> bool {
        let connection = self.connections.get(number);
        connection.is_some_and(|c| is_alive(&c.process.pidfd))
    }

    fn hello(&mut self, number: u32, socket: &OwnedFd, version: u16) {
        let begun = if version == PROTOCOL_VERSION {
            self.begin(number)
        } else {
            Err(Errno::PROTONOSUPPORT)
        };
        let end = match begun {
            Ok(answer) => match send_answer(socket, &answer) {
                Ok(()) => return self.watch(number),
                Err(reason) => reason,
            },
            Err(errno) => {
                // It ends in any case.
                let _ = send_answer(socket, &refusal(errno));
                if version == PROTOCOL_VERSION {
                    EndReason::Closed
                } else {
                    EndReason::Version { theirs: version }
                }
            }
        };
        self.close(number, end);
    }

    fn begin(&mut self, number: u32) -> Result<Answer, Errno> {
        if !self.fill_reserve() {
            return Err(Errno::MFILE);
        }
        let connection = self.connections.get(number).ok_or(Errno::INVAL)?;
        let endpoint = connection.endpoint;
        let peer = Peer {
            pid: connection.process.pid.unwrap_or(0),
            uid: connection.process.uid,
        };
        let socket = connection.socket.clone();
        let (session, welcome, fds) = self
            .shared
            .with(|engine| engine.begin_session(endpoint, peer, socket))?;
        self.connections.begin(number, session);
        Ok(Answer {
            reply: Ok(Reply::Welcome(welcome)),
            fds,
        })
    }

    fn close(&mut self, number: u32, reason: EndReason) {
        let Some(connection) = self.connections.remove(number) else {
            return;
        };
        let _ = epoll::delete(&*self.epoll, &connection.process.pidfd);
        let _ = epoll::delete(&*self.epoll, &connection.socket);
        if let Some(session) = connection.session {
            self.shared
                .with(|engine| engine.end_session(session, reason));
        }
        drop(connection);
        self.fill_reserve();
    }
}

fn refusal(errno: Errno) -> Answer {
    Answer {
        reply: Err(WireErrno(errno.raw_os_error())),
        fds: Vec::new(),
    }
}

/// Sends an answer; an error is why the session ends: there is no room for it, or the library went
/// without waiting for it, as when its process executes another program.
fn send_answer(socket: &OwnedFd, answer: &Answer) -> Result<(), EndReason> {
    let bytes = encode_reply(&answer.reply).ok_or(EndReason::DoesNotRead)?;
    let fds: Vec<BorrowedFd<'_>> = answer.fds.iter().map(|fd| fd.as_fd()).collect();
    match send_packet(socket, &bytes, &fds, SendFlags::DONTWAIT) {
        Ok(()) => Ok(()),
        Err(Errno::PIPE | Errno::CONNRESET) => Err(EndReason::Closed),
        Err(_) => Err(EndReason::DoesNotRead),
    }
}
