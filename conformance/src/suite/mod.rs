//! What tests are made of.

mod end;
mod far;
mod outcome;
mod pair;

pub(crate) use end::{Addr, End, QKEY, Side, Spec};
pub(crate) use far::{Far, listen, serve};
pub(crate) use outcome::{Outcome, Stop, check, complain, complaints, fail, same, skip};
pub(crate) use pair::{Op, Pair, status_name};

use std::path::PathBuf;
use std::time::Duration;

/// Time for what must happen: far longer than any machine needs.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// Time in which what must not happen is looked for.
pub(crate) const QUIET: Duration = Duration::from_millis(100);

/// Where the far end of a pair is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In this process.
    Here,
    /// In another process of this machine, started by the test.
    Process,
    /// With the server that listens at this path.
    Server(PathBuf),
}

/// What a run is against.
#[derive(Clone, Debug)]
pub(crate) struct Env {
    pub(crate) device: Option<String>,
    pub(crate) device2: Option<String>,
    pub(crate) gid_index: u8,
    pub(crate) place: Place,
    /// Long loops are shortened by this.
    pub(crate) shorter: u64,
}

impl Env {
    /// A number of repetitions, shortened if the run is to be quick.
    pub(crate) fn many(&self, n: u64) -> u64 {
        (n / self.shorter).max(100)
    }
}

/// Which runs a test belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Any: the far end is only told what to do.
    Anywhere,
    /// One process: it reaches into both ends, or needs one only.
    OneProcess,
    /// Two processes.
    TwoProcesses,
}

/// A test.
pub(crate) struct Test {
    /// `theme::what`.
    pub(crate) name: &'static str,
    /// The rule it checks: man page, IBTA volume 1.
    pub(crate) rule: &'static str,
    pub(crate) reach: Reach,
    pub(crate) run: fn(&Env) -> Outcome,
}

/// A table of the tests of a module: function, reach, rule.
macro_rules! tests {
    ($theme:literal; $($f:ident $reach:ident $rule:literal;)*) => {
        /// The tests of this theme.
        pub(crate) const TESTS: &[$crate::suite::Test] = &[$($crate::suite::Test {
            name: concat!($theme, "::", stringify!($f)),
            rule: $rule,
            reach: $crate::suite::Reach::$reach,
            run: $f,
        }),*];
    };
}
pub(crate) use tests;
