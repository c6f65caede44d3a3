//! Generational tables: a handle of an object that is gone finds nothing, even if its slot is
//! used again.

use std::collections::BTreeSet;

use freeflow_session::Handle;
use rustc_hash::FxHashMap;

const SLOT_BITS: u32 = 20;
const SLOT_MASK: u32 = (1 << SLOT_BITS) - 1;

/// The handle of an object that is not there: no table ever gives it.
pub(crate) const NONE: Handle = Handle(0);

/// What lies in a table.
pub(crate) trait Owned {
    /// What it ends with, [`NONE`] if nothing; it never changes.
    fn owner(&self) -> Handle;
}

/// Objects of one kind, found by handle in constant time, and by owner.
#[derive(Debug)]
pub(crate) struct Table<T> {
    entries: Vec<Entry<T>>,
    free: std::collections::VecDeque<u32>,
    /// By the number of each handle.
    by_owner: FxHashMap<Handle, BTreeSet<u32>>,
}

#[derive(Debug)]
struct Entry<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table {
            entries: Vec::new(),
            free: Default::default(),
            by_owner: FxHashMap::default(),
        }
    }
}

impl<T: Owned> Table<T> {
    /// Adds an object; `None` if the table is full.
    pub(crate) fn insert(&mut self, value: T) -> Option<Handle> {
        // First in, first out: a slot rests as long as possible before it is used again.
        let slot = match self.free.pop_front() {
            Some(slot) => slot,
            None if self.entries.len() <= SLOT_MASK as usize => {
                self.entries.push(Entry {
                    generation: 1,
                    value: None,
                });
                self.entries.len() as u32 - 1
            }
            None => return None,
        };
        let entry = self.entries.get_mut(slot as usize)?;
        let handle = Handle(entry.generation << SLOT_BITS | slot);
        let owner = value.owner();
        entry.value = Some(value);
        if owner != NONE {
            self.by_owner.entry(owner).or_default().insert(handle.0);
        }
        Some(handle)
    }

    /// All objects of an owner, always in the same order.
    pub(crate) fn of(&self, owner: Handle) -> Vec<Handle> {
        self.some_of(owner, usize::MAX)
    }

    /// The first objects of an owner, at most so many.
    pub(crate) fn some_of(&self, owner: Handle, most: usize) -> Vec<Handle> {
        let own = self.by_owner.get(&owner).into_iter().flatten();
        own.take(most).map(|&number| Handle(number)).collect()
    }

    fn entry(&self, handle: Handle) -> Option<&Entry<T>> {
        let entry = self.entries.get((handle.0 & SLOT_MASK) as usize)?;
        (entry.generation == handle.0 >> SLOT_BITS).then_some(entry)
    }

    /// The object, if it still exists.
    pub(crate) fn get(&self, handle: Handle) -> Option<&T> {
        self.entry(handle)?.value.as_ref()
    }

    /// The object, to change.
    pub(crate) fn get_mut(&mut self, handle: Handle) -> Option<&mut T> {
        let entry = self.entries.get_mut((handle.0 & SLOT_MASK) as usize)?;
        if entry.generation != handle.0 >> SLOT_BITS {
            return None;
        }
        entry.value.as_mut()
    }

    /// Removes the object.
    pub(crate) fn remove(&mut self, handle: Handle) -> Option<T> {
        let slot = handle.0 & SLOT_MASK;
        let entry = self.entries.get_mut(slot as usize)?;
        if entry.generation != handle.0 >> SLOT_BITS {
            return None;
        }
        let value = entry.value.take()?;
        // Generation 0 is never given, so that handle 0 never exists.
        entry.generation = (entry.generation + 1) & (u32::MAX >> SLOT_BITS);
        entry.generation = entry.generation.max(1);
        self.free.push_back(slot);
        let owner = value.owner();
        if let Some(own) = self.by_owner.get_mut(&owner) {
            own.remove(&handle.0);
            if own.is_empty() {
                self.by_owner.remove(&owner);
            }
        }
        Some(value)
    }

    /// All objects with their handles.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Handle, &T)> {
        self.entries.iter().enumerate().filter_map(|(slot, entry)| {
            let handle = Handle(entry.generation << SLOT_BITS | slot as u32);
            Some((handle, entry.value.as_ref()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Owned for &str {
        fn owner(&self) -> Handle {
            Handle(self.len() as u32)
        }
    }

    #[test]
    fn objects_are_found_by_their_owner() {
        let mut table = Table::default();
        let [a, b, c] = ["x", "y", "long"].map(|s| table.insert(s).unwrap());
        assert_eq!(table.of(Handle(1)), [a, b]);
        assert_eq!(table.some_of(Handle(1), 1), [a]);
        table.remove(a);
        assert_eq!(table.of(Handle(1)), [b]);
        assert_eq!(table.of(Handle(4)), [c]);
        table.remove(b);
        table.remove(c);
        assert_eq!(table.of(Handle(4)), []);
        assert!(table.by_owner.is_empty());
        table.insert("").unwrap();
        assert!(table.by_owner.is_empty());
    }

    #[test]
    fn an_old_handle_finds_nothing() {
        let mut table = Table::default();
        let a = table.insert("a").unwrap();
        assert_eq!(table.get(a), Some(&"a"));
        assert_eq!(table.remove(a), Some("a"));
        let b = table.insert("b").unwrap();
        assert_ne!(a, b);
        assert_eq!(table.get(a), None);
        assert_eq!(table.remove(a), None);
        assert_eq!(table.get_mut(b), Some(&mut "b"));
        assert_eq!(table.get(NONE), None);
        assert_eq!(table.get(Handle(u32::MAX)), None);
        assert_eq!(table.iter().collect::<Vec<_>>(), [(b, &"b")]);
    }

    #[test]
    fn generations_wrap_without_zero() {
        let mut table = Table::default();
        for _ in 0..10_000 {
            let handle = table.insert("").unwrap();
            assert_ne!(handle.0 >> SLOT_BITS, 0);
            table.remove(handle);
        }
    }
}
