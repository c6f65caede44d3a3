//! libibverbs, opened at run time: whichever the dynamic linker finds first.

use core::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use freeflow_abi::*;

type Ctx = *mut ibv_context;

/// Declares the functions of the library with the version node that programs are linked against.
macro_rules! symbols {
    ($($name:ident $version:literal ($($arg:ty),*) $(-> $ret:ty)?;)*) => {
        /// The functions of the library.
        pub(crate) struct Library {
            $(pub(crate) $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
        }

        impl Library {
            fn load(handle: *mut c_void) -> Result<Self, String> {
                Ok(Library { $($name: {
                    let at = find(handle, stringify!($name), $version)?;
                    // SAFETY: the symbol of this name and version has this type in the header.
                    unsafe {
                        core::mem::transmute::<
                            *mut c_void,
                            unsafe extern "C" fn($($arg),*) $(-> $ret)?,
                        >(at)
                    }
                },)* })
            }
        }
    };
}

symbols! {
    ibv_get_device_list "IBVERBS_1.1" (*mut c_int) -> *mut *mut ibv_device;
    ibv_free_device_list "IBVERBS_1.1" (*mut *mut ibv_device);
    ibv_get_device_name "IBVERBS_1.1" (*mut ibv_device) -> *const c_char;
    ibv_open_device "IBVERBS_1.1" (*mut ibv_device) -> Ctx;
    ibv_close_device "IBVERBS_1.1" (Ctx) -> c_int;
    ibv_get_async_event "IBVERBS_1.1" (Ctx, *mut ibv_async_event) -> c_int;
    ibv_ack_async_event "IBVERBS_1.1" (*mut ibv_async_event);
    ibv_query_device "IBVERBS_1.1" (Ctx, *mut ibv_device_attr) -> c_int;
    ibv_query_port "IBVERBS_1.1" (Ctx, u8, *mut ibv_port_attr) -> c_int;
    ibv_query_gid "IBVERBS_1.1" (Ctx, u8, c_int, *mut ibv_gid) -> c_int;
    ibv_query_pkey "IBVERBS_1.1" (Ctx, u8, c_int, *mut u16) -> c_int;
    ibv_query_qp "IBVERBS_1.1" (*mut ibv_qp, *mut ibv_qp_attr, c_int, *mut ibv_qp_init_attr) -> c_int;
    ibv_alloc_pd "IBVERBS_1.1" (Ctx) -> *mut ibv_pd;
    ibv_dealloc_pd "IBVERBS_1.1" (*mut ibv_pd) -> c_int;
    ibv_reg_mr "IBVERBS_1.1" (*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
    ibv_reg_mr_iova2 "IBVERBS_1.8" (*mut ibv_pd, *mut c_void, usize, u64, c_uint) -> *mut ibv_mr;
    ibv_reg_dmabuf_mr "IBVERBS_1.12" (*mut ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ibv_mr;
    ibv_rereg_mr "IBVERBS_1.1" (*mut ibv_mr, c_int, *mut ibv_pd, *mut c_void, usize, c_int) -> c_int;
    ibv_dereg_mr "IBVERBS_1.1" (*mut ibv_mr) -> c_int;
    ibv_create_comp_channel "IBVERBS_1.0" (Ctx) -> *mut ibv_comp_channel;
    ibv_destroy_comp_channel "IBVERBS_1.0" (*mut ibv_comp_channel) -> c_int;
    ibv_create_cq "IBVERBS_1.1" (Ctx, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
    ibv_resize_cq "IBVERBS_1.1" (*mut ibv_cq, c_int) -> c_int;
    ibv_destroy_cq "IBVERBS_1.1" (*mut ibv_cq) -> c_int;
    ibv_get_cq_event "IBVERBS_1.1" (*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    ibv_ack_cq_events "IBVERBS_1.1" (*mut ibv_cq, c_uint);
    ibv_create_srq "IBVERBS_1.1" (*mut ibv_pd, *mut ibv_srq_init_attr) -> *mut ibv_srq;
    ibv_modify_srq "IBVERBS_1.1" (*mut ibv_srq, *mut ibv_srq_attr, c_int) -> c_int;
    ibv_query_srq "IBVERBS_1.1" (*mut ibv_srq, *mut ibv_srq_attr) -> c_int;
    ibv_destroy_srq "IBVERBS_1.1" (*mut ibv_srq) -> c_int;
    ibv_create_qp "IBVERBS_1.1" (*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
    ibv_modify_qp "IBVERBS_1.1" (*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
    ibv_destroy_qp "IBVERBS_1.1" (*mut ibv_qp) -> c_int;
    ibv_qp_to_qp_ex "IBVERBS_1.6" (*mut ibv_qp) -> *mut ibv_qp_ex;
    ibv_query_qp_data_in_order "IBVERBS_1.14" (*mut ibv_qp, c_uint, u32) -> c_int;
    ibv_query_ece "IBVERBS_1.10" (*mut ibv_qp, *mut ibv_ece) -> c_int;
    ibv_set_ece "IBVERBS_1.10" (*mut ibv_qp, *mut ibv_ece) -> c_int;
    ibv_create_ah "IBVERBS_1.1" (*mut ibv_pd, *mut ibv_ah_attr) -> *mut ibv_ah;
    ibv_create_ah_from_wc "IBVERBS_1.1" (*mut ibv_pd, *mut ibv_wc, *mut ibv_grh, u8) -> *mut ibv_ah;
    ibv_init_ah_from_wc "IBVERBS_1.1" (Ctx, u8, *mut ibv_wc, *mut ibv_grh, *mut ibv_ah_attr) -> c_int;
    ibv_destroy_ah "IBVERBS_1.1" (*mut ibv_ah) -> c_int;
    ibv_attach_mcast "IBVERBS_1.1" (*mut ibv_qp, *const ibv_gid, u16) -> c_int;
    ibv_detach_mcast "IBVERBS_1.1" (*mut ibv_qp, *const ibv_gid, u16) -> c_int;
    ibv_fork_init "IBVERBS_1.1" () -> c_int;
    ibv_is_fork_initialized "IBVERBS_1.13" () -> c_uint;
    ibv_wc_status_str "IBVERBS_1.1" (c_uint) -> *const c_char;
    ibv_import_device "IBVERBS_1.10" (c_int) -> Ctx;
    ibv_import_pd "IBVERBS_1.10" (Ctx, u32) -> *mut ibv_pd;
    ibv_unimport_pd "IBVERBS_1.10" (*mut ibv_pd);
    ibv_import_mr "IBVERBS_1.10" (*mut ibv_pd, u32) -> *mut ibv_mr;
    ibv_unimport_mr "IBVERBS_1.10" (*mut ibv_mr);
}

fn reason() -> String {
    // SAFETY: dlerror gives null or a string that is valid until the next call on this thread.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            return "no reason given".to_owned();
        }
        CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}

fn find(handle: *mut c_void, name: &str, version: &str) -> Result<*mut c_void, String> {
    let (name, version) = (format!("{name}\0"), format!("{version}\0"));
    // SAFETY: both strings end with a zero; the handle is open.
    let at = unsafe { libc::dlvsym(handle, name.as_ptr().cast(), version.as_ptr().cast()) };
    if at.is_null() { Err(reason()) } else { Ok(at) }
}

/// The library; it stays open for the life of the process.
pub(crate) fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        // SAFETY: opening libibverbs runs its constructors, which any program that is linked
        // against it does.
        let handle = unsafe { libc::dlopen(c"libibverbs.so.1".as_ptr(), libc::RTLD_NOW) };
        let loaded = if handle.is_null() {
            Err(reason())
        } else {
            Library::load(handle)
        };
        loaded.unwrap_or_else(|why| {
            eprintln!("ff-conform: libibverbs.so.1: {why}");
            std::process::exit(2);
        })
    })
}

type AllocBuf = unsafe extern "C" fn(*mut ibv_pd, usize, *mut *mut ibv_buf) -> *mut c_void;
type FreeBuf = unsafe extern "C" fn(*mut ibv_buf);
type RegBufMr =
    unsafe extern "C" fn(*mut ibv_pd, *mut ibv_buf, *mut c_void, usize, c_int) -> *mut ibv_mr;

/// Functions of `IBVERBS_1.17`, which the oldest library that the suite runs on does not have.
pub(crate) struct Buffers {
    pub(crate) alloc: AllocBuf,
    pub(crate) free: FreeBuf,
    pub(crate) register: RegBufMr,
}

/// `ibv_alloc_buf(3)` and what belongs to it, if the library has them.
pub(crate) fn buffers() -> Option<Buffers> {
    library();
    // SAFETY: `library` has opened it: this counts once more.
    let handle = unsafe { libc::dlopen(c"libibverbs.so.1".as_ptr(), libc::RTLD_NOW) };
    let find = |name| find(handle, name, "IBVERBS_1.17").ok();
    let (alloc, free) = (find("ibv_alloc_buf")?, find("ibv_free_buf")?);
    let register = find("ibv_reg_buf_mr")?;
    // SAFETY: the symbols of these names and this version have these types in the header.
    unsafe {
        Some(Buffers {
            alloc: core::mem::transmute::<*mut c_void, AllocBuf>(alloc),
            free: core::mem::transmute::<*mut c_void, FreeBuf>(free),
            register: core::mem::transmute::<*mut c_void, RegBufMr>(register),
        })
    }
}

/// Calls a function of the library.
macro_rules! verb {
    ($f:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: objects of the library live as long as their wrappers, which make these calls;
        // other pointers are to values on the stack, of the header's types.
        unsafe { ($crate::verbs::library().$f)($($arg),*) }
    }};
}
pub(crate) use verb;

/// The operation of a context's extended table, if the library has it (`verbs_get_ctx_op`).
macro_rules! operation {
    ($ctx:expr, $op:ident) => {{
        let ctx: *mut freeflow_abi::ibv_context = $ctx;
        // SAFETY: the context is open; the table before it is read only as far as `sz` says.
        unsafe {
            if (*ctx).abi_compat as usize != usize::MAX {
                None
            } else {
                let table = ctx
                    .byte_sub(core::mem::offset_of!(freeflow_abi::verbs_context, context))
                    .cast::<freeflow_abi::verbs_context>();
                let needs = size_of::<freeflow_abi::verbs_context>()
                    - core::mem::offset_of!(freeflow_abi::verbs_context, $op);
                if (*table).sz < needs {
                    None
                } else {
                    (*table).$op
                }
            }
        }
    }};
}
pub(crate) use operation;
