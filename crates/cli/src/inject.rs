//! Getting our libraries into a program, and finding out beforehand whether that will work.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

/// Where our libraries are, if not beside the command.
const VARIABLE: &str = "FREEFLOW_LIB_DIR";
const LIBRARY: &str = "libibverbs.so.1";
/// glibc's loader.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// The directory of our libraries.
pub(crate) fn library_dir() -> Result<PathBuf> {
    let mut looked = Vec::new();
    if let Some(dir) = std::env::var_os(VARIABLE) {
        looked.push(PathBuf::from(dir));
    } else if let Ok(exe) = std::env::current_exe()
        && let Some(prefix) = exe.parent().and_then(Path::parent)
    {
        looked.extend([prefix.join("lib"), prefix.join("lib/freeflow")]);
    }
    match looked.iter().find(|dir| dir.join(LIBRARY).is_file()) {
        Some(dir) => Ok(dir.canonicalize()?),
        None => {
            let list: Vec<_> = looked.iter().map(|d| d.display().to_string()).collect();
            bail!(
                "FreeFlow's {LIBRARY} is in none of: {} (set {VARIABLE} to its directory)",
                list.join(", ")
            )
        }
    }
}

/// `LD_LIBRARY_PATH` with our directory first.
pub(crate) fn library_path(dir: &Path) -> OsString {
    let mut path = dir.as_os_str().to_owned();
    if let Some(old) = std::env::var_os("LD_LIBRARY_PATH").filter(|old| !old.is_empty()) {
        path.push(":");
        path.push(old);
    }
    path
}

/// The file that a command names, by `PATH`.
pub(crate) fn resolve(command: &OsStr) -> Option<PathBuf> {
    let path = Path::new(command);
    if path.components().count() > 1 {
        return path.exists().then(|| path.to_owned());
    }
    let search = std::env::var_os("PATH")?;
    let executable = |p: &PathBuf| {
        p.metadata()
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(&search)
        .map(|dir| dir.join(path))
        .find(executable)
}

/// Why a program would not get our library; `None` if it will, or if it cannot be told.
pub(crate) fn obstacle(program: &Path, dir: &Path) -> Option<String> {
    let name = program.display();
    let mode = program.metadata().ok()?.permissions().mode();
    let root = rustix::process::geteuid().is_root();
    if mode & 0o6000 != 0 && !root {
        return Some(format!(
            "{name} is set-user-id: the loader ignores LD_LIBRARY_PATH"
        ));
    }
    let mut magic = [0; 4];
    std::io::Read::read_exact(&mut std::fs::File::open(program).ok()?, &mut magic).ok()?;
    if &magic != b"\x7fELF" {
        return None;
    }
    let listed = Command::new(LOADER)
        .arg("--list")
        .arg(program)
        .env("LD_LIBRARY_PATH", library_path(dir))
        .output()
        .ok()?;
    if !listed.status.success() {
        let text = String::from_utf8_lossy(&listed.stderr);
        let fixed = text.contains("not a dynamic executable") || text.contains("statically linked");
        return fixed.then(|| format!("{name} is statically linked: it cannot use FreeFlow"));
    }
    let text = String::from_utf8_lossy(&listed.stdout);
    if text.contains("statically linked") {
        return Some(format!(
            "{name} is statically linked: it cannot use FreeFlow"
        ));
    }
    let found = loaded(&text, LIBRARY)?;
    (Path::new(&found).parent() != Some(dir)).then(|| {
        format!("{name} loads {found} instead of FreeFlow's library (an RPATH?): it will not see the device")
    })
}

/// The file that the loader's list gives for a library.
fn loaded(list: &str, library: &str) -> Option<String> {
    let line = list
        .lines()
        .find(|line| line.trim_start().starts_with(library))?;
    let (_, file) = line.split_once("=> ")?;
    Some(file.split(" (").next()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_list_is_read() {
        let list = "\tlinux-vdso.so.1 (0x1)\n\tlibibverbs.so.1 => /ff/lib/libibverbs.so.1 (0x2)\n";
        assert_eq!(
            loaded(list, LIBRARY).as_deref(),
            Some("/ff/lib/libibverbs.so.1")
        );
        assert_eq!(loaded(list, "libmlx5.so.1"), None);
    }

    #[test]
    fn commands_are_found_by_path() {
        assert_eq!(resolve(OsStr::new("/bin/sh")), Some("/bin/sh".into()));
        assert!(resolve(OsStr::new("sh")).is_some());
        assert_eq!(resolve(OsStr::new("no-such-command-here")), None);
    }
}
