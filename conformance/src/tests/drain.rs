//! The send queue's drained state.

use freeflow_abi::*;

use crate::suite::{Env, LONG, Op, Outcome, Pair, QUIET, Side, Spec, same, tests};
use crate::verbs::Attr;

tests! { "drain";
    drains_and_tells_once Anywhere "IBTA 10.3.1.5: SQD, IBV_EVENT_SQ_DRAINED";
    work_posted_while_drained_waits Anywhere "IBTA 10.3.1.5: posted in SQD, executed in RTS";
    no_event_unless_asked Anywhere "ibv_modify_qp(3): en_sqd_async_notify";
    attributes_change_while_drained Anywhere "ibv_modify_qp(3): SQD to SQD";
}

fn drain() -> Attr {
    Attr::state(IBV_QPS_SQD).with(IBV_QP_EN_SQD_ASYNC_NOTIFY, |a| a.en_sqd_async_notify = 1)
}

fn drains_and_tells_once(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    // The first is on its way: the peer is not ready for it yet.
    for i in 0..8 {
        pair.near.send(&[pair.request(Op::SEND, i, 0, 8)])?;
    }
    pair.near.qp().must_modify(&drain())?;
    for i in 0..8 {
        pair.far_recv(i, 0, 64)?;
    }
    let event = pair.near.ctx.event(LONG);
    let Some(event) = event else {
        crate::suite::fail!("no IBV_EVENT_SQ_DRAINED within {LONG:?}");
    };
    same!(event.kind, IBV_EVENT_SQ_DRAINED, "event");
    same!(event.object, pair.near.qp().ptr as usize, "queue pair of the event");
    let attr = pair.near.qp().query()?;
    same!((attr.qp_state, attr.sq_draining), (IBV_QPS_SQD, 0), "state when it is drained");
    // Some of them may wait; in RTS all are done, each once.
    pair.near.qp().set_state(IBV_QPS_RTS)?;
    let ids: Vec<_> = pair.near.wait(Side::Send, 8)?.iter().map(|w| (w.wr_id, w.status)).collect();
    same!(ids, (0..8).map(|i| (i, 0)).collect::<Vec<_>>(), "completions");
    pair.far.wait(Side::Recv, 8)?;
    same!(pair.near.ctx.event(QUIET), None, "a second event");
    Ok(())
}

fn work_posted_while_drained_waits(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    pair.ping(1)?;
    pair.near.qp().must_modify(&drain())?;
    same!(pair.near.ctx.event(LONG).map(|e| e.kind), Some(IBV_EVENT_SQ_DRAINED), "event");
    pair.far_recv(5, 0, 64)?;
    pair.near.send(&[pair.request(Op::SEND, 5, 0, 8)])?;
    pair.near.quiet(Side::Send, QUIET)?;
    same!(pair.far.peek(Side::Recv)?, [], "messages sent while drained");
    // It still receives.
    pair.near.recv(6, 0, 64)?;
    let to = pair.near.addr();
    let sge = crate::verbs::Sge { addr: pair.to.base, length: 8, lkey: pair.to.lkey };
    pair.far.post_send(vec![Op::SEND.request(6, to.base, to.rkey).sge(sge)])?;
    same!(pair.near.one(Side::Recv)?.wr_id, 6, "receive while drained");
    pair.near.qp().set_state(IBV_QPS_RTS)?;
    same!(pair.near.one(Side::Send)?.wr_id, 5, "completion after RTS");
    same!(pair.far.one(Side::Recv)?.wr_id, 5, "receive after RTS");
    Ok(())
}

fn no_event_unless_asked(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    pair.near.qp().set_state(IBV_QPS_SQD)?;
    same!(pair.near.ctx.event(QUIET), None, "an event that was not asked for");
    pair.near.qp().set_state(IBV_QPS_RTS)?;
    pair.ping(1)
}

fn attributes_change_while_drained(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    pair.near.qp().must_modify(&drain())?;
    same!(pair.near.ctx.event(LONG).map(|e| e.kind), Some(IBV_EVENT_SQ_DRAINED), "event");
    let attr = Attr::state(IBV_QPS_SQD)
        .with(IBV_QP_TIMEOUT, |a| a.timeout = 19)
        .with(IBV_QP_RNR_RETRY, |a| a.rnr_retry = 2);
    pair.near.qp().must_modify(&attr)?;
    let got = pair.near.qp().query()?;
    same!((got.timeout, got.rnr_retry), (19, 2), "timeout and rnr_retry");
    pair.near.qp().set_state(IBV_QPS_RTS)?;
    pair.ping(1)
}
