//! The process's session with the router, and what all objects share.

use std::cell::Cell;
use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use freeflow_convert::{PageSource, PoolRange};
use freeflow_session::{DeviceInfo, Handle, PROTOCOL_VERSION, Reply, Request, RingLocation};
use freeflow_shm::{CompletionEntry, DirtyMap, Doorbell, Mapping, Region};
use rustix::io::Errno;

use crate::cq::Cq;
use crate::link::Link;
use crate::qp::Qp;
use crate::slots::Slots;
use crate::srq::Srq;

/// Names the endpoint's socket; `freeflow run` sets it.
const SOCKET_VARIABLE: &str = "FREEFLOW_ENDPOINT";

/// Where the endpoint's socket is in a container that has it mounted.
const SOCKET_PATH: &str = "/run/freeflow/endpoint.sock";

/// How far the requests of a queue pair are done, by the completions that were polled.
#[derive(Debug, Default)]
pub(crate) struct Retired {
    /// Whose they are: its slot may be another's before all its completions were polled.
    pub(crate) qpn: u32,
    pub(crate) send: AtomicU64,
    pub(crate) recv: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) link: Link,
    pub(crate) info: DeviceInfo,
    pid: u32,
    doorbell: Doorbell,
    dirty: Region,
    slabs: Mutex<HashMap<u32, Arc<Mapping>>>,
    segments: Mutex<HashMap<u32, OwnedFd>>,
    pub(crate) memory_attached: Mutex<bool>,
    pub(crate) slots: Slots,
    /// By slot.
    pub(crate) retired: RwLock<Vec<Option<Arc<Retired>>>>,
    pub(crate) cqs: Mutex<HashMap<u32, Weak<Cq>>>,
    pub(crate) qps: Mutex<HashMap<u32, Weak<Qp>>>,
    /// XRC receive queue pairs by their opening.
    pub(crate) xrc_qps: Mutex<HashMap<u32, Weak<Qp>>>,
    pub(crate) srqs: Mutex<HashMap<u32, Weak<Srq>>>,
    /// The device as all ids of the connection manager share it.
    pub(crate) cm_device: Mutex<Option<usize>>,
    /// Empty polls after which a poller yields its processor.
    pub(crate) yield_after: u32,
}

static SESSION: Mutex<Option<Arc<Session>>> = Mutex::new(None);

thread_local! {
    /// The lock of [`SESSION`], while this thread forks.
    static HELD: Cell<ManuallyDrop<Option<Current>>> = const { Cell::new(ManuallyDrop::new(None)) };
}

type Current = MutexGuard<'static, Option<Arc<Session>>>;

/// Holds the process's session around each fork: else a child whose parent was opening one in
/// another thread would wait for that thread, which it does not have. Called when the library is
/// loaded.
pub fn prepare_for_fork() {
    freeflow_convert::around_fork(
        || HELD.set(ManuallyDrop::new(Some(unpoisoned(&SESSION)))),
        || {
            drop(ManuallyDrop::into_inner(
                HELD.replace(ManuallyDrop::new(None)),
            ))
        },
    );
}

