//! Programs that are watched: their output is kept, they are killed at a deadline, and never
//! outlive their test.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A program that ended.
#[derive(Debug)]
pub struct Ended {
    /// The command line.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ended {
    /// Fails with all it said unless its exit code is 0.
    pub fn success(self) -> Result<Self> {
        if self.status.success() {
            Ok(self)
        } else {
            bail!("{self}")
        }
    }

    /// The exit code; 128 and the signal if one killed it.
    pub fn code(&self) -> i32 {
        let signal = || self.status.signal().map(|s| 128 + s);
        self.status.code().or_else(signal).unwrap_or(-1)
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: {}\n--- stdout\n{}--- stderr\n{}---",
            self.command, self.status, self.stdout, self.stderr
        )
    }
}

#[derive(Default)]
struct Stream {
    text: Mutex<(String, bool)>,
    grew: Condvar,
}

impl Stream {
    fn read(from: impl Read + Send + 'static) -> (Arc<Stream>, JoinHandle<()>) {
        let stream = Arc::new(Stream::default());
        let sink = stream.clone();
        let reader = std::thread::spawn(move || sink.fill(from));
        (stream, reader)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (String, bool)> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self, mut from: impl Read) {
        let mut buffer = [0; 4096];
        loop {
            let n = from.read(&mut buffer).unwrap_or(0);
            let mut text = self.lock();
            match n {
                0 => text.1 = true,
                n => text.0.push_str(&String::from_utf8_lossy(&buffer[..n])),
            }
            drop(text);
            self.grew.notify_all();
            if n == 0 {
                return;
            }
        }
    }

    fn wait_for(&self, needle: &str, until: Instant) -> bool {
        let mut text = self.lock();
        loop {
            if text.0.contains(needle) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if text.1 || left.is_zero() {
                return false;
            }
            text = match self.grew.wait_timeout(text, left) {
                Ok((text, _)) => text,
                Err(e) => e.into_inner().0,
            };
        }
    }
}

/// A program that runs. Dropping it kills it with all its children.
pub struct Running {
    command: String,
    child: Child,
    stdout: Arc<Stream>,
    stderr: Arc<Stream>,
    readers: Vec<JoinHandle<()>>,
}

impl Running {
    /// Starts a program in a process group of its own, with no standard input.
    pub fn start(command: &mut Command) -> Result<Running> {
        Self::spawn(command.stdin(Stdio::null()))
    }

    /// As [`Self::start`], with a standard input that ends when this is dropped.
    pub fn start_piped(command: &mut Command) -> Result<Running> {
        Self::spawn(command.stdin(Stdio::piped()))
    }

    fn spawn(command: &mut Command) -> Result<Running> {
        use std::os::unix::process::CommandExt;
        let line = format!("{command:?}");
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {line}"))?;
        let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) else {
            bail!("{line} has no pipes");
        };
        let (stdout, out_reader) = Stream::read(out);
        let (stderr, err_reader) = Stream::read(err);
        Ok(Running {
            command: line,
            child,
            stdout,
            stderr,
            readers: vec![out_reader, err_reader],
        })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended yet.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Gives a line to the standard input of a program that has one.
    pub fn enter(&mut self, line: &str) -> Result<()> {
        let input = self.child.stdin.as_mut().context("no standard input")?;
        writeln!(input, "{line}").with_context(|| format!("{} does not read", self.command))
    }

    /// Waits until it has written something to standard output or standard error.
    pub fn wait_for(&self, needle: &str, deadline: Duration) -> Result<()> {
        let until = Instant::now() + deadline;
        let both = [&self.stdout, &self.stderr];
        loop {
            let ended = both.iter().all(|stream| stream.lock().1);
            // In turns: only one can be waited for.
            let turn = Instant::now() + Duration::from_millis(10);
            if both.iter().any(|stream| stream.wait_for(needle, turn)) {
                return Ok(());
            }
            if ended || Instant::now() > until {
                break;
            }
        }
        bail!(
            "{} did not say {needle:?} but\n{}{}",
            self.command,
            self.stdout.lock().0,
            self.stderr.lock().0
        )
    }

    /// Sends a signal to the program alone.
    pub fn signal(&self, signal: rustix::process::Signal) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid() as i32) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Waits until the program has ended, and leaves what it said in place.
    pub fn reap(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let until = Instant::now() + deadline;
        loop {
            if let Some(status) = self.child.try_wait().context("cannot wait")? {
                return Ok(status);
            }
            if Instant::now() > until {
                bail!("{} is not done after {deadline:?}", self.command);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn kill_group(&self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid() as i32) {
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
    }

    /// Waits until it ends; killed with all its children, and an error, at the deadline.
    pub fn wait(mut self, deadline: Duration) -> Result<Ended> {
        let until = Instant::now() + deadline;
        let status = loop {
            if let Some(status) = self.child.try_wait().context("cannot wait")? {
                break status;
            }
            if Instant::now() > until {
                self.kill_group();
                let _ = self.child.wait();
                bail!(
                    "{} is not done after {deadline:?}; it said\n{}{}",
                    self.command,
                    self.stdout.lock().0,
                    self.stderr.lock().0
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        // Children that were left behind would keep the pipes open.
        self.kill_group();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Ok(Ended {
            command: std::mem::take(&mut self.command),
            status,
            stdout: std::mem::take(&mut self.stdout.lock().0),
            stderr: std::mem::take(&mut self.stderr.lock().0),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_alive() {
            self.kill_group();
            let _ = self.child.wait();
        }
    }
}

/// A process and those that it started, as far as they live.
pub fn descendants(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut next = 0;
    while let Some(pid) = all.get(next) {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten();
        let children: Vec<u32> = threads
            .filter_map(|t| std::fs::read_to_string(t.path().join("children")).ok())
            .flat_map(|list| {
                let pids = list.split_ascii_whitespace().map(str::parse);
                pids.flatten().collect::<Vec<_>>()
            })
            .collect();
        all.extend(children);
        next += 1;
    }
    all
}

/// Waits until something is so, by asking again and again; an error at the deadline.
pub fn wait_until(what: &str, deadline: Duration, mut is_so: impl FnMut() -> bool) -> Result<()> {
    let until = Instant::now() + deadline;
    while !is_so() {
        if Instant::now() > until {
            bail!("after {deadline:?}, not yet: {what}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Running {
        Running::start(Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn output_and_code_are_kept() {
        let ended = shell("echo out; echo err >&2; exit 3")
            .wait(crate::DEADLINE)
            .unwrap();
        assert_eq!(
            (ended.stdout.as_str(), ended.stderr.as_str()),
            ("out\n", "err\n")
        );
        assert_eq!(ended.code(), 3);
        assert!(ended.success().is_err());
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let error = shell("echo hello; sleep 1000")
            .wait(Duration::from_millis(200))
            .unwrap_err();
        assert!(error.to_string().contains("hello"), "{error}");
    }

    #[test]
    fn what_it_says_can_be_waited_for() {
        let running = shell("echo ready; sleep 1000");
        running.wait_for("ready", crate::DEADLINE).unwrap();
        let silent = shell("exit 0");
        assert!(silent.wait_for("ready", crate::DEADLINE).is_err());
    }
}
