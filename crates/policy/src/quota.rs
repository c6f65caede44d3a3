//! How much of everything an endpoint may have.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! resources {
    ($($(#[$doc:meta])* $variant:ident $name:literal = $default:expr,)+) => {
        /// What is limited.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
        pub enum Resource { $($(#[$doc])* #[serde(rename = $name)] $variant,)+ }

        impl Resource {
            /// All of them.
            pub const ALL: [Resource; COUNT] = [$(Resource::$variant,)+];

            /// Its name in commands and messages.
            pub const fn name(self) -> &'static str {
                match self { $(Resource::$variant => $name,)+ }
            }

            /// Whether it is so many per second, rather than so many at a time.
            pub const fn is_rate(self) -> bool {
                matches!(self, Resource::Control | Resource::Connects)
            }

            const fn default_limit(self) -> u64 {
                match self { $(Resource::$variant => $default,)+ }
            }
        }

        const COUNT: usize = [$($name),+].len();
    };
}

/// No limit but the device's.
const NONE: u64 = u64::MAX;

resources! {
    /// Protection domains.
    Pds "pds" = 65_536,
    /// Completion channels.
    Channels "channels" = 65_536,
    /// Completion queues.
    Cqs "cqs" = 65_536,
    /// Queue pairs.
    Qps "qps" = 65_536,
    /// Shared receive queues.
    Srqs "srqs" = 65_536,
    /// Open XRC domains.
    Xrcds "xrcds" = 65_536,
    /// Ids of the connection manager.
    CmIds "cm_ids" = 65_536,
    /// Memory regions.
    Mrs "mrs" = 1 << 19,
    /// Memory windows.
    Mws "mws" = 1 << 19,
    /// Bytes in memory regions.
    Registered "registered" = NONE,
    /// Work requests that all queues together can hold.
    Outstanding "outstanding" = NONE,
    /// Control verbs per second.
    Control "control" = NONE,
    /// Connections that the connection manager begins per second.
    Connects "connects" = 10_000,
}

/// What is too much.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{} are limited to {limit}, {used} are in use and {more} more were wanted", resource.name())]
pub struct Exceeded {
    /// Of what.
    pub resource: Resource,
    /// The most there may be.
    pub limit: u64,
    /// How many there are.
    pub used: u64,
    /// How many more there were to be.
    pub more: u64,
}

/// Why a text is no setting.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ParseError {
    /// Not `NAME=NUMBER`.
    #[error("\"{0}\" is not NAME=NUMBER, with K, M, G or T for powers of 1024, or NAME=none")]
    Form(String),
    /// Nothing of that name is limited.
    #[error("there is no quota \"{name}\"; there are: {}", Resource::ALL.map(Resource::name).join(", "))]
    Name {
        /// The name.
        name: String,
    },
}

/// One limit, as commands give it: `qps=10`, `registered=1G`, `control=1000/s`, `mrs=none`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Setting {
    /// Of what.
    pub resource: Resource,
    /// The most there may be; `u64::MAX` is no limit.
    pub limit: u64,
}

impl FromStr for Setting {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let form = || ParseError::Form(text.to_owned());
        let (name, number) = text.split_once('=').ok_or_else(form)?;
        let resource = Resource::ALL.into_iter().find(|r| r.name() == name);
        let resource = resource.ok_or_else(|| ParseError::Name {
            name: name.to_owned(),
        })?;
        let number = if resource.is_rate() {
            number.strip_suffix("/s").unwrap_or(number)
        } else {
            number
        };
        let limit = if number == "none" {
            NONE
        } else {
            parse(number).ok_or_else(form)?
        };
        Ok(Setting { resource, limit })
    }
}

fn parse(number: &str) -> Option<u64> {
    let power = number.chars().last().and_then(|unit| "KMGT".find(unit));
    let (digits, shift) = match power {
        Some(power) => (&number[..number.len() - 1], 10 * (power as u32 + 1)),
        None => (number, 0),
    };
    u64::from_str(digits).ok()?.checked_mul(1 << shift)
}

