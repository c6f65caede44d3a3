//! Packets that somebody makes who can use the peer's host's address and knows nearly all of a
//! connection: none of them delivers anything that is not its sender's to give.

use freeflow_shm::SendEntry;
use freeflow_tests::packets::{body, packet, say, sealed};
use freeflow_tests::rig::{CAP, IOVA, RawQp, Rig, join};
use freeflow_tests::{DEADLINE, Hosts, wait_until};
use freeflow_types::{Opcode, Psn, QpAttr, QpAttrMask, QpState, QpType, WcStatus};
use freeflow_wire::{Aeth, AtomicEth, Bth, BthOpcode, Feth, Headers, Reth, Syndrome, tenant_pkey};

const PAGES: u64 = 1 << 16;
const HERE: &str = Hosts::ADDRESSES[0];
/// Who speaks as the peer's host.
const FORGER: (&str, u16) = (Hosts::ADDRESSES[1], 50_000);

/// A victim on the first host, connected with a peer on the second.
struct Scene {
    hosts: Hosts,
    victim: Rig,
    qp: RawQp,
    peer: Rig,
    to: RawQp,
}

impl Scene {
    fn new(test: &str) -> Option<Scene> {
        if !Hosts::can(test) {
            return None;
        }
        let hosts = Hosts::new(9000).unwrap();
        let rig = |host: usize| {
            let lasting = hosts.bed(host).lasting_endpoint("default").unwrap();
            Rig::new(&lasting.socket, PAGES).unwrap()
        };
        let (mut victim, mut peer) = (rig(0), rig(1));
        let (qp, to) = connection(&mut victim, &mut peer);
        victim.fill(0, &canaries()).unwrap();
        Some(Scene {
            hosts,
            victim,
            qp,
            peer,
            to,
        })
    }

    /// The peer sends a message; who takes it sees it.
    fn message(&mut self) {
        let into = self.victim.sge(0, 64);
        self.victim.recv(&mut self.qp, 1, &[into]).unwrap();
        self.send();
        let got = self.victim.completion(DEADLINE).unwrap();
        assert_eq!((got.wr_id, got.byte_len), (1, 64));
        self.victim.fill(0, &canaries()).unwrap();
    }

    fn send(&mut self) {
        let entry = SendEntry {
            wr_id: 2,
            opcode: Opcode::Send.raw() as u8,
            num_sge: 1,
            ..SendEntry::default()
        };
        let from = self.peer.sge(0, 64);
        self.peer.send(&mut self.to, &entry, &[from]).unwrap();
        let done = self.peer.completion(DEADLINE).unwrap();
        assert_eq!(done.status, WcStatus::Success.raw() as u8);
    }

    fn drops(&self) -> serde_json::Map<String, serde_json::Value> {
        let status = self.hosts.bed(0).status().unwrap();
        status["fabric"]["drops"].as_object().unwrap().clone()
    }

    /// Sends packets to the victim's host, which must count so many as dropped for that reason and
    /// none for another.
    fn dropped(&self, reason: &str, n: u64, packets: &[Vec<u8>]) {
        let before = self.drops();
        say(&self.hosts, env!("CARGO_BIN_EXE_say-udp"), FORGER, packets).unwrap();
        let mut now = before.clone();
        let all = |drops: &serde_json::Map<String, serde_json::Value>| -> u64 {
            drops.values().filter_map(serde_json::Value::as_u64).sum()
        };
        wait_until(&format!("{n} dropped as {reason}"), DEADLINE, || {
            now = self.drops();
            all(&now) >= all(&before) + n
        })
        .unwrap_or_else(|e| panic!("{e}: {before:?} became {now:?}"));
        let mut wanted = before;
        let count = wanted[reason].as_u64().unwrap();
        wanted.insert(reason.to_owned(), (count + n).into());
        assert_eq!(now, wanted, "{reason}");
    }

    /// Nothing has come to the victim.
    fn nothing_came(&mut self) {
        assert!(self.victim.cq.poll().unwrap().is_none(), "a completion");
        assert_eq!(self.victim.bytes(0, PAGES as usize).unwrap(), canaries());
    }
}

fn canaries() -> Vec<u8> {
    (0..PAGES).map(|at| (at * 7 + 1) as u8).collect()
}

/// Two connected queue pairs of two rigs.
fn connection(a: &mut Rig, b: &mut Rig) -> (RawQp, RawQp) {
    let (x, y) = (
        a.qp(QpType::Rc, CAP).unwrap(),
        b.qp(QpType::Rc, CAP).unwrap(),
    );
    join((a, &x), (b, &y)).unwrap();
    (x, y)
}

