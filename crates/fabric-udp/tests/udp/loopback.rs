//! Packets over the loopback device. Each test has addresses of its own.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{flush, headers, payload, push, receive, skip, to};
use freeflow_fabric_udp::{
    Capture, Datagrams, Ecn, Fabric, FaultRates, Faults, Link, PushError, To, Udp, UdpOptions,
    largest_payload, path_mtu,
};
use freeflow_shm::{Mapping, sealed_memfd};
use freeflow_types::Psn;
use freeflow_wire::{
    Addresses, Bth, BthOpcode, DEFAULT_PKEY, Flow, Headers, UDP_PORT, icrc, verify,
};

fn address(last: [u8; 2]) -> IpAddr {
    Ipv4Addr::new(127, 7, last[0], last[1]).into()
}

fn open(local: IpAddr) -> Udp {
    Udp::open(&UdpOptions::new(local)).unwrap()
}

fn pair(test: u8) -> (Fabric<Udp>, Fabric<Udp>) {
    let [a, b] = [1, 2].map(|side| Fabric::new(open(address([test, side]))));
    (a, b)
}

#[test]
fn packets_of_all_sizes_arrive_in_order() {
    let (mut a, mut b) = pair(1);
    let to = to(b.local(), 5);
    // Runs of one size, and a smaller one at a run's end, make trains.
    let sizes = [
        0, 0, 1, 4096, 4096, 4095, 4096, 1, 1, 1, 1, 1024, 60_000, 64, 64, 3,
    ];
    let sizes: Vec<usize> = sizes.into_iter().chain([256; 200]).collect();
    for (psn, &len) in sizes.iter().enumerate() {
        assert!(push(&mut a, &to, psn as u32, len));
    }
    flush(&mut a);
    let mut next = 0;
    receive(&mut b, |packet| {
        assert_eq!(packet.src, address([1, 1]));
        assert_eq!(packet.headers.bth.psn.get(), next);
        let data = payload(next, sizes[next as usize]);
        assert_eq!(packet.payload, data, "packet {next}");
        assert!(packet.ip_id < 64);
        next += 1;
        (next as usize) < sizes.len()
    });
    let sent = a.sent();
    assert_eq!(sent.packets, sizes.len() as u64);
    assert!(sent.calls < 8, "{sent:?}");
    assert_eq!(b.received().packets, sent.packets);
    assert_eq!(b.received().bytes, sent.bytes);
}

#[test]
fn ipv6_and_congestion_marks() {
    // The only loopback address that IPv6 has: packets to oneself.
    let mut fabric = match Udp::open(&UdpOptions::new("::1".parse().unwrap())) {
        Ok(udp) => Fabric::new(udp),
        Err(e) => {
            let why = format!("no IPv6 on the loopback device: {e}");
            skip("ipv6_and_congestion_marks", &why);
            return;
        }
    };
    let marks = [
        Ecn::Capable0,
        Ecn::Capable1,
        Ecn::Congested,
        Ecn::NotCapable,
    ];
    for (psn, ecn) in marks.into_iter().enumerate() {
        let to = To {
            dst: fabric.local(),
            flow: 1,
            ecn,
        };
        for i in 0..3 {
            assert!(push(&mut fabric, &to, 3 * psn as u32 + i, 100));
        }
    }
    flush(&mut fabric);
    let mut seen = Vec::new();
    receive(&mut fabric, |packet| {
        assert_eq!(packet.payload, payload(seen.len() as u32, 100));
        seen.push(packet.ecn);
        seen.len() < 12
    });
    assert_eq!(seen, marks.map(|mark| [mark; 3]).concat());
    assert_eq!(fabric.received().congested, 3);
}

#[test]
fn congestion_marks_of_ipv4() {
    let (mut a, mut b) = pair(2);
    for (psn, ecn) in [Ecn::Congested, Ecn::Capable0].into_iter().enumerate() {
        let to = To {
            ecn,
            ..to(b.local(), 0)
        };
        assert!(push(&mut a, &to, psn as u32, 8));
    }
    flush(&mut a);
    let mut seen = Vec::new();
    receive(&mut b, |packet| {
        seen.push(packet.ecn);
        seen.len() < 2
    });
    assert_eq!(seen, [Ecn::Congested, Ecn::Capable0]);
}

