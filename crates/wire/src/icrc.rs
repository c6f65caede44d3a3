//! The invariant CRC: over all of a packet that no router on its way may change, with ones in
//! place of what it may (IBTA volume 1, 7.8.1, and annex A17.3).
//!
//! It covers the IP header too, and of an IPv4 header the identification and the flag "don't
//! fragment", which a receiving socket does not show. But a CRC is linear: how the CRC differs from
//! that of an assumed header tells which header it was computed over, so [`verify`] finds out.
//!
//! Between FreeFlow routers that agreed on it, the CRC of a packet may cover its headers alone: a
//! bit of the base header says so. Its payload then has UDP's checksum and no more, as TCP's has.

use std::net::{Ipv4Addr, Ipv6Addr};

use crc32fast::Hasher;

use crate::{BthOpcode, ICRC_BYTES, MAX_HEADER_BYTES, UDP_PORT};

const UDP_HEADER: usize = 8;
const IPPROTO_UDP: u8 = 17;
/// IPv4's flag "don't fragment", in the half of a word that it shares with the offset.
const DF: u16 = 0x4000;
/// Bytes of the base header, of which the fifth is masked.
const BTH: usize = 12;
/// The CRC's register after eight bytes of ones.
const AFTER_ONES: u32 = 0xDEBB_20E3;
/// Bytes of the longest headers: up to 16 in front of them, IPv6, UDP, and the transport's.
const RUN: usize = 16 + 40 + UDP_HEADER + MAX_HEADER_BYTES;
/// Bit of the base header's ninth byte.
const HEADER_CRC: u8 = 0x40;

/// Source and destination of packets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Addresses {
    /// IPv4, without options.
    V4 {
        /// Source.
        src: Ipv4Addr,
        /// Destination.
        dst: Ipv4Addr,
    },
    /// IPv6, without extension headers.
    V6 {
        /// Source.
        src: Ipv6Addr,
        /// Destination.
        dst: Ipv6Addr,
    },
}

/// What the packets of one UDP flow to [`UDP_PORT`] have in common.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Flow {
    /// Of the network layer.
    pub addresses: Addresses,
    /// UDP source port.
    pub src_port: u16,
}

/// A packet's CRC is not that of its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
#[error("the packet's invariant CRC is wrong")]
pub struct BadIcrc;

/// Computes the CRC of a packet: transport headers, payload and pad, or the headers alone if the
/// base header says so ([`Bth::header_crc`](crate::Bth::header_crc)). `ip_id` is the identification
/// in its IPv4 header, of which "don't fragment" is set; of IPv6 it does not matter.
///
/// The bytes go on the wire as they are, after the packet.
pub fn icrc(flow: &Flow, ip_id: u16, packet: &[u8]) -> [u8; ICRC_BYTES] {
    crc(flow, ip_id, packet).to_le_bytes()
}

/// Checks a packet that ends with its CRC; returns the identification in its IPv4 header, 0 for
/// IPv6.
///
/// Any identification is believed, with or without "don't fragment", so of IPv4 only 15 bits of
/// the CRC are left to find errors with: who knows that a peer has few identifications should
/// refuse others. `likely` is the identification that the packet most likely has: any other takes
/// longer to find.
pub fn verify(flow: &Flow, likely: u16, packet: &[u8]) -> Result<u16, BadIcrc> {
    let (packet, found) = packet.split_last_chunk().ok_or(BadIcrc)?;
    let likely = match flow.addresses {
        Addresses::V4 { .. } => likely,
        Addresses::V6 { .. } => 0,
    };
    let wrong = crc(flow, likely, packet) ^ u32::from_le_bytes(*found);
    if wrong == 0 {
        return Ok(likely);
    }
    let Addresses::V4 { .. } = flow.addresses else {
        return Err(BadIcrc);
    };
    // What follows the word with the identification in the header, the CRC excluded.
    let after = 12 + UDP_HEADER + covered(packet).len();
    let word = input_difference(wrong, after).to_le_bytes();
    let [a, b, flags @ ..] = word;
    match u16::from_be_bytes(flags) {
        0 | DF => Ok(u16::from_be_bytes([a, b]) ^ likely),
        _ => Err(BadIcrc),
    }
}

