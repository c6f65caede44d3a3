//! Running the programs that measure, and reading their figures.

use anyhow::{Context, Result, bail};
use freeflow_tests::{Bed, DEADLINE, Ended, Hosts, TcpPair};

/// Where a pair of programs can run.
pub(crate) trait Pair {
    /// Runs a program's server and its client; their output.
    fn pair(&self, program: &str, args: &[&str]) -> Result<(Ended, Ended)>;
}

impl Pair for Bed {
    fn pair(&self, program: &str, args: &[&str]) -> Result<(Ended, Ended)> {
        Bed::pair(self, program, args)
    }
}

impl Pair for Hosts {
    fn pair(&self, program: &str, args: &[&str]) -> Result<(Ended, Ended)> {
        Hosts::pair(self, program, args)
    }
}

/// Port of iperf3's server.
const IPERF_PORT: u16 = 19_766;

/// Port of qperf's server.
const QPERF_PORT: u16 = 19_765;

/// Bytes per second that a perftest bandwidth program measured for each size: (bytes, MB/s of
/// 2^20 bytes, million messages per second).
pub(crate) fn bandwidth(
    at: &impl Pair,
    program: &str,
    args: &[&str],
) -> Result<Vec<(u64, f64, f64)>> {
    let rows = rows(at, program, args)?;
    rows.iter()
        .map(|r| match r[..] {
            [bytes, _, _, average, rate, ..] => Ok((bytes as u64, average, rate)),
            _ => bail!("{program} printed no row of bandwidth: {r:?}"),
        })
        .collect()
}

/// Latencies that a perftest latency program measured: (bytes, typical us, 99 % us).
pub(crate) fn latency(
    at: &impl Pair,
    program: &str,
    args: &[&str],
) -> Result<Vec<(u64, f64, f64)>> {
    let rows = rows(at, program, args)?;
    rows.iter()
        .map(|r| match r[..] {
            [bytes, _, _, _, typical, _, _, p99, ..] => Ok((bytes as u64, typical, p99)),
            _ => bail!("{program} printed no row of latency: {r:?}"),
        })
        .collect()
}

/// The rows of figures behind perftest's heading.
fn rows(at: &impl Pair, program: &str, args: &[&str]) -> Result<Vec<Vec<f64>>> {
    let (_, client) = at.pair(program, args)?;
    let rows = parse_rows(&client.stdout);
    if rows.is_empty() {
        bail!("{program} printed no figures:\n{}", client.stdout);
    }
    Ok(rows)
}

fn parse_rows(text: &str) -> Vec<Vec<f64>> {
    text.lines()
        .skip_while(|line| !line.trim_start().starts_with("#bytes"))
        .filter_map(|line| {
            let numbers: Option<Vec<f64>> = line
                .split_ascii_whitespace()
                .map(|word| word.parse().ok())
                .collect();
            numbers.filter(|n| n.len() >= 5)
        })
        .collect()
}

/// What rstream measured on two endpoints: microseconds for each message, and MiB/s.
pub(crate) fn rstream(bed: &Bed, args: &[&str]) -> Result<(f64, f64)> {
    let server_at = bed.endpoint();
    let server = server_at.serve("rstream", args)?;
    let ip = server_at.ip.to_string();
    let client = bed
        .endpoint()
        .run("rstream", &[&["-s", &ip], args].concat())?;
    server.wait(DEADLINE)?.success()?;
    let row = client.stdout.lines().nth(1).unwrap_or_default();
    let mut words = row.split_ascii_whitespace().rev();
    let mut last = || words.next().and_then(|word| word.parse::<f64>().ok());
    let (Some(us), Some(gigabits)) = (last(), last()) else {
        bail!("rstream printed no figures: {client}");
    };
    Ok((us, gigabits * 1e9 / 8.0 / f64::from(1 << 20)))
}

/// One-way latency of TCP messages of `bytes` between two network namespaces, in us, by qperf.
pub(crate) fn tcp_latency(pair: &TcpPair, bytes: u64) -> Result<f64> {
    Ok(figure(&qperf(pair, "tcp_lat", bytes)?, "latency")? / 1e3)
}

