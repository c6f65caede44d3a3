//! libibverbs.so.1: the C ABI of the verbs over [`freeflow_client`].
//!
//! Every public symbol of rdma-core 44 to 65 with its version (`symbols.rs`), operation tables
//! behind contexts and queues, and the private symbols that vendors' libraries need to load. What
//! the virtual device does not offer answers as the man page says an absent feature answers.
//!
//! The shared object also carries librdmacm's symbols (`rdmacm.rs`, `rdma_cm/`, `rsocket/`); librdmacm.so.1
//! itself only names their versions.

#![allow(
    clippy::missing_safety_doc,
    reason = "entry points of a C API: its man pages say what callers must do"
)]

mod cq;
mod device;
mod dm;
mod domain;
mod event;
mod export;
mod marshal;
mod memory;
mod mw;
mod objects;
mod private;
mod qp;
mod query;
mod rdma_cm;
mod rdmacm;
mod region;
mod rsocket;
mod srq;
mod strings;
mod symbols;
mod unsupported;
mod wr;
mod xrc;
