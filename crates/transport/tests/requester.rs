//! What a requester sends, and what it makes of answers, packet by packet.

use freeflow_transport::{
    Connection, Message, Part, Requester, RequesterEvent as Event, Transmit, Work, WorkError,
    selective,
};
use freeflow_types::{Opcode, Psn, QpAttr, QpType, WcStatus, rnr_timer_ns, timeout_ns};
use freeflow_wire::{Aeth, Bth, BthOpcode, Headers, NakCode, Syndrome};

const FIRST: u32 = 0xFF_FFFE;
const SEGMENT: u32 = 1024;
const RTT: u64 = 50_000;

fn connection() -> Connection {
    Connection {
        segment: SEGMENT,
        sq_psn: FIRST,
        timeout: 14,
        retry_cnt: 2,
        rnr_retry: 1,
        max_rd_atomic: 2,
        ..Connection::new(QpType::Rc, &QpAttr::default())
    }
}

/// A requester, what it told, and the time.
struct Bench {
    requester: Requester,
    events: Vec<Event>,
    now: u64,
}

impl Bench {
    fn new(connection: &Connection) -> Self {
        Bench {
            requester: Requester::new(connection),
            events: Vec::new(),
            now: 1,
        }
    }

    fn post(&mut self, opcode: Opcode, len: u32) -> Message {
        let work = Work {
            va: 1 << 20,
            rkey: 5,
            ..Work::new(opcode, len)
        };
        self.requester.post(work).unwrap()
    }

    fn send(&mut self) -> Vec<Transmit> {
        std::iter::from_fn(|| self.requester.next_packet(self.now, &mut self.events)).collect()
    }

    /// Sequence numbers, after the first, of what is sent.
    fn sent(&mut self) -> Vec<i32> {
        let number = |t: &Transmit| t.headers.bth.psn.distance(Psn::new(FIRST));
        self.send().iter().map(number).collect()
    }

    fn answer(
        &mut self,
        opcode: BthOpcode,
        at: i32,
        syndrome: Syndrome,
        payload: usize,
    ) -> Vec<Event> {
        let psn = Psn::new(FIRST.wrapping_add_signed(at));
        let mut h = Headers::new(Bth::new(opcode, 1, psn));
        h.aeth = Some(Aeth { syndrome, msn: 0 });
        h.atomic_ack = opcode.has_atomic_ack().then_some(99);
        self.requester
            .on_response(&h, payload, self.now, &mut self.events);
        std::mem::take(&mut self.events)
    }

    fn ack(&mut self, at: i32) -> Vec<Event> {
        self.answer(BthOpcode::RC_ACK, at, Syndrome::ACK, 0)
    }

    /// A router holds `at`, and waits for `gap`.
    fn holds(&mut self, gap: i32, at: i32) {
        let psn = |at| Psn::new(FIRST.wrapping_add_signed(at));
        let mut h = Headers::new(Bth::new(BthOpcode::RC_ATOMIC_ACK, 1, psn(gap - 1)));
        h.aeth = Some(Aeth {
            syndrome: Syndrome::Reserved(0x40),
            msn: psn(at).get(),
        });
        h.atomic_ack = Some(1);
        self.requester
            .on_response(&h, 0, self.now, &mut self.events);
    }

    fn nak(&mut self, at: i32, code: NakCode) -> Vec<Event> {
        self.answer(BthOpcode::RC_ACK, at, Syndrome::Nak(code), 0)
    }

    fn data(&mut self, at: i32, payload: usize) -> Vec<Event> {
        self.answer(BthOpcode::RC_READ_RESPONSE_ONLY, at, Syndrome::ACK, payload)
    }

    fn timeout(&mut self) -> Vec<Event> {
        self.now = self.requester.next_timeout().expect("a timer runs");
        self.requester.on_timeout(self.now, &mut self.events);
        std::mem::take(&mut self.events)
    }
}

