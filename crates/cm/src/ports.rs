//! Port numbers: which ids of an endpoint have them.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use freeflow_session::{Handle, PortSpace};
use serde::{Deserialize, Serialize};

use crate::error::Refused;
use crate::id::{Id, IdState, is_any};

/// First and last number that is given to who asks for any (Linux: `ip_local_port_range`).
const EPHEMERAL: (u16, u16) = (32_768, 60_999);

/// Numbers that are tried for who asks for any: where not even one of a hundred is free, that
/// finds one almost always, and if there is none nobody looks at all of them.
const TRIES: u32 = 1024;

/// Ids that may have a number together.
const MAX_OWNERS: usize = 64;

/// Endpoint, port space, number.
type Key = (u32, u16, u16);

/// Owners of port numbers, by id.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Ports {
    owners: BTreeMap<Key, Vec<u32>>,
    /// What was given last, and is not given again at once.
    last: u16,
}

fn key(id: &Id, number: u16) -> Key {
    (id.endpoint.0, id.space as u16, number)
}

impl Ports {
    /// The ids that have a port.
    pub(crate) fn owners(&self, endpoint: Handle, space: PortSpace, number: u16) -> &[u32] {
        let owners = self.owners.get(&(endpoint.0, space as u16, number));
        owners.map_or(&[], Vec::as_slice)
    }

    /// Gives a port to an id, which has its address already; its number is 0 if it wants any.
    pub(crate) fn bind(
        &mut self,
        ids: &BTreeMap<u32, Id>,
        name: u32,
        id: &mut Id,
    ) -> Result<(), Refused> {
        let number = match id.src.port() {
            0 => self.any(ids, id)?,
            number => {
                let owners = self.owners(id.endpoint, id.space, number);
                if owners.len() >= MAX_OWNERS {
                    return Err(Refused::AddressNotAvailable);
                }
                check(ids, owners, name, id, id.reuse)?;
                number
            }
        };
        id.src.set_port(number);
        id.owns_port = true;
        self.owners.entry(key(id, number)).or_default().push(name);
        Ok(())
    }

    /// A number that can be told from all others' in use.
    fn any(&mut self, ids: &BTreeMap<u32, Id>, id: &Id) -> Result<u16, Refused> {
        let (low, high) = EPHEMERAL;
        let count = u32::from(high - low) + 1;
        let first = (id.entropy >> 16) as u32 % count;
        // A step that has no divisor in common with the count visits each number once.
        let step = 8_191;
        let numbers = (0..TRIES).map(|n| low + ((first + n * step) % count) as u16);
        for number in numbers {
            let owners = self.owners(id.endpoint, id.space, number);
            if number != self.last
                && owners.len() < MAX_OWNERS
                && owners
                    .iter()
                    .all(|o| ids.get(o).is_none_or(|o| apart(o, id)))
            {
                self.last = number;
                return Ok(number);
            }
        }
        Err(Refused::AddressNotAvailable)
    }

    /// Whether an id that has its port may listen there.
    pub(crate) fn may_listen(
        &self,
        ids: &BTreeMap<u32, Id>,
        name: u32,
        id: &Id,
    ) -> Result<(), Refused> {
        let owners = self.owners(id.endpoint, id.space, id.src.port());
        check(ids, owners, name, id, false)
    }

    pub(crate) fn release(&mut self, name: u32, id: &Id) {
        let key = key(id, id.src.port());
        if id.owns_port
            && let Some(owners) = self.owners.get_mut(&key)
        {
            owners.retain(|&owner| owner != name);
            if owners.is_empty() {
                self.owners.remove(&key);
            }
        }
    }
}

/// Whether connections of two ids can be told apart that have the same port.
fn apart(a: &Id, b: &Id) -> bool {
    let port = |addr: Option<SocketAddr>| addr.map_or(0, |addr| addr.port());
    let (to_a, to_b) = (port(a.dst), port(b.dst));
    if to_a != 0 && to_b != 0 && to_a != to_b {
        return true;
    }
    let differ =
        |a: SocketAddr, b: SocketAddr| !is_any(a.ip()) && !is_any(b.ip()) && a.ip() != b.ip();
    differ(a.src, b.src) || a.dst.zip(b.dst).is_some_and(|(a, b)| differ(a, b))
}