pub(crate) fn unpoisoned<T>(lock: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic aborts the process.
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    /// The process's session; a new one if there is none, if its router died, or if it is the
    /// parent's. ENODEV: there is no endpoint here.
    pub(crate) fn current() -> Result<Arc<Session>, Errno> {
        let mut current = unpoisoned(&SESSION);
        match current.take() {
            Some(session) if session.is_own() && !session.link.check() => {
                *current = Some(session.clone());
                return Ok(session);
            }
            // The parent's mappings are not in this process: they must not be unmapped here,
            // where others may be by now.
            Some(session) if !session.is_own() => std::mem::forget(session),
            Some(_) => freeflow_convert::lock().forget_source(),
            None => {}
        }
        let session = Arc::new(Session::begin()?);
        *current = Some(session.clone());
        Ok(session)
    }

    fn begin() -> Result<Session, Errno> {
        let named = std::env::var_os(SOCKET_VARIABLE).map(PathBuf::from);
        let path = named.clone().unwrap_or_else(|| SOCKET_PATH.into());
        let link = match Link::connect(&path) {
            Ok(link) => link,
            Err(errno) => {
                if named.is_some() || errno != Errno::NOENT {
                    complain(&path, errno);
                }
                return Err(Errno::NODEV);
            }
        };
        let (welcome, fds) = match link.call(&Request::Hello {
            version: PROTOCOL_VERSION,
        }) {
            Ok((Reply::Welcome(welcome), fds)) => (welcome, fds),
            Ok(_) => return Err(Errno::PROTO),
            Err(errno) => {
                complain(&path, errno);
                return Err(Errno::NODEV);
            }
        };
        let mut fds = fds.into_iter();
        let (Some(doorbell), Some(slab)) = (fds.next(), fds.next()) else {
            return Err(Errno::PROTO);
        };
        let mapping = map_slab(&slab, &welcome.region)?;
        let dirty = region(&mapping, &welcome.region)?;
        let slabs = HashMap::from([(welcome.region.slab, mapping)]);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Session {
            link,
            info: welcome.device,
            pid: std::process::id(),
            doorbell: Doorbell::from_fd(doorbell),
            dirty,
            slabs: Mutex::new(slabs),
            segments: Mutex::default(),
            memory_attached: Mutex::new(false),
            slots: Slots::default(),
            retired: RwLock::default(),
            cqs: Mutex::default(),
            qps: Mutex::default(),
            xrc_qps: Mutex::default(),
            srqs: Mutex::default(),
            cm_device: Mutex::default(),
            // With a core for everybody, yielding only costs the poller time.
            yield_after: if cores > 4 { 2000 } else { 20 },
        })
    }

    /// Whether this is the process that began it, not its child.
    pub(crate) fn is_own(&self) -> bool {
        self.pid == std::process::id()
    }

    /// EINVAL: it is the parent's. What the router shares is not mapped in this child of `fork`, and
    /// another thread may have held a lock when it was made: this is asked before either.
    pub(crate) fn check_own(&self) -> Result<(), Errno> {
        if self.is_own() {
            Ok(())
        } else {
            Err(Errno::INVAL)
        }
    }

    /// Asks the router; a child of `fork` may not ask in its parent's name.
    pub(crate) fn call(&self, request: &Request) -> Result<(Reply, Vec<OwnedFd>), Errno> {
        self.check_own()?;
        self.link.call(request)
    }

    /// Asks for something that only succeeds or fails.
    pub(crate) fn tell(&self, request: &Request) -> Result<(), Errno> {
        self.call(request).map(|_| ())
    }

    /// As [`Self::tell`], to destroy something: with a dead router, it is gone already.
    pub(crate) fn destroy(&self, request: &Request) -> Result<(), Errno> {
        match self.tell(request) {
            Err(Errno::IO) if self.link.is_dead() => Ok(()),
            other => other,
        }
    }

    /// As [`Self::call`], of a request that makes or moves a ring: with the ring's memory, if the
    /// answer names one.
    pub(crate) fn call_for_ring(
        &self,
        request: &Request,
    ) -> Result<(Reply, Option<Region>), Errno> {
        self.check_own()?;
        // Held over the call: the router shows a slab once, and whoever else is given a ring in it
        // must find it.
        let mut slabs = unpoisoned(&self.slabs);
        let (reply, fds) = self.call(request)?;
        let at = match &reply {
            Reply::Cq(made) => &made.ring,
            Reply::Qp(made) => &made.ring,
            Reply::Srq(made) => &made.ring,
            Reply::Slots(made) => &made.table,
            _ => return Ok((reply, None)),
        };
        if let Some(fd) = fds.first() {
            slabs.insert(at.slab, map_slab(fd, at)?);
        }
        let region = region(slabs.get(&at.slab).ok_or(Errno::PROTO)?, at)?;
        Ok((reply, Some(region)))
    }

    /// Tells the router that a queue pair has new work.
    pub(crate) fn mark(&self, slot: u32) {
        if let Some(map) = DirtyMap::new(self.dirty.words())
            && map.mark(slot)
        {
            self.doorbell.ring();
        }
    }

    /// Waits until the router has taken up what was posted to any queue, at most for so long.
    pub(crate) fn wait_until_taken_up(&self, most: Duration) {
        let until = Instant::now() + most;
        while DirtyMap::new(self.dirty.words()).is_some_and(|map| map.is_dirty())
            && Instant::now() < until
        {
            rustix::thread::sched_yield();
        }
    }

    pub(crate) fn set_retired(&self, slot: u32, retired: Option<Arc<Retired>>) {
        let mut all = self.retired.write().unwrap_or_else(PoisonError::into_inner);
        let slot = slot as usize;
        if all.len() <= slot {
            all.resize(slot + 1, None);
        }
        all[slot] = retired;
    }

    /// A completion was polled: its request, and all before it in its queue, are done.
    pub(crate) fn retire(all: &[Option<Arc<Retired>>], entry: &CompletionEntry) {
        if let Some(Some(retired)) = all.get(entry.slot as usize)
            && retired.qpn == entry.qpn
        {
            let queue = if entry.is_send {
                &retired.send
            } else {
                &retired.recv
            };
            // Release: the slots were read by the router before (edge: the poster's load).
            queue.store(entry.retired, Ordering::Release);
        }
    }

    /// Lets the router reach this process's memory, for pages that cannot be shared.
    pub(crate) fn attach_memory(&self) -> Result<(), Errno> {
        let mut attached = unpoisoned(&self.memory_attached);
        if !*attached {
            if let Ok(router) = self.link.router() {
                // Only Yama's restricted ptrace needs it; elsewhere it fails and does no harm.
                let _ = rustix::process::set_ptracer(rustix::process::PTracer::ProcessID(router));
            }
            self.tell(&Request::AttachMemory)?;
            *attached = true;
        }
        Ok(())
    }
}

