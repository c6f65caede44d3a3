//! Rights of regions and what registering refuses.

use std::sync::Arc;

use freeflow_abi::*;

use crate::suite::{End, Env, Op, Outcome, Pair, Spec, check, same, skip, tests};
use crate::verbs::{Buf, Mr, name_of};

tests! { "access";
    remote_write_needs_local_write OneProcess "ibv_reg_mr(3): REMOTE_WRITE and REMOTE_ATOMIC need LOCAL_WRITE";
    memory_that_is_not_mapped OneProcess "ibv_reg_mr(3); IBTA 11.2.8.1";
    memory_that_may_not_be_written OneProcess "ibv_reg_mr(3): LOCAL_WRITE needs memory that may be written";
    on_demand_paging OneProcess "ibv_reg_mr(3): IBV_ACCESS_ON_DEMAND, as the device says";
    optional_flags_are_ignored Anywhere "ibv_reg_mr(3): IBV_ACCESS_RELAXED_ORDERING is optional";
    keys_are_not_reused_at_once OneProcess "a key never opens another region";
}

fn remote_write_needs_local_write(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let buf = Arc::new(Buf::new(4096)?);
    for access in [IBV_ACCESS_REMOTE_WRITE, IBV_ACCESS_REMOTE_ATOMIC] {
        match Mr::register(&end.pd, &buf, 0, 4096, access) {
            Ok(_) => crate::suite::fail!("access {access:#x} without LOCAL_WRITE was granted"),
            Err(errno) => same!(name_of(errno), name_of(libc::EINVAL), "errno"),
        }
    }
    Ok(())
}

fn memory_that_is_not_mapped(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let buf = Arc::new(Buf::with(3 * 4096, libc::PROT_NONE)?);
    // Two pages may be used, the third may not be.
    // SAFETY: pages of the buffer's own mapping.
    let failed = unsafe {
        libc::mprotect(buf.addr() as *mut _, 2 * 4096, libc::PROT_READ | libc::PROT_WRITE)
    };
    same!(failed, 0, "mprotect");
    match Mr::register(&end.pd, &buf, 0, 3 * 4096, IBV_ACCESS_LOCAL_WRITE) {
        Ok(_) => crate::suite::fail!("memory that may not be touched was registered"),
        Err(errno) => check!(
            matches!(errno, libc::EFAULT | libc::ENOMEM | libc::EINVAL),
            "errno {}",
            name_of(errno)
        ),
    }
    let good = Mr::register(&end.pd, &buf, 0, 2 * 4096, IBV_ACCESS_LOCAL_WRITE);
    check!(good.is_ok(), "the two good pages: {}", name_of(good.err().unwrap_or(0)));
    Ok(())
}

fn memory_that_may_not_be_written(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let buf = Arc::new(Buf::with(4096, libc::PROT_READ)?);
    match Mr::register(&end.pd, &buf, 0, 4096, IBV_ACCESS_LOCAL_WRITE) {
        Ok(_) => crate::suite::fail!("read-only memory was registered with LOCAL_WRITE"),
        Err(errno) => same!(name_of(errno), name_of(libc::EFAULT), "errno"),
    }
    let reading = Mr::register(&end.pd, &buf, 0, 4096, IBV_ACCESS_REMOTE_READ);
    check!(reading.is_ok(), "for reading: {}", name_of(reading.err().unwrap_or(0)));
    Ok(())
}

fn on_demand_paging(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let Some(attr) = end.ctx.attr_ex() else {
        skip!("the library does not answer ibv_query_device_ex");
    };
    let offered = attr.odp_caps.general_caps & 1 != 0;
    let buf = Arc::new(Buf::new(1 << 20)?);
    let access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_ON_DEMAND;
    let made = Mr::register(&end.pd, &buf, 0, 1 << 20, access);
    same!(made.is_ok(), offered, "registration, where odp_caps says {offered}");
    Ok(())
}

fn optional_flags_are_ignored(env: &Env) -> Outcome {
    let spec = Spec::rc();
    let access = spec.mr_access | IBV_ACCESS_RELAXED_ORDERING;
    let mut pair = Pair::new(env, &spec)?;
    let (base, rkey) = pair.far.register(4096, access, false)?;
    pair.succeed(Op::WRITE.request(1, base, rkey).sge(pair.near.sge(0, 100)))?;
    pair.succeed(Op::READ.request(1, base, rkey).sge(pair.near.sge(0, 100)))?;
    // The entry that takes optional flags, as the header's ibv_reg_mr calls it.
    let buf = Arc::new(Buf::new(4096)?);
    let made = Mr::register_iova(&pair.near.pd, &buf, 4096, buf.addr(), access);
    check!(made.is_ok(), "ibv_reg_mr_iova2: {}", name_of(made.err().unwrap_or(0)));
    Ok(())
}

fn keys_are_not_reused_at_once(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let mut seen = Vec::new();
    for _ in 0..32 {
        let mr = Mr::new(&end.pd, 4096, end.spec.mr_access)?;
        check!(!seen.contains(&mr.rkey()), "key {:#x} is given again at once", mr.rkey());
        seen.push(mr.rkey());
    }
    Ok(())
}
