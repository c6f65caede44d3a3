//! The connection manager's ids and event channels as objects of sessions. The manager itself
//! (`freeflow_cm`) knows no sessions: it is told what programs ask for, and what it has to send
//! or tell goes from here to other endpoints' managers and to programs' channels.

#[cfg(test)]
mod abroad_tests;
mod channels;
#[cfg(test)]
mod programs;
mod requests;
#[cfg(test)]
mod tests;
mod ways;

use std::collections::VecDeque;

use freeflow_cm::{Arrival, Manager, Output, Port, answer_for_the_gone};
use freeflow_policy::Resource;
use freeflow_session::{CmIdInfo, Handle};
use freeflow_types::Gid;
use rustix::io::Errno;

pub(crate) use channels::CmChannel;

use crate::engine::Engine;
use crate::remote::cm::Abroad;
use crate::table::{Owned, Table};

/// The state of the connection manager.
pub(crate) struct Cm {
    manager: Manager,
    ids: Table<CmId>,
    channels: Table<CmChannel>,
    /// Datagrams to other hosts.
    pub(crate) abroad: Abroad,
}

/// An id, as far as it is not the manager's.
pub(crate) struct CmId {
    session: Handle,
    channel: Handle,
    /// Numbers of the events that wait there.
    waiting: VecDeque<u64>,
    groups: Vec<Membership>,
    /// It came with a request that the program has not taken yet: it is not the program's so far.
    offered: bool,
}

/// A multicast group that an id has joined.
struct Membership {
    cookie: u64,
}

impl CmId {
    fn new(session: Handle, channel: Handle) -> Self {
        CmId {
            session,
            channel,
            waiting: VecDeque::new(),
            groups: Vec::new(),
            offered: false,
        }
    }
}

impl Owned for CmId {
    fn owner(&self) -> Handle {
        self.session
    }
}

impl Cm {
    pub(crate) fn new(max_rd_atomic: u8) -> Self {
        Cm {
            manager: Manager::new(max_rd_atomic),
            ids: Table::default(),
            channels: Table::default(),
            abroad: Abroad::default(),
        }
    }

    /// When [`Engine::fire_cm_timers`] has something to do.
    pub(crate) fn next_timeout(&self) -> Option<u64> {
        self.manager.next_timeout()
    }

    /// Ids and channels of a session.
    #[cfg(feature = "testing")]
    pub(crate) fn counts(&self, session: Handle) -> (u32, u32) {
        let (ids, channels) = (self.ids.of(session), self.channels.of(session));
        (ids.len() as u32, channels.len() as u32)
    }

    /// Events that wait for a session.
    #[cfg(feature = "testing")]
    pub(crate) fn waiting(&self, session: Handle) -> u32 {
        let own = self.channels.iter().filter(|(_, c)| c.session() == session);
        own.map(|(_, channel)| channel.waiting()).sum()
    }

    /// Whether channels have the users and the events that ids say.
    #[cfg(feature = "testing")]
    pub(crate) fn check(&self) -> Result<(), String> {
        for (handle, channel) in self.channels.iter() {
            let own = || self.ids.iter().filter(|(_, id)| id.channel == handle);
            let users = own().count();
            if channel.users as usize != users {
                return Err(format!(
                    "a channel has {} users, not {users}",
                    channel.users
                ));
            }
            let waiting: u32 = own().map(|(_, id)| id.waiting.len() as u32).sum();
            if channel.waiting() != waiting {
                let has = channel.waiting();
                return Err(format!(
                    "{has} events wait in a channel, of its ids {waiting}"
                ));
            }
        }
        Ok(())
    }

    /// Whether no id and no channel is left.
    #[cfg(feature = "testing")]
    pub(crate) fn is_empty(&self) -> bool {
        self.ids.iter().next().is_none() && self.channels.iter().next().is_none()
    }

    fn info(&self, id: Handle) -> Result<CmIdInfo, Errno> {
        self.manager.info(id).ok_or(Errno::INVAL)
    }
}

/// 64 bits that nobody can guess.
fn entropy() -> Result<u64, Errno> {
    getrandom::u64().map_err(|_| Errno::AGAIN)
}

impl Engine {
    /// Repeats and ends what is due.
    pub(crate) fn fire_cm_timers(&mut self) {
        let due = self.cm.next_timeout().is_some_and(|at| at <= self.now);
        if due {
            self.cm.manager.on_timeout(self.now);
            self.run_cm();
        }
        self.flush_cm();
    }

    /// Sends and tells what the manager has, until there is nothing more. That ends: each message
    /// is answered at most once, and no answer is answered.
    pub(crate) fn run_cm(&mut self) {
        loop {
            let output = self.cm.manager.take_output();
            if output.is_empty() {
                return self.flush_cm();
            }
            for one in output {
                match one {
                    Output::Tell { id, event } => self.tell_cm(id, *event),
                    Output::Send { from, to, mad } => self.send_cm(&from, to, &mad),
                }
            }
        }
    }

