//! `freeflow status` and `freeflow endpoint`: what the router says.

use std::process::ExitCode;

use anyhow::{Result, bail};
use freeflow_api::{
    ControlAnswer, EndpointStatus, FabricStatus, LinkStatus, NewEndpoint, Operation, Quota,
    QuotaStatus, Resource, RouterStatus, RuntimeDir, SessionStatus,
};

use crate::client::{Client, unexpected, warn};
use crate::{EndpointCommand, Output};

pub(crate) fn status(dir: &RuntimeDir, output: Output) -> Result<ExitCode> {
    let status = Client::connect(dir)?.status()?;
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
        Output::Text => print_status(dir, &status),
    }
    Ok(ExitCode::SUCCESS)
}

fn print_status(dir: &RuntimeDir, status: &RouterStatus) {
    println!(
        "{}router {} (pid {}) serves {} for {} s",
        if status.embedded { "embedded " } else { "" },
        status.version,
        status.pid,
        dir.path().display(),
        status.uptime_ms / 1000
    );
    println!("sandbox: {}", status.sandbox);
    if let Some(fabric) = &status.fabric {
        print_fabric(fabric);
    }
    print_endpoints(&status.endpoints);
    let sessions: Vec<_> = status
        .endpoints
        .iter()
        .flat_map(|e| e.sessions.iter().map(move |s| (e, s)))
        .collect();
    if !sessions.is_empty() {
        let mut rows = vec![row(&[
            "ENDPOINT",
            "PID",
            "UID",
            "QPS",
            "CQS",
            "MRS",
            "IDS",
            "REGISTERED",
            "COPIED",
            "PATH",
        ])];
        for (e, s) in sessions {
            rows.push(row(&[
                &e.name,
                &s.pid.to_string(),
                &s.uid.to_string(),
                &s.qps.to_string(),
                &s.cqs.to_string(),
                &s.mrs.to_string(),
                &s.cm_ids.to_string(),
                &bytes(s.registered_bytes),
                &bytes(s.foreign_bytes),
                &path(s),
            ]));
        }
        println!();
        print_table(&rows);
    }
    if !status.ended_sessions.is_empty() {
        println!("\nsessions that ended last:");
        for ended in status.ended_sessions.iter().rev().take(5) {
            println!("  {} (pid {}): {}", ended.endpoint, ended.pid, ended.reason);
        }
    }
}

/// How a session's traffic goes.
fn path(session: &SessionStatus) -> String {
    let paths = session.paths.iter().map(ToString::to_string);
    let mut paths: Vec<_> = paths.collect();
    if paths.is_empty() {
        paths.push("not connected".to_owned());
    }
    let mut path = paths.join(", ");
    if session.foreign_bytes != 0 {
        path.push_str(" (copied in part)");
    }
    path
}

fn print_fabric(fabric: &FabricStatus) {
    println!(
        "underlay: {} (MTU {}), {} other hosts; sent {} packets ({}), received {} ({})",
        fabric.address,
        fabric.mtu,
        fabric.hosts.len(),
        fabric.sent_packets,
        bytes(fabric.sent_bytes),
        fabric.received_packets,
        bytes(fabric.received_bytes),
    );
    let drops = fabric.drops.iter().filter(|&(_, &n)| n != 0);
    let drops: Vec<_> = drops.map(|(why, n)| format!("{why} {n}")).collect();
    if !drops.is_empty() {
        println!("dropped packets: {}", drops.join(", "));
    }
    if let Some(incarnation) = &fabric.incarnation {
        let known = if fabric.authenticated {
            "by their certificates"
        } else {
            "by their addresses alone (--insecure)"
        };
        println!("incarnation {incarnation}; other hosts are known {known}");
    }
    if !fabric.links.is_empty() {
        println!();
        print_links(&fabric.links);
        println!();
    }
}

/// How other hosts' routers are reached, or why they are not.
pub(crate) fn print_links(links: &[LinkStatus]) {
    let mut rows = vec![row(&[
        "HOST",
        "LINK",
        "SINCE",
        "INCARNATION",
        "PACKETS",
        "WHY",
    ])];
    for link in links {
        let host = match &link.name {
            Some(name) => format!("{name}@{}", link.host),
            None => link.host.to_string(),
        };
        rows.push(row(&[
            &host,
            if link.up { "up" } else { "down" },
            &format!("{} s", link.since_ms / 1000),
            link.incarnation.as_deref().unwrap_or("-"),
            &link
                .segment
                .map_or_else(|| "-".to_owned(), |n| format!("{n} B")),
            link.reason.as_deref().unwrap_or(""),
        ]));
    }
    print_table(&rows);
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|&c| c.to_owned()).collect()
}

