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
/// Address of the router between the hosts.
const ROUTER: &str = "192.0.2.254";
/// Has one processor take what a namespace's interfaces receive: those of a pair are queued where
/// their sender runs, and overtake each other, which TCP takes for losses.
const IN_ORDER: &str = "unshare -m sh -c 'mount -t sysfs none /sys && \
     for q in /sys/class/net/*/queues/rx-*; do echo 1 >$q/rps_cpus || exit; done'";
/// The longest round trip of a lone TCP stream, at least: the queue takes 20 ms to drain.
const FULL: Duration = Duration::from_millis(15);

/// Two hosts, and between them a router with a slow link to the first.
///
/// Its queue is that of a machine of its own, as a switch's is: what waits in a queue that the
/// packet got to without being received by another host still counts as the sender's own, and TCP,
/// of which no more than a few packets may be there (TCP small queues), never fills it. Packets are
/// single ones.
struct Slow {
    hosts: Hosts,
    router: Running,
}

impl Slow {
    fn new() -> Result<Slow> {
        let hosts = Hosts::new(1500)?;
        let ready = ["-n", "sh", "-c", "echo ready; exec sleep infinity"];
        let router = Running::start(&mut hosts.command(0, "unshare", &ready))?;
        router.wait_for("ready", DEADLINE)?;
        let (pid, [first, second]) = (router.pid(), Hosts::ADDRESSES);
        // Both stay in one network, as far as they know: the router answers for each of them.
        let forward = format!(
            "ip link set ff0 name second && \
             for i in first second; do ip addr add {ROUTER}/32 dev $i && \
             ip link set $i up gso_max_segs 1 && echo 1 >/proc/sys/net/ipv4/conf/$i/proxy_arp && \
             echo 0 >/proc/sys/net/ipv4/neigh/$i/proxy_delay || \
             exit; done && echo 1 >/proc/sys/net/ipv4/ip_forward && \
             ip route add {first} dev first && ip route add {second} dev second && \
             tc qdisc add dev first root tbf {LINK}"
        );
        let between = format!(
            "ip link set ff0 netns {pid} && \
             ip link add ff0 mtu 1500 type veth peer name first mtu 1500 netns {pid} && \
             ip addr add {first}/24 dev ff0 && ip link set ff0 up && \
             nsenter -t {pid} -n sh -c '{forward}'"
        );
        (hosts.shell(0, &between)).context("no router between the hosts can be made")?;
        hosts.shell(0, &format!("nsenter -t {pid} -n {IN_ORDER}"))?;
        (0..2).try_for_each(|host| hosts.shell(host, IN_ORDER).map(drop))?;
        // It has another hardware address than the first host had.
        hosts.shell(1, "ip neigh flush dev ff1")?;
        hosts.send_apart()?;
        hosts.wait_for_links()?;
        Ok(Slow { hosts, router })
    }

    /// Packets that its queue has dropped.
    fn drops(&self) -> Result<u64> {
        let show = format!(
            "nsenter -t {} -n tc -s -j qdisc show dev first",
            self.router.pid()
        );
        let said = self.hosts.shell(0, &show)?.stdout;
        let all: Value = serde_json::from_str(&said)?;
        all[0]["drops"].as_u64().context("tc tells of no drops")
    }
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
    let slow = Slow::new()?;
    let mut writers = Writers::new(&slow.hosts, connections)?;
    writers.go_on(BEGIN)?;
    Ok(jain(&writers.go_on(TIME)?))
}

/// The same of TCP streams.
pub(crate) fn tcp_alone(streams: usize) -> Result<f64> {
    let slow = Slow::new()?;
    let said = Iperf::new(&slow.hosts, streams)?.end()?;
    let all = said["end"]["streams"].as_array().context("no streams")?;
    let bytes = |stream: &Value| stream["receiver"]["bytes"].as_u64().unwrap_or(0);
    Ok(jain(&all.iter().map(bytes).collect::<Vec<_>>()))
}

/// Bytes a second that a TCP stream gets, and that so many connections beside it get together.
pub(crate) fn beside_tcp(connections: usize) -> Result<(f64, f64)> {
    let slow = Slow::new()?;
    let mut writers = Writers::new(&slow.hosts, connections)?;
    writers.go_on(BEGIN)?;
    let tcp = Iperf::new(&slow.hosts, 1)?;
    writers.go_on(BEGIN)?;
    let written: u64 = writers.go_on(TIME)?.iter().sum();
    drop(writers);
    let said = tcp.end()?;
    let bits = said["end"]["sum_received"]["bits_per_second"].as_f64();
    let tcp = bits.with_context(|| format!("no rate in {said}"))? / 8.0;
    Ok((tcp, written as f64 / TIME.as_secs_f64()))
}

/// Fails unless a TCP stream that has the link for itself fills its queue until packets are dropped:
/// else the link says nothing of shares.
pub(crate) fn check_link() -> Result<()> {
    let slow = Slow::new()?;
    let said = Iperf::new(&slow.hosts, 1)?.end()?;
    let rtt = &said["end"]["streams"][0]["sender"]["max_rtt"];
    let rtt = rtt
        .as_u64()
        .with_context(|| format!("no round trip in {said}"))?;
    let drops = slow.drops()?;
    if drops == 0 || Duration::from_micros(rtt) < FULL {
        bail!(
            "a lone TCP stream does not fill the slow link's queue: {drops} packets dropped, round \
             trips up to {rtt} us"
        );
    }
    eprintln!("a lone TCP stream: {drops} packets dropped, round trips up to {rtt} us");
    Ok(())
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
