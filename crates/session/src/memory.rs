//! Messages about memory: regions, windows, device memory.

use freeflow_types::{Access, Key, MwType};
use serde::{Deserialize, Serialize};

use crate::Handle;
use crate::message::{Invalid, RingLocation, at_most};

/// Most pieces of one memory region; a region in more pieces is refused with ENOMEM.
pub const MAX_PIECES: usize = 2048;

/// Most ranges of one [`AdviseMr`].
pub const MAX_ADVISED: usize = 1024;

/// Slots of a session's table of regions.
pub const REGION_SLOTS: u32 = 16_384;

/// Most slots that are given out or given back by one message.
pub const MAX_SLOTS_AT_ONCE: u32 = 512;

/// Rights that a region in the table may have: it is one piece of shared pages, to which no window
/// is ever bound.
const TABLE_ACCESS: Access = Access::REMOTE_CHANGE
    .union(Access::LOCAL_WRITE)
    .union(Access::REMOTE_READ)
    .union(Access::ZERO_BASED)
    .union(Access::FLUSH_GLOBAL);

/// Whether a region with these rights may be in the table: those that need the router are asked
/// for with [`RegMr`], and so are those that it refuses.
pub fn may_be_in_table(access: Access) -> bool {
    let changes = access.intersects(Access::REMOTE_CHANGE);
    TABLE_ACCESS.contains(access) && (!changes || access.contains(Access::LOCAL_WRITE))
}

/// What backs a piece of a memory region.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum PieceKind {
    /// Pages of a pool segment.
    Pool {
        /// The segment.
        segment: u32,
        /// Offset in it, in bytes.
        offset: u64,
    },
    /// The application's own memory, which the router reaches across processes.
    Foreign {
        /// Address in the application.
        addr: u64,
    },
}

/// A piece of a memory region; pieces follow each other without gaps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PieceDesc {
    /// Bytes.
    pub len: u64,
    /// What backs them.
    pub kind: PieceKind,
}

/// Where a memory region is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Translation {
    /// Address that work requests use for the first byte.
    pub iova: u64,
    /// Bytes; the sum of the pieces.
    pub len: u64,
    /// What backs the region, at most [`MAX_PIECES`].
    pub pieces: Vec<PieceDesc>,
}

impl Translation {
    /// All addresses of the application, whatever is there when one is used: what an implicit
    /// on-demand region is (`ibv_reg_mr(3)` of `NULL` and `SIZE_MAX`).
    pub fn everything() -> Self {
        Translation {
            iova: 0,
            len: u64::MAX,
            pieces: vec![PieceDesc {
                len: u64::MAX,
                kind: PieceKind::Foreign { addr: 0 },
            }],
        }
    }

    /// Only an on-demand region may be longer than `max_mr_size`, and then it is everything.
    pub(crate) fn validate(&self, access: Access, max_mr_size: u64) -> Result<(), Invalid> {
        if access.contains(Access::ON_DEMAND) && *self == Self::everything() {
            return Ok(());
        }
        at_most("length", self.len, max_mr_size)?;
        at_most("pieces", self.pieces.len() as u64, MAX_PIECES as u64)?;
        let mut sum = 0u64;
        for piece in &self.pieces {
            sum = sum.saturating_add(piece.len);
            let start = match piece.kind {
                PieceKind::Pool { offset, .. } => offset,
                PieceKind::Foreign { addr } => addr,
            };
            at_most("piece", piece.len, u64::MAX - start)?;
        }
        at_most("sum of pieces", sum, self.len)?;
        at_most("length", self.len, sum)?;
        at_most("iova", self.iova, u64::MAX - self.len)
    }
}

/// Registers a memory region.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RegMr {
    /// Protection domain.
    pub pd: Handle,
    /// Where it is.
    pub translation: Translation,
    /// Rights.
    pub access: Access,
}

