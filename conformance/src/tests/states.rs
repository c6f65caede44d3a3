//! The state machine of queue pairs.

use freeflow_abi::*;

use crate::suite::{End, Env, LONG, Op, Outcome, Pair, Side, Spec, check, same, tests};
use crate::verbs::{Attr, address, name_of};

tests! { "states";
    table_rc OneProcess "ibv_modify_qp(3): table of attributes for RC";
    table_uc OneProcess "ibv_modify_qp(3): table of attributes for UC";
    table_ud OneProcess "ibv_modify_qp(3): table of attributes for UD";
    attributes_are_kept OneProcess "ibv_query_qp(3): what was set is what is told";
    unmasked_attributes_are_ignored OneProcess "only what the mask names is looked at";
    values_out_of_range OneProcess "ibv_modify_qp(3): EINVAL";
    current_state OneProcess "ibv_modify_qp(3): IBV_QP_CUR_STATE";
    failure_changes_nothing OneProcess "ibv_modify_qp(3): all or nothing";
    reset_forgets OneProcess "IBTA 10.3.1.1: completions of a queue pair in RESET are gone";
    communication_established Anywhere "ibv_get_async_event(3): IBV_EVENT_COMM_EST";
    receives_in_ready_to_receive Anywhere "IBTA 10.3.1.3: RTR takes messages";
    alternate_path_as_offered OneProcess "APM is refused if not offered";
}

const ACCESS: i32 = IBV_QP_ACCESS_FLAGS;
const PATH: i32 = IBV_QP_ALT_PATH | IBV_QP_ACCESS_FLAGS | IBV_QP_PATH_MIG_STATE;

/// Required and optional attributes of a transition, from the tables of ibv_modify_qp(3) and of
/// IBTA 11.2.5.2; `None` if there is no such transition.
fn masks(kind: u32, from: u32, to: u32) -> Option<(i32, i32)> {
    let rc = kind == IBV_QPT_RC;
    let ud = kind == IBV_QPT_UD;
    let timer = if rc { IBV_QP_MIN_RNR_TIMER } else { 0 };
    let running = if ud { IBV_QP_CUR_STATE | IBV_QP_QKEY } else { IBV_QP_CUR_STATE | PATH | timer };
    Some(match (from, to) {
        (_, IBV_QPS_RESET) => (0, 0),
        (IBV_QPS_RESET, IBV_QPS_ERR) => return None,
        (_, IBV_QPS_ERR) => (0, 0),
        (IBV_QPS_RESET, IBV_QPS_INIT) if ud => (IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY, 0),
        (IBV_QPS_RESET, IBV_QPS_INIT) => (IBV_QP_PKEY_INDEX | IBV_QP_PORT | ACCESS, 0),
        (IBV_QPS_INIT, IBV_QPS_INIT) if ud => (0, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY),
        (IBV_QPS_INIT, IBV_QPS_INIT) => (0, IBV_QP_PKEY_INDEX | IBV_QP_PORT | ACCESS),
        (IBV_QPS_INIT, IBV_QPS_RTR) if ud => (0, IBV_QP_PKEY_INDEX | IBV_QP_QKEY),
        (IBV_QPS_INIT, IBV_QPS_RTR) => {
            let connect = IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
            let respond = IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
            let optional = IBV_QP_ALT_PATH | ACCESS | IBV_QP_PKEY_INDEX;
            (if rc { connect | respond } else { connect }, optional)
        }
        (IBV_QPS_RTR, IBV_QPS_RTS) => {
            let request = IBV_QP_TIMEOUT
                | IBV_QP_RETRY_CNT
                | IBV_QP_RNR_RETRY
                | IBV_QP_MAX_QP_RD_ATOMIC;
            (if rc { request | IBV_QP_SQ_PSN } else { IBV_QP_SQ_PSN }, running)
        }
        (IBV_QPS_RTS | IBV_QPS_SQD, IBV_QPS_RTS) => (0, running),
        (IBV_QPS_RTS, IBV_QPS_SQD) => (0, IBV_QP_EN_SQD_ASYNC_NOTIFY),
        (IBV_QPS_SQD, IBV_QPS_SQD) if ud => (0, IBV_QP_PKEY_INDEX | IBV_QP_QKEY),
        (IBV_QPS_SQD, IBV_QPS_SQD) => {
            let more = IBV_QP_TIMEOUT
                | IBV_QP_RETRY_CNT
                | IBV_QP_RNR_RETRY
                | IBV_QP_PORT
                | IBV_QP_MAX_QP_RD_ATOMIC
                | IBV_QP_MAX_DEST_RD_ATOMIC
                | IBV_QP_MIN_RNR_TIMER;
            (0, IBV_QP_AV | IBV_QP_PKEY_INDEX | PATH | if rc { more } else { 0 })
        }
        _ => return None,
    })
}

