//! Running a command in guests.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::guest::{Event, Guest, STARTED, Shape, console_log, qemu_log};
use crate::outcome::{End, Files, Host, Outcome};
use crate::{Machine, VmError, initrd};

/// A guest is up in seconds, in a minute if the machine is busy.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// What a command gets to notice that the other host's has failed.
const GRACE: Duration = Duration::from_secs(10);
/// Modules that every guest loads: the command's port, and RDMA.
const MODULES: [&str; 6] = [
    "virtio_console",
    "virtio_net",
    "veth",
    "rdma_rxe",
    "rdma_ucm",
    "ib_umad",
];
const LIBRARY: &str = include_str!("../guest/lib.sh");
const START: &str = include_str!("../guest/start");

/// One or two guests to be.
#[derive(Clone, Debug)]
pub struct Vm<'a> {
    machine: &'a Machine,
    hosts: usize,
    memory_mb: u32,
    limit: Duration,
    keep: bool,
    modules: Vec<String>,
}

/// Runs a bash script with arguments in one guest of a machine that has been prepared.
///
/// # Errors
///
/// As those of [`Vm::run`], and [`VmError::Unavailable`] where no guest can be had.
pub fn run(script: &Path, args: &[&str]) -> Result<Outcome, VmError> {
    let machine = Machine::find()?;
    let mut command = vec![OsStr::new("bash"), script.as_os_str()];
    command.extend(args.iter().map(OsStr::new));
    Vm::new(&machine).run(&command)
}

impl<'a> Vm<'a> {
    /// One guest with two CPUs and 2 GiB of memory, whose command may take ten minutes.
    pub fn new(machine: &'a Machine) -> Self {
        Vm {
            machine,
            hosts: 1,
            memory_mb: 2048,
            limit: Duration::from_secs(600),
            keep: false,
            modules: MODULES.map(str::to_owned).to_vec(),
        }
    }

    /// One host, or two with a network between them: both run the command.
    #[must_use]
    pub fn two_hosts(mut self, two: bool) -> Self {
        self.hosts = if two { 2 } else { 1 };
        self
    }

    /// Memory of each guest, in MiB.
    #[must_use]
    pub fn memory_mb(mut self, memory_mb: u32) -> Self {
        self.memory_mb = memory_mb;
        self
    }

    /// How long the command may take; what the guests take to start does not count.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Whether [`Outcome::dir`] outlives the outcome.
    #[must_use]
    pub fn keep(mut self, keep: bool) -> Self {
        self.keep = keep;
        self
    }

    /// Kernel modules that are loaded before the command runs; `modprobe` works in it, too.
    #[must_use]
    pub fn modules<S: Into<String>>(mut self, modules: impl IntoIterator<Item = S>) -> Self {
        self.modules.extend(modules.into_iter().map(Into::into));
        self
    }

    /// Runs a command (program and arguments) to its end.
    ///
    /// # Errors
    ///
    /// If no guest can be started. What goes wrong in a guest is in the [`Outcome`].
    pub fn run<S: AsRef<OsStr>>(&self, command: &[S]) -> Result<Outcome, VmError> {
        self.run_with(command, |_, _| {})
    }

