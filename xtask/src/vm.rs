//! `cargo xtask vm`: a script in a virtual machine with a kernel RDMA device.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use freeflow_vm::{End, Machine, Outcome, Vm};

use crate::packages;

/// Exit code if the script was not done at its limit, as `timeout(1)` has it.
const EXIT_TIMEOUT: u8 = 124;
/// Exit code if the guest failed.
const EXIT_GUEST: u8 = 125;

/// Arguments of `cargo xtask vm`.
#[derive(Args)]
#[command(after_help = "\
The script runs as root on this machine's root file system under a writable layer. It finds
  $VM_LIB        functions to source: `rxe_pair` makes rxe0 (10.77.0.1) and rxe1 (10.77.0.2);
                 `meet [WORD]` waits for the other host and prints its word
  $HOST_INDEX    0, or 1 on the second host; two hosts have eth0 (10.99.0.1, 10.99.0.2) and rxe0
  /out           a directory shared with the other host (and kept with --keep)
Exit codes: the script's (of two hosts, the first that is not 0); 124 if it is not done at its
limit; 125 if the guest fails.")]
pub(crate) struct VmArgs {
    /// Install what it needs, and run nothing
    #[arg(long)]
    prepare: bool,
    /// How many hosts run the script
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    hosts: u8,
    /// Kernel modules to load besides those that RDMA needs
    #[arg(long, value_name = "MODULE,...", value_delimiter = ',')]
    mods: Vec<String>,
    /// Memory of each guest
    #[arg(long, value_name = "MB", default_value_t = 2048)]
    mem: u32,
    /// How long the script may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    limit: u64,
    /// Keep /out and the guests' logs
    #[arg(long)]
    keep: bool,
    /// Bash script to run
    #[arg(required_unless_present = "prepare")]
    script: Option<PathBuf>,
    /// Its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Runs the script; the exit code is its own.
pub(crate) fn vm(args: &VmArgs) -> Result<ExitCode> {
    packages::install(&freeflow_vm::PACKAGES)?;
    let machine = Machine::prepare()?;
    let Some(script) = &args.script else {
        eprintln!("guests run Linux {}", machine.kernel_release()?);
        return Ok(ExitCode::SUCCESS);
    };
    let script = script
        .canonicalize()
        .with_context(|| format!("cannot read {}", script.display()))?;
    let mut command = vec!["bash".into(), script.into_os_string()];
    command.extend(args.args.iter().map(Into::into));
    let mut printer = Printer::new(args.hosts.into());
    let outcome = Vm::new(&machine)
        .two_hosts(args.hosts == 2)
        .memory_mb(args.mem)
        .limit(Duration::from_secs(args.limit))
        .keep(args.keep)
        .modules(&args.mods)
        .run_with(&command, |host, bytes| printer.print(host, bytes))?;
    printer.finish();
    if args.keep {
        eprintln!("kept {}", outcome.dir().display());
    }
    Ok(report(&outcome))
}

/// Says what went wrong, and gives the exit code.
fn report(outcome: &Outcome) -> ExitCode {
    let mut code = 0;
    for (index, host) in outcome.hosts.iter().enumerate() {
        let this = match host.end {
            End::Exited(code) => code,
            End::TimedOut(_) => EXIT_TIMEOUT,
            End::Died | End::NotUp(_) | End::Stopped => EXIT_GUEST,
        };
        if !matches!(host.end, End::Exited(_)) {
            let console = host.console_tail();
            eprintln!("host {index}: {}; its console:\n{console}", host.end);
        } else if this != 0 && outcome.hosts.len() > 1 {
            eprintln!("host {index}: {}", host.end);
        }
        if code == 0 {
            code = this;
        }
    }
    code.into()
}

/// Prints hosts' output: of one as it is, of two by lines that say which it was.
struct Printer {
    /// Of each of several hosts, the line that it has begun.
    lines: Vec<Vec<u8>>,
}

impl Printer {
    fn new(hosts: usize) -> Self {
        let lines = if hosts > 1 { hosts } else { 0 };
        Printer {
            lines: vec![Vec::new(); lines],
        }
    }

    fn print(&mut self, host: usize, bytes: &[u8]) {
        let mut out = std::io::stdout().lock();
        // If nobody reads it, the script goes on all the same.
        let _ = match self.lines.get_mut(host) {
            None => out.write_all(bytes),
            Some(line) => bytes.split_inclusive(|&b| b == b'\n').try_for_each(|part| {
                line.extend_from_slice(part);
                if !line.ends_with(b"\n") {
                    return Ok(());
                }
                write!(out, "{host}: ")?;
                out.write_all(&std::mem::take(line))
            }),
        };
        let _ = out.flush();
    }

    /// Prints lines that have no end.
    fn finish(&mut self) {
        for host in 0..self.lines.len() {
            if !self.lines[host].is_empty() {
                self.print(host, b"\n");
            }
        }
    }
}
