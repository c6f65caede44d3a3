//! Queue pair state machines, sans-IO.
//!
//! A [`Qp`] is a plain value. It is told what was asked and what came of it, and says what is to
//! be done; it knows no memory, no sockets, no tenants and no clock: the time comes in as
//! nanoseconds. Whoever executes messages (the router on one host, a fabric between hosts, the
//! posting thread itself) asks the same value.

#![forbid(unsafe_code)]

mod check;
mod modify;
mod qp;

pub use check::{PostError, check_send};
pub use modify::{ModifyError, ModifyLimits, check_modify};
pub use qp::{Nak, Next, Outcome, Qp, Transition};
