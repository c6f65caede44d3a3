//! The connection manager's event channels and ids (`rdma_cm(7)`). Their state is the router's.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use freeflow_session::{
    CmBringUp, CmDetail, CmEvent, CmEventType, CmIdInfo, CmOption, CmParam, CmQpAttr, CmRequest,
    Handle, PortSpace, Reply, Request,
};
use freeflow_shm::recv_packet_interruptible;
use freeflow_types::{AsyncEventType, QpAttr, QpAttrMask, QpState, QpType};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::acks::Acks;
use crate::context::Context;
use crate::qp::Qp;
use crate::session::{Session, created, unpoisoned};

/// An event channel.
#[derive(Debug)]
pub struct CmChannel {
    session: Arc<Session>,
    handle: Handle,
    events: OwnedFd,
    /// Held while an event is fetched and given to its id, and while an id leaves the channel:
    /// nobody is given an event of an id that is gone. Not held while one waits.
    turn: Mutex<()>,
    /// The program has destroyed it: who still waits in it waits for ever, as for a descriptor that
    /// another thread has closed.
    destroyed: AtomicBool,
    /// Ids whose events come here.
    ids: Mutex<HashMap<u32, Weak<CmId>>>,
}

/// An id (`rdma_create_id(3)`).
#[derive(Debug)]
pub struct CmId {
    session: Arc<Session>,
    handle: Handle,
    channel: Mutex<Arc<CmChannel>>,
    user: AtomicUsize,
    /// Events that the program was given.
    reported: Acks,
    /// Whether it is bound to the device, and that this is gone has not been reported.
    on_device: AtomicBool,
    groups: Mutex<HashMap<u64, Arc<CmGroup>>>,
}

/// To what a queue pair is brought for an id, with the attributes that [`CmId::init_qp_attr`]
/// says; what is here goes before them.
#[derive(Clone, Copy, Debug)]
pub struct CmUp<'a> {
    /// The queue pair.
    pub qp: &'a Qp,
    /// INIT, RTR or RTS.
    pub state: QpState,
    /// READs and atomics that it takes at a time.
    pub max_dest_rd_atomic: Option<u8>,
    /// READs and atomics that it has under way.
    pub max_rd_atomic: Option<u8>,
}

impl<'a> CmUp<'a> {
    /// As the connection manager says.
    pub fn new(qp: &'a Qp, state: QpState) -> Self {
        CmUp {
            qp,
            state,
            max_dest_rd_atomic: None,
            max_rd_atomic: None,
        }
    }

    /// For the router; none of a queue pair that is shared with other processes.
    fn said(&self) -> Option<CmBringUp> {
        Some(CmBringUp {
            qp: self.qp.handle()?,
            state: self.state,
            max_dest_rd_atomic: self.max_dest_rd_atomic,
            max_rd_atomic: self.max_rd_atomic,
        })
    }
}

/// A multicast group that an id has joined or is about to.
#[derive(Debug)]
pub struct CmGroup {
    cookie: u64,
    reported: Acks,
}

/// An event that the program is given: to be acknowledged.
#[derive(Debug)]
pub struct CmReport {
    /// The event.
    pub event: CmEvent,
    /// Of this id; with a request for a connection, the listener.
    pub id: Arc<CmId>,
    /// With a request for a connection: the id of it.
    pub new_id: Option<Arc<CmId>>,
    /// The group that it is about.
    pub group: Option<Arc<CmGroup>>,
}

/// The device as all ids of the process's session share it: a number that `open` gave for the
/// first who asked. ENODEV: there is no endpoint here.
pub fn cm_device(open: impl FnOnce(Arc<Context>) -> Result<usize, Errno>) -> Result<usize, Errno> {
    shared_device(&Session::current()?, open)
}

fn shared_device(
    session: &Arc<Session>,
    open: impl FnOnce(Arc<Context>) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let mut shared = unpoisoned(&session.cm_device);
    match *shared {
        Some(device) => Ok(device),
        None => {
            let device = open(Context::open_in(session.clone())?)?;
            *shared = Some(device);
            Ok(device)
        }
    }
}

impl CmChannel {
    /// Creates a channel (`rdma_create_event_channel(3)`). ENODEV: there is no endpoint here.
    pub fn create() -> Result<Arc<CmChannel>, Errno> {
        Self::create_in(Session::current()?)
    }

