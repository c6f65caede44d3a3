//! The order in which the control thread serves connections.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use freeflow_session::{
    Handle, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Reply, Request, decode_reply, encode_request,
};
use freeflow_shm::{recv_packet, send_packet};
use freeflow_types::VirtualIp;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, socket,
};

use crate::testbed::Host;
use crate::{Config, EndpointSpec, Router};

/// A router that has not answered by then hangs.
const ANSWER: Duration = Duration::from_secs(30);

/// A directory that goes when it is dropped.
struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn say(to: &OwnedFd, request: &Request) {
    let bytes = encode_request(request).unwrap();
    send_packet(to, &bytes, &[], SendFlags::empty()).unwrap();
}

fn hear(from: &OwnedFd) -> Reply {
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    let packet = recv_packet(from, &mut buffer, RecvFlags::empty()).unwrap();
    decode_reply(&buffer[..packet.len]).unwrap().unwrap()
}

/// A session with an open device.
fn session(endpoint: &Path) -> (OwnedFd, Handle) {
    let to = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    set_socket_timeout(&to, Timeout::Recv, Some(ANSWER)).unwrap();
    connect(&to, &SocketAddrUnix::new(endpoint).unwrap()).unwrap();
    let version = PROTOCOL_VERSION;
    say(&to, &Request::Hello { version });
    assert!(matches!(hear(&to), Reply::Welcome(_)));
    say(&to, &Request::OpenContext);
    let context = created(&hear(&to));
    (to, context)
}

fn created(reply: &Reply) -> Handle {
    match reply {
        Reply::Created(handle) => *handle,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_flood_from_many_sessions_is_one_endpoints_turn() {
    const SESSIONS: usize = 100;
    const EACH: usize = 3;
    let dir = std::env::temp_dir().join(format!("freeflow-turns-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let dir = Dir(dir);
    let config = Config {
        sandbox: false,
        ..Config::default()
    };
    let router = Router::start(config).unwrap();
    let [flooding, calm] = ["flooding", "calm"].map(|name| dir.0.join(name));
    for (n, path) in [(1, &flooding), (2, &calm)] {
        let spec = EndpointSpec {
            name: format!("e{n}"),
            tenant: "t".to_owned(),
            ip: VirtualIp([10, 77, 0, n].into()),
            socket: path.clone(),
            quota: Vec::new(),
            underlay_gid: false,
        };
        router.add_endpoint(spec).unwrap();
    }
    let flood: Vec<_> = (0..SESSIONS).map(|_| session(&flooding)).collect();
    let (victim, its_context) = session(&calm);
    // While the engine is held no verb is executed; at most one has been taken out of its socket.
    router.shared.with(|_| {
        for _ in 0..EACH {
            for (to, context) in &flood {
                say(to, &Request::AllocPd { context: *context });
            }
        }
        let context = its_context;
        say(&victim, &Request::AllocPd { context });
    });
    // Handles of a fresh table tell the order in which they were made.
    let mine = created(&hear(&victim));
    let theirs: Vec<_> = flood
        .iter()
        .flat_map(|(from, _)| (0..EACH).map(|_| created(&hear(from))))
        .collect();
    let before = theirs.iter().filter(|pd| pd.0 < mine.0).count();
    assert!(before <= 2, "{before} verbs of the flood went first");
    // Their sessions took turns as well: none was served twice before all were served once.
    let firsts = theirs.iter().step_by(EACH).max_by_key(|pd| pd.0);
    let seconds = theirs.iter().skip(1).step_by(EACH).min_by_key(|pd| pd.0);
    let (last, next) = (firsts.unwrap().0, seconds.unwrap().0);
    assert!(last < next, "{last:#x} is a first, {next:#x} a second");
}

#[test]
fn a_context_is_closed_bit_by_bit() {
    const DOMAINS: usize = 100;
    let mut host = Host::new();
    let endpoint = host.endpoint("10.77.0.1");
    let process = host.process(endpoint, 1);
    let context = process.context;
    for _ in 1..DOMAINS {
        host.ask(process.session, Request::AllocPd { context })
            .unwrap();
    }
    let engine = &mut host.engine;
    let answer = engine.handle(process.session, Request::CloseContext { context });
    assert_eq!(answer.reply, Ok(Reply::Done));
    let left = |engine: &crate::engine::Engine| engine.pds.of(context).len();
    let mut before = left(engine);
    assert_eq!(before, DOMAINS);
    while engine.work_off(process.session) {
        let now = left(engine);
        assert!(before - now <= 32, "{} domains at once", before - now);
        before = now;
    }
    assert_eq!(before, 0);
    assert!(engine.contexts.get(context).is_none());
}
