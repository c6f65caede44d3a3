//! Who takes part: sessions with verbs objects on an engine without threads.

use std::sync::Arc;

use freeflow_router::testing::{Host, Process};
use freeflow_session::{
    CreateCq, CreateQp, CreateSrq, ExchangeSlots, Handle, PieceDesc, PieceKind, QpCreated,
    REGION_SLOTS, RegMr, RegionSlot, Reply, Request, RingLocation, Translation,
};
use freeflow_shm::{
    CompletionEntry, CqRing, DirtyMap, Mapping, QpGeometry, QpRings, RecvEntry, Region,
    RegionEntry, RegionTable, SendEntry, Sge,
};
use freeflow_types::{
    Access, AddressVector, DeviceLimits, Gid, Mtu, Opcode, QpAttr, QpAttrMask as Mask, QpCap,
    QpState, QpType,
};

/// Bytes of the pages that a party registers.
pub(crate) const PAGES: u64 = 16 << 10;
/// Address of their first byte in work requests.
pub(crate) const IOVA: u64 = 0x1_0000;
/// Capacities of queue pairs.
pub(crate) const CAP: QpCap = QpCap {
    max_send_wr: 16,
    max_recv_wr: 16,
    max_send_sge: 3,
    max_recv_sge: 2,
    max_inline: 64,
};

/// Small, so that no input takes long.
pub(crate) fn limits() -> DeviceLimits {
    DeviceLimits {
        max_mr_size: 1 << 20,
        max_qp: 16,
        max_qp_wr: 64,
        max_sge: 4,
        max_inline: 128,
        max_cq: 16,
        max_cqe: 256,
        max_mr: 32,
        max_pd: 16,
        max_mw: 16,
        max_dm_size: 64 << 10,
        max_srq: 8,
        max_srq_wr: 64,
        max_xrcd: 8,
        ..DeviceLimits::default()
    }
}

/// An engine.
pub(crate) fn host() -> Host {
    Host::new(limits()).expect("an epoll set")
}

/// A session with a context, a domain, a completion queue and registered pages.
pub(crate) struct Party {
    pub(crate) process: Process,
    pub(crate) pd: Handle,
    pub(crate) cq: Handle,
    cq_ring: Region,
    cq_entries: u32,
    consumed: u64,
    pub(crate) pages: Arc<Mapping>,
    pub(crate) key: u32,
    pub(crate) qps: Vec<QueuePair>,
    pub(crate) slabs: Vec<Arc<Mapping>>,
    /// Its pages in the segment.
    segment: u32,
    /// The table of regions, and the slots of it that the party has.
    table: Option<Region>,
    pub(crate) slots: Vec<RegionSlot>,
}

/// A queue pair's rings.
pub(crate) struct QueuePair {
    pub(crate) made: QpCreated,
    qp_type: QpType,
    region: Region,
    geometry: QpGeometry,
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

fn region(host: &Host, of: &Process, at: &RingLocation) -> Region {
    let slab = host.slab(of.session, at.slab).expect("the slab");
    Region::new(slab, at.offset, at.len).expect("the ring")
}

impl Party {
    /// A party on an endpoint.
    pub(crate) fn new(host: &mut Host, endpoint: Handle) -> Party {
        let process = host.process(endpoint).expect("a session");
        let session = process.session;
        let mut ask = |request| host.ask(session, request).0.expect("an honest request");
        let Reply::Created(context) = ask(Request::OpenContext) else {
            panic!("no context")
        };
        let Reply::Created(pd) = ask(Request::AllocPd { context }) else {
            panic!("no domain")
        };
        let Reply::Cq(cq) = ask(Request::CreateCq(CreateCq {
            context,
            cqe: 128,
            channel: None,
            comp_vector: 0,
        })) else {
            panic!("no completion queue")
        };
        let Reply::Pages {
            segment, offset, ..
        } = ask(Request::AllocPages { len: PAGES })
        else {
            panic!("no pages")
        };
        let access = Access::LOCAL_WRITE
            | Access::MW_BIND
            | Access::REMOTE_WRITE
            | Access::REMOTE_READ
            | Access::REMOTE_ATOMIC;
        let kind = PieceKind::Pool { segment, offset };
        let Reply::Mr(mr) = ask(Request::RegMr(RegMr {
            pd,
            access,
            translation: Translation {
                iova: IOVA,
                len: PAGES,
                pieces: vec![PieceDesc { len: PAGES, kind }],
            },
        })) else {
            panic!("no region")
        };
        assert_eq!(offset, 0, "the first pages are at the start");
        Party {
            cq_ring: region(host, &process, &cq.ring),
            cq_entries: cq.entries,
            consumed: 0,
            pages: host.segment(session, segment).expect("the segment"),
            slabs: vec![host.slab(session, 0).expect("the slab")],
            process,
            pd,
            cq: cq.cq,
            key: mr.key.0,
            qps: Vec::new(),
            segment,
            table: None,
            slots: Vec::new(),
        }
    }