#[test]
fn flows_have_source_ports() {
    let (mut a, mut b) = pair(3);
    let dst = b.local();
    for flow in 0..8 {
        assert!(push(&mut a, &to(dst, flow), flow, 64));
    }
    flush(&mut a);
    let mut batch = Datagrams::default();
    let mut ports = vec![0; 8];
    let mut got = 0;
    while got < 8 {
        b.receive(0, &mut batch).unwrap();
        for datagram in batch.iter() {
            let packet = b.check(datagram).unwrap();
            ports[packet.headers.bth.psn.get() as usize] = datagram.src.port();
            got += 1;
        }
        if got < 8 {
            crate::common::wait(&b, std::time::Duration::from_secs(60));
        }
    }
    assert!(ports.iter().all(|&port| port >= 0xC000));
    // Four sources, in turn.
    assert_eq!(ports[..4], ports[4..]);
    let distinct: std::collections::BTreeSet<_> = ports.into_iter().collect();
    assert_eq!(distinct.len(), 4);
}

/// The CRC is of the bytes that are sent, whatever happens to the memory that they come from.
#[test]
fn payload_may_change_meanwhile() {
    let (mut a, mut b) = pair(4);
    let fd = sealed_memfd("payload", 4096).unwrap();
    let memory = Arc::new(Mapping::new(&fd, 4096).unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (memory, stop) = (memory.clone(), stop.clone());
        move || {
            let mut byte = 0u8;
            // Relaxed: nothing else is published.
            while !stop.load(Ordering::Relaxed) {
                byte = byte.wrapping_add(1);
                memory.write(0, &[byte; 4096]).unwrap();
            }
        }
    });
    let to = to(b.local(), 0);
    for round in 0..20 {
        for i in 0..10 {
            let psn = round * 10 + i;
            a.push(&to, &headers(psn), 4096, |room| memory.read(0, room))
                .unwrap();
        }
        flush(&mut a);
        let mut left = 10;
        receive(&mut b, |packet| {
            assert_eq!(packet.payload.len(), 4096);
            left -= 1;
            left > 0
        });
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    assert_eq!(b.received().bad_icrc, 0);
    // What cannot be read is not sent.
    let refused = a.push(&to, &headers(0), 4097, |room| memory.read(0, room));
    assert!(matches!(refused, Err(PushError::Payload(_))));
    assert!(!a.has_unsent());
}

#[test]
fn bad_packets_are_counted_by_reason() {
    let mut b = Fabric::new(open(address([5, 2])));
    let stranger = UdpSocket::bind((address([5, 1]), 0)).unwrap();
    let src_port = stranger.local_addr().unwrap().port();
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (address([5, 1]), b.local()) else {
        unreachable!()
    };
    let flow = Flow {
        addresses: Addresses::V4 { src, dst },
        src_port,
    };
    let send = |packet: &[u8], right: bool| {
        let mut packet = packet.to_vec();
        let mut crc = icrc(&flow, 0, &packet);
        crc[0] ^= u8::from(!right);
        packet.extend(crc);
        stranger.send_to(&packet, (dst, UDP_PORT)).unwrap();
    };
    let mut good = [0; 12];
    headers(7).emit(&mut good).unwrap();
    stranger.send_to(&[], (dst, UDP_PORT)).unwrap();
    stranger.send_to(&[1, 2, 3], (dst, UDP_PORT)).unwrap();
    send(&good, false);
    send(&good[..11], true);
    let with = |at: usize, byte: u8| {
        let mut packet = good;
        packet[at] = byte;
        packet
    };
    send(&with(1, 0x41), true);
    send(&with(0, 0x1F), true);
    send(&with(1, 0x50), true);
    send(&[good.to_vec(), vec![0; 3]].concat(), true);
    send(&with(0, BthOpcode::RC_ACK.0), true);
    send(&[with(0, 0x0C).to_vec(), vec![0; 20]].concat(), true);
    send(&good, true);
    receive(&mut b, |packet| {
        assert_eq!(packet.headers, headers(7));
        false
    });
    let c = b.received();
    // The acknowledgement has no AETH, the READ request has data.
    assert_eq!(
        [c.bad_icrc, c.truncated, c.version, c.opcode, c.length],
        [3, 2, 1, 1, 3],
        "{c:?}"
    );
    assert_eq!(c.packets, 1);
}

