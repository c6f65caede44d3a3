//! The initial RAM disk: busybox, the modules to reach the host's files, and what mounts them.

use std::fs::File;
use std::io::{BufWriter, Cursor};
use std::path::{Path, PathBuf};
use std::process::Command;

use cpio::newc::{Builder, ModeFileType};

use crate::machine::{Machine, output};
use crate::{VmError, image};

/// All others are loaded from the host's files.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
const DIRECTORIES: [&str; 8] = [
    "bin", "modules", "proc", "sys", "dev", "lower", "upper", "root",
];
const INIT: &str = include_str!("../guest/init");

/// Writes it. It is not compressed: the guest would need longer than the host saves.
pub(crate) fn write(machine: &Machine, path: &Path) -> Result<(), VmError> {
    let release = machine.kernel_release()?;
    let mut order = String::new();
    let mut files = vec![file("init", 0o755, INIT.into())];
    for module in modules(machine, &release)? {
        let (name, bytes) = image::module(&module)?;
        order.push_str(&format!("{name}\n"));
        files.push(file(&format!("modules/{name}"), 0o644, bytes));
    }
    files.push(file("modules/order", 0o644, order.into()));
    let busybox = std::fs::read(&machine.busybox)
        .map_err(|e| VmError::io(format!("cannot read {}", machine.busybox.display()), e))?;
    files.push(file("bin/busybox", 0o755, busybox));
    let directories = DIRECTORIES.map(|name| {
        let builder = Builder::new(name).set_mode_file_type(ModeFileType::Directory);
        (builder.mode(0o040_755), Cursor::new(Vec::new()))
    });
    let failed = |e| VmError::io(format!("cannot write {}", path.display()), e);
    let out = BufWriter::new(File::create(path).map_err(failed)?);
    let out = cpio::write_cpio(directories.into_iter().chain(files), out).map_err(failed)?;
    out.into_inner().map_err(|e| failed(e.into_error()))?;
    Ok(())
}

fn file(name: &str, mode: u32, bytes: Vec<u8>) -> (Builder, Cursor<Vec<u8>>) {
    let builder = Builder::new(name).mode(0o100_000 | mode);
    (builder, Cursor::new(bytes))
}

/// Module files, each after those that it needs.
fn modules(machine: &Machine, release: &str) -> Result<Vec<PathBuf>, VmError> {
    let mut files = Vec::new();
    for module in MODULES {
        let mut modprobe = Command::new(&machine.modprobe);
        modprobe
            .args(["--show-depends", "-S", release, "-d"])
            .arg(&machine.kernel)
            .arg(module);
        let said = output(&mut modprobe)?;
        for path in said.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let path = PathBuf::from(path.trim());
            if !files.contains(&path) {
                files.push(path);
            }
        }
    }
    Ok(files)
}