fn print_table(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| {
        rows.iter()
            .filter_map(|r| r.get(c))
            .map(String::len)
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    for row in rows {
        let cells: Vec<_> = row
            .iter()
            .zip(&widths)
            .map(|(cell, &w)| format!("{cell:<w$}"))
            .collect();
        println!("{}", cells.join("  ").trim_end());
    }
}

fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

fn print_endpoints(endpoints: &[EndpointStatus]) {
    let mut rows = vec![row(&[
        "NAME", "TENANT", "IP", "SESSIONS", "SENT", "RECEIVED", "FAILED", "QUOTA",
    ])];
    for e in endpoints {
        let c = &e.counters;
        rows.push(row(&[
            &e.name,
            &e.tenant,
            &e.ip.to_string(),
            &e.sessions.len().to_string(),
            &format!("{} ({})", c.sent_messages, bytes(c.sent_bytes)),
            &format!("{} ({})", c.received_messages, bytes(c.received_bytes)),
            &c.failed_requests.to_string(),
            &special_quota(&e.quota),
        ]));
    }
    print_table(&rows);
}

/// Limits that are not the usual ones, or too low for somebody: the rest is `inspect`'s to show.
fn special_quota(quota: &[QuotaStatus]) -> String {
    let usual = Quota::default();
    let special = quota.iter().filter(|q| {
        let limit = q.limit.unwrap_or(u64::MAX);
        limit != usual.limit(q.resource) || q.refused != 0
    });
    let one = |q: &QuotaStatus| {
        let number = |n: u64| match q.resource {
            Resource::Registered => bytes(n),
            _ => n.to_string(),
        };
        let limit = q.limit.map_or_else(|| "none".to_owned(), number);
        let name = q.resource.name();
        let mut text = if q.resource.is_rate() {
            format!("{name} {limit}/s")
        } else {
            format!("{name} {} of {limit}", number(q.used))
        };
        if q.refused != 0 {
            text.push_str(&format!(" (refused {})", q.refused));
        }
        text
    };
    special.map(one).collect::<Vec<_>>().join(", ")
}

fn print_quota(quota: &[QuotaStatus]) {
    let mut rows = vec![row(&["QUOTA", "USED", "LIMIT", "REFUSED"])];
    for q in quota {
        let limit = q.limit.map_or_else(|| "none".to_owned(), |n| n.to_string());
        let name = q.resource.name();
        rows.push(if q.resource.is_rate() {
            row(&[name, "-", &format!("{limit}/s"), "-"])
        } else {
            row(&[name, &q.used.to_string(), &limit, &q.refused.to_string()])
        });
    }
    println!();
    print_table(&rows);
}

pub(crate) fn endpoint(dir: &RuntimeDir, command: &EndpointCommand) -> Result<ExitCode> {
    let client = Client::connect(dir)?;
    match command {
        EndpointCommand::Ls(args) => {
            let endpoints = client.status()?.endpoints;
            match args.output {
                Output::Json => println!("{}", serde_json::to_string_pretty(&endpoints)?),
                Output::Text => print_endpoints(&endpoints),
            }
        }
        EndpointCommand::Create {
            name,
            ip,
            tenant,
            quota,
            underlay_gid,
            output,
        } => {
            let new = NewEndpoint {
                name: name.clone(),
                ip: *ip,
                tenant: tenant.clone(),
                ephemeral: false,
                quota: quota.clone(),
                underlay_gid: *underlay_gid,
            };
            match client.call(Operation::CreateEndpoint(new), &[])? {
                ControlAnswer::Created {
                    name,
                    ip,
                    underlay,
                    socket,
                    warning,
                } => {
                    warn(warning);
                    match output.output {
                        Output::Json => {
                            let made = serde_json::json!({
                                "name": name, "ip": ip, "underlay": underlay, "socket": socket
                            });
                            println!("{}", serde_json::to_string_pretty(&made)?);
                        }
                        Output::Text => println!("{name} {ip} {}", socket.display()),
                    }
                }
                other => return unexpected(other),
            }
        }
        EndpointCommand::Inspect { name, output } => {
            let endpoints = client.status()?.endpoints;
            let Some(found) = endpoints.into_iter().find(|e| e.name == *name) else {
                bail!("there is no endpoint \"{name}\" (freeflow endpoint ls shows them)");
            };
            match output.output {
                Output::Json => println!("{}", serde_json::to_string_pretty(&found)?),
                Output::Text => {
                    print_endpoints(std::slice::from_ref(&found));
                    println!("gid {}", found.gid);
                    if let Some(gid) = &found.underlay_gid {
                        println!("underlay gid {gid}");
                    }
                    println!("socket {}", found.socket.display());
                    print_quota(&found.quota);
                }
            }
        }
        EndpointCommand::Set { name, quota } => {
            let (name, settings) = (name.clone(), quota.clone());
            client.tell(Operation::SetQuota { name, settings }, &[])?;
        }
        EndpointCommand::Rm { name } => {
            client.tell(Operation::RemoveEndpoint { name: name.clone() }, &[])?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_shown_that_are_not_the_usual_ones() {
        let one = |resource, limit, used, refused| QuotaStatus {
            resource,
            used,
            limit,
            refused,
        };
        let usual = Quota::default().limit(Resource::Qps);
        let all = [
            one(Resource::Qps, Some(usual), 7, 0),
            one(Resource::Cqs, Some(10), 3, 2),
            one(Resource::Registered, Some(1 << 30), 2048, 0),
            one(Resource::Outstanding, None, 500, 0),
            one(Resource::Control, Some(1000), 0, 0),
            one(Resource::Connects, Some(5), 0, 0),
        ];
        assert_eq!(
            special_quota(&all),
            "cqs 3 of 10 (refused 2), registered 2.0 KiB of 1.0 GiB, control 1000/s, connects 5/s"
        );
        assert_eq!(special_quota(&all[..1]), "");
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(super::bytes(1023), "1023 B");
        assert_eq!(super::bytes(1536), "1.5 KiB");
        assert_eq!(super::bytes(3 << 30), "3.0 GiB");
    }
}
