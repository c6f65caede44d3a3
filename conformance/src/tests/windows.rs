//! Memory windows and invalidation.

use freeflow_abi::*;

use crate::suite::{Addr, Env, Op, Outcome, Pair, Side, Spec, check, fail, same, skip, tests};
use crate::verbs::{Mr, Mw, Qp, Recv, Send, Target, Wr, name_of};

tests! { "windows";
    type1_bind_and_unbind OneProcess "ibv_bind_mw(3): type 1";
    type2_bind_by_work_request OneProcess "ibv_post_send(3): IBV_WR_BIND_MW";
    type2_is_of_its_queue_pair OneProcess "IBTA 10.6.7.2.3: a window of type 2B is the queue pair's that bound it";
    bounds_and_rights OneProcess "ibv_bind_mw(3): address, length, mw_access_flags";
    region_without_bind_right OneProcess "ibv_reg_mr(3): IBV_ACCESS_MW_BIND";
    region_is_busy_while_bound OneProcess "ibv_dereg_mr(3): fails while a window is bound";
    local_invalidate OneProcess "ibv_post_send(3): IBV_WR_LOCAL_INV";
    send_with_invalidate OneProcess "ibv_post_send(3): IBV_WR_SEND_WITH_INV; wc.invalidated_rkey";
    by_the_extended_interface OneProcess "ibv_wr_bind_mw(3), ibv_wr_local_inv(3), ibv_wr_send_inv(3)";
    invalidate_of_a_region_is_refused OneProcess "IBTA 10.6.5: only what may be invalidated";
}

const BINDABLE: u32 = IBV_ACCESS_LOCAL_WRITE
    | IBV_ACCESS_REMOTE_WRITE
    | IBV_ACCESS_REMOTE_READ
    | IBV_ACCESS_REMOTE_ATOMIC
    | IBV_ACCESS_MW_BIND;

fn pair(env: &Env) -> Outcome<Pair> {
    let pair = Pair::new(env, &Spec::rc())?;
    let flags = IBV_DEVICE_MEM_WINDOW | IBV_DEVICE_MEM_WINDOW_TYPE_2A | IBV_DEVICE_MEM_WINDOW_TYPE_2B;
    if pair.near.ctx.attr.device_cap_flags & flags == 0 {
        skip!("device does not offer memory windows");
    }
    Ok(pair)
}

fn type2(pair: &Pair) -> Outcome {
    let flags = IBV_DEVICE_MEM_WINDOW_TYPE_2A | IBV_DEVICE_MEM_WINDOW_TYPE_2B;
    if pair.near.ctx.attr.device_cap_flags & flags == 0 {
        skip!("device does not offer memory windows of type 2");
    }
    Ok(())
}

fn window(pair: &Pair, kind: u32) -> Outcome<Mw> {
    match Mw::new(&pair.far.here()?.pd, kind) {
        Ok(mw) => Ok(mw),
        Err(libc::EOPNOTSUPP) => skip!("device does not offer memory windows of type {kind}"),
        Err(errno) => fail!("ibv_alloc_mw of type {kind}: {}", name_of(errno)),
    }
}

fn region(pair: &Pair) -> Outcome<Mr> {
    Mr::new(&pair.far.here()?.pd, 8192, BINDABLE)
}

/// Binds a window of type 1 as the header's `ibv_bind_mw` does; the completion must be good.
fn bind1(pair: &Pair, mw: &Mw, mr: &Mr, at: u64, length: u64, access: u32) -> Outcome<i32> {
    let far = pair.far.here()?;
    let info = ibv_mw_bind_info { mr: mr.ptr, addr: mr.base + at, length, mw_access_flags: access };
    let mut bind = ibv_mw_bind { wr_id: 70, send_flags: IBV_SEND_SIGNALED, bind_info: info };
    // SAFETY: the operations of an open context, on live objects.
    let got = unsafe {
        match (*far.ctx.ptr).ops.bind_mw {
            Some(bind_mw) => bind_mw(far.qp().ptr, mw.ptr, &mut bind),
            None => libc::EOPNOTSUPP,
        }
    };
    if got == libc::EOPNOTSUPP || got == libc::ENOSYS {
        skip!("device does not offer ibv_bind_mw");
    }
    if got == 0 {
        let wc = far.one(Side::Send)?;
        same!((wc.wr_id, wc.opcode), (70, IBV_WC_BIND_MW), "completion of the binding");
        return Ok(wc.status as i32);
    }
    Ok(-got)
}

