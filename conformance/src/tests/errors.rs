//! Each error on each operation: the status at the requester, and what the responder learns.

use freeflow_abi::*;

use crate::suite::{Env, LONG, Op, Outcome, Pair, QUIET, Side, Spec, check, same, status_name, tests};
use crate::verbs::{Mr, Pd, Recv, Send, Target};

tests! { "errors";
    bad_lkey Anywhere "ibv_poll_cq(3): IBV_WC_LOC_PROT_ERR";
    lkey_of_another_domain OneProcess "IBTA 10.2.3: a key belongs to its protection domain";
    lkey_past_the_end Anywhere "the element lies within its region";
    lkey_without_local_write Anywhere "ibv_reg_mr(3): IBV_ACCESS_LOCAL_WRITE";
    bad_rkey Anywhere "IBTA table 57: R_Key violation is a remote access error";
    rkey_past_the_end Anywhere "IBTA 9.7.4.1.5";
    rkey_address_wraps Anywhere "address + length does not wrap";
    rkey_of_another_domain Anywhere "IBTA 10.2.3";
    rkey_without_the_right Anywhere "ibv_reg_mr(3): remote rights";
    queue_pair_without_the_right Anywhere "IBTA table 57: a function not set up is an invalid request";
    no_resources_for_reads Anywhere "IBTA table 57: reads with no responder resources are invalid requests";
    receive_too_short Anywhere "IBTA table 57: LOC_LEN_ERR and REM_INV_REQ_ERR";
    receive_with_bad_lkey Anywhere "IBTA table 57: LOC_PROT_ERR and REM_OP_ERR";
    rest_is_flushed Anywhere "IBTA 10.3.1.5: what follows a failed request is flushed";
    events_at_the_responder Anywhere "ibv_get_async_event(3): IBV_EVENT_QP_ACCESS_ERR, IBV_EVENT_QP_REQ_ERR";
    recovers_by_reset Anywhere "ibv_modify_qp(3): ERR to RESET to RTS";
    deregistered_memory Anywhere "ibv_dereg_mr(3): the keys are dead at once";
    unreliable_write_with_bad_rkey Anywhere "IBTA 9.8.2.2: an unreliable responder drops it in silence";
    unreliable_with_bad_lkey Anywhere "IBTA 10.3.1.6: the send queue alone is in error (SQE)";
}

/// A request that must fail with this status, on a fresh connection for each operation.
fn each(
    env: &Env,
    ops: &[Op],
    status: u32,
    spec: &Spec,
    far: &Spec,
    build: impl Fn(&mut Pair, Op) -> Outcome<Send>,
) -> Outcome {
    for op in ops {
        let mut pair = Pair::with(env, spec, far)?;
        pair.far_recv(55, 0, 4096)?;
        let request = build(&mut pair, *op)?;
        pair.refuse(op.name, request, status)?;
        // A reliable queue pair that failed a request is in error (IBTA 10.3.1.5).
        same!(pair.near.state()?, IBV_QPS_ERR, "{}: state of the requester", op.name);
    }
    Ok(())
}

const REMOTE: [Op; 5] = [Op::WRITE, Op::WRITE_IMM, Op::READ, Op::CAS, Op::FAA];

fn bad_lkey(env: &Env) -> Outcome {
    let spec = Spec::rc();
    each(env, &Op::ALL, IBV_WC_LOC_PROT_ERR, &spec, &spec, |pair, op| {
        let mut request = pair.request(op, 1, 0, 8);
        request.sges[0].lkey = request.sges[0].lkey.wrapping_add(0x0101_0100);
        Ok(request)
    })
}

fn lkey_of_another_domain(env: &Env) -> Outcome {
    for op in Op::ALL {
        let mut pair = Pair::new(env, &Spec::rc())?;
        let pd = Pd::new(&pair.near.ctx)?;
        let mr = Mr::new(&pd, 4096, IBV_ACCESS_LOCAL_WRITE)?;
        pair.far_recv(1, 0, 64)?;
        let mut request = pair.request(op, 1, 0, 8);
        request.sges = vec![mr.sge(0, 8)];
        pair.refuse(op.name, request, IBV_WC_LOC_PROT_ERR)?;
    }
    Ok(())
}

