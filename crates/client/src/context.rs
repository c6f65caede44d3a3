//! Open devices and protection domains.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use freeflow_session::{DeviceInfo, Event, Handle, Reply, Request};
use freeflow_shm::recv_packet_interruptible;
use freeflow_types::AsyncEventType;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::channel::CompChannel;
use crate::session::{Session, created, unpoisoned};
use crate::slots::Users;

/// The device of this endpoint. ENODEV: there is none.
pub fn device() -> Result<DeviceInfo, Errno> {
    Ok(Session::current()?.info.clone())
}

/// An open device.
#[derive(Debug)]
pub struct Context {
    pub(crate) session: Arc<Session>,
    pub(crate) handle: Handle,
    events: OwnedFd,
    fatal: AtomicBool,
}

/// What an asynchronous event is about; numbers are those given when the object was created.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Element {
    /// A queue pair.
    Qp(usize),
    /// A completion queue.
    Cq(usize),
    /// A shared receive queue.
    Srq(usize),
    /// A port.
    Port(u8),
    /// The device.
    Device,
}

/// Asynchronous event (`ibv_get_async_event(3)`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AsyncEvent {
    /// What happened.
    pub kind: AsyncEventType,
    /// To whom.
    pub element: Element,
}

impl Context {
    /// Opens the device.
    pub fn open() -> Result<Arc<Context>, Errno> {
        Self::open_in(Session::current()?)
    }

    pub(crate) fn open_in(session: Arc<Session>) -> Result<Arc<Context>, Errno> {
        let (reply, fds) = session.call(&Request::OpenContext)?;
        let handle = created(reply)?;
        let events = fds.into_iter().next().ok_or(Errno::PROTO)?;
        Ok(Arc::new(Context {
            session,
            handle,
            events,
            fatal: AtomicBool::new(false),
        }))
    }

    /// Whether it is of this process, and its router lives.
    pub fn is_current(&self) -> bool {
        self.session.is_own() && !self.session.link.check()
    }

    /// What the device was when the session began.
    pub fn info(&self) -> &DeviceInfo {
        &self.session.info
    }

    /// What the device is now: limits follow the endpoint's quota. Who cannot ask, because the
    /// router is gone or this is a child of `fork`, is told what it was.
    pub fn query(&self) -> DeviceInfo {
        match self.session.call(&Request::QueryDevice) {
            Ok((Reply::Device(info), _)) => info,
            _ => self.session.info.clone(),
        }
    }

    /// Descriptor that is readable when there is an asynchronous event.
    pub fn async_fd(&self) -> RawFd {
        self.events.as_raw_fd()
    }

    /// The next asynchronous event; waits for it unless the descriptor is non-blocking (then
    /// EAGAIN). EINTR: a signal handler ran. EIO: the device is gone, and that was reported.
    pub fn get_async_event(&self) -> Result<AsyncEvent, Errno> {
        loop {
            let mut bytes = [0; Event::BYTES];
            let packet = recv_packet_interruptible(&self.events, &mut bytes, RecvFlags::empty());
            let event = match packet {
                Ok(packet) if packet.len != 0 => Event::decode(&bytes[..packet.len]),
                Err(errno) if errno != Errno::CONNRESET => return Err(errno),
                _ => {
                    // Relaxed: only who comes first matters.
                    if self.fatal.swap(true, Ordering::Relaxed) {
                        return Err(Errno::IO);
                    }
                    let (kind, element) = (AsyncEventType::DeviceFatal, Element::Device);
                    return Ok(AsyncEvent { kind, element });
                }
            };
            let found = match event {
                Some(Event::Qp(kind, handle)) => {
                    let qp = unpoisoned(&self.session.qps)
                        .get(&handle.0)
                        .and_then(|q| q.upgrade());
                    qp.map(|qp| {
                        qp.asynchronous.delivered();
                        AsyncEvent {
                            kind,
                            element: Element::Qp(qp.user),
                        }
                    })
                }
                Some(Event::Cq(kind, handle)) => {
                    let cq = unpoisoned(&self.session.cqs)
                        .get(&handle.0)
                        .and_then(|c| c.upgrade());
                    cq.map(|cq| {
                        cq.asynchronous.delivered();
                        AsyncEvent {
                            kind,
                            element: Element::Cq(cq.user),
                        }
                    })
                }
                Some(Event::Srq(kind, handle)) => {
                    let srq = unpoisoned(&self.session.srqs)
                        .get(&handle.0)
                        .and_then(|s| s.upgrade());
                    srq.map(|srq| {
                        srq.asynchronous.delivered();
                        AsyncEvent {
                            kind,
                            element: Element::Srq(srq.user),
                        }
                    })
                }
                Some(Event::XrcQp(kind, open)) => {
                    let qp = unpoisoned(&self.session.xrc_qps)
                        .get(&open.0)
                        .and_then(|q| q.upgrade());
                    qp.map(|qp| {
                        qp.asynchronous.delivered();
                        AsyncEvent {
                            kind,
                            element: Element::Qp(qp.user),
                        }
                    })
                }
                Some(Event::Port(kind)) => Some(AsyncEvent {
                    kind,
                    element: Element::Port(1),
                }),
                // A completion does not belong here; a newer router may know more events.
                Some(Event::Completion(_)) | None => None,
            };
            // An event of an object that is destroyed has nobody to go to.
            if let Some(found) = found {
                return Ok(found);
            }
        }
    }

    /// Closes the device. Objects that are left in it are destroyed at the router.
    pub fn close(&self) -> Result<(), Errno> {
        let context = self.handle;
        self.session.destroy(&Request::CloseContext { context })?;
        self.session.slots.close(&self.session, context);
        Ok(())
    }

    /// Allocates a protection domain.
    pub fn alloc_pd(self: &Arc<Self>) -> Result<Arc<Pd>, Errno> {
        let (reply, _) = self.session.call(&Request::AllocPd {
            context: self.handle,
        })?;
        Ok(Arc::new(Pd {
            context: self.clone(),
            handle: created(reply)?,
            users: Users::default(),
        }))
    }

    /// Creates a completion channel.
    pub fn create_channel(self: &Arc<Self>) -> Result<Arc<CompChannel>, Errno> {
        let (reply, fds) = self.session.call(&Request::CreateChannel {
            context: self.handle,
        })?;
        let handle = created(reply)?;
        let events = fds.into_iter().next().ok_or(Errno::PROTO)?;
        Ok(Arc::new(CompChannel::new(
            self.session.clone(),
            handle,
            events,
        )))
    }
}

/// Protection domain.
#[derive(Debug)]
pub struct Pd {
    pub(crate) context: Arc<Context>,
    pub(crate) handle: Handle,
    pub(crate) users: Users,
}

impl Pd {
    /// Its number at the router.
    pub fn number(&self) -> u32 {
        self.handle.0
    }

    /// Frees it. EBUSY: it is in use.
    pub fn dealloc(&self) -> Result<(), Errno> {
        let session = &self.context.session;
        // Relaxed: the program orders what it does with the domain.
        if self.users.load(Ordering::Relaxed) != 0 && session.is_own() && !session.link.check() {
            return Err(Errno::BUSY);
        }
        session.destroy(&Request::DeallocPd { pd: self.handle })
    }
}