/// Good values for every attribute.
fn good(end: &End, from: u32, to: u32) -> ibv_qp_attr {
    let path = address(&end.pd, end.ctx.gid);
    let mut attr = Attr::new().raw;
    attr.qp_state = to;
    attr.cur_qp_state = from;
    attr.path_mtu = IBV_MTU_1024;
    attr.path_mig_state = IBV_MIG_MIGRATED;
    attr.qkey = 0x1111_1111;
    attr.rq_psn = 5;
    attr.sq_psn = 6;
    attr.dest_qp_num = end.qp().number();
    attr.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
    attr.ah_attr = path;
    attr.alt_ah_attr = path;
    attr.max_rd_atomic = 1;
    attr.max_dest_rd_atomic = 1;
    attr.min_rnr_timer = 12;
    attr.port_num = 1;
    attr.timeout = 14;
    attr.retry_cnt = 7;
    attr.rnr_retry = 7;
    attr
}

const STATES: [u32; 6] =
    [IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD, IBV_QPS_ERR];

/// Brings a queue pair from anywhere to a state.
fn bring(end: &End, state: u32) -> Outcome {
    let qp = end.qp();
    // From any state but RESET there is a way through ERR.
    if end.state()? != IBV_QPS_RESET {
        qp.set_state(IBV_QPS_ERR)?;
    }
    qp.set_state(IBV_QPS_RESET)?;
    let chain: &[u32] = match state {
        IBV_QPS_RESET => &[],
        IBV_QPS_INIT => &[IBV_QPS_INIT],
        IBV_QPS_RTR => &[IBV_QPS_INIT, IBV_QPS_RTR],
        IBV_QPS_SQD => &[IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD],
        IBV_QPS_ERR => &[IBV_QPS_INIT, IBV_QPS_ERR],
        _ => &[IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS],
    };
    let mut from = IBV_QPS_RESET;
    for &to in chain {
        let required = masks(end.spec.kind, from, to).map_or(0, |(required, _)| required);
        qp.must_modify(&Attr { raw: good(end, from, to), mask: required | IBV_QP_STATE })?;
        from = to;
    }
    // Attributes may change when the send queue is drained, which needs no word of ours.
    let end_of_wait = std::time::Instant::now() + LONG;
    while state == IBV_QPS_SQD && qp.query()?.sq_draining != 0 {
        check!(
            std::time::Instant::now() < end_of_wait,
            "the send queue does not drain"
        );
    }
    Ok(())
}