#[test]
fn messages_become_packets() {
    let mut b = Bench::new(&connection());
    let message = b.post(Opcode::SendImm, 2500);
    b.post(Opcode::RdmaWrite, 0);
    let sent = b.send();
    let opcodes: Vec<_> = sent.iter().map(|t| t.headers.bth.opcode).collect();
    assert_eq!(
        opcodes,
        [
            BthOpcode::RC_SEND_FIRST,
            BthOpcode::RC_SEND_MIDDLE,
            BthOpcode::RC_SEND_LAST_IMM,
            BthOpcode::RC_WRITE_ONLY,
        ]
    );
    let part = Part {
        message,
        offset: 2048,
        len: 452,
    };
    assert_eq!(sent[2].payload, Some(part));
    assert_eq!(sent[3].payload, None);
    // Only what ends the burst asks for an answer.
    let asks: Vec<_> = sent.iter().map(|t| t.headers.bth.ack_req).collect();
    assert_eq!(asks, [false, false, false, true]);
    assert_eq!(b.ack(3).len(), 2);
    assert!(b.requester.is_idle());
    assert_eq!(b.requester.next_timeout(), None);
}

#[test]
fn an_acknowledgement_completes_all_before_it_in_order() {
    let mut b = Bench::new(&connection());
    let messages: Vec<_> = (0..4).map(|_| b.post(Opcode::Send, 10)).collect();
    b.send();
    let done: Vec<_> = messages[..3].iter().map(|&m| Event::Complete(m)).collect();
    assert_eq!(b.ack(2), done);
    // Old, doubled, and never sent.
    for at in [-1, 0, 2, 4, 100, 1 << 22] {
        assert_eq!(b.ack(at), []);
    }
    assert_eq!(b.requester.outstanding(), 1);
}

#[test]
fn a_sequence_error_goes_back_to_the_gap_once() {
    let mut b = Bench::new(&connection());
    b.post(Opcode::RdmaWrite, 6 * SEGMENT);
    assert_eq!(b.sent(), [0, 1, 2, 3, 4, 5]);
    b.now += RTT;
    b.nak(2, NakCode::PsnSequence);
    assert_eq!(b.sent(), [2, 3, 4, 5]);
    b.nak(2, NakCode::PsnSequence);
    assert_eq!(b.sent(), []);
    // Acknowledgement of what was overtaken spares it.
    b.now += RTT;
    b.nak(4, NakCode::PsnSequence);
    b.ack(4);
    assert_eq!(b.sent(), [5]);
}

#[test]
fn reads_are_asked_for_in_pieces_within_the_grant() {
    let mut b = Bench::new(&connection());
    let message = b.post(Opcode::RdmaRead, 20 * SEGMENT);
    // Two are granted, and together they fill the window.
    let sent = b.send();
    assert_eq!(sent.len(), 2);
    let reth = sent[1].headers.reth.unwrap();
    assert_eq!((reth.va, reth.len), ((1 << 20) + 8 * 1024, 8 * SEGMENT));
    assert_eq!(sent[1].payload, None);
    for at in 0..8 {
        let events = b.data(at, SEGMENT as usize);
        let part = Part {
            message,
            offset: at as u32 * SEGMENT,
            len: SEGMENT,
        };
        assert_eq!(events, [Event::Place(part)]);
    }
    let last = b.send();
    assert_eq!(last.len(), 1);
    let reth = last[0].headers.reth.unwrap();
    assert_eq!((reth.va, reth.len), ((1 << 20) + 16 * 1024, 4 * SEGMENT));
}

#[test]
fn no_more_answers_are_due_than_were_granted() {
    let mut b = Bench::new(&connection());
    for _ in 0..3 {
        b.post(Opcode::FetchAdd, 8);
    }
    b.post(Opcode::Send, 0);
    assert_eq!(b.sent(), [0, 1]);
    let events = b.answer(BthOpcode::RC_ATOMIC_ACK, 0, Syndrome::ACK, 0);
    assert!(matches!(events[0], Event::Atomic { value: 99, .. }));
    assert!(matches!(events[1], Event::Complete(_)));
    assert_eq!(b.sent(), [2, 3]);
}

