//! A layer that writes what passes into a capture file.

use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use freeflow_wire::UDP_PORT;

use crate::batch::{Datagrams, Trains};
use crate::link::{Ecn, Link, Progress, SendCounters};

/// Blocks of the pcapng format (draft-ietf-opsawg-pcapng, section 4).
const SECTION_HEADER: u32 = 0x0A0D_0D0A;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
/// Packets begin with an IP header (`LINKTYPE_RAW`).
const LINKTYPE_RAW: u16 = 101;
/// Options.
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;

/// A link whose packets are written to a file as pcapng, which Wireshark reads.
///
/// The IP and UDP headers are made up from what the sockets tell: time to live and checksums are
/// not those of the wire. If the file cannot be written any more, packets pass all the same.
pub struct Capture<L, W: Write> {
    link: L,
    out: Option<W>,
    /// What is added to `now` for the time since 1970.
    epoch_ns: u64,
    /// Bytes kept of each packet.
    snap: usize,
    failure: Option<io::Error>,
}

impl<L: Link, W: Write> Capture<L, W> {
    /// Writes a link's packets, of each the first `snap` bytes. `epoch_ns` is the time in ns since
    /// 1970 when the clock of `now` was 0.
    pub fn new(link: L, mut out: W, epoch_ns: u64, snap: u16) -> io::Result<Self> {
        let mut section = Vec::new();
        section.extend(0x1A2B_3C4Du32.to_ne_bytes());
        section.extend([1u16, 0].map(u16::to_ne_bytes).as_flattened());
        // The section's length is not known.
        section.extend((-1i64).to_ne_bytes());
        out.write_all(&block(SECTION_HEADER, &section))?;
        let mut interface = Vec::new();
        interface.extend([LINKTYPE_RAW, 0].map(u16::to_ne_bytes).as_flattened());
        interface.extend(u32::from(snap).to_ne_bytes());
        // Times in units of 10^-9 s.
        option(&mut interface, IF_TSRESOL, &[9]);
        option(&mut interface, 0, &[]);
        out.write_all(&block(INTERFACE_DESCRIPTION, &interface))?;
        Ok(Capture {
            link,
            out: Some(out),
            epoch_ns,
            snap: snap.into(),
            failure: None,
        })
    }

    /// Why nothing is written any more.
    pub fn failure(&self) -> Option<&io::Error> {
        self.failure.as_ref()
    }
}

/// One packet of the file.
struct Packet<'a> {
    src: (IpAddr, u16),
    dst: IpAddr,
    ecn: Ecn,
    ip_id: u16,
    payload: &'a [u8],
    outgoing: bool,
}

impl<W: Write> Recorder<'_, W> {
    fn record(&mut self, packet: &Packet<'_>) {
        let Some(out) = self.out else { return };
        let headers = headers(packet);
        let whole = headers.len() + packet.payload.len();
        let kept = whole.min(self.snap);
        let time = self.time;
        let mut body = Vec::with_capacity(kept + 48);
        for word in [
            0,
            (time >> 32) as u32,
            time as u32,
            kept as u32,
            whole as u32,
        ] {
            body.extend(word.to_ne_bytes());
        }
        body.extend(headers.iter().chain(packet.payload).take(kept));
        body.resize(body.len().next_multiple_of(4), 0);
        let direction: u32 = if packet.outgoing { 2 } else { 1 };
        option(&mut body, EPB_FLAGS, &direction.to_ne_bytes());
        option(&mut body, 0, &[]);
        if let Err(e) = out.write_all(&block(ENHANCED_PACKET, &body)) {
            *self.out = None;
            *self.failure = Some(e);
        }
    }
}

/// What is borrowed of a capture while it records.
struct Recorder<'a, W> {
    out: &'a mut Option<W>,
    failure: &'a mut Option<io::Error>,
    snap: usize,
    time: u64,
}

