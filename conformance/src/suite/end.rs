//! One end of a connection: a queue pair, its completion queues and its memory.

use std::sync::Arc;
use std::time::Duration;

use freeflow_abi::*;
use serde::{Deserialize, Serialize};

use super::{Env, LONG, Outcome, fail};
use crate::verbs::{
    Ah, Attr, Channel, Context, Cq, Mr, Pd, Qp, QpSpec, Recv, Send, Sge, Srq, Wc, address,
};

/// The Q_Key of both ends.
pub(crate) const QKEY: u32 = 0x1234_5678;

/// How an end is made; both ends are alike unless a test says otherwise.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) kind: u32,
    pub(crate) send_wr: u32,
    pub(crate) recv_wr: u32,
    pub(crate) send_sge: u32,
    pub(crate) recv_sge: u32,
    pub(crate) inline: u32,
    pub(crate) cqe: u32,
    pub(crate) sig_all: bool,
    /// One queue for both kinds of completion.
    pub(crate) one_cq: bool,
    /// Completion queues have a channel.
    pub(crate) channel: bool,
    /// Operations of the extended interface.
    pub(crate) ops: u64,
    pub(crate) memory: usize,
    pub(crate) mr_access: u32,
    pub(crate) qp_access: u32,
    pub(crate) timeout: u8,
    pub(crate) retry: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) rnr_timer: u8,
    pub(crate) rd_atomic: u8,
    pub(crate) mtu: u32,
    /// Receives come from a shared queue of this depth.
    pub(crate) srq: u32,
    /// The state that connecting ends with.
    pub(crate) state: u32,
}

/// All rights that a plain region can have.
const ALL: u32 = IBV_ACCESS_LOCAL_WRITE
    | IBV_ACCESS_REMOTE_WRITE
    | IBV_ACCESS_REMOTE_READ
    | IBV_ACCESS_REMOTE_ATOMIC;

impl Spec {
    pub(crate) fn new(kind: u32) -> Self {
        // A queue pair's own flags allow what its service has.
        let qp_access = match kind {
            IBV_QPT_UC => IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE,
            _ => ALL,
        };
        Spec {
            kind,
            send_wr: 64,
            recv_wr: 64,
            send_sge: 4,
            recv_sge: 4,
            inline: 64,
            cqe: 256,
            sig_all: false,
            one_cq: false,
            channel: false,
            ops: 0,
            memory: 64 << 10,
            mr_access: ALL,
            qp_access,
            timeout: 17,
            retry: 7,
            rnr_retry: 7,
            rnr_timer: 12,
            rd_atomic: 4,
            mtu: IBV_MTU_1024,
            srq: 0,
            state: IBV_QPS_RTS,
        }
    }

    pub(crate) fn rc() -> Self {
        Spec::new(IBV_QPT_RC)
    }

    pub(crate) fn uc() -> Self {
        Spec::new(IBV_QPT_UC)
    }

    pub(crate) fn ud() -> Self {
        Spec::new(IBV_QPT_UD)
    }

    pub(crate) fn qp(&self, srq: Option<Arc<Srq>>) -> QpSpec {
        QpSpec {
            kind: self.kind,
            cap: ibv_qp_cap {
                max_send_wr: self.send_wr,
                max_recv_wr: self.recv_wr,
                max_send_sge: self.send_sge,
                max_recv_sge: self.recv_sge,
                max_inline_data: self.inline,
            },
            sig_all: self.sig_all,
            ops: self.ops,
            srq,
        }
    }
}

/// What the other end needs to know of an end.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Addr {
    pub(crate) gid: [u8; 16],
    pub(crate) qpn: u32,
    pub(crate) psn: u32,
    /// First byte of its memory.
    pub(crate) base: u64,
    pub(crate) rkey: u32,
    pub(crate) lkey: u32,
}

/// Which completion queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Side {
    Send,
    Recv,
}

/// An end. Its parts are dropped in the order in which they may be destroyed.
pub(crate) struct End {
    pub(crate) qp: Option<Qp>,
    pub(crate) srq: Option<Arc<Srq>>,
    pub(crate) mr: Option<Mr>,
    pub(crate) send_cq: Arc<Cq>,
    pub(crate) recv_cq: Arc<Cq>,
    pub(crate) channel: Option<Arc<Channel>>,
    pub(crate) pd: Arc<Pd>,
    pub(crate) ctx: Arc<Context>,
    pub(crate) spec: Spec,
    pub(crate) psn: u32,
    /// Regions that the other end asked for.
    pub(crate) more: Vec<Mr>,
}

