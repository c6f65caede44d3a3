//! Who gets how much of a link that is too slow for all.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use freeflow_tests::rig::{CAP, IOVA, Patience, RawQp, Rig, path_to_rts, write};
use freeflow_tests::{DEADLINE, Hosts, Running, wait_for_listener_with};
use freeflow_types::{Mtu, QpAttr, QpType};
use serde_json::Value;

/// Rate of the link, as `tc` reads it: little, so that processors are no bottleneck.
const LINK: &str = "rate 400mbit burst 128kb latency 20ms";
/// Bytes of each write.
const MESSAGE: u32 = 16 << 10;
/// Writes that each queue pair has outstanding.
const DEPTH: usize = 48;
const CQE: u32 = 4096;
/// What all need to find their rates.
const BEGIN: Duration = Duration::from_secs(3);
/// What is measured.
const TIME: Duration = Duration::from_secs(10);
/// Between looks at an empty completion queue: whoever polls takes time from the routers.
const PAUSE: Duration = Duration::from_micros(200);
const IPERF_PORT: u16 = 19_767;

/// Two hosts with a slow link from the second to the first. Its queue is behind the link, as that of
/// a switch is: of one in the sending host TCP takes but a little part (TCP small queues). It sees
/// single packets.
fn slow() -> Result<Hosts> {
    let hosts = Hosts::new(1500)?;
    let queue = format!(
        "ip link add slow type ifb && ip link set slow up && \
         tc qdisc add dev slow root tbf {LINK} && tc qdisc add dev ff0 handle ffff: ingress && \
         tc filter add dev ff0 parent ffff: protocol ip u32 match u32 0 0 \
         action mirred egress redirect dev slow"
    );
    hosts.shell(0, &queue).context("no link can be made slow")?;
    hosts.send_apart()?;
    Ok(hosts)
}

/// Queue pairs that write from the second host to the first without end.
struct Writers {
    from: Rig,
    to: Rig,
    qps: Vec<RawQp>,
    _peers: Vec<RawQp>,
}

impl Writers {
    fn new(hosts: &Hosts, n: usize) -> Result<Writers> {
        let rig = |host: usize| {
            let lasting = hosts.bed(host).lasting_endpoint("default")?;
            Rig::with(&lasting.socket, MESSAGE.into(), CQE)
        };
        let (mut to, mut from) = (rig(0)?, rig(1)?);
        let (mut qps, mut peers) = (Vec::new(), Vec::new());
        for _ in 0..n {
            let (x, y) = (from.qp(QpType::Rc, CAP)?, to.qp(QpType::Rc, CAP)?);
            connect((&from, &x), (&to, &y))?;
            connect((&to, &y), (&from, &x))?;
            qps.push(x);
            peers.push(y);
        }
        let mut all = Writers {
            from,
            to,
            qps,
            _peers: peers,
        };
        for _ in 0..DEPTH {
            (0..n).try_for_each(|qp| all.post(qp))?;
        }
        Ok(all)
    }

    fn post(&mut self, qp: usize) -> Result<()> {
        let mut entry = write(self.to.key, IOVA);
        entry.wr_id = qp as u64;
        let sge = self.from.sge(0, MESSAGE);
        self.from.send(&mut self.qps[qp], &entry, &[sge])
    }

    /// Goes on for a while; bytes that each has written.
    fn go_on(&mut self, time: Duration) -> Result<Vec<u64>> {
        let mut written = vec![0; self.qps.len()];
        let until = Instant::now() + time;
        while Instant::now() < until {
            let Some(done) = self.from.cq.poll()? else {
                std::thread::sleep(PAUSE);
                continue;
            };
            if done.status != 0 {
                bail!("a write ended with status {}", done.status);
            }
            let qp = done.wr_id as usize;
            written[qp] += u64::from(MESSAGE);
            self.post(qp)?;
        }
        Ok(written)
    }
}

