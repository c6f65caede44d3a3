//! Moderation of completion events.

use std::time::{Duration, Instant};

use freeflow_abi::*;

use crate::suite::{Env, LONG, Op, Outcome, Pair, QUIET, Side, Spec, check, fail, same, skip, tests};
use crate::verbs::{Cq, Sge, Target, name_of, operation};

tests! { "moderation";
    values OneProcess "ibv_modify_cq(3): attr_mask; ibv_query_device_ex(3): cq_mod_caps";
    after_the_period OneProcess "ibv_modify_cq(3): cq_period";
    after_the_count OneProcess "ibv_modify_cq(3): cq_count";
    turned_off OneProcess "ibv_modify_cq(3): cq_count of 1";
    solicited_only OneProcess "ibv_modify_cq(3) and ibv_req_notify_cq(3): solicited_only";
    errors_come OneProcess "ibv_modify_cq(3): an error is not held back for ever";
    misses_nothing OneProcess "arm, poll, wait never loses a completion, with any moderation";
}

/// Sets a queue's moderation, `mask` being what is asked for: 0 or errno.
fn modify(cq: &Cq, mask: u32, count: u16, period: u16) -> Outcome<i32> {
    let Some(modify) = operation!(cq.ctx.ptr, modify_cq) else {
        return Ok(libc::EOPNOTSUPP);
    };
    let moderate = ibv_moderate_cq { cq_count: count, cq_period: period };
    let mut attr = ibv_modify_cq_attr { attr_mask: mask, moderate };
    // SAFETY: the library's own operation on its live queue.
    Ok(unsafe { modify(cq.ptr, &mut attr) })
}

fn moderate(cq: &Cq, count: u16, period: u16) -> Outcome {
    let got = modify(cq, IBV_CQ_ATTR_MODERATE, count, period)?;
    same!(got, 0, "ibv_modify_cq: {}", name_of(got));
    Ok(())
}

/// A pair with events, and the largest count and period.
fn pair(env: &Env) -> Outcome<(Pair, u16, u16)> {
    let pair = Pair::new(env, &Spec { channel: true, ..Spec::rc() })?;
    let caps = pair.near.ctx.attr_ex().map_or([0; 2], |attr| attr.cq_mod_caps);
    let got = modify(&pair.near.send_cq, IBV_CQ_ATTR_MODERATE, 1, 0)?;
    if got == libc::EOPNOTSUPP || caps == [0; 2] {
        same!((got, caps), (libc::EOPNOTSUPP, [0; 2]), "the verb and its capabilities");
        skip!("device does not offer moderation of completion events");
    }
    same!(got, 0, "ibv_modify_cq: {}", name_of(got));
    check!(caps[0] > 1 && caps[1] > 0, "capabilities {caps:?}");
    Ok((pair, caps[0], caps[1]))
}

/// Waits for an event of a queue, and acknowledges it.
fn event(pair: &Pair, side: Side) -> Outcome {
    let Some(channel) = &pair.near.channel else {
        fail!("no channel");
    };
    let Some((cq, _)) = channel.wait(LONG) else {
        fail!("no event within {LONG:?}");
    };
    same!(cq, pair.near.cq(side).ptr as usize, "queue of the event");
    pair.near.cq(side).acknowledge(1);
    Ok(())
}

fn no_event(pair: &Pair, why: &str) -> Outcome {
    let came = pair.near.channel.as_ref().and_then(|channel| channel.wait(QUIET));
    check!(came.is_none(), "an event: {why}");
    Ok(())
}

fn values(env: &Env) -> Outcome {
    let (pair, count, period) = pair(env)?;
    let cq = &pair.near.send_cq;
    moderate(cq, count, period)?;
    moderate(cq, 0, 0)?;
    same!(modify(cq, 0, 4, 100)?, libc::EINVAL, "nothing to modify");
    let unknown = IBV_CQ_ATTR_MODERATE << 1;
    same!(modify(cq, unknown, 4, 100)?, libc::EOPNOTSUPP, "an unknown attribute");
    let both = unknown | IBV_CQ_ATTR_MODERATE;
    same!(modify(cq, both, 4, 100)?, libc::EOPNOTSUPP, "an unknown attribute beside");
    // A queue without a channel has nothing to moderate, and is not refused.
    let silent = Cq::new(&pair.near.ctx, 16)?;
    moderate(&silent, 4, 100)
}

