//! The administrator's defaults: `/etc/rdma/rsocket/*`, as `rsocket(7)` lists them.

use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

use freeflow_rsocket::Config;

const DIRECTORY: &str = "/etc/rdma/rsocket";

pub(super) struct Defaults {
    /// Sizes of a stream.
    pub(super) config: Config,
    /// How long to poll before waiting.
    pub(super) polling: Duration,
}

fn read<T: FromStr>(name: &str) -> Option<T> {
    let text = std::fs::read_to_string(format!("{DIRECTORY}/{name}")).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// Read once.
pub(super) fn defaults() -> &'static Defaults {
    static DEFAULTS: OnceLock<Defaults> = OnceLock::new();
    DEFAULTS.get_or_init(|| {
        let own = Config::default();
        Defaults {
            config: Config {
                send_requests: read("sqsize_default").unwrap_or(own.send_requests),
                recv_requests: read("rqsize_default").unwrap_or(own.recv_requests),
                send_buffer: read("wmem_default").unwrap_or(own.send_buffer),
                recv_buffer: read("mem_default").unwrap_or(own.recv_buffer),
                inline: read("inline_default").unwrap_or(own.inline),
                maps: read("iomap_size").unwrap_or(own.maps),
            },
            polling: Duration::from_micros(read("polling_time").unwrap_or(10)),
        }
    })
}
