//! Keys of a session: what they name.

use freeflow_session::Handle;
use freeflow_types::Key;
use rustc_hash::FxHashMap;
use rustix::io::Errno;

use crate::control::random_u32;

/// The low bits of a key, which the consumer chooses when it binds a window of type 2 (IBTA
/// volume 1, 10.6.3.3).
pub(crate) const TAG: u32 = 0xFF;

/// What a key names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    Region(Handle),
    Window(Handle),
}

/// Everything that has a key, found in constant time. No two have keys that differ in the tag
/// alone.
#[derive(Debug, Default)]
pub(crate) struct Keys(FxHashMap<u32, Named>);

impl Keys {
    /// A random key for something new.
    pub(crate) fn choose(&self) -> Result<Key, Errno> {
        loop {
            let key = random_u32()?;
            if key > TAG && !self.0.contains_key(&(key & !TAG)) {
                return Ok(Key(key));
            }
        }
    }

    pub(crate) fn insert(&mut self, key: Key, named: Named) {
        self.0.insert(key.0 & !TAG, named);
    }

    pub(crate) fn remove(&mut self, key: Key) {
        self.0.remove(&(key.0 & !TAG));
    }

    /// How many there are.
    #[cfg(feature = "testing")]
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// What has this key or one that differs in the tag.
    pub(crate) fn get(&self, key: u32) -> Option<Named> {
        self.0.get(&(key & !TAG)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_not_confused() {
        let mut keys = Keys::default();
        let (a, b) = (keys.choose().unwrap(), Named::Region(Handle(1)));
        keys.insert(a, b);
        assert_eq!(keys.get(a.0), Some(b));
        assert_eq!(keys.get(a.0 ^ 1), Some(b));
        assert_eq!(keys.get(a.0 ^ 0x100), None);
        for _ in 0..1000 {
            assert_ne!(keys.choose().unwrap().0 & !TAG, a.0 & !TAG);
        }
        keys.remove(a);
        assert_eq!(keys.get(a.0), None);
    }
}
