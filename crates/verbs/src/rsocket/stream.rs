//! A stream socket: its connection.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freeflow_client::{
    AsyncEventType, CmChannel, CmEvent, CmEventType, CmId, CmIdInfo, CmReport, Errno, PortSpace,
    QpType,
};
use freeflow_rsocket::{ConnData, Phase as End};
use libc::pollfd;

use super::device::shared;
use super::link::{Link, set_nonblocking};
use super::options::Options;
use super::poll::READ;
use super::wait::{self, Source, Waits, Wake, input, now, wait_for};

/// How often a program that does not wait is told of the connection's events.
const LOOK_NS: u64 = 1_000_000;

/// How long an address, and a route, may take to be found.
const RESOLVE_MS: u32 = 5000;

/// How far a socket is.
#[derive(Clone, Copy)]
pub(super) enum Phase {
    /// New, or bound.
    Idle,
    Listening,
    /// The address, the route, the peer is looked for.
    Resolving,
    Routing,
    Connecting,
    /// The peer has not said that it is there.
    Accepting(ConnData),
    /// Connected; the stream says how far that is.
    Open,
    /// It could not be connected.
    Failed,
    /// Another thread has closed it.
    Gone,
}

pub(super) struct StreamSocket {
    /// The event channel's, which is the program's name for the socket.
    pub(super) fd: RawFd,
    pub(super) family: i32,
    pub(super) nonblocking: AtomicBool,
    pub(super) fd_flags: AtomicI32,
    inner: Mutex<Inner>,
}

pub(super) struct Inner {
    pub(super) id: Arc<CmId>,
    channel: Arc<CmChannel>,
    pub(super) phase: Phase,
    pub(super) options: Options,
    pub(super) info: Option<CmIdInfo>,
    /// The program has said that it sends no more.
    pub(super) sent_last: bool,
    /// `SO_ERROR`.
    pub(super) error: Option<Errno>,
    pub(super) link: Option<Link>,
    /// The router is gone: the descriptors are ready for ever, and nothing more happens.
    orphaned: bool,
    /// When a program that does not wait was last told of the connection's events.
    looked: u64,
    /// Threads that wait for it.
    watchers: Vec<Arc<Wake>>,
    /// Grows with whatever happens.
    pub(super) activity: u64,
}

