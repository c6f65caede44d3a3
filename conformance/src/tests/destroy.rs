//! Destroying objects: what goes, what stays, and who is in the way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use freeflow_abi::*;

use crate::suite::{End, Env, LONG, Op, Outcome, Pair, QUIET, Side, Spec, Stop, check, fail, same, tests};
use crate::verbs::{Cq, Qp, Recv, verb};

tests! { "destroy";
    purges_only_its_own_completions OneProcess "ibv_destroy_qp(3)";
    while_another_thread_polls OneProcess "ibv_destroy_qp(3): verbs are thread-safe";
    without_error_flushes_nothing OneProcess "no completion comes from destroying";
    error_first_flushes_all OneProcess "ERR, then all receives are flushed";
    with_work_outstanding OneProcess "ibv_destroy_qp(3): outstanding work does not stop it";
    busy_objects OneProcess "ibv_destroy_cq(3), ibv_dealloc_pd(3): EBUSY while used";
    numbers_are_not_reused_for_old_traffic OneProcess "a new queue pair gets nothing of the old one";
    peer_process_dies TwoProcesses "ibv_poll_cq(3): IBV_WC_RETRY_EXC_ERR when the peer is gone";
    many_times OneProcess "objects can be made and destroyed without end";
}

/// Two queue pairs that are connected to themselves and share a completion queue.
fn loops(end: &End, cq: &std::sync::Arc<Cq>, n: usize) -> Outcome<Vec<Qp>> {
    let mut all = Vec::new();
    for _ in 0..n {
        let qp = Qp::new(&end.pd, cq, cq, &Spec::rc().qp(None))?;
        let mut to = end.addr();
        to.qpn = qp.number();
        to.psn = end.psn;
        qp.must_modify(&end.to_init())?;
        qp.must_modify(&end.to_rtr(&to))?;
        qp.must_modify(&end.to_rts())?;
        all.push(qp);
    }
    Ok(all)
}

fn purges_only_its_own_completions(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let cq = Cq::new(&end.ctx, 64)?;
    let mut qps = loops(&end, &cq, 2)?;
    let to = end.addr();
    for i in 0..10 {
        for (k, qp) in qps.iter().enumerate() {
            let wr_id = 100 * k as u64 + i;
            qp.send(&[Op::WRITE.request(wr_id, to.base, to.rkey).sge(end.sge(0, 8))])?;
        }
    }
    // A fence of the second: when its last is there, so are the others of it. The first one's are
    // seen by its own last write.
    let sync = loops(&end, &end.send_cq, 1)?;
    for qp in &qps {
        let flag = end.mr().buf.load(4096)?;
        end.mr().buf.store(4104, flag + 1)?;
        let write = Op::WRITE.request(50, to.base + 4096, to.rkey).sge(end.sge(4104, 8));
        qp.send(&[write])?;
        let limit = std::time::Instant::now() + LONG;
        while end.mr().buf.load(4096)? != flag + 1 {
            check!(std::time::Instant::now() < limit, "the last write never came");
            std::thread::yield_now();
        }
    }
    drop(qps.remove(0));
    let got = cq.wait(11, LONG)?;
    for wc in &got {
        same!(wc.qp_num, qps[0].number(), "queue pair of a completion after destroying the other");
    }
    let ids: Vec<_> = got.iter().map(|wc| wc.wr_id).collect();
    let expected: Vec<_> = (100..110).chain([50]).collect();
    same!(ids, expected, "completions of the one that stays");
    same!(cq.poll(10).map(|w| w.len()), Ok(0), "completions left");
    drop(sync);
    Ok(())
}

fn while_another_thread_polls(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let cq = Cq::new(&end.ctx, 256)?;
    let stop = AtomicBool::new(false);
    let to = end.addr();
    std::thread::scope(|scope| -> Outcome {
        let poller = scope.spawn(|| -> Outcome<u64> {
            let mut n = 0;
            // Relaxed: only the end matters.
            while !stop.load(Ordering::Relaxed) {
                match cq.poll(16) {
                    Ok(got) => n += got.len() as u64,
                    Err(code) => fail!("ibv_poll_cq returned {code}"),
                }
                std::thread::yield_now();
            }
            Ok(n)
        });
        let work = || -> Outcome {
            for _ in 0..env.many(20_000).min(200) {
                let qps = loops(&end, &cq, 2)?;
                for qp in &qps {
                    for i in 0..20 {
                        qp.send(&[Op::WRITE.request(i, to.base, to.rkey).sge(end.sge(0, 8))])?;
                    }
                }
            }
            Ok(())
        };
        let result = work();
        stop.store(true, Ordering::Relaxed);
        let polled = poller.join().unwrap_or_else(|_| Err(Stop::Fail("the poller panicked".to_owned())));
        result?;
        polled.map(|_| ())
    })
}

fn without_error_flushes_nothing(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for i in 0..8 {
        pair.near.recv(i, 0, 64)?;
    }
    pair.near.qp = None;
    pair.near.quiet(Side::Recv, QUIET)?;
    pair.near.quiet(Side::Send, QUIET)
}

fn error_first_flushes_all(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for i in 0..8 {
        pair.near.recv(i, 0, 64)?;
    }
    pair.near.qp().set_state(IBV_QPS_ERR)?;
    let got: Vec<_> = pair.near.wait(Side::Recv, 8)?.iter().map(|w| (w.wr_id, w.status)).collect();
    same!(got, (0..8).map(|i| (i, IBV_WC_WR_FLUSH_ERR)).collect::<Vec<_>>(), "flushed receives");
    pair.near.qp = None;
    pair.near.quiet(Side::Recv, QUIET)
}

