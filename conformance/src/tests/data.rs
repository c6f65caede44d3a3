//! Data arrives whole, where it should, with every operation.

use std::time::Instant;

use freeflow_abi::*;

use crate::suite::{Env, LONG, Op, Outcome, Pair, Side, Spec, check, same, tests};
use crate::verbs::{Recv, Send, Sge, pattern};

tests! { "data";
    every_operation_rc Anywhere "ibv_post_send(3): table of opcodes; IBTA 9.4";
    every_operation_uc Anywhere "ibv_post_send(3): table of opcodes; IBTA 9.4";
    every_operation_ud Anywhere "ibv_post_send(3): table of opcodes; IBTA 9.4";
    sizes_around_the_mtu Anywhere "IBTA 9.7.4.1.2: packets of a message";
    unequal_elements Anywhere "ibv_post_send(3): sg_list; totals over many elements";
    empty_elements_are_skipped Anywhere "an element of no bytes is skipped";
    zero_length_rc Anywhere "IBTA 9.7.4.1.4: a message of no bytes takes a PSN";
    zero_length_uc Anywhere "IBTA 9.8.2";
    zero_length_ud Anywhere "IBTA 9.8.3";
    immediate_data_is_big_endian Anywhere "ibv_post_send(3): imm_data in network byte order";
    both_ways_at_once Anywhere "a connection carries both directions";
    longest_message Anywhere "IBTA 9.7.4.1.6: 2^31 bytes pass";
    too_long_is_refused OneProcess "IBTA 9.7.4.1.6: more than 2^31 bytes is refused";
}

/// Runs one operation with these bytes, and looks at both completions and the data.
pub(super) fn transfer(pair: &mut Pair, op: Op, wr_id: u64, bytes: &[u8]) -> Outcome {
    let (from, to, len) = (0, 32 << 10, bytes.len());
    let kind = pair.near.spec.kind;
    let grh = if kind == IBV_QPT_UD { 40 } else { 0 };
    let read = op.opcode == IBV_WR_RDMA_READ;
    pair.near.put(from, bytes)?;
    pair.near.put(to, &vec![0xEE; len + 16])?;
    pair.far.put(to, &vec![0xEE; grh + len + 16])?;
    if read {
        pair.far.put(to, bytes)?;
        pair.near.put(from, &vec![0xEE; len])?;
    }
    let imm = [0x81, 2, 3, wr_id as u8];
    if op.recv.is_some() {
        pair.far_recv(wr_id, to, grh + len)?;
    }
    let mut request = pair.request(op, wr_id, from, len).imm(imm);
    request = if op.is_remote() {
        op.request(wr_id, pair.to.base + to as u64, pair.to.rkey).imm(imm).sge(pair.near.sge(from, len))
    } else {
        request
    };
    let ah;
    if kind == IBV_QPT_UD {
        ah = pair.near.ah(&pair.to)?;
        let target = crate::verbs::Target::Ud(ah.ptr as usize, pair.to.qpn, crate::suite::QKEY);
        pair.near.send(&[request.to(target)])?;
    } else {
        pair.near.send(&[request])?;
    }
    let sent = pair.near.one(Side::Send)?;
    same!((sent.wr_id, sent.status), (wr_id, IBV_WC_SUCCESS), "{} of {len}: completion", op.name);
    same!(sent.opcode, op.wc, "{} of {len}: opcode of the completion", op.name);
    same!(sent.qp_num, pair.near.qp().number(), "{}: qp_num", op.name);
    if read {
        same!(pair.near.get(from, len)?, bytes, "{} of {len}: data", op.name);
        return Ok(());
    }
    if let Some(opcode) = op.recv {
        let got = pair.far.one(Side::Recv)?;
        same!((got.wr_id, got.status), (wr_id, IBV_WC_SUCCESS), "{} of {len}: receive", op.name);
        same!(got.opcode, opcode, "{} of {len}: opcode of the receive", op.name);
        same!(got.byte_len as usize, grh + len, "{} of {len}: byte_len of the receive", op.name);
        same!(got.qp_num, pair.to.qpn, "{}: qp_num of the receive", op.name);
        same!(got.flags & IBV_WC_WITH_IMM != 0, op.has_imm(), "{}: IBV_WC_WITH_IMM", op.name);
        if op.has_imm() {
            same!(got.imm.to_ne_bytes(), imm, "{}: immediate data", op.name);
        }
        if kind == IBV_QPT_UD {
            same!(got.src_qp, pair.near.qp().number(), "src_qp");
            check!(got.flags & IBV_WC_GRH != 0, "IBV_WC_GRH is not set: {got:?}");
        }
    }
    let mut got = pair.far.get(to, grh + len + 16)?;
    if kind == IBV_QPT_UC && op.recv.is_none() {
        // It is sent, which is not to say that it has arrived.
        let end = Instant::now() + LONG;
        while got[grh..grh + len] != *bytes && Instant::now() < end {
            got = pair.far.get(to, grh + len + 16)?;
        }
    }
    same!(got[grh..grh + len], *bytes, "{} of {len}: data", op.name);
    same!(got[grh + len..], [0xEE; 16], "{} of {len}: bytes behind the data", op.name);
    Ok(())
}

