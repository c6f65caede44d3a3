//! A program over the library's core that registers and deregisters the same pages again and
//! again, as registration caches do. Its argument says what happens meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use freeflow_client::{
    Access, Completion, Context, Cq, Errno, Mr, Opcode, Pd, Qp, QpAttr, QpAttrMask, QpInit,
    QpState, SendFlags, SendWr, Sge,
};
use freeflow_tests::rig::path_to_rts;
use freeflow_types::{QpCap, QpType, WcStatus};

/// Words of a buffer: as many as make a write by the router take a while.
const WORDS: usize = 8192;
const BYTES: u64 = 8 * WORDS as u64;
/// Registrations after which the router is certainly not asked any more.
const WARM: usize = 64;
const THEIRS: u64 = 0xEEEE_EEEE_EEEE_EEEE;

/// Memory that the router writes to while this process reads it.
fn buffer() -> Vec<AtomicU64> {
    (0..WORDS).map(|_| AtomicU64::new(0)).collect()
}

fn address(buffer: &[AtomicU64]) -> u64 {
    buffer.as_ptr() as u64
}

fn register(pd: &Pd, buffer: &[AtomicU64]) -> Result<Mr, Errno> {
    let addr = address(buffer);
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
    pd.reg_mr(addr, BYTES, addr, access)
}

/// Whether the router was not asked for a region: only then its number is its key.
fn is_in_table(mr: &Mr) -> bool {
    mr.number() == mr.key().0
}

fn warm(pd: &Pd, buffer: &[AtomicU64]) -> Result<()> {
    for _ in 0..WARM {
        register(pd, buffer)?.dereg()?;
    }
    let mr = register(pd, buffer)?;
    ensure!(is_in_table(&mr), "the router is still asked");
    Ok(mr.dereg()?)
}

struct Device {
    context: Arc<Context>,
    pd: Arc<Pd>,
}

impl Device {
    fn open() -> Result<Device> {
        let context = Context::open()?;
        let pd = context.alloc_pd()?;
        Ok(Device { context, pd })
    }

    fn close(&self) -> Result<()> {
        self.pd.dealloc()?;
        Ok(self.context.close()?)
    }
}

/// Two queue pairs that write by keys to this process's own memory.
struct Writer<'a> {
    device: &'a Device,
    cq: Arc<Cq>,
    near: Arc<Qp>,
    far: Arc<Qp>,
    source: Vec<AtomicU64>,
    region: Mr,
}

impl<'a> Writer<'a> {
    fn new(device: &'a Device, qp_type: QpType) -> Result<Self> {
        let cq = device.context.create_cq(16, None, 0, 0)?;
        let cap = QpCap {
            max_send_wr: 4,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline: 0,
        };
        let init = QpInit {
            qp_type,
            send_cq: &cq,
            recv_cq: Some(&cq),
            srq: None,
            cap,
            sq_sig_all: true,
        };
        let (near, far) = (
            device.pd.create_qp(&init, 0)?,
            device.pd.create_qp(&init, 0)?,
        );
        let source = buffer();
        source
            .iter()
            .for_each(|word| word.store(THEIRS, Ordering::Relaxed));
        let region = register(&device.pd, &source)?;
        let writer = Writer {
            device,
            cq,
            near,
            far,
            source,
            region,
        };
        writer.connect(qp_type)?;
        Ok(writer)
    }

    fn connect(&self, qp_type: QpType) -> Result<()> {
        let gids = &self.device.context.info().gids;
        let gid = gids.first().copied().unwrap_or_default();
        type M = QpAttrMask;
        let of_reliable = M::MAX_DEST_RD_ATOMIC
            | M::MIN_RNR_TIMER
            | M::TIMEOUT
            | M::RETRY_CNT
            | M::RNR_RETRY
            | M::MAX_QP_RD_ATOMIC;
        for (qp, peer) in [(&self.near, &self.far), (&self.far, &self.near)] {
            let reset = QpAttr {
                state: QpState::Reset,
                ..QpAttr::default()
            };
            qp.modify(&reset, M::STATE)?;
            for (attr, mask) in path_to_rts(gid, peer.qpn(), &Default::default()) {
                let mask = if qp_type == QpType::Rc {
                    mask
                } else {
                    mask - of_reliable
                };
                qp.modify(&attr, mask)?;
            }
        }
        Ok(())
    }