    /// The address of its endpoint.
    pub(crate) fn gid(&self) -> Gid {
        let gids = &self.process.welcome.device.gids;
        gids.first().copied().unwrap_or_default()
    }

    /// Creates a queue pair; its place among the party's.
    pub(crate) fn qp(&mut self, host: &mut Host, qp_type: QpType, srq: Option<Handle>) -> usize {
        let request = Request::CreateQp(CreateQp {
            pd: self.pd,
            qp_type,
            send_cq: self.cq,
            recv_cq: Some(self.cq),
            srq,
            cap: CAP,
            sq_sig_all: true,
        });
        let Ok(Reply::Qp(made)) = host.ask(self.process.session, request).0 else {
            panic!("no queue pair")
        };
        let own = srq.is_none();
        let geometry = QpGeometry::new(
            CAP.max_send_wr,
            if own { CAP.max_recv_wr } else { 0 },
            CAP.max_send_sge,
            if own { CAP.max_recv_sge } else { 0 },
            CAP.max_inline,
        );
        self.qps.push(QueuePair {
            region: region(host, &self.process, &made.ring),
            made,
            qp_type,
            geometry,
            sent: 0,
            received: 0,
        });
        self.qps.len() - 1
    }

    /// Asks for slots of the table of regions.
    pub(crate) fn take_slots(&mut self, host: &mut Host, want: u32) {
        let request = ExchangeSlots {
            back: Vec::new(),
            want,
        };
        let asked = host.ask(self.process.session, Request::ExchangeSlots(request));
        let Ok(Reply::Slots(made)) = asked.0 else {
            panic!("no slots")
        };
        self.table = Some(region(host, &self.process, &made.table));
        self.slots.extend(made.slots);
    }

    /// A region of all pages, as the table has it.
    pub(crate) fn whole(&self) -> RegionEntry {
        let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ;
        RegionEntry {
            pd: self.pd.0,
            access: access.bits(),
            iova: IOVA,
            len: PAGES,
            segment: self.segment,
            offset: 0,
        }
    }

    /// Registers a region in one of its slots.
    pub(crate) fn post_region(&self, at: RegionSlot, entry: &RegionEntry) {
        let table = self.table.as_ref().map(Region::words).unwrap_or_default();
        if let Some(table) = RegionTable::new(table, REGION_SLOTS) {
            table.register(at.slot, at.key.0, entry);
        }
    }

    /// Deregisters a region in one of its slots.
    pub(crate) fn drop_region(&self, at: RegionSlot) {
        let table = self.table.as_ref().map(Region::words).unwrap_or_default();
        if let Some(table) = RegionTable::new(table, REGION_SLOTS) {
            table.deregister(at.slot, at.key.0);
        }
    }

    /// Creates a shared receive queue.
    pub(crate) fn srq(&mut self, host: &mut Host) -> Handle {
        let request = Request::CreateSrq(CreateSrq {
            pd: self.pd,
            max_wr: 16,
            max_sge: 2,
            xrc: None,
        });
        match host.ask(self.process.session, request).0 {
            Ok(Reply::Srq(made)) => made.srq,
            other => panic!("no shared receive queue: {other:?}"),
        }
    }