impl Waits for StreamSocket {
    type Inner = Inner;

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic aborts the process.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StreamSocket {
    /// A new socket.
    pub(super) fn new(family: i32) -> Result<Self, Errno> {
        let channel = CmChannel::create()?;
        let id = channel.create_id(PortSpace::Tcp, QpType::Rc, 0);
        let id = id.inspect_err(|_| {
            // As in `Inner::destroy`.
            let _ = channel.destroy();
        })?;
        let phase = Phase::Idle;
        let inner = Inner::new(id, channel, phase, Options::default(), None)?;
        Ok(Self::with(family, inner))
    }

    fn with(family: i32, inner: Inner) -> Self {
        StreamSocket {
            fd: inner.channel.fd(),
            family,
            nonblocking: AtomicBool::new(false),
            fd_flags: AtomicI32::new(0),
            inner: Mutex::new(inner),
        }
    }

    pub(super) fn is_nonblocking(&self) -> bool {
        // Relaxed: the program orders what it does with the socket.
        self.nonblocking.load(Ordering::Relaxed)
    }

    /// `bind(2)`.
    pub(super) fn bind(&self, addr: SocketAddr) -> Result<(), Errno> {
        let mut inner = self.lock();
        if !matches!(inner.phase, Phase::Idle) {
            return Err(Errno::INVAL);
        }
        let info = inner.id.bind(addr)?;
        inner.info = Some(info);
        Ok(())
    }

    /// `listen(2)`.
    pub(super) fn listen(&self, backlog: i32) -> Result<(), Errno> {
        let mut inner = self.lock();
        match inner.phase {
            Phase::Listening => return Ok(()),
            Phase::Idle => {}
            _ => return Err(Errno::INVAL),
        }
        if inner.info.is_none() {
            inner.info = Some(inner.id.bind(self.unspecified())?);
        }
        let info = inner.id.listen(backlog.try_into().unwrap_or(0))?;
        inner.info = Some(info);
        inner.phase = Phase::Listening;
        Ok(())
    }

    /// The wildcard of its family.
    pub(super) fn unspecified(&self) -> SocketAddr {
        let ip = match self.family {
            libc::AF_INET6 => IpAddr::from(Ipv6Addr::UNSPECIFIED),
            _ => Ipv4Addr::UNSPECIFIED.into(),
        };
        (ip, 0).into()
    }

    /// `accept(2)`.
    pub(super) fn accept(&self) -> Result<StreamSocket, Errno> {
        let listening = |inner: &Inner| match inner.phase {
            Phase::Listening => Ok(()),
            Phase::Gone => Err(Errno::BADF),
            _ => Err(Errno::INVAL),
        };
        let child = if self.is_nonblocking() {
            let mut inner = self.lock();
            listening(&inner)?;
            inner.next_request()?.ok_or(Errno::AGAIN)?
        } else {
            wait_for(self, None, |inner| {
                let next = listening(inner).and_then(|()| inner.next_request());
                next.transpose()
            })??
        };
        Ok(Self::with(self.family, child))
    }

    /// `connect(2)`.
    pub(super) fn connect(&self, to: SocketAddr) -> Result<(), Errno> {
        {
            let mut inner = self.lock();
            match inner.phase {
                Phase::Idle => inner.resolve(to)?,
                Phase::Resolving | Phase::Routing | Phase::Connecting => {
                    inner.advance(true);
                    if inner.is_opening() && self.is_nonblocking() {
                        return Err(Errno::ALREADY);
                    }
                }
                Phase::Open | Phase::Accepting(_) => return Err(Errno::ISCONN),
                Phase::Failed => {}
                Phase::Listening => return Err(Errno::OPNOTSUPP),
                Phase::Gone => return Err(Errno::BADF),
            }
        }
        self.opened(self.is_nonblocking())
            .map_err(|errno| match errno {
                Errno::AGAIN => Errno::INPROGRESS,
                other => other,
            })
    }

    /// Waits until it is connected. EAGAIN: it is not yet.
    pub(super) fn opened(&self, nonblocking: bool) -> Result<(), Errno> {
        let outcome = |inner: &mut Inner| match inner.phase {
            Phase::Open => Some(Ok(())),
            Phase::Idle | Phase::Listening => Some(Err(Errno::NOTCONN)),
            Phase::Failed => Some(Err(inner.error.take().unwrap_or(Errno::NOTCONN))),
            Phase::Gone => Some(Err(Errno::BADF)),
            _ => None,
        };
        if nonblocking {
            let mut inner = self.lock();
            inner.advance(true);
            return outcome(&mut inner).unwrap_or(Err(Errno::AGAIN));
        }
        wait_for(self, None, outcome)?
    }

    /// `close(2)`: behind what was sent, the peer is told; it waits until all of that has arrived,
    /// as long as lingering may take.
    pub(super) fn close(&self) {
        let (linger, open) = {
            let mut inner = self.lock();
            inner.advance(true);
            let linger = inner.options.linger();
            let open = matches!(inner.phase, Phase::Open);
            if open && !linger.is_zero() {
                inner.disconnect();
            }
            (linger, open)
        };
        if open && !linger.is_zero() {
            let deadline = Instant::now() + linger;
            loop {
                let flushed = |inner: &mut Inner| match &inner.link {
                    Some(link) if !link.stream.is_flushed() => None,
                    _ => Some(()),
                };
                // It ends at the deadline, but for no signal.
                if wait_for(self, Some(deadline), flushed) != Err(Errno::INTR) {
                    break;
                }
            }
        }
        self.lock().end();
    }
}

/// How long a program that ends without `close` waits for what it has sent to arrive, by all its
/// sockets together.
pub(super) const LEAVE: Duration = Duration::from_secs(1);

impl StreamSocket {
    /// The program ends, and the peer is told. It may have been interrupted anywhere, and this
    /// thread's variables are gone.
    pub(super) fn part(&self) {
        if let Ok(mut inner) = self.inner.try_lock() {
            inner.advance(true);
            inner.disconnect();
        }
    }

