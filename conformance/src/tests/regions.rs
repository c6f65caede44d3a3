//! Memory regions of every shape.

use std::sync::Arc;

use freeflow_abi::*;

use crate::suite::{End, Env, Op, Outcome, Pair, Side, Spec, check, fail, same, skip, tests};
use crate::verbs::{Buf, Mr, Pd, buffers, errno, name_of, operation, pattern, verb};

tests! { "regions";
    one_byte_and_unaligned OneProcess "ibv_reg_mr(3): any address and length";
    overlapping_and_nested OneProcess "ibv_reg_mr(3): memory may be registered often";
    deregistering_one_keeps_the_other OneProcess "ibv_dereg_mr(3)";
    virtual_address OneProcess "ibv_reg_mr_iova(3)";
    wrong_iova_is_refused OneProcess "ibv_reg_mr_iova(3): the program's own address is not valid";
    sparse_and_large OneProcess "ibv_reg_mr(3): a region of 5 GiB";
    untouched_pages_read_as_zero OneProcess "ibv_reg_mr(3): memory that was never touched";
    neighbours_are_not_touched OneProcess "registration changes no byte, in the region or beside it";
    concurrent_writes_survive_registration OneProcess "ibv_reg_mr(3): no write of another thread is lost";
    dmabuf OneProcess "ibv_reg_dmabuf_mr(3)";
    reregister OneProcess "ibv_rereg_mr(3)";
    reregister_in_another_domain OneProcess "ibv_rereg_mr(3): IBV_REREG_MR_CHANGE_PD, all at once";
    null_region OneProcess "ibv_alloc_null_mr(3): reads zeroes, drops writes";
    device_memory OneProcess "ibv_alloc_dm(3), ibv_reg_dm_mr(3)";
    advise OneProcess "ibv_advise_mr(3)";
    on_demand_memory_may_change OneProcess "ibv_reg_mr(3): IBV_ACCESS_ON_DEMAND: memory as it is when it is accessed";
    allocated_buffer OneProcess "ibv_alloc_buf(3), ibv_reg_buf_mr(3)";
    implicit_region OneProcess "ibv_reg_mr(3): the whole address space on demand";
}

fn one_byte_and_unaligned(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let far = pair.far.here()?;
    let buf = Arc::new(Buf::new(5 * 4096)?);
    buf.fill(0x77);
    for (at, len) in [(0, 1), (4095, 1), (4095, 2), (1, 4096), (4096, 8192), (333, 9999)] {
        let mr = registered(&far.pd, &buf, at, len)?;
        let bytes = pattern(len as u64, len);
        pair.near.put(0, &bytes)?;
        pair.succeed(Op::WRITE.request(1, mr.base, mr.rkey()).sge(pair.near.sge(0, len)))?;
        same!(buf.get(at, len)?, bytes, "{len} bytes at {at}");
        pair.near.put(0, &vec![0; len])?;
        pair.succeed(Op::READ.request(1, mr.base, mr.rkey()).sge(pair.near.sge(0, len)))?;
        same!(pair.near.get(0, len)?, bytes, "{len} bytes at {at}, read back");
        if at > 0 {
            same!(buf.get(at - 1, 1)?, [0x77], "the byte before {at}");
        }
        same!(buf.get(at + len, 1)?, [0x77], "the byte after {at} + {len}");
        buf.fill(0x77);
        // One byte more is outside.
        let fresh = Pair::new(env, &Spec::rc())?;
        let request = Op::WRITE.request(1, mr.base + 1, mr.rkey()).sge(fresh.near.sge(0, len));
        same!(fresh.run(request)?.status, IBV_WC_REM_ACCESS_ERR, "one byte past {len}");
    }
    Ok(())
}

fn registered(pd: &Arc<Pd>, buf: &Arc<Buf>, at: usize, len: usize) -> Outcome<Mr> {
    match Mr::register(pd, buf, at, len, Spec::rc().mr_access) {
        Ok(mr) => Ok(mr),
        Err(errno) => fail!("ibv_reg_mr of {len} bytes at {at}: {}", name_of(errno)),
    }
}

