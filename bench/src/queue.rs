//! Queue pairs: set-up, and the cost of a work request.

use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use freeflow_client::{
    Access, AddressVector, Completion, Context, Cq, DeviceInfo, Gid, Mtu, Opcode, Pd, Qp, QpAttr,
    QpAttrMask, QpCap, QpInit, QpState, QpType, SendFlags, SendWr, Sge,
};
use serde_json::{Value, json};

const DEPTH: u32 = 128;

pub(crate) struct Device {
    context: Arc<Context>,
    pd: Arc<Pd>,
    cq: Arc<Cq>,
}

impl Device {
    pub(crate) fn open() -> Result<Device> {
        let context = Context::open()?;
        let pd = context.alloc_pd()?;
        let cq = context.create_cq(4 * DEPTH, None, 0, 0)?;
        Ok(Device { context, pd, cq })
    }

    /// The device's own address.
    pub(crate) fn gid(&self) -> Result<Gid> {
        let first = self.context.info().gids.first();
        first.copied().context("the device has no GID")
    }

    pub(crate) fn create(&self, depth: u32) -> Result<Arc<Qp>> {
        let init = QpInit {
            qp_type: QpType::Rc,
            send_cq: &self.cq,
            recv_cq: Some(&self.cq),
            srq: None,
            cap: QpCap {
                max_send_wr: depth,
                max_recv_wr: 1,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline: 0,
            },
            sq_sig_all: false,
        };
        Ok(self.pd.create_qp(&init, 0)?)
    }
}

/// Connects a queue pair to another of the same device.
fn connect(info: &DeviceInfo, qp: &Qp, peer: u32) -> Result<()> {
    let Some(&dgid) = info.gids.first() else {
        bail!("the device has no GID");
    };
    let all = QpAttr {
        port_num: 1,
        access: Access::REMOTE_WRITE | Access::REMOTE_READ | Access::LOCAL_WRITE,
        av: AddressVector {
            dgid,
            is_global: true,
            hop_limit: 64,
            port_num: 1,
            ..AddressVector::default()
        },
        path_mtu: Mtu::B4096,
        dest_qpn: peer,
        max_rd_atomic: 1,
        max_dest_rd_atomic: 1,
        min_rnr_timer: 12,
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        ..QpAttr::default()
    };
    type M = QpAttrMask;
    let steps = [
        (QpState::Init, M::PKEY_INDEX | M::PORT | M::ACCESS_FLAGS),
        (
            QpState::Rtr,
            M::AV
                | M::PATH_MTU
                | M::DEST_QPN
                | M::RQ_PSN
                | M::MAX_DEST_RD_ATOMIC
                | M::MIN_RNR_TIMER,
        ),
        (
            QpState::Rts,
            M::TIMEOUT | M::RETRY_CNT | M::RNR_RETRY | M::SQ_PSN | M::MAX_QP_RD_ATOMIC,
        ),
    ];
    for (state, mask) in steps {
        qp.modify(&QpAttr { state, ..all }, mask | M::STATE)?;
    }
    Ok(())
}

pub(crate) fn setup() -> Result<Value> {
    const PAIRS: u32 = 1500;
    let device = Device::open()?;
    let info = device.context.info();
    let start = Instant::now();
    for _ in 0..PAIRS {
        let (a, b) = (device.create(16)?, device.create(16)?);
        connect(info, &a, b.qpn())?;
        connect(info, &b, a.qpn())?;
        a.destroy()?;
        b.destroy()?;
    }
    let rate = f64::from(2 * PAIRS) / start.elapsed().as_secs_f64();
    Ok(json!({ "qps_per_s": rate }))
}

fn idlers(device: &Device, n: usize) -> Result<Vec<Arc<Qp>>> {
    let info = device.context.info();
    let mut all = Vec::with_capacity(n);
    while all.len() < n {
        let (a, b) = (device.create(16)?, device.create(16)?);
        connect(info, &a, b.qpn())?;
        connect(info, &b, a.qpn())?;
        all.extend([a, b]);
    }
    Ok(all)
}

pub(crate) fn rate(idle: usize) -> Result<Value> {
    const MESSAGES: u32 = 1_000_000;
    const SIGNAL_EVERY: u32 = 32;
    let device = Device::open()?;
    let _idlers = idlers(&device, idle)?;
    let (a, b) = (device.create(DEPTH)?, device.create(DEPTH)?);
    connect(device.context.info(), &a, b.qpn())?;
    connect(device.context.info(), &b, a.qpn())?;
    let buffer = vec![1u8; 8192];
    let addr = buffer.as_ptr() as u64;
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
    let mr = device.pd.reg_mr(addr, 8192, addr, access)?;
    let key = mr.key().0;
    let sge = [Sge {
        addr,
        length: 64,
        lkey: key,
    }];
    let start = Instant::now();
    let (mut posted, mut done) = (0, 0);
    let mut completions = [Completion::default(); 16];
    while done < MESSAGES {
        while posted < MESSAGES && posted - done < DEPTH {
            let mut queue = a.lock_send();
            for n in posted + 1..=posted + SIGNAL_EVERY {
                let signal = n.is_multiple_of(SIGNAL_EVERY);
                let wr = SendWr {
                    wr_id: n.into(),
                    opcode: Opcode::RdmaWrite,
                    flags: if signal {
                        SendFlags::SIGNALED
                    } else {
                        SendFlags::empty()
                    },
                    remote_addr: addr + 4096,
                    rkey: key,
                    ..SendWr::default()
                };
                // SAFETY: no inline data.
                unsafe { queue.push(&wr, &sge)? };
            }
            queue.commit();
            posted += SIGNAL_EVERY;
        }
        let n = device.cq.poll(&mut completions)?;
        for completion in &completions[..n] {
            ensure!(completion.status == 0, "status {}", completion.status);
            done = completion.wr_id as u32;
        }
    }
    let each = start.elapsed().as_nanos() as f64 / f64::from(MESSAGES);
    Ok(json!({ "ns_per_request": each }))
}

pub(crate) fn idle(qps: usize, mrs: usize) -> Result<Value> {
    const PAGE: usize = 4096;
    const BUFFER_PAGES: usize = 16;
    let device = Device::open()?;
    let start = Instant::now();
    let all = idlers(&device, qps)?;
    let connected = start.elapsed().as_secs_f64();
    let buffer = vec![1u8; BUFFER_PAGES * PAGE];
    let start = Instant::now();
    let regions: Result<Vec<_>, _> = (0..mrs)
        .map(|n| {
            let at = buffer.as_ptr() as u64 + (n % BUFFER_PAGES * PAGE) as u64;
            device.pd.reg_mr(at, PAGE as u64, at, Access::LOCAL_WRITE)
        })
        .collect();
    let regions = regions?;
    let registered = start.elapsed().as_secs_f64();
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(json!({
        "qps": all.len(), "qps_s": connected, "mrs": regions.len(), "mrs_s": registered
    }))
}