/// The part of a packet that its CRC covers: the lengths in front of it tell how much follows.
fn covered(packet: &[u8]) -> &[u8] {
    let head = match packet {
        [opcode, _, _, _, _, _, _, _, flags, ..] if flags & HEADER_CRC != 0 => {
            packet.get(..BthOpcode(*opcode).header_len())
        }
        _ => None,
    };
    head.unwrap_or(packet)
}

fn crc(flow: &Flow, ip_id: u16, packet: &[u8]) -> u32 {
    // Longer than any datagram: no such packet is ever sent, so any value will do.
    let udp_len = u16::try_from(UDP_HEADER + packet.len() + ICRC_BYTES).unwrap_or(u16::MAX);
    // All that is short in one run, with room in front of it.
    let mut run = [0; RUN];
    let (packet, mut end) = (covered(packet), 16);
    let mut put = |bytes: &[u8]| {
        let at = end;
        end += bytes.len();
        if let Some(room) = run.get_mut(at..end) {
            room.copy_from_slice(bytes);
        }
        at
    };
    match flow.addresses {
        Addresses::V4 { src, dst } => {
            let (total, id) = (
                udp_len.saturating_add(20).to_be_bytes(),
                ip_id.to_be_bytes(),
            );
            put(&[
                0x45,
                0xFF, // DSCP and ECN
                total[0],
                total[1],
                id[0],
                id[1],
                (DF >> 8) as u8,
                0,
                0xFF, // time to live
                IPPROTO_UDP,
                0xFF, // header checksum
                0xFF,
            ]);
            put(&src.octets());
            put(&dst.octets());
        }
        Addresses::V6 { src, dst } => {
            let len = udp_len.to_be_bytes();
            // Traffic class and flow label, and the hop limit.
            put(&[0x6F, 0xFF, 0xFF, 0xFF, len[0], len[1], IPPROTO_UDP, 0xFF]);
            put(&src.octets());
            put(&dst.octets());
        }
    }
    put(&flow.src_port.to_be_bytes());
    put(&UDP_PORT.to_be_bytes());
    put(&udp_len.to_be_bytes());
    put(&[0xFF; 2]);
    // Whatever is no longer than headers are, else the base header.
    let short = if packet.len() > MAX_HEADER_BYTES {
        BTH
    } else {
        packet.len()
    };
    let (head, rest) = packet.split_at(short);
    let at = put(head);
    // FECN, BECN and reserved bits.
    if let Some(byte) = run.get_mut(at + 4).filter(|_| head.len() > 4) {
        *byte = 0xFF;
    }
    // The CRC is begun with what it is after eight bytes of ones, which stand for the link layer
    // that InfiniBand has. Adding that to the first bytes is the same as to begin with it; and
    // zeroes in front of them change nothing then, which make whole blocks of 16 bytes.
    for (byte, state) in run[16..].iter_mut().zip(AFTER_ONES.to_le_bytes()) {
        *byte ^= state;
    }
    let start = end % 16;
    let mut hasher = Hasher::new_with_initial(!0);
    hasher.update(run.get(start..end).unwrap_or_default());
    hasher.update(rest);
    hasher.finalize()
}

/// Polynomials over GF(2) modulo that of CRC-32, in its bit order: the top bit is x^0.
const POLYNOMIAL: u32 = 0xEDB8_8320;
const ONE: u32 = 1 << 31;

const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 0;
    while bit < 32 {
        // All ones if `a` has x^bit; then `b` times x.
        product ^= b & ((a >> (31 - bit)) & 1).wrapping_neg();
        b = (b >> 1) ^ (POLYNOMIAL & (b & 1).wrapping_neg());
        bit += 1;
    }
    product
}

/// x^(-8 * 2^i).
const INVERSE_POWERS: [u32; 32] = {
    // The polynomial is primitive: x^(2^32 - 1) = 1, so x^-1 = x^(2^32 - 2), the product of all
    // x^(2^i) but the first.
    let (mut power, mut inverse) = (ONE >> 1, ONE);
    let mut i = 1;
    while i < 32 {
        power = multiply(power, power);
        inverse = multiply(inverse, power);
        i += 1;
    }
    let mut table = [0; 32];
    let mut doublings = 0;
    while doublings < 3 {
        inverse = multiply(inverse, inverse);
        doublings += 1;
    }
    let mut i = 0;
    while i < 32 {
        table[i] = inverse;
        inverse = multiply(inverse, inverse);
        i += 1;
    }
    table
};

