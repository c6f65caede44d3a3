//! Completion events.

use std::time::{Duration, Instant};

use freeflow_abi::*;

use crate::suite::{End, Env, LONG, Op, Outcome, Pair, QUIET, Side, Spec, Stop, check, fail, same, tests};
use crate::verbs::{Channel, Cq, Target, nonblocking, verb};

tests! { "events";
    one_event_per_arming Anywhere "ibv_req_notify_cq(3): one-shot";
    nothing_for_what_was_before Anywhere "ibv_req_notify_cq(3): a completion before arming gives no event";
    none_without_arming Anywhere "ibv_req_notify_cq(3)";
    solicited_only Anywhere "ibv_req_notify_cq(3): solicited_only; ibv_post_send(3): IBV_SEND_SOLICITED";
    errors_are_solicited Anywhere "ibv_req_notify_cq(3): errors count as solicited";
    any_beats_solicited Anywhere "IBTA 11.4.2.2: the wider request stays";
    arm_then_poll_misses_nothing OneProcess "arm, poll, wait never loses a completion";
    names_its_queue OneProcess "ibv_get_cq_event(3): cq and cq_context";
    descriptor_can_be_polled OneProcess "ibv_get_cq_event(3): the channel's fd, O_NONBLOCK";
    unacknowledged_blocks_destroy OneProcess "ibv_ack_cq_events(3)";
    unacknowledged_async_blocks_destroy OneProcess "ibv_ack_async_event(3)";
    channel_is_busy_while_used OneProcess "ibv_destroy_comp_channel(3): EBUSY";
    completion_vectors OneProcess "ibv_create_cq(3): comp_vector";
}

fn spec() -> Spec {
    Spec { channel: true, ..Spec::rc() }
}

fn channel(end: &End) -> Outcome<&Channel> {
    end.channel.as_deref().ok_or_else(|| Stop::Fail("no channel".to_owned()))
}

/// Waits for an event of a queue, and acknowledges it.
fn event(end: &End, side: Side) -> Outcome {
    let Some((cq, _)) = channel(end)?.wait(LONG) else {
        fail!("no event within {LONG:?}");
    };
    same!(cq, end.cq(side).ptr as usize, "queue of the event");
    end.cq(side).acknowledge(1);
    Ok(())
}

fn no_event(end: &End, why: &str) -> Outcome {
    match channel(end)?.wait(QUIET) {
        None => Ok(()),
        Some(_) => fail!("an event: {why}"),
    }
}

fn one_event_per_arming(env: &Env) -> Outcome {
    let pair = Pair::new(env, &spec())?;
    pair.near.cq(Side::Send).arm(false)?;
    for i in 0..3 {
        pair.succeed(pair.request(Op::WRITE, i, 0, 8))?;
    }
    event(&pair.near, Side::Send)?;
    no_event(&pair.near, "three completions after one arming give one")?;
    pair.near.cq(Side::Send).arm(false)?;
    pair.succeed(pair.request(Op::WRITE, 4, 0, 8))?;
    event(&pair.near, Side::Send)?;
    // Armed twice is armed once.
    pair.near.cq(Side::Send).arm(false)?;
    pair.near.cq(Side::Send).arm(false)?;
    pair.succeed(pair.request(Op::WRITE, 5, 0, 8))?;
    pair.succeed(pair.request(Op::WRITE, 6, 0, 8))?;
    event(&pair.near, Side::Send)?;
    no_event(&pair.near, "armed twice before one completion")
}

fn nothing_for_what_was_before(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &spec())?;
    pair.near.send(&[pair.request(Op::WRITE, 1, 0, 8)])?;
    // A later message has arrived, so that the first completion is there.
    pair.far_recv(2, 0, 64)?;
    pair.near.send(&[pair.request(Op::SEND, 2, 0, 8)])?;
    pair.far.one(Side::Recv)?;
    let first = pair.near.one(Side::Send)?;
    same!(first.wr_id, 1, "first completion");
    let end = Instant::now() + LONG;
    let second = loop {
        // Only polled once it is there: arming comes after it in any case.
        if let Some(wc) = pair.near.peek(Side::Send)?.first() {
            break *wc;
        }
        check!(Instant::now() < end, "no second completion");
    };
    same!(second.wr_id, 2, "second completion");
    pair.near.cq(Side::Send).arm(false)?;
    no_event(&pair.near, "both completions were polled before arming")?;
    pair.succeed(pair.request(Op::WRITE, 3, 0, 8))?;
    event(&pair.near, Side::Send)
}

fn none_without_arming(env: &Env) -> Outcome {
    let pair = Pair::new(env, &spec())?;
    pair.succeed(pair.request(Op::WRITE, 1, 0, 8))?;
    no_event(&pair.near, "the queue was never armed")
}

