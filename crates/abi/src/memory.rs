//! Memory windows, device memory, re-registration and advice.

use core::ffi::{c_int, c_uint, c_void};

use crate::context::ibv_context;
use crate::objects::{ibv_mr, ibv_pd};

/// `ibv_alloc_mw(3)`.
#[repr(C)]
pub struct ibv_mw {
    pub context: *mut ibv_context,
    pub pd: *mut ibv_pd,
    pub rkey: u32,
    pub handle: u32,
    pub kind: c_uint,
}

/// Bound by `ibv_bind_mw(3)`, to one queue pair's remote peer and any other of the domain.
pub const IBV_MW_TYPE_1: c_uint = 1;
/// Bound by a work request, which chooses the key's low byte.
pub const IBV_MW_TYPE_2: c_uint = 2;

/// What a window shows; a length of 0 unbinds a window of type 1.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_mw_bind_info {
    pub mr: *mut ibv_mr,
    pub addr: u64,
    pub length: u64,
    pub mw_access_flags: c_uint,
}

/// `ibv_alloc_dmah(3)`.
#[repr(C)]
pub struct ibv_dmah {
    pub context: *mut ibv_context,
}

/// `ibv_alloc_buf(3)`; opaque to programs.
#[repr(C)]
pub struct ibv_buf {
    pub _opaque: u8,
}

/// `ibv_reg_mr_ex(3)`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_mr_init_attr {
    pub length: usize,
    pub access: c_int,
    pub comp_mask: u64,
    pub iova: u64,
    pub addr: *mut c_void,
    pub fd: c_int,
    pub fd_offset: u64,
    pub dmah: *mut ibv_dmah,
    pub buf: *mut ibv_buf,
}

pub const IBV_REG_MR_MASK_IOVA: u64 = 1;
pub const IBV_REG_MR_MASK_ADDR: u64 = 1 << 1;
pub const IBV_REG_MR_MASK_FD: u64 = 1 << 2;
pub const IBV_REG_MR_MASK_FD_OFFSET: u64 = 1 << 3;
pub const IBV_REG_MR_MASK_DMAH: u64 = 1 << 4;
pub const IBV_REG_MR_MASK_BUF: u64 = 1 << 5;

/// `ibv_bind_mw(3)`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_mw_bind {
    pub wr_id: u64,
    pub send_flags: c_uint,
    pub bind_info: ibv_mw_bind_info,
}

/// `ibv_alloc_dm(3)`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct ibv_alloc_dm_attr {
    pub length: usize,
    /// Alignment wanted, as a power of two.
    pub log_align_req: u32,
    pub comp_mask: u32,
}

pub type memcpy_to_dm =
    Option<unsafe extern "C" fn(*mut ibv_dm, u64, *const c_void, usize) -> c_int>;
pub type memcpy_from_dm =
    Option<unsafe extern "C" fn(*mut c_void, *mut ibv_dm, u64, usize) -> c_int>;

/// Device memory; its copy functions are called through it.
#[repr(C)]
pub struct ibv_dm {
    pub context: *mut ibv_context,
    pub memcpy_to_dm: memcpy_to_dm,
    pub memcpy_from_dm: memcpy_from_dm,
    pub comp_mask: u32,
    /// Valid with [`IBV_DM_MASK_HANDLE`].
    pub handle: u32,
}

pub const IBV_DM_MASK_HANDLE: u32 = 1;

pub const IBV_REREG_MR_CHANGE_TRANSLATION: c_int = 1;
pub const IBV_REREG_MR_CHANGE_PD: c_int = 1 << 1;
pub const IBV_REREG_MR_CHANGE_ACCESS: c_int = 1 << 2;

/// The old region stands: the input was refused.
pub const IBV_REREG_MR_ERR_INPUT: c_int = -1;
/// The old region stands: the new range could not be kept from a fork's child.
pub const IBV_REREG_MR_ERR_DONT_FORK_NEW: c_int = -2;
/// The new region stands: the old range could not be given to a fork's child again.
pub const IBV_REREG_MR_ERR_DO_FORK_OLD: c_int = -3;
/// The region must not be used: the command failed.
pub const IBV_REREG_MR_ERR_CMD: c_int = -4;
/// As [`IBV_REREG_MR_ERR_CMD`], and the new range is not given to a fork's child.
pub const IBV_REREG_MR_ERR_CMD_AND_DO_FORK_NEW: c_int = -5;

pub const IBV_ADVISE_MR_ADVICE_PREFETCH: c_uint = 0;
pub const IBV_ADVISE_MR_ADVICE_PREFETCH_WRITE: c_uint = 1;
pub const IBV_ADVISE_MR_ADVICE_PREFETCH_NO_FAULT: c_uint = 2;
pub const IBV_ADVISE_MR_FLAG_FLUSH: u32 = 1;