#[test]
fn a_fence_waits_for_reads() {
    let mut b = Bench::new(&connection());
    b.post(Opcode::RdmaRead, 10);
    b.post(Opcode::Send, 10);
    let fenced = Work {
        fence: true,
        ..Work::new(Opcode::Send, 10)
    };
    b.requester.post(fenced).unwrap();
    assert_eq!(b.sent(), [0, 1]);
    b.data(0, 10);
    assert_eq!(b.sent(), [2]);
}

#[test]
fn an_acknowledgement_beyond_an_answer_says_that_it_was_lost() {
    let mut b = Bench::new(&connection());
    b.post(Opcode::RdmaRead, 3 * SEGMENT);
    b.post(Opcode::Send, 10);
    assert_eq!(b.sent(), [0, 3]);
    assert_eq!(b.data(0, SEGMENT as usize).len(), 1);
    assert_eq!(b.ack(3), []);
    let again = b.send();
    let reth = again[0].headers.reth.unwrap();
    assert_eq!((reth.va, reth.len), ((1 << 20) + 1024, 2 * SEGMENT));
    assert_eq!(again.len(), 2);
    // The peer says it again: the requester has gone back already.
    assert_eq!(b.ack(3), []);
    assert_eq!(b.sent(), []);
}

#[test]
fn refusals_fail_their_message_after_those_before_it() {
    for (code, status) in [
        (NakCode::InvalidRequest, WcStatus::RemInvReqErr),
        (NakCode::RemoteAccess, WcStatus::RemAccessErr),
        (NakCode::RemoteOperation, WcStatus::RemOpErr),
    ] {
        let mut b = Bench::new(&connection());
        let (first, second) = (b.post(Opcode::Send, 10), b.post(Opcode::RdmaWrite, 5000));
        b.post(Opcode::Send, 10);
        b.send();
        let events = b.nak(3, code);
        assert_eq!(
            events,
            [Event::Complete(first), Event::Failed(second, status)]
        );
        assert!(b.requester.is_dead());
        assert_eq!(b.ack(6), []);
        assert_eq!(b.sent(), []);
        assert_eq!(b.requester.next_timeout(), None);
    }
}

#[test]
fn a_response_of_another_length_is_a_bad_one() {
    let mut b = Bench::new(&connection());
    let message = b.post(Opcode::RdmaRead, 100);
    b.send();
    let bad = Event::Failed(message, WcStatus::BadRespErr);
    assert_eq!(b.data(0, 99), [bad]);
}

#[test]
fn a_peer_that_is_not_ready_gets_its_time() {
    let mut b = Bench::new(&connection());
    let message = b.post(Opcode::Send, 10);
    b.post(Opcode::Send, 10);
    assert_eq!(b.sent(), [0, 1]);
    let rnr = Syndrome::RnrNak { timer: 12 };
    b.answer(BthOpcode::RC_ACK, 0, rnr, 0);
    assert_eq!(b.sent(), []);
    assert_eq!(b.requester.next_timeout(), Some(b.now + rnr_timer_ns(12)));
    b.timeout();
    assert_eq!(b.sent(), [0, 1]);
    // One retry was granted.
    let events = b.answer(BthOpcode::RC_ACK, 0, rnr, 0);
    assert_eq!(events, [Event::Failed(message, WcStatus::RnrRetryExcErr)]);
}

