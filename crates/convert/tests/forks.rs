//! Children, of all kinds.

mod common;

use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use common::*;
use freeflow_convert::{Stats, lock};
use rustix::mm::MprotectFlags;

tests! {
    a_child_has_a_copy: ALL,
    a_child_sees_memory_of_one_moment: HELD,
    a_child_can_use_the_heap: HELD,
    children_while_threads_register: HELD,
    children_that_execute: ALL,
    children_that_share_the_address_space: HELD,
    grandchildren: ALL,
    a_child_registers_anew: ALL,
    a_child_of_threads_registers_anew: HELD,
    moved_unmapped_and_protected_memory: ALL,
    untouched_memory_costs_nothing: ALL,
    a_fork_that_fails: &[Mode::UserModeOnly, Mode::Refused],
    no_descriptors_left: ALL,
    children_have_none_of_our_descriptors: HELD,
    errno_and_signals_are_as_they_were: ALL,
}

/// Lets a child wait for its parent, or the other way round.
struct Turn(OwnedFd, OwnedFd);

impl Turn {
    fn new() -> Self {
        let (read, write) = rustix::pipe::pipe().unwrap();
        Turn(read, write)
    }

    fn give(&self) {
        assert_eq!(rustix::io::write(&self.1, b"x"), Ok(1));
    }

    fn take(&self) {
        assert_eq!(rustix::io::read(&self.0, &mut [0]), Ok(1));
    }
}

fn a_child_has_a_copy(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let before = memory.read(0, memory.len);
    let registration = pool.register(memory.addr + 100, 6 * PAGE);
    let (child, parent) = (Turn::new(), Turn::new());
    let pid = fork(|| {
        child.take();
        // What the parent and its peers have written since is not there.
        let mut good = memory.read(0, memory.len) == before;
        memory.write(0, &[0x77; 8 * PAGE as usize]);
        parent.give();
        child.take();
        good &= memory.read(0, memory.len) == [0x77; 8 * PAGE as usize];
        good
    });
    memory.write(PAGE, b"parent");
    pool.write(&registration, 3 * PAGE, b"peer");
    child.give();
    parent.take();
    let mut wanted = before.clone();
    wanted[PAGE as usize..][..6].copy_from_slice(b"parent");
    wanted[3 * PAGE as usize + 100..][..4].copy_from_slice(b"peer");
    assert_eq!(memory.read(0, memory.len), wanted);
    assert_eq!(
        pool.read(&registration, 0, 6 * PAGE),
        wanted[100..][..6 * PAGE as usize]
    );
    child.give();
    reap(pid);
    assert_eq!(memory.read(0, memory.len), wanted);
    // The registration works as before.
    pool.write(&registration, 0, b"still");
    assert_eq!(memory.read(100, 5), b"still");
    memory.write(200, b"shared");
    assert_eq!(pool.read(&registration, 100, 6), b"shared");
    let again = pool.register(memory.addr, memory.len);
    assert_eq!(again.pieces().len(), registration.pieces().len());
    pool.deregister(again);
    pool.deregister(registration);
}

fn a_child_sees_memory_of_one_moment(_: Mode) {
    let pool = Pool::new(GIB);
    let shared = Memory::filled(64 * PAGE);
    let private = Memory::filled(PAGE);
    let addr = shared.addr;
    let words = [
        private.addr,
        addr,
        addr + 9 * PAGE,
        addr + 63 * PAGE,
        private.addr + 64,
    ];
    for at in words {
        word(at).store(0, Relaxed);
    }
    let registration = pool.register(addr, shared.len);
    assert!(is_shared(&registration));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut n = 0;
            while !stop.load(Relaxed) {
                n += 1;
                for at in words {
                    word(at).store(n, Relaxed);
                }
            }
            n
        });
        for _ in 0..200 {
            let seen = word(addr).load(Relaxed);
            while word(addr).load(Relaxed) < seen + 5 {
                std::thread::yield_now();
            }
            reap(fork(|| {
                let seen = words.map(|at| word(at).load(Relaxed));
                let turn = seen[0];
                let split = seen.iter().position(|&n| n != turn).unwrap_or(seen.len());
                let good = seen[split..].iter().all(|&n| n + 1 == turn);
                if !good {
                    eprintln!("torn: {seen:?}");
                }
                let steady = shared.read(PAGE, PAGE) == pattern(addr + PAGE, PAGE);
                // It must not reach the parent.
                for at in words {
                    word(at).store(u64::MAX, Relaxed);
                }
                good && steady
            }));
        }
        stop.store(true, Relaxed);
        let last = writer.join().unwrap();
        for at in words {
            assert_eq!(word(at).load(Relaxed), last);
        }
    });
    assert_eq!(
        pool.read(&registration, 0, shared.len),
        shared.read(0, shared.len)
    );
    pool.deregister(registration);
}

