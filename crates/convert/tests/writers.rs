//! Threads that use memory while it is converted.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Barrier};

use common::*;

tests! {
    no_write_is_lost_and_nothing_torn_is_read: HELD,
    no_first_write_to_a_page_is_lost: HELD,
    first_touches_of_large_untouched_memory_are_kept: HELD,
    atomics_of_threads_that_share_a_word_add_up: HELD,
    system_calls_of_other_threads_wait_too: &[Mode::Full],
    signal_handlers_write_to_what_their_thread_converts: ALL,
}

/// Writers store growing numbers into their own words; readers look at all of them.
struct Hammer {
    memory: Memory,
    stop: AtomicBool,
    turns: AtomicU64,
}

const WRITERS: u64 = 2;

impl Hammer {
    fn words(&self) -> u64 {
        self.memory.len / 64
    }

    /// Its word of a cache line.
    fn word(&self, line: u64, writer: u64) -> &'static AtomicU64 {
        word(self.memory.addr + 64 * line + 8 * writer)
    }

    /// Returns what the last store to each line was.
    fn write(&self, writer: u64, start: u64) -> Vec<u64> {
        let mut last = vec![start; self.words() as usize];
        let mut value = start;
        while !self.stop.load(Relaxed) {
            for (line, last) in last.iter_mut().enumerate() {
                value += 1;
                self.word(line as u64, writer).store(value, Relaxed);
                *last = value;
            }
            self.turns.fetch_add(1, Relaxed);
        }
        last
    }

    /// Nothing is ever seen to go back.
    fn read(&self, start: u64) {
        let mut seen = vec![start; (self.words() * WRITERS) as usize];
        while !self.stop.load(Relaxed) {
            for line in 0..self.words() {
                for writer in 0..WRITERS {
                    let seen = &mut seen[(line * WRITERS + writer) as usize];
                    let now = self.word(line, writer).load(Relaxed);
                    assert!(now >= *seen, "line {line}: {now} after {seen}");
                    *seen = now;
                }
            }
        }
    }
}

/// Converts `len` bytes under fire; `prepare` touches the memory first, as far as it likes.
fn hammer(pool: &Pool, len: u64, start: u64) {
    let memory = if start == 0 {
        Memory::new(len)
    } else {
        let memory = Memory::new(len);
        for at in (0..len).step_by(8) {
            word(memory.addr + at).store(start, Relaxed);
        }
        memory
    };
    let hammer = Arc::new(Hammer {
        memory,
        stop: AtomicBool::new(false),
        turns: AtomicU64::new(0),
    });
    let ready = Arc::new(Barrier::new(WRITERS as usize + 2));
    let spawn = |writer: Option<u64>| {
        let (hammer, ready) = (hammer.clone(), ready.clone());
        std::thread::spawn(move || {
            ready.wait();
            match writer {
                Some(writer) => hammer.write(writer, start),
                None => {
                    hammer.read(start);
                    Vec::new()
                }
            }
        })
    };
    let writers: Vec<_> = (0..WRITERS).map(|w| spawn(Some(w))).collect();
    let reader = spawn(None);
    ready.wait();
    if start != 0 {
        while hammer.turns.load(Relaxed) < 2 {
            std::thread::yield_now();
        }
    }
    // The first and the last page are shared with bytes that are not registered.
    let (addr, len) = (hammer.memory.addr, hammer.memory.len);
    let registration = pool.register(addr + 100, len - 200);
    assert!(is_shared(&registration), "{registration:x?}");
    let after = hammer.turns.load(Relaxed);
    while hammer.turns.load(Relaxed) < after + WRITERS {
        std::thread::yield_now();
    }
    hammer.stop.store(true, Relaxed);
    reader.join().unwrap();
    for (writer, thread) in (0..).zip(writers) {
        let last = thread.join().unwrap();
        for (line, &last) in (0..).zip(&last) {
            let now = hammer.word(line, writer).load(Relaxed);
            assert_eq!(now, last, "writer {writer} lost a write to line {line}");
        }
    }
    assert_eq!(
        pool.read(&registration, 0, len - 200),
        load(addr + 100, len - 200)
    );
    pool.deregister(registration);
    hammer.memory.unmap(0, len);
    pool.collect();
    assert_eq!(pool.used(), 0);
}

fn no_write_is_lost_and_nothing_torn_is_read(_: Mode) {
    let pool = Pool::new(GIB);
    for round in 0..300 {
        hammer(&pool, 4 * PAGE, round + 1);
    }
}

fn no_first_write_to_a_page_is_lost(_: Mode) {
    let pool = Pool::new(GIB);
    for _ in 0..100 {
        hammer(&pool, 32 * PAGE, 0);
    }
}

