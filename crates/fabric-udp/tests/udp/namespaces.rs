//! Packets between two network namespaces with a virtual cable.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::common::{flush, headers, payload, push, receive, skip, to, wait};
use freeflow_fabric_udp::{Fabric, Progress, Udp, UdpOptions, largest_payload, path_mtu};
use freeflow_wire::{Addresses, Flow, Headers, ICRC_BYTES, UDP_PORT, verify};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Two namespaces, each with the device `v0`. They go with the last descriptor.
struct Cable {
    ends: [File; 2],
}

fn run(line: &str) -> Result<(), String> {
    let mut words = line.split_ascii_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "{line}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(e) => Err(format!("{line}: {e}")),
    }
}

impl Cable {
    /// A cable of an MTU, or why there is none.
    fn try_new(mtu: u32) -> Result<Cable, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Relaxed: a number that no other has.
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let names = ["a", "b"].map(|end| format!("ff-fabric-{}-{n}{end}", std::process::id()));
        let made = || {
            let mut ends = Vec::new();
            for name in &names {
                run(&format!("ip netns add {name}"))?;
                ends.push(File::open(format!("/run/netns/{name}")).map_err(|e| e.to_string())?);
            }
            let [a, b] = &names;
            run(&format!(
                "ip -n {a} link add v0 mtu {mtu} type veth peer name v0 mtu {mtu} netns {b}"
            ))?;
            for (i, name) in names.iter().enumerate() {
                run(&format!("ip -n {name} link set lo up"))?;
                run(&format!("ip -n {name} addr add 10.9.0.{}/24 dev v0", i + 1))?;
                run(&format!(
                    "ip -n {name} addr add fd09::{}/64 dev v0 nodad",
                    i + 1
                ))?;
                run(&format!("ip -n {name} link set v0 up"))?;
            }
            ends.try_into().map_err(|_| "two were made".to_owned())
        };
        let ends = made();
        for name in &names {
            // The descriptors keep them.
            let _ = run(&format!("ip netns del {name}"));
        }
        Ok(Cable { ends: ends? })
    }

    fn new(test: &str, mtu: u32) -> Option<Cable> {
        // Only root can make them.
        if !rustix::process::geteuid().is_root() {
            skip(test, "it needs root to make network namespaces");
            return None;
        }
        match Self::try_new(mtu) {
            Ok(cable) => Some(cable),
            Err(why) => {
                skip(test, &format!("no network namespaces can be made: {why}"));
                None
            }
        }
    }

    /// Does something in a namespace.
    fn at<T: Send>(&self, end: usize, act: impl FnOnce() -> T + Send) -> T {
        let namespace = self.ends[end].as_fd();
        let within = || {
            move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network)).unwrap();
            act()
        };
        std::thread::scope(|scope| scope.spawn(within).join().unwrap())
    }

    fn open(&self, end: usize, options: &UdpOptions) -> Fabric<Udp> {
        self.at(end, || Fabric::new(Udp::open(options).unwrap()))
    }
}

fn address(v6: bool, end: usize) -> IpAddr {
    let family = if v6 { "fd09::" } else { "10.9.0." };
    format!("{family}{}", end + 1).parse().unwrap()
}

/// Sends packets one way and takes them at the other end, all of them and in order.
fn transfer(a: &mut Fabric<Udp>, b: &mut Fabric<Udp>, packets: u32, size: usize) {
    let to = to(b.local(), 0);
    // Until the kernel knows the neighbour, it keeps few packets for it.
    assert!(push(a, &to, packets, 0));
    flush(a);
    receive(b, |packet| packet.headers.bth.psn.get() != packets);
    let mut next = 0;
    for first in (0..packets).step_by(100) {
        for psn in first..first + 100 {
            assert!(push(a, &to, psn, size));
        }
        flush(a);
        receive(b, |packet| {
            assert_eq!(packet.headers.bth.psn.get(), next);
            assert_eq!(packet.payload, payload(next, size), "packet {next}");
            next += 1;
            next < first + 100
        });
    }
    assert_eq!(a.sent().packets, u64::from(packets) + 1);
    let received = b.received();
    assert_eq!(
        received.bad_icrc,
        0,
        "{received:?} {:?} {size} {}",
        a.sent(),
        b.local()
    );
}

