//! `ff-conform`: what the verbs promise, checked through the C ABI alone, on any device.
//!
//! It opens whichever libibverbs.so.1 the dynamic linker finds, so that the same tests run on
//! FreeFlow and, as the reference, on rdma-core over the kernel's rdma_rxe. Each test runs in a
//! process of its own: a crash or a hang fails that test alone.

mod differences;
mod run;
mod suite;
mod tests;
mod verbs;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::suite::{Env, Place};

/// Checks that a device's verbs do what they promise.
#[derive(Parser, Debug)]
#[command(name = "ff-conform", version)]
struct Options {
    /// Device of the near end [default: the first]
    #[arg(long)]
    device: Option<String>,
    /// Device of the far end [default: that of the near end]
    #[arg(long)]
    device2: Option<String>,
    /// Index of the GID to use
    #[arg(long, default_value_t = 0)]
    gid_index: u8,
    /// Only tests whose name contains this; may be repeated
    #[arg(long)]
    filter: Vec<String>,
    /// Names the tests and their rules, and runs none
    #[arg(long)]
    list: bool,
    /// Prints one JSON object a line
    #[arg(long)]
    json: bool,
    /// The far end is a process of its own
    #[arg(long, conflicts_with = "peer")]
    two: bool,
    /// The far end is with the server at this path
    #[arg(long, value_name = "PATH")]
    peer: Option<PathBuf>,
    /// Serves far ends at this path until killed
    #[arg(long, value_name = "PATH", conflicts_with_all = ["peer", "two", "list"])]
    serve: Option<PathBuf>,
    /// Divides the lengths of long loops
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    shorter: u64,
    /// Seconds that a test may take
    #[arg(long, default_value_t = 300)]
    limit: u64,
    /// Runs this test in this process
    #[arg(long, hide = true)]
    one: Option<String>,
    /// Is the far end of the socket that is standard input
    #[arg(long, hide = true)]
    far: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let place = match &options.peer {
        Some(path) => Place::Server(path.clone()),
        None if options.two => Place::Process,
        None => Place::Here,
    };
    let env = Env {
        device: options.device.clone(),
        device2: options.device2.clone(),
        gid_index: options.gid_index,
        place,
        shorter: options.shorter,
    };
    if options.far {
        return run::far(&env);
    }
    if let Some(path) = &options.serve {
        return match suite::listen(&env, path) {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => {
                eprintln!("ff-conform: serving at {}: {why}", path.display());
                ExitCode::from(2)
            }
        };
    }
    if let Some(name) = &options.one {
        return run::one(&env, name);
    }
    run::all(&env, &options)
}
