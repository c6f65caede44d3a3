//! Completion queues: sizes, overrun, resizing.

use freeflow_abi::*;

use crate::suite::{End, Env, LONG, Op, Outcome, Pair, QUIET, Side, Spec, check, fail, same, skip, status_name, tests};
use crate::verbs::{Cq, CqEx, name_of, verb};

tests! { "queues";
    size_is_at_least_what_was_asked OneProcess "ibv_create_cq(3): cqe";
    sizes_out_of_range OneProcess "ibv_create_cq(3): EINVAL";
    overrun OneProcess "ibv_get_async_event(3): IBV_EVENT_CQ_ERR, once, never silent";
    overrun_of_a_receiver Anywhere "IBTA 11.6.3.4: its queue pairs fail, and their peers get no answer";
    full_is_no_overrun Anywhere "ibv_create_cq(3): cqe completions fit";
    resize_keeps_completions OneProcess "ibv_resize_cq(3)";
    resize_below_what_is_there OneProcess "ibv_resize_cq(3): outstanding completions are never lost";
    resize_under_load OneProcess "resizing while completions come";
    flags OneProcess "ibv_create_cq_ex(3): single-threaded, ignore overrun";
}

fn size_is_at_least_what_was_asked(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    for n in [1, 2, 3, 100, 1000, 4096] {
        let cq = Cq::new(&end.ctx, n)?;
        check!(cq.cqe() >= n, "{n} asked for, {} granted", cq.cqe());
    }
    Ok(())
}

fn sizes_out_of_range(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    for n in [0, -1, end.ctx.attr.max_cqe.saturating_add(1)] {
        same!(Cq::create(&end.ctx, n, None, 0, 0).err(), Some(libc::EINVAL), "errno for {n} entries");
    }
    Ok(())
}

fn overrun(env: &Env) -> Outcome {
    let mut spec = Spec { cqe: 8, send_wr: 512, recv_wr: 1024, ..Spec::rc() };
    let probe = End::open(env, false, &spec)?;
    let room = u64::from(probe.send_cq.cqe());
    drop(probe);
    spec.send_wr = spec.send_wr.max(room as u32 + 64);
    let pair = Pair::new(env, &spec)?;
    let room = u64::from(pair.near.send_cq.cqe());
    for i in 0..room + 32 {
        pair.near.send(&[pair.request(Op::WRITE, i, 0, 8)])?;
    }
    let Some(event) = pair.near.ctx.event(LONG) else {
        fail!("{} completions in a queue of {room}, and no event", room + 32);
    };
    same!(event.kind, IBV_EVENT_CQ_ERR, "event");
    same!(event.object, pair.near.send_cq.ptr as usize, "queue of the event");
    // What it kept may be polled; then it is unusable.
    let mut kept = 0;
    let end = std::time::Instant::now() + LONG;
    while let Ok(got) = pair.near.send_cq.poll(16) {
        kept += got.len() as u64;
        check!(kept <= room, "{kept} completions of a queue of {room}");
        check!(std::time::Instant::now() < end, "polling never fails after an overrun");
    }
    // No other event of the queue; queue pairs that use it may have one.
    while let Some(event) = pair.near.ctx.event(QUIET) {
        check!(event.kind != IBV_EVENT_CQ_ERR, "a second IBV_EVENT_CQ_ERR");
    }
    Ok(())
}

/// A consumer that is too slow: its queue is unusable, and its peers find that nobody answers.
fn overrun_of_a_receiver(env: &Env) -> Outcome {
    let spec = Spec { cqe: 8, recv_wr: 512, timeout: 12, retry: 2, ..Spec::rc() };
    let mut pair = Pair::new(env, &spec)?;
    // Both ends have queues of the same size.
    let room = u64::from(pair.near.send_cq.cqe());
    let n = room + 64;
    check!(n <= 500, "a queue of {room} entries was granted for 8");
    for i in 0..n {
        pair.far_recv(i, 0, 64)?;
    }
    let mut sent = 0;
    let failed = loop {
        check!(sent < n, "{n} messages came to a queue of {room}");
        pair.near.send(&[pair.request(Op::SEND, sent, 0, 8)])?;
        let wc = pair.near.one(Side::Send)?;
        same!(wc.wr_id, sent, "completion");
        if wc.status != IBV_WC_SUCCESS {
            break wc;
        }
        sent += 1;
    };
    check!(sent >= room, "{sent} messages were received by a queue of {room}");
    same!(status_name(failed.status), status_name(IBV_WC_RETRY_EXC_ERR), "after {sent} messages");
    same!(pair.near.state()?, IBV_QPS_ERR, "the sender's state");
    same!(pair.far.event(LONG)?, Some(IBV_EVENT_CQ_ERR), "the receiver's event");
    pair.far.until_state(IBV_QPS_ERR)?;
    // What was in the queue is still there.
    let got = pair.far.wait(Side::Recv, room as usize)?;
    let ids: Vec<_> = got.iter().map(|wc| wc.wr_id).collect();
    check!(ids.iter().copied().eq(0..room), "receives {ids:?}");
    Ok(())
}

