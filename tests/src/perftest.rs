//! Debian's perftest, run in many ways.

use anyhow::Result;

use crate::{Ended, have};

/// Runs a program of perftest in all these ways with `pair`, which gives what its two sides said;
/// each must print a row of figures.
pub fn ways(
    program: &str,
    ways: &[&str],
    mut pair: impl FnMut(&str, &[&str]) -> Result<(Ended, Ended)>,
) {
    if !have(program) {
        return;
    }
    for way in ways {
        let args: Vec<_> = way.split_ascii_whitespace().collect();
        let (server, client) = patient(|| pair(program, &args));
        let figures = client.stdout.lines().any(|line| {
            let mut words = line.split_ascii_whitespace();
            words.next().is_some_and(|w| w.parse::<u64>().is_ok()) && words.count() >= 4
        });
        assert!(figures, "{program} {way}: no figures in {client}");
        for side in [server, client] {
            let said = format!("{}{}", side.stdout, side.stderr).to_lowercase();
            for bad in [
                "failed",
                "error",
                "couldn't",
                "unable",
                "no version information",
            ] {
                assert!(!said.contains(bad), "{program} {way}: {side}");
            }
        }
    }
}

/// On a machine that is busy a program may find that it cannot measure the processor's clock, and
/// gives up: then it is tried again.
fn patient(mut pair: impl FnMut() -> Result<(Ended, Ended)>) -> (Ended, Ended) {
    const NO_CLOCK: &str = "Correlation coefficient";
    let mut tries = 5;
    loop {
        tries -= 1;
        match pair() {
            Err(e) if tries != 0 && e.to_string().contains(NO_CLOCK) => {}
            done => return done.unwrap(),
        }
    }
}
