//! Programs that use the connection manager, in virtual time: what tests are made of.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_session::{
    CmEvent, CmEventType as Kind, CmIdInfo, CmParam, CmQp, CmQpAttr, CmRequest, Handle, PortSpace,
    Reply, Request,
};
use freeflow_types::{Gid, QpState, QpType, Qpn, VirtualIp};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::testbed::{Host, Made, Process};

pub(super) const A: &str = "10.77.0.1";
pub(super) const B: &str = "10.77.0.2";
pub(super) const PORT: u16 = 7471;
pub(super) const SECOND: u64 = 1_000_000_000;

/// A process with one event channel.
pub(super) struct Program {
    pub(super) process: Process,
    pub(super) channel: Handle,
    pub(super) packets: Arc<OwnedFd>,
}

pub(super) fn program(host: &mut Host, endpoint: Handle) -> Program {
    let process = host.process(endpoint, 1000);
    let (channel, packets) = channel(host, process.session);
    Program {
        process,
        channel,
        packets,
    }
}

pub(super) fn channel(host: &mut Host, session: Handle) -> (Handle, Arc<OwnedFd>) {
    let request = Request::Cm(CmRequest::CreateChannel);
    let answer = host.engine.handle(session, request);
    let Ok(Reply::Created(channel)) = answer.reply else {
        panic!("{:?}", answer.reply);
    };
    (channel, answer.fds.into_iter().next().unwrap())
}

/// Two programs on two endpoints of a tenant.
pub(super) fn two() -> (Host, Program, Program) {
    let mut host = Host::new();
    let (a, b) = (host.endpoint(A), host.endpoint(B));
    let (a, b) = (program(&mut host, a), program(&mut host, b));
    (host, a, b)
}

