//! Extended reliable connections.

use core::mem::zeroed;
use std::sync::Arc;

use freeflow_abi::*;

use crate::suite::{End, Env, LONG, Outcome, Spec, check, fail, same, skip, tests};
use crate::verbs::{Attr, Cq, Qp, Recv, Send, Srq, Xrcd, errno, name_of, operation, pattern};

tests! { "xrc";
    send_to_a_queue_by_its_number OneProcess "ibv_open_xrcd(3), ibv_create_qp_ex(3): IBV_QPT_XRC_SEND, IBV_QPT_XRC_RECV";
    one_connection_many_queues OneProcess "ibv_post_send(3): remote_srqn";
    unknown_queue OneProcess "IBTA annex A14: no such XRC SRQ";
    open_an_existing_queue_pair OneProcess "ibv_open_qp(3)";
}

struct Xrc {
    send: Qp,
    recv: Qp,
    queues: Vec<Arc<Srq>>,
    cq: Arc<Cq>,
    xrcd: Arc<Xrcd>,
    end: End,
}

fn zeroed_init() -> ibv_qp_init_attr_ex {
    // SAFETY: numbers and null pointers.
    unsafe { zeroed() }
}

fn create(end: &End, kind: u32, cq: &Arc<Cq>, xrcd: Option<&Xrcd>) -> Outcome<Qp> {
    let mut init = zeroed_init();
    init.qp_type = kind;
    init.cap = Spec::rc().qp(None).cap;
    init.comp_mask = match xrcd {
        Some(_) => IBV_QP_INIT_ATTR_XRCD,
        None => IBV_QP_INIT_ATTR_PD,
    };
    init.xrcd = xrcd.map_or(core::ptr::null_mut(), |x| x.ptr);
    if xrcd.is_none() {
        init.pd = end.pd.ptr;
        init.send_cq = cq.ptr;
        init.recv_cq = cq.ptr;
    }
    let Some(create) = operation!(end.ctx.ptr, create_qp_ex) else {
        skip!("device does not offer XRC");
    };
    // SAFETY: the library's own operation on live objects.
    let ptr = unsafe { create(end.ctx.ptr, &mut init) };
    if ptr.is_null() {
        fail!("creating a queue pair of type {kind}: {}", name_of(errno()));
    }
    Ok(Qp::adopt(ptr, kind, &end.pd, cq, init.cap))
}

/// A sender and a receiver on one device, connected, with `n` queues.
fn setup(env: &Env, n: usize) -> Outcome<Xrc> {
    let end = End::open(env, false, &Spec::rc())?;
    if end.ctx.attr.device_cap_flags & IBV_DEVICE_XRC == 0 {
        skip!("device does not offer XRC");
    }
    let xrcd = match Xrcd::open(&end.ctx, -1) {
        Ok(xrcd) => xrcd,
        Err(errno) => fail!("ibv_open_xrcd: {}", name_of(errno)),
    };
    let cq = Cq::new(&end.ctx, 128)?;
    let mut queues = Vec::new();
    for _ in 0..n {
        match Srq::create_xrc(&end.pd, &xrcd, &cq, 32) {
            Ok(srq) => queues.push(srq),
            Err(errno) => fail!("ibv_create_srq_ex: {}", name_of(errno)),
        }
    }
    let send = create(&end, IBV_QPT_XRC_SEND, &end.send_cq, None)?;
    let recv = create(&end, IBV_QPT_XRC_RECV, &cq, Some(&xrcd))?;
    for (qp, to) in [(&send, recv.number()), (&recv, send.number())] {
        let mut addr = end.addr();
        addr.qpn = to;
        qp.must_modify(&end.to_init())?;
        let rtr = end.to_rtr(&addr);
        let responds = IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
        let mask = if qp.kind == IBV_QPT_XRC_SEND { rtr.mask & !responds } else { rtr.mask };
        qp.must_modify(&Attr { mask, ..rtr })?;
    }
    send.must_modify(&end.to_rts())?;
    Ok(Xrc { send, recv, queues, cq, xrcd, end })
}

fn message(x: &Xrc, wr_id: u64, srqn: u32, len: usize) -> Send {
    let mut request = Send::new(wr_id, IBV_WR_SEND).sge(x.end.sge(0, len));
    request.srqn = srqn;
    request
}

fn send_to_a_queue_by_its_number(env: &Env) -> Outcome {
    let x = setup(env, 1)?;
    let bytes = pattern(1, 100);
    x.end.put(0, &bytes)?;
    x.queues[0].recv(&[Recv::new(5).sge(x.end.sge(4096, 128))])?;
    x.send.send(&[message(&x, 1, x.queues[0].number()?, 100)])?;
    same!(x.end.send_cq.wait(1, LONG)?[0].status, IBV_WC_SUCCESS, "status");
    let got = x.cq.wait(1, LONG)?[0];
    same!((got.wr_id, got.status, got.byte_len), (5, IBV_WC_SUCCESS, 100), "receive");
    same!(x.end.get(4096, 100)?, bytes, "data");
    Ok(())
}

fn one_connection_many_queues(env: &Env) -> Outcome {
    let x = setup(env, 3)?;
    for (k, queue) in x.queues.iter().enumerate() {
        for i in 0..5 {
            queue.recv(&[Recv::new(10 * k as u64 + i).sge(x.end.sge(4096, 64))])?;
        }
    }
    for i in 0..15 {
        let k = (i * 2 % 3) as usize;
        x.send.send(&[message(&x, i, x.queues[k].number()?, 8)])?;
        same!(x.end.send_cq.wait(1, LONG)?[0].status, IBV_WC_SUCCESS, "status");
        let got = x.cq.wait(1, LONG)?[0];
        same!(got.wr_id, 10 * k as u64 + i / 3, "receive of queue {k}");
    }
    Ok(())
}

fn unknown_queue(env: &Env) -> Outcome {
    let x = setup(env, 1)?;
    x.send.send(&[message(&x, 1, x.queues[0].number()? ^ 0x5A5A, 8)])?;
    let got = x.end.send_cq.wait(1, LONG)?[0];
    check!(
        matches!(got.status, IBV_WC_REM_INV_REQ_ERR | IBV_WC_REM_OP_ERR),
        "status {}",
        got.status
    );
    Ok(())
}

fn open_an_existing_queue_pair(env: &Env) -> Outcome {
    let x = setup(env, 1)?;
    let Some(open) = operation!(x.end.ctx.ptr, open_qp) else {
        skip!("device does not offer ibv_open_qp");
    };
    let mut attr = ibv_qp_open_attr {
        comp_mask: IBV_QP_OPEN_ATTR_NUM | IBV_QP_OPEN_ATTR_XRCD | IBV_QP_OPEN_ATTR_TYPE,
        qp_num: x.recv.number(),
        xrcd: x.xrcd.ptr,
        qp_context: core::ptr::null_mut(),
        qp_type: IBV_QPT_XRC_RECV,
    };
    // SAFETY: the library's own operation on live objects.
    let ptr = unsafe { open(x.end.ctx.ptr, &mut attr) };
    check!(!ptr.is_null(), "ibv_open_qp: {}", name_of(errno()));
    let again = Qp::adopt(ptr, IBV_QPT_XRC_RECV, &x.end.pd, &x.cq, x.recv.cap);
    same!(again.number(), x.recv.number(), "qp_num");
    attr.qp_num ^= 0x3300;
    // SAFETY: as above.
    let none = unsafe { open(x.end.ctx.ptr, &mut attr) };
    check!(none.is_null(), "a queue pair that does not exist was opened");
    drop(again);
    Ok(())
}
