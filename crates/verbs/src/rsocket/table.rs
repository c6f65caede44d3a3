//! The descriptors of the process that are rsockets.

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use freeflow_client::Errno;

use super::datagram::DatagramSocket;
use super::epoll::Epoll;
use super::stream::StreamSocket;
use super::{device, wait};

/// What a descriptor is.
pub(super) enum Descriptor {
    Stream(Box<StreamSocket>),
    Datagram(Box<DatagramSocket>),
    Epoll(Epoll),
    /// The parent's: it can only be closed.
    Inherited(Option<File>),
}

/// A number, and the file that was behind it when it was ours: the program may have closed it, and
/// opened another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct File {
    fd: RawFd,
    device: u64,
    inode: u64,
}

impl File {
    /// `None`: the number is not open.
    fn at(fd: RawFd) -> Option<Self> {
        // SAFETY: the number is looked at by the kernel alone, which says if it is none.
        let status = rustix::fs::fstat(unsafe { BorrowedFd::borrow_raw(fd) }).ok()?;
        Some(File {
            fd,
            device: status.st_dev,
            inode: status.st_ino,
        })
    }

    /// Closes a file of the parent's, if it is still there.
    pub(super) fn close_inherited(self) {
        if File::at(self.fd) == Some(self) {
            // SAFETY: it was the parent's socket's, whose owner is forgotten in this process.
            drop(unsafe { OwnedFd::from_raw_fd(self.fd) });
        }
    }
}

/// What sockets have open beside their own descriptors.
static BESIDE: Mutex<Vec<File>> = Mutex::new(Vec::new());

fn beside() -> MutexGuard<'static, Vec<File>> {
    BESIDE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has children close a descriptor of a socket's until this is dropped, which is before it is closed.
pub(super) struct Beside(Option<File>);

impl Beside {
    pub(super) fn new(fd: RawFd) -> Self {
        let file = File::at(fd);
        beside().extend(file);
        Beside(file)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let mut all = beside();
        if let Some(at) = all.iter().position(|file| Some(*file) == self.0) {
            all.swap_remove(at);
        }
    }
}

/// A descriptor, and the file under its number.
#[derive(Clone)]
struct Entry {
    descriptor: Arc<Descriptor>,
    file: Option<File>,
}

type Entries = Vec<Option<Entry>>;

static TABLE: RwLock<Entries> = RwLock::new(Vec::new());

/// The descriptor of that number; `None`: it is no rsocket.
pub(super) fn find(fd: RawFd) -> Option<Arc<Descriptor>> {
    let table = TABLE.read().unwrap_or_else(PoisonError::into_inner);
    let entry = table.get(usize::try_from(fd).ok()?)?.as_ref()?;
    Some(entry.descriptor.clone())
}

fn write() -> RwLockWriteGuard<'static, Entries> {
    TABLE.write().unwrap_or_else(PoisonError::into_inner)
}

/// Enters a descriptor under the number that it has.
pub(super) fn insert(fd: RawFd, descriptor: Descriptor) -> Result<RawFd, Errno> {
    let at = usize::try_from(fd).map_err(|_| Errno::BADF)?;
    let mut table = write();
    if table.len() <= at {
        table.resize(at + 1, None);
    }
    table[at] = Some(Entry {
        descriptor: Arc::new(descriptor),
        file: File::at(fd),
    });
    Ok(fd)
}

/// Takes a descriptor out.
pub(super) fn remove(fd: RawFd) -> Option<Arc<Descriptor>> {
    let entry = write().get_mut(usize::try_from(fd).ok()?)?.take();
    Some(entry?.descriptor)
}

/// The streams that there are, unless somebody is changing that.
pub(super) fn streams() -> Vec<Arc<Descriptor>> {
    let Ok(table) = TABLE.try_read() else {
        return Vec::new();
    };
    let all = table.iter().flatten().map(|entry| &entry.descriptor);
    let streams = all.filter(|found| matches!(***found, Descriptor::Stream(_)));
    streams.cloned().collect()
}

/// The locks that are held while this thread forks: a child would wait for threads that it does not
/// have.
type Held = (
    RwLockWriteGuard<'static, Entries>,
    device::Held,
    MutexGuard<'static, Vec<File>>,
);

thread_local! {
    static HELD: Cell<ManuallyDrop<Option<Held>>> = const { Cell::new(ManuallyDrop::new(None)) };
}

extern "C" fn before_fork() {
    HELD.set(ManuallyDrop::new(Some((write(), device::hold(), beside()))));
}

fn after_fork() -> Option<Held> {
    ManuallyDrop::into_inner(HELD.replace(ManuallyDrop::new(None)))
}

extern "C" fn in_parent() {
    drop(after_fork());
}

/// The queues of the parent's sockets are not mapped in the child, and the connections are not the
/// child's to use.
extern "C" fn in_child() {
    wait::forked();
    let Some((mut table, mut device, mut beside)) = after_fork() else {
        return;
    };
    std::mem::forget(device.take());
    for entry in table.iter_mut() {
        if let Some(Entry { descriptor, file }) = entry.take() {
            std::mem::forget(descriptor);
            let descriptor = Arc::new(Descriptor::Inherited(file));
            *entry = Some(Entry { descriptor, file });
        }
    }
    std::mem::take(&mut *beside)
        .into_iter()
        .for_each(File::close_inherited);
}

/// Called when the library is loaded, behind the client's own.
pub(crate) fn prepare_for_fork() {
    // SAFETY: the handlers are functions of this library, which stays loaded. It fails only for
    // want of memory; then a child must not touch its parent's rsockets.
    unsafe { libc::pthread_atfork(Some(before_fork), Some(in_parent), Some(in_child)) };
}
