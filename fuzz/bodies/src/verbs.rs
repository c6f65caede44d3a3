//! Control verbs in any order and with any values, from three sessions, while the rings hold
//! whatever they hold.

use std::net::{Ipv4Addr, Ipv6Addr};

use arbitrary::{Result, Unstructured};
use freeflow_router::testing::{Host, Process};
use freeflow_session::{
    AdviseMr, AdvisedRange, AllocMw, CmRequest, CreateCq, CreateQp, CreateSrq, ExchangeSlots,
    FileId, Handle, ModifySrq, OpenXrcQp, OpenXrcd, PieceDesc, PieceKind, REGION_SLOTS, RegDmMr,
    RegMr, Reply, Request, ReregMr, SlotsExchanged, Translation, XrcSrq, decode_request,
};
use freeflow_shm::{RegionEntry, RegionTable};
use freeflow_types::{
    Access, AddressVector, Gid, Key, Mtu, MwType, QpAttr, QpAttrMask, QpCap, QpState, QpType, Qpn,
    VirtualIp,
};

use crate::cast::{Bystander, endpoints, finish, host};
use crate::ids;

const STEPS: usize = 128;

/// What is known by now, of all sessions: each may name what is another's.
#[derive(Default)]
struct Known {
    handles: Vec<Handle>,
    qpns: Vec<u32>,
    gids: Vec<Gid>,
}

/// Bytes as a program of requests, writes into shared memory, rounds, and ends of sessions.
pub fn verbs(data: &[u8]) {
    let mut host = host();
    let [a, b, c] = endpoints(&mut host);
    let mut bystander = Bystander::new(&mut host, c);
    let mut actors = vec![
        begin(&mut host, a),
        begin(&mut host, a),
        begin(&mut host, b),
    ];
    let mut known = Known::default();
    for actor in &actors {
        known.gids.extend(&actor.welcome.device.gids);
    }
    let mut input = Unstructured::new(data);
    let program = run(&mut input, &mut host, [a, b], &mut actors, &mut known);
    // The input may end anywhere.
    let _ = program;
    host.check().expect("the engine's books");
    bystander.check(&mut host);
    let mut sessions: Vec<_> = actors.iter().map(|a| a.session).collect();
    sessions.push(bystander.session());
    finish(host, &sessions);
}

fn begin(host: &mut Host, endpoint: Handle) -> Process {
    host.process(endpoint).expect("a session")
}

fn run(
    u: &mut Unstructured<'_>,
    host: &mut Host,
    mut homes: [Handle; 2],
    actors: &mut [Process],
    known: &mut Known,
) -> Result<()> {
    for _ in 0..STEPS {
        if u.is_empty() {
            break;
        }
        let at = u.choose_index(actors.len())?;
        let Some(actor) = actors.get_mut(at) else {
            break;
        };
        match u.int_in_range(0..=19)? {
            0 => {
                let n = u.int_in_range(1..=255)?;
                let bytes = u.bytes(n.min(u.len()))?;
                if let Ok(request) = decode_request(bytes) {
                    ask(host, actor, request, known);
                }
            }
            1 => write(u, host, actor)?,
            2 => {
                let later = [0, 1_000, 1_000_000, 1_000_000_000, u64::MAX / 4];
                host.round(*u.choose(&later)?);
            }
            3 => {
                host.close(actor.session);
                *actor = begin(host, homes[at % 2]);
            }
            4 if u.ratio(1, 8)? => {
                // Its sessions end with it.
                let home = at % 2;
                host.remove_endpoint(homes[home]);
                let ip = VirtualIp(std::net::IpAddr::from([10, 0, 0, 1 + home as u8]));
                let name = if home == 0 { "a" } else { "b" };
                homes[home] = host.endpoint(name, "t", ip).expect("an endpoint");
                for (at, actor) in actors.iter_mut().enumerate() {
                    if !host.is_alive(actor.session) {
                        *actor = begin(host, homes[at % 2]);
                    }
                }
            }
            _ => {
                let request = request(u, known)?;
                ask(host, actor, request, known);
            }
        }
    }
    Ok(())
}

fn ask(host: &mut Host, actor: &Process, request: Request, known: &mut Known) {
    if !host.is_alive(actor.session) {
        return;
    }
    let (reply, _) = host.ask(actor.session, request);
    match reply {
        Ok(Reply::Created(handle)) => known.handles.push(handle),
        Ok(Reply::Mr(made)) => known.handles.push(made.mr),
        Ok(Reply::Cq(made)) => known.handles.push(made.cq),
        Ok(Reply::Mw(made)) => known.handles.push(made.mw),
        Ok(Reply::Dm(made)) => known.handles.push(made.dm),
        Ok(Reply::Srq(made)) => known.handles.push(made.srq),
        Ok(Reply::Qp(made)) => {
            known.handles.push(made.qp);
            known.qpns.push(made.qpn.get());
        }
        Ok(Reply::XrcQp(made)) => {
            known.handles.push(made.open);
            known.qpns.push(made.qpn.get());
        }
        Ok(Reply::Slots(made)) => register(host, actor, &made, known),
        _ => {}
    }
}

