//! Thread and parent domains, importing, counters, newer operations.

use core::ffi::{c_int, c_void};
use core::mem::zeroed;
use std::sync::atomic::{AtomicUsize, Ordering};

use freeflow_abi::*;

use crate::suite::{End, Env, LONG, Op, Outcome, Pair, Side, Spec, check, fail, same, skip, tests};
use crate::verbs::{Mr, Qp, Wr, errno, name_of, operation, pattern, verb};

/// `IBV_FLUSH_GLOBAL`: what was written is visible to everybody.
const IBV_FLUSH_GLOBAL: u8 = 1;

tests! { "domains";
    parent_domain OneProcess "ibv_alloc_td(3), ibv_alloc_parent_domain(3)";
    parent_domain_keeps_its_parts OneProcess "ibv_dealloc_pd(3), ibv_dealloc_td(3): EBUSY while used";
    parent_domain_with_allocators OneProcess "ibv_alloc_parent_domain(3): alloc, free, pd_context";
    import_of_device_and_region OneProcess "ibv_import_device(3), ibv_import_pd(3), ibv_import_mr(3)";
    counters OneProcess "ibv_create_counters(3)";
    atomic_write OneProcess "ibv_wr_atomic_write(3); IBTA annex A19";
    flush Anywhere "ibv_wr_flush(3); IBTA annex A19";
    flush_without_the_right Anywhere "ibv_reg_mr(3): IBV_ACCESS_FLUSH_GLOBAL";
    data_in_order Anywhere "ibv_query_qp_data_in_order(3)";
    enhanced_connection Anywhere "ibv_query_ece(3), ibv_set_ece(3)";
    rate_limit OneProcess "ibv_modify_qp_rate_limit(3)";
    real_time_clock OneProcess "ibv_query_rt_values_ex(3)";
}

/// A thread domain and a parent domain of an end's domain.
fn parent(end: &End) -> Outcome<(*mut ibv_td, *mut ibv_pd)> {
    let (Some(alloc_td), Some(alloc)) =
        (operation!(end.ctx.ptr, alloc_td), operation!(end.ctx.ptr, alloc_parent_domain))
    else {
        skip!("device does not offer parent domains");
    };
    let mut init = ibv_td_init_attr { comp_mask: 0 };
    // SAFETY: the library's own operation on its open context.
    let td = unsafe { alloc_td(end.ctx.ptr, &mut init) };
    if td.is_null() {
        if errno() == libc::EOPNOTSUPP {
            skip!("device does not offer thread domains");
        }
        fail!("ibv_alloc_td: {}", name_of(errno()));
    }
    // SAFETY: numbers, null pointers and absent functions.
    let mut attr: ibv_parent_domain_init_attr = unsafe { zeroed() };
    attr.pd = end.pd.ptr;
    attr.td = td;
    // SAFETY: as above; both parts are live.
    let pd = unsafe { alloc(end.ctx.ptr, &mut attr) };
    check!(!pd.is_null(), "ibv_alloc_parent_domain: {}", name_of(errno()));
    Ok((td, pd))
}

/// A queue pair of a parent domain, with an end's completion queues and connected to itself.
fn in_domain(end: &End, pd: *mut ibv_pd) -> Outcome<Qp> {
    // SAFETY: numbers and null pointers.
    let mut init: ibv_qp_init_attr = unsafe { zeroed() };
    init.send_cq = end.send_cq.ptr;
    init.recv_cq = end.recv_cq.ptr;
    init.cap = Spec::rc().qp(None).cap;
    init.qp_type = IBV_QPT_RC;
    let ptr = verb!(ibv_create_qp(pd, &mut init));
    check!(!ptr.is_null(), "ibv_create_qp in a parent domain: {}", name_of(errno()));
    let qp = Qp::adopt(ptr, IBV_QPT_RC, &end.pd, &end.send_cq, init.cap);
    let mut to = end.addr();
    to.qpn = qp.number();
    qp.must_modify(&end.to_init())?;
    qp.must_modify(&end.to_rtr(&to))?;
    qp.must_modify(&end.to_rts())?;
    Ok(qp)
}

fn free_td(end: &End, td: *mut ibv_td) -> c_int {
    let dealloc = operation!(end.ctx.ptr, dealloc_td);
    // SAFETY: the library's own operation; the domain is live until now.
    dealloc.map_or(libc::ENOSYS, |dealloc| unsafe { dealloc(td) })
}

fn parent_domain(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let (td, pd) = parent(&end)?;
    // Objects of the parent domain work with those of its protection domain.
    let qp = in_domain(&end, pd)?;
    let to = end.addr();
    qp.send(&[Op::WRITE.request(1, to.base + 4096, to.rkey).sge(end.sge(0, 64))])?;
    same!(end.send_cq.wait(1, LONG)?[0].status, IBV_WC_SUCCESS, "write in a parent domain");
    drop(qp);
    same!(verb!(ibv_dealloc_pd(pd)), 0, "ibv_dealloc_pd of the parent domain");
    same!(free_td(&end, td), 0, "ibv_dealloc_td");
    Ok(())
}

