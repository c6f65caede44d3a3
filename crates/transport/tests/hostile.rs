//! Whatever a peer sends, in whatever state: nothing panics, nothing is placed or read that was not
//! asked for or allowed, and completions stay in order.

use std::collections::BTreeMap;

use freeflow_transport::{
    Action, Connection, Execution, Refusal, Requester, RequesterEvent, Responder, Verdict, Work,
};
use freeflow_types::{FlushSpec, Opcode, Psn, QpAttr, QpType};
use freeflow_wire::{Aeth, AtomicEth, Bth, BthOpcode, Deth, Feth, Headers, Reth, Syndrome};
use proptest::prelude::*;

/// A packet whose sequence number is near what is due, mostly, and whose headers may not be those
/// of its opcode.
#[derive(Clone, Debug)]
struct Packet {
    opcode: u8,
    ahead: i32,
    consistent: bool,
    reth: Reth,
    atomic: AtomicEth,
    syndrome: u8,
    msn: u32,
    value: u64,
    flags: u8,
    payload: usize,
}

#[derive(Clone, Debug)]
enum Step {
    Post(Opcode, u32, bool),
    Send(u8),
    Response(Packet),
    Request(Packet, u8),
    Reply(u8),
    Timeout,
    Abort(u64),
    Congestion,
}

fn packet() -> impl Strategy<Value = Packet> {
    let near = prop_oneof![6 => -3..3i32, 3 => -40..40i32, 1 => any::<i32>()];
    let len = || prop_oneof![4 => 0..3000u32, 1 => any::<u32>()];
    let va = prop_oneof![Just(4096u64), Just(u64::MAX - 7), any::<u64>()];
    let reth = (va, 0..3u32, len()).prop_map(|(va, rkey, len)| Reth { va, rkey, len });
    let atomic = (any::<u64>(), any::<u32>(), any::<u64>(), any::<u64>()).prop_map(
        |(va, rkey, swap_add, compare)| AtomicEth {
            va: va & !7,
            rkey,
            swap_add,
            compare,
        },
    );
    let syndrome = prop_oneof![
        Just(0x1F),
        Just(0x60),
        Just(0x40),
        0x20..0x40u8,
        any::<u8>()
    ];
    let payload = prop_oneof![
        Just(0),
        Just(8),
        Just(256),
        Just(1024),
        0..5000usize,
        any::<usize>()
    ];
    (
        any::<u8>(),
        near,
        prop::bool::weighted(0.9),
        reth,
        atomic,
        (syndrome, any::<u32>(), any::<u64>(), any::<u8>()),
        payload,
    )
        .prop_map(|(opcode, ahead, consistent, reth, atomic, more, payload)| {
            let (syndrome, msn, value, flags) = more;
            Packet {
                opcode,
                ahead,
                consistent,
                reth,
                atomic,
                syndrome,
                msn,
                value,
                flags,
                payload,
            }
        })
}

fn step() -> impl Strategy<Value = Step> {
    let opcode = prop::sample::select((0..16).filter_map(Opcode::from_raw).collect::<Vec<_>>());
    let len = prop_oneof![0..5000u32, Just(1 << 31), any::<u32>()];
    prop_oneof![
        3 => (opcode, len, any::<bool>()).prop_map(|(o, l, f)| Step::Post(o, l, f)),
        4 => (0..20u8).prop_map(Step::Send),
        5 => packet().prop_map(Step::Response),
        8 => (packet(), 0..12u8).prop_map(|(p, o)| Step::Request(p, o)),
        2 => (0..20u8).prop_map(Step::Reply),
        1 => Just(Step::Timeout),
        1 => (0..10u64).prop_map(Step::Abort),
        1 => Just(Step::Congestion),
    ]
}

fn headers(p: &Packet, base: u32, qp_type: QpType, response: bool) -> Headers {
    // Mostly an opcode that this side takes.
    let service = match qp_type {
        QpType::Uc => 1,
        QpType::XrcSend => 5,
        _ => 0,
    };
    let ops: Vec<u8> = (0..32)
        .filter(|op| {
            let o = BthOpcode(*op);
            o.is_known() && o.is_response() == response
        })
        .collect();
    let op = ops[usize::from(p.opcode) % ops.len()];
    let opcode = if p.flags & 0xC0 == 0xC0 {
        BthOpcode(p.opcode)
    } else {
        BthOpcode(service << 5 | op)
    };
    let psn = Psn::new(base.wrapping_add_signed(p.ahead));
    let mut h = Headers::new(Bth::new(opcode, 1, psn));
    h.bth.ack_req = p.flags & 1 != 0;
    h.bth.becn = p.flags & 2 != 0;
    let has = |b: bool| b || !p.consistent;
    h.reth = has(opcode.has_reth()).then_some(p.reth);
    h.atomic = has(opcode.has_atomic()).then_some(p.atomic);
    h.aeth = has(opcode.has_aeth()).then_some(Aeth {
        syndrome: Syndrome::from_byte(p.syndrome),
        // Near enough that reports mean something.
        msn: if p.flags & 4 != 0 {
            p.msn
        } else {
            psn.add(p.msn & 63).get()
        },
    });
    h.atomic_ack = has(opcode.has_atomic_ack()).then_some(p.value);
    h.imm = has(opcode.has_imm()).then_some([1; 4]);
    h.ieth = has(opcode.has_ieth()).then_some(3);
    h.feth = has(opcode.has_feth()).then_some(Feth(p.msn & 0x3F));
    h.xrc_srq = has(opcode.has_xrc_srq()).then_some(9);
    h.deth = has(opcode.has_deth()).then_some(Deth::default());
    h
}

