//! The extended interfaces.

use freeflow_abi::*;

use crate::suite::{End, Env, LONG, Op, Outcome, Pair, QKEY, QUIET, Side, Spec, check, fail, same, skip, tests};
use crate::verbs::{CqEx, Qp, Wr, name_of, operation, pattern};

tests! { "extended";
    every_operation Anywhere "ibv_wr_post(3)";
    elements_and_inline_lists Anywhere "ibv_wr_set_sge_list(3), ibv_wr_set_inline_data_list(3)";
    datagrams Anywhere "ibv_wr_set_ud_addr(3)";
    abort_posts_nothing Anywhere "ibv_wr_abort(3)";
    failure_posts_nothing OneProcess "ibv_wr_complete(3): all or nothing";
    operations_of_other_services OneProcess "ibv_create_qp_ex(3): send_ops_flags the service does not have";
    start_locks_out_other_threads OneProcess "ibv_wr_start(3): thread-safe until ibv_wr_complete";
    poll_consumes_what_was_read OneProcess "ibv_create_cq_ex(3)";
    poll_reads_every_field OneProcess "ibv_create_cq_ex(3): wc_flags";
    timestamps_are_of_the_devices_clock OneProcess "ibv_query_rt_values_ex(3): the clock of completion timestamps";
    timestamps_grow OneProcess "ibv_create_cq_ex(3): IBV_WC_EX_WITH_COMPLETION_TIMESTAMP";
    time_of_day OneProcess "ibv_create_cq_ex(3): IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK";
}

const OPS: u64 = IBV_QP_EX_WITH_RDMA_WRITE
    | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
    | IBV_QP_EX_WITH_SEND
    | IBV_QP_EX_WITH_SEND_WITH_IMM
    | IBV_QP_EX_WITH_RDMA_READ
    | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP
    | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD;

/// Skips the test if the device has no extended queue pairs.
fn offered(env: &Env, spec: &Spec) -> Outcome {
    let end = End::open(env, false, &Spec { ops: 0, ..spec.clone() })?;
    match Qp::create(&end.pd, &end.send_cq, &end.recv_cq, &spec.qp(None)) {
        Err(libc::EOPNOTSUPP) => skip!("device does not offer extended queue pairs"),
        Err(errno) => fail!("ibv_create_qp_ex: {}", name_of(errno)),
        Ok(_) => Ok(()),
    }
}

fn pair(env: &Env) -> Outcome<Pair> {
    let spec = Spec { ops: OPS, ..Spec::rc() };
    offered(env, &spec)?;
    Pair::new(env, &spec)
}

fn complete(wr: Wr<'_>) -> Outcome {
    match wr.complete()? {
        0 => Ok(()),
        failed => fail!("ibv_wr_complete: {}", name_of(failed)),
    }
}

