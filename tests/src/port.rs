//! TCP ports for the bootstrap of RDMA programs.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::{Running, descendants};

/// Below the range from which the kernel takes ports of outgoing connections.
const FIRST: u16 = 11_000;
const SPAN: u16 = 20_000;

/// A port of this host that nobody listens on, and that no other test of this run gets.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id().wrapping_mul(97) % u32::from(SPAN)) as u16;
    loop {
        // Relaxed: only that no two callers get the same number matters.
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + start.wrapping_add(n) % SPAN;
        if TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return port;
        }
    }
}

/// Waits until somebody listens on a TCP port of this network namespace; false at the deadline,
/// or if `alive` says that nobody will.
pub fn wait_for_listener(port: u16, deadline: Duration, mut alive: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + deadline;
    while Instant::now() < until && alive() {
        if is_listening("/proc/self", port) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// Waits until a process, or one that it started, is in a network namespace where somebody
/// listens on a TCP port; false as for [`wait_for_listener`].
pub fn wait_for_listener_of(running: &mut Running, port: u16, deadline: Duration) -> bool {
    let until = Instant::now() + deadline;
    while Instant::now() < until && running.is_alive() {
        let mut family = descendants(running.pid());
        // Its own namespace is the test's.
        family.retain(|&pid| pid != running.pid());
        let found = family.iter().any(|pid| {
            let listens = is_listening(&format!("/proc/{pid}"), port);
            listens && network_of(*pid).is_some_and(|of| Some(of) != network_of(running.pid()))
        });
        if found {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// Waits until somebody listens on a TCP port of a process's own network namespace; false as for
/// [`wait_for_listener`].
pub fn wait_for_listener_with(running: &mut Running, port: u16, deadline: Duration) -> bool {
    let until = Instant::now() + deadline;
    while Instant::now() < until && running.is_alive() {
        if is_listening(&format!("/proc/{}", running.pid()), port) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

fn network_of(pid: u32) -> Option<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/net")).ok()
}

fn is_listening(process: &str, port: u16) -> bool {
    const LISTEN: &str = "0A";
    let wanted = format!(":{port:04X}");
    ["tcp", "tcp6"].into_iter().any(|table| {
        std::fs::read_to_string(format!("{process}/net/{table}"))
            .unwrap_or_default()
            .lines()
            .skip(1)
            .any(|line| {
                let mut fields = line.split_ascii_whitespace().skip(1);
                let local = fields.next().unwrap_or_default();
                local.ends_with(&wanted) && fields.nth(1) == Some(LISTEN)
            })
    })
}
