//! Where a router keeps its sockets.

use std::path::{Path, PathBuf};

/// Chooses the directory; scripts and tests set it.
const VARIABLE: &str = "FREEFLOW_RUNTIME_DIR";

/// A router's runtime directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// A directory that was named.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        RuntimeDir(path.into())
    }

    /// The directory for this user: `FREEFLOW_RUNTIME_DIR`, or `/run/freeflow` for root, or
    /// `$XDG_RUNTIME_DIR/freeflow`, or `/tmp/freeflow-<uid>`.
    pub fn of_user(uid: u32, variable: impl Fn(&str) -> Option<PathBuf>) -> Self {
        RuntimeDir(match (variable(VARIABLE), variable("XDG_RUNTIME_DIR")) {
            (Some(dir), _) => dir,
            _ if uid == 0 => "/run/freeflow".into(),
            (None, Some(xdg)) => xdg.join("freeflow"),
            (None, None) => format!("/tmp/freeflow-{uid}").into(),
        })
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("router.sock")
    }

    /// By how many bytes a path is too long for a socket; `None` if it is not (`unix(7)`: 107
    /// bytes and a terminating null).
    pub fn excess(path: &Path) -> Option<usize> {
        const LONGEST: usize = 107;
        let bytes = path.as_os_str().len();
        (bytes > LONGEST).then(|| bytes - LONGEST)
    }

    /// Locked by the router that serves the directory.
    pub fn lock(&self) -> PathBuf {
        self.0.join("router.lock")
    }

    /// Locked by a command that starts an embedded router.
    pub fn start_lock(&self) -> PathBuf {
        self.0.join("start.lock")
    }

    /// Where an embedded router writes what it has to say.
    pub fn log(&self) -> PathBuf {
        self.0.join("router.log")
    }

    /// Directory of the endpoints' sockets.
    pub fn endpoints(&self) -> PathBuf {
        self.0.join("endpoints")
    }

    /// An endpoint's socket.
    pub fn endpoint_socket(&self, name: &str) -> PathBuf {
        self.endpoints().join(format!("{name}.sock"))
    }

    /// Directory of the endpoints' trees that look like `/sys/class`.
    pub fn sysfs_root(&self) -> PathBuf {
        self.0.join("sysfs")
    }

    /// An endpoint's tree that looks like `/sys/class`.
    pub fn sysfs(&self, name: &str) -> PathBuf {
        self.sysfs_root().join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_follows_user_and_environment() {
        let dir = |uid, set: &[(&str, &str)]| {
            let find = |name: &str| set.iter().find(|v| v.0 == name).map(|v| v.1.into());
            RuntimeDir::of_user(uid, find).path().display().to_string()
        };
        assert_eq!(dir(0, &[]), "/run/freeflow");
        assert_eq!(dir(0, &[("XDG_RUNTIME_DIR", "/x")]), "/run/freeflow");
        assert_eq!(dir(7, &[("XDG_RUNTIME_DIR", "/x")]), "/x/freeflow");
        assert_eq!(dir(7, &[]), "/tmp/freeflow-7");
        assert_eq!(
            dir(
                7,
                &[("FREEFLOW_RUNTIME_DIR", "/r"), ("XDG_RUNTIME_DIR", "/x")]
            ),
            "/r"
        );
    }
}
