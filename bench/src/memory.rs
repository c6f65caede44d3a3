//! Copying and registering memory.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context as _, Result};
use freeflow_client::{Access, Context};
use rustix::fs::{FallocateFlags, MemfdFlags};
use serde_json::{Value, json};

const MIB: f64 = (1 << 20) as f64;

/// Memory that nobody has touched.
fn untouched(len: usize) -> Vec<u8> {
    vec![0; len]
}

/// Memory with something on every page.
fn touched(len: usize) -> Vec<u8> {
    let mut bytes = untouched(len);
    bytes.iter_mut().step_by(4096).for_each(|b| *b = 1);
    bytes
}

/// As perftest does: the same two buffers again and again.
pub(crate) fn memcpy(size: usize) -> Value {
    let (from, mut to) = (touched(size), touched(size));
    let mut copy = |n: usize| {
        let start = Instant::now();
        for _ in 0..n {
            black_box(&mut to).copy_from_slice(black_box(&from));
        }
        start.elapsed().as_secs_f64()
    };
    copy(100);
    let n = (4usize << 30) / size;
    let seconds = copy(n);
    json!({ "mib_per_s": (n * size) as f64 / MIB / seconds })
}

/// What registration cannot do without: a fresh memfd, all its pages, one copy.
fn copy_into_memfd(bytes: &[u8]) -> Result<f64> {
    let start = Instant::now();
    let fd = rustix::fs::memfd_create("peer", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, bytes.len() as u64)?;
    rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes.len() as u64)?;
    let mut done = 0;
    while done < bytes.len() {
        done += rustix::io::pwrite(&fd, &bytes[done..], done as u64)?;
    }
    Ok(start.elapsed().as_secs_f64())
}

pub(crate) fn register(len: usize) -> Result<Value> {
    let context = Context::open()?;
    let pd = context.alloc_pd()?;
    let time = |buffer: &[u8]| -> Result<f64> {
        let (addr, len) = (buffer.as_ptr() as u64, buffer.len() as u64);
        let start = Instant::now();
        let mr = pd.reg_mr(addr, len, addr, Access::LOCAL_WRITE)?;
        let seconds = start.elapsed().as_secs_f64();
        mr.dereg()?;
        Ok(seconds)
    };
    let full = touched(len);
    // The first copy may have to find the machine's free memory; it does not count.
    copy_into_memfd(&full)?;
    let peer = copy_into_memfd(&full)?;
    let whole = time(&full).context("touched memory")?;
    drop(full);
    let empty = time(&untouched(len)).context("untouched memory")?;
    Ok(json!({ "touched_s": whole, "copy_s": peer, "ratio": whole / peer, "untouched_s": empty }))
}

pub(crate) fn cache() -> Result<Value> {
    const PAIRS: u32 = 50_000;
    let context = Context::open()?;
    let pd = context.alloc_pd()?;
    let buffer = touched(64 << 10);
    let addr = buffer.as_ptr() as u64;
    // The pages are converted once.
    pd.reg_mr(addr, 64 << 10, addr, Access::LOCAL_WRITE)?
        .dereg()?;
    let start = Instant::now();
    for n in 0..PAIRS {
        let at = addr + u64::from(n % 8) * 4096;
        pd.reg_mr(at, 4096, at, Access::LOCAL_WRITE)?.dereg()?;
    }
    let rate = f64::from(PAIRS) / start.elapsed().as_secs_f64();
    Ok(json!({ "pairs_per_s": rate }))
}