fn overlapping_and_nested(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let far = pair.far.here()?;
    let buf = Arc::new(Buf::new(16 * 4096)?);
    let ranges = [(0, 65536), (4096, 8192), (5000, 20_000), (4096, 8192), (60_000, 5536), (0, 1)];
    let mut all = Vec::new();
    for (at, len) in ranges {
        all.push(registered(&far.pd, &buf, at, len)?);
    }
    for (i, ((at, len), mr)) in ranges.iter().zip(&all).enumerate() {
        let bytes = pattern(i as u64, *len);
        pair.near.put(0, &bytes[..*len.min(&60_000)])?;
        let n = *len.min(&60_000);
        pair.succeed(Op::WRITE.request(1, mr.base, mr.rkey()).sge(pair.near.sge(0, n)))?;
        same!(buf.get(*at, n)?, bytes[..n], "through region {i}");
        // The CPU and every other region see the same bytes.
        buf.put(*at, &[i as u8])?;
        let whole = Op::READ.request(2, all[0].base + *at as u64, all[0].rkey());
        pair.succeed(whole.sge(pair.near.sge(0, 1)))?;
        same!(pair.near.get(0, 1)?, [i as u8], "first byte of region {i} through the whole");
    }
    Ok(())
}

fn deregistering_one_keeps_the_other(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let far = pair.far.here()?;
    let buf = Arc::new(Buf::new(8 * 4096)?);
    for keep_first in [true, false] {
        let first = registered(&far.pd, &buf, 0, 5 * 4096)?;
        let second = registered(&far.pd, &buf, 2 * 4096, 6 * 4096)?;
        let kept = if keep_first {
            drop(second);
            first
        } else {
            drop(first);
            second
        };
        let bytes = pattern(9, 4096);
        pair.near.put(0, &bytes)?;
        pair.succeed(Op::WRITE.request(1, kept.base, kept.rkey()).sge(pair.near.sge(0, 4096)))?;
        let at = (kept.base - buf.addr()) as usize;
        same!(buf.get(at, 4096)?, bytes, "through the region that is left");
    }
    Ok(())
}

fn virtual_address(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let far = pair.far.here()?;
    let buf = Arc::new(Buf::new(8192)?);
    for iova in [0, 0x1000_0000_0000, buf.addr() + 4096] {
        let made = Mr::register_iova(&far.pd, &buf, 8192, iova, far.spec.mr_access);
        let mr = match made {
            Ok(mr) => mr,
            Err(errno) => fail!("ibv_reg_mr_iova at {iova:#x}: {}", name_of(errno)),
        };
        let bytes = pattern(iova, 100);
        pair.near.put(0, &bytes)?;
        pair.succeed(Op::WRITE.request(1, iova + 4000, mr.rkey()).sge(pair.near.sge(0, 100)))?;
        same!(buf.get(4000, 100)?, bytes, "data through iova {iova:#x}");
        // Local elements use it too.
        let recv = crate::verbs::Recv::new(5).sge(mr.sge(100, 100));
        far.qp().recv(&[recv])?;
        pair.succeed(pair.request(Op::SEND, 2, 0, 100))?;
        far.one(Side::Recv)?;
        same!(buf.get(100, 100)?, bytes, "data received at iova {iova:#x}");
    }
    Ok(())
}

fn wrong_iova_is_refused(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let far = pair.far.here()?;
    let buf = Arc::new(Buf::new(8192)?);
    let iova = 0x2000_0000_0000;
    match Mr::register_iova(&far.pd, &buf, 8192, iova, far.spec.mr_access) {
        Err(errno) => fail!("ibv_reg_mr_iova: {}", name_of(errno)),
        Ok(mr) => {
            let request = Op::WRITE.request(1, buf.addr(), mr.rkey()).sge(pair.near.sge(0, 8));
            pair.refuse("the buffer's own address", request, IBV_WC_REM_ACCESS_ERR)?;
        }
    }
    Ok(())
}

