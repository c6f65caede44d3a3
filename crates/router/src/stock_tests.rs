//! Packets of hosts without FreeFlow against an engine without threads and sockets.

use std::net::IpAddr;

use freeflow_fabric_udp::{Ecn, Received};
use freeflow_session::{Handle, Request};
use freeflow_shm::{CompletionEntry, Sge};
use freeflow_transport::{Datagrams, Destination, Work};
use freeflow_types::{
    AddressVector, GRH_BYTES, Gid, Mtu, Opcode, Psn, QpAttr, QpAttrMask as Mask, QpState, QpType,
    VirtualIp, WcFlags, WcStatus,
};
use freeflow_wire::{Bth, BthOpcode, Headers};
use rustix::io::Errno;

use crate::remote::{Drops, Map};
use crate::testbed::{Cq, Host, Made, Process, Srq, steps_to_rts};
use crate::{EndpointSpec, Hosts, RouterError};

const QKEY: u32 = 0x1111;
const LOCAL: &str = "192.0.2.1";
const PEER: &str = "192.0.2.7";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn gid(text: &str) -> Gid {
    Gid::from(VirtualIp(ip(text)))
}

struct Bench {
    host: Host,
    process: Process,
    cq: Cq,
    srq: Srq,
}

impl Bench {
    /// With an endpoint that has the underlay's GID, or without.
    fn new(underlay: bool) -> Bench {
        let mut host = Host::new();
        let endpoint = host.endpoint("10.0.0.1");
        if underlay {
            host.engine.share_address(endpoint, ip(LOCAL));
        }
        let process = host.process(endpoint, 0);
        let cq = host.cq(&process);
        let srq = host.srq(&process, 8, None);
        Bench {
            host,
            process,
            cq,
            srq,
        }
    }

    fn modify(&mut self, qp: Made, attr: QpAttr, mask: Mask) -> Result<(), Errno> {
        let (qp, mask) = (qp.handle, mask | Mask::STATE);
        let request = Request::ModifyQp { qp, attr, mask };
        self.host.ask(self.process.session, request).map(|_| ())
    }

    fn qp(&mut self, qp_type: QpType) -> Made {
        let cqs = (self.cq, Some(self.cq));
        let srq = Some(self.srq);
        self.host.qp(&self.process, qp_type, cqs, srq)
    }

    /// A queue pair of datagrams, with a buffer for one.
    fn datagrams(&mut self) -> Made {
        let key = self.host.reg(&self.process, 4096).0;
        let sge = Sge {
            addr: 0,
            length: 4096,
            lkey: key,
        };
        assert!(self.host.try_post(&self.process, &mut self.srq, 5, &[sge]));
        let qp = self.qp(QpType::Ud);
        let attr = |state| QpAttr {
            state,
            port_num: 1,
            qkey: QKEY,
            ..QpAttr::default()
        };
        let init = Mask::PKEY_INDEX | Mask::PORT | Mask::QKEY;
        self.modify(qp, attr(QpState::Init), init).unwrap();
        self.modify(qp, attr(QpState::Rtr), Mask::empty()).unwrap();
        self.modify(qp, attr(QpState::Rts), Mask::SQ_PSN).unwrap();
        qp
    }

    /// A reliable queue pair on its way to a host by the GID of an index.
    fn connect(&mut self, to: &str, sgid_index: u8) -> Result<Made, Errno> {
        let qp = self.qp(QpType::Rc);
        let attr = QpAttr {
            state: QpState::Init,
            port_num: 1,
            path_mtu: Mtu::B1024,
            dest_qpn: 0x77,
            av: AddressVector {
                dgid: gid(to),
                sgid_index,
                is_global: true,
                port_num: 1,
                ..AddressVector::default()
            },
            ..QpAttr::default()
        };
        let [(_, init), (_, rtr), _] = steps_to_rts(QpType::Rc);
        self.modify(qp, attr, init).unwrap();
        let attr = QpAttr {
            state: QpState::Rtr,
            ..attr
        };
        self.modify(qp, attr, rtr).map(|()| qp)
    }

    /// A packet comes, and what is dropped is returned.
    fn give(&mut self, src: &str, headers: Headers, payload: &[u8]) -> Drops {
        self.host.engine.network.drops = Drops::default();
        let packet = Received {
            src: ip(src),
            ecn: Ecn::NotCapable,
            ip_id: 0,
            headers,
            payload,
        };
        self.host.engine.on_packet(&packet, None);
        self.host.settle();
        self.host.engine.network.drops
    }

    fn completions(&mut self) -> Vec<CompletionEntry> {
        self.host.completions(&mut self.cq)
    }

