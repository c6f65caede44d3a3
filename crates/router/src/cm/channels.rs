//! Event channels: events wait in the router, and one packet of one byte for each is sent down
//! the channel's socket, to show that something waits.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;

use freeflow_cm::Event;
use freeflow_session::{CmDetail, CmEvent, CmEventType, Handle};
use rustix::io::Errno;

use crate::engine::Engine;
use crate::events::{Outlet, StreamId};
use crate::table::Owned;

/// An event channel.
pub(crate) struct CmChannel {
    session: Handle,
    outlet: Outlet,
    /// In line, by numbers that their ids know.
    events: BTreeMap<u64, CmEvent>,
    /// Number of the next one.
    next: u64,
    /// Packets for which there was no room.
    owed: u32,
    /// Ids whose events come here.
    pub(super) users: u32,
}

impl Owned for CmChannel {
    fn owner(&self) -> Handle {
        self.session
    }
}

impl CmChannel {
    pub(super) fn new(session: Handle, socket: OwnedFd) -> Result<Self, Errno> {
        Ok(CmChannel {
            session,
            outlet: Outlet::new(socket)?,
            events: BTreeMap::new(),
            next: 0,
            owed: 0,
            users: 0,
        })
    }

    /// Events that wait.
    #[cfg(feature = "testing")]
    pub(super) fn waiting(&self) -> u32 {
        self.events.len() as u32
    }

    pub(super) fn session(&self) -> Handle {
        self.session
    }

    /// Takes events out of the line, in their order.
    pub(super) fn take_out(&mut self, numbers: &VecDeque<u64>) -> Vec<CmEvent> {
        let events = numbers.iter();
        events.filter_map(|n| self.events.remove(n)).collect()
    }

    /// Puts an event in line: its number.
    fn add(&mut self, event: CmEvent, set: &OwnedFd, data: u64) -> u64 {
        let number = self.next;
        self.next += 1;
        self.events.insert(number, event);
        self.owed = self.owed.saturating_add(1);
        self.show(set, data);
        number
    }

    /// Sends the packets that are owed, as far as there is room; the rest when there is room
    /// again.
    fn show(&mut self, set: &OwnedFd, data: u64) {
        while self.owed != 0 {
            if !self.outlet.pass(&[1]) {
                return self.outlet.watch(set, data);
            }
            self.owed -= 1;
        }
    }
}

impl Engine {
    /// Tells an id's program something.
    pub(super) fn tell_cm(&mut self, id: Handle, event: Event) {
        let Ok(info) = self.cm.info(event.new_id.unwrap_or(id)) else {
            return;
        };
        let Some(i) = self.cm.ids.get_mut(id) else {
            return;
        };
        let handle = i.channel;
        let Some(channel) = self.cm.channels.get_mut(handle) else {
            return;
        };
        let event = CmEvent {
            id,
            new_id: event.new_id,
            event: event.event,
            status: event.status,
            detail: event.detail,
            private_data: event.private_data,
            ece: event.ece,
            info,
        };
        let number = channel.add(event, &self.doorbells, StreamId::Cm(handle).data());
        i.waiting.push_back(number);
        if let Some(s) = self.sessions.get_mut(i.session) {
            s.counts.cm_events += 1;
        }
    }

    /// Takes the first event out of a channel.
    pub(super) fn take_cm_event(&mut self, handle: Handle) -> Option<CmEvent> {
        let channel = self.cm.channels.get_mut(handle)?;
        let event = channel.events.pop_first();
        channel.show(&self.doorbells, StreamId::Cm(handle).data());
        let (number, event) = event?;
        if let Some(i) = self.cm.ids.get_mut(event.id) {
            i.waiting.retain(|&n| n != number);
            let session = i.session;
            self.uncount_cm_events(session, 1);
        }
        if let Some(new) = event.new_id.and_then(|new| self.cm.ids.get_mut(new)) {
            new.offered = false;
        }
        if event.event == CmEventType::ConnectRequest {
            self.cm.manager.request_taken(event.id);
        }
        Some(event)
    }

    /// So many events of a session do not wait any more.
    pub(super) fn uncount_cm_events(&mut self, session: Handle, gone: u32) {
        if let Some(s) = self.sessions.get_mut(session) {
            s.counts.cm_events = s.counts.cm_events.saturating_sub(gone);
        }
    }

    /// Removes the events of a group that an id has left; how many.
    pub(super) fn forget_cm_group(&mut self, id: Handle, cookie: u64) -> u32 {
        let Some(i) = self.cm.ids.get_mut(id) else {
            return 0;
        };
        let Some(channel) = self.cm.channels.get_mut(i.channel) else {
            return 0;
        };
        let of_group = |event: &CmEvent| {
            let of = matches!(event.detail, CmDetail::Datagram { cookie: c, .. } if c == cookie);
            of && event.event == CmEventType::MulticastJoin
        };
        let (gone, left) = std::mem::take(&mut i.waiting)
            .into_iter()
            .partition(|number| channel.events.get(number).is_some_and(of_group));
        i.waiting = left;
        let gone = channel.take_out(&gone).len() as u32;
        let session = i.session;
        self.uncount_cm_events(session, gone);
        gone
    }

    /// Moves an id with its events to another channel of its session; how many events.
    pub(super) fn migrate_cm_id(&mut self, id: Handle, to: Handle) -> u32 {
        let Some(i) = self.cm.ids.get_mut(id) else {
            return 0;
        };
        let session = i.session;
        let from = std::mem::replace(&mut i.channel, to);
        let numbers = std::mem::take(&mut i.waiting);
        let mut events = Vec::new();
        if let Some(channel) = self.cm.channels.get_mut(from) {
            channel.users -= 1;
            events = channel.take_out(&numbers);
        }
        let mut count = events.len() as u32;
        let requests: Vec<_> = events.iter().filter_map(|event| event.new_id).collect();
        if let Some(channel) = self.cm.channels.get_mut(to) {
            channel.users += 1;
            let data = StreamId::Cm(to).data();
            let events = events.into_iter();
            let numbers = events.map(|event| channel.add(event, &self.doorbells, data));
            let numbers = numbers.collect();
            if let Some(i) = self.cm.ids.get_mut(id) {
                i.waiting = numbers;
            }
        }
        // The ids of requests that wait come along, with what happened to them since.
        for request in requests {
            if self.is_offered(session, request) {
                count += self.migrate_cm_id(request, to);
            }
        }
        count
    }

    /// A channel's socket has room.
    pub(crate) fn show_cm_events(&mut self, handle: Handle) {
        if let Some(channel) = self.cm.channels.get_mut(handle) {
            channel.show(&self.doorbells, StreamId::Cm(handle).data());
        }
    }

    pub(super) fn remove_cm_channel(&mut self, channel: Handle) {
        if let Some(c) = self.cm.channels.remove(channel)
            && let Some(s) = self.sessions.get_mut(c.session)
        {
            s.counts.cm_channels -= 1;
        }
    }
}
