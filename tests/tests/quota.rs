//! Quotas of endpoints: what programs see of them, and what other endpoints do not.

use std::time::{Duration, Instant};

use freeflow_session::{Reply, Request};
use freeflow_tests::rig::{CAP, Rig, register};
use freeflow_tests::{Bed, DEADLINE, Running, have};
use freeflow_types::QpType;
use serde_json::Value;

/// One limit of an endpoint, as `freeflow endpoint inspect` has it.
fn quota(bed: &Bed, name: &str, resource: &str) -> Value {
    let said = bed.call(&["endpoint", "inspect", name, "-o", "json"]);
    let said = said.unwrap().success().unwrap();
    let endpoint: Value = serde_json::from_str(&said.stdout).unwrap();
    let all = endpoint["quota"].as_array().unwrap();
    let found = all.iter().find(|q| q["resource"] == resource);
    found.unwrap().clone()
}

fn set(bed: &Bed, name: &str, quota: &str) {
    let said = bed.call(&["endpoint", "set", name, "--quota", quota]);
    said.unwrap().success().unwrap();
}

#[test]
fn a_program_at_its_quota_fails_as_its_man_page_says() {
    if !have("ibv_rc_pingpong") {
        return;
    }
    let bed = Bed::new().unwrap();
    for (quota, says) in [
        ("mrs=0", "Couldn't register MR"),
        ("registered=1K", "Couldn't register MR"),
        ("qps=0", "Couldn't create QP"),
        ("outstanding=100,qps=5", "Couldn't create QP"),
        ("cqs=0", "Couldn't create CQ"),
        ("pds=0", "Couldn't allocate PD"),
        ("channels=0", "Couldn't create completion channel"),
    ] {
        let mut command = bed.freeflow();
        command.args(["run", "--ip", "10.78.9.9", "--quota", quota, "--"]);
        command.args(["ibv_rc_pingpong", "-g", "0", "-e"]);
        let ended = Running::start(&mut command)
            .unwrap()
            .wait(DEADLINE)
            .unwrap();
        assert_eq!(ended.code(), 1, "{quota}: {ended}");
        assert!(ended.stderr.contains(says), "{quota}: {ended}");
    }
    let mut command = bed.freeflow();
    command.args(["run", "--quota", "cows=1", "--", "true"]);
    let ended = Running::start(&mut command)
        .unwrap()
        .wait(DEADLINE)
        .unwrap();
    assert_eq!(ended.code(), 125, "{ended}");
    assert!(ended.stderr.contains("no quota \"cows\""), "{ended}");
}

#[test]
fn all_sessions_of_an_endpoint_share_a_quota_that_can_be_changed() {
    let bed = Bed::new().unwrap();
    let endpoint = bed.lasting_endpoint("t").unwrap();
    set(&bed, &endpoint.name, "mrs=3,registered=64K,qps=1");
    let first = Rig::new(&endpoint.socket, 4096).unwrap();
    let limits = &first.raw.welcome.device.limits;
    assert_eq!(
        (limits.max_mr, limits.max_qp, limits.max_mr_size),
        (3, 1, 64 << 10)
    );
    let mut second = Rig::new(&endpoint.socket, 4096).unwrap();
    let again = |rig: &Rig| register(&rig.raw, rig.pd, rig.pages, 4096, 0);
    let (mr, _) = again(&first).unwrap();
    again(&second).unwrap_err();
    let seen = quota(&bed, &endpoint.name, "mrs");
    assert_eq!((&seen["used"], &seen["refused"]), (&3.into(), &1.into()));
    // What one gives back another may have.
    first.raw.call(&Request::DeregMr { mr }).unwrap();
    again(&second).unwrap();
    let qp = second.qp(QpType::Rc, CAP).unwrap();
    assert!(second.qp(QpType::Rc, CAP).is_err());
    // Less than is used takes nothing away; more is had at once.
    set(&bed, &endpoint.name, "qps=0");
    assert_eq!(quota(&bed, &endpoint.name, "qps")["used"], 1);
    set(&bed, &endpoint.name, "qps=2");
    // Also in the limits that a session is told when it asks again.
    let (reply, _) = first.raw.call(&Request::QueryDevice).unwrap();
    let Reply::Device(now) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!((now.limits.max_mr, now.limits.max_qp), (3, 2));
    second.qp(QpType::Rc, CAP).unwrap();
    drop(qp);
    // Nothing is left of ended sessions.
    drop((first, second));
    let none = |status: &Value| {
        let quota = status["endpoints"][0]["quota"].as_array();
        quota.is_some_and(|all| all.iter().all(|q| q["used"] == 0))
    };
    bed.wait_for_status(none, DEADLINE).unwrap();
}

#[test]
fn control_verbs_over_the_rate_are_delayed_and_others_are_not() {
    const RATE: u32 = 50;
    const FLOOD: u32 = 3 * RATE;
    let bed = Bed::new().unwrap();
    let (flooded, other) = (
        bed.lasting_endpoint("t").unwrap(),
        bed.lasting_endpoint("u").unwrap(),
    );
    let mut rigs = [&flooded, &other].map(|e| Rig::new(&e.socket, 4096).unwrap());
    let qps: Vec<_> = rigs
        .iter_mut()
        .map(|rig| rig.qp(QpType::Rc, CAP).unwrap().made.qp)
        .collect();
    let [flooding, calm] = &rigs;
    set(&bed, &flooded.name, &format!("control={RATE}/s"));
    let query = |rig: &Rig, qp, n: u32| {
        for _ in 0..n {
            let (reply, _) = rig.raw.call(&Request::QueryQp { qp }).unwrap();
            assert!(matches!(reply, Reply::QpQueried(_)), "{reply:?}");
        }
    };
    let began = Instant::now();
    let took = std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            query(flooding, qps[0], FLOOD);
            began.elapsed()
        });
        query(calm, qps[1], 200);
        assert!(!flood.is_finished(), "the other endpoint waited as long");
        flood.join().unwrap()
    });
    // A second's worth at once, and the rest at the rate.
    let least = Duration::from_secs((FLOOD / RATE - 1).into()) - Duration::from_millis(100);
    assert!(took >= least, "{FLOOD} verbs took {took:?}");
    // No rate at all, and then one again.
    set(&bed, &flooded.name, "control=0");
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| query(flooding, qps[0], 2 * RATE));
        query(calm, qps[1], 200);
        assert!(!flood.is_finished(), "verbs were executed without tokens");
        set(&bed, &flooded.name, "control=none");
        flood.join().unwrap();
    });
}
