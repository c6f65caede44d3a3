//! The wake-up protocols under every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p
//! freeflow-shm --release --test loom`.
#![cfg(loom)]

use std::sync::Arc;

use freeflow_shm::{ARM_ANY, AtomicU64, CompletionEntry, CqRing, DirtyMap, QpGeometry, QpRings};
use loom::thread;

fn words(n: usize) -> Arc<Vec<AtomicU64>> {
    Arc::new((0..n).map(|_| AtomicU64::new(0)).collect())
}

/// Loom bounds the atomics of a model; the map's layout is thinned out for it by reusing one
/// allocation per test.
fn bounded(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 100_000;
    builder.check(model);
}

#[test]
fn a_post_is_seen_or_wakes_the_router() {
    bounded(|| {
        let memory = words(DirtyMap::WORDS);
        let ring = words(1);
        let poster = {
            let (memory, ring) = (memory.clone(), ring.clone());
            thread::spawn(move || {
                ring[0].store(1, std::sync::atomic::Ordering::Relaxed);
                DirtyMap::new(&memory).unwrap().mark(70)
            })
        };
        let map = DirtyMap::new(&memory).unwrap();
        let mut seen = false;
        let look = |seen: &mut bool| {
            map.take(|slot| {
                assert_eq!(slot, 70);
                // The index stored before the mark is visible.
                assert_eq!(ring[0].load(std::sync::atomic::Ordering::Relaxed), 1);
                *seen = true;
            });
        };
        look(&mut seen);
        let asleep = map.arm();
        if !asleep {
            look(&mut seen);
        }
        let woken = poster.join().unwrap();
        if !seen {
            assert!(!asleep || woken, "the router sleeps on a post");
            look(&mut seen);
            assert!(seen);
        }
    });
}

#[test]
fn a_completion_is_polled_or_raises_an_event() {
    bounded(|| {
        let memory = words(CqRing::words(2));
        let router = {
            let memory = memory.clone();
            thread::spawn(move || {
                let cq = CqRing::new(&memory, 2).unwrap();
                cq.produce(
                    0,
                    &CompletionEntry {
                        wr_id: 42,
                        ..CompletionEntry::default()
                    },
                );
                cq.take_arming(false)
            })
        };
        let cq = CqRing::new(&memory, 2).unwrap();
        cq.arm(ARM_ANY);
        let polled = cq.produced() == 1;
        if polled {
            assert_eq!(cq.read(0).wr_id, 42);
        }
        let event = router.join().unwrap();
        assert!(polled || event, "a completion without an event");
    });
}

#[test]
fn a_receive_is_seen_or_resumes_the_sender() {
    bounded(|| {
        let geometry = QpGeometry::new(1, 1, 1, 1, 0);
        let memory = words(geometry.words());
        let poster = {
            let memory = memory.clone();
            thread::spawn(move || QpRings::new(&memory, geometry).unwrap().publish_recv(1))
        };
        let rings = QpRings::new(&memory, geometry).unwrap();
        let seen = rings.want_recv(0);
        let marked = poster.join().unwrap();
        assert!(seen || marked, "a receive that nobody notices");
    });
}
