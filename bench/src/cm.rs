//! Connections by the connection manager, from nothing to nothing.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use freeflow_client::{
    CmChannel, CmEventType, CmId, CmParam, CmQp, CmUp, PortSpace, Qp, QpState, QpType,
};
use serde_json::{Value, json};

use crate::queue::Device;

const CONNECTIONS: u32 = 4000;
/// Under way at a time.
const AT_ONCE: usize = 16;
const TIMEOUT_MS: u32 = 5000;

/// An id with its queue pair.
struct End {
    id: Arc<CmId>,
    qp: Arc<Qp>,
}

impl End {
    fn new(device: &Device, id: Arc<CmId>) -> Result<End> {
        let qp = device.create(16)?;
        id.bring_up(&CmUp::new(&qp, QpState::Init))?;
        Ok(End { id, qp })
    }

    /// Of a connection that is asked for: accepts it.
    fn take(device: &Device, id: Arc<CmId>) -> Result<End> {
        let end = End::new(device, id)?;
        end.accept(Some(end.param()))?;
        Ok(end)
    }

    /// Accepts as `rdma_accept` does, which brings the queue pair up.
    fn accept(&self, param: Option<CmParam>) -> Result<()> {
        let up = CmUp::new(&self.qp, QpState::Rts);
        Ok(self.id.accept_with(param, &up)?)
    }

    /// Ends the connection as `rdma_disconnect` does, which ends the queue pair too.
    fn disconnect(&self) -> Result<()> {
        Ok(self.id.disconnect_with(&self.qp)?)
    }

    fn param(&self) -> CmParam {
        CmParam {
            qp: CmQp {
                qpn: freeflow_client::Qpn::new(self.qp.qpn()),
                qp_type: QpType::Rc,
                srq: false,
            },
            private_data: Vec::new(),
            responder_resources: 1,
            initiator_depth: 1,
            flow_control: false,
            retry_count: 7,
            rnr_retry_count: 7,
            qkey: None,
            ece: None,
        }
    }

    fn end(self) -> Result<()> {
        self.qp.destroy()?;
        Ok(self.id.destroy()?)
    }
}

/// Accepts and answers until it is killed; says its port first.
pub(crate) fn serve() -> Result<Value> {
    let device = Device::open()?;
    let channel = CmChannel::create()?;
    let (_listener, address) = listen(&channel, &device)?;
    println!("{address}");
    let mut ends: HashMap<usize, End> = HashMap::new();
    let mut next = 0;
    loop {
        let report = channel.get_event(|_, _| {
            next += 1;
            next
        })?;
        report.acknowledge();
        match (report.event.event, report.new_id) {
            (CmEventType::ConnectRequest, Some(id)) => {
                ends.insert(id.user(), End::take(&device, id)?);
            }
            (CmEventType::Disconnected, None) => {
                if let Some(end) = ends.remove(&report.id.user()) {
                    end.disconnect()?;
                    end.end()?;
                }
            }
            _ => {}
        }
    }
}

/// Listens at the device's own address, at a port that is free.
fn listen(channel: &Arc<CmChannel>, device: &Device) -> Result<(Arc<CmId>, SocketAddr)> {
    let listener = channel.create_id(PortSpace::Tcp, QpType::Rc, 0)?;
    let ip = std::net::Ipv6Addr::from(device.gid()?.0).to_canonical();
    listener.bind((ip, 0).into())?;
    let address = listener.listen(0)?.src;
    Ok((listener, address))
}

/// A program of its own is the other side.
pub(crate) fn connections() -> Result<Value> {
    let mut server = Command::new(std::env::current_exe()?)
        .arg("cm-server")
        .stdout(Stdio::piped())
        .spawn()?;
    let result = connect_to(server.stdout.take().context("no output")?);
    let _ = server.kill();
    let _ = server.wait();
    result
}

/// Keeps connections of this process with itself, until standard input ends.
pub(crate) fn idle(connections: u32) -> Result<Value> {
    let device = Device::open()?;
    let channel = CmChannel::create()?;
    let (_listener, to) = listen(&channel, &device)?;
    let mut next = 0;
    let mut begin = || -> Result<Arc<CmId>> {
        next += 1;
        let id = channel.create_id(PortSpace::Tcp, QpType::Rc, next)?;
        id.resolve_addr(None, to, TIMEOUT_MS)?;
        Ok(id)
    };
    let mut ids = HashMap::new();
    let mut ends: HashMap<usize, End> = HashMap::new();
    let mut accepting = connections as usize;
    let (mut begun, mut done) = (0, 0);
    while done < connections {
        while begun < connections && begun - done < AT_ONCE as u32 {
            let id = begin()?;
            ids.insert(id.user(), id);
            begun += 1;
        }
        let report = channel.get_event(|_, _| {
            accepting += 1;
            accepting
        })?;
        report.acknowledge();
        let user = report.id.user();
        match (report.event.event, report.new_id) {
            (CmEventType::AddrResolved, _) => report.id.resolve_route(TIMEOUT_MS)?,
            (CmEventType::RouteResolved, _) => {
                let end = End::new(&device, ids.remove(&user).context("no such id")?)?;
                end.id.connect(end.param())?;
                ends.insert(user, end);
            }
            (CmEventType::ConnectRequest, Some(id)) => {
                ends.insert(id.user(), End::take(&device, id)?);
            }
            (CmEventType::ConnectResponse, _) => {
                ends.get(&user).context("no such id")?.accept(None)?;
            }
            (CmEventType::Established, _) => done += 1,
            (other, _) => bail!("{other:?}, status {}", report.event.status),
        }
    }
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(json!({ "connections": done, "queue_pairs": ends.len() }))
}

fn connect_to(server: impl std::io::Read) -> Result<Value> {
    let mut line = String::new();
    BufReader::new(server).read_line(&mut line)?;
    let to: SocketAddr = line.trim().parse().context("the server's address")?;
    let device = Device::open()?;
    let channel = CmChannel::create()?;
    let begin = |user: u32| -> Result<Arc<CmId>> {
        let id = channel.create_id(PortSpace::Tcp, QpType::Rc, user as usize)?;
        id.resolve_addr(None, to, TIMEOUT_MS)?;
        Ok(id)
    };
    let start = Instant::now();
    let (mut begun, mut done) = (0, 0);
    let mut ids: HashMap<usize, Arc<CmId>> = HashMap::new();
    let mut ends: HashMap<usize, End> = HashMap::new();
    while done < CONNECTIONS {
        while ids.len() + ends.len() < AT_ONCE && begun < CONNECTIONS {
            ids.insert(begun as usize, begin(begun)?);
            begun += 1;
        }
        let report = channel.get_event(|_, _| 0)?;
        report.acknowledge();
        let user = report.id.user();
        match report.event.event {
            CmEventType::AddrResolved => report.id.resolve_route(TIMEOUT_MS)?,
            CmEventType::RouteResolved => {
                let id = ids.remove(&user).context("no such id")?;
                let end = End::new(&device, id)?;
                end.id.connect(end.param())?;
                ends.insert(user, end);
            }
            CmEventType::ConnectResponse => {
                let end = ends.get(&user).context("no such id")?;
                end.accept(None)?;
                end.disconnect()?;
            }
            CmEventType::Disconnected => {
                ends.remove(&user).context("no such id")?.end()?;
                done += 1;
            }
            CmEventType::TimewaitExit => {}
            other => bail!("{other:?}, status {}", report.event.status),
        }
    }
    let rate = f64::from(CONNECTIONS) / start.elapsed().as_secs_f64();
    Ok(json!({ "connections_per_s": rate }))
}