    /// Behind [`Self::part`]: what was sent is to arrive, as TCP's would, if it does until then.
    pub(super) fn leave(&self, deadline: Instant) {
        let Ok(mut inner) = self.inner.try_lock() else {
            return;
        };
        inner.advance(true);
        while let Some(link) = inner.open()
            && !link.stream.is_flushed()
            && let Ok(left) = wait::until(Some(deadline))
        {
            let fds = &mut [input(link.fd())];
            if !matches!(link.arm(), Ok(true)) && wait::poll(fds, left).is_ok() {
                inner.take_events();
            }
            inner.advance(true);
        }
    }
}

impl Source for Inner {
    fn advance(&mut self, look: bool) {
        let (mut some, mut flushed) = (false, false);
        let waits = matches!(self.phase, Phase::Listening | Phase::Gone);
        if !waits && (look || self.is_opening()) {
            some |= self.look();
        }
        if let Phase::Accepting(peer) = self.phase
            && self.take_events()
        {
            // Its first message came before its word that it is there.
            let _ = self.id.notify(AsyncEventType::CommEst);
            self.established(&peer);
            some = true;
        }
        if let Some(link) = self.open() {
            link.take_time();
            let before = link.stream.phase();
            let polled = link.poll();
            if polled.is_err() {
                link.stream.fail();
            }
            if before != End::Broken && link.stream.phase() == End::Broken {
                self.error = Some(polled.err().unwrap_or(Errno::CONNRESET));
            }
            match before {
                // Requests are flushed, of which the program is told nothing: it is no edge.
                End::Closed | End::Broken => flushed = polled == Ok(true),
                End::Opening | End::Connected => some |= polled != Ok(false),
            }
        }
        if some {
            self.changed();
        } else if flushed {
            self.watchers.iter().for_each(|wake| wake.wake());
        }
    }

    fn look_is_due(&mut self) -> bool {
        let now = now();
        let due = now.saturating_sub(self.looked) >= LOOK_NS;
        if due {
            self.looked = now;
        }
        due
    }

    fn arm(&mut self) -> bool {
        match self.open().map(Link::arm) {
            Some(Ok(newly)) => newly,
            // Polling tells.
            Some(Err(_)) => true,
            None => false,
        }
    }

    fn watch(&mut self, events: i16, wake: &Arc<Wake>, fds: &mut Vec<pollfd>) {
        self.watchers.push(wake.clone());
        let broken = |link: &Link| link.stream.phase() == End::Broken;
        let ended = matches!(self.phase, Phase::Failed) || self.link.as_ref().is_some_and(broken);
        // A request stays there until it is accepted.
        let unasked = matches!(self.phase, Phase::Listening) && events & READ == 0;
        if ended || unasked || self.orphaned {
            return;
        }
        fds.push(input(self.channel.fd()));
        if let Some(link) = &self.link {
            fds.push(input(link.fd()));
        }
    }

    fn unwatch(&mut self, wake: &Arc<Wake>, ready: bool) {
        wait::forget(&mut self.watchers, wake);
        if ready && matches!(self.phase, Phase::Open) && self.take_events() {
            // No completion raises an event now: who still sleeps has to arm it again.
            self.watchers.iter().for_each(|wake| wake.wake());
        }
    }

    fn earliest(&mut self, left: Option<Duration>) -> Option<Duration> {
        let due = self.open().and_then(|link| link.stream.deadline());
        let due = due.map(|due| Duration::from_nanos(due.saturating_sub(now())));
        match (left, due) {
            (Some(left), Some(due)) => Some(left.min(due)),
            (left, due) => left.or(due),
        }
    }
}

impl Inner {
    fn new(
        id: Arc<CmId>,
        channel: Arc<CmChannel>,
        phase: Phase,
        options: Options,
        info: Option<CmIdInfo>,
    ) -> Result<Self, Errno> {
        let inner = Inner {
            id,
            channel,
            phase,
            options,
            info,
            sent_last: false,
            error: None,
            link: None,
            orphaned: false,
            looked: 0,
            watchers: Vec::new(),
            activity: 0,
        };
        match set_nonblocking(inner.channel.fd()) {
            Ok(()) => Ok(inner),
            Err(errno) => {
                inner.destroy();
                Err(errno)
            }
        }
    }