#[test]
fn nobody_there_is_no_error() {
    let mut a = Fabric::new(open(address([6, 1])));
    let to = to(address([6, 2]), 0);
    for psn in 0..100 {
        assert!(push(&mut a, &to, psn, 100));
        flush(&mut a);
    }
    // What comes back from a closed port does not disturb what is sent to an open one.
    let mut b = Fabric::new(open(address([6, 2])));
    assert!(push(&mut a, &to, 100, 100));
    flush(&mut a);
    receive(&mut b, |packet| packet.headers.bth.psn.get() != 100);
    let mut batch = Datagrams::default();
    a.receive(0, &mut batch).unwrap();
    assert!(batch.is_empty());
}

#[test]
fn what_cannot_be_sent_is_refused() {
    let mut a = Fabric::new(open(address([7, 1])));
    let local = a.local();
    let fill = |_: &mut [u8]| Ok::<_, Infallible>(());
    let v6 = to("::1".parse().unwrap(), 0);
    assert!(matches!(
        a.push(&v6, &headers(0), 4, fill),
        Err(PushError::Family { .. })
    ));
    let mut other = headers(0);
    other.imm = Some([0; 4]);
    let here = to(local, 0);
    assert!(matches!(
        a.push(&here, &other, 4, fill),
        Err(PushError::Headers(_))
    ));
    assert!(matches!(
        a.push(&here, &headers(0), 1 << 16, fill),
        Err(PushError::Size(_))
    ));
    let room = (0..).take_while(|&psn| push(&mut a, &here, psn, 4096));
    assert!(room.count() > 64);
    flush(&mut a);
    assert!(push(&mut a, &here, 0, 4096));

    let taken = Udp::open(&UdpOptions::new(local)).err().unwrap();
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    for none in ["0.0.0.0", "::", "224.0.0.1"] {
        let e = Udp::open(&UdpOptions::new(none.parse().unwrap()));
        assert_eq!(e.err().unwrap().kind(), std::io::ErrorKind::InvalidInput);
    }
}

/// Without offloads, packets go one by one, and the CRCs are right all the same.
#[test]
fn without_offload() {
    let options = |local| UdpOptions {
        offload: false,
        sources: 0,
        ..UdpOptions::new(local)
    };
    let [mut a, mut b] =
        [1, 2].map(|side| Fabric::new(Udp::open(&options(address([8, side]))).unwrap()));
    let to = to(b.local(), 3);
    for round in 0..2 {
        for psn in 0..100 {
            assert!(push(&mut a, &to, psn + round * 100, 500));
        }
        flush(&mut a);
    }
    let mut next = 0;
    receive(&mut b, |packet| {
        assert_eq!(packet.headers.bth.psn.get(), next);
        assert_eq!((packet.ip_id, packet.payload), (0, &payload(next, 500)[..]));
        next += 1;
        next < 200
    });
}

#[test]
fn the_loopback_devices_mtu() {
    let local = address([9, 1]);
    let mtu = path_mtu(local, local).unwrap();
    assert!(mtu >= 1500);
    assert_eq!(largest_payload(1500, local), 1424);
    assert!(largest_payload(4200, local) >= 4096);
    assert!(largest_payload(4200, "::1".parse().unwrap()) >= 4096);
    assert_eq!(largest_payload(0, local), 0);
}

