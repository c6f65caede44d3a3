//! What goes between two hosts, as tshark sees it.

use std::collections::BTreeSet;

use freeflow_tests::{DEADLINE, Hosts, Running, Underlay, have, skip, wait_until};
use freeflow_wire::BthOpcode;

/// Programs, by whose traffic all kinds of packets come.
const PROGRAMS: [(&str, &[&str]); 6] = [
    ("ibv_rc_pingpong", &["-g", "0", "-n", "20", "-s", "5000"]),
    ("ibv_uc_pingpong", &["-g", "0", "-n", "20", "-s", "5000"]),
    ("ibv_ud_pingpong", &["-g", "0", "-n", "20", "-s", "1000"]),
    ("ib_write_bw", &["-n", "20", "-s", "5001"]),
    ("ib_read_bw", &["-n", "20", "-s", "5001"]),
    ("ib_atomic_bw", &["-n", "20"]),
];

/// What must be among them.
const KINDS: [BthOpcode; 14] = [
    BthOpcode::RC_SEND_FIRST,
    BthOpcode::RC_SEND_MIDDLE,
    BthOpcode::RC_SEND_LAST,
    BthOpcode::RC_WRITE_FIRST,
    BthOpcode::RC_WRITE_LAST,
    BthOpcode::RC_READ_REQUEST,
    BthOpcode::RC_READ_RESPONSE_FIRST,
    BthOpcode::RC_READ_RESPONSE_LAST,
    BthOpcode::RC_ACK,
    BthOpcode::RC_ATOMIC_ACK,
    BthOpcode::RC_FETCH_ADD,
    BthOpcode::UC_SEND_FIRST,
    BthOpcode::UC_SEND_LAST,
    BthOpcode::UD_SEND_ONLY,
];

/// What is sent behind all packets.
const LAST: &str = "that was the last packet";

#[test]
fn tshark_understands_every_packet() {
    let test = "tshark_understands_every_packet";
    let programs = PROGRAMS.iter().map(|p| p.0);
    if !Hosts::can(test) || !programs.chain(["tshark", "dumpcap", "bash"]).all(have) {
        return;
    }
    for underlay in [Underlay::V4, Underlay::V6] {
        let hosts = Hosts::over(underlay, 1500, &[]).unwrap();
        // As a wire has them: no trains.
        hosts.send_apart().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("packets.pcapng");
        let path = file.to_str().unwrap();
        let args = [
            "-q",
            "-i",
            "ff0",
            "-B",
            "64",
            "-w",
            path,
            "-f",
            "udp port 4791",
        ];
        let mut dumping = Running::start(&mut hosts.command(0, "dumpcap", &args)).unwrap();
        let begun = wait_until("dumpcap captures", DEADLINE, || file.exists());
        if begun.is_err() || !dumping.is_alive() {
            let ended = dumping.wait(DEADLINE).unwrap();
            return skip(test, &format!("nothing can be captured: {ended}"));
        }
        for (program, args) in PROGRAMS {
            hosts.pair(program, args).unwrap();
        }
        // It is told of packets some at a time, and ends with those that it was told of: the last is
        // of a stranger, and comes behind all of them.
        let mark = format!("echo -n {LAST} > /dev/udp/{}/4791", underlay.addresses()[1]);
        let sent = Running::start(&mut hosts.command(0, "bash", &["-c", &mark]));
        sent.unwrap().wait(DEADLINE).unwrap().success().unwrap();
        wait_until("dumpcap has written all", DEADLINE, || {
            let written = std::fs::read(&file).unwrap();
            written
                .windows(LAST.len())
                .any(|bytes| bytes == LAST.as_bytes())
        })
        .unwrap();
        dumping.signal(rustix::process::Signal::INT);
        dumping.wait(DEADLINE).unwrap().success().unwrap();
        understood(path);
    }
}

/// Looks at all packets of a file.
fn understood(path: &str) {
    let fields = [
        "infiniband.bth.opcode",
        "_ws.malformed",
        "_ws.expert.severity",
    ];
    let ours = format!("!(udp.payload contains \"{LAST}\")");
    let mut args = vec!["-r", path, "-Y", &ours];
    args.extend(["-T", "fields", "-E", "separator=;"]);
    args.extend(fields.iter().flat_map(|field| ["-e", field]));
    let mut command = std::process::Command::new("tshark");
    let said = Running::start(command.args(&args)).unwrap();
    let said = said.wait(DEADLINE).unwrap().success().unwrap();
    let mut kinds = BTreeSet::new();
    for (n, line) in said.stdout.lines().enumerate() {
        let [opcode, malformed, expert] = line.split(';').collect::<Vec<_>>()[..] else {
            panic!("{line}");
        };
        let good = malformed.is_empty() && expert.is_empty();
        assert!(good, "packet {}: {line}", n + 1);
        let opcode: u8 = opcode
            .parse()
            .unwrap_or_else(|_| panic!("packet {}: {line}", n + 1));
        kinds.insert(BthOpcode(opcode));
    }
    for kind in KINDS {
        assert!(kinds.contains(&kind), "no {kind} in {kinds:?}");
    }
}