#[test]
fn silence_is_probed_and_counted() {
    let mut b = Bench::new(&connection());
    let message = b.post(Opcode::Send, 10);
    let start = b.now;
    assert_eq!(b.sent(), [0]);
    let mut copies = 0;
    let failed = loop {
        let events = b.timeout();
        if !events.is_empty() {
            break events;
        }
        copies += b.sent().len();
    };
    assert_eq!(failed, [Event::Failed(message, WcStatus::RetryExcErr)]);
    assert_eq!(b.now - start, 3 * timeout_ns(14).unwrap());
    assert!(copies > 2, "{copies}");
}

#[test]
fn without_a_timeout_probes_go_on_for_ever() {
    let mut b = Bench::new(&Connection {
        timeout: 0,
        ..connection()
    });
    b.post(Opcode::Send, 10);
    b.send();
    for _ in 0..100 {
        assert_eq!(b.timeout(), []);
        assert_eq!(b.sent(), [0]);
    }
}

/// Posts so many SENDs together, each answered after `time`; how many packets are sent more than
/// once.
fn exchange(b: &mut Bench, at: &mut i32, batch: i32, time: u64) -> usize {
    let sent: Vec<_> = (*at..*at + batch).collect();
    for _ in &sent {
        b.post(Opcode::Send, 10);
    }
    assert_eq!(b.sent(), sent);
    let (answered, mut copies) = (b.now + time, 0);
    while b.requester.next_timeout().is_some_and(|t| t < answered) {
        assert_eq!(b.timeout(), []);
        copies += b.send().len();
    }
    b.now = answered;
    for psn in sent {
        assert_eq!(b.ack(psn).len(), 1);
    }
    *at += batch;
    copies
}

fn patient(selective: bool) -> Bench {
    Bench::new(&Connection {
        selective,
        timeout: 20,
        ..connection()
    })
}

#[test]
fn a_round_trip_that_has_grown_is_measured_anew() {
    for selective in [false, true] {
        for (batch, longer) in [(1, 100), (2, 100), (2, 1000), (5, 5000)] {
            let (mut b, mut at) = (patient(selective), 0);
            assert_eq!(exchange(&mut b, &mut at, batch, RTT), 0);
            assert_ne!(exchange(&mut b, &mut at, batch, longer * RTT), 0);
            // One flight tells how long to wait; then the estimate follows.
            for _ in 0..10 {
                exchange(&mut b, &mut at, batch, longer * RTT);
            }
            for _ in 0..10 {
                assert_eq!(exchange(&mut b, &mut at, batch, longer * RTT), 0);
            }
            assert!(b.requester.round_trip().unwrap() > longer / 2 * RTT);
        }
    }
}

#[test]
fn a_long_round_trip_is_measured_from_the_start() {
    const MS: u64 = 1_000_000;
    for selective in [false, true] {
        for (batch, time) in [(1, 25), (1, 40), (1, 80), (2, 40), (1, 600)] {
            let (mut b, mut at) = (patient(selective), 0);
            assert_ne!(exchange(&mut b, &mut at, batch, time * MS), 0);
            for _ in 0..10 {
                assert_eq!(exchange(&mut b, &mut at, batch, time * MS), 0);
            }
            assert_eq!(b.requester.round_trip(), Some(time * MS));
        }
    }
}

#[test]
fn nothing_is_sent_that_the_peer_cannot_hold_behind_a_gap() {
    // Headers count, and the oldest itself.
    let bytes = selective::HELD_BYTES / (8192 + 80) - 1;
    for (segment, held) in [(SEGMENT, selective::WINDOW as i32), (8192, bytes as i32)] {
        let mut b = Bench::new(&Connection {
            selective: true,
            segment,
            ..connection()
        });
        b.post(Opcode::RdmaWrite, 6000 * segment);
        let mut flight = b.sent();
        while flight.len() < 1000 {
            b.now += RTT;
            b.ack(*flight.last().unwrap());
            flight = b.sent();
        }
        let (lost, last) = (flight[0], *flight.last().unwrap());
        b.now += RTT;
        let mut copies = Vec::new();
        for at in lost + 1..=lost + held {
            b.holds(lost, at);
            copies.extend(b.sent());
        }
        // The gap, and neither what was dropped nor what would be.
        assert_eq!(copies, [lost]);
        b.now += RTT;
        b.ack(lost + held);
        let again: Vec<_> = (lost + held + 1..=last).collect();
        let (mut sent, mut oldest) = (Vec::new(), lost + held + 1);
        loop {
            let next = b.sent();
            let far = |&&psn: &&i32| psn <= last && psn > oldest + held;
            assert_eq!(next.iter().find(far), None, "beyond {oldest}");
            sent.extend(next);
            if sent.len() >= again.len() {
                break;
            }
            b.now += RTT;
            oldest = *sent.last().unwrap() + 1;
            b.ack(oldest - 1);
        }
        assert_eq!(sent[..again.len()], again);
    }
}

