//! The wake-up protocols under every interleaving: `RUSTFLAGS="--cfg loom" cargo test -p
//! freeflow-shm --release --test loom`.
#![cfg(loom)]

use std::sync::Arc;

use freeflow_shm::{
    ARM_ANY, AtomicU64, CompletionEntry, CqRing, DirtyMap, QpGeometry, QpRings, RecvEntry,
    RegionEntry, RegionTable, SrqGeometry, SrqRing,
};
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
fn a_post_is_not_lost_when_only_a_part_is_taken() {
    bounded(|| {
        let memory = words(DirtyMap::WORDS);
        let map = DirtyMap::new(&memory).unwrap();
        // Work of two slots of one summary is waiting; one of them gets more meanwhile.
        map.mark(70);
        map.mark(200);
        let poster = {
            let memory = memory.clone();
            thread::spawn(move || DirtyMap::new(&memory).unwrap().mark(200))
        };
        let mut from = 0;
        let mut seen = [0, 0];
        let mut take = |seen: &mut [u32; 2]| {
            map.take_some(1, &mut from, |slot| seen[usize::from(slot == 200)] += 1);
        };
        take(&mut seen);
        assert!(!map.arm());
        take(&mut seen);
        let asleep = map.arm();
        let woken = poster.join().unwrap();
        if !asleep || woken {
            take(&mut seen);
        }
        assert!(seen[0] == 1 && seen[1] >= 1, "{seen:?}");
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

/// The router takes from a ring of one slot: the poster waits for the slot, the router for a
/// request; nothing is lost, torn or seen twice.
#[test]
fn a_shared_receive_is_seen_and_its_slot_comes_back() {
    bounded(|| {
        let geometry = SrqGeometry::new(1, 1);
        let memory = words(geometry.words());
        let poster = {
            let memory = memory.clone();
            thread::spawn(move || {
                let ring = SrqRing::new(&memory, geometry).unwrap();
                let mut marked = false;
                let mut posted = 0;
                for wr_id in [10, 11] {
                    if posted - ring.consumed() == 0 {
                        RecvEntry::store(wr_id, &[], ring.slot(posted));
                        posted += 1;
                        marked |= ring.publish(posted);
                    }
                }
                (posted, marked)
            })
        };
        let ring = SrqRing::new(&memory, geometry).unwrap();
        let mut head = 0;
        let mut seen = Vec::new();
        let mut take = |head: &mut u64| {
            while ring.produced() != *head || ring.want(*head) {
                seen.push(RecvEntry::load(ring.slot(*head), &mut Vec::new()).wr_id);
                *head += 1;
                ring.consume(*head);
            }
        };
        take(&mut head);
        let (posted, marked) = poster.join().unwrap();
        assert!(head == posted || marked, "a receive that nobody notices");
        take(&mut head);
        assert_eq!(head, posted);
        // The second one is posted only if the slot came back in time.
        assert_eq!(seen, [10, 11][..posted as usize]);
    });
}

/// What a region leads to: loom reports every access that another one does not happen before.
struct Memory(loom::cell::UnsafeCell<u64>);

// SAFETY: that no two threads use it at once is what the model checks.
unsafe impl Sync for Memory {}
// SAFETY: as above.
unsafe impl Send for Memory {}

impl Memory {
    fn write(&self, value: u64) {
        // SAFETY: loom fails the model if another access is not ordered with this one.
        self.0.with_mut(|at| unsafe { *at = value });
    }
}

/// One use of the table, as the router's turn is.
fn use_region(table: &RegionTable<'_>, turn: u64, keys: &[u32], memory: &[Memory]) {
    table.begin_use(turn);
    for &key in keys {
        if let Some(entry) = table.lookup(0, key) {
            // Never a part of one region and a part of another.
            assert_eq!(entry.len, entry.offset + 100);
            memory[entry.offset as usize].write(key.into());
        }
    }
    table.end_use(turn + 1);
}

fn entry(offset: u64) -> RegionEntry {
    RegionEntry {
        offset,
        len: offset + 100,
        ..RegionEntry::default()
    }
}

/// The memory of a region is the program's own again once it is deregistered, and its slot may be
/// written, while the router uses the table again and again.
#[test]
fn deregistered_memory_is_not_accessed() {
    bounded(|| {
        let words = words(RegionTable::words(1));
        let memory = || Memory(loom::cell::UnsafeCell::new(0));
        let memory = Arc::new([memory(), memory()]);
        RegionTable::new(&words, 1)
            .unwrap()
            .register(0, 5, &entry(0));
        let router = {
            let (words, memory) = (words.clone(), memory.clone());
            thread::spawn(move || {
                let table = RegionTable::new(&words, 1).unwrap();
                use_region(&table, 1, &[5, 6], &*memory);
                use_region(&table, 3, &[6, 5], &*memory);
            })
        };
        let table = RegionTable::new(&words, 1).unwrap();
        assert!(table.deregister(0, 5));
        if let Some(number) = table.in_use() {
            while !table.is_over(number) {
                thread::yield_now();
            }
        }
        memory[0].write(1);
        // The slot's next life.
        table.register(0, 6, &entry(1));
        router.join().unwrap();
    });
}

/// A region that is registered is found by whoever learned its key.
#[test]
fn a_registered_region_is_found() {
    bounded(|| {
        let words = words(RegionTable::words(1));
        let key = Arc::new(AtomicU64::new(0));
        let library = {
            let (words, key) = (words.clone(), key.clone());
            thread::spawn(move || {
                let table = RegionTable::new(&words, 1).unwrap();
                table.register(0, 5, &entry(7));
                key.store(5, std::sync::atomic::Ordering::Release);
            })
        };
        let table = RegionTable::new(&words, 1).unwrap();
        let known = key.load(std::sync::atomic::Ordering::Acquire) as u32;
        let found = table.lookup(0, 5);
        assert!(found.is_none_or(|found| found == entry(7)));
        assert!(known == 0 || found.is_some());
        library.join().unwrap();
    });
}
