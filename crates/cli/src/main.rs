//! The `freeflow` command.
fn main() {}