fn sparse_and_large(env: &Env) -> Outcome {
    const LEN: usize = 5 << 30;
    let pair = Pair::new(env, &Spec::rc())?;
    let far = pair.far.here()?;
    if far.ctx.is_rxe() {
        skip!("the reference pins all pages, which takes 5 GiB");
    }
    let buf = Arc::new(Buf::new(LEN)?);
    let mr = registered(&far.pd, &buf, 0, LEN)?;
    for at in [0, (4 << 30) - 50, LEN - 100] {
        let bytes = pattern(at as u64, 100);
        pair.near.put(0, &bytes)?;
        let to = mr.base + at as u64;
        pair.succeed(Op::WRITE.request(1, to, mr.rkey()).sge(pair.near.sge(0, 100)))?;
        same!(buf.get(at, 100)?, bytes, "data at {at:#x}");
    }
    Ok(())
}

fn untouched_pages_read_as_zero(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let far = pair.far.here()?;
    let buf = Arc::new(Buf::new(64 * 4096)?);
    let mr = registered(&far.pd, &buf, 0, 64 * 4096)?;
    pair.near.put(0, &[0x5A; 5000])?;
    pair.succeed(Op::READ.request(1, mr.base + 99_000, mr.rkey()).sge(pair.near.sge(0, 5000)))?;
    same!(pair.near.get(0, 5000)?, [0; 5000], "memory that nobody touched");
    Ok(())
}

fn neighbours_are_not_touched(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let buf = Arc::new(Buf::new(8 * 4096)?);
    let bytes = pattern(77, 8 * 4096);
    buf.put(0, &bytes)?;
    for (at, len) in [(10, 20), (4000, 200), (4096, 4096), (0, 8 * 4096)] {
        let mr = registered(&end.pd, &buf, at, len)?;
        same!(buf.get(0, 8 * 4096)?, bytes, "memory after registering {len} at {at}");
        drop(mr);
        same!(buf.get(0, 8 * 4096)?, bytes, "memory after deregistering {len} at {at}");
    }
    Ok(())
}

