//! The `freeflow` command.

mod client;
mod doctor;
mod enter;
mod hosts;
mod inject;
mod links;
mod namespaces;
mod router;
mod run;
mod show;
mod start;
mod sysfs;
mod watch;

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use freeflow_api::{RuntimeDir, Setting};
use freeflow_router::Config;

/// `freeflow doctor` found something that FreeFlow cannot do without.
const EXIT_UNFIT: u8 = 1;
/// The command line is wrong; under `freeflow run` it is [`EXIT_FAILURE`].
const EXIT_USAGE: u8 = 2;
/// No router serves the runtime directory.
const EXIT_NO_ROUTER: u8 = 3;
/// FreeFlow itself failed; programs that `freeflow run` starts seldom use this code.
const EXIT_FAILURE: u8 = 125;
/// The program is there but cannot be executed.
const EXIT_NOT_EXECUTABLE: u8 = 126;
/// The program is not there.
const EXIT_NOT_FOUND: u8 = 127;

const EXIT_CODES: &str = "\
Exit codes:
  0    success
  1    doctor: this machine lacks something that FreeFlow cannot do without
  2    bad usage
  3    no router runs in the runtime directory
  125  freeflow itself failed: the reason is on standard error
run passes on its program's exit code, or 128 plus the signal that killed it; its own are:
  125  freeflow itself failed (bad usage, too), and the program did not run
  126  the program cannot be executed
  127  the program is not found";

const RUN_HELP: &str = "\
Two endpoints of an embedded router, which ends with the last of them:
  freeflow run --network private --ip 10.77.0.1 -- ib_write_bw &
  freeflow run --network private --ip 10.77.0.2 -- ib_write_bw 10.77.0.1

With the host's network the programs' own TCP connections use the host's addresses:
  freeflow run --ip 10.77.0.1 -- ib_write_bw &
  freeflow run --ip 10.77.0.2 -- ib_write_bw 127.0.0.1

Endpoints of a tenant that have a private network reach each other and nothing else. An ordinary
user needs user namespaces for it (freeflow doctor).

The program gets the libraries by LD_LIBRARY_PATH, the endpoint by FREEFLOW_ENDPOINT. SIGHUP,
SIGINT, SIGQUIT, SIGTERM, SIGUSR1 and SIGUSR2 are passed on to it, and it gets SIGTERM if freeflow
run is killed.

Exit code: the program's, or 128 plus the signal that killed it; 125 if freeflow failed, 126 if the
program cannot be executed, 127 if it is not found.";

const ROUTER_HELP: &str = "\
With --underlay and --hosts, endpoints of several hosts reach each other. The file has a line for each
address or network of a tenant, and the host that has it; # begins a remark:
  default  10.77.1.0/24  192.0.2.1
  default  10.77.2.0/24  192.0.2.2
Every host may have the same file. Of lines with the router's own address only the name counts, which
its certificate must be for. SIGHUP has the file and the certificates read again.

Hosts know each other by certificates of one authority, each for the host's address, or for the name
that the map has in front of it (node1@192.0.2.1):
  freeflow host ca
  freeflow host cert 192.0.2.1
  freeflow router --underlay 192.0.2.1 --hosts hosts --tls-ca freeflow-ca/ca.pem \\
      --tls-cert freeflow-ca/192.0.2.1.pem --tls-key freeflow-ca/192.0.2.1.key
Of two hosts, the one with the lower address connects to TCP port 4792 of the other (--control-port).

