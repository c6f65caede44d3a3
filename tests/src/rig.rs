//! Verbs objects made by hand over a [`Raw`] session.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use freeflow_session::{
    CreateCq, CreateQp, Handle, PieceDesc, PieceKind, QpCreated, RegMr, Reply, Request, Translation,
};
use freeflow_shm::{
    CompletionEntry, CqRing, Mapping, QpGeometry, QpRings, RecvEntry, Region, SendEntry, Sge,
};
use freeflow_types::{
    Access, AddressVector, Gid, Mtu, Opcode, QpAttr, QpAttrMask, QpCap, QpState, QpType, WcStatus,
};

use crate::raw::Raw;
use crate::{DEADLINE, Hosts};

/// Address that work requests use for a rig's first byte.
pub const IOVA: u64 = 0x7000_0000_0000;

/// A session with a context, a protection domain, a completion queue and registered pages.
pub struct Rig {
    /// The session.
    pub raw: Raw,
    /// Open device.
    pub context: Handle,
    /// Its asynchronous events.
    pub events: OwnedFd,
    /// Protection domain.
    pub pd: Handle,
    /// Completion queue.
    pub cq: RawCq,
    /// Segment of its pages, and their offset in it.
    pub pages: (u32, u64),
    /// Bytes of its pages.
    pub len: u64,
    /// Region of all pages, with all rights.
    pub mr: Handle,
    /// The region's key.
    pub key: u32,
}

/// A completion queue's ring.
pub struct RawCq {
    /// The queue.
    pub handle: Handle,
    /// Its memory.
    pub region: Region,
    /// Entries.
    pub entries: u32,
    consumed: u64,
}

/// A queue pair's rings.
pub struct RawQp {
    /// What the router said of it.
    pub made: QpCreated,
    /// Transport service.
    pub qp_type: QpType,
    /// Their memory.
    pub region: Region,
    /// Their layout.
    pub geometry: QpGeometry,
    send: u64,
    recv: u64,
}

/// Capacities that do for most tests.
pub const CAP: QpCap = QpCap {
    max_send_wr: 64,
    max_recv_wr: 64,
    max_send_sge: 4,
    max_recv_sge: 4,
    max_inline: 64,
};

/// All rights that peers can have.
pub fn all_rights() -> Access {
    Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC
}

fn handle_of(reply: &Reply) -> Result<Handle> {
    match reply {
        Reply::Created(handle) => Ok(*handle),
        other => bail!("not a new object: {other:?}"),
    }
}

impl Rig {
    /// A session on an endpoint, with `len` bytes of registered pages.
    pub fn new(endpoint: &Path, len: u64) -> Result<Rig> {
        Self::with(endpoint, len, 256)
    }

    /// As [`Self::new`], with a completion queue of `cqe` entries.
    pub fn with(endpoint: &Path, len: u64, cqe: u32) -> Result<Rig> {
        let mut raw = Raw::connect(endpoint)?;
        let (reply, fds) = raw.call(&Request::OpenContext)?;
        let context = handle_of(&reply)?;
        let events = fds.into_iter().next().context("no event stream")?;
        let pd = handle_of(&raw.call(&Request::AllocPd { context })?.0)?;
        let cq = RawCq::new(&mut raw, context, cqe, None)?;
        let pages = raw.pages(len)?;
        let (mr, key) = register(&raw, pd, pages, len, IOVA)?;
        Ok(Rig {
            raw,
            context,
            events,
            pd,
            cq,
            pages,
            len,
            mr,
            key,
        })
    }

    /// The mapping of the pages, and where they are in it.
    pub fn memory(&self) -> Result<(Arc<Mapping>, u64)> {
        let (mapping, _) = self.raw.segment(self.pages.0).context("no segment")?;
        Ok((mapping.clone(), self.pages.1))
    }

    /// Fills bytes of the pages.
    pub fn fill(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let (mapping, offset) = self.memory()?;
        let written = mapping.write(offset + at, bytes);
        written.map_err(|e| anyhow::anyhow!("{e:?}"))
    }