/// A request of the right tenant.
fn request(opcode: BthOpcode, qp: &RawQp, psn: u32) -> Headers {
    let mut headers = Headers::new(Bth::new(opcode, qp.qpn(), Psn::new(psn)));
    headers.bth.pkey = tenant_pkey("default");
    headers.bth.ack_req = true;
    headers
}

#[test]
fn what_is_no_packet_is_dropped_and_counted() {
    let Some(mut scene) = Scene::new("what_is_no_packet_is_dropped_and_counted") else {
        return;
    };
    let into = scene.victim.sge(0, 4096);
    scene.victim.recv(&mut scene.qp, 7, &[into]).unwrap();
    let right = body(&request(BthOpcode::RC_SEND_ONLY, &scene.qp, 0), b"data");
    let write = body(
        &Headers {
            reth: Some(Reth {
                va: IOVA,
                rkey: scene.victim.key,
                len: 4,
            }),
            ..request(BthOpcode::RC_WRITE_ONLY, &scene.qp, 0)
        },
        b"data",
    );
    let seal = |bytes: Vec<u8>| sealed(FORGER, HERE, 0, bytes);
    let changed = |at: usize, byte: u8| {
        let mut bytes = right.clone();
        bytes[at] = byte;
        seal(bytes)
    };
    // Every part of the headers that is no whole.
    let short: Vec<_> = (0..28).map(|len| seal(write[..len].to_vec())).collect();
    scene.dropped("truncated", 28, &short);
    scene.dropped("version", 2, &[changed(1, 0x41), changed(1, 0x4F)]);
    scene.dropped("opcode", 3, &[0x15, 0x1F, 0xFF].map(|o| changed(0, o)));
    let odd = [&right[..], b"x"].concat();
    let all_pad = right[..12].to_vec();
    let with_pad = |mut bytes: Vec<u8>| {
        bytes[1] |= 0x30;
        seal(bytes)
    };
    let ack_with_data = changed(0, 0x11);
    let mut long = ack_with_data.clone();
    long.truncate(16);
    long.extend([0; 8]);
    scene.dropped("length", 3, &[seal(odd), with_pad(all_pad), seal(long)]);
    // The peer is a router like this one, whose packets have few identifications.
    let strange = [64, 1000, 0xFFFF].map(|id| sealed(FORGER, HERE, id, right.clone()));
    scene.dropped("damaged", 3, &strange);
    scene.nothing_came();
    // It is the packet itself that is right.
    say(
        &scene.hosts,
        env!("CARGO_BIN_EXE_say-udp"),
        FORGER,
        &[seal(right)],
    )
    .unwrap();
    let got = scene.victim.completion(DEADLINE).unwrap();
    assert_eq!((got.wr_id, got.byte_len), (7, 4));
}

#[test]
fn what_comes_again_is_not_delivered_again() {
    let Some(mut scene) = Scene::new("what_comes_again_is_not_delivered_again") else {
        return;
    };
    for _ in 0..3 {
        scene.message();
    }
    let into = scene.victim.sge(0, 64);
    scene.victim.recv(&mut scene.qp, 7, &[into]).unwrap();
    let again: Vec<_> = (0..3)
        .map(|psn| {
            let headers = request(BthOpcode::RC_SEND_ONLY, &scene.qp, psn);
            packet(FORGER, HERE, &headers, &[0xEE; 64])
        })
        .collect();
    scene.dropped("useless", 3, &again);
    // Far from what is due, before and behind.
    let far: Vec<_> = [0x10_0000, 0x40_0000, 0x7F_FFF0, 0x90_0000, 0xFF_0000]
        .into_iter()
        .map(|psn| {
            let headers = request(BthOpcode::RC_SEND_ONLY, &scene.qp, psn);
            packet(FORGER, HERE, &headers, &[0xEE; 64])
        })
        .collect();
    scene.dropped("useless", far.len() as u64, &far);
    // Answers to what was never asked for.
    let answers: Vec<_> = [BthOpcode::RC_READ_RESPONSE_ONLY, BthOpcode::RC_ATOMIC_ACK]
        .into_iter()
        .map(|opcode| {
            let mut headers = request(opcode, &scene.qp, 5);
            headers.aeth = Some(Aeth {
                syndrome: Syndrome::ACK,
                msn: 1,
            });
            headers.atomic_ack = opcode.has_atomic_ack().then_some(7);
            let payload: &[u8] = if opcode.has_payload() {
                &[0xEE; 64]
            } else {
                &[]
            };
            packet(FORGER, HERE, &headers, payload)
        })
        .collect();
    say(
        &scene.hosts,
        env!("CARGO_BIN_EXE_say-udp"),
        FORGER,
        &answers,
    )
    .unwrap();
    scene.nothing_came();
    // The connection is as it was.
    scene.send();
    let got = scene.victim.completion(DEADLINE).unwrap();
    assert_eq!((got.wr_id, got.byte_len), (7, 64));
}

