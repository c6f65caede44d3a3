//! What this machine must have: QEMU and a few tools, and Debian's kernel.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

use crate::{VmError, image};

/// Programs, and Debian's packages of them.
const TOOLS: [(&str, &str); 7] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("modprobe", "kmod"),
    ("ip", "iproute2"),
    ("setpriv", "util-linux"),
    ("xz", "xz-utils"),
    ("sysctl", "procps"),
];
/// Debian's packages that a machine needs to run guests.
pub const PACKAGES: [&str; TOOLS.len()] = {
    let mut packages = [""; TOOLS.len()];
    let mut i = 0;
    while i < packages.len() {
        packages[i] = TOOLS[i].1;
        i += 1;
    }
    packages
};
/// Depends on the newest kernel's package.
const KERNEL_PACKAGE: &str = "linux-image-amd64";

/// In the cache, the unpacked kernel package.
const KERNEL_DIR: &str = "kernel";
/// In that, the kernel as QEMU starts it.
const KERNEL_FILE: &str = "boot/kernel";

/// A machine that can run guests.
#[derive(Clone, Debug)]
pub struct Machine {
    pub(crate) qemu: PathBuf,
    pub(crate) busybox: PathBuf,
    pub(crate) modprobe: PathBuf,
    pub(crate) setpriv: PathBuf,
    /// The unpacked kernel package.
    pub(crate) kernel: PathBuf,
    /// Where guests' files are kept.
    pub(crate) cache: PathBuf,
}

impl Machine {
    /// This machine, with everything that guests need; the kernel is downloaded if need be.
    ///
    /// # Errors
    ///
    /// [`VmError::Unavailable`] says what is missing and how to get it.
    pub fn prepare() -> Result<Machine, VmError> {
        check()?;
        download_kernel(&cache())?;
        Machine::find()
    }

    /// As [`Machine::prepare`], but nothing is downloaded.
    ///
    /// # Errors
    ///
    /// [`VmError::Unavailable`] says what is missing and how to get it.
    pub fn find() -> Result<Machine, VmError> {
        check()?;
        let cache = cache();
        let kernel = cache.join(KERNEL_DIR);
        if !kernel.is_dir() {
            return Err(VmError::Unavailable(format!(
                "there is no kernel in {}: run `cargo xtask vm --prepare`",
                kernel.display()
            )));
        }
        let tool = |name| find(name).ok_or_else(|| VmError::Unavailable(format!("no {name}")));
        Ok(Machine {
            qemu: tool("qemu-system-x86_64")?,
            busybox: tool("busybox")?,
            modprobe: tool("modprobe")?,
            setpriv: tool("setpriv")?,
            kernel,
            cache,
        })
    }

    /// The kernel as QEMU starts it.
    pub(crate) fn kernel_file(&self) -> PathBuf {
        self.kernel.join(KERNEL_FILE)
    }

    /// Release of the guests' kernel, as `uname -r` prints it there.
    pub fn kernel_release(&self) -> Result<String, VmError> {
        let modules = self.kernel.join("lib/modules");
        let entry = std::fs::read_dir(&modules)
            .and_then(|mut entries| entries.next().transpose())
            .map_err(|e| VmError::io(format!("cannot read {}", modules.display()), e))?;
        let entry = entry.ok_or_else(|| {
            VmError::Unavailable(format!("no kernel modules in {}", modules.display()))
        })?;
        Ok(entry.file_name().to_string_lossy().into_owned())
    }
}

/// `target/vm` of the workspace.
fn cache() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || workspace.unwrap_or(Path::new(".")).join("target"),
        PathBuf::from,
    );
    std::path::absolute(&target).unwrap_or(target).join("vm")
}

/// A program by `PATH`; those for administrators are often not in it.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .filter(|file| name != "busybox" || is_static(file))
}

/// A program that names no loader: it runs where there is no library yet.
fn is_static(file: &Path) -> bool {
    const LOADER: &[u8] = b"/ld-linux";
    std::fs::read(file).is_ok_and(|bytes| !bytes.windows(LOADER.len()).any(|part| part == LOADER))
}

/// Whether guests can run and all tools are there.
fn check() -> Result<(), VmError> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(VmError::Unavailable(
            "guests are x86-64, as the programs of this machine must be".to_owned(),
        ));
    }
    let lacks = |&(name, package): &(&str, &'static str)| find(name).is_none().then_some(package);
    let missing: Vec<_> = TOOLS.iter().filter_map(lacks).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(VmError::Unavailable(format!(
        "not installed (names of Debian's packages): {}; `cargo xtask vm --prepare` installs them \
         as root on Debian",
        missing.join(", ")
    )))
}