/// Binds a window of type 2; returns its key.
fn bind2(pair: &Pair, mw: &Mw, mr: &Mr, at: u64, length: u64, access: u32) -> Outcome<u32> {
    let far = pair.far.here()?;
    let old = mw.rkey();
    let key = (old & !0xFF) | (old.wrapping_add(1) & 0xFF);
    let target =
        Target::Bind(mw.ptr as usize, key, mr.ptr as usize, mr.base + at, length, access);
    far.send(&[Send::new(71, IBV_WR_BIND_MW).to(target)])?;
    let wc = far.one(Side::Send)?;
    same!((wc.wr_id, wc.status), (71, IBV_WC_SUCCESS), "completion of the binding");
    same!(wc.opcode, IBV_WC_BIND_MW, "opcode of the binding");
    mw.set_rkey(key);
    Ok(key)
}

fn write(pair: &Pair, addr: u64, rkey: u32, len: usize) -> Outcome<u32> {
    Ok(pair.run(Op::WRITE.request(1, addr, rkey).sge(pair.near.sge(0, len)))?.status)
}

fn type1_bind_and_unbind(env: &Env) -> Outcome {
    let pair = pair(env)?;
    let (mr, mw) = (region(&pair)?, window(&pair, IBV_MW_TYPE_1)?);
    same!(bind1(&pair, &mw, &mr, 1000, 500, IBV_ACCESS_REMOTE_WRITE)?, 0, "binding");
    pair.near.put(0, &[0x61; 100])?;
    same!(write(&pair, mr.base + 1100, mw.rkey(), 100)?, IBV_WC_SUCCESS, "write through the window");
    same!(mr.buf.get(1100, 100)?, [0x61; 100], "data");
    let bound = mw.rkey();
    same!(bind1(&pair, &mw, &mr, 0, 0, 0)?, 0, "unbinding");
    same!(write(&pair, mr.base + 1100, bound, 100)?, IBV_WC_REM_ACCESS_ERR, "write after unbinding");
    Ok(())
}

fn type2_bind_by_work_request(env: &Env) -> Outcome {
    let pair = pair(env)?;
    type2(&pair)?;
    let (mr, mw) = (region(&pair)?, window(&pair, IBV_MW_TYPE_2)?);
    let key = bind2(&pair, &mw, &mr, 0, 4096, IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ)?;
    pair.near.put(0, &[0x62; 100])?;
    same!(write(&pair, mr.base + 8, key, 100)?, IBV_WC_SUCCESS, "write through the window");
    same!(mr.buf.get(8, 100)?, [0x62; 100], "data");
    Ok(())
}

fn type2_is_of_its_queue_pair(env: &Env) -> Outcome {
    let pair = pair(env)?;
    if pair.near.ctx.attr.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2B == 0 {
        skip!("device does not offer memory windows of type 2B");
    }
    let (mr, mw) = (region(&pair)?, window(&pair, IBV_MW_TYPE_2)?);
    let key = bind2(&pair, &mw, &mr, 0, 4096, IBV_ACCESS_REMOTE_WRITE)?;
    // A second connection between the same domains.
    let (near, far) = (&pair.near, pair.far.here()?);
    let spec = near.spec.qp(None);
    let here = Qp::new(&near.pd, &near.send_cq, &near.recv_cq, &spec)?;
    let there = Qp::new(&far.pd, &far.send_cq, &far.recv_cq, &spec)?;
    for (qp, end, to) in [
        (&here, near, Addr { qpn: there.number(), ..far.addr() }),
        (&there, far, Addr { qpn: here.number(), ..near.addr() }),
    ] {
        qp.must_modify(&end.to_init())?;
        qp.must_modify(&end.to_rtr(&to))?;
        qp.must_modify(&end.to_rts())?;
    }
    here.send(&[Op::WRITE.request(2, mr.base, mr.rkey()).sge(near.sge(0, 8))])?;
    same!(near.one(Side::Send)?.status, IBV_WC_SUCCESS, "write by the region's key");
    here.send(&[Op::WRITE.request(3, mr.base, key).sge(near.sge(0, 8))])?;
    same!(near.one(Side::Send)?.status, IBV_WC_REM_ACCESS_ERR, "write by another connection");
    same!(write(&pair, mr.base, key, 8)?, IBV_WC_SUCCESS, "write by the window's own");
    Ok(())
}

