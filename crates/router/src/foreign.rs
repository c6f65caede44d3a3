//! The application's own memory, reached across processes: for pages that cannot be shared.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender};

use rustix::io::Errno;

use crate::copier::{Copier, Copiers, Job, Threads};

/// A process's memory, bound to the address space it had when it was opened: neither `exec` nor
/// the reuse of its process id makes it another one's.
#[derive(Clone, Debug)]
pub(crate) struct ForeignMemory(Arc<File>);

impl ForeignMemory {
    /// Opens the memory of the process that opened a session, as user `uid`.
    ///
    /// The process may be hostile and race with us by executing a set-user-id program. What was
    /// opened before that is bound to the old address space; what was opened after it belongs to
    /// the new user, which the second look at the owner shows.
    pub(crate) fn open(pid: u32, uid: u32) -> Result<Self, Errno> {
        if pid == 0 {
            // Not in our process id namespace.
            return Err(Errno::SRCH);
        }
        let path = format!("/proc/{pid}/mem");
        let errno = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(errno)?;
        let owner = std::fs::symlink_metadata(&path).map_err(errno)?.uid();
        if owner == uid {
            Ok(ForeignMemory(Arc::new(file)))
        } else {
            Err(Errno::PERM)
        }
    }

    /// Reads from the process; false if any byte cannot be read.
    pub(crate) fn read(&self, addr: u64, out: &mut [u8]) -> bool {
        self.0.read_exact_at(out, addr).is_ok()
    }

    /// Writes to the process; false if any byte cannot be written.
    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) -> bool {
        self.0.write_all_at(bytes, addr).is_ok()
    }

    /// Whether the address space is no more: its process has died, or executed another program.
    /// That comes before anybody is told of it.
    pub(crate) fn is_gone(&self) -> bool {
        // The file ends where there is no memory at all; a hole in it is an error.
        matches!(self.0.read_at(&mut [0], 0), Ok(0))
    }
}

/// What needs a thread that is not confined.
#[derive(Debug)]
pub(crate) enum Question {
    /// A process's memory, by its id and its user's.
    Memory(u32, u32, SyncSender<Result<ForeignMemory, Errno>>),
    /// Another copier.
    Copier(Sender<Copier>),
}

/// Who opens processes' memory.
#[derive(Clone, Debug)]
pub(crate) enum Opener {
    /// Whoever asks: without threads.
    #[cfg(any(test, feature = "testing"))]
    Direct,
    /// A thread that is not confined.
    Thread(Sender<Question>),
}

impl Opener {
    /// One whose thread ends when it, with all its copies, is gone. `confined` is whether the
    /// copiers that it starts are.
    pub(crate) fn thread(confined: bool) -> std::io::Result<Self> {
        let (ask, questions) = std::sync::mpsc::channel::<Question>();
        std::thread::Builder::new()
            .name("ff-open".into())
            .spawn(move || {
                for question in questions {
                    // Who asked waits for it, or is gone.
                    match question {
                        Question::Memory(pid, uid, answer) => {
                            let _ = answer.send(ForeignMemory::open(pid, uid));
                        }
                        Question::Copier(answer) => {
                            if let Ok(copier) = Copier::start(Arc::new(Job::run), confined) {
                                let _ = answer.send(copier);
                            }
                        }
                    }
                }
            })?;
        Ok(Opener::Thread(ask))
    }

    /// Who makes the copies.
    pub(crate) fn copiers(&self) -> Copiers {
        match self {
            #[cfg(any(test, feature = "testing"))]
            Opener::Direct => Copiers::Direct,
            Opener::Thread(ask) => Copiers::Threads(Threads::new(ask.clone())),
        }
    }

    /// As [`ForeignMemory::open`].
    pub(crate) fn open(&self, pid: u32, uid: u32) -> Result<ForeignMemory, Errno> {
        match self {
            #[cfg(any(test, feature = "testing"))]
            Opener::Direct => ForeignMemory::open(pid, uid),
            Opener::Thread(ask) => {
                let (answer, answered) = std::sync::mpsc::sync_channel(1);
                let question = Question::Memory(pid, uid, answer);
                ask.send(question).map_err(|_| Errno::IO)?;
                answered.recv().map_err(|_| Errno::IO)?
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_memory_is_reached_and_holes_are_not() {
        let uid = rustix::process::getuid().as_raw();
        let memory = ForeignMemory::open(std::process::id(), uid).unwrap();
        let mut bytes = *b"abcd";
        let addr = bytes.as_mut_ptr() as u64;
        assert!(memory.write(addr, b"wxyz"));
        let mut out = [0; 4];
        assert!(memory.read(addr, &mut out));
        assert_eq!(&out, b"wxyz");
        assert_eq!(std::hint::black_box(&bytes), b"wxyz");
        assert!(!memory.read(8, &mut out));
        assert!(!memory.write(8, b"x"));
        assert!(!memory.is_gone());
        for opener in [Opener::Direct, Opener::thread(true).unwrap()] {
            assert!(opener.open(std::process::id(), uid).is_ok());
            let other = opener.open(std::process::id(), uid + 1);
            assert_eq!(other.unwrap_err(), Errno::PERM);
        }
    }

    #[test]
    fn the_memory_of_who_has_died_is_gone() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let uid = rustix::process::getuid().as_raw();
        let memory = ForeignMemory::open(child.id(), uid).unwrap();
        assert!(!memory.is_gone());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(memory.is_gone());
    }
}