    /// Brings a queue pair to RTS.
    pub(crate) fn connect(&self, host: &mut Host, qp: usize, gid: Gid, qpn: u32) {
        self.connect_from(host, qp, 0, gid, qpn);
    }

    /// As [`Self::connect`], from the GID of an index.
    pub(crate) fn connect_from(&self, host: &mut Host, qp: usize, from: u8, gid: Gid, qpn: u32) {
        let Some(own) = self.qps.get(qp) else { return };
        for (attr, mask) in to_rts(own.qp_type, from, gid, qpn) {
            let qp = own.made.qp;
            let asked = host.ask(self.process.session, Request::ModifyQp { qp, attr, mask });
            asked.0.expect("an honest transition");
        }
    }

    /// Posts a receive request.
    pub(crate) fn recv(&mut self, qp: usize, wr_id: u64, sges: &[Sge]) {
        let Some(own) = self.qps.get_mut(qp) else {
            return;
        };
        if let Some(rings) = QpRings::new(own.region.words(), own.geometry) {
            RecvEntry::store(wr_id, sges, rings.recv_slot(own.received));
            own.received += 1;
            rings.publish_recv(own.received);
        }
        self.mark(qp);
    }

    /// Posts a send request, with data in the request if its flags say so.
    pub(crate) fn send(&mut self, qp: usize, entry: &SendEntry, sges: &[Sge], inline: &[u8]) {
        let Some(own) = self.qps.get_mut(qp) else {
            return;
        };
        if let Some(rings) = QpRings::new(own.region.words(), own.geometry) {
            let slot = rings.send_slot(own.sent);
            entry.store(own.qp_type, slot);
            SendEntry::store_sges(slot, sges);
            SendEntry::store_inline(slot, 0, inline);
            own.sent += 1;
            rings.publish_send(own.sent);
        }
        self.mark(qp);
    }

    fn mark(&self, qp: usize) {
        let slab = self.slabs.first().expect("the slab");
        let at = &self.process.welcome.region;
        let words = slab.words(at.offset, at.len).expect("the dirty map");
        if let (Some(map), Some(own)) = (DirtyMap::new(words), self.qps.get(qp)) {
            map.mark(own.made.slot);
        }
    }

    /// Takes a completion.
    pub(crate) fn poll(&mut self) -> Option<CompletionEntry> {
        let ring = CqRing::new(self.cq_ring.words(), self.cq_entries)?;
        if ring.produced() == self.consumed {
            return None;
        }
        let entry = ring.read(self.consumed);
        self.consumed += 1;
        ring.consume(self.consumed);
        Some(entry)
    }

    /// All bytes of its pages.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; PAGES as usize];
        self.pages.read(0, &mut bytes).expect("the pages");
        bytes
    }

    /// An element of its pages.
    pub(crate) fn sge(&self, at: u64, length: u32) -> Sge {
        Sge {
            addr: IOVA + at,
            length,
            lkey: self.key,
        }
    }
}

/// The Q_Key of all datagram queue pairs here.
pub(crate) const QKEY: u32 = 0x1234;

fn to_rts(qp_type: QpType, sgid_index: u8, gid: Gid, qpn: u32) -> [(QpAttr, Mask); 3] {
    let attr = QpAttr {
        port_num: 1,
        access: Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC,
        path_mtu: Mtu::B1024,
        qkey: QKEY,
        dest_qpn: qpn,
        av: AddressVector {
            dgid: gid,
            sgid_index,
            is_global: true,
            port_num: 1,
            ..AddressVector::default()
        },
        max_rd_atomic: 4,
        max_dest_rd_atomic: 4,
        min_rnr_timer: 1,
        timeout: 1,
        retry_cnt: 1,
        rnr_retry: 1,
        ..QpAttr::default()
    };
    let own = Mask::PKEY_INDEX | Mask::PORT;
    let connect = Mask::AV | Mask::PATH_MTU | Mask::DEST_QPN | Mask::RQ_PSN;
    let masks = match qp_type {
        QpType::Ud => [own | Mask::QKEY, Mask::empty(), Mask::SQ_PSN],
        QpType::Uc => [own | Mask::ACCESS_FLAGS, connect, Mask::SQ_PSN],
        _ => [
            own | Mask::ACCESS_FLAGS,
            connect | Mask::MAX_DEST_RD_ATOMIC | Mask::MIN_RNR_TIMER,
            Mask::SQ_PSN
                | Mask::TIMEOUT
                | Mask::RETRY_CNT
                | Mask::RNR_RETRY
                | Mask::MAX_QP_RD_ATOMIC,
        ],
    };
    let step = |state, mask| (QpAttr { state, ..attr }, mask | Mask::STATE);
    let [init, rtr, rts] = masks;
    [
        step(QpState::Init, init),
        step(QpState::Rtr, rtr),
        step(QpState::Rts, rts),
    ]
}

