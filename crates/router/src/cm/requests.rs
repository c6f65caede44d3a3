//! What sessions ask the connection manager for.

use std::net::SocketAddr;

use freeflow_cm::{Port, Refused};
use freeflow_policy::Resource;
use freeflow_session::{CmBringUp, CmRequest, Handle, Reply};
use freeflow_shm::event_pair;
use freeflow_types::{QpAttr, QpAttrMask, QpState, QpType, Qpn};
use rustix::io::Errno;

use super::{CmChannel, CmId, Membership, entropy};
use crate::control::{Outcome, created, done};
use crate::engine::Engine;
use crate::held::{Held, PIECES_OF_AN_EVENT};

/// Events of an id that may wait before it gets no more of those that its program asks for.
const MAX_WAITING: usize = 256;

/// Events of a session, likewise.
const MAX_WAITING_SESSION: u32 = 65_536;

/// Groups that an id may have joined.
const MAX_GROUPS: usize = 1024;

fn errno(refused: Refused) -> Errno {
    Errno::from_raw_os_error(refused.errno())
}

fn in_state(state: QpState) -> QpAttr {
    QpAttr {
        state,
        ..QpAttr::default()
    }
}

fn reply(reply: Reply) -> Outcome {
    Ok((reply, Vec::new()))
}

impl Engine {
    pub(crate) fn handle_cm(&mut self, session: Handle, request: CmRequest) -> Outcome {
        let outcome = self.ask_cm(session, request);
        self.run_cm();
        outcome
    }

    fn ask_cm(&mut self, session: Handle, request: CmRequest) -> Outcome {
        let now = self.now;
        if let Some(id) = own(&request) {
            self.own_cm_id(session, id)?;
        }
        let manager = &mut self.cm.manager;
        let result = match request {
            CmRequest::CreateChannel => return self.create_cm_channel(session),
            CmRequest::DestroyChannel { channel } => {
                if self.own_cm_channel(session, channel)?.users != 0 {
                    return Err(Errno::BUSY);
                }
                self.remove_cm_channel(channel);
                Ok(())
            }
            CmRequest::GetEvent { channel } => {
                self.own_cm_channel(session, channel)?;
                let event = self.take_cm_event(channel).map(Box::new);
                return reply(Reply::CmEvent(event));
            }
            CmRequest::CreateId {
                channel,
                port_space,
                qp_type,
            } => {
                self.own_cm_channel(session, channel)?;
                let endpoint = self.session_mut(session)?.endpoint;
                let entropy = entropy()?;
                let id = self.add_cm_id(session, channel)?;
                let manager = &mut self.cm.manager;
                manager.create(id, endpoint, port_space, qp_type, entropy);
                return created(id, None);
            }
            CmRequest::DestroyId { id } => {
                let events = self.remove_cm_id(id);
                return reply(Reply::CmDestroyed { events });
            }
            CmRequest::MigrateId { id, channel } => {
                self.own_cm_channel(session, channel)?;
                let events = self.migrate_cm_id(id, channel);
                return reply(Reply::CmMigrated { events });
            }
            CmRequest::QueryId { id } => return self.cm_info(id),
            CmRequest::BindAddr { id, addr } => {
                let endpoint = self.session_mut(session)?.endpoint;
                let port = self.cm_own(endpoint, addr.ip());
                self.cm.manager.bind(id, addr, port).map_err(errno)?;
                return self.cm_info(id);
            }
            CmRequest::ResolveAddr { id, src, dst, .. } => {
                return self.resolve_cm_addr(session, id, src, dst);
            }
            CmRequest::ResolveRoute { id, .. } => {
                self.may_tell(session, id)?;
                self.cm.manager.resolve_route(id)
            }
            CmRequest::Listen { id, backlog } => {
                manager.listen(id, backlog).map_err(errno)?;
                self.session_mut(session)?.counts.cm_listeners += 1;
                return self.cm_info(id);
            }
            CmRequest::Connect { id, param } => {
                if !self.cm.manager.may_connect(id) {
                    return Err(Errno::INVAL);
                }
                self.check_cm_qp(session, id, param.qp.qpn)?;
                let at = self.may_connect(session)?;
                self.cm.manager.connect(now, at, id, &param)
            }
            CmRequest::Accept { id, param, up } => {
                if let Some(up) = up {
                    self.bring_up(session, id, &up)?;
                }
                self.cm.manager.accept(now, id, param.as_ref())
            }
            CmRequest::Reject {
                id,
                private_data,
                for_ece,
            } => manager.reject(now, id, &private_data, for_ece),
            CmRequest::Disconnect { id, fail } => {
                if let Some(qp) = fail {
                    let attr = in_state(QpState::Err);
                    self.modify_qp(session, qp, &attr, QpAttrMask::STATE)?;
                }
                self.cm.manager.disconnect(now, id)
            }
            CmRequest::Notify { id, event } => manager.notify(id, event),
            CmRequest::InitQpAttr { id, state } => {
                let attr = manager.init_qp_attr(id, state).map_err(errno)?;
                return reply(Reply::CmQpAttr(Box::new(attr)));
            }
            CmRequest::BringUp { id, up } => {
                self.bring_up(session, id, &up)?;
                Ok(())
            }
            CmRequest::SetOption { id, option } => manager.set_option(id, option),
            CmRequest::Join {
                id, addr, cookie, ..
            } => {
                self.may_tell(session, id)?;
                if self.own_cm_id(session, id)?.groups.len() >= MAX_GROUPS {
                    return Err(Errno::NOMEM);
                }
                self.cm.manager.join(id, addr, cookie).map_err(errno)?;
                let joined = Membership { cookie };
                self.own_cm_id(session, id)?.groups.push(joined);
                Ok(())
            }
            CmRequest::Leave { id, cookie } => {
                let i = self.own_cm_id(session, id)?;
                let at = i.groups.iter().position(|group| group.cookie == cookie);
                i.groups.swap_remove(at.ok_or(Errno::INVAL)?);
                let events = self.forget_cm_group(id, cookie);
                return reply(Reply::CmDestroyed { events });
            }
            CmRequest::WriteEvent { id, status, arg } => {
                self.may_tell(session, id)?;
                self.cm.manager.write_event(id, status, arg)
            }
        };
        result.map_err(errno)?;
        done()
    }

