//! Versioned types between router, orchestrator and command line.

#![forbid(unsafe_code)]

mod status;

pub use status::{Counters, EndedSession, EndpointStatus, RouterStatus, SessionStatus};
