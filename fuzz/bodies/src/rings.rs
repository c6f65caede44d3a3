//! Anything in the memory that a session shares with the router.

use arbitrary::{Result, Unstructured};
use freeflow_router::testing::Host;
use freeflow_shm::{SendEntry, Sge};
use freeflow_types::{AddressVector, QpType};

use crate::cast::{Bystander, PAGES, Party, QKEY, endpoints, finish, host};

const STEPS: usize = 96;

/// Bytes as writes into a session's rings, dirty map and pages, amid requests that are in order.
/// It is connected with an honest session of its tenant, which must not end for it.
pub fn rings(data: &[u8]) {
    let mut host = host();
    let [a, b, c] = endpoints(&mut host);
    let mut bystander = Bystander::new(&mut host, c);
    let mut bad = Party::new(&mut host, a);
    let mut peer = Party::new(&mut host, b);
    for qp_type in [QpType::Rc, QpType::Uc, QpType::Ud] {
        let (x, y) = (
            bad.qp(&mut host, qp_type, None),
            peer.qp(&mut host, qp_type, None),
        );
        let number = |party: &Party, qp: usize| party.qps[qp].made.qpn.get();
        bad.connect(&mut host, x, peer.gid(), number(&peer, y));
        peer.connect(&mut host, y, bad.gid(), number(&bad, x));
    }
    // A shared receive queue on the bad side, and a sender for it.
    let srq = bad.srq(&mut host);
    let (x, y) = (
        bad.qp(&mut host, QpType::Rc, Some(srq)),
        peer.qp(&mut host, QpType::Rc, None),
    );
    bad.connect(&mut host, x, peer.gid(), peer.qps[y].made.qpn.get());
    peer.connect(&mut host, y, bad.gid(), bad.qps[x].made.qpn.get());
    bad.take_slots(&mut host, 4);
    let mut input = Unstructured::new(data);
    // The input may end anywhere.
    let _ = run(&mut input, &mut host, &mut bad, &mut peer);
    bystander.check(&mut host);
    assert!(
        host.is_alive(peer.process.session),
        "the peer's session ended: {:?}",
        host.ended()
    );
    let sessions = [
        bad.process.session,
        peer.process.session,
        bystander.session(),
    ];
    finish(host, &sessions);
}

fn word(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=5)? {
        0 => u.int_in_range(0..=40)?,
        1 => u64::MAX,
        2 => 1 << u.int_in_range(0..=63)?,
        3 => u64::MAX - u.int_in_range(0..=40)?,
        _ => u.arbitrary()?,
    })
}

fn sges(u: &mut Unstructured<'_>, party: &Party, other: &Party) -> Result<Vec<Sge>> {
    let mut sges = Vec::new();
    for _ in 0..u.int_in_range(0..=3)? {
        let mut sge = party.sge(u.int_in_range(0..=PAGES)?, u.arbitrary::<u16>()?.into());
        match u.int_in_range(0..=9)? {
            0 => sge.addr = word(u)?,
            1 => sge.length = word(u)? as u32,
            2 => sge.lkey = other.key,
            4 if !party.slots.is_empty() => sge.lkey = u.choose(&party.slots)?.key.0,
            3 => sge.lkey = u.arbitrary()?,
            _ => {}
        }
        sges.push(sge);
    }
    Ok(sges)
}

