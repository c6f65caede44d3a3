//! Completions: each request one at most, in order, and saying the truth.

use freeflow_abi::*;

use crate::suite::{Env, LONG, Op, Outcome, Pair, QUIET, Side, Spec, check, fail, same, tests};
use crate::verbs::{SendList, Wc, pattern};

tests! { "completions";
    failed_unsignaled_completes Anywhere "ibv_post_send(3): errors complete whatever the flags";
    unsignaled_success_is_silent Anywhere "ibv_post_send(3): IBV_SEND_SIGNALED";
    all_signaled Anywhere "ibv_create_qp(3): sq_sig_all";
    flush_is_complete_and_in_order Anywhere "IBTA 10.3.1.5: all outstanding requests are flushed";
    flush_while_posting OneProcess "posting while the queue pair enters ERR";
    million_wraps Anywhere "slots come back with later signaled completions";
    no_stale_bytes_after_a_wrap Anywhere "each slot is written anew";
    completions_are_in_order_of_posting Anywhere "IBTA 10.8.5: send requests complete in order";
    poll_takes_no_more_than_asked Anywhere "ibv_poll_cq(3): num_entries";
    received_length_of_writes_with_immediate Anywhere "ibv_poll_cq(3): byte_len of IBV_WC_RECV_RDMA_WITH_IMM";
}

fn failed_unsignaled_completes(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let mut request = pair.request(Op::WRITE, 77, 0, 8).unsignaled();
    request.sges[0].lkey ^= 0x5A00;
    pair.near.send(&[pair.request(Op::WRITE, 76, 0, 8).unsignaled(), request])?;
    let wc = pair.near.one(Side::Send)?;
    same!((wc.wr_id, wc.status), (77, IBV_WC_LOC_PROT_ERR), "completion of the request that failed");
    pair.near.quiet(Side::Send, QUIET)
}

fn unsignaled_success_is_silent(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for op in [Op::WRITE, Op::READ, Op::FAA, Op::SEND] {
        if op == Op::SEND {
            pair.far_recv(1, 0, 64)?;
        }
        pair.near.send(&[pair.request(op, 1, 64, 8).unsignaled()])?;
        pair.succeed(pair.request(Op::WRITE, 2, 128, 8))?;
    }
    pair.near.quiet(Side::Send, QUIET)
}

fn all_signaled(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec { sig_all: true, ..Spec::rc() })?;
    for i in 0..8 {
        pair.near.send(&[pair.request(Op::WRITE, i, 0, 8).unsignaled()])?;
    }
    let ids: Vec<_> = pair.near.wait(Side::Send, 8)?.iter().map(|w| (w.wr_id, w.status)).collect();
    same!(ids, (0..8).map(|i| (i, IBV_WC_SUCCESS)).collect::<Vec<_>>(), "completions");
    Ok(())
}

/// A prefix of successes, then flushes, in the order of posting.
fn flushed(wcs: &[Wc], first: u64) -> Outcome {
    let mut gone = false;
    for (i, wc) in wcs.iter().enumerate() {
        same!(wc.wr_id, first + i as u64, "wr_id of completion {i}: {wcs:?}");
        match wc.status {
            IBV_WC_SUCCESS if !gone => {}
            IBV_WC_WR_FLUSH_ERR => {
                gone = true;
                same!(wc.vendor_err, 0, "vendor_err of a flush");
            }
            other => fail!("status {other} of completion {i}"),
        }
    }
    check!(gone, "nothing was flushed");
    Ok(())
}

fn flush_is_complete_and_in_order(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for i in 0..20 {
        pair.near.recv(100 + i, 0, 64)?;
    }
    // The peer is never ready, so that all of them wait.
    for i in 0..30 {
        let mut request = pair.request(Op::SEND, i, 0, 8);
        if i % 3 == 0 {
            request = request.unsignaled();
        }
        pair.near.send(&[request])?;
    }
    pair.near.qp().set_state(IBV_QPS_ERR)?;
    let sent = pair.near.wait(Side::Send, 30)?;
    flushed(&sent, 0)?;
    check!(sent.iter().all(|w| w.status == IBV_WC_WR_FLUSH_ERR), "{sent:?}");
    flushed(&pair.near.wait(Side::Recv, 20)?, 100)?;
    pair.near.quiet(Side::Send, QUIET)?;
    pair.near.quiet(Side::Recv, QUIET)?;
    pair.far.set_state(IBV_QPS_ERR)
}

fn flush_while_posting(env: &Env) -> Outcome {
    for round in 0..env.many(2000).min(50) {
        let pair = Pair::new(env, &Spec { send_wr: 512, cqe: 1024, ..Spec::rc() })?;
        let qp = pair.near.qp();
        let posted = std::thread::scope(|scope| {
            let poster = scope.spawn(|| {
                let mut n = 0;
                while n < 400 && qp.post_send(&[pair.request(Op::WRITE, n, 0, 8)]).is_ok() {
                    n += 1;
                }
                n
            });
            for _ in 0..round * 20 {
                std::hint::spin_loop();
            }
            let failed = qp.modify(&crate::verbs::Attr::state(IBV_QPS_ERR));
            (poster.join(), failed)
        });
        let (Ok(n), failed) = posted else {
            fail!("the posting thread panicked");
        };
        same!(failed, 0, "ibv_modify_qp");
        // Whatever was posted before or after, each completes once, in order.
        let wcs = pair.near.wait(Side::Send, n as usize)?;
        let mut gone = false;
        for (i, wc) in wcs.iter().enumerate() {
            same!(wc.wr_id, i as u64, "order of completions in round {round}");
            gone |= wc.status != IBV_WC_SUCCESS;
            let good = if gone { IBV_WC_WR_FLUSH_ERR } else { IBV_WC_SUCCESS };
            same!(wc.status, good, "status of completion {i} in round {round}");
        }
        same!(pair.near.peek(Side::Send)?, [], "completions beyond those posted");
    }
    Ok(())
}

