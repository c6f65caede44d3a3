//! Completion channels and queues.

use core::ffi::{c_int, c_uint, c_void};
use std::cell::UnsafeCell;

use freeflow_abi::*;
use freeflow_client::{Completion, Errno};
use rustix::time::{ClockId, clock_gettime};

use crate::domain::is_parent;
use crate::objects::{
    Base, COND, Channel, Cq, Current, MUTEX, RawLock, code, context, give, minus_one, set_errno,
    status,
};

/// Completions that are taken from the ring at once.
const BATCH: usize = 16;

/// Nanoseconds between two readings of the monotonic clock that have the time of day between them, and
/// how often both are read for that.
const CLOCKS_APART: u64 = 2000;
const CLOCK_READINGS: u32 = 8;

/// `ibv_create_comp_channel(3)`.
pub(crate) unsafe extern "C" fn create_comp_channel(
    ctx: *mut ibv_context,
) -> *mut ibv_comp_channel {
    // SAFETY: the caller gives an open context.
    let made = unsafe { context(ctx) }.client.create_channel();
    give(made.map(|client| {
        let c = ibv_comp_channel {
            context: ctx,
            fd: client.fd(),
            refcnt: 0,
        };
        Box::new(Channel { c, client })
    }))
}

/// `ibv_destroy_comp_channel(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: the caller gives a live channel; only one that is gone is dropped.
    unsafe {
        let result = ibv_comp_channel::object(channel).client.destroy();
        if result.is_ok() {
            drop(ibv_comp_channel::take(channel));
        }
        status(result)
    }
}

/// Creates a queue; its operations are those of the extended queue too.
///
/// # Safety
///
/// An open context, and a live channel or null.
unsafe fn create(
    ctx: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    comp_vector: c_int,
) -> Result<*mut ibv_cq_ex, Errno> {
    let cqe = u32::try_from(cqe).map_err(|_| Errno::INVAL)?;
    let comp_vector = u32::try_from(comp_vector).map_err(|_| Errno::INVAL)?;
    // SAFETY: by the caller's promise.
    let (client, events) = unsafe {
        let events = (!channel.is_null()).then(|| &ibv_comp_channel::object(channel).client);
        (&context(ctx).client, events)
    };
    // Events name the queue by the address that the program will have.
    let room = Box::<Cq>::new_uninit();
    let user = room.as_ptr() as usize;
    let client = client.create_cq(cqe, events, comp_vector, user)?;
    let base = ibv_cq {
        context: ctx,
        channel,
        cq_context,
        handle: 0,
        cqe: client.capacity() as c_int,
        mutex: MUTEX,
        cond: COND,
        comp_events_completed: 0,
        async_events_completed: 0,
    };
    let c = ibv_cq_ex {
        cq: base,
        comp_mask: 0,
        status: 0,
        wr_id: 0,
        start_poll: Some(start_poll),
        next_poll: Some(next_poll),
        end_poll: Some(end_poll),
        read_opcode: Some(read_opcode),
        read_vendor_err: Some(read_vendor_err),
        read_byte_len: Some(read_byte_len),
        read_imm_data: Some(read_imm_data),
        read_qp_num: Some(read_qp_num),
        read_src_qp: Some(read_src_qp),
        read_wc_flags: Some(read_wc_flags),
        read_slid: Some(read_slid),
        read_sl: Some(read_sl),
        read_dlid_path_bits: Some(read_dlid_path_bits),
        read_completion_ts: Some(read_completion_ts),
        read_cvlan: None,
        read_flow_tag: None,
        read_tm_info: None,
        read_completion_wallclock_ns: Some(read_completion_wallclock_ns),
    };
    let current = UnsafeCell::new(Current::default());
    let cq = Box::write(
        room,
        Cq {
            c,
            client,
            polling: RawLock::default(),
            current,
        },
    );
    Ok(Box::into_raw(cq).cast())
}

fn or_null<T>(made: Result<*mut T, Errno>) -> *mut T {
    made.unwrap_or_else(|errno| {
        set_errno(code(errno));
        std::ptr::null_mut()
    })
}

/// `ibv_create_cq(3)`.
pub(crate) unsafe extern "C" fn create_cq(
    ctx: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    comp_vector: c_int,
) -> *mut ibv_cq {
    // SAFETY: the caller gives an open context, and a live channel or null.
    or_null(unsafe { create(ctx, cqe, cq_context, channel, comp_vector) }).cast()
}

