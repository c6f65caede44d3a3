//! Taking as much as there is.

use freeflow_api::{ControlAnswer, Operation};
use freeflow_session::{CreateCq, Request};
use freeflow_tests::raw::{Answer, Raw};
use freeflow_tests::rig::Rig;
use rustix::io::Errno;

use crate::scene::Scene;

#[test]
fn a_router_without_descriptors_says_so_and_recovers() {
    let scene = Scene::under(&["sh", "-c", "ulimit -n 96; exec \"$0\" \"$@\""]);
    // An endpoint has its share of them alone: it takes several to use them all up.
    let mut held = Vec::new();
    let others: Vec<_> = (0..8)
        .map_while(|_| scene.bed.lasting_endpoint("hostile").ok())
        .collect();
    for other in &others {
        while let Ok(raw) = Raw::connect(&other.socket) {
            held.push(raw);
            assert!(held.len() < 64, "sessions without descriptors");
        }
    }
    // What needs none goes on; what needs one is refused with its reason.
    let first = held.first().expect("some sessions");
    let errno = loop {
        match first.ask(&Request::OpenContext).unwrap() {
            Answer::Reply(..) => {}
            Answer::Refused(errno) => break errno,
            Answer::Closed => panic!("the session ended"),
        }
    };
    assert_eq!(errno, Errno::MFILE);
    scene.victim.goes_on(3).unwrap();
    drop(held);
    for other in others {
        let name = other.name;
        let gone = scene
            .bed
            .control(Operation::RemoveEndpoint { name })
            .unwrap();
        assert_eq!(gone, ControlAnswer::Done);
    }
    // With descriptors there is a session again.
    let until = std::time::Instant::now() + freeflow_tests::DEADLINE;
    while Raw::connect(&scene.hostile.socket).is_err() {
        assert!(std::time::Instant::now() < until, "no session any more");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    scene.end();
}

#[test]
fn address_space_for_pages_and_rings_ends_before_the_routers() {
    let scene = Scene::new();
    let rig = scene.rig();
    // Half of what there is, a quarter, and so on: as much as can be had.
    let limits = rig.raw.welcome.device.limits;
    let mut len = limits.max_mr_size.next_power_of_two();
    let mut granted = 0u64;
    while len > 1 << 20 {
        match rig.raw.ask(&Request::AllocPages { len }).unwrap() {
            Answer::Reply(..) => granted += len,
            Answer::Refused(errno) => {
                assert_eq!(errno, Errno::NOMEM);
                len /= 2;
            }
            Answer::Closed => panic!("the session ended"),
        }
        assert!(granted < 1 << 46, "{granted} bytes were granted");
    }
    assert!(granted > 0);
    // Less than a segment is left: rings take the rest.
    let mut rings = 0;
    let errno = loop {
        let request = Request::CreateCq(CreateCq {
            context: rig.context,
            cqe: limits.max_cqe,
            channel: None,
            comp_vector: 0,
        });
        match rig.raw.ask(&request).unwrap() {
            Answer::Reply(..) => rings += 1,
            Answer::Refused(errno) => break errno,
            Answer::Closed => panic!("the session ended"),
        }
        assert!(rings < 1000, "{rings} rings were granted");
    };
    assert_eq!(errno, Errno::NOMEM);
    // Others are not short of anything, nor is the next session of the same endpoint once this
    // one is gone.
    drop(Rig::new(&scene.victims[0].socket, 1 << 20).unwrap());
    drop(rig);
    scene.end();
}

#[test]
fn an_endpoint_has_its_share_of_descriptors_alone() {
    let scene = Scene::under(&["sh", "-c", "ulimit -n 512; exec \"$0\" \"$@\""]);
    let mut held = Vec::new();
    let refused = loop {
        match Raw::connect(&scene.hostile.socket) {
            Ok(raw) => held.push(raw),
            Err(e) => break format!("{e:#}"),
        }
        assert!(held.len() < 500, "sessions without end");
    };
    assert!(refused.contains("Refused"), "{refused}");
    // Nor can one of them go on to take what sessions may not.
    let Some(first) = held.first() else {
        panic!("not one session");
    };
    let errno = first.refused(&Request::OpenContext).unwrap();
    assert_eq!(errno, Errno::MFILE);
    // Others have what they need.
    let others: Vec<_> = (0..10)
        .map(|_| Raw::connect(&scene.victims[0].socket).unwrap())
        .collect();
    drop(others);
    drop(held);
    scene.end();
}
