//! `freeflow router`: the daemon.

use std::process::ExitCode;

use anyhow::{Context, Result};
use freeflow_api::RuntimeDir;
use freeflow_router::{Admin, Config, Router};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Serves until a signal, or, embedded, until the last endpoint is gone.
pub(crate) fn router(dir: RuntimeDir, embedded: bool, sandbox: bool) -> Result<ExitCode> {
    raise_descriptor_limit();
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot handle signals")?;
    let config = Config {
        sandbox,
        ..Config::default()
    };
    let router = Router::start(config)?;
    let admin = Admin::start(router, dir.clone())?;
    if !embedded {
        eprintln!("freeflow: router serves {}", dir.path().display());
    }
    let ended = admin.clone();
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            ended.stop();
        }
    });
    admin.wait(embedded);
    admin.close();
    Ok(ExitCode::SUCCESS)
}

/// Every completion channel and session is a descriptor.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}