/// `ibv_create_cq_ex(3)`.
pub(crate) unsafe extern "C" fn create_cq_ex(
    ctx: *mut ibv_context,
    attr: *mut ibv_cq_init_attr_ex,
) -> *mut ibv_cq_ex {
    const OFFERED: u64 = IBV_WC_EX_WITH_BYTE_LEN
        | IBV_WC_EX_WITH_IMM
        | IBV_WC_EX_WITH_QP_NUM
        | IBV_WC_EX_WITH_SRC_QP
        | IBV_WC_EX_WITH_SLID
        | IBV_WC_EX_WITH_SL
        | IBV_WC_EX_WITH_DLID_PATH_BITS
        | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP
        | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK;
    // SAFETY: the caller gives attributes.
    let attr = unsafe { &*attr };
    let flags = if attr.comp_mask & IBV_CQ_INIT_ATTR_MASK_FLAGS != 0 {
        attr.flags
    } else {
        0
    };
    const KNOWN: u32 = IBV_CQ_INIT_ATTR_MASK_FLAGS | IBV_CQ_INIT_ATTR_MASK_PD;
    if attr.wc_flags & !OFFERED != 0
        || attr.comp_mask & !KNOWN != 0
        || flags & !IBV_CREATE_CQ_ATTR_SINGLE_THREADED != 0
    {
        set_errno(libc::EOPNOTSUPP);
        return std::ptr::null_mut();
    }
    // SAFETY: the caller gives a live domain.
    if attr.comp_mask & IBV_CQ_INIT_ATTR_MASK_PD != 0 && !unsafe { is_parent(attr.parent_domain) } {
        set_errno(libc::EINVAL);
        return std::ptr::null_mut();
    }
    let (Ok(cqe), Ok(vector)) = (attr.cqe.try_into(), attr.comp_vector.try_into()) else {
        set_errno(libc::EINVAL);
        return std::ptr::null_mut();
    };
    // SAFETY: the caller gives an open context, and a live channel or null.
    or_null(unsafe { create(ctx, cqe, attr.cq_context, attr.channel, vector) })
}

/// `ibv_resize_cq(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int {
    let Ok(cqe) = u32::try_from(cqe) else {
        return libc::EINVAL;
    };
    // SAFETY: the caller gives a live queue, whose size is only written here.
    unsafe {
        let client = &ibv_cq::object(cq).client;
        let result = client.resize(cqe);
        (*cq).cqe = client.capacity() as c_int;
        status(result)
    }
}

/// `ibv_modify_cq(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn modify_cq(cq: *mut ibv_cq, attr: *mut ibv_modify_cq_attr) -> c_int {
    // SAFETY: the caller gives attributes.
    let attr = unsafe { &*attr };
    match attr.attr_mask {
        0 => return libc::EINVAL,
        IBV_CQ_ATTR_MODERATE => {}
        _ => return libc::EOPNOTSUPP,
    }
    let ibv_moderate_cq {
        cq_count,
        cq_period,
    } = attr.moderate;
    // SAFETY: the caller gives a live queue.
    let client = unsafe { &ibv_cq::object(cq).client };
    status(client.moderate(cq_count, cq_period))
}

/// `ibv_destroy_cq(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn destroy_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: the caller gives a live queue; only one that is gone is dropped.
    unsafe {
        let result = ibv_cq::object(cq).client.destroy();
        if result.is_ok() {
            drop(ibv_cq::take(cq));
        }
        status(result)
    }
}

/// `ibv_get_cq_event(3)`: 0, or -1 with errno.
pub(crate) unsafe extern "C" fn get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    // SAFETY: the caller gives a live channel.
    let event = unsafe { ibv_comp_channel::object(channel) }
        .client
        .get_event();
    minus_one(event.map(|user| {
        let found = user as *mut ibv_cq;
        // SAFETY: an event names a queue that lives until the event is acknowledged; the caller
        // gives room for both pointers.
        unsafe {
            *cq = found;
            *cq_context = (*found).cq_context;
        }
    }))
}

/// `ibv_ack_cq_events(3)`.
pub(crate) unsafe extern "C" fn ack_cq_events(cq: *mut ibv_cq, n: c_uint) {
    // SAFETY: the caller gives a live queue.
    unsafe { ibv_cq::object(cq) }.client.ack_events(n);
}

/// `ibv_req_notify_cq(3)`: 0 or errno.
pub(crate) unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: the caller gives a live queue.
    status(
        unsafe { ibv_cq::object(cq) }
            .client
            .req_notify(solicited_only != 0),
    )
}

fn wc(completion: &Completion) -> ibv_wc {
    ibv_wc {
        wr_id: completion.wr_id,
        status: completion.status,
        opcode: completion.opcode,
        vendor_err: completion.vendor_err,
        byte_len: completion.byte_len,
        imm_data: completion.imm,
        qp_num: completion.qpn,
        src_qp: completion.src_qp,
        wc_flags: completion.wc_flags,
        pkey_index: 0,
        slid: 0,
        sl: completion.sl,
        dlid_path_bits: 0,
    }
}

/// `ibv_poll_cq(3)`: how many, or negative.
pub(crate) unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, n: c_int, out: *mut ibv_wc) -> c_int {
    // SAFETY: the caller gives a live queue.
    let client = unsafe { &ibv_cq::object(cq).client };
    let Ok(wanted) = usize::try_from(n) else {
        return -libc::EINVAL;
    };
    let mut batch = [Completion::default(); BATCH];
    let mut taken = 0;
    while taken < wanted {
        let room = BATCH.min(wanted - taken);
        let got = match client.poll(&mut batch[..room]) {
            Ok(got) => got,
            // What was taken before must reach the program first.
            Err(_) if taken != 0 => break,
            Err(errno) => return -code(errno),
        };
        for completion in &batch[..got] {
            // SAFETY: the caller gives room for `n` completions, and taken < n.
            unsafe { out.add(taken).write(wc(completion)) };
            taken += 1;
        }
        if got < room {
            break;
        }
    }
    taken as c_int
}

