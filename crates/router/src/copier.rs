//! Copies to and from the application's own memory, by a thread that may wait for it.
//!
//! Such memory comes when somebody else delivers it: a file system that the container serves
//! itself, a server that is down. The engine hands over one copy at a time and waits for a bounded
//! time; a copier that is late is left behind with its buffer, which is its own, and another takes
//! its place.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel,
};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::foreign::{ForeignMemory, Question};
use crate::sandbox;

/// Looks for an answer, or a job, before a thread sleeps; the processor is yielded between them.
const LOOKS: u32 = 100;

/// A copier that sleeps in the kernel is looked at again after so long.
const STEP: Duration = Duration::from_millis(1);

/// The engine waits no longer than this for a copier that is not asleep, but gets no processor.
const LONGEST: Duration = Duration::from_millis(400);

/// What an endpoint's memory may have the engine wait for at once.
const PATIENCE: Duration = Duration::from_millis(50);

/// Patience comes back by one part in so many of the time that passes.
const RECOVERY: u32 = 20;

/// Copiers that wait for memory that does not come. Beyond that no copy is made until one of them
/// is back.
const MAX_STUCK: usize = 16;

/// One copy.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) memory: ForeignMemory,
    pub(crate) addr: u64,
    /// What is read or written, as long as the copy.
    pub(crate) buffer: Vec<u8>,
    /// Whether the memory is written, not read.
    pub(crate) write: bool,
    /// Found in vain: there is no such memory any more. The engine itself must not look: that takes
    /// the lock of a process's memory map, which is held while one of its pages comes late.
    pub(crate) gone: bool,
}

impl Job {
    /// Makes the copy; false if any byte cannot be reached.
    pub(crate) fn run(&mut self) -> bool {
        let good = if self.write {
            self.memory.write(self.addr, &self.buffer)
        } else {
            self.memory.read(self.addr, &mut self.buffer)
        };
        self.gone = !good && self.memory.is_gone();
        good
    }
}

/// How a copier makes a copy; tests have others than [`Job::run`].
pub(crate) type Run = Arc<dyn Fn(&mut Job) -> bool + Send + Sync>;

/// Why a copy was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// A byte cannot be reached.
    Fault,
    /// None can: the process is dead, or executes another program.
    Gone,
    /// It did not come in time.
    Late,
    /// All copiers wait for memory that does not come.
    NoCopier,
}

/// How long an endpoint's memory may still have the engine wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    left: Duration,
    at: Instant,
}

impl Patience {
    pub(crate) fn new(now: Instant) -> Self {
        Patience {
            left: PATIENCE,
            at: now,
        }
    }

    /// Takes some of it; false if there is none left.
    fn spend(&mut self, now: Instant, time: Duration) -> bool {
        let passed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        self.left = self.left.saturating_add(passed / RECOVERY).min(PATIENCE);
        match self.left.checked_sub(time) {
            Some(left) => self.left = left,
            None => return false,
        }
        true
    }
}

/// A thread that makes copies until nobody asks for any.
#[derive(Debug)]
pub(crate) struct Copier {
    jobs: SyncSender<Job>,
    done: Receiver<(Job, bool)>,
    /// What the kernel says of the thread, if it says it.
    stat: Option<File>,
    /// Gone when the thread has ended.
    lives: Weak<()>,
}