fn lkey_past_the_end(env: &Env) -> Outcome {
    let spec = Spec::rc();
    each(env, &Op::ALL, IBV_WC_LOC_PROT_ERR, &spec, &spec, |pair, op| {
        let end = pair.near.spec.memory;
        let mut request = pair.request(op, 1, 0, 16);
        request.sges[0].addr = pair.near.mr().base + end as u64 - 7;
        Ok(request)
    })
}

fn lkey_without_local_write(env: &Env) -> Outcome {
    let read_only = Spec { mr_access: IBV_ACCESS_REMOTE_READ, ..Spec::rc() };
    let ops = [Op::READ, Op::CAS, Op::FAA];
    each(env, &ops, IBV_WC_LOC_PROT_ERR, &read_only, &Spec::rc(), |pair, op| {
        Ok(pair.request(op, 1, 0, 8))
    })?;
    // What only reads the memory works.
    let mut pair = Pair::with(env, &read_only, &Spec::rc())?;
    pair.far_recv(1, 0, 64)?;
    pair.succeed(pair.request(Op::SEND, 1, 0, 8))?;
    pair.succeed(pair.request(Op::WRITE, 1, 0, 8))?;
    Ok(())
}

fn remote(env: &Env, what: impl Fn(&mut Pair, Op) -> Outcome<(u64, u32)>) -> Outcome {
    let spec = Spec::rc();
    each(env, &REMOTE, IBV_WC_REM_ACCESS_ERR, &spec, &spec, |pair, op| {
        let (addr, rkey) = what(pair, op)?;
        let len = if op.is_atomic() { 8 } else { 16 };
        Ok(op.request(1, addr, rkey).sge(pair.near.sge(0, len)))
    })
}

fn bad_rkey(env: &Env) -> Outcome {
    remote(env, |pair, _| Ok((pair.to.base, pair.to.rkey.wrapping_add(0x0101_0100))))
}

fn rkey_past_the_end(env: &Env) -> Outcome {
    remote(env, |pair, _| {
        let end = pair.to.base + pair.near.spec.memory as u64;
        Ok((end, pair.to.rkey))
    })?;
    // The first byte is within, the last is not.
    let spec = Spec::rc();
    each(env, &REMOTE[..3], IBV_WC_REM_ACCESS_ERR, &spec, &spec, |pair, op| {
        let addr = pair.to.base + pair.near.spec.memory as u64 - 15;
        Ok(op.request(1, addr, pair.to.rkey).sge(pair.near.sge(0, 16)))
    })
}

fn rkey_address_wraps(env: &Env) -> Outcome {
    remote(env, |pair, _| Ok((u64::MAX - 7, pair.to.rkey)))
}

fn rkey_of_another_domain(env: &Env) -> Outcome {
    remote(env, |pair, _| {
        let access = pair.near.spec.mr_access;
        pair.far.register(4096, access, true)
    })
}

fn rkey_without_the_right(env: &Env) -> Outcome {
    remote(env, |pair, op| {
        let lacking = match op {
            Op::READ => IBV_ACCESS_REMOTE_READ,
            _ if op.is_atomic() => IBV_ACCESS_REMOTE_ATOMIC,
            _ => IBV_ACCESS_REMOTE_WRITE,
        };
        pair.far.register(4096, pair.near.spec.mr_access & !lacking, false)
    })
}

fn queue_pair_without_the_right(env: &Env) -> Outcome {
    for op in REMOTE {
        let lacking = match op {
            Op::READ => IBV_ACCESS_REMOTE_READ,
            _ if op.is_atomic() => IBV_ACCESS_REMOTE_ATOMIC,
            _ => IBV_ACCESS_REMOTE_WRITE,
        };
        let spec = Spec::rc();
        let far = Spec { qp_access: spec.qp_access & !lacking, ..Spec::rc() };
        let mut pair = Pair::with(env, &spec, &far)?;
        pair.far_recv(1, 0, 64)?;
        pair.refuse(op.name, pair.request(op, 1, 0, 8), IBV_WC_REM_INV_REQ_ERR)?;
    }
    Ok(())
}