fn bounds_and_rights(env: &Env) -> Outcome {
    for (at, len, access, what) in [
        (999, 8, IBV_ACCESS_REMOTE_WRITE, "before the window"),
        (1496, 8, IBV_ACCESS_REMOTE_WRITE, "past the window"),
        (1000, 8, IBV_ACCESS_REMOTE_READ, "a write without the right"),
    ] {
        let pair = pair(env)?;
        type2(&pair)?;
        let (mr, mw) = (region(&pair)?, window(&pair, IBV_MW_TYPE_2)?);
        let key = bind2(&pair, &mw, &mr, 1000, 500, access)?;
        same!(write(&pair, mr.base + at, key, len)?, IBV_WC_REM_ACCESS_ERR, "{what}");
    }
    Ok(())
}

fn region_without_bind_right(env: &Env) -> Outcome {
    let pair = pair(env)?;
    type2(&pair)?;
    let mw = window(&pair, IBV_MW_TYPE_2)?;
    let far = pair.far.here()?;
    let mr = Mr::new(&far.pd, 8192, BINDABLE & !IBV_ACCESS_MW_BIND)?;
    let target = Target::Bind(
        mw.ptr as usize,
        mw.rkey() ^ 1,
        mr.ptr as usize,
        mr.base,
        4096,
        IBV_ACCESS_REMOTE_WRITE,
    );
    match far.qp().post_send(&[Send::new(1, IBV_WR_BIND_MW).to(target)]) {
        Err((errno, _)) => check!(errno > 0, "errno {errno}"),
        Ok(()) => {
            let wc = far.one(Side::Send)?;
            check!(
                matches!(wc.status, IBV_WC_MW_BIND_ERR | IBV_WC_LOC_PROT_ERR | IBV_WC_LOC_QP_OP_ERR),
                "status {}",
                wc.status
            );
        }
    }
    Ok(())
}

fn region_is_busy_while_bound(env: &Env) -> Outcome {
    let pair = pair(env)?;
    type2(&pair)?;
    let (mr, mw) = (region(&pair)?, window(&pair, IBV_MW_TYPE_2)?);
    bind2(&pair, &mw, &mr, 0, 4096, IBV_ACCESS_REMOTE_WRITE)?;
    let got = crate::verbs::verb!(ibv_dereg_mr(mr.ptr));
    if got == 0 {
        std::mem::forget(mr);
    }
    check!(got > 0, "a region was deregistered with a window bound to it");
    drop(mw);
    Ok(())
}

fn local_invalidate(env: &Env) -> Outcome {
    let pair = pair(env)?;
    type2(&pair)?;
    let (mr, mw) = (region(&pair)?, window(&pair, IBV_MW_TYPE_2)?);
    let key = bind2(&pair, &mw, &mr, 0, 4096, IBV_ACCESS_REMOTE_WRITE)?;
    same!(write(&pair, mr.base, key, 8)?, IBV_WC_SUCCESS, "write before");
    let far = pair.far.here()?;
    let mut invalidate = Send::new(5, IBV_WR_LOCAL_INV);
    invalidate.imm = key;
    far.send(&[invalidate])?;
    let wc = far.one(Side::Send)?;
    same!((wc.status, wc.opcode), (IBV_WC_SUCCESS, IBV_WC_LOCAL_INV), "completion");
    same!(write(&pair, mr.base, key, 8)?, IBV_WC_REM_ACCESS_ERR, "write after");
    Ok(())
}