    pub(super) fn is_opening(&self) -> bool {
        matches!(
            self.phase,
            Phase::Resolving | Phase::Routing | Phase::Connecting | Phase::Accepting(_)
        )
    }

    /// The stream, if there is one now.
    pub(super) fn open(&mut self) -> Option<&mut Link> {
        match self.phase {
            Phase::Open => self.link.as_mut(),
            _ => None,
        }
    }

    /// Begins to connect.
    fn resolve(&mut self, to: SocketAddr) -> Result<(), Errno> {
        let src = self.info.map(|info| info.src).filter(|src| src.port() != 0);
        self.id.resolve_addr(src, to, RESOLVE_MS)?;
        self.phase = Phase::Resolving;
        Ok(())
    }

    /// Whoever waits for it looks again.
    pub(super) fn changed(&mut self) {
        self.activity += 1;
        self.watchers.iter().for_each(|wake| wake.wake());
    }

    /// Takes the events of completions; whether there were any.
    fn take_events(&mut self) -> bool {
        match self.link.as_mut().map(Link::take_events) {
            Some(Ok(some)) => some,
            Some(Err(errno)) => {
                self.orphan(errno);
                false
            }
            None => false,
        }
    }

    /// The router is gone.
    fn orphan(&mut self, errno: Errno) {
        if std::mem::replace(&mut self.orphaned, true) {
            return;
        }
        if self.is_opening() {
            self.fail(errno);
        } else if !self.is_over() {
            self.lost();
        } else if let Some(link) = &mut self.link {
            // Nor does what was sent complete.
            link.stream.lost();
        }
        self.changed();
    }

    /// Takes the connection's events; whether there were any.
    fn look(&mut self) -> bool {
        let mut some = false;
        while !self.orphaned {
            match self.channel.get_event(|_, _| 0) {
                Ok(report) => {
                    report.acknowledge();
                    self.happened(&report.event);
                }
                Err(Errno::AGAIN) => return some,
                Err(Errno::INTR) => {}
                Err(errno) => self.orphan(errno),
            }
            some = true;
        }
        some
    }

    fn is_over(&self) -> bool {
        let phase = self.link.as_ref().map(|link| link.stream.phase());
        matches!(phase, Some(End::Closed | End::Broken) | None)
    }

    fn fail(&mut self, errno: Errno) {
        self.error = Some(errno);
        self.phase = Phase::Failed;
        if let Some(link) = self.link.take() {
            link.destroy();
        }
    }

    fn happened(&mut self, event: &CmEvent) {
        if event.info.port.is_some() {
            self.info = Some(event.info);
        }
        let failed = match event.event {
            CmEventType::Rejected => Errno::CONNREFUSED,
            _ => match event.status {
                status @ ..=-1 => Errno::from_raw_os_error(-status),
                _ => Errno::CONNABORTED,
            },
        };
        let next = match (self.phase, event.event) {
            (Phase::Resolving, CmEventType::AddrResolved) => {
                self.phase = Phase::Routing;
                self.id.resolve_route(RESOLVE_MS)
            }
            (Phase::Routing, CmEventType::RouteResolved) => self.request(),
            (Phase::Connecting, CmEventType::ConnectResponse) => self.answered(&event.private_data),
            (Phase::Accepting(peer), CmEventType::Established) => {
                self.established(&peer);
                Ok(())
            }
            (Phase::Open, CmEventType::Disconnected | CmEventType::DeviceRemoval) => {
                self.lost();
                Ok(())
            }
            (
                _,
                CmEventType::AddrError
                | CmEventType::RouteError
                | CmEventType::ConnectError
                | CmEventType::Unreachable
                | CmEventType::Rejected
                | CmEventType::Disconnected
                | CmEventType::DeviceRemoval,
            ) if self.is_opening() => Err(failed),
            _ => Ok(()),
        };
        if let Err(errno) = next {
            self.fail(errno);
        }
    }

    /// The way is known: asks the peer.
    fn request(&mut self) -> Result<(), Errno> {
        let link = Link::new(&shared()?, &self.id, self.options.config)?;
        let param = link.param();
        self.link = Some(link);
        self.phase = Phase::Connecting;
        self.id.connect(param)
    }