fn no_resources_for_reads(env: &Env) -> Outcome {
    let far = Spec { rd_atomic: 0, ..Spec::rc() };
    let near = Spec { rd_atomic: 1, ..Spec::rc() };
    for op in [Op::READ, Op::CAS, Op::FAA] {
        let pair = Pair::with(env, &near, &far)?;
        pair.refuse(op.name, pair.request(op, 1, 0, 8), IBV_WC_REM_INV_REQ_ERR)?;
    }
    Ok(())
}

fn receive_too_short(env: &Env) -> Outcome {
    for (room, len) in [(15, 16), (0, 1), (1024, 1025), (1500, 5000)] {
        for op in [Op::SEND, Op::SEND_IMM] {
            let mut pair = Pair::new(env, &Spec::rc())?;
            pair.far_recv(5, 0, room)?;
            pair.far_recv(6, 0, 4096)?;
            let what = format!("{} of {len} into {room}", op.name);
            pair.refuse(&what, pair.request(op, 1, 0, len), IBV_WC_REM_INV_REQ_ERR)?;
            let got = pair.far.wait(Side::Recv, 2)?;
            same!(
                (got[0].wr_id, status_name(got[0].status)),
                (5, status_name(IBV_WC_LOC_LEN_ERR)),
                "{what}: the receive"
            );
            same!((got[1].wr_id, got[1].status), (6, IBV_WC_WR_FLUSH_ERR), "{what}: the next");
            same!(pair.far.state()?, IBV_QPS_ERR, "{what}: state of the responder");
        }
    }
    Ok(())
}

fn receive_with_bad_lkey(env: &Env) -> Outcome {
    for op in [Op::SEND, Op::SEND_IMM] {
        let mut pair = Pair::new(env, &Spec::rc())?;
        let sge = crate::verbs::Sge { addr: pair.to.base, length: 64, lkey: pair.to.lkey ^ 0x5500 };
        pair.far.post_recv(vec![Recv::new(5).sge(sge)])?;
        pair.refuse(op.name, pair.request(op, 1, 0, 16), IBV_WC_REM_OP_ERR)?;
        let got = pair.far.one(Side::Recv)?;
        same!(
            (got.wr_id, status_name(got.status)),
            (5, status_name(IBV_WC_LOC_PROT_ERR)),
            "{}: the receive",
            op.name
        );
        same!(pair.far.state()?, IBV_QPS_ERR, "state of the responder");
    }
    Ok(())
}

fn rest_is_flushed(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for i in 0..4 {
        pair.near.recv(50 + i, 0, 64)?;
        pair.far_recv(60 + i, 0, 64)?;
    }
    let mut list: Vec<_> = (0..6).map(|i| pair.request(Op::WRITE, i, 0, 8).unsignaled()).collect();
    list[2].target = Target::Rdma(pair.to.base, pair.to.rkey ^ 0x3300);
    pair.near.send(&list)?;
    let got: Vec<_> =
        pair.near.wait(Side::Send, 4)?.iter().map(|w| (w.wr_id, w.status)).collect();
    let flush = IBV_WC_WR_FLUSH_ERR;
    same!(got, [(2, IBV_WC_REM_ACCESS_ERR), (3, flush), (4, flush), (5, flush)], "completions");
    let got: Vec<_> = pair.near.wait(Side::Recv, 4)?.iter().map(|w| (w.wr_id, w.status)).collect();
    same!(got, (50..54).map(|i| (i, flush)).collect::<Vec<_>>(), "receives of the requester");
    pair.far.until_state(IBV_QPS_ERR)?;
    let got: Vec<_> = pair.far.wait(Side::Recv, 4)?.iter().map(|w| (w.wr_id, w.status)).collect();
    same!(got, (60..64).map(|i| (i, flush)).collect::<Vec<_>>(), "receives of the responder");
    pair.near.quiet(Side::Send, QUIET)
}

