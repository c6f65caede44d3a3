//! Control verbs: what one waits for, and a flood of them.

use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use freeflow_client::Context;
use serde_json::{Value, json};

/// A program between two verbs does something else.
const BETWEEN: Duration = Duration::from_micros(200);

pub(crate) fn verbs() -> Result<Value> {
    const VERBS: usize = 5000;
    let context = Context::open()?;
    let mut took = Vec::with_capacity(VERBS);
    for _ in 0..VERBS {
        let start = Instant::now();
        let pd = context.alloc_pd()?;
        took.push(start.elapsed());
        pd.dealloc()?;
        std::thread::sleep(BETWEEN);
    }
    took.sort_unstable();
    let us = |part: usize| took[(VERBS - 1) * part / 100].as_secs_f64() * 1e6;
    Ok(json!({ "p50_us": us(50), "p99_us": us(99) }))
}

pub(crate) fn flood() -> Result<Value> {
    static ENDED: AtomicBool = AtomicBool::new(false);
    let context = Context::open()?;
    println!("ready");
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        // Relaxed: nothing else is told by it.
        ENDED.store(true, Ordering::Relaxed);
    });
    let start = Instant::now();
    let mut verbs = 0u64;
    while !ENDED.load(Ordering::Relaxed) {
        context.alloc_pd()?.dealloc()?;
        verbs += 2;
    }
    let rate = verbs as f64 / start.elapsed().as_secs_f64();
    Ok(json!({ "verbs_per_s": rate }))
}
