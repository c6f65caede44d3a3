//! Garbage on the socket.

use std::os::fd::AsFd;
use std::time::Duration;

use freeflow_session::{
    MAX_MESSAGE_BYTES, PROTOCOL_VERSION, PieceDesc, PieceKind, RegMr, Request, Translation,
    encode_request,
};
use freeflow_tests::raw::{Answer, Raw, dial, hear, say};
use freeflow_types::Access;
use rustix::io::Errno;

use crate::scene::Scene;

const HELLO: Request = Request::Hello {
    version: PROTOCOL_VERSION,
};

fn closed(socket: impl AsFd) {
    let answer = hear(socket).unwrap();
    assert!(matches!(answer, Answer::Closed), "{answer:?}");
}

/// A session that says these bytes ends.
fn ends_with(scene: &Scene, bytes: &[u8], reason: &str) {
    let raw = Raw::connect(&scene.hostile.socket).unwrap();
    say(&raw.socket, bytes, &[]).unwrap();
    closed(&raw.socket);
    scene.ended(reason).unwrap();
}

#[test]
fn bytes_that_are_no_message_end_the_session() {
    let scene = Scene::new();
    let good = encode_request(&Request::OpenContext).unwrap();
    let mut trailing = good.clone();
    trailing.push(0);
    ends_with(&scene, &trailing, "1 bytes follow the message");
    ends_with(&scene, &[0xFF; 64], "bytes are no message");
    // A region whose pieces are cut off.
    let pieces = vec![
        PieceDesc {
            len: 4096,
            kind: PieceKind::Foreign { addr: 4096 }
        };
        100
    ];
    let long = encode_request(&Request::RegMr(RegMr {
        pd: freeflow_session::Handle(1),
        access: Access::LOCAL_WRITE,
        translation: Translation {
            iova: 0,
            len: 409_600,
            pieces,
        },
    }))
    .unwrap();
    ends_with(&scene, &long[..long.len() / 2], "bytes are no message");
    ends_with(&scene, &vec![0; MAX_MESSAGE_BYTES + 1], "exceeds the limit");
    ends_with(
        &scene,
        &encode_request(&HELLO).unwrap(),
        "message out of order",
    );
    scene.end();
}

#[test]
fn every_prefix_and_every_flipped_byte_of_a_message_is_survived() {
    let scene = Scene::new();
    let requests = [
        Request::CreateChannel {
            context: freeflow_session::Handle(0xABCD),
        },
        Request::AllocPages { len: u64::MAX },
        Request::FreePages {
            segment: u32::MAX,
            offset: u64::MAX,
            len: u64::MAX,
        },
    ];
    for request in requests {
        let bytes = encode_request(&request).unwrap();
        for cut in 1..bytes.len() {
            let raw = Raw::connect(&scene.hostile.socket).unwrap();
            say(&raw.socket, &bytes[..cut], &[]).unwrap();
            hear(&raw.socket).unwrap();
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut bytes = bytes.clone();
                bytes[at] ^= 1 << bit;
                let raw = Raw::connect(&scene.hostile.socket).unwrap();
                say(&raw.socket, &bytes, &[]).unwrap();
                hear(&raw.socket).unwrap();
            }
        }
    }
    scene.end();
}

#[test]
fn before_hello_nothing_is_granted() {
    let scene = Scene::new();
    let early = dial(&scene.hostile.socket).unwrap();
    say(&early, &encode_request(&Request::OpenContext).unwrap(), &[]).unwrap();
    closed(&early);
    let old = dial(&scene.hostile.socket).unwrap();
    let hello = Request::Hello { version: 0xFFFF };
    say(&old, &encode_request(&hello).unwrap(), &[]).unwrap();
    let answer = hear(&old).unwrap();
    assert!(
        matches!(answer, Answer::Refused(Errno::PROTONOSUPPORT)),
        "{answer:?}"
    );
    closed(&old);
    let empty = dial(&scene.hostile.socket).unwrap();
    say(&empty, &[], &[]).unwrap();
    closed(&empty);
    scene.end();
}

#[test]
fn descriptors_are_refused() {
    let scene = Scene::new();
    let (a, b) = freeflow_shm::event_pair().unwrap();
    let memfd = freeflow_shm::sealed_memfd("bad", 4096).unwrap();
    for fds in [
        vec![a.as_fd()],
        vec![memfd.as_fd(), b.as_fd(), a.as_fd(), memfd.as_fd()],
    ] {
        let raw = Raw::connect(&scene.hostile.socket).unwrap();
        let bytes = encode_request(&Request::OpenContext).unwrap();
        match say(&raw.socket, &bytes, &fds) {
            Ok(()) => {
                closed(&raw.socket);
                scene.ended("unexpected descriptors").unwrap();
            }
            // Linux 6.16 lets the router refuse them before they are sent.
            Err(errno) => assert_eq!(errno, Errno::PERM),
        }
        let mute = dial(&scene.hostile.socket).unwrap();
        let hello = encode_request(&HELLO).unwrap();
        if say(&mute, &hello, &fds).is_ok() {
            closed(&mute);
        }
    }
    scene.end();
}

#[test]
fn silent_and_half_open_connections_make_room_for_others() {
    let scene = Scene::new();
    let path = &scene.hostile.socket;
    let mut silent = Vec::new();
    for _ in 0..300 {
        // With all its places taken, the endpoint's socket answers nobody for a while.
        match dial(path) {
            Ok(socket) => silent.push(socket),
            Err(_) => break,
        }
    }
    scene.victim.goes_on(3).unwrap();
    // Other endpoints are served meanwhile.
    drop(Raw::connect(&scene.victims[0].socket).unwrap());
    // The silent ones lose their places in time; until then the endpoint itself may be full.
    let until = std::time::Instant::now() + freeflow_tests::DEADLINE;
    while Raw::connect(path).is_err() {
        assert!(std::time::Instant::now() < until, "the endpoint stays shut");
        std::thread::sleep(Duration::from_millis(50));
    }
    for socket in &silent {
        closed(socket);
    }
    scene.end();
}

#[test]
fn a_flood_without_reading_ends_the_session() {
    let scene = Scene::new();
    let raw = Raw::connect(&scene.hostile.socket).unwrap();
    let bytes = encode_request(&Request::OpenContext).unwrap();
    let mut said = 0;
    while say(&raw.socket, &bytes, &[]).is_ok() {
        said += 1;
        assert!(said < 1_000_000, "the router takes it all");
    }
    scene.ended("does not read its answers").unwrap();
    scene.end();
}

#[test]
fn a_flood_of_connections_and_verbs_does_not_stop_others() {
    let scene = Scene::new();
    let until = std::time::Instant::now() + Duration::from_secs(3);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while std::time::Instant::now() < until {
                    let raw = Raw::connect(&scene.hostile.socket).unwrap();
                    for _ in 0..100 {
                        raw.call(&Request::OpenContext).unwrap();
                    }
                }
            });
        }
        scope.spawn(|| {
            while std::time::Instant::now() < until {
                scene.victim.goes_on(5).unwrap();
                drop(Raw::connect(&scene.victims[0].socket).unwrap());
            }
        });
    });
    scene.end();
}