/// Registers a page in every other slot that was given out.
fn register(host: &Host, actor: &Process, made: &SlotsExchanged, known: &Known) {
    let entry = RegionEntry {
        pd: known.handles.last().map_or(0, |handle| handle.0),
        access: Access::LOCAL_WRITE.bits(),
        len: 4096,
        ..RegionEntry::default()
    };
    let slab = host
        .slab(actor.session, made.table.slab)
        .expect("the slab of the table");
    let words = slab
        .words(made.table.offset, made.table.len)
        .expect("the table");
    let table = RegionTable::new(words, REGION_SLOTS).expect("all of the table");
    for at in made.slots.iter().step_by(2) {
        table.register(at.slot, at.key.0, &entry);
    }
}

/// A word somewhere in the session's first slab: rings lie close to its start.
fn write(u: &mut Unstructured<'_>, host: &mut Host, actor: &Process) -> Result<()> {
    let at = u.int_in_range(0..=8191u64)? * 8;
    let value = match u.int_in_range(0..=4)? {
        0 => u.int_in_range(0..=64)?,
        1 => u64::MAX,
        2 => 1 << u.int_in_range(0..=63)?,
        _ => u.arbitrary()?,
    };
    if let Some(slab) = host.slab(actor.session, 0) {
        slab.write(at, &value.to_le_bytes())
            .expect("within the slab");
    }
    Ok(())
}

fn handle(u: &mut Unstructured<'_>, known: &Known) -> Result<Handle> {
    if known.handles.is_empty() || u.ratio(1, 32)? {
        return Ok(Handle(u.arbitrary()?));
    }
    // The later, the likelier to exist.
    let back = u.int_in_range(0..=known.handles.len().min(24) - 1)?;
    Ok(known.handles[known.handles.len() - 1 - back])
}

fn maybe(u: &mut Unstructured<'_>, known: &Known) -> Result<Option<Handle>> {
    if u.ratio(1, 2)? {
        Ok(Some(handle(u, known)?))
    } else {
        Ok(None)
    }
}

fn small(u: &mut Unstructured<'_>) -> Result<u32> {
    if u.ratio(1, 16)? {
        u.arbitrary()
    } else {
        u.int_in_range(0..=40)
    }
}