/// Takes the next completion of a queue whose `polling` lock is held: 0, ENOENT or errno.
///
/// # Safety
///
/// A live queue, its lock held by the caller.
unsafe fn advance(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: by the caller's promise; `current` and the fields below are ours while we hold the
    // lock.
    unsafe {
        let object = ibv_cq_ex::object(cq);
        let current = &mut (*object.current.get()).completion;
        match object.client.poll(std::slice::from_mut(current)) {
            Ok(0) => libc::ENOENT,
            Ok(_) => {
                (*cq).wr_id = current.wr_id;
                (*cq).status = current.status;
                0
            }
            Err(errno) => code(errno),
        }
    }
}

/// `ibv_start_poll(3)`.
unsafe extern "C" fn start_poll(cq: *mut ibv_cq_ex, attr: *mut ibv_poll_cq_attr) -> c_int {
    // SAFETY: the caller gives a live queue and attributes.
    unsafe {
        if attr.as_ref().is_some_and(|attr| attr.comp_mask != 0) {
            return libc::EINVAL;
        }
        let object = ibv_cq_ex::object(cq);
        object.polling.lock();
        // The completions of one batch are told by the same clock.
        (*object.current.get()).since_1970 = None;
        let result = advance(cq);
        // After a failure there is no end_poll.
        if result != 0 {
            object.polling.unlock();
        }
        result
    }
}

unsafe extern "C" fn next_poll(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: the caller is between start_poll and end_poll, and so holds the lock.
    unsafe { advance(cq) }
}

unsafe extern "C" fn end_poll(cq: *mut ibv_cq_ex) {
    // SAFETY: the caller gives a live queue.
    unsafe { ibv_cq_ex::object(cq) }.polling.unlock();
}

/// Read functions of the current completion.
macro_rules! readers {
    ($($name:ident -> $type:ty = |$c:ident| $value:expr;)*) => {
        $(unsafe extern "C" fn $name(cq: *mut ibv_cq_ex) -> $type {
            // SAFETY: the caller is between start_poll and end_poll, and so holds the lock.
            let $c = unsafe { &mut *ibv_cq_ex::object(cq).current.get() };
            $value
        })*
    };
}

readers! {
    read_opcode -> u32 = |c| c.completion.opcode;
    read_vendor_err -> u32 = |c| c.completion.vendor_err;
    read_byte_len -> u32 = |c| c.completion.byte_len;
    read_imm_data -> u32 = |c| c.completion.imm;
    read_qp_num -> u32 = |c| c.completion.qpn;
    read_src_qp -> u32 = |c| c.completion.src_qp;
    read_wc_flags -> u32 = |c| c.completion.wc_flags;
    read_slid -> u32 = |_c| 0;
    read_sl -> u8 = |c| c.completion.sl;
    read_dlid_path_bits -> u8 = |_c| 0;
    read_completion_ts -> u64 = |c| c.completion.timestamp;
    read_completion_wallclock_ns -> u64 = |c| c.wallclock();
}

impl Current {
    /// When it completed, in nanoseconds since 1970.
    fn wallclock(&mut self) -> u64 {
        let since_1970 = *self.since_1970.get_or_insert_with(monotonic_since_1970);
        since_1970.wrapping_add(self.completion.timestamp)
    }
}

/// Nanoseconds from 1970 to the monotonic clock's zero, by the time of day as it is set now.
fn monotonic_since_1970() -> u64 {
    let read = || {
        let before = now(ClockId::Monotonic);
        let of_day = now(ClockId::Realtime);
        let apart = now(ClockId::Monotonic).wrapping_sub(before);
        (apart, of_day.wrapping_sub(before.wrapping_add(apart / 2)))
    };
    // A thread that loses its processor between two of them reads again, but not for ever.
    let mut best = read();
    for _ in 1..CLOCK_READINGS {
        if best.0 <= CLOCKS_APART {
            break;
        }
        best = best.min(read());
    }
    best.1
}

fn now(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    (now.tv_sec as u64)
        .wrapping_mul(1_000_000_000)
        .wrapping_add(now.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_day_of_one_batch_are_as_far_apart_as_its_timestamps() {
        const SECOND: u64 = 1_000_000_000;
        let mut current = Current::default();
        let mut told = |timestamp| {
            current.completion.timestamp = timestamp;
            current.wallclock()
        };
        let timestamp = now(ClockId::Monotonic);
        let first = told(timestamp);
        // Unless the time of day is set meanwhile.
        assert!(now(ClockId::Realtime).abs_diff(first) < 60 * SECOND);
        for later in 0..1000 {
            assert_eq!(told(timestamp + later), first + later);
        }
    }
}
