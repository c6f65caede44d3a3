//! Links between routers' threads on this host's loopback addresses, and what goes wrong with them.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use freeflow_link::pki::{Authority, Pair, Validity};
use freeflow_link::{
    Agreed, Config, DEFAULT_PORT, Hello, Identity, LinkError, Links, Message, Observer, PeerSpec,
    SELECTIVE, Status, encode,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

const DEADLINE: Duration = Duration::from_secs(60);

/// Two hosts that no other test has: of this process's part of the loopback network.
#[derive(Clone)]
struct Net {
    low: String,
    high: String,
    stranger: String,
}

impl Net {
    fn new() -> Net {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        // Relaxed: only that numbers differ matters.
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let address = |host| format!("127.{}.{n}.{host}", 1 + std::process::id() % 250);
        Net {
            low: address(1),
            high: address(2),
            stranger: address(3),
        }
    }

    fn low(&self, incarnation: u64, identity: Option<Identity>) -> Host {
        Host::new(&self.low, incarnation, identity)
    }

    fn high(&self, incarnation: u64, identity: Option<Identity>) -> Host {
        Host::new(&self.high, incarnation, identity)
    }

    /// Where the higher one listens.
    fn at(&self) -> SocketAddr {
        SocketAddr::new(self.high.parse().unwrap(), DEFAULT_PORT)
    }

    /// Two hosts that know each other.
    fn two(&self, low: Option<Identity>, high: Option<Identity>) -> (Host, Host) {
        let high = self.high(2, high).knows(&self.low);
        let low = self.low(1, low).knows(&self.high);
        (low, high)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Greeted(u64),
    Up(Agreed),
    Down,
    Lapsed,
}

struct Ear(Sender<(IpAddr, Told)>);

impl Ear {
    fn tell(&self, host: IpAddr, told: Told) {
        // The test may be over.
        let _ = self.0.send((host, told));
    }
}

impl Observer for Ear {
    fn greeted(&mut self, host: IpAddr, incarnation: u64) {
        self.tell(host, Told::Greeted(incarnation));
    }
    fn up(&mut self, host: IpAddr, agreed: Agreed) {
        self.tell(host, Told::Up(agreed));
    }
    fn down(&mut self, host: IpAddr) {
        self.tell(host, Told::Down);
    }
    fn lapsed(&mut self, host: IpAddr) {
        self.tell(host, Told::Lapsed);
    }
    fn notice(&mut self, line: String) {
        assert!(!line.is_empty());
    }
}

struct Ca {
    pair: Pair,
    authority: Authority,
}

impl Ca {
    fn new() -> Ca {
        let pair = Authority::generate(Validity::days(2)).unwrap();
        let authority = Authority::load(&pair.cert, &pair.key).unwrap();
        Ca { pair, authority }
    }

    fn identity(&self, name: &str) -> Identity {
        self.issue(name, Validity::days(1), self)
    }

    /// Of this authority, but believing another.
    fn issue(&self, name: &str, validity: Validity, believed: &Ca) -> Identity {
        let host = self.authority.issue(&[name], validity).unwrap();
        let ca = believed.pair.cert.as_bytes();
        Identity::from_pem(host.cert.as_bytes(), host.key.as_bytes(), ca).unwrap()
    }
}

struct Host {
    links: Links,
    told: Receiver<(IpAddr, Told)>,
}

impl Host {
    fn new(local: &str, incarnation: u64, identity: Option<Identity>) -> Host {
        let config = Config {
            local: local.parse().unwrap(),
            port: DEFAULT_PORT,
            identity,
            incarnation,
            features: SELECTIVE,
        };
        let (ear, told) = channel();
        let links = Links::start(config, Ear(ear), || {}).unwrap();
        Host { links, told }
    }

    fn knows(self, peer: &str) -> Host {
        self.links.set_peers(vec![spec(peer, 1408)]);
        // Whoever connects before it knows them is sent away.
        self.status(|_| true);
        self
    }

    fn expect(&self) -> Told {
        self.told.recv_timeout(DEADLINE).unwrap().1
    }

    fn up(&self) -> Agreed {
        loop {
            if let Told::Up(agreed) = self.expect() {
                return agreed;
            }
        }
    }

    /// Waits until the status of the only peer is as wanted.
    fn status(&self, wanted: impl Fn(&Status) -> bool) -> Status {
        let until = Instant::now() + DEADLINE;
        loop {
            let all = self.links.status();
            match &all[..] {
                [one] if wanted(one) => return one.clone(),
                _ => assert!(Instant::now() < until, "still {all:?}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn refused(&self, said: &[&str]) {
        let has = |status: &Status| {
            let reason = status.reason.as_deref().unwrap_or_default();
            !status.up && said.iter().all(|said| reason.contains(said))
        };
        self.status(has);
        let up = self
            .told
            .try_iter()
            .any(|(_, told)| matches!(told, Told::Up(_)));
        assert!(!up, "a link came up");
    }
}

fn spec(peer: &str, segment: u32) -> PeerSpec {
    PeerSpec {
        address: peer.parse().unwrap(),
        name: None,
        segment,
    }
}

/// A connection from one of this host's addresses.
fn dial(from: &str, to: SocketAddr) -> TcpStream {
    let flags = SocketFlags::CLOEXEC;
    let socket =
        rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    let from = SocketAddr::new(from.parse().unwrap(), 0);
    rustix::net::bind(&socket, &from).unwrap();
    rustix::net::connect(&socket, &to).unwrap();
    let socket = TcpStream::from(socket);
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

fn frame(body: &[u8]) -> Vec<u8> {
    let len = u16::try_from(body.len()).unwrap();
    [&len.to_be_bytes()[..], body].concat()
}

#[test]
fn hosts_that_prove_who_they_are_agree() {
    let ca = Ca::new();
    for secure in [false, true] {
        let net = Net::new();
        let identity = |name| secure.then(|| ca.identity(name));
        let (low, high) = net.two(identity(&net.low), identity(&net.high));
        for (host, incarnation) in [(&low, 2), (&high, 1)] {
            assert_eq!(host.expect(), Told::Greeted(incarnation));
            let agreed = host.up();
            assert_eq!((agreed.incarnation, agreed.segment), (incarnation, 1408));
            assert!(agreed.selective);
            let status = host.status(|status| status.up);
            assert_eq!((status.agreed, status.reason), (Some(agreed), None));
        }
    }
}

#[test]
fn each_direction_has_its_packets_and_an_offer_stands() {
    let net = Net::new();
    let high = net.high(2, None);
    high.links.set_peers(vec![spec(&net.low, 8192)]);
    let low = net.low(1, None).knows(&net.high);
    assert_eq!((low.up().segment, high.up().segment), (1408, 1408));
    // Whatever the link's MTU is now: the other side may have queue pairs by what was said.
    low.links.set_peers(vec![]);
    while low.expect() != Told::Lapsed {}
    low.links.set_peers(vec![spec(&net.high, 8192)]);
    assert_eq!(high.up().segment, 1408);
}

#[test]
fn a_certificate_is_known_by_a_name_if_the_map_has_one() {
    let (ca, net) = (Ca::new(), Net::new());
    let named = |peer, name: &str| PeerSpec {
        name: Some(name.to_owned()),
        ..spec(peer, 1408)
    };
    let high = net.high(2, Some(ca.identity("node2")));
    high.links.set_peers(vec![named(&net.low, "node1")]);
    let low = net.low(1, Some(ca.identity("node1")));
    low.links.set_peers(vec![named(&net.high, "node2")]);
    low.up();
    high.up();
    low.links.set_peers(vec![named(&net.high, "node3")]);
    low.refused(&["name or address in the map"]);
}

#[test]
fn a_stranger_is_not_believed_on_either_side() {
    let (ca, other) = (Ca::new(), Ca::new());
    let hour = Duration::from_secs(3600);
    let past = SystemTime::now() - 48 * hour;
    let expired = Validity {
        from: past,
        to: past + hour,
    };
    for (n, why) in [
        "another authority",
        "name or address in the map",
        "renew it",
    ]
    .into_iter()
    .enumerate()
    {
        let wrong = |own: &str| match n {
            0 => other.issue(own, Validity::days(1), &ca),
            1 => ca.identity("127.0.0.9"),
            _ => ca.issue(own, expired, &ca),
        };
        let net = Net::new();
        let (low, high) = net.two(Some(ca.identity(&net.low)), Some(wrong(&net.high)));
        low.refused(&[why]);
        high.refused(&["the other host refuses this one's certificate"]);
        let net = Net::new();
        let (low, high) = net.two(Some(wrong(&net.low)), Some(ca.identity(&net.high)));
        high.refused(&[why]);
        low.refused(&["the other host refuses this one's certificate"]);
    }
}

#[test]
fn one_without_tls_is_told_so_on_both_sides() {
    let ca = Ca::new();
    let net = Net::new();
    let (low, high) = net.two(Some(ca.identity(&net.low)), None);
    low.refused(&["--insecure"]);
    high.refused(&["--insecure"]);
    let net = Net::new();
    let (low, high) = net.two(None, Some(ca.identity(&net.high)));
    low.refused(&["--insecure"]);
    high.refused(&["--insecure"]);
}

#[test]
fn new_certificates_are_used_at_once() {
    let (ca, other) = (Ca::new(), Ca::new());
    let net = Net::new();
    let old = ca.identity(&net.low);
    let (low, high) = net.two(Some(old.clone()), Some(ca.identity(&net.high)));
    low.up();
    high.up();
    // The same again is nothing new.
    low.links.set_identity(old);
    low.links.set_peers(vec![]);
    assert_eq!((low.expect(), low.expect()), (Told::Down, Told::Lapsed));
    low.links.set_peers(vec![spec(&net.high, 1408)]);
    low.up();
    while high.expect() != Told::Down {}
    high.up();
    low.links.set_identity(other.identity(&net.low));
    low.refused(&["another authority"]);
    high.links.set_identity(other.identity(&net.high));
    low.up();
    high.up();
}

#[test]
fn a_link_comes_back_with_the_incarnation_that_there_is() {
    let net = Net::new();
    let low = net.low(1, None).knows(&net.high);
    low.refused(&["cannot connect"]);
    for incarnation in [2, 3] {
        let high = net.high(incarnation, None).knows(&net.low);
        assert_eq!(low.up().incarnation, incarnation);
        assert_eq!(high.up().incarnation, 1);
        drop(high);
        assert_eq!(low.expect(), Told::Down);
    }
    // The side that does not connect finds a new one that does.
    let high = net.high(4, None).knows(&net.low);
    low.up();
    high.up();
    drop(low);
    assert_eq!(high.expect(), Told::Down);
    let _low = net.low(5, None).knows(&net.high);
    assert_eq!(high.up().incarnation, 5);
}

#[test]
fn a_host_that_leaves_the_map_is_not_believed() {
    let net = Net::new();
    let (low, high) = net.two(None, None);
    low.up();
    high.up();
    high.links.set_peers(vec![]);
    assert_eq!((high.expect(), high.expect()), (Told::Down, Told::Lapsed));
    assert_eq!(low.expect(), Told::Down);
    low.refused(&["does its map (--hosts) have this host?"]);
    high.links.set_peers(vec![spec(&net.low, 1408)]);
    low.up();
    high.up();
}

#[test]
fn a_second_connection_of_the_same_host_takes_the_place_of_the_first() {
    let net = Net::new();
    let high = net.high(2, None).knows(&net.low);
    let at = net.at();
    let mut old = dial(&net.low, at);
    let talk = |socket: &mut TcpStream, incarnation| {
        let hello = Hello {
            incarnation,
            segment: 4096,
            features: SELECTIVE,
        };
        socket.write_all(&frame(b"FFLK\0\x01\0\x01")).unwrap();
        socket
            .write_all(&frame(&encode(&Message::Hello(hello))))
            .unwrap();
        let ready = Message::Ready { incarnation: 2 };
        socket.write_all(&frame(&encode(&ready))).unwrap();
    };
    talk(&mut old, 7);
    assert_eq!(high.expect(), Told::Greeted(7));
    assert_eq!(high.up().incarnation, 7);
    // The host has crashed, and its old connection was never closed.
    let mut new = dial(&net.low, at);
    talk(&mut new, 8);
    assert_eq!(high.expect(), Told::Down);
    assert_eq!(high.expect(), Told::Greeted(8));
    assert_eq!(high.up().incarnation, 8);
    old.read_to_end(&mut Vec::new()).unwrap();
    high.status(|status| status.up && status.agreed.is_some_and(|a| a.incarnation == 8));
}

#[test]
fn garbage_and_other_versions_are_told_of() {
    let net = Net::new();
    let high = net.high(2, None).knows(&net.low);
    let at = net.at();
    for (said, why) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "exceeds the limit"),
        (&b"\0\x08FFLK\0\x02\0\x03"[..], "versions 2 to 3"),
        (&b"\0\x04oops"[..], "not of this protocol"),
        (&b"\0\x08FFLK\0\x01\0\x01\0\x01\x02"[..], "out of turn"),
    ] {
        let mut socket = dial(&net.low, at);
        socket.write_all(said).unwrap();
        // It says its own, and ends.
        let mut heard = Vec::new();
        let _ = socket.read_to_end(&mut heard);
        high.refused(&[why]);
    }
    let ca = Ca::new();
    let net = Net::new();
    let secure = net.high(2, Some(ca.identity(&net.high))).knows(&net.low);
    let mut socket = dial(&net.low, net.at());
    socket.write_all(&[0xA5; 300]).unwrap();
    let _ = socket.read_to_end(&mut Vec::new());
    secure.refused(&["TLS"]);
}

#[test]
fn a_hundred_that_say_nothing_keep_nobody_out() {
    let net = Net::new();
    let high = net.high(2, None).knows(&net.low);
    let at = net.at();
    let strangers: Vec<_> = (0..20).map(|_| dial(&net.stranger, at)).collect();
    let silent: Vec<_> = (0..100).map(|_| dial(&net.low, at)).collect();
    let low = net.low(1, None).knows(&net.high);
    low.up();
    high.up();
    // Strangers are not listened to at all; of others the last few wait, for a while.
    let began = Instant::now();
    for mut socket in strangers.into_iter().chain(silent) {
        let _ = socket.read_to_end(&mut Vec::new());
    }
    assert!(began.elapsed() < DEADLINE);
    assert!(high.status(|_| true).up && low.status(|_| true).up);
}

#[test]
fn a_port_that_another_has_is_named() {
    let net = Net::new();
    let _high = net.high(2, None);
    let config = Config {
        local: net.high.parse().unwrap(),
        port: DEFAULT_PORT,
        identity: None,
        incarnation: 3,
        features: SELECTIVE,
    };
    let (ear, _told) = channel();
    let refused = Links::start(config, Ear(ear), || {});
    assert!(matches!(refused, Err(LinkError::InUse { .. })));
}
