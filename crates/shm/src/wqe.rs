//! Descriptors in the rings: work requests and completions, as words.
//!
//! A load copies the words once; nothing is read from shared memory again after it was checked.
//! All accesses are relaxed: the rings' indices order them.

use freeflow_types::{AddressVector, Gid, QpType};

use crate::sync::{AtomicU64, Ordering};

fn load(words: &[AtomicU64], at: usize) -> u64 {
    words[at].load(Ordering::Relaxed)
}

fn store(words: &[AtomicU64], at: usize, value: u64) {
    words[at].store(value, Ordering::Relaxed);
}

pub(crate) const fn low(word: u64) -> u32 {
    word as u32
}

pub(crate) const fn high(word: u64) -> u32 {
    (word >> 32) as u32
}

pub(crate) const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

/// Scatter/gather element, with the layout of `struct ibv_sge`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Sge {
    /// Address in the application (or offset in the region, as its iova says).
    pub addr: u64,
    /// Bytes.
    pub length: u32,
    /// Local key.
    pub lkey: u32,
}

/// A send work request without its data. Numbers are raw: whoever reads one from a ring checks
/// them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SendEntry {
    /// The program's own number.
    pub wr_id: u64,
    /// `enum ibv_wr_opcode`.
    pub opcode: u8,
    /// `enum ibv_send_flags`.
    pub flags: u8,
    /// Elements behind the entry (none if inline).
    pub num_sge: u16,
    /// Inline bytes behind the entry.
    pub inline_len: u32,
    /// Immediate data, bytes as the program gave them; or the key to invalidate.
    pub imm: u32,
    /// Remote key.
    pub rkey: u32,
    /// Remote address.
    pub remote_addr: u64,
    /// Atomics: compare or add operand. Flush: bytes.
    pub compare_add: u64,
    /// Atomics: swap operand. Flush: `FlushSpec`.
    pub swap: u64,
    /// XRC: the shared receive queue that is meant.
    pub remote_srqn: u32,
    /// Datagrams: destination.
    pub av: AddressVector,
    /// Datagrams: destination QP.
    pub remote_qpn: u32,
    /// Datagrams: Q_Key.
    pub remote_qkey: u32,
}

/// What binds a memory window, in the fields of a [`SendEntry`] that binding does not need
/// otherwise. Numbers are raw.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bind {
    /// Handle of the window.
    pub window: u32,
    /// Key wanted; its low byte counts.
    pub rkey: u32,
    /// Local key of the region.
    pub lkey: u32,
    /// First address in the region.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// `enum ibv_access_flags`.
    pub access: u32,
}

impl SendEntry {
    /// The entry that binds a window, but for the program's number and flags.
    pub fn from_bind(bind: &Bind) -> Self {
        SendEntry {
            imm: bind.lkey,
            rkey: bind.rkey,
            remote_addr: bind.addr,
            compare_add: bind.len,
            swap: pair(bind.window, bind.access),
            ..SendEntry::default()
        }
    }

    /// What the entry binds, if it is one that does.
    pub fn bind(&self) -> Bind {
        Bind {
            window: low(self.swap),
            rkey: self.rkey,
            lkey: self.imm,
            addr: self.remote_addr,
            len: self.compare_add,
            access: high(self.swap),
        }
    }

    /// Words before the data.
    pub const WORDS: usize = 8;

