//! `cargo xtask demo`: the main job on this machine.

use anyhow::Result;
use freeflow_tests::{Bed, Hosts, TcpPair};

use crate::{dist, measure, packages};

/// Message size of the latency rows.
const SMALL: u64 = 8;
/// Message size of the bandwidth rows.
const LARGE: u64 = 65_536;
/// The usual MTU of an Ethernet link.
const MTU: u32 = 1500;

/// Runs Debian's programs between two endpoints and prints one table.
pub(crate) fn demo() -> Result<()> {
    packages::install(&packages::PROGRAMS)?;
    println!("building");
    dist::dist()?;
    let bed = Bed::new()?;
    println!("TCP over a veth pair between two network namespaces, by qperf");
    let pair = TcpPair::new(MTU)?;
    let tcp_us = measure::tcp_latency(&pair, SMALL)?;
    let tcp_rate = measure::tcp_rate(&pair, LARGE)?;
    println!("RDMA between two endpoints of one router, by Debian's unmodified perftest");
    let (small, large) = (SMALL.to_string(), LARGE.to_string());
    let mut table = vec![[
        "program".to_owned(),
        "bytes".to_owned(),
        "FreeFlow".to_owned(),
        "TCP".to_owned(),
        "FreeFlow is".to_owned(),
    ]];
    for program in ["ib_write_lat", "ib_send_lat"] {
        for (bytes, us, _) in measure::latency(&bed, program, &["-s", &small, "-n", "20000"])? {
            table.push(latency_row(program, bytes, us, tcp_us));
        }
    }
    for program in ["ib_write_bw", "ib_send_bw", "ib_read_bw"] {
        for (bytes, rate, _) in measure::bandwidth(&bed, program, &["-s", &large, "-n", "20000"])? {
            table.push(rate_row(program, bytes, rate, tcp_rate));
        }
    }
    if Hosts::can("the rows between hosts") {
        println!("the same between two hosts (network namespaces), by RoCEv2 over UDP");
        let hosts = Hosts::new(MTU)?;
        for (bytes, us, _) in
            measure::latency(&hosts, "ib_write_lat", &["-s", &small, "-n", "10000"])?
        {
            table.push(latency_row("ib_write_lat, two hosts", bytes, us, tcp_us));
        }
        for program in ["ib_write_bw", "ib_read_bw"] {
            for (bytes, rate, _) in
                measure::bandwidth(&hosts, program, &["-s", &large, "-n", "10000"])?
            {
                let name = format!("{program}, two hosts");
                table.push(rate_row(&name, bytes, rate, tcp_rate));
            }
        }
    }
    println!();
    print(&table);
    Ok(())
}

fn latency_row(name: &str, bytes: u64, us: f64, tcp_us: f64) -> [String; 5] {
    [
        name.to_owned(),
        bytes.to_string(),
        format!("{us:.1} us"),
        format!("{tcp_us:.1} us"),
        format!("{:.1} times as fast", tcp_us / us),
    ]
}

fn rate_row(name: &str, bytes: u64, rate: f64, tcp_rate: f64) -> [String; 5] {
    [
        name.to_owned(),
        bytes.to_string(),
        format!("{rate:.0} MiB/s"),
        format!("{tcp_rate:.0} MiB/s"),
        format!("{:.1} times as fast", rate / tcp_rate),
    ]
}

/// Prints rows in columns.
pub(crate) fn print<const N: usize>(table: &[[String; N]]) {
    let width = |c: usize| table.iter().map(|row| row[c].len()).max().unwrap_or(0);
    let widths: Vec<_> = (0..N).map(width).collect();
    for row in table {
        let line: Vec<_> = row
            .iter()
            .zip(&widths)
            .map(|(cell, &w)| format!("{cell:<w$}"))
            .collect();
        println!("{}", line.join("  ").trim_end());
    }
}
