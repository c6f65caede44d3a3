//! `cargo xtask bench`: every figure beside its peer, measured in the same run.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use freeflow_tests::{Bed, DEADLINE, Hosts, Running, TcpPair, have};
use freeflow_vm::{Machine, Vm, VmError};
use serde::Serialize;
use serde_json::Value;

use crate::cargo::{cargo, root, run, target};
use crate::demo::print;
use crate::{checks, dist, fairness, measure, packages};

/// The usual MTU of an Ethernet link.
const MTU: u32 = 1500;
/// That of a link with jumbo frames.
const JUMBO_MTU: u32 = 9000;
const BULK: [u64; 5] = [65_536, 131_072, 262_144, 524_288, 1_048_576];
const IDLE_ENDPOINTS: usize = 64;
const IDLE_QPS: usize = 16;
const SCALE_QPS: usize = 160;
const SCALE_MRS: usize = 1600;
const SCALE_CONNECTIONS: usize = 160;
/// What ten thousand open connections fit in, in bytes.
const CONNECTIONS_FIT: f64 = 256.0 * MIB;
/// Programs that flood the router with control verbs, and the rate that their endpoint may have.
const FLOODING: usize = 8;
const FLOOD_RATE: &str = "control=1000/s";
const IDLE_TIME: Duration = Duration::from_secs(10);
/// Connections that share a link.
const MANY: usize = 64;
const MIB: f64 = (1 << 20) as f64;
/// How many of a thousand packets are lost; what is to be left of the rate, and that as a sentence.
const LOSSES: [(u32, f64, &str); 3] = [
    (1, 0.9, "at least 0.9"),
    (10, 0.7, "at least 0.7"),
    (50, 0.2, "at least 0.2"),
];
/// What a guest needs before it measures, and for each measurement of all there are, at most.
const GUEST_START: Duration = Duration::from_secs(300);
const GUEST_RUN: Duration = Duration::from_secs(600);

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// Runs of each measurement; their median counts
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Measure only what has this in its name
    #[arg(long)]
    only: Option<String>,
    /// Where the JSON goes [default: target/bench.json]
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One figure, and what it is compared with; of what could not be measured it is no number.
#[derive(Serialize)]
struct Row {
    name: String,
    figure: f64,
    unit: &'static str,
    peer: String,
    peer_figure: f64,
    /// How often the figure is the peer's.
    ratio: f64,
    /// What the ratio is to be, as a sentence.
    target: &'static str,
    met: bool,
}

