//! `freeflow doctor`: what this machine allows.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use clap::Args;
use freeflow_convert::UffdMode;
use rustix::thread::UnshareFlags;

use crate::links::{TlsArgs, read_hosts};
use crate::{Output, OutputArgs, enter, inject, namespaces, sysfs};

/// A certificate that expires within this time is to be renewed.
const RENEW_WITHIN: Duration = Duration::from_secs(30 * 86_400);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

struct Finding {
    what: &'static str,
    verdict: Verdict,
    detail: String,
}

fn finding(what: &'static str, verdict: Verdict, detail: impl Into<String>) -> Finding {
    Finding {
        what,
        verdict,
        detail: detail.into(),
    }
}

#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// This host's address in the network between hosts, to look whether the certificate is for it
    #[arg(long, value_name = "ADDRESS", requires = "tls_cert")]
    underlay: Option<IpAddr>,
    /// The map of hosts, if it has names for them
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    hosts: Option<PathBuf>,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Looks at everything that FreeFlow depends on.
pub(crate) fn doctor(args: &DoctorArgs) -> Result<ExitCode> {
    let mut findings = vec![
        kernel(),
        cores(),
        memfd(),
        userfaultfd(),
        mount_namespace(),
        private_network(),
        ptrace(),
        huge_pages(),
        nic(),
        libraries(),
        stock_libraries(),
        descriptors(),
    ];
    findings.extend(certificates(args));
    let name = |v| match v {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "fail",
    };
    match args.output.output {
        Output::Json => {
            let list: Vec<_> = findings
                .iter()
                .map(|f| {
                    serde_json::json!({
                        "what": f.what, "verdict": name(f.verdict), "detail": f.detail
                    })
                })
                .collect();
            println!("{}", serde_json::to_string_pretty(&list)?);
        }
        Output::Text => {
            for f in &findings {
                println!("{:<4}  {:<16}  {}", name(f.verdict), f.what, f.detail);
            }
        }
    }
    let failed = findings.iter().any(|f| f.verdict == Verdict::Fail);
    Ok(if failed {
        crate::EXIT_UNFIT.into()
    } else {
        ExitCode::SUCCESS
    })
}

/// The files that a router is to be given, if any are named.
fn certificates(args: &DoctorArgs) -> Option<Finding> {
    let what = "certificates";
    let hosts = args.hosts.as_deref();
    let hosts = hosts
        .map(|file| read_hosts(file, args.underlay))
        .transpose();
    let read = hosts.and_then(|hosts| args.tls.read(args.underlay, &hosts.unwrap_or_default()));
    let identity = match read.transpose()? {
        Ok(identity) => identity,
        Err(e) => return Some(finding(what, Verdict::Fail, format!("{e:#}"))),
    };
    let (verdict, detail) = match args.underlay {
        Some(underlay) => (
            Verdict::Ok,
            format!("other hosts that have this authority believe that this is {underlay}"),
        ),
        None => (
            Verdict::Warn,
            "they go together; --underlay ADDRESS has them looked at as other hosts would"
                .to_owned(),
        ),
    };
    let (verdict, until) = match identity.expires() {
        Some(expiry) if expiry.left(SystemTime::now()) < RENEW_WITHIN => (
            Verdict::Warn,
            format!(
                "; the certificate expires on {expiry}: renew it soon, with `freeflow host cert` or \
                 at your authority, and send the router SIGHUP"
            ),
        ),
        Some(expiry) => (verdict, format!(", until {expiry}")),
        None => (verdict, String::new()),
    };
    Some(finding(what, verdict, detail + &until))
}