fn with_work_outstanding(env: &Env) -> Outcome {
    for _ in 0..env.many(2000).min(30) {
        let mut pair = Pair::new(env, &Spec::rc())?;
        for i in 0..20 {
            // Some wait for a receive, some are on their way.
            pair.near.send(&[pair.request(Op::WRITE, i, 0, 4096)])?;
        }
        pair.near.send(&[pair.request(Op::SEND, 99, 0, 8)])?;
        for i in 0..5 {
            pair.near.recv(i, 0, 64)?;
        }
        pair.near.qp = None;
        pair.near.mr = None;
    }
    Ok(())
}

fn busy_objects(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    same!(end.send_cq.destroy_now(), libc::EBUSY, "ibv_destroy_cq with a queue pair");
    same!(verb!(ibv_dealloc_pd(end.pd.ptr)), libc::EBUSY, "ibv_dealloc_pd with a queue pair");
    // Both still work.
    let mut pair = Pair::new(env, &Spec::rc())?;
    same!(pair.near.send_cq.destroy_now(), libc::EBUSY, "ibv_destroy_cq");
    pair.ping(1)?;
    pair.near.qp = None;
    let failed = verb!(ibv_dealloc_pd(pair.near.pd.ptr));
    same!(failed, libc::EBUSY, "ibv_dealloc_pd with a region");
    Ok(())
}

fn numbers_are_not_reused_for_old_traffic(env: &Env) -> Outcome {
    for round in 0..env.many(2000).min(30) {
        let spec = Spec { timeout: 10, retry: 1, ..Spec::rc() };
        let mut pair = Pair::new(env, &spec)?;
        pair.ping(1)?;
        let old = pair.to;
        // The far queue pair goes, another comes; the near end still talks to the old one.
        let far = pair.far.here_mut()?;
        far.qp = None;
        let fresh = Qp::new(&far.pd, &far.send_cq, &far.recv_cq, &spec.qp(None))?;
        check!(fresh.number() != old.qpn, "number {:#x} is given again at once", old.qpn);
        fresh.must_modify(&far.to_init())?;
        let mut here = pair.near.addr();
        here.psn = 77;
        let rtr = far.to_rtr(&here);
        fresh.must_modify(&rtr)?;
        fresh.recv(&[Recv::new(round).sge(far.sge(0, 64))])?;
        far.mr().buf.fill(0x33);
        let request = pair.request(Op::SEND, 1, 0, 8);
        pair.refuse("old number", request, IBV_WC_RETRY_EXC_ERR)?;
        let far = pair.far.here()?;
        same!(far.peek(Side::Recv)?, [], "receives of the new queue pair");
        same!(far.get(0, 64)?, [0x33; 64], "memory of the new queue pair");
    }
    Ok(())
}

fn peer_process_dies(env: &Env) -> Outcome {
    let spec = Spec { timeout: 12, retry: 2, ..Spec::rc() };
    let mut pair = Pair::new(env, &spec)?;
    pair.ping(1)?;
    for i in 0..4 {
        pair.near.recv(i, 0, 64)?;
    }
    let mut wr_id = 5;
    pair.far.die()?;
    // A dying process's socket closes before its device does, and a device may learn of a death
    // only later: until then it answers. Nothing but success may come before the failure.
    let deadline = Instant::now() + LONG;
    let (mut got, first) = loop {
        let first = wr_id;
        wr_id += 2;
        let writes = [first, first + 1].map(|id| pair.request(Op::WRITE, id, 0, 8));
        pair.near.send(&writes)?;
        let got = pair.near.wait(Side::Send, 2)?;
        let got: Vec<_> = got.iter().map(|w| (w.wr_id, w.status)).collect();
        if got != [first, first + 1].map(|id| (id, IBV_WC_SUCCESS)) {
            break (got, first);
        }
        check!(Instant::now() < deadline, "writes succeed {LONG:?} after the peer's death");
        std::thread::yield_now();
    };
    let mut failed = first;
    if got[0] == (first, IBV_WC_SUCCESS) {
        // It was gone between the two: what is posted behind the failure is flushed as well.
        failed = first + 1;
        pair.near.send(&[pair.request(Op::WRITE, wr_id, 0, 8)])?;
        let last = pair.near.one(Side::Send)?;
        got = vec![got[1], (last.wr_id, last.status)];
    }
    let gone = [(failed, IBV_WC_RETRY_EXC_ERR), (failed + 1, IBV_WC_WR_FLUSH_ERR)];
    same!(got, gone, "completions");
    let got = pair.near.wait(Side::Recv, 4)?;
    check!(got.iter().all(|w| w.status == IBV_WC_WR_FLUSH_ERR), "receives: {got:?}");
    Ok(())
}

fn many_times(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    for _ in 0..env.many(50_000).min(1000) {
        let cq = Cq::new(&end.ctx, 16)?;
        let qp = Qp::new(&end.pd, &cq, &cq, &Spec::rc().qp(None))?;
        let mr = crate::verbs::Mr::new(&end.pd, 4096, IBV_ACCESS_LOCAL_WRITE)?;
        drop((qp, cq, mr));
    }
    Ok(())
}
