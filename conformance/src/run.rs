//! Running tests, each in a process of its own, and telling how they ended.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::differences::difference;
use crate::suite::{Env, Place, Reach, Stop, Test, complaints};
use crate::{Options, tests};

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum End {
    Ok,
    Fail(String),
    Skip(String),
}

/// One line of the answer.
#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    rule: &'a str,
    result: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    why: &'a str,
    seconds: f64,
}

fn belongs(test: &Test, env: &Env) -> bool {
    match test.reach {
        Reach::Anywhere => true,
        Reach::OneProcess => env.place == Place::Here,
        Reach::TwoProcesses => env.place != Place::Here,
    }
}

/// The far end of the socket that is standard input.
pub(crate) fn far(env: &Env) -> ExitCode {
    let stream = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(UnixStream::from);
    match stream {
        Ok(stream) => {
            crate::suite::serve(env, stream);
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("ff-conform: standard input is no socket: {why}");
            ExitCode::from(2)
        }
    }
}

/// Runs a test in this process; its end is the last line.
pub(crate) fn one(env: &Env, name: &str) -> ExitCode {
    let Some(test) = tests::all().find(|t| t.name == name) else {
        eprintln!("ff-conform: no test {name}");
        return ExitCode::from(2);
    };
    let mut end = match (test.run)(env) {
        Ok(()) => End::Ok,
        Err(Stop::Fail(why)) => End::Fail(why),
        Err(Stop::Skip(why)) => End::Skip(why),
    };
    let left = complaints();
    if end == End::Ok && !left.is_empty() {
        end = End::Fail(left.join("; "));
    }
    match serde_json::to_string(&end) {
        Ok(line) => println!("{line}"),
        Err(why) => eprintln!("ff-conform: {why}"),
    }
    ExitCode::SUCCESS
}

/// Runs a test in a child process, for so long at most.
fn isolated(env: &Env, test: &Test, limit: Duration) -> std::io::Result<End> {
    let mut command = Command::new("/proc/self/exe");
    command.args([
        "--one",
        test.name,
        "--gid-index",
        &env.gid_index.to_string(),
    ]);
    command.args(["--shorter", &env.shorter.to_string()]);
    if let Some(device) = &env.device {
        command.args(["--device", device]);
    }
    if let Some(device) = &env.device2 {
        command.args(["--device2", device]);
    }
    match &env.place {
        Place::Here => {}
        Place::Process => {
            command.arg("--two");
        }
        Place::Server(path) => {
            command.arg("--peer").arg(path);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    // SAFETY: prctl is async-signal-safe; the child dies with the suite.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    let mut said = Vec::new();
    let mut late = false;
    if let Some(mut out) = child.stdout.take() {
        let end = Instant::now() + limit;
        let mut bytes = [0; 4096];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !crate::verbs::readable(out.as_raw_fd(), left) {
                late = true;
                break;
            }
            match out.read(&mut bytes)? {
                0 => break,
                n => said.extend_from_slice(&bytes[..n]),
            }
        }
    }
    if late {
        child.kill()?;
    }
    let status = child.wait()?;
    if late {
        return Ok(End::Fail(format!("no end within {limit:?}")));
    }
    let text = String::from_utf8_lossy(&said);
    let last = text
        .lines()
        .last()
        .and_then(|line| serde_json::from_str(line).ok());
    Ok(last.unwrap_or_else(|| match status.signal() {
        Some(signal) => End::Fail(format!("died of signal {signal}")),
        None => End::Fail(format!("ended without an answer, {status}")),
    }))
}

/// The name of the device that tests open.
fn device(env: &Env) -> Option<String> {
    let opened = crate::verbs::Context::open(env.device.as_deref(), env.gid_index);
    opened.ok().map(|ctx| ctx.name.clone())
}

/// Runs all tests that were asked for.
pub(crate) fn all(env: &Env, options: &Options) -> ExitCode {
    let wanted = |t: &&Test| {
        (options.filter.is_empty() || options.filter.iter().any(|f| t.name.contains(f)))
            && belongs(t, env)
    };
    if options.list {
        for test in tests::all().filter(wanted) {
            println!("{:<48} {}", test.name, test.rule);
        }
        return ExitCode::SUCCESS;
    }
    let Some(device) = device(env) else {
        let name = env.device.as_deref().unwrap_or("at all");
        eprintln!(
            "ff-conform: no RDMA device {name} with a GID at index {}",
            env.gid_index
        );
        return ExitCode::from(2);
    };
    let (mut passed, mut failed, mut skipped, mut differing) = (0, 0, 0, 0);
    for test in tests::all().filter(wanted) {
        let started = Instant::now();
        let end = isolated(env, test, Duration::from_secs(options.limit))
            .unwrap_or_else(|why| End::Fail(format!("running it: {why}")));
        let known = difference(&device, test.name);
        let (result, why) = match (end, known) {
            (End::Ok, _) => {
                passed += 1;
                ("ok", String::new())
            }
            (End::Fail(why), Some(known)) => {
                differing += 1;
                skipped += 1;
                (
                    "differs",
                    format!("{}; {} is right ({why})", known.what, known.right),
                )
            }
            (End::Fail(why), None) => {
                failed += 1;
                ("FAIL", why)
            }
            (End::Skip(why), _) => {
                skipped += 1;
                ("skip", why)
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        if options.json {
            let line = Line {
                name: test.name,
                rule: test.rule,
                result,
                why: &why,
                seconds,
            };
            match serde_json::to_string(&line) {
                Ok(line) => println!("{line}"),
                Err(why) => eprintln!("ff-conform: {why}"),
            }
        } else if why.is_empty() {
            println!("{result:<8}{} ({seconds:.1} s)", test.name);
        } else {
            println!(
                "{result:<8}{}: {why} [{}] ({seconds:.1} s)",
                test.name, test.rule
            );
        }
    }
    if differing != 0 && !options.json {
        println!("{differing} of those skipped are known differences of {device}");
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