fn read(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

fn kernel() -> Finding {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(['.', '-'])
        .filter_map(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (5, 4) {
        return finding(
            "kernel",
            Verdict::Fail,
            format!("Linux {release}: 5.4 is needed"),
        );
    }
    if version < (6, 7) {
        let detail = format!(
            "Linux {release}: it cannot tell untouched pages from others (6.7 can); registering \
             untouched memory costs as much as touching it"
        );
        return finding("kernel", Verdict::Warn, detail);
    }
    finding("kernel", Verdict::Ok, format!("Linux {release}"))
}

fn cores() -> Finding {
    let n = std::thread::available_parallelism().map_or(1, usize::from);
    let detail = format!(
        "{n}: programs that poll and the router {}",
        if n > 4 {
            "spin before they sleep"
        } else {
            "yield to each other"
        }
    );
    finding("cores", Verdict::Ok, detail)
}

fn memfd() -> Finding {
    match freeflow_shm::sealed_memfd("freeflow-doctor", 4096) {
        Ok(_) => finding(
            "sealed memory",
            Verdict::Ok,
            "memfd_create with seals works",
        ),
        Err(e) => finding("sealed memory", Verdict::Fail, format!("memfd_create: {e}")),
    }
}

fn userfaultfd() -> Finding {
    let what = "userfaultfd";
    let refused = "registered memory of programs with several threads is copied across \
                   processes, which is slower; allow the userfaultfd system call, or give access to \
                   /dev/userfaultfd";
    match freeflow_convert::probe_userfaultfd() {
        (UffdMode::Full, true) => finding(what, Verdict::Ok, "full: any memory is shared in place"),
        (UffdMode::UserModeOnly, true) => finding(
            what,
            Verdict::Ok,
            "user mode: memory is shared in place; a system call that writes to a buffer at the \
             moment it is registered may fail",
        ),
        (UffdMode::None, _) => finding(what, Verdict::Warn, format!("refused: {refused}")),
        (_, false) => finding(
            what,
            Verdict::Warn,
            format!("too old (Linux 5.14 is needed): {refused}"),
        ),
    }
}

/// What is tried in a process of its own, as it changes that process for good.
#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum Probe {
    /// A mount namespace with the device's directories
    Mounts,
    /// A network namespace with an interface on a bridge
    Network,
}

/// Tries something; an error says why it cannot be had.
pub(crate) fn probe(what: Probe) -> Result<ExitCode> {
    match what {
        Probe::Network => namespaces::probe_network()?,
        Probe::Mounts => {
            let tree = std::env::temp_dir().join(format!("freeflow-doctor-{}", std::process::id()));
            let tried = sysfs::write(&tree, [[10, 77, 0, 1].into()], None)
                .map_err(anyhow::Error::from)
                .and_then(|()| namespaces::separate(UnshareFlags::NEWNS))
                .and_then(|()| enter::arrange(&tree, false));
            let _ = std::fs::remove_dir_all(&tree);
            tried?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Has another process try something.
fn tried(what: &'static str, probe: &str, without: &str) -> Finding {
    let own = match std::env::current_exe() {
        Ok(own) => own,
        Err(e) => return finding(what, Verdict::Warn, format!("cannot be tried: {e}")),
    };
    match Command::new(own).args(["__probe", probe]).output() {
        Ok(out) if out.status.success() => finding(what, Verdict::Ok, "can be had"),
        Ok(out) => {
            let said = String::from_utf8_lossy(&out.stderr);
            let reason = said.trim().trim_start_matches("freeflow: ");
            finding(what, Verdict::Warn, format!("{reason}: {without}"))
        }
        Err(e) => finding(what, Verdict::Warn, format!("cannot be tried: {e}")),
    }
}

fn mount_namespace() -> Finding {
    let without = "programs that look for /dev/infiniband or /sys/class/infiniband find nothing \
                   there; others work";
    tried("mount namespace", "mounts", without)
}

fn private_network() -> Finding {
    let without = "freeflow run --network private is not possible; --network host is";
    tried("private network", "network", without)
}

fn ptrace() -> Finding {
    let what = "process memory";
    match read("/proc/sys/kernel/yama/ptrace_scope").as_deref() {
        None | Some("0" | "1") => finding(
            what,
            Verdict::Ok,
            "the router can reach memory that cannot be shared",
        ),
        Some(scope) => finding(
            what,
            Verdict::Warn,
            format!(
                "kernel.yama.ptrace_scope is {scope}: memory that cannot be shared can be \
                 registered only if the router is root"
            ),
        ),
    }
}

fn huge_pages() -> Finding {
    let n = read("/proc/sys/vm/nr_hugepages").unwrap_or_else(|| "0".into());
    finding(
        "huge pages",
        Verdict::Ok,
        format!("{n} reserved; memory in huge pages is copied across processes"),
    )
}

fn nic() -> Finding {
    let devices = std::fs::read_dir("/sys/class/infiniband")
        .map(|d| d.count())
        .unwrap_or(0);
    let detail = match devices {
        0 => "none: not needed".to_owned(),
        n => format!("{n} in /sys/class/infiniband: not used by this release"),
    };
    finding("RDMA NIC", Verdict::Ok, detail)
}

fn libraries() -> Finding {
    match inject::library_dir() {
        Ok(dir) => finding("our libraries", Verdict::Ok, dir.display().to_string()),
        Err(e) => finding("our libraries", Verdict::Fail, e.to_string()),
    }
}

fn stock_libraries() -> Finding {
    let what = "stock libraries";
    if let Some(preload) = std::env::var_os("LD_PRELOAD").filter(|p| !p.is_empty()) {
        let detail = format!(
            "LD_PRELOAD is {}: it comes before our libraries",
            preload.display()
        );
        return finding(what, Verdict::Warn, detail);
    }
    let stock = [
        "/usr/lib/x86_64-linux-gnu/libibverbs.so.1",
        "/usr/lib64/libibverbs.so.1",
    ]
    .into_iter()
    .find(|p| Path::new(p).exists());
    let detail = match stock {
        Some(path) => {
            format!("{path} is there; programs get ours by LD_LIBRARY_PATH, and are told if not")
        }
        None => "none in the usual places".to_owned(),
    };
    finding(what, Verdict::Ok, detail)
}

fn descriptors() -> Finding {
    use rustix::process::{Resource, getrlimit};
    let limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let verdict = if limit < 4096 {
        Verdict::Warn
    } else {
        Verdict::Ok
    };
    let detail = format!("{limit} for the router: two for each process, one for each channel");
    finding("descriptors", verdict, detail)
}
