//! `freeflow router`: the daemon.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use freeflow_api::{ControlAnswer, Operation, RouterStatus, RuntimeDir};
use freeflow_router::{Admin, Config, Router, RouterError};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::client::{Client, unexpected};
use crate::links::read_hosts;
use crate::{NetworkArgs, namespaces, start};

/// A router that ends answers, or closes its socket, within so long.
const ASK_TIME: Duration = Duration::from_secs(1);

/// Serves until a signal, or, embedded, until the last endpoint is gone.
pub(crate) fn router(
    dir: RuntimeDir,
    embedded: bool,
    config: Config,
    network: NetworkArgs,
) -> Result<ExitCode> {
    raise_descriptor_limit();
    // The others end one that does not serve yet, as any program.
    let mut signals = Signals::new([SIGHUP]).context("cannot handle signals")?;
    let served = serve(dir.clone(), embedded, config, &network);
    if served.is_ok() {
        for signal in [SIGINT, SIGTERM] {
            let added = signals.add_signal(signal);
            added.context("cannot handle signals")?;
        }
    }
    if embedded {
        // To the command that started us and that waits for this line, if it still lives.
        let line = match &served {
            Ok(_) => start::READY.to_owned(),
            Err(e) => format!("{e:#}"),
        };
        let _ = writeln!(std::io::stdout(), "{line}");
    } else if served.is_ok() {
        let line = format!("freeflow: router serves {}", dir.path().display());
        let _ = writeln!(std::io::stderr(), "{line}");
    }
    let admin = served?;
    let ended = admin.clone();
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if signal != SIGHUP {
                return ended.stop();
            }
            let read = match &network.hosts {
                Some(file) => read_again(&ended, file, &network)
                    .map_err(|e| format!("{e:#}; hosts and certificates stay as they were")),
                None => Err("SIGHUP: without --hosts there is nothing to read again".to_owned()),
            };
            if let Err(why) = read {
                ended.notice(why);
            }
        }
    });
    admin.wait();
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
    let make_bridge = Box::new(namespaces::make_bridge);
    let there = Cell::new(false);
    let unanswered = RefCell::new(None);
    // Whoever starts an embedded one has found no router that goes on.
    let ends = || {
        embedded
            || match ask(&dir) {
                Ok(Some(status)) => {
                    there.set(status.embedded);
                    status.embedded && status.endpoints.is_empty()
                }
                Ok(None) => true,
                Err(why) => {
                    unanswered.replace(Some(why));
                    false
                }
            }
    };
    match Admin::start(router, dir.clone(), make_bridge, embedded, &ends) {
        Err(RouterError::AlreadyServed { .. }) if there.get() => bail!(
            "an embedded router serves {}, for programs of `freeflow run`, and ends with the last of \
             them; end them first (freeflow status shows them), or choose another directory with \
             --runtime-dir",
            dir.path().display()
        ),
        Err(e @ RouterError::AlreadyServed { .. }) => match unanswered.into_inner() {
            Some(why) => Err(why.context(e)),
            None => Err(e.into()),
        },
        started => Ok(started?),
    }
}

/// The status of a directory's router, unless it is gone.
fn ask(dir: &RuntimeDir) -> Result<Option<RouterStatus>> {
    let Some(client) = Client::try_connect_for(dir, ASK_TIME)? else {
        return Ok(None);
    };
    match client.call(Operation::Status, &[])? {
        ControlAnswer::Status(status) => Ok(Some(status)),
        ControlAnswer::Ending => Ok(None),
        other => unexpected(other),
    }
}

/// Every completion channel and session is a descriptor.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}