    /// Writes the entry, for a QP of this type.
    pub fn store(&self, qp: QpType, words: &[AtomicU64]) {
        store(words, 0, self.wr_id);
        let kind =
            u32::from(self.opcode) | u32::from(self.flags) << 8 | u32::from(self.num_sge) << 16;
        store(words, 1, pair(kind, self.inline_len));
        store(words, 2, pair(self.imm, self.rkey));
        if qp == QpType::Ud {
            let (gid, av) = (self.av.dgid.0, &self.av);
            let (first, second) = gid.split_at(8);
            store(
                words,
                4,
                u64::from_le_bytes(first.try_into().unwrap_or_default()),
            );
            store(
                words,
                5,
                u64::from_le_bytes(second.try_into().unwrap_or_default()),
            );
            store(words, 6, pair(self.remote_qpn, self.remote_qkey));
            let more = u32::from(av.traffic_class)
                | u32::from(av.hop_limit) << 8
                | u32::from(av.sgid_index) << 16
                | u32::from(av.sl) << 24;
            store(words, 7, pair(av.flow_label, more));
        } else {
            store(words, 3, self.remote_addr);
            store(words, 4, self.compare_add);
            store(words, 5, self.swap);
            if qp == QpType::XrcSend {
                store(words, 6, self.remote_srqn.into());
            }
        }
    }

    /// Reads an entry, for a QP of this type.
    pub fn load(qp: QpType, words: &[AtomicU64]) -> Self {
        let (kind, imm) = (load(words, 1), load(words, 2));
        let mut entry = SendEntry {
            wr_id: load(words, 0),
            opcode: low(kind) as u8,
            flags: (low(kind) >> 8) as u8,
            num_sge: (low(kind) >> 16) as u16,
            inline_len: high(kind),
            imm: low(imm),
            rkey: high(imm),
            ..SendEntry::default()
        };
        if qp == QpType::Ud {
            let mut gid = [0; 16];
            gid[..8].copy_from_slice(&load(words, 4).to_le_bytes());
            gid[8..].copy_from_slice(&load(words, 5).to_le_bytes());
            let (to, more) = (load(words, 6), load(words, 7));
            entry.remote_qpn = low(to);
            entry.remote_qkey = high(to);
            entry.av = AddressVector {
                dgid: Gid(gid),
                flow_label: low(more),
                traffic_class: high(more) as u8,
                hop_limit: (high(more) >> 8) as u8,
                sgid_index: (high(more) >> 16) as u8,
                sl: (high(more) >> 24) as u8,
                is_global: true,
                port_num: 1,
                ..AddressVector::default()
            };
        } else {
            entry.remote_addr = load(words, 3);
            entry.compare_add = load(words, 4);
            entry.swap = load(words, 5);
            if qp == QpType::XrcSend {
                entry.remote_srqn = low(load(words, 6));
            }
        }
        entry
    }

    /// Writes the elements behind an entry. They must fit.
    pub fn store_sges(words: &[AtomicU64], sges: &[Sge]) {
        for (pair, sge) in words[Self::WORDS..].chunks_exact(2).zip(sges) {
            store_sge(pair, sge);
        }
    }

    /// Appends the `n` elements behind an entry to `out`; fewer if the entry has room for fewer.
    pub fn load_sges(words: &[AtomicU64], n: usize, out: &mut Vec<Sge>) {
        out.extend(words[Self::WORDS..].chunks_exact(2).take(n).map(load_sge));
    }

    /// Writes inline bytes at `offset` behind an entry. False if they do not fit.
    pub fn store_inline(words: &[AtomicU64], offset: usize, bytes: &[u8]) -> bool {
        let words = &words[Self::WORDS..];
        let end = offset + bytes.len();
        if end > words.len() * 8 {
            return false;
        }
        let mut at = offset;
        while at < end {
            let (word, skip) = (at / 8, at % 8);
            let n = (8 - skip).min(end - at);
            let mut value = load(words, word).to_le_bytes();
            value[skip..skip + n].copy_from_slice(&bytes[at - offset..at - offset + n]);
            store(words, word, u64::from_le_bytes(value));
            at += n;
        }
        true
    }

    /// Appends the first `n` inline bytes behind an entry to `out`; fewer if it has room for
    /// fewer.
    pub fn load_inline(words: &[AtomicU64], n: usize, out: &mut Vec<u8>) {
        let end = out.len() + n.min((words.len() - Self::WORDS) * 8);
        for word in &words[Self::WORDS..] {
            if out.len() >= end {
                break;
            }
            out.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        out.truncate(end);
    }
}

fn store_sge(words: &[AtomicU64], sge: &Sge) {
    store(words, 0, sge.addr);
    store(words, 1, pair(sge.length, sge.lkey));
}

fn load_sge(words: &[AtomicU64]) -> Sge {
    let more = load(words, 1);
    Sge {
        addr: load(words, 0),
        length: low(more),
        lkey: high(more),
    }
}

/// A receive work request without its elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RecvEntry {
    /// The program's own number.
    pub wr_id: u64,
    /// Elements behind the entry.
    pub num_sge: u32,
}

