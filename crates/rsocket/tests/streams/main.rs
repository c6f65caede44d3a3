//! Two ends joined in memory: every byte once, in order; nobody waits for what does not come.

mod world;

use freeflow_rsocket::{Broken, Config, ConnData, Message, NoMap, Phase, Place};
use proptest::prelude::*;
use world::{World, byte};

const TINY: Config = Config {
    send_requests: 16,
    recv_requests: 16,
    send_buffer: 4096,
    recv_buffer: 4096,
    inline: 64,
    maps: 4,
};

fn both(config: Config) -> World {
    World::new([config, config])
}

/// Sends so many bytes in pieces of a size, while the other side reads in pieces of another.
fn transfer(world: &mut World, bytes: u64, piece: u64, reads: u32) {
    let target = world.0[0].written + bytes;
    while world.0[0].written < target {
        let left = target - world.0[0].written;
        let before = (world.0[0].written, world.0[1].read);
        world.0[0].send(piece.min(left));
        world.quiesce().unwrap();
        world.0[1].read(reads);
        world.0[1].settle();
        world.quiesce().unwrap();
        assert_ne!(
            before,
            (world.0[0].written, world.0[1].read),
            "nothing moves"
        );
    }
    world.drain().unwrap();
    assert_eq!(world.0[1].read, world.0[0].written);
}

#[test]
fn bytes_arrive_whatever_the_sizes() {
    for (piece, reads) in [
        (1, 1),
        (1, u32::MAX),
        (65, 3),
        (5000, 7),
        (1 << 20, 1 << 20),
    ] {
        transfer(&mut both(TINY), 20_000, piece, reads);
        transfer(
            &mut both(Config::default()),
            500_000,
            piece.max(16),
            reads.max(99),
        );
    }
}

/// A stock program with default sizes meets one with the smallest.
#[test]
fn sides_may_differ_in_their_sizes() {
    let mut world = World::new([Config::default(), TINY]);
    transfer(&mut world, 300_000, 70_000, 1000);
    world.0.swap(0, 1);
    let mut world = World::new([TINY, Config::default()]);
    transfer(&mut world, 300_000, 70_000, 1000);
}

#[test]
fn a_peer_that_does_not_read_stops_the_sender() {
    let mut world = both(Config::default());
    while world.0[0].send(10_000) > 0 {
        world.quiesce().unwrap();
    }
    assert_eq!(world.0[0].written, 1 << 17, "the whole receive buffer");
    assert!(!world.0[0].stream.can_send());
    world.drain().unwrap();
    assert!(world.0[0].stream.can_send());
    assert_eq!(world.0[1].read, 1 << 17);
}

#[test]
fn small_messages_are_limited_by_credits_and_go_on_when_they_are_read() {
    let mut world = both(Config::default());
    while world.0[0].send(1) > 0 {
        world.quiesce().unwrap();
    }
    assert_eq!(world.0[0].written, 384);
    world.0[1].read(191);
    world.0[1].settle();
    world.quiesce().unwrap();
    assert!(!world.0[0].stream.can_send(), "half of the credits");
    world.0[1].read(1);
    world.0[1].settle();
    world.quiesce().unwrap();
    assert!(world.0[0].stream.can_send());
}

/// Both sides have used all they were granted, and neither polls until then: what is kept for
/// messages of the protocol lets them go on.
#[test]
fn both_sides_out_of_credit_go_on() {
    let mut world = both(TINY);
    for round in 0..100 {
        for end in &mut world.0 {
            while end.send(1) > 0 {}
            assert!(!end.stream.can_send());
        }
        let before = [0, 1].map(|i: usize| world.0[i].read);
        world.drain().unwrap();
        let after = [0, 1].map(|i: usize| world.0[i].read);
        assert!(
            before[0] < after[0] && before[1] < after[1],
            "round {round}"
        );
    }
}

