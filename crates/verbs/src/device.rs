//! Devices: listing and opening.

use core::ffi::{c_char, c_int, c_void};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use freeflow_abi::*;
use freeflow_client::{self as client, Errno};
use rustix::event::{EventfdFlags, eventfd};

use crate::objects::{Context, MUTEX, NULL, code, context, set_errno};
use crate::{cq, dm, domain, mw, qp, query, region, srq, xrc};

/// The one device of a process. It lives as long as the process: programs keep pointers to it.
struct Device(Box<verbs_device>);

// SAFETY: nothing writes the device after it is made; its pointers are to statics or null.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

static DEVICE: OnceLock<Device> = OnceLock::new();

/// Provider operations that nobody calls: vendors' libraries compare the address with their own.
static OPS: [usize; 16] = [0; 16];

/// Where the tree is that looks like sysfs; `freeflow run` sets it.
const SYSFS_VARIABLE: &str = "FREEFLOW_SYSFS";

fn fill<const N: usize>(to: &mut [c_char; N], text: &str) {
    for (to, from) in to[..N - 1].iter_mut().zip(text.bytes()) {
        *to = from as c_char;
    }
}

fn device() -> *mut ibv_device {
    let device = DEVICE.get_or_init(|| {
        let class = std::env::var(SYSFS_VARIABLE).unwrap_or_else(|_| "/sys/class".to_owned());
        let mut device = ibv_device {
            _ops: [NULL; 2],
            node_type: IBV_NODE_CA,
            transport_type: IBV_TRANSPORT_IB,
            name: [0; 64],
            dev_name: [0; 64],
            dev_path: [0; 256],
            ibdev_path: [0; 256],
        };
        fill(&mut device.name, "freeflow0");
        fill(&mut device.dev_name, "uverbs0");
        fill(
            &mut device.dev_path,
            &format!("{class}/infiniband_verbs/uverbs0"),
        );
        fill(
            &mut device.ibdev_path,
            &format!("{class}/infiniband/freeflow0"),
        );
        Device(Box::new(verbs_device {
            device,
            ops: OPS.as_ptr().cast(),
            refcount: 1,
            entry: [NULL; 2],
            sysfs: NULL,
            core_support: 0,
        }))
    });
    std::ptr::from_ref(&device.0.device).cast_mut()
}

extern "C" fn loaded() {
    client::prepare_for_fork();
    crate::rsocket::prepare_for_fork();
    // Not in one thread while another forks.
    device();
}

/// Called by the loader.
#[used]
// SAFETY: the section holds functions of this type; it needs nothing of libraries that are loaded
// later.
#[unsafe(link_section = ".init_array")]
static LOADED: extern "C" fn() = loaded;

/// `ibv_get_device_list(3)`: without an endpoint, an empty list.
pub(crate) unsafe extern "C" fn get_device_list(num: *mut c_int) -> *mut *mut ibv_device {
    let found = client::device().is_ok();
    // SAFETY: calloc gives zeroed room for two pointers, or null.
    let list = unsafe { libc::calloc(2, size_of::<*mut ibv_device>()) }.cast::<*mut ibv_device>();
    if list.is_null() {
        set_errno(libc::ENOMEM);
        return list;
    }
    if found {
        // SAFETY: the list has room for two.
        unsafe { *list = device() };
    }
    if !num.is_null() {
        // SAFETY: the caller gives a place for the number, or null.
        unsafe { *num = c_int::from(found) };
    }
    list
}

pub(crate) unsafe extern "C" fn free_device_list(list: *mut *mut ibv_device) {
    // SAFETY: the list came from `get_device_list`, or is null.
    unsafe { libc::free(list.cast()) };
}

pub(crate) unsafe extern "C" fn get_device_name(device: *mut ibv_device) -> *const c_char {
    if device.is_null() {
        return std::ptr::null();
    }
    // SAFETY: the caller gives a device of ours.
    unsafe { (&raw const (*device).name).cast() }
}

/// In network order.
pub(crate) unsafe extern "C" fn get_device_guid(_device: *mut ibv_device) -> u64 {
    client::device().map_or(0, |info| info.node_guid.to_be())
}

pub(crate) unsafe extern "C" fn get_device_index(_device: *mut ibv_device) -> c_int {
    0
}

/// `ibv_open_device(3)`.
pub(crate) unsafe extern "C" fn open_device(device: *mut ibv_device) -> *mut ibv_context {
    match client::Context::open().and_then(|client| give_context(device, client)) {
        Ok(context) => context,
        Err(errno) => {
            set_errno(code(errno));
            std::ptr::null_mut()
        }
    }
}

