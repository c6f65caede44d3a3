//! The order of operations, and what is seen when a completion is.

use std::time::Instant;

use freeflow_abi::*;

use crate::suite::{Env, LONG, Op, Outcome, Pair, Side, Spec, check, fail, same, tests};
use crate::verbs::pattern;

tests! { "order";
    fence_waits_for_reads Anywhere "ibv_post_send(3): IBV_SEND_FENCE";
    write_before_send Anywhere "IBTA 9.5: a message is seen after the writes before it";
    data_before_completion Anywhere "IBTA 10.8.5: a completion is seen after its data";
    read_after_write Anywhere "IBTA table 79: a read sees the writes before it";
    flag_is_written_last OneProcess "a polled flag, written after the data by the same queue pair";
    many_outstanding_reads Anywhere "IBTA 9.4.4: more reads than max_rd_atomic wait for their turn";
}

fn fence_waits_for_reads(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for round in 0..env.many(20_000).min(200) {
        let bytes = pattern(round, 4096);
        pair.far.put(0, &bytes)?;
        pair.near.put(0, &[0; 4096])?;
        pair.far_recv(round, 8192, 4096)?;
        // Reads into the buffer, then sends that buffer.
        let read = pair.request(Op::READ, 1, 0, 4096).unsignaled();
        let send = pair.request(Op::SEND, 2, 0, 4096).flags(IBV_SEND_FENCE);
        pair.near.send(&[read, send])?;
        let wc = pair.near.one(Side::Send)?;
        same!((wc.wr_id, wc.status), (2, IBV_WC_SUCCESS), "completion");
        pair.far.one(Side::Recv)?;
        same!(pair.far.get(8192, 4096)?, bytes, "what came back in round {round}");
        // The same of an atomic.
        pair.far.put(0, &round.to_ne_bytes())?;
        pair.far_recv(round, 8192, 64)?;
        let add = pair.request(Op::FAA, 3, 0, 8).unsignaled();
        let send = pair.request(Op::SEND, 4, 0, 8).flags(IBV_SEND_FENCE);
        pair.near.send(&[add, send])?;
        pair.near.one(Side::Send)?;
        pair.far.one(Side::Recv)?;
        same!(pair.far.get(8192, 8)?, round.to_ne_bytes(), "the word in round {round}");
    }
    Ok(())
}

fn write_before_send(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for round in 0..env.many(20_000).min(500) {
        let bytes = pattern(round, 5000);
        pair.near.put(0, &bytes)?;
        pair.far_recv(round, 60 << 10, 64)?;
        let write = Op::WRITE
            .request(1, pair.to.base + 16384, pair.to.rkey)
            .sge(pair.near.sge(0, 5000))
            .unsignaled();
        pair.near.send(&[write, pair.request(Op::SEND, 2, 0, 0)])?;
        pair.far.one(Side::Recv)?;
        same!(pair.far.get(16384, 5000)?, bytes, "the write before message {round}");
        pair.near.one(Side::Send)?;
    }
    Ok(())
}

fn data_before_completion(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for round in 0..env.many(20_000).min(500) {
        let op = [Op::SEND, Op::WRITE_IMM, Op::READ][round as usize % 3];
        super::data::transfer(&mut pair, op, round, &pattern(round, 3000))?;
    }
    Ok(())
}

fn read_after_write(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    for round in 0..env.many(20_000).min(500) {
        let bytes = pattern(round, 2500);
        pair.near.put(0, &bytes)?;
        let back = Op::READ.request(2, pair.to.base, pair.to.rkey).sge(pair.near.sge(32 << 10, 2500));
        pair.near.send(&[pair.request(Op::WRITE, 1, 0, 2500).unsignaled(), back])?;
        same!(pair.near.one(Side::Send)?.status, IBV_WC_SUCCESS, "status");
        same!(pair.near.get(32 << 10, 2500)?, bytes, "what was read in round {round}");
    }
    Ok(())
}

fn flag_is_written_last(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let there = pair.far.here()?.mr().buf.clone();
    for round in 1..env.many(20_000).min(2000) {
        let bytes = pattern(round, 1800);
        pair.near.put(0, &bytes)?;
        pair.near.mr().buf.store(4096, round)?;
        let flag = Op::WRITE.request(2, pair.to.base + 8192, pair.to.rkey).sge(pair.near.sge(4096, 8));
        pair.near.send(&[pair.request(Op::WRITE, 1, 0, 1800).unsignaled(), flag])?;
        let end = Instant::now() + LONG;
        while there.load(8192)? != round {
            check!(Instant::now() < end, "flag {round} never came");
            std::thread::yield_now();
        }
        same!(there.get(0, 1800)?, bytes, "data behind flag {round}");
        pair.near.one(Side::Send)?;
    }
    Ok(())
}

fn many_outstanding_reads(env: &Env) -> Outcome {
    let near = Spec { rd_atomic: 2, ..Spec::rc() };
    let mut pair = Pair::with(env, &near, &near)?;
    let bytes = pattern(8, 32 * 1000);
    pair.far.put(0, &bytes)?;
    for i in 0..32_usize {
        let one = Op::READ
            .request(i as u64, pair.to.base + 1000 * i as u64, pair.to.rkey)
            .sge(pair.near.sge(32_000 + 900 * i, 900));
        pair.near.send(&[one])?;
    }
    for (i, wc) in pair.near.wait(Side::Send, 32)?.iter().enumerate() {
        same!((wc.wr_id, wc.status), (i as u64, IBV_WC_SUCCESS), "completion {i}");
        let got = pair.near.get(32_000 + 900 * i, 900)?;
        if got != bytes[1000 * i..1000 * i + 900] {
            fail!("read {i} has other data");
        }
    }
    Ok(())
}
