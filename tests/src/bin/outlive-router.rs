//! A program over the library's core that has threads in every kind of wait when its router dies:
//! for a completion event, for an asynchronous event, polling, and in the middle of control verbs.
//! It says what each of them found, destroys everything, and ends.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use freeflow_client::{Completion, Context, Cq, Errno, Qp, QpInit};
use freeflow_tests::rig::path_to_rts;
use freeflow_types::{AsyncEventType, QpCap, QpType, WcStatus};

/// Receive requests that wait on each queue pair.
const WAITING: u64 = 8;

fn queue_pair(
    context: &Arc<Context>,
    pd: &Arc<freeflow_client::Pd>,
    cq: &Arc<Cq>,
) -> Result<Arc<Qp>> {
    let cap = QpCap {
        max_send_wr: 8,
        max_recv_wr: WAITING as u32,
        max_send_sge: 1,
        max_recv_sge: 1,
        max_inline: 0,
    };
    let init = QpInit {
        qp_type: QpType::Rc,
        send_cq: cq,
        recv_cq: Some(cq),
        srq: None,
        cap,
        sq_sig_all: true,
    };
    let qp = pd.create_qp(&init, 0)?;
    // Connected with itself: nobody will ever send to it.
    let gid = context.info().gids.first().copied().unwrap_or_default();
    for (attr, mask) in path_to_rts(gid, qp.qpn(), &Default::default()) {
        qp.modify(&attr, mask)?;
    }
    let mut queue = qp.lock_recv();
    for wr_id in 0..WAITING {
        queue.push(wr_id, &[])?;
    }
    queue.commit();
    Ok(qp)
}

/// Every receive request is flushed, once and in order.
fn flushed(cq: &Cq) -> Result<()> {
    let mut next = 0;
    let mut out = [Completion::default(); 4];
    while next < WAITING {
        let n = cq.poll(&mut out)?;
        for done in &out[..n] {
            ensure!(
                done.wr_id == next && done.status == WcStatus::WrFlushErr.raw(),
                "{done:?} in place of {next}"
            );
            next += 1;
        }
    }
    ensure!(cq.poll(&mut out)? == 0, "more than was posted");
    Ok(())
}

fn main() -> Result<()> {
    let context = Context::open()?;
    let pd = context.alloc_pd()?;
    let channel = context.create_channel()?;
    let with_events = context.create_cq(64, Some(&channel), 0, 7)?;
    let polled = context.create_cq(64, None, 0, 8)?;
    let a = queue_pair(&context, &pd, &with_events)?;
    let b = queue_pair(&context, &pd, &polled)?;
    with_events.req_notify(false)?;
    std::thread::scope(|scope| -> Result<()> {
        let event = scope.spawn(|| -> Result<()> {
            let user = channel.get_event()?;
            ensure!(user == 7, "an event of {user}");
            flushed(&with_events)?;
            with_events.ack_events(1);
            println!("completion event: flushed");
            let last = channel.get_event();
            ensure!(last == Err(Errno::IO), "then {last:?}");
            Ok(())
        });
        let asynchronous = scope.spawn(|| -> Result<()> {
            let event = context.get_async_event()?;
            ensure!(event.kind == AsyncEventType::DeviceFatal, "{event:?}");
            println!("asynchronous event: device fatal");
            let last = context.get_async_event();
            ensure!(last == Err(Errno::IO), "then {last:?}");
            Ok(())
        });
        let polling = scope.spawn(|| -> Result<()> {
            flushed(&polled)?;
            println!("polling: flushed");
            Ok(())
        });
        println!("ready");
        loop {
            match context.alloc_pd().and_then(|pd| pd.dealloc()) {
                Ok(()) => {}
                Err(Errno::IO) => break,
                Err(errno) => bail!("a control verb fails with {errno}"),
            }
        }
        println!("control verb: EIO");
        for thread in [event, asynchronous, polling] {
            match thread.join() {
                Ok(result) => result?,
                Err(_) => bail!("a thread panicked"),
            }
        }
        Ok(())
    })?;
    a.destroy()?;
    b.destroy()?;
    with_events.destroy()?;
    polled.destroy()?;
    channel.destroy()?;
    pd.dealloc()?;
    context.close()?;
    println!("destroyed everything");
    Ok(())
}
