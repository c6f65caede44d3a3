//! Registrations that share pages, and mappings that come and go.

mod common;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use common::*;
use freeflow_convert::{Backing, Registration, lock};
use rustix::io::Errno;
use rustix::mm::MprotectFlags;

tests! {
    nested_and_identical_registrations_share_pages: ALL,
    registrations_end_in_any_order: ALL,
    memory_may_be_unmapped_first: ALL,
    what_is_mapped_there_afterwards_is_not_touched: ALL,
    moved_memory_stays_shared: ALL,
    collecting_takes_what_is_unused_and_no_more: ALL,
    collecting_while_memory_moves: HELD,
    half_a_registration_is_rolled_back: ALL,
    a_source_without_a_descriptor: ALL,
    memory_is_shared_again_after_the_routers_death: ALL,
    writers_lose_nothing_after_the_routers_death: HELD,
    another_sessions_source_frees_nothing: ALL,
    signals_are_as_they_were: ALL,
    descriptors_are_few_and_closed_on_exec: ALL,
    the_heap_is_registered_while_threads_use_it: HELD,
}

/// Where the pool shows the first byte of a registration.
fn place(registration: &Registration) -> u64 {
    match registration.pieces()[0].backing {
        Backing::Pool { offset, .. } => offset,
        Backing::Foreign => panic!("{registration:x?} is not shared"),
    }
}

fn nested_and_identical_registrations_share_pages(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(16 * PAGE);
    let ranges = [(4, 4), (4, 4), (0, 16), (6, 4), (2, 3), (0, 16), (15, 1)];
    let mut all = Vec::new();
    for (at, pages) in ranges {
        all.push(pool.register(memory.addr + at * PAGE, pages * PAGE));
    }
    assert_eq!(pool.used(), 16 * PAGE, "each page once");
    for (at, registration) in ranges.iter().map(|r| r.0 * PAGE).zip(&all) {
        memory.write(at, &at.to_ne_bytes());
        assert_eq!(pool.read(registration, 0, 8), at.to_ne_bytes());
        pool.write(registration, 8, b"router");
        assert_eq!(memory.read(at + 8, 6), b"router");
    }
    // The identical ones are the same pages of the pool.
    assert_eq!(all[0].pieces(), all[1].pieces());
    assert_eq!(all[2].pieces(), all[5].pieces());
    all.into_iter().for_each(|r| pool.deregister(r));
}

fn registrations_end_in_any_order(_: Mode) {
    let pool = Pool::new(GIB);
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let memory = Memory::filled(8 * PAGE);
        let mut all = [(0, 6), (2, 6), (3, 2)]
            .map(|(at, pages)| Some(pool.register(memory.addr + at * PAGE, pages * PAGE)));
        for (done, index) in order.into_iter().enumerate() {
            pool.deregister(all[index].take().unwrap());
            pool.collect();
            assert_eq!(pool.used(), 8 * PAGE, "it is the application's memory");
            for left in all.iter().flatten() {
                assert_eq!(
                    pool.read(left, 0, left.len()),
                    memory.read(left.addr() - memory.addr, left.len())
                );
            }
            assert_eq!(
                memory.read(0, 8 * PAGE),
                pattern(memory.addr, 8 * PAGE),
                "{done}"
            );
        }
        memory.unmap(0, memory.len);
        pool.collect();
        assert_eq!(pool.used(), 0);
    }
}

fn memory_may_be_unmapped_first(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let whole = pool.register(memory.addr, memory.len);
    let part = pool.register(memory.addr + PAGE, PAGE);
    memory.unmap(0, 4 * PAGE);
    // A peer may still write there: it is pinned.
    pool.write(&whole, 0, b"nobody sees it");
    pool.collect();
    assert_eq!(
        pool.used(),
        8 * PAGE,
        "pages of a registration are not given back"
    );
    assert!(pool.try_register(memory.addr, PAGE, true).is_err());
    pool.deregister(whole);
    pool.collect();
    assert_eq!(pool.used(), 5 * PAGE);
    pool.deregister(part);
    pool.collect();
    assert_eq!(pool.used(), 4 * PAGE);
    assert_eq!(
        memory.read(4 * PAGE, 4 * PAGE),
        pattern(memory.addr + 4 * PAGE, 4 * PAGE)
    );
    memory.unmap(4 * PAGE, 4 * PAGE);
    pool.collect();
    assert_eq!(pool.used(), 0);
}