    fn own_cm_id(&mut self, session: Handle, id: Handle) -> Result<&mut CmId, Errno> {
        let id = self.cm.ids.get_mut(id);
        let own = id.filter(|id| id.session == session && !id.offered);
        own.ok_or(Errno::INVAL)
    }

    fn own_cm_channel(&mut self, session: Handle, ch: Handle) -> Result<&mut CmChannel, Errno> {
        let channel = self.cm.channels.get_mut(ch);
        let own = channel.filter(|channel| channel.session() == session);
        own.ok_or(Errno::INVAL)
    }

    /// Whether an id may get one more event that its program asks for. ENOMEM: too many wait.
    fn may_tell(&mut self, session: Handle, id: Handle) -> Result<(), Errno> {
        let of_id = self.own_cm_id(session, id)?.waiting.len();
        let of_session = self.session_mut(session)?.counts.cm_events;
        if of_id >= MAX_WAITING || of_session >= MAX_WAITING_SESSION {
            return Err(Errno::NOMEM);
        }
        self.check_session(session, Held::pieces(PIECES_OF_AN_EVENT as usize))
    }

    fn cm_info(&self, id: Handle) -> Outcome {
        reply(Reply::CmId(self.cm.info(id)?))
    }

    fn create_cm_channel(&mut self, session: Handle) -> Outcome {
        self.check_quota(session, Resource::Channels, 1)?;
        self.check_session(session, Held::DESCRIPTOR)?;
        let (router, program) = event_pair()?;
        let channel = CmChannel::new(session, router)?;
        let channel = self.cm.channels.insert(channel).ok_or(Errno::NOMEM)?;
        self.session_mut(session)?.counts.cm_channels += 1;
        created(channel, Some(program))
    }