    /// Bytes of the pages.
    pub fn bytes(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        let (mapping, offset) = self.memory()?;
        let mut bytes = vec![0; len];
        let read = mapping.read(offset + at, &mut bytes);
        read.map_err(|e| anyhow::anyhow!("{e:?}"))?;
        Ok(bytes)
    }

    /// The address of this endpoint.
    pub fn gid(&self) -> Gid {
        let gids = &self.raw.welcome.device.gids;
        gids.first().copied().unwrap_or_default()
    }

    /// An element of `len` bytes at `at`.
    pub fn sge(&self, at: u64, length: u32) -> Sge {
        Sge {
            addr: IOVA + at,
            length,
            lkey: self.key,
        }
    }

    /// Creates a queue pair on the rig's domain and completion queue.
    pub fn qp(&mut self, qp_type: QpType, cap: QpCap) -> Result<RawQp> {
        let request = Request::CreateQp(CreateQp {
            pd: self.pd,
            qp_type,
            send_cq: self.cq.handle,
            recv_cq: Some(self.cq.handle),
            srq: None,
            cap,
            sq_sig_all: true,
        });
        let (reply, fds) = self.raw.call(&request)?;
        let Reply::Qp(made) = reply else {
            bail!("not a queue pair: {reply:?}");
        };
        Ok(RawQp {
            region: self.raw.ring(&made.ring, fds)?,
            made,
            qp_type,
            geometry: QpGeometry::new(
                cap.max_send_wr,
                cap.max_recv_wr,
                cap.max_send_sge.max(1),
                cap.max_recv_sge.max(1),
                cap.max_inline,
            ),
            send: 0,
            recv: 0,
        })
    }

    /// Two reliable queue pairs that are connected to each other.
    pub fn pair(&mut self) -> Result<(RawQp, RawQp)> {
        let a = self.qp(QpType::Rc, CAP)?;
        let b = self.qp(QpType::Rc, CAP)?;
        join((self, &a), (self, &b))?;
        Ok((a, b))
    }

    /// Brings a connected queue pair to RTS towards a peer.
    pub fn connect(&self, qp: &RawQp, gid: Gid, qpn: u32) -> Result<()> {
        self.connect_with(qp, gid, qpn, &Patience::default())
    }

    /// As [`Self::connect`], with chosen timers.
    pub fn connect_with(&self, qp: &RawQp, gid: Gid, qpn: u32, timers: &Patience) -> Result<()> {
        for (attr, mask) in path_to_rts(gid, qpn, timers) {
            self.modify(qp, attr, mask)?;
        }
        Ok(())
    }

    /// Modifies a queue pair.
    pub fn modify(&self, qp: &RawQp, attr: QpAttr, mask: QpAttrMask) -> Result<()> {
        let qp = qp.made.qp;
        self.raw.call(&Request::ModifyQp { qp, attr, mask })?;
        Ok(())
    }

    /// Posts a send request.
    pub fn send(&self, qp: &mut RawQp, entry: &SendEntry, sges: &[Sge]) -> Result<()> {
        let rings = qp.rings()?;
        let slot = rings.send_slot(qp.send);
        entry.store(qp.qp_type, slot);
        SendEntry::store_sges(slot, sges);
        rings.publish_send(qp.send + 1);
        qp.send += 1;
        self.raw.mark(qp.made.slot);
        Ok(())
    }

    /// Posts a receive request.
    pub fn recv(&self, qp: &mut RawQp, wr_id: u64, sges: &[Sge]) -> Result<()> {
        let rings = qp.rings()?;
        RecvEntry::store(wr_id, sges, rings.recv_slot(qp.recv));
        let wake = rings.publish_recv(qp.recv + 1);
        qp.recv += 1;
        if wake {
            self.raw.mark(qp.made.slot);
        }
        Ok(())
    }

