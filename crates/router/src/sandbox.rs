//! What the threads that handle hostile input may ask of the kernel.
//!
//! Each of them gives up its capabilities and all access to files (Landlock), and is left with the
//! system calls that it needs (seccomp); any other fails with EPERM. What needs more, opening
//! another process's memory, is done by a thread of its own that sees nothing of a client's but
//! the ids that the kernel gave.

use std::collections::BTreeMap;

use landlock::{
    ABI, Access, AccessFs, AccessNet, NetPort, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// Executes work requests.
    Engine,
    /// Serves endpoints' sockets.
    Control,
    /// Copies to and from memory that may come late.
    Copier,
    /// Talks to other hosts' routers, which have this TCP port.
    Links { port: u16 },
}

/// How well a thread is confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Confinement {
    pub(crate) seccomp: bool,
    pub(crate) landlock: bool,
}

/// Of every thread: memory, time, waiting, ending, and the descriptors it has.
const COMMON: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fallocate,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Of the control thread: connections, and the memory and descriptors of new objects.
const CONTROL: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_dup,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_getsockopt,
    libc::SYS_ioctl,
    libc::SYS_memfd_create,
    libc::SYS_newfstatat,
    libc::SYS_pidfd_open,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_setsockopt,
    libc::SYS_socketpair,
    libc::SYS_statx,
];

/// Of the engine's thread: the sockets between hosts, and short timers.
const ENGINE: &[libc::c_long] = &[
    libc::SYS_getsockopt,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
];

/// Of the thread that talks to other routers: connections.
const LINKS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_ioctl,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_setsockopt,
];

/// Allowed unless the memory would be executable.
const MAPPING: &[libc::c_long] = &[libc::SYS_mmap, libc::SYS_mprotect];

/// Confines the thread that calls it, as far as the kernel knows how.
pub(crate) fn confine(job: Job) -> Confinement {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    // Known from here on without a look at a file.
    let _ = rustix::param::page_size();
    // Giving capabilities up is always allowed.
    let _ = set_capabilities(None, none);
    Confinement {
        landlock: no_files(job).unwrap_or(false),
        seccomp: few_calls(job).is_ok(),
    }
}

/// No access to files, to abstract sockets, and no signals to others; no TCP, but for connections to
/// other routers.
fn no_files(job: Job) -> Result<bool, landlock::RulesetError> {
    const NEWEST: ABI = ABI::V6;
    let rules = Ruleset::default().handle_access(AccessFs::from_all(NEWEST))?;
    let rules = match job {
        // It binds its end of each to an address, and the port that there is.
        Job::Links { .. } => rules.handle_access(AccessNet::ConnectTcp)?,
        _ => rules.handle_access(AccessNet::from_all(NEWEST))?,
    };
    let mut made = rules.scope(Scope::from_all(NEWEST))?.create()?;
    if let Job::Links { port } = job {
        made = made.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
    }
    Ok(made.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}

fn few_calls(job: Job) -> Result<(), seccompiler::Error> {
    seccompiler::apply_filter(&filter(job)?)
}

fn filter(job: Job) -> Result<BpfProgram, seccompiler::BackendError> {
    const PROT: u8 = 2;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let more = match job {
        Job::Engine => ENGINE,
        Job::Copier => &[],
        Job::Control => CONTROL,
        Job::Links { .. } => LINKS,
    };
    for &call in COMMON.iter().chain(more) {
        rules.insert(call, Vec::new());
    }
    for &call in MAPPING {
        let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
        let not = SeccompCondition::new(PROT, SeccompCmpArgLen::Dword, executable, 0)?;
        rules.insert(call, vec![SeccompRule::new(vec![not])?]);
    }
    if matches!(job, Job::Links { .. }) {
        rules.insert(libc::SYS_socket, tcp_alone()?);
    }
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, arch)?.try_into()
}

/// Sockets of TCP: no others, as Landlock looks at where these connect to and at nothing else. MPTCP,
/// which it does not know, is another protocol.
fn tcp_alone() -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    const FLAGS: u64 = (libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u64;
    let is = |argument, op, value: i32| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value as u64)
    };
    let mut rules = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for protocol in [0, libc::IPPROTO_TCP] {
            rules.push(SeccompRule::new(vec![
                is(0, SeccompCmpOp::Eq, family)?,
                is(1, SeccompCmpOp::MaskedEq(!FLAGS), libc::SOCK_STREAM)?,
                is(2, SeccompCmpOp::Eq, protocol)?,
            ])?);
        }
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;
    use landlock::{CompatLevel, Compatible};

    #[test]
    fn a_confined_thread_can_do_little() {
        let had = std::fs::read_to_string("/proc/self/status").is_ok();
        let confined = std::thread::spawn(|| {
            let confinement = confine(Job::Engine);
            assert!(confinement.seccomp, "this kernel has no seccomp");
            assert!(std::fs::read_to_string("/proc/self/status").is_err());
            assert!(std::process::Command::new("/bin/true").spawn().is_err());
            assert!(std::net::TcpListener::bind("127.0.0.1:0").is_err());
            assert_eq!(vec![1u8; 64 << 20].len(), 64 << 20);
            assert!(std::time::Instant::now().elapsed().as_secs() < 10);
        });
        confined.join().unwrap();
        // Other threads are as free as before.
        assert_eq!(std::fs::read_to_string("/proc/self/status").is_ok(), had);
    }

    #[test]
    fn a_control_thread_makes_shared_memory_but_opens_no_files() {
        let confined = std::thread::spawn(|| {
            confine(Job::Control);
            let fd = freeflow_shm::sealed_memfd("t", 4096).unwrap();
            freeflow_shm::Mapping::new(&fd, 4096).unwrap();
            freeflow_shm::event_pair().unwrap();
            freeflow_shm::Doorbell::new().unwrap();
            assert!(std::fs::File::open("/proc/self/maps").is_err());
        });
        confined.join().unwrap();
    }
    #[test]
    fn a_thread_of_links_connects_to_other_routers_alone() {
        let listen = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (router, other) = (listen(), listen());
        let at = |socket: &std::net::TcpListener| socket.local_addr().unwrap();
        let (router_at, other_at) = (at(&router), at(&other));
        let port = router_at.port();
        let confined = std::thread::spawn(move || {
            let confinement = confine(Job::Links { port });
            let connect = std::net::TcpStream::connect;
            connect(router_at).unwrap();
            router.accept().unwrap();
            assert!(std::fs::File::open("/proc/self/maps").is_err());
            if confinement.seccomp {
                assert!(std::os::unix::net::UnixStream::pair().is_err());
                assert!(std::os::unix::net::UnixDatagram::unbound().is_err());
                assert!(std::net::UdpSocket::bind("127.0.0.1:0").is_err());
            }
            if confinement.landlock {
                // Only kernels from 6.7 on look at ports.
                let knows = Ruleset::default()
                    .set_compatibility(CompatLevel::HardRequirement)
                    .handle_access(AccessNet::ConnectTcp);
                if knows.is_ok() {
                    assert!(connect(other_at).is_err());
                }
            }
        });
        confined.join().unwrap();
    }
}
