//! What an endpoint may use, and how fast. Pure: no sockets, threads, clocks or unsafe code; the
//! time comes in with each call, in nanoseconds of any monotonic clock.

#![forbid(unsafe_code)]

mod bucket;
mod quota;

pub use bucket::TokenBucket;
pub use quota::{Exceeded, ParseError, Quota, Resource, Setting, Usage};
