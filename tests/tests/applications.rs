//! What people run over verbs, unmodified: MPI, uDAPL, block storage over iSER, and virtual machines
//! that move from one QEMU to another.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use freeflow_tests::{
    Bed, DEADLINE, Ended, Endpoint, Hosts, Running, compiled_by, count, descendants, free_port,
    have, program, skip, wait_until,
};
use rustix::process::Signal;

/// Programs that wait for each other on two busy processors.
const LONG: Duration = Duration::from_secs(180);

/// A launcher of MPI programs, its compiler, and what it wants to be told.
struct Mpi {
    launcher: &'static str,
    compiler: &'static str,
    args: &'static [&'static str],
}

const OPEN_MPI: Mpi = Mpi {
    launcher: "mpirun.openmpi",
    compiler: "mpicc.openmpi",
    args: &[
        "--allow-run-as-root",
        "--oversubscribe",
        // No way but UCX, which is to have no way but the device.
        "--mca",
        "pml",
        "ucx",
        "--mca",
        "osc",
        "ucx",
        "--mca",
        "btl",
        "^vader,tcp,openib,uct",
    ],
};

const MPICH: Mpi = Mpi {
    launcher: "mpiexec.mpich",
    compiler: "mpicc.mpich",
    args: &[],
};

impl Mpi {
    fn program(&self) -> Option<String> {
        let there = have(self.launcher);
        compiled_by(self.compiler, "mpi", &[]).filter(|_| there)
    }

