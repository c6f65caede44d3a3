//! Packets of RoCEv2 that no router has made, between the IPv4 addresses of hosts.

use std::net::Ipv4Addr;

use anyhow::Result;
use freeflow_wire::{Addresses, Flow, Headers, icrc};

use crate::{DEADLINE, Hosts, Running};

/// Adds the CRC to a packet from an address and port to an address. `ip_id` is the identification
/// that the CRC tells of.
pub fn sealed(from: (&str, u16), to: &str, ip_id: u16, mut bytes: Vec<u8>) -> Vec<u8> {
    let address = |text: &str| text.parse::<Ipv4Addr>().expect("an IPv4 address");
    let flow = Flow {
        addresses: Addresses::V4 {
            src: address(from.0),
            dst: address(to),
        },
        src_port: from.1,
    };
    let crc = icrc(&flow, ip_id, &bytes);
    bytes.extend(crc);
    bytes
}

/// Headers, payload and pad, without CRC.
pub fn body(headers: &Headers, payload: &[u8]) -> Vec<u8> {
    let headers = headers.with_payload(payload.len());
    let mut bytes = vec![0; headers.len()];
    headers.emit(&mut bytes).expect("headers of their opcode");
    bytes.extend(payload);
    bytes.extend(vec![0; usize::from(headers.bth.pad)]);
    bytes
}

/// A packet as another implementation would send it from an address and port.
pub fn packet(from: (&str, u16), to: &str, headers: &Headers, payload: &[u8]) -> Vec<u8> {
    sealed(from, to, 0, body(headers, payload))
}

/// Sends packets from the second host, from one of its addresses and a port, to the first.
/// `program` is this package's `say-udp`.
pub fn say(hosts: &Hosts, program: &str, from: (&str, u16), packets: &[Vec<u8>]) -> Result<()> {
    let hex = |bytes: &Vec<u8>| bytes.iter().map(|b| format!("{b:02x}")).collect();
    let mut args = vec![
        format!("{}:{}", from.0, from.1),
        Hosts::ADDRESSES[0].to_owned(),
    ];
    args.extend(packets.iter().map(hex));
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    Running::start(&mut hosts.command(1, program, &args))?
        .wait(DEADLINE)?
        .success()
        .map(drop)
}
