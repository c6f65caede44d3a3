//! What of the memory is copied, and that it costs no more than it must.

mod common;

use common::*;
use freeflow_convert::lock;

tests! {
    untouched_memory_takes_none: ALL,
    sparse_memory_stays_sparse: ALL,
    a_gibibyte_is_converted_in_place: HELD,
    pages_that_were_only_read_take_none: HELD,
    untouched_pages_are_known_without_a_pagemap: &[Mode::UserModeOnly],
    any_size_and_any_alignment: ALL,
    both_sides_see_each_others_writes: ALL,
    memory_of_huge_pages: HELD,
    locked_memory_stays_locked: ALL,
    memory_that_children_do_not_get: HELD,
}

/// Bytes of memory that this process uses itself.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let mut fields = statm.split(' ').map(|n| n.parse::<u64>().unwrap());
    fields.nth(1).unwrap() * PAGE
}

fn untouched_memory_takes_none(_: Mode) {
    let pool = Pool::new(65 * GIB);
    let memory = Memory::new(64 * GIB);
    let before = resident();
    let registration = pool.register(memory.addr, memory.len);
    assert!(is_shared(&registration));
    assert_eq!(registration.pieces().len(), 1, "one range of the pool");
    assert_eq!(pool.resident(), 0);
    assert!(resident() < before + 4 * MIB, "it was faulted in");
    // It is memory as before.
    memory.write(40 * GIB, b"there");
    assert_eq!(pool.read(&registration, 40 * GIB, 5), b"there");
    assert_eq!(memory.read(64 * GIB - 1, 1), [0]);
    pool.deregister(registration);
}

fn sparse_memory_stays_sparse(_: Mode) {
    let pool = Pool::new(17 * GIB);
    let memory = Memory::new(16 * GIB);
    // In and out of the order of sizes at which the converter changes its way.
    let touched = [
        0,
        PAGE,
        3 * PAGE,
        20 * MIB,
        60 * MIB,
        5 * GIB - PAGE,
        5 * GIB,
        5 * GIB + 31 * MIB,
        5 * GIB + 64 * MIB,
        16 * GIB - PAGE,
    ];
    for at in touched {
        memory.write(at, &pattern(at, PAGE));
    }
    let registration = pool.register(memory.addr, memory.len);
    assert!(is_shared(&registration));
    assert_eq!(pool.resident(), touched.len() as u64 * PAGE);
    for at in touched {
        assert_eq!(memory.read(at, PAGE), pattern(at, PAGE), "{at:#x}");
        assert_eq!(
            pool.read(&registration, at, PAGE),
            pattern(at, PAGE),
            "{at:#x}"
        );
    }
    assert_eq!(memory.read(2 * PAGE, PAGE), [0; PAGE as usize]);
    assert_eq!(memory.read(4 * GIB, PAGE), [0; PAGE as usize]);
    pool.deregister(registration);
}

fn a_gibibyte_is_converted_in_place(_: Mode) {
    let pool = Pool::new(2 * GIB);
    let memory = Memory::new(GIB);
    let stamp = |at: u64| (at | 1).to_ne_bytes();
    for at in (0..GIB).step_by(PAGE as usize) {
        memory.write(at + 8, &stamp(at));
    }
    let registration = pool.register(memory.addr, GIB);
    assert!(is_shared(&registration));
    assert_eq!(registration.pieces().len(), 1);
    assert_eq!(pool.resident(), GIB);
    for at in (0..GIB).step_by(PAGE as usize) {
        assert_eq!(memory.read(at + 8, 8), stamp(at));
        assert_eq!(pool.read(&registration, at + 8, 8), stamp(at));
    }
    pool.deregister(registration);
}

fn pages_that_were_only_read_take_none(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::new(64 * PAGE);
    assert!(memory.read(0, memory.len).iter().all(|&b| b == 0));
    memory.write(7 * PAGE, b"x");
    let registration = pool.register(memory.addr, memory.len);
    assert!(is_shared(&registration));
    assert_eq!(pool.resident(), PAGE);
    assert_eq!(pool.read(&registration, 7 * PAGE, 2), b"x\0");
    pool.deregister(registration);
}

fn untouched_pages_are_known_without_a_pagemap(_: Mode) {
    if rustix::system::sysinfo().totalswap != 0 {
        skip("needs a machine without swap space: mincore does not see what is swapped out");
    }
    // As a daemon has it that gave its privileges up.
    // SAFETY: it takes no pointers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }, 0);
    if std::fs::File::open("/proc/self/pagemap").is_ok() {
        skip("needs to be root at first, to become a process that may not read its own pagemap");
    }
    let pool = Pool::new(9 * GIB);
    let memory = Memory::new(8 * GIB);
    for at in [0, PAGE, 6 * PAGE, 5 * GIB] {
        memory.write(at, &pattern(at, PAGE));
    }
    let registration = pool.register(memory.addr, memory.len);
    assert!(is_shared(&registration));
    assert_eq!(pool.resident(), 4 * PAGE);
    for at in [0, PAGE, 6 * PAGE, 5 * GIB] {
        assert_eq!(memory.read(at, PAGE), pattern(at, PAGE));
        assert_eq!(pool.read(&registration, at, PAGE), pattern(at, PAGE));
    }
    pool.deregister(registration);
}