#[test]
fn trains_cross_links_of_usual_mtus() {
    for (mtu, roce) in [(1500, 1024), (9000, 4096)] {
        let Some(cable) = Cable::new("trains_cross_links_of_usual_mtus", mtu) else {
            return;
        };
        for v6 in [false, true] {
            let [mut a, mut b] =
                [0, 1].map(|end| cable.open(end, &UdpOptions::new(address(v6, end))));
            let (here, there) = (a.local(), b.local());
            let found = cable.at(0, || path_mtu(here, there)).unwrap();
            assert_eq!(found, mtu as usize);
            let largest = largest_payload(found, there);
            assert!((roce..2 * roce + 1000).contains(&largest));
            transfer(&mut a, &mut b, 1000, roce);
            let sent = a.sent();
            // 62 packets of 1 KiB and 15 of 4 KiB fit in a train; 16 trains go at a time.
            assert!(sent.calls < 40, "{sent:?}");
            // The largest that fits, and no more, behind the largest headers.
            assert!(push(&mut a, &to(there, 0), 0, largest));
            cable.at(0, || flush(&mut a));
            receive(&mut b, |packet| {
                assert_eq!(packet.payload.len(), largest);
                false
            });
        }
    }
}

/// The CRC covers the identification, which the kernel gives: foreign peers check it.
#[test]
fn packets_on_the_wire_have_the_identification_that_their_crc_covers() {
    let name = "packets_on_the_wire_have_the_identification_that_their_crc_covers";
    for offload in [true, false] {
        let Some(cable) = Cable::new(name, 1500) else {
            return;
        };
        // Then the kernel splits trains before the device has them.
        if let Err(why) = cable.at(0, || run("ip link set v0 gso_max_segs 1")) {
            skip(
                name,
                &format!("trains cannot be kept off the device: {why}"),
            );
            return;
        }
        let wire = cable.at(1, || {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            socket_with(
                AddressFamily::PACKET,
                SocketType::RAW,
                flags,
                Some(eth::ALL),
            )
            .unwrap()
        });
        let options = |end| UdpOptions {
            offload,
            ..UdpOptions::new(address(false, end))
        };
        let mut a = cable.open(0, &options(0));
        let _b = cable.open(1, &options(1));
        let dst = address(false, 1);
        for psn in 0..100 {
            assert!(push(&mut a, &to(dst, psn / 50), psn, 256));
        }
        flush(&mut a);
        let mut ids = BTreeSet::new();
        let mut psns = BTreeSet::new();
        let mut buffer = [0; 2048];
        while psns.len() < 100 {
            let Ok((_, len)) = recv(&wire, &mut buffer[..], RecvFlags::empty()) else {
                wait(&wire, Duration::from_secs(60));
                continue;
            };
            let frame = &buffer[..len];
            let half = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
            // IPv4, UDP, to the port.
            if len < 42 || half(12) != 0x0800 || frame[23] != 17 || half(36) != UDP_PORT {
                continue;
            }
            let ip = |at: usize| Ipv4Addr::from(<[u8; 4]>::try_from(&frame[at..at + 4]).unwrap());
            let flow = Flow {
                addresses: Addresses::V4 {
                    src: ip(26),
                    dst: ip(30),
                },
                src_port: half(34),
            };
            let end = 34 + usize::from(half(38));
            let datagram = &frame[42..end];
            assert_eq!(half(20), 0x4000, "don't fragment");
            assert_eq!(verify(&flow, 0, datagram), Ok(half(18)));
            let body = &datagram[..datagram.len() - ICRC_BYTES];
            let (found, _) = Headers::parse(body).unwrap();
            let psn = found.bth.psn.get();
            assert_eq!(found, headers(psn));
            ids.insert(half(18));
            psns.insert(psn);
        }
        assert_eq!(ids.len(), if offload { 50 } else { 1 }, "{ids:?}");
    }
}

