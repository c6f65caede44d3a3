//! Which host has an endpoint: the map that routers carry traffic by.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use freeflow_types::{Gid, VirtualIp};

/// Bits of a GID.
const GID_BITS: u8 = 128;
/// Bits in front of an IPv4 address in its GID.
const V4_PREFIX: u8 = 96;

/// Why a text is no map of hosts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub struct HostsError {
    line: usize,
    what: String,
}

/// The longest name of a tenant.
const MAX_TENANT_BYTES: usize = u8::MAX as usize;

const FORM: &str = "each line is TENANT ADDRESS[/BITS] [NAME@]HOST, as in \"default 10.77.2.0/24 \
                    192.0.2.2\"";

/// The hosts of endpoints: of single addresses or of whole networks, the longest prefix first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts {
    tenants: HashMap<String, Tenant>,
    /// Lengths of prefixes that there are.
    lengths: BTreeSet<u8>,
    routers: BTreeMap<IpAddr, Host>,
}

/// What is known of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Host {
    /// The name that its certificate is for, if that is not for its address.
    name: Option<String>,
    /// The first line that names it.
    line: usize,
}

/// Where a tenant's endpoints are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tenant {
    by_prefix: HashMap<(u8, u128), IpAddr>,
    routers: BTreeSet<IpAddr>,
}

/// Whether a tenant may be called so: the map holds the name as a word, and messages between hosts
/// its length as a byte.
pub(crate) fn is_tenant(name: &str) -> bool {
    let bad = |c: char| c.is_whitespace() || c.is_control() || c == '#';
    !name.is_empty() && name.len() <= MAX_TENANT_BYTES && !name.contains(bad)
}

impl Hosts {
    /// Reads a map: a line for each address or network, with its tenant, and the host's address in
    /// the network between hosts, in front of which may be the name in its certificate and `@`. `#`
    /// begins a remark.
    pub fn parse(text: &str) -> Result<Self, HostsError> {
        let mut hosts = Hosts::default();
        for (at, line) in text.lines().enumerate() {
            let fields = line.split('#').next().unwrap_or_default();
            let fields: Vec<_> = fields.split_whitespace().collect();
            let error = |what: String| HostsError {
                line: at + 1,
                what: format!("{what}; {FORM}"),
            };
            match fields[..] {
                [] => {}
                [tenant, ..] if !is_tenant(tenant) => {
                    let what = format!("{tenant:?} is no name for a tenant");
                    return Err(error(what));
                }
                [tenant, network, host] => {
                    let (name, address) = match host.split_once('@') {
                        Some((name, address)) => (Some(name), address),
                        None => (None, host),
                    };
                    let address = address
                        .parse()
                        .map_err(|_| error(format!("\"{host}\" is not an address of a host")))?;
                    if let Some(name) = name.filter(|name| !freeflow_link::is_host_name(name)) {
                        let what = format!("\"{name}\" in \"{host}\" is no DNS name");
                        return Err(error(what));
                    }
                    hosts
                        .add(tenant, network, address)
                        .ok_or_else(|| error(format!("\"{network}\" is no address or network")))?;
                    let line = at + 1;
                    let new = Host { name: None, line };
                    hosts.routers.entry(address).or_insert(new);
                    hosts.call(address, name).map_err(|before| {
                        error(format!("host {address} has another name before, {before}"))
                    })?;
                }
                _ => return Err(error(format!("{} words", fields.len()))),
            }
        }
        Ok(hosts)
    }

    fn add(&mut self, tenant: &str, network: &str, host: IpAddr) -> Option<()> {
        let (address, bits) = match network.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u8>().ok()?)),
            None => (network, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let before = if address.is_ipv4() { V4_PREFIX } else { 0 };
        let bits = match bits {
            Some(bits) => before.checked_add(bits).filter(|&b| b <= GID_BITS)?,
            None => GID_BITS,
        };
        let gid = Gid::from(VirtualIp(address));
        self.lengths.insert(bits);
        let tenant = self.tenants.entry(tenant.to_owned()).or_default();
        tenant.by_prefix.insert((bits, masked(gid, bits)), host);
        tenant.routers.insert(host);
        Some(())
    }

    /// Gives a host a name, if it has no other.
    fn call(&mut self, host: IpAddr, name: Option<&str>) -> Result<(), String> {
        let (Some(name), Some(known)) = (name, self.routers.get_mut(&host)) else {
            return Ok(());
        };
        let known = known.name.get_or_insert_with(|| name.to_owned());
        if known == name {
            Ok(())
        } else {
            Err(known.clone())
        }
    }

    /// The name in a host's certificate, if that is not its address.
    pub fn name(&self, host: IpAddr) -> Option<&str> {
        self.routers.get(&host)?.name.as_deref()
    }

    /// Whether a host can reach the others from its address: an error tells of one with an address of
    /// the other family.
    pub fn check_reach(&self, local: IpAddr) -> Result<(), HostsError> {
        let mut all = self.routers.iter();
        match all.find(|(host, _)| host.is_ipv4() != local.is_ipv4()) {
            Some((host, &Host { line, .. })) => Err(HostsError {
                line,
                what: format!(
                    "host {host} cannot be reached from this one's address, {local}: all hosts need \
                     addresses of one family"
                ),
            }),
            None => Ok(()),
        }
    }

    /// The host that has an endpoint of a tenant.
    pub(crate) fn find(&self, tenant: &str, gid: Gid) -> Option<IpAddr> {
        let by_prefix = &self.tenants.get(tenant)?.by_prefix;
        let mut longest_first = self.lengths.iter().rev();
        longest_first.find_map(|&bits| by_prefix.get(&(bits, masked(gid, bits))).copied())
    }

    /// The hosts that may have endpoints of a tenant.
    pub(crate) fn of_tenant(&self, tenant: &str) -> impl Iterator<Item = IpAddr> {
        let tenant = self.tenants.get(tenant);
        tenant.into_iter().flat_map(|t| t.routers.iter().copied())
    }

    /// The hosts there are.
    pub(crate) fn routers(&self) -> impl Iterator<Item = IpAddr> {
        self.routers.keys().copied()
    }
}

