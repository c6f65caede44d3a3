//! Names of enumeration values, rates, and sysfs: what programs print and read. The wordings are
//! rdma-core's, as programs' output is compared by scripts.

use core::ffi::{CStr, c_char, c_int, c_uint, c_void};

use crate::objects::set_errno;

fn name(table: &'static [&'static CStr], at: c_uint, unknown: &'static CStr) -> *const c_char {
    table.get(at as usize).copied().unwrap_or(unknown).as_ptr()
}

/// `ibv_wc_status_str(3)`.
pub(crate) unsafe extern "C" fn wc_status_str(status: c_uint) -> *const c_char {
    const NAMES: [&CStr; 24] = [
        c"success",
        c"local length error",
        c"local QP operation error",
        c"local EE context operation error",
        c"local protection error",
        c"Work Request Flushed Error",
        c"memory management operation error",
        c"bad response error",
        c"local access error",
        c"remote invalid request error",
        c"remote access error",
        c"remote operation error",
        c"transport retry counter exceeded",
        c"RNR retry counter exceeded",
        c"local RDD violation error",
        c"remote invalid RD request",
        c"aborted error",
        c"invalid EE context number",
        c"invalid EE context state",
        c"fatal error",
        c"response timeout error",
        c"general error",
        c"TM error",
        c"TM software rendezvous",
    ];
    name(&NAMES, status, c"unknown")
}

/// `ibv_event_type_str(3)`.
pub(crate) unsafe extern "C" fn event_type_str(event: c_uint) -> *const c_char {
    const NAMES: [&CStr; 21] = [
        c"CQ error",
        c"local work queue catastrophic error",
        c"invalid request local work queue error",
        c"local access violation work queue error",
        c"communication established",
        c"send queue drained",
        c"path migrated",
        c"path migration request error",
        c"local catastrophic error",
        c"port active",
        c"port error",
        c"LID change",
        c"P_Key change",
        c"SM change",
        c"SRQ catastrophic error",
        c"SRQ limit reached",
        c"last WQE reached",
        c"client reregistration",
        c"GID table change",
        c"WQ fatal",
        c"Device link speed change",
    ];
    name(&NAMES, event, c"unknown")
}

/// `ibv_node_type_str(3)`.
pub(crate) unsafe extern "C" fn node_type_str(node: c_uint) -> *const c_char {
    const NAMES: [&CStr; 8] = [
        c"unknown",
        c"InfiniBand channel adapter",
        c"InfiniBand switch",
        c"InfiniBand router",
        c"iWARP NIC",
        c"usNIC",
        c"usNIC UDP",
        c"unspecified",
    ];
    name(&NAMES, node, c"unknown")
}

/// `ibv_port_state_str(3)`.
pub(crate) unsafe extern "C" fn port_state_str(state: c_uint) -> *const c_char {
    const NAMES: [&CStr; 6] = [
        c"no state change (NOP)",
        c"down",
        c"init",
        c"armed",
        c"active",
        c"active defer",
    ];
    name(&NAMES, state, c"unknown")
}

/// `ibv_wr_opcode_str`, of rdma-core 50 on; two numbers are nobody's.
pub(crate) fn wr_opcode_str(opcode: c_uint) -> *const c_char {
    const NAMES: [&CStr; 16] = [
        c"rdma-write",
        c"rdma-write-with-imm",
        c"send",
        c"send-with-imm",
        c"rdma-read",
        c"atomic-cmp-and-swp",
        c"atomic-fetch-and-add",
        c"local-inv",
        c"bind-mw",
        c"send-with-inv",
        c"tso",
        c"driver1",
        c"unknown",
        c"unknown",
        c"flush",
        c"atomic-write",
    ];
    name(&NAMES, opcode, c"unknown")
}

/// `enum ibv_rate`, multiples of 2.5 Gb/s (-1 if it is none), Mb/s.
const RATES: [(c_int, c_int, c_int); 23] = [
    (2, 1, 2500),
    (5, 2, 5000),
    (3, 4, 10000),
    (6, 8, 20000),
    (4, 12, 30000),
    (7, 16, 40000),
    (8, 24, 60000),
    (9, 32, 80000),
    (10, 48, 120000),
    (11, -1, 14062),
    (12, -1, 56250),
    (13, -1, 112500),
    (14, -1, 168750),
    (15, -1, 25781),
    (16, -1, 103125),
    (17, -1, 206250),
    (18, -1, 309375),
    (19, 11, 28125),
    (20, 20, 53125),
    (21, 160, 425000),
    (22, 240, 637500),
    (23, 320, 850000),
    (24, 480, 1275000),
];

/// `ibv_rate_to_mult(3)`: -1 if unknown.
pub(crate) unsafe extern "C" fn rate_to_mult(rate: c_int) -> c_int {
    RATES.iter().find(|r| r.0 == rate).map_or(-1, |r| r.1)
}

/// `mult_to_ibv_rate(3)`: `IBV_RATE_MAX` (0) if unknown.
pub(crate) unsafe extern "C" fn mult_to_rate(mult: c_int) -> c_int {
    RATES
        .iter()
        .find(|r| r.1 > 0 && r.1 == mult)
        .map_or(0, |r| r.0)
}

/// `ibv_rate_to_mbps(3)`: -1 if unknown.
pub(crate) unsafe extern "C" fn rate_to_mbps(rate: c_int) -> c_int {
    RATES.iter().find(|r| r.0 == rate).map_or(-1, |r| r.2)
}

/// `mbps_to_ibv_rate(3)`: `IBV_RATE_MAX` (0) if unknown.
pub(crate) unsafe extern "C" fn mbps_to_rate(mbps: c_int) -> c_int {
    RATES.iter().find(|r| r.2 == mbps).map_or(0, |r| r.0)
}

pub(crate) unsafe extern "C" fn get_sysfs_path() -> *const c_char {
    c"/sys".as_ptr()
}

/// Reads a small text file below a directory, without its last newline: its length, or -1 if there
/// is no such file or the text and its end do not fit.
pub(crate) unsafe extern "C" fn read_sysfs_file(
    dir: *const c_char,
    file: *const c_char,
    buffer: *mut c_char,
    size: usize,
) -> c_int {
    // SAFETY: the caller gives two strings.
    let (dir, file) = unsafe { (CStr::from_ptr(dir), CStr::from_ptr(file)) };
    let path = std::path::Path::new(&*dir.to_string_lossy()).join(&*file.to_string_lossy());
    let Ok(mut text) = std::fs::read(path) else {
        set_errno(libc::ENOENT);
        return -1;
    };
    if text.last() == Some(&b'\n') {
        text.pop();
    }
    if text.len() >= size {
        set_errno(libc::EOVERFLOW);
        return -1;
    }
    // SAFETY: the caller gives room for `size` bytes, more than the text has.
    unsafe {
        libc::memcpy(buffer.cast::<c_void>(), text.as_ptr().cast(), text.len());
        *buffer.add(text.len()) = 0;
    }
    text.len() as c_int
}
