//! Shared receive queues.

use std::sync::Arc;

use freeflow_abi::*;

use crate::suite::{End, Env, LONG, Op, Outcome, Pair, QUIET, Side, Spec, check, fail, same, skip, status_name, tests};
use crate::verbs::{Pd, Qp, Recv, Srq, errno, name_of, operation};

tests! { "srq";
    create_and_query OneProcess "ibv_create_srq(3), ibv_query_srq(3)";
    extended_creation OneProcess "ibv_create_srq_ex(3), ibv_get_srq_num(3)";
    limits OneProcess "ibv_create_srq(3): max_srq_wr, max_srq_sge; EINVAL";
    messages_take_from_it Anywhere "ibv_post_srq_recv(3)";
    shared_among_queue_pairs OneProcess "ibv_create_qp(3): srq; wc.qp_num tells the receiver";
    own_receives_are_refused OneProcess "ibv_post_recv(3): a queue pair of a shared queue has none of its own";
    full_and_bad_third OneProcess "ibv_post_srq_recv(3): ENOMEM, bad_recv_wr";
    not_ready_when_empty Anywhere "IBTA 9.7.5.2.8: RNR of an empty shared queue";
    limit_event_once_per_arming OneProcess "ibv_modify_srq(3): IBV_SRQ_LIMIT";
    limit_when_already_below OneProcess "ibv_modify_srq(3): fewer than the limit at arming";
    last_request_reached OneProcess "ibv_get_async_event(3): IBV_EVENT_QP_LAST_WQE_REACHED";
    error_does_not_flush_it OneProcess "IBTA 10.2.9.3: the shared queue outlives a queue pair's error";
    error_of_a_receive OneProcess "IBTA 10.2.9: LOC_LEN_ERR of a shared receive";
    busy_while_used OneProcess "ibv_destroy_srq(3): EBUSY";
    resize OneProcess "ibv_modify_srq(3): IBV_SRQ_MAX_WR";
    datagrams OneProcess "ibv_create_qp(3): srq of UD";
    unacknowledged_event_blocks_destroy OneProcess "ibv_destroy_srq(3), ibv_ack_async_event(3)";
}

/// Skips the test if the device has no shared receive queues.
pub(super) fn offered(env: &Env) -> Outcome<End> {
    let end = End::open(env, false, &Spec::rc())?;
    if end.ctx.attr.max_srq == 0 {
        skip!("device does not offer SRQ");
    }
    Ok(end)
}

fn made(pd: &Arc<Pd>, max_wr: u32) -> Outcome<Arc<Srq>> {
    match Srq::create(pd, max_wr, 1) {
        Ok(srq) => Ok(srq),
        Err(errno) => fail!("ibv_create_srq: {}", name_of(errno)),
    }
}

fn spec() -> Spec {
    Spec { srq: 64, ..Spec::rc() }
}

fn srq(end: &End) -> Outcome<&Srq> {
    match end.srq.as_deref() {
        Some(srq) => Ok(srq),
        None => fail!("no shared queue"),
    }
}

fn create_and_query(env: &Env) -> Outcome {
    let end = offered(env)?;
    let srq = made(&end.pd, 100)?;
    check!(srq.granted.max_wr >= 100 && srq.granted.max_sge >= 1, "granted {:?}", srq.granted);
    let got = srq.query()?;
    same!((got.max_wr, got.srq_limit), (srq.granted.max_wr, 0), "max_wr and srq_limit");
    same!(srq.modify(None, Some(10)), 0, "ibv_modify_srq");
    same!(srq.query()?.srq_limit, 10, "srq_limit");
    Ok(())
}

