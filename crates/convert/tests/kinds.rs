//! What memory can be: what is shared, what is copied by the router, what is refused.

mod common;

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::mpsc;

use common::*;
use freeflow_convert::{Backing, ConvertError, lock};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

tests! {
    files_are_foreign: ALL,
    shared_anonymous_memory_is_foreign: ALL,
    memory_that_may_not_be_written: ALL,
    executable_memory_is_foreign: ALL,
    the_main_stack_is_foreign: ALL,
    stacks_of_threads_are_foreign: HELD,
    memory_beside_the_main_control_block_is_shared: ALL,
    the_head_of_an_arena_is_foreign: HELD,
    huge_pages_are_foreign: ALL,
    holes_are_refused: ALL,
    nonsense_is_refused: ALL,
    ranges_span_mappings: ALL,
    the_pool_itself_is_shared_as_it_is: ALL,
    static_data: ALL,
}

const RW: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

fn a_file(len: u64) -> OwnedFd {
    let path = std::env::temp_dir().join(format!("freeflow-convert-{}", std::process::id()));
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(&pattern(0, len)).unwrap();
    file.into()
}

/// Registers memory that stays as it is.
fn untouched(pool: &Pool, memory: &Memory, write: bool) {
    let before = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = |maps: &str| {
        let start = format!("{:x}-", memory.addr);
        maps.lines()
            .find(|l| l.starts_with(&start))
            .map(str::to_owned)
    };
    let foreign = lock().stats().foreign_bytes;
    let registration = pool.try_register(memory.addr, memory.len, write).unwrap();
    assert!(is_foreign(&registration), "{registration:x?}");
    let [piece] = registration.pieces() else {
        panic!("{registration:x?}");
    };
    assert_eq!((piece.addr, piece.len), (memory.addr, memory.len));
    assert_eq!(lock().stats().foreign_bytes, foreign + memory.len);
    assert_eq!(lock().stats().unsafe_bytes, 0);
    let after = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert_eq!(line(&before), line(&after));
    pool.deregister(registration);
}

fn files_are_foreign(_: Mode) {
    let pool = Pool::new(MIB);
    let fd = a_file(4 * PAGE);
    for flags in [MapFlags::PRIVATE, MapFlags::SHARED] {
        let memory = Memory::file(&fd, 4 * PAGE, RW, flags);
        untouched(&pool, &memory, true);
        memory.write(0, b"changed");
        untouched(&pool, &memory, true);
        assert_eq!(memory.read(0, 7), b"changed");
    }
    assert_eq!(pool.used(), 0);
}

fn shared_anonymous_memory_is_foreign(_: Mode) {
    let pool = Pool::new(MIB);
    let memory = Memory::with(4 * PAGE, RW, MapFlags::SHARED);
    memory.write(0, b"shared");
    untouched(&pool, &memory, true);
    // Children still share it.
    reap(fork(|| {
        memory.write(0, b"child!");
        true
    }));
    assert_eq!(memory.read(0, 6), b"child!");
    assert_eq!(pool.used(), 0);
}

fn memory_that_may_not_be_written(_: Mode) {
    let pool = Pool::new(MIB);
    let memory = Memory::filled(4 * PAGE);
    memory.protect(0, 4 * PAGE, MprotectFlags::READ);
    untouched(&pool, &memory, false);
    let refused = pool.try_register(memory.addr + 10, 10, true).unwrap_err();
    assert_eq!(refused, ConvertError::Fault { addr: memory.addr });
    assert_eq!(refused.errno(), Errno::FAULT);
    // What was shared before it became read-only still is.
    memory.protect(0, 4 * PAGE, MprotectFlags::READ | MprotectFlags::WRITE);
    let first = pool.register(memory.addr, memory.len);
    memory.protect(0, 4 * PAGE, MprotectFlags::READ);
    let second = pool.try_register(memory.addr, memory.len, false).unwrap();
    assert_eq!(first.pieces(), second.pieces());
    assert!(is_shared(&second));
    assert!(pool.try_register(memory.addr, memory.len, true).is_err());
    pool.deregister(first);
    pool.deregister(second);
}

fn executable_memory_is_foreign(_: Mode) {
    let pool = Pool::new(MIB);
    let memory = Memory::with(PAGE, RW | ProtFlags::EXEC, MapFlags::PRIVATE);
    untouched(&pool, &memory, true);
}

fn the_main_stack_is_foreign(_: Mode) {
    let pool = Pool::new(MIB);
    let here = [7u8; 10000];
    let addr = std::hint::black_box(&here).as_ptr() as u64;
    let registration = pool.register(addr, 10000);
    assert!(is_foreign(&registration));
    pool.deregister(registration);
}