fn what_is_mapped_there_afterwards_is_not_touched(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let old = pool.register(memory.addr, memory.len);
    memory.unmap(0, memory.len);
    let next = Memory::at(memory.addr, 8 * PAGE);
    next.write(0, &[0x55; 8 * PAGE as usize]);
    // The old registration is of the old pages.
    pool.write(&old, 0, &[0xAA; 8 * PAGE as usize]);
    assert_eq!(next.read(0, next.len), [0x55; 8 * PAGE as usize]);
    let new = pool.register(next.addr + 2 * PAGE, 2 * PAGE);
    assert_ne!(place(&new), place(&old) + 2 * PAGE);
    assert_eq!(pool.read(&new, 0, 2 * PAGE), [0x55; 2 * PAGE as usize]);
    pool.deregister(old);
    pool.collect();
    assert_eq!(pool.used(), 2 * PAGE);
    assert_eq!(next.read(0, next.len), [0x55; 8 * PAGE as usize]);
    pool.write(&new, 0, b"new");
    assert_eq!(next.read(2 * PAGE, 3), b"new");
    // What is reused of the pool shows nothing of the old content.
    let third = Memory::new(8 * PAGE);
    let registration = pool.register(third.addr, third.len);
    assert_eq!(
        pool.read(&registration, 0, third.len),
        [0; 8 * PAGE as usize]
    );
    pool.deregister(registration);
    pool.deregister(new);
}

/// Moves memory as `realloc` does.
fn moved(memory: &Memory, len: u64) -> Memory {
    // Something is in the way.
    let old = memory.addr as *mut _;
    let target = Memory::new(len);
    // SAFETY: it replaces this test's own memory.
    let addr = unsafe {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        libc::mremap(old, memory.len as usize, len as usize, flags, target.addr)
    };
    assert_eq!(addr as u64, target.addr);
    target
}

fn moved_memory_stays_shared(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let wanted = memory.read(0, memory.len);
    let old = pool.register(memory.addr, memory.len);
    let next = moved(&memory, memory.len);
    assert_eq!(next.read(0, next.len), wanted);
    pool.write(&old, 100, b"old registration");
    assert_eq!(next.read(100, 16), b"old registration");
    let new = pool.register(next.addr, next.len);
    assert_eq!(place(&new), place(&old), "the same pages");
    // Another mapping at the old place is another one.
    let other = Memory::at(memory.addr, 4 * PAGE);
    other.write(0, b"other");
    let third = pool.register(other.addr, other.len);
    assert_ne!(place(&third), place(&old));
    pool.deregister(old);
    pool.deregister(new);
    pool.collect();
    assert_eq!(next.read(100, 16), b"old registration");
    assert_eq!(pool.used(), 12 * PAGE);
    // Cut into two, one of which moves.
    let end = Memory {
        addr: next.addr + 4 * PAGE,
        len: 4 * PAGE,
    };
    let end = moved(&end, end.len);
    let before = (next.read(0, 4 * PAGE), end.read(0, 4 * PAGE));
    let (a, b) = (
        pool.register(next.addr, 4 * PAGE),
        pool.register(end.addr, 4 * PAGE),
    );
    assert_eq!(place(&b), place(&a) + 4 * PAGE);
    assert_eq!(
        (pool.read(&a, 0, 4 * PAGE), pool.read(&b, 0, 4 * PAGE)),
        before
    );
    for registration in [a, b, third] {
        pool.deregister(registration);
    }
}

