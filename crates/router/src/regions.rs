//! Control verbs of memory regions.

use freeflow_session::{Handle, MrRegistered, PieceKind, RegMr, Reply};
use freeflow_types::{Access, Key};
use rustix::io::Errno;

use crate::control::{Outcome, done, random_u32};
use crate::engine::Engine;
use crate::objects::{Backing, Mr, Piece};

impl Engine {
    pub(crate) fn reg_mr(&mut self, session: Handle, request: &RegMr) -> Outcome {
        let remote_change = Access::REMOTE_WRITE | Access::REMOTE_ATOMIC;
        let access = request.access;
        if access.intersects(remote_change) && !access.contains(Access::LOCAL_WRITE) {
            return Err(Errno::INVAL);
        }
        let context = self.own_pd(session, request.pd)?.context;
        let limit = self.limits.max_mr;
        let s = self.sessions.get(session).ok_or(Errno::INVAL)?;
        if s.counts.mrs >= limit {
            return Err(Errno::NOMEM);
        }
        let mut pieces = Vec::with_capacity(request.pieces.len());
        let (mut start, mut foreign) = (0, 0);
        for piece in request.pieces.iter().filter(|p| p.len != 0) {
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
                    foreign += piece.len;
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
        let key = loop {
            let key = random_u32()?;
            if key != 0 && !s.keys.contains_key(&key) {
                break key;
            }
        };
        let mr = Mr {
            session,
            context,
            pd: request.pd,
            key: Key(key),
            iova: request.iova,
            len: request.len,
            access,
            pieces,
        };
        let mr = self.mrs.insert(mr).ok_or(Errno::NOMEM)?;
        let s = self.session_mut(session)?;
        s.keys.insert(key, mr);
        s.counts.mrs += 1;
        s.counts.registered += request.len;
        s.counts.foreign += foreign;
        self.own_pd(session, request.pd)?.users += 1;
        Ok((Reply::Mr(MrRegistered { mr, key: Key(key) }), Vec::new()))
    }

    pub(crate) fn dereg_mr(&mut self, session: Handle, mr: Handle) -> Outcome {
        self.mrs
            .get(mr)
            .filter(|m| m.session == session)
            .ok_or(Errno::INVAL)?;
        self.remove_mr(mr);
        done()
    }

    pub(crate) fn remove_mr(&mut self, mr: Handle) {
        let Some(m) = self.mrs.remove(mr) else { return };
        if let Some(pd) = self.pds.get_mut(m.pd) {
            pd.users -= 1;
        }
        if let Some(s) = self.sessions.get_mut(m.session) {
            let foreign = |p: &&Piece| matches!(p.backing, Backing::Foreign { .. });
            s.keys.remove(&m.key.0);
            s.counts.mrs -= 1;
            s.counts.registered -= m.len;
            s.counts.foreign -= m.pieces.iter().filter(foreign).map(|p| p.len).sum::<u64>();
        }
    }
}