fn every_operation(env: &Env) -> Outcome {
    let mut pair = pair(env)?;
    let bytes = pattern(1, 100);
    pair.near.put(0, &bytes)?;
    pair.far.put(0, &5_u64.to_ne_bytes())?;
    for i in 0..3 {
        pair.far_recv(i, 4096, 100)?;
    }
    let (base, rkey) = (pair.to.base, pair.to.rkey);
    let imm = u32::from_ne_bytes([1, 2, 3, 4]);
    let sge = pair.near.sge(0, 100);
    let wr = Wr::start(pair.near.qp())?;
    wr.next(0, IBV_SEND_SIGNALED).send()?;
    wr.sge(sge)?;
    wr.next(1, IBV_SEND_SIGNALED).send_imm(imm)?;
    wr.sge(sge)?;
    wr.next(2, IBV_SEND_SIGNALED).write(rkey, base + 8192)?;
    wr.sge(sge)?;
    wr.next(3, IBV_SEND_SIGNALED).write_imm(rkey, base + 12288, imm)?;
    wr.sge(sge)?;
    wr.next(4, IBV_SEND_SIGNALED).read(rkey, base + 8192)?;
    wr.sge(pair.near.sge(16384, 100))?;
    wr.next(5, 0).fetch_add(rkey, base, 2)?;
    wr.sge(pair.near.sge(20480, 8))?;
    wr.next(6, IBV_SEND_SIGNALED).cmp_swp(rkey, base, 7, 9)?;
    wr.sge(pair.near.sge(20488, 8))?;
    complete(wr)?;
    let got: Vec<_> = pair.near.wait(Side::Send, 6)?.iter().map(|w| (w.wr_id, w.status, w.opcode)).collect();
    let expected = [
        (0, 0, IBV_WC_SEND),
        (1, 0, IBV_WC_SEND),
        (2, 0, IBV_WC_RDMA_WRITE),
        (3, 0, IBV_WC_RDMA_WRITE),
        (4, 0, IBV_WC_RDMA_READ),
        (6, 0, IBV_WC_COMP_SWAP),
    ];
    same!(got, expected, "completions");
    let got = pair.far.wait(Side::Recv, 3)?;
    same!((got[1].imm, got[2].imm), (imm, imm), "immediate data");
    same!(pair.far.get(4096, 100)?, bytes, "data of the send");
    same!(pair.far.get(8192, 100)?, bytes, "data of the write");
    same!(pair.far.get(12288, 100)?, bytes, "data of the write with immediate");
    same!(pair.near.get(16384, 100)?, bytes, "data of the read");
    same!(pair.near.get(20480, 8)?, 5_u64.to_ne_bytes(), "word before the addition");
    same!(pair.near.get(20488, 8)?, 7_u64.to_ne_bytes(), "word before the swap");
    same!(pair.far.get(0, 8)?, 9_u64.to_ne_bytes(), "word at the end");
    Ok(())
}

fn elements_and_inline_lists(env: &Env) -> Outcome {
    let mut pair = pair(env)?;
    let bytes = pattern(2, 60);
    pair.near.put(0, &bytes)?;
    for i in 0..3 {
        pair.far_recv(i, 4096 + 64 * i as usize, 64)?;
    }
    let mut private = bytes.clone();
    let wr = Wr::start(pair.near.qp())?;
    wr.next(0, 0).send()?;
    wr.sges(&[pair.near.sge(0, 1), pair.near.sge(1, 40), pair.near.sge(41, 19)])?;
    wr.next(1, 0).send()?;
    wr.inline(&private)?;
    wr.next(2, IBV_SEND_SIGNALED).send()?;
    wr.inline_list(&[&private[..7], &[], &private[7..]])?;
    // The data was taken when it was set.
    private.fill(0);
    complete(wr)?;
    let wc = pair.near.one(Side::Send)?;
    same!((wc.wr_id, wc.status), (2, IBV_WC_SUCCESS), "completion");
    pair.far.wait(Side::Recv, 3)?;
    for i in 0..3 {
        same!(pair.far.get(4096 + 64 * i, 60)?, bytes, "data of request {i}");
    }
    Ok(())
}

fn datagrams(env: &Env) -> Outcome {
    let spec = Spec { ops: IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM, ..Spec::ud() };
    offered(env, &spec)?;
    let mut pair = Pair::new(env, &spec)?;
    let ah = pair.near.ah(&pair.to)?;
    let bytes = pattern(4, 50);
    pair.near.put(0, &bytes)?;
    pair.far_recv(1, 0, 140)?;
    let wr = Wr::start(pair.near.qp())?;
    wr.next(1, IBV_SEND_SIGNALED).send_imm(7)?;
    wr.ud(&ah, pair.to.qpn, QKEY)?;
    wr.sge(pair.near.sge(0, 50))?;
    complete(wr)?;
    same!(pair.near.one(Side::Send)?.status, IBV_WC_SUCCESS, "status");
    let got = pair.far.one(Side::Recv)?;
    same!((got.byte_len, got.imm), (90, 7), "byte_len and immediate data");
    same!(pair.far.get(40, 50)?, bytes, "data");
    Ok(())
}

