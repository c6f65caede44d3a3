//! Registered memory that changes under the router's hands.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use freeflow_api::{ControlAnswer, Operation};
use freeflow_session::{PieceDesc, PieceKind, RegMr, Reply, Request, Translation};
use freeflow_shm::SendEntry;
use freeflow_tests::rig::{CAP, IOVA, Rig, all_rights, join, write};
use freeflow_tests::{DEADLINE, StuckFile, skip};
use freeflow_types::{Opcode, QpType, WcStatus};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::scene::Scene;

#[test]
fn pages_that_are_freed_or_punched_under_traffic_harm_nobody() {
    let scene = Scene::new();
    let mut rig = scene.rig();
    let (mut a, _b) = rig.pair().unwrap();
    let (segment, offset) = rig.pages;
    let half = rig.len / 2;
    let write = write(rig.key, IOVA + half);
    let (_, fd) = rig.raw.segment(segment).unwrap();
    let fd = fd.try_clone_to_owned().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            while !stop.load(Ordering::Relaxed) {
                fallocate(&fd, punch, 0, 1 << 30).unwrap();
            }
        });
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            let sge = rig.sge(0, half as u32);
            rig.send(&mut a, &write, &[sge]).unwrap();
            assert_eq!(rig.completion(DEADLINE).unwrap().status, 0);
        }
        stop.store(true, Ordering::Relaxed);
    });
    // In use or not: they are the session's own.
    let len = rig.len;
    rig.raw
        .call(&Request::FreePages {
            segment,
            offset,
            len,
        })
        .unwrap();
    let sge = rig.sge(0, half as u32);
    rig.send(&mut a, &write, &[sge]).unwrap();
    let _ = rig.completion(DEADLINE).unwrap();
    let errno = rig.raw.refused(&Request::FreePages {
        segment,
        offset,
        len,
    });
    assert_eq!(errno.unwrap(), Errno::INVAL);
    drop(rig);
    scene.end();
}

#[test]
fn seals_cannot_be_taken_away_and_sizes_not_changed() {
    let scene = Scene::new();
    let rig = scene.rig();
    let (_, fd) = rig.raw.segment(rig.pages.0).unwrap();
    assert_eq!(rustix::fs::ftruncate(fd, 0), Err(Errno::PERM));
    assert_eq!(rustix::fs::ftruncate(fd, 1 << 40), Err(Errno::PERM));
    let more = rustix::fs::SealFlags::WRITE;
    assert_eq!(rustix::fs::fcntl_add_seals(fd, more), Err(Errno::PERM));
    drop(rig);
    scene.end();
}

#[test]
fn requests_at_the_ends_of_all_numbers_are_refused_with_their_status() {
    let scene = Scene::new();
    let far = u64::MAX;
    let cases = [
        (Opcode::RdmaWrite, far, 64, WcStatus::RemAccessErr),
        (Opcode::RdmaRead, far - 7, 64, WcStatus::RemAccessErr),
        (Opcode::RdmaWrite, IOVA - 1, 64, WcStatus::RemAccessErr),
        (
            Opcode::RdmaWrite,
            IOVA + (1 << 20) - 63,
            64,
            WcStatus::RemAccessErr,
        ),
        (Opcode::FetchAdd, IOVA + 4, 8, WcStatus::RemInvReqErr),
        (Opcode::CompareSwap, far - 7, 8, WcStatus::RemAccessErr),
    ];
    for (opcode, remote_addr, length, status) in cases {
        let mut rig = scene.rig();
        let (mut a, _b) = rig.pair().unwrap();
        let entry = SendEntry {
            opcode: opcode.raw() as u8,
            num_sge: 1,
            rkey: rig.key,
            remote_addr,
            ..SendEntry::default()
        };
        let sge = rig.sge(0, length);
        rig.send(&mut a, &entry, &[sge]).unwrap();
        let done = rig.completion(DEADLINE).unwrap();
        assert_eq!(
            done.status,
            status.raw() as u8,
            "{opcode:?} {remote_addr:#x}"
        );
    }
    let locals = [
        (far, 64, 0),
        (far - 63, 64, 0),
        (IOVA, u32::MAX, 0),
        (IOVA + (1 << 20) - 63, 64, 0),
        (IOVA, 64, 1),
    ];
    for (addr, length, other_key) in locals {
        let mut rig = scene.rig();
        let (mut a, _b) = rig.pair().unwrap();
        let entry = write(rig.key, IOVA);
        let mut sge = rig.sge(0, length);
        sge.addr = addr;
        sge.lkey ^= other_key << 16;
        rig.send(&mut a, &entry, &[sge]).unwrap();
        let done = rig.completion(DEADLINE).unwrap();
        let expected = if length == u32::MAX {
            // Longer than any message.
            WcStatus::LocLenErr
        } else {
            WcStatus::LocProtErr
        };
        assert_eq!(done.status, expected.raw() as u8, "{addr:#x} {length}");
    }
    scene.end();
}

/// Registers a page of the process's own memory.
fn foreign_region(rig: &Rig, addr: u64) -> Request {
    let kind = PieceKind::Foreign { addr };
    Request::RegMr(RegMr {
        pd: rig.pd,
        access: all_rights(),
        translation: Translation {
            iova: IOVA,
            len: 4096,
            pieces: vec![PieceDesc { len: 4096, kind }],
        },
    })
}

