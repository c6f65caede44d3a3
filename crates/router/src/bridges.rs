//! The bridges of endpoints with a private network: one for each tenant that has such endpoints.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use freeflow_network::{Bridge, Port};

use crate::RouterError;

/// Makes a bridge in a network namespace of its own. A router's process has several threads, so
/// that it cannot enter a user namespace to do so itself.
pub type MakeBridge = Box<dyn Fn() -> io::Result<Bridge> + Send + Sync>;

pub(crate) struct Bridges {
    make: MakeBridge,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    by_tenant: HashMap<String, Bridge>,
    /// By endpoint: its tenant and its port.
    ports: HashMap<String, (String, Port)>,
}

impl Bridges {
    pub(crate) fn new(make: MakeBridge) -> Self {
        let state = Mutex::default();
        Bridges { make, state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attaches a network namespace to its tenant's bridge, as that of an endpoint.
    pub(crate) fn attach(
        &self,
        endpoint: &str,
        tenant: &str,
        namespace: BorrowedFd<'_>,
    ) -> Result<(), RouterError> {
        let mut state = self.state();
        if state.ports.contains_key(endpoint) {
            return Err(RouterError::AttachedAlready {
                name: endpoint.to_owned(),
            });
        }
        let bridge = match state.by_tenant.entry(tenant.to_owned()) {
            std::collections::hash_map::Entry::Occupied(bridge) => bridge.into_mut(),
            std::collections::hash_map::Entry::Vacant(none) => {
                let bridge = (self.make)().map_err(|source| RouterError::Io {
                    what: format!("cannot make a network for tenant \"{tenant}\""),
                    source,
                })?;
                none.insert(bridge)
            }
        };
        let attached = bridge.attach(namespace);
        match attached {
            Ok(port) => {
                let at = (tenant.to_owned(), port);
                state.ports.insert(endpoint.to_owned(), at);
                Ok(())
            }
            Err(e) => {
                state.drop_unused(tenant);
                Err(e.into())
            }
        }
    }

    /// Takes an endpoint off its bridge: its address may be another's from now on.
    pub(crate) fn detach(&self, endpoint: &str) {
        let mut state = self.state();
        let Some((tenant, port)) = state.ports.remove(endpoint) else {
            return;
        };
        if let Some(bridge) = state.by_tenant.get_mut(&tenant) {
            // What cannot be removed goes with the program's namespace.
            let _ = bridge.detach(&port);
        }
        state.drop_unused(&tenant);
    }
}

impl State {
    /// A bridge goes with its last port.
    fn drop_unused(&mut self, tenant: &str) {
        if !self.ports.values().any(|(t, _)| t == tenant) {
            self.by_tenant.remove(tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_network_that_cannot_be_made_is_an_error_that_says_why() {
        let refuse = || Err(io::Error::other("not here"));
        let bridges = Bridges::new(Box::new(refuse));
        let any = std::fs::File::open("/").unwrap();
        let error = bridges.attach("a", "t", any.as_fd()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("\"t\"") && text.contains("not here"),
            "{text}"
        );
        bridges.detach("a");
    }
}