    /// Sends a datagram to the manager of another port, which is here, or on another host. One
    /// that nobody is found for is lost, as on any network.
    fn send_cm(&mut self, from: &Port, to: Gid, mad: &[u8]) {
        let Some(e) = self.endpoints.get(from.endpoint) else {
            return;
        };
        let ports = if from.index == 0 {
            let here = self.by_gid.get(&(e.tenant, to));
            here.and_then(|&e| self.cm_port(e, 0)).into_iter().collect()
        } else if to == from.gid {
            self.underlay_ports()
        } else {
            Vec::new()
        };
        if ports.is_empty() {
            if from.index == 0 && !self.network.has_way(&e.tenant_name, to) {
                return self.send_cm_from_nobody(from, to, mad);
            }
            return self.cm_abroad(from, to, mad);
        }
        let source = from.gid;
        self.receive_cm(&Arrival { ports, source }, mad);
    }

    /// Answers a datagram to an address that nobody has, here or on another host, as far as is known.
    fn send_cm_from_nobody(&mut self, from: &Port, to: Gid, mad: &[u8]) {
        let Some(e) = self.endpoints.get(from.endpoint) else {
            return;
        };
        let sure = self.network.is_own(&e.tenant_name, to);
        if let Some(answer) = answer_for_the_gone(mad, sure) {
            let (ports, source) = (vec![*from], to);
            self.receive_cm(&Arrival { ports, source }, &answer);
        }
    }

    /// A datagram has come; false if it is none of the connection manager's.
    pub(crate) fn receive_cm(&mut self, arrival: &Arrival, mad: &[u8]) -> bool {
        // Meanwhile nobody else has to do with it.
        let empty = Manager::new(0);
        let mut manager = std::mem::replace(&mut self.cm.manager, empty);
        let now = self.now;
        let read = manager.receive(now, arrival, mad, &mut |listener| {
            self.new_peer_id(listener)
        });
        self.cm.manager = manager;
        read.is_ok()
    }

    /// Makes the id of a request to a listener, in the listener's channel.
    fn new_peer_id(&mut self, listener: Handle) -> Option<(Handle, u64)> {
        let l = self.cm.ids.get(listener)?;
        let (session, channel) = (l.session, l.channel);
        if self.has_ended(session) {
            return None;
        }
        let entropy = entropy().ok()?;
        let id = self.add_cm_id(session, channel).ok()?;
        self.cm.ids.get_mut(id)?.offered = true;
        // It is not this session that has asked for something now.
        self.account(session);
        Some((id, entropy))
    }

    /// Adds an id to a session that may have one more.
    fn add_cm_id(&mut self, session: Handle, channel: Handle) -> Result<Handle, Errno> {
        self.check_quota(session, Resource::CmIds, 1)?;
        let id = CmId::new(session, channel);
        let id = self.cm.ids.insert(id).ok_or(Errno::NOMEM)?;
        if let Some(s) = self.sessions.get_mut(session) {
            s.counts.cm_ids += 1;
        }
        if let Some(c) = self.cm.channels.get_mut(channel) {
            c.users += 1;
        }
        Ok(id)
    }

    /// Removes an id with the events that wait of it, and the requests among these; how many
    /// events that were.
    fn remove_cm_id(&mut self, id: Handle) -> u32 {
        let Some(old) = self.cm.ids.remove(id) else {
            return 0;
        };
        let listened = self.cm.manager.is_listening(id);
        self.cm.manager.destroy(self.now, id);
        let mut events = Vec::new();
        if let Some(channel) = self.cm.channels.get_mut(old.channel) {
            channel.users -= 1;
            events = channel.take_out(&old.waiting);
        }
        self.uncount_cm_events(old.session, events.len() as u32);
        if let Some(s) = self.sessions.get_mut(old.session) {
            s.counts.cm_ids -= 1;
            s.counts.cm_listeners -= u32::from(listened);
        }
        let requests = events.iter().filter_map(|event| event.new_id);
        let mut count = events.len() as u32;
        for request in requests {
            if self.is_offered(old.session, request) {
                count += self.remove_cm_id(request);
            }
        }
        count
    }

    /// Whether an id came with a request that its session has not taken yet.
    fn is_offered(&self, session: Handle, id: Handle) -> bool {
        let id = self.cm.ids.get(id);
        id.is_some_and(|id| id.session == session && id.offered)
    }

    /// A session has ended: some of its ids and channels go, at most so many, and whoever they are
    /// connected with is told. False if none is left.
    pub(crate) fn remove_some_cm(&mut self, session: Handle, most: usize) -> bool {
        let ids = self.cm.ids.some_of(session, most);
        if ids.is_empty() {
            let channels = self.cm.channels.some_of(session, most);
            for &channel in &channels {
                self.remove_cm_channel(channel);
            }
            return !channels.is_empty();
        }
        for id in ids {
            self.remove_cm_id(id);
        }
        self.run_cm();
        true
    }

    /// An endpoint ends, without sessions by now.
    pub(crate) fn forget_cm(&mut self, endpoint: Handle) {
        self.cm.manager.forget(endpoint);
    }
}
