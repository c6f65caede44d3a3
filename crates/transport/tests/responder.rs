//! What a responder answers, packet by packet.

use freeflow_transport::{
    Action, Connection, Dropped, Execution, ReadData, Refusal, Responder, Verdict,
};
use freeflow_types::{Psn, QpAttr, QpType};
use freeflow_wire::{AtomicEth, Bth, BthOpcode, Headers, NakCode, Reth, Syndrome};

const FIRST: u32 = 0xFF_FFFE;
const SEGMENT: u32 = 1024;

fn responder(selective: bool) -> Responder {
    Responder::new(&Connection {
        segment: SEGMENT,
        rq_psn: FIRST,
        min_rnr_timer: 7,
        max_dest_rd_atomic: 2,
        selective,
        ..Connection::new(QpType::Rc, &QpAttr::default())
    })
}

fn packet(opcode: BthOpcode, at: u32) -> Headers {
    let mut h = Headers::new(Bth::new(opcode, 1, Psn::new(FIRST).add(at)));
    h.bth.ack_req = true;
    h
}

fn read(at: u32, va: u64, len: u32) -> Headers {
    let mut h = packet(BthOpcode::RC_READ_REQUEST, at);
    h.reth = Some(Reth { va, rkey: 5, len });
    h
}

fn fetch_add(at: u32) -> Headers {
    let mut h = packet(BthOpcode::RC_FETCH_ADD, at);
    h.atomic = Some(AtomicEth {
        va: 64,
        rkey: 5,
        swap_add: 1,
        compare: 0,
    });
    h
}

fn execution(r: &mut Responder, h: &Headers, payload: usize) -> Execution {
    match r.on_request(h, payload) {
        Verdict::Execute(e) => e,
        other => panic!("{other:?}"),
    }
}

fn execute(r: &mut Responder, h: &Headers, payload: usize, value: u64) {
    let e = execution(r, h, payload);
    r.finish(&e, Ok(value));
}

/// Sequence number after the first, syndrome or result, and data, of each answer.
fn replies(r: &mut Responder) -> Vec<(i32, BthOpcode, Option<Syndrome>, Option<ReadData>)> {
    std::iter::from_fn(|| r.next_reply())
        .map(|r| {
            let h = r.headers;
            let at = h.bth.psn.distance(Psn::new(FIRST));
            (at, h.bth.opcode, h.aeth.map(|a| a.syndrome), r.data)
        })
        .collect()
}

fn ack(at: i32, syndrome: Syndrome) -> (i32, BthOpcode, Option<Syndrome>, Option<ReadData>) {
    (at, BthOpcode::RC_ACK, Some(syndrome), None)
}

const SEQUENCE: Syndrome = Syndrome::Nak(NakCode::PsnSequence);

#[test]
fn acknowledgements_coalesce_and_count_messages() {
    let mut r = responder(false);
    for at in 0..3 {
        execute(&mut r, &packet(BthOpcode::RC_SEND_ONLY, at), 10, 0);
    }
    let reply = r.next_reply().unwrap();
    assert_eq!(reply.headers.aeth.unwrap().msn, 3);
    assert_eq!(reply.headers.bth.psn, Psn::new(FIRST).add(2));
    assert_eq!(r.next_reply(), None);
    // Not asked for, not given.
    let mut quiet = packet(BthOpcode::RC_SEND_ONLY, 3);
    quiet.bth.ack_req = false;
    execute(&mut r, &quiet, 0, 0);
    assert_eq!(r.next_reply(), None);
}

#[test]
fn a_gap_is_reported_once() {
    let mut r = responder(false);
    let send = |at| packet(BthOpcode::RC_SEND_ONLY, at);
    for at in [2, 3, 4] {
        assert_eq!(
            r.on_request(&send(at), 0),
            Verdict::Drop(Dropped::OutOfSequence)
        );
    }
    assert_eq!(replies(&mut r), [ack(0, SEQUENCE)]);
    r.on_request(&send(2), 0);
    assert_eq!(replies(&mut r), []);
    // The gap closes before it is reported: then it is not.
    execute(&mut r, &send(0), 0, 0);
    r.on_request(&send(2), 0);
    execute(&mut r, &send(1), 0, 0);
    assert_eq!(replies(&mut r), [ack(1, Syndrome::ACK)]);
    r.on_request(&send(5), 0);
    assert_eq!(replies(&mut r), [ack(2, SEQUENCE)]);
}