fn table(env: &Env, kind: u32) -> Outcome {
    let end = End::open(env, false, &Spec::new(kind))?;
    let mut wrong = Vec::new();
    for from in STATES {
        for to in STATES {
            let attempt = |mask: i32| -> Outcome<i32> {
                bring(&end, from)?;
                Ok(end.qp().modify(&Attr { raw: good(&end, from, to), mask }))
            };
            let Some((required, optional)) = masks(kind, from, to) else {
                if attempt(IBV_QP_STATE)? == 0 {
                    wrong.push(format!("{from} to {to} is no transition, but was made"));
                }
                continue;
            };
            let base = required | IBV_QP_STATE;
            let got = attempt(base)?;
            if got != 0 {
                wrong.push(format!("{from} to {to}: {}", name_of(got)));
                continue;
            }
            same!(end.state()?, to, "state after {from} to {to}");
            for bit in (0..21).map(|i| 1 << i).filter(|bit| bit & IBV_QP_STATE == 0) {
                if required & bit != 0 {
                    if attempt(base & !bit)? == 0 {
                        wrong.push(format!("{from} to {to} without {bit:#x} was made"));
                    }
                    continue;
                }
                // Paths that the device does not offer, and sizes that it does not change, may be
                // refused for their own sake.
                let unsure = IBV_QP_ALT_PATH | IBV_QP_CAP | IBV_QP_PATH_MIG_STATE;
                let got = attempt(base | bit)?;
                if optional & bit != 0 && got != 0 && bit & unsure == 0 {
                    wrong.push(format!("{from} to {to} with {bit:#x}: {}", name_of(got)));
                }
                let allowed = optional | IBV_QP_CUR_STATE | IBV_QP_CAP;
                if allowed & bit == 0 && got == 0 {
                    wrong.push(format!("{from} to {to} with {bit:#x} was made"));
                }
            }
        }
    }
    check!(wrong.is_empty(), "{} deviations: {}", wrong.len(), wrong.join("; "));
    Ok(())
}

fn table_rc(env: &Env) -> Outcome {
    table(env, IBV_QPT_RC)
}

fn table_uc(env: &Env) -> Outcome {
    table(env, IBV_QPT_UC)
}

fn table_ud(env: &Env) -> Outcome {
    table(env, IBV_QPT_UD)
}

fn attributes_are_kept(env: &Env) -> Outcome {
    let spec = Spec { timeout: 11, retry: 3, rnr_retry: 5, rnr_timer: 9, rd_atomic: 2, ..Spec::rc() };
    let pair = Pair::new(env, &spec)?;
    let got = pair.near.qp().query()?;
    let near = &pair.near;
    same!(got.qp_state, IBV_QPS_RTS, "qp_state");
    same!(got.path_mtu, IBV_MTU_1024, "path_mtu");
    same!((got.rq_psn, got.sq_psn), (pair.to.psn, near.psn), "rq_psn and sq_psn");
    same!(got.dest_qp_num, pair.to.qpn, "dest_qp_num");
    same!(got.qp_access_flags & 0xF, spec.qp_access & 0xF, "qp_access_flags");
    same!(
        (got.timeout, got.retry_cnt, got.rnr_retry, got.min_rnr_timer),
        (11, 3, 5, 9),
        "timeout, retry_cnt, rnr_retry, min_rnr_timer"
    );
    same!((got.max_rd_atomic, got.max_dest_rd_atomic), (2, 2), "max_rd_atomic, max_dest_rd_atomic");
    same!((got.port_num, got.pkey_index), (1, 0), "port_num and pkey_index");
    // SAFETY: any bytes are a GID.
    let gid = unsafe { got.ah_attr.grh.dgid.raw };
    same!(gid, pair.to.gid, "ah_attr.grh.dgid");
    same!((got.ah_attr.is_global, got.ah_attr.port_num), (1, 1), "ah_attr");
    let ud = Pair::new(env, &Spec::ud())?;
    same!(ud.near.qp().query()?.qkey, crate::suite::QKEY, "qkey");
    Ok(())
}

fn unmasked_attributes_are_ignored(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let to = end.addr();
    // Every field that the mask does not name is nonsense.
    let spoil = |attr: Attr| {
        let mut spoilt = attr;
        // SAFETY: plain numbers, any bytes are good.
        unsafe { core::ptr::write_bytes(&raw mut spoilt.raw, 0xA5, 1) };
        let (from, raw) = (attr.raw, &mut spoilt.raw);
        for (bit, copy) in fields() {
            if attr.mask & bit != 0 {
                copy(raw, &from);
            }
        }
        spoilt
    };
    for attr in [end.to_init(), end.to_rtr(&to), end.to_rts()] {
        end.qp().must_modify(&spoil(attr))?;
    }
    same!(end.state()?, IBV_QPS_RTS, "state");
    Ok(())
}