/// A block with its lengths.
fn block(kind: u32, body: &[u8]) -> Vec<u8> {
    let len = (body.len() + 12) as u32;
    let mut bytes = Vec::with_capacity(body.len() + 12);
    bytes.extend([kind, len].map(u32::to_ne_bytes).as_flattened());
    bytes.extend(body);
    bytes.extend(len.to_ne_bytes());
    bytes
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend(
        [code, value.len() as u16]
            .map(u16::to_ne_bytes)
            .as_flattened(),
    );
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// IP and UDP headers like those on the wire.
fn headers(packet: &Packet<'_>) -> Vec<u8> {
    let udp_len = u16::try_from(packet.payload.len() + 8).unwrap_or(u16::MAX);
    let (src, src_port) = packet.src;
    let mut bytes = Vec::with_capacity(48);
    match (src, packet.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            bytes.extend([0x45, packet.ecn as u8]);
            bytes.extend(udp_len.saturating_add(20).to_be_bytes());
            bytes.extend(packet.ip_id.to_be_bytes());
            bytes.extend([0x40, 0, 64, 17, 0, 0]);
            bytes.extend(src.octets());
            bytes.extend(dst.octets());
            let sum: u32 = bytes
                .chunks_exact(2)
                .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
                .sum();
            let folded = (sum & 0xFFFF) + (sum >> 16);
            let checksum = !((folded & 0xFFFF) + (folded >> 16)) as u16;
            bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            bytes.extend((0x6000_0000 | (packet.ecn as u32) << 20).to_be_bytes());
            bytes.extend(udp_len.to_be_bytes());
            bytes.extend([17, 64]);
            bytes.extend(src.octets());
            bytes.extend(dst.octets());
        }
        // A socket has one family.
        _ => {}
    }
    for field in [src_port, UDP_PORT, udp_len, 0] {
        bytes.extend(field.to_be_bytes());
    }
    bytes
}

impl<L: Link, W: Write> Link for Capture<L, W> {
    fn local(&self) -> IpAddr {
        self.link.local()
    }

    fn source_port(&self, flow: u32) -> u16 {
        self.link.source_port(flow)
    }

    fn send(&mut self, now: u64, trains: &mut Trains) -> io::Result<Progress> {
        let local = self.link.local();
        let mut recorder = Recorder {
            out: &mut self.out,
            failure: &mut self.failure,
            snap: self.snap,
            time: self.epoch_ns.saturating_add(now),
        };
        trains.look(|train, bytes| {
            for (place, payload) in bytes.chunks(train.packet_size()).enumerate() {
                recorder.record(&Packet {
                    src: (local, train.src_port),
                    dst: train.dst,
                    ecn: train.ecn,
                    ip_id: place as u16,
                    payload,
                    outgoing: true,
                });
            }
        });
        self.link.send(now, trains)
    }

    fn receive(&mut self, now: u64, into: &mut Datagrams) -> io::Result<()> {
        self.link.receive(now, into)?;
        let mut recorder = Recorder {
            out: &mut self.out,
            failure: &mut self.failure,
            snap: self.snap,
            time: self.epoch_ns.saturating_add(now),
        };
        let local = self.link.local();
        for datagram in into.iter() {
            recorder.record(&Packet {
                src: (datagram.src.ip(), datagram.src.port()),
                dst: local,
                ecn: datagram.ecn,
                ip_id: 0,
                payload: datagram.bytes,
                outgoing: false,
            });
        }
        Ok(())
    }

    fn next_timeout(&self) -> Option<u64> {
        self.link.next_timeout()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.link.fd()
    }

    fn has_checksum(&self) -> bool {
        self.link.has_checksum()
    }

    fn sent(&self) -> SendCounters {
        self.link.sent()
    }

    fn overflows(&self) -> u64 {
        self.link.overflows()
    }
}

impl<L, W: Write> Drop for Capture<L, W> {
    fn drop(&mut self) {
        if let Some(out) = &mut self.out {
            // Nobody is left to be told.
            let _ = out.flush();
        }
    }
}
