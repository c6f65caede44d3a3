//! Many threads at the same objects.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use freeflow_abi::*;

use crate::suite::{End, Env, LONG, Op, Outcome, Pair, Side, Spec, Stop, check, fail, same, tests};
use crate::verbs::{Cq, Mr, Qp, Recv};

tests! { "threads";
    many_post_to_one_queue OneProcess "verbs are thread-safe: each request once, each thread's in order";
    many_poll_one_queue OneProcess "verbs are thread-safe: each completion to one poller";
    objects_of_many_threads OneProcess "verbs are thread-safe: making and destroying";
    receives_posted_by_another_thread OneProcess "posting receives while messages come";
}

fn joined<T>(handle: std::thread::ScopedJoinHandle<'_, Outcome<T>>) -> Outcome<T> {
    handle.join().unwrap_or_else(|_| Err(Stop::Fail("a thread panicked".to_owned())))
}

fn many_post_to_one_queue(env: &Env) -> Outcome {
    const THREADS: u64 = 4;
    let each = env.many(200_000) / THREADS;
    let pair = Pair::new(env, &Spec { send_wr: 128, cqe: 1024, ..Spec::rc() })?;
    let qp = pair.near.qp();
    std::thread::scope(|scope| {
        let posters: Vec<_> = (0..THREADS)
            .map(|k| {
                let pair = &pair;
                scope.spawn(move || -> Outcome {
                    for i in 0..each {
                        let request = pair.request(Op::WRITE, k << 32 | i, 64 * k as usize, 8);
                        loop {
                            match qp.post_send(std::slice::from_ref(&request)) {
                                Ok(()) => break,
                                Err((libc::ENOMEM, _)) => std::thread::yield_now(),
                                Err((errno, _)) => fail!("post: {}", crate::verbs::name_of(errno)),
                            }
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        let mut next: HashMap<u64, u64> = HashMap::new();
        let mut left = each * THREADS;
        while left != 0 {
            let got = pair.near.cq(Side::Send).wait(left.min(16) as usize, LONG)?;
            for wc in got {
                same!(wc.status, IBV_WC_SUCCESS, "status");
                let (k, i) = (wc.wr_id >> 32, wc.wr_id & 0xFFFF_FFFF);
                let expected = next.entry(k).or_default();
                same!(i, *expected, "next completion of thread {k}");
                *expected += 1;
                left -= 1;
            }
        }
        posters.into_iter().try_for_each(joined)
    })
}

fn many_poll_one_queue(env: &Env) -> Outcome {
    const THREADS: usize = 3;
    let n = env.many(100_000);
    let pair = Pair::new(env, &Spec { send_wr: 128, cqe: 1024, ..Spec::rc() })?;
    let polled = AtomicU64::new(0);
    let sum = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let pollers: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| -> Outcome {
                    let end = std::time::Instant::now() + LONG + LONG;
                    // Relaxed: sums, read after the threads are joined; the rest is a hint.
                    while polled.load(Ordering::Relaxed) < n {
                        match pair.near.cq(Side::Send).poll(4) {
                            Ok(got) => {
                                for wc in &got {
                                    same!(wc.status, IBV_WC_SUCCESS, "status");
                                    sum.fetch_add(wc.wr_id, Ordering::Relaxed);
                                }
                                polled.fetch_add(got.len() as u64, Ordering::Relaxed);
                            }
                            Err(code) => fail!("ibv_poll_cq returned {code}"),
                        }
                        check!(std::time::Instant::now() < end, "completions are missing");
                        std::thread::yield_now();
                    }
                    Ok(())
                })
            })
            .collect();
        let mut i = 0;
        while i < n && !pollers.iter().any(|p| p.is_finished()) {
            match pair.near.qp().post_send(&[pair.request(Op::WRITE, i, 0, 8)]) {
                Ok(()) => i += 1,
                Err((libc::ENOMEM, _)) => std::thread::yield_now(),
                Err((errno, _)) => fail!("post: {}", crate::verbs::name_of(errno)),
            }
        }
        pollers.into_iter().try_for_each(joined)
    })?;
    same!(polled.load(Ordering::Relaxed), n, "completions polled");
    same!(sum.load(Ordering::Relaxed), n * (n - 1) / 2, "sum of the wr_ids");
    Ok(())
}

fn objects_of_many_threads(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let rounds = env.many(20_000).min(100);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| -> Outcome {
                    for _ in 0..rounds {
                        let cq = Cq::new(&end.ctx, 16)?;
                        let mr = Mr::new(&end.pd, 8192, end.spec.mr_access)?;
                        let qp = Qp::new(&end.pd, &cq, &cq, &Spec::rc().qp(None))?;
                        let mut to = end.addr();
                        to.qpn = qp.number();
                        qp.must_modify(&end.to_init())?;
                        qp.must_modify(&end.to_rtr(&to))?;
                        qp.must_modify(&end.to_rts())?;
                        qp.recv(&[Recv::new(1).sge(mr.sge(0, 64))])?;
                        qp.send(&[Op::SEND.request(2, 0, 0).sge(mr.sge(4096, 64))])?;
                        let got = cq.wait(2, LONG)?;
                        check!(got.iter().all(|w| w.status == IBV_WC_SUCCESS), "{got:?}");
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(joined)
    })
}

fn receives_posted_by_another_thread(env: &Env) -> Outcome {
    let n = env.many(200_000).min(50_000);
    let spec = Spec { recv_wr: 16, cqe: 512, rnr_timer: 1, ..Spec::rc() };
    let pair = Pair::new(env, &spec)?;
    let far = pair.far.here()?;
    std::thread::scope(|scope| {
        let feeder = scope.spawn(|| -> Outcome {
            let (mut posted, mut got) = (0, 0);
            let mut end = std::time::Instant::now() + LONG;
            while got < n {
                if posted < n {
                    match far.qp().post_recv(&[Recv::new(posted).sge(far.sge(0, 8))]) {
                        Ok(()) => posted += 1,
                        Err((libc::ENOMEM, _)) => {}
                        Err((errno, _)) => fail!("post: {}", crate::verbs::name_of(errno)),
                    }
                }
                for wc in far.peek(Side::Recv)? {
                    same!((wc.wr_id, wc.status), (got, IBV_WC_SUCCESS), "receive");
                    same!(wc.imm, got as u32, "immediate data of receive {got}");
                    got += 1;
                    end = std::time::Instant::now() + LONG;
                }
                check!(std::time::Instant::now() < end, "{got} of {n} messages, then silence");
            }
            Ok(())
        });
        let (mut posted, mut done) = (0, 0);
        while done < n && !feeder.is_finished() {
            while posted < n && posted - done < 48 {
                let request = pair.request(Op::SEND_IMM, posted, 0, 8).imm((posted as u32).to_ne_bytes());
                pair.near.send(&[request])?;
                posted += 1;
            }
            done += pair.near.peek(Side::Send)?.len() as u64;
        }
        joined(feeder)
    })
}