type Copier = fn(&mut ibv_qp_attr, &ibv_qp_attr);

fn fields() -> [(i32, Copier); 15] {
    [
        (IBV_QP_STATE, |a, b| a.qp_state = b.qp_state),
        (IBV_QP_PKEY_INDEX, |a, b| a.pkey_index = b.pkey_index),
        (IBV_QP_PORT, |a, b| a.port_num = b.port_num),
        (IBV_QP_ACCESS_FLAGS, |a, b| a.qp_access_flags = b.qp_access_flags),
        (IBV_QP_AV, |a, b| a.ah_attr = b.ah_attr),
        (IBV_QP_PATH_MTU, |a, b| a.path_mtu = b.path_mtu),
        (IBV_QP_DEST_QPN, |a, b| a.dest_qp_num = b.dest_qp_num),
        (IBV_QP_RQ_PSN, |a, b| a.rq_psn = b.rq_psn),
        (IBV_QP_MAX_DEST_RD_ATOMIC, |a, b| a.max_dest_rd_atomic = b.max_dest_rd_atomic),
        (IBV_QP_MIN_RNR_TIMER, |a, b| a.min_rnr_timer = b.min_rnr_timer),
        (IBV_QP_TIMEOUT, |a, b| a.timeout = b.timeout),
        (IBV_QP_RETRY_CNT, |a, b| a.retry_cnt = b.retry_cnt),
        (IBV_QP_RNR_RETRY, |a, b| a.rnr_retry = b.rnr_retry),
        (IBV_QP_SQ_PSN, |a, b| a.sq_psn = b.sq_psn),
        (IBV_QP_MAX_QP_RD_ATOMIC, |a, b| a.max_rd_atomic = b.max_rd_atomic),
    ]
}

fn values_out_of_range(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let to = end.addr();
    let refused = |what: &str, attr: Attr| -> Outcome {
        let got = end.qp().modify(&attr);
        check!(got > 0, "{what} was taken");
        Ok(())
    };
    refused("port 0", end.to_init().with(IBV_QP_PORT, |a| a.port_num = 0))?;
    refused("port 2", end.to_init().with(IBV_QP_PORT, |a| a.port_num = 2))?;
    refused("P_Key index 999", end.to_init().with(IBV_QP_PKEY_INDEX, |a| a.pkey_index = 999))?;
    end.qp().must_modify(&end.to_init())?;
    refused("MTU 0", end.to_rtr(&to).with(IBV_QP_PATH_MTU, |a| a.path_mtu = 0))?;
    refused("MTU 6", end.to_rtr(&to).with(IBV_QP_PATH_MTU, |a| a.path_mtu = 6))?;
    let beyond = end.ctx.attr.max_qp_rd_atom as u8;
    if let Some(beyond) = beyond.checked_add(1) {
        refused(
            "more reads than max_qp_rd_atom",
            end.to_rtr(&to).with(IBV_QP_MAX_DEST_RD_ATOMIC, |a| a.max_dest_rd_atomic = beyond),
        )?;
    }
    refused("GID index 200", end.to_rtr(&to).with(IBV_QP_AV, |a| a.ah_attr.grh.sgid_index = 200))?;
    end.qp().must_modify(&end.to_rtr(&to))?;
    same!(end.state()?, IBV_QPS_RTR, "state");
    Ok(())
}

fn current_state(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let rts = |current| {
        Attr::state(IBV_QPS_RTS).with(IBV_QP_CUR_STATE, |a| a.cur_qp_state = current)
    };
    same!(pair.near.qp().modify(&rts(IBV_QPS_RTS)), 0, "the true state");
    same!(pair.near.qp().query()?.cur_qp_state, IBV_QPS_RTS, "cur_qp_state as queried");
    Ok(())
}