    fn create_in(session: Arc<Session>) -> Result<Arc<CmChannel>, Errno> {
        let (reply, fds) = session.call(&Request::Cm(CmRequest::CreateChannel))?;
        let handle = created(reply)?;
        let events = fds.into_iter().next().ok_or(Errno::PROTO)?;
        Ok(Arc::new(CmChannel {
            session,
            handle,
            events,
            turn: Mutex::default(),
            destroyed: AtomicBool::new(false),
            ids: Mutex::default(),
        }))
    }

    /// Descriptor that is readable when there is an event.
    pub fn fd(&self) -> RawFd {
        self.events.as_raw_fd()
    }

    /// Destroys it. EBUSY: an id uses it.
    pub fn destroy(&self) -> Result<(), Errno> {
        // Release: before the router closes the socket (edge: `removal`).
        self.destroyed.store(true, Ordering::Release);
        let channel = self.handle;
        let request = Request::Cm(CmRequest::DestroyChannel { channel });
        let destroyed = self.session.destroy(&request);
        if destroyed.is_err() {
            self.destroyed.store(false, Ordering::Release);
        }
        destroyed
    }

    /// Creates an id whose events come here. `user` is what [`CmId::user`] says.
    pub fn create_id(
        self: &Arc<Self>,
        port_space: PortSpace,
        qp_type: QpType,
        user: usize,
    ) -> Result<Arc<CmId>, Errno> {
        let request = CmRequest::CreateId {
            channel: self.handle,
            port_space,
            qp_type,
        };
        let handle = created(self.session.call(&Request::Cm(request))?.0)?;
        Ok(self.adopt(handle, user))
    }

    fn adopt(self: &Arc<Self>, handle: Handle, user: usize) -> Arc<CmId> {
        let id = Arc::new(CmId {
            session: self.session.clone(),
            handle,
            channel: Mutex::new(self.clone()),
            user: AtomicUsize::new(user),
            reported: Acks::default(),
            on_device: AtomicBool::new(false),
            groups: Mutex::default(),
        });
        unpoisoned(&self.ids).insert(handle.0, Arc::downgrade(&id));
        id
    }

    fn find(&self, handle: Handle) -> Option<Arc<CmId>> {
        unpoisoned(&self.ids).get(&handle.0)?.upgrade()
    }

    /// The next event; waits for it unless the descriptor is non-blocking (then EAGAIN). EINTR: a
    /// signal handler ran. `accepted` is called with each new id, and the listener, before anybody
    /// else can be given an event of it; what it returns is what [`CmId::user`] says.
    ///
    /// If the router is gone, each id of the channel that was bound has an event of its device's
    /// removal; then EIO.
    pub fn get_event(
        self: &Arc<Self>,
        accepted: impl FnOnce(&Arc<CmId>, &CmId) -> usize,
    ) -> Result<CmReport, Errno> {
        loop {
            if !self.session.is_own() {
                return Err(Errno::INVAL);
            }
            let mut byte = [0; 1];
            match recv_packet_interruptible(&self.events, &mut byte, RecvFlags::empty()) {
                Ok(packet) if packet.len != 0 => {}
                Err(errno) if errno != Errno::CONNRESET => return Err(errno),
                _ => return self.removal(),
            }
            let turn = unpoisoned(&self.turn);
            let request = CmRequest::GetEvent {
                channel: self.handle,
            };
            let event = match self.session.call(&Request::Cm(request)) {
                Ok((Reply::CmEvent(Some(event)), _)) => *event,
                // What it was is gone with its id.
                Ok((Reply::CmEvent(None), _)) => continue,
                Ok(_) => return Err(Errno::PROTO),
                Err(Errno::IO) if self.session.link.is_dead() => return self.removal(),
                Err(errno) => return Err(errno),
            };
            let Some(id) = self.find(event.id) else {
                continue;
            };
            let new_id = event.new_id.map(|handle| {
                let new_id = self.adopt(handle, 0);
                new_id.learn(&event.info);
                let user = accepted(&new_id, &id);
                // Relaxed: who finds the id in the channel takes its turn.
                new_id.user.store(user, Ordering::Relaxed);
                new_id
            });
            if new_id.is_none() {
                id.learn(&event.info);
            }
            let group = match event.detail {
                CmDetail::Datagram { cookie, .. } if of_group(event.event) => {
                    unpoisoned(&id.groups).get(&cookie).cloned()
                }
                _ => None,
            };
            let report = CmReport {
                event,
                id,
                new_id,
                group,
            };
            report.delivered();
            drop(turn);
            return Ok(report);
        }
    }

