//! Requests about the connection manager.

use std::net::{IpAddr, SocketAddr};

use arbitrary::{Result, Unstructured};
use freeflow_session::{CmBringUp, CmOption, CmParam, CmQp, CmRequest, Handle, PortSpace};
use freeflow_types::{AsyncEventType, QpState, QpType, Qpn};

fn space(u: &mut Unstructured<'_>) -> Result<PortSpace> {
    u.choose(&[
        PortSpace::Tcp,
        PortSpace::Tcp,
        PortSpace::Udp,
        PortSpace::Ib,
        PortSpace::Ipoib,
    ])
    .copied()
}

fn qp_type(u: &mut Unstructured<'_>) -> Result<QpType> {
    u.choose(&[QpType::Rc, QpType::Uc, QpType::Ud, QpType::XrcSend])
        .copied()
}

fn address(u: &mut Unstructured<'_>, ips: &[IpAddr]) -> Result<SocketAddr> {
    let ip = if u.ratio(1, 8)? {
        IpAddr::from(u.arbitrary::<[u8; 4]>()?)
    } else {
        *u.choose(ips)?
    };
    Ok(SocketAddr::new(ip, u.int_in_range(0..=3)?))
}

pub(crate) fn param(u: &mut Unstructured<'_>) -> Result<CmParam> {
    let len = u.int_in_range(0..=224)?;
    Ok(CmParam {
        qp: CmQp {
            qpn: Qpn::new(u.int_in_range(0..=8)?),
            qp_type: QpType::Rc,
            srq: u.arbitrary()?,
        },
        private_data: if u.ratio(1, 2)? {
            Vec::new()
        } else {
            vec![7; len]
        },
        responder_resources: u.int_in_range(0..=17)?,
        initiator_depth: *u.choose(&[0, 1, 16, 0xFF])?,
        flow_control: u.arbitrary()?,
        retry_count: u.int_in_range(0..=7)?,
        rnr_retry_count: u.int_in_range(0..=7)?,
        qkey: u.arbitrary()?,
        ece: u.arbitrary()?,
    })
}

fn bring_up(qp: Handle, u: &mut Unstructured<'_>) -> Result<CmBringUp> {
    Ok(CmBringUp {
        qp,
        state: *u.choose(&[QpState::Init, QpState::Rtr, QpState::Rts, QpState::Err])?,
        max_dest_rd_atomic: u.arbitrary()?,
        max_rd_atomic: u.arbitrary()?,
    })
}

/// A request. `handle` gives a channel's, an id's, or any other.
pub(crate) fn request<'u>(
    u: &mut Unstructured<'u>,
    ips: &[IpAddr],
    handle: impl Fn(&mut Unstructured<'u>) -> Result<Handle>,
) -> Result<CmRequest> {
    let timeout_ms = 1000;
    Ok(match u.int_in_range(0..=28)? {
        0 => CmRequest::CreateChannel,
        1 => CmRequest::DestroyChannel {
            channel: handle(u)?,
        },
        2..=5 => CmRequest::GetEvent {
            channel: handle(u)?,
        },
        6..=8 => CmRequest::CreateId {
            channel: handle(u)?,
            port_space: space(u)?,
            qp_type: qp_type(u)?,
        },
        9 => CmRequest::DestroyId { id: handle(u)? },
        10 => CmRequest::MigrateId {
            id: handle(u)?,
            channel: handle(u)?,
        },
        11 => CmRequest::QueryId { id: handle(u)? },
        12 | 13 => CmRequest::BindAddr {
            id: handle(u)?,
            addr: address(u, ips)?,
        },
        14 | 15 => CmRequest::ResolveAddr {
            id: handle(u)?,
            src: None,
            dst: address(u, ips)?,
            timeout_ms,
        },
        16 | 17 => CmRequest::ResolveRoute {
            id: handle(u)?,
            timeout_ms,
        },
        18 => CmRequest::Listen {
            id: handle(u)?,
            backlog: u.int_in_range(0..=3)?,
        },
        19 => CmRequest::Connect {
            id: handle(u)?,
            param: param(u)?,
        },
        20 | 21 => CmRequest::Accept {
            id: handle(u)?,
            param: if u.arbitrary()? {
                Some(param(u)?)
            } else {
                None
            },
            up: if u.arbitrary()? {
                Some(bring_up(handle(u)?, u)?)
            } else {
                None
            },
        },
        22 => CmRequest::Reject {
            id: handle(u)?,
            private_data: Vec::new(),
            for_ece: u.arbitrary()?,
        },
        23 => CmRequest::Disconnect {
            id: handle(u)?,
            fail: if u.arbitrary()? {
                Some(handle(u)?)
            } else {
                None
            },
        },
        24 => CmRequest::InitQpAttr {
            id: handle(u)?,
            state: *u.choose(&[QpState::Init, QpState::Rtr, QpState::Rts, QpState::Err])?,
        },
        25 => CmRequest::SetOption {
            id: handle(u)?,
            option: *u.choose(&[
                CmOption::Tos(8),
                CmOption::ReuseAddr(true),
                CmOption::AfOnly(true),
                CmOption::AckTimeout(31),
            ])?,
        },
        27 => CmRequest::BringUp {
            id: handle(u)?,
            up: bring_up(handle(u)?, u)?,
        },
        26 => CmRequest::Notify {
            id: handle(u)?,
            event: AsyncEventType::CommEst,
        },
        _ => match u.int_in_range(0..=2)? {
            0 => CmRequest::Join {
                id: handle(u)?,
                addr: SocketAddr::new([239, 1, 1, 1].into(), 0),
                send_only: u.arbitrary()?,
                cookie: u.int_in_range(0..=3)?,
            },
            1 => CmRequest::Leave {
                id: handle(u)?,
                cookie: u.int_in_range(0..=3)?,
            },
            _ => CmRequest::WriteEvent {
                id: handle(u)?,
                status: u.arbitrary()?,
                arg: u.arbitrary()?,
            },
        },
    })
}
