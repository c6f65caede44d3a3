//! What `freeflow router` and `freeflow doctor` are told of the network between hosts: the map, and
//! certificates.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use freeflow_link::{Identity, IdentityError, Part};
use freeflow_router::{Hosts, LinkConfig};

/// What a router shows others, and whom it believes.
#[derive(Args, Clone)]
pub(crate) struct TlsArgs {
    /// This host's certificate (PEM), for its address in the network between hosts or its name in
    /// the map
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_ca"])]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Certificate of the authority that other hosts' certificates must be of (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,
}

impl TlsArgs {
    /// Reads the files, if they are given, and looks whether other hosts will believe them.
    pub(crate) fn read(&self, underlay: Option<IpAddr>, hosts: &Hosts) -> Result<Option<Identity>> {
        let (Some(cert), Some(key), Some(ca)) = (&self.tls_cert, &self.tls_key, &self.tls_ca)
        else {
            return Ok(None);
        };
        let read = |file: &Path| {
            std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
        };
        let made = Identity::from_pem(&read(cert)?, &read(key)?, &read(ca)?);
        let identity = made.map_err(|e| match e {
            IdentityError::Pem { part } => {
                let file = match part {
                    Part::Certificate => cert,
                    Part::Key => key,
                    Part::Authority => ca,
                };
                anyhow!("{} holds no {} in PEM", file.display(), part.holds())
            }
            IdentityError::WrongKey => {
                anyhow!("{} is not the key of {}", key.display(), cert.display())
            }
            e => {
                let of = format!("{}, {}, {}", cert.display(), key.display(), ca.display());
                anyhow::Error::from(e).context(of)
            }
        })?;
        if let Some(underlay) = underlay {
            let now = SystemTime::now();
            identity
                .check(hosts.name(underlay), underlay, now)
                .with_context(|| format!("{}, {}", cert.display(), ca.display()))?;
        }
        Ok(Some(identity))
    }
}

/// How a router knows others.
#[derive(Args, Clone)]
pub(crate) struct LinkArgs {
    /// TCP port of all routers' control connections
    #[arg(long, value_name = "PORT", default_value_t = freeflow_link::DEFAULT_PORT, requires = "hosts",
        value_parser = clap::value_parser!(u16).range(1..))]
    control_port: u16,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// Believe that whoever sends from a host's address is that host: for networks that nobody else
    /// is in
    #[arg(long, requires = "hosts", conflicts_with = "tls_cert")]
    insecure: bool,
}

impl LinkArgs {
    pub(crate) fn config(&self, underlay: Option<IpAddr>, hosts: &Hosts) -> Result<LinkConfig> {
        let identity = self.tls.read(underlay, hosts)?;
        if identity.is_none() && !self.insecure {
            bail!(
                "--hosts needs --tls-cert, --tls-key and --tls-ca, by which hosts know each other \
                 (`freeflow host ca` and `freeflow host cert` make them); or --insecure, if nobody \
                 else can send in the network between hosts"
            );
        }
        Ok(LinkConfig {
            port: self.control_port,
            identity,
        })
    }
}

/// Reads the map of hosts, for one with an address in the network between them.
pub(crate) fn read_hosts(file: &Path, underlay: Option<IpAddr>) -> Result<Hosts> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read the hosts in {}", file.display()))?;
    let read = Hosts::parse(&text).and_then(|hosts| match underlay {
        Some(underlay) => hosts.check_reach(underlay).map(|()| hosts),
        None => Ok(hosts),
    });
    read.with_context(|| format!("{}", file.display()))
}
