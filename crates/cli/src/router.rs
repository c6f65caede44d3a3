//! `freeflow router`: the daemon.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use freeflow_api::RuntimeDir;
use freeflow_router::{Admin, Config, Router};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::{namespaces, start};

/// An embedded router's predecessor is about to end, and gets this time for it.
const PREDECESSOR: Duration = Duration::from_secs(10);

/// Serves until a signal, or, embedded, until the last endpoint is gone.
pub(crate) fn router(dir: RuntimeDir, embedded: bool, sandbox: bool) -> Result<ExitCode> {
    raise_descriptor_limit();
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot handle signals")?;
    let served = serve(dir.clone(), embedded, sandbox);
    if embedded {
        // To the command that started us and that waits for this line, if it still lives.
        let line = match &served {
            Ok(_) => start::READY.to_owned(),
            Err(e) => format!("{e:#}"),
        };
        let _ = writeln!(std::io::stdout(), "{line}");
    } else if served.is_ok() {
        eprintln!("freeflow: router serves {}", dir.path().display());
    }
    let admin = served?;
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

fn serve(dir: RuntimeDir, embedded: bool, sandbox: bool) -> Result<Arc<Admin>> {
    let config = Config {
        sandbox,
        ..Config::default()
    };
    let router = Router::start(config)?;
    let patience = if embedded {
        PREDECESSOR
    } else {
        Duration::ZERO
    };
    let make_bridge = Box::new(namespaces::make_bridge);
    Ok(Admin::start(router, dir, make_bridge, patience)?)
}

/// Every completion channel and session is a descriptor.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}
