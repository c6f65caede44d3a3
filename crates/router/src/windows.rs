//! Memory windows: allocating, binding, invalidating (IBTA volume 1, 10.6.7).
//!
//! Binding and invalidating are work requests, executed in the order of their send queue.

use freeflow_policy::Resource;
use freeflow_session::{AllocMw, Handle, MwAllocated, Reply};
use freeflow_transport::Outcome;
use freeflow_types::{Access, Key, MwType, Opcode};
use rustix::io::Errno;

use crate::control::{self, done};
use crate::engine::Engine;
use crate::exec::Request;
use crate::keys::{Named, TAG};
use crate::objects::Mr;
use crate::table::Owned;

/// Memory window.
#[derive(Debug)]
pub(crate) struct Window {
    pub(crate) session: Handle,
    pub(crate) context: Handle,
    pub(crate) pd: Handle,
    kind: MwType,
    key: Key,
    binding: Option<Binding>,
}

#[cfg(feature = "testing")]
impl Window {
    pub(crate) fn is_bound_to(&self, mr: Handle) -> bool {
        self.binding.is_some_and(|b| b.mr == mr)
    }
}

/// What a bound window shows.
#[derive(Clone, Copy, Debug)]
struct Binding {
    mr: Handle,
    /// Offset in the region.
    offset: u64,
    /// The first byte's address in requests.
    base: u64,
    len: u64,
    access: Access,
    /// Type 2: the only queue pair whose peer may use it.
    qp: Option<Handle>,
}

impl Owned for Window {
    fn owner(&self) -> Handle {
        self.context
    }
}

impl Engine {
    pub(crate) fn alloc_mw(&mut self, session: Handle, request: &AllocMw) -> control::Outcome {
        let context = self.own_pd(session, request.pd)?.context;
        self.check_quota(session, Resource::Mws, 1)?;
        let limit = self.limits.max_mw;
        let s = self.session_mut(session)?;
        if s.counts.mws >= limit {
            return Err(Errno::NOMEM);
        }
        let key = s.keys.choose()?;
        let window = Window {
            session,
            context,
            pd: request.pd,
            kind: request.kind,
            key,
            binding: None,
        };
        let mw = self.windows.insert(window).ok_or(Errno::NOMEM)?;
        let s = self.session_mut(session)?;
        s.keys.insert(key, Named::Window(mw));
        s.counts.mws += 1;
        self.own_pd(session, request.pd)?.users += 1;
        Ok((Reply::Mw(MwAllocated { mw, key }), Vec::new()))
    }

    pub(crate) fn dealloc_mw(&mut self, session: Handle, mw: Handle) -> control::Outcome {
        let own = |w: &&Window| w.session == session;
        self.windows.get(mw).filter(own).ok_or(Errno::INVAL)?;
        self.remove_window(mw);
        done()
    }

    /// Unbinds and removes a window.
    pub(crate) fn remove_window(&mut self, mw: Handle) {
        self.rebind(mw, None);
        let Some(w) = self.windows.remove(mw) else {
            return;
        };
        if let Some(pd) = self.pds.get_mut(w.pd) {
            pd.users -= 1;
        }
        if let Some(s) = self.sessions.get_mut(w.session) {
            s.keys.remove(w.key);
            s.counts.mws -= 1;
        }
    }

    fn rebind(&mut self, mw: Handle, to: Option<Binding>) {
        let Some(w) = self.windows.get_mut(mw) else {
            return;
        };
        let from = std::mem::replace(&mut w.binding, to);
        if let Some(mr) = from.and_then(|from| self.mrs.get_mut(from.mr)) {
            mr.windows -= 1;
        }
        if let Some(mr) = to.and_then(|to| self.mrs.get_mut(to.mr)) {
            mr.windows += 1;
        }
    }

    /// Executes a request between a queue pair and its own device.
    pub(crate) fn local_operation(
        &mut self,
        qp: Handle,
        opcode: Opcode,
        request: &Request,
    ) -> Outcome {
        let (result, refused) = match opcode {
            Opcode::BindMw => (self.bind(qp, request), Outcome::BindRefused),
            _ => {
                let invalidated = self.invalidate(qp, request.entry.imm);
                (invalidated, Outcome::LocalQpOperation)
            }
        };
        result.map_or(refused, |()| Outcome::Delivered)
    }

