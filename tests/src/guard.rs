//! Ends what this process has started if it is killed itself, as by Ctrl-C.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

/// Is told of process groups, and kills those that are left when nobody can tell it more.
const SCRIPT: &str = r#"
groups=" "
while read -r what group; do
    case $what in
        begins) groups="$groups$group " ;;
        ended) groups="${groups%% $group *} ${groups#* $group }" ;;
    esac
done
for group in $groups; do kill -s KILL -- "-$group"; done
"#;

/// The shell that executes it, once there is something to guard.
static SHELL: Mutex<Option<Child>> = Mutex::new(None);

/// A process group that ends with this process.
pub(crate) struct Guarded(u32);

impl Guarded {
    /// Starts a program in a process group of its own, which is guarded from then on.
    pub(crate) fn spawn(command: &mut Command) -> Result<(Child, Guarded)> {
        let mut shell = shell();
        if shell.is_none() {
            *shell = Some(start().context("cannot start the guard")?);
        }
        let child = command.process_group(0).spawn()?;
        let group = Guarded(child.id());
        tell(&mut shell, "begins", child.id());
        Ok((child, group))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        tell(&mut shell(), "ended", self.0);
    }
}

fn shell() -> MutexGuard<'static, Option<Child>> {
    SHELL.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start() -> std::io::Result<Child> {
    // Ctrl-C is for all of this process's group: the guard is in another.
    Command::new("sh")
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

fn tell(shell: &mut Option<Child>, what: &str, group: u32) {
    let stdin = shell.as_mut().and_then(|shell| shell.stdin.as_mut());
    if let Some(stdin) = stdin {
        // Without a guard, programs are killed by their tests alone.
        let _ = stdin.write_all(format!("{what} {group}\n").as_bytes());
    }
}