/// What a ratio is to be.
#[derive(Clone, Copy)]
enum Target {
    AtLeast(f64, &'static str),
    AtMost(f64, &'static str),
    /// Nothing: it is there to compare with.
    None,
}

struct Bench {
    bed: Bed,
    runs: usize,
    own: PathBuf,
    rows: Vec<Row>,
}

impl Bench {
    fn row(
        &mut self,
        name: impl Into<String>,
        (figure, unit): (f64, &'static str),
        (peer, peer_figure): (impl Into<String>, f64),
        target: Target,
    ) {
        let ratio = figure / peer_figure;
        let (met, target) = match target {
            Target::AtLeast(bound, text) => (ratio >= bound, text),
            Target::AtMost(bound, text) => (ratio <= bound, text),
            Target::None => (!ratio.is_nan(), "-"),
        };
        self.rows.push(Row {
            name: name.into(),
            figure,
            unit,
            peer: peer.into(),
            peer_figure,
            ratio,
            target,
            met,
        });
    }

    /// The median of several runs.
    fn median(&self, mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
        let figures: Result<Vec<_>> = (0..self.runs).map(|_| measure()).collect();
        Ok(measure::median(figures?))
    }

    /// Runs one of our own measuring programs on an endpoint.
    fn own(&self, args: &[&str]) -> Result<Value> {
        let program = self.own.display().to_string();
        let ended = self.bed.endpoint().run(&program, args)?;
        serde_json::from_str(&ended.stdout).with_context(|| ended.to_string())
    }

    fn own_figure(&self, args: &[&str], name: &str) -> Result<f64> {
        let said = self.own(args)?;
        said[name]
            .as_f64()
            .with_context(|| format!("no {name} in {said}"))
    }

    fn bandwidth(&mut self) -> Result<()> {
        let pair = TcpPair::new(MTU)?;
        for size in BULK {
            let text = size.to_string();
            let (mut ours, mut copy, mut tcp) = (Vec::new(), Vec::new(), Vec::new());
            // Alternating: what disturbs the machine disturbs all.
            for _ in 0..self.runs {
                let iterations = ((4 << 30) / size).clamp(1000, 20_000).to_string();
                let args = ["-s", &text, "-n", &iterations, "-N"];
                for (_, rate, _) in measure::bandwidth(&self.bed, "ib_write_bw", &args)? {
                    ours.push(rate);
                }
                copy.push(self.own_figure(&["memcpy", &text], "mib_per_s")?);
                tcp.push(measure::tcp_rate(&pair, size)?);
            }
            let ours = (measure::median(ours), "MiB/s");
            let name = format!("ib_write_bw {size} B");
            let memcpy = Target::AtLeast(0.5, "at least 0.5");
            self.row(
                &name,
                ours,
                ("memcpy, one thread", measure::median(copy)),
                memcpy,
            );
            let eight = Target::AtLeast(8.0, "at least 8");
            self.row(&name, ours, ("TCP over veth", measure::median(tcp)), eight);
        }
        Ok(())
    }

    fn latency(&mut self) -> Result<()> {
        let pair = TcpPair::new(MTU)?;
        for program in ["ib_write_lat", "ib_send_lat"] {
            let (mut ours, mut tcp) = (Vec::new(), Vec::new());
            for _ in 0..self.runs {
                for (_, us, _) in measure::latency(&self.bed, program, &["-s", "8", "-n", "20000"])?
                {
                    ours.push(us);
                }
                tcp.push(measure::tcp_latency(&pair, 8)?);
            }
            let third = Target::AtMost(1.0 / 3.0, "at most 1/3");
            let ours = (measure::median(ours), "us");
            let tcp = measure::median(tcp);
            self.row(
                format!("{program} 8 B"),
                ours,
                ("TCP over veth", tcp),
                third,
            );
        }
        Ok(())
    }

    /// A router's own memory for many idle queue pairs, and for many regions.
    fn scale(&mut self) -> Result<()> {
        let mut bed = Bed::new()?;
        let pid = bed.router().pid();
        let qps = SCALE_QPS.to_string();
        let mrs = SCALE_MRS.to_string();
        let connections = SCALE_CONNECTIONS.to_string();
        for (name, none, some, count, bytes) in [
            (
                "idle queue pair",
                &["idle", "0", "0"][..],
                &["idle", &qps, "0"][..],
                SCALE_QPS,
                4096.0,
            ),
            (
                "region of 4 KiB",
                &["idle", "0", "0"],
                &["idle", "0", &mrs],
                SCALE_MRS,
                512.0,
            ),
            (
                "idle connection, both ends and their queue pairs",
                &["cm-idle", "0"],
                &["cm-idle", &connections],
                SCALE_CONNECTIONS,
                CONNECTIONS_FIT / 10_000.0,
            ),
        ] {
            // What endpoints and their processes take is not what is asked for.
            let holders = self.holders(&bed, none)?;
            let before = own_memory(pid)?;
            drop(holders);
            let holders = self.holders(&bed, some)?;
            let all = IDLE_ENDPOINTS * count;
            let used = (own_memory(pid)? - before).max(0.0) / all as f64;
            drop(holders);
            let few = Target::AtMost(1.0, "at most");
            self.row(
                format!("router's memory: {name}, of {all}"),
                (used, "B"),
                ("limit", bytes),
                few,
            );
        }
        Ok(())
    }

    /// One of our own programs on each of many endpoints, once all of them say that they are ready.
    fn holders(&self, bed: &Bed, args: &[&str]) -> Result<Vec<Running>> {
        let program = self.own.display().to_string();
        let start = |_| {
            let mut command = bed.endpoint().command(&program, args);
            Running::start_piped(&mut command)
        };
        let holders: Vec<_> = (0..IDLE_ENDPOINTS).map(start).collect::<Result<_>>()?;
        for holder in &holders {
            holder.wait_for("ready", DEADLINE)?;
        }
        Ok(holders)
    }

    /// Between two hosts, over links with the MTU of Ethernet and of jumbo frames.
    fn hosts(&mut self) -> Result<()> {
        if !Hosts::can("bench between hosts") {
            return Ok(());
        }
        for mtu in [MTU, JUMBO_MTU] {
            let (hosts, pair) = (Hosts::new(mtu)?, TcpPair::new(mtu)?);
            let half = Target::AtLeast(1.5, "at least 1.5");
            for (program, size) in [
                ("ib_write_bw", 65_536),
                ("ib_write_bw", 1_048_576),
                ("ib_read_bw", 65_536),
            ] {
                let text = u64::to_string(&size);
                let iterations = u64::to_string(&((2 << 30) / size).clamp(1000, 20_000));
                let args = ["-s", &text, "-n", &iterations, "-N"];
                let (mut ours, mut tcp) = (Vec::new(), Vec::new());
                for _ in 0..self.runs {
                    for (_, rate, _) in measure::bandwidth(&hosts, program, &args)? {
                        ours.push(rate);
                    }
                    tcp.push(measure::tcp_stream(&pair)?);
                }
                self.row(
                    format!("{program} {size} B between hosts, MTU {mtu}"),
                    (measure::median(ours), "MiB/s"),
                    ("one TCP stream, iperf3", measure::median(tcp)),
                    half,
                );
            }
            let (mut ours, mut tcp) = (Vec::new(), Vec::new());
            for _ in 0..self.runs {
                let args = ["-s", "8", "-n", "10000"];
                for (_, us, _) in measure::latency(&hosts, "ib_write_lat", &args)? {
                    ours.push(us);
                }
                tcp.push(measure::tcp_latency(&pair, 8)?);
            }
            let less = Target::AtMost(0.8, "at most 0.8");
            self.row(
                format!("ib_write_lat 8 B between hosts, MTU {mtu}"),
                (measure::median(ours), "us"),
                ("TCP over veth", measure::median(tcp)),
                less,
            );
        }
        Ok(())
    }

    /// What is left of the rate between hosts when packets are lost, each for itself.
    fn loss(&mut self) -> Result<()> {
        if !Hosts::can("bench of loss between hosts") {
            return Ok(());
        }
        let args = ["-s", "65536", "-n", "5000", "-N"];
        let rate = |hosts: &Hosts| -> Result<f64> {
            let rows = measure::bandwidth(hosts, "ib_write_bw", &args)?;
            rows.first().map(|r| r.1).context("no row")
        };
        let apart = || -> Result<Hosts> {
            let hosts = Hosts::new(MTU)?;
            hosts.send_apart()?;
            Ok(hosts)
        };
        let whole = {
            let hosts = apart()?;
            self.median(|| rate(&hosts))?
        };
        for (of_1000, part, target) in LOSSES {
            let hosts = apart()?;
            hosts.lose(0, of_1000)?;
            hosts.lose(1, of_1000)?;
            let left = self.median(|| rate(&hosts))?;
            self.row(
                format!("ib_write_bw 65536 B, {of_1000} of 1000 packets lost"),
                (left, "MiB/s"),
                ("no loss", whole),
                Target::AtLeast(part, target),
            );
        }
        Ok(())
    }

    /// Connections that share a link with each other, and with TCP.
    fn fairness(&mut self) -> Result<()> {
        if !Hosts::can("bench of fairness between hosts") {
            return Ok(());
        }
        fairness::check_link()?;
        let index = self.median(|| fairness::alone(MANY))?;
        let even = Target::AtLeast(0.95, "at least 0.95");
        self.row(
            format!("Jain's index of {MANY} connections"),
            (index, ""),
            ("all get the same", 1.0),
            even,
        );
        let index = self.median(|| fairness::tcp_alone(MANY))?;
        self.row(
            format!("Jain's index of {MANY} TCP streams"),
            (index, ""),
            ("all get the same", 1.0),
            Target::None,
        );
        for connections in [1, 8] {
            let (mut tcp, mut all) = (Vec::new(), Vec::new());
            for _ in 0..self.runs {
                let (theirs, ours) = fairness::beside_tcp(connections)?;
                tcp.push(theirs / MIB);
                all.push((theirs + ours) / MIB);
            }
            let share = measure::median(all) / (connections + 1) as f64;
            self.row(
                format!("TCP stream beside {connections} connections"),
                (measure::median(tcp), "MiB/s"),
                ("its fair share", share),
                Target::AtLeast(0.5, "at least 0.5"),
            );
        }
        Ok(())
    }

    /// FreeFlow beside the kernel's rxe in one virtual machine, and both when packets are lost.
    fn rxe(&mut self) -> Result<()> {
        packages::install(&freeflow_vm::PACKAGES)?;
        let machine = match Machine::prepare() {
            Ok(machine) => machine,
            Err(why @ VmError::Unavailable(_)) => {
                freeflow_tests::skip("bench beside rxe", &why.to_string());
                return Ok(());
            }
            Err(e) => return Err(e.into()),
        };
        let (script, dist) = (root().join("xtask/guest/rxe.sh"), target().join("dist"));
        let runs = self.runs.to_string();
        let per_cent = |of_1000: u32| f64::from(of_1000) / 10.0;
        let losses = LOSSES.map(|(of_1000, ..)| per_cent(of_1000).to_string());
        let losses = format!("0 {}", losses.join(" "));
        let command = [
            OsStr::new("bash"),
            script.as_os_str(),
            dist.as_os_str(),
            OsStr::new(&runs),
            OsStr::new(&losses),
        ];
        let limit = GUEST_START + GUEST_RUN * u32::try_from(self.runs)?;
        let outcome = Vm::new(&machine).limit(limit).run(&command)?;
        let output = &outcome.hosts.first().context("no guest")?.output;
        // What failed is a row too, and the others are there all the same.
        let mut failed = !outcome.success();
        let mut rate = |name: &str| {
            let figures = measure::named(output, name);
            let all = figures.len() == self.runs;
            failed |= !all;
            if all {
                measure::median(figures)
            } else {
                f64::NAN
            }
        };
        let mut rows = Vec::new();
        let three = Target::AtLeast(3.0, "at least 3");
        for (name, where_) in [("local", "on one host"), ("hosts", "between hosts")] {
            let name = (
                format!("ib_write_bw 65536 B {where_}, in a guest"),
                rate(name),
            );
            rows.push((name, ("rxe in it".to_owned(), rate("rxe")), three));
        }
        for (of_1000, part, target) in LOSSES {
            let percent = per_cent(of_1000);
            for (kind, who, target) in [
                ("hosts", "FreeFlow", Target::AtLeast(part, target)),
                ("rxe", "rxe", Target::None),
            ] {
                let left = rate(&format!("{kind}-loss-{percent}"));
                let whole = rate(&format!("{kind}-loss-0"));
                let name = format!("{who}, ib_write_bw 65536 B, netem loss {percent} %");
                rows.push(((name, left), ("no loss".to_owned(), whole), target));
            }
        }
        let connections = ("rxe in it".to_owned(), rate("rxe-cm"));
        let local = rate("local-cm");
        for ((name, figure), peer, target) in rows {
            self.row(name, (figure, "MiB/s"), peer, target);
        }
        let name = "cmtime on one host, connections, in a guest".to_owned();
        let five = Target::AtLeast(5.0, "at least 5");
        self.row(name, (local, "/s"), connections, five);
        if failed {
            bail!("not all was measured: {outcome}");
        }
        Ok(())
    }

    fn message_rate(&mut self) -> Result<()> {
        let rate = self.median(|| {
            let args = ["-s", "64", "-n", "500000", "-N"];
            let rows = measure::bandwidth(&self.bed, "ib_write_bw", &args)?;
            rows.first().map(|r| r.2).context("no row")
        })?;
        let million = Target::AtLeast(1.0, "at least 1 M/s");
        self.row(
            "ib_write_bw 64 B",
            (rate, "M/s"),
            ("a million", 1.0),
            million,
        );
        let alone = self.median(|| self.own_figure(&["rate", "0"], "ns_per_request"))?;
        let beside = self.median(|| self.own_figure(&["rate", "1000"], "ns_per_request"))?;
        let same = Target::AtMost(1.2, "the same");
        let peer = ("no idle queue pair", alone);
        self.row(
            "request beside 1000 idle queue pairs",
            (beside, "ns"),
            peer,
            same,
        );
        Ok(())
    }

    /// The part of the engine's work on small messages that is to check what clients wrote.
    fn checks(&mut self) -> Result<()> {
        if ["perf", "nm", "addr2line"].iter().any(|tool| !have(tool)) {
            return Ok(());
        }
        let router = freeflow_tests::dist().join("bin/freeflow");
        let (mut checks, mut lookups) = (Vec::new(), Vec::new());
        for _ in 0..self.runs {
            let pid = self.bed.router().pid();
            // Long enough for some thousand samples.
            let load = || (0..10).try_for_each(|_| self.own(&["rate", "0"]).map(|_| ()));
            let shares = checks::sample(pid, &router, load)?;
            checks.push(shares.checks);
            lookups.push(shares.lookups);
        }
        let few = Target::AtMost(0.05, "at most 0.05");
        let engine = ("all that the engine does", 1.0);
        let checks = (measure::median(checks), "");
        self.row("checks, write of 64 B", checks, engine, few);
        let some = Target::AtMost(0.2, "at most 0.2");
        let lookups = (measure::median(lookups), "");
        self.row(
            "finding regions by key, write of 64 B",
            lookups,
            engine,
            some,
        );
        Ok(())
    }

    fn registration(&mut self) -> Result<()> {
        let (mut ours, mut peer, mut untouched) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.runs {
            let said = self.own(&["register"])?;
            let get = |name: &str| said[name].as_f64().with_context(|| format!("no {name}"));
            ours.push(get("touched_s")?);
            peer.push(get("copy_s")?);
            untouched.push(get("untouched_s")?);
        }
        let copy = ("fallocate and copy", measure::median(peer));
        let near = Target::AtMost(1.2, "at most 1.2");
        self.row(
            "register 1 GiB, touched",
            (measure::median(ours), "s"),
            copy,
            near,
        );
        let little = Target::AtMost(10.0, "milliseconds");
        let ms = measure::median(untouched) * 1e3;
        self.row(
            "register 1 GiB, untouched",
            (ms, "ms"),
            ("a millisecond", 1.0),
            little,
        );
        Ok(())
    }

    fn control(&mut self) -> Result<()> {
        let pairs = self.median(|| self.own_figure(&["cache"], "pairs_per_s"))?;
        let many = Target::AtLeast(1.0, "at least 100 000/s");
        let peer = ("100 000/s", 100_000.0);
        self.row("register and deregister 4 KiB", (pairs, "1/s"), peer, many);
        let qps = self.median(|| self.own_figure(&["setup"], "qps_per_s"))?;
        let thousand = Target::AtLeast(1.0, "at least 1000/s");
        let peer = ("1000/s", 1000.0);
        self.row(
            "queue pairs set up and destroyed",
            (qps, "1/s"),
            peer,
            thousand,
        );
        let connections = self.median(|| self.own_figure(&["cm"], "connections_per_s"))?;
        let thousands = Target::AtLeast(1.0, "at least 2000/s");
        let peer = ("2000/s", 2000.0);
        self.row(
            "connections made, accepted and ended",
            (connections, "1/s"),
            peer,
            thousands,
        );
        Ok(())
    }

    /// What a control verb waits for while another endpoint floods the router with them, with and
    /// without a limit on that endpoint's rate.
    fn flood(&mut self) -> Result<()> {
        let flooding = self.bed.lasting_endpoint("flood")?;
        let (mut alone, mut beside, mut limited) = (Vec::new(), Vec::new(), Vec::new());
        // Alternating: what disturbs the machine disturbs all.
        for _ in 0..self.runs {
            alone.push(self.verbs()?);
            for (quota, into) in [("control=none", &mut beside), (FLOOD_RATE, &mut limited)] {
                let args = ["endpoint", "set", &flooding.name, "--quota", quota];
                self.bed.call(&args)?.success()?;
                let mut flood = Vec::new();
                for _ in 0..FLOODING {
                    let mut command = Command::new(&self.own);
                    command.arg("flood");
                    command.env("FREEFLOW_ENDPOINT", &flooding.socket);
                    flood.push(Running::start_piped(&mut command)?);
                }
                for running in &flood {
                    running.wait_for("ready", DEADLINE)?;
                }
                into.push(self.verbs()?);
            }
        }
        let twice = Target::AtMost(2.0, "at most 2");
        for (of, part) in ["P50", "P99"].into_iter().enumerate() {
            let median = |all: &[[f64; 2]]| measure::median(all.iter().map(|us| us[of]).collect());
            for (flood, all) in [
                (format!("{FLOODING} that flood"), &beside),
                (format!("{FLOODING} with {FLOOD_RATE}"), &limited),
            ] {
                self.row(
                    format!("control verb beside {flood}, {part}"),
                    (median(all), "us"),
                    (format!("{part} alone"), median(&alone)),
                    twice,
                );
            }
        }
        Ok(())
    }

    /// P50 and P99 of a control verb, in us.
    fn verbs(&self) -> Result<[f64; 2]> {
        let said = self.own(&["verbs"])?;
        let get = |name: &str| said[name].as_f64().with_context(|| format!("no {name}"));
        Ok([get("p50_us")?, get("p99_us")?])
    }

    /// Streams of rsockets, beside the same queue pairs without them and beside TCP.
    fn rsocket(&mut self) -> Result<()> {
        let pair = TcpPair::new(MTU)?;
        let (mut ours, mut verbs, mut tcp) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.runs {
            let args = ["-S", "64", "-C", "1", "-I", "20000"];
            ours.push(measure::rstream(&self.bed, &args)?.0);
            let args = ["-s", "64", "-n", "20000"];
            for (_, us, _) in measure::latency(&self.bed, "ib_send_lat", &args)? {
                verbs.push(us);
            }
            tcp.push(measure::tcp_latency(&pair, 64)?);
        }
        let ours = (measure::median(ours), "us");
        let near = Target::AtMost(1.5, "at most 1.5");
        let verbs = ("ib_send_lat", measure::median(verbs));
        self.row("rstream 64 B", ours, verbs, near);
        let half = Target::AtMost(0.5, "at most 0.5");
        let tcp = ("TCP over veth", measure::median(tcp));
        self.row("rstream 64 B", ours, tcp, half);

        let (mut ours, mut verbs, mut tcp) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.runs {
            let args = ["-S", "65536", "-C", "1000", "-I", "20"];
            ours.push(measure::rstream(&self.bed, &args)?.1);
            let args = ["-s", "65536", "-n", "20000", "-N"];
            for (_, rate, _) in measure::bandwidth(&self.bed, "ib_write_bw", &args)? {
                verbs.push(rate);
            }
            tcp.push(measure::tcp_rate(&pair, 65_536)?);
        }
        let ours = (measure::median(ours), "MiB/s");
        // Each byte is copied into the stream and out of it, beside the router's copy.
        let most = Target::AtLeast(0.7, "at least 0.7");
        let verbs = ("ib_write_bw", measure::median(verbs));
        self.row("rstream 65536 B", ours, verbs, most);
        let twice = Target::AtLeast(2.0, "at least 2");
        let tcp = ("TCP over veth", measure::median(tcp));
        self.row("rstream 65536 B", ours, tcp, twice);
        Ok(())
    }

    /// Processor time of a router with many idle queue pairs, and with many idle connections and
    /// their listeners.
    fn idle(&mut self) -> Result<()> {
        let each = IDLE_QPS.to_string();
        let all = IDLE_ENDPOINTS * IDLE_QPS;
        let pid = self.bed.router().pid();
        for (args, what) in [
            (["idle", &each], format!("{all} QPs")),
            (["cm-idle", &each], format!("{all} connections")),
        ] {
            let holders = self.holders(&self.bed, &args)?;
            std::thread::sleep(Duration::from_secs(1));
            let before = cpu_seconds(pid)?;
            std::thread::sleep(IDLE_TIME);
            let used = (cpu_seconds(pid)? - before) * 1e3;
            drop(holders);
            let none = Target::AtMost(0.0, "none");
            self.row(
                format!("idle router, {IDLE_ENDPOINTS} endpoints, {what}"),
                (used, "ms"),
                ("10 s", IDLE_TIME.as_secs_f64() * 1e3),
                none,
            );
        }
        Ok(())
    }
}

/// Bytes of memory that are a process's own.
fn own_memory(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
    let kib = line.and_then(|l| l.split_ascii_whitespace().next());
    Ok(kib.context("no RssAnon in status")?.parse::<f64>()? * 1024.0)
}

/// Processor time that a process has used.
fn cpu_seconds(pid: u32) -> Result<f64> {
    const UTIME: usize = 11;
    /// USER_HZ, which is the same on every Linux.
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold spaces.
    let (_, fields) = stat.rsplit_once(") ").context("no name in stat")?;
    let fields: Vec<_> = fields.split(' ').collect();
    let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("short")?.parse()?) };
    Ok((ticks(UTIME)? + ticks(UTIME + 1)?) / TICKS)
}

type Part = (&'static str, fn(&mut Bench) -> Result<()>);

const PARTS: [Part; 14] = [
    ("bandwidth", Bench::bandwidth),
    ("latency", Bench::latency),
    ("message rate", Bench::message_rate),
    ("checks", Bench::checks),
    ("registration", Bench::registration),
    ("control", Bench::control),
    ("flood", Bench::flood),
    ("rsocket", Bench::rsocket),
    ("idle", Bench::idle),
    ("scale", Bench::scale),
    ("hosts", Bench::hosts),
    ("loss", Bench::loss),
    ("fairness", Bench::fairness),
    ("rxe", Bench::rxe),
];

/// Measures, prints a table and writes JSON.
pub(crate) fn bench(args: &BenchArgs) -> Result<()> {
    if args.runs == 0 {
        bail!("--runs is 0; at least 1");
    }
    packages::install(&packages::PROGRAMS)?;
    dist::dist()?;
    run(&mut cargo(&[
        "build",
        "--release",
        "--quiet",
        "--package",
        "freeflow-bench",
    ]))?;
    let mut bench = Bench {
        bed: Bed::new()?,
        runs: args.runs,
        own: target().join("release/ff-bench"),
        rows: Vec::new(),
    };
    let wanted = |name: &str| args.only.as_deref().is_none_or(|only| name.contains(only));
    let mut failed = Vec::new();
    for (name, part) in PARTS.iter().filter(|(name, _)| wanted(name)) {
        eprintln!("measuring {name}");
        if let Err(e) = part(&mut bench) {
            eprintln!("cannot measure {name}: {e:#}");
            failed.push(*name);
        }
    }
    let mut table = vec![["measured", "", "peer", "", "ratio", "target", ""].map(str::to_owned)];
    table.extend(bench.rows.iter().map(|row| {
        [
            row.name.clone(),
            format!("{} {}", shown(row.figure, 3), row.unit),
            row.peer.clone(),
            shown(row.peer_figure, 3),
            shown(row.ratio, 2),
            row.target.to_owned(),
            if row.met { "met" } else { "MISSED" }.to_owned(),
        ]
    }));
    print(&table);
    let file = args
        .json
        .clone()
        .unwrap_or_else(|| target().join("bench.json"));
    write(&file, &bench.rows)?;
    if !failed.is_empty() {
        bail!("cannot measure {}", failed.join(", "));
    }
    Ok(())
}

/// A figure with so many decimal places.
fn shown(figure: f64, places: usize) -> String {
    if figure.is_nan() {
        return "failed".to_owned();
    }
    format!("{figure:.places$}")
}

fn write(file: &Path, rows: &[Row]) -> Result<()> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = Command::new("uname")
        .arg("-r")
        .stdin(Stdio::null())
        .output()?;
    let report = serde_json::json!({
        "cpus": cpus,
        "kernel": String::from_utf8_lossy(&kernel.stdout).trim(),
        "rows": rows,
    });
    std::fs::write(file, serde_json::to_string_pretty(&report)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    eprintln!("written to {}", file.display());
    Ok(())
}
