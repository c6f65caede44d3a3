//! Atomic operations.

use std::sync::atomic::Ordering;

use freeflow_abi::*;

use crate::suite::{Env, Op, Outcome, Pair, Side, Spec, check, same, skip, tests};
use crate::verbs::Target;

tests! { "atomics";
    compare_and_swap Anywhere "ibv_post_send(3): IBV_WR_ATOMIC_CMP_AND_SWP";
    fetch_and_add Anywhere "ibv_post_send(3): IBV_WR_ATOMIC_FETCH_AND_ADD";
    unaligned Anywhere "IBTA table 57: a misaligned atomic is an invalid request";
    one_element_of_eight_bytes OneProcess "ibv_post_send(3): atomics have one element of 8 bytes";
    atomic_among_queue_pairs OneProcess "ibv_query_device(3): IBV_ATOMIC_HCA";
    mixed_with_writes_and_reads OneProcess "neighbours of the word are not touched, none is torn";
}

fn offered(pair: &Pair) -> Outcome {
    if pair.near.ctx.attr.atomic_cap == 0 {
        skip!("device does not offer atomics");
    }
    Ok(())
}

fn compare_and_swap(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    offered(&pair)?;
    let word = |pair: &mut Pair| -> Outcome<u64> {
        let bytes = pair.far.get(64, 8)?;
        Ok(bytes.iter().rev().fold(0, |all, b| all << 8 | u64::from(*b)))
    };
    pair.far.put(64, &5_u64.to_ne_bytes())?;
    for (compare, swap, before, after) in
        [(5, u64::MAX, 5, u64::MAX), (5, 1, u64::MAX, u64::MAX), (u64::MAX, 0, u64::MAX, 0)]
    {
        let target = Target::Atomic(pair.to.base + 64, pair.to.rkey, compare, swap);
        let wc = pair.succeed(pair.request(Op::CAS, 1, 0, 8).to(target))?;
        same!((wc.opcode, wc.byte_len), (IBV_WC_COMP_SWAP, 8), "opcode and byte_len");
        same!(pair.near.get(0, 8)?, u64::to_ne_bytes(before), "the word before");
        same!(word(&mut pair)?, after, "the word after");
    }
    Ok(())
}

fn fetch_and_add(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    offered(&pair)?;
    pair.far.put(64, &u64::MAX.to_ne_bytes())?;
    for (add, before) in [(2, u64::MAX), (0, 1), (u64::MAX, 1), (7, 0)] {
        let target = Target::Atomic(pair.to.base + 64, pair.to.rkey, add, 0);
        let wc = pair.succeed(pair.request(Op::FAA, 1, 8, 8).to(target))?;
        same!((wc.opcode, wc.byte_len), (IBV_WC_FETCH_ADD, 8), "opcode and byte_len");
        same!(pair.near.get(8, 8)?, u64::to_ne_bytes(before), "the word before");
    }
    same!(pair.far.get(64, 8)?, 7_u64.to_ne_bytes(), "the word after");
    Ok(())
}

fn unaligned(env: &Env) -> Outcome {
    for op in [Op::CAS, Op::FAA] {
        for at in [1, 4, 7] {
            let mut pair = Pair::new(env, &Spec::rc())?;
            offered(&pair)?;
            pair.far.put(0, &[3; 16])?;
            let target = Target::Atomic(pair.to.base + at, pair.to.rkey, 0, 1);
            let request = pair.request(op, 1, 0, 8).to(target);
            pair.refuse(op.name, request, IBV_WC_REM_INV_REQ_ERR)?;
            same!(pair.far.get(0, 16)?, [3; 16], "memory");
        }
    }
    Ok(())
}