#[test]
fn duplicates_are_acknowledged_and_not_executed() {
    let mut r = responder(false);
    for at in 0..2 {
        execute(&mut r, &packet(BthOpcode::RC_SEND_ONLY, at), 10, 0);
    }
    replies(&mut r);
    let again = r.on_request(&packet(BthOpcode::RC_SEND_ONLY, 0), 10);
    assert_eq!(again, Verdict::Drop(Dropped::Duplicate));
    assert_eq!(replies(&mut r), [ack(1, Syndrome::ACK)]);
}

#[test]
fn a_receiver_that_is_not_ready_waits_for_that_packet() {
    let mut r = responder(false);
    let send = packet(BthOpcode::RC_SEND_ONLY, 0);
    let e = execution(&mut r, &send, 10);
    assert!(e.take_recv && e.starts);
    r.finish(&e, Err(Refusal::NotReady));
    // What follows is dropped without a word.
    r.on_request(&packet(BthOpcode::RC_SEND_ONLY, 1), 10);
    assert_eq!(replies(&mut r), [ack(0, Syndrome::RnrNak { timer: 7 })]);
    r.on_request(&packet(BthOpcode::RC_SEND_ONLY, 1), 10);
    assert_eq!(replies(&mut r), []);
    execute(&mut r, &send, 10, 0);
    assert_eq!(replies(&mut r), [ack(0, Syndrome::ACK)]);
}

#[test]
fn answers_come_in_order_and_acknowledge_what_is_before_them() {
    let mut r = responder(false);
    execute(&mut r, &packet(BthOpcode::RC_SEND_ONLY, 0), 10, 0);
    execute(&mut r, &read(1, 1 << 20, 2500), 0, 0);
    execute(&mut r, &packet(BthOpcode::RC_SEND_ONLY, 4), 10, 0);
    execute(&mut r, &fetch_add(5), 0, 77);
    execute(&mut r, &packet(BthOpcode::RC_SEND_ONLY, 6), 10, 0);
    let got = replies(&mut r);
    let numbers: Vec<i32> = got.iter().map(|g| g.0).collect();
    assert_eq!(numbers, [1, 2, 3, 5, 6]);
    let opcodes: Vec<BthOpcode> = got.iter().map(|g| g.1).collect();
    assert_eq!(
        opcodes,
        [
            BthOpcode::RC_READ_RESPONSE_FIRST,
            BthOpcode::RC_READ_RESPONSE_MIDDLE,
            BthOpcode::RC_READ_RESPONSE_LAST,
            BthOpcode::RC_ATOMIC_ACK,
            BthOpcode::RC_ACK,
        ]
    );
    let last = got[2].3.unwrap();
    assert_eq!((last.va, last.len), ((1 << 20) + 2048, 452));
}

#[test]
fn reads_and_atomics_are_replayed_as_they_were() {
    let mut r = responder(false);
    execute(&mut r, &read(0, 1 << 20, 4000), 0, 0);
    execute(&mut r, &fetch_add(4), 0, 77);
    replies(&mut r);
    // A part of the READ, from the packet that was lost.
    r.on_request(&read(2, (1 << 20) + 2048, 1952), 0);
    let got = replies(&mut r);
    assert_eq!(got.iter().map(|g| g.0).collect::<Vec<_>>(), [2, 3]);
    let va = (1 << 20) + 2048;
    assert_eq!(
        got[0].3,
        Some(ReadData {
            va,
            rkey: 5,
            len: 1024
        })
    );
    // The atomic has its old result.
    r.on_request(&fetch_add(4), 0);
    assert_eq!(r.next_reply().unwrap().headers.atomic_ack, Some(77));
    // Other memory, more of it, or another key, under a number that was granted: nothing.
    let mut other_key = read(0, 1 << 20, 4000);
    other_key.reth = other_key.reth.map(|r| Reth { rkey: 6, ..r });
    let more = read(2, (1 << 20) + 2048, 1953);
    for forged in [read(2, 1 << 20, 1952), more, other_key, fetch_add(0)] {
        assert_eq!(r.on_request(&forged, 0), Verdict::Drop(Dropped::Duplicate));
        assert_eq!(replies(&mut r), []);
    }
    // Two are remembered, a third displaces the first.
    execute(&mut r, &fetch_add(5), 0, 78);
    replies(&mut r);
    r.on_request(&read(0, 1 << 20, 4000), 0);
    assert_eq!(replies(&mut r), []);
}

