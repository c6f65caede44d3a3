//! Inside of `freeflow run`: the view of the system that programs expect, then the program.
//!
//! In a mount namespace of its own, `/dev/infiniband/uverbs0` is a character device and
//! `/sys/class/infiniband` shows the device. Both directories get a fresh tmpfs with everything
//! bound into it that was there before. Whatever of this the system refuses is left out: the
//! network library itself needs none of it.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind_recursive, mount_change};
use rustix::thread::UnshareFlags;

use crate::sysfs::UVERBS;

#[derive(Args)]
pub(crate) struct EnterArgs {
    /// The tree that looks like /sys/class
    #[arg(long)]
    sysfs: PathBuf,
    /// Say what is not possible
    #[arg(short, long)]
    verbose: bool,
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Prepares, and becomes the program.
pub(crate) fn enter(args: &EnterArgs) -> Result<ExitCode> {
    if let Err(e) = arrange(&args.sysfs)
        && args.verbose
    {
        eprintln!("freeflow: no /dev/infiniband and /sys/class/infiniband for the program: {e:#}");
    }
    let program = &args.command[0];
    let error = Command::new(program).args(&args.command[1..]).exec();
    eprintln!("freeflow: cannot run {}: {error}", program.display());
    Ok(ExitCode::from(if error.kind() == ErrorKind::NotFound {
        127
    } else {
        126
    }))
}

/// Makes the mount namespace; the current directory is the same afterwards.
fn arrange(tree: &Path) -> Result<()> {
    let here = std::env::current_dir();
    own_mounts()?;
    // Bound in place of old entries while those can still be seen.
    overlay(Path::new("/dev"), |new| {
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
    overlay(Path::new("/sys/class"), |new| {
        for class in ["infiniband", "infiniband_verbs"] {
            let dir = new.join(class);
            if !dir.exists() {
                std::fs::create_dir(&dir)?;
                mount_bind_recursive(tree.join(class), &dir)?;
            }
        }
        Ok(())
    })
    .context("/sys/class")?;
    if let Ok(here) = here {
        let _ = std::env::set_current_dir(here);
    }
    Ok(())
}

/// Enters a new mount namespace; as an ordinary user, by way of a user namespace in which all ids
/// stay what they are.
fn own_mounts() -> Result<()> {
    let uid = rustix::process::geteuid();
    let gid = rustix::process::getegid();
    let mounts = UnshareFlags::NEWNS;
    let flags = if uid.is_root() {
        mounts
    } else {
        mounts | UnshareFlags::NEWUSER
    };
    // SAFETY: this process has one thread, which shares nothing that the flags separate.
    unsafe { rustix::thread::unshare_unsafe(flags) }.context("no mount namespace")?;
    if !uid.is_root() {
        let (uid, gid) = (uid.as_raw(), gid.as_raw());
        std::fs::write("/proc/self/setgroups", "deny").context("/proc/self/setgroups")?;
        std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")).context("uid_map")?;
        std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")).context("gid_map")?;
    }
    let private = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", private).context("cannot separate mounts")
}

/// Replaces a directory by a tmpfs that shows all that was in it, and more.
fn overlay(dir: &Path, more: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    // Built at a place that nobody looks at in our own namespace, then moved over.
    let new = Path::new("/tmp");
    mount("freeflow", new, "tmpfs", MountFlags::NOSUID, c"mode=0755").context("no tmpfs")?;
    let built = fill(dir, new)
        .and_then(|()| more(new))
        .and_then(|()| rustix::mount::mount_move(new, dir).context("cannot put it in place"));
    if built.is_err() {
        let _ = rustix::mount::unmount(new, rustix::mount::UnmountFlags::DETACH);
    }
    built
}

fn fill(dir: &Path, new: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
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