/// Runs one round after the other, each of which arms the send queue and gives it completions, and
/// tells how many events took at least so long. Most decide: a machine with much else to do may be
/// late at times, or begin to count a little early.
fn most_take(pair: &Pair, period: u16, completions: u64) -> Outcome<bool> {
    const ROUNDS: usize = 9;
    let period = Duration::from_micros(period.into());
    let mut long = 0;
    for _ in 0..ROUNDS {
        pair.near.send_cq.arm(false)?;
        let before = Instant::now();
        for i in 0..completions {
            pair.succeed(pair.request(Op::WRITE, i, 0, 8))?;
        }
        event(pair, Side::Send)?;
        long += usize::from(before.elapsed() >= period);
    }
    Ok(long > ROUNDS / 2)
}

fn after_the_period(env: &Env) -> Outcome {
    let (pair, count, most) = pair(env)?;
    for period in [most.min(20_000), most] {
        moderate(&pair.near.send_cq, count, period)?;
        check!(
            most_take(&pair, period, 1)?,
            "one of {count} completions, and events in less than {period} us"
        );
    }
    no_event(&pair, "one arming, one event")
}

fn after_the_count(env: &Env) -> Outcome {
    let (pair, _, most) = pair(env)?;
    moderate(&pair.near.send_cq, 4, most)?;
    check!(
        !most_take(&pair, most, 4)?,
        "four of four completions, and events only after {most} us"
    );
    no_event(&pair, "one arming, one event")
}

fn turned_off(env: &Env) -> Outcome {
    let (pair, count, most) = pair(env)?;
    let cq = &pair.near.send_cq;
    moderate(cq, count, most)?;
    cq.arm(false)?;
    pair.succeed(pair.request(Op::WRITE, 1, 0, 8))?;
    // What is held back comes, at the latest when its period is over.
    moderate(cq, 1, most)?;
    event(&pair, Side::Send)?;
    check!(!most_take(&pair, most, 1)?, "without moderation events come only after {most} us");
    Ok(())
}

fn solicited_only(env: &Env) -> Outcome {
    let (mut pair, _, most) = pair(env)?;
    moderate(&pair.near.recv_cq, 2, most.min(20_000))?;
    for i in 0..8 {
        pair.near.recv(i, 0, 64)?;
    }
    let to = pair.near.addr();
    let sge = Sge { addr: pair.to.base, length: 8, lkey: pair.to.lkey };
    let request = |flags| Op::SEND.request(1, to.base, to.rkey).sge(sge).flags(flags);
    pair.near.recv_cq.arm(true)?;
    for _ in 0..3 {
        pair.far.post_send(vec![request(0)])?;
        pair.far.one(Side::Send)?;
    }
    pair.near.wait(Side::Recv, 3)?;
    no_event(&pair, "no message was solicited")?;
    pair.far.post_send(vec![request(IBV_SEND_SOLICITED)])?;
    event(&pair, Side::Recv)?;
    pair.near.one(Side::Recv)?;
    pair.far.one(Side::Send)?;
    Ok(())
}

fn errors_come(env: &Env) -> Outcome {
    for solicited in [false, true] {
        let (pair, count, most) = pair(env)?;
        moderate(&pair.near.send_cq, count, most)?;
        pair.near.send_cq.arm(solicited)?;
        let bad = pair
            .request(Op::WRITE, 1, 0, 8)
            .to(Target::Rdma(pair.to.base, pair.to.rkey ^ 0x1100));
        pair.refuse("bad rkey", bad, IBV_WC_REM_ACCESS_ERR)?;
        event(&pair, Side::Send)?;
    }
    Ok(())
}

fn misses_nothing(env: &Env) -> Outcome {
    let (pair, ..) = pair(env)?;
    let cq = &pair.near.send_cq;
    // Counts that are never reached, reached at times, or always; periods that end early or late.
    for (count, period) in [(2, 1), (2, 200), (3, 50), (8, 20), (64, 100)] {
        moderate(cq, count, period)?;
        let n = env.many(2000);
        let (mut posted, mut done) = (0, 0);
        while done < n {
            // One, two, three or four at once: sometimes less than the count.
            while posted < n && posted - done < 1 + (posted & 3) {
                pair.near.send(&[pair.request(Op::WRITE, posted, 0, 8)])?;
                posted += 1;
            }
            cq.arm(false)?;
            let mut got = pair.near.peek(Side::Send)?;
            if got.is_empty() {
                event(&pair, Side::Send)?;
                got = pair.near.peek(Side::Send)?;
            }
            for wc in got {
                same!((wc.wr_id, wc.status), (done, IBV_WC_SUCCESS), "completion");
                done += 1;
            }
        }
        // The last arming may still have an event for what was polled since.
        while let Some(channel) = &pair.near.channel
            && channel.wait(QUIET).is_some()
        {
            cq.acknowledge(1);
        }
    }
    Ok(())
}