fn abort_posts_nothing(env: &Env) -> Outcome {
    let mut pair = pair(env)?;
    let wr = Wr::start(pair.near.qp())?;
    wr.next(1, IBV_SEND_SIGNALED).write(pair.to.rkey, pair.to.base)?;
    wr.sge(pair.near.sge(0, 8))?;
    wr.abort()?;
    pair.near.quiet(Side::Send, QUIET)?;
    // The queue is free again, for either interface.
    pair.ping(2)?;
    let wr = Wr::start(pair.near.qp())?;
    wr.next(3, IBV_SEND_SIGNALED).write(pair.to.rkey, pair.to.base)?;
    wr.sge(pair.near.sge(0, 8))?;
    complete(wr)?;
    same!(pair.near.one(Side::Send)?.wr_id, 3, "completion");
    Ok(())
}

fn failure_posts_nothing(env: &Env) -> Outcome {
    let mut pair = pair(env)?;
    let wr = Wr::start(pair.near.qp())?;
    wr.next(1, IBV_SEND_SIGNALED).write(pair.to.rkey, pair.to.base)?;
    wr.sge(pair.near.sge(0, 8))?;
    wr.next(2, IBV_SEND_SIGNALED).write(pair.to.rkey, pair.to.base)?;
    let many = vec![pair.near.sge(0, 1); pair.near.qp().cap.max_send_sge as usize + 1];
    wr.sges(&many)?;
    check!(wr.complete()? > 0, "too many elements were taken");
    pair.near.quiet(Side::Send, QUIET)?;
    pair.ping(3)
}

fn operations_of_other_services(env: &Env) -> Outcome {
    offered(env, &Spec { ops: OPS, ..Spec::rc() })?;
    let end = End::open(env, false, &Spec::rc())?;
    let wrong = [
        (IBV_QPT_UC, IBV_QP_EX_WITH_RDMA_READ),
        (IBV_QPT_UC, IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD),
        (IBV_QPT_UD, IBV_QP_EX_WITH_RDMA_WRITE),
        (IBV_QPT_RC, 1 << 40),
    ];
    for (kind, ops) in wrong {
        let spec = Spec { ops, ..Spec::new(kind) };
        let made = Qp::create(&end.pd, &end.send_cq, &end.recv_cq, &spec.qp(None));
        check!(
            matches!(made.as_ref().err(), Some(&libc::EOPNOTSUPP) | Some(&libc::EINVAL)),
            "operations {ops:#x} on type {kind}: {:?}",
            made.err()
        );
    }
    Ok(())
}

