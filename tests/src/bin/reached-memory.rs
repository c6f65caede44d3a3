//! A process with memory at an address that another one has, too. As a client, with its endpoint's
//! socket and its peer's address and QPN, it has that memory registered as its own, which the router
//! reaches across processes; it says its QPN and its key. Without arguments it is nobody's client,
//! fills the memory, and says that it is ready. Either ends with its standard input.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use freeflow_session::{PieceDesc, PieceKind, RegMr, Reply, Request, Translation};
use freeflow_tests::REACHED;
use freeflow_tests::rig::{CAP, IOVA, Rig, all_rights};
use freeflow_types::{Gid, QpType, VirtualIp};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

fn main() -> Result<()> {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    let (at, len) = (REACHED.start as *mut u8, REACHED.clone().count());
    // SAFETY: it replaces nothing.
    unsafe { mmap_anonymous(at.cast(), len, prot, flags | MapFlags::FIXED_NOREPLACE) }
        .context("cannot map the memory")?;
    let args: Vec<_> = std::env::args().skip(1).collect();
    let _session = match args.as_slice() {
        [] => {
            // SAFETY: the mapping made above.
            unsafe { at.write_bytes(freeflow_tests::UNTOUCHED, len) };
            println!("ready");
            None
        }
        [socket, ip, qpn] => Some(register(socket, ip, qpn, len as u64)?),
        _ => bail!("usage: reached-memory [SOCKET IP QPN]"),
    };
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn register(socket: &str, ip: &str, qpn: &str, len: u64) -> Result<Rig> {
    let mut rig = Rig::new(Path::new(socket), 4096)?;
    rig.raw.call(&Request::AttachMemory)?;
    let addr = REACHED.start;
    let (reply, _) = rig.raw.call(&Request::RegMr(RegMr {
        pd: rig.pd,
        access: all_rights(),
        translation: Translation {
            iova: IOVA,
            len,
            pieces: vec![PieceDesc {
                len,
                kind: PieceKind::Foreign { addr },
            }],
        },
    }))?;
    let Reply::Mr(region) = reply else {
        bail!("not a region: {reply:?}");
    };
    let qp = rig.qp(QpType::Rc, CAP)?;
    rig.connect(&qp, Gid::from(VirtualIp(ip.parse()?)), qpn.parse()?)?;
    println!("{} {}", qp.qpn(), region.key.0);
    Ok(rig)
}
