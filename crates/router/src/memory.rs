//! Memory that a session shares with the router: ring slabs and page-pool segments, both sealed
//! memfds of zeroes from which ranges are handed out.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_shm::{Mapping, sealed_memfd};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// Bytes of a slab unless one object needs more. Sparse: it costs what is touched.
const SLAB_BYTES: u64 = 16 << 20;

/// Bytes of a segment unless one registration needs more. Sparse, and as long as its pages are
/// not touched it costs address space alone.
const SEGMENT_BYTES: u64 = 16 << 30;

/// Page size of the machine.
pub(crate) fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// A range of an area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Range {
    /// Index of the area.
    pub(crate) area: u32,
    /// Offset in it.
    pub(crate) offset: u64,
    /// Bytes, a multiple of the page size.
    pub(crate) len: u64,
}

/// One memfd.
#[derive(Debug)]
pub(crate) struct Area {
    fd: Arc<OwnedFd>,
    mapping: Arc<Mapping>,
    free: FreeList,
    shown: bool,
}

/// All memfds of one purpose of a session.
#[derive(Debug)]
pub(crate) struct Areas {
    name: &'static str,
    least: u64,
    areas: Vec<Area>,
    used: u64,
}

impl Areas {
    /// For rings.
    pub(crate) fn slabs() -> Self {
        Areas {
            name: "freeflow-rings",
            least: SLAB_BYTES,
            areas: Vec::new(),
            used: 0,
        }
    }

    /// For registered pages.
    pub(crate) fn segments() -> Self {
        Areas {
            name: "freeflow-pages",
            least: SEGMENT_BYTES,
            areas: Vec::new(),
            used: 0,
        }
    }

    /// Hands out a range of zeroes of at least `len` bytes.
    pub(crate) fn alloc(&mut self, len: u64) -> Result<Range, Errno> {
        let page = page_size();
        let len = len
            .max(1)
            .checked_next_multiple_of(page)
            .ok_or(Errno::NOMEM)?;
        for (index, area) in self.areas.iter_mut().enumerate() {
            if let Some(offset) = area.free.take(len) {
                self.used += len;
                return Ok(Range {
                    area: index as u32,
                    offset,
                    len,
                });
            }
        }
        let size = len.max(self.least);
        let fd = sealed_memfd(self.name, size)?;
        let mapping = Arc::new(Mapping::new(&fd, size)?);
        let mut free = FreeList::new(size);
        let offset = free.take(len).ok_or(Errno::NOMEM)?;
        self.areas.push(Area {
            fd: Arc::new(fd),
            mapping,
            free,
            shown: false,
        });
        self.used += len;
        Ok(Range {
            area: self.areas.len() as u32 - 1,
            offset,
            len,
        })
    }

    /// Bytes that a new area takes if `len` bytes are handed out; 0 if there is room.
    pub(crate) fn growth(&self, len: u64) -> u64 {
        let len = len.max(1).saturating_add(page_size() - 1) & !(page_size() - 1);
        if self.areas.iter().any(|area| area.free.has(len)) {
            0
        } else {
            len.max(self.least)
        }
    }

    /// Areas: each is a descriptor.
    pub(crate) fn count(&self) -> u64 {
        self.areas.len() as u64
    }

    /// Takes a range back; its memory is released and reads as zeroes when handed out again.
    /// EINVAL unless all of it was handed out.
    pub(crate) fn free(&mut self, range: Range) -> Result<(), Errno> {
        let page = page_size();
        let aligned = range.offset.is_multiple_of(page) && range.len.is_multiple_of(page);
        let area = self
            .areas
            .get_mut(range.area as usize)
            .ok_or(Errno::INVAL)?;
        if !aligned || !area.free.could_put(range.offset, range.len) {
            return Err(Errno::INVAL);
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&*area.fd, punch, range.offset, range.len)?;
        area.free.put(range.offset, range.len);
        self.used -= range.len;
        if area.free.is_whole() {
            // Perhaps nobody was told of it: a create that failed gives back what it had.
            area.shown = false;
        }
        Ok(())
    }

    /// The mapping of an area.
    pub(crate) fn mapping(&self, area: u32) -> Option<&Arc<Mapping>> {
        Some(&self.areas.get(area as usize)?.mapping)
    }

    /// The descriptor of an area, the first time it is asked for: then the library has it.
    pub(crate) fn show(&mut self, area: u32) -> Option<Arc<OwnedFd>> {
        let area = self.areas.get_mut(area as usize)?;
        (!std::mem::replace(&mut area.shown, true)).then(|| area.fd.clone())
    }

