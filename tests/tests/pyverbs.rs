//! rdma-core's own tests of libibverbs and librdmacm, which run by its Python binding: those of the
//! version that Debian's `python3-pyverbs` is of, from Debian's source package.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use freeflow_tests::{DEADLINE, Ended, Place, Running, dir_for_apt, program, skip};
use tempfile::TempDir;

/// Names a directory with the tests, where the source package cannot be had.
const TESTS_VARIABLE: &str = "FREEFLOW_PYVERBS_TESTS";

/// Debian's, for which its package of the binding is.
const PYTHON: &str = "/usr/bin/python3";

/// How reasons begin for which a test may be skipped.
const SKIPPED: &[&str] = &[
    // Other vendors' devices, and devices that this machine may lack.
    "Can not run the test over non MLX5 device",
    "Can not run the test over non EFA device",
    "Could not open mlx5 context",
    "Converting timestamp to nanoseconds is not supported",
    "PCI device must be passed by the user",
    "cuda-python 12.0+ must be installed",
    "Allocating dmabuf is not supported",
    // Not offered: raw packets, tag matching, importing.
    "Create QP type 8 is not supported",
    "Create Raw Packet QP",
    "Must be run by root on Ethernet link layer",
    "To Create RAW QP must be done by root on Ethernet link layer",
    "Extended CQ is not supported",
    "Importing a device is not supported",
    "Some object imports are not supported",
    // The table of GIDs is as long as there are any.
    "All gid indices populated",
];

/// On the host's network no interface has the endpoint's address.
const NO_INTERFACE: &str = "Device freeflow0 doesn't have net interface";

/// Tests that fail, with what, and why that is right.
const DIFFERENCES: &[(&str, &str, &str)] = &[(
    "tests.test_device.DMTest.test_multi_process_alloc_dm",
    "allocation failed with errno: 22",
    "children of fork open the device anew: their parent's session is not theirs",
)];

/// Fewer tests that pass mean that something went wrong before them.
const LEAST: usize = 120;
/// With those of librdmacm.
const LEAST_WITH_INTERFACE: usize = 130;

/// Hundreds of tests, one after the other.
const SUITE: Duration = Duration::from_secs(600);

/// What came of each test, and the reason.
type Outcomes = BTreeMap<String, (String, String)>;

/// The tests that belong to the installed binding; or why there are none.
fn suite() -> &'static Result<PathBuf, String> {
    static SUITE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    SUITE.get_or_init(find)
}

fn find() -> Result<PathBuf, String> {
    let dpkg = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status} ${source:Version}"])
        .arg("python3-pyverbs")
        .output();
    let said = dpkg.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
    let version = match said.as_deref().map(|said| said.split_once(' ')) {
        Ok(Some(("installed", version))) => version,
        _ => return Err("Debian's python3-pyverbs is not installed".to_owned()),
    };
    if let Some(named) = std::env::var_os(TESTS_VARIABLE) {
        return Ok(named.into());
    }
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("rdma-core-{version}"));
    fetch(&home, version).map_err(|e| {
        format!(
            "the source of rdma-core {version} cannot be had: {e:#}; {TESTS_VARIABLE} can name a \
             directory with its tests"
        )
    })?;
    Ok(home.join("tests"))
}

/// Has the tests of a version of Debian's package below `home`. The machine's lists of packages and
/// sources stay as they are.
fn fetch(home: &Path, version: &str) -> Result<()> {
    if home.is_dir() {
        return Ok(());
    }
    for needed in ["apt-get", "tar"] {
        if program(needed).is_none() {
            bail!("{needed} is not installed");
        }
    }
    let dir = dir_for_apt(&["lists/partial", "cache/archives/partial", "source"])?;
    let at = |name: &str| dir.path().join(name);
    // Where this machine has its packages from, their sources are too.
    let line = "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
                $(REPO_URI) $(RELEASE) $(COMPONENT)";
    let sources = run(Command::new("apt-get")
        .args(["indextargets", "--format", line])
        .args(["Created-By: Packages", "Origin: Debian"]))?;
    if sources.trim().is_empty() {
        bail!("apt has no list of Debian's packages (apt-get update)");
    }
    fs::write(at("sources.list"), sources)?;
    let apt = |args: &[&str]| {
        let options = [
            format!("Dir::Etc::SourceList={}", at("sources.list").display()),
            "Dir::Etc::SourceParts=-".to_owned(),
            format!("Dir::State::Lists={}", at("lists").display()),
            format!("Dir::Cache={}", at("cache").display()),
            "Acquire::Languages=none".to_owned(),
            "Acquire::http::Timeout=20".to_owned(),
            "Acquire::Retries=1".to_owned(),
        ];
        let mut command = Command::new("apt-get");
        command.current_dir(at("source")).arg("-qq");
        for option in &options {
            command.args(["-o", option]);
        }
        run(command.args(args))
    };
    apt(&["update"])?;
    let wanted = format!("rdma-core={version}");
    apt(&["source", "--download-only", "--only-source", &wanted])?;
    let tarball = fs::read_dir(at("source"))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.to_string_lossy().contains(".orig.tar."))
        .context("the source package has no tarball")?;
    // Where it can become the other by its name.
    let unpacked = TempDir::new_in(env!("CARGO_TARGET_TMPDIR"))?;
    let new = unpacked.path().join("rdma-core");
    fs::create_dir(&new)?;
    run(Command::new("tar")
        .arg("-xf")
        .arg(tarball)
        .arg("-C")
        .arg(&new)
        .args([
            "--strip-components=1",
            "--wildcards",
            "--no-wildcards-match-slash",
            "*/tests/*",
        ]))?;
    match fs::rename(&new, home) {
        // Another run of the tests was faster.
        Err(_) if home.is_dir() => Ok(()),
        other => other.context("cannot keep it"),
    }
}