/// Allocations of [`allocate`] that [`release`] has not given back; its address is the context of
/// the domain that they are for.
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" fn allocate(
    _: *mut ibv_pd,
    context: *mut c_void,
    size: usize,
    alignment: usize,
    _: u64,
) -> *mut c_void {
    let mut at = core::ptr::null_mut();
    // SAFETY: the context is the counter; the allocation's address goes to `at`.
    unsafe {
        (*context.cast::<AtomicUsize>()).fetch_add(1, Ordering::Relaxed);
        match libc::posix_memalign(&mut at, alignment.max(size_of::<usize>()), size) {
            0 => at,
            _ => core::ptr::null_mut(),
        }
    }
}

unsafe extern "C" fn release(_: *mut ibv_pd, context: *mut c_void, at: *mut c_void, _: u64) {
    // SAFETY: the context is the counter; what was allocated above comes back once.
    unsafe {
        (*context.cast::<AtomicUsize>()).fetch_sub(1, Ordering::Relaxed);
        libc::free(at);
    }
}

/// Whether a program's allocators are asked is the device's choice; what they gave comes back.
fn parent_domain_with_allocators(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let Some(alloc) = operation!(end.ctx.ptr, alloc_parent_domain) else {
        skip!("device does not offer parent domains");
    };
    let mut attr = ibv_parent_domain_init_attr {
        pd: end.pd.ptr,
        td: core::ptr::null_mut(),
        comp_mask: IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS
            | IBV_PARENT_DOMAIN_INIT_ATTR_PD_CONTEXT,
        alloc: Some(allocate),
        free: Some(release),
        pd_context: (&raw const ALLOCATED).cast_mut().cast(),
    };
    // SAFETY: the library's own operation on live objects; the functions outlive the domain.
    let pd = unsafe { alloc(end.ctx.ptr, &mut attr) };
    if pd.is_null() {
        same!(errno(), libc::EOPNOTSUPP, "errno of a domain with allocators");
        skip!("device does not offer allocators of the program's");
    }
    let qp = in_domain(&end, pd)?;
    let to = end.addr();
    qp.send(&[Op::WRITE.request(1, to.base + 4096, to.rkey).sge(end.sge(0, 64))])?;
    same!(end.send_cq.wait(1, LONG)?[0].status, IBV_WC_SUCCESS, "write in the domain");
    drop(qp);
    same!(verb!(ibv_dealloc_pd(pd)), 0, "ibv_dealloc_pd");
    same!(ALLOCATED.load(Ordering::Relaxed), 0, "allocations that were not given back");
    Ok(())
}

fn parent_domain_keeps_its_parts(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let (td, pd) = parent(&end)?;
    same!(free_td(&end, td), libc::EBUSY, "ibv_dealloc_td while a parent domain has it");
    same!(verb!(ibv_dealloc_pd(end.pd.ptr)), libc::EBUSY, "ibv_dealloc_pd of the part");
    same!(verb!(ibv_dealloc_pd(pd)), 0, "ibv_dealloc_pd of the parent domain");
    same!(free_td(&end, td), 0, "ibv_dealloc_td");
    Ok(())
}

fn import_of_device_and_region(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    // SAFETY: live objects' public fields.
    let (fd, pd, mr) =
        unsafe { ((*end.ctx.ptr).cmd_fd, (*end.pd.ptr).handle, (*end.mr().ptr).handle) };
    // SAFETY: only the number is looked at.
    let fd = unsafe { libc::dup(fd) };
    check!(fd >= 0, "a duplicate of cmd_fd: {}", name_of(errno()));
    let ctx = verb!(ibv_import_device(fd));
    if ctx.is_null() {
        let why = errno();
        // SAFETY: a descriptor of our own, which nobody took.
        unsafe { libc::close(fd) };
        if matches!(why, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY) {
            skip!("device does not offer importing");
        }
        fail!("ibv_import_device: {}", name_of(why));
    }
    let domain = verb!(ibv_import_pd(ctx, pd));
    if domain.is_null() && matches!(errno(), libc::EOPNOTSUPP | libc::ENOSYS) {
        same!(verb!(ibv_close_device(ctx)), 0, "ibv_close_device");
        skip!("device does not offer importing of domains");
    }
    check!(!domain.is_null(), "ibv_import_pd: {}", name_of(errno()));
    let region = verb!(ibv_import_mr(domain, mr));
    check!(!region.is_null(), "ibv_import_mr: {}", name_of(errno()));
    // SAFETY: the imported region is live.
    let (lkey, rkey) = unsafe { ((*region).lkey, (*region).rkey) };
    same!((lkey, rkey), (end.mr().lkey(), end.mr().rkey()), "keys of the imported region");
    verb!(ibv_unimport_mr(region));
    verb!(ibv_unimport_pd(domain));
    same!(verb!(ibv_close_device(ctx)), 0, "ibv_close_device");
    // What was imported is still there for its owner.
    let more = Mr::new(&end.pd, 4096, IBV_ACCESS_LOCAL_WRITE)?;
    drop(more);
    Ok(())
}

