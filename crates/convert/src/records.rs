//! Interval maps: which addresses are converted to what, and who uses which pages. Pure.

use std::collections::BTreeMap;

/// A value that changes along an interval: after `n` bytes it is another one.
pub(crate) trait Advance: Copy + PartialEq {
    /// The value `n` bytes further on.
    fn advance(self, n: u64) -> Self;
}

/// Disjoint intervals with values.
#[derive(Debug)]
pub(crate) struct Intervals<T> {
    map: BTreeMap<u64, (u64, T)>,
}

impl<T: Advance> Intervals<T> {
    pub(crate) const fn new() -> Self {
        Intervals {
            map: BTreeMap::new(),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.map.clear();
    }

    /// All intervals: start, end, value at the start.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64, T)> + '_ {
        self.map
            .iter()
            .map(|(&start, &(end, value))| (start, end, value))
    }

    /// The intervals within a range, cut to it.
    pub(crate) fn within(&self, start: u64, end: u64) -> Vec<(u64, u64, T)> {
        let first = self
            .map
            .range(..=start)
            .next_back()
            .map_or(start, |(&at, _)| at);
        self.map
            .range(first..end)
            .filter(|&(_, &(e, _))| e > start)
            .map(|(&s, &(e, value))| {
                let from = s.max(start);
                (from, e.min(end), value.advance(from - s))
            })
            .collect()
    }

    fn split(&mut self, at: u64) {
        if let Some((&start, &(end, value))) = self.map.range(..at).next_back()
            && end > at
        {
            self.map.insert(start, (at, value));
            self.map.insert(at, (end, value.advance(at - start)));
        }
    }

    /// Removes a range; other intervals keep what lies outside of it.
    pub(crate) fn remove(&mut self, start: u64, end: u64) {
        self.split(start);
        self.split(end);
        let gone: Vec<_> = self.map.range(start..end).map(|(&at, _)| at).collect();
        for at in gone {
            self.map.remove(&at);
        }
    }

    /// Sets a range to a value, whatever was there; merges with neighbours that continue it.
    pub(crate) fn insert(&mut self, mut start: u64, mut end: u64, mut value: T) {
        self.remove(start, end);
        if let Some(&(next_end, next)) = self.map.get(&end)
            && next == value.advance(end - start)
        {
            self.map.remove(&end);
            end = next_end;
        }
        if let Some((&before, &(before_end, before_value))) = self.map.range(..start).next_back()
            && before_end == start
            && before_value.advance(start - before) == value
        {
            (start, value) = (before, before_value);
        }
        self.map.insert(start, (end, value));
    }

    /// Changes the value of everything that is in a range.
    pub(crate) fn update(&mut self, start: u64, end: u64, change: impl Fn(T) -> T) {
        for (s, e, value) in self.within(start, end) {
            self.insert(s, e, change(value));
        }
    }
}

/// Pool pages behind an address: internal segment and offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    pub(crate) segment: usize,
    pub(crate) offset: u64,
}

impl Advance for Place {
    fn advance(self, n: u64) -> Self {
        Place {
            offset: self.offset + n,
            ..self
        }
    }
}

/// Registrations that use a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Users(pub(crate) u32);

impl Advance for Users {
    fn advance(self, _: u64) -> Self {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_like_one_value_per_unit(
            steps in proptest::collection::vec((0u8..3, 0u64..60, 1u64..20, 0u64..1000), 0..40)
        ) {
            let mut model: Vec<Option<Place>> = vec![None; 100];
            let mut map = Intervals::new();
            for (kind, start, len, offset) in steps {
                let end = start + len;
                match kind {
                    0 => {
                        map.insert(start, end, Place { segment: 0, offset });
                        for at in start..end {
                            let offset = offset + at - start;
                            model[at as usize] = Some(Place { segment: 0, offset });
                        }
                    }
                    1 => {
                        map.remove(start, end);
                        model[start as usize..end as usize].fill(None);
                    }
                    _ => {
                        map.update(start, end, |p| Place { segment: p.segment + 1, ..p });
                        for place in model[start as usize..end as usize].iter_mut().flatten() {
                            place.segment += 1;
                        }
                    }
                }
            }
            let mut seen = vec![None; 100];
            for (start, end, value) in map.within(0, 100) {
                prop_assert!(start < end);
                for at in start..end {
                    prop_assert!(seen[at as usize].is_none());
                    seen[at as usize] = Some(value.advance(at - start));
                }
            }
            prop_assert_eq!(seen, model);
            for (start, end, value) in map.within(30, 50) {
                prop_assert!(start >= 30 && end <= 50);
                prop_assert_eq!(Some(value), map.within(start, start + 1).first().map(|x| x.2));
            }
        }
    }

    #[test]
    fn continuations_merge() {
        let mut map = Intervals::new();
        map.insert(
            0,
            10,
            Place {
                segment: 0,
                offset: 100,
            },
        );
        map.insert(
            20,
            30,
            Place {
                segment: 0,
                offset: 120,
            },
        );
        map.insert(
            10,
            20,
            Place {
                segment: 0,
                offset: 110,
            },
        );
        assert_eq!(
            map.iter().collect::<Vec<_>>(),
            [(
                0,
                30,
                Place {
                    segment: 0,
                    offset: 100
                }
            )]
        );
    }
}