fn concurrent_writes_survive_registration(env: &Env) -> Outcome {
    use std::sync::atomic::{AtomicBool, Ordering};
    let end = End::open(env, false, &Spec::rc())?;
    let buf = Arc::new(Buf::new(16 * 4096)?);
    let (began, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| -> Outcome {
        let writer = scope.spawn(|| -> Outcome<u64> {
            let mut n = 0;
            // Relaxed: only the end matters.
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                began.store(true, Ordering::Relaxed);
                for page in 0..16 {
                    buf.store(page * 4096 + 64, n)?;
                }
                for page in 0..16 {
                    same!(buf.load(page * 4096 + 64)?, n, "the word of page {page}");
                }
            }
            Ok(n)
        });
        // Registering may take less time than a thread to start.
        while !began.load(Ordering::Relaxed) && !writer.is_finished() {
            std::thread::yield_now();
        }
        let mut made = Ok(());
        for _ in 0..env.many(20_000).min(300) {
            let mr = registered(&end.pd, &buf, 100, 15 * 4096);
            if let Err(stop) = mr {
                made = Err(stop);
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        let wrote = writer
            .join()
            .unwrap_or_else(|_| Err(crate::suite::Stop::Fail("the writer panicked".to_owned())))?;
        check!(wrote > 0, "the writer never ran");
        made
    })
}

fn dmabuf(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let got = verb!(ibv_reg_dmabuf_mr(end.pd.ptr, 0, 4096, 0, -1, 1));
    check!(got.is_null(), "descriptor -1 is no dma-buf");
    let errno = errno();
    check!(
        matches!(errno, libc::EOPNOTSUPP | libc::EBADF | libc::EINVAL),
        "errno {}",
        name_of(errno)
    );
    if errno == libc::EOPNOTSUPP {
        skip!("device does not offer dma-buf regions");
    }
    Ok(())
}

/// 0, or what the call returned and errno.
fn rereg(mr: &Mr, flags: i32, pd: Option<&Pd>, buf: Option<(&Buf, usize)>, access: u32) -> Outcome<i32> {
    let pd = pd.map_or(core::ptr::null_mut(), |pd| pd.ptr);
    let (addr, len) = buf.map_or((0, 0), |(buf, len)| (buf.addr(), len));
    let got = verb!(ibv_rereg_mr(mr.ptr, flags, pd, addr as *mut _, len, access as i32));
    if got != 0 && matches!(errno(), libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY) {
        skip!("device does not offer re-registration");
    }
    Ok(got)
}

fn reregister(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let far = pair.far.here()?;
    let (first, second) = (Arc::new(Buf::new(8192)?), Arc::new(Buf::new(8192)?));
    let mr = registered(&far.pd, &first, 0, 8192)?;
    let write = |pair: &Pair, at: u64, key: u32| {
        pair.run(Op::WRITE.request(1, at, key).sge(pair.near.sge(0, 64)))
    };
    pair.near.put(0, &[0x42; 64])?;
    // Another place: the region's keys may change, and the new ones open the new memory.
    let got = rereg(&mr, IBV_REREG_MR_CHANGE_TRANSLATION, None, Some((&second, 8192)), 0)?;
    same!(got, 0, "changing the translation: {}", name_of(errno()));
    same!(write(&pair, second.addr(), mr.rkey())?.status, IBV_WC_SUCCESS, "write to the new place");
    same!(second.get(0, 64)?, [0x42; 64], "data at the new place");
    same!(first.get(0, 64)?, [0; 64], "data at the old place");
    // Other rights.
    let got = rereg(&mr, IBV_REREG_MR_CHANGE_ACCESS, None, None, IBV_ACCESS_LOCAL_WRITE)?;
    same!(got, 0, "changing the access: {}", name_of(errno()));
    let refused = write(&pair, second.addr(), mr.rkey())?;
    same!(refused.status, IBV_WC_REM_ACCESS_ERR, "write after the right was taken");
    // Another domain.
    let pair = Pair::new(env, &Spec::rc())?;
    let got = rereg(
        &mr,
        IBV_REREG_MR_CHANGE_PD | IBV_REREG_MR_CHANGE_ACCESS,
        Some(&pair.far.here()?.pd),
        None,
        Spec::rc().mr_access,
    );
    match got? {
        0 => same!(write(&pair, second.addr(), mr.rkey())?.status, IBV_WC_SUCCESS, "write in the new domain"),
        // A domain of another open device is bad input: the region stands.
        IBV_REREG_MR_ERR_INPUT | IBV_REREG_MR_ERR_CMD => {}
        other => fail!("ibv_rereg_mr returned {other}"),
    }
    Ok(())
}

fn reregister_in_another_domain(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let far = pair.far.here()?;
    let elsewhere = Pd::new(&far.ctx)?;
    let (first, second) = (Arc::new(Buf::new(4096)?), Arc::new(Buf::new(8192)?));
    let write = |at: u64, key: u32| {
        pair.run(Op::WRITE.request(1, at, key).sge(pair.near.sge(0, 64)))
    };
    pair.near.put(0, &[0x43; 64])?;
    let mr = match Mr::register(&elsewhere, &first, 0, 4096, IBV_ACCESS_LOCAL_WRITE) {
        Ok(mr) => mr,
        Err(errno) => fail!("ibv_reg_mr: {}", name_of(errno)),
    };
    let got = rereg(
        &mr,
        IBV_REREG_MR_CHANGE_PD | IBV_REREG_MR_CHANGE_ACCESS | IBV_REREG_MR_CHANGE_TRANSLATION,
        Some(&far.pd),
        Some((&second, 8192)),
        Spec::rc().mr_access,
    )?;
    same!(got, 0, "changing all: {}", name_of(errno()));
    // SAFETY: a live region.
    let told = unsafe { ((*mr.ptr).pd, (*mr.ptr).addr as u64, (*mr.ptr).length as usize) };
    same!(told, (far.pd.ptr, second.addr(), 8192), "domain, address and length that it tells");
    same!(write(second.addr() + 8000, mr.rkey())?.status, IBV_WC_SUCCESS, "write to the new place");
    same!(second.get(8000, 64)?, [0x43; 64], "data");
    let got = rereg(&mr, IBV_REREG_MR_CHANGE_PD, Some(&elsewhere), None, 0)?;
    same!(got, 0, "changing the domain back: {}", name_of(errno()));
    let refused = write(second.addr(), mr.rkey())?;
    same!(refused.status, IBV_WC_REM_ACCESS_ERR, "write to a region of another domain");
    same!(second.get(0, 64)?, [0; 64], "data of a write that was refused");
    Ok(())
}

fn null_region(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let Some(alloc) = operation!(pair.near.ctx.ptr, alloc_null_mr) else {
        skip!("device does not offer null regions");
    };
    // SAFETY: the library's own operation on its live domain.
    let ptr = unsafe { alloc(pair.near.pd.ptr) };
    let buf = pair.near.mr().buf.clone();
    let mr = match Mr::adopt(ptr, 0, &buf, &pair.near.pd) {
        Ok(mr) => mr,
        Err(libc::EOPNOTSUPP) => skip!("device does not offer null regions"),
        Err(errno) => fail!("ibv_alloc_null_mr: {}", name_of(errno)),
    };
    pair.far.put(0, &[7; 300])?;
    pair.far_recv(1, 0, 300)?;
    pair.near.put(0, &[1; 100])?;
    // Zeroes in the middle of a message.
    let request = Op::SEND
        .request(1, 0, 0)
        .sge(pair.near.sge(0, 100))
        .sge(mr.sge(0, 100))
        .sge(pair.near.sge(0, 100));
    pair.succeed(request)?;
    pair.far.one(Side::Recv)?;
    let expected = [[1; 100], [0; 100], [1; 100]].concat();
    same!(pair.far.get(0, 300)?, expected, "data");
    // What is read into it is lost.
    pair.far.put(0, &pattern(1, 300))?;
    let request = pair.request(Op::READ, 2, 0, 0);
    let mut request = request;
    request.sges = vec![mr.sge(0, 100), pair.near.sge(0, 200)];
    pair.succeed(request)?;
    same!(pair.near.get(0, 200)?, pattern(1, 300)[100..], "data behind the null part");
    Ok(())
}

fn device_memory(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let ctx = pair.near.ctx.clone();
    let most = ctx.attr_ex().map_or(0, |attr| attr.max_dm_size);
    let ops = (
        operation!(ctx.ptr, alloc_dm),
        operation!(ctx.ptr, free_dm),
        operation!(ctx.ptr, reg_dm_mr),
    );
    let (Some(alloc), Some(free), Some(reg)) = ops else {
        skip!("device does not offer device memory");
    };
    if most == 0 {
        skip!("device does not offer device memory");
    }
    let mut attr = ibv_alloc_dm_attr { length: 4096, log_align_req: 0, comp_mask: 0 };
    // SAFETY: the library's own operation on its open context.
    let dm = unsafe { alloc(ctx.ptr, &mut attr) };
    check!(!dm.is_null(), "ibv_alloc_dm: {}", name_of(errno()));
    let bytes = pattern(1, 200);
    let mut back = [0_u8; 200];
    // SAFETY: the device memory is live; it is called through as the header does, with buffers of
    // 200 bytes.
    let copied = unsafe {
        let to = (*dm).memcpy_to_dm.map_or(-1, |copy| copy(dm, 100, bytes.as_ptr().cast(), 200));
        let from = (*dm).memcpy_from_dm.map_or(-1, |copy| {
            copy(back.as_mut_ptr().cast(), dm, 100, 200)
        });
        let beyond = (*dm).memcpy_to_dm.map_or(0, |copy| copy(dm, 4000, bytes.as_ptr().cast(), 200));
        (to, from, beyond != 0)
    };
    same!(copied, (0, 0, true), "copying to, from and beyond device memory");
    same!(back[..], bytes[..], "data copied there and back");
    let access = pair.near.spec.mr_access | IBV_ACCESS_ZERO_BASED;
    // SAFETY: the library's own operation on live objects.
    let ptr = unsafe { reg(pair.near.pd.ptr, dm, 0, 4096, access) };
    let buf = pair.near.mr().buf.clone();
    let mr = match Mr::adopt(ptr, 0, &buf, &pair.near.pd) {
        Ok(mr) => mr,
        Err(errno) => fail!("ibv_reg_dm_mr: {}", name_of(errno)),
    };
    let mut request = pair.request(Op::WRITE, 1, 0, 200);
    request.sges = vec![mr.sge(100, 200)];
    pair.succeed(request)?;
    same!(pair.far.here()?.get(0, 200)?, bytes, "data sent from device memory");
    drop(mr);
    // SAFETY: no region shows it any more.
    same!(unsafe { free(dm) }, 0, "ibv_free_dm");
    Ok(())
}

fn advise(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let Some(advise) = operation!(end.ctx.ptr, advise_mr) else {
        skip!("device does not offer advice");
    };
    // Prefetching is for regions on demand alone.
    let caps = end.ctx.attr_ex().map_or(0, |attr| attr.odp_caps.general_caps);
    if caps & 1 == 0 {
        skip!("device does not offer on-demand regions");
    }
    let buf = Arc::new(Buf::new(4096)?);
    let access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_ON_DEMAND;
    let mr = match Mr::register(&end.pd, &buf, 0, 4096, access) {
        Ok(mr) => mr,
        Err(libc::EOPNOTSUPP) => skip!("device does not offer on-demand regions"),
        Err(errno) => fail!("ibv_reg_mr: {}", name_of(errno)),
    };
    let mut list = ibv_sge { addr: mr.base, length: 4096, lkey: mr.lkey() };
    // SAFETY: the library's own operation on its live domain, with one element.
    let got = unsafe { advise(end.pd.ptr, IBV_ADVISE_MR_ADVICE_PREFETCH, 0, &mut list, 1) };
    if got == libc::EOPNOTSUPP {
        skip!("device does not offer advice");
    }
    same!(got, 0, "ibv_advise_mr: {}", name_of(got));
    list.lkey ^= 0x9900;
    // SAFETY: as above.
    let got = unsafe { advise(end.pd.ptr, IBV_ADVISE_MR_ADVICE_PREFETCH, 0, &mut list, 1) };
    check!(got > 0, "a bad key was taken");
    Ok(())
}

fn on_demand_memory_may_change(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let caps = pair.near.ctx.attr_ex().map_or(0, |attr| attr.odp_caps.rc_odp_caps);
    let needed = IBV_ODP_SUPPORT_WRITE | IBV_ODP_SUPPORT_READ;
    if caps & needed != needed {
        skip!("device does not offer on-demand writes and reads");
    }
    let far = pair.far.here()?;
    let buf = Arc::new(Buf::new(3 * 4096)?);
    let access = Spec::rc().mr_access | IBV_ACCESS_ON_DEMAND;
    let mr = match Mr::register(&far.pd, &buf, 0, 3 * 4096, access) {
        Ok(mr) => mr,
        Err(errno) => fail!("ibv_reg_mr: {}", name_of(errno)),
    };
    let bytes = pattern(9, 3 * 4096);
    let all = pair.near.sge(0, 3 * 4096);
    pair.near.put(0, &bytes)?;
    pair.succeed(Op::WRITE.request(1, mr.base, mr.rkey()).sge(all))?;
    same!(buf.get(0, 3 * 4096)?, bytes, "data");
    // The middle page is another one now.
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a page of the buffer, that nobody has a reference to.
    let at = unsafe {
        libc::mmap((buf.addr() + 4096) as *mut _, 4096, prot, flags | libc::MAP_FIXED, -1, 0)
    };
    check!(at != libc::MAP_FAILED, "mmap: {}", name_of(errno()));
    buf.put(5000, &[0x39; 100])?;
    pair.succeed(Op::READ.request(2, mr.base, mr.rkey()).sge(all))?;
    let expected = buf.get(0, 3 * 4096)?;
    check!(expected[4096..5000] == [0; 904], "the new page is not empty");
    same!(pair.near.get(0, 3 * 4096)?, expected, "data read back");
    // Without memory there, the request fails.
    // SAFETY: as above.
    let failed = unsafe { libc::munmap((buf.addr() + 4096) as *mut _, 4096) };
    same!(failed, 0, "munmap");
    let got = pair.run(Op::WRITE.request(3, mr.base, mr.rkey()).sge(all))?;
    check!(
        matches!(got.status, IBV_WC_REM_OP_ERR | IBV_WC_REM_ACCESS_ERR),
        "status {} of a write to memory that is not there",
        got.status
    );
    Ok(())
}

fn allocated_buffer(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let Some(calls) = buffers() else {
        skip!("the library has no ibv_alloc_buf");
    };
    let far = pair.far.here()?;
    let mut buffer = core::ptr::null_mut();
    // SAFETY: the library's own function on a live domain.
    let at = unsafe { (calls.alloc)(far.pd.ptr, 8192, &mut buffer) };
    if at.is_null() {
        same!(errno(), libc::EOPNOTSUPP, "errno of ibv_alloc_buf");
        skip!("device does not offer buffers");
    }
    let access = Spec::rc().mr_access as i32;
    // SAFETY: a live domain and a live buffer, of which this is a part.
    let ptr = unsafe { (calls.register)(far.pd.ptr, buffer, at.byte_add(1000), 5000, access) };
    let base = at as u64 + 1000;
    let mr = match Mr::adopt(ptr, base, &far.mr().buf, &far.pd) {
        Ok(mr) => mr,
        Err(errno) => fail!("ibv_reg_buf_mr: {}", name_of(errno)),
    };
    let bytes = pattern(4, 5000);
    pair.near.put(0, &bytes)?;
    pair.succeed(Op::WRITE.request(1, base, mr.rkey()).sge(pair.near.sge(0, 5000)))?;
    let mut found = vec![0; 5000];
    // SAFETY: bytes of the buffer, which is live.
    unsafe { core::ptr::copy_nonoverlapping(base as *const u8, found.as_mut_ptr(), 5000) };
    same!(found, bytes, "data");
    let past = Op::WRITE.request(2, base + 4999, mr.rkey()).sge(pair.near.sge(0, 2));
    same!(pair.run(past)?.status, IBV_WC_REM_ACCESS_ERR, "one byte past the region");
    // SAFETY: as above; one byte more than the buffer has.
    let beyond = unsafe { (calls.register)(far.pd.ptr, buffer, at, 8193, access) };
    check!(beyond.is_null(), "more than the buffer was registered");
    drop(mr);
    // SAFETY: nothing uses the buffer any more.
    unsafe { (calls.free)(buffer) };
    Ok(())
}

fn implicit_region(env: &Env) -> Outcome {
    let pair = Pair::new(env, &Spec::rc())?;
    let caps = pair.near.ctx.attr_ex().map_or(0, |attr| attr.odp_caps.general_caps);
    if caps & 2 == 0 {
        skip!("device does not offer implicit on-demand regions");
    }
    let access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_ON_DEMAND;
    let ptr = verb!(ibv_reg_mr(pair.near.pd.ptr, core::ptr::null_mut(), usize::MAX, access as i32));
    check!(!ptr.is_null(), "ibv_reg_mr: {}", name_of(errno()));
    let buf = pair.near.mr().buf.clone();
    let Ok(mr) = Mr::adopt(ptr, 0, &buf, &pair.near.pd) else {
        fail!("no region");
    };
    let mut request = pair.request(Op::WRITE, 1, 0, 64);
    request.sges[0].lkey = mr.lkey();
    pair.succeed(request)?;
    Ok(())
}