fn far_sends(pair: &mut Pair, flags: u32) -> Outcome {
    let to = pair.near.addr();
    let sge = crate::verbs::Sge { addr: pair.to.base, length: 8, lkey: pair.to.lkey };
    pair.far.post_send(vec![Op::SEND.request(1, to.base, to.rkey).sge(sge).flags(flags)])?;
    pair.far.one(Side::Send)?;
    Ok(())
}

fn solicited_only(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &spec())?;
    for i in 0..4 {
        pair.near.recv(i, 0, 64)?;
    }
    pair.near.cq(Side::Recv).arm(true)?;
    far_sends(&mut pair, 0)?;
    same!(pair.near.one(Side::Recv)?.wr_id, 0, "receive of an unsolicited message");
    no_event(&pair.near, "the message was not solicited")?;
    far_sends(&mut pair, IBV_SEND_SOLICITED)?;
    event(&pair.near, Side::Recv)?;
    pair.near.one(Side::Recv)?;
    // A send completion is never a solicited one.
    pair.near.cq(Side::Send).arm(true)?;
    pair.succeed(pair.request(Op::WRITE, 1, 0, 8).flags(IBV_SEND_SOLICITED))?;
    no_event(&pair.near, "a send completed")
}

fn errors_are_solicited(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &spec())?;
    pair.near.cq(Side::Send).arm(true)?;
    let bad = pair.request(Op::WRITE, 1, 0, 8).to(Target::Rdma(pair.to.base, pair.to.rkey ^ 0x1100));
    pair.refuse("bad rkey", bad, IBV_WC_REM_ACCESS_ERR)?;
    event(&pair.near, Side::Send)?;
    // A flush is an error too.
    let mut pair2 = Pair::new(env, &spec())?;
    pair2.near.recv(1, 0, 64)?;
    pair2.near.cq(Side::Recv).arm(true)?;
    pair2.near.qp().set_state(IBV_QPS_ERR)?;
    event(&pair2.near, Side::Recv)?;
    same!(pair2.near.one(Side::Recv)?.status, IBV_WC_WR_FLUSH_ERR, "status");
    pair.far.set_state(IBV_QPS_ERR)?;
    pair2.far.set_state(IBV_QPS_ERR)
}

fn any_beats_solicited(env: &Env) -> Outcome {
    for order in [[true, false], [false, true]] {
        let mut pair = Pair::new(env, &spec())?;
        pair.near.recv(0, 0, 64)?;
        for solicited in order {
            pair.near.cq(Side::Recv).arm(solicited)?;
        }
        far_sends(&mut pair, 0)?;
        event(&pair.near, Side::Recv)?;
    }
    Ok(())
}

fn arm_then_poll_misses_nothing(env: &Env) -> Outcome {
    let n = env.many(1_000_000);
    let spec = Spec { recv_wr: 256, cqe: 512, ..spec() };
    let mut pair = Pair::new(env, &spec)?;
    let near = &pair.near;
    let far = pair.far.here_mut()?;
    for i in 0..200 {
        far.recv(i, 0, 64)?;
    }
    let request = Op::SEND.request(0, 0, 0).sge(near.sge(0, 8));
    let far = &*far;
    std::thread::scope(|scope| -> Outcome {
        let waiter = scope.spawn(|| -> Outcome<u64> {
            let (mut got, mut events, mut unacknowledged) = (0, 0, 0);
            while got < n {
                far.cq(Side::Recv).arm(false)?;
                let more = far.peek(Side::Recv)?;
                for wc in &more {
                    same!(wc.status, IBV_WC_SUCCESS, "status of receive {got}");
                    far.recv(wc.wr_id, 0, 64)?;
                    got += 1;
                }
                if more.is_empty() && got < n {
                    let Some(_) = channel(far)?.wait(LONG) else {
                        fail!("an event is missing: {got} of {n} messages came, then silence");
                    };
                    events += 1;
                    unacknowledged += 1;
                    if unacknowledged == 100 {
                        far.cq(Side::Recv).acknowledge(unacknowledged);
                        unacknowledged = 0;
                    }
                }
            }
            far.cq(Side::Recv).acknowledge(unacknowledged);
            Ok(events)
        });
        let (mut posted, mut done) = (0_u64, 0_u64);
        let mut last = Instant::now();
        while done < n && !waiter.is_finished() {
            // Bursts of changing length, so that the waiter meets every moment.
            let burst = 1 + posted % 7;
            while posted < n && posted - done < burst {
                near.send(std::slice::from_ref(&request))?;
                posted += 1;
            }
            let got = near.peek(Side::Send)?;
            if !got.is_empty() {
                last = Instant::now();
            }
            check!(last.elapsed() < LONG + LONG, "{done} of {n} sends, then silence");
            done += got.len() as u64;
        }
        let events = waiter.join().unwrap_or_else(|_| Err(Stop::Fail("the waiter panicked".to_owned())))?;
        check!(events > 0, "the waiter never had to wait");
        Ok(())
    })
}