fn send_with_invalidate(env: &Env) -> Outcome {
    let pair = pair(env)?;
    type2(&pair)?;
    let (mr, mw) = (region(&pair)?, window(&pair, IBV_MW_TYPE_2)?);
    let key = bind2(&pair, &mw, &mr, 0, 4096, IBV_ACCESS_REMOTE_WRITE)?;
    let far = pair.far.here()?;
    far.qp().recv(&[Recv::new(3).sge(far.sge(0, 64))])?;
    let mut request = Send::new(4, IBV_WR_SEND_WITH_INV).sge(pair.near.sge(0, 16));
    request.imm = key;
    same!(pair.succeed(request)?.opcode, IBV_WC_SEND, "opcode");
    let got = far.one(Side::Recv)?;
    same!((got.wr_id, got.status, got.byte_len), (3, IBV_WC_SUCCESS, 16), "receive");
    check!(got.flags & IBV_WC_WITH_INV != 0, "IBV_WC_WITH_INV is not set");
    same!(got.imm, key, "invalidated_rkey");
    same!(write(&pair, mr.base, key, 8)?, IBV_WC_REM_ACCESS_ERR, "write after");
    Ok(())
}

fn by_the_extended_interface(env: &Env) -> Outcome {
    type2(&pair(env)?)?;
    let ops = IBV_QP_EX_WITH_BIND_MW | IBV_QP_EX_WITH_LOCAL_INV | IBV_QP_EX_WITH_SEND_WITH_INV;
    let spec = Spec {
        ops: ops | IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_RDMA_WRITE,
        ..Spec::rc()
    };
    let mut pair = Pair::new(env, &spec)?;
    let (mr, mw) = (region(&pair)?, window(&pair, IBV_MW_TYPE_2)?);
    let next = |key: u32| (key & !0xFF) | (key.wrapping_add(1) & 0xFF);
    let done = |pair: &Pair, wr: Wr<'_>, opcode: u32| -> Outcome {
        same!(wr.complete()?, 0, "ibv_wr_complete");
        let wc = pair.far.here()?.one(Side::Send)?;
        same!((wc.status, wc.opcode), (IBV_WC_SUCCESS, opcode), "completion");
        Ok(())
    };
    let key = next(mw.rkey());
    let wr = Wr::start(pair.far.here()?.qp())?;
    wr.next(1, IBV_SEND_SIGNALED).bind(&mw, key, &mr, 4096, IBV_ACCESS_REMOTE_WRITE)?;
    done(&pair, wr, IBV_WC_BIND_MW)?;
    mw.set_rkey(key);
    same!(write(&pair, mr.base, key, 8)?, IBV_WC_SUCCESS, "write through the window");
    let wr = Wr::start(pair.far.here()?.qp())?;
    wr.next(2, IBV_SEND_SIGNALED).local_inv(key)?;
    done(&pair, wr, IBV_WC_LOCAL_INV)?;
    let key = next(key);
    let wr = Wr::start(pair.far.here()?.qp())?;
    wr.next(3, IBV_SEND_SIGNALED).bind(&mw, key, &mr, 4096, IBV_ACCESS_REMOTE_WRITE)?;
    done(&pair, wr, IBV_WC_BIND_MW)?;
    pair.far_recv(4, 0, 64)?;
    let wr = Wr::start(pair.near.qp())?;
    wr.next(5, IBV_SEND_SIGNALED).send_inv(key)?;
    wr.sge(pair.near.sge(0, 8))?;
    same!(wr.complete()?, 0, "ibv_wr_complete");
    same!(pair.near.one(Side::Send)?.status, IBV_WC_SUCCESS, "status");
    same!(pair.far.one(Side::Recv)?.imm, key, "invalidated_rkey");
    same!(write(&pair, mr.base, key, 8)?, IBV_WC_REM_ACCESS_ERR, "write after");
    Ok(())
}

fn invalidate_of_a_region_is_refused(env: &Env) -> Outcome {
    let mut pair = pair(env)?;
    if pair.near.ctx.attr.device_cap_flags & IBV_DEVICE_MEM_MGT_EXTENSIONS == 0 {
        skip!("device does not offer SEND_WITH_INV");
    }
    pair.far_recv(3, 0, 64)?;
    // An ordinary region's key cannot be taken away by the peer.
    let mut request = Send::new(4, IBV_WR_SEND_WITH_INV).sge(pair.near.sge(0, 16));
    request.imm = pair.to.rkey;
    // The sender may have its acknowledgement by then (IBTA 9.9.3.1, class J); the receiver's
    // program learns of the error, and its queue pair is in error.
    pair.run(request)?;
    let got = pair.far.one(Side::Recv)?;
    check!(got.status != IBV_WC_SUCCESS, "a region's key was invalidated");
    pair.far.until_state(IBV_QPS_ERR)?;
    Ok(())
}
