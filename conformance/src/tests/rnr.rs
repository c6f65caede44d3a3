//! Receivers that are not ready, and peers that are gone.

use std::time::{Duration, Instant};

use freeflow_abi::*;

use crate::suite::{Env, LONG, Op, Outcome, Pair, Side, Spec, check, same, tests};

tests! { "rnr";
    no_retry Anywhere "ibv_modify_qp(3): rnr_retry 0";
    counted_retries Anywhere "IBTA 9.7.5.2.8: rnr_retry n waits n timers";
    for_ever Anywhere "ibv_modify_qp(3): rnr_retry 7 retries for ever";
    only_what_needs_a_receive Anywhere "IBTA 9.7.5.2.8: writes and reads need no receive";
    write_with_immediate_needs_a_receive Anywhere "IBTA 9.7.5.2.8";
    is_no_timeout Anywhere "a peer that is not ready is not gone";
    peer_is_gone Anywhere "ibv_poll_cq(3): IBV_WC_RETRY_EXC_ERR";
    peer_is_in_error Anywhere "IBTA 9.9.2.1.2: a queue pair in ERR does not answer";
    unreliable_loses_in_silence Anywhere "IBTA 9.8.2.2: no receive, no error";
}

/// 10.24 ms, as a code.
const TIMER: u8 = 20;

fn no_retry(env: &Env) -> Outcome {
    for op in [Op::SEND, Op::SEND_IMM, Op::WRITE_IMM] {
        let spec = Spec { rnr_retry: 0, ..Spec::rc() };
        let pair = Pair::new(env, &spec)?;
        pair.refuse(op.name, pair.request(op, 1, 0, 8), IBV_WC_RNR_RETRY_EXC_ERR)?;
        same!(pair.near.state()?, IBV_QPS_ERR, "state of the requester");
    }
    Ok(())
}

fn counted_retries(env: &Env) -> Outcome {
    for retries in [1, 3, 6] {
        let spec = Spec { rnr_retry: retries, rnr_timer: TIMER, ..Spec::rc() };
        let pair = Pair::new(env, &spec)?;
        let start = Instant::now();
        pair.refuse("not ready", pair.request(Op::SEND, 1, 0, 8), IBV_WC_RNR_RETRY_EXC_ERR)?;
        let least = Duration::from_micros(10_240) * u32::from(retries);
        check!(start.elapsed() >= least, "{retries} retries took {:?}, at least {least:?} were asked", start.elapsed());
    }
    // A receive that comes before the retries end is used.
    let spec = Spec { rnr_retry: 6, rnr_timer: 27, ..Spec::rc() };
    let mut pair = Pair::new(env, &spec)?;
    pair.near.send(&[pair.request(Op::SEND, 1, 0, 8)])?;
    pair.far_recv(1, 0, 64)?;
    same!(pair.near.one(Side::Send)?.status, IBV_WC_SUCCESS, "status");
    Ok(())
}

fn for_ever(env: &Env) -> Outcome {
    let spec = Spec { rnr_retry: 7, rnr_timer: 1, timeout: 12, retry: 1, ..Spec::rc() };
    let mut pair = Pair::new(env, &spec)?;
    pair.near.send(&[pair.request(Op::SEND, 1, 0, 8)])?;
    // Many times what retry_cnt and the timer would allow.
    pair.near.quiet(Side::Send, Duration::from_millis(500))?;
    pair.far_recv(1, 0, 64)?;
    same!(pair.near.one(Side::Send)?.status, IBV_WC_SUCCESS, "status");
    pair.far.one(Side::Recv)?;
    pair.ping(2)
}

fn only_what_needs_a_receive(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec { rnr_retry: 0, ..Spec::rc() })?;
    for op in [Op::WRITE, Op::READ, Op::CAS, Op::FAA] {
        pair.succeed(pair.request(op, 1, 0, 8))?;
    }
    Ok(())
}

fn write_with_immediate_needs_a_receive(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    pair.near.put(0, &[9; 8])?;
    let request = Op::WRITE_IMM.request(1, pair.to.base + 512, pair.to.rkey).sge(pair.near.sge(0, 8));
    pair.near.send(&[request])?;
    pair.near.quiet(Side::Send, crate::suite::QUIET)?;
    pair.far_recv(1, 0, 64)?;
    same!(pair.near.one(Side::Send)?.status, IBV_WC_SUCCESS, "status");
    same!(pair.far.one(Side::Recv)?.opcode, IBV_WC_RECV_RDMA_WITH_IMM, "opcode");
    same!(pair.far.get(512, 8)?, [9; 8], "data");
    Ok(())
}

fn is_no_timeout(env: &Env) -> Outcome {
    // The timer of "not ready" is longer than all timeouts together.
    let spec = Spec { rnr_retry: 7, rnr_timer: 28, timeout: 8, retry: 1, ..Spec::rc() };
    let mut pair = Pair::new(env, &spec)?;
    pair.near.send(&[pair.request(Op::SEND, 1, 0, 8)])?;
    pair.near.quiet(Side::Send, Duration::from_millis(400))?;
    pair.far_recv(1, 0, 64)?;
    same!(pair.near.one(Side::Send)?.status, IBV_WC_SUCCESS, "status");
    Ok(())
}

fn peer_is_gone(env: &Env) -> Outcome {
    for op in Op::ALL {
        let spec = Spec { timeout: 12, retry: 2, ..Spec::rc() };
        let mut pair = Pair::new(env, &spec)?;
        pair.far.destroy()?;
        let start = Instant::now();
        pair.refuse(op.name, pair.request(op, 1, 0, 8), IBV_WC_RETRY_EXC_ERR)?;
        // 4.096 us * 2^12, once and two retries.
        let least = Duration::from_micros(16_777) * 3;
        check!(start.elapsed() >= least, "{}: {:?}, at least {least:?} were asked", op.name, start.elapsed());
    }
    Ok(())
}

fn peer_is_in_error(env: &Env) -> Outcome {
    let spec = Spec { timeout: 12, retry: 1, ..Spec::rc() };
    let mut pair = Pair::new(env, &spec)?;
    pair.far_recv(1, 0, 64)?;
    pair.far.set_state(IBV_QPS_ERR)?;
    pair.refuse("peer in ERR", pair.request(Op::SEND, 1, 0, 8), IBV_WC_RETRY_EXC_ERR)?;
    let got = pair.far.one(Side::Recv)?;
    same!(got.status, IBV_WC_WR_FLUSH_ERR, "the peer's receive");
    Ok(())
}

fn unreliable_loses_in_silence(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::uc())?;
    pair.succeed(pair.request(Op::SEND, 1, 0, 8))?;
    pair.succeed(pair.request(Op::WRITE_IMM, 2, 0, 8))?;
    // They are sent, which is not to say that they have arrived: what was sent after them tells.
    let mark = [0x5A; 8];
    pair.near.put(128, &mark)?;
    pair.succeed(pair.request(Op::WRITE, 3, 128, 8))?;
    let end = Instant::now() + LONG;
    while pair.far.get(128, 8)? != mark {
        check!(Instant::now() < end, "the WRITE after them does not arrive");
    }
    pair.far_recv(7, 0, 64)?;
    pair.succeed(pair.request(Op::SEND, 4, 0, 13))?;
    let got = pair.far.one(Side::Recv)?;
    same!((got.wr_id, got.byte_len), (7, 13), "the message that had a receive");
    Ok(())
}