fn stacks_of_threads_are_foreign(_: Mode) {
    let pool = Pool::new(MIB);
    let (tell, told) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    let inner = pool.clone();
    let thread = std::thread::spawn(move || {
        let here = [7u8; 10000];
        let addr = std::hint::black_box(&here).as_ptr() as u64;
        let registration = inner.register(addr, 10000);
        assert!(is_foreign(&registration));
        inner.deregister(registration);
        // SAFETY: it returns the address of the thread's control block.
        let control = unsafe { libc::pthread_self() } as u64;
        tell.send((addr, control)).unwrap();
        gone.recv().unwrap_err();
        assert!(std::hint::black_box(&here).iter().all(|&b| b == 7));
    });
    // Another thread's, too: the kernel writes there, and wakes those who join by its address.
    let (addr, control) = told.recv().unwrap();
    let joiner = std::thread::spawn(move || thread.join().unwrap());
    for (addr, len) in [(addr, 10000), (control, 2000)] {
        let registration = pool.register(addr, len);
        assert!(is_foreign(&registration), "{registration:x?}");
        pool.deregister(registration);
    }
    drop(go);
    joiner.join().unwrap();
    assert_eq!(pool.used(), 0);
}

fn memory_beside_the_main_control_block_is_shared(_: Mode) {
    let pool = Pool::new(MIB);
    // SAFETY: it returns the address of the main thread's control block.
    let control = unsafe { libc::pthread_self() } as u64;
    let registration = pool.register(control, 1500);
    assert!(is_foreign(&registration));
    pool.deregister(registration);
    // The loader mapped it, and the kernel merges what is mapped right below.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let starts = maps.lines().map(|line| {
        let (start, _) = line.split_once('-').unwrap();
        u64::from_str_radix(start, 16).unwrap()
    });
    let start = starts.filter(|&start| start <= control).max().unwrap();
    let below = start - 16 * PAGE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: it replaces nothing.
    let at = unsafe { rustix::mm::mmap_anonymous(below as *mut _, 16 * PAGE as usize, RW, flags) };
    match at {
        Ok(at) => assert_eq!(at as u64, below),
        Err(_) => skip("needs the memory below the loader's"),
    }
    store(below, &pattern(below, 16 * PAGE));
    let registration = pool.register(below, 16 * PAGE);
    assert!(is_shared(&registration), "{registration:x?}");
    assert_eq!(
        pool.read(&registration, 0, 16 * PAGE),
        pattern(below, 16 * PAGE)
    );
    pool.deregister(registration);
}

fn the_head_of_an_arena_is_foreign(_: Mode) {
    let pool = Pool::new(GIB);
    let inner = pool.clone();
    let thread = std::thread::spawn(move || {
        // The first allocation of a thread makes an arena.
        let first = vec![1u8; 100];
        let addr = first.as_ptr() as u64;
        let head = addr & !((64 << 20) - 1);
        assert!(
            addr - head < 64 << 10,
            "glibc's arenas begin at multiples of 64 MiB"
        );
        let registration = inner.register(head, 2 * PAGE);
        let [foreign, shared] = registration.pieces() else {
            panic!("{registration:x?}");
        };
        assert_eq!((foreign.len, foreign.backing), (PAGE, Backing::Foreign));
        assert!(matches!(shared.backing, Backing::Pool { .. }));
        inner.deregister(registration);
        assert_eq!(first, [1; 100]);
    });
    thread.join().unwrap();
}

fn huge_pages_are_foreign(_: Mode) {
    const HUGE: u64 = 2 * MIB;
    let pool = Pool::new(GIB);
    let flags = MapFlags::PRIVATE | MapFlags::HUGETLB;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let addr =
        unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), HUGE as usize, RW, flags) };
    let Ok(addr) = addr else {
        skip("needs a reserved huge page (sysctl vm.nr_hugepages)");
    };
    let memory = Memory {
        addr: addr as u64,
        len: HUGE,
    };
    memory.write(HUGE - 5, b"hello");
    untouched(&pool, &memory, true);
    assert_eq!(memory.read(HUGE - 5, 5), b"hello");
}

fn holes_are_refused(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(16 * PAGE);
    memory.protect(4 * PAGE, PAGE, MprotectFlags::empty());
    memory.unmap(8 * PAGE, PAGE);
    for (from, to, hole) in [(0, 16, 4), (4, 5, 4), (5, 16, 8), (8, 9, 8), (3, 5, 4)] {
        for write in [false, true] {
            let (addr, len) = (memory.addr + from * PAGE + 1, (to - from) * PAGE - 2);
            let refused = pool.try_register(addr, len, write).unwrap_err();
            let addr = memory.addr + hole * PAGE;
            assert_eq!(refused, ConvertError::Fault { addr });
            assert_eq!(refused.errno(), Errno::FAULT);
        }
    }
    // Nothing is left of what came before the hole but its pages, which nobody registers.
    assert_eq!(memory.read(0, PAGE), pattern(memory.addr, PAGE));
    memory.unmap(0, 8 * PAGE);
    memory.unmap(9 * PAGE, 7 * PAGE);
    pool.collect();
    assert_eq!(pool.used(), 0);
}