fn first_touches_of_large_untouched_memory_are_kept(_: Mode) {
    const STEP: u64 = 3 * MIB;
    let pool = Pool::new(GIB);
    for _ in 0..100 {
        let memory = Memory::new(384 * MIB);
        let (addr, len) = (memory.addr, memory.len);
        let ready = Arc::new(Barrier::new(2));
        let begin = ready.clone();
        let toucher = std::thread::spawn(move || {
            begin.wait();
            for at in (0..len).step_by(STEP as usize) {
                assert_eq!(word(addr + at).swap(at + 1, Relaxed), 0);
            }
        });
        ready.wait();
        let registration = pool.register(addr, len);
        toucher.join().unwrap();
        assert!(is_shared(&registration));
        for at in (0..len).step_by(STEP as usize) {
            assert_eq!(word(addr + at).load(Relaxed), at + 1);
            assert_eq!(pool.read(&registration, at, 8), (at + 1).to_ne_bytes());
        }
        pool.deregister(registration);
        memory.unmap(0, len);
        pool.collect();
    }
}

fn atomics_of_threads_that_share_a_word_add_up(_: Mode) {
    let pool = Pool::new(GIB);
    for _ in 0..200 {
        let memory = Memory::filled(PAGE);
        let addr = memory.addr;
        word(addr).store(0, Relaxed);
        let stop = Arc::new(AtomicBool::new(false));
        let adder = || {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut added = 0;
                while !stop.load(Relaxed) || added < 100 {
                    word(addr).fetch_add(1, Relaxed);
                    added += 1;
                }
                added
            })
        };
        let adders = [adder(), adder()];
        while word(addr).load(Relaxed) < 10 {
            std::thread::yield_now();
        }
        let registration = pool.register(addr + 8, 8);
        stop.store(true, Relaxed);
        let sum: u64 = adders.into_iter().map(|a| a.join().unwrap()).sum();
        assert_eq!(word(addr).load(Relaxed), sum);
        pool.deregister(registration);
        memory.unmap(0, PAGE);
    }
}

fn system_calls_of_other_threads_wait_too(_: Mode) {
    // With the user-mode kind they fail: a documented limit.
    let pool = Pool::new(GIB);
    let source = Memory::filled(PAGE);
    for _ in 0..200 {
        let memory = Memory::filled(PAGE);
        let (addr, from) = (memory.addr, source.addr);
        let stop = Arc::new(AtomicBool::new(false));
        let copied = Arc::new(AtomicU64::new(0));
        let (ended, count) = (stop.clone(), copied.clone());
        let copier = std::thread::spawn(move || {
            let (read, write) = rustix::pipe::pipe().unwrap();
            while !ended.load(Relaxed) {
                // SAFETY: both are pages of this test that outlive the thread.
                unsafe {
                    let n = libc::write(fd(&write), from as *const _, PAGE as usize);
                    assert_eq!(n, PAGE as isize);
                    let n = libc::read(fd(&read), addr as *mut _, PAGE as usize);
                    assert_eq!(n, PAGE as isize, "{}", std::io::Error::last_os_error());
                }
                count.fetch_add(1, Relaxed);
            }
        });
        while copied.load(Relaxed) < 3 {
            std::thread::yield_now();
        }
        let registration = pool.register(addr, PAGE);
        let now = copied.load(Relaxed);
        while copied.load(Relaxed) < now + 2 {
            std::thread::yield_now();
        }
        stop.store(true, Relaxed);
        copier.join().unwrap();
        assert_eq!(pool.read(&registration, 0, PAGE), source.read(0, PAGE));
        pool.deregister(registration);
        memory.unmap(0, PAGE);
    }
}

fn fd(fd: &std::os::fd::OwnedFd) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(fd)
}

static TARGET: AtomicU64 = AtomicU64::new(0);
static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_alarm(_: libc::c_int) {
    let addr = TARGET.load(Relaxed);
    if addr != 0 {
        word(addr).fetch_add(1, Relaxed);
        word(addr + 16 * PAGE - 8).fetch_add(1, Relaxed);
        SIGNALS.fetch_add(1, Relaxed);
    }
}

fn signal_handlers_write_to_what_their_thread_converts(_: Mode) {
    let pool = Pool::new(GIB);
    let every = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: 200,
        },
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: 200,
        },
    };
    // SAFETY: the handler uses atomics alone.
    unsafe {
        let handler = on_alarm as extern "C" fn(libc::c_int);
        assert_ne!(libc::signal(libc::SIGALRM, handler as usize), libc::SIG_ERR);
        assert_eq!(
            libc::setitimer(libc::ITIMER_REAL, &every, std::ptr::null_mut()),
            0
        );
    }
    let mut counted = 0;
    for round in 0.. {
        let memory = Memory::new(16 * PAGE);
        TARGET.store(memory.addr, Relaxed);
        let registration = pool.register(memory.addr, memory.len);
        assert!(is_shared(&registration));
        TARGET.store(0, Relaxed);
        counted += word(memory.addr).load(Relaxed);
        assert_eq!(
            pool.read(&registration, memory.len - 8, 8),
            word(memory.addr).load(Relaxed).to_ne_bytes()
        );
        pool.deregister(registration);
        memory.unmap(0, memory.len);
        if round > 400 && counted >= 20 {
            break;
        }
    }
    assert_eq!(counted, SIGNALS.load(Relaxed));
}
