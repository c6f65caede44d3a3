//! Whatever a create lacks, and at whichever step it finds that out: nothing of it is left.
//!
//! Descriptors are a process's: the tests run in one of their own.

use std::process::Command;
use std::sync::Arc;

use freeflow_policy::{Resource, Setting};
use freeflow_session::{
    CreateCq, CreateQp, CreateSrq, ExchangeSlots, OpenXrcQp, OpenXrcd, RegDmMr, RegMr, Reply,
    Request,
};
use freeflow_shm::event_pair;
use freeflow_types::{Access, DeviceLimits, MwType, QpCap, QpType};
use rustix::io::Errno;
use rustix::process::{Resource as Limited, Rlimit, getrlimit, setrlimit};

use crate::memory::Areas;
use crate::memory_tests::{Host, PAGE};
use crate::objects::Peer;

/// Set in the process that has a test for itself.
const ALONE: &str = "FREEFLOW_TEST_ALONE";

/// A create, and what undoes it.
type Verb = (&'static str, Request, fn(&Reply) -> Option<Request>);

/// Everything that creates change.
fn state(host: &Host) -> String {
    let e = &host.engine;
    let tables = [
        e.sessions.iter().count(),
        e.contexts.iter().count(),
        e.pds.iter().count(),
        e.mrs.iter().count(),
        e.windows.iter().count(),
        e.dms.iter().count(),
        e.channels.iter().count(),
        e.cqs.iter().count(),
        e.qps.iter().count(),
        e.srqs.iter().count(),
        e.xrc.xrcds.iter().count(),
        e.xrc.opens.iter().count(),
        e.xrc.by_srqn.len(),
        e.by_qpn.len(),
    ];
    let s = e.sessions.get(host.session).unwrap();
    let endpoint = e.endpoints.get(s.endpoint).unwrap();
    let used = [s.slabs.used(), s.segments.used()];
    let slots = s.slots.iter().flatten().count();
    let users: Vec<_> = e.pds.iter().map(|(_, pd)| pd.users).collect();
    let users = (
        users,
        e.cqs.iter().map(|(_, cq)| cq.users).collect::<Vec<_>>(),
    );
    let quota: Vec<_> = endpoint.quota_status().iter().map(|q| q.used).collect();
    format!(
        "{tables:?} {:?} {:?} {used:?} {slots} {users:?} {} {:?}",
        s.counts,
        s.usage,
        s.memory.is_some(),
        quota,
    )
}

/// Descriptors of this process.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Leaves no room in areas, so that what needs some needs a new one.
fn fill(areas: &mut Areas, mut len: u64) {
    while len >= PAGE {
        while areas.growth(len) == 0 {
            areas.alloc(len).unwrap();
        }
        len /= 2;
    }
}

fn verbs(host: &mut Host) -> Vec<Verb> {
    let (context, pd) = (host.context, host.pd);
    let create_cq = CreateCq {
        context,
        cqe: 16,
        channel: None,
        comp_vector: 0,
    };
    let cq = host.make(Request::CreateCq(create_cq));
    let dm = host.make(Request::AllocDm { context, len: 8 });
    let open_xrcd = Request::OpenXrcd(OpenXrcd {
        context,
        file: None,
        create: true,
        exclusive: false,
    });
    let xrcd = host.make(open_xrcd.clone());
    let cap = QpCap {
        max_send_wr: 16,
        max_send_sge: 1,
        ..QpCap::default()
    };
    let none: fn(&Reply) -> Option<Request> = |_| None;
    vec![
        ("context", Request::OpenContext, |r| match *r {
            Reply::Created(context) => Some(Request::CloseContext { context }),
            _ => None,
        }),
        ("domain", Request::AllocPd { context }, |r| match *r {
            Reply::Created(pd) => Some(Request::DeallocPd { pd }),
            _ => None,
        }),
        ("pages", Request::AllocPages { len: PAGE }, |r| match *r {
            Reply::Pages {
                segment, offset, ..
            } => Some(Request::FreePages {
                segment,
                offset,
                len: PAGE,
            }),
            _ => None,
        }),
        (
            "region",
            Request::RegMr(RegMr {
                pd,
                translation: host.translation(),
                access: Access::LOCAL_WRITE,
            }),
            |r| match r {
                Reply::Mr(made) => Some(Request::DeregMr { mr: made.mr }),
                _ => None,
            },
        ),
        ("null region", Request::AllocNullMr { pd }, |r| match r {
            Reply::Mr(made) => Some(Request::DeregMr { mr: made.mr }),
            _ => None,
        }),
        ("window", host.mw(MwType::Two), |r| match r {
            Reply::Mw(made) => Some(Request::DeallocMw { mw: made.mw }),
            _ => None,
        }),
        (
            "device memory",
            Request::AllocDm { context, len: 8 },
            |r| match r {
                Reply::Dm(made) => Some(Request::FreeDm { dm: made.dm }),
                _ => None,
            },
        ),
        (
            "region of device memory",
            Request::RegDmMr(RegDmMr {
                pd,
                dm,
                offset: 0,
                len: 8,
                access: Access::ZERO_BASED,
            }),
            |r| match r {
                Reply::Mr(made) => Some(Request::DeregMr { mr: made.mr }),
                _ => None,
            },
        ),
        (
            "channel",
            Request::CreateChannel { context },
            |r| match *r {
                Reply::Created(channel) => Some(Request::DestroyChannel { channel }),
                _ => None,
            },
        ),
        (
            "completion queue",
            Request::CreateCq(create_cq),
            |r| match r {
                Reply::Cq(made) => Some(Request::DestroyCq { cq: made.cq }),
                _ => None,
            },
        ),
        (
            "queue pair",
            Request::CreateQp(CreateQp {
                pd,
                qp_type: QpType::Rc,
                send_cq: cq,
                recv_cq: Some(cq),
                srq: None,
                cap,
                sq_sig_all: true,
            }),
            |r| match r {
                Reply::Qp(made) => Some(Request::DestroyQp { qp: made.qp }),
                _ => None,
            },
        ),
        (
            "shared receive queue",
            Request::CreateSrq(CreateSrq {
                pd,
                max_wr: 16,
                max_sge: 1,
                xrc: None,
            }),
            |r| match r {
                Reply::Srq(made) => Some(Request::DestroySrq { srq: made.srq }),
                _ => None,
            },
        ),
        (
            "XRC shared receive queue",
            Request::CreateSrq(CreateSrq {
                pd,
                max_wr: 16,
                max_sge: 1,
                xrc: Some(freeflow_session::XrcSrq { xrcd, cq }),
            }),
            |r| match r {
                Reply::Srq(made) => Some(Request::DestroySrq { srq: made.srq }),
                _ => None,
            },
        ),
        ("XRC domain", open_xrcd, |r| match *r {
            Reply::Created(xrcd) => Some(Request::CloseXrcd { xrcd }),
            _ => None,
        }),
        (
            "XRC queue pair",
            Request::OpenXrcQp(OpenXrcQp {
                context,
                xrcd,
                qpn: None,
            }),
            |r| match r {
                Reply::XrcQp(made) => Some(Request::CloseXrcQp { open: made.open }),
                _ => None,
            },
        ),
        // These stay with the session once they are there: last, not undone, and made once.
        ("memory", Request::AttachMemory, none),
        (
            "slots",
            Request::ExchangeSlots(ExchangeSlots {
                back: Vec::new(),
                want: 8,
            }),
            none,
        ),
    ]
}

/// Lowers a limit to what there is and `spare`, asks, and sets it back.
fn ask_short(host: &mut Host, what: Lack, spare: u64, request: &Request) -> Result<Reply, Errno> {
    let limits = host.engine.limits;
    let s = host.engine.sessions.get(host.session).unwrap();
    let endpoint = s.endpoint;
    let e = host.engine.endpoints.get(endpoint).unwrap();
    let held = e.held;
    let used = e.quota_status();
    let all = Resource::ALL
        .into_iter()
        .filter(|&r| r != Resource::Control);
    match what {
        Lack::Descriptors => host.engine.max_descriptors = held.descriptors + spare,
        Lack::AddressSpace => host.engine.limits.max_shared_bytes = held.mapped + spare,
        Lack::Heap => host.engine.max_pieces = held.pieces + spare,
        Lack::Quota => {
            let limits = all.clone().map(|resource| {
                let used = used.iter().find(|q| q.resource == resource);
                let limit = used.map_or(0, |q| q.used) + spare;
                Setting { resource, limit }
            });
            host.engine.set_quota(endpoint, &limits.collect::<Vec<_>>());
        }
        Lack::Processes => {}
    }
    let result = if what == Lack::Processes {
        with_descriptors(spare, || host.ask(request.clone()))
    } else {
        host.ask(request.clone())
    };
    host.engine.limits = limits;
    host.engine.max_descriptors = u64::MAX;
    host.engine.max_pieces = crate::held::MAX_PIECES;
    let unlimited = all.map(|resource| Setting {
        resource,
        limit: u64::MAX,
    });
    let unlimited: Vec<_> = unlimited.collect();
    host.engine.set_quota(endpoint, &unlimited);
    result
}

/// What there is too little of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lack {
    /// Descriptors of the process.
    Processes,
    /// Descriptors of the endpoint.
    Descriptors,
    AddressSpace,
    Heap,
    Quota,
}