#[test]
fn what_is_too_big_for_the_path_is_counted() {
    let Some(cable) = Cable::new("what_is_too_big_for_the_path_is_counted", 1500) else {
        return;
    };
    for v6 in [false, true] {
        let [mut a, mut b] = [0, 1].map(|end| cable.open(end, &UdpOptions::new(address(v6, end))));
        let dst = b.local();
        // One, a train, and between them what fits.
        for (psn, size) in [
            (0, 4096),
            (1, 100),
            (2, 2048),
            (3, 2048),
            (4, 100),
            (5, 100),
        ] {
            assert!(push(&mut a, &to(dst, 0), psn, size));
        }
        cable.at(0, || flush(&mut a));
        let mut seen = Vec::new();
        receive(&mut b, |packet| {
            seen.push(packet.headers.bth.psn.get());
            seen.len() < 3
        });
        assert_eq!(seen, [1, 4, 5]);
        let sent = a.sent();
        assert_eq!((sent.packets, sent.too_big), (3, 3), "{sent:?}");
        assert_eq!(sent.last_too_big, Some(dst));
    }
}

#[test]
fn a_slow_link_makes_the_sender_wait() {
    let name = "a_slow_link_makes_the_sender_wait";
    let Some(cable) = Cable::new(name, 1500) else {
        return;
    };
    let shape = "tc qdisc add dev v0 root tbf rate 200mbit burst 128kb limit 64mb";
    if let Err(why) = cable.at(0, || run(shape)) {
        skip(name, &format!("no link can be made slow: {why}"));
        return;
    }
    let options = |end| UdpOptions {
        send_buffer: 128 << 10,
        ..UdpOptions::new(address(false, end))
    };
    let [mut a, mut b] = [0, 1].map(|end| cable.open(end, &options(end)));
    let to = to(b.local(), 0);
    let mut psn = 0;
    let mut blocked = 0;
    while psn < 2000 {
        while psn < 2000 && push(&mut a, &to, psn, 1024) {
            psn += 1;
        }
        while a.flush(0).unwrap() == Progress::Blocked {
            assert!(a.has_unsent());
            blocked += 1;
            wait(&a, Duration::from_secs(60));
        }
    }
    let mut next = 0;
    receive(&mut b, |packet| {
        assert_eq!(packet.headers.bth.psn.get(), next);
        next += 1;
        next < 2000
    });
    assert!(blocked > 0);
    assert_eq!(a.sent().blocked, blocked);
    // Nothing waits any more: the descriptor is quiet.
    let mut fds = [rustix::event::PollFd::new(&a, rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec::default();
    assert_eq!(rustix::event::poll(&mut fds, Some(&now)), Ok(0));
}

/// Devices that do not compute checksums take no trains on some kernels.
#[test]
fn a_device_without_offloads() {
    let name = "a_device_without_offloads";
    let Some(cable) = Cable::new(name, 1500) else {
        return;
    };
    for end in 0..2 {
        if let Err(why) = cable.at(end, || run("ethtool -K v0 tx off")) {
            skip(name, &format!("offloads cannot be turned off: {why}"));
            return;
        }
    }
    let [mut a, mut b] = [0, 1].map(|end| cable.open(end, &UdpOptions::new(address(false, end))));
    cable.at(0, || transfer(&mut a, &mut b, 200, 1024));
}

#[test]
fn hosts_that_cannot_be_reached_are_counted() {
    let Some(cable) = Cable::new("hosts_that_cannot_be_reached_are_counted", 1500) else {
        return;
    };
    let mut a = cable.open(0, &UdpOptions::new(address(false, 0)));
    let nowhere = Ipv4Addr::new(192, 0, 2, 1).into();
    for psn in 0..3 {
        assert!(push(&mut a, &to(nowhere, 0), psn, 100));
    }
    let here = to(a.local(), 0);
    assert!(push(&mut a, &here, 3, 100));
    flush(&mut a);
    receive(&mut a, |packet| {
        assert_eq!(packet.headers.bth.psn.get(), 3);
        false
    });
    let sent = a.sent();
    assert_eq!((sent.packets, sent.unreachable), (1, 3), "{sent:?}");
}
