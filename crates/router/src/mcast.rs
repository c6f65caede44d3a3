//! Multicast groups: which queue pairs of a tenant get the datagrams to a multicast GID.

use freeflow_session::Handle;
use freeflow_types::{Gid, QpType, TenantId};
use rustc_hash::FxHashMap;
use rustix::io::Errno;

use crate::engine::Engine;

/// All groups of this host.
#[derive(Debug, Default)]
pub(crate) struct Groups {
    members: FxHashMap<(TenantId, Gid), Vec<Handle>>,
    per_tenant: FxHashMap<TenantId, u32>,
}

impl Groups {
    /// The queue pairs of a group.
    pub(crate) fn members(&self, tenant: TenantId, gid: Gid) -> &[Handle] {
        self.members.get(&(tenant, gid)).map_or(&[], Vec::as_slice)
    }

    fn attach(
        &mut self,
        (tenant, gid): (TenantId, Gid),
        qp: Handle,
        (groups, members): (u32, u32),
    ) -> Result<(), Errno> {
        let count = self.per_tenant.entry(tenant).or_default();
        let is_new = !self.members.contains_key(&(tenant, gid));
        if is_new && *count >= groups {
            return Err(Errno::NOMEM);
        }
        let group = self.members.entry((tenant, gid)).or_default();
        if group.len() >= members as usize {
            return Err(Errno::NOMEM);
        }
        group.push(qp);
        *count += u32::from(is_new);
        Ok(())
    }

    fn detach(&mut self, tenant: TenantId, gid: Gid, qp: Handle) {
        if let Some(group) = self.members.get_mut(&(tenant, gid)) {
            group.retain(|&member| member != qp);
            if group.is_empty() {
                self.members.remove(&(tenant, gid));
                if let Some(count) = self.per_tenant.get_mut(&tenant) {
                    *count = count.saturating_sub(1);
                }
            }
        }
    }
}

impl Engine {
    /// `ibv_attach_mcast(3)`: attaching twice changes nothing. EINVAL: not a datagram queue pair,
    /// or no multicast GID; ENOMEM: too many groups or members.
    pub(crate) fn attach_mcast(&mut self, qp: Handle, gid: Gid) -> Result<(), Errno> {
        let q = self.qps.get(qp).ok_or(Errno::INVAL)?;
        if q.qp_type != QpType::Ud || !gid.is_multicast() {
            return Err(Errno::INVAL);
        }
        if q.groups.contains(&gid) {
            return Ok(());
        }
        let tenant = self.endpoints.get(q.endpoint).ok_or(Errno::INVAL)?.tenant;
        let limits = (self.limits.max_mcast_grp, self.limits.max_mcast_qp_attach);
        self.groups.attach((tenant, gid), qp, limits)?;
        let q = self.qps.get_mut(qp).ok_or(Errno::INVAL)?;
        q.groups.push(gid);
        Ok(())
    }

    /// `ibv_detach_mcast(3)`. EINVAL: it is not attached.
    pub(crate) fn detach_mcast(&mut self, qp: Handle, gid: Gid) -> Result<(), Errno> {
        let q = self.qps.get_mut(qp).ok_or(Errno::INVAL)?;
        let at = q.groups.iter().position(|&g| g == gid);
        q.groups.swap_remove(at.ok_or(Errno::INVAL)?);
        let endpoint = q.endpoint;
        if let Some(e) = self.endpoints.get(endpoint) {
            self.groups.detach(e.tenant, gid, qp);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_bounded_and_end_with_their_last_member() {
        let mut groups = Groups::default();
        let (tenant, limits) = (TenantId(1), (2, 2));
        let gid = |n| Gid([0xFF, n, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, n]);
        let qp = Handle;
        groups.attach((tenant, gid(1)), qp(1), limits).unwrap();
        groups.attach((tenant, gid(1)), qp(2), limits).unwrap();
        let full = groups.attach((tenant, gid(1)), qp(3), limits);
        assert_eq!(full, Err(Errno::NOMEM));
        groups.attach((tenant, gid(2)), qp(1), limits).unwrap();
        let full = groups.attach((tenant, gid(3)), qp(1), limits);
        assert_eq!(full, Err(Errno::NOMEM));
        // Another tenant's groups are others.
        assert!(groups.members(TenantId(2), gid(1)).is_empty());
        groups.attach((TenantId(2), gid(1)), qp(9), limits).unwrap();
        assert_eq!(groups.members(tenant, gid(1)), [qp(1), qp(2)]);
        groups.detach(tenant, gid(2), qp(1));
        groups.attach((tenant, gid(3)), qp(1), limits).unwrap();
    }
}