impl End {
    /// An end on this device, its queue pair in RESET.
    pub(crate) fn new(ctx: &Arc<Context>, spec: &Spec) -> Outcome<Self> {
        let pd = Pd::new(ctx)?;
        let channel = spec.channel.then(|| Channel::new(ctx)).transpose()?;
        let send_cq = Cq::with_channel(ctx, spec.cqe, channel.as_ref())?;
        let recv_cq = if spec.one_cq {
            send_cq.clone()
        } else {
            Cq::with_channel(ctx, spec.cqe, channel.as_ref())?
        };
        let mr = Mr::new(&pd, spec.memory, spec.mr_access)?;
        let srq = match spec.srq {
            0 => None,
            depth => match Srq::create(&pd, depth, 1) {
                Ok(srq) => Some(srq),
                Err(errno) => fail!("ibv_create_srq: {}", crate::verbs::name_of(errno)),
            },
        };
        let qp = Qp::new(&pd, &send_cq, &recv_cq, &spec.qp(srq.clone()))?;
        // Different at each end, and such that numbers wrap within a test.
        let psn = 0xFF_FF00 | (qp.number() & 0xFF);
        Ok(End {
            qp: Some(qp),
            srq,
            mr: Some(mr),
            send_cq,
            recv_cq,
            channel,
            pd,
            ctx: ctx.clone(),
            spec: spec.clone(),
            psn,
            more: Vec::new(),
        })
    }

    /// Opens a device and makes an end on it.
    pub(crate) fn open(env: &Env, second: bool, spec: &Spec) -> Outcome<Self> {
        let name = if second {
            env.device2.as_ref().or(env.device.as_ref())
        } else {
            env.device.as_ref()
        };
        End::new(
            &Context::open(name.map(String::as_str), env.gid_index)?,
            spec,
        )
    }

    pub(crate) fn qp(&self) -> &Qp {
        match &self.qp {
            Some(qp) => qp,
            None => unreachable!("the test destroyed its queue pair"),
        }
    }

    pub(crate) fn mr(&self) -> &Mr {
        match &self.mr {
            Some(mr) => mr,
            None => unreachable!("the test deregistered its memory"),
        }
    }

    pub(crate) fn addr(&self) -> Addr {
        Addr {
            gid: self.ctx.gid,
            qpn: self.qp().number(),
            psn: self.psn,
            base: self.mr().base,
            rkey: self.mr().rkey(),
            lkey: self.mr().lkey(),
        }
    }

    /// Attributes of RESET to INIT.
    pub(crate) fn to_init(&self) -> Attr {
        let attr = Attr::state(IBV_QPS_INIT)
            .with(IBV_QP_PKEY_INDEX, |a| a.pkey_index = 0)
            .with(IBV_QP_PORT, |a| a.port_num = 1);
        if self.spec.kind == IBV_QPT_UD {
            attr.with(IBV_QP_QKEY, |a| a.qkey = QKEY)
        } else {
            attr.with(IBV_QP_ACCESS_FLAGS, |a| {
                a.qp_access_flags = self.spec.qp_access
            })
        }
    }

    /// Attributes of INIT to RTR.
    pub(crate) fn to_rtr(&self, to: &Addr) -> Attr {
        let attr = Attr::state(IBV_QPS_RTR);
        if self.spec.kind == IBV_QPT_UD {
            return attr;
        }
        let attr = attr
            .with(IBV_QP_AV, |a| a.ah_attr = address(&self.pd, to.gid))
            .with(IBV_QP_PATH_MTU, |a| a.path_mtu = self.spec.mtu)
            .with(IBV_QP_DEST_QPN, |a| a.dest_qp_num = to.qpn)
            .with(IBV_QP_RQ_PSN, |a| a.rq_psn = to.psn);
        if self.spec.kind == IBV_QPT_UC {
            return attr;
        }
        attr.with(IBV_QP_MAX_DEST_RD_ATOMIC, |a| {
            a.max_dest_rd_atomic = self.spec.rd_atomic
        })
        .with(IBV_QP_MIN_RNR_TIMER, |a| {
            a.min_rnr_timer = self.spec.rnr_timer
        })
    }

