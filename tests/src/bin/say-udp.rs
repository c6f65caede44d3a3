//! Sends datagrams to RoCEv2's port: `say-udp FROM:PORT TO HEX...`, each as its hexadecimal bytes.

use std::net::{IpAddr, UdpSocket};

use anyhow::{Context as _, Result, bail};

const ROCE: u16 = 4791;

fn bytes(hex: &str) -> Result<Vec<u8>> {
    if !hex.len().is_multiple_of(2) {
        bail!("{hex}: half a byte");
    }
    let byte = |at| u8::from_str_radix(hex.get(at..at + 2).unwrap_or_default(), 16);
    (0..hex.len())
        .step_by(2)
        .map(|at| byte(at).with_context(|| format!("{hex} at {at}")))
        .collect()
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(from), Some(to)) = (args.next(), args.next()) else {
        bail!("say-udp FROM:PORT TO HEX...");
    };
    let socket = UdpSocket::bind(&from).with_context(|| format!("cannot bind {from}"))?;
    let to: IpAddr = to.parse()?;
    for hex in args {
        socket.send_to(&bytes(&hex)?, (to, ROCE))?;
    }
    Ok(())
}