/// Runs something while this process may open so many more descriptors.
fn with_descriptors<T>(spare: u64, run: impl FnOnce() -> T) -> T {
    use std::os::fd::AsRawFd;
    let limit = getrlimit(Limited::Nofile);
    // No gaps below the next one.
    let fill: Vec<_> = (0..64)
        .map(|_| rustix::io::dup(std::io::stdin()).unwrap())
        .collect();
    let next = fill.iter().map(|fd| fd.as_raw_fd()).max().unwrap() as u64 + 1;
    let lower = Rlimit {
        current: Some(next + spare),
        ..limit
    };
    setrlimit(Limited::Nofile, lower).unwrap();
    let result = run();
    setrlimit(Limited::Nofile, limit).unwrap();
    result
}

/// Runs a test of this file in a process of its own; true in that process.
fn alone(name: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("rollback_tests::{name}"), "--nocapture"])
        .env(ALONE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
    false
}

#[test]
fn a_create_that_fails_leaves_nothing() {
    if !alone("a_create_that_fails_leaves_nothing") {
        return;
    }
    let mut host = Host::new(DeviceLimits::default());
    let mut failed = Vec::new();
    for (name, request, undo) in verbs(&mut host) {
        let lacks = [
            Lack::Processes,
            Lack::Descriptors,
            Lack::AddressSpace,
            Lack::Heap,
            Lack::Quota,
        ];
        for lack in lacks {
            let s = host.engine.sessions.get_mut(host.session).unwrap();
            fill(&mut s.slabs, 16 << 20);
            fill(&mut s.segments, 16 << 30);
            host.engine.account(host.session);
            let mut spare = 0;
            loop {
                assert!(
                    spare < 16,
                    "{name} fails with {lack:?} and {spare} to spare"
                );
                let (before, open) = (state(&host), descriptors());
                match ask_short(&mut host, lack, spare, &request) {
                    Err(errno) => {
                        let lacking = [Errno::NOMEM, Errno::MFILE, Errno::NFILE];
                        assert!(
                            lacking.contains(&errno),
                            "{name}, {lack:?}, {spare}: {errno}"
                        );
                        assert_eq!(state(&host), before, "{name}, {lack:?}, {spare}");
                        assert_eq!(descriptors(), open, "{name}, {lack:?}, {spare}");
                        failed.push((name, lack));
                    }
                    Ok(reply) => {
                        if let Some(undo) = undo(&reply) {
                            assert_eq!(host.ask(undo), Ok(Reply::Done), "{name}");
                            assert_eq!(state(&host), before, "{name} undone, {lack:?}");
                        }
                        break;
                    }
                }
                // Address space comes in whole areas, quotas in whole queues.
                spare = match lack {
                    Lack::AddressSpace | Lack::Quota => break,
                    _ => spare + 1,
                };
            }
        }
    }
    // Each way to fail was met by all that can fail so.
    let met = |lack| {
        let all = failed.iter().filter(|(_, l)| *l == lack);
        let mut names: Vec<_> = all.map(|(name, _)| *name).collect();
        names.dedup();
        names
    };
    let rings = [
        "completion queue",
        "queue pair",
        "shared receive queue",
        "XRC shared receive queue",
    ];
    let mut areas = vec!["pages", "device memory"];
    areas.extend(rings);
    let mut descriptors = vec!["context", "pages", "device memory", "channel"];
    descriptors.extend(rings);
    assert_eq!(met(Lack::AddressSpace), areas);
    assert_eq!(met(Lack::Descriptors), descriptors);
    descriptors.extend(["memory", "slots"]);
    assert_eq!(met(Lack::Processes), descriptors);
    let regions = ["region", "null region", "region of device memory"];
    assert_eq!(met(Lack::Heap), regions);
    let quota = [
        "domain",
        "region",
        "null region",
        "window",
        "region of device memory",
        "channel",
        "completion queue",
        "queue pair",
        "shared receive queue",
        "XRC shared receive queue",
        "XRC domain",
        "XRC queue pair",
    ];
    assert_eq!(met(Lack::Quota), quota);
}

