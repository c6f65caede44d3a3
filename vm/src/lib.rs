//! Virtual machines with a kernel RDMA device, to test in.
//!
//! A guest runs Debian's own kernel in QEMU, whose TCG needs neither `/dev/kvm` nor any right. Its
//! root is this machine's root file system, read-only, under a writable layer in memory: whatever
//! is installed and built here can be run there, in the directory where it was asked for. `rxe`,
//! the kernel's software RoCE, is its RDMA device.
//!
//! ```no_run
//! use freeflow_vm::{End, Machine, Vm};
//!
//! let machine = Machine::prepare()?;
//! let script = r#". "$VM_LIB"; rxe_pair; ibv_devices"#;
//! let outcome = Vm::new(&machine).run(&["bash", "-c", script])?;
//! assert_eq!(outcome.hosts[0].end, End::Exited(0), "{outcome}");
//! # Ok::<(), freeflow_vm::VmError>(())
//! ```
//!
//! A command in a guest finds
//!
//! * `VM_LIB`: a file for shell scripts to source, with `rxe_pair`, which makes two connected rxe
//!   devices, and `meet`, by which the scripts of two hosts wait for each other;
//! * `HOSTS` and `HOST_INDEX`: how many hosts there are, and which of them this is, from 0;
//! * `/out`: a directory that all hosts and this machine share ([`Outcome::out`]);
//! * an empty `/run` and `/dev/shm`; the rest is as here, and writes to it are lost at the end.
//!
//! Two hosts have a network between them: `eth0` with 10.99.0.1 and 10.99.0.2, and `rxe0` on it.

mod guest;
mod image;
mod initrd;
mod machine;
mod outcome;
mod vm;

pub use machine::{Machine, PACKAGES};
pub use outcome::{End, Host, Outcome};
pub use vm::{Vm, run};

use std::io;

/// Why no guest ran, or was left.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// This machine cannot run guests.
    #[error("no virtual machine can be had: {0}")]
    Unavailable(String),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Its answer.
        source: io::Error,
    },
    /// A program failed.
    #[error("{line}: {said}")]
    Command {
        /// The command line.
        line: String,
        /// What it complained of.
        said: String,
    },
}

impl VmError {
    fn io(what: String, source: io::Error) -> VmError {
        VmError::Io { what, source }
    }
}
