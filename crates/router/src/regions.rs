//! Control verbs of memory regions and device memory.

use freeflow_policy::Resource;
use freeflow_session::{
    AdviseMr, DmAllocated, Handle, MrRegistered, PieceDesc, PieceKind, RegDmMr, RegMr, Reply,
    ReregMr, Translation,
};
use freeflow_types::{Access, Key};
use rustix::io::Errno;

use crate::control::{Outcome, done};
use crate::engine::Engine;
use crate::held::Held;
use crate::keys::Named;
use crate::objects::{Backing, Dm, Mr, Piece, claim};

/// Rights that a region may have. Pages of a memfd do not survive the host: nothing here is
/// persistent.
fn check_access(access: Access) -> Result<(), Errno> {
    if access.contains(Access::FLUSH_PERSISTENT) {
        return Err(Errno::OPNOTSUPP);
    }
    let known = Access::all().contains(access);
    let changes = access.intersects(Access::REMOTE_CHANGE);
    if !known || (changes && !access.contains(Access::LOCAL_WRITE)) {
        return Err(Errno::INVAL);
    }
    Ok(())
}

impl Engine {
    pub(crate) fn reg_mr(&mut self, session: Handle, request: &RegMr) -> Outcome {
        check_access(request.access)?;
        let pieces = self.pieces(session, &request.translation)?;
        let (iova, len) = (request.translation.iova, request.translation.len);
        self.add_mr(
            session,
            request.pd,
            request.access,
            (iova, len),
            pieces,
            None,
            None,
        )
    }

    /// What backs a region that a session describes.
    fn pieces(&self, session: Handle, at: &Translation) -> Result<Vec<Piece>, Errno> {
        let s = self.sessions.get(session).ok_or(Errno::INVAL)?;
        if !are_whole_pages(&at.pieces) {
            return Err(Errno::INVAL);
        }
        let mut pieces = Vec::with_capacity(at.pieces.len());
        let mut start = 0;
        for piece in at.pieces.iter().filter(|p| p.len != 0) {
            let backing = match piece.kind {
                PieceKind::Pool { segment, offset } => {
                    // Validated not to overflow.
                    if offset + piece.len > s.segments.size(segment) {
                        return Err(Errno::INVAL);
                    }
                    Backing::Pool { segment, offset }
                }
                PieceKind::Foreign { addr } => {
                    if s.memory.is_none() {
                        return Err(Errno::PERM);
                    }
                    if self.endpoints.get(s.endpoint).is_none_or(|e| e.late) {
                        return Err(Errno::OPNOTSUPP);
                    }
                    Backing::Foreign { addr }
                }
            };
            pieces.push(Piece {
                start,
                len: piece.len,
                backing,
            });
            start += piece.len;
        }
        Ok(pieces)
    }

