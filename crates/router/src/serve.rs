//! What the router's threads share, and the thread that polls the engine.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use freeflow_policy::{Resource, Setting, TokenBucket};
use freeflow_session::Handle;
use freeflow_shm::Doorbell;
use parking_lot::{Mutex as FairMutex, MutexGuard};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::Timespec;

use crate::Config;
use crate::engine::{Engine, Polled};
use crate::events::StreamId;
use crate::foreign::Opener;
use crate::notices::Notices;
use crate::objects::Session;
use crate::remote::FABRIC;
use crate::sandbox::{self, Confinement, Job};
use crate::watch::Progress;

/// Rounds of the engine between looks at doorbells of sessions that are not watched.
const ROUNDS_PER_LOOK: u32 = 16;

/// Shorter timers than this must not be late by a millisecond: `epoll_wait` knows no smaller unit,
/// but `poll` does. (`epoll_pwait2` is of Linux 5.11.)
const LONG: Duration = Duration::from_millis(10);

/// The engine thread's own doorbell among those of the sessions.
const KICK: u64 = u64::MAX;

/// What both threads share.
pub(crate) struct Shared {
    /// Handed from thread to thread in turn: neither a flood of control verbs nor of work keeps
    /// the other from it.
    engine: FairMutex<Engine>,
    /// Whether the polling thread is, or is about to be, asleep.
    asleep: AtomicBool,
    pub(crate) stop: AtomicBool,
    kick: Doorbell,
    doorbells: Arc<OwnedFd>,
    pub(crate) start: Instant,
    /// By which other hosts' routers tell this one from one before it, or after it.
    pub(crate) incarnation: u64,
    yield_after: u32,
    /// Of each thread that is confined.
    confinement: Mutex<Vec<Confinement>>,
    pub(crate) progress: Progress,
    /// The engine's, at hand even while it is busy.
    pub(crate) notices: Notices,
    graves: Sender<Vec<Session>>,
    /// Control verbs of the endpoints whose rate is limited.
    rates: Mutex<HashMap<Handle, TokenBucket>>,
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: time.subsec_nanos().into(),
    }
}

/// A thread that drops the sessions that are sent to it, until nobody can send any more.
fn undertaker() -> std::io::Result<Sender<Vec<Session>>> {
    let (graves, dead) = std::sync::mpsc::channel::<Vec<Session>>();
    std::thread::Builder::new()
        .name("ff-bury".into())
        .spawn(move || dead.into_iter().for_each(drop))?;
    Ok(graves)
}