fn counters(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let ops = (
        operation!(end.ctx.ptr, create_counters),
        operation!(end.ctx.ptr, read_counters),
        operation!(end.ctx.ptr, destroy_counters),
    );
    let (Some(create), Some(read), Some(destroy)) = ops else {
        skip!("device does not offer counters");
    };
    let mut init = ibv_counters_init_attr { comp_mask: 0 };
    // SAFETY: the library's own operation on its open context.
    let made = unsafe { create(end.ctx.ptr, &mut init) };
    if made.is_null() {
        same!(errno(), libc::EOPNOTSUPP, "errno of ibv_create_counters");
        skip!("device does not offer counters");
    }
    let mut values = [u64::MAX; 2];
    // SAFETY: the library's own operations on the live object, with room for two values.
    unsafe {
        same!(read(made, values.as_mut_ptr(), 2, 0), 0, "ibv_read_counters");
        same!(destroy(made), 0, "ibv_destroy_counters");
    }
    Ok(())
}

fn atomic_write(env: &Env) -> Outcome {
    let spec = Spec { ops: IBV_QP_EX_WITH_ATOMIC_WRITE | IBV_QP_EX_WITH_RDMA_WRITE, ..Spec::rc() };
    let probe = End::open(env, false, &Spec::rc())?;
    let flags = probe.ctx.attr_ex().map_or(0, |attr| attr.device_cap_flags_ex);
    if flags & IBV_DEVICE_ATOMIC_WRITE == 0 {
        skip!("device does not offer atomic writes");
    }
    drop(probe);
    let mut pair = Pair::new(env, &spec)?;
    pair.far.put(0, &[0; 24])?;
    let bytes = pattern(3, 8);
    let mut value = [0; 8];
    value.copy_from_slice(&bytes);
    let wr = Wr::start(pair.near.qp())?;
    wr.next(1, IBV_SEND_SIGNALED).atomic_write(pair.to.rkey, pair.to.base + 8, &value)?;
    let got = wr.complete()?;
    same!(got, 0, "ibv_wr_complete: {}", name_of(got));
    let wc = pair.near.one(Side::Send)?;
    same!((wc.wr_id, wc.status, wc.opcode), (1, 0, IBV_WC_ATOMIC_WRITE), "completion");
    same!(pair.far.get(8, 8)?, bytes, "the word");
    same!((pair.far.get(0, 8)?, pair.far.get(16, 8)?), (vec![0; 8], vec![0; 8]), "its neighbours");
    let wr = Wr::start(pair.near.qp())?;
    wr.next(2, IBV_SEND_SIGNALED).atomic_write(pair.to.rkey, pair.to.base + 4, &value)?;
    same!(wr.complete()?, 0, "ibv_wr_complete");
    let wc = pair.near.one(Side::Send)?;
    same!(wc.status, IBV_WC_REM_INV_REQ_ERR, "status of a misaligned atomic write");
    Ok(())
}

/// A connection that may flush memory of a region with these rights.
fn flushing(env: &Env, access: u32) -> Outcome<Pair> {
    let probe = End::open(env, false, &Spec::rc())?;
    let flags = probe.ctx.attr_ex().map_or(0, |attr| attr.device_cap_flags_ex);
    if flags & IBV_DEVICE_FLUSH_GLOBAL == 0 {
        skip!("device does not offer flushes");
    }
    let plain = Spec::rc();
    Pair::new(env, &Spec {
        ops: IBV_QP_EX_WITH_FLUSH | IBV_QP_EX_WITH_RDMA_WRITE,
        mr_access: plain.mr_access | access,
        qp_access: plain.qp_access | IBV_ACCESS_FLUSH_GLOBAL,
        ..plain
    })
}

