//! Work requests of an honest program with all the mistakes that one can make: each completes
//! once, in order, and only what it may change changes.

use arbitrary::{Result, Unstructured};
use freeflow_router::testing::Host;
use freeflow_types::{QpType, SendFlags};

use crate::cast::{Bystander, CAP, PAGES, Party, endpoints, finish, host};
use crate::rings::entry;

/// Virtual time in which every retry has ended: timers here are of microseconds.
const ROUNDS: u32 = 64;
const ROUND: u64 = 1_000_000_000;

/// Bytes as work requests on connected queue pairs and datagrams, some of which cannot succeed.
pub fn work(data: &[u8]) {
    let mut host = host();
    let [a, b, c] = endpoints(&mut host);
    let mut bystander = Bystander::new(&mut host, c);
    let mut from = Party::new(&mut host, a);
    let mut to = Party::new(&mut host, b);
    let mut input = Unstructured::new(data);
    let types = [QpType::Rc, QpType::Uc, QpType::Ud];
    let qp_type = input.choose(&types).copied().unwrap_or(QpType::Rc);
    let (x, y) = (
        from.qp(&mut host, qp_type, None),
        to.qp(&mut host, qp_type, None),
    );
    from.connect(&mut host, x, to.gid(), to.qps[y].made.qpn.get());
    to.connect(&mut host, y, from.gid(), from.qps[x].made.qpn.get());
    // The second half of each side's pages is nobody's business.
    let half = PAGES / 2;
    for (party, mark) in [(&from, 0xA5), (&to, 0x5A)] {
        party
            .pages
            .write(half, &vec![mark; half as usize])
            .expect("the pages");
    }
    let posted = post(&mut input, &mut host, &mut from, &mut to).unwrap_or_default();
    for _ in 0..ROUNDS {
        assert!(host.settle(), "the engine does not come to rest");
        host.round(ROUND);
    }
    let (sends, recvs) = posted;
    let mut seen: Vec<_> = std::iter::from_fn(|| from.poll()).collect();
    let order: Vec<_> = seen.iter().map(|c| c.wr_id).collect();
    assert_eq!(
        order,
        (0..sends).collect::<Vec<_>>(),
        "each send request completes once, in order"
    );
    let failed = seen.iter().position(|c| c.status != 0);
    if let Some(first) = failed {
        // Flushed after the first error, on every service.
        assert!(seen.drain(first + 1..).all(|c| c.status == 5), "flushed");
    }
    let seen: Vec<_> = std::iter::from_fn(|| to.poll()).map(|c| c.wr_id).collect();
    assert!(seen.len() as u64 <= recvs);
    assert!(
        seen.iter().copied().eq(0..seen.len() as u64),
        "receive requests complete in order: {seen:?}"
    );
    for (party, mark) in [(&from, 0xA5), (&to, 0x5A)] {
        let bytes = party.bytes();
        assert!(
            bytes[half as usize..].iter().all(|&b| b == mark),
            "what no request named has changed"
        );
    }
    bystander.check(&mut host);
    let sessions = [
        from.process.session,
        to.process.session,
        bystander.session(),
    ];
    finish(host, &sessions);
}

fn post(
    u: &mut Unstructured<'_>,
    host: &mut Host,
    from: &mut Party,
    to: &mut Party,
) -> Result<(u64, u64)> {
    let (mut sends, mut recvs) = (0, 0);
    let deepest = u64::from(CAP.max_send_wr);
    while !u.is_empty() && sends < deepest && recvs < deepest {
        let done = one(u, host, from, to, &mut sends, &mut recvs);
        if done.is_err() {
            break;
        }
    }
    Ok((sends, recvs))
}

fn one(
    u: &mut Unstructured<'_>,
    host: &mut Host,
    from: &mut Party,
    to: &mut Party,
    sends: &mut u64,
    recvs: &mut u64,
) -> Result<()> {
    let half = PAGES / 2;
    match u.int_in_range(0..=4)? {
        0 => {
            assert!(host.settle(), "the engine does not come to rest");
        }
        1 | 2 => {
            let at = u.int_in_range(0..=half - 1)?;
            let length = u.int_in_range(0..=half - at)? as u32;
            let mut sge = to.sge(at, length);
            if u.ratio(1, 16)? {
                sge.lkey = from.key;
            }
            to.recv(0, *recvs, &[sge]);
            *recvs += 1;
        }
        _ => {
            let mut entry = entry(u, from, to, 0)?;
            let mut sges = Vec::new();
            for _ in 0..u.int_in_range(0..=3)? {
                let at = u.int_in_range(0..=half - 1)?;
                let length = u.int_in_range(0..=half - at)? as u32;
                let mut sge = from.sge(at, length);
                if u.ratio(1, 16)? {
                    sge.lkey = to.key;
                }
                sges.push(sge);
            }
            let mut inline = Vec::new();
            if SendFlags::from_bits_truncate(entry.flags).contains(SendFlags::INLINE) {
                let n = u.int_in_range(0..=CAP.max_inline)?;
                inline.resize(n as usize, 0x77);
                entry.inline_len = n;
                sges.clear();
            }
            // Writes stay in the first half, or name what is not theirs.
            let len: u64 = sges.iter().map(|s| u64::from(s.length)).sum();
            let len = len + inline.len() as u64;
            let last = crate::cast::IOVA + half;
            let end = entry.remote_addr.saturating_add(len.max(8));
            if entry.remote_addr < last + half && end > last {
                entry.remote_addr = crate::cast::IOVA;
            }
            if len > half {
                sges.truncate(1);
            }
            entry.wr_id = *sends;
            entry.num_sge = sges.len() as u16;
            from.send(0, &entry, &sges, &inline);
            *sends += 1;
        }
    }
    Ok(())
}
