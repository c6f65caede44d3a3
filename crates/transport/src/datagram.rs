//! Unreliable datagrams: one packet each, nothing to remember but a number.

use freeflow_types::{Opcode, Psn, QpType};
use freeflow_wire::{Bth, BthOpcode, Deth, Headers};
use serde::{Deserialize, Serialize};

use crate::requester::{Work, WorkError};

/// Where a datagram goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Destination {
    /// Queue pair, 24 bits; 0xFFFFFF is multicast.
    pub qpn: u32,
    /// Q_Key, already that of the queue pair if the request's has its high bit set.
    pub qkey: u32,
}

/// The sender of an unreliable datagram queue pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Datagrams {
    psn: Psn,
}

impl Datagrams {
    /// With the first sequence number.
    pub fn new(sq_psn: u32) -> Self {
        Datagrams {
            psn: Psn::new(sq_psn),
        }
    }

    /// The sequence number of the next datagram.
    pub fn next_psn(&self) -> u32 {
        self.psn.get()
    }

    /// Headers of a datagram from queue pair `from` with all of the work's data, of at most
    /// `longest` bytes, as payload. It is complete as it is sent.
    pub fn send(
        &mut self,
        work: &Work,
        from: u32,
        to: Destination,
        longest: u32,
    ) -> Result<Headers, WorkError> {
        let opcode = match work.opcode {
            Opcode::Send => BthOpcode::UD_SEND_ONLY,
            Opcode::SendImm => BthOpcode::UD_SEND_ONLY_IMM,
            other => return Err(WorkError::Opcode(other, QpType::Ud)),
        };
        if work.len > longest {
            return Err(WorkError::Length {
                len: work.len,
                longest: longest.into(),
            });
        }
        let mut h = Headers::new(Bth::new(opcode, to.qpn & 0xFF_FFFF, self.psn));
        h.bth.solicited = work.solicited;
        h.deth = Some(Deth {
            qkey: to.qkey,
            src_qp: from & 0xFF_FFFF,
        });
        h.imm = opcode.has_imm().then_some(work.imm);
        self.psn = self.psn.add(1);
        Ok(h.with_payload(work.len as usize))
    }
}

/// A datagram that has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Datagram {
    /// The sender, 24 bits.
    pub src_qp: u32,
    /// Immediate data.
    pub imm: Option<[u8; 4]>,
    /// It raises a solicited event.
    pub solicited: bool,
}

/// What a packet is to an unreliable datagram queue pair with this Q_Key; `None`: it is dropped
/// (IBTA volume 1, 9.8.3 and 9.6.1.4.1).
pub fn accept_datagram(headers: &Headers, qkey: u32) -> Option<Datagram> {
    let deth = headers.deth.filter(|d| d.qkey == qkey)?;
    headers.bth.opcode.is_send().then_some(Datagram {
        src_qp: deth.src_qp,
        imm: headers.imm,
        solicited: headers.bth.solicited,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TO: Destination = Destination {
        qpn: 0x12_3456,
        qkey: 7,
    };

    #[test]
    fn datagrams_arrive_as_they_were_sent() {
        let mut sender = Datagrams::new(0xFF_FFFF);
        let mut work = Work::new(Opcode::SendImm, 5);
        (work.imm, work.solicited) = ([1, 2, 3, 4], true);
        let h = sender.send(&work, 0x65_4321, TO, 4096).unwrap();
        assert_eq!(
            (h.bth.psn.get(), h.bth.pad, h.bth.dest_qp),
            (0xFF_FFFF, 3, TO.qpn)
        );
        assert_eq!(sender.next_psn(), 0);
        let mut packet = vec![0; h.len() + 8];
        h.emit(&mut packet).unwrap();
        let (parsed, payload) = Headers::parse(&packet).unwrap();
        assert_eq!((parsed, payload.len()), (h, 5));
        let got = accept_datagram(&parsed, 7).unwrap();
        assert_eq!((got.src_qp, got.imm), (0x65_4321, Some([1, 2, 3, 4])));
        assert!(got.solicited);
        assert_eq!(accept_datagram(&parsed, 8), None);
    }

    #[test]
    fn what_no_datagram_carries_is_refused() {
        let mut sender = Datagrams::new(0);
        let write = Work::new(Opcode::RdmaWrite, 0);
        assert!(sender.send(&write, 1, TO, 4096).is_err());
        let long = Work::new(Opcode::Send, 4097);
        assert!(sender.send(&long, 1, TO, 4096).is_err());
        assert_eq!(sender.next_psn(), 0);
        let rc = Headers::new(Bth::new(BthOpcode::RC_SEND_ONLY, 1, Psn::new(0)));
        assert_eq!(accept_datagram(&rc, 0), None);
    }
}
