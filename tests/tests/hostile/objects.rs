//! Handles, sizes, and the order of things.

use freeflow_session::{
    CreateCq, CreateQp, Handle, PieceDesc, PieceKind, RegMr, Reply, Request, Translation,
};
use freeflow_tests::rig::{CAP, IOVA, Rig, all_rights, path_to_rts, register};
use freeflow_types::{QpCap, QpType};
use rustix::io::Errno;

use crate::scene::Scene;

/// Every request that names an object, naming this one.
fn naming(handle: Handle, rig: &Rig) -> Vec<Request> {
    let (attr, mask) = path_to_rts(rig.gid(), 1, &Default::default())[0];
    let reg = |pd| {
        let (segment, offset) = rig.pages;
        let kind = PieceKind::Pool { segment, offset };
        Request::RegMr(RegMr {
            pd,
            access: all_rights(),
            translation: Translation {
                iova: IOVA,
                len: 4096,
                pieces: vec![PieceDesc { len: 4096, kind }],
            },
        })
    };
    let qp = |pd, send_cq, recv_cq| {
        Request::CreateQp(CreateQp {
            pd,
            qp_type: QpType::Rc,
            send_cq,
            recv_cq: Some(recv_cq),
            srq: None,
            cap: CAP,
            sq_sig_all: true,
        })
    };
    let cq = |context, channel| {
        Request::CreateCq(CreateCq {
            context,
            cqe: 16,
            channel,
            comp_vector: 0,
        })
    };
    vec![
        Request::CloseContext { context: handle },
        Request::AllocPd { context: handle },
        Request::DeallocPd { pd: handle },
        reg(handle),
        Request::DeregMr { mr: handle },
        Request::CreateChannel { context: handle },
        Request::DestroyChannel { channel: handle },
        cq(handle, None),
        cq(rig.context, Some(handle)),
        Request::DestroyCq { cq: handle },
        qp(handle, rig.cq.handle, rig.cq.handle),
        qp(rig.pd, handle, rig.cq.handle),
        qp(rig.pd, rig.cq.handle, handle),
        Request::ModifyQp {
            qp: handle,
            attr,
            mask,
        },
        Request::QueryQp { qp: handle },
        Request::DestroyQp { qp: handle },
    ]
}

#[test]
fn handles_of_others_are_refused() {
    let scene = Scene::new();
    let mut owner = Rig::new(&scene.victims[0].socket, 1 << 16).unwrap();
    let qp = owner.qp(QpType::Rc, CAP).unwrap();
    let reply = owner.raw.call(&Request::CreateChannel {
        context: owner.context,
    });
    let Reply::Created(channel) = reply.unwrap().0 else {
        panic!("no channel");
    };
    let theirs = [
        owner.context,
        owner.pd,
        owner.mr,
        owner.cq.handle,
        channel,
        qp.made.qp,
    ];
    // A session of another tenant, and one of the owner's own endpoint.
    for socket in [&scene.hostile.socket, &scene.victims[0].socket] {
        let rig = Rig::new(socket, 1 << 16).unwrap();
        for handle in theirs {
            for request in naming(handle, &rig) {
                let errno = rig.raw.refused(&request).unwrap();
                assert_eq!(errno, Errno::INVAL, "{request:?}");
            }
        }
    }
    // All of it is still there.
    owner
        .raw
        .call(&Request::QueryQp { qp: qp.made.qp })
        .unwrap();
    owner
        .raw
        .call(&Request::DestroyChannel { channel })
        .unwrap();
    drop(owner);
    scene.end();
}

#[test]
fn guessed_and_stale_handles_are_refused() {
    let scene = Scene::new();
    let mut rig = scene.rig();
    let qp = rig.qp(QpType::Rc, CAP).unwrap();
    rig.raw
        .call(&Request::DestroyQp { qp: qp.made.qp })
        .unwrap();
    let second = Rig::new(&scene.hostile.socket, 4096).unwrap();
    second
        .raw
        .call(&Request::DeregMr { mr: second.mr })
        .unwrap();
    let mut guesses = vec![qp.made.qp, Handle(0), Handle(u32::MAX), Handle(1 << 20)];
    let mut state = 1u32;
    guesses.extend((0..16).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Handle(state)
    }));
    let own = [rig.context, rig.pd, rig.cq.handle, rig.mr];
    for handle in guesses {
        for request in naming(handle, &rig) {
            // Objects of another kind may have the same number.
            if own.contains(&handle) && !matches!(request, Request::QueryQp { .. }) {
                continue;
            }
            let errno = rig.raw.refused(&request).unwrap();
            assert_eq!(errno, Errno::INVAL, "{request:?}");
        }
    }
    let mr = Request::DeregMr { mr: second.mr };
    assert_eq!(second.raw.refused(&mr).unwrap(), Errno::INVAL);
    drop((rig, second));
    scene.end();
}

