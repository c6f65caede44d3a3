//! Packets that the kernel's rxe made.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use freeflow_wire::cm::{self, IpCm, Mad, Message, PortSpace};
use freeflow_wire::{
    Addresses, BthOpcode, Flow, Headers, ICRC_BYTES, NakCode, Syndrome, UDP_PORT, icrc, verify,
};

struct Captured {
    flow: Flow,
    ip_id: u16,
    /// Payload of the datagram.
    packet: Vec<u8>,
}

fn captured() -> Vec<Captured> {
    let lines = include_str!("rxe-packets.txt").lines();
    lines
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let byte = |i| u8::from_str_radix(&line[i..i + 2], 16).unwrap();
            let ip: Vec<u8> = (0..line.len()).step_by(2).map(byte).collect();
            let word = |at: usize| u16::from_be_bytes([ip[at], ip[at + 1]]);
            let (addresses, ip_id, udp) = if ip[0] == 0x45 {
                let at = |i| Ipv4Addr::from(<[u8; 4]>::try_from(&ip[i..i + 4]).unwrap());
                let (src, dst) = (at(12), at(16));
                (Addresses::V4 { src, dst }, word(4), 20)
            } else {
                let at = |i| Ipv6Addr::from(<[u8; 16]>::try_from(&ip[i..i + 16]).unwrap());
                let (src, dst) = (at(8), at(24));
                (Addresses::V6 { src, dst }, 0, 40)
            };
            assert_eq!(word(udp + 2), UDP_PORT);
            let src_port = word(udp);
            Captured {
                flow: Flow {
                    addresses,
                    src_port,
                },
                ip_id,
                packet: ip[udp + 8..].to_vec(),
            }
        })
        .collect()
}

#[test]
fn packets_are_read_and_made_alike() {
    let mut opcodes = BTreeSet::new();
    let mut naks = BTreeSet::new();
    for Captured {
        flow,
        ip_id,
        packet,
    } in captured()
    {
        assert_eq!(verify(&flow, 0, &packet), Ok(ip_id));
        let (body, crc) = packet.split_at(packet.len() - ICRC_BYTES);
        assert_eq!(icrc(&flow, ip_id, body), crc);
        let (headers, payload) = Headers::parse(body).unwrap();
        let pad = usize::from(headers.bth.pad);
        assert_eq!(payload, headers.len()..body.len() - pad);
        assert_eq!(headers.with_payload(payload.len()), headers);

        let mut made = vec![0; headers.len()];
        assert_eq!(headers.emit(&mut made), Ok(made.len()));
        assert_eq!(made, body[..made.len()], "{headers:?}");

        opcodes.insert(headers.bth.opcode);
        match headers.aeth.map(|aeth| aeth.syndrome) {
            Some(Syndrome::Nak(code)) => drop(naks.insert(code as u8)),
            Some(Syndrome::RnrNak { timer }) => assert_eq!(timer, 12),
            Some(other) => assert_eq!(other, Syndrome::ACK),
            None => {}
        }
    }
    for opcode in [
        BthOpcode::RC_SEND_FIRST,
        BthOpcode::RC_SEND_ONLY_INV,
        BthOpcode::RC_WRITE_LAST_IMM,
        BthOpcode::RC_READ_RESPONSE_MIDDLE,
        BthOpcode::RC_ATOMIC_ACK,
        BthOpcode::RC_COMPARE_SWAP,
        BthOpcode::UC_SEND_LAST,
        BthOpcode::UD_SEND_ONLY_IMM,
    ] {
        assert!(opcodes.contains(&opcode), "no {opcode}");
    }
    let all = [
        NakCode::PsnSequence,
        NakCode::InvalidRequest,
        NakCode::RemoteAccess,
        NakCode::RemoteOperation,
    ];
    assert_eq!(naks, all.map(|code| code as u8).into());
}

#[test]
fn changed_packets_are_refused() {
    for Captured {
        flow, mut packet, ..
    } in captured()
    {
        let end = packet.len() - 1;
        packet[end] ^= 0x80;
        assert!(verify(&flow, 0, &packet).is_err());
        packet[end] ^= 0x80;
        let other = Flow {
            src_port: flow.src_port ^ 1,
            ..flow
        };
        assert!(verify(&other, 0, &packet).is_err());
    }
}

#[test]
fn messages_of_the_communication_manager_are_read_and_made_alike() {
    let mut kinds = BTreeSet::new();
    for Captured { flow, packet, .. } in captured() {
        let (headers, payload) = Headers::parse(&packet[..packet.len() - ICRC_BYTES]).unwrap();
        if headers.bth.dest_qp != cm::QPN {
            continue;
        }
        assert_eq!(headers.deth.unwrap().qkey, cm::QKEY);
        let mad = Mad::parse(&packet[payload.clone()]).unwrap();
        assert_eq!(mad.emit().unwrap(), packet[payload]);
        let (kind, service, addresses) = match &mad.message {
            Message::Req(m) => {
                assert_eq!(m.transport, cm::TransportType::Rc);
                assert_eq!(m.alternate, None);
                assert_eq!((m.pkey, m.retry_count, m.max_cm_retries), (0xFFFF, 7, 15));
                ("REQ", Some(m.service_id), Some(IpCm::parse(&m.private)))
            }
            Message::Rep(m) => {
                assert_ne!(m.qpn, 0);
                ("REP", None, None)
            }
            Message::Rtu(_) => ("RTU", None, None),
            Message::Rej(m) => {
                // The manager's own refusals are said in a private byte too.
                assert_eq!((m.message, m.reason), (cm::Rejected::Req, 8));
                ("REJ", None, None)
            }
            Message::Dreq(m) => {
                assert_ne!(m.qpn, 0);
                ("DREQ", None, None)
            }
            Message::Drep(_) => ("DREP", None, None),
            Message::SidrReq(m) => (
                "SIDR_REQ",
                Some(m.service_id),
                Some(IpCm::parse(&m.private)),
            ),
            Message::SidrRep(m) => {
                assert_eq!((m.status, m.qkey), (cm::SidrRep::VALID, 0x0123_4567));
                ("SIDR_REP", None, None)
            }
            Message::Mra(_) => ("MRA", None, None),
        };
        kinds.insert(kind);
        if let Some(service) = service {
            let (space, port) = cm::port_of(service).unwrap();
            let sidr = kind == "SIDR_REQ";
            let wanted = if sidr { PortSpace::Udp } else { PortSpace::Tcp };
            assert_eq!((space, port), (wanted, 7174));
            assert_eq!(cm::service_id(space, port), service);
        }
        if let Some(addresses) = addresses {
            let addresses = addresses.unwrap();
            let (src, dst) = match flow.addresses {
                Addresses::V4 { src, dst } => (src.into(), dst.into()),
                Addresses::V6 { src, dst } => (src.into(), dst.into()),
            };
            assert_eq!((addresses.src, addresses.dst), (src, dst));
            let Message::Req(m) = mad.message else {
                continue;
            };
            let mut private = [0; 92];
            addresses.emit(&mut private).unwrap();
            assert_eq!(private[..IpCm::BYTES], m.private[..IpCm::BYTES]);
        }
    }
    let wanted = [
        "DREP", "DREQ", "REJ", "REP", "REQ", "RTU", "SIDR_REP", "SIDR_REQ",
    ];
    assert_eq!(kinds, wanted.into());
}