    fn resolve_cm_addr(
        &mut self,
        session: Handle,
        id: Handle,
        src: Option<SocketAddr>,
        dst: SocketAddr,
    ) -> Outcome {
        self.may_tell(session, id)?;
        let endpoint = self.session_mut(session)?.endpoint;
        let own = src.and_then(|src| self.cm_own(endpoint, src.ip()));
        let from = self.cm.manager.port(id).or(own);
        let way = self.cm_way(endpoint, from, dst);
        let manager = &mut self.cm.manager;
        let resolved = manager.resolve_addr(id, (src, own), dst, way);
        resolved.map_err(errno)?;
        done()
    }

    /// Brings a session's queue pair up for an id. INIT comes first in any case: what peers may do
    /// there is known only once there is a connection.
    fn bring_up(&mut self, session: Handle, id: Handle, up: &CmBringUp) -> Result<(), Errno> {
        let all = [QpState::Init, QpState::Rtr, QpState::Rts];
        let last = all.iter().position(|&state| state == up.state);
        let datagrams = self.own_qp(session, up.qp)?.qp_type == QpType::Ud;
        for &state in all.iter().take(last.ok_or(Errno::INVAL)? + 1) {
            let (mut attr, mask) = match state {
                QpState::Rtr if datagrams => (in_state(state), QpAttrMask::STATE),
                QpState::Rts if datagrams => {
                    (in_state(state), QpAttrMask::STATE | QpAttrMask::SQ_PSN)
                }
                _ => {
                    let said = self.cm.manager.init_qp_attr(id, state).map_err(errno)?;
                    (said.attr, said.mask)
                }
            };
            attr.max_dest_rd_atomic = up.max_dest_rd_atomic.unwrap_or(attr.max_dest_rd_atomic);
            attr.max_rd_atomic = up.max_rd_atomic.unwrap_or(attr.max_rd_atomic);
            self.modify_qp(session, up.qp, &attr, mask)?;
        }
        Ok(())
    }

    /// Whether a session may connect an id with a queue pair. By the host's own address, which
    /// endpoints share, its peer tells connections apart by that number alone: EINVAL, if it is
    /// another endpoint's.
    fn check_cm_qp(&mut self, session: Handle, id: Handle, qpn: Qpn) -> Result<(), Errno> {
        let virtual_port = |port: Port| port.index == 0;
        if self.cm.manager.port(id).is_none_or(virtual_port) {
            return Ok(());
        }
        let endpoint = self.session_mut(session)?.endpoint;
        let qp = self.by_qpn.get(&qpn.get()).and_then(|&qp| self.qps.get(qp));
        match qp {
            Some(qp) if qp.endpoint != endpoint => Err(Errno::INVAL),
            _ => Ok(()),
        }
    }

    /// When the endpoint of a session may begin another connection. EAGAIN: never.
    fn may_connect(&mut self, session: Handle) -> Result<u64, Errno> {
        let endpoint = self.session_mut(session)?.endpoint;
        let e = self.endpoints.get_mut(endpoint).ok_or(Errno::NODEV)?;
        match e.allowance.take_connect(self.now) {
            u64::MAX => Err(Errno::AGAIN),
            at => Ok(at),
        }
    }
}

/// The id that a request is about.
fn own(request: &CmRequest) -> Option<Handle> {
    match request {
        CmRequest::CreateChannel
        | CmRequest::DestroyChannel { .. }
        | CmRequest::GetEvent { .. }
        | CmRequest::CreateId { .. } => None,
        CmRequest::DestroyId { id }
        | CmRequest::MigrateId { id, .. }
        | CmRequest::QueryId { id }
        | CmRequest::BindAddr { id, .. }
        | CmRequest::ResolveAddr { id, .. }
        | CmRequest::ResolveRoute { id, .. }
        | CmRequest::Listen { id, .. }
        | CmRequest::Connect { id, .. }
        | CmRequest::Accept { id, .. }
        | CmRequest::Reject { id, .. }
        | CmRequest::Disconnect { id, .. }
        | CmRequest::Notify { id, .. }
        | CmRequest::InitQpAttr { id, .. }
        | CmRequest::BringUp { id, .. }
        | CmRequest::SetOption { id, .. }
        | CmRequest::Join { id, .. }
        | CmRequest::Leave { id, .. }
        | CmRequest::WriteEvent { id, .. } => Some(*id),
    }
}
