//! Garbage in the rings.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use freeflow_session::Request;
use freeflow_shm::{AtomicU64, SendEntry, Sge};
use freeflow_tests::DEADLINE;
use freeflow_tests::rig::{CAP, IOVA, Rig, datagrams, join, write};
use freeflow_types::{Opcode, QpType, WcStatus};
use rustix::io::Errno;

use crate::scene::Scene;

/// SplitMix64.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB)
    }
}

const SEND_PRODUCED: usize = 0;
const RECV_PRODUCED: usize = 16;

/// Words are shared memory: the order of these stores is that of the processor.
fn poke(words: &[AtomicU64], at: usize, value: u64) {
    if let Some(word) = words.get(at) {
        word.store(value, Ordering::SeqCst);
    }
}

#[test]
fn a_send_index_that_runs_away_ends_the_session() {
    let scene = Scene::new();
    for claim in [65, 1 << 31, u64::MAX, u64::MAX - 64] {
        let mut rig = scene.rig();
        let (a, _b) = rig.pair().unwrap();
        poke(a.region.words(), SEND_PRODUCED, claim);
        rig.raw.mark(a.made.slot);
        scene
            .ended(&format!("claims {claim} requests, more than it holds"))
            .unwrap();
    }
    scene.end();
}

#[test]
fn a_receive_index_that_runs_away_ends_the_session_and_not_the_senders() {
    let scene = Scene::new();
    let mut sender = Rig::new(&scene.victims[0].socket, 4096).unwrap();
    // Its peer of the same tenant is the bad one: it may be reached.
    let mut bad = Rig::new(&scene.victims[1].socket, 4096).unwrap();
    let mut a = sender.qp(QpType::Rc, CAP).unwrap();
    let b = bad.qp(QpType::Rc, CAP).unwrap();
    join((&sender, &a), (&bad, &b)).unwrap();
    poke(b.region.words(), RECV_PRODUCED, 1 << 40);
    let entry = SendEntry {
        opcode: Opcode::Send.raw() as u8,
        num_sge: 1,
        ..SendEntry::default()
    };
    let sge = sender.sge(0, 64);
    sender.send(&mut a, &entry, &[sge]).unwrap();
    // The peer's session ended: it is silent from now on.
    let failed = sender.completion(DEADLINE).unwrap();
    assert_eq!(failed.status, WcStatus::RetryExcErr.raw() as u8);
    drop((sender, bad));
    scene.end();
}

#[test]
fn indices_that_go_back_and_random_slots_harm_nobody_else() {
    let scene = Scene::new();
    let mut numbers = Numbers(7);
    for round in 0..24 {
        let mut rig = scene.rig();
        let (a, b) = rig.pair().unwrap();
        let ud = rig.qp(QpType::Ud, CAP).unwrap();
        for (attr, mask) in datagrams(5) {
            rig.modify(&ud, attr, mask).unwrap();
        }
        for qp in [&a, &b, &ud] {
            let words = qp.region.words();
            for at in (64..words.len()).step_by(1 + round % 3) {
                let random = numbers.next();
                // Some of them nearly right.
                let value = match random % 4 {
                    0 => random,
                    1 => IOVA + (random >> 40),
                    2 => random & 0x0003_000F,
                    _ => u64::from(rig.key) << 32 | random >> 50,
                };
                poke(words, at, value);
            }
            let claim = numbers.next() % 65;
            poke(words, SEND_PRODUCED, claim);
            poke(words, RECV_PRODUCED, numbers.next() % 65);
            rig.raw.mark(qp.made.slot);
        }
        // It may be ended or not, but the router answers.
        let _ = rig.raw.ask(&Request::QueryQp { qp: a.made.qp }).unwrap();
        // Backwards.
        poke(a.region.words(), SEND_PRODUCED, 0);
        rig.raw.mark(a.made.slot);
        let _ = rig.raw.ask(&Request::QueryQp { qp: a.made.qp }).unwrap();
    }
    scene.end();
}