fn failure_changes_nothing(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let to = end.addr();
    let bad = end.to_rtr(&to).with(IBV_QP_PATH_MTU, |a| a.path_mtu = 0);
    end.qp().must_modify(&end.to_init())?;
    check!(end.qp().modify(&bad) > 0, "a bad MTU was taken");
    same!(end.state()?, IBV_QPS_INIT, "state after a failure");
    end.qp().must_modify(&end.to_rtr(&to))
}

fn reset_forgets(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    for i in 0..5 {
        pair.near.recv(100 + i, 0, 64)?;
        pair.near.send(&[pair.request(Op::WRITE, i, 0, 8)])?;
    }
    // The last one is done, so that all five completions are there.
    let last = pair.near.wait(Side::Send, 1)?;
    same!(last[0].wr_id, 0, "first completion");
    let here = pair.near.addr();
    pair.near.qp().set_state(IBV_QPS_RESET)?;
    pair.far.set_state(IBV_QPS_RESET)?;
    pair.far.connect(here)?;
    pair.near.connect(&pair.to)?;
    pair.far_recv(8, 0, 64)?;
    pair.near.send(&[pair.request(Op::SEND, 9, 0, 8)])?;
    let mut sent = pair.near.one(Side::Send)?;
    // Completions from before the reset may still be there, or be gone; nothing else may.
    while sent.wr_id < 5 {
        sent = pair.near.one(Side::Send)?;
    }
    same!((sent.wr_id, sent.status), (9, IBV_WC_SUCCESS), "the request after the reset");
    same!(pair.near.peek(Side::Recv)?, [], "receives of before the reset");
    same!(pair.far.one(Side::Recv)?.wr_id, 8, "the receive after the reset");
    Ok(())
}

fn communication_established(env: &Env) -> Outcome {
    let far = Spec { state: IBV_QPS_RTR, ..Spec::rc() };
    let mut pair = Pair::with(env, &Spec::rc(), &far)?;
    pair.far_recv(1, 0, 64)?;
    pair.succeed(pair.request(Op::SEND, 1, 0, 8))?;
    pair.far.one(Side::Recv)?;
    same!(pair.far.event(LONG)?, Some(IBV_EVENT_COMM_EST), "event of the first message");
    pair.far_recv(2, 0, 64)?;
    pair.succeed(pair.request(Op::SEND, 2, 0, 8))?;
    same!(pair.far.event(crate::suite::QUIET)?, None, "event of the second message");
    Ok(())
}

fn receives_in_ready_to_receive(env: &Env) -> Outcome {
    for kind in [IBV_QPT_RC, IBV_QPT_UC] {
        let far = Spec { state: IBV_QPS_RTR, ..Spec::new(kind) };
        let mut pair = Pair::with(env, &Spec::new(kind), &far)?;
        pair.far_recv(1, 0, 64)?;
        pair.succeed(pair.request(Op::SEND, 1, 0, 8))?;
        same!(pair.far.one(Side::Recv)?.wr_id, 1, "type {kind}: receive in RTR");
    }
    Ok(())
}

fn alternate_path_as_offered(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let offered = end.ctx.attr.device_cap_flags & IBV_DEVICE_AUTO_PATH_MIG != 0;
    if offered {
        crate::suite::skip!("device offers automatic path migration; the suite has no second path");
    }
    let to = end.addr();
    end.qp().must_modify(&end.to_init())?;
    let path = address(&end.pd, end.ctx.gid);
    let attr = end.to_rtr(&to).with(IBV_QP_ALT_PATH, |a| {
        a.alt_ah_attr = path;
        a.alt_port_num = 1;
        a.alt_timeout = 14;
    });
    check!(end.qp().modify(&attr) > 0, "an alternate path was taken, but none is offered");
    Ok(())
}
