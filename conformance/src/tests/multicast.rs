//! Multicast datagrams.

use freeflow_abi::*;

use crate::suite::{End, Env, Op, Outcome, Pair, QKEY, QUIET, Side, Spec, check, same, skip, tests};
use crate::verbs::{Ah, Qp, Recv, Target, name_of, pattern, verb};

tests! { "multicast";
    every_member_gets_one OneProcess "ibv_attach_mcast(3); IBTA 10.5.2";
    detached_gets_none OneProcess "ibv_detach_mcast(3)";
    only_datagrams_and_multicast_addresses OneProcess "ibv_attach_mcast(3): EINVAL";
}

/// 239.1.2.3, mapped.
const GROUP: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 239, 1, 2, 3];
/// Queue pair number of a multicast packet (IBTA 9.6.1).
const QPN: u32 = 0xFF_FFFF;

fn offered(end: &End) -> Outcome {
    if end.ctx.attr.max_mcast_grp == 0 {
        skip!("device does not offer multicast");
    }
    Ok(())
}

fn attach(qp: &Qp, gid: [u8; 16]) -> i32 {
    verb!(ibv_attach_mcast(qp.ptr, &ibv_gid { raw: gid }, 0))
}

fn detach(qp: &Qp, gid: [u8; 16]) -> i32 {
    verb!(ibv_detach_mcast(qp.ptr, &ibv_gid { raw: gid }, 0))
}

fn every_member_gets_one(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::ud())?;
    offered(&pair.near)?;
    let far = pair.far.here()?;
    let more = Qp::new(&far.pd, &far.send_cq, &far.recv_cq, &far.spec.qp(None))?;
    more.must_modify(&far.to_init())?;
    more.must_modify(&far.to_rtr(&pair.to))?;
    let outsider = Qp::new(&far.pd, &far.send_cq, &far.recv_cq, &far.spec.qp(None))?;
    outsider.must_modify(&far.to_init())?;
    outsider.must_modify(&far.to_rtr(&pair.to))?;
    for (i, qp) in [far.qp(), &more, &outsider].into_iter().enumerate() {
        qp.recv(&[Recv::new(i as u64).sge(far.sge(4096 * (i + 1), 200))])?;
    }
    for qp in [far.qp(), &more] {
        let got = attach(qp, GROUP);
        same!(got, 0, "ibv_attach_mcast: {}", name_of(got));
    }
    let bytes = pattern(1, 60);
    pair.near.put(0, &bytes)?;
    let ah = Ah::new(&pair.near.pd, GROUP)?;
    pair.succeed(pair.request(Op::SEND, 1, 0, 60).to(Target::Ud(ah.ptr as usize, QPN, QKEY)))?;
    let mut got: Vec<_> = far.wait(Side::Recv, 2)?.iter().map(|w| (w.wr_id, w.byte_len)).collect();
    got.sort_unstable();
    same!(got, [(0, 100), (1, 100)], "receives of the members");
    far.quiet(Side::Recv, QUIET)?;
    for i in 0..2 {
        same!(far.get(4096 * (i + 1) + 40, 60)?, bytes, "data of member {i}");
    }
    for qp in [far.qp(), &more] {
        same!(detach(qp, GROUP), 0, "ibv_detach_mcast");
    }
    Ok(())
}

fn detached_gets_none(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::ud())?;
    offered(&pair.near)?;
    let far = pair.far.here()?;
    same!(attach(far.qp(), GROUP), 0, "ibv_attach_mcast");
    same!(detach(far.qp(), GROUP), 0, "ibv_detach_mcast");
    check!(detach(far.qp(), GROUP) != 0, "detaching twice");
    far.recv(1, 0, 200)?;
    let ah = Ah::new(&pair.near.pd, GROUP)?;
    pair.succeed(pair.request(Op::SEND, 1, 0, 60).to(Target::Ud(ah.ptr as usize, QPN, QKEY)))?;
    let unicast = pair.near.ah(&pair.to)?;
    let target = Target::Ud(unicast.ptr as usize, pair.to.qpn, QKEY);
    pair.succeed(pair.request(Op::SEND, 2, 0, 33).to(target))?;
    same!(pair.far.one(Side::Recv)?.byte_len, 73, "the one datagram that is meant for it");
    Ok(())
}

fn only_datagrams_and_multicast_addresses(env: &Env) -> Outcome {
    let rc = End::open(env, false, &Spec::rc())?;
    offered(&rc)?;
    check!(attach(rc.qp(), GROUP) != 0, "a connected queue pair was attached");
    let ud = Pair::new(env, &Spec::ud())?;
    check!(attach(ud.near.qp(), ud.to.gid) != 0, "an address that is not multicast was taken");
    Ok(())
}