    /// Attributes of RTR to RTS.
    pub(crate) fn to_rts(&self) -> Attr {
        let attr = Attr::state(IBV_QPS_RTS).with(IBV_QP_SQ_PSN, |a| a.sq_psn = self.psn);
        if self.spec.kind != IBV_QPT_RC {
            return attr;
        }
        attr.with(IBV_QP_TIMEOUT, |a| a.timeout = self.spec.timeout)
            .with(IBV_QP_RETRY_CNT, |a| a.retry_cnt = self.spec.retry)
            .with(IBV_QP_RNR_RETRY, |a| a.rnr_retry = self.spec.rnr_retry)
            .with(IBV_QP_MAX_QP_RD_ATOMIC, |a| {
                a.max_rd_atomic = self.spec.rd_atomic
            })
    }

    /// Brings the queue pair from RESET as far as its description says.
    pub(crate) fn connect(&self, to: &Addr) -> Outcome {
        let steps = [
            (IBV_QPS_INIT, self.to_init()),
            (IBV_QPS_RTR, self.to_rtr(to)),
            (IBV_QPS_RTS, self.to_rts()),
        ];
        for (state, attr) in steps {
            if state <= self.spec.state {
                self.qp().must_modify(&attr)?;
            }
        }
        Ok(())
    }

    pub(crate) fn cq(&self, side: Side) -> &Arc<Cq> {
        match side {
            Side::Send => &self.send_cq,
            Side::Recv => &self.recv_cq,
        }
    }

    /// An element of its memory.
    pub(crate) fn sge(&self, at: usize, len: usize) -> Sge {
        self.mr().sge(at, len)
    }

    /// Posts a receive into its memory.
    pub(crate) fn recv(&self, wr_id: u64, at: usize, len: usize) -> Outcome {
        self.post_recv(&[Recv::new(wr_id).sge(self.sge(at, len))])
    }

    /// Posts receives to its queue, or to the shared one.
    pub(crate) fn post_recv(&self, requests: &[Recv]) -> Outcome {
        match &self.srq {
            Some(srq) => srq.recv(requests),
            None => self.qp().recv(requests),
        }
    }

    pub(crate) fn send(&self, requests: &[Send]) -> Outcome {
        self.qp().send(requests)
    }

    pub(crate) fn wait(&self, side: Side, n: usize) -> Outcome<Vec<Wc>> {
        self.cq(side).wait(n, LONG)
    }

    /// Waits for one completion.
    pub(crate) fn one(&self, side: Side) -> Outcome<Wc> {
        match self.wait(side, 1)?.first() {
            Some(wc) => Ok(*wc),
            None => fail!("no completion"),
        }
    }

    /// What is in the completion queue now.
    pub(crate) fn peek(&self, side: Side) -> Outcome<Vec<Wc>> {
        match self.cq(side).poll(64) {
            Ok(got) => Ok(got),
            Err(code) => fail!("ibv_poll_cq returned {code}"),
        }
    }

    /// Looks for a time whether nothing completes.
    pub(crate) fn quiet(&self, side: Side, within: Duration) -> Outcome {
        let end = std::time::Instant::now() + within;
        loop {
            let got = self.peek(side)?;
            if !got.is_empty() {
                fail!("nothing should complete, but {got:?} did");
            }
            if std::time::Instant::now() > end {
                return Ok(());
            }
            std::thread::yield_now();
        }
    }

    pub(crate) fn put(&self, at: usize, bytes: &[u8]) -> Outcome {
        self.mr().buf.put(at, bytes)
    }

    pub(crate) fn get(&self, at: usize, len: usize) -> Outcome<Vec<u8>> {
        self.mr().buf.get(at, len)
    }

    pub(crate) fn state(&self) -> Outcome<u32> {
        Ok(self.qp().query()?.qp_state)
    }

    /// An address handle of the other end.
    pub(crate) fn ah(&self, to: &Addr) -> Outcome<Ah> {
        Ah::new(&self.pd, to.gid)
    }
}