#[test]
fn what_is_in_use_is_not_destroyed_and_closing_takes_all() {
    let scene = Scene::new();
    let mut rig = scene.rig();
    let qp = rig.qp(QpType::Rc, CAP).unwrap();
    let (pd, cq) = (rig.pd, rig.cq.handle);
    for request in [Request::DeallocPd { pd }, Request::DestroyCq { cq }] {
        assert_eq!(rig.raw.refused(&request).unwrap(), Errno::BUSY);
    }
    let context = rig.context;
    rig.raw.call(&Request::CloseContext { context }).unwrap();
    for handle in [rig.context, rig.pd, rig.cq.handle, rig.mr, qp.made.qp] {
        for request in naming(handle, &rig) {
            assert_eq!(rig.raw.refused(&request).unwrap(), Errno::INVAL);
        }
    }
    // The session goes on, and what it counts of its objects is right.
    rig.raw.call(&Request::OpenContext).unwrap();
    let counts = |status: &serde_json::Value| {
        status["endpoints"].as_array().is_some_and(|all| {
            all.iter()
                .flat_map(|e| e["sessions"].as_array().into_iter().flatten())
                .any(|s| s["contexts"] == 1 && s["pds"] == 0 && s["qps"] == 0 && s["mrs"] == 0)
        })
    };
    scene
        .bed
        .wait_for_status(counts, crate::scene::REAPED)
        .unwrap();
    drop(rig);
    scene.end();
}

#[test]
fn sizes_that_overflow_are_refused() {
    let scene = Scene::new();
    let mut rig = scene.rig();
    let cq = |cqe, comp_vector| {
        Request::CreateCq(CreateCq {
            context: rig.context,
            cqe,
            channel: None,
            comp_vector,
        })
    };
    for request in [
        cq(0, 0),
        cq(u32::MAX, 0),
        cq((1 << 31) + 1, 0),
        cq(16, u32::MAX),
    ] {
        let errno = rig.raw.refused(&request).unwrap();
        assert_eq!(errno, Errno::INVAL, "{request:?}");
    }
    let big = u32::MAX;
    for cap in [
        QpCap {
            max_send_wr: big,
            ..CAP
        },
        QpCap {
            max_recv_wr: big,
            ..CAP
        },
        QpCap {
            max_send_sge: big,
            ..CAP
        },
        QpCap {
            max_recv_sge: big,
            ..CAP
        },
        QpCap {
            max_inline: big,
            ..CAP
        },
        QpCap {
            max_send_wr: 1 << 31,
            max_send_sge: 1 << 31,
            ..CAP
        },
    ] {
        assert!(rig.qp(QpType::Rc, cap).is_err(), "{cap:?}");
    }
    let (segment, offset) = rig.pages;
    let pool = |segment, offset| PieceKind::Pool { segment, offset };
    let foreign = |addr| PieceKind::Foreign { addr };
    let reg = |iova, len, pieces: &[(u64, PieceKind)]| {
        let piece = |&(len, kind)| PieceDesc { len, kind };
        Request::RegMr(RegMr {
            pd: rig.pd,
            access: all_rights(),
            translation: Translation {
                iova,
                len,
                pieces: pieces.iter().map(piece).collect(),
            },
        })
    };
    let page = 4096;
    let half = 1u64 << 63;
    for request in [
        // More than there is, before and behind.
        reg(0, page, &[(page, pool(segment, u64::MAX - page + 1))]),
        reg(0, 1 << 44, &[(1 << 44, pool(segment, offset))]),
        reg(0, page, &[(page, pool(segment + 1, offset))]),
        reg(0, page, &[(page, pool(u32::MAX, 0))]),
        // Sums that come back to the right length.
        reg(
            0,
            page,
            &[
                (half, foreign(0)),
                (half, foreign(0)),
                (page, foreign(page)),
            ],
        ),
        reg(0, page, &[(2 * page, pool(segment, offset))]),
        reg(0, page, &[]),
        // The last byte is beyond the end of the address space.
        reg(u64::MAX, page, &[(page, pool(segment, offset))]),
        reg(u64::MAX - page + 1, page, &[(page, pool(segment, offset))]),
        reg(0, u64::MAX, &[(u64::MAX, foreign(0))]),
        // Pieces that are no pages.
        reg(
            0,
            page,
            &[
                (1, pool(segment, offset)),
                (1, pool(segment, offset)),
                (page - 2, pool(segment, offset)),
            ],
        ),
    ] {
        let errno = rig.raw.refused(&request).unwrap();
        assert_eq!(errno, Errno::INVAL, "{request:?}");
    }
    let free = |segment, offset, len| Request::FreePages {
        segment,
        offset,
        len,
    };
    for request in [
        free(segment, offset, 0),
        free(segment, offset, u64::MAX),
        free(segment, offset + 1, page),
        free(segment, u64::MAX - page + 1, page),
        free(segment, offset + (1 << 20), page),
        free(7, 0, page),
    ] {
        let errno = rig.raw.refused(&request).unwrap();
        assert_eq!(errno, Errno::INVAL, "{request:?}");
    }
    rig.raw
        .refused(&Request::AllocPages { len: u64::MAX })
        .unwrap();
    drop(rig);
    scene.end();
}

#[test]
fn a_region_at_the_end_of_the_address_space_works() {
    let scene = Scene::new();
    let mut rig = scene.rig();
    let pages = rig.raw.pages(4096).unwrap();
    let last = u64::MAX - 4096;
    let (mr, _) = register(&rig.raw, rig.pd, pages, 4096, last).unwrap();
    rig.raw.call(&Request::DeregMr { mr }).unwrap();
    drop(rig);
    scene.end();
}