    /// The socket is closed: the router is gone, or the channel.
    fn removal(&self) -> Result<CmReport, Errno> {
        // Acquire: see `destroy`.
        while self.destroyed.load(Ordering::Acquire) {
            rustix::event::poll(&mut [], None)?;
        }
        let ids = unpoisoned(&self.ids);
        let of = ids
            .values()
            .filter_map(Weak::upgrade)
            // Relaxed: only who comes first matters.
            .find(|id| id.on_device.swap(false, Ordering::Relaxed));
        let id = of.ok_or(Errno::IO)?;
        let event = CmEvent {
            id: id.handle,
            new_id: None,
            event: CmEventType::DeviceRemoval,
            status: 0,
            detail: CmDetail::None,
            private_data: Vec::new(),
            ece: None,
            info: CmIdInfo {
                src: (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
                dst: None,
                port: None,
            },
        };
        let report = CmReport {
            event,
            id,
            new_id: None,
            group: None,
        };
        report.delivered();
        Ok(report)
    }

    /// Takes packets out of the socket that stood for events that are gone: at most so many. If
    /// another thread has one of them in its hand, it takes what is there instead.
    fn forget(&self, events: u32) {
        let mut byte = [0; 1];
        for _ in 0..events {
            match recv_packet_interruptible(&self.events, &mut byte, RecvFlags::DONTWAIT) {
                Ok(packet) if packet.len != 0 => {}
                _ => break,
            }
        }
    }
}

fn of_group(event: CmEventType) -> bool {
    matches!(
        event,
        CmEventType::MulticastJoin | CmEventType::MulticastError
    )
}

impl CmReport {
    fn delivered(&self) {
        self.id.reported.delivered();
        if let Some(group) = &self.group {
            group.reported.delivered();
        }
    }

    /// The program is done with it (`rdma_ack_cm_event(3)`).
    pub fn acknowledge(&self) {
        if let Some(group) = &self.group {
            group.reported.acknowledge(1);
        }
        self.id.reported.acknowledge(1);
    }
}

impl CmId {
    /// What the program's side knows it by.
    pub fn user(&self) -> usize {
        self.user.load(Ordering::Relaxed)
    }

    /// Where its events go.
    pub fn channel(&self) -> Arc<CmChannel> {
        unpoisoned(&self.channel).clone()
    }

    /// A new channel of the same session, for events of this id alone.
    pub fn own_channel(&self) -> Result<Arc<CmChannel>, Errno> {
        CmChannel::create_in(self.session.clone())
    }

    /// As [`cm_device`], of this id's session.
    pub fn device(
        &self,
        open: impl FnOnce(Arc<Context>) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        shared_device(&self.session, open)
    }

    /// READs and atomics that the device has under way, each way.
    pub fn max_rd_atomic(&self) -> u8 {
        self.session.info.limits.max_rd_atomic
    }

    fn learn(&self, info: &CmIdInfo) {
        if info.port.is_some() {
            self.on_device.store(true, Ordering::Relaxed);
        }
    }

    fn call(&self, request: CmRequest) -> Result<Reply, Errno> {
        Ok(self.session.call(&Request::Cm(request))?.0)
    }

    fn tell(&self, request: CmRequest) -> Result<(), Errno> {
        self.call(request).map(drop)
    }

    fn ask(&self, request: CmRequest) -> Result<CmIdInfo, Errno> {
        match self.call(request)? {
            Reply::CmId(info) => {
                self.learn(&info);
                Ok(info)
            }
            _ => Err(Errno::PROTO),
        }
    }

    /// Gives it an address (`rdma_bind_addr(3)`). ENODEV: the address is not the endpoint's;
    /// EADDRINUSE.
    pub fn bind(&self, addr: SocketAddr) -> Result<CmIdInfo, Errno> {
        let id = self.handle;
        self.ask(CmRequest::BindAddr { id, addr })
    }