fn names_its_queue(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let shared = Channel::new(&end.ctx)?;
    let mut queues = Vec::new();
    for i in 0..3_usize {
        match Cq::create(&end.ctx, 16, Some(&shared), 0, 0x1000 + i) {
            Ok(cq) => queues.push(cq),
            Err(errno) => fail!("ibv_create_cq: {}", crate::verbs::name_of(errno)),
        }
    }
    for (i, cq) in queues.iter().enumerate() {
        let qp = crate::verbs::Qp::new(&end.pd, cq, cq, &Spec::rc().qp(None))?;
        cq.arm(false)?;
        qp.must_modify(&end.to_init())?;
        qp.recv(&[crate::verbs::Recv::new(5).sge(end.sge(0, 8))])?;
        qp.set_state(IBV_QPS_ERR)?;
        let got = shared.wait(LONG);
        same!(got, Some((cq.ptr as usize, 0x1000 + i)), "queue and context of the event");
        cq.acknowledge(1);
        same!(cq.wait(1, LONG)?[0].wr_id, 5, "completion");
    }
    Ok(())
}

fn descriptor_can_be_polled(env: &Env) -> Outcome {
    let pair = Pair::new(env, &spec())?;
    let c = channel(&pair.near)?;
    nonblocking(c.fd(), true);
    same!(c.take(), Err(libc::EAGAIN), "ibv_get_cq_event on an empty channel");
    pair.near.cq(Side::Send).arm(false)?;
    pair.succeed(pair.request(Op::WRITE, 1, 0, 8))?;
    check!(crate::verbs::readable(c.fd(), LONG), "the descriptor is not readable");
    check!(c.take().is_ok(), "ibv_get_cq_event after poll");
    pair.near.cq(Side::Send).acknowledge(1);
    check!(!crate::verbs::readable(c.fd(), Duration::ZERO), "the descriptor is still readable");
    same!(c.take(), Err(libc::EAGAIN), "ibv_get_cq_event when it is taken");
    Ok(())
}

/// Whether `destroy` waits until `release` is called.
pub(super) fn blocks(destroy: impl FnOnce() -> i32 + Send, release: impl FnOnce()) -> Outcome {
    std::thread::scope(|scope| {
        let destroyer = scope.spawn(destroy);
        let end = Instant::now() + Duration::from_millis(300);
        while Instant::now() < end {
            if destroyer.is_finished() {
                fail!("the object was destroyed with an event that is not acknowledged");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        release();
        match destroyer.join() {
            Ok(failed) => same!(failed, 0, "destroying after the acknowledgement"),
            Err(_) => fail!("the destroying thread panicked"),
        }
        Ok(())
    })
}

fn unacknowledged_blocks_destroy(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &spec())?;
    pair.near.cq(Side::Send).arm(false)?;
    pair.succeed(pair.request(Op::WRITE, 1, 0, 8))?;
    check!(channel(&pair.near)?.wait(LONG).is_some(), "no event");
    pair.near.qp = None;
    let cq = pair.near.send_cq.clone();
    blocks(|| cq.destroy_now(), || cq.acknowledge(1))?;
    // It is destroyed: the wrappers must not do it again.
    std::mem::forget(cq);
    std::mem::forget(pair.near);
    Ok(())
}

fn unacknowledged_async_blocks_destroy(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let bad = pair.request(Op::WRITE, 1, 0, 8).to(Target::Rdma(pair.to.base, pair.to.rkey ^ 0x1100));
    pair.refuse("bad rkey", bad, IBV_WC_REM_ACCESS_ERR)?;
    let far = pair.far.here_mut()?;
    let Some(mut event) = far.ctx.raw_event(LONG) else {
        fail!("no asynchronous event");
    };
    let Some(qp) = far.qp.take() else {
        fail!("no queue pair");
    };
    blocks(
        move || {
            let failed = verb!(ibv_destroy_qp(qp.ptr));
            std::mem::forget(qp);
            failed
        },
        || verb!(ibv_ack_async_event(&mut event)),
    )
}

fn channel_is_busy_while_used(env: &Env) -> Outcome {
    let end = End::open(env, false, &spec())?;
    let channel = channel(&end)?;
    same!(verb!(ibv_destroy_comp_channel(channel.ptr)), libc::EBUSY, "with two queues");
    Ok(())
}

fn completion_vectors(env: &Env) -> Outcome {
    let end = End::open(env, false, &spec())?;
    let n = end.ctx.vectors();
    check!(n >= 1, "{n} completion vectors");
    for vector in [0, n - 1] {
        let made = Cq::create(&end.ctx, 16, end.channel.as_ref(), vector, 0);
        check!(made.is_ok(), "vector {vector} of {n}: {:?}", made.err());
    }
    for vector in [-1, n] {
        let made = Cq::create(&end.ctx, 16, end.channel.as_ref(), vector, 0);
        same!(made.err(), Some(libc::EINVAL), "errno for vector {vector} of {n}");
    }
    Ok(())
}
