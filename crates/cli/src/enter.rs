//! Inside of `freeflow run`: the view of the system that programs expect, then the program.
//!
//! In a mount namespace of its own, `/dev/infiniband/uverbs0` is a character device and
//! `/sys/class/infiniband` shows the device. Both directories get a fresh tmpfs with everything
//! bound into it that was there before. Whatever of this the system refuses is left out: the
//! network library itself needs none of it. A private network, on the other hand, is there or the
//! program is not run.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use freeflow_api::{Operation, RuntimeDir};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive,
    mount_change, mount_move, unmount,
};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use rustix::thread::UnshareFlags;

use crate::client::Client;
use crate::sysfs::{self, UVERBS};
use crate::{EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, inject, namespaces};

#[derive(Args)]
pub(crate) struct EnterArgs {
    /// The tree that looks like /sys/class
    #[arg(long)]
    sysfs: PathBuf,
    /// The endpoint, if it has a private network
    #[arg(long, requires = "ip")]
    private: Option<String>,
    /// The address in the private network
    #[arg(long)]
    ip: Option<IpAddr>,
    /// Say what is not possible
    #[arg(short, long)]
    verbose: bool,
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Prepares, and becomes the program.
pub(crate) fn enter(dir: &RuntimeDir, args: &EnterArgs) -> Result<ExitCode> {
    let parent = getppid();
    let here = std::env::current_dir();
    let mounts = match (&args.private, args.ip) {
        (Some(endpoint), Some(ip)) => {
            private_network(dir, endpoint, ip).context("no private network")?;
            Ok(())
        }
        _ => namespaces::separate(UnshareFlags::NEWNS),
    };
    let arranged = mounts.and_then(|()| arrange(&args.sysfs, args.private.is_some()));
    if let Err(e) = arranged
        && args.verbose
    {
        eprintln!("freeflow: not all of /dev/infiniband and /sys is there for the program: {e:#}");
    }
    if let Ok(here) = here {
        // The same directory, but seen through the new mounts.
        let _ = std::env::set_current_dir(here);
    }
    // Without `freeflow run` there is no endpoint.
    set_parent_process_death_signal(Some(Signal::TERM)).context("cannot watch freeflow run")?;
    if getppid() != parent {
        bail!("freeflow run is gone");
    }
    let program = &args.command[0];
    let error = Command::new(program).args(&args.command[1..]).exec();
    let missing = error.kind() == ErrorKind::NotFound;
    let there = inject::resolve(program).is_some();
    let why = if missing && there {
        "the interpreter or loader that it names does not exist".to_owned()
    } else {
        error.to_string()
    };
    eprintln!("freeflow: cannot run {}: {why}", program.display());
    Ok(if missing && !there {
        EXIT_NOT_FOUND.into()
    } else {
        EXIT_NOT_EXECUTABLE.into()
    })
}

/// Enters a network namespace that has the endpoint's address, and a mount namespace.
fn private_network(dir: &RuntimeDir, endpoint: &str, ip: IpAddr) -> Result<()> {
    // While the router's user is seen as what it is.
    let router = Client::connect(dir)?;
    namespaces::separate(UnshareFlags::NEWNS | UnshareFlags::NEWNET)?;
    let attach = Operation::AttachNetwork {
        name: endpoint.to_owned(),
    };
    router.tell(attach, &[namespaces::own_network()?.as_fd()])?;
    Ok(freeflow_network::configure(ip)?)
}

/// Shows the device in a new mount namespace.
pub(crate) fn arrange(tree: &Path, private_network: bool) -> Result<()> {
    let private = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", private).context("cannot separate mounts")?;
    let stage = tree.join(sysfs::STAGE);
    overlay(Path::new("/dev"), &stage, &[], |new| {
        let dir = new.join("infiniband");
        if !dir.exists() {
            std::fs::create_dir(&dir)?;
            let node = dir.join(UVERBS);
            std::fs::write(&node, "")?;
            mount_bind_recursive("/dev/null", &node)?;
        }
        Ok(())
    })
    .context("/dev")?;
    let ours = ["infiniband", "infiniband_verbs"];
    overlay(Path::new("/sys/class"), &stage, &ours, |new| {
        for class in ours {
            let dir = new.join(class);
            std::fs::create_dir(&dir)?;
            mount_bind_recursive(tree.join(class), &dir)?;
        }
        Ok(())
    })
    .context("/sys/class")?;
    if private_network {
        show_interfaces(&stage).context("/sys/class/net shows another network")?;
    }
    Ok(())
}

/// Has `/sys` show the interfaces of this network namespace. They are virtual: all of them lie
/// in two directories.
fn show_interfaces(stage: &Path) -> Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("freeflow", stage, "sysfs", flags, None).context("no sysfs")?;
    let shown = ["class/net", "devices/virtual/net"]
        .into_iter()
        .try_for_each(|dir| mount_bind(stage.join(dir), Path::new("/sys").join(dir)).context(dir));
    let _ = unmount(stage, UnmountFlags::DETACH);
    shown
}

/// Replaces a directory by a tmpfs that shows all that was in it except `but`, and more.
fn overlay(
    dir: &Path,
    stage: &Path,
    but: &[&str],
    more: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    mount("freeflow", stage, "tmpfs", MountFlags::NOSUID, c"mode=0755").context("no tmpfs")?;
    let built = fill(dir, stage, but)
        .and_then(|()| more(stage))
        .and_then(|()| mount_move(stage, dir).context("cannot put it in place"));
    if built.is_err() {
        let _ = unmount(stage, UnmountFlags::DETACH);
    }
    built
}

fn fill(dir: &Path, new: &Path, but: &[&str]) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if but.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        let to = new.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(entry.path())?, &to)?;
            continue;
        }
        if kind.is_dir() {
            std::fs::create_dir(&to)?;
        } else {
            std::fs::write(&to, "")?;
        }
        mount_bind_recursive(entry.path(), &to)
            .with_context(|| format!("cannot show {}", entry.path().display()))?;
    }
    Ok(())
}