    /// Begins to find the way to an address (`rdma_resolve_addr(3)`).
    pub fn resolve_addr(
        &self,
        src: Option<SocketAddr>,
        dst: SocketAddr,
        timeout_ms: u32,
    ) -> Result<(), Errno> {
        let id = self.handle;
        self.tell(CmRequest::ResolveAddr {
            id,
            src,
            dst,
            timeout_ms,
        })
    }

    /// Begins to find the route (`rdma_resolve_route(3)`).
    pub fn resolve_route(&self, timeout_ms: u32) -> Result<(), Errno> {
        let id = self.handle;
        self.tell(CmRequest::ResolveRoute { id, timeout_ms })
    }

    /// Begins to listen (`rdma_listen(3)`); says the port.
    pub fn listen(&self, backlog: u32) -> Result<CmIdInfo, Errno> {
        let id = self.handle;
        self.ask(CmRequest::Listen { id, backlog })
    }

    /// Begins to connect (`rdma_connect(3)`).
    pub fn connect(&self, param: CmParam) -> Result<(), Errno> {
        let id = self.handle;
        self.tell(CmRequest::Connect { id, param })
    }

    /// Accepts a request (`rdma_accept(3)`), or without a parameter a reply
    /// (`rdma_establish(3)`).
    pub fn accept(&self, param: Option<CmParam>) -> Result<(), Errno> {
        let id = self.handle;
        let up = None;
        self.tell(CmRequest::Accept { id, param, up })
    }

    /// As [`Self::accept`]; first brings a queue pair up, as [`Self::bring_up`].
    pub fn accept_with(&self, param: Option<CmParam>, up: &CmUp<'_>) -> Result<(), Errno> {
        let id = self.handle;
        let Some(said) = up.said() else {
            self.bring_up(up)?;
            return self.accept(param);
        };
        let up_first = Some(said);
        let request = CmRequest::Accept {
            id,
            param,
            up: up_first,
        };
        up.qp.follow(up.state, self.tell(request))
    }

    /// Rejects a request or a reply (`rdma_reject(3)`).
    pub fn reject(&self, private_data: Vec<u8>, for_ece: bool) -> Result<(), Errno> {
        let id = self.handle;
        self.tell(CmRequest::Reject {
            id,
            private_data,
            for_ece,
        })
    }

    /// Ends a connection, or answers that the other side ended it (`rdma_disconnect(3)`).
    pub fn disconnect(&self) -> Result<(), Errno> {
        let (id, fail) = (self.handle, None);
        self.tell(CmRequest::Disconnect { id, fail })
    }

    /// As [`Self::disconnect`]; first moves a queue pair to ERR.
    pub fn disconnect_with(&self, qp: &Qp) -> Result<(), Errno> {
        let fail = qp.handle();
        if fail.is_none() {
            let attr = QpAttr {
                state: QpState::Err,
                ..QpAttr::default()
            };
            qp.modify(&attr, QpAttrMask::STATE)?;
            return self.disconnect();
        }
        let id = self.handle;
        let told = self.tell(CmRequest::Disconnect { id, fail });
        qp.follow(QpState::Err, told)
    }

    /// Tells of an event of its queue pair (`rdma_notify(3)`).
    pub fn notify(&self, event: AsyncEventType) -> Result<(), Errno> {
        let id = self.handle;
        self.tell(CmRequest::Notify { id, event })
    }

    /// Attributes to bring its queue pair to a state with (`rdma_init_qp_attr(3)`).
    pub fn init_qp_attr(&self, state: QpState) -> Result<CmQpAttr, Errno> {
        let id = self.handle;
        match self.call(CmRequest::InitQpAttr { id, state })? {
            Reply::CmQpAttr(attr) => Ok(*attr),
            _ => Err(Errno::PROTO),
        }
    }

    /// Brings a queue pair to a state, through those before it. If that fails, it may have got to
    /// one on the way.
    pub fn bring_up(&self, up: &CmUp<'_>) -> Result<(), Errno> {
        if let Some(said) = up.said() {
            let id = self.handle;
            let told = self.tell(CmRequest::BringUp { id, up: said });
            return up.qp.follow(up.state, told);
        }
        for state in [QpState::Init, QpState::Rtr, QpState::Rts] {
            let CmQpAttr { mut attr, mask } = self.init_qp_attr(state)?;
            attr.max_dest_rd_atomic = up.max_dest_rd_atomic.unwrap_or(attr.max_dest_rd_atomic);
            attr.max_rd_atomic = up.max_rd_atomic.unwrap_or(attr.max_rd_atomic);
            up.qp.modify(&attr, mask)?;
            if state == up.state {
                break;
            }
        }
        Ok(())
    }