    /// Launches a rank on each endpoint.
    fn launch(&self, ends: &[Endpoint<'_>], transports: &str, words: &[&str]) -> Running {
        let mut launch = Command::new(self.launcher);
        launch.args(self.args);
        let transports = format!("UCX_TLS={transports},self");
        for (at, end) in ends.iter().enumerate() {
            if at != 0 {
                launch.arg(":");
            }
            let command = end.command("env", &[&[transports.as_str()], words].concat());
            launch.args(["-np", "1"]);
            launch.arg(command.get_program()).args(command.get_args());
        }
        // Its processes' files are not to meet another launch's.
        launch.env_remove("LD_LIBRARY_PATH");
        Running::start(&mut launch).unwrap()
    }

    /// Its ranks must have sent their messages by the device: the router is asked before they end.
    fn agrees(&self, ends: &[Endpoint<'_>], transports: &str, program: &str) {
        const STAYS: &str = "$0; code=$?; until [ -e $1 ]; do sleep 0.1; done; exit $code";
        let dir = tempfile::tempdir().unwrap();
        let asked = dir.path().join("asked");
        let words = ["sh", "-c", STAYS, program, asked.to_str().unwrap()];
        let launched = self.launch(ends, transports, &words);
        let wanted = format!("{} ranks agree", ends.len());
        launched.wait_for(&wanted, LONG).unwrap();
        for end in ends {
            let sent = end.wait_for_some("sent_messages");
            sent.unwrap_or_else(|e| panic!("{} over {transports}: {e:#}", self.launcher));
        }
        std::fs::write(asked, "").unwrap();
        launched.wait(LONG).and_then(Ended::success).unwrap();
    }
}

#[test]
fn mpi_ranks_agree_on_one_host() {
    for mpi in [OPEN_MPI, MPICH] {
        let Some(program) = mpi.program() else {
            continue;
        };
        let bed = Bed::new().unwrap();
        for (ranks, transports) in [(2, "rc"), (4, "ud")] {
            let ends: Vec<_> = (0..ranks).map(|_| bed.endpoint()).collect();
            mpi.agrees(&ends, transports, &program);
        }
    }
}

/// Hydra's processes are told of each other by inherited pipes, so that they may be in different
/// network namespaces; Open MPI's are not.
#[test]
fn mpi_ranks_agree_across_hosts() {
    let Some(program) = MPICH.program() else {
        return;
    };
    if !Hosts::can("mpi_ranks_agree_across_hosts") {
        return;
    }
    let hosts = Hosts::new(1500).unwrap();
    for transports in ["rc", "ud"] {
        let ends = [0, 1].map(|host| hosts.bed(host).endpoint());
        MPICH.agrees(&ends, transports, &program);
    }
}

/// The launcher ends the other ranks, and the router has nothing left of any.
#[test]
fn an_mpi_rank_may_be_killed() {
    for mpi in [OPEN_MPI, MPICH] {
        let Some(program) = mpi.program() else {
            continue;
        };
        let bed = Bed::new().unwrap();
        let ends = [bed.endpoint(), bed.endpoint()];
        let launched = mpi.launch(&ends, "rc", &[&program, "go-on"]);
        launched.wait_for("2 ranks agree", LONG).unwrap();
        let name = Path::new(&program).file_name().unwrap().to_str().unwrap();
        let is_rank = |pid: &u32| {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            comm.is_ok_and(|comm| !comm.trim().is_empty() && name.starts_with(comm.trim()))
        };
        let rank = descendants(launched.pid()).into_iter().find(is_rank);
        let rank = rustix::process::Pid::from_raw(rank.expect("a rank") as i32).unwrap();
        rustix::process::kill_process(rank, Signal::KILL).unwrap();
        let ended = launched.wait(LONG).unwrap();
        assert!(!ended.status.success(), "{ended}");
        bed.wait_for_status(|status| count(status, "qps") == 0, DEADLINE)
            .unwrap();
    }
}

/// Its provider over the connection manager, which looks for the device by an interface, and the one
/// that connects queue pairs over TCP.
#[test]
fn udapl_over_each_of_its_providers() {
    let programs = [
        ("dtest", "waiting for client", "Test Complete. PASSED"),
        ("dtestx", "waiting to snd addr", "immed/atomic test PASSED"),
        ("dtestsrq", "Accepting", "SRQ Test Complete"),
    ];
    if !programs.iter().all(|program| have(program.0)) {
        return;
    }
    let bed = Bed::new().unwrap();
    if !bed.has_private_networks("udapl_over_each_of_its_providers") {
        return;
    }
    let providers = tempfile::NamedTempFile::new().unwrap();
    let text = "cma u2.0 nonthreadsafe default libdaplofa.so.2 dapl.2.0 \"eth0 0\" \"\"\n\
                scm u2.0 nonthreadsafe default libdaploscm.so.2 dapl.2.0 \"freeflow0 1\" \"\"\n";
    std::fs::write(providers.path(), text).unwrap();
    let (server, client) = ("10.79.1.1", "10.79.1.2");
    let start = |ip, args: &[&str]| {
        let mut run = bed.freeflow();
        run.env("DAT_OVERRIDE", providers.path());
        run.args(["run", "--network", "private", "--ip", ip, "--"]);
        // That it waits is said by lines.
        Running::start(run.args(["stdbuf", "-oL"]).args(args)).unwrap()
    };
    for (program, ready, passed) in programs {
        for provider in ["cma", "scm"] {
            let args = [program, "-P", provider];
            let serving = start(server, &args);
            serving.wait_for(ready, DEADLINE).unwrap();
            let using = start(client, &[&args[..], &["-h", server]].concat());
            for end in [using, serving] {
                let said = end.wait(DEADLINE).and_then(Ended::success).unwrap();
                assert!(said.stdout.contains(passed), "{provider}: {said}");
            }
        }
    }
}

const TARGET: &str = "iqn.2026-01.example:disk";
/// The name that QEMU's initiator has.
const INITIATOR: &str = "iqn.2008-11.org.linux-kvm";
const DISK_BYTES: u64 = 16 << 20;

/// A target with one disk.
struct Target<'a> {
    serving: Running,
    endpoint: Endpoint<'a>,
    disk: tempfile::NamedTempFile,
    _control: tempfile::TempDir,
}

impl<'a> Target<'a> {
    fn start(bed: &'a Bed) -> Target<'a> {
        let endpoint = bed.endpoint();
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(DISK_BYTES).unwrap();
        // Its control socket is nobody else's, as the TCP port that nobody uses.
        let control = tempfile::tempdir().unwrap();
        let socket = control.path().join("socket");
        let portal = format!("portal=127.0.0.1:{}", free_port());
        let path = |name| program(name).unwrap();
        let tgtd = path("tgtd");
        let mut serving = endpoint.command(tgtd.to_str().unwrap(), &["-f", "--iscsi", &portal]);
        let serving = Running::start(serving.env("TGT_IPC_SOCKET", &socket)).unwrap();
        endpoint.wait_for_some("cm_listeners").unwrap();
        let admin = |words: &str| {
            let mut command = Command::new(path("tgtadm"));
            command.env("TGT_IPC_SOCKET", &socket);
            command.args(["--lld", "iser"]);
            command.args(words.split(' '));
            let done = Running::start(&mut command).and_then(|run| run.wait(DEADLINE)?.success());
            done.map(drop)
        };
        wait_until("tgtd answers", DEADLINE, || {
            admin("--mode sys --op show").is_ok()
        })
        .unwrap();
        let path = disk.path().to_str().unwrap();
        for words in [
            &format!("--mode target --op new --tid 1 --targetname {TARGET}"),
            &format!("--mode logicalunit --op new --tid 1 --lun 1 -b {path}"),
            "--mode target --op bind --tid 1 -I ALL",
            &format!("--mode target --op bind --tid 1 -Q {INITIATOR}"),
        ] {
            admin(words).unwrap();
        }
        Target {
            serving,
            endpoint,
            disk,
            _control: control,
        }
    }

    fn url(&self) -> String {
        format!("iser://{}/{TARGET}/1", self.endpoint.ip)
    }
}

fn has_storage() -> bool {
    const DRIVER: &str = "/usr/lib/x86_64-linux-gnu/qemu/block-iscsi.so";
    let there = Path::new(DRIVER).exists();
    if !there {
        skip("QEMU's driver of iSER", &format!("there is no {DRIVER}"));
    }
    there && ["tgtd", "tgtadm", "qemu-io"].into_iter().all(have)
}

/// One host, or the target on the first of two and its user on the second.
fn blocks_are_those_that_were_written(serving: &Bed, using: &Bed) {
    let target = Target::start(serving);
    let said = using.endpoint().run(
        "qemu-io",
        &[
            "-f",
            "raw",
            // Sizes up to those that libiscsi's buffers have.
            "-c",
            "write -P 0x5a 64k 64k",
            "-c",
            "aio_write -P 0x33 1M 100k",
            "-c",
            "aio_write -P 0x34 2M 100k",
            "-c",
            "aio_write -P 0x35 16776704 512",
            "-c",
            "aio_flush",
            "-c",
            "read -P 0x5a 64k 64k",
            "-c",
            "read -P 0x34 2M 100k",
            "-c",
            "read -P 0 512k 64k",
            "-c",
            "flush",
            &target.url(),
        ],
    );
    let said = said.unwrap();
    for wanted in ["wrote 65536/65536 bytes", "read 102400/102400 bytes"] {
        assert!(said.stdout.contains(wanted), "{said}");
    }
    assert!(!said.stdout.contains("verification failed"), "{said}");
    let disk = std::fs::read(target.disk.path()).unwrap();
    let mut wanted = vec![0; DISK_BYTES as usize];
    wanted[64 << 10..128 << 10].fill(0x5a);
    wanted[1 << 20..(1 << 20) + (100 << 10)].fill(0x33);
    wanted[2 << 20..(2 << 20) + (100 << 10)].fill(0x34);
    wanted[16_776_704..].fill(0x35);
    assert!(disk == wanted, "the disk has other bytes than were written");
}

#[test]
fn iser_writes_and_reads_blocks() {
    if has_storage() {
        let bed = Bed::new().unwrap();
        blocks_are_those_that_were_written(&bed, &bed);
    }
}

#[test]
fn iser_crosses_hosts() {
    if has_storage() && Hosts::can("iser_crosses_hosts") {
        let hosts = Hosts::new(1500).unwrap();
        blocks_are_those_that_were_written(hosts.bed(0), hosts.bed(1));
    }
}

/// A user that is killed leaves a target that serves the next; nothing of it is left.
#[test]
fn an_iser_initiator_may_be_killed() {
    if !has_storage() || !have("iscsi-perf") {
        return;
    }
    let bed = Bed::new().unwrap();
    let mut target = Target::start(&bed);
    let sessions = |status: &serde_json::Value| count(status, "qps");
    let idle = sessions(&bed.status().unwrap());
    for _ in 0..3 {
        let user = bed.endpoint();
        let args = ["-i", INITIATOR, "-m", "16", "-b", "64", &target.url()];
        let mut user = user.start("iscsi-perf", &args).unwrap();
        user.wait_for("iops current", DEADLINE).unwrap();
        user.kill_program().unwrap();
        bed.wait_for_status(|status| sessions(status) == idle, DEADLINE)
            .unwrap();
    }
    assert!(target.serving.is_alive());
    let said = bed.endpoint().run(
        "qemu-io",
        &["-f", "raw", "-c", "read -P 0 0 64k", &target.url()],
    );
    assert!(!said.unwrap().stdout.contains("verification failed"));
}

/// A virtual machine that is spoken to by QMP.
struct Guest {
    qemu: Running,
    asked: u32,
}

const GUEST_MB: u64 = 128;

impl Guest {
    fn start(on: &Endpoint<'_>, more: &[&str]) -> Guest {
        let memory = GUEST_MB.to_string();
        let mut args = vec!["-accel", "tcg", "-m", &memory, "-S", "-nodefaults"];
        args.extend(["-display", "none", "-qmp", "stdio"]);
        args.extend(more);
        let mut command = on.command("qemu-system-x86_64", &args);
        let qemu = Running::start_piped(&mut command).unwrap();
        qemu.wait_for("\"QMP\"", DEADLINE).unwrap();
        let mut guest = Guest { qemu, asked: 0 };
        guest.ask("qmp_capabilities", "{}");
        guest
    }

