//! What is fuzzed: plain functions over bytes, run by libFuzzer (`cargo xtask fuzz`) and, on the
//! corpora and on past crashes, by ordinary tests.
//!
//! A body panics if something is wrong: the router's engine panics or does not come to rest, an
//! object is lost or kept, memory of another tenant changes, an honest session ends.

#![forbid(unsafe_code)]

mod cable;
mod cast;
mod ids;
mod links;
mod manager;
mod messages;
mod packets;
mod rings;
mod verbs;
mod wire;
mod work;

pub use links::links;
pub use manager::manager;
pub use messages::messages;
pub use packets::packets;
pub use rings::rings;
pub use verbs::verbs;
pub use wire::wire;
pub use work::work;

/// A body.
pub type Body = fn(&[u8]);

/// All bodies, by the names of their targets.
pub const BODIES: [(&str, Body); 8] = [
    ("links", links),
    ("messages", messages),
    ("manager", manager),
    ("verbs", verbs),
    ("rings", rings),
    ("work", work),
    ("wire", wire),
    ("packets", packets),
];