fn events_at_the_responder(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let mut request = pair.request(Op::WRITE, 1, 0, 8);
    request.target = Target::Rdma(pair.to.base, pair.to.rkey ^ 0x3300);
    pair.refuse("bad rkey", request, IBV_WC_REM_ACCESS_ERR)?;
    same!(pair.far.event(LONG)?, Some(IBV_EVENT_QP_ACCESS_ERR), "event of an R_Key violation");
    let far = Spec { qp_access: IBV_ACCESS_LOCAL_WRITE, ..Spec::rc() };
    let mut pair = Pair::with(env, &Spec::rc(), &far)?;
    pair.refuse("not set up", pair.request(Op::WRITE, 1, 0, 8), IBV_WC_REM_INV_REQ_ERR)?;
    same!(pair.far.event(LONG)?, Some(IBV_EVENT_QP_REQ_ERR), "event of an invalid request");
    // An error that completes a receive is told by that completion alone.
    let mut pair = Pair::new(env, &Spec::rc())?;
    pair.far_recv(1, 0, 1)?;
    pair.refuse("too short", pair.request(Op::SEND, 1, 0, 8), IBV_WC_REM_INV_REQ_ERR)?;
    same!(pair.far.event(QUIET)?, None, "event of a receive that was too short");
    Ok(())
}

fn recovers_by_reset(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for round in 0..3 {
        let mut request = pair.request(Op::WRITE, 1, 0, 8);
        request.target = Target::Rdma(pair.to.base, pair.to.rkey ^ 0x3300);
        pair.refuse("bad rkey", request, IBV_WC_REM_ACCESS_ERR)?;
        pair.far.until_state(IBV_QPS_ERR)?;
        let here = pair.near.addr();
        pair.near.qp().set_state(IBV_QPS_RESET)?;
        pair.far.set_state(IBV_QPS_RESET)?;
        pair.far.connect(here)?;
        pair.near.connect(&pair.to)?;
        pair.ping(round)?;
    }
    Ok(())
}

fn deregistered_memory(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    pair.ping(1)?;
    pair.far.deregister()?;
    pair.refuse("deregistered at the far end", pair.request(Op::WRITE, 1, 0, 8), IBV_WC_REM_ACCESS_ERR)?;
    let mut pair = Pair::new(env, &Spec::rc())?;
    pair.ping(1)?;
    let request = pair.request(Op::WRITE, 1, 0, 8);
    pair.near.mr = None;
    pair.refuse("deregistered at the near end", request, IBV_WC_LOC_PROT_ERR)?;
    Ok(())
}

fn unreliable_write_with_bad_rkey(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::uc())?;
    pair.far_recv(9, 0, 64)?;
    for op in [Op::WRITE, Op::WRITE_IMM] {
        let mut request = pair.request(op, 1, 0, 8);
        request.target = Target::Rdma(pair.to.base, pair.to.rkey ^ 0x3300);
        pair.succeed(request)?;
    }
    same!(pair.far.peek(Side::Recv)?, [], "receives consumed by what was dropped");
    same!(pair.far.state()?, IBV_QPS_RTS, "state of the responder");
    same!(pair.near.state()?, IBV_QPS_RTS, "state of the requester");
    pair.succeed(pair.request(Op::SEND, 2, 0, 8))?;
    same!(pair.far.one(Side::Recv)?.wr_id, 9, "the message that follows");
    Ok(())
}

fn unreliable_with_bad_lkey(env: &Env) -> Outcome {
    for kind in [IBV_QPT_UC, IBV_QPT_UD] {
        let mut pair = Pair::new(env, &Spec::new(kind))?;
        let ah = pair.near.ah(&pair.to)?;
        let target = match kind {
            IBV_QPT_UD => Target::Ud(ah.ptr as usize, pair.to.qpn, crate::suite::QKEY),
            _ => Target::None,
        };
        let mut request = pair.request(Op::SEND, 1, 0, 8).to(target);
        request.sges[0].lkey ^= 0x7700;
        pair.refuse("bad lkey", request, IBV_WC_LOC_PROT_ERR)?;
        same!(pair.near.state()?, IBV_QPS_SQE, "type {kind}: state after a failed send");
        // Receives go on, and sends after the program's word.
        pair.near.recv(3, 0, 128)?;
        let rts = crate::verbs::Attr::state(IBV_QPS_RTS);
        pair.near.qp().must_modify(&rts)?;
        pair.far_recv(4, 0, 128)?;
        pair.succeed(pair.request(Op::SEND, 2, 0, 8).to(target))?;
        let got = pair.far.one(Side::Recv)?;
        check!(got.status == IBV_WC_SUCCESS && got.wr_id == 4, "after SQE: {got:?}");
    }
    Ok(())
}
