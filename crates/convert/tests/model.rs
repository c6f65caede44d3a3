//! Random lives of memory, against a model of what both sides must see.

mod common;

use std::collections::BTreeMap;
use std::ops::Range;

use common::*;
use freeflow_convert::{Backing, Registration};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::mm::{MapFlags, ProtFlags};

tests! {
    any_sequence_of_steps: ALL,
}

/// Pages of the range that the steps play with.
const PAGES: u64 = 12;

#[derive(Clone, Debug)]
enum Step {
    Map {
        pages: Range<u64>,
    },
    Unmap {
        pages: Range<u64>,
    },
    Move {
        pages: Range<u64>,
        to: u64,
    },
    Write {
        at: u64,
        len: u64,
        byte: u8,
    },
    Register {
        at: u64,
        len: u64,
    },
    Deregister {
        which: usize,
    },
    PeerWrites {
        which: usize,
        at: u64,
        len: u64,
        byte: u8,
    },
    Fork,
    Collect,
    RouterDies,
}

fn pages() -> impl Strategy<Value = Range<u64>> {
    (0..PAGES, 1..=PAGES).prop_map(|(start, len)| start..(start + len).min(PAGES))
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = PAGES * PAGE;
    prop_oneof![
        3 => pages().prop_map(|pages| Step::Map { pages }),
        2 => pages().prop_map(|pages| Step::Unmap { pages }),
        2 => (pages(), 0..PAGES).prop_map(|(pages, to)| Step::Move { pages, to }),
        5 => (0..bytes, 1..3 * PAGE, 1..=255u8)
            .prop_map(|(at, len, byte)| Step::Write { at, len, byte }),
        5 => (0..bytes, 1..5 * PAGE).prop_map(|(at, len)| Step::Register { at, len }),
        3 => any::<usize>().prop_map(|which| Step::Deregister { which }),
        5 => (any::<usize>(), 0..bytes, 1..2 * PAGE, 1..=255u8)
            .prop_map(|(which, at, len, byte)| Step::PeerWrites { which, at, len, byte }),
        1 => Just(Step::Fork),
        1 => Just(Step::Collect),
        1 => Just(Step::RouterDies),
    ]
}

/// A page of content, which mappings and registrations show.
type PageId = usize;

/// What the kernel and the converter must do, said simply.
struct World {
    base: u64,
    pool: Pool,
    content: Vec<Vec<u8>>,
    /// What the application has mapped, by page.
    mapped: BTreeMap<u64, PageId>,
    registered: Vec<(Registration, Vec<PageId>)>,
}

impl World {
    fn new() -> Self {
        // What is unmapped stays reserved, lest others (stacks of threads) are put there.
        let reserve = Memory::with(PAGES * PAGE, ProtFlags::empty(), MapFlags::PRIVATE);
        World {
            base: reserve.addr,
            pool: Pool::new(GIB),
            content: Vec::new(),
            mapped: BTreeMap::new(),
            registered: Vec::new(),
        }
    }

    fn mapped(&self, pages: &Range<u64>) -> bool {
        pages.clone().all(|page| self.mapped.contains_key(&page))
    }

    fn at(&self, page: u64) -> u64 {
        self.base + page * PAGE
    }

    /// Maps fresh memory in place of what was there.
    fn place(&self, pages: &Range<u64>, prot: ProtFlags) {
        let len = (pages.end - pages.start) * PAGE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: the range is this test's own.
        let at = unsafe {
            rustix::mm::mmap_anonymous(self.at(pages.start) as *mut _, len as usize, prot, flags)
        };
        assert_eq!(at.unwrap() as u64, self.at(pages.start));
    }

