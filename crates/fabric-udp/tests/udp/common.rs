//! What the tests of packets share.

use std::convert::Infallible;
use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use freeflow_fabric_udp::{Datagrams, Ecn, Fabric, Link, Progress, Received, To};
use freeflow_types::Psn;
use freeflow_wire::{Bth, BthOpcode, Headers};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// Says, loudly, that a test is skipped.
pub(crate) fn skip(test: &str, why: &str) {
    let line = format!("skipped: {test}: {why}");
    eprintln!("{line}");
    if let Some(file) = std::env::var_os("FREEFLOW_SKIPS")
        && let Ok(mut file) = File::options().append(true).create(true).open(file)
    {
        let _ = writeln!(file, "{line}");
    }
}

/// Waits for a descriptor to be readable, or for a time.
pub(crate) fn wait(fd: impl AsFd, at_most: Duration) {
    let fd = fd.as_fd();
    let timeout = Timespec {
        tv_sec: at_most.as_secs() as i64,
        tv_nsec: at_most.subsec_nanos().into(),
    };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).unwrap();
}

/// The payload of packet `psn`: all differ.
pub(crate) fn payload(psn: u32, len: usize) -> Vec<u8> {
    let word = psn.wrapping_mul(0x9E37_79B9);
    (0..len)
        .map(|i| (word.rotate_left(i as u32 % 32) as usize ^ i) as u8)
        .collect()
}

pub(crate) fn headers(psn: u32) -> Headers {
    Headers::new(Bth::new(BthOpcode::RC_SEND_MIDDLE, 0x1234, Psn::new(psn)))
}

/// Sends packet `psn` at the next flush; false if there is no room.
pub(crate) fn push<L: Link>(fabric: &mut Fabric<L>, to: &To, psn: u32, len: usize) -> bool {
    let data = payload(psn, len);
    let pushed = fabric.push(to, &headers(psn), len, |room| {
        room.copy_from_slice(&data);
        Ok::<_, Infallible>(())
    });
    match pushed {
        Ok(()) => true,
        Err(freeflow_fabric_udp::PushError::Full) => false,
        Err(e) => panic!("{e:?}"),
    }
}

/// Sends all that was pushed.
pub(crate) fn flush<L: Link>(fabric: &mut Fabric<L>) {
    let end = Instant::now() + DEADLINE;
    while fabric.flush(0).unwrap() == Progress::Blocked {
        assert!(Instant::now() < end, "the socket stays full");
        wait(&*fabric, DEADLINE);
    }
    assert!(!fabric.has_unsent());
}

/// Gives each packet that arrives to `each`, until it says that it has enough.
pub(crate) fn receive<L: Link>(fabric: &mut Fabric<L>, mut each: impl FnMut(Received<'_>) -> bool) {
    let mut batch = Datagrams::default();
    let end = Instant::now() + DEADLINE;
    loop {
        fabric.receive(0, &mut batch).unwrap();
        for datagram in batch.iter() {
            if let Some(received) = fabric.check(datagram)
                && !each(received)
            {
                return;
            }
        }
        if batch.is_empty() {
            let counters = fabric.received();
            assert!(Instant::now() < end, "nothing comes: {counters:?}");
            wait(&*fabric, DEADLINE);
        }
    }
}

pub(crate) fn to(dst: IpAddr, flow: u32) -> To {
    To {
        dst,
        flow,
        ecn: Ecn::NotCapable,
    }
}