#[test]
fn a_session_that_cannot_begin_leaves_nothing() {
    if !alone("a_session_that_cannot_begin_leaves_nothing") {
        return;
    }
    let mut host = Host::new(DeviceLimits::default());
    let (endpoint, _) = host.engine.endpoints.iter().next().unwrap();
    let mut refused = 0;
    loop {
        let (socket, _other) = event_pair().unwrap();
        let socket = Arc::new(socket);
        let (before, open) = (state(&host), descriptors());
        let held = host.engine.endpoints.get(endpoint).unwrap().held;
        let peer = Peer {
            pid: std::process::id(),
            uid: 0,
        };
        let begun = with_descriptors(refused, || {
            host.engine.begin_session(endpoint, peer, socket.clone())
        });
        match begun {
            Ok((session, ..)) => {
                assert!(
                    refused > 1,
                    "a session needs more than {refused} descriptors"
                );
                assert_ne!(state(&host), before);
                host.engine.end_session(session, crate::EndReason::Closed);
                host.engine.take_dead();
                assert_eq!(state(&host), before);
                return;
            }
            Err(errno) => {
                assert_eq!(errno, Errno::MFILE);
                assert_eq!(state(&host), before, "{refused}");
                assert_eq!(host.engine.endpoints.get(endpoint).unwrap().held, held);
                assert_eq!(descriptors(), open, "{refused}");
            }
        }
        refused += 1;
        assert!(refused < 16, "no session with {refused} descriptors");
    }
}