#[test]
fn a_completion_ring_with_garbage_is_full() {
    let scene = Scene::new();
    for consumed in [1 << 40, 1 << 63, 17] {
        let mut rig = Rig::with(&scene.hostile.socket, 4096, 16).unwrap();
        let (mut a, mut b) = rig.pair().unwrap();
        {
            const CONSUMED: usize = 8;
            const ARMED: usize = 16;
            let words = rig.cq.region.words();
            poke(words, CONSUMED, consumed);
            poke(words, ARMED, u64::MAX);
        }
        let sge = rig.sge(0, 64);
        rig.recv(&mut b, 1, &[sge]).unwrap();
        let entry = SendEntry {
            opcode: Opcode::Send.raw() as u8,
            num_sge: 1,
            ..SendEntry::default()
        };
        rig.send(&mut a, &entry, &[sge]).unwrap();
        // Its own queue overran: it is told so, and goes on.
        let mut bytes = [0; freeflow_session::Event::BYTES];
        freeflow_shm::recv_packet(&rig.events, &mut bytes, rustix::net::RecvFlags::empty())
            .unwrap();
        let event = freeflow_session::Event::decode(&bytes);
        assert!(
            matches!(event, Some(freeflow_session::Event::Cq(..))),
            "{event:?}"
        );
        rig.raw.call(&Request::QueryQp { qp: a.made.qp }).unwrap();
    }
    scene.end();
}

#[test]
fn spinning_marks_and_doorbells_do_not_stop_others() {
    let scene = Scene::new();
    let rig = scene.rig();
    let until = Instant::now() + Duration::from_secs(3);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for word in rig.raw.dirty.words() {
                    word.store(u64::MAX, Ordering::Relaxed);
                }
                rig.raw.doorbell.ring();
            }
        });
        while Instant::now() < until {
            scene.victim.goes_on(2).unwrap();
            rig.raw.call(&Request::OpenContext).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(rig);
    scene.end();
}

#[test]
fn a_doorbell_that_is_full_or_blocks_stops_nobody() {
    let scene = Scene::new();
    let mut rig = scene.rig();
    let (a, _b) = rig.pair().unwrap();
    let bell = std::os::fd::AsFd::as_fd(&rig.raw.doorbell);
    // To the brim, then made to block: whoever writes or reads it now waits.
    rustix::io::write(bell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    assert_eq!(
        rustix::io::write(bell, &1u64.to_ne_bytes()),
        Err(Errno::AGAIN)
    );
    rustix::io::ioctl_fionbio(bell, false).unwrap();
    scene.victim.goes_on(3).unwrap();
    rig.raw.call(&Request::QueryQp { qp: a.made.qp }).unwrap();
    // Emptied, it rings again.
    let mut count = [0; 8];
    rustix::io::read(bell, &mut count).unwrap();
    let entry = write(rig.key, IOVA + 64);
    let mut a = a;
    let sge = rig.sge(0, 64);
    rig.send(&mut a, &entry, &[sge]).unwrap();
    assert_eq!(rig.completion(DEADLINE).unwrap().status, 0);
    drop(rig);
    scene.end();
}

/// A second thread turns what the router checks into something else before it uses it.
#[test]
fn requests_that_change_while_they_are_read_stay_in_their_bounds() {
    let scene = Scene::new();
    let mut rig = scene.rig();
    let (mut a, b) = rig.pair().unwrap();
    let good = write(rig.key, IOVA + 4096);
    let stop = AtomicBool::new(false);
    let region = a.region.clone();
    let until = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut numbers = Numbers(1);
            let words = region.words();
            while !stop.load(Ordering::Relaxed) {
                // Counts, lengths and addresses of the slots, between right and wild.
                let at = 64 + (numbers.next() as usize) % (words.len() - 64);
                let Some(word) = words.get(at) else { continue };
                let before = word.load(Ordering::Relaxed);
                word.store(numbers.next(), Ordering::Relaxed);
                word.store(u64::MAX, Ordering::Relaxed);
                word.store(before, Ordering::Relaxed);
            }
        });
        while Instant::now() < until {
            let sge: Sge = rig.sge(0, 4096);
            if rig.send(&mut a, &good, &[sge]).is_err() {
                break;
            }
            let done = rig.completion(DEADLINE).unwrap();
            if done.status != 0 {
                // It was caught wild: the queue pairs start anew.
                let reset = freeflow_types::QpAttr::default();
                let mask = freeflow_types::QpAttrMask::STATE;
                rig.modify(&a, reset, mask).unwrap();
                rig.modify(&b, reset, mask).unwrap();
                join((&rig, &a), (&rig, &b)).unwrap();
            }
            scene.victim.goes_on(0).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(rig);
    scene.end();
}
