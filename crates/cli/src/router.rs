//! `freeflow router`: the daemon.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use freeflow_api::RuntimeDir;
use freeflow_router::{Admin, Config, Router};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::hosts::read_hosts;
use crate::{NetworkArgs, namespaces, start};

/// An embedded router's predecessor is about to end, and gets this time for it.
const PREDECESSOR: Duration = Duration::from_secs(10);

/// Serves until a signal, or, embedded, until the last endpoint is gone.
pub(crate) fn router(
    dir: RuntimeDir,
    embedded: bool,
    config: Config,
    network: NetworkArgs,
) -> Result<ExitCode> {
    raise_descriptor_limit();
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).context("cannot handle signals")?;
    let served = serve(dir.clone(), embedded, config, &network);
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
            let Some(file) = network.hosts.as_ref().filter(|_| signal == SIGHUP) else {
                return ended.stop();
            };
            if let Err(e) = read_again(&ended, file, &network) {
                eprintln!("freeflow: {e:#}; hosts and certificates stay as they were");
            }
        }
    });
    admin.wait(embedded);
    admin.close();
    Ok(ExitCode::SUCCESS)
}

fn read_again(admin: &Admin, file: &Path, network: &NetworkArgs) -> Result<()> {
    let hosts = read_hosts(file, network.underlay)?;
    let identity = network.links.tls.read(network.underlay, &hosts)?;
    admin.set_hosts(hosts);
    if let Some(identity) = identity {
        admin.set_identity(identity);
    }
    Ok(())
}

fn serve(
    dir: RuntimeDir,
    embedded: bool,
    mut config: Config,
    network: &NetworkArgs,
) -> Result<Arc<Admin>> {
    config.underlay = network.underlay;
    let read = |file| read_hosts(file, network.underlay);
    let hosts = network.hosts.as_deref().map(read).transpose()?;
    if let Some(hosts) = &hosts {
        config.links = Some(network.links.config(network.underlay, hosts)?);
    }
    let router = Router::start(config)?;
    // Without a map, too: the port's MTU is that of the link.
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