/// Small buffers in the heaps of all threads, so that the allocator's records are converted.
fn register_small_buffers(pool: &Pool) -> Vec<(Vec<u8>, freeflow_convert::Registration)> {
    (0..200)
        .map(|n| {
            let buffer = vec![n as u8; 100 + n];
            let registration = pool.register(buffer.as_ptr() as u64, buffer.len() as u64);
            (buffer, registration)
        })
        .collect()
}

/// Allocates and frees, and finds its memory as it left it.
fn use_the_heap(seed: u64, turns: usize) -> bool {
    let mut random = seed;
    let mut kept: Vec<Vec<u64>> = Vec::new();
    for _ in 0..turns {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        kept.push(vec![random; 1 + (random >> 56) as usize]);
        if kept.len() > 60 {
            let old = kept.swap_remove((random >> 33) as usize % kept.len());
            if !old.iter().all(|&word| word == old[0]) {
                return false;
            }
        }
    }
    kept.iter()
        .all(|old| old.iter().all(|&word| word == old[0]))
}

fn a_child_can_use_the_heap(_: Mode) {
    let pool = Pool::new(GIB);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 0..3 {
            let (pool, stop) = (&pool, &stop);
            scope.spawn(move || {
                let kept = register_small_buffers(pool);
                while !stop.load(Relaxed) {
                    assert!(use_the_heap(seed, 300), "the parent's heap is corrupt");
                }
                for (buffer, registration) in kept {
                    assert!(buffer.iter().all(|&b| b == buffer[0]));
                    pool.deregister(registration);
                }
            });
        }
        let kept = register_small_buffers(&pool);
        for round in 0..100 {
            reap(fork(|| use_the_heap(round, 500)));
            assert!(use_the_heap(round, 100));
        }
        stop.store(true, Relaxed);
        for (buffer, registration) in kept {
            assert!(buffer.iter().all(|&b| b == buffer[0]));
            pool.deregister(registration);
        }
    });
}

fn children_while_threads_register(_: Mode) {
    let pool = Pool::new(GIB);
    let stop = AtomicBool::new(false);
    let turns = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    let memory = Memory::filled(8 * PAGE);
                    let registration = pool.register(memory.addr + 1, 7 * PAGE);
                    pool.write(&registration, 0, b"peer");
                    assert_eq!(memory.read(1, 4), b"peer");
                    if turns.fetch_add(1, Relaxed).is_multiple_of(2) {
                        memory.unmap(0, memory.len);
                        pool.deregister(registration);
                    } else {
                        pool.deregister(registration);
                        memory.unmap(0, memory.len);
                    }
                }
            });
        }
        let memory = Memory::filled(8 * PAGE);
        let registration = pool.register(memory.addr, memory.len);
        for _ in 0..200 {
            reap(fork(|| {
                memory.read(0, memory.len) == pattern(memory.addr, memory.len)
            }));
        }
        stop.store(true, Relaxed);
        assert_eq!(
            pool.read(&registration, 0, memory.len),
            memory.read(0, memory.len)
        );
        pool.deregister(registration);
    });
}

fn children_that_execute(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let registration = pool.register(memory.addr, memory.len);
    for _ in 0..20 {
        let name = c"/bin/true";
        let arguments = [name.as_ptr(), std::ptr::null()];
        reap(fork(|| {
            // SAFETY: it does not return unless it fails.
            unsafe { libc::execv(name.as_ptr(), arguments.as_ptr()) };
            false
        }));
    }
    assert_eq!(memory.read(0, memory.len), pattern(memory.addr, memory.len));
    pool.write(&registration, 0, b"peer");
    assert_eq!(memory.read(0, 4), b"peer");
    pool.deregister(registration);
}

fn children_that_share_the_address_space(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let registration = pool.register(memory.addr, memory.len);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut n = 0;
            while !stop.load(Relaxed) {
                n += 1;
                word(memory.addr).store(n, Relaxed);
            }
            n
        });
        for _ in 0..30 {
            // `posix_spawn`, which uses CLONE_VM and CLONE_VFORK.
            assert!(Command::new("true").status().unwrap().success());
            let other = Memory::filled(2 * PAGE);
            let registration = pool.register(other.addr, other.len);
            pool.deregister(registration);
        }
        stop.store(true, Relaxed);
        let last = writer.join().unwrap();
        assert_eq!(pool.read(&registration, 0, 8), last.to_ne_bytes());
    });
    pool.deregister(registration);
}