#[test]
fn what_is_written_before_a_shutdown_arrives() {
    let mut world = both(Config::default());
    world.0[0].send(100_000);
    world.0[0].stream.shutdown_send();
    world.0[0].settle();
    assert!(!world.0[0].stream.is_flushed());
    assert_eq!(world.0[0].stream.send(1), None);
    // The other direction is open.
    world.0[1].send(5000);
    world.drain().unwrap();
    assert!(world.0[0].stream.is_flushed());
    assert_eq!(world.0[1].read, 100_000.min(world.0[0].written));
    assert_eq!(world.0[0].read, 5000);
    assert!(!world.0[1].stream.is_readable() && world.0[1].stream.is_writable());
    world.0[1].stream.shutdown_send();
    world.0[1].settle();
    world.drain().unwrap();
    assert_eq!(world.0[0].stream.phase(), Phase::Closed);
    assert_eq!(world.0[1].stream.phase(), Phase::Closed);
}

#[test]
fn both_sides_may_end_at_once() {
    type End = fn(&mut freeflow_rsocket::Stream);
    let ends: [End; 3] = [
        |s| s.disconnect(),
        |s| s.shutdown_send(),
        |s| {
            s.shutdown_receive();
            s.shutdown_send();
        },
    ];
    for first in ends {
        for second in ends {
            let mut world = both(TINY);
            world.0[0].send(1000);
            world.0[1].send(2000);
            first(&mut world.0[0].stream);
            second(&mut world.0[1].stream);
            for end in &mut world.0 {
                end.settle();
            }
            world.drain().unwrap();
            for end in &world.0 {
                assert_eq!(end.stream.phase(), Phase::Closed);
                assert!(end.stream.is_flushed());
            }
            assert_eq!((world.0[1].read, world.0[0].read), (1000, 2000));
        }
    }
}

#[test]
fn who_only_stops_reading_says_nothing() {
    let mut world = both(TINY);
    world.0[0].stream.shutdown_receive();
    world.0[0].settle();
    world.quiesce().unwrap();
    assert!(world.0[1].stream.is_writable() && world.0[1].stream.is_readable());
    transfer(&mut world, 10_000, 100, 100);
}

#[test]
fn what_had_arrived_of_a_dead_peer_is_read() {
    let mut world = both(TINY);
    world.0[0].send(1000);
    world.quiesce().unwrap();
    world.0[1].send(3000);
    world.0[1].break_off();
    world.0[1].poll(usize::MAX).unwrap();
    assert_eq!(world.0[1].stream.phase(), Phase::Broken);
    assert!(!world.0[1].stream.can_send() && world.0[1].stream.is_flushed());
    world.0[1].read(u32::MAX);
    assert_eq!(world.0[1].read, 1000);
    let mut world = both(TINY);
    world.0[1].stream.lost();
    assert_eq!(world.0[1].stream.phase(), Phase::Closed);
}

#[test]
fn buffers_are_written_directly_before_what_follows() {
    let mut world = both(TINY);
    let data: Vec<u8> = (0..50_000).map(byte).collect();
    assert_eq!(world.0[0].send_at(5, &data), Err(NoMap(5)));
    let index = world.0[1].map(1_000_000).unwrap();
    world.0[1].settle();
    world.0[1].send(1);
    world.drain().unwrap();
    let mut done = 0;
    while done < data.len() {
        let at = 1_000_000 + 7 + done as u64;
        done += world.0[0].send_at(at, &data[done..]).unwrap();
        world.quiesce().unwrap();
    }
    assert_eq!(&world.0[1].mapped[7..][..data.len()], data);
    assert_eq!(world.0[0].send_at(999_999, &data), Err(NoMap(999_999)));
    assert_eq!(world.0[0].send_at(1_100_000, &data), Err(NoMap(1_100_000)));
    // As many as the peer has places for.
    for _ in 0..3 {
        assert!(world.0[1].map(0).is_some());
    }
    assert_eq!(world.0[1].map(0), None);
    world.0[1].stream.unmap_own(index);
    assert_eq!(world.0[1].map(0), Some(index));
}

