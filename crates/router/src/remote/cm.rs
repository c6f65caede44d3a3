//! The connection manager's datagrams to and from other hosts.

use freeflow_types::Gid;

use super::Network;

impl Network {
    /// Whether another host has an endpoint of a tenant, as far as the map tells.
    pub(crate) fn has_way(&self, tenant: &str, gid: Gid) -> bool {
        self.find(tenant, gid).is_some()
    }
}