    /// Sets an option (`rdma_set_option(3)`).
    pub fn set_option(&self, option: CmOption) -> Result<(), Errno> {
        let id = self.handle;
        self.tell(CmRequest::SetOption { id, option })
    }

    /// Begins to join a multicast group (`rdma_join_multicast_ex(3)`).
    pub fn join(&self, addr: SocketAddr, send_only: bool) -> Result<Arc<CmGroup>, Errno> {
        static COOKIE: AtomicU64 = AtomicU64::new(1);
        // Relaxed: only that numbers differ matters.
        let cookie = COOKIE.fetch_add(1, Ordering::Relaxed);
        let group = Arc::new(CmGroup {
            cookie,
            reported: Acks::default(),
        });
        // Before the event can come.
        unpoisoned(&self.groups).insert(cookie, group.clone());
        let joined = self.tell(CmRequest::Join {
            id: self.handle,
            addr,
            send_only,
            cookie,
        });
        match joined {
            Ok(()) => Ok(group),
            Err(errno) => {
                unpoisoned(&self.groups).remove(&cookie);
                Err(errno)
            }
        }
    }

    /// Leaves a multicast group, when its events are acknowledged (`rdma_leave_multicast(3)`).
    pub fn leave(&self, group: &CmGroup) -> Result<(), Errno> {
        self.end(CmRequest::Leave {
            id: self.handle,
            cookie: group.cookie,
        })?;
        unpoisoned(&self.groups).remove(&group.cookie);
        group.reported.wait();
        Ok(())
    }

    /// Ends something together with its events that wait.
    fn end(&self, request: CmRequest) -> Result<(), Errno> {
        let channel = self.channel();
        let _turn = unpoisoned(&channel.turn);
        match self.call(request) {
            Ok(Reply::CmDestroyed { events }) => channel.forget(events),
            Ok(_) => return Err(Errno::PROTO),
            Err(Errno::IO) if self.session.link.is_dead() => {}
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    /// Puts an event of the program's own in line (`rdma_write_cm_event(3)`).
    pub fn write_event(&self, status: i32, arg: u64) -> Result<(), Errno> {
        let id = self.handle;
        self.tell(CmRequest::WriteEvent { id, status, arg })
    }

    /// Moves it and the events that wait to another channel (`rdma_migrate_id(3)`). EINVAL: that
    /// is of another router's life.
    pub fn migrate(self: &Arc<Self>, to: &Arc<CmChannel>) -> Result<(), Errno> {
        let from = self.channel();
        if Arc::ptr_eq(&from, to) {
            return Ok(());
        }
        if !Arc::ptr_eq(&from.session, &to.session) {
            return Err(Errno::INVAL);
        }
        let _turn = unpoisoned(&from.turn);
        // Before its first event can come there.
        unpoisoned(&to.ids).insert(self.handle.0, Arc::downgrade(self));
        let moved = self.call(CmRequest::MigrateId {
            id: self.handle,
            channel: to.handle,
        });
        let events = match moved {
            Ok(Reply::CmMigrated { events }) => events,
            failed => {
                unpoisoned(&to.ids).remove(&self.handle.0);
                return Err(failed.err().unwrap_or(Errno::PROTO));
            }
        };
        from.forget(events);
        unpoisoned(&from.ids).remove(&self.handle.0);
        *unpoisoned(&self.channel) = to.clone();
        Ok(())
    }

    /// Destroys it, with what waits of its events; those that were reported must be acknowledged
    /// later: see [`Self::wait_for_acknowledgements`].
    pub fn destroy(&self) -> Result<(), Errno> {
        self.end(CmRequest::DestroyId { id: self.handle })?;
        unpoisoned(&self.channel().ids).remove(&self.handle.0);
        Ok(())
    }

    /// Waits until all events are acknowledged that the program was given.
    pub fn wait_for_acknowledgements(&self) {
        self.reported.wait();
    }
}