    /// Adds a region, with a key that its session has already or with a new one.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one property of the region"
    )]
    pub(crate) fn add_mr(
        &mut self,
        session: Handle,
        pd: Handle,
        access: Access,
        (iova, len): (u64, u64),
        pieces: Vec<Piece>,
        dm: Option<Handle>,
        key: Option<Key>,
    ) -> Outcome {
        let context = self.own_pd(session, pd)?.context;
        let limit = self.limits.max_mr;
        let s = self.session_mut(session)?;
        if s.counts.mrs + s.counts.slots >= limit {
            return Err(Errno::NOMEM);
        }
        self.check_session(session, Held::pieces(pieces.len()))?;
        self.check_quota(session, Resource::Mrs, 1)?;
        self.check_quota(session, Resource::Registered, claim(&pieces))?;
        let s = self.session_mut(session)?;
        let key = key.map_or_else(|| s.keys.choose(), Ok)?;
        let region = Mr {
            session,
            context,
            pd,
            key,
            iova,
            len,
            access,
            pieces,
            dm,
            windows: 0,
        };
        let (registered, foreign) = region.weight();
        let count = region.pieces.len() as u64;
        let mr = self.mrs.insert(region).ok_or(Errno::NOMEM)?;
        let s = self.session_mut(session)?;
        s.keys.insert(key, Named::Region(mr));
        s.counts.mrs += 1;
        s.counts.registered += registered;
        s.counts.foreign += foreign;
        s.counts.pieces += count;
        self.own_pd(session, pd)?.users += 1;
        if let Some(dm) = dm.and_then(|dm| self.dms.get_mut(dm)) {
            dm.users += 1;
        }
        Ok((Reply::Mr(MrRegistered { mr, key }), Vec::new()))
    }

    fn own_mr(&mut self, session: Handle, mr: Handle) -> Result<&mut Mr, Errno> {
        self.mrs
            .get_mut(mr)
            .filter(|m| m.session == session)
            .ok_or(Errno::INVAL)
    }

    /// The region as it will be is checked as a whole before anything changes. Requests that are
    /// being executed find the new region with their next part.
    pub(crate) fn rereg_mr(&mut self, session: Handle, request: &ReregMr) -> Outcome {
        let m = self.own_mr(session, request.mr)?;
        let (context, old_pd, windows) = (m.context, m.pd, m.windows);
        let plain = m.dm.is_none() && m.pieces.iter().all(|p| p.backing != Backing::Null);
        if !plain {
            return Err(Errno::INVAL);
        }
        if windows != 0 {
            return Err(Errno::BUSY);
        }
        if let Some(access) = request.access {
            check_access(access)?;
            let everything = claim(&self.own_mr(session, request.mr)?.pieces) == u64::MAX;
            if everything && request.translation.is_none() && !access.contains(Access::ON_DEMAND) {
                return Err(Errno::INVAL);
            }
        }
        let pd = request.pd.unwrap_or(old_pd);
        if self.own_pd(session, pd)?.context != context {
            return Err(Errno::INVAL);
        }
        let place = match &request.translation {
            Some(to) => Some((to.iova, to.len, self.pieces(session, to)?)),
            None => None,
        };
        if let Some((.., pieces)) = &place {
            self.check_session(session, Held::pieces(pieces.len()))?;
            let m = self.own_mr(session, request.mr)?;
            // A region of all addresses counts as no bytes, but one that is allowed stays so.
            let (old, new) = (claim(&m.pieces), claim(pieces));
            let more = match (old, new) {
                (u64::MAX, u64::MAX) => 0,
                _ => new.saturating_sub(m.weight().0),
            };
            self.check_quota(session, Resource::Registered, more)?;
        }
        let m = self.own_mr(session, request.mr)?;
        let old = m.weight();
        let old_pieces = m.pieces.len() as u64;
        m.pd = pd;
        m.access = request.access.unwrap_or(m.access);
        if let Some(place) = place {
            (m.iova, m.len, m.pieces) = place;
        }
        let new = m.weight();
        let new_pieces = m.pieces.len() as u64;
        let counts = &mut self.session_mut(session)?.counts;
        counts.registered = counts.registered - old.0 + new.0;
        counts.foreign = counts.foreign - old.1 + new.1;
        counts.pieces = counts.pieces - old_pieces + new_pieces;
        self.own_pd(session, old_pd)?.users -= 1;
        self.own_pd(session, pd)?.users += 1;
        done()
    }

    /// A region of all addresses that is nowhere (`ibv_alloc_null_mr(3)`); peers have no rights.
    pub(crate) fn alloc_null_mr(&mut self, session: Handle, pd: Handle) -> Outcome {
        let everything = Piece {
            start: 0,
            len: u64::MAX,
            backing: Backing::Null,
        };
        let range = (0, u64::MAX);
        self.add_mr(
            session,
            pd,
            Access::LOCAL_WRITE,
            range,
            vec![everything],
            None,
            None,
        )
    }

    /// Nothing is fetched here: foreign pages come when they are used. The program has them
    /// fetched if this says that it may (`ibv_advise_mr(3)`).
    pub(crate) fn advise_mr(&mut self, session: Handle, request: &AdviseMr) -> Outcome {
        self.own_pd(session, request.pd)?;
        for range in &request.ranges {
            let s = self.session_mut(session)?;
            let mr = match s.keys.get(range.key.0) {
                Some(Named::Region(mr)) => self.mrs.get(mr).filter(|m| m.key == range.key),
                Some(Named::Slot(slot)) => {
                    let found = s.posted.as_ref().and_then(|p| p.found(slot, range.key));
                    let found = found.ok_or(Errno::NOENT)?;
                    // There are no on-demand regions among them.
                    let own = found.pd == request.pd.0;
                    return Err(if own { Errno::INVAL } else { Errno::PERM });
                }
                Some(Named::Window(_)) => return Err(Errno::INVAL),
                None => None,
            };
            let mr = mr.ok_or(Errno::NOENT)?;
            if mr.pd != request.pd {
                return Err(Errno::PERM);
            }
            if !mr.access.contains(Access::ON_DEMAND) {
                return Err(Errno::INVAL);
            }
            if request.write && !mr.access.contains(Access::LOCAL_WRITE) {
                return Err(Errno::PERM);
            }
            mr.offset(range.addr, range.len).ok_or(Errno::FAULT)?;
        }
        done()
    }

    pub(crate) fn dereg_mr(&mut self, session: Handle, mr: Handle) -> Outcome {
        if self.own_mr(session, mr)?.windows != 0 {
            return Err(Errno::BUSY);
        }
        self.remove_mr(mr);
        done()
    }

    /// Removes a region to which no window is bound.
    pub(crate) fn remove_mr(&mut self, mr: Handle) {
        let Some(m) = self.mrs.remove(mr) else { return };
        if let Some(pd) = self.pds.get_mut(m.pd) {
            pd.users -= 1;
        }
        if let Some(dm) = m.dm.and_then(|dm| self.dms.get_mut(dm)) {
            dm.users -= 1;
        }
        if let Some(s) = self.sessions.get_mut(m.session) {
            let (registered, foreign) = m.weight();
            s.keys.remove(m.key);
            s.counts.mrs -= 1;
            s.counts.registered -= registered;
            s.counts.foreign -= foreign;
            s.counts.pieces -= m.pieces.len() as u64;
        }
    }

    fn own_dm(&mut self, session: Handle, dm: Handle) -> Result<&mut Dm, Errno> {
        self.dms
            .get_mut(dm)
            .filter(|d| d.session == session)
            .ok_or(Errno::INVAL)
    }

    pub(crate) fn alloc_dm(&mut self, session: Handle, context: Handle, len: u64) -> Outcome {
        self.own_context(session, context)?;
        let limit = self.limits.max_dm_size;
        let s = self.session_mut(session)?;
        if len > limit.saturating_sub(s.counts.device) {
            return Err(Errno::NOMEM);
        }
        let more = Held::range(&s.segments, len);
        self.check_session(session, more)?;
        let range = self.session_mut(session)?.segments.alloc(len)?;
        let dm = Dm {
            session,
            context,
            range,
            len,
            users: 0,
        };
        let Some(dm) = self.dms.insert(dm) else {
            self.session_mut(session)?.segments.free(range)?;
            return Err(Errno::NOMEM);
        };
        let s = self.session_mut(session)?;
        s.counts.device += range.len;
        let fds = s.segments.show(range.area).into_iter().collect();
        let reply = Reply::Dm(DmAllocated {
            dm,
            segment: range.area,
            offset: range.offset,
        });
        Ok((reply, fds))
    }

    pub(crate) fn free_dm(&mut self, session: Handle, dm: Handle) -> Outcome {
        if self.own_dm(session, dm)?.users != 0 {
            return Err(Errno::BUSY);
        }
        self.remove_dm(dm);
        done()
    }

    /// Removes device memory in which no region is.
    pub(crate) fn remove_dm(&mut self, dm: Handle) {
        let Some(d) = self.dms.remove(dm) else { return };
        if let Some(s) = self.sessions.get_mut(d.session) {
            s.counts.device -= d.range.len;
            // A session that has given the pages back itself harms itself alone.
            let _ = s.segments.free(d.range);
        }
    }

    pub(crate) fn reg_dm_mr(&mut self, session: Handle, request: &RegDmMr) -> Outcome {
        check_access(request.access)?;
        if !request.access.contains(Access::ZERO_BASED) {
            return Err(Errno::INVAL);
        }
        let context = self.own_pd(session, request.pd)?.context;
        let dm = self.own_dm(session, request.dm)?;
        // Validated not to overflow.
        if dm.context != context || request.offset + request.len > dm.len {
            return Err(Errno::INVAL);
        }
        let piece = Piece {
            start: 0,
            len: request.len,
            backing: Backing::Pool {
                segment: dm.range.area,
                offset: dm.range.offset + request.offset,
            },
        };
        let (range, dm) = ((0, request.len), Some(request.dm));
        let (pd, access) = (request.pd, request.access);
        // An empty region is in no place.
        let pieces = Some(piece).filter(|p| p.len != 0).into_iter().collect();
        self.add_mr(session, pd, access, range, pieces, dm, None)
    }
}

/// Whether all pieces but the first and the last are whole pages: else a few bytes of a message
/// could be as many pieces, each as much work as a page.
fn are_whole_pages(pieces: &[PieceDesc]) -> bool {
    let page = crate::memory::page_size();
    let inner = pieces.get(1..pieces.len().saturating_sub(1));
    inner.is_none_or(|inner| inner.iter().all(|p| p.len.is_multiple_of(page)))
}