impl RecvEntry {
    /// Words before the elements.
    pub const WORDS: usize = 2;

    /// Writes the entry and its elements, which must fit.
    pub fn store(wr_id: u64, sges: &[Sge], words: &[AtomicU64]) {
        store(words, 0, wr_id);
        store(words, 1, sges.len() as u64);
        for (pair, sge) in words[Self::WORDS..].chunks_exact(2).zip(sges) {
            store_sge(pair, sge);
        }
    }

    /// Reads an entry and appends its elements to `out`, no more than it has room for.
    pub fn load(words: &[AtomicU64], out: &mut Vec<Sge>) -> Self {
        let entry = RecvEntry {
            wr_id: load(words, 0),
            num_sge: low(load(words, 1)),
        };
        let n = entry.num_sge as usize;
        out.extend(words[Self::WORDS..].chunks_exact(2).take(n).map(load_sge));
        entry
    }
}

/// A completion.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CompletionEntry {
    /// The work request's number.
    pub wr_id: u64,
    /// `enum ibv_wc_status`.
    pub status: u8,
    /// `enum ibv_wc_opcode`.
    pub opcode: u8,
    /// `enum ibv_wc_flags`.
    pub wc_flags: u8,
    /// Service level.
    pub sl: u8,
    /// Vendor's error code.
    pub vendor_err: u32,
    /// Bytes received, or read.
    pub byte_len: u32,
    /// Immediate data.
    pub imm: u32,
    /// The local QP.
    pub qpn: u32,
    /// Datagrams: the sender's QP.
    pub src_qp: u32,
    /// The QP's slot in the session; [`CompletionEntry::SHARED`] if a shared receive queue gave
    /// the request.
    pub slot: u32,
    /// Whether a send request completed (else a receive request).
    pub is_send: bool,
    /// Index behind the work request in its ring: all before it are done. Of a shared receive
    /// queue, whose slots are free as soon as they are taken, its handle instead.
    pub retired: u64,
    /// Nanoseconds of the monotonic clock.
    pub timestamp: u64,
}

impl CompletionEntry {
    /// Words of an entry.
    pub const WORDS: usize = 8;

    /// No queue pair's slot.
    pub const SHARED: u32 = u32::MAX;

    pub(crate) fn store(&self, words: &[AtomicU64]) {
        let kind = u32::from(self.status)
            | u32::from(self.opcode) << 8
            | u32::from(self.wc_flags) << 16
            | u32::from(self.sl) << 24;
        store(words, 0, self.wr_id);
        store(words, 1, pair(kind, self.vendor_err));
        store(words, 2, pair(self.byte_len, self.imm));
        store(words, 3, pair(self.qpn, self.src_qp));
        store(words, 4, pair(self.slot, u32::from(self.is_send)));
        store(words, 5, self.retired);
        store(words, 6, self.timestamp);
    }