fn every_operation(env: &Env, kind: u32) -> Outcome {
    let mut pair = Pair::new(env, &Spec::new(kind))?;
    for (i, op) in Op::of(kind).iter().filter(|op| !op.is_atomic()).enumerate() {
        for len in [1, 7, 64, 1000] {
            transfer(&mut pair, *op, i as u64, &pattern(i as u64 + len as u64, len))?;
        }
    }
    Ok(())
}

fn every_operation_rc(env: &Env) -> Outcome {
    every_operation(env, IBV_QPT_RC)
}

fn every_operation_uc(env: &Env) -> Outcome {
    every_operation(env, IBV_QPT_UC)
}

fn every_operation_ud(env: &Env) -> Outcome {
    every_operation(env, IBV_QPT_UD)
}

fn sizes_around_the_mtu(env: &Env) -> Outcome {
    for (mtu, bytes) in [(IBV_MTU_256, 256), (IBV_MTU_1024, 1024)] {
        let mut pair = Pair::new(env, &Spec { mtu, ..Spec::rc() })?;
        for n in [bytes - 1, bytes, bytes + 1, 2 * bytes, 3 * bytes + 1, 9 * bytes - 1] {
            for op in [Op::SEND, Op::WRITE, Op::WRITE_IMM, Op::READ] {
                transfer(&mut pair, op, n as u64, &pattern(n as u64, n))?;
            }
        }
    }
    Ok(())
}

fn unequal_elements(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let lengths = [[1, 999, 3, 4097], [2000, 1, 1, 3098], [5, 5, 5085, 5]];
    for (i, out) in lengths.iter().enumerate() {
        let back = lengths[(i + 1) % 3];
        let bytes = pattern(i as u64, 5100);
        // Gathered from four places, scattered to four others.
        let place = |k: usize, len: usize| (k * 8192 + 13 * (k + i), len);
        let mut at = 0;
        let mut request = Send::new(1, IBV_WR_SEND);
        for (k, &len) in out.iter().enumerate() {
            let (offset, len) = place(k, len);
            pair.near.put(offset, &bytes[at..at + len])?;
            request = request.sge(pair.near.sge(offset, len));
            at += len;
        }
        let mut recv = Recv::new(2);
        for (k, &len) in back.iter().enumerate() {
            let (offset, len) = place(k, len);
            let addr = pair.to.base + offset as u64;
            recv = recv.sge(Sge { addr, length: len as u32, lkey: pair.to.lkey });
        }
        pair.far.post_recv(vec![recv])?;
        pair.succeed(request)?;
        same!(pair.far.one(Side::Recv)?.byte_len, 5100, "byte_len");
        let mut got = Vec::new();
        for (k, &len) in back.iter().enumerate() {
            let (offset, len) = place(k, len);
            got.extend(pair.far.get(offset, len)?);
        }
        same!(got, bytes, "data of lists {out:?} and {back:?}");
    }
    Ok(())
}