fn collecting_takes_what_is_unused_and_no_more(_: Mode) {
    let pool = Pool::new(GIB);
    let kept = Memory::filled(4 * PAGE);
    let kept_moved = Memory::filled(4 * PAGE);
    let registered = Memory::filled(4 * PAGE);
    let gone = Memory::filled(4 * PAGE);
    for memory in [&kept, &kept_moved, &gone] {
        let registration = pool.register(memory.addr, memory.len);
        pool.deregister(registration);
    }
    let registration = pool.register(registered.addr, registered.len);
    let content = kept_moved.read(0, 4 * PAGE);
    let kept_moved = moved(&kept_moved, 4 * PAGE);
    gone.unmap(0, gone.len);
    registered.unmap(0, PAGE);
    kept.protect(0, PAGE, MprotectFlags::empty());
    pool.collect();
    assert_eq!((pool.used(), pool.freed()), (12 * PAGE, 4 * PAGE));
    pool.collect();
    assert_eq!((pool.used(), pool.freed()), (12 * PAGE, 4 * PAGE));
    kept.protect(0, PAGE, MprotectFlags::READ | MprotectFlags::WRITE);
    assert_eq!(kept.read(0, kept.len), pattern(kept.addr, kept.len));
    assert_eq!(kept_moved.read(0, 4 * PAGE), content);
    pool.write(&registration, 0, b"still");
    pool.deregister(registration);
    // By itself, when enough is unused.
    for _ in 0..40 {
        let memory = Memory::new(8 * MIB);
        let registration = pool.register(memory.addr, memory.len);
        pool.deregister(registration);
        memory.unmap(0, memory.len);
    }
    assert!(
        pool.used() < 128 * MIB,
        "{} bytes are never given back",
        pool.used()
    );
}

fn collecting_while_memory_moves(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(PAGE);
    let wanted = memory.read(0, PAGE);
    let registration = pool.register(memory.addr, PAGE);
    pool.deregister(registration);
    // From one end of the address space to the other, past many mappings.
    let low = 1 << 32;
    let between: Vec<_> = (1..400)
        .map(|n| Memory::at(low + 2 * n * PAGE, PAGE))
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let mut here = memory.addr;
            let mut there = low;
            while !stop.load(Relaxed) {
                for _ in 0..2 {
                    // SAFETY: both places are this test's own.
                    let at = unsafe {
                        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                        libc::mremap(here as *mut _, PAGE as usize, PAGE as usize, flags, there)
                    };
                    assert_eq!(at as u64, there);
                    std::mem::swap(&mut here, &mut there);
                }
                std::thread::yield_now();
            }
            assert_eq!(
                load(here, PAGE),
                wanted,
                "pages that are mapped were given back"
            );
        });
        for _ in 0..300 {
            pool.collect();
        }
        stop.store(true, Relaxed);
        mover.join().unwrap();
    });
    assert_eq!(pool.used(), PAGE);
    drop(between);
}

fn half_a_registration_is_rolled_back(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(12 * PAGE);
    // Three mappings, of which the second cannot be converted for want of pages.
    memory.advise_part(4 * PAGE, 4 * PAGE, libc::MADV_DONTFORK);
    pool.refuse_after(1);
    let refused = pool
        .try_register(memory.addr, memory.len, true)
        .unwrap_err();
    assert_eq!(refused.errno(), Errno::NOMEM);
    assert_eq!(memory.read(0, memory.len), pattern(memory.addr, memory.len));
    pool.allow();
    // Nothing counts as registered.
    memory.unmap(0, 4 * PAGE);
    pool.collect();
    assert_eq!(pool.used(), 0);
    let registration = pool.register(memory.addr + 4 * PAGE, 8 * PAGE);
    assert!(is_shared(&registration));
    assert_eq!(
        pool.read(&registration, 0, 8 * PAGE),
        pattern(memory.addr + 4 * PAGE, 8 * PAGE)
    );
    pool.deregister(registration);
}