fn is_debian() -> bool {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    text.lines().any(|line| line == "ID=debian")
}

/// Downloads and unpacks the kernel package, once.
fn download_kernel(cache: &Path) -> Result<(), VmError> {
    let kernel = cache.join(KERNEL_DIR);
    let failed = |e| VmError::io(format!("cannot write {}", cache.display()), e);
    if kernel.is_dir() {
        return Ok(());
    }
    if !is_debian() {
        return Err(VmError::Unavailable(format!(
            "{KERNEL_PACKAGE} is Debian's, and this is not Debian: on one, `cargo xtask vm \
             --prepare` makes {}",
            kernel.display()
        )));
    }
    std::fs::create_dir_all(cache).map_err(failed)?;
    let lock = File::create(cache.join("lock")).map_err(failed)?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|e| failed(e.into()))?;
    // Another process may have been faster.
    if !kernel.is_dir() {
        let work = tempfile::tempdir_in(cache).map_err(failed)?;
        let unpacked = download(work.path())?;
        std::fs::rename(unpacked, &kernel).map_err(failed)?;
    }
    Ok(())
}

fn download(work: &Path) -> Result<PathBuf, VmError> {
    let depends = || output(Command::new("apt-cache").args(["depends", KERNEL_PACKAGE]));
    let package = match depends() {
        Ok(said) if image_package(&said).is_some() => image_package(&said),
        _ => {
            output(Command::new("apt-get").args(["update", "-q"]))?;
            image_package(&depends()?)
        }
    };
    let package = package.ok_or_else(|| {
        VmError::Unavailable(format!("apt knows no package that {KERNEL_PACKAGE} needs"))
    })?;
    eprintln!("downloading {package}");
    let mut get = Command::new("apt-get");
    // The ordinary user that it would become as root cannot write here.
    get.args(["download", "-q", "-o", "APT::Sandbox::User=root", &package]);
    output(get.current_dir(work))?;
    let failed = |e| VmError::io(format!("cannot use {}", work.display()), e);
    let archive = std::fs::read_dir(work)
        .map_err(failed)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "deb"));
    let archive = archive.ok_or_else(|| {
        VmError::Unavailable(format!("apt-get has not left {package} in its directory"))
    })?;
    let unpacked = work.join("kernel");
    output(Command::new("dpkg").arg("-x").args([&archive, &unpacked]))?;
    let release = package.trim_start_matches("linux-image-");
    let depmod = find("depmod").unwrap_or_else(|| "depmod".into());
    output(Command::new(depmod).arg("-b").arg(&unpacked).arg(release))?;
    let packed = unpacked.join(format!("boot/vmlinuz-{release}"));
    let image = std::fs::read(&packed)
        .map_err(|e| VmError::io(format!("cannot read {}", packed.display()), e))?;
    let elf = image::kernel_of(&image)?.unwrap_or(image);
    std::fs::write(unpacked.join(KERNEL_FILE), elf).map_err(failed)?;
    Ok(unpacked)
}

/// The package that the answer of `apt-cache depends` names.
fn image_package(said: &str) -> Option<String> {
    let mut names = said
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "));
    names
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
}

/// What a command prints; its error output is the error's if it fails.
pub(crate) fn output(command: &mut Command) -> Result<String, VmError> {
    output_bytes(command).map(|out| String::from_utf8_lossy(&out).into_owned())
}

/// As [`output`], of a command that does not print text.
pub(crate) fn output_bytes(command: &mut Command) -> Result<Vec<u8>, VmError> {
    let line = format!("{command:?}");
    let out = command
        .output()
        .map_err(|e| VmError::io(format!("cannot run {line}"), e))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        return Err(VmError::Command { line, said });
    }
    Ok(out.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_package_is_found() {
        let said = "linux-image-amd64\n  Depends: linux-image-6.1.0-9-amd64\n  Suggests: x\n";
        assert_eq!(
            image_package(said).as_deref(),
            Some("linux-image-6.1.0-9-amd64")
        );
        assert_eq!(image_package("linux-image-amd64\n"), None);
    }

    #[test]
    fn a_program_with_a_loader_is_not_static() {
        assert!(!is_static(Path::new("/bin/sh")));
        assert!(!is_static(Path::new("/no/such/file")));
    }

    #[test]
    fn a_commands_complaint_is_in_the_error() {
        let error = output(Command::new("sh").args(["-c", "echo why >&2; exit 1"])).unwrap_err();
        assert!(error.to_string().ends_with("why"), "{error}");
    }
}