fn start_locks_out_other_threads(env: &Env) -> Outcome {
    let n = env.many(100_000).min(5000);
    let spec = Spec { ops: OPS, send_wr: 256, cqe: 1024, ..Spec::rc() };
    offered(env, &spec)?;
    let pair = Pair::new(env, &spec)?;
    let qp = pair.near.qp();
    std::thread::scope(|scope| -> Outcome {
        let workers: Vec<_> = (0..2_u64)
            .map(|k| {
                let (pair, qp) = (&pair, qp);
                scope.spawn(move || -> Outcome {
                    for i in 0..n {
                        loop {
                            let wr = Wr::start(qp)?;
                            let id = 1_000_000 * k + 2 * i;
                            for half in 0..2 {
                                wr.next(id + half, IBV_SEND_SIGNALED).write(pair.to.rkey, pair.to.base)?;
                                wr.sge(pair.near.sge(0, 8))?;
                            }
                            match wr.complete()? {
                                0 => break,
                                libc::ENOMEM => std::thread::yield_now(),
                                failed => fail!("ibv_wr_complete: {}", name_of(failed)),
                            }
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        let mut next = [0_u64; 2];
        let mut got = Vec::new();
        for _ in 0..2 * n {
            // Pairs are posted together, and each thread's in order.
            got.extend(pair.near.cq(Side::Send).wait(2, LONG)?.iter().map(|w| w.wr_id));
            let (a, b) = (got[0], got[1]);
            let k = (a / 1_000_000) as usize;
            same!((a % 1_000_000, b), (next[k], a + 1), "completions of thread {k}");
            next[k] += 2;
            got.clear();
        }
        for worker in workers {
            worker.join().unwrap_or_else(|_| Err(crate::suite::Stop::Fail("a thread panicked".to_owned())))?;
        }
        Ok(())
    })
}

/// A queue pair that is connected to itself, with an extended completion queue.
fn looped(end: &End, cq: &CqEx) -> Outcome<Qp> {
    let qp = Qp::new(&end.pd, &cq.cq, &cq.cq, &Spec::rc().qp(None))?;
    let mut to = end.addr();
    to.qpn = qp.number();
    qp.must_modify(&end.to_init())?;
    qp.must_modify(&end.to_rtr(&to))?;
    qp.must_modify(&end.to_rts())?;
    Ok(qp)
}

fn queue(end: &End, flags: u64) -> Outcome<CqEx> {
    match CqEx::create(&end.ctx, 64, flags, 0) {
        Ok(cq) => Ok(cq),
        Err(libc::EOPNOTSUPP) => skip!("device does not offer completion queues with flags {flags:#x}"),
        Err(errno) => fail!("ibv_create_cq_ex: {}", name_of(errno)),
    }
}

fn started(cq: &CqEx) -> Outcome<crate::verbs::Reader<'_>> {
    let end = std::time::Instant::now() + LONG;
    loop {
        if let Some(reader) = cq.start()? {
            return Ok(reader);
        }
        check!(std::time::Instant::now() < end, "no completion within {LONG:?}");
        std::thread::yield_now();
    }
}

fn poll_consumes_what_was_read(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let cq = queue(&end, 0)?;
    check!(cq.start()?.is_none(), "an empty queue has a completion");
    let qp = looped(&end, &cq)?;
    let to = end.addr();
    let write = |i| Op::WRITE.request(i, to.base, to.rkey).sge(end.sge(0, 8));
    // One completion, polled twice.
    qp.send(&[write(1)])?;
    let reader = started(&cq)?;
    same!((reader.wr_id(), reader.status()), (1, IBV_WC_SUCCESS), "first completion");
    check!(!reader.next()?, "a second completion of one request");
    drop(reader);
    check!(cq.start()?.is_none(), "the completion is there again");
    // Three, of which one turn takes two.
    qp.send(&[write(2), write(3), write(4)])?;
    let reader = started(&cq)?;
    same!(reader.wr_id(), 2, "first of three");
    let limit = std::time::Instant::now() + LONG;
    while !reader.next()? {
        check!(std::time::Instant::now() < limit, "no second of three");
    }
    same!(reader.wr_id(), 3, "second of three");
    drop(reader);
    let reader = started(&cq)?;
    same!(reader.wr_id(), 4, "third, in a turn of its own");
    drop(reader);
    check!(cq.start()?.is_none(), "a fourth of three");
    // The plain interface takes from the same queue.
    qp.send(&[write(5), write(6)])?;
    let reader = started(&cq)?;
    same!(reader.wr_id(), 5, "by the extended interface");
    drop(reader);
    same!(cq.cq.wait(1, LONG)?[0].wr_id, 6, "by the plain interface");
    Ok(())
}

fn poll_reads_every_field(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let flags = IBV_WC_EX_WITH_BYTE_LEN
        | IBV_WC_EX_WITH_IMM
        | IBV_WC_EX_WITH_QP_NUM
        | IBV_WC_EX_WITH_SRC_QP
        | IBV_WC_EX_WITH_SLID
        | IBV_WC_EX_WITH_SL
        | IBV_WC_EX_WITH_DLID_PATH_BITS;
    let cq = queue(&end, flags)?;
    let qp = looped(&end, &cq)?;
    let to = end.addr();
    let imm = [9, 8, 7, 6];
    qp.recv(&[crate::verbs::Recv::new(1).sge(end.sge(4096, 64))])?;
    qp.send(&[Op::SEND_IMM.request(2, to.base, to.rkey).sge(end.sge(0, 33)).imm(imm)])?;
    let mut seen = 0;
    while seen != 3 {
        let reader = started(&cq)?;
        same!(reader.status(), IBV_WC_SUCCESS, "status");
        same!(reader.qp_num()?, qp.number(), "qp_num");
        match reader.wr_id() {
            1 => {
                same!(reader.opcode()?, IBV_WC_RECV, "opcode");
                same!(reader.byte_len()?, 33, "byte_len");
                same!(reader.imm()?.to_ne_bytes(), imm, "immediate data");
                same!(reader.flags()? & IBV_WC_WITH_IMM, IBV_WC_WITH_IMM, "wc_flags");
                seen |= 1;
            }
            2 => {
                same!(reader.opcode()?, IBV_WC_SEND, "opcode");
                seen |= 2;
            }
            other => fail!("wr_id {other}"),
        }
    }
    // An error has its vendor's code and number.
    let mut bad = Op::WRITE.request(3, to.base, to.rkey).sge(end.sge(0, 8));
    bad.sges[0].lkey ^= 0x4400;
    qp.send(&[bad])?;
    let reader = started(&cq)?;
    same!((reader.wr_id(), reader.status()), (3, IBV_WC_LOC_PROT_ERR), "error");
    reader.vendor_err()?;
    same!(reader.qp_num()?, qp.number(), "qp_num of an error");
    Ok(())
}

fn timestamps_are_of_the_devices_clock(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let Some(query) = operation!(end.ctx.ptr, query_rt_values) else {
        skip!("device does not offer its clock");
    };
    // A device that counts ticks tells them as nanoseconds.
    let clock = || {
        let mut values = ibv_values_ex { comp_mask: 1, raw_clock: [0; 2] };
        // SAFETY: the library's own operation on its open context.
        let got = unsafe { query(end.ctx.ptr, &mut values) };
        let [seconds, rest] = values.raw_clock;
        (got == 0).then_some(seconds as u64 * 1_000_000_000 + rest as u64)
    };
    if clock().is_none() {
        skip!("device does not offer its clock");
    }
    let cq = queue(&end, IBV_WC_EX_WITH_COMPLETION_TIMESTAMP)?;
    let qp = looped(&end, &cq)?;
    let to = end.addr();
    for i in 0..20 {
        let before = clock();
        qp.send(&[Op::WRITE.request(i, to.base, to.rkey).sge(end.sge(0, 8))])?;
        let reader = started(&cq)?;
        let (at, after) = (Some(reader.timestamp()?), clock());
        check!(before <= at && at <= after, "completed at {at:?}, between {before:?} and {after:?}");
    }
    Ok(())
}

fn timestamps_grow(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let cq = queue(&end, IBV_WC_EX_WITH_COMPLETION_TIMESTAMP)?;
    let qp = looped(&end, &cq)?;
    let to = end.addr();
    let mut last = 0;
    for i in 0..20 {
        qp.send(&[Op::WRITE.request(i, to.base, to.rkey).sge(end.sge(0, 8))])?;
        let reader = started(&cq)?;
        let now = reader.timestamp()?;
        check!(now >= last, "time went from {last} to {now}");
        last = now;
    }
    check!(last != 0, "no time is told");
    Ok(())
}

fn time_of_day(env: &Env) -> Outcome {
    // Of two clocks; and a device may take the time in somewhat larger steps.
    const NEAR: u128 = 1_000_000_000;
    let end = End::open(env, false, &Spec::rc())?;
    let both = IBV_WC_EX_WITH_COMPLETION_TIMESTAMP | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK;
    let cq = queue(&end, both)?;
    let qp = looped(&end, &cq)?;
    let to = end.addr();
    let now = || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |since| since.as_nanos())
    };
    for i in 0..3 {
        let before = now();
        qp.send(&[Op::WRITE.request(i, to.base, to.rkey).sge(end.sge(0, 8))])?;
        let told = u128::from(started(&cq)?.wallclock()?);
        let after = now();
        check!(
            (before - NEAR..after + NEAR).contains(&told),
            "{told} ns, between {before} and {after}"
        );
    }
    Ok(())
}