    /// As [`Vm::run`]; a host's output is given to `said` as it comes.
    ///
    /// # Errors
    ///
    /// As those of [`Vm::run`].
    pub fn run_with<S: AsRef<OsStr>>(
        &self,
        command: &[S],
        mut said: impl FnMut(usize, &[u8]),
    ) -> Result<Outcome, VmError> {
        let cache = &self.machine.cache;
        let dir = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(cache)
            .map_err(|e| VmError::io(format!("cannot write {}", cache.display()), e))?;
        self.lay_out(dir.path(), command)
            .map_err(|e| VmError::io(format!("cannot write {}", dir.path().display()), e))?;
        initrd::write(self.machine, &dir.path().join("initrd"))?;

        let (sender, events) = channel();
        let mut watched = Vec::new();
        for index in 0..self.hosts {
            let shape = Shape {
                index,
                hosts: self.hosts,
                memory_mb: self.memory_mb,
            };
            let guest = Guest::start(self.machine, dir.path(), &shape, sender.clone())?;
            watched.push(Watched::new(guest));
        }
        while let Some(next) = watched.iter().filter_map(Watched::deadline).min() {
            let left = next.saturating_duration_since(Instant::now());
            match events.recv_timeout(left) {
                Ok(Event::Said(index, bytes)) => {
                    said(index, watched[index].said(&bytes, self.limit));
                }
                Ok(Event::Closed(index)) => {
                    let file = dir.path().join(format!("share/exit.{index}"));
                    let code = std::fs::read_to_string(file);
                    let code = code.ok().and_then(|code| code.trim().parse().ok());
                    watched[index].end(code.map_or(End::Died, End::Exited));
                    if code != Some(0) {
                        watched.iter_mut().for_each(Watched::hurry);
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let now = Instant::now();
                    watched.iter_mut().for_each(|host| host.check(now));
                }
            }
        }
        let read = |name| {
            let bytes = std::fs::read(dir.path().join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let hosts = watched.into_iter().enumerate().map(|(index, host)| Host {
            end: host.end.unwrap_or(End::Died),
            output: String::from_utf8_lossy(&host.output).into_owned(),
            console: read(console_log(index)) + &read(qemu_log(index)),
        });
        let hosts = hosts.collect();
        let files = if self.keep {
            Files::Kept(dir.keep())
        } else {
            Files::Temporary(dir)
        };
        Ok(Outcome { hosts, files })
    }

    /// Writes what the guests read.
    fn lay_out<S: AsRef<OsStr>>(&self, dir: &Path, command: &[S]) -> std::io::Result<()> {
        let share = dir.join("share");
        std::fs::create_dir_all(share.join("out"))?;
        std::fs::write(share.join("start"), START)?;
        std::fs::write(share.join("lib.sh"), LIBRARY)?;
        let setting = |name: &str, value: &OsStr| {
            let mut setting = OsString::from(name);
            setting.push("=");
            setting.push(value);
            setting
        };
        let environment = [
            setting("HOSTS", self.hosts.to_string().as_ref()),
            setting("VM_KERNEL", self.machine.kernel.as_ref()),
            setting("VM_DIRECTORY", std::env::current_dir()?.as_ref()),
        ];
        write_list(&share.join("environment"), &environment)?;
        write_list(&share.join("modules"), &self.modules)?;
        write_list(&share.join("command"), command)
    }
}

/// Writes words such that bash's `mapfile -d ''` reads them.
fn write_list<S: AsRef<OsStr>>(path: &Path, list: &[S]) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    for word in list {
        bytes.extend_from_slice(word.as_ref().as_bytes());
        bytes.push(0);
    }
    std::fs::write(path, bytes)
}

/// A guest and what it has done so far.
struct Watched {
    guest: Guest,
    output: Vec<u8>,
    /// Bytes of [`STARTED`] that have come.
    greeted: usize,
    /// When it is ended, and as what.
    limit: (Instant, End),
    end: Option<End>,
}

impl Watched {
    fn new(guest: Guest) -> Self {
        Watched {
            guest,
            output: Vec::new(),
            greeted: 0,
            limit: (Instant::now() + BOOT_LIMIT, End::NotUp(BOOT_LIMIT)),
            end: None,
        }
    }

    /// When something must be done, while it runs.
    fn deadline(&self) -> Option<Instant> {
        self.end.is_none().then_some(self.limit.0)
    }

    /// It said something; returns what of it is the command's output.
    fn said<'b>(&mut self, bytes: &'b [u8], limit: Duration) -> &'b [u8] {
        let greeting = bytes.len().min(STARTED.len() - self.greeted);
        if greeting > 0 {
            self.greeted += greeting;
            if self.greeted == STARTED.len() {
                self.limit = (Instant::now() + limit, End::TimedOut(limit));
            }
        }
        let output = &bytes[greeting..];
        self.output.extend_from_slice(output);
        output
    }

    /// The other host's command has failed: this one's may not come to an end by itself.
    fn hurry(&mut self) {
        let soon = Instant::now() + GRACE;
        if soon < self.limit.0 {
            self.limit = (soon, End::Stopped);
        }
    }

    /// Its time may be over.
    fn check(&mut self, now: Instant) {
        if self.limit.0 <= now {
            self.end(self.limit.1);
        }
    }

    /// It ended, or must end. What was known first holds.
    fn end(&mut self, end: End) {
        if self.end.is_none() {
            self.guest.kill();
            self.end = Some(end);
        }
    }
}