#[test]
fn requests_beyond_what_was_granted_are_invalid() {
    let mut r = responder(false);
    execute(&mut r, &read(0, 0, 1), 0, 0);
    execute(&mut r, &read(1, 0, 1), 0, 0);
    assert_eq!(r.on_request(&read(2, 0, 1), 0), Verdict::Invalid);
    let refusal = Syndrome::Nak(NakCode::InvalidRequest);
    assert_eq!(replies(&mut r).last(), Some(&ack(2, refusal)));
}

#[test]
fn packets_that_make_no_message_are_invalid() {
    let write = |opcode, at, len| {
        let mut h = packet(opcode, at);
        h.reth = opcode.has_reth().then_some(Reth {
            va: 0,
            rkey: 5,
            len,
        });
        h
    };
    use BthOpcode as B;
    let segment = SEGMENT as usize;
    // Each is a first packet that is taken, if there is one, and then one that is not.
    type Step = (BthOpcode, u32, usize);
    let cases: &[(Option<Step>, Step)] = &[
        (None, (B::RC_SEND_MIDDLE, 0, segment)),
        (None, (B::RC_SEND_LAST, 0, 1)),
        (None, (B::RC_SEND_FIRST, 0, segment - 1)),
        (None, (B::RC_SEND_ONLY, 0, segment + 1)),
        (None, (B::RC_WRITE_ONLY, 9, 10)),
        (None, (B::RC_WRITE_ONLY, 11, 10)),
        (None, (B::RC_WRITE_FIRST, SEGMENT, segment)),
        (None, (B::RC_WRITE_FIRST, (1 << 31) + 1, segment)),
        (None, (B::RC_READ_REQUEST, (1 << 31) + 1, 0)),
        (None, (B::RC_READ_REQUEST, 1, 1)),
        (
            Some((B::RC_SEND_FIRST, 0, segment)),
            (B::RC_SEND_LAST, 0, 0),
        ),
        (
            Some((B::RC_SEND_FIRST, 0, segment)),
            (B::RC_SEND_ONLY, 0, 1),
        ),
        (
            Some((B::RC_SEND_FIRST, 0, segment)),
            (B::RC_WRITE_LAST, 0, 1),
        ),
        (
            Some((B::RC_SEND_FIRST, 0, segment)),
            (B::RC_READ_REQUEST, 1, 0),
        ),
        (
            Some((B::RC_WRITE_FIRST, 1030, segment)),
            (B::RC_WRITE_LAST, 0, 5),
        ),
        (
            Some((B::RC_WRITE_FIRST, 1030, segment)),
            (B::RC_WRITE_LAST, 0, 7),
        ),
        (
            Some((B::RC_WRITE_FIRST, 1030, segment)),
            (B::RC_WRITE_MIDDLE, 0, segment),
        ),
        (
            Some((B::RC_WRITE_FIRST, 1030, segment)),
            (B::RC_SEND_LAST, 0, 6),
        ),
    ];
    for (good, (opcode, len, payload)) in cases {
        let mut r = responder(false);
        if let Some((opcode, len, payload)) = good {
            execute(&mut r, &write(*opcode, 0, *len), *payload, 0);
        }
        let at = u32::from(good.is_some());
        let verdict = r.on_request(&write(*opcode, at, *len), *payload);
        assert_eq!(verdict, Verdict::Invalid, "{opcode} {len} {payload}");
        let refusal = Syndrome::Nak(NakCode::InvalidRequest);
        assert_eq!(replies(&mut r), [ack(at as i32, refusal)]);
        // If it is lost, it comes again; and nothing is executed any more.
        let again = r.on_request(&packet(BthOpcode::RC_SEND_ONLY, at), 0);
        assert_eq!(again, Verdict::Drop(Dropped::Failed));
        assert_eq!(replies(&mut r), [ack(at as i32, refusal)]);
    }
    let mut unaligned = fetch_add(0);
    unaligned.atomic = unaligned.atomic.map(|a| AtomicEth { va: 65, ..a });
    assert_eq!(responder(false).on_request(&unaligned, 0), Verdict::Invalid);
}

