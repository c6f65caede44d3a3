//! Inline data.

use freeflow_abi::*;

use crate::suite::{Env, Op, Outcome, Pair, Side, Spec, check, same, tests};
use crate::verbs::{Sge, pattern};

tests! { "inline";
    limit_counts_all_elements Anywhere "ibv_post_send(3): IBV_SEND_INLINE, max_inline_data";
    limit_is_counted_in_64_bits OneProcess "the sum does not wrap";
    needs_no_key_and_may_be_reused Anywhere "ibv_post_send(3): the lkey is not checked, the buffer is free at once";
    with_every_operation Anywhere "ibv_post_send(3): IBV_SEND_INLINE for SEND and RDMA WRITE";
    not_with_reads_and_atomics OneProcess "ibv_post_send(3): IBV_SEND_INLINE";
}

fn limit_counts_all_elements(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let most = pair.near.qp().cap.max_inline_data as usize;
    check!(most >= 64, "64 bytes of inline data were asked for, {most} granted");
    let bytes = pattern(1, most + 1);
    pair.near.put(0, &bytes)?;
    for parts in [1, 2, 4] {
        for total in [most, most + 1] {
            let mut request = pair.request(Op::SEND, 1, 0, 0).flags(IBV_SEND_INLINE);
            request.sges.clear();
            let mut at = 0;
            for k in 0..parts {
                let len = if k + 1 == parts { total - at } else { total / parts };
                request.sges.push(Sge { lkey: 0, ..pair.near.sge(at, len) });
                at += len;
            }
            if total > most {
                let got = pair.near.qp().post_send(&[request]);
                check!(matches!(got, Err((e, Some(0))) if e > 0), "{total} bytes in {parts}: {got:?}");
                continue;
            }
            pair.far_recv(1, 0, 4096)?;
            pair.succeed(request)?;
            same!(pair.far.one(Side::Recv)?.byte_len as usize, most, "byte_len");
            same!(pair.far.get(0, most)?, bytes[..most], "data in {parts} parts");
        }
    }
    Ok(())
}

fn limit_is_counted_in_64_bits(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    // 2^32 - 8 and 40 bytes are 32 bytes, modulo 2^32; nobody may read the first.
    let mut request = pair.request(Op::SEND, 1, 0, 40).flags(IBV_SEND_INLINE);
    request.sges.insert(0, Sge { addr: 8, length: u32::MAX - 7, lkey: 0 });
    let got = pair.near.qp().post_send(&[request]);
    check!(matches!(got, Err((e, Some(0))) if e > 0), "expected an error, got {got:?}");
    Ok(())
}

fn needs_no_key_and_may_be_reused(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let mut bytes = pattern(7, 48);
    let expected = bytes.clone();
    // Memory that was never registered; the peer is not ready yet.
    let sge = Sge { addr: bytes.as_ptr() as u64, length: 48, lkey: 0xDEAD_BEEF };
    let mut request = pair.request(Op::SEND, 1, 0, 0).flags(IBV_SEND_INLINE);
    request.sges = vec![sge];
    pair.near.send(&[request])?;
    bytes.fill(0);
    drop(bytes);
    pair.far_recv(1, 0, 64)?;
    same!(pair.near.one(Side::Send)?.status, IBV_WC_SUCCESS, "status");
    pair.far.one(Side::Recv)?;
    same!(pair.far.get(0, 48)?, expected, "data as it was when it was posted");
    Ok(())
}

fn with_every_operation(env: &Env) -> Outcome {
    for kind in [IBV_QPT_RC, IBV_QPT_UC] {
        let mut pair = Pair::new(env, &Spec::new(kind))?;
        for (i, op) in Op::of(kind).iter().take(4).enumerate() {
            let bytes = pattern(i as u64, 33);
            pair.near.put(0, &bytes)?;
            if op.recv.is_some() {
                pair.far_recv(1, 4096, 64)?;
            }
            let request = op
                .request(1, pair.to.base + 4096, pair.to.rkey)
                .sge(Sge { lkey: 0, ..pair.near.sge(0, 33) })
                .flags(IBV_SEND_INLINE);
            same!(pair.succeed(request)?.opcode, op.wc, "opcode");
            if op.recv.is_some() {
                same!(pair.far.one(Side::Recv)?.byte_len, 33, "{}: byte_len", op.name);
            } else {
                // What follows it arrives later.
                pair.ping(1)?;
            }
            same!(pair.far.get(4096, 33)?, bytes, "{}: data", op.name);
        }
    }
    Ok(())
}

fn not_with_reads_and_atomics(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    for op in [Op::READ, Op::CAS, Op::FAA] {
        let request = pair.request(op, 1, 0, 8).flags(IBV_SEND_INLINE);
        let got = pair.near.qp().post_send(&[request]);
        check!(matches!(got, Err((e, Some(0))) if e > 0), "{}: expected an error, got {got:?}", op.name);
    }
    Ok(())
}
