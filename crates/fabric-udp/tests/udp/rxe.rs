//! Packets to and from the kernel's RDMA device, in a virtual machine.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::Duration;

use crate::common::{flush, receive, skip, to};
use freeflow_fabric_udp::{Fabric, Udp, UdpOptions};
use freeflow_types::Psn;
use freeflow_vm::{Machine, Vm, VmError};
use freeflow_wire::cm::{self, IpCm, Mad, Message, PortSpace, SidrRep, SidrReq};
use freeflow_wire::{Bth, BthOpcode, Deth, Headers};

/// Where this test runs in the guest: the fabric's namespace.
const INSIDE: &str = "TEST_IN_THE_GUEST";
const NAME: &str = "rxe::the_kernel_answers";

/// rxe receives in the first namespace only, and has RoCE's port there.
const SCRIPT: &str = "
set -eu
ip netns add peer
ip link add v0 type veth peer name v0 netns peer
ip addr add 10.78.0.1/24 dev v0
ip link set v0 up
ip -n peer addr add 10.78.0.2/24 dev v0
ip -n peer link set v0 up
rdma link add rxe9 type rxe netdev v0
for segments in 65535 1; do
    ip -n peer link set v0 gso_max_segs $segments
    ip netns exec peer \"$@\"
done
";

/// Trains that the kernel splits, before the device or after it, are packets whose CRC rxe finds
/// right, and so are its answers.
#[test]
fn the_kernel_answers() {
    if std::env::var_os(INSIDE).is_some() {
        return ask();
    }
    let machine = match Machine::find() {
        Ok(machine) => machine,
        Err(why @ VmError::Unavailable(_)) => return skip(NAME, &why.to_string()),
        Err(e) => panic!("{e}"),
    };
    let this = std::env::current_exe().unwrap();
    let inside = format!("{INSIDE}=1");
    let this = this.to_str().unwrap();
    let command = [
        "bash",
        "-c",
        SCRIPT,
        "bash",
        "env",
        &inside,
        this,
        "--exact",
        NAME,
        "--nocapture",
    ];
    let outcome = Vm::new(&machine)
        .limit(Duration::from_secs(300))
        .run(&command)
        .unwrap();
    assert!(outcome.success(), "{outcome}");
    let passed = outcome.hosts[0].output.matches("ok. 1 passed").count();
    assert_eq!(passed, 2, "{outcome}");
}

/// Asks the kernel's communication manager for a service that there is not.
fn ask() {
    let [rxe, local] = ["10.78.0.1", "10.78.0.2"].map(|ip| ip.parse().unwrap());
    let mut fabric = Fabric::new(Udp::open(&UdpOptions::new(local)).unwrap());
    let to = to(rxe, 0);
    let request = |id: u32| {
        let mut private = [0; 216];
        let ip = IpCm {
            src_port: 9,
            src: local,
            dst: rxe,
        };
        ip.emit(&mut private).unwrap();
        let message = SidrReq {
            request_id: id,
            pkey: freeflow_wire::DEFAULT_PKEY,
            service_id: cm::service_id(PortSpace::Udp, 4),
            private,
        };
        Mad {
            transaction: 1000 + u64::from(id),
            modifier: 0,
            message: Message::SidrReq(message),
        }
    };
    // The first teaches the kernels whose neighbours they are; the others go together.
    for ids in [0..1, 1..21] {
        for id in ids.clone() {
            let bth = Bth::new(BthOpcode::UD_SEND_ONLY, cm::QPN, Psn::new(id));
            let mut headers = Headers::new(bth);
            headers.deth = Some(Deth {
                qkey: cm::QKEY,
                src_qp: cm::QPN,
            });
            let mad = request(id).emit().unwrap();
            let fill = |room: &mut [u8]| {
                room.copy_from_slice(&mad);
                Ok::<_, Infallible>(())
            };
            fabric.push(&to, &headers, mad.len(), fill).unwrap();
        }
        let calls = fabric.sent().calls;
        flush(&mut fabric);
        assert_eq!(fabric.sent().calls, calls + 1);
        let mut left: BTreeSet<u32> = ids.collect();
        receive(&mut fabric, |packet| {
            assert_eq!(packet.src, rxe);
            assert_eq!(packet.headers.deth.unwrap().qkey, cm::QKEY);
            let mad = Mad::parse(packet.payload).unwrap();
            let Message::SidrRep(answer) = mad.message else {
                panic!("{mad:?}");
            };
            assert_eq!(answer.status, SidrRep::UNSUPPORTED);
            assert_eq!(mad.transaction, 1000 + u64::from(answer.request_id));
            left.remove(&answer.request_id);
            !left.is_empty()
        });
    }
    assert_eq!(fabric.received().bad_icrc, 0);
    println!("{:?}", fabric.received());
}