fn masked(gid: Gid, bits: u8) -> u128 {
    let shift = u32::from(GID_BITS - bits);
    let mask = u128::MAX.checked_shl(shift).unwrap_or(0);
    u128::from_be_bytes(gid.0) & mask
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(ip: &str) -> Gid {
        Gid::from(VirtualIp(ip.parse().unwrap()))
    }

    #[test]
    fn the_longest_prefix_of_the_tenant_counts() {
        let text = "
            # who is where
            default 10.77.0.0/16 192.0.2.1
            default 10.77.2.0/24 192.0.2.2   # a rack
            default 10.77.2.9    192.0.2.3
            other   10.77.2.9    192.0.2.4
            other   fd00::/64    2001:db8::1
            all     ::/0         192.0.2.9
        ";
        let hosts = Hosts::parse(text).unwrap();
        let find = |tenant, ip| hosts.find(tenant, gid(ip)).map(|h| h.to_string());
        assert_eq!(find("default", "10.77.1.1").as_deref(), Some("192.0.2.1"));
        assert_eq!(find("default", "10.77.2.1").as_deref(), Some("192.0.2.2"));
        assert_eq!(find("default", "10.77.2.9").as_deref(), Some("192.0.2.3"));
        assert_eq!(find("other", "10.77.2.9").as_deref(), Some("192.0.2.4"));
        assert_eq!(find("other", "fd00::7").as_deref(), Some("2001:db8::1"));
        assert_eq!(find("all", "10.0.0.1").as_deref(), Some("192.0.2.9"));
        assert_eq!(find("default", "10.78.0.1"), None);
        assert_eq!(find("nobody", "10.77.2.9"), None);
        assert_eq!(hosts.routers().count(), 6);
        let of = |hosts: &Hosts, tenant: &str| hosts.of_tenant(tenant).count();
        assert_eq!(of(&hosts, "default"), 3);
        assert_eq!((of(&hosts, "all"), of(&hosts, "nobody")), (1, 0));
    }

    #[test]
    fn hosts_may_have_names() {
        let text = "
            a 10.0.1.0/24 node1@192.0.2.1
            b 10.0.1.0/24 192.0.2.1
            a 10.0.2.0/24 192.0.2.2
        ";
        let hosts = Hosts::parse(text).unwrap();
        let name = |ip: &str| hosts.name(ip.parse().unwrap());
        assert_eq!(
            (name("192.0.2.1"), name("192.0.2.2")),
            (Some("node1"), None)
        );
        let found = hosts.find("a", gid("10.0.1.7"));
        assert_eq!(found, Some("192.0.2.1".parse().unwrap()));
    }

    #[test]
    fn hosts_reach_each_other_by_addresses_of_one_family() {
        let text = "a 10.0.1.0/24 192.0.2.1\na fd00::/64 192.0.2.2\n";
        let local = "192.0.2.1".parse().unwrap();
        Hosts::parse(text).unwrap().check_reach(local).unwrap();
        let mixed = format!("{text}\na 10.0.3.0/24 2001:db8::3");
        let mixed = Hosts::parse(&mixed).unwrap();
        for (local, line, said) in [
            ("192.0.2.1", 4, "host 2001:db8::3 "),
            ("2001:db8::3", 1, "host 192.0.2.1 "),
        ] {
            let error = mixed.check_reach(local.parse().unwrap()).unwrap_err();
            assert_eq!(error.line, line, "{error}");
            assert!(error.to_string().contains(said), "{error}");
        }
    }

    #[test]
    fn tenants_are_words_of_the_map() {
        let (longest, longer) = ("\u{e9}".repeat(127) + "x", "x".repeat(256));
        for good in ["default", "a/b", "\u{e9}t\u{e9}", "t-1", &longest] {
            assert!(is_tenant(good), "{good}");
            let map = format!("{good} 10.0.0.0/8 192.0.2.1");
            let gid = VirtualIp([10, 0, 0, 1].into()).into();
            assert!(Hosts::parse(&map).unwrap().find(good, gid).is_some());
        }
        for bad in ["", "a b", "\n", "#", "a#b", "\u{a0}", "\u{1b}", &longer] {
            assert!(!is_tenant(bad), "{bad:?}");
        }
        for bad in ["a\u{1b}", &longer] {
            let map = format!("{bad} 10.0.0.0/8 192.0.2.1");
            assert!(Hosts::parse(&map).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_no_map_is_told_with_its_line() {
        for (text, line, said) in [
            ("default 10.0.0.1", 1, "2 words"),
            ("\ndefault 10.0.0.1/33 192.0.2.1", 2, "10.0.0.1/33"),
            ("default 10.0.0.1 host", 1, "\"host\""),
            ("default 10.0.0.1 host@", 1, "\"host@\""),
            (
                "a 10.0.0.1 192.0.2.2\na 10.0.0.2 bad..name@192.0.2.1",
                2,
                "\"bad..name@192.0.2.1\"",
            ),
            ("a 10.0.0.1 @192.0.2.1", 1, "\"@192.0.2.1\""),
            (
                "a 10.0.0.1 x@192.0.2.1\nb 10.0.0.1 y@192.0.2.1",
                2,
                "another name",
            ),
            ("default here 192.0.2.1", 1, "\"here\""),
        ] {
            let error = Hosts::parse(text).unwrap_err();
            assert_eq!(error.line, line, "{error}");
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}
