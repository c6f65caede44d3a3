//! A client that has died, and a process that was given its id.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use freeflow_shm::SendEntry;
use freeflow_tests::rig::{CAP, IOVA, Patience, Rig};
use freeflow_tests::{Bed, DEADLINE, REACHED, Running, UNTOUCHED, have, is_root, skip, wait_until};
use freeflow_types::{Opcode, QpType, WcStatus};
use rustix::process::Signal;

/// Its process ids are this test's own.
const INSIDE: &str = "FREEFLOW_TEST_OWN_PIDS";
/// The id that the namespace gave last; the next one is the next that is free.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// Executes a command in a namespace of process ids, which ends with it.
fn unshare() -> Command {
    let mut command = Command::new("unshare");
    if !is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command
}

/// What a dead client had open for its peers ends with it: a process with its id and with memory at
/// the same address is neither written to nor read.
#[test]
fn a_successor_by_process_id_is_not_touched() {
    const NAME: &str = "reuse::a_successor_by_process_id_is_not_touched";
    if std::env::var_os(INSIDE).is_some() {
        for opcode in [Opcode::RdmaWrite, Opcode::RdmaRead].repeat(4) {
            succeed(opcode).unwrap();
        }
        return;
    }
    if !have("unshare") {
        return;
    }
    let set = format!("echo 1000 > {LAST_PID}");
    let probe = Running::start(unshare().args(["sh", "-c", &set])).unwrap();
    let probed = probe.wait(DEADLINE).unwrap();
    if !probed.status.success() {
        return skip(NAME, &format!("process ids cannot be chosen: {probed}"));
    }
    let mut again = unshare();
    again.arg(std::env::current_exe().unwrap());
    again
        .args(["--exact", NAME, "--nocapture"])
        .env(INSIDE, "1");
    let ended = Running::start(&mut again).unwrap();
    let ended = ended.wait(8 * DEADLINE).unwrap().success().unwrap();
    assert!(ended.stdout.contains("1 passed"), "{ended}");
}

/// A process of `reached-memory`; it is killed at the end.
struct Reached {
    process: Child,
    said: String,
}

impl Reached {
    fn start(args: &[String]) -> Result<Reached> {
        let mut process = Command::new(env!("CARGO_BIN_EXE_reached-memory"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let out = process.stdout.take().context("no output")?;
        let mut reached = Reached {
            process,
            said: String::new(),
        };
        BufReader::new(out).read_line(&mut reached.said)?;
        Ok(reached)
    }

    /// One with this process id, which is free.
    fn with_pid(pid: u32) -> Result<Reached> {
        let until = Instant::now() + DEADLINE;
        while Instant::now() < until {
            std::fs::write(LAST_PID, (pid - 1).to_string())?;
            let reached = Reached::start(&[])?;
            if reached.process.id() == pid {
                ensure!(reached.said == "ready\n", "it said {:?}", reached.said);
                return Ok(reached);
            }
        }
        bail!("no process was given the id {pid}")
    }

    /// What is in its memory.
    fn bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; REACHED.count()];
        File::open(format!("/proc/{}/mem", self.process.id()))?
            .read_exact_at(&mut bytes, REACHED.start)?;
        Ok(bytes)
    }

    fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Reached {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The peer's requests are under way when the client dies and its successor comes: all that while
/// the router stands still.
fn succeed(opcode: Opcode) -> Result<()> {
    let len = REACHED.count();
    let mut bed = Bed::new()?;
    let (near, far) = (bed.lasting_endpoint("t")?, bed.lasting_endpoint("t")?);
    let far_gid = Rig::new(&far.socket, 4096)?.gid();
    let mut peer = Rig::new(&near.socket, len as u64)?;
    let mut qp = peer.qp(QpType::Rc, CAP)?;
    let ip = std::net::Ipv6Addr::from(peer.gid().0).to_canonical();
    let mut client = Reached::start(&[
        far.socket.to_string_lossy().into_owned(),
        ip.to_string(),
        qp.qpn().to_string(),
    ])?;
    let (qpn, key) = client.said.trim().split_once(' ').context("a QPN, a key")?;
    let entry = |opcode: Opcode| SendEntry {
        opcode: opcode.raw() as u8,
        num_sge: 1,
        rkey: key.parse().unwrap_or_default(),
        remote_addr: IOVA,
        ..SendEntry::default()
    };
    let (first, then) = (entry(Opcode::RdmaWrite), entry(opcode));
    let patience = Patience {
        timeout: 12,
        retry_cnt: 1,
        rnr_retry: 0,
    };
    peer.connect_with(&qp, far_gid, qpn.parse()?, &patience)?;
    let ours = vec![0x5A; len];
    peer.fill(0, &ours)?;
    let all = peer.sge(0, len as u32);
    peer.send(&mut qp, &first, &[all])?;
    let done = peer.completion(DEADLINE)?;
    ensure!(done.status == 0, "while the client lived: {done:?}");
    ensure!(
        client.bytes()? == ours,
        "the client's memory is not reached"
    );

    let router = bed.router().pid();
    bed.router().signal(Signal::STOP);
    wait_until("the router stands still", DEADLINE, || {
        let stat = std::fs::read_to_string(format!("/proc/{router}/stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('T'))
    })?;
    for _ in 0..CAP.max_send_wr {
        peer.send(&mut qp, &then, &[all])?;
    }
    let pid = client.process.id();
    client.kill();
    let successor = Reached::with_pid(pid)?;
    bed.router().signal(Signal::CONT);

    for n in 0..CAP.max_send_wr {
        let done = peer.completion(DEADLINE)?;
        let status = WcStatus::from_raw(done.status.into()).context("no status")?;
        ensure!(
            status != WcStatus::Success,
            "request {n} of the dead client's memory"
        );
    }
    let untouched = vec![UNTOUCHED; len];
    ensure!(
        successor.bytes()? == untouched,
        "the successor was written to"
    );
    ensure!(peer.bytes(0, len)? == ours, "the successor was read");
    let gone = |status: &serde_json::Value| {
        let ended = status["ended_sessions"].as_array();
        ended.is_some_and(|all| all.iter().any(|e| e["endpoint"] == far.name.as_str()))
    };
    bed.wait_for_status(gone, DEADLINE)?;
    ensure!(bed.router().is_alive(), "the router ended");
    Ok(())
}