    /// Writes a whole buffer; how that ended.
    fn write(&self, to: u64, rkey: u32) -> Result<WcStatus> {
        let wr = SendWr {
            opcode: Opcode::RdmaWrite,
            flags: SendFlags::SIGNALED,
            remote_addr: to,
            rkey,
            ..SendWr::default()
        };
        let sge = Sge {
            addr: address(&self.source),
            length: BYTES as u32,
            lkey: self.region.key().0,
        };
        let mut queue = self.near.lock_send();
        // SAFETY: no inline data.
        unsafe { queue.push(&wr, &[sge])? };
        queue.commit();
        let mut done = [Completion::default()];
        while self.cq.poll(&mut done)? == 0 {}
        WcStatus::from_raw(done[0].status).context("no such status")
    }

    fn end(self) -> Result<()> {
        self.near.destroy()?;
        self.far.destroy()?;
        self.cq.destroy()?;
        Ok(self.region.dereg()?)
    }
}

/// A buffer that is registered again and again, and the key that it has or had last.
struct Target {
    buffer: Vec<AtomicU64>,
    key: AtomicU32,
}

/// Registers, lets others write, deregisters, and checks that nobody writes then. At least
/// `least` rounds, until enough has happened.
fn reuse(pd: &Pd, target: &Target, least: u64, enough: &AtomicBool) -> Result<()> {
    let mut round = 0;
    while round < least || !enough.load(Ordering::Relaxed) {
        round += 1;
        let mr = register(pd, &target.buffer)?;
        ensure!(is_in_table(&mr), "the router is asked for region {round}");
        target.key.store(mr.key().0, Ordering::Release);
        // Most of the time until somebody writes, sometimes not.
        for _ in 0..200 {
            let first = target
                .buffer
                .first()
                .map(|word| word.load(Ordering::Relaxed));
            if first == Some(THEIRS) || round % 8 == 0 {
                break;
            }
            std::thread::yield_now();
        }
        mr.dereg()?;
        for word in &target.buffer {
            word.store(round, Ordering::Relaxed);
        }
        for look in 0..3 {
            let changed = target
                .buffer
                .iter()
                .position(|w| w.load(Ordering::Relaxed) != round);
            if let Some(word) = changed {
                bail!("word {word} was written after deregistration, by look {look} of {round}");
            }
            std::thread::yield_now();
        }
    }
    Ok(())
}

/// A writer of one service, until everybody is ready. How many writes arrived, and how many were
/// refused, as far as that is told.
fn write_all(
    device: &Device,
    qp_type: QpType,
    targets: &[Target],
    ready: &AtomicBool,
    enough: &AtomicBool,
) -> Result<(u64, u64)> {
    let writer = Writer::new(device, qp_type)?;
    let (mut arrived, mut refused) = (0, 0);
    for target in targets.iter().cycle() {
        if ready.load(Ordering::Relaxed) {
            break;
        }
        let key = target.key.load(Ordering::Acquire);
        if key == 0 {
            std::thread::yield_now();
            continue;
        }
        match writer.write(address(&target.buffer), key)? {
            WcStatus::Success => arrived += 1,
            WcStatus::RemAccessErr if qp_type == QpType::Rc => {
                refused += 1;
                writer.connect(qp_type)?;
            }
            other => bail!("a write ended with {other:?}"),
        }
        if qp_type == QpType::Rc && arrived >= 50 && refused >= 50 {
            enough.store(true, Ordering::Relaxed);
        }
    }
    writer.end()?;
    Ok((arrived, refused))
}

/// Peers write by keys, also by those of regions that are gone.
fn storm() -> Result<()> {
    let device = Device::open()?;
    let targets: Vec<_> = (0..2)
        .map(|_| Target {
            buffer: buffer(),
            key: AtomicU32::new(0),
        })
        .collect();
    for target in &targets {
        warm(&device.pd, &target.buffer)?;
    }
    let (enough, ready) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| -> Result<()> {
        let write = |qp_type| {
            let (device, targets, ready, enough) = (&device, &targets, &ready, &enough);
            scope.spawn(move || {
                let written = write_all(device, qp_type, targets, ready, enough);
                // Nobody waits for a writer that has failed.
                enough.store(true, Ordering::Relaxed);
                written
            })
        };
        let writers = [write(QpType::Rc), write(QpType::Uc)];
        let users: Vec<_> = targets
            .iter()
            .map(|target| scope.spawn(|| reuse(&device.pd, target, 300, &enough)))
            .collect();
        let used: Result<Vec<()>> = users.into_iter().map(joined).collect();
        ready.store(true, Ordering::Relaxed);
        let [reliable, unreliable] = writers.map(joined);
        used?;
        let ((arrived, refused), (dropped_or_not, _)) = (reliable?, unreliable?);
        println!("{arrived} arrived, {refused} refused, {dropped_or_not} unreliable");
        ensure!(
            arrived != 0 && refused != 0 && dropped_or_not != 0,
            "too little happened"
        );
        Ok(())
    })?;
    device.close()
}

fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| bail!("a thread panicked"))
}

/// The router dies.
fn death() -> Result<()> {
    let device = Device::open()?;
    let buffers = [buffer(), buffer()];
    for buffer in &buffers {
        warm(&device.pd, buffer)?;
    }
    let held = register(&device.pd, &buffers[0])?;
    println!("ready");
    let again = |buffer: &[AtomicU64]| loop {
        match register(&device.pd, buffer) {
            Ok(mr) => mr.dereg()?,
            Err(Errno::IO) => break Ok(()),
            Err(errno) => bail!("a registration fails with {errno}"),
        }
    };
    let again = &again;
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = buffers
            .iter()
            .map(|b| scope.spawn(move || again(b)))
            .collect();
        threads.into_iter().try_for_each(joined)
    })?;
    println!("registering: EIO");
    held.dereg()?;
    device.close()?;
    println!("destroyed everything");
    Ok(())
}

/// A child is made, and must not touch what is its parent's.
fn fork() -> Result<()> {
    let device = Device::open()?;
    let buffer = buffer();
    warm(&device.pd, &buffer)?;
    let mr = register(&device.pd, &buffer)?;
    // SAFETY: this process has one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let own = register(&device.pd, &buffer).err();
        let good = own == Some(Errno::INVAL)
            && mr.dereg() == Err(Errno::INVAL)
            && device.pd.dealloc() == Err(Errno::INVAL);
        // SAFETY: it ends the child at once, without what its parent has to do at its end.
        unsafe { libc::_exit(if good { 0 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: it writes the status of our own child.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    ensure!(
        waited == child && status == 0,
        "the child ended with {status:#x}"
    );
    let writer = Writer::new(&device, QpType::Rc)?;
    let status = writer.write(address(&buffer), mr.key().0)?;
    ensure!(status == WcStatus::Success, "after fork: {status:?}");
    ensure!(
        buffer
            .iter()
            .all(|word| word.load(Ordering::Relaxed) == THEIRS),
        "not written"
    );
    ensure!(
        device.pd.dealloc() == Err(Errno::BUSY),
        "the domain is not busy"
    );
    writer.end()?;
    mr.dereg()?;
    device.close()
}

/// The session may have this many regions, and not one more.
fn limited(regions: usize) -> Result<()> {
    let device = Device::open()?;
    let buffer = buffer();
    warm(&device.pd, &buffer)?;
    for round in 0..3 {
        let all: Result<Vec<_>, _> = (0..regions)
            .map(|_| register(&device.pd, &buffer))
            .collect();
        let all = all.with_context(|| format!("round {round}"))?;
        ensure!(all.iter().any(is_in_table), "all of them were asked for");
        ensure!(
            register(&device.pd, &buffer).err() == Some(Errno::NOMEM),
            "one too many"
        );
        all.iter().try_for_each(Mr::dereg)?;
        // Others find as many.
        let null: Result<Vec<_>, _> = (0..regions).map(|_| device.pd.alloc_null_mr()).collect();
        let null = null.with_context(|| format!("null regions of round {round}"))?;
        ensure!(
            device.pd.alloc_null_mr().err() == Some(Errno::NOMEM),
            "one too many"
        );
        null.iter().try_for_each(Mr::dereg)?;
        for _ in 0..16 * WARM {
            register(&device.pd, &buffer)?.dereg()?;
        }
    }
    device.close()
}

/// Regions are told of, and go with their context.
fn held(regions: usize) -> Result<()> {
    let device = Device::open()?;
    let buffer = buffer();
    warm(&device.pd, &buffer)?;
    let all: Result<Vec<_>, _> = (0..regions)
        .map(|_| register(&device.pd, &buffer))
        .collect();
    let all = all?;
    ensure!(all.iter().all(is_in_table), "some were asked for");
    println!("holding");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    // A program that forgets them.
    let other = Context::open()?;
    device.context.close()?;
    let last = all.last().context("no region")?;
    last.dereg()?;
    println!("closed");
    std::io::stdin().read_line(&mut line)?;
    Ok(other.close()?)
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let what = args.next();
    let number = args.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    match what.as_deref() {
        Some("storm") => storm()?,
        Some("death") => death()?,
        Some("fork") => fork()?,
        Some("limited") => limited(number)?,
        Some("held") => held(number)?,
        other => bail!("{other:?} is none of storm, death, fork, limited N, held N"),
    }
    println!("well");
    Ok(())
}
