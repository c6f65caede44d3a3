//! A look at a running program: whether it, or a process it started, has loaded another
//! libibverbs than ours. Nothing foretells that of a library which is loaded by name at run time.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::inject::Injection;

/// Times after the start at which to look: after small programs, large ones, and those that
/// compile or download something first.
pub(crate) const LOOKS: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(30),
];

/// Processes looked at, at most.
const MAX_PROCESSES: usize = 1024;

/// A process that has a libibverbs which is not ours.
#[derive(Debug)]
pub(crate) struct Stray {
    pid: u32,
    command: String,
    library: PathBuf,
}

impl std::fmt::Display for Stray {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} (pid {}) has loaded {} instead of FreeFlow's library: it does not see the device",
            self.command,
            self.pid,
            self.library.display()
        )
    }
}

/// Looks at a process and those that it started.
pub(crate) fn find_stray(root: u32, injection: &Injection) -> Option<Stray> {
    let mut waiting = vec![root];
    for _ in 0..MAX_PROCESSES {
        let pid = waiting.pop()?;
        // A process that ends meanwhile has nothing to show.
        let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        if let Some(library) = foreign(&String::from_utf8_lossy(&maps), injection) {
            let command = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            return Some(Stray {
                pid,
                command: command.unwrap_or_default().trim().to_owned(),
                library,
            });
        }
        waiting.extend(children(pid));
    }
    None
}

/// The foreign library among a process's mappings, unless ours is there as well.
fn foreign(maps: &str, injection: &Injection) -> Option<PathBuf> {
    let mut found = None;
    for line in maps.lines() {
        // Address, permissions, offset, device, inode; then the file.
        let Some(at) = line.find('/') else {
            continue;
        };
        let file = Path::new(&line[at..]);
        if injection.is_foreign(file) {
            found = Some(file.to_owned());
        } else if injection.is_ours(file) {
            return None;
        }
    }
    found
}

fn children(pid: u32) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    threads
        .filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("children")).ok())
        .flat_map(|list| {
            let pids = list
                .split_ascii_whitespace()
                .filter_map(|pid| pid.parse().ok());
            pids.collect::<Vec<_>>()
        })
        .collect()
}
