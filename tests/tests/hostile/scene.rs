//! A router, a victim whose traffic flows, and a place for the hostile client.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use freeflow_tests::rig::Rig;
use freeflow_tests::{Bed, DEADLINE, Footprint, Lasting, Victim};

/// Everything of a dead client is gone within a second; machines are noisy.
pub(crate) const REAPED: Duration = Duration::from_secs(10);

pub(crate) struct Scene {
    /// Before the router: its traffic ends first.
    pub(crate) victim: Victim,
    pub(crate) bed: Bed,
    /// The victim's endpoints.
    pub(crate) victims: [Lasting; 2],
    /// The hostile client's endpoint, of another tenant.
    pub(crate) hostile: Lasting,
    before: Footprint,
}

impl Scene {
    pub(crate) fn new() -> Scene {
        Self::under(&[])
    }

    /// With a program that executes the router.
    pub(crate) fn under(wrapper: &[&str]) -> Scene {
        Self::make(wrapper).expect("a router, endpoints and traffic")
    }

    fn make(wrapper: &[&str]) -> Result<Scene> {
        let mut bed = Bed::under(wrapper)?;
        let victims = [
            bed.lasting_endpoint("honest")?,
            bed.lasting_endpoint("honest")?,
        ];
        let hostile = bed.lasting_endpoint("hostile")?;
        let victim = Victim::start(&victims[0], &victims[1])?;
        victim.goes_on(3)?;
        let before = Footprint::of(bed.router().pid())?;
        Ok(Scene {
            bed,
            victims,
            hostile,
            victim,
            before,
        })
    }

    /// A well-behaved session of the hostile endpoint, with registered pages; for now.
    pub(crate) fn rig(&self) -> Rig {
        Rig::new(&self.hostile.socket, 1 << 20).expect("a session of the hostile endpoint")
    }

    /// Waits until a session of the hostile endpoint has ended for a reason that contains this.
    pub(crate) fn ended(&self, reason: &str) -> Result<()> {
        let ended = |status: &serde_json::Value| {
            status["ended_sessions"].as_array().is_some_and(|all| {
                all.iter().any(|e| {
                    e["endpoint"] == self.hostile.name.as_str()
                        && e["reason"].as_str().is_some_and(|r| r.contains(reason))
                })
            })
        };
        self.bed
            .wait_for_status(ended, DEADLINE)
            .with_context(|| format!("no session ended because of {reason:?}"))
    }

    /// The victim's traffic still flows, and was right all the time; nothing of the hostile
    /// sessions is left.
    pub(crate) fn end(mut self) {
        let checked = self.check();
        checked.expect("the router and the victim are well");
    }

    fn check(&mut self) -> Result<()> {
        ensure!(self.bed.router().is_alive(), "the router ended");
        self.victim.goes_on(3)?;
        let name = self.hostile.name.clone();
        let gone = |status: &serde_json::Value| {
            status["endpoints"].as_array().is_some_and(|all| {
                all.iter()
                    .filter(|e| e["name"] == name.as_str())
                    .all(|e| e["sessions"].as_array().is_some_and(Vec::is_empty))
            })
        };
        self.bed.wait_for_status(gone, REAPED)?;
        let pid = self.bed.router().pid();
        self.before.wait_back(pid, REAPED)?;
        self.victim.goes_on(3)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        if !self.bed.router().is_alive() {
            eprintln!("the router has ended");
        } else if let Ok(status) = self.bed.status() {
            eprintln!("{status:#}");
        }
    }
}
