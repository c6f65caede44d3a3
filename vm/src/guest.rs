//! One guest: a QEMU process.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Sender;

use crate::VmError;
use crate::machine::Machine;

/// What a guest does.
pub(crate) enum Event {
    /// It says something on its port: first [`STARTED`], then the command's output.
    Said(usize, Vec<u8>),
    /// Its QEMU has closed the port: it ends.
    Closed(usize),
}

/// The line that comes before the command's output.
pub(crate) const STARTED: &[u8] = b"started\n";

/// Size and neighbours of a guest.
pub(crate) struct Shape {
    pub(crate) index: usize,
    pub(crate) hosts: usize,
    pub(crate) memory_mb: u32,
}

/// A running guest; dropping it ends it.
pub(crate) struct Guest {
    qemu: Child,
}

pub(crate) fn console_log(index: usize) -> String {
    format!("console.{index}.log")
}

pub(crate) fn qemu_log(index: usize) -> String {
    format!("qemu.{index}.log")
}

impl Guest {
    /// Starts a guest in a directory that has its `initrd` and `share`.
    pub(crate) fn start(
        machine: &Machine,
        dir: &Path,
        shape: &Shape,
        events: Sender<Event>,
    ) -> Result<Guest, VmError> {
        let index = shape.index;
        let failed = |e| VmError::io(format!("cannot start guest {index}"), e);
        // QEMU gets one end as its standard input, a descriptor that no other process inherits.
        let (mut ours, theirs) = UnixStream::pair().map_err(failed)?;
        let log = File::create(dir.join(qemu_log(index))).map_err(failed)?;
        // It does not outlive this thread, which waits for it, however that ends.
        let qemu = Command::new(&machine.setpriv)
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&machine.qemu)
            .args(arguments(machine, shape))
            // Sockets' names are short: they are relative to it.
            .current_dir(dir)
            .stdin(OwnedFd::from(theirs))
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(Stdio::from(log))
            .spawn()
            .map_err(failed)?;
        std::thread::spawn(move || {
            let mut buffer = [0; 8192];
            // Whoever listened may have gone.
            loop {
                match ours.read(&mut buffer) {
                    Ok(n) if n > 0 => {
                        if events
                            .send(Event::Said(index, buffer[..n].to_vec()))
                            .is_err()
                        {
                            return;
                        }
                    }
                    _ => {
                        let _ = events.send(Event::Closed(index));
                        return;
                    }
                }
            }
        });
        Ok(Guest { qemu })
    }

    /// Ends it, if it runs.
    pub(crate) fn kill(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
    }
}

fn arguments(machine: &Machine, shape: &Shape) -> Vec<OsString> {
    let kernel = machine.kernel_file();
    let Shape {
        index,
        hosts,
        memory_mb,
    } = shape;
    // panic=-1: a panic restarts at once, which -no-reboot makes an end. The TSC is the only clock
    // that can be read without leaving the emulated processor, and perftest compares it with time.
    // no_timer_check: a machine so busy that a guest misses ticks is no reason to panic.
    let append = format!(
        "console=ttyS0 quiet panic=-1 oops=panic mitigations=off tsc=reliable clocksource=tsc \
         no_timer_check vm.host={index}"
    );
    let text = format!(
        "-accel tcg,thread=multi -cpu max -smp 2 -m {memory_mb} -no-reboot \
         -nodefaults -no-user-config -display none -initrd initrd \
         -chardev file,id=console,path={} -serial chardev:console \
         -chardev socket,id=command,fd=0 -device virtio-serial-pci \
         -device virtserialport,chardev=command,name=command \
         -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap \
         -device virtio-9p-pci,fsdev=host,mount_tag=host \
         -fsdev local,id=share,path=share,security_model=none \
         -device virtio-9p-pci,fsdev=share,mount_tag=share",
        console_log(*index)
    );
    let mut arguments: Vec<OsString> = text.split_ascii_whitespace().map(OsString::from).collect();
    if *hosts > 1 {
        let other = 1 - index;
        let network = format!(
            "-netdev dgram,id=net,local.type=unix,local.path=net.{index},\
             remote.type=unix,remote.path=net.{other} \
             -device virtio-net-pci,netdev=net,mac=52:54:00:99:00:0{index},romfile="
        );
        arguments.extend(network.split_ascii_whitespace().map(OsString::from));
    }
    arguments.extend([
        "-kernel".into(),
        kernel.into(),
        "-append".into(),
        append.into(),
    ]);
    arguments
}