/// How the four bytes differ, as a little-endian number, that are followed by `after` bytes and
/// make CRCs differ by `difference`.
fn input_difference(difference: u32, after: usize) -> u32 {
    // Bytes that differ by d make CRCs differ by d * x^(32 + 8 * after).
    let bytes = after + 4;
    INVERSE_POWERS
        .iter()
        .enumerate()
        .filter(|&(i, _)| bytes >> i & 1 == 1)
        .fold(difference, |d, (_, &power)| multiply(d, power))
}

#[cfg(test)]
mod tests {
    use freeflow_types::Psn;
    use proptest::prelude::*;

    use super::*;
    use crate::{Bth, Headers, Reth};

    fn flow(v6: bool, src_port: u16) -> Flow {
        let addresses = if v6 {
            Addresses::V6 {
                src: "fd00::1".parse().unwrap(),
                dst: "fd00::2".parse().unwrap(),
            }
        } else {
            Addresses::V4 {
                src: Ipv4Addr::new(10, 0, 0, 1),
                dst: Ipv4Addr::new(10, 0, 0, 2),
            }
        };
        Flow {
            addresses,
            src_port,
        }
    }

    proptest! {
        #[test]
        fn the_identification_is_found(
            v6: bool, port: u16, id: u16, likely: u16,
            packet in prop::collection::vec(any::<u8>(), 0..5000),
        ) {
            let flow = flow(v6, port);
            let mut sent = packet.clone();
            sent.extend(icrc(&flow, id, &packet));
            let found = Ok(if v6 { 0 } else { id });
            prop_assert_eq!(verify(&flow, likely, &sent), found);
            prop_assert_eq!(verify(&flow, id, &sent), found);
        }

        #[test]
        fn changed_bits_are_found(
            v6: bool, port: u16, mut packet in prop::collection::vec(any::<u8>(), 20..5000),
            at: prop::sample::Index, bit in 0..8,
        ) {
            let flow = flow(v6, port);
            // The CRC covers all of it.
            packet[8] &= !HEADER_CRC;
            packet.extend(icrc(&flow, 7, &packet));
            let before = verify(&flow, 0, &packet);
            let at = at.index(packet.len());
            packet[at] ^= 1u8 << bit;
            // Of the base header, one byte is not covered. Of IPv4, an error may look like another
            // identification.
            let after = verify(&flow, 0, &packet);
            prop_assert_eq!(after == before, at == 4);
        }

        #[test]
        fn a_crc_of_headers_finds_changes_of_headers_and_length(
            v6: bool, port: u16, id: u16, payload in prop::collection::vec(any::<u8>(), 4..5000),
            at: prop::sample::Index, bit in 0..8,
        ) {
            let flow = flow(v6, port);
            let mut packet = vec![0; 28];
            let mut bth = Bth::new(BthOpcode::RC_WRITE_FIRST, 7, Psn::new(1));
            bth.header_crc = true;
            let reth = Some(Reth { va: 1, rkey: 2, len: 3 });
            Headers { reth, ..Headers::new(bth) }.emit(&mut packet).unwrap();
            packet.extend(&payload);
            packet.extend(icrc(&flow, id, &packet));
            let before = verify(&flow, 0, &packet);
            prop_assert_eq!(before, Ok(if v6 { 0 } else { id }));
            let mut longer = packet.clone();
            longer.splice(28..28, [0; 4]);
            prop_assert_ne!(verify(&flow, 0, &longer), before);
            let at = at.index(packet.len());
            packet[at] ^= 1u8 << bit;
            let uncovered = at == 4 || (28..28 + payload.len()).contains(&at);
            prop_assert_eq!(verify(&flow, 0, &packet) == before, uncovered);
        }

        #[test]
        fn any_bytes_can_be_checked(
            v6: bool, bytes in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let _ = verify(&flow(v6, 1), 0, &bytes);
        }
    }

    #[test]
    fn most_noise_is_refused() {
        let flow = flow(false, 49152);
        let mut packet = vec![0; 100];
        let accepted = (0..10_000u32).filter(|n| {
            packet[20..24].copy_from_slice(&n.wrapping_mul(0x9E37_79B9).to_be_bytes());
            verify(&flow, 0, &packet).is_ok()
        });
        assert!(accepted.count() < 10);
    }
}
