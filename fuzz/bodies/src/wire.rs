//! Datagrams to the port of RoCEv2.

use std::net::{Ipv4Addr, Ipv6Addr};

use freeflow_wire::cm::{self, IpCm, Mad, Message};
use freeflow_wire::{Addresses, BthOpcode, Flow, Headers, ICRC_BYTES, icrc, verify};

/// Bytes as a datagram: a packet that is read can be written, and then is read alike; so are the
/// communication manager's messages in it; and no bit of it can change without its CRC.
pub fn wire(data: &[u8]) {
    let Some((body, [.., choice])) = data.split_last_chunk::<ICRC_BYTES>() else {
        assert!(verify(&flow(0), 0, data).is_err(), "there is no CRC");
        return;
    };
    let choice = *choice;
    let flow = flow(choice);
    // Almost never right.
    let _ = verify(&flow, 0, data);
    let ip_id = u16::from(choice);
    let mut sealed = [body, &icrc(&flow, ip_id, body)].concat();
    // Whether it was expected or not.
    for likely in [0, ip_id] {
        let found = verify(&flow, likely, &sealed).expect("its own CRC");
        if matches!(flow.addresses, Addresses::V4 { .. }) {
            assert_eq!(found, ip_id);
        }
    }
    // Bytes that routers do not change; the CRC is blind to some of the others.
    let at = 8 + usize::from(choice);
    // Nor of a payload that it does not cover, whether the packet is a good one or not.
    let at = match body {
        [opcode, _, _, _, _, _, _, _, flags, ..] if flags & 0x40 != 0 => {
            let len = BthOpcode(*opcode).header_len();
            if body.len() < len {
                at
            } else {
                at.min(len - 1)
            }
        }
        _ => at,
    };
    if let Some(byte) = sealed.get_mut(at) {
        *byte ^= 1;
        let spoilt = verify(&flow, ip_id, &sealed);
        assert!(
            spoilt.is_err() || spoilt != Ok(ip_id),
            "a changed bit at {at} is not seen"
        );
    }
    let Ok((headers, payload)) = Headers::parse(body) else {
        return;
    };
    let mut again = body.to_vec();
    let len = headers.emit(&mut again).expect("what was read");
    assert_eq!(len, headers.len());
    assert_eq!(Headers::parse(&again), Ok((headers, payload.clone())));
    let payload = body.get(payload).expect("within the packet");
    assert_eq!(headers.with_payload(payload.len()), headers, "its pad");
    let _ = IpCm::parse(payload);
    if headers.bth.dest_qp == cm::QPN
        && let Ok(mad) = Mad::parse(payload)
    {
        let again = mad.emit().expect("what was read");
        assert_eq!(Mad::parse(&again).as_ref(), Ok(&mad));
        if let Message::Req(request) = &mad.message {
            let _ = IpCm::parse(&request.private);
        }
    }
}

fn flow(choice: u8) -> Flow {
    let addresses = if choice.is_multiple_of(2) {
        Addresses::V4 {
            src: Ipv4Addr::new(192, 0, 2, 1),
            dst: Ipv4Addr::new(192, 0, 2, 2),
        }
    } else {
        let address = |last| Ipv6Addr::new(0x2001, 0xDB8, 0, 0, 0, 0, 0, last);
        Addresses::V6 {
            src: address(1),
            dst: address(2),
        }
    };
    Flow {
        addresses,
        src_port: 0xC000,
    }
}
