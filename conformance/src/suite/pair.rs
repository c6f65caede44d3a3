//! Two connected ends.

use freeflow_abi::*;

use super::{Addr, End, Env, Far, Outcome, Side, Spec, same};
use crate::verbs::{Recv, Send, Target, Wc};

/// A connection: the near end is in the test's process.
pub(crate) struct Pair {
    pub(crate) near: End,
    pub(crate) far: Far,
    /// What the near end knows of the far one.
    pub(crate) to: Addr,
}

/// An operation that a connected queue pair can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Op {
    pub(crate) name: &'static str,
    pub(crate) opcode: u32,
    /// Opcode of its completion.
    pub(crate) wc: u32,
    /// Opcode of the peer's completion, if it consumes a receive.
    pub(crate) recv: Option<u32>,
}

const fn op(name: &'static str, opcode: u32, wc: u32, recv: Option<u32>) -> Op {
    Op {
        name,
        opcode,
        wc,
        recv,
    }
}

impl Op {
    pub(crate) const SEND: Op = op("SEND", IBV_WR_SEND, IBV_WC_SEND, Some(IBV_WC_RECV));
    pub(crate) const SEND_IMM: Op = op(
        "SEND_WITH_IMM",
        IBV_WR_SEND_WITH_IMM,
        IBV_WC_SEND,
        Some(IBV_WC_RECV),
    );
    pub(crate) const WRITE: Op = op("RDMA_WRITE", IBV_WR_RDMA_WRITE, IBV_WC_RDMA_WRITE, None);
    pub(crate) const WRITE_IMM: Op = op(
        "RDMA_WRITE_WITH_IMM",
        IBV_WR_RDMA_WRITE_WITH_IMM,
        IBV_WC_RDMA_WRITE,
        Some(IBV_WC_RECV_RDMA_WITH_IMM),
    );
    pub(crate) const READ: Op = op("RDMA_READ", IBV_WR_RDMA_READ, IBV_WC_RDMA_READ, None);
    pub(crate) const CAS: Op = op(
        "CMP_AND_SWP",
        IBV_WR_ATOMIC_CMP_AND_SWP,
        IBV_WC_COMP_SWAP,
        None,
    );
    pub(crate) const FAA: Op = op(
        "FETCH_AND_ADD",
        IBV_WR_ATOMIC_FETCH_AND_ADD,
        IBV_WC_FETCH_ADD,
        None,
    );

    /// All of a reliable connection.
    pub(crate) const ALL: [Op; 7] = [
        Op::SEND,
        Op::SEND_IMM,
        Op::WRITE,
        Op::WRITE_IMM,
        Op::READ,
        Op::CAS,
        Op::FAA,
    ];

    /// Those of a service.
    pub(crate) fn of(kind: u32) -> &'static [Op] {
        match kind {
            IBV_QPT_UD => &Op::ALL[..2],
            IBV_QPT_UC => &Op::ALL[..4],
            _ => &Op::ALL,
        }
    }

    pub(crate) fn is_atomic(&self) -> bool {
        self.opcode == IBV_WR_ATOMIC_CMP_AND_SWP || self.opcode == IBV_WR_ATOMIC_FETCH_AND_ADD
    }

    pub(crate) fn is_remote(&self) -> bool {
        !matches!(self.opcode, IBV_WR_SEND | IBV_WR_SEND_WITH_IMM)
    }

    pub(crate) fn has_imm(&self) -> bool {
        matches!(
            self.opcode,
            IBV_WR_SEND_WITH_IMM | IBV_WR_RDMA_WRITE_WITH_IMM
        )
    }

    /// A signaled request without its data, acting on an address of the peer.
    pub(crate) fn request(&self, wr_id: u64, remote: u64, rkey: u32) -> Send {
        let request = Send::new(wr_id, self.opcode);
        if self.is_atomic() {
            request.to(Target::Atomic(remote, rkey, 0, 1))
        } else if self.is_remote() {
            request.to(Target::Rdma(remote, rkey))
        } else {
            request
        }
    }
}

impl Pair {
    pub(crate) fn new(env: &Env, spec: &Spec) -> Outcome<Self> {
        Pair::with(env, spec, spec)
    }

    pub(crate) fn with(env: &Env, near: &Spec, far: &Spec) -> Outcome<Self> {
        let near = End::open(env, false, near)?;
        let mut other = Far::new(env)?;
        let to = other.open(far)?;
        other.connect(near.addr())?;
        near.connect(&to)?;
        Ok(Pair {
            near,
            far: other,
            to,
        })
    }

    /// A request of `len` bytes (8 for an atomic) at offset `at` of both memories.
    pub(crate) fn request(&self, op: Op, wr_id: u64, at: usize, len: usize) -> Send {
        let len = if op.is_atomic() { 8 } else { len };
        op.request(wr_id, self.to.base + at as u64, self.to.rkey)
            .sge(self.near.sge(at, len))
    }

    /// A receive into the far end's memory.
    pub(crate) fn far_recv(&mut self, wr_id: u64, at: usize, len: usize) -> Outcome {
        let sge = crate::verbs::Sge {
            addr: self.to.base + at as u64,
            length: len as u32,
            lkey: self.to.lkey,
        };
        self.far.post_recv(vec![Recv::new(wr_id).sge(sge)])
    }

    /// Posts a request and waits for its completion, which must be of that request.
    pub(crate) fn run(&self, request: Send) -> Outcome<Wc> {
        let wr_id = request.wr_id;
        self.near.send(&[request])?;
        let wc = self.near.one(Side::Send)?;
        same!(wc.wr_id, wr_id, "wr_id of the completion");
        same!(
            wc.qp_num,
            self.near.qp().number(),
            "qp_num of the completion"
        );
        Ok(wc)
    }

    /// Runs a request that must succeed.
    pub(crate) fn succeed(&self, request: Send) -> Outcome<Wc> {
        let opcode = request.opcode;
        let wc = self.run(request)?;
        same!(wc.status, IBV_WC_SUCCESS, "status of opcode {opcode}");
        Ok(wc)
    }

    /// Runs a request that must fail so, and take the queue pair to the error state.
    pub(crate) fn refuse(&self, what: &str, request: Send, status: u32) -> Outcome<Wc> {
        let wc = self.run(request)?;
        same!(
            status_name(wc.status),
            status_name(status),
            "{what}: status"
        );
        Ok(wc)
    }

    /// Sends messages both ways, to see that the connection works.
    pub(crate) fn ping(&mut self, wr_id: u64) -> Outcome {
        let bytes = crate::verbs::pattern(wr_id, 48);
        self.near.put(0, &bytes)?;
        self.far_recv(wr_id, 64, 64)?;
        self.succeed(self.request(Op::SEND, wr_id, 0, 48))?;
        let got = self.far.one(Side::Recv)?;
        same!(
            (got.wr_id, got.status, got.byte_len),
            (wr_id, IBV_WC_SUCCESS, 48),
            "receive"
        );
        same!(self.far.get(64, 48)?, bytes, "data received");
        Ok(())
    }
}

/// The name of a completion's status, for messages.
pub(crate) fn status_name(status: u32) -> String {
    let text = crate::verbs::verb!(ibv_wc_status_str(status));
    if text.is_null() {
        return format!("status {status}");
    }
    // SAFETY: the library gives a string that is never freed.
    let text = unsafe { core::ffi::CStr::from_ptr(text) };
    format!("{status} {}", text.to_string_lossy())
}