fn flush(env: &Env) -> Outcome {
    let mut pair = flushing(env, IBV_ACCESS_FLUSH_GLOBAL)?;
    let bytes = pattern(6, 64);
    pair.near.put(0, &bytes)?;
    // The flush comes after the write, and completes when that is visible.
    let (at, rkey) = (pair.to.base + 4096, pair.to.rkey);
    let wr = Wr::start(pair.near.qp())?;
    wr.next(1, 0).write(rkey, at)?;
    wr.sge(pair.near.sge(0, 64))?;
    wr.next(2, IBV_SEND_SIGNALED).flush(rkey, at, 64, IBV_FLUSH_GLOBAL)?;
    let got = wr.complete()?;
    same!(got, 0, "ibv_wr_complete: {}", name_of(got));
    let wc = pair.near.one(Side::Send)?;
    same!((wc.wr_id, wc.status, wc.opcode), (2, IBV_WC_SUCCESS, IBV_WC_FLUSH), "completion");
    same!(pair.far.get(4096, 64)?, bytes, "data");
    Ok(())
}

fn flush_without_the_right(env: &Env) -> Outcome {
    let pair = flushing(env, 0)?;
    let wr = Wr::start(pair.near.qp())?;
    wr.next(1, IBV_SEND_SIGNALED).flush(pair.to.rkey, pair.to.base, 64, IBV_FLUSH_GLOBAL)?;
    same!(wr.complete()?, 0, "ibv_wr_complete");
    same!(pair.near.one(Side::Send)?.status, IBV_WC_REM_ACCESS_ERR, "status");
    Ok(())
}

fn data_in_order(env: &Env) -> Outcome {
    // IBV_QUERY_QP_DATA_IN_ORDER_RETURN_CAPS, and the capabilities.
    const RETURN_CAPS: u32 = 1;
    const WHOLE_MESSAGE: i32 = 1;
    const ALIGNED: i32 = 2;
    let mut pair = Pair::new(env, &Spec::rc())?;
    for op in Op::ALL {
        let ask = |flags| verb!(ibv_query_qp_data_in_order(pair.near.qp().ptr, op.opcode, flags));
        let (plain, caps) = (ask(0), ask(RETURN_CAPS));
        check!(matches!(plain, 0 | 1), "{}: {plain}", op.name);
        // A library that knows no flags answers nothing to them.
        check!(caps & !(WHOLE_MESSAGE | ALIGNED) == 0, "{}: capabilities {caps:#x}", op.name);
        check!(caps == 0 || (caps & WHOLE_MESSAGE != 0) == (plain == 1), "{}: {plain}, {caps}", op.name);
    }
    pair.ping(1)
}

fn enhanced_connection(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let end = End::open(env, false, &Spec::rc())?;
    let mut ece = ibv_ece { vendor_id: 0, options: 0, comp_mask: 0 };
    let asked = verb!(ibv_query_ece(end.qp().ptr, &mut ece));
    check!(matches!(asked, 0 | libc::EOPNOTSUPP), "ibv_query_ece: {}", name_of(asked));
    let mut none = ibv_ece { vendor_id: 0, options: 0, comp_mask: 0 };
    let set = verb!(ibv_set_ece(end.qp().ptr, &mut none));
    same!(name_of(set), name_of(libc::EOPNOTSUPP), "ibv_set_ece without a vendor");
    if asked == 0 && ece.vendor_id != 0 {
        same!(verb!(ibv_set_ece(end.qp().ptr, &mut ece)), 0, "ibv_set_ece of what was told");
    }
    // Whoever has no options connects without.
    pair.ping(1)
}

fn rate_limit(env: &Env) -> Outcome {
    let mut pair = Pair::new(env, &Spec::rc())?;
    let Some(modify) = operation!(pair.near.ctx.ptr, modify_qp_rate_limit) else {
        skip!("device does not offer rate limits");
    };
    let mut attr = ibv_qp_rate_limit_attr { rate_limit: 10_000_000, ..Default::default() };
    // SAFETY: the library's own operation on its live queue pair.
    let got = unsafe { modify(pair.near.qp().ptr, &mut attr) };
    if matches!(got, libc::EOPNOTSUPP | libc::ENOSYS) {
        skip!("device does not offer rate limits");
    }
    same!(got, 0, "ibv_modify_qp_rate_limit: {}", name_of(got));
    pair.ping(1)
}

fn real_time_clock(env: &Env) -> Outcome {
    let end = End::open(env, false, &Spec::rc())?;
    let Some(query) = operation!(end.ctx.ptr, query_rt_values) else {
        skip!("device does not offer its clock");
    };
    let mut last = [0; 2];
    for _ in 0..3 {
        let mut values = ibv_values_ex { comp_mask: 1, raw_clock: [0; 2] };
        // SAFETY: the library's own operation on its open context.
        let got = unsafe { query(end.ctx.ptr, &mut values) };
        if matches!(got, libc::EOPNOTSUPP | libc::ENOSYS) {
            skip!("device does not offer its clock");
        }
        same!((got, values.comp_mask), (0, 1), "ibv_query_rt_values_ex and its comp_mask");
        check!(values.raw_clock >= last, "time went from {last:?} to {:?}", values.raw_clock);
        last = values.raw_clock;
    }
    Ok(())
}
