//! Somebody who uses the command: this user, or one without any privilege.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::fs::{Gid, Uid};
use tempfile::TempDir;

use crate::{DEADLINE, Ended, Running, dist, is_root, skip};

/// A user id that nobody is known by, for tests that run as root.
const NOBODY_KNOWN: u32 = 54_321;

/// A directory with the command, its libraries and a runtime directory that is not there yet, for
/// one user. No router runs.
pub struct Place {
    dir: TempDir,
    uid: Option<u32>,
}

impl Place {
    /// For the user who runs the test.
    pub fn ours() -> Result<Place> {
        Self::of(None)
    }

    /// For an ordinary user: another one if the test runs as root.
    pub fn ordinary() -> Result<Place> {
        Self::of(is_root().then_some(NOBODY_KNOWN))
    }

    /// Both, or one if they are the same.
    pub fn all() -> Result<Vec<Place>> {
        let mut all = vec![Self::ordinary()?];
        if is_root() {
            all.push(Self::ours()?);
        }
        Ok(all)
    }

    /// Those whose users can have private networks; says loudly who cannot.
    pub fn private(test: &str) -> Vec<Place> {
        let mut all = Self::all().expect("places");
        all.retain(|place| place.has_private_networks(test));
        all
    }

    fn of(uid: Option<u32>) -> Result<Place> {
        let dir = tempfile::Builder::new()
            .prefix("ffplace")
            .tempdir_in("/tmp")?;
        // A copy, as the user may not be able to read the original's directory.
        for part in ["bin", "lib"] {
            let (from, to) = (dist().join(part), dir.path().join(part));
            fs::create_dir(&to)?;
            for entry in fs::read_dir(&from)? {
                let entry = entry?;
                fs::copy(entry.path(), to.join(entry.file_name()))
                    .with_context(|| format!("cannot copy {}", entry.path().display()))?;
            }
        }
        fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755))?;
        let own = dir.path().join("own");
        fs::create_dir(&own)?;
        chown(&own, uid, uid)?;
        Ok(Place { dir, uid })
    }

    /// Who uses it, for messages.
    pub fn user(&self) -> String {
        let uid = self
            .uid
            .unwrap_or_else(|| rustix::process::geteuid().as_raw());
        format!("user {uid}")
    }

    /// Whether the user can have private networks; says loudly if not.
    pub fn has_private_networks(&self, test: &str) -> bool {
        private_networks(self.call(&["doctor"]), &self.user(), test)
    }

    /// A directory that the user may write to.
    pub fn own(&self) -> PathBuf {
        self.dir.path().join("own")
    }

    /// The runtime directory.
    pub fn runtime_dir(&self) -> PathBuf {
        self.own().join("run")
    }

    /// The libraries.
    pub fn lib(&self) -> PathBuf {
        self.dir.path().join("lib")
    }

    /// The `freeflow` command.
    pub fn binary(&self) -> PathBuf {
        self.dir.path().join("bin/freeflow")
    }

    /// Any program as the user.
    pub fn program(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command
            .current_dir(self.own())
            .env_remove("FREEFLOW_ENDPOINT")
            .env_remove("LD_LIBRARY_PATH")
            .env("FREEFLOW_RUNTIME_DIR", self.runtime_dir());
        if let Some(uid) = self.uid {
            command.uid(uid).gid(uid);
        }
        command
    }

    /// `freeflow ARGS`.
    pub fn freeflow<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = self.program(self.binary());
        command.args(args);
        command
    }

    /// Runs `freeflow ARGS` to its end.
    pub fn call(&self, args: &[&str]) -> Result<Ended> {
        Running::start(&mut self.freeflow(args.iter().copied()))?.wait(DEADLINE)
    }

    /// Runs it to an end that must be a good one with nothing on standard error.
    pub fn clean(&self, args: &[&str]) -> Result<Ended> {
        let ended = self.call(args)?.success()?;
        if !ended.stderr.is_empty() {
            bail!("{ended}");
        }
        Ok(ended)
    }

    /// What the router says of itself.
    pub fn status(&self) -> Result<serde_json::Value> {
        let said = self.clean(&["status", "-o", "json"])?;
        serde_json::from_str(&said.stdout).context("status is no JSON")
    }

    /// The user's file of zeroes.
    pub fn file(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.own().join(name);
        fs::File::create(&path)?.set_len(bytes)?;
        let owner = self.uid.map(|uid| (Uid::from_raw(uid), Gid::from_raw(uid)));
        if let Some((uid, gid)) = owner {
            rustix::fs::chown(&path, Some(uid), Some(gid))?;
        }
        Ok(path)
    }
}

/// Whether the user of whom the doctor said that can have private networks; says loudly if not.
pub(crate) fn private_networks(said: Result<Ended>, user: &str, test: &str) -> bool {
    let said = said.unwrap_or_else(|e| panic!("{e:#}"));
    let line = said.stdout.lines().find(|l| l.contains("private network"));
    let line = line.unwrap_or_else(|| panic!("the doctor does not know: {said}"));
    if !line.starts_with("ok") {
        skip(test, &format!("{user}: {line}"));
    }
    line.starts_with("ok")
}
