//! Where userfaultfd is refused.

mod common;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use common::*;
use freeflow_convert::lock;

tests! {
    one_thread_alone_converts: &[Mode::Refused],
    several_threads_share_nothing_and_lose_nothing: &[Mode::Refused],
    what_was_converted_before_stays_shared: &[Mode::Refused],
    the_device_serves_as_well: &[Mode::Full],
}

fn one_thread_alone_converts(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    // One that has ended does not count.
    std::thread::spawn(|| {}).join().unwrap();
    while threads() != 1 {
        std::thread::yield_now();
    }
    let registration = pool.register(memory.addr, memory.len);
    assert!(is_shared(&registration));
    assert_eq!(
        pool.read(&registration, 0, memory.len),
        memory.read(0, memory.len)
    );
    let stats = lock().stats();
    assert_eq!((stats.conversions, stats.converted_bytes), (1, 8 * PAGE));
    assert_eq!((stats.foreign_bytes, stats.unsafe_bytes), (0, 0));
    pool.deregister(registration);
}

fn several_threads_share_nothing_and_lose_nothing(_: Mode) {
    let pool = Pool::new(GIB);
    let stop = AtomicBool::new(false);
    let memory = Memory::filled(8 * PAGE);
    let addr = memory.addr;
    word(addr).store(0, Relaxed);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut last = 0;
            while !stop.load(Relaxed) {
                last += 1;
                for page in 0..8 {
                    word(addr + page * PAGE).store(last, Relaxed);
                }
            }
            last
        });
        for round in 1..=100 {
            let seen = word(addr).load(Relaxed);
            let registration = pool.register(addr + 100, 8 * PAGE - 200);
            assert!(is_foreign(&registration));
            let stats = lock().stats();
            // Pages in the one, bytes in the other.
            assert_eq!(stats.unsafe_bytes, round * 8 * PAGE);
            assert_eq!(stats.foreign_bytes, round * (8 * PAGE - 200));
            assert_eq!(stats.conversions, 0);
            pool.deregister(registration);
            while word(addr).load(Relaxed) < seen + 2 {
                std::thread::yield_now();
            }
        }
        stop.store(true, Relaxed);
        let last = writer.join().unwrap();
        for page in 0..8 {
            assert_eq!(word(addr + page * PAGE).load(Relaxed), last);
        }
    });
    assert_eq!(pool.used(), 0);
}

fn what_was_converted_before_stays_shared(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let first = pool.register(memory.addr, 4 * PAGE);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                std::thread::yield_now();
            }
        });
        let again = pool.register(memory.addr, 4 * PAGE);
        assert!(is_shared(&again));
        let both = pool.register(memory.addr, 8 * PAGE);
        let [shared, foreign] = both.pieces() else {
            panic!("{both:x?}");
        };
        assert_eq!((shared.len, foreign.len), (4 * PAGE, 4 * PAGE));
        assert_eq!(lock().stats().unsafe_bytes, 4 * PAGE);
        for registration in [first, again, both] {
            pool.deregister(registration);
        }
        stop.store(true, Relaxed);
    });
}

fn the_device_serves_as_well(_: Mode) {
    if std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
        .is_err()
    {
        skip("needs /dev/userfaultfd");
    }
    refuse_userfaultfd();
    let (mode, works) = freeflow_convert::probe_userfaultfd();
    assert_eq!((mode, works), (freeflow_convert::UffdMode::Full, true));
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let held = std::thread::scope(|scope| {
        scope
            .spawn(|| pool.register(memory.addr, memory.len))
            .join()
            .unwrap()
    });
    assert!(is_shared(&held));
    pool.deregister(held);
}
