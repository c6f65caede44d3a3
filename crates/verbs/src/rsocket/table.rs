//! The descriptors of the process that are rsockets.

use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};

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
    Inherited(RawFd),
}

type Entries = Vec<Option<Arc<Descriptor>>>;

static TABLE: RwLock<Entries> = RwLock::new(Vec::new());

/// The descriptor of that number; `None`: it is no rsocket.
pub(super) fn find(fd: RawFd) -> Option<Arc<Descriptor>> {
    let table = TABLE.read().unwrap_or_else(PoisonError::into_inner);
    table.get(usize::try_from(fd).ok()?)?.clone()
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
    table[at] = Some(Arc::new(descriptor));
    Ok(fd)
}

/// Takes a descriptor out.
pub(super) fn remove(fd: RawFd) -> Option<Arc<Descriptor>> {
    write().get_mut(usize::try_from(fd).ok()?)?.take()
}

/// The streams that there are, unless somebody is changing that.
pub(super) fn streams() -> Vec<Arc<Descriptor>> {
    let Ok(table) = TABLE.try_read() else {
        return Vec::new();
    };
    let streams = table.iter().flatten();
    let streams = streams.filter(|found| matches!(***found, Descriptor::Stream(_)));
    streams.cloned().collect()
}

/// The locks that are held while this thread forks: a child would wait for threads that it does not
/// have.
type Held = (RwLockWriteGuard<'static, Entries>, device::Held);

thread_local! {
    static HELD: Cell<ManuallyDrop<Option<Held>>> = const { Cell::new(ManuallyDrop::new(None)) };
}

extern "C" fn before_fork() {
    HELD.set(ManuallyDrop::new(Some((write(), device::hold()))));
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
    let Some((mut table, mut device)) = after_fork() else {
        return;
    };
    std::mem::forget(device.take());
    for (fd, entry) in table.iter_mut().enumerate() {
        if let Some(parents) = entry.take() {
            let others = match &*parents {
                Descriptor::Stream(socket) => socket.event_fds(),
                Descriptor::Datagram(socket) => socket.event_fds(),
                Descriptor::Epoll(_) | Descriptor::Inherited(_) => Vec::new(),
            };
            others.into_iter().for_each(close_inherited);
            std::mem::forget(parents);
            *entry = Some(Arc::new(Descriptor::Inherited(fd as RawFd)));
        }
    }
}

/// Called when the library is loaded, behind the client's own.
pub(crate) fn prepare_for_fork() {
    // SAFETY: the handlers are functions of this library, which stays loaded. It fails only for
    // want of memory; then a child must not touch its parent's rsockets.
    unsafe { libc::pthread_atfork(Some(before_fork), Some(in_parent), Some(in_child)) };
}

/// Closes a descriptor that the parent has too.
pub(super) fn close_inherited(fd: RawFd) {
    // SAFETY: the number was the parent's socket's, whose owner is forgotten in this process.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}