fn one_element_of_eight_bytes(env: &Env) -> Outcome {
    for op in [Op::CAS, Op::FAA] {
        for lengths in [&[4_usize][..], &[16], &[4, 4], &[8, 0], &[]] {
            let pair = Pair::new(env, &Spec::rc())?;
            offered(&pair)?;
            let mut request = pair.request(op, 1, 0, 8);
            request.sges = lengths.iter().map(|len| pair.near.sge(0, *len)).collect();
            match pair.near.qp().post_send(&[request]) {
                Err((errno, at)) => check!(errno > 0 && at == Some(0), "errno {errno} at {at:?}"),
                Ok(()) => {
                    let wc = pair.near.one(Side::Send)?;
                    check!(
                        matches!(wc.status, IBV_WC_LOC_LEN_ERR | IBV_WC_LOC_QP_OP_ERR),
                        "{} of {lengths:?}: status {}",
                        op.name,
                        wc.status
                    );
                }
            }
        }
    }
    Ok(())
}

fn atomic_among_queue_pairs(env: &Env) -> Outcome {
    const CONNECTIONS: u64 = 4;
    let each = env.many(200_000) / CONNECTIONS;
    let spec = Spec { send_wr: 128, rd_atomic: 4, ..Spec::rc() };
    let mut pairs = Vec::new();
    for _ in 0..CONNECTIONS {
        pairs.push(Pair::new(env, &spec)?);
    }
    offered(&pairs[0])?;
    // All add to the word of the first: its memory is registered in each domain.
    let owner = pairs[0].far.here()?.mr().buf.clone();
    let mut keys = Vec::new();
    for pair in &pairs {
        let pd = pair.far.here()?.pd.clone();
        match crate::verbs::Mr::register(&pd, &owner, 0, 4096, spec.mr_access) {
            Ok(mr) => keys.push(mr),
            Err(errno) => crate::suite::fail!("registering it again: {}", crate::verbs::name_of(errno)),
        }
    }
    owner.store(0, 0)?;
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = pairs
            .iter()
            .zip(&keys)
            .map(|(pair, key)| {
                scope.spawn(move || -> Outcome {
                    let target = Target::Atomic(key.base, key.rkey(), 1, 0);
                    let (mut posted, mut done) = (0, 0);
                    while done < each {
                        while posted < each && posted - done < 32 {
                            pair.near.send(&[pair.request(Op::FAA, posted, 0, 8).to(target)])?;
                            posted += 1;
                        }
                        let wc = pair.near.one(Side::Send)?;
                        same!((wc.wr_id, wc.status), (done, IBV_WC_SUCCESS), "completion");
                        done += 1;
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().map(|w| w.join()).collect::<Vec<_>>()
    });
    for result in results {
        result.unwrap_or_else(|_| Err(crate::suite::Stop::Fail("a thread panicked".to_owned())))?;
    }
    same!(owner.load(0)?, each * CONNECTIONS, "the sum");
    Ok(())
}

fn mixed_with_writes_and_reads(env: &Env) -> Outcome {
    let adders = Pair::new(env, &Spec::rc())?;
    offered(&adders)?;
    let memory = adders.far.here()?.mr().buf.clone();
    memory.store(0, 0)?;
    let n = env.many(20_000);
    std::thread::scope(|scope| -> Outcome {
        let reader = scope.spawn(|| -> Outcome {
            // The CPU sees a counter that only grows, by one step at a time or more.
            let (mut last, end) = (0, std::time::Instant::now() + crate::suite::LONG);
            while last < n {
                let now = memory.word(0)?.load(Ordering::SeqCst);
                check!(now >= last && now <= n, "the word went from {last} to {now}");
                last = now;
                check!(std::time::Instant::now() < end, "only {last} of {n} additions");
                std::thread::yield_now();
            }
            Ok(())
        });
        let target = Target::Atomic(adders.to.base, adders.to.rkey, 1, 0);
        for i in 0..n {
            let neighbour = Op::WRITE
                .request(i, adders.to.base + 8, adders.to.rkey)
                .sge(adders.near.sge(64, 8))
                .unsignaled();
            adders.near.send(&[neighbour, adders.request(Op::FAA, i, 0, 8).to(target)])?;
            let wc = adders.near.one(Side::Send)?;
            same!(wc.status, IBV_WC_SUCCESS, "status");
            same!(adders.near.mr().buf.load(0)?, i, "the word before addition {i}");
        }
        reader.join().unwrap_or_else(|_| Err(crate::suite::Stop::Fail("the reader panicked".to_owned())))
    })?;
    same!(memory.load(0)?, n, "the sum");
    Ok(())
}