fn request(u: &mut Unstructured<'_>, known: &Known) -> Result<Request> {
    Ok(match u.int_in_range(0..=48)? {
        0 | 1 => Request::OpenContext,
        2 => Request::CloseContext {
            context: handle(u, known)?,
        },
        3 | 4 => Request::AllocPd {
            context: handle(u, known)?,
        },
        5 => Request::DeallocPd {
            pd: handle(u, known)?,
        },
        6 => Request::AllocPages {
            len: if u.ratio(1, 8)? {
                u.arbitrary()?
            } else {
                u.int_in_range(0..=4)? * 4096
            },
        },
        7 => Request::FreePages {
            segment: u.int_in_range(0..=1)?,
            offset: u.int_in_range(0..=4)? * 4096,
            len: u.int_in_range(0..=4)? * 4096,
        },
        8 | 9 => reg_mr(u, known)?,
        10 => Request::DeregMr {
            mr: handle(u, known)?,
        },
        11 => Request::CreateChannel {
            context: handle(u, known)?,
        },
        12 => Request::DestroyChannel {
            channel: handle(u, known)?,
        },
        13 | 14 => Request::CreateCq(CreateCq {
            context: handle(u, known)?,
            cqe: small(u)?,
            channel: maybe(u, known)?,
            comp_vector: 0,
        }),
        15 => {
            if u.arbitrary()? {
                Request::ResizeCq {
                    cq: handle(u, known)?,
                    cqe: small(u)?,
                }
            } else {
                Request::ModifyCq {
                    cq: handle(u, known)?,
                    count: u.int_in_range(0..=4)?,
                    period: u.int_in_range(0..=4)?,
                }
            }
        }
        16 => Request::DestroyCq {
            cq: handle(u, known)?,
        },
        17 | 18 => Request::CreateQp(CreateQp {
            pd: handle(u, known)?,
            qp_type: qp_type(u)?,
            send_cq: handle(u, known)?,
            recv_cq: maybe(u, known)?,
            srq: maybe(u, known)?,
            cap: QpCap {
                max_send_wr: small(u)?,
                max_recv_wr: small(u)?,
                max_send_sge: small(u)? % 5,
                max_recv_sge: small(u)? % 5,
                max_inline: small(u)?,
            },
            sq_sig_all: u.arbitrary()?,
        }),
        19 | 20 => {
            let (attr, mask) = modification(u, known)?;
            Request::ModifyQp {
                qp: handle(u, known)?,
                attr,
                mask,
            }
        }
        21 => Request::QueryQp {
            qp: handle(u, known)?,
        },
        22 => Request::DestroyQp {
            qp: handle(u, known)?,
        },
        23 => Request::Multicast {
            qp: handle(u, known)?,
            gid: Gid([
                0xFF,
                2,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                u.arbitrary()?,
            ]),
            attach: u.arbitrary()?,
        },
        24 => Request::CreateSrq(CreateSrq {
            pd: handle(u, known)?,
            max_wr: small(u)?,
            max_sge: small(u)? % 5,
            xrc: match maybe(u, known)? {
                Some(xrcd) => Some(XrcSrq {
                    xrcd,
                    cq: handle(u, known)?,
                }),
                None => None,
            },
        }),
        25 => Request::ModifySrq(ModifySrq {
            srq: handle(u, known)?,
            max_wr: Some(small(u)?),
            limit: Some(small(u)?),
        }),
        26 => Request::DestroySrq {
            srq: handle(u, known)?,
        },
        27 => Request::OpenXrcd(OpenXrcd {
            context: handle(u, known)?,
            file: u.ratio(1, 2)?.then_some(FileId { dev: 1, ino: 2 }),
            create: u.arbitrary()?,
            exclusive: u.ratio(1, 4)?,
        }),
        28 => Request::CloseXrcd {
            xrcd: handle(u, known)?,
        },
        29 => Request::OpenXrcQp(OpenXrcQp {
            context: handle(u, known)?,
            xrcd: handle(u, known)?,
            qpn: u.ratio(1, 2)?.then_some(Qpn::new(qpn(u, known)?)),
        }),
        30..=33 => memory(u, known)?,
        34 => slots(u)?,
        37..=48 => Request::Cm(cm(u, known)?),
        _ => {
            let (attr, mask) = modification(u, known)?;
            let open = handle(u, known)?;
            match u.int_in_range(0..=2)? {
                0 => Request::ModifyXrcQp { open, attr, mask },
                1 => Request::QueryXrcQp { open },
                _ => Request::CloseXrcQp { open },
            }
        }
    })
}

/// About the connection manager: between the endpoints, and to some address.
fn cm(u: &mut Unstructured<'_>, known: &Known) -> Result<CmRequest> {
    let ip = |gid: &Gid| Ipv6Addr::from(gid.0).to_canonical();
    let mut ips: Vec<_> = known.gids.iter().map(ip).collect();
    ips.push(Ipv4Addr::UNSPECIFIED.into());
    ids::request(u, &ips, |u| handle(u, known))
}

fn qpn(u: &mut Unstructured<'_>, known: &Known) -> Result<u32> {
    match known.qpns.as_slice() {
        [] => u.arbitrary(),
        qpns => u.choose(qpns).copied(),
    }
}

fn qp_type(u: &mut Unstructured<'_>) -> Result<QpType> {
    let all = [
        QpType::Rc,
        QpType::Uc,
        QpType::Ud,
        QpType::XrcSend,
        QpType::XrcRecv,
    ];
    u.choose(&all).copied()
}

fn reg_mr(u: &mut Unstructured<'_>, known: &Known) -> Result<Request> {
    let mut pieces = Vec::new();
    for _ in 0..u.int_in_range(0..=3)? {
        let kind = if u.ratio(1, 4)? {
            PieceKind::Foreign {
                addr: u.arbitrary()?,
            }
        } else {
            PieceKind::Pool {
                segment: u.int_in_range(0..=1)?,
                offset: u.int_in_range(0..=4)? * 4096,
            }
        };
        let len = if u.ratio(1, 4)? {
            u.arbitrary::<u16>()?.into()
        } else {
            4096
        };
        pieces.push(PieceDesc { len, kind });
    }
    let len = if u.ratio(1, 8)? {
        u.arbitrary()?
    } else {
        pieces.iter().map(|p| p.len).sum()
    };
    let translation = Translation {
        iova: u.arbitrary()?,
        len,
        pieces,
    };
    let access = access(u)?;
    if u.ratio(1, 3)? {
        return Ok(Request::ReregMr(ReregMr {
            mr: handle(u, known)?,
            pd: maybe(u, known)?,
            translation: u.ratio(1, 2)?.then_some(translation),
            access: u.ratio(1, 2)?.then_some(access),
        }));
    }
    Ok(Request::RegMr(RegMr {
        pd: handle(u, known)?,
        translation,
        access,
    }))
}