A host without FreeFlow (a RoCE network card, the kernel's rxe) is reached by endpoints that have the
underlay's address as a second GID:
  freeflow run --underlay-gid -- ib_write_bw -x 1 192.0.2.9";

const ENDPOINT_HELP: &str = "\
An endpoint for programs that are started by hand, or in containers, needs a router that stays
(freeflow router). create prints the endpoint's name, address and socket:
  freeflow endpoint create web --ip 10.77.0.1
  FREEFLOW_ENDPOINT=SOCKET LD_LIBRARY_PATH=LIB ibv_devinfo
where LIB is the directory of FreeFlow's libraries (freeflow doctor shows it). In a container, mount
SOCKET as /run/freeflow/endpoint.sock; then FREEFLOW_ENDPOINT is not needed.";

const HOST_HELP: &str = "\
One authority for all hosts, on a machine whose keys are safe; then a certificate for each host, by its
address in the network between hosts:
  freeflow host ca
  freeflow host cert 192.0.2.1
  freeflow host cert 192.0.2.2
Each host gets ca.pem and its own two files, for freeflow router --tls-ca, --tls-cert and --tls-key.
Certificates of another authority do as well, if they are good for TLS servers and clients both.";

/// Virtual RDMA devices for unmodified programs.
#[derive(Parser)]
#[command(version, after_help = EXIT_CODES)]
struct Cli {
    /// Runtime directory of the router [default: $FREEFLOW_RUNTIME_DIR, or /run/freeflow for
    /// root, or $XDG_RUNTIME_DIR/freeflow, or /tmp/freeflow-UID]
    #[arg(long, global = true, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a program with a virtual RDMA device
    #[command(after_help = RUN_HELP)]
    Run(RunArgs),
    /// Run the host daemon in the foreground
    #[command(after_help = ROUTER_HELP, mut_arg("tls_cert", |arg| arg.requires("hosts")))]
    Router {
        /// End with the last endpoint
        #[arg(long)]
        embedded: bool,
        /// Leave the threads that handle clients' input unconfined, for debugging
        #[arg(long)]
        no_sandbox: bool,
        /// How long it polls after the last work before it sleeps
        #[arg(long, value_name = "MICROSECONDS", default_value_t = 200)]
        spin: u32,
        #[command(flatten)]
        network: NetworkArgs,
    },
    /// Create, list and remove endpoints
    #[command(subcommand, after_help = ENDPOINT_HELP)]
    Endpoint(EndpointCommand),
    /// Make hosts' certificates, and show the links to other hosts
    #[command(subcommand, after_help = HOST_HELP)]
    Host(hosts::HostCommand),
    /// Show the router, its endpoints and their sessions
    Status(OutputArgs),
    /// Say what this machine allows
    Doctor(doctor::DoctorArgs),
    /// Prepare a program's view of the system and execute it (used by `run`)
    #[command(name = "__enter", hide = true)]
    Enter(enter::EnterArgs),
    /// Make a bridge in a network namespace of its own (used by `router`)
    #[command(name = "__bridge", hide = true)]
    Bridge,
    /// Try what the system allows, in a process that ends then (used by `doctor`)
    #[command(name = "__probe", hide = true)]
    Probe {
        /// What to try
        what: doctor::Probe,
    },
}

/// How a router reaches others.
#[derive(Args)]
struct NetworkArgs {
    /// This host's address in the network between hosts: traffic to others goes from here by
    /// RoCEv2 (UDP port 4791)
    #[arg(long, value_name = "ADDRESS")]
    underlay: Option<IpAddr>,
    /// File that says which host has which endpoints; SIGHUP has it read again
    #[arg(long, value_name = "FILE", requires = "underlay")]
    hosts: Option<PathBuf>,
    #[command(flatten)]
    links: links::LinkArgs,
}

#[derive(Args)]
struct RunArgs {
    /// Name of the endpoint [default: chosen by the router]
    #[arg(long)]
    name: Option<String>,
    /// Virtual IP, which is the device's GID [default: the next free of 10.77.0.0/16]
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<IpAddr>,
    /// Tenant: endpoints of different tenants never reach each other. One is there as soon as an
    /// endpoint names it [default: default]
    #[arg(long)]
    tenant: Option<String>,
    /// Limits of the endpoint, separated by commas: pds, channels, cqs, qps, srqs, xrcds,
    /// cm_ids, mrs, mws, registered (bytes), outstanding (work requests its queues hold), control
    /// (verbs per second, as 1000/s; more are delayed), connects (connections begun by the connection
    /// manager per second, as 100/s; more are delayed). A rate of 0 delays them until the limit is
    /// changed. K, M, G and T are powers of 1024; "none" is no limit
    #[arg(long, value_name = "NAME=LIMIT", value_delimiter = ',')]
    quota: Vec<Setting>,
    /// Give the device a second GID, the router's underlay address: queue pairs that use it (GID
    /// index 1) reach any host that speaks RoCEv2, FreeFlow's or not
    #[arg(long)]
    underlay_gid: bool,
    /// The program's network: the host's, or one of its own
    #[arg(long, value_enum, default_value_t = Network::Host)]
    network: Network,
    /// Load FreeFlow's library before all others: for programs that bring a copy of libibverbs
    /// under another name, as Python's wheels do
    #[arg(long)]
    preload: bool,
    /// Say what is done
    #[arg(short, long)]
    verbose: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true)]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Network {
    /// The host's network
    Host,
    /// A network namespace with the endpoint's address on an interface of its own
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
        /// Tenant, as for `freeflow run` [default: default]
        #[arg(long)]
        tenant: Option<String>,
        /// Limits, as for `freeflow run`
        #[arg(long, value_name = "NAME=LIMIT", value_delimiter = ',')]
        quota: Vec<Setting>,
        /// Give the device a second GID, the router's underlay address: queue pairs that use it (GID
        /// index 1) reach any host that speaks RoCEv2, FreeFlow's or not
        #[arg(long)]
        underlay_gid: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Change an endpoint's limits while it lives; what is in use above them stays
    Set {
        /// Name
        name: String,
        /// Limits, as for `freeflow run`
        #[arg(
            long,
            required = true,
            value_name = "NAME=LIMIT",
            value_delimiter = ','
        )]
        quota: Vec<Setting>,
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
            return match (e.use_stderr(), runs_a_program(std::env::args_os().skip(1))) {
                (false, _) => ExitCode::SUCCESS,
                (true, true) => EXIT_FAILURE.into(),
                (true, false) => EXIT_USAGE.into(),
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
            spin,
            network,
        } => {
            let config = Config {
                sandbox: !no_sandbox,
                spin: Duration::from_micros(spin.into()),
                ..Config::default()
            };
            router::router(dir, embedded, config, network)
        }
        Command::Endpoint(command) => show::endpoint(&dir, &command),
        Command::Status(args) => show::status(&dir, args.output),
        Command::Host(command) => hosts::host(&dir, &command),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Enter(args) => enter::enter(&dir, &args),
        Command::Bridge => namespaces::bridge(),
        Command::Probe { what } => doctor::probe(what),
    };
    done.unwrap_or_else(|e| {
        eprintln!("freeflow: {e:#}");
        if e.is::<client::NoRouter>() {
            EXIT_NO_ROUTER.into()
        } else {
            EXIT_FAILURE.into()
        }
    })
}

/// Whether a command line that is not understood was to run a program: then the exit code must
/// not be taken for the program's.
fn runs_a_program(mut args: impl Iterator<Item = OsString>) -> bool {
    while let Some(arg) = args.next() {
        if arg == "--runtime-dir" {
            args.next();
        } else if !arg.as_encoded_bytes().starts_with(b"-") {
            return arg == "run" || arg == "__enter";
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn bad_usage_of_run_is_told_from_a_programs_failure() {
        let runs = |line: &str| runs_a_program(line.split(' ').map(OsString::from));
        assert!(runs("run --no-such-option"));
        assert!(runs("--runtime-dir status run"));
        assert!(runs("--runtime-dir=x run"));
        assert!(!runs("endpoint create run --no-such-option"));
        assert!(!runs("--runtime-dir run status"));
    }
}