#[test]
fn a_write_tells_where_each_part_goes() {
    let mut r = responder(false);
    let mut first = packet(BthOpcode::RC_WRITE_FIRST, 0);
    first.reth = Some(Reth {
        va: 7,
        rkey: 5,
        len: 1030,
    });
    execute(&mut r, &first, 1024, 0);
    let mut last = packet(BthOpcode::RC_WRITE_LAST_IMM, 1);
    last.imm = Some([1, 2, 3, 4]);
    let e = execution(&mut r, &last, 6);
    let action = Action::Write {
        va: 7,
        rkey: 5,
        total: 1030,
        offset: 1024,
        len: 6,
    };
    assert_eq!((e.action, e.take_recv, e.starts), (action, true, false));
    let end = e.end.unwrap();
    assert_eq!((end.len, end.imm), (1030, Some([1, 2, 3, 4])));
}

#[test]
fn memory_that_is_withdrawn_under_a_read_is_an_access_error() {
    let mut r = responder(false);
    execute(&mut r, &read(0, 0, 3000), 0, 0);
    execute(&mut r, &packet(BthOpcode::RC_SEND_ONLY, 3), 0, 0);
    assert!(r.next_reply().is_some());
    let second = r.next_reply().unwrap();
    r.read_failed(&second);
    assert!(r.has_failed());
    let refusal = Syndrome::Nak(NakCode::RemoteAccess);
    assert_eq!(replies(&mut r), [ack(1, refusal)]);
}

#[test]
fn early_packets_are_held_and_asked_for_in_order() {
    let mut r = responder(true);
    let send = |at| packet(BthOpcode::RC_SEND_ONLY, at);
    let Verdict::Hold(number) = r.on_request(&send(2), 0) else {
        panic!("it is not held");
    };
    // There was no room: nothing is promised, and nothing asked for.
    assert_eq!(replies(&mut r), []);
    r.hold(number);
    assert_eq!(r.on_request(&send(2), 0), Verdict::Drop(Dropped::Duplicate));
    let report = replies(&mut r);
    assert_eq!(report.len(), 1);
    assert_eq!((report[0].0, report[0].1), (-1, BthOpcode::RC_ATOMIC_ACK));
    assert_eq!(r.next_held(), None);
    execute(&mut r, &send(0), 0, 0);
    execute(&mut r, &send(1), 0, 0);
    assert_eq!(r.next_held(), Some(number));
    execute(&mut r, &send(2), 0, 0);
    assert_eq!(r.next_held(), None);
    assert_eq!(replies(&mut r), [ack(2, Syndrome::ACK)]);
    // Beyond the window there is no holding.
    let far = send(3 + freeflow_transport::selective::WINDOW as u32 + 1);
    assert_eq!(r.on_request(&far, 0), Verdict::Drop(Dropped::OutOfSequence));
    // The peer learns of the gap in the standard's words as long as nothing is held.
    assert_eq!(replies(&mut r), [ack(3, SEQUENCE)]);
    execute(&mut r, &send(3), 0, 0);
    let Verdict::Hold(number) = r.on_request(&send(5), 0) else {
        panic!("it is not held");
    };
    r.hold(number);
    replies(&mut r);
    let far = send(4 + freeflow_transport::selective::WINDOW as u32 + 1);
    assert_eq!(r.on_request(&far, 0), Verdict::Drop(Dropped::OutOfSequence));
    assert_eq!(replies(&mut r), []);
}

#[test]
fn congestion_is_notified_and_not_too_often() {
    let mut r = responder(false);
    for now in [1, 2, 40_000] {
        r.on_mark(now);
    }
    let cnp = r.next_reply().unwrap().headers;
    assert_eq!((cnp.bth.opcode, cnp.bth.becn), (BthOpcode::CNP, true));
    cnp.emit(&mut [0; 64]).expect("it is well formed");
    assert_eq!(r.next_reply(), None);
    r.on_mark(60_000);
    assert!(r.next_reply().is_some());
}