fn empty_elements_are_skipped(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let bytes = pattern(3, 300);
    pair.near.put(0, &bytes)?;
    let empty = Sge { addr: 0, length: 0, lkey: 0 };
    let request = Send::new(1, IBV_WR_SEND)
        .sge(empty)
        .sge(pair.near.sge(0, 100))
        .sge(empty)
        .sge(pair.near.sge(100, 200));
    let part = |at: u64, length| Sge { addr: pair.to.base + at, length, lkey: pair.to.lkey };
    let recv = Recv::new(1).sge(part(4096, 50)).sge(empty).sge(part(4146, 250)).sge(empty);
    pair.far.post_recv(vec![recv])?;
    pair.succeed(request)?;
    same!(pair.far.one(Side::Recv)?.byte_len, 300, "byte_len");
    same!(pair.far.get(4096, 300)?, bytes, "data");
    Ok(())
}

fn zero_length(env: &Env, kind: u32) -> Outcome {
    let mut pair = Pair::new(env, &Spec::new(kind))?;
    for round in 0..3 {
        for (i, op) in Op::of(kind).iter().filter(|op| !op.is_atomic()).enumerate() {
            transfer(&mut pair, *op, i as u64, &[])?;
            transfer(&mut pair, Op::SEND, 7, &pattern(round + i as u64, 100))?;
        }
    }
    if kind != IBV_QPT_RC {
        return Ok(());
    }
    // No element at all, and no address that the key could be looked up for (IBTA C9-88: the key
    // of a request of no bytes is not checked).
    for op in [Op::WRITE, Op::READ] {
        let bare = op.request(9, 0, 0);
        let wc = pair.run(bare)?;
        same!(wc.status, IBV_WC_SUCCESS, "{} of no element, key 0", op.name);
    }
    pair.far.post_recv(vec![Recv::new(11)])?;
    pair.succeed(Send::new(10, IBV_WR_SEND))?;
    let got = pair.far.one(Side::Recv)?;
    same!((got.wr_id, got.byte_len), (11, 0), "receive of no element");
    pair.ping(12)
}

fn zero_length_rc(env: &Env) -> Outcome {
    zero_length(env, IBV_QPT_RC)
}

fn zero_length_uc(env: &Env) -> Outcome {
    zero_length(env, IBV_QPT_UC)
}

fn zero_length_ud(env: &Env) -> Outcome {
    zero_length(env, IBV_QPT_UD)
}

fn immediate_data_is_big_endian(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for bytes in [[0, 0, 0, 1], [0x80, 0, 0, 0], [0xFF; 4], [1, 2, 3, 4], [0; 4]] {
        pair.far_recv(1, 0, 8)?;
        pair.succeed(pair.request(Op::SEND_IMM, 1, 0, 4).imm(bytes))?;
        let got = pair.far.one(Side::Recv)?;
        same!(got.imm.to_ne_bytes(), bytes, "immediate data, byte for byte");
        check!(got.flags & IBV_WC_WITH_IMM != 0, "IBV_WC_WITH_IMM is not set");
    }
    Ok(())
}