fn check(
    ids: &BTreeMap<u32, Id>,
    owners: &[u32],
    name: u32,
    id: &Id,
    reuse: bool,
) -> Result<(), Refused> {
    let others = owners.iter().filter(|&&owner| owner != name);
    for other in others.filter_map(|owner| ids.get(owner)) {
        if other.state != IdState::Listening && reuse && other.reuse {
            continue;
        }
        let (own, others) = (id.src.ip(), other.src.ip());
        if id.afonly && other.afonly && own.is_ipv4() != others.is_ipv4() {
            continue;
        }
        if is_any(own) || is_any(others) {
            return Err(Refused::AddressNotAvailable);
        }
        if own == others {
            return Err(Refused::AddressInUse);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use freeflow_types::QpType;

    #[derive(Default)]
    struct Host {
        ports: Ports,
        ids: BTreeMap<u32, Id>,
        names: u32,
    }

    impl Host {
        fn bind(&mut self, addr: &str, space: PortSpace, reuse: bool) -> Result<u32, Refused> {
            self.names += 1;
            let name = self.names;
            let entropy = u64::from(name) << 20;
            let mut id = Id::new(Handle(1), space, QpType::Rc, entropy);
            id.src = addr.parse().unwrap();
            (id.reuse, id.afonly) = (reuse, id.src.is_ipv4());
            id.state = IdState::Bound;
            self.ports.bind(&self.ids, name, &mut id)?;
            self.ids.insert(name, id);
            Ok(name)
        }

        fn listen(&mut self, name: u32) -> Result<(), Refused> {
            self.ports.may_listen(&self.ids, name, &self.ids[&name])?;
            self.ids.get_mut(&name).unwrap().state = IdState::Listening;
            Ok(())
        }
    }

    #[test]
    fn a_port_has_one_owner_for_each_address_and_space() {
        let mut host = Host::default();
        let tcp = PortSpace::Tcp;
        host.bind("10.0.0.1:7", tcp, false).unwrap();
        let again = host.bind("10.0.0.1:7", tcp, false);
        assert_eq!(again, Err(Refused::AddressInUse));
        // A wildcard counts for all addresses of its family, and one of IPv6 for both.
        for any in ["0.0.0.0:7", "[::]:7"] {
            let refused = host.bind(any, tcp, false);
            assert_eq!(refused, Err(Refused::AddressNotAvailable), "{any}");
        }
        host.bind("10.0.0.2:7", tcp, false).unwrap();
        host.bind("10.0.0.1:7", PortSpace::Udp, false).unwrap();
        host.bind("10.0.0.1:8", tcp, false).unwrap();
    }

    #[test]
    fn who_reuses_may_bind_but_one_alone_listens() {
        let mut host = Host::default();
        let a = host.bind("10.0.0.1:7", PortSpace::Tcp, true).unwrap();
        let b = host.bind("10.0.0.1:7", PortSpace::Tcp, true).unwrap();
        assert_eq!(host.listen(b), Err(Refused::AddressInUse));
        let gone = host.ids.remove(&a).unwrap();
        host.ports.release(a, &gone);
        host.listen(b).unwrap();
        let late = host.bind("10.0.0.1:7", PortSpace::Tcp, true);
        assert_eq!(late, Err(Refused::AddressInUse));
    }

    #[test]
    fn any_port_is_one_that_nobody_has() {
        let mut host = Host::default();
        let name = host.bind("0.0.0.0:0", PortSpace::Tcp, false).unwrap();
        let first = host.ids[&name].src.port();
        assert!((32_768..=60_999).contains(&first));
        let all: std::collections::BTreeSet<_> = (0..500)
            .map(|_| {
                let name = host.bind("0.0.0.0:0", PortSpace::Tcp, false).unwrap();
                host.ids[&name].src.port()
            })
            .collect();
        assert_eq!(all.len(), 500);
        assert!(!all.contains(&first));
    }
}