    fn unmap(&mut self, pages: &Range<u64>) {
        self.place(pages, ProtFlags::empty());
        self.mapped.retain(|at, _| !pages.contains(at));
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Map { pages } => {
                // As an allocator does: what was there is gone.
                self.place(pages, ProtFlags::READ | ProtFlags::WRITE);
                for page in pages.clone() {
                    self.content.push(vec![0; PAGE as usize]);
                    self.mapped.insert(page, self.content.len() - 1);
                }
            }
            Step::Unmap { pages } => self.unmap(pages),
            Step::Move { pages, to } => self.relocate(pages, *to),
            Step::Write { at, len, byte } => {
                let end = (at + len).min(PAGES * PAGE);
                if self.mapped(&(at / PAGE..end.div_ceil(PAGE))) {
                    store(self.base + at, &vec![*byte; (end - at) as usize]);
                    for at in *at..end {
                        let page = self.mapped[&(at / PAGE)];
                        self.content[page][(at % PAGE) as usize] = *byte;
                    }
                }
            }
            Step::Register { at, len } => {
                let end = (at + len).min(PAGES * PAGE);
                let pages = at / PAGE..end.div_ceil(PAGE);
                let made = self.pool.try_register(self.base + at, end - at, true);
                assert_eq!(made.is_ok(), self.mapped(&pages), "{made:x?}");
                if let Ok(made) = made {
                    assert!(is_shared(&made), "{made:x?}");
                    let pages = pages.map(|page| self.mapped[&page]).collect();
                    self.registered.push((made, pages));
                }
            }
            Step::Deregister { which } => {
                if !self.registered.is_empty() {
                    let which = which % self.registered.len();
                    let (registration, _) = self.registered.swap_remove(which);
                    self.pool.deregister(registration);
                }
            }
            Step::PeerWrites {
                which,
                at,
                len,
                byte,
            } => self.peer_writes(*which, *at, *len, *byte),
            Step::Fork => {
                let pid = fork(|| {
                    let good = self.mapped.iter().all(|(&page, &id)| {
                        let same = load(self.at(page), PAGE) == self.content[id];
                        store(self.at(page), &[0xDD; PAGE as usize]);
                        same
                    });
                    good && self
                        .mapped
                        .keys()
                        .all(|&page| load(self.at(page), PAGE) == [0xDD; PAGE as usize])
                });
                reap(pid);
            }
            Step::Collect => {
                self.pool.collect();
                self.check_use();
            }
            Step::RouterDies => {
                freeflow_convert::lock().forget_source();
                self.pool = Pool::new(GIB);
                for (registration, _) in std::mem::take(&mut self.registered) {
                    self.pool.deregister(registration);
                }
            }
        }
    }

    fn relocate(&mut self, pages: &Range<u64>, to: u64) {
        let count = pages.end - pages.start;
        let target = to..to + count;
        let apart = target.end <= pages.start || pages.end <= target.start;
        if target.end > PAGES || !apart || !self.mapped(pages) {
            return;
        }
        let id = |page| self.mapped[&page];
        let from: Vec<_> = pages.clone().map(id).collect();
        self.unmap(&target);
        // Only within one mapping can memory be moved at once.
        for (page, id) in pages.clone().zip(from) {
            let to = to + (page - pages.start);
            // SAFETY: both are pages of this test.
            let at = unsafe {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let len = PAGE as usize;
                libc::mremap(self.at(page) as *mut _, len, len, flags, self.at(to))
            };
            assert_eq!(at as u64, self.at(to));
            self.place(&(page..page + 1), ProtFlags::empty());
            self.mapped.remove(&page);
            self.mapped.insert(to, id);
        }
    }

    fn peer_writes(&mut self, which: usize, at: u64, len: u64, byte: u8) {
        if self.registered.is_empty() {
            return;
        }
        let (registration, pages) = &self.registered[which % self.registered.len()];
        let at = at % registration.len();
        let len = len.min(registration.len() - at);
        self.pool.write(registration, at, &vec![byte; len as usize]);
        let skip = registration.addr() % PAGE;
        for at in skip + at..skip + at + len {
            self.content[pages[(at / PAGE) as usize]][(at % PAGE) as usize] = byte;
        }
    }

    /// Pages of the pool in use are those that are registered, and no more than those and the
    /// ones that are mapped.
    fn check_use(&self) {
        let registered: std::collections::BTreeSet<_> = self
            .registered
            .iter()
            .flat_map(|(_, pages)| pages)
            .collect();
        let most: std::collections::BTreeSet<_> = registered
            .iter()
            .copied()
            .chain(self.mapped.values())
            .collect();
        let used = self.pool.used() / PAGE;
        assert!(used >= registered.len() as u64, "{used} pages are used");
        assert!(used <= most.len() as u64, "{used} pages are used");
    }

    fn check(&self) {
        for (&page, &id) in &self.mapped {
            assert_eq!(load(self.at(page), PAGE), self.content[id], "page {page}");
        }
        for (registration, pages) in &self.registered {
            let seen = self.pool.read(registration, 0, registration.len());
            let all: Vec<u8> = pages
                .iter()
                .flat_map(|&id| &self.content[id])
                .copied()
                .collect();
            let skip = (registration.addr() % PAGE) as usize;
            assert_eq!(seen, all[skip..skip + seen.len()], "{registration:x?}");
            let covered: u64 = registration.pieces().iter().map(|p| p.len).sum();
            assert_eq!(covered, registration.len());
            for piece in registration.pieces() {
                assert!(matches!(piece.backing, Backing::Pool { .. }));
            }
        }
    }
}

fn any_sequence_of_steps(_: Mode) {
    // A panic does not end the process: the steps are to be made fewer.
    drop(std::panic::take_hook());
    let config = Config {
        cases: 300,
        failure_persistence: None,
        ..Config::default()
    };
    let steps = prop::collection::vec(step(), 1..40);
    let result = TestRunner::new(config).run(&steps, |steps| {
        freeflow_convert::lock().forget_source();
        let mut world = World::new();
        for step in &steps {
            world.take(step);
            world.check();
        }
        for (registration, _) in std::mem::take(&mut world.registered) {
            world.pool.deregister(registration);
        }
        world.unmap(&(0..PAGES));
        world.pool.collect();
        prop_assert_eq!(world.pool.used(), 0);
        Ok(())
    });
    if let Err(why) = result {
        panic!("{why}");
    }
}