struct Sides {
    requester: Requester,
    responder: Responder,
    qp_type: QpType,
    posted: BTreeMap<u64, Work>,
    next_done: u64,
    failed: bool,
    /// Ranges that the responder may read.
    readable: Vec<(u64, u32, u32)>,
    received: Option<u32>,
    held: BTreeMap<u64, (Headers, usize)>,
    now: u64,
}

impl Sides {
    fn events(&mut self, events: Vec<RequesterEvent>, payload: usize) {
        for event in events {
            assert!(!self.failed, "{event:?} after the failure");
            match event {
                RequesterEvent::Place(part) => {
                    let work = &self.posted[&part.message.seq];
                    assert!(part.message.seq >= self.next_done);
                    assert_eq!(work.opcode, Opcode::RdmaRead);
                    assert_eq!(part.len as usize, payload);
                    assert!(u64::from(part.offset) + u64::from(part.len) <= u64::from(work.len));
                }
                RequesterEvent::Atomic { message, .. } => {
                    assert!(message.seq >= self.next_done);
                    assert!(self.posted[&message.seq].opcode.is_atomic());
                }
                RequesterEvent::Complete(message) => {
                    assert_eq!(message.seq, self.next_done);
                    self.next_done += 1;
                }
                RequesterEvent::Failed(message, _) => {
                    assert_eq!(message.seq, self.next_done);
                    self.failed = true;
                }
            }
        }
    }

    fn request(&mut self, h: &Headers, payload: usize, outcome: u8) {
        match self.responder.on_request(h, payload) {
            Verdict::Execute(e) => self.execute(&e, payload, outcome),
            Verdict::Hold(n) if outcome != 0 => {
                self.held.insert(n, (*h, payload));
                self.responder.hold(n);
                assert!(self.held.len() <= freeflow_transport::selective::WINDOW as usize);
            }
            _ => {}
        }
        // What is held and due must be there.
        while let Some(n) = self.responder.next_held() {
            self.held = self.held.split_off(&n);
            let (h, payload) = self
                .held
                .remove(&n)
                .expect("only what was kept is asked for");
            if let Verdict::Execute(e) = self.responder.on_request(&h, payload) {
                self.execute(&e, payload, 11);
            }
        }
        let due = self.responder.next_psn();
        self.held
            .retain(|&n, _| Psn::new(n as u32).distance(Psn::new(due)) >= 0);
    }

    fn execute(&mut self, e: &Execution, payload: usize, outcome: u8) {
        let refusal = match outcome {
            0 => Some(Refusal::NotReady),
            1 => Some(Refusal::RemoteAccess),
            2 => Some(Refusal::InvalidRequest),
            3 => Some(Refusal::RemoteOperation),
            _ => None,
        };
        if e.take_recv && matches!(e.action, Action::Nothing | Action::Recv { offset: 0, .. }) {
            self.received = Some(0);
        }
        match e.action {
            Action::Recv { offset, len } => {
                assert_eq!(len as usize, payload);
                // Parts of one message follow each other.
                assert!(offset == 0 || self.received == Some(offset));
                assert!(u64::from(offset) + u64::from(len) <= 1 << 31);
                if refusal.is_none() {
                    self.received = Some(offset + len);
                }
            }
            Action::Write {
                total, offset, len, ..
            } => {
                assert_eq!(len as usize, payload);
                assert!(u64::from(offset) + u64::from(len) <= u64::from(total));
            }
            Action::Read { va, rkey, len } => {
                assert!(u64::from(len) <= 1 << 31);
                if refusal.is_none() {
                    self.readable.push((va, rkey, len));
                }
            }
            Action::Atomic { va, .. } | Action::AtomicWrite { va, .. } => assert_eq!(va % 8, 0),
            Action::Nothing | Action::Flush { .. } => assert_eq!(payload, 0),
        }
        if let Some(end) = e.end {
            assert!(u64::from(end.len) <= 1 << 31);
        }
        self.responder.finish(e, refusal.map_or(Ok(5), Err));
    }

