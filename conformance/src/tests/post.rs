//! Posting: what is refused at once, and what is executed all the same.

use freeflow_abi::*;

use crate::suite::{Env, Op, Outcome, Pair, QUIET, Side, Spec, check, same, tests};
use crate::verbs::{Recv, Send};

tests! { "post";
    bad_third_send Anywhere "ibv_post_send(3): bad_wr, positive errno";
    bad_third_receive Anywhere "ibv_post_recv(3): bad_wr, positive errno";
    send_queue_is_as_deep_as_granted Anywhere "ibv_create_qp(3): max_send_wr; ibv_post_send(3): ENOMEM";
    receive_queue_is_as_deep_as_granted Anywhere "ibv_create_qp(3): max_recv_wr; ibv_post_recv(3): ENOMEM";
    receives_by_state OneProcess "IBTA 10.3.1: refused in RESET, taken in INIT";
    sends_by_state OneProcess "IBTA 10.3.1: refused before RTS";
    sends_in_error_are_flushed OneProcess "IBTA 10.3.1.5: flushed in ERR";
    unknown_opcode OneProcess "ibv_post_send(3): EINVAL";
    operations_of_other_services OneProcess "ibv_post_send(3): table of opcodes and services";
    one_element_too_many OneProcess "ibv_create_qp(3): max_send_sge, max_recv_sge";
    capacities_are_at_least_what_was_asked OneProcess "ibv_create_qp(3): cap is updated";
}

fn bad_third_send(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for i in 0..4 {
        pair.far_recv(i, 64 * i as usize, 64)?;
    }
    let good = |i| pair.request(Op::SEND, i, 0, 16);
    let mut bad = good(3);
    bad.sges = vec![bad.sges[0]; pair.near.qp().cap.max_send_sge as usize + 1];
    match pair.near.qp().post_send(&[good(1), good(2), bad, good(4)]) {
        Ok(()) => crate::suite::fail!("the third request has too many elements, but was taken"),
        Err((errno, at)) => {
            check!(errno > 0, "errno {errno} is not positive");
            same!(at, Some(2), "place of bad_wr");
        }
    }
    let ids: Vec<_> = pair.near.wait(Side::Send, 2)?.iter().map(|w| (w.wr_id, w.status)).collect();
    same!(ids, [(1, 0), (2, 0)], "completions of those before it");
    // A later request follows them at once: the fourth was not posted.
    pair.succeed(pair.request(Op::SEND, 9, 0, 16))?;
    same!(pair.far.wait(Side::Recv, 3)?.len(), 3, "messages that arrived");
    pair.near.quiet(Side::Send, QUIET)
}

fn bad_third_receive(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let good = |i: u64| Recv::new(i).sge(pair.near.sge(64 * i as usize, 64));
    let mut bad = good(3);
    bad.sges = vec![bad.sges[0]; pair.near.qp().cap.max_recv_sge as usize + 1];
    match pair.near.qp().post_recv(&[good(1), good(2), bad, good(4)]) {
        Ok(()) => crate::suite::fail!("the third request has too many elements, but was taken"),
        Err((errno, at)) => {
            check!(errno > 0, "errno {errno} is not positive");
            same!(at, Some(2), "place of bad_wr");
        }
    }
    pair.near.recv(9, 0, 64)?;
    let to = pair.near.addr();
    let sge = crate::verbs::Sge { addr: pair.to.base, length: 8, lkey: pair.to.lkey };
    for i in 0..3 {
        pair.far.post_send(vec![Op::SEND.request(i, to.base, to.rkey).sge(sge)])?;
    }
    let ids: Vec<_> = pair.near.wait(Side::Recv, 3)?.iter().map(|w| w.wr_id).collect();
    same!(ids, [1, 2, 9], "receives that were posted");
    Ok(())
}