fn map_slab(fd: &OwnedFd, at: &RingLocation) -> Result<Arc<Mapping>, Errno> {
    let mapping = Mapping::new(fd, at.slab_len)?;
    mapping.exclude_from_fork()?;
    Ok(Arc::new(mapping))
}

fn region(mapping: &Arc<Mapping>, at: &RingLocation) -> Result<Region, Errno> {
    Region::new(mapping.clone(), at.offset, at.len).map_err(|_| Errno::PROTO)
}

/// Says once why there is no device although there should be one.
fn complain(path: &std::path::Path, errno: Errno) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        let advice = match errno {
            Errno::NOENT | Errno::CONNREFUSED => "; is its router running?",
            Errno::ACCESS => "; is it another user's?",
            Errno::MFILE => "; raise this program's or the router's limit of open files",
            Errno::IO => ": the router refused it",
            Errno::PROTONOSUPPORT => ": the router is of another release",
            _ => "",
        };
        let line = format!(
            "freeflow: no RDMA device: cannot open a session at {}: {errno}{advice}\n",
            path.display()
        );
        eprint!("{line}");
    });
}

/// Shared pages, from the router.
pub(crate) struct Pages<'a> {
    session: &'a Session,
    segments: std::sync::MutexGuard<'a, HashMap<u32, OwnedFd>>,
}

impl<'a> Pages<'a> {
    pub(crate) fn of(session: &'a Session) -> Self {
        Pages {
            session,
            segments: unpoisoned(&session.segments),
        }
    }
}

impl Pages<'_> {
    /// Maps a range that the router has handed out; `fds`: its segment, if it is new.
    pub(crate) fn map(
        &mut self,
        segment: u32,
        offset: u64,
        len: u64,
        fds: Vec<OwnedFd>,
    ) -> Result<Mapping, Errno> {
        if let Some(fd) = fds.into_iter().next() {
            self.segments.insert(segment, fd);
        }
        let fd = self.segments.get(&segment).ok_or(Errno::PROTO)?;
        let page = self.session.info.page_size;
        let len = len.checked_next_multiple_of(page).ok_or(Errno::NOMEM)?;
        let mapping = Mapping::part(fd, offset, len)?;
        mapping.exclude_from_fork()?;
        Ok(mapping)
    }
}

impl PageSource for Pages<'_> {
    fn alloc(&mut self, len: u64) -> Result<PoolRange, Errno> {
        match self.session.call(&Request::AllocPages { len })? {
            (
                Reply::Pages {
                    segment, offset, ..
                },
                fds,
            ) => {
                if let Some(fd) = fds.into_iter().next() {
                    self.segments.insert(segment, fd);
                }
                Ok(PoolRange {
                    segment,
                    offset,
                    len,
                })
            }
            _ => Err(Errno::PROTO),
        }
    }

    fn free(&mut self, range: PoolRange) {
        let PoolRange {
            segment,
            offset,
            len,
        } = range;
        // A router that is gone has freed it; any other refusal leaves it to the session's end.
        let _ = self.session.tell(&Request::FreePages {
            segment,
            offset,
            len,
        });
    }

    fn fd(&self, segment: u32) -> Option<BorrowedFd<'_>> {
        Some(self.segments.get(&segment)?.as_fd())
    }
}

/// The handle in a reply that creates something.
pub(crate) fn created(reply: Reply) -> Result<Handle, Errno> {
    match reply {
        Reply::Created(handle) => Ok(handle),
        _ => Err(Errno::PROTO),
    }
}
