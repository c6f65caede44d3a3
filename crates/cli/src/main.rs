//! The `freeflow` command.

mod client;
mod doctor;
mod enter;
mod inject;
mod router;
mod run;
mod show;
mod sysfs;

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use freeflow_api::RuntimeDir;

/// FreeFlow itself failed; programs that `freeflow run` starts seldom use these codes.
const EXIT_FAILURE: u8 = 125;

const EXIT_CODES: &str = "\
Exit codes: 0 success; 125 freeflow itself failed, the reason is on standard error; 126 the \
program cannot be executed; 127 it is not found; else the program's own, or 128 plus the signal \
that killed it.";

/// Virtual RDMA devices for unmodified programs.
#[derive(Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Cli {
    /// Runtime directory of the router [default: $FREEFLOW_RUNTIME_DIR, or /run/freeflow for
    /// root, or $XDG_RUNTIME_DIR/freeflow]
    #[arg(long, global = true, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a program with a virtual RDMA device
    #[command(after_help = "\
Example: two endpoints of an embedded router, which ends with the last of them:
  freeflow run --ip 10.77.0.1 -- ib_write_bw &
  freeflow run --ip 10.77.0.2 -- ib_write_bw 127.0.0.1")]
    Run(RunArgs),
    /// Run the host daemon in the foreground
    Router {
        /// End with the last endpoint
        #[arg(long)]
        embedded: bool,
        /// Leave the threads that handle clients' input unconfined, for debugging
        #[arg(long)]
        no_sandbox: bool,
    },
    /// Create, list and remove endpoints
    #[command(subcommand)]
    Endpoint(EndpointCommand),
    /// Show the router, its endpoints and their sessions
    Status(OutputArgs),
    /// Say what this machine allows
    Doctor(OutputArgs),
    /// Prepare a program's view of the system and execute it (used by `run`)
    #[command(name = "__enter", hide = true)]
    Enter(enter::EnterArgs),
}

#[derive(Args)]
struct RunArgs {
    /// Name of the endpoint [default: chosen by the router]
    #[arg(long)]
    name: Option<String>,
    /// Virtual IP, which is the device's GID [default: the next free of 10.77.0.0/16]
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<IpAddr>,
    /// Tenant: endpoints of different tenants never reach each other [default: default]
    #[arg(long)]
    tenant: Option<String>,
    /// The program's network: the host's, or one of its own
    #[arg(long, value_enum, default_value_t = Network::Host)]
    network: Network,
    /// Say what is done
    #[arg(short, long)]
    verbose: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Network {
    /// The host's network
    Host,
    /// A network namespace of its own
    Private,
}

#[derive(Subcommand)]
enum EndpointCommand {
    /// List endpoints
    Ls(OutputArgs),
    /// Create an endpoint that stays until it is removed or the router ends
    Create {
        /// Name [default: chosen by the router]
        name: Option<String>,
        /// Virtual IP [default: the next free of 10.77.0.0/16]
        #[arg(long, value_name = "ADDRESS")]
        ip: Option<IpAddr>,
        /// Tenant [default: default]
        #[arg(long)]
        tenant: Option<String>,
    },
    /// Show one endpoint
    Inspect {
        /// Name
        name: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Remove an endpoint: its sessions end
    Rm {
        /// Name
        name: String,
    },
}

#[derive(Args, Clone, Copy)]
struct OutputArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Text,
    /// For programs
    Json,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return if e.use_stderr() {
                EXIT_FAILURE.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let dir = cli.runtime_dir.map_or_else(
        || {
            let uid = rustix::process::geteuid().as_raw();
            RuntimeDir::of_user(uid, |name| std::env::var_os(name).map(PathBuf::from))
        },
        RuntimeDir::at,
    );
    let done = match cli.command {
        Command::Run(args) => run::run(&dir, &args),
        Command::Router {
            embedded,
            no_sandbox,
        } => router::router(dir, embedded, !no_sandbox),
        Command::Endpoint(command) => show::endpoint(&dir, &command),
        Command::Status(args) => show::status(&dir, args.output),
        Command::Doctor(args) => doctor::doctor(args.output),
        Command::Enter(args) => enter::enter(&args),
    };
    done.unwrap_or_else(|e| {
        eprintln!("freeflow: {e:#}");
        EXIT_FAILURE.into()
    })
}