fn grandchildren(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let registration = pool.register(memory.addr, memory.len);
    reap(fork(|| {
        memory.write(0, b"child");
        reap(fork(|| {
            let good = memory.read(0, 5) == b"child";
            memory.write(0, b"grand");
            good && memory.read(PAGE, PAGE) == pattern(memory.addr + PAGE, PAGE)
        }));
        memory.read(0, 5) == b"child"
    }));
    assert_eq!(memory.read(0, memory.len), pattern(memory.addr, memory.len));
    assert_eq!(
        pool.read(&registration, 0, memory.len),
        memory.read(0, memory.len)
    );
    pool.deregister(registration);
}

/// In a child: all is as in a process that has converted nothing.
fn register_anew(memory: &Memory) -> bool {
    assert_eq!(lock().stats(), Stats::default());
    let pool = Pool::new(GIB);
    let before = memory.read(0, memory.len);
    let registration = pool.register(memory.addr + 10, memory.len - 20);
    assert!(is_shared(&registration), "{registration:x?}");
    assert_eq!(
        pool.read(&registration, 0, memory.len - 20),
        before[10..before.len() - 10]
    );
    pool.write(&registration, 0, b"child's peer");
    assert_eq!(memory.read(10, 12), b"child's peer");
    let pid = fork(|| memory.read(10, 12) == b"child's peer");
    reap(pid);
    pool.write(&registration, 0, b"again");
    assert_eq!(memory.read(10, 5), b"again");
    pool.deregister(registration);
    memory.unmap(0, memory.len);
    pool.collect();
    pool.used() == 0
}

fn a_child_registers_anew(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let registration = pool.register(memory.addr, memory.len);
    reap(fork(|| register_anew(&memory)));
    assert_eq!(memory.read(0, memory.len), pattern(memory.addr, memory.len));
    assert_eq!(
        pool.read(&registration, 0, memory.len),
        memory.read(0, memory.len)
    );
    pool.deregister(registration);
}

fn a_child_of_threads_registers_anew(_: Mode) {
    let pool = Pool::new(GIB);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seed = 0;
            while !stop.load(Relaxed) {
                seed += 1;
                assert!(use_the_heap(seed, 100));
            }
        });
        for _ in 0..30 {
            let memory = Memory::filled(8 * PAGE);
            let registration = pool.register(memory.addr, memory.len);
            reap(fork(|| register_anew(&memory)));
            assert_eq!(
                pool.read(&registration, 0, memory.len),
                memory.read(0, memory.len)
            );
            pool.deregister(registration);
            memory.unmap(0, memory.len);
        }
        stop.store(true, Relaxed);
    });
}

fn moved_unmapped_and_protected_memory(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(12 * PAGE);
    let registration = pool.register(memory.addr, memory.len);
    memory.unmap(3 * PAGE, PAGE);
    let other = Memory::at(memory.addr + 3 * PAGE, PAGE);
    other.write(0, b"not ours");
    memory.protect(5 * PAGE, PAGE, MprotectFlags::READ);
    memory.protect(6 * PAGE, PAGE, MprotectFlags::empty());
    // SAFETY: it moves this test's own memory.
    let moved = unsafe {
        let target = Memory::new(4 * PAGE).addr;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let from = (memory.addr + 8 * PAGE) as *mut _;
        libc::mremap(from, 4 * PAGE as usize, 4 * PAGE as usize, flags, target) as u64
    };
    let rights = |at: u64| {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let covers = |line: &&str| {
            let (range, _) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let hex = |text| u64::from_str_radix(text, 16).unwrap();
            (hex(start)..hex(end)).contains(&at)
        };
        maps.lines()
            .find(covers)
            .map(|l| l.split(' ').nth(1).unwrap().to_owned())
    };
    assert_eq!(rights(memory.addr).as_deref(), Some("rw-s"));
    reap(fork(|| {
        let at = |page: u64| rights(memory.addr + page * PAGE);
        assert_eq!(at(0).as_deref(), Some("rw-p"));
        assert_eq!(at(3).as_deref(), Some("rw-p"));
        assert_eq!(at(5).as_deref(), Some("r--p"));
        assert_eq!(at(6).as_deref(), Some("---p"));
        assert_eq!(at(8), None);
        assert_eq!(rights(moved).as_deref(), Some("rw-p"));
        assert_eq!(other.read(0, 8), b"not ours");
        assert_eq!(
            load(moved, 4 * PAGE),
            pattern(memory.addr + 8 * PAGE, 4 * PAGE)
        );
        store(moved, b"child");
        memory.write(0, b"child");
        memory.read(5 * PAGE, PAGE) == pattern(memory.addr + 5 * PAGE, PAGE)
    }));
    assert_eq!(
        load(moved, 4 * PAGE),
        pattern(memory.addr + 8 * PAGE, 4 * PAGE)
    );
    assert_eq!(pool.read(&registration, 0, 8), pattern(memory.addr, 8));
    pool.deregister(registration);
}