#[test]
fn a_mapping_is_told_before_what_is_sent_after_it() {
    let mut world = both(TINY);
    while world.0[1].send(1) > 0 {}
    world.0[1].map(77).unwrap();
    world.0[1].settle();
    // It waits for a credit, and data wait for it.
    assert!(!world.0[1].stream.can_send());
    world.drain().unwrap();
    assert!(world.0[1].stream.can_send());
    assert_eq!(world.0[0].send_at(77, &[1, 2, 3]), Ok(3));
}

#[test]
fn mappings_use_no_credits_up() {
    let mut world = both(TINY);
    for round in 0..1000 {
        let index = world.0[1].map(round).expect("a place that was unmapped");
        world.0[1].settle();
        world.quiesce().unwrap();
        assert_eq!(world.0[0].send_at(round, &[1]), Ok(1), "round {round}");
        world.0[1].stream.unmap_own(index);
    }
    transfer(&mut world, 10_000, 100, 100);
    world.0.swap(0, 1);
    assert!(world.0[0].stream.can_send());
    assert_eq!(world.0[0].send(1), 1);
    world.drain().unwrap();
    assert_eq!(world.0[1].read, 1);
}

#[test]
fn a_peer_that_breaks_the_rules_ends_the_stream() {
    let half = TINY.recv_buffer / 2;
    let mut world = both(TINY);
    let stream = &mut world.0[0].stream;
    assert_eq!(stream.received(Message::Data(half).encode()), Ok(()));
    let (announced, room) = (1, 0);
    assert_eq!(
        stream.received(Message::Data(1).encode()),
        Err(Broken::Room { announced, room })
    );
    assert_eq!(stream.phase(), Phase::Broken);
    assert_eq!(stream.unread(), half);
    let mut world = both(TINY);
    let stream = &mut world.0[0].stream;
    for _ in 0..TINY.recv_requests {
        assert_eq!(stream.received(Message::Data(1).encode()), Ok(()));
    }
    assert_eq!(
        stream.received(Message::Data(1).encode()),
        Err(Broken::Credits(16))
    );
    let mut world = both(TINY);
    let unknown = Broken::Unknown(0xA000_0000);
    assert_eq!(world.0[0].stream.received(0xA000_0000), Err(unknown));
}

#[test]
fn empty_messages_are_credited_at_once() {
    let mut world = both(TINY);
    let stream = &mut world.0[0].stream;
    for _ in 0..1000 {
        assert_eq!(stream.received(Message::Data(0).encode()), Ok(()));
    }
    assert_eq!(stream.unread(), 0);
    assert!(stream.control().is_some_and(|post| post.imm.is_some()));
}

#[test]
fn signs_of_life_are_sent_when_they_are_due() {
    let mut world = both(TINY);
    world.quiesce().unwrap();
    world.drain().unwrap();
    let stream = &mut world.0[0].stream;
    stream.keep_alive(Some(100), 1000);
    assert_eq!(stream.deadline(), Some(1100));
    stream.tick(1099);
    assert_eq!(stream.control(), None);
    stream.tick(1150);
    assert_eq!(stream.deadline(), Some(1250));
    let post = stream.control().unwrap();
    assert_eq!((post.bytes(), post.imm), (&[][..], None));
    assert_eq!(stream.control(), None);
    stream.keep_alive(None, 1200);
    assert_eq!(stream.deadline(), None);
}

/// The first message grants the second half of the buffer, in the second place of the table, as
/// rdma-core's does.
#[test]
fn the_second_half_of_the_buffer_is_granted_first() {
    let mut world = both(Config::default());
    let ConnData { table, buffer, .. } = world.0[1].stream.conn_data();
    let post = world.0[0].stream.control().unwrap();
    assert_eq!(post.addr, table.addr + 16);
    assert_eq!(post.imm, Some(0x8000_0000 | 384));
    assert_eq!(post.bytes()[..8], (buffer.addr + 65536).to_ne_bytes());
    assert_eq!(post.bytes()[12..], 65536_u32.to_ne_bytes());
    assert_eq!(world.0[0].stream.control(), None);
    let write = world.0[0].stream.send(64).unwrap();
    assert_eq!((write.addr, write.place), (buffer.addr, Place::Inline));
    assert_eq!(write.imm, Some(64));
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Send(bool, u32),
    Read(bool, u32),
    Deliver(bool, u8),
    Poll(bool, u8),
    Map(bool),
    Shutdown(bool),
}

