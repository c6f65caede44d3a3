//! Gives the shared object its name and its version nodes. The symbols themselves are versioned
//! where they are defined (see `export.rs`).

use std::path::Path;

fn main() {
    let nodes = Path::new(env!("CARGO_MANIFEST_DIR")).join("nodes.map");
    println!("cargo::rerun-if-changed={}", nodes.display());
    println!(
        "cargo::rustc-cdylib-link-arg=-Wl,--version-script={}",
        nodes.display()
    );
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libibverbs.so.1");
}