/// One whose segment nobody can map.
struct Blind<'a>(Source<'a>);

impl freeflow_convert::PageSource for Blind<'_> {
    fn alloc(&mut self, len: u64) -> Result<freeflow_convert::PoolRange, Errno> {
        self.0.alloc(len)
    }

    fn free(&mut self, range: freeflow_convert::PoolRange) {
        self.0.free(range);
    }

    fn fd(&self, _: u32) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

fn a_source_without_a_descriptor(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(PAGE);
    let refused = lock().register(&mut Blind(pool.source()), memory.addr, PAGE, true);
    assert_eq!(refused.unwrap_err().errno(), Errno::BADF);
    assert_eq!(pool.used(), 0);
    assert_eq!(memory.read(0, PAGE), pattern(memory.addr, PAGE));
}

fn memory_is_shared_again_after_the_routers_death(_: Mode) {
    let dead = Pool::new(9 * GIB);
    let memory = Memory::filled(64 * PAGE);
    let sparse = Memory::new(8 * GIB);
    sparse.write(5 * GIB, b"far");
    let old = dead.register(memory.addr, memory.len);
    let old_sparse = dead.register(sparse.addr, sparse.len);
    let unmapped = dead.register(sparse.addr, PAGE);
    lock().forget_source();
    assert_eq!(memory.read(0, memory.len), pattern(memory.addr, memory.len));
    let pool = Pool::new(9 * GIB);
    // The old ones end after it, at any time.
    pool.deregister(unmapped);
    let new = pool.register(memory.addr + 10, memory.len - 20);
    let new_sparse = pool.register(sparse.addr, sparse.len);
    pool.deregister(old);
    pool.deregister(old_sparse);
    assert!(is_shared(&new) && is_shared(&new_sparse));
    assert_eq!(pool.resident(), 65 * PAGE, "untouched memory is not copied");
    assert_eq!(
        pool.read(&new, 0, memory.len - 20),
        memory.read(10, memory.len - 20)
    );
    assert_eq!(memory.read(0, memory.len), pattern(memory.addr, memory.len));
    assert_eq!(pool.read(&new_sparse, 5 * GIB, 3), b"far");
    pool.write(&new, 0, b"again");
    assert_eq!(memory.read(10, 5), b"again");
    assert_eq!(dead.used(), 64 * PAGE + 8 * GIB, "the dead are not asked");
    // Nobody but the test has the dead router's memory any more.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let shown = maps.lines().filter(|l| l.contains("test-pages")).count();
    assert_eq!(shown, 2, "{maps}");
    assert_eq!(
        descriptors("test-pages"),
        3,
        "two of the test, one of the converter"
    );
    pool.deregister(new);
    pool.deregister(new_sparse);
}

fn writers_lose_nothing_after_the_routers_death(_: Mode) {
    let memory = Memory::filled(4 * PAGE);
    let stop = AtomicBool::new(false);
    let addr = memory.addr;
    word(addr + PAGE).store(0, Relaxed);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut last = 0;
            while !stop.load(Relaxed) {
                last += 1;
                word(addr + PAGE).store(last, Relaxed);
                assert_eq!(word(addr + PAGE).load(Relaxed), last);
                word(addr + 3 * PAGE).store(last, Relaxed);
            }
            last
        });
        for _ in 0..200 {
            let pool = Pool::new(MIB);
            let registration = pool.register(memory.addr, memory.len);
            assert!(is_shared(&registration));
            let seen = word(addr + PAGE).load(Relaxed);
            while word(addr + PAGE).load(Relaxed) < seen + 2 {
                std::thread::yield_now();
            }
            lock().forget_source();
        }
        stop.store(true, Relaxed);
        let last = writer.join().unwrap();
        assert_eq!(word(addr + PAGE).load(Relaxed), last);
        assert_eq!(word(addr + 3 * PAGE).load(Relaxed), last);
    });
}