fn access(u: &mut Unstructured<'_>) -> Result<Access> {
    Ok(if u.ratio(1, 2)? {
        Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::MW_BIND
    } else {
        Access::from_bits_retain(u.arbitrary()?)
    })
}

fn memory(u: &mut Unstructured<'_>, known: &Known) -> Result<Request> {
    Ok(match u.int_in_range(0..=6)? {
        0 => Request::AllocMw(AllocMw {
            pd: handle(u, known)?,
            kind: if u.arbitrary()? {
                MwType::One
            } else {
                MwType::Two
            },
        }),
        1 => Request::DeallocMw {
            mw: handle(u, known)?,
        },
        2 => Request::AllocDm {
            context: handle(u, known)?,
            len: small(u)?.into(),
        },
        3 => Request::FreeDm {
            dm: handle(u, known)?,
        },
        4 => Request::RegDmMr(RegDmMr {
            pd: handle(u, known)?,
            dm: handle(u, known)?,
            offset: small(u)?.into(),
            len: small(u)?.into(),
            access: access(u)? | Access::ZERO_BASED,
        }),
        5 => Request::AllocNullMr {
            pd: handle(u, known)?,
        },
        _ => Request::AdviseMr(AdviseMr {
            pd: handle(u, known)?,
            write: u.arbitrary()?,
            ranges: vec![AdvisedRange {
                addr: u.arbitrary()?,
                len: u.arbitrary()?,
                key: Key(u.arbitrary()?),
            }],
        }),
    })
}

/// A few slots of the table of regions, which a session may have or not.
fn slots(u: &mut Unstructured<'_>) -> Result<Request> {
    Ok(match u.int_in_range(0..=5)? {
        0 => Request::AdoptMr { slot: small(u)? },
        1 => Request::Settle,
        2 => Request::QueryDevice,
        _ => {
            let back = (0..u.int_in_range(0..=4)?).map(|_| small(u));
            Request::ExchangeSlots(ExchangeSlots {
                back: back.collect::<Result<_>>()?,
                want: small(u)?,
            })
        }
    })
}

fn modification(u: &mut Unstructured<'_>, known: &Known) -> Result<(QpAttr, QpAttrMask)> {
    use QpAttrMask as Mask;
    let usual = [
        (
            QpState::Init,
            Mask::PKEY_INDEX | Mask::PORT | Mask::ACCESS_FLAGS,
        ),
        (QpState::Init, Mask::PKEY_INDEX | Mask::PORT | Mask::QKEY),
        (
            QpState::Rtr,
            Mask::AV
                | Mask::PATH_MTU
                | Mask::DEST_QPN
                | Mask::RQ_PSN
                | Mask::MAX_DEST_RD_ATOMIC
                | Mask::MIN_RNR_TIMER,
        ),
        (
            QpState::Rtr,
            Mask::AV | Mask::PATH_MTU | Mask::DEST_QPN | Mask::RQ_PSN,
        ),
        (QpState::Rtr, Mask::empty()),
        (
            QpState::Rts,
            Mask::TIMEOUT
                | Mask::RETRY_CNT
                | Mask::RNR_RETRY
                | Mask::SQ_PSN
                | Mask::MAX_QP_RD_ATOMIC,
        ),
        (QpState::Rts, Mask::SQ_PSN),
        (QpState::Sqd, Mask::empty()),
        (QpState::Sqd, Mask::EN_SQD_ASYNC_NOTIFY),
        (QpState::Err, Mask::empty()),
        (QpState::Reset, Mask::empty()),
    ];
    let &(state, mask) = u.choose(&usual)?;
    let mask = if u.ratio(1, 8)? {
        Mask::from_bits_retain(u.arbitrary()?)
    } else {
        mask
    };
    let gid = match known.gids.as_slice() {
        [] => Gid::ZERO,
        gids => *u.choose(gids)?,
    };
    let mtus = [Mtu::B256, Mtu::B4096];
    let attr = QpAttr {
        state,
        cur_state: state,
        path_mtu: *u.choose(&mtus)?,
        qkey: u.int_in_range(0..=1)?,
        dest_qpn: qpn(u, known)?,
        access: Access::from_bits_retain(u.arbitrary::<u8>()?.into()),
        av: AddressVector {
            dgid: gid,
            is_global: true,
            port_num: 1,
            ..AddressVector::default()
        },
        en_sqd_async_notify: true,
        max_rd_atomic: u.int_in_range(0..=17)?,
        max_dest_rd_atomic: u.int_in_range(0..=17)?,
        min_rnr_timer: u.int_in_range(0..=32)?,
        port_num: 1,
        timeout: u.int_in_range(0..=32)?,
        retry_cnt: u.int_in_range(0..=8)?,
        rnr_retry: u.int_in_range(0..=8)?,
        ..QpAttr::default()
    };
    Ok((attr, mask | Mask::STATE))
}