/// What `ibv_open_device` gives, of a device that is open.
pub(crate) fn open(client: Arc<client::Context>) -> Result<*mut ibv_context, Errno> {
    give_context(device(), client)
}

/// EMFILE: the process may have no more descriptors; then the device is closed.
fn give_context(
    device: *mut ibv_device,
    client: Arc<client::Context>,
) -> Result<*mut ibv_context, Errno> {
    // What programs do with it, and who inherits it, concerns nobody.
    let command = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).inspect_err(|_| {
        // Of a router that is gone.
        let _ = client.close();
    })?;
    let opened = Box::into_raw(Box::new(new_context(device, client, command)));
    // SAFETY: just made; the address is taken without a reference.
    Ok(unsafe { &raw mut (*opened).verbs.context })
}

/// `ibv_close_device(3)`.
pub(crate) unsafe extern "C" fn close_device(closing: *mut ibv_context) -> c_int {
    // SAFETY: the caller gives an open context, and gives it up.
    let opened = unsafe { context(closing) };
    let result = opened.client.close();
    // SAFETY: it was made by `Box::into_raw` in `open_device`.
    drop(unsafe { Box::from_raw(std::ptr::from_ref(opened).cast_mut()) });
    crate::objects::minus_one(result)
}

fn new_context(device: *mut ibv_device, client: Arc<client::Context>, command: OwnedFd) -> Context {
    let ops = ibv_context_ops {
        _compat_query_device: Some(query::query_device),
        _compat_query_port: Some(query::query_port),
        _compat_alloc_pd_to_dereg_mr: [None; 5],
        alloc_mw: Some(mw::alloc_mw),
        bind_mw: Some(mw::bind_mw),
        dealloc_mw: Some(mw::dealloc_mw),
        _compat_create_cq: None,
        poll_cq: Some(cq::poll_cq),
        req_notify_cq: Some(cq::req_notify_cq),
        _compat_cq_event_to_destroy_srq: [None; 7],
        post_srq_recv: Some(srq::post_srq_recv),
        _compat_create_qp_to_destroy_qp: [None; 4],
        post_send: Some(qp::post_send),
        post_recv: Some(qp::post_recv),
        _compat_create_ah_to_async_event: [None; 5],
    };
    let base = ibv_context {
        device,
        ops,
        cmd_fd: command.as_raw_fd(),
        async_fd: client.async_fd(),
        num_comp_vectors: client.info().limits.comp_vectors as c_int,
        mutex: MUTEX,
        abi_compat: usize::MAX as *mut c_void,
    };
    let verbs = verbs_context {
        free_buf: Some(region::free_buf),
        alloc_buf: Some(region::alloc_buf),
        dm_export_dmabuf_fd: None,
        reg_mr_ex: Some(region::reg_mr_ex),
        dealloc_dmah: None,
        alloc_dmah: None,
        query_port: Some(query::query_port_ex),
        advise_mr: Some(region::advise_mr),
        alloc_null_mr: Some(region::alloc_null_mr),
        read_counters: None,
        attach_counters_point_flow: None,
        create_counters: None,
        destroy_counters: None,
        reg_dm_mr: Some(dm::reg_dm_mr),
        alloc_dm: Some(dm::alloc_dm),
        free_dm: Some(dm::free_dm),
        modify_flow_action_esp: None,
        destroy_flow_action: None,
        create_flow_action_esp: None,
        modify_qp_rate_limit: None,
        alloc_parent_domain: Some(domain::alloc_parent_domain),
        dealloc_td: Some(domain::dealloc_td),
        alloc_td: Some(domain::alloc_td),
        modify_cq: Some(cq::modify_cq),
        post_srq_ops: None,
        destroy_rwq_ind_table: None,
        create_rwq_ind_table: None,
        destroy_wq: None,
        modify_wq: None,
        create_wq: None,
        query_rt_values: Some(query::query_rt_values),
        create_cq_ex: Some(cq::create_cq_ex),
        private: NULL,
        query_device_ex: Some(query::query_device_ex),
        ibv_destroy_flow: None,
        abi_placeholder2: None,
        ibv_create_flow: None,
        abi_placeholder1: None,
        open_qp: Some(xrc::open_qp),
        create_qp_ex: Some(qp::create_qp_ex),
        get_srq_num: Some(srq::get_srq_num),
        create_srq_ex: Some(srq::create_srq_ex),
        open_xrcd: Some(xrc::open_xrcd),
        close_xrcd: Some(xrc::close_xrcd),
        abi_placeholder3: 0,
        sz: size_of::<verbs_context>(),
        context: base,
    };
    Context {
        verbs,
        client,
        _command: command,
    }
}