    /// Waits for a completion.
    pub fn completion(&mut self, deadline: Duration) -> Result<CompletionEntry> {
        let until = Instant::now() + deadline;
        loop {
            if let Some(entry) = self.cq.poll()? {
                return Ok(entry);
            }
            if Instant::now() > until {
                bail!("no completion in {deadline:?}");
            }
            std::thread::yield_now();
        }
    }
}

/// Registers pages with all rights.
pub fn register(
    raw: &Raw,
    pd: Handle,
    (segment, offset): (u32, u64),
    len: u64,
    iova: u64,
) -> Result<(Handle, u32)> {
    let kind = PieceKind::Pool { segment, offset };
    let request = Request::RegMr(RegMr {
        pd,
        access: all_rights(),
        translation: Translation {
            iova,
            len,
            pieces: vec![PieceDesc { len, kind }],
        },
    });
    match raw.call(&request)?.0 {
        Reply::Mr(made) => Ok((made.mr, made.key.0)),
        other => bail!("not a region: {other:?}"),
    }
}

impl RawCq {
    /// Creates a completion queue.
    pub fn new(raw: &mut Raw, context: Handle, cqe: u32, channel: Option<Handle>) -> Result<RawCq> {
        let request = Request::CreateCq(CreateCq {
            context,
            cqe,
            channel,
            comp_vector: 0,
        });
        let (reply, fds) = raw.call(&request)?;
        let Reply::Cq(made) = reply else {
            bail!("not a completion queue: {reply:?}");
        };
        Ok(RawCq {
            handle: made.cq,
            region: raw.ring(&made.ring, fds)?,
            entries: made.entries,
            consumed: 0,
        })
    }

    /// The ring.
    pub fn ring(&self) -> Result<CqRing<'_>> {
        CqRing::new(self.region.words(), self.entries).context("the ring is too small")
    }

    /// Takes a completion.
    pub fn poll(&mut self) -> Result<Option<CompletionEntry>> {
        let ring = self.ring()?;
        if ring.produced() == self.consumed {
            return Ok(None);
        }
        let entry = ring.read(self.consumed);
        ring.consume(self.consumed + 1);
        self.consumed += 1;
        Ok(Some(entry))
    }
}

impl RawQp {
    /// The rings.
    pub fn rings(&self) -> Result<QpRings<'_>> {
        QpRings::new(self.region.words(), self.geometry).context("the rings are too small")
    }

    /// Its number.
    pub fn qpn(&self) -> u32 {
        self.made.qpn.get()
    }
}

/// How long a connection waits for its peer.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Local ACK timeout code.
    pub timeout: u8,
    /// Retries after silence.
    pub retry_cnt: u8,
    /// Retries when the receiver is not ready; 7 is for ever.
    pub rnr_retry: u8,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            timeout: 14,
            retry_cnt: 7,
            rnr_retry: 7,
        }
    }
}

/// The modifications that connect a reliable queue pair.
pub fn path_to_rts(gid: Gid, qpn: u32, timers: &Patience) -> [(QpAttr, QpAttrMask); 3] {
    use QpAttrMask as Mask;
    let attr = QpAttr {
        state: QpState::Init,
        port_num: 1,
        access: all_rights(),
        path_mtu: Mtu::B4096,
        dest_qpn: qpn,
        av: AddressVector {
            dgid: gid,
            is_global: true,
            port_num: 1,
            hop_limit: 64,
            ..AddressVector::default()
        },
        max_rd_atomic: 16,
        max_dest_rd_atomic: 16,
        min_rnr_timer: 12,
        timeout: timers.timeout,
        retry_cnt: timers.retry_cnt,
        rnr_retry: timers.rnr_retry,
        ..QpAttr::default()
    };
    let init = Mask::STATE | Mask::PKEY_INDEX | Mask::PORT | Mask::ACCESS_FLAGS;
    let respond = Mask::MAX_DEST_RD_ATOMIC | Mask::MIN_RNR_TIMER;
    let rtr = Mask::STATE | Mask::AV | Mask::PATH_MTU | Mask::DEST_QPN | Mask::RQ_PSN | respond;
    let rts = Mask::STATE
        | Mask::TIMEOUT
        | Mask::RETRY_CNT
        | Mask::RNR_RETRY
        | Mask::SQ_PSN
        | Mask::MAX_QP_RD_ATOMIC;
    let step = |state| QpAttr { state, ..attr };
    [
        (attr, init),
        (step(QpState::Rtr), rtr),
        (step(QpState::Rts), rts),
    ]
}