#[test]
fn a_guessed_key_ends_the_connection_that_it_comes_over_and_nothing_else() {
    let test = "a_guessed_key_ends_the_connection_that_it_comes_over_and_nothing_else";
    let Some(mut scene) = Scene::new(test) else {
        return;
    };
    let wrong = scene.victim.key ^ 0x5A5A_5A00;
    let reth = |va: u64, rkey: u32, len: u32| Some(Reth { va, rkey, len });
    let atomic = AtomicEth {
        va: IOVA,
        rkey: wrong,
        swap_add: 1,
        compare: 0,
    };
    type Change = Box<dyn Fn(&mut Headers)>;
    let with = |reth: Option<Reth>| -> Change { Box::new(move |h| h.reth = reth) };
    let key = scene.victim.key;
    let guesses: Vec<(BthOpcode, Change, usize)> = vec![
        (BthOpcode::RC_WRITE_ONLY, with(reth(IOVA, wrong, 64)), 64),
        (
            BthOpcode::RC_WRITE_FIRST,
            with(reth(IOVA, wrong, 8192)),
            4096,
        ),
        (BthOpcode::RC_READ_REQUEST, with(reth(IOVA, wrong, 64)), 0),
        (
            BthOpcode::RC_FETCH_ADD,
            Box::new(move |h| h.atomic = Some(atomic)),
            0,
        ),
        (BthOpcode::RC_ATOMIC_WRITE, with(reth(IOVA, wrong, 8)), 8),
        (
            BthOpcode::RC_FLUSH,
            Box::new(move |h| {
                h.reth = reth(IOVA, wrong, 64);
                h.feth = Some(Feth(1));
            }),
            0,
        ),
        // The right key, for what is not the region's.
        (BthOpcode::RC_WRITE_ONLY, with(reth(IOVA - 1, key, 64)), 64),
        (
            BthOpcode::RC_WRITE_ONLY,
            with(reth(IOVA + PAGES - 63, key, 64)),
            64,
        ),
        (
            BthOpcode::RC_WRITE_ONLY,
            with(reth(u64::MAX - 8, key, 64)),
            64,
        ),
        // Less than it says, and more.
        (BthOpcode::RC_WRITE_ONLY, with(reth(IOVA, key, 4096)), 64),
        (BthOpcode::RC_WRITE_ONLY, with(reth(IOVA, key, 4)), 64),
        // In the middle of nothing.
        (BthOpcode::RC_WRITE_MIDDLE, with(None), 4096),
        (BthOpcode::RC_SEND_LAST, with(None), 64),
    ];
    for (opcode, change, len) in guesses {
        let (mut qp, _to) = connection(&mut scene.victim, &mut scene.peer);
        let into = scene.victim.sge(0, 8192);
        scene.victim.recv(&mut qp, 8, &[into]).unwrap();
        let mut headers = request(opcode, &qp, 0);
        change(&mut headers);
        let guess = packet(FORGER, HERE, &headers, &vec![0xEE; len]);
        scene.dropped("refused", 1, std::slice::from_ref(&guess));
        // As any connection whose request was refused; its receive comes back empty.
        let flushed = scene.victim.completion(DEADLINE).unwrap();
        assert_eq!(
            (flushed.wr_id, flushed.status),
            (8, WcStatus::WrFlushErr.raw() as u8),
            "{opcode}"
        );
        scene.nothing_came();
        // It says so again, and does no more.
        scene.dropped("useless", 1, &[guess]);
        scene.nothing_came();
    }
    // Another connection of the same programs.
    scene.message();
}

#[test]
fn a_queue_pair_in_error_takes_nothing() {
    let Some(mut scene) = Scene::new("a_queue_pair_in_error_takes_nothing") else {
        return;
    };
    scene.message();
    let error = QpAttr {
        state: QpState::Err,
        ..QpAttr::default()
    };
    scene
        .victim
        .modify(&scene.qp, error, QpAttrMask::STATE)
        .unwrap();
    let packets: Vec<_> = [BthOpcode::RC_SEND_ONLY, BthOpcode::RC_ACK]
        .into_iter()
        .map(|opcode| {
            let mut headers = request(opcode, &scene.qp, 1);
            headers.aeth = opcode.has_aeth().then_some(Aeth {
                syndrome: Syndrome::ACK,
                msn: 1,
            });
            packet(FORGER, HERE, &headers, b"")
        })
        .collect();
    scene.dropped("not_receiving", 2, &packets);
    scene.nothing_came();
}