/// Rate of a TCP stream of messages of `bytes` between two network namespaces, in MiB/s, by qperf.
pub(crate) fn tcp_rate(pair: &TcpPair, bytes: u64) -> Result<f64> {
    Ok(figure(&qperf(pair, "tcp_bw", bytes)?, "bw")? / f64::from(1 << 20))
}

fn qperf(pair: &TcpPair, test: &str, bytes: u64) -> Result<String> {
    let bytes = bytes.to_string();
    let port = QPERF_PORT.to_string();
    let client = [TcpPair::SERVER, "-lp", &port, "-t", "2", "-m", &bytes, test];
    let server = ("qperf", ["-lp", port.as_str()]);
    let ended = pair.measure((server.0, &server.1), QPERF_PORT, ("qperf", &client))?;
    Ok(ended.stdout)
}

/// Rate of one TCP stream between two network namespaces, in MiB/s, by iperf3.
pub(crate) fn tcp_stream(pair: &TcpPair) -> Result<f64> {
    let port = IPERF_PORT.to_string();
    let client = ["-c", TcpPair::SERVER, "-p", &port, "-t", "2", "-J"];
    let server = ("iperf3", ["-s", "-1", "-p", port.as_str()]);
    let ended = pair.measure((server.0, &server.1), IPERF_PORT, ("iperf3", &client))?;
    let said: serde_json::Value = serde_json::from_str(&ended.stdout)?;
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
    let bits = bits.with_context(|| format!("no rate in:\n{}", ended.stdout))?;
    Ok(bits / 8.0 / f64::from(1 << 20))
}

/// A figure of qperf's in nanoseconds or bytes a second.
fn figure(text: &str, name: &str) -> Result<f64> {
    let line = text
        .lines()
        .find(|line| line.trim_start().starts_with(name) && line.contains('='))
        .with_context(|| format!("no {name} in:\n{text}"))?;
    let (_, value) = line.split_once('=').context("no value")?;
    let mut words = value.split_ascii_whitespace();
    let number: f64 = words
        .next()
        .unwrap_or_default()
        .replace(',', "")
        .parse()
        .with_context(|| format!("no number in {line}"))?;
    let unit = words.next().unwrap_or_default();
    let factor = match unit {
        "ns" | "bytes/sec" => 1.0,
        "us" | "KB/sec" => 1e3,
        "ms" | "MB/sec" => 1e6,
        "sec" | "GB/sec" => 1e9,
        other => bail!("unit {other} in {line}"),
    };
    Ok(number * factor)
}

/// The figures of all lines that are a name and a figure.
pub(crate) fn named(text: &str, name: &str) -> Vec<f64> {
    let figure = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
    text.lines().filter_map(figure).collect()
}

/// The middle of some figures.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_by_their_names() {
        let text = "rxe 1.5\nrxe-loss-0 7\nrxe failed\nrxe 2\n";
        assert_eq!(named(text, "rxe"), [1.5, 2.0]);
        assert_eq!(named(text, "rxe-loss-0"), [7.0]);
    }

    #[test]
    fn perftests_rows_are_read() {
        let text = " Mtu : 4096[B]\n #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]\n \
                    64   5000   0.00   192.02   3.146\n-----\n";
        assert_eq!(parse_rows(text), [[64.0, 5000.0, 0.0, 192.02, 3.146]]);
        assert!(parse_rows("nothing").is_empty());
    }

    #[test]
    fn qperfs_figures_are_read() {
        assert_eq!(
            figure("tcp_lat:\n    latency  =  38.8 us\n", "latency").unwrap(),
            38_800.0
        );
        assert_eq!(
            figure("tcp_bw:\n    bw  =  1.5 GB/sec\n", "bw").unwrap(),
            1.5e9
        );
        assert_eq!(
            figure("    bw  =  1,500 bytes/sec\n", "bw").unwrap(),
            1500.0
        );
        assert!(figure("nothing", "bw").is_err());
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 5.0]), 5.0);
        assert!(median(vec![]).is_nan());
    }
}