fn extended_creation(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let Some(create) = operation!(end.ctx.ptr, create_srq_ex) else {
        skip!("device does not offer ibv_create_srq_ex");
    };
    let make = |kind: u32, mask: u32| {
        // SAFETY: numbers and null pointers.
        let mut init: ibv_srq_init_attr_ex = unsafe { core::mem::zeroed() };
        init.attr = ibv_srq_attr { max_wr: 8, max_sge: 1, srq_limit: 0 };
        init.comp_mask = mask;
        init.srq_type = kind;
        init.pd = end.pd.ptr;
        // SAFETY: the library's own operation on live objects.
        unsafe { create(end.ctx.ptr, &mut init) }
    };
    // What a type needs must be named and be there; what is unknown is refused.
    let known = IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD;
    for (what, kind, mask) in [
        ("XRC without a domain and a completion queue", IBV_SRQT_XRC, known),
        ("unknown attributes", IBV_SRQT_BASIC, known | 1 << 30),
        ("an unknown type", 77, known),
    ] {
        let made = make(kind, mask);
        check!(made.is_null(), "{what}: a queue was created");
        let got = errno();
        check!(matches!(got, libc::EINVAL | libc::EOPNOTSUPP), "{what}: {}", name_of(got));
    }
    // A plain queue has no number of XRC's.
    let plain = match Srq::create(&end.pd, 8, 1) {
        Ok(srq) => srq,
        Err(errno) => fail!("ibv_create_srq: {}", name_of(errno)),
    };
    let Some(number_of) = operation!(end.ctx.ptr, get_srq_num) else {
        return Ok(());
    };
    let mut number = 0;
    // SAFETY: the library's own operation on its live queue.
    let got = unsafe { number_of(plain.ptr, &mut number) };
    check!(got != 0, "a plain queue has the number {number}");
    Ok(())
}

fn limits(env: &Env) -> Outcome {
    let end = offered(env)?;
    let attr = &end.ctx.attr;
    for (wr, sge) in [(attr.max_srq_wr as u32 + 1, 1), (16, attr.max_srq_sge as u32 + 1)] {
        let got = Srq::create(&end.pd, wr, sge);
        same!(got.err(), Some(libc::EINVAL), "errno for {wr} requests of {sge} elements");
    }
    let srq = made(&end.pd, 16)?;
    let got = srq.modify(None, Some(srq.query()?.max_wr + 1));
    check!(got > 0, "a limit beyond max_wr was taken");
    Ok(())
}

fn messages_take_from_it(env: &Env) -> Outcome {
    offered(env)?;
    let mut pair = Pair::new(env, &spec())?;
    for i in 0..20 {
        pair.far_recv(100 + i, 0, 64)?;
    }
    for i in 0..20 {
        pair.near.put(0, &[i as u8; 16])?;
        pair.succeed(pair.request(Op::SEND, i, 0, 16))?;
        let got = pair.far.one(Side::Recv)?;
        same!((got.status, got.byte_len, got.qp_num), (0, 16, pair.to.qpn), "receive {i}");
        same!(pair.far.get(0, 16)?, [i as u8; 16], "data of message {i}");
    }
    Ok(())
}

fn shared_among_queue_pairs(env: &Env) -> Outcome {
    offered(env)?;
    let mut pairs = Vec::new();
    let first = Pair::new(env, &spec())?;
    let far = first.far.here()?;
    let queue = far.srq.clone();
    // Two more queue pairs take from the first one's queue.
    let mut more = Vec::new();
    for _ in 0..2 {
        let near = End::open(env, false, &Spec::rc())?;
        let qp = Qp::new(&far.pd, &far.send_cq, &far.recv_cq, &Spec::rc().qp(queue.clone()))?;
        let mut to = far.addr();
        to.qpn = qp.number();
        qp.must_modify(&far.to_init())?;
        qp.must_modify(&far.to_rtr(&near.addr()))?;
        qp.must_modify(&far.to_rts())?;
        near.connect(&to)?;
        more.push(qp);
        pairs.push((near, to));
    }
    for i in 0..30 {
        far.recv(i, 0, 64)?;
    }
    let mut seen = Vec::new();
    for i in 0..30 {
        let (near, qpn) = match i % 3 {
            0 => (&first.near, first.to.qpn),
            k => (&pairs[k - 1].0, pairs[k - 1].1.qpn),
        };
        near.send(&[Op::SEND.request(i as u64, 0, 0).sge(near.sge(0, 8))])?;
        same!(near.one(Side::Send)?.status, IBV_WC_SUCCESS, "send {i}");
        let got = far.one(Side::Recv)?;
        same!((got.status, got.qp_num), (IBV_WC_SUCCESS, qpn), "receive {i}");
        seen.push(got.wr_id);
    }
    seen.sort_unstable();
    same!(seen, (0..30).collect::<Vec<_>>(), "receives, each once");
    drop(more);
    Ok(())
}

fn own_receives_are_refused(env: &Env) -> Outcome {
    offered(env)?;
    let pair = Pair::new(env, &spec())?;
    let got = pair.near.qp().post_recv(&[Recv::new(1).sge(pair.near.sge(0, 8))]);
    check!(matches!(got, Err((e, Some(0))) if e > 0), "expected an error, got {got:?}");
    Ok(())
}