/// Changes a memory region that no window is bound to (`ibv_rereg_mr(3)`): all of it or, on an
/// error, nothing. Its key stays.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReregMr {
    /// The region.
    pub mr: Handle,
    /// Another protection domain of the same context.
    pub pd: Option<Handle>,
    /// Another place.
    pub translation: Option<Translation>,
    /// Other rights.
    pub access: Option<Access>,
}

/// Exchanges slots of the table of regions: those that are given back, with their keys, are not the
/// library's any more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExchangeSlots {
    /// Slots that are given back, dead or never used, at most [`MAX_SLOTS_AT_ONCE`].
    pub back: Vec<u32>,
    /// Slots that are asked for, at most [`MAX_SLOTS_AT_ONCE`].
    pub want: u32,
}

/// A slot of the table of regions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RegionSlot {
    /// Its number.
    pub slot: u32,
    /// Key of the region that will be in it.
    pub key: Key,
}

/// Answer to [`ExchangeSlots`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SlotsExchanged {
    /// The table, of [`REGION_SLOTS`].
    pub table: RingLocation,
    /// Slots that the library may use; fewer than it asked for if that is all it may have.
    pub slots: Vec<RegionSlot>,
}

/// Asks whether ranges of memory regions may be fetched ahead (`ibv_advise_mr(3)`).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AdviseMr {
    /// Protection domain of all regions.
    pub pd: Handle,
    /// To be written.
    pub write: bool,
    /// At most [`MAX_ADVISED`].
    pub ranges: Vec<AdvisedRange>,
}

/// A part of a memory region.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AdvisedRange {
    /// First address, as work requests name it.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Local key.
    pub key: Key,
}

/// Allocates a memory window.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AllocMw {
    /// Protection domain.
    pub pd: Handle,
    /// Kind.
    pub kind: MwType,
}

/// Registers a part of device memory; its first byte has address 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RegDmMr {
    /// Protection domain.
    pub pd: Handle,
    /// The device memory.
    pub dm: Handle,
    /// Offset of the first byte in it.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Rights.
    pub access: Access,
}

/// Answer to requests that make a memory region.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MrRegistered {
    /// The region.
    pub mr: Handle,
    /// Its key; local and remote are the same.
    pub key: Key,
}

/// Answer to [`AllocMw`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MwAllocated {
    /// The window.
    pub mw: Handle,
    /// Its key; what it names changes when the window is bound.
    pub key: Key,
}