fn send_queue_is_as_deep_as_granted(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec { send_wr: 16, recv_wr: 512, cqe: 1024, ..Spec::rc() })?;
    let depth = u64::from(pair.near.qp().cap.max_send_wr);
    check!(depth >= 16, "max_send_wr {depth}");
    // The peer has no receive: nothing completes.
    for i in 0..depth {
        let one = pair.request(Op::SEND, i, 0, 8);
        crate::verbs::posted("a request within max_send_wr", pair.near.qp().post_send(&[one]))?;
    }
    match pair.near.qp().post_send(&[pair.request(Op::SEND, depth, 0, 8)]) {
        Ok(()) => crate::suite::fail!("request {} of a queue of {depth} was taken", depth + 1),
        Err((errno, at)) => same!((errno, at), (libc::ENOMEM, Some(0)), "errno of a full queue"),
    }
    for i in 0..depth {
        pair.far_recv(i, 0, 8)?;
    }
    let ids: Vec<_> = pair.near.wait(Side::Send, depth as usize)?.iter().map(|w| w.wr_id).collect();
    same!(ids, (0..depth).collect::<Vec<_>>(), "completions");
    pair.far.wait(Side::Recv, depth as usize)?;
    pair.ping(5)
}

fn receive_queue_is_as_deep_as_granted(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec { recv_wr: 16, ..Spec::rc() })?;
    let depth = u64::from(pair.near.qp().cap.max_recv_wr);
    check!(depth >= 16, "max_recv_wr {depth}");
    for i in 0..depth {
        pair.near.recv(i, 0, 8)?;
    }
    let one = Recv::new(depth).sge(pair.near.sge(0, 8));
    match pair.near.qp().post_recv(&[one]) {
        Ok(()) => crate::suite::fail!("request {} of a queue of {depth} was taken", depth + 1),
        Err((errno, at)) => same!((errno, at), (libc::ENOMEM, Some(0)), "errno of a full queue"),
    }
    Ok(())
}

fn receives_by_state(env: &Env) -> Outcome {
    for state in [IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_ERR] {
        let spec = Spec { state: state.min(IBV_QPS_RTS), ..Spec::rc() };
        let pair = Pair::new(env, &spec)?;
        if state == IBV_QPS_ERR {
            pair.near.qp().set_state(IBV_QPS_ERR)?;
        }
        let one = Recv::new(1).sge(pair.near.sge(0, 8));
        let got = pair.near.qp().post_recv(&[one]);
        if state == IBV_QPS_RESET {
            check!(matches!(got, Err((e, Some(0))) if e > 0), "in RESET: {got:?}");
        } else {
            same!(got, Ok(()), "in state {state}");
        }
        if state == IBV_QPS_ERR {
            let wc = pair.near.one(Side::Recv)?;
            same!((wc.wr_id, wc.status), (1, IBV_WC_WR_FLUSH_ERR), "in ERR");
        }
    }
    Ok(())
}

fn sends_by_state(env: &Env) -> Outcome {
    for kind in [IBV_QPT_RC, IBV_QPT_UC] {
        for state in [IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR] {
            let pair = Pair::new(env, &Spec { state, ..Spec::new(kind) })?;
            let got = pair.near.qp().post_send(&[pair.request(Op::SEND, 1, 0, 8)]);
            check!(
                matches!(got, Err((e, Some(0))) if e > 0),
                "type {kind} in state {state}: expected an error at request 0, got {got:?}"
            );
        }
    }
    Ok(())
}

fn sends_in_error_are_flushed(env: &Env) -> Outcome {
    for kind in [IBV_QPT_RC, IBV_QPT_UC] {
        let pair = Pair::new(env, &Spec::new(kind))?;
        pair.near.qp().set_state(IBV_QPS_ERR)?;
        // One is unsignaled: a flush is an error, and errors always complete.
        let list = [pair.request(Op::SEND, 1, 0, 8), pair.request(Op::WRITE, 2, 0, 8).unsignaled()];
        pair.near.send(&list)?;
        let got: Vec<_> = pair.near.wait(Side::Send, 2)?.iter().map(|w| (w.wr_id, w.status)).collect();
        same!(got, [(1, IBV_WC_WR_FLUSH_ERR), (2, IBV_WC_WR_FLUSH_ERR)], "type {kind}");
    }
    Ok(())
}