    fn answered(&mut self, private_data: &[u8]) -> Result<(), Errno> {
        let link = self.link.as_ref().ok_or(Errno::INVAL)?;
        let Ok(peer) = ConnData::from_bytes(private_data) else {
            let _ = self.id.reject(Vec::new(), false);
            return Err(Errno::OPNOTSUPP);
        };
        link.begin(&self.id)?;
        self.id.accept(None)?;
        self.established(&peer);
        Ok(())
    }

    fn established(&mut self, peer: &ConnData) {
        self.phase = Phase::Open;
        let keep_alive = self.options.keep_alive();
        if let Some(link) = &mut self.link {
            link.stream.connected(peer);
            link.stream.keep_alive(keep_alive, now());
        }
    }

    /// The peer has ended the connection, or is dead.
    fn lost(&mut self) {
        if let Some(link) = &mut self.link {
            // What had arrived stays to be read.
            if link.poll().is_err() {
                link.stream.fail();
            }
            link.stream.lost();
            link.flush();
        }
        // Or it has been told.
        let _ = self.id.disconnect();
    }

    /// Tells the peer that nothing more is sent or read here.
    pub(super) fn disconnect(&mut self) {
        if let Some(link) = self.open() {
            link.stream.disconnect();
            // If it fails, the connection is gone.
            let _ = link.settle();
        }
    }

    /// Ends it, and wakes whoever waits for it.
    fn end(&mut self) {
        if matches!(self.phase, Phase::Gone) {
            return;
        }
        if matches!(self.phase, Phase::Open | Phase::Accepting(_)) {
            // Or the peer has ended it.
            let _ = self.id.disconnect();
        }
        self.phase = Phase::Gone;
        if let Some(link) = self.link.take() {
            link.destroy();
        }
        self.destroy();
        self.changed();
    }

    /// Destroys the id and its channel.
    fn destroy(&self) {
        // A router that is gone has neither any more.
        let _ = self.id.destroy();
        let _ = self.channel.destroy();
    }

    /// The next connection that a peer has asked for.
    fn next_request(&mut self) -> Result<Option<Inner>, Errno> {
        loop {
            let report = match self.channel.get_event(|_, _| 0) {
                Ok(report) => report,
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno),
            };
            report.acknowledge();
            // The next request is another edge.
            self.changed();
            match report.event.event {
                CmEventType::ConnectRequest => {}
                CmEventType::DeviceRemoval => return Err(Errno::NODEV),
                _ => continue,
            }
            let CmReport { event, new_id, .. } = report;
            let Some(id) = new_id else { continue };
            match self.welcome(&id, &event) {
                Ok(child) => return Ok(Some(child)),
                // Who asked is told, and the next one may have more luck.
                Err(_) => {
                    let _ = id.reject(Vec::new(), false);
                    let _ = id.destroy();
                }
            }
        }
    }

    fn welcome(&self, id: &Arc<CmId>, event: &CmEvent) -> Result<Inner, Errno> {
        let peer = ConnData::from_bytes(&event.private_data).map_err(|_| Errno::PROTO)?;
        let channel = id.own_channel()?;
        if let Err(errno) = id.migrate(&channel) {
            let _ = channel.destroy();
            return Err(errno);
        }
        let options = self.options.clone();
        let config = options.config;
        let phase = Phase::Accepting(peer);
        let mut child = Inner::new(id.clone(), channel, phase, options, Some(event.info))?;
        let link = shared().and_then(|shared| Link::new(&shared, id, config));
        let accepted = link.and_then(|mut link| {
            let ready = link
                .begin(id)
                .and_then(|()| link.arm())
                .and_then(|_| id.accept(Some(link.param())));
            match ready {
                Ok(()) => Ok(link),
                Err(errno) => {
                    link.destroy();
                    Err(errno)
                }
            }
        });
        match accepted {
            Ok(link) => {
                child.link = Some(link);
                Ok(child)
            }
            Err(errno) => {
                let _ = id.reject(Vec::new(), false);
                child.destroy();
                Err(errno)
            }
        }
    }

    /// Whether a peer may be waiting to be accepted.
    pub(super) fn has_request(&self) -> bool {
        let mut fds = [input(self.channel.fd())];
        matches!(wait::poll(&mut fds, Some(Duration::ZERO)), Ok(1..))
    }
}