/// Connects a queue pair with its peer, with packets that every link carries.
fn connect(own: (&Rig, &RawQp), peer: (&Rig, &RawQp)) -> Result<()> {
    let (gid, qpn) = (peer.0.gid(), peer.1.qpn());
    for (attr, mask) in path_to_rts(gid, qpn, &Patience::default()) {
        let path_mtu = Mtu::B1024;
        own.0.modify(own.1, QpAttr { path_mtu, ..attr }, mask)?;
    }
    Ok(())
}

/// Jain's index of what so many connections get: 1 if all get the same, 1/n if one gets all.
pub(crate) fn alone(connections: usize) -> Result<f64> {
    let hosts = slow()?;
    let mut writers = Writers::new(&hosts, connections)?;
    writers.go_on(BEGIN)?;
    Ok(jain(&writers.go_on(TIME)?))
}

/// The same of TCP streams.
pub(crate) fn tcp_alone(streams: usize) -> Result<f64> {
    let hosts = slow()?;
    let said = Iperf::new(&hosts, streams)?.end()?;
    let all = said["end"]["streams"].as_array().context("no streams")?;
    let bytes = |stream: &Value| stream["receiver"]["bytes"].as_u64().unwrap_or(0);
    Ok(jain(&all.iter().map(bytes).collect::<Vec<_>>()))
}

/// Bytes a second that a TCP stream gets, and that so many connections beside it get together.
pub(crate) fn beside_tcp(connections: usize) -> Result<(f64, f64)> {
    let hosts = slow()?;
    let mut writers = Writers::new(&hosts, connections)?;
    writers.go_on(BEGIN)?;
    let tcp = Iperf::new(&hosts, 1)?;
    writers.go_on(BEGIN)?;
    let written: u64 = writers.go_on(TIME)?.iter().sum();
    drop(writers);
    let said = tcp.end()?;
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
    let tcp = bits.with_context(|| format!("no rate in {said}"))? / 8.0;
    Ok((tcp, written as f64 / TIME.as_secs_f64()))
}

/// TCP streams from the second host to the first.
struct Iperf {
    client: Running,
    _server: Running,
}

impl Iperf {
    fn new(hosts: &Hosts, streams: usize) -> Result<Iperf> {
        let port = IPERF_PORT.to_string();
        let mut server = hosts.command(0, "iperf3", &["-s", "-1", "-p", &port]);
        let mut server = Running::start(&mut server)?;
        if !wait_for_listener_with(&mut server, IPERF_PORT, DEADLINE) {
            bail!("iperf3 does not listen: {}", server.wait(DEADLINE)?);
        }
        let (time, omit) = (TIME.as_secs().to_string(), BEGIN.as_secs().to_string());
        let streams = streams.to_string();
        // CUBIC as FreeFlow: others share with neither.
        let args = [
            "-c",
            Hosts::ADDRESSES[0],
            "-p",
            &port,
            "-t",
            &time,
            "-O",
            &omit,
            "-P",
            &streams,
            "-C",
            "cubic",
            "-J",
        ];
        Ok(Iperf {
            client: Running::start(&mut hosts.command(1, "iperf3", &args))?,
            _server: server,
        })
    }

    /// What iperf3 says when it is done.
    fn end(self) -> Result<Value> {
        let said = self.client.wait(DEADLINE)?.success()?.stdout;
        serde_json::from_str(&said).context("iperf3 says no JSON")
    }
}

fn jain(shares: &[u64]) -> f64 {
    let sum: f64 = shares.iter().map(|&x| x as f64).sum();
    let squares: f64 = shares.iter().map(|&x| (x as f64).powi(2)).sum();
    sum * sum / (shares.len() as f64 * squares)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_is_one_if_all_get_the_same() {
        assert_eq!(jain(&[5, 5, 5, 5]), 1.0);
        assert_eq!(jain(&[8, 0, 0, 0]), 0.25);
    }
}
