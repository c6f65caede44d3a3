//! Gives the shared object its name and its version nodes. The symbols themselves are versioned
//! where they are defined (see `export.rs`).

use std::path::Path;

fn main() {
    // Of this run: a build directory may serve several checkouts.
    let directory = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default();
    let nodes = Path::new(&directory).join("nodes.map");
    println!("cargo::rerun-if-changed={}", nodes.display());
    println!(
        "cargo::rustc-cdylib-link-arg=-Wl,--version-script={}",
        nodes.display()
    );
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libibverbs.so.1");
}
