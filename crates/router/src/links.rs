//! The links to other hosts' routers: what they say goes to the engine, and what is known of them
//! to the status.

use std::net::IpAddr;
use std::sync::Arc;

use freeflow_api::LinkStatus;
use freeflow_link::{
    Agreed, Config, HEADER_CRC, LinkError, Links, Observer, PeerSpec, SELECTIVE, Status,
};

use crate::LinkConfig;
use crate::remote::Map;
use crate::sandbox::Job;
use crate::serve::Shared;

/// Hands on to the engine what happens to links.
struct Relay(Arc<Shared>);

impl Observer for Relay {
    fn greeted(&mut self, host: IpAddr, incarnation: u64) {
        self.0.with(|engine| engine.peer_greeted(host, incarnation));
    }

    fn up(&mut self, host: IpAddr, agreed: Agreed) {
        self.0.with(|engine| engine.peer_up(host, agreed));
    }

    fn down(&mut self, host: IpAddr) {
        self.0.with(|engine| engine.peer_down(host));
    }

    fn lapsed(&mut self, host: IpAddr) {
        self.0.with(|engine| engine.peer_lapsed(host));
    }

    fn notice(&mut self, line: String) {
        self.0.notices.push(line);
    }
}

/// Starts to keep links; there are no peers yet.
pub(crate) fn start(
    shared: &Arc<Shared>,
    local: IpAddr,
    config: LinkConfig,
    confined: bool,
) -> Result<Links, LinkError> {
    let LinkConfig { port, identity } = config;
    let checked = shared.with(|engine| {
        engine.network.peers.authenticated = identity.is_some();
        engine.network.has_checksums()
    });
    let config = Config {
        local,
        port,
        identity,
        incarnation: shared.incarnation,
        features: SELECTIVE | if checked { HEADER_CRC } else { 0 },
    };
    let own = shared.clone();
    Links::start(config, Relay(shared.clone()), move || {
        if confined {
            own.confine(Job::Links { port });
        }
    })
}

/// The peers of a map.
pub(crate) fn peers(map: &Map) -> Vec<PeerSpec> {
    let peer = |(address, name, segment): (IpAddr, Option<&str>, u32)| PeerSpec {
        address,
        name: name.map(str::to_owned),
        segment,
    };
    map.peers().map(peer).collect()
}

/// As the command line sees it.
pub(crate) fn status(link: Status) -> LinkStatus {
    let agreed = link.agreed;
    LinkStatus {
        host: link.address,
        name: link.name,
        up: link.up,
        since_ms: link.since_ms,
        reason: link.reason,
        incarnation: agreed.map(|a| format!("{:016x}", a.incarnation)),
        version: agreed.map(|a| a.version),
        segment: agreed.map(|a| a.segment),
        selective: agreed.map(|a| a.selective),
        header_crc: agreed.map(|a| a.header_crc),
    }
}