    fn remote(&self, qp: Handle) -> bool {
        self.host.engine.qps.get(qp).unwrap().remote.is_some()
    }
}

fn datagram(to: Made, qkey: u32, payload: &[u8]) -> Headers {
    let mut work = Work::new(Opcode::SendImm, payload.len() as u32);
    work.imm = [1, 2, 3, 4];
    let to = Destination { qpn: to.qpn, qkey };
    Datagrams::new(0).send(&work, 0x55, to, 4096).unwrap()
}

#[test]
fn a_datagram_comes_with_the_real_addresses() {
    let mut bench = Bench::new(true);
    let qp = bench.datagrams();
    let drops = bench.give(PEER, datagram(qp, QKEY, b"hello"), b"hello");
    assert_eq!(drops, Drops::default());
    let all = bench.completions();
    let [c] = &all[..] else { panic!("{all:?}") };
    assert_eq!(u32::from(c.status), WcStatus::Success.raw());
    assert_eq!((c.wr_id, c.byte_len), (5, GRH_BYTES + 5));
    assert_eq!((c.src_qp, c.imm.to_ne_bytes()), (0x55, [1, 2, 3, 4]));
    assert_eq!(c.wc_flags, (WcFlags::GRH | WcFlags::WITH_IMM).bits());
}

#[test]
fn a_datagram_needs_the_key_and_the_underlays_gid() {
    let mut bench = Bench::new(true);
    let qp = bench.datagrams();
    let drops = bench.give(PEER, datagram(qp, QKEY + 1, b"x"), b"x");
    assert_eq!(drops.not_taken, 1);
    let mut agreed = datagram(qp, QKEY, b"x");
    agreed.bth.header_crc = true;
    assert_eq!(bench.give(PEER, agreed, b"x").damaged, 1);
    // A host of the map is a FreeFlow router: its datagrams have virtual addresses.
    let hosts = Hosts::parse(&format!("t 10.0.1.0/24 {PEER}")).unwrap();
    let map = Map::new(hosts, ip(LOCAL));
    bench.host.engine.network.set_map(map);
    let drops = bench.give(PEER, datagram(qp, QKEY, b"x"), b"x");
    assert_eq!(drops.no_address, 1);
    assert!(bench.completions().is_empty());

    let mut bench = Bench::new(false);
    let qp = bench.datagrams();
    let drops = bench.give(PEER, datagram(qp, QKEY, b"x"), b"x");
    assert_eq!(drops.wrong_host, 1);
    assert!(bench.completions().is_empty());
}

#[test]
fn a_connection_is_with_the_host_that_its_gid_names() {
    let mut bench = Bench::new(true);
    let qp = bench.connect(PEER, 1).unwrap();
    assert!(bench.remote(qp.handle));
    let headers = Headers::new(Bth::new(BthOpcode::RC_SEND_ONLY, qp.qpn, Psn::new(0)));
    assert_eq!(bench.give("192.0.2.8", headers, b"").wrong_host, 1);
    let mut agreed = headers;
    agreed.bth.header_crc = true;
    assert_eq!(bench.give(PEER, agreed, b"").damaged, 1);
    assert!(bench.completions().is_empty());
    let key = bench.host.reg(&bench.process, 4096).0;
    let sge = Sge {
        addr: 0,
        length: 4096,
        lkey: key,
    };
    let Bench {
        host, process, srq, ..
    } = &mut bench;
    assert!(host.try_post(process, srq, 6, &[sge]));
    assert_eq!(bench.give(PEER, headers, b""), Drops::default());
    assert_eq!(bench.completions().first().map(|c| c.wr_id), Some(6));
    // Not a host's address: nobody answers, here or elsewhere.
    for nobody in ["127.0.0.1", "224.0.0.1", "255.255.255.255", "::1"] {
        let qp = bench.connect(nobody, 1).unwrap();
        assert!(!bench.remote(qp.handle), "{nobody}");
    }
    assert_eq!(bench.connect(PEER, 2), Err(Errno::INVAL));
    assert_eq!(Bench::new(false).connect(PEER, 1), Err(Errno::INVAL));
}

#[test]
fn the_underlays_gid_needs_an_underlay() {
    let mut host = Host::new();
    let spec = EndpointSpec {
        name: "a".to_owned(),
        tenant: "t".to_owned(),
        ip: VirtualIp(ip("10.0.0.1")),
        socket: "/nowhere".into(),
        quota: Vec::new(),
        underlay_gid: true,
    };
    let refused = host.engine.add_endpoint(&spec);
    assert!(matches!(refused, Err(RouterError::NoUnderlay)));
}