fn full_and_bad_third(env: &Env) -> Outcome {
    let end = offered(env)?;
    let srq = made(&end.pd, 16)?;
    let good = |i| Recv::new(i).sge(end.sge(0, 8));
    let mut bad = good(3);
    bad.sges = vec![end.sge(0, 1); srq.granted.max_sge as usize + 1];
    let got = srq.post_recv(&[good(1), good(2), bad, good(4)]);
    check!(matches!(got, Err((e, Some(2))) if e > 0), "bad third: {got:?}");
    for i in 2..u64::from(srq.granted.max_wr) {
        srq.recv(&[good(i)])?;
    }
    same!(srq.post_recv(&[good(99)]), Err((libc::ENOMEM, Some(0))), "a full queue");
    Ok(())
}

fn not_ready_when_empty(env: &Env) -> Outcome {
    offered(env)?;
    let pair = Pair::new(env, &Spec { rnr_retry: 0, ..spec() })?;
    pair.refuse("empty", pair.request(Op::SEND, 1, 0, 8), IBV_WC_RNR_RETRY_EXC_ERR)?;
    let mut pair = Pair::new(env, &spec())?;
    pair.near.send(&[pair.request(Op::SEND, 1, 0, 8)])?;
    pair.near.quiet(Side::Send, QUIET)?;
    pair.far_recv(1, 0, 64)?;
    same!(pair.near.one(Side::Send)?.status, IBV_WC_SUCCESS, "status");
    Ok(())
}

fn limit_event_once_per_arming(env: &Env) -> Outcome {
    offered(env)?;
    let pair = Pair::new(env, &spec())?;
    let far = pair.far.here()?;
    let queue = srq(far)?;
    let take = |n: u64| -> Outcome {
        for i in 0..n {
            pair.succeed(pair.request(Op::SEND, i, 0, 8))?;
            far.one(Side::Recv)?;
        }
        Ok(())
    };
    let give = |n: u64| (0..n).try_for_each(|i| far.recv(i, 0, 64));
    give(20)?;
    same!(queue.modify(None, Some(10)), 0, "arming");
    take(10)?;
    same!(far.ctx.event(QUIET), None, "event with as many left as the limit");
    take(1)?;
    let event = far.ctx.event(LONG);
    same!(event.map(|e| e.kind), Some(IBV_EVENT_SRQ_LIMIT_REACHED), "event below the limit");
    same!(event.map(|e| e.object), Some(queue.ptr as usize), "queue of the event");
    same!(queue.query()?.srq_limit, 0, "srq_limit after the event");
    // Up and down again without arming.
    give(10)?;
    take(12)?;
    same!(far.ctx.event(QUIET), None, "event without arming again");
    give(10)?;
    same!(queue.modify(None, Some(10)), 0, "arming again");
    take(9)?;
    same!(far.ctx.event(LONG).map(|e| e.kind), Some(IBV_EVENT_SRQ_LIMIT_REACHED), "second event");
    Ok(())
}

fn limit_when_already_below(env: &Env) -> Outcome {
    let end = offered(env)?;
    let srq = made(&end.pd, 32)?;
    srq.recv(&[Recv::new(1).sge(end.sge(0, 8))])?;
    same!(srq.modify(None, Some(5)), 0, "arming");
    // At once or with the next message that takes one: not lost is all that is asked.
    let event = end.ctx.event(QUIET).map(|e| e.kind);
    check!(matches!(event, None | Some(IBV_EVENT_SRQ_LIMIT_REACHED)), "event {event:?}");
    Ok(())
}

fn last_request_reached(env: &Env) -> Outcome {
    offered(env)?;
    let pair = Pair::new(env, &spec())?;
    let far = pair.far.here()?;
    far.recv(1, 0, 64)?;
    pair.succeed(pair.request(Op::SEND, 1, 0, 8))?;
    far.one(Side::Recv)?;
    far.qp().set_state(IBV_QPS_ERR)?;
    let event = far.ctx.event(LONG);
    same!(event.map(|e| e.kind), Some(IBV_EVENT_QP_LAST_WQE_REACHED), "event");
    same!(event.map(|e| e.object), Some(far.qp().ptr as usize), "queue pair of the event");
    same!(far.ctx.event(QUIET), None, "a second event");
    Ok(())
}

