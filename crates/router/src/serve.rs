//! The two threads of a router: one serves sockets, one polls the engine.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freeflow_session::{
    Errno as WireErrno, Handle, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Reply, Request,
    decode_request, encode_reply,
};
use freeflow_shm::{Doorbell, recv_packet, send_packet};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use crate::control::Answer;
use crate::engine::{Engine, Polled};
use crate::foreign::Opener;
use crate::objects::Peer;
use crate::sandbox::{self, Confinement, Job};
use crate::watch::Progress;
use crate::{Config, EndReason};

/// A connection must say hello within this time.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// Connections of an endpoint that have not said hello.
const MAX_SILENT: usize = 64;

/// Rounds of the engine between looks at doorbells of sessions that are not watched.
const ROUNDS_PER_LOOK: u32 = 16;

/// The engine thread's own doorbell among those of the sessions.
const KICK: u64 = u64::MAX;

/// What both threads share.
pub(crate) struct Shared {
    engine: Mutex<Engine>,
    /// Threads that want the engine; the polling one steps aside.
    waiting: AtomicUsize,
    /// Whether the polling thread is, or is about to be, asleep.
    asleep: AtomicBool,
    pub(crate) stop: AtomicBool,
    kick: Doorbell,
    doorbells: OwnedFd,
    pub(crate) start: Instant,
    yield_after: u32,
    /// Of each thread that is confined.
    confinement: Mutex<Vec<Confinement>>,
    pub(crate) progress: Progress,
}

