//! Children of `fork` get copies of converted pages, as they would have of private ones.
//!
//! Before the fork, writers to converted pages are held; the child replaces each converted range
//! by a private copy while the parent waits; then writers go on. What peers write by RDMA in
//! that moment may or may not be in the child's copy, as with a NIC.

use std::cell::UnsafeCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{MutexGuard, Once};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap_anonymous, mremap_fixed};

use crate::converter::Converter;
use crate::maps::{Maps, is_single_threaded};

/// What `prepare` hands to the other two.
struct Forking {
    guard: MutexGuard<'static, Converter>,
    /// The child says that it is done by writing, or by dying.
    done: Option<(OwnedFd, OwnedFd)>,
    held: bool,
}

struct Slot(UnsafeCell<Option<Forking>>);

// SAFETY: glibc calls the handlers of one fork one after the other on one thread, and `prepare`
// holds the converter's lock until the others have taken what it left: no other thread is between
// its own `prepare` and them.
unsafe impl Sync for Slot {}

static FORKING: Slot = Slot(UnsafeCell::new(None));

/// Installs the handlers, once.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handlers are functions of this library, which is never unloaded while the
        // process has converted pages. It fails only for want of memory; then children share.
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    });
}

unsafe extern "C" fn prepare() {
    let guard = crate::locked();
    let any = !guard.segments.is_empty();
    let done = any
        .then(|| rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).ok())
        .flatten();
    let held = any && !is_single_threaded();
    if held {
        guard.hold_writers(true);
    }
    // SAFETY: see `Slot`.
    unsafe { *FORKING.0.get() = Some(Forking { guard, done, held }) };
}

fn take() -> Option<Forking> {
    // SAFETY: see `Slot`.
    unsafe { (*FORKING.0.get()).take() }
}

unsafe extern "C" fn parent() {
    let Some(Forking { guard, done, held }) = take() else {
        return;
    };
    if let Some((read, write)) = done {
        drop(write);
        let mut byte = [0];
        while rustix::io::read(&read, &mut byte) == Err(Errno::INTR) {}
    }
    if held {
        guard.hold_writers(false);
    }
}

unsafe extern "C" fn child() {
    let Some(Forking {
        mut guard, done, ..
    }) = take()
    else {
        return;
    };
    if !guard.segments.is_empty()
        && let Ok(mut maps) = Maps::open()
    {
        separate(&mut maps, &guard);
    }
    guard.reset();
    drop(guard);
    if let Some((_, write)) = done {
        let _ = rustix::io::write(&write, &[1]);
    }
}

/// Replaces every mapping of our pages, wherever the application has moved it, by private copies.
fn separate(maps: &mut Maps, converter: &Converter) {
    let mut at = 0;
    while let Some(vma) = maps.at_or_after(at) {
        if let Some(place) = converter.shows(&vma, vma.start) {
            let fd = &converter.segments[place.segment].fd;
            // A failure for want of memory leaves the pages shared; a fork itself would have
            // failed for it.
            let _ = privatise(fd, place.offset, vma.start, vma.end - vma.start);
        }
        at = vma.end;
    }
}

fn privatise(fd: &OwnedFd, offset: u64, start: u64, len: u64) -> Result<(), Errno> {
    let size = len as usize;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let copy = unsafe { mmap_anonymous(std::ptr::null_mut(), size, prot, MapFlags::PRIVATE)? };
    // SAFETY: nobody else knows the new mapping.
    let bytes = unsafe { std::slice::from_raw_parts_mut(copy.cast::<u8>(), size) };
    let mut at = offset;
    // What was never touched reads as zeroes in both.
    while let Ok(data) = rustix::fs::seek(fd.as_fd(), SeekFrom::Data(at)) {
        if data >= offset + len {
            break;
        }
        let hole = rustix::fs::seek(fd.as_fd(), SeekFrom::Hole(data))?.min(offset + len);
        let mut done = data;
        while done < hole {
            let part = &mut bytes[(done - offset) as usize..(hole - offset) as usize];
            match rustix::io::pread(fd, part, done)? {
                0 => break,
                n => done += n as u64,
            }
        }
        at = hole;
    }
    // SAFETY: it moves over our own pages, of the same content, in a process of one thread.
    unsafe { mremap_fixed(copy, size, size, MremapFlags::MAYMOVE, start as *mut _)? };
    Ok(())
}