    /// Has a command executed; it must succeed.
    fn ask(&mut self, command: &str, arguments: &str) {
        self.asked += 1;
        let id = self.asked;
        self.qemu
            .enter(&format!(
                r#"{{"execute":"{command}","arguments":{arguments},"id":{id}}}"#
            ))
            .unwrap();
        let answer = format!("{{\"return\": {{}}, \"id\": {id}}}");
        self.qemu.wait_for(&answer, DEADLINE).unwrap();
    }

    fn capability(&mut self, name: &str) {
        let arguments = format!(r#"{{"capabilities":[{{"capability":"{name}","state":true}}]}}"#);
        self.ask("migrate-set-capabilities", &arguments);
    }

    /// Its memory.
    fn memory(&mut self) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (bytes, path) = (GUEST_MB << 20, file.path().to_str().unwrap());
        let arguments = format!(r#"{{"val":0,"size":{bytes},"filename":"{path}"}}"#);
        self.ask("pmemsave", &arguments);
        std::fs::read(path).unwrap()
    }
}

/// A file of bytes that are all different from their neighbours, for a guest's memory.
fn content() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut words = Vec::with_capacity(32 << 20);
    while words.len() < 32 << 20 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words.extend(state.to_le_bytes());
    }
    std::fs::write(file.path(), words).unwrap();
    file
}

/// The source's machine, with content in its memory, and one that waits for it.
fn guests<'a>(from: &'a Bed, to: &'a Bed, content: &Path) -> (Guest, Guest, String) {
    let there = to.endpoint();
    let uri = format!("rdma:{}:4444", there.ip);
    let mut destination = Guest::start(&there, &["-incoming", "defer"]);
    let loader = format!(
        "loader,file={},addr=0x1000000,force-raw=on",
        content.display()
    );
    let mut source = Guest::start(&from.endpoint(), &["-device", &loader]);
    for guest in [&mut source, &mut destination] {
        guest.capability("events");
    }
    (source, destination, uri)
}