#[test]
fn payloads_may_have_udps_checksum_alone() {
    for offload in [true, false] {
        let options = |side| UdpOptions {
            offload,
            ..UdpOptions::new(address([18, side]))
        };
        let [mut a, mut b] = [1, 2].map(|side| Fabric::new(Udp::open(&options(side)).unwrap()));
        assert!(a.has_checksum() && b.has_checksum());
        let to = to(b.local(), 3);
        for psn in 0..100 {
            let mut headers = headers(psn);
            headers.bth.header_crc = psn % 3 != 0;
            let fill = |room: &mut [u8]| {
                room.copy_from_slice(&payload(psn, 500));
                Ok::<_, ()>(())
            };
            a.push(&to, &headers, 500, fill).unwrap();
        }
        flush(&mut a);
        let mut next = 0;
        receive(&mut b, |packet| {
            assert_eq!(packet.headers.bth.psn.get(), next);
            assert_eq!(packet.headers.bth.header_crc, next % 3 != 0);
            assert_eq!(packet.payload, payload(next, 500));
            next += 1;
            next < 100
        });
        assert_eq!(b.received().bad_icrc, 0);
    }
    // Nothing is behind these that finds what they change.
    let spoiled = Fabric::new(Faults::new(
        open(address([18, 3])),
        FaultRates::default(),
        1,
    ));
    assert!(!spoiled.has_checksum());
}

/// What arrives of 2000 packets, in order.
fn spoiled(test: u8, rates: FaultRates, seed: u64) -> (Vec<u32>, Fabric<Faults<Udp>>) {
    let mut a = Fabric::new(open(address([test, 1])));
    let mut b = Fabric::new(Faults::new(open(address([test, 2])), rates, seed));
    let to = to(b.local(), 0);
    let mut batch = Datagrams::default();
    let mut seen = Vec::new();
    let mut take = |b: &mut Fabric<_>, now| {
        b.receive(now, &mut batch).unwrap();
        for datagram in batch.iter() {
            if let Some(packet) = b.check(datagram) {
                let psn = packet.headers.bth.psn.get();
                assert_eq!(packet.payload, payload(psn, 100));
                seen.push(psn);
            }
        }
    };
    for round in 0..20u32 {
        let now = u64::from(round) * 1000;
        for i in 0..100 {
            assert!(push(&mut a, &to, round * 100 + i, 100));
        }
        flush(&mut a);
        while b.link().counters().seen < u64::from(round + 1) * 100 {
            crate::common::wait(&b, std::time::Duration::from_secs(60));
            take(&mut b, now);
        }
    }
    while let Some(due) = b.next_timeout() {
        take(&mut b, due);
    }
    (seen, b)
}

#[test]
fn networks_may_be_bad() {
    let all: Vec<u32> = (0..2000).collect();
    let (seen, _) = spoiled(10, FaultRates::default(), 1);
    assert_eq!(seen, all);

    let rates = FaultRates {
        loss: 0.1,
        duplication: 0.1,
        corruption: 0.1,
        ..FaultRates::default()
    };
    let (seen, b) = spoiled(11, rates, 1);
    let counters = b.link().counters();
    for n in [counters.lost, counters.duplicated, counters.corrupted] {
        assert!((100..300).contains(&n), "{counters:?}");
    }
    assert!(seen.is_sorted());
    // A few changes are of bits that the CRC does not cover, or look like another identification.
    let received = b.received();
    let refused = received.bad_icrc + received.truncated + received.version + received.opcode;
    assert_eq!(
        refused + received.length + seen.len() as u64,
        counters.seen - counters.lost + counters.duplicated
    );
    assert!(
        received.bad_icrc * 10 > counters.corrupted * 9,
        "{received:?}"
    );
    let (again, _) = spoiled(12, rates, 1);
    assert_eq!(seen, again);
    let (other, _) = spoiled(13, rates, 2);
    assert_ne!(seen, other);

    let rates = FaultRates {
        reordering: 0.1,
        reordering_ns: 500,
        delay_ns: 10_000,
        jitter_ns: 10,
        ..FaultRates::default()
    };
    let (mut seen, b) = spoiled(14, rates, 1);
    assert!(b.link().counters().reordered > 100);
    assert!(!seen.is_sorted());
    seen.sort_unstable();
    assert_eq!(seen, all);
}

