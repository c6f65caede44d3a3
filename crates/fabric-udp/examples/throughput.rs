//! How fast packets go one way: `throughput receive LOCAL` on one host, then
//! `throughput send LOCAL REMOTE [PAYLOAD [SECONDS]]` on another.

use std::convert::Infallible;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use freeflow_fabric_udp::{Datagrams, Ecn, Fabric, Progress, PushError, To, Udp, UdpOptions};
use freeflow_types::Psn;
use freeflow_wire::{Bth, BthOpcode, Headers};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["receive", local] => receive(local.parse()?),
        ["send", local, remote, ref rest @ ..] => {
            let payload = rest.first().unwrap_or(&"1024").parse()?;
            let seconds = rest.get(1).unwrap_or(&"5").parse()?;
            send(local.parse()?, remote.parse()?, payload, seconds)
        }
        _ => Err("throughput receive LOCAL | send LOCAL REMOTE [PAYLOAD [SECONDS]]".into()),
    }
}

/// Waits for a second at most; false if nothing came.
fn wait(fabric: &Fabric<Udp>) -> Result<bool, Error> {
    let second = Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(fabric, PollFlags::IN)];
    Ok(poll(&mut fds, Some(&second))? > 0)
}

fn send(local: IpAddr, dst: IpAddr, payload: usize, seconds: u64) -> Result<(), Error> {
    let mut fabric = Fabric::new(Udp::open(&UdpOptions::new(local))?);
    let to = To {
        dst,
        flow: 0,
        ecn: Ecn::NotCapable,
    };
    let memory = vec![7; 1 << 20];
    let mut psn = Psn::new(0);
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        loop {
            let headers = Headers::new(Bth::new(BthOpcode::RC_SEND_MIDDLE, 1, psn));
            let at = (psn.get() as usize * payload) % (memory.len() - payload);
            let fill = |room: &mut [u8]| {
                room.copy_from_slice(&memory[at..at + room.len()]);
                Ok::<_, Infallible>(())
            };
            match fabric.push(&to, &headers, payload, fill) {
                Ok(()) => psn = psn.add(1),
                Err(PushError::Full) => break,
                Err(e) => return Err(e.into()),
            }
        }
        while fabric.flush(0)? == Progress::Blocked {
            wait(&fabric)?;
        }
    }
    let sent = fabric.sent();
    println!(
        "sent {:.2} Gbit/s, {:.0} packets a call, {sent:?}",
        sent.bytes as f64 * 8e-9 / seconds as f64,
        sent.packets as f64 / sent.calls as f64,
    );
    Ok(())
}

fn receive(local: IpAddr) -> Result<(), Error> {
    let mut fabric = Fabric::new(Udp::open(&UdpOptions::new(local))?);
    let mut batch = Datagrams::default();
    let mut first = None;
    let mut last = Instant::now();
    let mut payload = 0;
    loop {
        fabric.receive(0, &mut batch)?;
        if batch.is_empty() {
            if !wait(&fabric)? && first.is_some() {
                break;
            }
            continue;
        }
        for datagram in batch.iter() {
            if let Some(packet) = fabric.check(datagram) {
                payload += packet.payload.len();
            }
        }
        last = Instant::now();
        first.get_or_insert(last);
    }
    let seconds = first.map_or(0.0, |first| (last - first).as_secs_f64());
    println!(
        "received {:.2} Gbit/s of payload, overflows {}, {:?}",
        payload as f64 * 8e-9 / seconds,
        fabric.overflows(),
        fabric.received(),
    );
    Ok(())
}