fn unknown_opcode(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    for opcode in [13, 99, u32::MAX] {
        let got = pair.near.qp().post_send(&[Send::new(1, opcode).sge(pair.near.sge(0, 8))]);
        check!(matches!(got, Err((e, Some(0))) if e > 0), "opcode {opcode}: {got:?}");
    }
    Ok(())
}

fn operations_of_other_services(env: &Env) -> Outcome {
    for kind in [IBV_QPT_UC, IBV_QPT_UD] {
        let pair = Pair::new(env, &Spec::new(kind))?;
        let ah = pair.near.ah(&pair.to)?;
        for op in Op::ALL.iter().filter(|op| !Op::of(kind).contains(op)) {
            let mut request = pair.request(*op, 1, 0, 8);
            if kind == IBV_QPT_UD {
                request.target = crate::verbs::Target::Ud(ah.ptr as usize, pair.to.qpn, 1);
            }
            let got = pair.near.qp().post_send(&[request]);
            check!(
                matches!(got, Err((e, Some(0))) if e > 0),
                "{} on type {kind}: expected an error, got {got:?}",
                op.name
            );
        }
    }
    Ok(())
}

fn one_element_too_many(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let (send, recv) = {
        let cap = pair.near.qp().cap;
        (cap.max_send_sge as usize, cap.max_recv_sge as usize)
    };
    check!(send >= 4 && recv >= 4, "granted {send} and {recv} elements, 4 were asked");
    let mut most = pair.request(Op::SEND, 1, 0, 4);
    most.sges = vec![most.sges[0]; send];
    pair.far_recv(1, 0, 4096)?;
    pair.succeed(most.clone())?;
    same!(pair.far.one(Side::Recv)?.byte_len as usize, 4 * send, "bytes of {send} elements");
    most.sges.push(most.sges[0]);
    let got = pair.near.qp().post_send(&[most]);
    check!(matches!(got, Err((e, Some(0))) if e > 0), "{} elements: {got:?}", send + 1);
    let mut list = Recv::new(1);
    list.sges = vec![pair.near.sge(0, 4); recv + 1];
    let got = pair.near.qp().post_recv(&[list]);
    check!(matches!(got, Err((e, Some(0))) if e > 0), "{} elements: {got:?}", recv + 1);
    Ok(())
}

fn capacities_are_at_least_what_was_asked(env: &Env) -> Outcome {
    let end = crate::suite::End::open(env, false, &Spec::rc())?;
    for wr in [1, 3, 100, 1000] {
        let spec = Spec { send_wr: wr, recv_wr: wr + 1, send_sge: 2, recv_sge: 3, inline: 40, ..Spec::rc() };
        let qp = crate::verbs::Qp::new(&end.pd, &end.send_cq, &end.recv_cq, &spec.qp(None))?;
        let (got, asked) = (qp.cap, spec.qp(None).cap);
        check!(
            got.max_send_wr >= asked.max_send_wr
                && got.max_recv_wr >= asked.max_recv_wr
                && got.max_send_sge >= asked.max_send_sge
                && got.max_recv_sge >= asked.max_recv_sge
                && got.max_inline_data >= asked.max_inline_data,
            "asked for {wr} requests, granted {} and {}",
            got.max_send_wr,
            got.max_recv_wr
        );
        let queried = qp.query()?.cap;
        same!(queried.max_send_wr, got.max_send_wr, "max_send_wr as queried");
        same!(queried.max_recv_wr, got.max_recv_wr, "max_recv_wr as queried");
    }
    let most = end.ctx.attr.max_qp_wr as u32;
    let spec = Spec { send_wr: most + 1, ..Spec::rc() };
    let got = crate::verbs::Qp::create(&end.pd, &end.send_cq, &end.recv_cq, &spec.qp(None));
    same!(got.err(), Some(libc::EINVAL), "errno for more than max_qp_wr requests");
    let spec = Spec { send_sge: end.ctx.attr.max_sge as u32 + 1, ..Spec::rc() };
    let got = crate::verbs::Qp::create(&end.pd, &end.send_cq, &end.recv_cq, &spec.qp(None));
    same!(got.err(), Some(libc::EINVAL), "errno for more than max_sge elements");
    Ok(())
}
