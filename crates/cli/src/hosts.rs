//! `freeflow host`: certificates for hosts, and how other hosts' routers are reached.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use clap::builder::RangedI64ValueParser;
use freeflow_api::RuntimeDir;
use freeflow_link::pki::{Authority, MAX_DAYS, Validity};

use crate::client::Client;
use crate::{Output, OutputArgs, show};

const CA_CERT: &str = "ca.pem";
const CA_KEY: &str = "ca.key";

#[derive(Subcommand)]
pub(crate) enum HostCommand {
    /// List the other hosts of the router's map, and the links to their routers
    Ls(OutputArgs),
    /// Make an authority that signs hosts' certificates: ca.pem, which every host gets, and ca.key,
    /// which stays where it is
    Ca {
        /// Directory of the authority
        #[arg(value_name = "DIR", default_value = "freeflow-ca")]
        dir: PathBuf,
        /// How long it is good, and all certificates of it
        #[arg(long, value_name = "DAYS", default_value_t = 3650, value_parser = days())]
        days: u32,
    },
    /// Make one host's certificate and key, NAME.pem and NAME.key, or new ones in their place
    Cert {
        /// The host's address in the network between hosts, or the name that the map has in front
        /// of it. Several names are of the same host: they make one certificate, in files called
        /// after the first
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
        /// Directory of the authority
        #[arg(long, value_name = "DIR", default_value = "freeflow-ca")]
        ca: PathBuf,
        /// Directory for the files [default: that of the authority]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// How long it is good; not longer than the authority
        #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = days())]
        days: u32,
    },
}

fn days() -> RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=MAX_DAYS.into())
}

pub(crate) fn host(dir: &RuntimeDir, command: &HostCommand) -> Result<ExitCode> {
    match command {
        HostCommand::Ls(args) => list(dir, args.output)?,
        HostCommand::Ca { dir, days } => make_authority(dir, *days)?,
        HostCommand::Cert {
            names,
            ca,
            out,
            days,
        } => make_certificate(names, ca, out.as_deref().unwrap_or(ca), *days)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn list(dir: &RuntimeDir, output: Output) -> Result<()> {
    let fabric = Client::connect(dir)?.status()?.fabric;
    let links = fabric.map(|fabric| fabric.links).unwrap_or_default();
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&links)?),
        Output::Text => show::print_links(&links),
    }
    Ok(())
}

fn make_authority(dir: &Path, days: u32) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let (cert, key) = (dir.join(CA_CERT), dir.join(CA_KEY));
    if let Some(there) = [&cert, &key].into_iter().find(|file| file.exists()) {
        bail!(
            "{} is there already: the certificates of an authority are worth nothing without it; \
             choose another directory",
            there.display()
        );
    }
    let made = Authority::generate(Validity::days(days))?;
    write(&key, &made.key, 0o600)?;
    write(&cert, &made.cert, 0o644)?;
    println!("{} {}", cert.display(), key.display());
    Ok(())
}

fn make_certificate(names: &[String], ca: &Path, out: &Path, days: u32) -> Result<()> {
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let first = names.first().copied().unwrap_or_default();
    let authority = Authority::load(&read(&ca.join(CA_CERT))?, &read(&ca.join(CA_KEY))?)
        .with_context(|| format!("{}", ca.display()))?;
    let made = authority.issue(&names, Validity::days(days))?;
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let is_authority = out.canonicalize()? == ca.canonicalize()?;
    if is_authority && format!("{first}.pem") == CA_CERT {
        bail!(
            "{} is the authority's: name another directory for the host's with --out",
            out.join(CA_CERT).display()
        );
    }
    let cert = out.join(format!("{first}.pem"));
    let key = out.join(format!("{first}.key"));
    write(&key, &made.key, 0o600)?;
    write(&cert, &made.cert, 0o644)?;
    println!("{} {}", cert.display(), key.display());
    Ok(())
}

fn read(file: &Path) -> Result<String> {
    let hint = "an authority is made by `freeflow host ca`";
    std::fs::read_to_string(file)
        .with_context(|| format!("cannot read {} ({hint})", file.display()))
}

/// Puts a file in the place of another, which is there until the new one is whole.
fn write(file: &Path, text: &str, mode: u32) -> Result<()> {
    let context = || format!("cannot write {}", file.display());
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = file.with_file_name(name);
    // One that an earlier try has left may be readable by others.
    let _ = std::fs::remove_file(&new);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(mode);
    let mut opened = options.open(&new).with_context(context)?;
    opened
        .write_all(text.as_bytes())
        .and_then(|()| opened.sync_all())
        .and_then(|()| std::fs::rename(&new, file))
        .with_context(context)
}