    fn replies(&mut self, count: u8, segment: u32) {
        for _ in 0..count {
            let Some(reply) = self.responder.next_reply() else {
                break;
            };
            reply
                .headers
                .emit(&mut [0; 64])
                .expect("replies are well formed");
            if let Some(data) = reply.data {
                assert!(data.len <= segment);
                let inside = self.readable.iter().any(|&(va, rkey, len)| {
                    let offset = data.va.wrapping_sub(va);
                    rkey == data.rkey && offset.saturating_add(data.len.into()) <= len.into()
                });
                assert!(inside, "{data:?} was never allowed");
                if data.len % 7 == 3 {
                    self.responder.read_failed(&reply);
                }
            }
        }
    }

    fn step(&mut self, step: &Step, segment: u32) {
        let mut events = Vec::new();
        let mut payload = 0;
        self.now += 50_000;
        match step {
            Step::Post(opcode, len, fence) => {
                let word = opcode.is_word() || *opcode == Opcode::Flush;
                let work = Work {
                    va: 4096,
                    fence: *fence,
                    swap_add: FlushSpec::new(1, 0).unwrap().raw(),
                    ..Work::new(*opcode, if word { 8 } else { *len })
                };
                if let Ok(message) = self.requester.post(work) {
                    self.posted.insert(message.seq, work);
                }
            }
            Step::Send(count) => {
                for _ in 0..*count {
                    let packet = self.requester.next_packet(self.now, &mut events);
                    let Some(packet) = packet else { break };
                    packet
                        .headers
                        .emit(&mut [0; 64])
                        .expect("requests are well formed");
                    if let Some(part) = packet.payload {
                        let work = &self.posted[&part.message.seq];
                        let end = u64::from(part.offset) + u64::from(part.len);
                        assert!(end <= u64::from(work.len) && part.len <= segment);
                    }
                }
            }
            Step::Response(p) => {
                payload = p.payload;
                // Relative to what may be under way: the peer knows what it was sent.
                let base = self.next_due();
                let h = headers(p, base, self.qp_type, true);
                self.requester
                    .on_response(&h, payload, self.now, &mut events);
            }
            Step::Request(p, outcome) => {
                let h = headers(p, self.responder.next_psn(), self.qp_type, false);
                self.request(&h, p.payload, *outcome);
            }
            Step::Reply(count) => self.replies(*count, segment),
            Step::Timeout => {
                if let Some(at) = self.requester.next_timeout() {
                    self.now = self.now.max(at);
                }
                self.requester.on_timeout(self.now, &mut events);
            }
            Step::Abort(back) => {
                let seq = self.next_done + back;
                let status = freeflow_types::WcStatus::LocProtErr;
                self.requester.abort(seq, status, &mut events);
            }
            Step::Congestion => self.requester.on_congestion(),
        }
        self.events(events, payload);
    }

    /// The first sequence number of the oldest message that is not complete.
    fn next_due(&self) -> u32 {
        let segment = 1024;
        let open = self.posted.range(self.next_done..);
        let packets: u64 = open
            .map(|(_, w)| match w.opcode {
                Opcode::Flush => 1,
                _ => u64::from(w.len.div_ceil(segment).max(1)),
            })
            .sum();
        self.requester.next_psn().wrapping_sub(packets as u32)
    }
}

fn run(qp_type: QpType, selective: bool, psn: u32, resources: u8, steps: &[Step]) {
    let connection = Connection {
        segment: 1024,
        sq_psn: psn,
        rq_psn: psn,
        timeout: 10,
        retry_cnt: 7,
        rnr_retry: 3,
        min_rnr_timer: 1,
        max_rd_atomic: resources,
        max_dest_rd_atomic: resources,
        selective,
        ..Connection::new(qp_type, &QpAttr::default())
    };
    let mut sides = Sides {
        requester: Requester::new(&connection),
        responder: Responder::new(&connection),
        qp_type,
        posted: BTreeMap::new(),
        next_done: 0,
        failed: false,
        readable: Vec::new(),
        received: None,
        held: BTreeMap::new(),
        now: 0,
    };
    for step in steps {
        sides.step(step, connection.segment);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_peer_sends_breaks_a_connection(
        qp_type in prop_oneof![3 => Just(QpType::Rc), 1 => Just(QpType::Uc), 1 => Just(QpType::XrcSend)],
        selective: bool,
        psn in prop_oneof![Just(0xFF_FFF8u32), Just(0), any::<u32>()],
        resources in 0..4u8,
        steps in prop::collection::vec(step(), 1..80),
    ) {
        run(qp_type, selective, psn, resources, &steps);
    }
}