/// An honest pair within one session of another tenant: what it holds must not change, and it
/// must always be able to go on.
pub(crate) struct Bystander {
    party: Party,
}

/// Where its messages go from and to; all else is canaries.
const FROM: u64 = 0;
const TO: u64 = 64;
const MESSAGE: u32 = 64;

impl Bystander {
    pub(crate) fn new(host: &mut Host, endpoint: Handle) -> Bystander {
        let mut party = Party::new(host, endpoint);
        let (a, b) = (
            party.qp(host, QpType::Rc, None),
            party.qp(host, QpType::Rc, None),
        );
        let number = |party: &Party, qp: usize| party.qps[qp].made.qpn.get();
        let gid = party.gid();
        party.connect(host, a, gid, number(&party, b));
        party.connect(host, b, gid, number(&party, a));
        let canaries: Vec<u8> = (0..PAGES).map(|at| (at * 7 + 1) as u8).collect();
        party.pages.write(0, &canaries).expect("the pages");
        Bystander { party }
    }

    /// It sends itself a message; nothing else of it has changed.
    pub(crate) fn check(&mut self, host: &mut Host) {
        let party = &mut self.party;
        assert!(
            host.is_alive(party.process.session),
            "an honest session ended: {:?}",
            host.ended()
        );
        let sge = party.sge(TO, MESSAGE);
        party.recv(1, 77, &[sge]);
        let entry = SendEntry {
            wr_id: 78,
            opcode: Opcode::Send.raw() as u8,
            num_sge: 1,
            ..SendEntry::default()
        };
        let sge = party.sge(FROM, MESSAGE);
        party.send(0, &entry, &[sge], &[]);
        assert!(host.settle(), "the engine does not come to rest");
        let mut seen: Vec<_> = std::iter::from_fn(|| party.poll()).collect();
        seen.sort_by_key(|c| c.wr_id);
        let expected = [(77, 0), (78, 0)];
        let found: Vec<_> = seen.iter().map(|c| (c.wr_id, c.status)).collect();
        assert_eq!(found, expected, "an honest message");
        for (at, byte) in party.bytes().into_iter().enumerate() {
            let at = at as u64;
            let source = if (TO..TO + u64::from(MESSAGE)).contains(&at) {
                at - TO + FROM
            } else {
                at
            };
            assert_eq!(byte, (source * 7 + 1) as u8, "canary at {at}");
        }
    }
}

/// Ends everything and looks that nothing is left.
pub(crate) fn finish(mut host: Host, sessions: &[Handle]) {
    host.check().expect("the engine's books");
    for &session in sessions {
        host.close(session);
        host.check().expect("the engine's books");
    }
}

/// All endpoints: two of one tenant, one of another.
pub(crate) fn endpoints(host: &mut Host) -> [Handle; 3] {
    let ip = |last: u8| freeflow_types::VirtualIp(std::net::IpAddr::from([10, 0, 0, last]));
    let mut add = |name, tenant, last| host.endpoint(name, tenant, ip(last)).expect("an endpoint");
    [add("a", "t", 1), add("b", "t", 2), add("c", "u", 1)]
}

impl Bystander {
    pub(crate) fn session(&self) -> Handle {
        self.party.process.session
    }
}