fn error_does_not_flush_it(env: &Env) -> Outcome {
    offered(env)?;
    let pair = Pair::new(env, &spec())?;
    let far = pair.far.here()?;
    for i in 0..5 {
        far.recv(i, 0, 64)?;
    }
    far.qp().set_state(IBV_QPS_ERR)?;
    far.quiet(Side::Recv, QUIET)?;
    // Another queue pair takes them.
    let near = End::open(env, false, &Spec::rc())?;
    let qp = Qp::new(&far.pd, &far.send_cq, &far.recv_cq, &Spec::rc().qp(far.srq.clone()))?;
    let mut to = far.addr();
    to.qpn = qp.number();
    qp.must_modify(&far.to_init())?;
    qp.must_modify(&far.to_rtr(&near.addr()))?;
    near.connect(&to)?;
    for i in 0..5 {
        near.send(&[Op::SEND.request(i, 0, 0).sge(near.sge(0, 8))])?;
        near.one(Side::Send)?;
        let got = far.one(Side::Recv)?;
        same!((got.wr_id, got.status), (i, IBV_WC_SUCCESS), "receive of another queue pair");
    }
    Ok(())
}

fn error_of_a_receive(env: &Env) -> Outcome {
    offered(env)?;
    let pair = Pair::new(env, &spec())?;
    let far = pair.far.here()?;
    far.recv(7, 0, 4)?;
    pair.refuse("too short", pair.request(Op::SEND, 1, 0, 8), IBV_WC_REM_INV_REQ_ERR)?;
    let got = far.one(Side::Recv)?;
    same!(
        (got.wr_id, status_name(got.status)),
        (7, status_name(IBV_WC_LOC_LEN_ERR)),
        "the receive"
    );
    Ok(())
}

fn busy_while_used(env: &Env) -> Outcome {
    offered(env)?;
    let mut pair = Pair::new(env, &spec())?;
    same!(srq(&pair.near)?.destroy_now(), libc::EBUSY, "ibv_destroy_srq with a queue pair");
    pair.ping(1)
}

fn resize(env: &Env) -> Outcome {
    let end = offered(env)?;
    if end.ctx.attr.device_cap_flags & IBV_DEVICE_SRQ_RESIZE == 0 {
        skip!("device does not offer resizing of SRQ");
    }
    let srq = made(&end.pd, 16)?;
    for i in 0..10 {
        srq.recv(&[Recv::new(i).sge(end.sge(0, 8))])?;
    }
    same!(srq.modify(Some(200), None), 0, "growing");
    let now = srq.query()?.max_wr;
    check!(now >= 200, "max_wr {now} after growing to 200");
    for i in 10..200 {
        srq.recv(&[Recv::new(i).sge(end.sge(0, 8))])?;
    }
    check!(srq.modify(Some(16), None) > 0, "shrinking below what is posted");
    Ok(())
}

fn datagrams(env: &Env) -> Outcome {
    offered(env)?;
    let mut pair = Pair::new(env, &Spec { srq: 16, ..Spec::ud() })?;
    let ah = pair.near.ah(&pair.to)?;
    pair.far_recv(3, 0, 100)?;
    let target = crate::verbs::Target::Ud(ah.ptr as usize, pair.to.qpn, crate::suite::QKEY);
    pair.succeed(pair.request(Op::SEND, 1, 0, 20).to(target))?;
    let got = pair.far.one(Side::Recv)?;
    same!((got.wr_id, got.byte_len), (3, 60), "receive");
    Ok(())
}

fn unacknowledged_event_blocks_destroy(env: &Env) -> Outcome {
    let end = offered(env)?;
    let pair = Pair::new(env, &spec())?;
    let far = pair.far.here()?;
    far.recv(1, 0, 64)?;
    far.recv(2, 0, 64)?;
    same!(srq(far)?.modify(None, Some(2)), 0, "arming");
    pair.succeed(pair.request(Op::SEND, 1, 0, 8))?;
    let Some(mut event) = far.ctx.raw_event(LONG) else {
        fail!("no event");
    };
    same!(event.event_type, IBV_EVENT_SRQ_LIMIT_REACHED, "event");
    drop(end);
    let mut pair = pair;
    let far = pair.far.here_mut()?;
    far.qp = None;
    let Some(queue) = far.srq.take() else {
        fail!("no shared queue");
    };
    super::events::blocks(
        || queue.destroy_now(),
        || crate::verbs::verb!(ibv_ack_async_event(&mut event)),
    )?;
    // It is destroyed: the wrapper must not do it again; its domain goes with the process.
    std::mem::forget(queue);
    std::mem::forget(pair);
    Ok(())
}
