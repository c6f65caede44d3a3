//! How much of the engine's work is to check what clients wrote: samples of its thread while it
//! executes small messages, by the functions that were inlined where each was taken.

use std::collections::HashMap;
use std::fmt::Write;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use freeflow_tests::{DEADLINE, Running};
use rustix::process::Signal;

/// A function: its name, and the end of its file's name.
type Function = (&'static str, &'static str);

/// Functions that do nothing but check.
const CHECKS: [Function; 8] = [
    ("check_send", "transport/src/check.rs"),
    ("allowed_on", "types/src/verbs.rs"),
    ("check_request", "transport/src/qp.rs"),
    ("may_receive", "transport/src/qp.rs"),
    ("responder", "router/src/exec.rs"),
    ("offset_in", "router/src/data.rs"),
    ("checked", "router/src/posted.rs"),
    ("at", "shm/src/mapping.rs"),
];

/// Functions that find the region that a key of the client's means, with its rights and its domain.
/// A router that trusted its clients would look regions up too, but perhaps with less.
const LOOKUPS: [Function; 5] = [
    ("named", "router/src/data.rs"),
    ("keyed_region", "router/src/data.rs"),
    ("local_region", "router/src/data.rs"),
    ("remote_region", "router/src/data.rs"),
    ("posted_region", "router/src/posted.rs"),
];

/// Parts of the engine's work, from 0 to 1.
pub(crate) struct Shares {
    pub(crate) checks: f64,
    pub(crate) lookups: f64,
}

/// Samples per second: not a multiple of anything that happens.
const FREQUENCY: &str = "4999";

/// Samples a router's engine while `load` runs.
pub(crate) fn sample(
    router: u32,
    binary: &Path,
    load: impl FnOnce() -> Result<()>,
) -> Result<Shares> {
    let thread = engine_thread(router)?;
    let data = tempfile::NamedTempFile::new()?;
    let mut perf = Command::new("perf");
    perf.args([
        "record",
        "-e",
        "cpu-clock:u",
        "-F",
        FREQUENCY,
        "-t",
        &thread,
    ]);
    let mut perf = Running::start(perf.arg("-o").arg(data.path()))?;
    load()?;
    perf.signal(Signal::INT);
    perf.reap(DEADLINE)?;
    let mut script = Command::new("perf");
    script.args(["script", "--no-demangle", "-F", "sym,symoff,dso,ip", "-i"]);
    let said = output(script.arg(data.path()))?;
    let symbols = symbols(binary)?;
    let (mut all, mut places) = (0usize, HashMap::<u64, usize>::new());
    for line in said.lines() {
        // ADDRESS SYMBOL+0xOFFSET (FILE)
        let Some(place) = line.split_ascii_whitespace().nth(1) else {
            continue;
        };
        all += 1;
        if let Some((symbol, offset)) = place.rsplit_once("+0x")
            && let Some(start) = symbols.get(symbol)
        {
            let at = start + u64::from_str_radix(offset, 16)?;
            *places.entry(at).or_default() += 1;
        }
    }
    if all < 1000 {
        bail!("only {all} samples of the engine's thread");
    }
    let mut shares = Shares {
        checks: 0.0,
        lookups: 0.0,
    };
    for (at, functions) in inlined(binary, places.keys().copied())? {
        let share = *places.get(&at).unwrap_or(&0) as f64 / all as f64;
        let is = |wanted: &[Function]| {
            let is_one = |(name, file): &(String, String)| {
                wanted.iter().any(|w| name == w.0 && file.ends_with(w.1))
            };
            functions.iter().any(is_one)
        };
        if is(&CHECKS) {
            shares.checks += share;
        } else if is(&LOOKUPS) {
            shares.lookups += share;
        }
    }
    if shares.checks == 0.0 || shares.lookups == 0.0 {
        bail!(
            "no sample is in one of {CHECKS:?}, or none in one of {LOOKUPS:?}: are they renamed?"
        );
    }
    Ok(shares)
}

fn engine_thread(router: u32) -> Result<String> {
    for task in std::fs::read_dir(format!("/proc/{router}/task"))? {
        let task = task?;
        if std::fs::read_to_string(task.path().join("comm"))?.trim() == "ff-engine" {
            return Ok(task.file_name().to_string_lossy().into_owned());
        }
    }
    bail!("router {router} has no thread ff-engine")
}

fn output(command: &mut Command) -> Result<String> {
    let out = command.stdin(Stdio::null()).output();
    let out = out.with_context(|| format!("cannot run {command:?}"))?;
    if !out.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Addresses of a file's functions.
fn symbols(binary: &Path) -> Result<HashMap<String, u64>> {
    let said = output(Command::new("nm").arg(binary))?;
    let all = said.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (at, name) = (words.next()?, words.nth(1)?);
        Some((name.to_owned(), u64::from_str_radix(at, 16).ok()?))
    });
    Ok(all.collect())
}

/// By address, names and files of functions.
type Frames = HashMap<u64, Vec<(String, String)>>;

/// The functions that each address is in: inlined ones, and the one that they are in.
fn inlined(binary: &Path, places: impl Iterator<Item = u64>) -> Result<Frames> {
    let mut asked = String::new();
    for at in places {
        writeln!(asked, "{at:#x}")?;
    }
    let mut child = Command::new("addr2line")
        .args(["-f", "-i", "-a", "-C", "-e"])
        .arg(binary)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run addr2line")?;
    let mut stdin = child.stdin.take().context("no pipe")?;
    let writer = std::thread::spawn(move || stdin.write_all(asked.as_bytes()));
    let out = child.wait_with_output()?;
    let _ = writer.join();
    if !out.status.success() {
        bail!("addr2line: {}", out.status);
    }
    let mut all = Frames::new();
    let mut at = 0;
    // An address, then pairs of lines: a function's name, and its file and line.
    let said = String::from_utf8_lossy(&out.stdout);
    let mut lines = said.lines();
    while let Some(line) = lines.next() {
        if let Some(address) = line.strip_prefix("0x") {
            at = u64::from_str_radix(address, 16)?;
            continue;
        }
        let place = lines.next().unwrap_or_default();
        let file = place.split_once(':').map_or(place, |(file, _)| file);
        // What is inlined has its name alone, what is not its path.
        let name = line.rsplit("::").next().unwrap_or(line);
        let frame = (name.to_owned(), file.to_owned());
        all.entry(at).or_default().push(frame);
    }
    Ok(all)
}
