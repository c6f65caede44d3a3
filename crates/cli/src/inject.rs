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

/// How our libraries get into a program.
pub(crate) struct Injection {
    dir: PathBuf,
    /// Our libibverbs itself, free of links.
    library: PathBuf,
    /// Load it even into programs that ask for another file.
    preload: bool,
}

impl Injection {
    /// With the libraries that belong to this command.
    pub(crate) fn new(preload: bool) -> Result<Self> {
        let dir = library_dir()?;
        let library = dir.join(LIBRARY).canonicalize()?;
        Ok(Injection {
            dir,
            library,
            preload,
        })
    }

    /// Variables of the program's environment.
    pub(crate) fn environment(&self) -> Vec<(&'static str, OsString)> {
        let mut set = vec![("LD_LIBRARY_PATH", before(&self.dir, "LD_LIBRARY_PATH"))];
        if self.preload {
            let preload = before(&self.dir.join(LIBRARY), "LD_PRELOAD");
            set.push(("LD_PRELOAD", preload));
        }
        set
    }

    /// Whether a file is a libibverbs, and not ours. Copies are often renamed, as in Python's
    /// wheels: libibverbs-0a1b2c3d.so.1.
    pub(crate) fn is_foreign(&self, file: &Path) -> bool {
        let name = file.file_name().unwrap_or_default().as_encoded_bytes();
        name.starts_with(b"libibverbs") && !self.is_ours(file)
    }

    /// Whether a file is our libibverbs.
    pub(crate) fn is_ours(&self, file: &Path) -> bool {
        file == self.library || file.canonicalize().is_ok_and(|file| file == self.library)
    }

    /// Why a program would not get our library; `None` if it will, or if it cannot be told.
    pub(crate) fn obstacle(&self, program: &Path) -> Option<String> {
        let name = program.display();
        let mode = program.metadata().ok()?.permissions().mode();
        let root = rustix::process::geteuid().is_root();
        if mode & 0o6000 != 0 && !root {
            return Some(format!(
                "{name} is set-user-id or set-group-id: the loader ignores LD_LIBRARY_PATH, and it \
                 will not see the device"
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
            .envs(self.environment())
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(if listed.status.success() {
            &listed.stdout
        } else {
            &listed.stderr
        });
        if ["statically linked", "not a dynamic executable"]
            .iter()
            .any(|words| text.contains(words))
        {
            return Some(format!(
                "{name} is statically linked: it cannot use FreeFlow's library"
            ));
        }
        let found: Vec<_> = listed_files(&text).collect();
        let foreign = found.iter().find(|file| self.is_foreign(file))?;
        // Both: those that come first serve the calls, whoever is linked to the other one.
        if found.iter().any(|file| self.is_ours(file)) {
            return None;
        }
        let advice = if self.preload {
            ""
        } else {
            " (an RPATH?); freeflow run --preload may help"
        };
        Some(format!(
            "{name} loads {} instead of FreeFlow's library: it will not see the device{advice}",
            foreign.display()
        ))
    }
}

/// A search path with an entry of ours before those that the environment has already.
fn before(ours: &Path, variable: &str) -> OsString {
    let mut path = ours.as_os_str().to_owned();
    if let Some(old) = std::env::var_os(variable).filter(|old| !old.is_empty()) {
        path.push(":");
        path.push(old);
    }
    path
}

/// The files in the loader's list.
fn listed_files(list: &str) -> impl Iterator<Item = PathBuf> {
    list.lines().filter_map(|line| {
        let file = line.split_once(" => ").map_or(line, |(_, file)| file);
        let file = file.split(" (0x").next()?.trim();
        file.starts_with('/').then(|| PathBuf::from(file))
    })
}

/// The file that a command names, by `PATH`.
pub(crate) fn resolve(command: &OsStr) -> Option<PathBuf> {
    let path = Path::new(command);
    if command.as_encoded_bytes().contains(&b'/') {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_list_is_read() {
        let list = "\tlinux-vdso.so.1 (0x1)\n\t/pre/libibverbs.so.1 (0x3)\n\
                    \tlibibverbs.so.1 => /ff (x)/libibverbs.so.1 (0x2)\n\tlibc.so.6 => not found\n";
        let files: Vec<_> = listed_files(list).collect();
        let expected: [&Path; 2] = [
            Path::new("/pre/libibverbs.so.1"),
            Path::new("/ff (x)/libibverbs.so.1"),
        ];
        assert_eq!(files, expected);
    }

    #[test]
    fn copies_are_foreign_and_links_are_not() {
        let root = std::env::temp_dir().join(format!("ff-inject-{}", std::process::id()));
        std::fs::create_dir_all(&root).unwrap();
        let library = root.join("ours.so");
        std::fs::write(&library, "").unwrap();
        let link = root.join("libibverbs.so.1");
        std::os::unix::fs::symlink(&library, &link).unwrap();
        let injection = Injection {
            dir: root.clone(),
            library: library.canonicalize().unwrap(),
            preload: false,
        };
        assert!(!injection.is_foreign(&link) && injection.is_ours(&link));
        assert!(injection.is_foreign(Path::new("/w/libibverbs-0a1b.so.1")));
        assert!(!injection.is_foreign(Path::new("/usr/lib/libibverbs/libmlx5-rdmav34.so")));
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn commands_are_found_by_path() {
        assert_eq!(resolve(OsStr::new("/bin/sh")), Some("/bin/sh".into()));
        assert!(resolve(OsStr::new("sh")).is_some());
        assert_eq!(resolve(OsStr::new("no-such-command-here")), None);
    }
}