fn any_size_and_any_alignment(_: Mode) {
    let pool = Pool::new(GIB);
    for (offset, len) in [
        (0, 1),
        (1, 1),
        (PAGE - 1, 1),
        (PAGE - 1, 2),
        (PAGE, PAGE),
        (17, PAGE),
        (17, 3 * PAGE),
        (2 * PAGE + 4095, PAGE + 2),
    ] {
        let memory = Memory::filled(8 * PAGE);
        let before = memory.read(0, memory.len);
        let registration = pool.register(memory.addr + offset, len);
        assert!(is_shared(&registration));
        assert_eq!(
            (registration.addr(), registration.len()),
            (memory.addr + offset, len)
        );
        let covered: u64 = registration.pieces().iter().map(|p| p.len).sum();
        assert_eq!(covered, len);
        assert_eq!(memory.read(0, memory.len), before);
        let at = offset as usize..(offset + len) as usize;
        assert_eq!(pool.read(&registration, 0, len), before[at.clone()]);
        // Not a byte beyond what is registered changes.
        pool.write(&registration, 0, &vec![0xEE; len as usize]);
        let mut wanted = before;
        wanted[at].fill(0xEE);
        assert_eq!(memory.read(0, memory.len), wanted);
        pool.deregister(registration);
        memory.unmap(0, memory.len);
    }
    let stats = lock().stats();
    assert_eq!(
        (stats.foreign_bytes, stats.unsafe_bytes, stats.failed_bytes),
        (0, 0, 0)
    );
}

fn both_sides_see_each_others_writes(_: Mode) {
    use std::sync::atomic::Ordering::SeqCst;
    let pool = Pool::new(MIB);
    let view = pool.view();
    let memory = Memory::filled(2 * PAGE);
    let registration = pool.register(memory.addr, memory.len);
    let [piece] = registration.pieces() else {
        panic!("{registration:x?}");
    };
    let freeflow_convert::Backing::Pool { offset, .. } = piece.backing else {
        panic!("{registration:x?}");
    };
    let counter = word(memory.addr + PAGE);
    counter.store(1, SeqCst);
    assert_eq!(view.fetch_add(offset + PAGE, 5), Ok(1));
    assert_eq!(counter.load(SeqCst), 6);
    assert_eq!(view.compare_swap(offset + PAGE, 6, 9), Ok(6));
    assert_eq!(counter.fetch_add(1, SeqCst), 9);
    assert_eq!(view.fetch_add(offset + PAGE, 0), Ok(10));
    pool.deregister(registration);
}

fn memory_of_huge_pages(_: Mode) {
    let modes = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    if modes.is_ok_and(|modes| modes.contains("[never]")) {
        skip("needs transparent huge pages");
    }
    let pool = Pool::new(GIB);
    let memory = Memory::new(32 * MIB);
    assert!(memory.advise(libc::MADV_HUGEPAGE));
    memory.write(0, &pattern(0, 32 * MIB));
    // A part of a huge page, then the rest.
    for (start, len) in [(5 * MIB + 100, 3 * MIB), (0, 32 * MIB)] {
        let registration = pool.register(memory.addr + start, len);
        assert!(is_shared(&registration));
        assert_eq!(
            pool.read(&registration, 0, len),
            pattern(0, 32 * MIB)[start as usize..][..len as usize]
        );
        pool.deregister(registration);
    }
    assert_eq!(memory.read(0, 32 * MIB), pattern(0, 32 * MIB));
}

/// Bytes that are locked in memory.
fn locked() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("VmLck:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn locked_memory_stays_locked(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(16 * PAGE);
    // SAFETY: it changes no content.
    let done = unsafe { libc::mlock(memory.addr as *const _, 8 * PAGE as usize) };
    if done != 0 {
        skip("needs 32 KiB of locked memory (ulimit -l)");
    }
    assert_eq!(locked(), 8 * PAGE);
    let registration = pool.register(memory.addr + 4 * PAGE, 8 * PAGE);
    assert!(is_shared(&registration));
    assert_eq!(locked(), 8 * PAGE);
    assert_eq!(memory.read(0, memory.len), pattern(memory.addr, memory.len));
    pool.deregister(registration);
}

fn memory_that_children_do_not_get(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(4 * PAGE);
    assert!(memory.advise(libc::MADV_DONTFORK));
    let early = pool.register(memory.addr, PAGE);
    let later = Memory::filled(4 * PAGE);
    let registration = pool.register(later.addr, later.len);
    assert!(later.advise(libc::MADV_DONTFORK));
    let addr = later.addr;
    // What is said after the registration holds.
    reap(fork(|| {
        let mut resident = 0u8;
        // SAFETY: the kernel writes one byte.
        unsafe { libc::mincore(addr as *mut _, PAGE as usize, &mut resident) != 0 }
    }));
    assert_eq!(pool.read(&registration, 0, 8), later.read(0, 8));
    memory.write(0, b"parent");
    assert_eq!(pool.read(&early, 0, 6), b"parent");
    pool.deregister(registration);
    pool.deregister(early);
}
