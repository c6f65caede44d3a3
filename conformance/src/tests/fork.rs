//! Programs that fork (`ibv_fork_init(3)`).

use crate::suite::{Env, Op, Outcome, Pair, Spec, check, fail, same, tests};
use crate::verbs::{pattern, verb};

tests! { "fork";
    fork_init OneProcess "ibv_fork_init(3), ibv_is_fork_initialized(3)";
    child_runs_and_parent_goes_on Anywhere "ibv_fork_init(3): the parent's registrations keep working";
    child_sees_memory_of_the_fork Anywhere "fork(2): memory beside a registered buffer is the child's own copy";
}

fn fork_init(_env: &Env) -> Outcome {
    same!(verb!(ibv_fork_init()), 0, "ibv_fork_init");
    let state = verb!(ibv_is_fork_initialized());
    // IBV_FORK_ENABLED or IBV_FORK_UNNEEDED.
    check!(state == 1 || state == 2, "ibv_is_fork_initialized says {state}");
    Ok(())
}

/// Forks; the child runs `work`, which may only touch memory, and tells by its exit code.
fn child(work: impl FnOnce() -> bool) -> Outcome<libc::pid_t> {
    // SAFETY: the child calls only what touches memory, then _exit.
    match unsafe { libc::fork() } {
        -1 => fail!("fork: {}", crate::verbs::name_of(crate::verbs::errno())),
        0 => {
            let code = i32::from(!work());
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(code) }
        }
        pid => Ok(pid),
    }
}

fn reap(pid: libc::pid_t) -> Outcome<i32> {
    let mut status = 0;
    // SAFETY: our own child, and room for its status.
    let got = unsafe { libc::waitpid(pid, &mut status, 0) };
    same!(got, pid, "waitpid");
    check!(libc::WIFEXITED(status), "the child ended with status {status:#x}");
    Ok(libc::WEXITSTATUS(status))
}

fn child_runs_and_parent_goes_on(env: &Env) -> Outcome {
    same!(verb!(ibv_fork_init()), 0, "ibv_fork_init");
    let mut pair = Pair::new(env, &Spec::rc())?;
    pair.ping(1)?;
    for round in 0..5 {
        let pid = child(|| true)?;
        // Registered memory is written by both while the child lives or dies.
        for i in 0..10 {
            pair.ping(100 * round + i)?;
            let bytes = pattern(i, 9000);
            pair.far.put(0, &bytes)?;
            pair.near.put(20_000, &[0; 9000])?;
            let read = Op::READ.request(1, pair.to.base, pair.to.rkey).sge(pair.near.sge(20_000, 9000));
            pair.succeed(read)?;
            same!(pair.near.get(20_000, 9000)?, bytes, "data read after fork {round}");
        }
        same!(reap(pid)?, 0, "exit code of the child");
    }
    Ok(())
}

fn child_sees_memory_of_the_fork(env: &Env) -> Outcome {
    same!(verb!(ibv_fork_init()), 0, "ibv_fork_init");
    let mut pair = Pair::new(env, &Spec::rc())?;
    // Ordinary memory, registered in its middle.
    let heap = vec![0x11_u8; 64 << 10];
    let (pd, len) = (pair.near.pd.clone(), heap.len());
    let mr = verb!(ibv_reg_mr(pd.ptr, heap.as_ptr().wrapping_add(20_000).cast_mut().cast(), 5000, 1));
    check!(!mr.is_null(), "ibv_reg_mr: {}", crate::verbs::name_of(crate::verbs::errno()));
    let mut go = [0; 2];
    // SAFETY: room for two descriptors.
    same!(unsafe { libc::pipe(go.as_mut_ptr()) }, 0, "pipe");
    let at = heap.as_ptr();
    let pid = child(|| {
        let mut byte = 0_u8;
        // SAFETY: reads one byte into the stack; then the child's copy of the vector, whose first
        // part is outside the region.
        unsafe {
            libc::read(go[0], (&raw mut byte).cast(), 1);
            (0..16_000).all(|i| at.add(i).read_volatile() == 0x11)
        }
    })?;
    // The parent changes its memory; the child must not see that.
    // SAFETY: the vector's own bytes.
    unsafe { core::ptr::write_bytes(heap.as_ptr().cast_mut(), 0x22, len) };
    // SAFETY: one byte from the stack.
    unsafe { libc::write(go[1], c"x".as_ptr().cast(), 1) };
    same!(reap(pid)?, 0, "exit code of the child, which looks at its own copy");
    same!(verb!(ibv_dereg_mr(mr)), 0, "ibv_dereg_mr");
    pair.ping(3)?;
    check!(heap.iter().all(|b| *b == 0x22), "the parent's memory");
    Ok(())
}
