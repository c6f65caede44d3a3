//! Programs of `c/` that check cases, as `c/check.h` has it.

use anyhow::Result;
use rustix::process::Signal;

use crate::{Bed, DEADLINE, Ended, Running, compiled};

/// Such a program: its arguments are an address and a case, and perhaps another.
pub struct Checker {
    /// Its path.
    pub program: String,
}

impl Checker {
    /// As [`compiled()`].
    pub fn new(name: &'static str) -> Option<Checker> {
        let program = compiled(name)?;
        Some(Checker { program })
    }

    /// Starts a case on an endpoint of its own, at that address or the endpoint's.
    pub fn start(&self, bed: &Bed, address: Option<&str>, case: &str) -> Result<Running> {
        let endpoint = bed.endpoint();
        let ip = endpoint.ip.to_string();
        endpoint.start(&self.program, &[address.unwrap_or(&ip), case])
    }

    /// A case must hold, with nothing on standard error.
    pub fn holds(&self, address: Option<&str>, case: &str) -> Ended {
        let bed = Bed::new().expect("a router starts");
        let running = self.start(&bed, address, case);
        let said = held(running.and_then(|running| running.wait(DEADLINE)));
        assert_eq!(said.stderr, "", "{said}");
        said
    }

    /// A case must hold, whose router is killed when it says that it is ready.
    pub fn outlives_router(&self, address: Option<&str>, case: &str) {
        let mut bed = Bed::new().expect("a router starts");
        let running = self.start(&bed, address, case).unwrap();
        running.wait_for("ready", DEADLINE).unwrap();
        bed.router().signal(Signal::KILL);
        held(running.wait(DEADLINE));
    }
}

/// All that such a program has checked must be so.
pub fn held(said: Result<Ended>) -> Ended {
    let said = said.and_then(Ended::success);
    let said = said.unwrap_or_else(|e| panic!("{e:#}"));
    assert!(said.stdout.contains(" 0 failed"), "{said}");
    said
}