    pub(crate) fn load(words: &[AtomicU64]) -> Self {
        let (kind, len, qpn, slot) = (
            load(words, 1),
            load(words, 2),
            load(words, 3),
            load(words, 4),
        );
        CompletionEntry {
            wr_id: load(words, 0),
            status: low(kind) as u8,
            opcode: (low(kind) >> 8) as u8,
            wc_flags: (low(kind) >> 16) as u8,
            sl: (low(kind) >> 24) as u8,
            vendor_err: high(kind),
            byte_len: low(len),
            imm: high(len),
            qpn: low(qpn),
            src_qp: high(qpn),
            slot: low(slot),
            is_send: high(slot) != 0,
            retired: load(words, 5),
            timestamp: load(words, 6),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(n: usize) -> Vec<AtomicU64> {
        (0..n)
            .map(|_| AtomicU64::new(0x5A5A_5A5A_5A5A_5A5A))
            .collect()
    }

    #[test]
    fn a_datagram_entry_round_trips() {
        let words = words(8);
        let entry = SendEntry {
            wr_id: 1,
            opcode: 3,
            flags: 0x0F,
            num_sge: 9,
            inline_len: 77,
            imm: 0x1122_3344,
            rkey: 5,
            remote_qpn: 0xABCDEF,
            remote_qkey: 0x8000_0001,
            av: AddressVector {
                dgid: Gid(*b"0123456789abcdef"),
                flow_label: 0xFFFFF,
                traffic_class: 3,
                hop_limit: 64,
                sl: 7,
                is_global: true,
                port_num: 1,
                ..AddressVector::default()
            },
            ..SendEntry::default()
        };
        entry.store(QpType::Ud, &words);
        assert_eq!(SendEntry::load(QpType::Ud, &words), entry);
    }

    proptest! {
        #[test]
        fn a_connected_entry_round_trips(wr_id: u64, opcode: u8, flags: u8, num_sge: u16,
            inline_len: u32, imm: u32, rkey: u32, remote_addr: u64, compare_add: u64, swap: u64) {
            let words = words(8);
            let entry = SendEntry { wr_id, opcode, flags, num_sge, inline_len, imm, rkey,
                remote_addr, compare_add, swap, ..SendEntry::default() };
            entry.store(QpType::Rc, &words);
            prop_assert_eq!(SendEntry::load(QpType::Rc, &words), entry);
            let entry = SendEntry { remote_srqn: imm, ..entry };
            entry.store(QpType::XrcSend, &words);
            prop_assert_eq!(SendEntry::load(QpType::XrcSend, &words), entry);
        }

        #[test]
        fn a_bind_round_trips(window: u32, rkey: u32, lkey: u32, addr: u64, len: u64,
            access: u32) {
            let words = words(8);
            let bind = Bind { window, rkey, lkey, addr, len, access };
            SendEntry::from_bind(&bind).store(QpType::Uc, &words);
            prop_assert_eq!(SendEntry::load(QpType::Uc, &words).bind(), bind);
        }

        #[test]
        fn inline_pieces_concatenate(pieces in proptest::collection::vec(
            proptest::collection::vec(any::<u8>(), 0..20), 0..8)) {
            let words = words(8 + 20);
            let mut at = 0;
            for piece in &pieces {
                prop_assert!(SendEntry::store_inline(&words, at, piece));
                at += piece.len();
            }
            let mut out = vec![1, 2, 3];
            SendEntry::load_inline(&words, at, &mut out);
            prop_assert_eq!(&out[3..], pieces.concat());
        }

        #[test]
        fn a_completion_round_trips(wr_id: u64, kind: [u8; 4], vendor_err: u32, byte_len: u32,
            imm: u32, qpn: u32, src_qp: u32, slot: u32, is_send: bool, retired: u64) {
            let words = words(8);
            let entry = CompletionEntry { wr_id, status: kind[0], opcode: kind[1],
                wc_flags: kind[2], sl: kind[3], vendor_err, byte_len, imm, qpn, src_qp, slot,
                is_send, retired, timestamp: 9 };
            entry.store(&words);
            prop_assert_eq!(CompletionEntry::load(&words), entry);
        }
    }

    #[test]
    fn a_hostile_count_reads_no_more_than_the_slot() {
        let words = words(8 + 4);
        let mut sges = Vec::new();
        SendEntry::load_sges(&words, 65_535, &mut sges);
        assert_eq!(sges.len(), 2);
        let mut bytes = Vec::new();
        SendEntry::load_inline(&words, usize::MAX / 2, &mut bytes);
        assert_eq!(bytes.len(), 32);
        assert!(!SendEntry::store_inline(&words, 30, b"abc"));
    }
}
