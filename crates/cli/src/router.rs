//! `freeflow router`: the daemon.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use freeflow_api::RuntimeDir;
use freeflow_router::{Admin, Config, Hosts, Router};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::{namespaces, start};

/// An embedded router's predecessor is about to end, and gets this time for it.
const PREDECESSOR: Duration = Duration::from_secs(10);

/// Serves until a signal, or, embedded, until the last endpoint is gone.
pub(crate) fn router(
    dir: RuntimeDir,
    embedded: bool,
    config: Config,
    hosts: Option<PathBuf>,
) -> Result<ExitCode> {
    raise_descriptor_limit();
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).context("cannot handle signals")?;
    let served = serve(dir.clone(), embedded, config, hosts.as_deref());
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
        for signal in signals.forever() {
            let Some(file) = hosts.as_ref().filter(|_| signal == SIGHUP) else {
                return ended.stop();
            };
            match read_hosts(file) {
                Ok(hosts) => ended.set_hosts(hosts),
                Err(e) => eprintln!("freeflow: {e:#}; the hosts stay as they were"),
            }
        }
    });
    admin.wait(embedded);
    admin.close();
    Ok(ExitCode::SUCCESS)
}

fn read_hosts(file: &Path) -> Result<Hosts> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read the hosts in {}", file.display()))?;
    Hosts::parse(&text).with_context(|| format!("{}", file.display()))
}

fn serve(
    dir: RuntimeDir,
    embedded: bool,
    config: Config,
    hosts: Option<&Path>,
) -> Result<Arc<Admin>> {
    let hosts = hosts.map(read_hosts).transpose()?;
    let router = Router::start(config)?;
    router.set_hosts(hosts.unwrap_or_default());
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
