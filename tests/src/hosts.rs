//! Two hosts with a link between them: each is a network namespace with a router.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::bed::{Host, pair};

use crate::{
    Bed, DEADLINE, Ended, Running, TcpPair, dist, free_port, program, skip, wait_for_listener_with,
};

/// By which of their addresses the routers of two hosts reach each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Underlay {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Underlay {
    /// Addresses of the hosts.
    pub fn addresses(self) -> [&'static str; 2] {
        match self {
            Underlay::V4 => Hosts::ADDRESSES,
            Underlay::V6 => ["2001:db8::1", "2001:db8::2"],
        }
    }
}

/// Two hosts whose routers carry traffic between them.
pub struct Hosts {
    beds: [Bed; 2],
    net: TcpPair,
    dir: TempDir,
}

/// How hosts know each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// By certificates of one authority.
    Certificates,
    /// By certificates, each of an authority of its own: they do not believe each other.
    Strangers,
    /// By their addresses alone.
    Addresses,
}

impl Hosts {
    /// IPv4 addresses of the hosts.
    pub const ADDRESSES: [&'static str; 2] = ["192.0.2.1", "192.0.2.2"];

    /// Whether this machine can have them; says loudly if not.
    pub fn can(test: &str) -> bool {
        for needed in ["unshare", "nsenter", "ip", "ss"] {
            if program(needed).is_none() {
                skip(test, &format!("{needed} is not installed"));
                return false;
            }
        }
        match TcpPair::new(1500) {
            Ok(_) => true,
            Err(e) => {
                skip(test, &format!("no two network namespaces: {e:#}"));
                false
            }
        }
    }

    /// Starts them, with a link that carries IP packets of so many bytes. Endpoints of `default`
    /// and of `other` on each are known to the other.
    pub fn new(mtu: u32) -> Result<Hosts> {
        Self::with(mtu, &[])
    }

    /// As [`Self::new`], with more arguments for both routers.
    pub fn with(mtu: u32, router: &[&str]) -> Result<Hosts> {
        Self::over(Underlay::V4, mtu, router)
    }

    /// As [`Self::with`], with routers that reach each other by these addresses. Programs bootstrap
    /// over IPv4.
    pub fn over(underlay: Underlay, mtu: u32, router: &[&str]) -> Result<Hosts> {
        let hosts = Self::start_routers(underlay, mtu, Trust::Certificates, router)?;
        hosts.wait_for_links()?;
        Ok(hosts)
    }

    /// As [`Self::with`], but the hosts may not know each other, or not yet.
    pub fn apart(mtu: u32, trust: Trust, router: &[&str]) -> Result<Hosts> {
        Self::start_routers(Underlay::V4, mtu, trust, router)
    }

    fn start_routers(underlay: Underlay, mtu: u32, trust: Trust, router: &[&str]) -> Result<Hosts> {
        let net = TcpPair::new(mtu)?;
        let addresses = underlay.addresses();
        if underlay == Underlay::V6 {
            for (n, address) in addresses.iter().enumerate() {
                net.shell(n, &format!("ip addr add {address}/64 dev ff{n} nodad"))?;
            }
        }
        let dir = tempfile::Builder::new()
            .prefix("ffhosts")
            .tempdir_in("/tmp")?;
        let map = dir.path().join("hosts");
        let lines: String = ["default", "other"]
            .into_iter()
            .flat_map(|tenant| {
                addresses
                    .into_iter()
                    .enumerate()
                    .map(move |(n, host)| format!("{tenant} 10.{}.0.0/16 {host}\n", NETWORKS[n]))
            })
            .collect();
        std::fs::write(&map, lines)?;
        let map = map.to_str().context("a path that is no text")?;
        let bed = |n: usize| {
            let address = addresses[n];
            let own = ["--underlay", address, "--hosts", map];
            let authority = match trust {
                Trust::Certificates => Some(dir.path().join("ca")),
                Trust::Strangers => Some(dir.path().join(format!("ca{n}"))),
                Trust::Addresses => None,
            };
            let known = match authority {
                Some(ca) => certify(&ca, address)?,
                None => vec!["--insecure".to_owned()],
            };
            let known: Vec<_> = known.iter().map(String::as_str).collect();
            let args = own.iter().chain(&known).chain(router);
            let host = Host {
                place: net.place(n),
                router: args.map(|&arg| arg.to_owned()).collect(),
                network: [10, NETWORKS[n]],
            };
            Bed::at(host, &[])
        };
        Ok(Hosts {
            beds: [bed(0)?, bed(1)?],
            net,
            dir,
        })
    }

    /// Waits until the routers know each other.
    pub fn wait_for_links(&self) -> Result<()> {
        for bed in &self.beds {
            bed.wait_for_status(
                |status| status["fabric"]["links"][0]["up"] == true,
                DEADLINE,
            )?;
        }
        Ok(())
    }

    /// The link of a host's router to the other one, as its status has it.
    pub fn link(&self, host: usize) -> Result<serde_json::Value> {
        Ok(self.beds[host].status()?["fabric"]["links"][0].clone())
    }

    /// The hosts' own files: the map, and of each authority a directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A host's router.
    pub fn bed(&self, host: usize) -> &Bed {
        &self.beds[host]
    }

    /// A host's router.
    pub fn bed_mut(&mut self, host: usize) -> &mut Bed {
        &mut self.beds[host]
    }

    /// A command on a host.
    pub fn command(&self, host: usize, program: &str, args: &[&str]) -> Command {
        self.net.command(host, program, args)
    }

    /// Runs a shell's script on a host; it must end well.
    pub fn shell(&self, host: usize, script: &str) -> Result<Ended> {
        self.net.shell(host, script)
    }

    /// Has both hosts' kernels take trains of packets apart before they are on the link: what is
    /// lost from now on is a packet, as on a wire, and not up to 64 KiB of packets at once.
    pub fn send_apart(&self) -> Result<()> {
        for host in [0, 1] {
            self.shell(host, &format!("ip link set ff{host} gso_max_segs 1"))?;
        }
        Ok(())
    }

    /// Has a host drop so many of a thousand of the RoCEv2 packets, or trains of packets (see
    /// [`Self::send_apart`]), that come to it.
    pub fn lose(&self, host: usize, of_1000: u32) -> Result<()> {
        // A number is always below 1000, which nft does not want to be asked.
        let which = match of_1000 {
            1000.. => String::new(),
            _ => format!("numgen random mod 1000 '<' {of_1000}"),
        };
        let script = format!(
            "nft add table inet loss && nft add chain inet loss input \
             '{{ type filter hook input priority 0; }}' && nft add rule inet loss input \
             udp dport 4791 {which} counter drop"
        );
        self.shell(host, &script).map(drop)
    }

    /// RoCEv2 packets that [`Self::lose`] has dropped at a host.
    pub fn lost(&self, host: usize) -> Result<u64> {
        let said = self.shell(host, "nft -j list table inet loss")?.stdout;
        let rules: serde_json::Value = serde_json::from_str(&said)?;
        let of = |object: &serde_json::Value| {
            let parts = object["rule"]["expr"].as_array()?;
            parts.iter().find_map(|p| p["counter"]["packets"].as_u64())
        };
        let all = rules["nftables"].as_array().context("nft lists nothing")?;
        all.iter().find_map(of).context("no counter")
    }

    /// Runs a program that bootstraps over TCP with its server on the first host, its client on
    /// the second, as [`Bed::pair`] does.
    pub fn pair(&self, program: &str, args: &[&str]) -> Result<(Ended, Ended)> {
        let port = free_port();
        let ends = [&self.beds[0].endpoint(), &self.beds[1].endpoint()];
        pair(ends, program, args, port, Self::ADDRESSES[0], |serving| {
            wait_for_listener_with(serving, port, DEADLINE)
        })
    }

    /// Starts both sides of such a program, and leaves them.
    pub fn start(&self, program: &str, args: &[&str]) -> Result<(Running, Running)> {
        let port = free_port();
        let text = port.to_string();
        let mut all = args.to_vec();
        all.extend(["-p", &text]);
        let mut server = self.beds[0].endpoint().start(program, &all)?;
        if !wait_for_listener_with(&mut server, port, DEADLINE) {
            anyhow::bail!("the server does not listen: {}", server.wait(DEADLINE)?);
        }
        all.push(Self::ADDRESSES[0]);
        Ok((server, self.beds[1].endpoint().start(program, &all)?))
    }
}

/// Makes a certificate for a host, and first its authority if that is not there yet: the router's
/// arguments.
fn certify(ca: &Path, address: &str) -> Result<Vec<String>> {
    let command = |args: &[&str]| {
        let mut command = Command::new(dist().join("bin/freeflow"));
        command.arg("host").args(args);
        Running::start(&mut command)?.wait(DEADLINE)?.success()
    };
    let dir = ca.to_str().context("a path that is no text")?;
    if !ca.exists() {
        command(&["ca", dir])?;
    }
    command(&["cert", address, "--ca", dir])?;
    let file = |name: &str| format!("{dir}/{name}");
    Ok(vec![
        "--tls-ca".to_owned(),
        file("ca.pem"),
        "--tls-cert".to_owned(),
        file(&format!("{address}.pem")),
        "--tls-key".to_owned(),
        file(&format!("{address}.key")),
    ])
}

/// Second bytes of the addresses of the hosts' endpoints.
const NETWORKS: [u8; 2] = [81, 82];