    /// Bytes of a whole area.
    pub(crate) fn size(&self, area: u32) -> u64 {
        self.mapping(area).map_or(0, |m| m.len())
    }

    /// Bytes of address space that all areas take.
    pub(crate) fn mapped(&self) -> u64 {
        self.areas.iter().map(|area| area.mapping.len()).sum()
    }

    /// Bytes handed out.
    pub(crate) fn used(&self) -> u64 {
        self.used
    }
}

/// Free ranges of an area, by offset; neighbours are merged.
#[derive(Debug)]
struct FreeList {
    size: u64,
    free: BTreeMap<u64, u64>,
}

impl FreeList {
    fn new(size: u64) -> Self {
        FreeList {
            size,
            free: BTreeMap::from([(0, size)]),
        }
    }

    /// Whether all of the area is free.
    fn is_whole(&self) -> bool {
        self.free.get(&0) == Some(&self.size)
    }

    /// Whether a range of this length is free.
    fn has(&self, len: u64) -> bool {
        self.free.values().any(|&have| have >= len)
    }

    /// First fit.
    fn take(&mut self, len: u64) -> Option<u64> {
        let (&offset, &have) = self.free.iter().find(|&(_, &have)| have >= len)?;
        self.free.remove(&offset);
        if have > len {
            self.free.insert(offset + len, have - len);
        }
        Some(offset)
    }

    /// Whether the range lies in the area and no part of it is free.
    fn could_put(&self, offset: u64, len: u64) -> bool {
        let Some(end) = offset.checked_add(len) else {
            return false;
        };
        let before = self.free.range(..end).next_back();
        len != 0 && end <= self.size && before.is_none_or(|(&o, &l)| o + l <= offset)
    }

    fn put(&mut self, mut offset: u64, mut len: u64) {
        if let Some((&next, &next_len)) = self.free.range(offset..).next()
            && next == offset + len
        {
            self.free.remove(&next);
            len += next_len;
        }
        if let Some((&prev, &prev_len)) = self.free.range(..offset).next_back()
            && prev + prev_len == offset
        {
            self.free.remove(&prev);
            offset = prev;
            len += prev_len;
        }
        self.free.insert(offset, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_come_back_zeroed_and_merged() {
        let mut areas = Areas::slabs();
        let page = page_size();
        let a = areas.alloc(1).unwrap();
        let b = areas.alloc(page + 1).unwrap();
        assert_eq!((a.len, b.len, b.offset), (page, 2 * page, page));
        areas.mapping(0).unwrap().write(a.offset, b"dirt").unwrap();
        areas.free(a).unwrap();
        assert_eq!(areas.free(a), Err(Errno::INVAL));
        assert_eq!(areas.alloc(page).unwrap(), a);
        let mut bytes = [1; 4];
        areas
            .mapping(0)
            .unwrap()
            .read(a.offset, &mut bytes)
            .unwrap();
        assert_eq!(bytes, [0; 4]);
        areas.free(a).unwrap();
        areas.free(b).unwrap();
        assert_eq!(areas.used(), 0);
        let all = areas.alloc(SLAB_BYTES).unwrap();
        assert_eq!((all.area, all.offset), (0, 0));
    }

    #[test]
    fn what_was_never_handed_out_is_not_taken_back() {
        let mut areas = Areas::slabs();
        let a = areas.alloc(4 * page_size()).unwrap();
        let bad = [
            Range { area: 1, ..a },
            Range {
                offset: a.offset + 1,
                ..a
            },
            Range {
                len: a.len + page_size(),
                ..a
            },
            Range {
                offset: u64::MAX - page_size() + 1,
                len: page_size(),
                area: 0,
            },
            Range { len: 0, ..a },
        ];
        for range in bad {
            assert_eq!(areas.free(range), Err(Errno::INVAL), "{range:?}");
        }
        let middle = Range {
            offset: a.offset + page_size(),
            len: page_size(),
            area: 0,
        };
        areas.free(middle).unwrap();
        assert_eq!(areas.free(a), Err(Errno::INVAL));
    }

    #[test]
    fn an_area_is_shown_once() {
        let mut areas = Areas::slabs();
        let a = areas.alloc(1).unwrap();
        assert!(areas.show(a.area).is_some());
        assert!(areas.show(a.area).is_none());
        assert!(areas.show(9).is_none());
        // Until all of it is free: who gives back what he could not use was not told of it.
        areas.free(a).unwrap();
        let a = areas.alloc(1).unwrap();
        assert!(areas.show(a.area).is_some());
        assert!(areas.alloc(SLAB_BYTES + 1).unwrap().area == 1);
    }
}