/// Answer to a request for device memory: pages of a pool segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DmAllocated {
    /// The device memory.
    pub dm: Handle,
    /// Its segment.
    pub segment: u32,
    /// Offset in the segment.
    pub offset: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Request;
    use freeflow_types::DeviceLimits;

    fn reg(len: u64, pieces: Vec<PieceDesc>) -> Result<(), Invalid> {
        let translation = Translation {
            iova: 0x1000,
            len,
            pieces,
        };
        let reg = Request::RegMr(RegMr {
            pd: Handle(0),
            translation: translation.clone(),
            access: Access::LOCAL_WRITE,
        });
        let rereg = Request::ReregMr(ReregMr {
            mr: Handle(0),
            pd: None,
            translation: Some(translation),
            access: None,
        });
        let limits = DeviceLimits::default();
        let result = reg.validate(&limits);
        assert_eq!(result, rereg.validate(&limits));
        result
    }

    fn foreign(addr: u64, len: u64) -> PieceDesc {
        PieceDesc {
            len,
            kind: PieceKind::Foreign { addr },
        }
    }

    #[test]
    fn pieces_must_cover_the_region_exactly() {
        assert!(reg(10, vec![foreign(0, 4), foreign(8, 6)]).is_ok());
        assert!(reg(11, vec![foreign(0, 4), foreign(8, 6)]).is_err());
        assert!(reg(9, vec![foreign(0, 4), foreign(8, 6)]).is_err());
        assert!(reg(4, vec![foreign(u64::MAX - 1, 4)]).is_err());
        assert!(reg(4, vec![foreign(0, u64::MAX), foreign(0, 5)]).is_err());
    }

    #[test]
    fn all_addresses_are_for_regions_on_demand() {
        let limits = DeviceLimits::default();
        let reg = |translation: Translation, access| {
            let pd = Handle(0);
            let reg = RegMr {
                pd,
                translation,
                access,
            };
            Request::RegMr(reg).validate(&limits)
        };
        let rereg = |access| {
            let rereg = ReregMr {
                mr: Handle(0),
                pd: None,
                translation: Some(Translation::everything()),
                access,
            };
            Request::ReregMr(rereg).validate(&limits)
        };
        let on_demand = Access::ON_DEMAND | Access::LOCAL_WRITE;
        assert!(reg(Translation::everything(), on_demand).is_ok());
        assert!(reg(Translation::everything(), Access::LOCAL_WRITE).is_err());
        assert!(rereg(Some(on_demand)).is_ok());
        assert!(rereg(Some(Access::LOCAL_WRITE)).is_err());
        assert!(rereg(None).is_err());
        // Whoever asks for less has to say of what.
        let most = |iova, len, piece| Translation {
            iova,
            len,
            pieces: vec![piece],
        };
        let all = foreign(0, u64::MAX);
        let pool = PieceDesc {
            len: u64::MAX,
            kind: PieceKind::Pool {
                segment: 0,
                offset: 0,
            },
        };
        for wrong in [
            most(1, u64::MAX, all),
            most(0, u64::MAX, foreign(1, u64::MAX)),
            most(0, u64::MAX - 1, foreign(0, u64::MAX - 1)),
            most(0, u64::MAX, pool),
        ] {
            assert!(reg(wrong.clone(), on_demand).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn exchanges_of_slots_are_bounded() {
        let limits = DeviceLimits::default();
        let exchange = |back: u32, want| {
            let back = (0..back).collect();
            Request::ExchangeSlots(ExchangeSlots { back, want }).validate(&limits)
        };
        let most = MAX_SLOTS_AT_ONCE;
        assert!(exchange(most, most).is_ok());
        assert!(exchange(most + 1, 0).is_err());
        assert!(exchange(0, most + 1).is_err());
    }

    #[test]
    fn only_plain_regions_go_without_the_router() {
        type A = Access;
        let plain = A::LOCAL_WRITE | A::REMOTE_WRITE | A::REMOTE_READ | A::REMOTE_ATOMIC;
        for access in [A::empty(), A::REMOTE_READ, plain, plain | A::ZERO_BASED] {
            assert!(may_be_in_table(access), "{access:?}");
        }
        for access in [
            A::REMOTE_WRITE,
            A::REMOTE_ATOMIC | A::REMOTE_READ,
            plain | A::MW_BIND,
            plain | A::ON_DEMAND,
            plain | A::FLUSH_PERSISTENT,
            A::from_bits_retain(1 << 19),
        ] {
            assert!(!may_be_in_table(access), "{access:?}");
        }
    }

    #[test]
    fn device_memory_and_advice_are_bounded() {
        let limits = DeviceLimits::default();
        let dm = |len| Request::AllocDm {
            context: Handle(0),
            len,
        };
        assert!(dm(1).validate(&limits).is_ok());
        assert!(dm(0).validate(&limits).is_err());
        assert!(dm(limits.max_dm_size + 1).validate(&limits).is_err());
        let part = |offset, len| {
            Request::RegDmMr(RegDmMr {
                pd: Handle(0),
                dm: Handle(0),
                offset,
                len,
                access: Access::ZERO_BASED,
            })
        };
        assert!(part(4, 4).validate(&limits).is_ok());
        assert!(part(0, 0).validate(&limits).is_ok());
        assert!(part(u64::MAX, 2).validate(&limits).is_err());
        let advise = |n| {
            let range = AdvisedRange {
                addr: 0,
                len: 1,
                key: Key(1),
            };
            Request::AdviseMr(AdviseMr {
                pd: Handle(0),
                write: false,
                ranges: vec![range; n],
            })
        };
        assert!(advise(MAX_ADVISED).validate(&limits).is_ok());
        assert!(advise(MAX_ADVISED + 1).validate(&limits).is_err());
    }
}
