//! Unreliable datagrams.

use freeflow_abi::*;

use crate::suite::{Env, Op, Outcome, Pair, QKEY, Side, Spec, check, same, tests};
use crate::verbs::{Ah, Send, Target, address_of, pattern};

tests! { "datagram";
    header_of_forty_bytes Anywhere "IBTA annex A17: GRH, or an IPv4 header in its last 20 bytes";
    answer_by_completion OneProcess "ibv_create_ah_from_wc(3)";
    address_of_a_completion OneProcess "ibv_init_ah_from_wc(3)";
    queue_key_must_match Anywhere "IBTA 10.2.5, 9.8.3.1: a wrong Q_Key is dropped in silence";
    queue_key_with_the_high_bit Anywhere "IBTA 10.2.5: the high bit means the sender's own Q_Key";
    no_receive_is_no_error Anywhere "IBTA 9.8.3: dropped in silence";
    receive_too_short Anywhere "IBTA 9.8.3: a datagram that does not fit";
    up_to_the_mtu Anywhere "IBTA 9.8.3: one packet, as long as the port's MTU";
    beyond_the_mtu OneProcess "IBTA 9.8.3: a longer one is refused";
    nobody_there Anywhere "IBTA 9.8.3: sent is sent";
    many_senders OneProcess "ibv_poll_cq(3): src_qp";
    needs_no_peer_in_order Anywhere "datagrams keep the order of one path here";
}

fn datagram(pair: &Pair, ah: &Ah, wr_id: u64, len: usize, qkey: u32) -> Send {
    pair.request(Op::SEND, wr_id, 0, len).to(Target::Ud(ah.ptr as usize, pair.to.qpn, qkey))
}

fn header_of_forty_bytes(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::ud())?;
    let ah = pair.near.ah(&pair.to)?;
    let bytes = pattern(5, 100);
    pair.near.put(0, &bytes)?;
    pair.far_recv(1, 0, 140)?;
    pair.succeed(datagram(&pair, &ah, 1, 100, QKEY))?;
    let wc = pair.far.one(Side::Recv)?;
    same!((wc.byte_len, wc.flags & IBV_WC_GRH), (140, IBV_WC_GRH), "byte_len and IBV_WC_GRH");
    let got = pair.far.get(0, 140)?;
    same!(got[40..], bytes[..], "data");
    let (from, to) = (pair.near.ctx.gid, pair.to.gid);
    if from[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF] {
        let ip = &got[20..40];
        same!(ip[0], 0x45, "version and length of the IPv4 header");
        same!(ip[9], 17, "protocol of the IPv4 header");
        same!(ip[12..16], from[12..], "source of the IPv4 header");
        same!(ip[16..20], to[12..], "destination of the IPv4 header");
        // UDP, BTH, DETH, data, ICRC.
        let length = u16::from_be_bytes([ip[2], ip[3]]);
        same!(length, 20 + 8 + 12 + 8 + 100 + 4, "length of the IPv4 header");
    } else {
        same!(got[0] >> 4, 6, "version of the GRH");
        same!(got[8..24], from, "sgid of the GRH");
        same!(got[24..40], to, "dgid of the GRH");
        same!(u16::from_be_bytes([got[4], got[5]]), 8 + 12 + 8 + 100 + 4, "paylen of the GRH");
    }
    Ok(())
}

fn answer_by_completion(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::ud())?;
    let ah = pair.near.ah(&pair.to)?;
    pair.far_recv(1, 0, 140)?;
    pair.near.recv(2, 4096, 140)?;
    pair.succeed(datagram(&pair, &ah, 1, 10, QKEY))?;
    let wc = pair.far.one(Side::Recv)?;
    let far = pair.far.here()?;
    let mut grh = [0; 40];
    grh.copy_from_slice(&far.get(0, 40)?);
    let back = Ah::from_wc(&far.pd, &wc, &grh)?;
    let answer = Op::SEND
        .request(3, 0, 0)
        .sge(far.sge(0, 20))
        .to(Target::Ud(back.ptr as usize, wc.src_qp, QKEY));
    far.send(&[answer])?;
    same!(far.one(Side::Send)?.status, IBV_WC_SUCCESS, "status of the answer");
    let got = pair.near.one(Side::Recv)?;
    same!((got.wr_id, got.byte_len, got.src_qp), (2, 60, pair.to.qpn), "the answer");
    Ok(())
}

fn address_of_a_completion(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::ud())?;
    let ah = pair.near.ah(&pair.to)?;
    pair.far_recv(1, 0, 140)?;
    pair.succeed(datagram(&pair, &ah, 1, 10, QKEY))?;
    let wc = pair.far.one(Side::Recv)?;
    let far = pair.far.here()?;
    let mut grh = [0; 40];
    grh.copy_from_slice(&far.get(0, 40)?);
    let attr = address_of(&far.pd, &wc, &grh)?;
    // SAFETY: any bytes are a GID.
    let (gid, sender) = (unsafe { attr.grh.dgid.raw }, pair.near.ctx.gid);
    same!((attr.is_global, attr.port_num), (1, 1), "is_global and port_num");
    same!((gid, attr.grh.sgid_index), (sender, far.ctx.gid_index), "dgid and sgid_index");
    Ok(())
}