/// Runs a program to a good end; a bad one is told in its own first words.
fn run(command: &mut Command) -> Result<String> {
    let ended = Running::start(command)?.wait(DEADLINE)?;
    if ended.status.success() {
        return Ok(ended.stdout);
    }
    let name = command.get_program().display();
    bail!(
        "{name}: {}",
        ended.stderr.lines().next().unwrap_or("failed")
    )
}

/// The tests where every user can read them.
fn shown(tests: &Path) -> Result<TempDir> {
    let dir = tempfile::Builder::new()
        .prefix("ffpyverbs")
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir_in("/tmp")?;
    let driver = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/pyverbs_suite.py");
    fs::copy(driver, dir.path().join("pyverbs_suite.py"))?;
    let to = dir.path().join("tests");
    fs::create_dir(&to)?;
    let all = fs::read_dir(tests).with_context(|| format!("cannot read {}", tests.display()))?;
    for entry in all {
        let entry = entry?;
        if entry.path().extension().is_some_and(|ext| ext == "py") {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(dir)
}

/// Runs the suite on an endpoint of its own.
fn outcomes(place: &Place, tests: &Path, options: &[&str]) -> Outcomes {
    let dir = shown(tests).unwrap();
    let path = |name| dir.path().join(name).to_str().unwrap().to_owned();
    let (driver, tests) = (path("pyverbs_suite.py"), path("tests"));
    let mut args = vec!["run"];
    args.extend(options);
    args.extend(["--", PYTHON, "-B", &driver, &tests]);
    args.extend(["--dev", "freeflow0", "--gid", "0", "--port", "1"]);
    let running = Running::start(&mut place.freeflow(args)).unwrap();
    let said = running.wait(SUITE).and_then(Ended::success).unwrap();
    let line = said
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("outcomes "));
    let line = line.unwrap_or_else(|| panic!("the suite does not end: {said}"));
    serde_json::from_str(line).unwrap()
}

fn judge(outcomes: &Outcomes, has_interface: bool) {
    let known = DIFFERENCES.iter().map(|(name, ..)| *name);
    let gone = known.filter(|name| !outcomes.contains_key(*name));
    let mut wrong: Vec<_> = gone.map(|name| format!("{name}: not there")).collect();
    let mut passed = 0;
    for (test, (outcome, reason)) in outcomes {
        let known = DIFFERENCES.iter().find(|(name, ..)| name == test);
        let good = match (outcome.as_str(), known) {
            ("ok", None) => {
                passed += 1;
                true
            }
            ("failed", Some((_, with, _))) => reason.contains(with),
            ("skipped", None) => {
                let by = |why: &str| reason.starts_with(why);
                SKIPPED.iter().any(|why| by(why)) || (!has_interface && by(NO_INTERFACE))
            }
            _ => false,
        };
        if !good {
            let why = known.map_or("", |(.., why)| why);
            wrong.push(format!("{test}: {outcome} {why}: {reason}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let least = if has_interface {
        LEAST_WITH_INTERFACE
    } else {
        LEAST
    };
    assert!(passed >= least, "only {passed} tests ran: {outcomes:#?}");
}

#[test]
fn the_suite_on_the_hosts_network_of_an_ordinary_user() {
    let tests = match suite() {
        Ok(tests) => tests,
        Err(why) => return skip("rdma-core's tests", why),
    };
    let place = Place::ordinary().unwrap();
    judge(&outcomes(&place, tests, &[]), false);
}

#[test]
fn the_suite_in_a_private_network_of_an_ordinary_user() {
    const NAME: &str = "rdma-core's tests in a private network";
    let tests = match suite() {
        Ok(tests) => tests,
        Err(why) => return skip(NAME, why),
    };
    let place = Place::ordinary().unwrap();
    if !place.has_private_networks(NAME) {
        return;
    }
    if program("ip").is_none() {
        return skip(
            NAME,
            "the tests ask for addresses with ip, which is not installed",
        );
    }
    judge(&outcomes(&place, tests, &["--network", "private"]), true);
}