fn nonsense_is_refused(_: Mode) {
    let pool = Pool::new(MIB);
    for (addr, len) in [
        (4096, 0),
        (u64::MAX, 1),
        (u64::MAX - 10, 11),
        (4096, u64::MAX),
        (1, u64::MAX - 1),
    ] {
        let refused = pool.try_register(addr, len, false).unwrap_err();
        assert_eq!(refused, ConvertError::Range { addr, len });
        assert_eq!(refused.errno(), Errno::INVAL);
    }
    for addr in [0, 1 << 46, 1 << 60, u64::MAX - 2 * PAGE] {
        let refused = pool.try_register(addr, 1, false).unwrap_err();
        assert_eq!(refused.errno(), Errno::FAULT, "{addr:#x}");
    }
    assert_eq!(pool.used(), 0);
}

fn ranges_span_mappings(_: Mode) {
    let pool = Pool::new(GIB);
    let fd = a_file(2 * PAGE);
    // Private, file, private, shared, private.
    let memory = Memory::filled(10 * PAGE);
    let over = |at: u64, flags: MapFlags, fd: Option<&OwnedFd>| {
        let addr = (memory.addr + at) as *mut _;
        let flags = flags | MapFlags::FIXED;
        // SAFETY: it replaces a part of this test's own memory.
        unsafe {
            match fd {
                Some(fd) => rustix::mm::mmap(addr, 2 * PAGE as usize, RW, flags, fd, 0),
                None => rustix::mm::mmap_anonymous(addr, 2 * PAGE as usize, RW, flags),
            }
            .unwrap();
        }
    };
    over(2 * PAGE, MapFlags::PRIVATE, Some(&fd));
    over(6 * PAGE, MapFlags::SHARED, None);
    let before = memory.read(0, memory.len);
    let registration = pool.register(memory.addr + 5, 10 * PAGE - 10);
    assert_eq!(memory.read(0, memory.len), before);
    let mut at = memory.addr + 5;
    let mut kinds = Vec::new();
    for piece in registration.pieces() {
        assert_eq!(piece.addr, at, "pieces follow each other");
        at += piece.len;
        kinds.push(matches!(piece.backing, Backing::Pool { .. }));
    }
    assert_eq!(at, memory.addr + 10 * PAGE - 5);
    assert_eq!(kinds, [true, false, true, false, true]);
    pool.write(&registration, 4 * PAGE - 5, b"in the middle");
    assert_eq!(memory.read(4 * PAGE, 13), b"in the middle");
    pool.deregister(registration);
    // Two of different rights.
    let memory = Memory::filled(4 * PAGE);
    memory.protect(2 * PAGE, 2 * PAGE, MprotectFlags::READ);
    let registration = pool.try_register(memory.addr, memory.len, false).unwrap();
    let [shared, foreign] = registration.pieces() else {
        panic!("{registration:x?}");
    };
    assert_eq!((shared.len, foreign.len), (2 * PAGE, 2 * PAGE));
    assert_eq!(foreign.backing, Backing::Foreign);
    pool.deregister(registration);
}

fn the_pool_itself_is_shared_as_it_is(_: Mode) {
    let pool = Pool::new(MIB);
    let memory = Memory::filled(4 * PAGE);
    let first = pool.register(memory.addr, memory.len);
    let conversions = lock().stats().conversions;
    let again = pool.register(memory.addr + 8, 8);
    assert_eq!(lock().stats().conversions, conversions);
    assert!(is_shared(&again));
    pool.deregister(first);
    pool.deregister(again);
}

static mut ZEROES: [u8; 5 * PAGE as usize] = [0; 5 * PAGE as usize];

fn static_data(_: Mode) {
    let pool = Pool::new(MIB);
    let addr = &raw mut ZEROES as u64;
    store(addr + 3, b"static");
    let registration = pool.register(addr, 5 * PAGE);
    // What the linker put on pages of the file is copied, all else is shared.
    let len: u64 = registration.pieces().iter().map(|p| p.len).sum();
    assert_eq!(len, 5 * PAGE);
    assert_eq!(load(addr + 3, 6), b"static");
    store(addr + 4 * PAGE - 3, b"static");
    assert_eq!(load(addr + 4 * PAGE - 3, 6), b"static");
    pool.deregister(registration);
}
