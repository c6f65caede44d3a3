//! Programs for `cargo xtask bench`, each run under `freeflow run`: what perftest does not
//! measure. Each prints one line of JSON.

mod cm;
mod control;
mod memory;
mod queue;

use anyhow::Result;
use clap::Parser;

#[derive(Parser)]
#[command(about = "Measures, and prints JSON")]
enum Measure {
    /// One thread's memcpy of messages of this size, in MiB/s
    Memcpy {
        /// Bytes
        size: usize,
    },
    /// Registration of a large region, beside fallocate and copy into a fresh memfd, in seconds
    Register {
        /// MiB
        #[arg(default_value_t = 1024)]
        mib: usize,
    },
    /// Pairs of register and deregister of 4 KiB, per second
    Cache,
    /// Queue pairs created, connected and destroyed, per second
    Setup,
    /// Latency of control verbs that make and destroy protection domains, in us
    Verbs,
    /// Makes and destroys protection domains as fast as it can, until standard input ends
    Flood,
    /// Connections made, accepted and ended by the connection manager, per second
    Cm,
    /// Keeps connections of the connection manager, idle, until standard input ends
    CmIdle {
        /// Connections of this process with itself
        connections: u32,
    },
    /// The other side of `cm`
    #[command(hide = true)]
    CmServer,
    /// RDMA writes of 64 bytes between two queue pairs of this process beside idle ones: ns each
    Rate {
        /// Idle queue pairs
        #[arg(default_value_t = 0)]
        idle: usize,
    },
    /// Keeps queue pairs and regions, idle, until standard input ends
    Idle {
        /// Queue pairs
        #[arg(default_value_t = 16)]
        qps: usize,
        /// Regions of 4 KiB
        #[arg(default_value_t = 0)]
        mrs: usize,
    },
}

fn main() -> Result<()> {
    let figures = match Measure::parse() {
        Measure::Memcpy { size } => memory::memcpy(size),
        Measure::Register { mib } => memory::register(mib << 20)?,
        Measure::Cache => memory::cache()?,
        Measure::Setup => queue::setup()?,
        Measure::Verbs => control::verbs()?,
        Measure::Flood => control::flood()?,
        Measure::Cm => cm::connections()?,
        Measure::CmIdle { connections } => cm::idle(connections)?,
        Measure::CmServer => cm::serve()?,
        Measure::Rate { idle } => queue::rate(idle)?,
        Measure::Idle { qps, mrs } => queue::idle(qps, mrs)?,
    };
    println!("{figures}");
    Ok(())
}
