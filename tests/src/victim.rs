//! Two honest sessions that exchange data while something goes wrong elsewhere, and check every
//! byte of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use freeflow_session::{Reply, Request};
use freeflow_shm::SendEntry;
use freeflow_types::{Opcode, QpCap, QpType};

use crate::rig::{CAP, IOVA, RawQp, Rig, join};
use crate::{DEADLINE, Lasting};

const PAGE: u64 = 4096;
const PAGES: u64 = 64;
/// The first page carries messages, the others are canaries.
const MESSAGE: usize = 4096;

const SMALL: QpCap = QpCap {
    max_send_wr: 2,
    max_recv_wr: 2,
    ..CAP
};

/// Honest traffic in the background.
pub struct Victim {
    rounds: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

fn canary(page: u64, side: u8) -> Vec<u8> {
    (0..PAGE)
        .map(|at| (page.wrapping_mul(31) ^ at ^ (u64::from(side) << 6)) as u8)
        .collect()
}

struct Side {
    rig: Rig,
    qp: RawQp,
    name: u8,
}

impl Side {
    fn new(endpoint: &Lasting, name: u8) -> Result<Side> {
        // Small rings: all their pages are touched soon, and the router's memory is then steady.
        let mut rig = Rig::with(&endpoint.socket, PAGES * PAGE, 4)?;
        for page in 1..PAGES {
            rig.fill(page * PAGE, &canary(page, name))?;
        }
        let qp = rig.qp(QpType::Rc, SMALL)?;
        Ok(Side { rig, qp, name })
    }

    fn check_canaries(&self) -> Result<()> {
        for page in 1..PAGES {
            let found = self.rig.bytes(page * PAGE, PAGE as usize)?;
            ensure!(
                found == canary(page, self.name),
                "page {page} of side {} was changed",
                self.name
            );
        }
        Ok(())
    }
}

/// One message from one side to the other, with a pattern that no other round has.
fn exchange(from: &mut Side, to: &mut Side, round: u64) -> Result<()> {
    let pattern: Vec<u8> = (0..MESSAGE as u64)
        .map(|at| ((round.wrapping_mul(0x9E37_79B9) >> 7) ^ (at * 13)) as u8)
        .collect();
    from.rig.fill(0, &pattern)?;
    to.rig.fill(0, &vec![0; MESSAGE])?;
    let sge = to.rig.sge(0, MESSAGE as u32);
    to.rig.recv(&mut to.qp, round, &[sge])?;
    let entry = SendEntry {
        wr_id: round,
        opcode: Opcode::Send.raw() as u8,
        num_sge: 1,
        ..SendEntry::default()
    };
    let sge = from.rig.sge(0, MESSAGE as u32);
    from.rig.send(&mut from.qp, &entry, &[sge])?;
    let sent = from.rig.completion(DEADLINE).context("sending")?;
    let received = to.rig.completion(DEADLINE).context("receiving")?;
    ensure!(
        sent.status == 0 && sent.wr_id == round && sent.is_send,
        "sender: {sent:?}"
    );
    ensure!(
        received.status == 0 && received.wr_id == round && !received.is_send,
        "receiver: {received:?}"
    );
    ensure!(
        to.rig.bytes(0, MESSAGE)? == pattern,
        "the data of round {round} is wrong"
    );
    Ok(())
}

fn traffic(mut a: Side, mut b: Side, rounds: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    // Relaxed: a flag and a count, with nothing behind them.
    while !stop.load(Ordering::Relaxed) {
        let round = rounds.load(Ordering::Relaxed);
        exchange(&mut a, &mut b, round).context("from a to b")?;
        exchange(&mut b, &mut a, round).context("from b to a")?;
        if round.is_multiple_of(64) {
            a.check_canaries()?;
            b.check_canaries()?;
            let began = Instant::now();
            let qp = a.qp.made.qp;
            let (reply, _) = a.rig.raw.call(&Request::QueryQp { qp })?;
            ensure!(matches!(reply, Reply::QpQueried(_)), "{reply:?}");
            ensure!(began.elapsed() < DEADLINE, "a control verb took too long");
        }
        rounds.fetch_add(1, Ordering::Relaxed);
    }
    a.check_canaries()?;
    b.check_canaries()
}

impl Victim {
    /// Starts traffic between two endpoints, which may be the same.
    pub fn start(a: &Lasting, b: &Lasting) -> Result<Victim> {
        let (a, b) = (Side::new(a, 1)?, Side::new(b, 2)?);
        join((&a.rig, &a.qp), (&b.rig, &b.qp))?;
        let (rounds, stop) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let thread = std::thread::spawn({
            let (rounds, stop) = (rounds.clone(), stop.clone());
            move || traffic(a, b, &rounds, &stop)
        });
        Ok(Victim {
            rounds,
            stop,
            thread: Some(thread),
        })
    }

    /// Address of the first canary byte, as a work request of the victim names it.
    pub const CANARIES: u64 = IOVA + PAGE;

    /// Waits until the traffic has gone on for `n` rounds from now.
    pub fn goes_on(&self, n: u64) -> Result<()> {
        let from = self.rounds();
        let until = Instant::now() + DEADLINE;
        while self.rounds() < from + n {
            let dead = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            if dead || Instant::now() > until {
                bail!(
                    "the victim's traffic stands still after {} rounds",
                    self.rounds()
                );
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Rounds done.
    pub fn rounds(&self) -> u64 {
        // Relaxed: a count.
        self.rounds.load(Ordering::Relaxed)
    }

    /// Ends the traffic; fails if anything was wrong with it.
    pub fn finish(mut self) -> Result<()> {
        let still = self.goes_on(2);
        // Relaxed: a flag.
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result.and(still),
            _ => bail!("the victim panicked"),
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // Relaxed: a flag.
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