fn op() -> impl Strategy<Value = Op> {
    let length = prop_oneof![0..10_u32, 0..3000_u32, 0..200_000_u32];
    prop_oneof![
        8 => (any::<bool>(), length.clone()).prop_map(|(end, n)| Op::Send(end, n)),
        6 => (any::<bool>(), length).prop_map(|(end, n)| Op::Read(end, n)),
        8 => (any::<bool>(), 1..20_u8).prop_map(|(end, n)| Op::Deliver(end, n)),
        8 => (any::<bool>(), 1..20_u8).prop_map(|(end, n)| Op::Poll(end, n)),
        1 => any::<bool>().prop_map(Op::Map),
        1 => any::<bool>().prop_map(Op::Shutdown),
    ]
}

fn config() -> impl Strategy<Value = Config> {
    (
        16..40_u16,
        16..40_u16,
        4096..20_000_u32,
        4096..20_000_u32,
        0..100_u32,
    )
        .prop_map(
            |(send_requests, recv_requests, send_buffer, recv_buffer, inline)| Config {
                send_requests,
                recv_requests,
                send_buffer,
                recv_buffer,
                inline,
                maps: 3,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever the order of work, arrival and polling: what was taken arrives once, in order, and
    /// then either side can send again unless it has ended.
    #[test]
    fn every_byte_arrives_once_in_order(
        configs in [config(), config()],
        ops in proptest::collection::vec(op(), 1..300),
    ) {
        let mut world = World::new(configs);
        let mut ended = [false; 2];
        for op in ops {
            match op {
                Op::Send(end, n) => {
                    world.0[usize::from(end)].send(n.into());
                }
                Op::Read(end, n) => {
                    world.0[usize::from(end)].read(n);
                    world.0[usize::from(end)].settle();
                }
                Op::Deliver(end, n) => {
                    world.deliver(end.into(), n.into());
                }
                Op::Poll(end, n) => world.0[usize::from(end)].poll(n.into()).unwrap(),
                Op::Map(end) => {
                    world.0[usize::from(end)].map(5);
                }
                Op::Shutdown(end) => {
                    ended[usize::from(end)] = true;
                    world.0[usize::from(end)].stream.shutdown_send();
                }
            }
        }
        for end in &mut world.0 {
            end.settle();
        }
        world.drain().unwrap();
        for (i, ended) in ended.into_iter().enumerate() {
            prop_assert_eq!(world.0[1 - i].read, world.0[i].written);
            prop_assert!(world.0[i].stream.is_flushed());
            prop_assert_eq!(world.0[i].stream.can_send(), !ended);
            prop_assert_eq!(world.0[1 - i].stream.is_readable(), !ended);
        }
    }

    /// Connection data and messages of any content do no harm.
    #[test]
    fn anything_may_come(
        data in proptest::collection::vec(any::<u8>(), 0..64),
        imms in proptest::collection::vec(any::<u32>(), 0..64),
    ) {
        let mut world = both(TINY);
        if let Ok(data) = ConnData::from_bytes(&data) {
            world.0[0].stream.connected(&data);
        }
        let stream = &mut world.0[0].stream;
        for imm in imms {
            let _ = stream.received(imm);
            stream.sent(true);
            while stream.control().is_some() {}
            stream.send(u32::MAX);
            let unread: u32 = stream.unread_ranges().iter().map(|r| r.length).sum();
            prop_assert_eq!(unread, stream.unread());
            prop_assert!(unread <= TINY.recv_buffer);
            stream.consume(unread / 2);
        }
    }
}