fn receive(bed: &Bed, destination: &mut Guest, uri: &str) {
    destination.ask("migrate-incoming", &format!(r#"{{"uri":"{uri}"}}"#));
    let listens = |status: &serde_json::Value| count(status, "cm_listeners") != 0;
    bed.wait_for_status(listens, DEADLINE).unwrap();
}

fn a_machine_moves(from: &Bed, to: &Bed, pin_all: bool) {
    let content = content();
    let (mut source, mut destination, uri) = guests(from, to, content.path());
    if pin_all {
        source.capability("rdma-pin-all");
        destination.capability("rdma-pin-all");
    }
    receive(to, &mut destination, &uri);
    let before = source.memory();
    let bytes = std::fs::read(content.path()).unwrap();
    assert!(before[16 << 20..].starts_with(&bytes));
    source.ask("migrate", &format!(r#"{{"uri":"{uri}"}}"#));
    for guest in [&source, &destination] {
        guest
            .qemu
            .wait_for("\"status\": \"completed\"", LONG)
            .unwrap();
    }
    assert!(
        destination.memory() == before,
        "memory has changed on the way"
    );
    for guest in [&mut source, &mut destination] {
        guest.ask("quit", "{}");
    }
}

#[test]
fn a_virtual_machine_moves() {
    if have("qemu-system-x86_64") {
        let bed = Bed::new().unwrap();
        for pin_all in [false, true] {
            a_machine_moves(&bed, &bed, pin_all);
        }
    }
}

#[test]
fn a_virtual_machine_moves_to_another_host() {
    if have("qemu-system-x86_64") && Hosts::can("a_virtual_machine_moves_to_another_host") {
        let hosts = Hosts::new(1500).unwrap();
        a_machine_moves(hosts.bed(0), hosts.bed(1), true);
    }
}

/// A machine whose destination is killed stays where it is.
#[test]
fn a_virtual_machine_stays_if_its_destination_dies() {
    if !have("qemu-system-x86_64") {
        return;
    }
    let bed = Bed::new().unwrap();
    let content = content();
    let (mut source, mut destination, uri) = guests(&bed, &bed, content.path());
    receive(&bed, &mut destination, &uri);
    let before = source.memory();
    // It is under way for seconds.
    source.ask("migrate-set-parameters", r#"{"max-bandwidth":4000000}"#);
    source.ask("migrate", &format!(r#"{{"uri":"{uri}"}}"#));
    source
        .qemu
        .wait_for("\"status\": \"active\"", LONG)
        .unwrap();
    destination.qemu.kill_program().unwrap();
    source
        .qemu
        .wait_for("\"status\": \"failed\"", LONG)
        .unwrap();
    assert!(source.memory() == before);
    source.ask("quit", "{}");
}