fn untouched_memory_costs_nothing(_: Mode) {
    let pool = Pool::new(65 * GIB);
    let memory = Memory::new(64 * GIB);
    memory.write(PAGE, b"near");
    let registration = pool.register(memory.addr, memory.len);
    memory.write(50 * GIB, b"far");
    for _ in 0..3 {
        reap(fork(|| {
            memory.write(30 * GIB, b"child");
            memory.read(PAGE, 4) == b"near" && memory.read(50 * GIB, 3) == b"far"
        }));
    }
    assert_eq!(memory.read(30 * GIB, 5), [0; 5]);
    assert_eq!(pool.read(&registration, 50 * GIB, 3), b"far");
    // One page was read that is a hole.
    assert!(pool.resident() <= 3 * PAGE);
    pool.deregister(registration);
}

fn limit(what: libc::__rlimit_resource_t, most: u64) {
    let limit = libc::rlimit {
        rlim_cur: most,
        rlim_max: most,
    };
    // SAFETY: the kernel reads the limits.
    assert_eq!(unsafe { libc::setrlimit(what, &limit) }, 0);
}

fn a_fork_that_fails(mode: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let registration = pool.register(memory.addr, memory.len);
    limit(libc::RLIMIT_NPROC, 0);
    for _ in 0..5 {
        // SAFETY: it fails.
        let pid = unsafe { libc::fork() };
        let errno = std::io::Error::last_os_error().raw_os_error();
        assert_eq!(
            (pid, errno),
            (-1, Some(libc::EAGAIN)),
            "userfaultfd {mode:?}"
        );
        memory.write(0, b"go on");
        assert_eq!(pool.read(&registration, 0, 5), b"go on");
    }
    pool.deregister(registration);
}

fn no_descriptors_left(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let registration = pool.register(memory.addr, memory.len);
    limit(libc::RLIMIT_NOFILE, 3);
    reap(fork(|| {
        memory.write(0, b"child");
        memory.read(PAGE, PAGE) == pattern(memory.addr + PAGE, PAGE)
    }));
    assert_eq!(memory.read(0, memory.len), pattern(memory.addr, memory.len));
    assert_eq!(
        pool.read(&registration, 0, memory.len),
        memory.read(0, memory.len)
    );
    pool.deregister(registration);
}

/// How many descriptors this process has, and whether one is a userfaultfd.
fn descriptors() -> (usize, bool) {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    let names = all.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    let names: Vec<_> = names
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    (
        names.len(),
        names.iter().any(|name| name.contains("userfaultfd")),
    )
}

fn children_have_none_of_our_descriptors(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let before = descriptors();
    let registration = pool.register(memory.addr, memory.len);
    let with = descriptors();
    assert!(with.1);
    let stop = AtomicBool::new(false);
    for threaded in [false, true] {
        stop.store(!threaded, Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    std::thread::yield_now();
                }
            });
            for _ in 0..5 {
                reap(fork(|| {
                    let now = descriptors();
                    if now != before {
                        eprintln!("{before:?}, in the child {now:?}");
                    }
                    now == before
                }));
            }
            stop.store(true, Relaxed);
        });
    }
    assert_eq!(descriptors(), with);
    pool.deregister(registration);
}

fn errno_and_signals_are_as_they_were(_: Mode) {
    let pool = Pool::new(GIB);
    let memory = Memory::filled(8 * PAGE);
    let registration = pool.register(memory.addr, memory.len);
    let unblocked = || {
        // SAFETY: all zeroes are a set; the kernel writes another one.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set);
            (1..32).all(|signal| libc::sigismember(&set, signal) == 0)
        }
    };
    let errno = || std::io::Error::last_os_error().raw_os_error();
    // SAFETY: libc gives the address of this thread's errno.
    unsafe { *libc::__errno_location() = libc::EXDEV };
    // SAFETY: the child runs this code alone.
    match unsafe { libc::fork() } {
        0 => {
            let good = errno() == Some(libc::EXDEV) && unblocked();
            // SAFETY: it ends the process.
            unsafe { libc::_exit(if good { 0 } else { 1 }) }
        }
        pid => {
            assert_eq!(errno(), Some(libc::EXDEV));
            assert!(unblocked());
            reap(pid);
        }
    }
    pool.deregister(registration);
}