/// An endpoint's limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quota([u64; COUNT]);

impl Default for Quota {
    fn default() -> Self {
        Quota(Resource::ALL.map(Resource::default_limit))
    }
}

impl Quota {
    /// The most there may be of something; `u64::MAX` is no limit.
    pub fn limit(&self, resource: Resource) -> u64 {
        self.0[resource as usize]
    }

    /// Changes one limit. What is in use above it stays.
    pub fn set(&mut self, setting: Setting) {
        self.0[setting.resource as usize] = setting.limit;
    }
}

/// How much of everything is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage([u64; COUNT]);

impl Usage {
    /// How many there are.
    pub fn of(&self, resource: Resource) -> u64 {
        self.0[resource as usize]
    }

    /// The same with `n` of something.
    pub fn with(mut self, resource: Resource, n: u64) -> Self {
        self.0[resource as usize] = n;
        self
    }

    /// Counts `new` in the place of `old`.
    pub fn replace(&mut self, old: &Usage, new: &Usage) {
        for ((sum, old), new) in self.0.iter_mut().zip(old.0).zip(new.0) {
            *sum = sum.saturating_add(new).saturating_sub(old);
        }
    }

    /// Whether there may be `more` of something; `u64::MAX` is any number, for which there must be
    /// no limit.
    pub fn check(&self, quota: &Quota, resource: Resource, more: u64) -> Result<(), Exceeded> {
        let (used, limit) = (self.of(resource), quota.limit(resource));
        if used.saturating_add(more) <= limit || more == 0 {
            return Ok(());
        }
        Err(Exceeded {
            resource,
            limit,
            used,
            more,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_exact() {
        let mut quota = Quota::default();
        quota.set("qps=3".parse().unwrap());
        let usage = Usage::default().with(Resource::Qps, 2);
        assert_eq!(usage.check(&quota, Resource::Qps, 1), Ok(()));
        let refused = usage.check(&quota, Resource::Qps, 2).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "qps are limited to 3, 2 are in use and 2 more were wanted"
        );
        // A limit that sinks below what is used takes nothing away.
        quota.set("qps=1".parse().unwrap());
        assert_eq!(usage.check(&quota, Resource::Qps, 0), Ok(()));
        assert!(usage.check(&quota, Resource::Qps, 1).is_err());
        // Any number takes that there is no limit.
        assert!(usage.check(&quota, Resource::Qps, u64::MAX).is_err());
        quota.set("qps=none".parse().unwrap());
        assert_eq!(usage.check(&quota, Resource::Qps, u64::MAX), Ok(()));
        let mut sum = usage;
        sum.replace(&usage, &Usage::default().with(Resource::Mrs, 7));
        assert_eq!(sum, Usage::default().with(Resource::Mrs, 7));
    }

    #[test]
    fn settings_are_read() {
        let limit = |text: &str| Setting::from_str(text).map(|s| (s.resource, s.limit));
        assert_eq!(limit("registered=1G"), Ok((Resource::Registered, 1 << 30)));
        assert_eq!(limit("control=1000/s"), Ok((Resource::Control, 1000)));
        assert_eq!(limit("control=5"), Ok((Resource::Control, 5)));
        assert_eq!(limit("mrs=none"), Ok((Resource::Mrs, u64::MAX)));
        for bad in [
            "qps",
            "qps=",
            "qps=-1",
            "qps=1/s",
            "qps=K",
            "qps=99999999999T",
            "qps=1é",
        ] {
            assert_eq!(limit(bad), Err(ParseError::Form(bad.to_owned())));
        }
        let unknown = limit("cows=1").unwrap_err().to_string();
        assert!(unknown.contains("outstanding"), "{unknown}");
        let setting: Setting = "qps=10".parse().unwrap();
        let json = serde_json::to_string(&setting).unwrap();
        assert_eq!(json, r#"{"resource":"qps","limit":10}"#);
        assert_eq!(serde_json::from_str::<Setting>(&json).unwrap(), setting);
    }
}
