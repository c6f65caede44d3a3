//! Quotas: what all sessions of an endpoint together may have.

use freeflow_api::QuotaStatus;
use freeflow_policy::{Quota, Resource, Setting, TokenBucket, Usage};
use freeflow_session::Handle;
use freeflow_types::DeviceLimits;
use rustix::io::Errno;

use crate::engine::Engine;
use crate::objects::{Endpoint, Session};

/// The operator is told again of the same limit after so many nanoseconds.
const TELL_AGAIN: u64 = 60_000_000_000;

/// An endpoint's quota, and how it is used.
#[derive(Debug)]
pub(crate) struct Allowance {
    pub(crate) quota: Quota,
    usage: Usage,
    /// When it may begin connections.
    connects: TokenBucket,
    /// Of each resource, how often there was too little, and when that was told.
    refused: [(u64, Option<u64>); Resource::ALL.len()],
}

impl Default for Allowance {
    fn default() -> Self {
        let quota = Quota::default();
        Allowance {
            connects: TokenBucket::new(quota.limit(Resource::Connects), 0),
            quota,
            usage: Usage::default(),
            refused: Default::default(),
        }
    }
}

impl Allowance {
    /// When the next connection may begin; [`u64::MAX`] if never.
    pub(crate) fn take_connect(&mut self, now: u64) -> u64 {
        self.connects.take(now)
    }

    fn set(&mut self, setting: Setting, now: u64) {
        self.quota.set(setting);
        if setting.resource == Resource::Connects {
            self.connects.set_rate(setting.limit, now);
        }
    }
}

impl Session {
    /// What it has.
    pub(crate) fn usage(&self) -> Usage {
        let c = &self.counts;
        [
            (Resource::Pds, c.pds.into()),
            (
                Resource::Channels,
                u64::from(c.channels) + u64::from(c.cm_channels),
            ),
            (Resource::Cqs, c.cqs.into()),
            (Resource::Qps, c.qps.into()),
            (Resource::Srqs, c.srqs.into()),
            (Resource::Xrcds, c.xrcds.into()),
            (Resource::CmIds, c.cm_ids.into()),
            (Resource::Mrs, u64::from(c.mrs) + u64::from(c.slots)),
            (Resource::Mws, c.mws.into()),
            (Resource::Registered, c.registered),
            (Resource::Outstanding, c.outstanding),
        ]
        .into_iter()
        .fold(Usage::default(), |usage, (of, n)| usage.with(of, n))
    }
}

impl Endpoint {
    /// Counts what a session has in the place of what it had.
    pub(crate) fn count(&mut self, old: &Usage, new: &Usage) {
        self.allowance.usage.replace(old, new);
    }

    /// What it has of everything.
    #[cfg(feature = "testing")]
    pub(crate) fn usage(&self) -> Usage {
        self.allowance.usage
    }

    /// Whether it may have regions of all addresses, which are any number of bytes.
    pub(crate) fn may_have_everything(&self) -> bool {
        self.allowance.quota.limit(Resource::Registered) == u64::MAX
    }

    /// The device's limits as they are here.
    pub(crate) fn limits(&self, device: &DeviceLimits) -> DeviceLimits {
        let most = |of, limit: u32| {
            let quota = self.allowance.quota.limit(of);
            limit.min(u32::try_from(quota).unwrap_or(u32::MAX))
        };
        let bytes = self.allowance.quota.limit(Resource::Registered);
        let requests = |limit| most(Resource::Outstanding, limit);
        DeviceLimits {
            max_mr_size: device.max_mr_size.min(bytes),
            max_qp: most(Resource::Qps, device.max_qp),
            max_qp_wr: requests(device.max_qp_wr),
            max_cq: most(Resource::Cqs, device.max_cq),
            max_mr: most(Resource::Mrs, device.max_mr),
            max_mw: most(Resource::Mws, device.max_mw),
            max_pd: most(Resource::Pds, device.max_pd),
            max_srq: most(Resource::Srqs, device.max_srq),
            max_srq_wr: requests(device.max_srq_wr),
            max_xrcd: most(Resource::Xrcds, device.max_xrcd),
            ..*device
        }
    }

    /// What `freeflow endpoint inspect` shows of its quota.
    pub(crate) fn quota_status(&self) -> Vec<QuotaStatus> {
        let one = |resource: Resource| {
            let limit = self.allowance.quota.limit(resource);
            QuotaStatus {
                resource,
                used: self.allowance.usage.of(resource),
                limit: (limit != u64::MAX).then_some(limit),
                refused: self.allowance.refused[resource as usize].0,
            }
        };
        Resource::ALL.map(one).into()
    }
}

impl Engine {
    /// Changes an endpoint's quota; what is in use above it stays.
    pub(crate) fn set_quota(&mut self, endpoint: Handle, settings: &[Setting]) {
        let now = self.now;
        if let Some(e) = self.endpoints.get_mut(endpoint) {
            settings.iter().for_each(|&s| e.allowance.set(s, now));
        }
    }

    /// Regions that a session's endpoint may still have without asking for each: none if their
    /// bytes are limited, as the router does not see those.
    pub(crate) fn region_room(&self, session: Handle) -> u32 {
        let s = self.sessions.get(session);
        let Some(e) = s.and_then(|s| self.endpoints.get(s.endpoint)) else {
            return 0;
        };
        let Allowance { quota, usage, .. } = &e.allowance;
        if quota.limit(Resource::Registered) != u64::MAX {
            return 0;
        }
        let left = quota
            .limit(Resource::Mrs)
            .saturating_sub(usage.of(Resource::Mrs));
        u32::try_from(left).unwrap_or(u32::MAX)
    }

    /// Whether a session's endpoint may have `more` of something. ENOMEM: it may not, which is
    /// counted, and told to the operator from time to time.
    pub(crate) fn check_quota(
        &mut self,
        session: Handle,
        resource: Resource,
        more: u64,
    ) -> Result<(), Errno> {
        let s = self.sessions.get(session).ok_or(Errno::INVAL)?;
        let e = self.endpoints.get_mut(s.endpoint).ok_or(Errno::NODEV)?;
        let allowance = &mut e.allowance;
        let Err(exceeded) = allowance.usage.check(&allowance.quota, resource, more) else {
            return Ok(());
        };
        let (refused, told) = &mut allowance.refused[resource as usize];
        *refused += 1;
        if told.is_none_or(|told| self.now.saturating_sub(told) >= TELL_AGAIN) {
            *told = Some(self.now);
            let notice = format!("endpoint \"{}\" is at its quota: {exceeded}", e.name);
            self.notices.push(notice);
        }
        Err(Errno::NOMEM)
    }
}