fn both_ways_at_once(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let back = pair.near.addr();
    for i in 0..32 {
        pair.far_recv(i, 1024 + 64 * i as usize, 64)?;
        pair.near.recv(i, 1024 + 64 * i as usize, 64)?;
    }
    pair.near.put(0, &pattern(1, 64))?;
    pair.far.put(0, &pattern(2, 64))?;
    let far_sge = Sge { addr: pair.to.base, length: 64, lkey: pair.to.lkey };
    for i in 0..32 {
        pair.near.send(&[pair.request(Op::SEND, i, 0, 64)])?;
        pair.far.post_send(vec![Op::SEND.request(i, back.base, back.rkey).sge(far_sge)])?;
    }
    for (wcs, what) in [
        (pair.near.wait(Side::Send, 32)?, "near sends"),
        (pair.near.wait(Side::Recv, 32)?, "near receives"),
        (pair.far.wait(Side::Send, 32)?, "far sends"),
        (pair.far.wait(Side::Recv, 32)?, "far receives"),
    ] {
        let ids: Vec<_> = wcs.iter().map(|wc| (wc.wr_id, wc.status)).collect();
        let expected: Vec<_> = (0..32).map(|i| (i, IBV_WC_SUCCESS)).collect();
        same!(ids, expected, "{what}");
    }
    same!(pair.far.get(1024 + 64 * 31, 64)?, pattern(1, 64), "data at the far end");
    same!(pair.near.get(1024 + 64 * 31, 64)?, pattern(2, 64), "data at the near end");
    Ok(())
}

/// Elements that add up to `total`, all of the same memory.
fn repeated(mut total: u64, part: u64, sge: Sge) -> Vec<Sge> {
    let mut list = Vec::new();
    while total != 0 {
        let length = total.min(part) as u32;
        list.push(Sge { length, ..sge });
        total -= u64::from(length);
    }
    list
}

fn longest_message(env: &Env) -> Outcome {
    const LONGEST: u64 = 1 << 31;
    const PART: usize = 512 << 20;
    if env.shorter > 1 {
        crate::suite::skip!("2^31 bytes take too long for a shortened run");
    }
    let spec = Spec { memory: PART, timeout: 20, ..Spec::rc() };
    let mut pair = Pair::new(env, &spec)?;
    let bytes = pattern(1, 4096);
    pair.near.put(PART - 4096, &bytes)?;
    let far = Sge { addr: pair.to.base, length: 0, lkey: pair.to.lkey };
    let mut recv = Recv::new(1);
    recv.sges = repeated(LONGEST, PART as u64, far);
    pair.far.post_recv(vec![recv])?;
    let mut request = Send::new(1, IBV_WR_SEND);
    request.sges = repeated(LONGEST, PART as u64, pair.near.sge(0, 0));
    pair.near.send(&[request])?;
    let within = std::time::Duration::from_secs(250);
    let sent = pair.near.cq(Side::Send).wait(1, within)?;
    same!(sent[0].status, IBV_WC_SUCCESS, "status of 2^31 bytes");
    let got = pair.far.one(Side::Recv)?;
    same!((got.status, got.byte_len), (IBV_WC_SUCCESS, 1 << 31), "receive of 2^31 bytes");
    same!(pair.far.get(PART - 4096, 4096)?, bytes, "the last bytes");
    Ok(())
}

fn too_long_is_refused(env: &Env) -> Outcome {
    const PART: usize = 1 << 30;
    let pair = Pair::new(env, &Spec { memory: PART, ..Spec::rc() })?;
    for op in [Op::SEND, Op::WRITE, Op::READ] {
        let mut request = op.request(1, pair.to.base, pair.to.rkey);
        request.sges = repeated((1 << 31) + 1, PART as u64, pair.near.sge(0, 0));
        // At once, or as the error of the completion: both are allowed (IBTA 10.8.3).
        match pair.near.qp().post_send(&[request]) {
            Err((errno, at)) => {
                check!(errno > 0, "errno {errno}");
                same!(at, Some(0), "{}: bad_wr", op.name);
            }
            Ok(()) => {
                let wc = pair.near.one(Side::Send)?;
                same!(wc.status, IBV_WC_LOC_LEN_ERR, "{}: status of 2^31 + 1 bytes", op.name);
                return Ok(());
            }
        }
    }
    Ok(())
}