pub(super) fn address(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

pub(super) fn gid(ip: &str) -> Gid {
    VirtualIp(ip.parse().unwrap()).into()
}

pub(super) fn param(qpn: u32, private_data: &[u8]) -> CmParam {
    CmParam {
        qp: CmQp {
            qpn: Qpn::new(qpn),
            qp_type: QpType::Rc,
            srq: false,
        },
        private_data: private_data.to_vec(),
        responder_resources: 1,
        initiator_depth: 1,
        flow_control: false,
        retry_count: 6,
        rnr_retry_count: 5,
        qkey: None,
        ece: None,
    }
}

impl Program {
    pub(super) fn ask(&self, host: &mut Host, request: CmRequest) -> Result<Reply, Errno> {
        host.ask(self.process.session, Request::Cm(request))
    }

    pub(super) fn done(&self, host: &mut Host, request: CmRequest) {
        let told = format!("{request:?}");
        assert_eq!(self.ask(host, request), Ok(Reply::Done), "{told}");
    }

    pub(super) fn info(&self, host: &mut Host, request: CmRequest) -> Result<CmIdInfo, Errno> {
        match self.ask(host, request)? {
            Reply::CmId(info) => Ok(info),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn id(&self, host: &mut Host, port_space: PortSpace) -> Handle {
        let request = CmRequest::CreateId {
            channel: self.channel,
            port_space,
            qp_type: QpType::Rc,
        };
        match self.ask(host, request) {
            Ok(Reply::Created(id)) => id,
            other => panic!("{other:?}"),
        }
    }

    /// Packets on the channel's socket, which are read then.
    pub(super) fn packets(&self) -> usize {
        let mut bytes = [0; 4];
        let mut count = 0;
        while let Ok((_, n)) = rustix::net::recv(&*self.packets, &mut bytes, RecvFlags::DONTWAIT)
            && n != 0
        {
            assert_eq!(n, 1);
            count += 1;
        }
        count
    }

    /// The next event, if one waits: then a packet says so.
    pub(super) fn event(&self, host: &mut Host) -> Option<CmEvent> {
        let channel = self.channel;
        let packet = rustix::net::recv(&*self.packets, &mut [0; 4], RecvFlags::DONTWAIT);
        match self.ask(host, CmRequest::GetEvent { channel }) {
            Ok(Reply::CmEvent(event)) => {
                assert_eq!(packet.is_ok(), event.is_some());
                event.map(|event| *event)
            }
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn expect(&self, host: &mut Host, event: Kind, status: i32) -> CmEvent {
        let got = self.event(host).unwrap_or_else(|| panic!("no {event:?}"));
        assert_eq!((got.event, got.status), (event, status), "{got:?}");
        got
    }

    pub(super) fn quiet(&self, host: &mut Host) {
        assert_eq!(self.event(host), None);
    }

    pub(super) fn listener(
        &self,
        host: &mut Host,
        space: PortSpace,
        addr: &str,
        backlog: u32,
    ) -> Handle {
        let id = self.id(host, space);
        let addr = address(addr, PORT);
        self.info(host, CmRequest::BindAddr { id, addr }).unwrap();
        self.info(host, CmRequest::Listen { id, backlog }).unwrap();
        id
    }

    /// An id with a route to an address.
    pub(super) fn routed(&self, host: &mut Host, space: PortSpace, to: &str) -> Handle {
        let id = self.id(host, space);
        self.route(host, id, to);
        id
    }

    pub(super) fn route(&self, host: &mut Host, id: Handle, to: &str) {
        self.done(host, resolve(id, to));
        let event = self.expect(host, Kind::AddrResolved, 0);
        assert_eq!(event.info.dst, Some(address(to, PORT)));
        let timeout_ms = 2000;
        self.done(host, CmRequest::ResolveRoute { id, timeout_ms });
        self.expect(host, Kind::RouteResolved, 0);
    }

    pub(super) fn connect(&self, host: &mut Host, id: Handle, param: CmParam) {
        self.done(host, CmRequest::Connect { id, param });
    }

    pub(super) fn accept(&self, host: &mut Host, id: Handle, param: CmParam) {
        let (param, up) = (Some(param), None);
        self.done(host, CmRequest::Accept { id, param, up });
    }

    pub(super) fn finish(&self, host: &mut Host, id: Handle) {
        let (param, up) = (None, None);
        self.done(host, CmRequest::Accept { id, param, up });
    }

    pub(super) fn destroy(&self, host: &mut Host, id: Handle) -> u32 {
        match self.ask(host, CmRequest::DestroyId { id }) {
            Ok(Reply::CmDestroyed { events }) => events,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn attr(
        &self,
        host: &mut Host,
        id: Handle,
        state: QpState,
    ) -> Result<CmQpAttr, Errno> {
        match self.ask(host, CmRequest::InitQpAttr { id, state })? {
            Reply::CmQpAttr(attr) => Ok(*attr),
            other => panic!("{other:?}"),
        }
    }

    /// Brings a queue pair to a state as the manager says.
    pub(super) fn modify(&self, host: &mut Host, id: Handle, qp: Made, state: QpState) -> CmQpAttr {
        let got = self.attr(host, id, state).unwrap();
        let request = Request::ModifyQp {
            qp: qp.handle,
            attr: got.attr,
            mask: got.mask,
        };
        let reply = host.ask(self.process.session, request);
        assert_eq!(reply, Ok(Reply::Done), "{state:?}: {got:?}");
        got
    }

    pub(super) fn qp(&self, host: &mut Host) -> Made {
        let cq = host.cq(&self.process);
        host.qp(&self.process, QpType::Rc, (cq, Some(cq)), None)
    }
}

pub(super) fn disconnect(id: Handle) -> CmRequest {
    CmRequest::Disconnect { id, fail: None }
}

pub(super) fn resolve(id: Handle, to: &str) -> CmRequest {
    CmRequest::ResolveAddr {
        id,
        src: None,
        dst: address(to, PORT),
        timeout_ms: 2000,
    }
}

/// A connection of `a` with a listener of `b`: the ids of both.
pub(super) fn connected(host: &mut Host, a: &Program, b: &Program) -> (Handle, Handle) {
    let listener = b.listener(host, PortSpace::Tcp, B, 0);
    let id = a.routed(host, PortSpace::Tcp, B);
    a.connect(host, id, param(0x111, b""));
    let peer = b.expect(host, Kind::ConnectRequest, 0).new_id.unwrap();
    b.accept(host, peer, param(0x222, b""));
    a.expect(host, Kind::ConnectResponse, 0);
    a.finish(host, id);
    b.expect(host, Kind::Established, 0);
    b.destroy(host, listener);
    (id, peer)
}
