//! What a process holds: descriptors, mappings, shared memory.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What a process holds at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Open descriptors.
    pub descriptors: usize,
    /// Mappings of memory that is shared with clients.
    pub mappings: usize,
    /// Bytes of shared memory that are resident.
    pub shared: u64,
}

/// Names of the memfds that are shared with clients.
const SHARED: &str = "/memfd:freeflow-";

impl Footprint {
    /// Of a process that lives.
    pub fn of(pid: u32) -> Result<Footprint> {
        let path = |file: &str| format!("/proc/{pid}/{file}");
        let fds = std::fs::read_dir(path("fd")).context("cannot list descriptors")?;
        let maps = std::fs::read_to_string(path("maps")).context("cannot read maps")?;
        let status = std::fs::read_to_string(path("status")).context("cannot read status")?;
        let shared = status
            .lines()
            .find_map(|line| line.strip_prefix("RssShmem:"))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|kib| kib.parse::<u64>().ok())
            .context("no RssShmem")?;
        Ok(Footprint {
            descriptors: fds.count(),
            mappings: maps.lines().filter(|line| line.contains(SHARED)).count(),
            shared: shared << 10,
        })
    }

    /// Waits until the process holds no more than this.
    pub fn wait_back(&self, pid: u32, deadline: Duration) -> Result<()> {
        let until = Instant::now() + deadline;
        loop {
            let now = Footprint::of(pid)?;
            let back = now.descriptors <= self.descriptors
                && now.mappings <= self.mappings
                && now.shared <= self.shared;
            if back {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("after {deadline:?} process {pid} holds {now:?}, at first it was {self:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