impl Shared {
    pub(crate) fn new(config: &Config, opener: Opener) -> Result<Self, Errno> {
        let kick = Doorbell::new()?;
        let doorbells = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        let edge = EventFlags::IN | EventFlags::ET;
        epoll::add(&doorbells, &kick, EventData::new_u64(KICK), edge)?;
        let spin = config.spin.as_nanos() as u64;
        let mut engine = Engine::new(config.limits, spin, opener, doorbells.clone());
        engine.network_spin = config.network_spin.as_nanos() as u64;
        engine.max_descriptors = config.max_descriptors;
        Ok(Shared {
            notices: engine.notices.clone(),
            engine: FairMutex::new(engine),
            confinement: Mutex::default(),
            progress: Progress::default(),
            graves: undertaker().map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::AGAIN))?,
            rates: Mutex::default(),
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            kick,
            doorbells,
            start: Instant::now(),
            incarnation: getrandom::u64().map_err(|_| Errno::AGAIN)?.max(1),
            yield_after: config.yield_after,
        })
    }

    /// Nanoseconds of `CLOCK_MONOTONIC`: completions carry them, and programs compare these with
    /// what the library reads of that clock (`ibv_query_rt_values_ex(3)`). A container with a time
    /// namespace of its own reads another one.
    pub(crate) fn now(&self) -> u64 {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        (now.tv_sec as u64)
            .wrapping_mul(1_000_000_000)
            .wrapping_add(now.tv_nsec as u64)
    }

    fn rates(&self) -> std::sync::MutexGuard<'_, HashMap<Handle, TokenBucket>> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Limits the rate of an endpoint's control verbs, if a setting says so.
    pub(crate) fn set_rate(&self, endpoint: Handle, settings: &[Setting]) {
        let now = self.now();
        for setting in settings.iter().filter(|s| s.resource == Resource::Control) {
            let bucket = TokenBucket::new(setting.limit, now);
            self.rates()
                .entry(endpoint)
                .or_insert(bucket)
                .set_rate(setting.limit, now);
        }
    }

    pub(crate) fn forget_rate(&self, endpoint: Handle) {
        self.rates().remove(&endpoint);
    }

    /// When an endpoint may have its next control verb executed.
    pub(crate) fn take_token(&self, endpoint: Handle, now: u64) -> u64 {
        let mut rates = self.rates();
        rates
            .get_mut(&endpoint)
            .map_or(now, |bucket| bucket.take(now))
    }

    /// Runs `f` on the engine, at the latest after the polling thread's present round. That thread
    /// is woken only if `f` left something for it: most control verbs do not.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut Engine) -> R) -> R {
        let mut engine = self.engine.lock();
        engine.now = self.now();
        let result = f(&mut engine);
        engine.reap();
        let dead = engine.take_dead();
        let wanted = engine.wants_a_round();
        MutexGuard::unlock_fair(engine);
        self.bury(dead);
        // SeqCst: the polling thread sets the flag before it looks at the engine for the last
        // time; it saw our change, or we see its flag.
        if wanted && self.asleep.load(Ordering::SeqCst) {
            self.kick.ring();
        }
        result
    }

    /// Drops sessions in a thread that nobody waits for.
    fn bury(&self, dead: Vec<Session>) {
        if !dead.is_empty() {
            // Without that thread they are dropped here.
            let _ = self.graves.send(dead);
        }
    }

    pub(crate) fn request_stop(&self) {
        // Release: pairs with the loads in both threads.
        self.stop.store(true, Ordering::Release);
        self.kick.ring();
    }

    /// Confines the thread that calls it for the rest of its life.
    pub(crate) fn confine(&self, job: Job) {
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
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(ROUNDS_PER_LOOK) {
                self.look(Some(Duration::ZERO));
            }
            let mut engine = self.engine.lock();
            let now = self.now();
            self.progress.begin(now);
            let polled = engine.poll(now, &self.progress);
            engine.reap();
            let dead = engine.take_dead();
            self.progress.end();
            match polled {
                Polled::Busy => {
                    MutexGuard::unlock_fair(engine);
                    idle_rounds = 0;
                }
                Polled::Idle => {
                    MutexGuard::unlock_fair(engine);
                    idle_rounds = idle_rounds.saturating_add(1);
                    if idle_rounds > self.yield_after {
                        std::thread::yield_now();
                    } else {
                        std::hint::spin_loop();
                    }
                }
                Polled::Asleep { until } => {
                    engine.sleeps_until = until;
                    // SeqCst: see `with`. The engine is still locked: whoever changes it later
                    // finds the flag.
                    self.asleep.store(true, Ordering::SeqCst);
                    MutexGuard::unlock_fair(engine);
                    let now = self.now();
                    let timeout = until.map(|at| Duration::from_nanos(at.saturating_sub(now)));
                    self.look(timeout);
                    self.asleep.store(false, Ordering::SeqCst);
                    idle_rounds = 0;
                }
            }
            self.bury(dead);
        }
    }

    /// Waits for doorbells and has the engine watch the sessions that rang.
    fn look(&self, mut timeout: Option<Duration>) {
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 64];
        if let Some(short) = timeout.filter(|t| !t.is_zero() && *t < LONG) {
            // Ready or not, the doorbells are looked at.
            let mut doorbells = [PollFd::new(&*self.doorbells, PollFlags::IN)];
            let _ = poll(&mut doorbells, Some(&timespec(short)));
            timeout = Some(Duration::ZERO);
        }
        // Rounded up: a timer that is due a little later must not be polled for.
        let timeout = timeout.map(timespec);
        let Ok((events, _)) = epoll::wait(&self.doorbells, &mut events, timeout.as_ref()) else {
            return;
        };
        if events.is_empty() {
            return;
        }
        let mut engine = self.engine.lock();
        engine.now = self.now();
        for event in events.iter() {
            match event.data.u64() {
                KICK => {}
                FABRIC => engine.wake_network(),
                data => match StreamId::from_data(data) {
                    Some(stream) => engine.flush_events(stream),
                    None => engine.wake(Handle(data as u32)),
                },
            }
        }
    }
}
