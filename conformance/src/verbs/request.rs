//! Work requests, as values that also go to another process.

use core::ffi::{c_int, c_uint};
use core::mem::zeroed;

use freeflow_abi::*;
use serde::{Deserialize, Serialize};

/// An element of a scatter or gather list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sge {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// What a request acts upon at the peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Target {
    /// Nothing.
    #[default]
    None,
    /// An address and its key.
    Rdma(u64, u32),
    /// An address, its key, compare or add, and swap.
    Atomic(u64, u32, u64, u64),
    /// A datagram's address handle (of this process), queue pair number and Q_Key.
    Ud(usize, u32, u32),
    /// The window (of this process) to bind, its new key, and the region, address, length and
    /// rights that it is to show.
    Bind(usize, u32, usize, u64, u64, u32),
}

/// A send request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Send {
    pub(crate) wr_id: u64,
    pub(crate) opcode: c_uint,
    pub(crate) flags: c_uint,
    pub(crate) sges: Vec<Sge>,
    /// Immediate data as it is in memory, or the key to invalidate.
    pub(crate) imm: u32,
    pub(crate) target: Target,
    /// XRC: the peer's shared receive queue.
    pub(crate) srqn: u32,
}

impl Send {
    /// A signaled request.
    pub(crate) fn new(wr_id: u64, opcode: c_uint) -> Self {
        Send {
            wr_id,
            opcode,
            flags: IBV_SEND_SIGNALED,
            ..Send::default()
        }
    }

    pub(crate) fn sge(mut self, sge: Sge) -> Self {
        self.sges.push(sge);
        self
    }

    pub(crate) fn flags(mut self, flags: c_uint) -> Self {
        self.flags |= flags;
        self
    }

    pub(crate) fn unsignaled(mut self) -> Self {
        self.flags &= !IBV_SEND_SIGNALED;
        self
    }

    pub(crate) fn imm(mut self, bytes: [u8; 4]) -> Self {
        self.imm = u32::from_ne_bytes(bytes);
        self
    }

    pub(crate) fn to(mut self, target: Target) -> Self {
        self.target = target;
        self
    }
}

/// A receive request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recv {
    pub(crate) wr_id: u64,
    pub(crate) sges: Vec<Sge>,
}

impl Recv {
    pub(crate) fn new(wr_id: u64) -> Self {
        Recv {
            wr_id,
            sges: Vec::new(),
        }
    }

    pub(crate) fn sge(mut self, sge: Sge) -> Self {
        self.sges.push(sge);
        self
    }
}

fn c_sges(sges: &[Sge]) -> Vec<ibv_sge> {
    let c = |s: &Sge| ibv_sge {
        addr: s.addr,
        length: s.length,
        lkey: s.lkey,
    };
    sges.iter().map(c).collect()
}

/// Send requests as the C structures, linked.
pub(crate) struct SendList {
    wrs: Vec<ibv_send_wr>,
    _sges: Vec<Vec<ibv_sge>>,
}

impl SendList {
    pub(crate) fn new(requests: &[Send]) -> Self {
        let mut sges: Vec<_> = requests.iter().map(|r| c_sges(&r.sges)).collect();
        let mut wrs: Vec<_> = requests
            .iter()
            .zip(&mut sges)
            .map(|(r, s)| c_send(r, s))
            .collect();
        for i in 1..wrs.len() {
            wrs[i - 1].next = &raw mut wrs[i];
        }
        SendList { wrs, _sges: sges }
    }

    /// The first, or null.
    pub(crate) fn head(&mut self) -> *mut ibv_send_wr {
        if self.wrs.is_empty() {
            core::ptr::null_mut()
        } else {
            self.wrs.as_mut_ptr()
        }
    }

    /// Which of them a pointer is.
    pub(crate) fn index(&self, wr: *mut ibv_send_wr) -> Option<usize> {
        self.wrs.iter().position(|own| core::ptr::eq(own, wr))
    }
}

fn c_send(r: &Send, sges: &mut [ibv_sge]) -> ibv_send_wr {
    // SAFETY: numbers and null pointers.
    let mut wr: ibv_send_wr = unsafe { zeroed() };
    wr.wr_id = r.wr_id;
    wr.sg_list = sges.as_mut_ptr();
    wr.num_sge = sges.len() as c_int;
    wr.opcode = r.opcode;
    wr.send_flags = r.flags;
    wr.imm_data = r.imm;
    wr.remote_srqn = r.srqn;
    match r.target {
        Target::None => {}
        Target::Rdma(remote_addr, rkey) => wr.wr.rdma = ibv_send_wr_rdma { remote_addr, rkey },
        Target::Atomic(remote_addr, rkey, compare_add, swap) => {
            wr.wr.atomic = ibv_send_wr_atomic {
                remote_addr,
                compare_add,
                swap,
                rkey,
            };
        }
        Target::Ud(ah, remote_qpn, remote_qkey) => {
            wr.wr.ud = ibv_send_wr_ud {
                ah: ah as *mut ibv_ah,
                remote_qpn,
                remote_qkey,
            };
        }
        Target::Bind(mw, rkey, mr, addr, length, mw_access_flags) => {
            wr.more.bind_mw = ibv_send_wr_bind_mw {
                mw: mw as *mut ibv_mw,
                rkey,
                bind_info: ibv_mw_bind_info {
                    mr: mr as *mut ibv_mr,
                    addr,
                    length,
                    mw_access_flags,
                },
            };
        }
    }
    wr
}

/// Receive requests as the C structures, linked.
pub(crate) struct RecvList {
    wrs: Vec<ibv_recv_wr>,
    _sges: Vec<Vec<ibv_sge>>,
}

impl RecvList {
    pub(crate) fn new(requests: &[Recv]) -> Self {
        let mut sges: Vec<_> = requests.iter().map(|r| c_sges(&r.sges)).collect();
        let one = |(r, s): (&Recv, &mut Vec<ibv_sge>)| ibv_recv_wr {
            wr_id: r.wr_id,
            next: core::ptr::null_mut(),
            sg_list: s.as_mut_ptr(),
            num_sge: s.len() as c_int,
        };
        let mut wrs: Vec<_> = requests.iter().zip(&mut sges).map(one).collect();
        for i in 1..wrs.len() {
            wrs[i - 1].next = &raw mut wrs[i];
        }
        RecvList { wrs, _sges: sges }
    }

    pub(crate) fn head(&mut self) -> *mut ibv_recv_wr {
        if self.wrs.is_empty() {
            core::ptr::null_mut()
        } else {
            self.wrs.as_mut_ptr()
        }
    }

    pub(crate) fn index(&self, wr: *mut ibv_recv_wr) -> Option<usize> {
        self.wrs.iter().position(|own| core::ptr::eq(own, wr))
    }
}
