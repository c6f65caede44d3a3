//! How guests ended.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

/// How one guest ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The command ended, with this exit code (128 and the signal if one killed it).
    Exited(u8),
    /// The guest ended before its command: the kernel panicked, or something it needs is missing.
    Died,
    /// The guest was not up after this time, and was ended.
    NotUp(Duration),
    /// The command was not done after this time, and the guest was ended.
    TimedOut(Duration),
    /// The command went on when the other host's had failed, and the guest was ended.
    Stopped,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Exited(code) => write!(f, "exit code {code}"),
            End::Died => write!(f, "the guest ended before its command did"),
            End::NotUp(limit) => write!(f, "the guest was not up after {limit:?} and was ended"),
            End::TimedOut(limit) => {
                write!(
                    f,
                    "not done after the limit of {limit:?}: the guest was ended"
                )
            }
            End::Stopped => write!(f, "ended, as the other host's command had failed"),
        }
    }
}

/// What became of one host.
#[derive(Clone, Debug)]
pub struct Host {
    /// How it ended.
    pub end: End,
    /// What the command printed.
    pub output: String,
    /// What the kernel printed, and QEMU.
    pub console: String,
}

impl Host {
    /// The last lines of the console.
    pub fn console_tail(&self) -> String {
        let lines: Vec<_> = self.console.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

/// What became of all hosts.
#[derive(Debug)]
pub struct Outcome {
    /// By index.
    pub hosts: Vec<Host>,
    /// Where the guests' files are; removed with the outcome unless they are kept.
    pub(crate) files: Files,
}

#[derive(Debug)]
pub(crate) enum Files {
    Temporary(TempDir),
    Kept(PathBuf),
}

impl Outcome {
    /// Whether every command ended with exit code 0.
    pub fn success(&self) -> bool {
        self.hosts.iter().all(|host| host.end == End::Exited(0))
    }

    /// The shared directory: what guests have left in `/out`.
    pub fn out(&self) -> PathBuf {
        self.dir().join("share/out")
    }

    /// The directory with `share/out`, and each host's `console.INDEX.log` and `qemu.INDEX.log`.
    pub fn dir(&self) -> &Path {
        match &self.files {
            Files::Temporary(dir) => dir.path(),
            Files::Kept(dir) => dir,
        }
    }
}

/// All that is known, for the message of a test that fails.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, host) in self.hosts.iter().enumerate() {
            writeln!(f, "host {index}: {}", host.end)?;
            writeln!(f, "--- output\n{}", host.output.trim_end())?;
            writeln!(f, "--- console\n{}", host.console_tail())?;
        }
        write!(f, "---")
    }
}