/// Memory of the process itself, which the router reaches across processes: mapped, then gone.
#[test]
fn own_memory_that_goes_away_fails_the_request_alone() {
    let scene = Scene::new();
    let mut rig = scene.rig();
    rig.raw.call(&Request::AttachMemory).unwrap();
    let buffer = vec![7u8; 8192];
    let addr = buffer.as_ptr() as u64;
    let region = |addr| foreign_region(&rig, addr);
    let mut keys = Vec::new();
    // There, never there, and the kernel's.
    for addr in [addr, 4096, 0xFFFF_8000_0000_0000] {
        match rig.raw.call(&region(addr)).unwrap().0 {
            Reply::Mr(made) => keys.push(made.key.0),
            other => panic!("{other:?}"),
        }
    }
    for (key, status) in keys.into_iter().zip([
        WcStatus::Success,
        WcStatus::LocProtErr,
        WcStatus::LocProtErr,
    ]) {
        let (mut a, _b) = rig.pair().unwrap();
        let entry = write(rig.key, IOVA);
        let mut sge = rig.sge(0, 64);
        sge.lkey = key;
        rig.send(&mut a, &entry, &[sge]).unwrap();
        let done = rig.completion(DEADLINE).unwrap();
        assert_eq!(done.status, status.raw() as u8);
    }
    assert_eq!(rig.bytes(0, 64).unwrap(), [7; 64]);
    drop((rig, buffer));
    scene.end();
}

/// A process that is killed at the end: it cannot end while somebody else waits for its memory.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Memory that a file system delivers, or does not: read by the session itself, and written by a
/// peer.
#[test]
fn memory_that_does_not_come_ends_its_session_alone() {
    for by_peer in [false, true] {
        let stuck = match StuckFile::new(1 << 16).unwrap() {
            Ok(stuck) => stuck,
            Err(why) => return skip("memory that does not come", &why),
        };
        let scene = Scene::new();
        let other = scene.bed.lasting_endpoint("hostile").unwrap();
        let mut peer = Rig::new(&other.socket, 1 << 16).unwrap();
        let mut b = peer.qp(QpType::Rc, CAP).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_stuck-memory"));
        let ip = peer.gid().0;
        let ip = std::net::Ipv6Addr::from(ip).to_canonical().to_string();
        command.arg(&scene.hostile.socket).arg(ip);
        command.args([b.qpn(), peer.key].map(|n| n.to_string()));
        if !by_peer {
            command.arg("send");
        }
        command.stdin(stuck.file.try_clone().unwrap());
        let mut client = Killed(command.stdout(Stdio::piped()).spawn().unwrap());
        let said = client.0.stdout.take().unwrap();
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line).unwrap();
        let (qpn, key) = line.trim().split_once(' ').expect("a QPN and a key");
        let gid = scene.rig().gid();
        peer.connect(&b, gid, qpn.parse().unwrap()).unwrap();
        if by_peer {
            let entry = write(key.parse().unwrap(), IOVA);
            let sge = peer.sge(0, 64);
            peer.send(&mut b, &entry, &[sge]).unwrap();
            let done = peer.completion(DEADLINE).unwrap();
            assert_eq!(done.status, WcStatus::RemOpErr.raw() as u8);
        }
        scene.ended("did not come in time").unwrap();
        // The endpoint goes on without such memory: even good one is refused.
        let again = scene.rig();
        again.raw.call(&Request::AttachMemory).unwrap();
        let buffer = vec![0u8; 8192];
        let refused = foreign_region(&again, buffer.as_ptr() as u64);
        assert_eq!(again.raw.refused(&refused).unwrap(), Errno::OPNOTSUPP);
        let name = scene.hostile.name.as_str();
        let counted = |status: &serde_json::Value| {
            status["endpoints"].as_array().is_some_and(|all| {
                let mut own = all.iter().filter(|e| e["name"] == name);
                own.any(|e| e["counters"]["late_memory"] == 1)
            })
        };
        scene.bed.wait_for_status(counted, DEADLINE).unwrap();
        // Others' memory is still reached.
        peer.raw.call(&Request::AttachMemory).unwrap();
        let region = foreign_region(&peer, buffer.as_ptr() as u64);
        let Reply::Mr(good) = peer.raw.call(&region).unwrap().0 else {
            panic!("not a region");
        };
        let mut c = peer.qp(QpType::Rc, CAP).unwrap();
        let d = peer.qp(QpType::Rc, CAP).unwrap();
        join((&peer, &c), (&peer, &d)).unwrap();
        let entry = write(good.key.0, IOVA);
        let sge = peer.sge(0, 64);
        peer.send(&mut c, &entry, &[sge]).unwrap();
        assert_eq!(peer.completion(DEADLINE).unwrap().status, 0);
        drop((again, peer, stuck, client, buffer));
        let name = other.name;
        let removed = scene.bed.control(Operation::RemoveEndpoint { name });
        assert_eq!(removed.unwrap(), ControlAnswer::Done);
        scene.end();
    }
}