#[test]
fn what_cannot_be_read_here_fails_when_its_turn_comes() {
    let mut b = Bench::new(&connection());
    let (first, second) = (b.post(Opcode::Send, 10), b.post(Opcode::Send, 10));
    b.post(Opcode::Send, 10);
    let status = WcStatus::LocProtErr;
    assert!(b.requester.abort(second.seq, status, &mut b.events));
    assert_eq!(b.sent(), [0]);
    let events = b.ack(0);
    assert_eq!(
        events,
        [Event::Complete(first), Event::Failed(second, status)]
    );
    assert!(!b.requester.abort(first.seq, status, &mut b.events));
}

#[test]
fn what_the_service_does_not_have_is_refused() {
    let uc = Connection {
        qp_type: QpType::Uc,
        ..connection()
    };
    for (connection, opcode) in [
        (connection(), Opcode::BindMw),
        (connection(), Opcode::LocalInv),
        (uc, Opcode::RdmaRead),
        // The verbs have it, the standard's packets do not.
        (uc, Opcode::SendInv),
    ] {
        let refused = Requester::new(&connection).post(Work::new(opcode, 0));
        assert_eq!(refused, Err(WorkError::Opcode(opcode, connection.qp_type)));
    }
    let long = Work::new(Opcode::Send, (1 << 31) + 1);
    assert!(Requester::new(&connection()).post(long).is_err());
    let flush = Work::new(Opcode::Flush, 0);
    assert!(Requester::new(&connection()).post(flush).is_err());
}

#[test]
fn an_unreliable_message_is_complete_as_it_is_sent() {
    let mut b = Bench::new(&Connection {
        qp_type: QpType::Uc,
        ..connection()
    });
    let message = b.post(Opcode::RdmaWrite, 1500);
    assert_eq!(b.sent(), [0, 1]);
    assert_eq!(b.events, [Event::Complete(message)]);
    assert_eq!(b.requester.next_timeout(), None);
}

#[test]
fn a_notification_shrinks_the_window_once_a_round_trip() {
    let mut b = Bench::new(&connection());
    b.post(Opcode::RdmaWrite, 8 * SEGMENT);
    let before = b.requester.window();
    b.send();
    let cnp = Headers::new(Bth::new(BthOpcode::CNP, 1, Psn::new(0)));
    for _ in 0..3 {
        b.requester.on_response(&cnp, 0, b.now, &mut b.events);
    }
    let once = b.requester.window();
    assert!(once < before && once > before / 2);
    b.ack(7);
    b.post(Opcode::RdmaWrite, 8 * SEGMENT);
    b.send();
    b.requester.on_response(&cnp, 0, b.now, &mut b.events);
    assert!(b.requester.window() < once);
}

#[test]
fn an_idle_connection_is_small() {
    let mut b = Bench::new(&connection());
    b.post(Opcode::RdmaWrite, 10);
    b.send();
    b.ack(0);
    // Tens of thousands of queue pairs are idle most of the time.
    assert!(size_of::<Requester>() <= 512);
    assert!(size_of::<freeflow_transport::Responder>() <= 256);
}
