//! Memory that a session shares with the router: ring slabs and page-pool segments, both sealed
//! memfds of zeroes from which ranges are handed out.

use std::collections::{BTreeMap, BTreeSet};
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

/// Bytes that are given back to the system at once: that takes some ten microseconds.
const BACK_AT_ONCE: u64 = 256 << 10;

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

impl Range {
    fn overlaps(&self, other: Range) -> bool {
        // Ranges of areas are far from where numbers end.
        self.area == other.area
            && self.offset < other.offset + other.len
            && other.offset < self.offset + self.len
    }
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
    /// Ranges that are being given back, each with its rest.
    leaving: Vec<Range>,
}

impl Areas {
    /// For rings.
    pub(crate) fn slabs() -> Self {
        Areas {
            name: "freeflow-rings",
            least: SLAB_BYTES,
            areas: Vec::new(),
            used: 0,
            leaving: Vec::new(),
        }
    }

    /// For registered pages.
    pub(crate) fn segments() -> Self {
        Areas {
            name: "freeflow-pages",
            least: SEGMENT_BYTES,
            areas: Vec::new(),
            used: 0,
            leaving: Vec::new(),
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

    /// Free ranges, each of which takes some of the heap. They lie between what is handed out: who
    /// gives parts of it back in pieces has more and more of them.
    pub(crate) fn free_ranges(&self) -> u64 {
        self.areas.iter().map(|area| area.free.len() as u64).sum()
    }

    /// Whether there is one more free range when this one is taken back. EINVAL unless all of it was
    /// handed out.
    pub(crate) fn adds_range(&self, range: Range) -> Result<bool, Errno> {
        let free = &self.handed_out(range)?.free;
        Ok(free.stands_alone(range.offset, range.len))
    }

    /// The area of a range, all of which was handed out; else EINVAL.
    fn handed_out(&self, range: Range) -> Result<&Area, Errno> {
        let page = page_size();
        let aligned = range.offset.is_multiple_of(page) && range.len.is_multiple_of(page);
        let area = self.areas.get(range.area as usize).ok_or(Errno::INVAL)?;
        if aligned && area.free.could_put(range.offset, range.len) {
            Ok(area)
        } else {
            Err(Errno::INVAL)
        }
    }

    /// Takes a range back; its memory is released and reads as zeroes when handed out again. Of a
    /// large one that happens bit by bit, see [`Self::free_some`]. EINVAL unless all of it was
    /// handed out.
    pub(crate) fn free(&mut self, range: Range) -> Result<(), Errno> {
        self.handed_out(range)?;
        if self.leaving.iter().any(|leaving| leaving.overlaps(range)) {
            return Err(Errno::INVAL);
        }
        if range.len > BACK_AT_ONCE {
            self.leaving.push(range);
            return Ok(());
        }
        self.give_back(range)
    }

    /// Gives back some of what is left of large ranges; false if nothing is. Until then nothing
    /// else may be done with them.
    pub(crate) fn free_some(&mut self) -> bool {
        let Some(mut range) = self.leaving.pop() else {
            return false;
        };
        let first = Range {
            len: range.len.min(BACK_AT_ONCE),
            ..range
        };
        range.offset += first.len;
        range.len -= first.len;
        if range.len != 0 {
            self.leaving.push(range);
        }
        // What the system does not take back stays handed out.
        let _ = self.give_back(first);
        true
    }

    fn give_back(&mut self, range: Range) -> Result<(), Errno> {
        let area = self
            .areas
            .get_mut(range.area as usize)
            .ok_or(Errno::INVAL)?;
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

/// Free ranges of an area; neighbours are merged. Everything takes logarithmic time, however a
/// client cuts the area up.
#[derive(Debug)]
struct FreeList {
    size: u64,
    /// Lengths by offset.
    free: BTreeMap<u64, u64>,
    /// The same by length, then offset.
    by_len: BTreeSet<(u64, u64)>,
}

impl FreeList {
    fn new(size: u64) -> Self {
        FreeList {
            size,
            free: BTreeMap::from([(0, size)]),
            by_len: BTreeSet::from([(size, 0)]),
        }
    }

    fn add(&mut self, offset: u64, len: u64) {
        self.free.insert(offset, len);
        self.by_len.insert((len, offset));
    }

    fn remove(&mut self, offset: u64, len: u64) {
        self.free.remove(&offset);
        self.by_len.remove(&(len, offset));
    }

    /// Whether all of the area is free.
    fn is_whole(&self) -> bool {
        self.free.get(&0) == Some(&self.size)
    }

    /// Free ranges.
    fn len(&self) -> usize {
        self.free.len()
    }

    /// Whether what is behind a range, and before it, is not free.
    fn stands_alone(&self, offset: u64, len: u64) -> bool {
        let before = self.free.range(..offset).next_back();
        let touches = |(&o, &l): (&u64, &u64)| o + l == offset;
        !before.is_some_and(touches)
            && offset
                .checked_add(len)
                .is_some_and(|end| !self.free.contains_key(&end))
    }

    /// Whether a range of this length is free.
    fn has(&self, len: u64) -> bool {
        self.by_len.last().is_some_and(|&(have, _)| have >= len)
    }

    /// Best fit: the least that is enough, and of several the first.
    fn take(&mut self, len: u64) -> Option<u64> {
        let &(have, offset) = self.by_len.range((len, 0)..).next()?;
        self.remove(offset, have);
        if have > len {
            self.add(offset + len, have - len);
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
            self.remove(next, next_len);
            len += next_len;
        }
        if let Some((&prev, &prev_len)) = self.free.range(..offset).next_back()
            && prev + prev_len == offset
        {
            self.remove(prev, prev_len);
            offset = prev;
            len += prev_len;
        }
        self.add(offset, len);
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
        assert!(!areas.free_some());
        assert_eq!(areas.used(), 0);
        let all = areas.alloc(SLAB_BYTES).unwrap();
        assert_eq!((all.area, all.offset), (0, 0));
    }

    #[test]
    fn large_ranges_come_back_bit_by_bit() {
        let mut areas = Areas::slabs();
        let len = 2 * BACK_AT_ONCE + page_size();
        let ranges = [areas.alloc(len).unwrap(), areas.alloc(len).unwrap()];
        let mapping = areas.mapping(0).unwrap().clone();
        for range in ranges {
            mapping.write(range.offset + len - 1, b"d").unwrap();
            areas.free(range).unwrap();
        }
        let mut steps = 0;
        while areas.free_some() {
            steps += 1;
            assert_eq!(
                areas.used(),
                areas.leaving.iter().map(|r| r.len).sum::<u64>()
            );
        }
        assert_eq!((steps, areas.used()), (6, 0));
        let all = areas.alloc(SLAB_BYTES).unwrap();
        assert_eq!((all.area, all.offset), (0, 0));
        let mut byte = [1];
        mapping.read(len - 1, &mut byte).unwrap();
        assert_eq!(byte, [0]);
    }

    #[test]
    fn a_large_range_comes_back_once_though_it_is_given_back_twice() {
        let mut areas = Areas::slabs();
        let range = areas.alloc(3 * BACK_AT_ONCE).unwrap();
        let kept = areas.alloc(page_size()).unwrap();
        let part = |offset, len| Range {
            offset: range.offset + offset,
            len,
            ..range
        };
        areas.free(range).unwrap();
        for again in [
            range,
            part(BACK_AT_ONCE, 2 * BACK_AT_ONCE),
            part(0, page_size()),
            part(3 * BACK_AT_ONCE - page_size(), page_size()),
        ] {
            assert_eq!(areas.free(again), Err(Errno::INVAL));
        }
        // Of what has come back already, too.
        assert!(areas.free_some());
        assert_eq!(areas.free(range), Err(Errno::INVAL));
        assert_eq!(areas.free(part(0, page_size())), Err(Errno::INVAL));
        while areas.free_some() {}
        assert_eq!(areas.used(), kept.len);
        let free = &areas.areas[0].free;
        assert_eq!(free.by_len.len(), free.free.len());
        areas.free(kept).unwrap();
        assert_eq!(areas.used(), 0);
    }

    #[test]
    fn the_least_range_that_is_enough_is_taken() {
        let mut list = FreeList::new(100);
        assert_eq!(list.take(100), Some(0));
        for (offset, len) in [(0, 10), (20, 5), (40, 7), (60, 5)] {
            list.put(offset, len);
        }
        let taken: Vec<_> = [4, 5, 6, 11, 10].map(|len| list.take(len)).into();
        assert_eq!(taken, [Some(20), Some(60), Some(40), None, Some(0)]);
        assert_eq!(list.free, BTreeMap::from([(24, 1), (46, 1)]));
        let by_len: Vec<_> = list.by_len.iter().copied().collect();
        assert_eq!(by_len, [(1, 24), (1, 46)]);
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