/// A send request with anything in it.
pub(crate) fn entry(
    u: &mut Unstructured<'_>,
    from: &Party,
    to: &Party,
    qp: usize,
) -> Result<SendEntry> {
    let mut entry = SendEntry {
        wr_id: u.arbitrary()?,
        opcode: u.int_in_range(0..=15)?,
        flags: u.arbitrary::<u8>()? & 0x1F,
        imm: u.arbitrary()?,
        rkey: to.key,
        remote_addr: crate::cast::IOVA + u.int_in_range(0..=PAGES)?,
        compare_add: u.arbitrary()?,
        swap: u.arbitrary()?,
        av: AddressVector {
            dgid: to.gid(),
            ..AddressVector::default()
        },
        remote_qpn: to.qps.get(qp).map_or(0, |q| q.made.qpn.get()),
        remote_qkey: QKEY,
        ..SendEntry::default()
    };
    match u.int_in_range(0..=11)? {
        0 => entry.opcode = u.arbitrary()?,
        1 => entry.rkey = from.key,
        2 => entry.rkey = u.arbitrary()?,
        3 => entry.remote_addr = word(u)?,
        4 => entry.flags = u.arbitrary()?,
        5 => entry.remote_qkey = word(u)? as u32,
        6 => entry.remote_qpn = 0xFF_FFFF,
        7 if !to.slots.is_empty() => entry.rkey = u.choose(&to.slots)?.key.0,
        _ => {}
    }
    Ok(entry)
}

fn run(u: &mut Unstructured<'_>, host: &mut Host, bad: &mut Party, peer: &mut Party) -> Result<()> {
    for _ in 0..STEPS {
        if u.is_empty() || !host.is_alive(bad.process.session) {
            break;
        }
        match u.int_in_range(0..=12)? {
            0 => {
                let later = [0, 1_000, 10_000_000, 1_000_000_000];
                host.round(*u.choose(&later)?);
            }
            1 => {
                let _ = host.settle();
            }
            // Anywhere in the slab: the dirty map, then the rings.
            2..=4 => {
                let at = u.int_in_range(0..=12 * 1024u64)? * 8;
                let value = word(u)?;
                if let Some(slab) = bad.slabs.first() {
                    slab.write(at, &value.to_le_bytes())
                        .expect("within the slab");
                }
            }
            5 => {
                let at = u.int_in_range(0..=PAGES - 8)?;
                let value = word(u)?;
                bad.pages
                    .write(at, &value.to_le_bytes())
                    .expect("within the pages");
            }
            6 => {
                let qp = u.int_in_range(0..=2)?;
                let sges = sges(u, bad, peer)?;
                bad.recv(qp, u.arbitrary()?, &sges);
            }
            7 => {
                let qp = u.int_in_range(0..=3)?;
                let mut entry = entry(u, bad, peer, qp)?;
                let sges = sges(u, bad, peer)?;
                entry.num_sge = if u.ratio(1, 8)? {
                    u.arbitrary()?
                } else {
                    sges.len() as u16
                };
                entry.inline_len = if u.ratio(1, 8)? {
                    u.arbitrary()?
                } else {
                    u.int_in_range(0..=64)?
                };
                bad.send(qp, &entry, &sges, b"0123456789");
            }
            // Regions of its table, with anything in them, by which the peer writes.
            9 => {
                let mut entry = bad.whole();
                match u.int_in_range(0..=8)? {
                    0 => entry.pd = peer.pd.0,
                    1 => entry.access = word(u)? as u32,
                    2 => entry.iova = word(u)?,
                    3 => entry.len = word(u)?,
                    4 => entry.segment = word(u)? as u32,
                    5 => entry.offset = word(u)?,
                    _ => {}
                }
                bad.post_region(*u.choose(&bad.slots)?, &entry);
            }
            10 => bad.drop_region(*u.choose(&bad.slots)?),
            11 => {
                let qp = u.int_in_range(0..=2)?;
                let write = entry(u, peer, bad, qp)?;
                let sge = peer.sge(0, 8);
                if peer.qps[qp].sent < 8 {
                    let write = SendEntry {
                        flags: write.flags & 2,
                        num_sge: 1,
                        rkey: u.choose(&bad.slots)?.key.0,
                        ..write
                    };
                    peer.send(qp, &write, &[sge], b"");
                }
            }
            // The peer goes on in order.
            8 => {
                let qp = u.int_in_range(0..=3)?;
                if peer.qps[qp].received < 8 {
                    let sge = peer.sge(0, 4096);
                    peer.recv(qp, 1, &[sge]);
                }
            }
            _ => while peer.poll().is_some() {},
        }
    }
    Ok(())
}
