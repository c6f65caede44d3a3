//! Gives the shared object its name, its version nodes, and its need for libibverbs.so.1.
//!
//! The linker records a need by the name inside a library: an empty one of that name will do, as
//! the real one is built from another package.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    // Of this run: a build directory may serve several checkouts.
    let directory = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default();
    let here = Path::new(&directory);
    let nodes = here.join("nodes.map");
    println!("cargo::rerun-if-changed={}", nodes.display());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let source = out.join("empty.c");
    let library = out.join("libffneed.so");
    std::fs::write(&source, "").expect("OUT_DIR is writable");
    let status = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()))
        .args(["-shared", "-nostdlib", "-Wl,-soname,libibverbs.so.1", "-o"])
        .args([&library, &source])
        .status()
        .expect("a C compiler drives the linker");
    assert!(status.success(), "cannot link {}", library.display());
    for argument in [
        format!("-Wl,--version-script={}", nodes.display()),
        "-Wl,-soname,librdmacm.so.1".to_owned(),
        "-Wl,--no-as-needed".to_owned(),
        library.display().to_string(),
    ] {
        println!("cargo::rustc-cdylib-link-arg={argument}");
    }
}
