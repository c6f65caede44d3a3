//! How a test ends.

use std::sync::Mutex;

/// Why a test did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// What was seen is not what the rule says.
    Fail(String),
    /// The device or the machine lacks what the test needs.
    Skip(String),
}

/// The result of a test or of a step of one.
pub(crate) type Outcome<T = ()> = Result<T, Stop>;

/// Complaints from where no result can be returned: an object that could not be destroyed.
static COMPLAINTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

pub(crate) fn complain(what: String) {
    COMPLAINTS
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .push(what);
}

/// Takes the complaints of the test that ends.
pub(crate) fn complaints() -> Vec<String> {
    std::mem::take(
        &mut COMPLAINTS
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner),
    )
}

/// Ends the test as failed.
macro_rules! fail {
    ($($arg:tt)*) => { return Err($crate::suite::Stop::Fail(format!($($arg)*))) };
}

/// Ends the test as skipped.
macro_rules! skip {
    ($($arg:tt)*) => { return Err($crate::suite::Stop::Skip(format!($($arg)*))) };
}

/// Fails the test unless the condition holds.
macro_rules! check {
    ($cond:expr, $($arg:tt)*) => { if !$cond { $crate::suite::fail!($($arg)*); } };
}

/// Fails the test unless what was got is what was expected.
macro_rules! same {
    ($got:expr, $expected:expr, $($arg:tt)*) => {{
        let (got, expected) = (&$got, &$expected);
        if got != expected {
            $crate::suite::fail!("{}: expected {expected:?}, got {got:?}", format_args!($($arg)*));
        }
    }};
}

pub(crate) use {check, fail, same, skip};