impl Shared {
    pub(crate) fn new(config: &Config, opener: Opener) -> Result<Self, Errno> {
        let kick = Doorbell::new()?;
        let doorbells = epoll::create(CreateFlags::CLOEXEC)?;
        let edge = EventFlags::IN | EventFlags::ET;
        epoll::add(&doorbells, &kick, EventData::new_u64(KICK), edge)?;
        Ok(Shared {
            engine: Mutex::new(Engine::new(
                config.limits,
                config.spin.as_nanos() as u64,
                opener,
            )),
            confinement: Mutex::default(),
            progress: Progress::default(),
            waiting: AtomicUsize::new(0),
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            kick,
            doorbells,
            start: Instant::now(),
            yield_after: config.yield_after,
        })
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn lock(&self) -> MutexGuard<'_, Engine> {
        // A panic aborts the process, so that a poisoned lock is never seen.
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` on the engine, ahead of the polling thread's next round.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut Engine) -> R) -> R {
        // Relaxed: a hint to the polling thread; the lock orders everything else.
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let mut engine = self.lock();
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        engine.now = self.now();
        let result = f(&mut engine);
        engine.reap();
        drop(engine);
        // SeqCst: the polling thread sets the flag before it looks at the engine for the last
        // time; it saw our change, or we see its flag.
        if self.asleep.load(Ordering::SeqCst) {
            self.kick.ring();
        }
        result
    }

    pub(crate) fn request_stop(&self) {
        // Release: pairs with the loads in both threads.
        self.stop.store(true, Ordering::Release);
        self.kick.ring();
    }

    /// Confines the thread that calls it for the rest of its life.
    fn confine(&self, job: Job) {
        let confinement = sandbox::confine(job);
        self.confinement
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(confinement);
    }

    /// How the router's threads are confined, in words.
    pub(crate) fn confinement(&self) -> String {
        let all = self
            .confinement
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let each = |has: fn(&Confinement) -> bool| !all.is_empty() && all.iter().all(has);
        match (each(|c| c.seccomp), each(|c| c.landlock)) {
            (true, true) => "seccomp and landlock",
            (true, false) => "seccomp; this kernel has no landlock",
            (false, true) => "landlock; this kernel has no seccomp",
            (false, false) => "none",
        }
        .to_owned()
    }

    /// The polling thread.
    pub(crate) fn run_engine(&self, confined: bool) {
        if confined {
            self.confine(Job::Engine);
        }
        let mut idle_rounds = 0u32;
        let mut rounds = 0u32;
        // Acquire: pairs with `request_stop`.
        while !self.stop.load(Ordering::Acquire) {
            while self.waiting.load(Ordering::Relaxed) != 0 {
                std::thread::yield_now();
            }
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(ROUNDS_PER_LOOK) {
                self.look(Some(Duration::ZERO));
            }
            let mut engine = self.lock();
            let now = self.now();
            self.progress.begin(now);
            let polled = engine.poll(now, &self.progress);
            engine.reap();
            self.progress.end();
            match polled {
                Polled::Busy => idle_rounds = 0,
                Polled::Idle => {
                    drop(engine);
                    idle_rounds = idle_rounds.saturating_add(1);
                    if idle_rounds > self.yield_after {
                        std::thread::yield_now();
                    } else {
                        std::hint::spin_loop();
                    }
                }
                Polled::Asleep { until } => {
                    // SeqCst: see `with`. The engine is still locked: whoever changes it later
                    // finds the flag.
                    self.asleep.store(true, Ordering::SeqCst);
                    drop(engine);
                    let now = self.now();
                    let timeout = until.map(|at| Duration::from_nanos(at.saturating_sub(now)));
                    self.look(timeout);
                    self.asleep.store(false, Ordering::SeqCst);
                    idle_rounds = 0;
                }
            }
        }
    }

    /// Waits for doorbells and has the engine watch the sessions that rang.
    fn look(&self, timeout: Option<Duration>) {
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 64];
        // Rounded up: a timer that is due a little later must not be polled for.
        let timeout = timeout.map(|t| rustix::time::Timespec {
            tv_sec: t.as_secs() as i64,
            tv_nsec: t.subsec_nanos().into(),
        });
        let Ok((events, _)) = epoll::wait(&self.doorbells, &mut events, timeout.as_ref()) else {
            return;
        };
        if events.is_empty() {
            return;
        }
        let mut engine = self.lock();
        engine.now = self.now();
        for event in events.iter() {
            if event.data.u64() != KICK {
                engine.wake(Handle(event.data.u64() as u32));
            }
        }
    }
}

/// A connection as the control thread sees it.
struct Connection {
    socket: Arc<OwnedFd>,
    endpoint: Handle,
    session: Option<Handle>,
    peer: Peer,
    process: Option<OwnedFd>,
    since: Instant,
}

enum Watched {
    Stop,
    Listener(Handle),
    Connection(RawFd),
    Process(RawFd),
}

/// The thread that serves sockets.
pub(crate) struct Server {
    shared: Arc<Shared>,
    epoll: OwnedFd,
    stop: OwnedFd,
    /// Given up to refuse a connection when there are no descriptors left.
    reserve: Option<OwnedFd>,
    listeners: Arc<Mutex<HashMap<u32, OwnedFd>>>,
    connections: HashMap<RawFd, Connection>,
    buffer: Vec<u8>,
}

const KIND_SHIFT: u32 = 32;

impl Watched {
    fn data(&self) -> EventData {
        let (kind, value) = match *self {
            Watched::Stop => (0, 0),
            Watched::Listener(endpoint) => (1, endpoint.0),
            Watched::Connection(fd) => (2, fd as u32),
            Watched::Process(fd) => (3, fd as u32),
        };
        EventData::new_u64(kind << KIND_SHIFT | u64::from(value))
    }

    fn from_data(data: u64) -> Self {
        let value = data as u32;
        match data >> KIND_SHIFT {
            1 => Watched::Listener(Handle(value)),
            2 => Watched::Connection(value as RawFd),
            3 => Watched::Process(value as RawFd),
            _ => Watched::Stop,
        }
    }
}

/// Where endpoints' sockets are added to a running server.
#[derive(Clone)]
pub(crate) struct Listeners {
    epoll: Arc<OwnedFd>,
    listeners: Arc<Mutex<HashMap<u32, OwnedFd>>>,
}

impl Listeners {
    pub(crate) fn add(&self, endpoint: Handle, socket: OwnedFd) -> Result<(), Errno> {
        let data = Watched::Listener(endpoint).data();
        epoll::add(&*self.epoll, &socket, data, EventFlags::IN)?;
        let mut listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.insert(endpoint.0, socket);
        Ok(())
    }

    pub(crate) fn remove(&self, endpoint: Handle) {
        let mut listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.remove(&endpoint.0);
    }
}

impl Server {
    /// A server that ends when `stop` becomes readable.
    pub(crate) fn new(shared: Arc<Shared>, stop: OwnedFd) -> Result<(Self, Listeners), Errno> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &stop, Watched::Stop.data(), EventFlags::IN)?;
        let listeners = Arc::new(Mutex::new(HashMap::new()));
        let copy = epoll.try_clone().map_err(|_| Errno::MFILE)?;
        let handle = Listeners {
            epoll: Arc::new(copy),
            listeners: listeners.clone(),
        };
        let buffer = vec![0; MAX_MESSAGE_BYTES + 1];
        let connections = HashMap::new();
        Ok((
            Server {
                shared,
                reserve: epoll.try_clone().ok(),
                epoll,
                stop,
                listeners,
                connections,
                buffer,
            },
            handle,
        ))
    }

    pub(crate) fn run(mut self, confined: bool) {
        if confined {
            self.shared.confine(Job::Control);
        }
        let _keep = &self.stop.as_raw_fd();
        loop {
            let mut events = [const { std::mem::MaybeUninit::uninit() }; 64];
            let silent = self.connections.values().any(|c| c.session.is_none());
            let timeout = silent.then_some(rustix::time::Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            });
            let ready: Vec<_> = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
                Ok((ready, _)) => ready.iter().map(|e| (e.data.u64(), e.flags)).collect(),
                Err(Errno::INTR) => continue,
                Err(_) => return,
            };
            for (data, _) in ready {
                match Watched::from_data(data) {
                    Watched::Stop => return,
                    Watched::Listener(endpoint) => self.accept(endpoint),
                    Watched::Connection(fd) => self.serve(fd),
                    Watched::Process(fd) => self.close(fd, EndReason::ProcessExited),
                }
            }
            if silent {
                self.drop_silent();
            }
        }
    }

    fn accept(&mut self, endpoint: Handle) {
        let listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(listener) = listeners.get(&endpoint.0) else {
            return;
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = match rustix::net::accept_with(listener, flags) {
            Ok(socket) => socket,
            Err(Errno::MFILE | Errno::NFILE) => {
                // Left to wait, it would be found ready again and again.
                self.reserve = None;
                drop(rustix::net::accept_with(listener, flags));
                self.reserve = self.epoll.try_clone().ok();
                return;
            }
            Err(_) => return,
        };
        drop(listeners);
        let silent = self
            .connections
            .values()
            .filter(|c| c.endpoint == endpoint && c.session.is_none());
        if silent.count() >= MAX_SILENT {
            return;
        }
        let Ok(credentials) = rustix::net::sockopt::socket_peercred(&socket) else {
            return;
        };
        let peer = Peer {
            pid: credentials.pid.as_raw_nonzero().get() as u32,
            uid: credentials.uid.as_raw(),
        };
        let fd = socket.as_raw_fd();
        // Its death ends the session even if a child still holds the socket.
        let none = rustix::process::PidfdFlags::empty();
        let process = rustix::process::pidfd_open(credentials.pid, none).ok();
        if let Some(process) = &process {
            let _ = epoll::add(
                &self.epoll,
                process,
                Watched::Process(fd).data(),
                EventFlags::IN,
            );
        }
        if epoll::add(
            &self.epoll,
            &socket,
            Watched::Connection(fd).data(),
            EventFlags::IN,
        )
        .is_err()
        {
            return;
        }
        let socket = Arc::new(socket);
        let since = Instant::now();
        let connection = Connection {
            socket,
            endpoint,
            session: None,
            peer,
            process,
            since,
        };
        self.connections.insert(fd, connection);
    }

    fn serve(&mut self, fd: RawFd) {
        let Some(connection) = self.connections.get(&fd) else {
            return;
        };
        let socket = connection.socket.clone();
        let packet = match recv_packet(&*socket, &mut self.buffer, RecvFlags::DONTWAIT) {
            Ok(packet) => packet,
            Err(Errno::AGAIN) => return,
            Err(_) => return self.close(fd, EndReason::Closed),
        };
        if packet.len == 0 {
            return self.close(fd, EndReason::Closed);
        }
        if packet.truncated || !packet.fds.is_empty() {
            return self.close(fd, EndReason::UnexpectedDescriptors);
        }
        let request = match decode_request(&self.buffer[..packet.len]) {
            Ok(request) => request,
            Err(e) => return self.close(fd, EndReason::Message(e)),
        };
        let answer = match (connection.session, request) {
            (None, Request::Hello { version }) if version == PROTOCOL_VERSION => {
                match self.begin(fd) {
                    Ok(answer) => answer,
                    Err(errno) => {
                        let reply = Err(WireErrno(errno.raw_os_error()));
                        Answer {
                            reply,
                            fds: Vec::new(),
                        }
                    }
                }
            }
            (None, Request::Hello { version }) => {
                let reply = Err(WireErrno(Errno::PROTONOSUPPORT.raw_os_error()));
                self.answer(
                    &socket,
                    Answer {
                        reply,
                        fds: Vec::new(),
                    },
                );
                return self.close(fd, EndReason::Version { theirs: version });
            }
            (Some(session), request) if !matches!(request, Request::Hello { .. }) => {
                self.shared.with(|engine| engine.handle(session, request))
            }
            _ => return self.close(fd, EndReason::OutOfOrder),
        };
        // The library waits for each answer before it asks again, so that there is room for it.
        if !self.answer(&socket, answer) {
            self.close(fd, EndReason::DoesNotRead);
        }
    }

    fn answer(&self, socket: &OwnedFd, answer: Answer) -> bool {
        let Some(bytes) = encode_reply(&answer.reply) else {
            return false;
        };
        let fds: Vec<BorrowedFd<'_>> = answer.fds.iter().map(|fd| fd.as_fd()).collect();
        send_packet(socket, &bytes, &fds, SendFlags::DONTWAIT).is_ok()
    }

    fn begin(&mut self, fd: RawFd) -> Result<Answer, Errno> {
        let connection = self.connections.get_mut(&fd).ok_or(Errno::INVAL)?;
        let (endpoint, peer) = (connection.endpoint, connection.peer);
        let socket = connection.socket.clone();
        let shared = &self.shared;
        let (session, welcome, fds) = shared.with(|engine| {
            let session = engine.begin_session(endpoint, peer, socket)?;
            let welcome = engine.welcome(session).ok_or(Errno::NODEV)?;
            let fds = engine.welcome_fds(session)?;
            let data = EventData::new_u64(session.0.into());
            let edge = EventFlags::IN | EventFlags::ET;
            let doorbell = &engine.sessions.get(session).ok_or(Errno::NODEV)?.doorbell;
            epoll::add(&shared.doorbells, doorbell, data, edge)?;
            Ok::<_, Errno>((session, welcome, fds))
        })?;
        connection.session = Some(session);
        Ok(Answer {
            reply: Ok(Reply::Welcome(welcome)),
            fds,
        })
    }

    fn close(&mut self, fd: RawFd, reason: EndReason) {
        let Some(connection) = self.connections.remove(&fd) else {
            return;
        };
        if let Some(process) = &connection.process {
            let _ = epoll::delete(&self.epoll, process);
        }
        let _ = epoll::delete(&self.epoll, &connection.socket);
        if let Some(session) = connection.session {
            let doorbells = &self.shared.doorbells;
            self.shared.with(|engine| {
                if let Some(s) = engine.sessions.get(session) {
                    // The library may still hold the doorbell: then it would stay in the set.
                    let _ = epoll::delete(doorbells, &s.doorbell);
                }
                engine.end_session(session, reason);
            });
        }
    }

    fn drop_silent(&mut self) {
        let late = |c: &Connection| c.session.is_none() && c.since.elapsed() > HELLO_TIME;
        let late: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, c)| late(c))
            .map(|(&fd, _)| fd)
            .collect();
        for fd in late {
            self.close(fd, EndReason::Closed);
        }
    }
}
