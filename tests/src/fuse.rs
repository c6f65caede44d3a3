//! A file whose bytes never come: a file system served by a thread that answers everything but
//! reads (`fuse(4)`; the structures are those of the kernel's `linux/fuse.h`, protocol 7.31).
//!
//! A process that maps it must be another than the one that serves it, and be killed, not waited
//! for: while a page is fetched for somebody else, the kernel holds its memory map.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

const ROOT: u64 = 1;
const FILE: u64 = 2;

/// Bytes of a request's header, and of an answer's.
const IN_HEADER: usize = 40;
const OUT_HEADER: u32 = 16;

/// A file whose bytes never come. Dropping it ends the file system: whoever waits for a page gets
/// an error then.
pub struct StuckFile {
    /// The file, open for reading.
    pub file: File,
    stop: Option<OwnedFd>,
    server: Option<JoinHandle<()>>,
}

impl StuckFile {
    /// Opens a file of `len` bytes; `None` if this machine does not allow it, for the reason that is said.
    pub fn new(len: u64) -> Result<Result<StuckFile, String>> {
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(e) => return Ok(Err(format!("cannot open /dev/fuse: {e}"))),
        };
        let (stopped, stop) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        // In a mount namespace of this thread alone: nothing is left of it whatever happens.
        let opened = std::thread::spawn(move || open(device, stopped, len)).join();
        let opened = opened.map_err(|_| anyhow!("the mounting thread failed"))??;
        Ok(opened.map(|(file, server)| StuckFile {
            file,
            stop: Some(stop),
            server: Some(server),
        }))
    }
}

impl Drop for StuckFile {
    fn drop(&mut self) {
        // The connection ends with its last descriptor.
        self.stop = None;
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

type Opened = (File, JoinHandle<()>);

fn open(device: File, stop: OwnedFd, len: u64) -> Result<Result<Opened, String>> {
    // SAFETY: of this thread alone; it has no descriptors of its own.
    if let Err(e) = unsafe { unshare_unsafe(UnshareFlags::NEWNS) } {
        return Ok(Err(format!("cannot make a mount namespace: {e}")));
    }
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).context("cannot make mounts private")?;
    let dir = tempfile::tempdir()?;
    if let Err(e) = mount_fuse(&device, dir.path()) {
        return Ok(Err(format!("cannot mount a FUSE file system: {e}")));
    }
    // A device that is not mounted is not served.
    let server = std::thread::spawn(move || serve(&device, &stop, len));
    let file = File::open(dir.path().join("file")).context("cannot open the stuck file")?;
    rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::DETACH)?;
    Ok(Ok((file, server)))
}

fn mount_fuse(device: &File, at: &Path) -> Result<(), Errno> {
    let fd = device.as_raw_fd();
    let data = format!("fd={fd},rootmode=40000,user_id=0,group_id=0\0");
    let data = std::ffi::CString::from_vec_with_nul(data.into_bytes());
    let data = data.map_err(|_| Errno::INVAL)?;
    mount("stuck", at, "fuse", MountFlags::NODEV, data.as_c_str())
}

/// Answers requests until `stop`'s other end is closed.
fn serve(device: &File, stop: &OwnedFd, len: u64) {
    let mut request = vec![0; 1 << 20];
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(device.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            Ok(_) if fds[1].revents().is_empty() => {}
            _ => return,
        }
        let mut device = device;
        let Ok(n) = device.read(&mut request) else {
            return;
        };
        if let Ok(Some(answer)) = answer(&request[..n], len)
            && device.write_all(&answer).is_err()
        {
            // Who asked was interrupted.
        }
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    let field = bytes.get(at..at + N).context("a short request")?;
    Ok(field.try_into()?)
}

/// The answer to a request, if it gets one.
fn answer(request: &[u8], len: u64) -> Result<Option<Vec<u8>>> {
    let opcode = u32::from_ne_bytes(number(request, 4)?);
    let unique = u64::from_ne_bytes(number(request, 8)?);
    let node = u64::from_ne_bytes(number(request, 16)?);
    let mut body = Vec::new();
    let mut error = 0;
    match opcode {
        INIT => {
            let readahead = 0u32;
            for word in [7, 31, readahead, 0] {
                body.extend(word.to_ne_bytes());
            }
            // Background requests, writes, time granularity, pages, and what is unused.
            body.extend([16u16, 12].map(u16::to_ne_bytes).concat());
            body.extend(4096u32.to_ne_bytes());
            body.resize(64, 0);
        }
        LOOKUP if request.get(IN_HEADER..) == Some(b"file\0".as_slice()) => {
            // Node, generation, for how long the entry and the attributes hold.
            for field in [FILE, 0, 3600, 3600, 0] {
                body.extend(field.to_ne_bytes());
            }
            body.extend(attributes(FILE, len));
        }
        GETATTR => {
            for field in [3600u64, 0] {
                body.extend(field.to_ne_bytes());
            }
            body.extend(attributes(node, len));
        }
        OPEN => {
            // Handle, flags: to close the file asks nobody, who may be ending in the same process.
            const NO_FLUSH: u32 = 1 << 5;
            body.extend([0, 0, NO_FLUSH, 0].map(u32::to_ne_bytes).concat());
        }
        FLUSH | RELEASE => {}
        // That is the point.
        READ => return Ok(None),
        FORGET | BATCH_FORGET | INTERRUPT => return Ok(None),
        LOOKUP => error = Errno::NOENT.raw_os_error(),
        _ => error = Errno::NOSYS.raw_os_error(),
    }
    if body.len() > 4096 {
        bail!("an answer of {} bytes", body.len());
    }
    let mut answer = Vec::new();
    answer.extend((OUT_HEADER + body.len() as u32).to_ne_bytes());
    answer.extend((-error).to_ne_bytes());
    answer.extend(unique.to_ne_bytes());
    answer.extend(body);
    Ok(Some(answer))
}

/// `struct fuse_attr`.
fn attributes(node: u64, len: u64) -> Vec<u8> {
    let (mode, len) = if node == ROOT {
        (0o40_755u32, 0)
    } else {
        (0o100_644, len)
    };
    let mut attr = Vec::new();
    for field in [node, len, len / 512, 0, 0, 0] {
        attr.extend(field.to_ne_bytes());
    }
    // Nanoseconds, mode, links, user, group, device, block size, flags.
    for field in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        attr.extend(field.to_ne_bytes());
    }
    attr
}