/// The modifications that make a datagram queue pair ready.
pub fn datagrams(qkey: u32) -> [(QpAttr, QpAttrMask); 3] {
    use QpAttrMask as Mask;
    let step = |state| QpAttr {
        state,
        port_num: 1,
        qkey,
        ..QpAttr::default()
    };
    let init = Mask::STATE | Mask::PKEY_INDEX | Mask::PORT | Mask::QKEY;
    [
        (step(QpState::Init), init),
        (step(QpState::Rtr), Mask::STATE),
        (step(QpState::Rts), Mask::STATE | Mask::SQ_PSN),
    ]
}

/// A write of one element to an address.
pub fn write(rkey: u32, remote_addr: u64) -> SendEntry {
    SendEntry {
        opcode: Opcode::RdmaWrite.raw() as u8,
        num_sge: 1,
        rkey,
        remote_addr,
        ..SendEntry::default()
    }
}

/// Connects two queue pairs with each other.
pub fn join(a: (&Rig, &RawQp), b: (&Rig, &RawQp)) -> Result<()> {
    a.0.connect(a.1, b.0.gid(), b.1.qpn())?;
    b.0.connect(b.1, a.0.gid(), a.1.qpn())
}

/// Two rigs on two hosts with a connection between them.
pub struct Pair {
    /// On the first host.
    pub near: (Rig, RawQp),
    /// On the second one.
    pub far: (Rig, RawQp),
}

impl Pair {
    /// Bytes of each one's pages.
    pub const PAGES: u64 = 1 << 20;

    /// Connects two endpoints of the usual tenant.
    pub fn new(hosts: &Hosts, timers: &Patience) -> Result<Pair> {
        let rig = |host: usize| {
            let lasting = hosts.bed(host).lasting_endpoint("default")?;
            Rig::new(&lasting.socket, Self::PAGES)
        };
        let (mut a, mut b) = (rig(0)?, rig(1)?);
        let (qa, qb) = (a.qp(QpType::Rc, CAP)?, b.qp(QpType::Rc, CAP)?);
        a.connect_with(&qa, b.gid(), qb.qpn(), timers)?;
        b.connect_with(&qb, a.gid(), qa.qpn(), timers)?;
        Ok(Pair {
            near: (a, qa),
            far: (b, qb),
        })
    }

    /// Posts a receive at the far end.
    pub fn expect(&mut self, len: u32) -> Result<()> {
        let (b, qb) = &mut self.far;
        let into = b.sge(0, len);
        b.recv(qb, 1, &[into])
    }

    /// Posts a message at the near end.
    pub fn post(&mut self, len: u32) -> Result<()> {
        let (a, qa) = &mut self.near;
        let entry = SendEntry {
            wr_id: 2,
            opcode: Opcode::Send.raw() as u8,
            num_sge: 1,
            ..SendEntry::default()
        };
        let from = a.sge(0, len);
        a.send(qa, &entry, &[from])
    }

    /// Waits for the near end's request; how it ended.
    pub fn outcome(&mut self) -> Result<WcStatus> {
        let done = self.near.0.completion(DEADLINE)?;
        WcStatus::from_raw(done.status.into()).context("a status that does not exist")
    }

    /// Sends a message from the near end, where the far one may expect it or not; how that ended.
    pub fn send(&mut self, len: u32) -> Result<WcStatus> {
        self.post(len)?;
        self.outcome()
    }

    /// Sends a message that the far end expects; how that ended.
    pub fn pass(&mut self, len: u32) -> Result<WcStatus> {
        self.expect(len)?;
        self.send(len)
    }
}