fn another_sessions_source_frees_nothing(_: Mode) {
    let pool = Pool::new(MIB);
    let other = Pool::new(MIB);
    let memory = Memory::filled(4 * PAGE);
    let registration = pool.register(memory.addr, memory.len);
    memory.unmap(0, memory.len);
    lock().deregister(&mut other.source(), registration);
    lock().collect(&mut other.source());
    assert_eq!((pool.used(), other.freed()), (4 * PAGE, 0));
    pool.collect();
    assert_eq!(pool.used(), 0);
}

fn signals_are_as_they_were(_: Mode) {
    let pool = Pool::new(MIB);
    let memory = Memory::filled(PAGE);
    let registration = pool.register(memory.addr, PAGE);
    // SAFETY: all zeroes are a set; the kernel writes another one.
    let unblocked = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set);
        (1..32).all(|signal| libc::sigismember(&set, signal) == 0)
    };
    assert!(unblocked);
    pool.deregister(registration);
}

/// Descriptors of this process whose file's name has a part.
fn descriptors(part: &str) -> usize {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    let names = all.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    names
        .filter(|name| name.to_string_lossy().contains(part))
        .count()
}

fn descriptors_are_few_and_closed_on_exec(_: Mode) {
    let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let pool = Pool::new(GIB);
    for _ in 0..20 {
        let memory = Memory::filled(4 * PAGE);
        let registration = pool.register(memory.addr, memory.len);
        pool.deregister(registration);
    }
    let after = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(after <= before + 4, "{before} descriptors, then {after}");
    let listed = std::process::Command::new("ls")
        .arg("-l")
        .arg("/proc/self/fd")
        .output()
        .unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains("pipe:"), "{listed}");
    assert!(
        !listed.contains("userfaultfd") && !listed.contains("memfd"),
        "{listed}"
    );
    assert!(!listed.contains("/maps"), "{listed}");
}

fn the_heap_is_registered_while_threads_use_it(_: Mode) {
    let pool = Pool::new(GIB);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 1..4u64 {
            let stop = &stop;
            scope.spawn(move || {
                let mut random = seed;
                let mut kept: Vec<Vec<u64>> = Vec::new();
                while !stop.load(Relaxed) {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    kept.push(vec![random; 1 + (random >> 55) as usize]);
                    if kept.len() > 100 {
                        let old = kept.swap_remove((random >> 33) as usize % kept.len());
                        assert!(old.iter().all(|&word| word == old[0]));
                    }
                }
                for old in kept {
                    assert!(old.iter().all(|&word| word == old[0]));
                }
            });
        }
        // Small buffers between those of the others and the allocator's own records.
        let mut kept = Vec::new();
        for round in 0..1500u64 {
            let mut buffer = vec![round as u8; 40 + 13 * (round % 60) as usize];
            let registration = pool.register(buffer.as_ptr() as u64, buffer.len() as u64);
            if is_shared(&registration) {
                pool.write(&registration, 3, b"rdma");
                assert_eq!(std::hint::black_box(&mut buffer)[3..7], *b"rdma");
                assert_eq!(pool.read(&registration, 0, buffer.len() as u64), buffer);
            }
            kept.push((buffer, registration));
            if kept.len() > 50 {
                let (mut buffer, registration) = kept.swap_remove((round * 7 % 50) as usize);
                buffer.fill(9);
                if is_shared(&registration) {
                    assert_eq!(pool.read(&registration, 0, buffer.len() as u64), buffer);
                }
                pool.deregister(registration);
            }
        }
        for (_, registration) in kept {
            pool.deregister(registration);
        }
        stop.store(true, Relaxed);
    });
    let stats = lock().stats();
    assert!(stats.conversions > 10, "{stats:?}");
    assert_eq!((stats.unsafe_bytes, stats.failed_bytes), (0, 0));
}