fn million_wraps(env: &Env) -> Outcome {
    // One signaled in each queue's full depth: that is the longest time a slot is not reclaimed.
    let pair = Pair::new(env, &Spec { send_wr: 16, cqe: 16, ..Spec::rc() })?;
    let depth = u64::from(pair.near.qp().cap.max_send_wr);
    let rounds = env.many(1_000_000 / 16 * 16) / depth;
    let mut requests: Vec<_> =
        (0..depth).map(|i| pair.request(Op::WRITE, i, 0, 8).unsignaled()).collect();
    if let Some(last) = requests.last_mut() {
        last.flags |= IBV_SEND_SIGNALED;
    }
    let mut list = SendList::new(&requests);
    for round in 0..rounds {
        if let Err((errno, at)) = pair.near.qp().post_send_list(&mut list) {
            fail!("round {round} of {rounds}: errno {errno} at {at:?}");
        }
        let wc = pair.near.one(Side::Send)?;
        same!((wc.wr_id, wc.status), (depth - 1, IBV_WC_SUCCESS), "round {round}");
    }
    same!(pair.near.peek(Side::Send)?, [], "completions beyond those signaled");
    Ok(())
}

fn no_stale_bytes_after_a_wrap(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec { send_wr: 5, recv_wr: 5, ..Spec::rc() })?;
    let ops = [Op::SEND_IMM, Op::WRITE, Op::READ, Op::SEND, Op::WRITE_IMM, Op::FAA, Op::CAS];
    for i in 0..40_u64 {
        let op = ops[i as usize % ops.len()];
        if op.is_atomic() {
            pair.far.put(0, &i.to_ne_bytes())?;
            pair.succeed(pair.request(op, i, 0, 8))?;
            same!(pair.near.get(0, 8)?, i.to_ne_bytes(), "{} of request {i}", op.name);
            continue;
        }
        let len = [3, 700, 1, 64, 2000][i as usize % 5];
        super::data::transfer(&mut pair, op, i, &pattern(i, len))?;
    }
    Ok(())
}

fn completions_are_in_order_of_posting(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for round in 0..env.many(10_000).min(50) {
        let mut ids = Vec::new();
        for i in 0..28 {
            let op = Op::ALL[(i + round) as usize % 7];
            if op.recv.is_some() {
                pair.far_recv(i, 32 << 10, 4096)?;
            }
            let len = if i % 4 == 0 { 4096 } else { 8 };
            pair.near.send(&[pair.request(op, i, 64, len)])?;
            ids.push((i, op.wc, IBV_WC_SUCCESS));
        }
        let wcs = pair.near.wait(Side::Send, 28)?;
        let got: Vec<_> = wcs.iter().map(|w| (w.wr_id, w.opcode, w.status)).collect();
        same!(got, ids, "order of completions in round {round}");
        let receives = ids.iter().filter(|(i, ..)| Op::ALL[(i + round) as usize % 7].recv.is_some());
        pair.far.wait(Side::Recv, receives.count())?;
    }
    Ok(())
}

fn poll_takes_no_more_than_asked(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    for i in 0..10 {
        pair.near.send(&[pair.request(Op::WRITE, i, 0, 8)])?;
    }
    let end = std::time::Instant::now() + LONG;
    let mut ids = Vec::new();
    while ids.len() < 10 {
        same!(pair.near.cq(Side::Send).poll(0).map(|w| w.len()), Ok(0), "poll of none");
        match pair.near.cq(Side::Send).poll(3) {
            Ok(wcs) => {
                check!(wcs.len() <= 3, "{} completions, 3 were asked for", wcs.len());
                ids.extend(wcs.iter().map(|w| w.wr_id));
            }
            Err(code) => fail!("ibv_poll_cq returned {code}"),
        }
        check!(std::time::Instant::now() < end, "only {ids:?} within {LONG:?}");
    }
    same!(ids, (0..10).collect::<Vec<_>>(), "completions");
    Ok(())
}

fn received_length_of_writes_with_immediate(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for len in [0, 1, 1024, 5000] {
        // The receive's own buffer is not used.
        pair.far_recv(1, 0, 1)?;
        pair.succeed(pair.request(Op::WRITE_IMM, 1, 8192, len))?;
        let got = pair.far.one(Side::Recv)?;
        same!(
            (got.status, got.opcode, got.byte_len as usize),
            (IBV_WC_SUCCESS, IBV_WC_RECV_RDMA_WITH_IMM, len),
            "receive of a write of {len}"
        );
    }
    Ok(())
}
