//! A client whose registered memory does not come: the file that is its standard input, mapped. Its
//! arguments are its endpoint's socket and its peer's address, QPN and remote key; it says its own
//! QPN and key. With a last argument it sends from that memory itself. It ends with its session.

use std::path::Path;

use anyhow::{Context, Result, bail};
use freeflow_session::{PieceDesc, PieceKind, RegMr, Reply, Request, Translation};
use freeflow_shm::SendEntry;
use freeflow_tests::raw::{Answer, hear};
use freeflow_tests::rig::{CAP, IOVA, Rig, all_rights};
use freeflow_types::{Gid, Opcode, QpType, VirtualIp};
use rustix::mm::{MapFlags, ProtFlags, mmap};

const LEN: u64 = 4096;

fn main() -> Result<()> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [socket, ip, qpn, key, sends @ ..] = args.as_slice() else {
        bail!("usage: stuck-memory SOCKET IP QPN KEY [send]");
    };
    let mut rig = Rig::new(Path::new(socket), LEN)?;
    rig.raw.call(&Request::AttachMemory)?;
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    let file = std::io::stdin();
    // SAFETY: a new mapping where there is none.
    let addr = unsafe { mmap(std::ptr::null_mut(), LEN as usize, prot, flags, &file, 0) };
    let addr = addr.context("cannot map standard input")? as u64;
    let kind = PieceKind::Foreign { addr };
    let (reply, _) = rig.raw.call(&Request::RegMr(RegMr {
        pd: rig.pd,
        access: all_rights(),
        translation: Translation {
            iova: IOVA,
            len: LEN,
            pieces: vec![PieceDesc { len: LEN, kind }],
        },
    }))?;
    let Reply::Mr(stuck) = reply else {
        bail!("not a region: {reply:?}");
    };
    let mut qp = rig.qp(QpType::Rc, CAP)?;
    rig.connect(&qp, Gid::from(VirtualIp(ip.parse()?)), qpn.parse()?)?;
    println!("{} {}", qp.qpn(), stuck.key.0);
    if !sends.is_empty() {
        let entry = SendEntry {
            opcode: Opcode::RdmaWrite.raw() as u8,
            num_sge: 1,
            rkey: key.parse()?,
            remote_addr: IOVA,
            ..SendEntry::default()
        };
        let mut sge = rig.sge(0, 64);
        sge.lkey = stuck.key.0;
        rig.send(&mut qp, &entry, &[sge])?;
    }
    match hear(&rig.raw.socket)? {
        Answer::Closed => Ok(()),
        other => bail!("nobody asked for {other:?}"),
    }
}