fn queue_key_must_match(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::ud())?;
    let ah = pair.near.ah(&pair.to)?;
    pair.far_recv(1, 0, 140)?;
    for qkey in [0, QKEY ^ 1, !QKEY & 0x7FFF_FFFF] {
        pair.succeed(datagram(&pair, &ah, 1, 10, qkey))?;
    }
    pair.succeed(datagram(&pair, &ah, 2, 20, QKEY))?;
    let got = pair.far.one(Side::Recv)?;
    same!((got.wr_id, got.byte_len), (1, 60), "the one datagram with the right Q_Key");
    Ok(())
}

fn queue_key_with_the_high_bit(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::ud())?;
    let ah = pair.near.ah(&pair.to)?;
    pair.far_recv(1, 0, 140)?;
    pair.succeed(datagram(&pair, &ah, 1, 10, 0x8000_0001))?;
    same!(pair.far.one(Side::Recv)?.byte_len, 50, "a datagram with the sender's own Q_Key");
    Ok(())
}

fn no_receive_is_no_error(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::ud())?;
    let ah = pair.near.ah(&pair.to)?;
    for i in 0..10 {
        pair.succeed(datagram(&pair, &ah, i, 10, QKEY))?;
    }
    // They are sent, which is not to say that they have arrived, and nothing tells when they have.
    std::thread::sleep(crate::suite::QUIET);
    pair.far_recv(1, 0, 140)?;
    pair.succeed(datagram(&pair, &ah, 11, 30, QKEY))?;
    let got = pair.far.one(Side::Recv)?;
    same!((got.wr_id, got.byte_len), (1, 70), "the datagram after the receive was posted");
    Ok(())
}

fn receive_too_short(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::ud())?;
    let ah = pair.near.ah(&pair.to)?;
    pair.far.put(0, &[0x44; 256])?;
    pair.far_recv(1, 0, 60)?;
    pair.succeed(datagram(&pair, &ah, 1, 100, QKEY))?;
    // Dropped, or the receive ends in error: nothing is written behind it in either case.
    let end = std::time::Instant::now() + crate::suite::QUIET;
    while std::time::Instant::now() < end {
        for wc in pair.far.peek(Side::Recv)? {
            check!(wc.status != IBV_WC_SUCCESS, "100 bytes into 20: {wc:?}");
        }
    }
    same!(pair.far.get(60, 196)?, [0x44; 196], "memory behind the receive");
    Ok(())
}

fn up_to_the_mtu(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::ud())?;
    let ah = pair.near.ah(&pair.to)?;
    let mtu = 128 << pair.near.ctx.port.active_mtu;
    let bytes = pattern(1, mtu);
    pair.near.put(0, &bytes)?;
    pair.far_recv(1, 0, mtu + 40)?;
    pair.succeed(datagram(&pair, &ah, 1, mtu, QKEY))?;
    same!(pair.far.one(Side::Recv)?.byte_len as usize, mtu + 40, "byte_len");
    same!(pair.far.get(40, mtu)?, bytes, "data");
    Ok(())
}

fn beyond_the_mtu(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::ud())?;
    let ah = pair.near.ah(&pair.to)?;
    let mtu = 128 << pair.near.ctx.port.active_mtu;
    match pair.near.qp().post_send(&[datagram(&pair, &ah, 1, mtu + 1, QKEY)]) {
        Err((errno, at)) => check!(errno > 0 && at == Some(0), "errno {errno} at {at:?}"),
        Ok(()) => {
            let wc = pair.near.one(Side::Send)?;
            same!(wc.status, IBV_WC_LOC_LEN_ERR, "status of a datagram longer than the MTU");
        }
    }
    Ok(())
}

fn nobody_there(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::ud())?;
    let right = pair.near.ah(&pair.to)?;
    let request = pair
        .request(Op::SEND, 1, 0, 8)
        .to(Target::Ud(right.ptr as usize, pair.to.qpn ^ 0x3F_0000, QKEY));
    pair.succeed(request)?;
    Ok(())
}

fn many_senders(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::ud())?;
    let ah = pair.near.ah(&pair.to)?;
    let end = &pair.near;
    let mut senders = Vec::new();
    for _ in 0..5 {
        let qp = crate::verbs::Qp::new(&end.pd, &end.send_cq, &end.recv_cq, &end.spec.qp(None))?;
        qp.must_modify(&end.to_init())?;
        qp.must_modify(&end.to_rtr(&pair.to))?;
        qp.must_modify(&end.to_rts())?;
        senders.push(qp);
    }
    for _ in 0..3 {
        for qp in &senders {
            pair.far_recv(1, 0, 140)?;
            qp.send(&[datagram(&pair, &ah, 1, 10, QKEY)])?;
            same!(pair.near.one(Side::Send)?.qp_num, qp.number(), "qp_num");
            same!(pair.far.one(Side::Recv)?.src_qp, qp.number(), "src_qp");
        }
    }
    Ok(())
}

fn needs_no_peer_in_order(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::ud())?;
    let ah = pair.near.ah(&pair.to)?;
    for i in 0..32 {
        pair.far_recv(i, 0, 140)?;
    }
    for i in 0..32 {
        pair.near.send(&[datagram(&pair, &ah, i, i as usize, QKEY)])?;
    }
    pair.near.wait(Side::Send, 32)?;
    let lengths: Vec<_> = pair.far.wait(Side::Recv, 32)?.iter().map(|w| w.byte_len).collect();
    same!(lengths, (40..72).collect::<Vec<_>>(), "lengths");
    Ok(())
}
