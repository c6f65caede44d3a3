//! Big-endian fields, taken from and put into buffers with bounds always checked.

/// Reads fields one after another.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Reader { bytes }
    }

    /// The next `N` bytes; `None` if there are fewer.
    pub(crate) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.bytes.split_first_chunk()?;
        self.bytes = rest;
        Some(*head)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    /// The next `N` bytes of a message whose length has been checked; zeroes past its end.
    pub(crate) fn array<const N: usize>(&mut self) -> [u8; N] {
        self.take().unwrap_or([0; N])
    }

    /// As [`array`](Self::array).
    pub(crate) fn u16_or_0(&mut self) -> u16 {
        u16::from_be_bytes(self.array())
    }

    /// As [`array`](Self::array).
    pub(crate) fn u32_or_0(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    /// As [`array`](Self::array).
    pub(crate) fn u64_or_0(&mut self) -> u64 {
        u64::from_be_bytes(self.array())
    }

    /// Passes over bytes.
    pub(crate) fn skip(&mut self, n: usize) {
        self.bytes = self.bytes.get(n..).unwrap_or_default();
    }

    /// Bytes not yet read.
    pub(crate) fn left(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes fields one after another.
pub(crate) struct Writer<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(bytes: &'a mut [u8]) -> Self {
        Writer { bytes, at: 0 }
    }

    /// Writes as much as there is room for; the caller has checked that it is enough.
    pub(crate) fn put(&mut self, field: &[u8]) {
        let room = self.bytes.get_mut(self.at..).unwrap_or_default();
        let len = field.len().min(room.len());
        room[..len].copy_from_slice(&field[..len]);
        self.at += field.len();
    }

    pub(crate) fn u8(&mut self, v: u8) {
        self.put(&[v]);
    }

    pub(crate) fn u16(&mut self, v: u16) {
        self.put(&v.to_be_bytes());
    }

    pub(crate) fn u32(&mut self, v: u32) {
        self.put(&v.to_be_bytes());
    }

    pub(crate) fn u64(&mut self, v: u64) {
        self.put(&v.to_be_bytes());
    }

    /// Bytes written.
    pub(crate) fn written(&self) -> usize {
        self.at
    }
}