impl Copier {
    /// Starts one.
    pub(crate) fn start(run: Run, confined: bool) -> std::io::Result<Self> {
        let (jobs, ask) = sync_channel::<Job>(1);
        // Room for the answer that nobody waits for any more.
        let (answer, done) = sync_channel(1);
        let (opened, stat) = sync_channel(1);
        let life = Arc::new(());
        let lives = Arc::downgrade(&life);
        std::thread::Builder::new()
            .name("ff-copy".into())
            .spawn(move || {
                let _life = life;
                let _ = opened.send(File::open("/proc/thread-self/stat").ok());
                if confined {
                    sandbox::confine(sandbox::Job::Copier);
                }
                while let Some(mut job) = next(&ask) {
                    let good = run(&mut job);
                    if answer.send((job, good)).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Copier {
            jobs,
            done,
            stat: stat.recv().ok().flatten(),
            lives,
        })
    }

    /// Whether the thread waits in the kernel, as opposed to for a processor.
    fn sleeps(&self) -> bool {
        let mut text = [0; 256];
        let read = self.stat.as_ref().map(|stat| stat.read_at(&mut text, 0));
        let Some(Ok(len)) = read else { return true };
        // The state follows the name, which ends with the last parenthesis (proc_pid_stat(5)).
        let text = text.get(..len).unwrap_or_default();
        let name_end = text.iter().rposition(|&b| b == b')');
        name_end.and_then(|end| text.get(end + 2)) != Some(&b'R')
    }

    /// Makes one copy.
    fn copy(&self, job: Job, patience: &mut Patience) -> Result<(Job, bool), Failed> {
        self.jobs.send(job).map_err(|_| Failed::NoCopier)?;
        for _ in 0..LOOKS {
            match self.done.try_recv() {
                Ok(done) => return Ok(done),
                Err(TryRecvError::Empty) => std::thread::yield_now(),
                Err(TryRecvError::Disconnected) => return Err(Failed::NoCopier),
            }
        }
        let began = Instant::now();
        loop {
            match self.done.recv_timeout(STEP) {
                Ok(done) => return Ok(done),
                Err(RecvTimeoutError::Disconnected) => return Err(Failed::NoCopier),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = Instant::now();
            let over = now.saturating_duration_since(began) > LONGEST;
            if over || self.sleeps() && !patience.spend(now, STEP) {
                return Err(Failed::Late);
            }
        }
    }
}

/// The next job; `None` if there will be none.
fn next(jobs: &Receiver<Job>) -> Option<Job> {
    for _ in 0..LOOKS {
        match jobs.try_recv() {
            Ok(job) => return Some(job),
            Err(TryRecvError::Empty) => std::thread::yield_now(),
            Err(TryRecvError::Disconnected) => return None,
        }
    }
    jobs.recv().ok()
}

/// Who makes copies for the engine.
#[derive(Debug)]
pub(crate) enum Copiers {
    /// The engine's thread.
    #[cfg(any(test, feature = "testing"))]
    Direct,
    /// A thread at a time.
    Threads(Threads),
}

/// A copier, one that waits to take its place, and those left behind.
#[derive(Debug)]
pub(crate) struct Threads {
    current: Option<Copier>,
    spares: Receiver<Copier>,
    give: Sender<Copier>,
    /// Who may start threads.
    opener: Sender<Question>,
    stuck: VecDeque<Weak<()>>,
}

impl Threads {
    /// Copiers that `opener` starts.
    pub(crate) fn new(opener: Sender<Question>) -> Self {
        let (give, spares) = channel();
        let threads = Threads {
            current: None,
            spares,
            give,
            opener,
            stuck: VecDeque::new(),
        };
        // One to work, one to take its place at once.
        threads.order();
        threads.order();
        threads
    }

    fn order(&self) {
        let _ = self.opener.send(Question::Copier(self.give.clone()));
    }

    fn copier(&mut self) -> Option<&Copier> {
        self.stuck.retain(|stuck| stuck.strong_count() != 0);
        if self.current.is_none() && self.stuck.len() < MAX_STUCK {
            // The spare may be on its way.
            self.current = self.spares.recv_timeout(PATIENCE).ok();
        }
        self.current.as_ref()
    }

    fn copy(&mut self, job: Job, patience: &mut Patience) -> Result<(Job, bool), Failed> {
        let copier = self.copier().ok_or(Failed::NoCopier)?;
        let result = copier.copy(job, patience);
        if result.is_err()
            && let Some(left) = self.current.take()
        {
            self.stuck.push_back(left.lives);
            // It ends when it is back, or at once.
            self.order();
        }
        result
    }
}

impl Copiers {
    /// Makes a copy; returns its buffer.
    pub(crate) fn copy(&mut self, job: Job, patience: &mut Patience) -> Result<Vec<u8>, Failed> {
        let (job, good) = match self {
            #[cfg(any(test, feature = "testing"))]
            Copiers::Direct => {
                let mut job = job;
                let good = job.run();
                (job, good)
            }
            Copiers::Threads(threads) => threads.copy(job, patience)?,
        };
        match (good, job.gone) {
            (true, _) => Ok(job.buffer),
            (false, true) => Err(Failed::Gone),
            (false, false) => Err(Failed::Fault),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Condvar, Mutex};

    /// Copies to this address do not come back before the gate opens.
    const SLOW: u64 = 1;

    #[derive(Default)]
    struct Gate {
        open: Mutex<bool>,
        opened: Condvar,
    }

    impl Gate {
        fn pass(&self) {
            let open = self.open.lock().unwrap();
            drop(self.opened.wait_while(open, |open| !*open).unwrap());
        }

        fn open(&self) {
            *self.open.lock().unwrap() = true;
            self.opened.notify_all();
        }
    }

    fn copiers(gate: &Arc<Gate>) -> Copiers {
        let (opener, questions) = channel();
        let gate = gate.clone();
        let run: Run = Arc::new(move |job| {
            if job.addr == SLOW {
                gate.pass();
            }
            job.buffer.fill(7);
            true
        });
        std::thread::spawn(move || {
            for question in questions {
                if let Question::Copier(answer) = question {
                    let _ = answer.send(Copier::start(run.clone(), true).unwrap());
                }
            }
        });
        Copiers::Threads(Threads::new(opener))
    }

    fn job(addr: u64) -> Job {
        let uid = rustix::process::getuid().as_raw();
        Job {
            memory: ForeignMemory::open(std::process::id(), uid).unwrap(),
            addr,
            buffer: vec![0; 8],
            write: false,
            gone: false,
        }
    }

    #[test]
    fn a_late_copier_is_left_behind_and_another_goes_on() {
        let gate = Arc::new(Gate::default());
        let mut copiers = copiers(&gate);
        let mut copy = |addr| copiers.copy(job(addr), &mut Patience::new(Instant::now()));
        assert_eq!(copy(0), Ok(vec![7; 8]));
        let until = Instant::now() + Duration::from_secs(30);
        let work = |copy: &mut dyn FnMut(u64) -> Result<Vec<u8>, Failed>| {
            while copy(0) != Ok(vec![7; 8]) {
                assert!(Instant::now() < until, "no copier comes");
            }
        };
        for _ in 0..MAX_STUCK {
            work(&mut copy);
            assert_eq!(copy(SLOW), Err(Failed::Late));
        }
        // Enough threads wait.
        assert_eq!(copy(0), Err(Failed::NoCopier));
        gate.open();
        work(&mut copy);
    }

    #[test]
    fn patience_is_bounded_and_comes_back_slowly() {
        let start = Instant::now();
        let mut patience = Patience::new(start);
        assert!(patience.spend(start, PATIENCE));
        assert!(!patience.spend(start, STEP));
        // Who makes everybody wait without end gets a small part of the time.
        let mut spent = 0;
        for ms in 1..=10_000 {
            if patience.spend(start + Duration::from_millis(ms), STEP) {
                spent += 1;
            }
        }
        assert_eq!(spent, 10_000 / RECOVERY);
        let later = start + Duration::from_secs(3600);
        assert!(patience.spend(later, PATIENCE));
        assert!(!patience.spend(later, STEP));
    }

    #[test]
    fn an_idle_copier_sleeps_and_ends_with_its_owner() {
        let copier = Copier::start(Arc::new(Job::run), false).unwrap();
        let until = Instant::now() + Duration::from_secs(30);
        while !copier.sleeps() {
            assert!(Instant::now() < until, "it never sleeps");
            std::thread::yield_now();
        }
        let lives = copier.lives.clone();
        drop(copier);
        while lives.strong_count() != 0 {
            assert!(Instant::now() < until, "it never ends");
            std::thread::yield_now();
        }
    }
}
