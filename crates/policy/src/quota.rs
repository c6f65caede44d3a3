//! How much of everything an endpoint may have.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! resources {
    ($($(#[$doc:meta])* $variant:ident $name:literal = $default:expr,)+) => {
        /// What is counted.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        pub enum Resource { $($(#[$doc])* $variant,)+ }

        impl Resource {
            /// All of them.
            pub const ALL: [Resource; COUNT] = [$(Resource::$variant,)+];

            /// Its name in commands and messages.
            pub const fn name(self) -> &'static str {
                match self { $(Resource::$variant => $name,)+ }
            }

            const fn default_limit(self) -> u64 {
                match self { $(Resource::$variant => $default,)+ }
            }
        }

        const COUNT: usize = [$($name),+].len();
    };
}

resources! {
    /// Processes connected to the router.
    Sessions "sessions" = 1024,
    /// Open devices.
    Contexts "contexts" = 65_536,
    /// Protection domains, with extended reliable connection domains.
    Pds "pds" = 65_536,
    /// Completion channels.
    Channels "channels" = 4096,
    /// Completion queues.
    Cqs "cqs" = 65_536,
    /// Queue pairs.
    Qps "qps" = 65_536,
    /// Shared receive queues.
    Srqs "srqs" = 65_536,
    /// Memory regions and windows.
    Mrs "mrs" = 1 << 20,
    /// Bytes in memory regions.
    RegisteredBytes "registered-bytes" = 1 << 44,
    /// Bytes of the queues' rings: with them, of outstanding work requests.
    RingBytes "ring-bytes" = 16 << 30,
}

/// What is too much.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{} are limited to {limit}, of which {used} are used", resource.name())]
pub struct Exceeded {
    /// Of what.
    pub resource: Resource,
    /// The most there may be.
    pub limit: u64,
    /// How many there are.
    pub used: u64,
}

/// Why a text is no quota.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ParseError {
    /// Not `NAME=NUMBER`.
    #[error("\"{0}\" is not of the form NAME=NUMBER")]
    Form(String),
    /// Nothing of that name is limited.
    #[error("there is no quota \"{name}\"; there are: {}, control-verbs", names())]
    Name {
        /// The name.
        name: String,
    },
}

fn names() -> String {
    Resource::ALL.map(Resource::name).join(", ")
}

/// An endpoint's limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Quota {
    limits: [u64; COUNT],
    /// Control verbs per second; 0 is without limit.
    pub control_verbs: u64,
}

impl Default for Quota {
    fn default() -> Self {
        Quota {
            limits: Resource::ALL.map(Resource::default_limit),
            control_verbs: 0,
        }
    }
}

impl Quota {
    /// The most there may be of something.
    pub fn limit(&self, resource: Resource) -> u64 {
        self.limits[resource as usize]
    }

    /// Changes one limit, given as `NAME=NUMBER`.
    pub fn set(&mut self, text: &str) -> Result<(), ParseError> {
        let form = || ParseError::Form(text.to_owned());
        let (name, number) = text.split_once('=').ok_or_else(form)?;
        let number = u64::from_str(number).map_err(|_| form())?;
        if name == "control-verbs" {
            self.control_verbs = number;
            return Ok(());
        }
        let resource = Resource::ALL.into_iter().find(|r| r.name() == name);
        let resource = resource.ok_or_else(|| ParseError::Name {
            name: name.to_owned(),
        })?;
        self.limits[resource as usize] = number;
        Ok(())
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for resource in Resource::ALL {
            write!(f, "{}={} ", resource.name(), self.limit(resource))?;
        }
        write!(f, "control-verbs={}", self.control_verbs)
    }
}

/// How much of everything is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Usage {
    used: [u64; COUNT],
}

impl Usage {
    /// How many there are.
    pub fn of(&self, resource: Resource) -> u64 {
        self.used[resource as usize]
    }

    /// Counts `n` more, if the quota allows it.
    pub fn charge(&mut self, quota: &Quota, resource: Resource, n: u64) -> Result<(), Exceeded> {
        let (used, limit) = (self.of(resource), quota.limit(resource));
        let more = used.checked_add(n).filter(|&more| more <= limit);
        self.used[resource as usize] = more.ok_or(Exceeded {
            resource,
            limit,
            used,
        })?;
        Ok(())
    }

    /// Counts `n` less.
    pub fn release(&mut self, resource: Resource, n: u64) {
        let used = &mut self.used[resource as usize];
        *used = used.saturating_sub(n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_exact() {
        let mut quota = Quota::default();
        quota.set("qps=3").unwrap();
        let mut usage = Usage::default();
        usage.charge(&quota, Resource::Qps, 2).unwrap();
        let refused = usage.charge(&quota, Resource::Qps, 2).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "qps are limited to 3, of which 2 are used"
        );
        usage.charge(&quota, Resource::Qps, 1).unwrap();
        assert_eq!(usage.of(Resource::Qps), 3);
        usage.release(Resource::Qps, 3);
        assert_eq!(usage, Usage::default());
        let huge = usage.charge(&quota, Resource::RegisteredBytes, u64::MAX);
        assert!(huge.is_err());
    }

    #[test]
    fn a_limit_that_sinks_below_the_use_takes_nothing_away() {
        let mut quota = Quota::default();
        let mut usage = Usage::default();
        usage.charge(&quota, Resource::Mrs, 5).unwrap();
        quota.set("mrs=1").unwrap();
        assert!(usage.charge(&quota, Resource::Mrs, 1).is_err());
        usage.release(Resource::Mrs, 5);
        usage.charge(&quota, Resource::Mrs, 1).unwrap();
    }

    #[test]
    fn texts_are_read_and_written() {
        let mut quota = Quota::default();
        quota.set("control-verbs=500").unwrap();
        quota.set("registered-bytes=4096").unwrap();
        assert_eq!(quota.control_verbs, 500);
        let mut again = Quota::default();
        for word in quota.to_string().split(' ') {
            again.set(word).unwrap();
        }
        assert_eq!(again, quota);
        assert_eq!(quota.set("qps"), Err(ParseError::Form("qps".into())));
        assert_eq!(quota.set("qps=-1"), Err(ParseError::Form("qps=-1".into())));
        let unknown = quota.set("cows=1").unwrap_err();
        assert!(
            unknown.to_string().contains("registered-bytes"),
            "{unknown}"
        );
    }
}
