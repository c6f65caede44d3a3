//! Keys of a session: what they name.

use freeflow_session::Handle;
use freeflow_types::Key;
use rustc_hash::FxHashMap;
use rustix::io::Errno;

/// The low bits of a key, which the consumer chooses when it binds a window of type 2 (IBTA
/// volume 1, 10.6.3.3).
pub(crate) const TAG: u32 = 0xFF;

/// Random numbers that are asked for at once.
const RANDOM_AT_ONCE: usize = 64;

/// What a key names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    Region(Handle),
    /// What is in this slot of the session's table, if it lives.
    Slot(u32),
    Window(Handle),
}

/// Everything that has a key, found in constant time. No two have keys that differ in the tag
/// alone.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    named: FxHashMap<u32, Named>,
    /// Random numbers for the next keys: one system call for many.
    random: Vec<u32>,
}

impl Keys {
    /// A random key for something new.
    pub(crate) fn choose(&mut self) -> Result<Key, Errno> {
        loop {
            let key = self.random()?;
            if key > TAG && !self.named.contains_key(&(key & !TAG)) {
                return Ok(Key(key));
            }
        }
    }

    fn random(&mut self) -> Result<u32, Errno> {
        if let Some(number) = self.random.pop() {
            return Ok(number);
        }
        let mut bytes = [0; 4 * RANDOM_AT_ONCE];
        getrandom::fill(&mut bytes).map_err(|_| Errno::AGAIN)?;
        let (numbers, _) = bytes.as_chunks();
        let numbers = numbers.iter().map(|bytes| u32::from_ne_bytes(*bytes));
        self.random.extend(numbers);
        self.random.pop().ok_or(Errno::AGAIN)
    }

    pub(crate) fn insert(&mut self, key: Key, named: Named) {
        self.named.insert(key.0 & !TAG, named);
    }

    pub(crate) fn remove(&mut self, key: Key) {
        self.named.remove(&(key.0 & !TAG));
    }

    /// How many there are.
    #[cfg(feature = "testing")]
    pub(crate) fn len(&self) -> usize {
        self.named.len()
    }

    /// What has this key or one that differs in the tag.
    pub(crate) fn get(&self, key: u32) -> Option<Named> {
        self.named.get(&(key & !TAG)).copied()
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
