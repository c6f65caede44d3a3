//! Versioned types between router, orchestrator and command line.
//!
//! The router serves a control socket in its runtime directory: `SOCK_SEQPACKET`, one JSON
//! document a packet, a [`ControlRequest`] answered by a [`ControlAnswer`].

#![forbid(unsafe_code)]

mod control;
mod runtime;
mod status;

pub use control::{
    CONTROL_VERSION, ControlAnswer, ControlRequest, Envelope, MAX_CONTROL_BYTES, NewEndpoint,
    Operation,
};
pub use freeflow_policy::{Quota, Resource, Setting};
pub use runtime::RuntimeDir;
pub use status::{
    Counters, EndedSession, EndpointStatus, FabricStatus, LinkStatus, PathStatus, QuotaStatus,
    RouterStatus, SessionStatus,
};
