//! Programs that are watched: their output is kept, they are killed at a deadline, and never
//! outlive their test, even if that is killed.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid,
};

use crate::guard::Guarded;

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

/// A program that runs. Dropping it kills it with all its children, even if it has ended before them.
pub struct Running {
    command: String,
    /// Its number, which is its process group's too, is nobody else's until it is waited for.
    child: Child,
    /// Until then.
    guarded: Option<Guarded>,
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
        let line = format!("{command:?}");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let (mut child, guarded) =
            Guarded::spawn(command).with_context(|| format!("cannot start {line}"))?;
        let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) else {
            bail!("{line} has no pipes");
        };
        let (stdout, out_reader) = Stream::read(out);
        let (stderr, err_reader) = Stream::read(err);
        Ok(Running {
            command: line,
            child,
            guarded: Some(guarded),
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
        matches!(self.status(), Ok(None))
    }

    /// How it ended, if it has; it is not waited for.
    fn status(&self) -> Result<Option<ExitStatus>> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let ended = waitid(WaitId::Pid(self.group()), options).context("cannot wait")?;
        Ok(ended.map(|ended| {
            let code = ended.exit_status().map(|code| code << 8);
            ExitStatus::from_raw(code.or(ended.terminating_signal()).unwrap_or(0))
        }))
    }

    fn group(&self) -> Pid {
        Pid::from_child(&self.child)
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
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(self.group(), signal);
    }

    /// Of a program that starts another one, as `freeflow run` does: kills that with all its
    /// processes, and waits for the end of the first.
    pub fn kill_program(&mut self) -> Result<ExitStatus> {
        let all = descendants(self.pid());
        if all.len() < 2 {
            bail!("{} has started nothing", self.command);
        }
        for pid in all.into_iter().skip(1) {
            if let Some(pid) = Pid::from_raw(pid as i32) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        self.reap(crate::DEADLINE)
    }

    /// Waits until the program has ended, and leaves what it said in place.
    pub fn reap(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let until = Instant::now() + deadline;
        loop {
            if let Some(status) = self.status()? {
                return Ok(status);
            }
            if Instant::now() > until {
                bail!("{} is not done after {deadline:?}", self.command);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Kills it with all its children, and waits for it.
    fn end(&mut self) {
        if let Some(guarded) = self.guarded.take() {
            let _ = kill_process_group(self.group(), Signal::KILL);
            drop(guarded);
            let _ = self.child.wait();
        }
    }

    /// Waits until it ends; killed with all its children, and an error, at the deadline.
    pub fn wait(mut self, deadline: Duration) -> Result<Ended> {
        let status = self.reap(deadline);
        // Children that were left behind would keep the pipes open.
        self.end();
        let status = match status {
            Ok(status) => status,
            Err(e) => bail!(
                "{e:#}; it said\n{}{}",
                self.stdout.lock().0,
                self.stderr.lock().0
            ),
        };
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
        self.end();
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
    fn children_end_with_a_program_that_has_ended() {
        let mut running = shell("sleep 1000 >/dev/null 2>&1 & echo child $!.");
        running.reap(crate::DEADLINE).unwrap();
        running.wait_for(".", crate::DEADLINE).unwrap();
        let child = child_of(&running);
        assert!(is_there(&child));
        drop(running);
        wait_until("the child ends", crate::DEADLINE, || !is_there(&child)).unwrap();
    }

    /// Starts this test again, which starts a program, and kills it.
    #[test]
    fn children_end_with_a_test_that_is_killed() {
        const AGAIN: &str = "FREEFLOW_TEST_TO_BE_KILLED";
        if std::env::var_os(AGAIN).is_some() {
            let running = shell("echo child $$.; exec sleep 1000");
            running.wait_for(".", crate::DEADLINE).unwrap();
            println!("child {}.", child_of(&running));
            std::thread::sleep(crate::DEADLINE);
            return;
        }
        let mut test = Command::new(std::env::current_exe().unwrap());
        let name = "process::tests::children_end_with_a_test_that_is_killed";
        test.args(["--exact", name, "--nocapture"]).env(AGAIN, "1");
        let mut test = Running::start(&mut test).unwrap();
        test.wait_for(".\n", crate::DEADLINE).unwrap();
        let child = child_of(&test);
        assert!(is_there(&child));
        test.signal(Signal::KILL);
        test.reap(crate::DEADLINE).unwrap();
        wait_until("the child ends", crate::DEADLINE, || !is_there(&child)).unwrap();
    }

    /// The number that a program says of its child.
    fn child_of(running: &Running) -> String {
        let said = &running.stdout.lock().0;
        let (_, after) = said.split_once("child ").unwrap();
        after.split_once('.').unwrap().0.to_owned()
    }

    fn is_there(pid: &str) -> bool {
        // What has ended has no program any more, though nobody may have waited for it.
        std::fs::read_link(format!("/proc/{pid}/exe")).is_ok()
    }

    #[test]
    fn the_program_of_another_can_be_killed() {
        let mut running = shell("sh -c 'trap : TERM; echo ready; sleep 1000'; echo code $?");
        running.wait_for("ready", crate::DEADLINE).unwrap();
        running.kill_program().unwrap();
        running.wait_for("code 137", crate::DEADLINE).unwrap();
        assert!(shell("exit 0").kill_program().is_err());
    }

    #[test]
    fn what_it_says_can_be_waited_for() {
        let running = shell("echo ready; sleep 1000");
        running.wait_for("ready", crate::DEADLINE).unwrap();
        let silent = shell("exit 0");
        assert!(silent.wait_for("ready", crate::DEADLINE).is_err());
    }
}
