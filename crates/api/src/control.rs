//! Requests on a router's control socket.

use std::net::IpAddr;
use std::path::PathBuf;

use freeflow_policy::Setting;
use serde::{Deserialize, Serialize};

use crate::RouterStatus;

/// Version of the control protocol.
pub const CONTROL_VERSION: u32 = 1;

/// Longest message.
pub const MAX_CONTROL_BYTES: usize = 4 << 20;

/// A message with its version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// [`CONTROL_VERSION`] of the sender.
    pub version: u32,
    /// The message.
    pub body: T,
}

/// A request.
pub type ControlRequest = Envelope<Operation>;

/// What a router is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Everything there is to know.
    Status,
    /// Creates an endpoint.
    CreateEndpoint(NewEndpoint),
    /// Removes an endpoint.
    RemoveEndpoint {
        /// Its name.
        name: String,
    },
    /// Changes an endpoint's limits; what is in use above them stays.
    SetQuota {
        /// Its name.
        name: String,
        /// The limits that change.
        settings: Vec<Setting>,
    },
    /// Gives an endpoint's program an interface on its tenant's network. The message comes with
    /// a descriptor of the program's network namespace.
    AttachNetwork {
        /// The endpoint's name.
        name: String,
    },
}

/// An endpoint to be; the router chooses what is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewEndpoint {
    /// Name.
    pub name: Option<String>,
    /// Virtual IP.
    pub ip: Option<IpAddr>,
    /// Tenant; "default" if left out.
    pub tenant: Option<String>,
    /// Whether it ends with the connection that created it.
    pub ephemeral: bool,
    /// Limits other than the usual ones.
    #[serde(default)]
    pub quota: Vec<Setting>,
    /// Whether its device has the router's underlay address as a second GID.
    #[serde(default)]
    pub underlay_gid: bool,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlAnswer {
    /// To [`Operation::Status`].
    Status(RouterStatus),
    /// To [`Operation::CreateEndpoint`].
    Created {
        /// Name.
        name: String,
        /// Virtual IP.
        ip: IpAddr,
        /// The router's underlay address, if it is the device's second GID.
        #[serde(default)]
        underlay: Option<IpAddr>,
        /// Where its sessions are opened.
        socket: PathBuf,
        /// What will not be as the caller expects, in one line.
        #[serde(default)]
        warning: Option<String>,
    },
    /// It is done.
    Done,
    /// The router is about to end and does nothing more; another can be started.
    Ending,
    /// It failed: what, with which value, and what to do.
    Error(String),
}