#[test]
fn packets_are_captured() {
    let mut file = Vec::new();
    let mut fabric = {
        let link = Capture::new(open(address([15, 1])), &mut file, 5_000_000_000, 200).unwrap();
        Fabric::new(Box::new(link) as Box<dyn Link + '_>)
    };
    let local = fabric.local();
    for psn in 0..3 {
        let len = if psn == 2 { 1000 } else { 30 };
        assert!(push(&mut fabric, &to(local, 0), psn, len));
    }
    flush(&mut fabric);
    receive(&mut fabric, |packet| packet.headers.bth.psn.get() < 2);
    drop(fabric);

    // Block type, length, body, and the length again.
    let word = |at: usize| u32::from_ne_bytes(file[at..at + 4].try_into().unwrap()) as usize;
    let mut at = 0;
    let mut packets = Vec::new();
    let mut kinds = Vec::new();
    while at < file.len() {
        let len = word(at + 4);
        assert!(len % 4 == 0 && word(at + len - 4) == len);
        kinds.push(word(at));
        if word(at) == 6 {
            let (kept, whole) = (word(at + 20), word(at + 24));
            assert_eq!(word(at + 16) + (word(at + 12) << 32), 5_000_000_000);
            let packet = file[at + 28..at + 28 + kept].to_vec();
            let direction = word(at + 28 + kept.next_multiple_of(4) + 4);
            packets.push((direction, whole, packet));
        }
        at += len;
    }
    assert_eq!(kinds, [0x0A0D_0D0A, 1, 6, 6, 6, 6, 6, 6]);
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (local, local) else {
        unreachable!()
    };
    let addresses = Addresses::V4 { src, dst };
    for (i, (direction, whole, packet)) in packets.iter().enumerate() {
        assert_eq!(*direction, if i < 3 { 2 } else { 1 });
        let long = i % 3 == 2;
        assert_eq!((*whole > 1000, packet.len() == 200), (long, long));
        assert_eq!(packet[0], 0x45);
        assert_eq!(packet[12..20], [src.octets(), dst.octets()].concat());
        let sum: u32 = packet[..20]
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        assert_eq!((sum & 0xFFFF) + (sum >> 16), 0xFFFF);
        let port = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
        assert_eq!(port(22), UDP_PORT);
        let flow = Flow {
            addresses,
            src_port: port(20),
        };
        if !long {
            // Outgoing ones have the identification that the wire will show.
            let id = verify(&flow, 0, &packet[28..]).unwrap();
            assert!(*direction == 1 || id == u16::from_be_bytes([packet[4], packet[5]]));
        }
    }
}

/// A capture that cannot be written ends, and packets pass.
#[test]
fn a_full_disk_does_not_matter() {
    struct Full(usize);
    impl std::io::Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 = self
                .0
                .checked_sub(bytes.len())
                .ok_or_else(|| std::io::Error::from_raw_os_error(28))?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let link = Capture::new(open(address([16, 1])), Full(200), 0, 200).unwrap();
    let mut fabric = Fabric::new(link);
    let to = to(fabric.local(), 0);
    assert!(fabric.link().failure().is_none());
    for psn in 0..5 {
        assert!(push(&mut fabric, &to, psn, 64));
    }
    flush(&mut fabric);
    receive(&mut fabric, |packet| packet.headers.bth.psn.get() < 4);
    assert!(fabric.link().failure().is_some());
}

#[test]
fn what_is_sent_has_the_pad_that_it_needs() {
    let mut fabric = Fabric::new(open(address([17, 1])));
    let to = to(fabric.local(), 0);
    let mut bth = Bth::new(BthOpcode::UC_SEND_ONLY, 1, Psn::new(2));
    bth.pad = 3;
    assert_eq!(bth.pkey, DEFAULT_PKEY);
    let fill = |room: &mut [u8]| {
        room.fill(9);
        Ok::<_, Infallible>(())
    };
    fabric.push(&to, &Headers::new(bth), 6, fill).unwrap();
    flush(&mut fabric);
    receive(&mut fabric, |packet| {
        assert_eq!((packet.headers.bth.pad, packet.payload), (2, &[9; 6][..]));
        false
    });
}
