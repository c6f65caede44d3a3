//! Tenants: nothing that one knows of another is of any use to it.

use freeflow_shm::SendEntry;
use freeflow_tests::rig::{CAP, IOVA, Patience, Rig, datagrams, join};
use freeflow_tests::{DEADLINE, Victim};
use freeflow_types::{AddressVector, Opcode, QpType, WcStatus};

use crate::scene::Scene;

/// The owner's side of every attempt: registered pages with all rights, a queue pair that would
/// take anything.
fn target(scene: &Scene) -> Rig {
    let rig = Rig::new(&scene.victims[0].socket, 1 << 16).unwrap();
    rig.fill(0, &[0xC7; 1 << 16]).unwrap();
    rig
}

#[test]
fn queue_pairs_of_another_tenant_are_not_there() {
    let scene = Scene::new();
    let mut owner = target(&scene);
    let mut evil = scene.rig();
    let patience = Patience {
        timeout: 5,
        retry_cnt: 1,
        rnr_retry: 0,
    };
    for opcode in [Opcode::Send, Opcode::RdmaWrite, Opcode::RdmaRead] {
        let theirs = owner.qp(QpType::Rc, CAP).unwrap();
        let mut mine = evil.qp(QpType::Rc, CAP).unwrap();
        // The owner is even made to point back: it is talked into a connection with a stranger.
        owner.connect(&theirs, evil.gid(), mine.qpn()).unwrap();
        evil.connect_with(&mine, owner.gid(), theirs.qpn(), &patience)
            .unwrap();
        let mut theirs = theirs;
        let sge = owner.sge(0, 4096);
        owner.recv(&mut theirs, 1, &[sge]).unwrap();
        let entry = SendEntry {
            opcode: opcode.raw() as u8,
            num_sge: 1,
            rkey: owner.key,
            remote_addr: IOVA,
            ..SendEntry::default()
        };
        let sge = evil.sge(0, 64);
        evil.send(&mut mine, &entry, &[sge]).unwrap();
        let done = evil.completion(DEADLINE).unwrap();
        assert_eq!(done.status, WcStatus::RetryExcErr.raw() as u8, "{opcode:?}");
        assert!(owner.cq.poll().unwrap().is_none());
    }
    assert_eq!(owner.bytes(0, 1 << 16).unwrap(), vec![0xC7; 1 << 16]);
    assert_eq!(evil.bytes(0, 64).unwrap(), vec![0; 64]);
    drop((owner, evil));
    scene.end();
}

#[test]
fn datagrams_to_another_tenant_are_dropped() {
    let scene = Scene::new();
    let mut owner = target(&scene);
    let mut evil = scene.rig();
    let mut theirs = owner.qp(QpType::Ud, CAP).unwrap();
    let mut mine = evil.qp(QpType::Ud, CAP).unwrap();
    for (attr, mask) in datagrams(0x11) {
        owner.modify(&theirs, attr, mask).unwrap();
        evil.modify(&mine, attr, mask).unwrap();
    }
    let sge = owner.sge(0, 4096);
    owner.recv(&mut theirs, 1, &[sge]).unwrap();
    let entry = SendEntry {
        opcode: Opcode::Send.raw() as u8,
        num_sge: 1,
        av: AddressVector {
            dgid: owner.gid(),
            ..AddressVector::default()
        },
        remote_qpn: theirs.qpn(),
        remote_qkey: 0x11,
        ..SendEntry::default()
    };
    let sge = evil.sge(0, 64);
    evil.send(&mut mine, &entry, &[sge]).unwrap();
    // Sent, as far as the sender knows.
    assert_eq!(evil.completion(DEADLINE).unwrap().status, 0);
    assert!(owner.cq.poll().unwrap().is_none());
    assert_eq!(owner.bytes(0, 64).unwrap(), vec![0xC7; 64]);
    // From its own tenant it comes.
    let mut friend = Rig::new(&scene.victims[1].socket, 4096).unwrap();
    let mut ours = friend.qp(QpType::Ud, CAP).unwrap();
    for (attr, mask) in datagrams(0x11) {
        friend.modify(&ours, attr, mask).unwrap();
    }
    let sge = friend.sge(0, 64);
    friend.send(&mut ours, &entry, &[sge]).unwrap();
    assert_eq!(friend.completion(DEADLINE).unwrap().status, 0);
    assert_eq!(owner.completion(DEADLINE).unwrap().status, 0);
    drop((owner, evil, friend));
    scene.end();
}

#[test]
fn keys_of_others_open_nothing() {
    let scene = Scene::new();
    let owner = target(&scene);
    // A connection of the attacker's own, within its session: keys of others on both sides.
    let mut evil = scene.rig();
    for (local, opcode) in [
        (true, Opcode::RdmaWrite),
        (false, Opcode::RdmaWrite),
        (false, Opcode::RdmaRead),
        (true, Opcode::RdmaRead),
        (false, Opcode::FetchAdd),
    ] {
        let mut a = evil.qp(QpType::Rc, CAP).unwrap();
        let b = evil.qp(QpType::Rc, CAP).unwrap();
        join((&evil, &a), (&evil, &b)).unwrap();
        let entry = SendEntry {
            opcode: opcode.raw() as u8,
            num_sge: 1,
            rkey: if local { evil.key } else { owner.key },
            remote_addr: IOVA,
            compare_add: 1,
            ..SendEntry::default()
        };
        let length = if opcode.is_atomic() { 8 } else { 64 };
        let mut sge = evil.sge(0, length);
        if local {
            sge.lkey = owner.key;
        }
        evil.send(&mut a, &entry, &[sge]).unwrap();
        let done = evil.completion(DEADLINE).unwrap();
        let expected = if local {
            WcStatus::LocProtErr
        } else {
            WcStatus::RemAccessErr
        };
        assert_eq!(done.status, expected.raw() as u8, "{local} {opcode:?}");
    }
    assert_eq!(owner.bytes(0, 1 << 16).unwrap(), vec![0xC7; 1 << 16]);
    drop((owner, evil));
    scene.end();
}

#[test]
fn guessed_keys_open_nothing() {
    let scene = Scene::new();
    let mut evil = scene.rig();
    let own = evil.key;
    // Neighbours of its own key, which is random, and others.
    let patience = Patience::default();
    let near = [1 << 8, 1 << 9, 1 << 31].map(|bit| own ^ bit);
    let far = [0, 1, 2, 0x100, u32::MAX, 0x9E37_79B1];
    for guess in near.into_iter().chain(far) {
        let mut a = evil.qp(QpType::Rc, CAP).unwrap();
        let b = evil.qp(QpType::Rc, CAP).unwrap();
        evil.connect_with(&a, evil.gid(), b.qpn(), &patience)
            .unwrap();
        evil.connect_with(&b, evil.gid(), a.qpn(), &patience)
            .unwrap();
        let entry = SendEntry {
            opcode: Opcode::RdmaRead.raw() as u8,
            num_sge: 1,
            rkey: guess,
            remote_addr: Victim::CANARIES,
            ..SendEntry::default()
        };
        let sge = evil.sge(0, 64);
        evil.send(&mut a, &entry, &[sge]).unwrap();
        let done = evil.completion(DEADLINE).unwrap();
        assert_eq!(done.status, WcStatus::RemAccessErr.raw() as u8);
        for qp in [a.made.qp, b.made.qp] {
            evil.raw
                .call(&freeflow_session::Request::DestroyQp { qp })
                .unwrap();
        }
    }
    assert_eq!(evil.bytes(0, 64).unwrap(), vec![0; 64]);
    drop(evil);
    scene.end();
}