    /// Binds a window, or unbinds one of type 1 by a length of 0. `None`: refused, nothing has
    /// changed.
    fn bind(&mut self, qp: Handle, request: &Request) -> Option<()> {
        let bind = request.entry.bind();
        let pd = self.qps.get(qp)?.pd;
        let mw = Handle(bind.window);
        let w = self.windows.get(mw).filter(|w| w.pd == pd)?;
        let kind = w.kind;
        let access = Access::from_bits(bind.access).filter(|a| Access::WINDOW.contains(*a))?;
        let to = match (kind, bind.len) {
            (MwType::One, 0) => None,
            // Only invalidation frees a window of type 2.
            (MwType::Two, _) if bind.len == 0 || w.binding.is_some() => return None,
            _ => Some(self.binding(qp, pd, kind, &bind, access)?),
        };
        self.rebind(mw, to);
        let w = self.windows.get_mut(mw)?;
        // The map of keys does not look at the tag.
        w.key = Key(w.key.0 & !TAG | bind.rkey & TAG);
        Some(())
    }

    fn binding(
        &self,
        qp: Handle,
        pd: Handle,
        kind: MwType,
        bind: &freeflow_shm::Bind,
        access: Access,
    ) -> Option<Binding> {
        let zero_based = access.contains(Access::ZERO_BASED);
        let (handle, mr) = self.keyed_region(pd, bind.lkey)?;
        let changes = access.intersects(Access::REMOTE_CHANGE);
        let allowed = mr.access.contains(Access::MW_BIND)
            && !mr.access.contains(Access::ZERO_BASED)
            && (!changes || mr.access.contains(Access::LOCAL_WRITE))
            && (!zero_based || kind == MwType::Two);
        if !allowed {
            return None;
        }
        Some(Binding {
            mr: handle,
            offset: mr.offset(bind.addr, bind.len)?,
            base: if zero_based { 0 } else { bind.addr },
            len: bind.len,
            access,
            qp: (kind == MwType::Two).then_some(qp),
        })
    }

    /// Invalidates a window of type 2 that is bound to this queue pair. `None`: the key names none.
    /// Receiving queue pairs of XRC have none: they post nothing.
    pub(crate) fn invalidate(&mut self, qp: Handle, key: u32) -> Option<()> {
        let pd = self.pds.get(self.qps.get(qp)?.pd)?;
        let Named::Window(mw) = self.sessions.get(pd.session)?.keys.get(key)? else {
            return None;
        };
        let w = self.windows.get(mw).filter(|w| w.key.0 == key)?;
        if w.binding?.qp != Some(qp) {
            return None;
        }
        self.rebind(mw, None);
        Some(())
    }

    /// The region behind a window's key, and the offset in it, for a request to a queue pair that
    /// is meant for a protection domain.
    pub(crate) fn through_window(
        &self,
        (qp, pd): (Handle, Handle),
        mw: Handle,
        key: u32,
        range: Option<(u64, u64)>,
        need: Access,
    ) -> Option<(&Mr, u64)> {
        let w = self.windows.get(mw).filter(|w| w.key.0 == key)?;
        let b = w.binding?;
        let reached = match b.qp {
            Some(bound) => bound == qp,
            None => pd == w.pd,
        };
        let (addr, len) = range.unwrap_or((b.base, 0));
        let offset = addr.checked_sub(b.base)?;
        let inside = offset.checked_add(len)? <= b.len;
        if !reached || !inside || !b.access.contains(need) {
            return None;
        }
        Some((self.mrs.get(b.mr)?, b.offset + offset))
    }

    /// Windows that are bound.
    #[cfg(test)]
    pub(crate) fn bound_windows(&self) -> u32 {
        let bound = self.windows.iter().filter(|(_, w)| w.binding.is_some());
        bound.count() as u32
    }
}
