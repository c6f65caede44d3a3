//! What holds for any bytes and any headers.

use freeflow_types::Psn;
use freeflow_wire::cm::{IpCm, MAD_BYTES, Mad};
use freeflow_wire::{
    Aeth, AtomicEth, Bth, BthOpcode, Deth, EmitError, Feth, Headers, ParseError, Reth, Syndrome,
};
use proptest::prelude::*;

fn known() -> impl Strategy<Value = BthOpcode> {
    let known = (0..=255).map(BthOpcode).filter(|o| o.is_known());
    prop::sample::select(known.collect::<Vec<_>>())
}

prop_compose! {
    fn headers()(
        opcode in known(),
        flags: [bool; 6],
        pad in 0u8..4,
        pkey: u16,
        words: [u32; 6],
        longs: [u64; 4],
        imm: [u8; 4],
        syndrome: u8,
        flush in 0u32..64,
    ) -> Headers {
        let [solicited, migrated, fecn, becn, ack_req, header_crc] = flags;
        let low = |word: u32| word & 0xFF_FFFF;
        let (rkey, va) = (words[2], longs[0]);
        Headers {
            bth: Bth {
                opcode, solicited, migrated, pad, pkey, fecn, becn, ack_req, header_crc,
                dest_qp: low(words[0]), psn: Psn::new(words[1]),
            },
            xrc_srq: opcode.has_xrc_srq().then_some(low(words[3])),
            deth: opcode.has_deth().then_some(Deth { qkey: words[3], src_qp: low(words[4]) }),
            feth: opcode.has_feth().then_some(Feth(flush)),
            reth: opcode.has_reth().then_some(Reth { va, rkey, len: words[5] }),
            atomic: opcode.has_atomic().then_some(AtomicEth {
                va, rkey, swap_add: longs[1], compare: longs[2],
            }),
            aeth: opcode.has_aeth().then_some(Aeth {
                syndrome: Syndrome::from_byte(syndrome), msn: low(words[4]),
            }),
            atomic_ack: opcode.has_atomic_ack().then_some(longs[3]),
            imm: opcode.has_imm().then_some(imm),
            ieth: opcode.has_ieth().then_some(words[5]),
        }
    }
}

proptest! {
    #[test]
    fn headers_survive_the_wire(headers in headers(), words in 0usize..40) {
        let atomic_write = headers.bth.opcode.op() == BthOpcode::RC_ATOMIC_WRITE.op()
            && headers.bth.opcode.has_reth();
        let data = match headers.bth.opcode.has_payload() {
            _ if atomic_write => 8,
            true => (4 * words).saturating_sub(headers.bth.pad.into()),
            false => 0,
        };
        let headers = headers.with_payload(data);
        let mut packet = vec![0xA5; headers.len() + data + usize::from(headers.bth.pad)];
        let len = headers.emit(&mut packet);
        prop_assert_eq!(len, Ok(headers.len()));
        prop_assert_eq!(
            Headers::parse(&packet),
            Ok((headers, headers.len()..headers.len() + data))
        );
        // No part of the headers is enough, neither to read nor to write.
        for short in 0..headers.len() {
            prop_assert_eq!(Headers::parse(&packet[..short]), Err(ParseError::Truncated));
            let room = EmitError::Room { need: headers.len(), room: short };
            prop_assert_eq!(headers.emit(&mut packet[..short].to_vec()), Err(room));
        }
    }

    #[test]
    fn what_is_read_can_be_written(
        code: u8, mut bytes in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        if let [first, second, ..] = &mut bytes[..] {
            *first = code;
            *second &= 0xF0;
        }
        let Ok((headers, payload)) = Headers::parse(&bytes) else {
            return Ok(());
        };
        prop_assert!(payload.end <= bytes.len());
        let mut again = bytes.clone();
        headers.emit(&mut again).unwrap();
        prop_assert_eq!(Headers::parse(&again), Ok((headers, payload)));
    }

    #[test]
    fn any_bytes_can_be_read(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Headers::parse(&bytes);
        let _ = Mad::parse(&bytes);
        let _ = IpCm::parse(&bytes);
    }

    #[test]
    fn headers_of_another_packet_are_not_written(headers in headers(), opcode in known()) {
        let mut other = headers;
        other.bth.opcode = opcode;
        let same = [
            BthOpcode::has_xrc_srq, BthOpcode::has_deth, BthOpcode::has_feth, BthOpcode::has_reth,
            BthOpcode::has_atomic, BthOpcode::has_aeth, BthOpcode::has_atomic_ack,
            BthOpcode::has_imm, BthOpcode::has_ieth,
        ].iter().all(|has| has(opcode) == has(headers.bth.opcode));
        prop_assert_eq!(other.emit(&mut [0; 64]).is_ok(), same);
    }

    #[test]
    fn messages_survive_the_wire(
        attribute in 0x0Fu16..0x1C, body in prop::collection::vec(any::<u8>(), MAD_BYTES - 24),
        transaction: u64,
    ) {
        let mut bytes = [0; MAD_BYTES];
        bytes[..4].copy_from_slice(&[1, 7, 2, 3]);
        bytes[8..16].copy_from_slice(&transaction.to_be_bytes());
        bytes[16..18].copy_from_slice(&attribute.to_be_bytes());
        bytes[24..].copy_from_slice(&body);
        if let Ok(mad) = Mad::parse(&bytes) {
            prop_assert_eq!(mad.transaction, transaction);
            // But for reserved bits, the same.
            let again = mad.emit().unwrap();
            prop_assert_eq!(Mad::parse(&again), Ok(mad));
            let same = bytes.iter().zip(&again).all(|(&was, &is)| is & !was == 0);
            prop_assert!(same, "bits came from nowhere");
        } else {
            prop_assert!(!(0x10..=0x18).contains(&attribute) || matches!(attribute, 0x11 | 0x12));
        }
    }

    #[test]
    fn addresses_survive_the_wire(v6: bool, src: u128, dst: u128, src_port: u16) {
        let address = |bits: u128| -> std::net::IpAddr {
            if v6 {
                std::net::Ipv6Addr::from(bits).into()
            } else {
                std::net::Ipv4Addr::from(bits as u32).into()
            }
        };
        let (src, dst) = (address(src), address(dst));
        let ip = IpCm { src_port, src, dst };
        let mut private = [0xA5; IpCm::BYTES + 1];
        ip.emit(&mut private).unwrap();
        prop_assert_eq!(private[IpCm::BYTES], 0xA5);
        prop_assert_eq!(IpCm::parse(&private), Ok(ip));
    }
}

#[test]
fn every_syndrome_survives() {
    for byte in 0..=255 {
        assert_eq!(Syndrome::from_byte(byte).byte(), byte);
    }
}