fn full_is_no_overrun(env: &Env) -> Outcome {
    let spec = Spec { cqe: 16, send_wr: 512, ..Spec::rc() };
    let pair = Pair::new(env, &spec)?;
    let room = u64::from(pair.near.send_cq.cqe()).min(500);
    for _ in 0..5 {
        for i in 0..room {
            pair.near.send(&[pair.request(Op::WRITE, i, 0, 8)])?;
        }
        same!(pair.near.ctx.event(QUIET), None, "event of a queue that is full");
        let got = pair.near.wait(Side::Send, room as usize)?;
        check!(got.iter().enumerate().all(|(i, w)| w.wr_id == i as u64), "order: {got:?}");
    }
    Ok(())
}

/// 0 or errno; skips if the device cannot.
fn resize(cq: &Cq, n: i32) -> Outcome<i32> {
    let got = verb!(ibv_resize_cq(cq.ptr, n));
    let code = if got == -1 { crate::verbs::errno() } else { got };
    if matches!(code, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY) {
        skip!("device does not offer resizing of completion queues");
    }
    Ok(code)
}

fn resize_keeps_completions(env: &Env) -> Outcome {
    let spec = Spec { cqe: 32, ..Spec::rc() };
    let pair = Pair::new(env, &spec)?;
    let cq = &pair.near.send_cq;
    for i in 0..20 {
        pair.near.send(&[pair.request(Op::WRITE, i, 0, 8)])?;
    }
    for n in [500, 64, 1000] {
        let got = resize(cq, n)?;
        same!(got, 0, "ibv_resize_cq to {n}: {}", name_of(got));
        check!(cq.cqe() >= n as u32, "{n} asked for, {} granted", cq.cqe());
    }
    let ids: Vec<_> = pair.near.wait(Side::Send, 20)?.iter().map(|w| w.wr_id).collect();
    same!(ids, (0..20).collect::<Vec<_>>(), "completions of before");
    // Now it holds more than it could.
    for i in 0..60 {
        pair.near.send(&[pair.request(Op::WRITE, i, 0, 8)])?;
    }
    let ids: Vec<_> = pair.near.wait(Side::Send, 60)?.iter().map(|w| w.wr_id).collect();
    same!(ids, (0..60).collect::<Vec<_>>(), "completions after");
    Ok(())
}

fn resize_below_what_is_there(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec { cqe: 64, ..Spec::rc() })?;
    for i in 0..40 {
        pair.near.send(&[pair.request(Op::WRITE, i, 0, 8)])?;
    }
    // All are there: the last word has arrived.
    pair.near.put(64, &[1; 8])?;
    let flag = Op::WRITE.request(40, pair.to.base + 128, pair.to.rkey).sge(pair.near.sge(64, 8));
    pair.near.send(&[flag])?;
    let end = std::time::Instant::now() + LONG;
    while pair.far.here()?.get(128, 8)? != [1; 8] {
        check!(std::time::Instant::now() < end, "the last write never came");
    }
    let got = resize(&pair.near.send_cq, 2)?;
    let ids: Vec<_> = pair.near.wait(Side::Send, 41)?.iter().map(|w| w.wr_id).collect();
    same!(ids, (0..41).collect::<Vec<_>>(), "completions, after ibv_resize_cq said {got}");
    Ok(())
}

fn resize_under_load(env: &Env) -> Outcome {
    let n = env.many(100_000);
    let pair = Pair::new(env, &Spec { cqe: 64, send_wr: 32, ..Spec::rc() })?;
    resize(&pair.near.send_cq, 128)?;
    let cq = &pair.near.send_cq;
    std::thread::scope(|scope| -> Outcome {
        let resizer = scope.spawn(|| -> Outcome {
            for i in 0..100 {
                let got = resize(cq, 64 + 37 * (i % 9))?;
                same!(got, 0, "ibv_resize_cq");
            }
            Ok(())
        });
        let (mut posted, mut done) = (0, 0);
        while done < n || !resizer.is_finished() {
            while posted - done < 32 && (posted < n || !resizer.is_finished()) {
                pair.near.send(&[pair.request(Op::WRITE, posted, 0, 8)])?;
                posted += 1;
            }
            for wc in pair.near.wait(Side::Send, usize::from(posted != done))? {
                same!((wc.wr_id, wc.status), (done, IBV_WC_SUCCESS), "completion");
                done += 1;
            }
        }
        resizer.join().unwrap_or_else(|_| Err(crate::suite::Stop::Fail("a thread panicked".to_owned())))
    })
}

fn flags(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    for flags in [IBV_CREATE_CQ_ATTR_SINGLE_THREADED, IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN] {
        match CqEx::create(&end.ctx, 16, 0, flags) {
            Ok(_) | Err(libc::EOPNOTSUPP) => {}
            Err(errno) => fail!("flags {flags}: {}", name_of(errno)),
        }
    }
    match CqEx::create(&end.ctx, 16, 1 << 60, 0) {
        Ok(_) => fail!("unknown wc_flags were taken"),
        Err(errno) => check!(
            matches!(errno, libc::EOPNOTSUPP | libc::EINVAL),
            "errno {}",
            name_of(errno)
        ),
    }
    Ok(())
}
