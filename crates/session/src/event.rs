//! Events that the router sends on a completion channel or a context's event stream: 16 bytes
//! each, one packet each.

use freeflow_types::AsyncEventType;

use crate::Handle;

/// An event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A completion queue that was armed has a new completion.
    Completion(Handle),
    /// Asynchronous event of a completion queue.
    Cq(AsyncEventType, Handle),
    /// Asynchronous event of a queue pair.
    Qp(AsyncEventType, Handle),
    /// Asynchronous event of the port.
    Port(AsyncEventType),
    /// Asynchronous event of a shared receive queue.
    Srq(AsyncEventType, Handle),
    /// Asynchronous event of an XRC receive queue pair, to one of those who opened it.
    XrcQp(AsyncEventType, Handle),
}

impl Event {
    /// Bytes of an encoded event.
    pub const BYTES: usize = 16;

    /// Encodes: kind, event type, handle, zero; little endian.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let (kind, event, handle) = match self {
            Event::Completion(cq) => (1, 0, cq.0),
            Event::Cq(event, cq) => (2, event.raw(), cq.0),
            Event::Qp(event, qp) => (3, event.raw(), qp.0),
            Event::Port(event) => (4, event.raw(), 0),
            Event::Srq(event, srq) => (5, event.raw(), srq.0),
            Event::XrcQp(event, open) => (6, event.raw(), open.0),
        };
        let mut bytes = [0; Self::BYTES];
        for (at, word) in [kind, event, handle].into_iter().enumerate() {
            bytes[at * 4..at * 4 + 4].copy_from_slice(&u32::to_le_bytes(word));
        }
        bytes
    }

    /// Decodes; `None` if it is no event of this version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let (kind, event, handle) = (word(0)?, word(4)?, Handle(word(8)?));
        let event = AsyncEventType::from_raw(event)?;
        match kind {
            1 => Some(Event::Completion(handle)),
            2 => Some(Event::Cq(event, handle)),
            3 => Some(Event::Qp(event, handle)),
            4 => Some(Event::Port(event)),
            5 => Some(Event::Srq(event, handle)),
            6 => Some(Event::XrcQp(event, handle)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_round_trip() {
        let handle = Handle(0xABCD_0123);
        for event in [
            Event::Completion(handle),
            Event::Cq(AsyncEventType::CqErr, handle),
            Event::Qp(AsyncEventType::CommEst, handle),
            Event::Port(AsyncEventType::PortErr),
            Event::Srq(AsyncEventType::SrqLimitReached, handle),
            Event::XrcQp(AsyncEventType::QpFatal, handle),
        ] {
            assert_eq!(Event::decode(&event.encode()), Some(event));
        }
        assert_eq!(Event::decode(&[9; 16]), None);
        assert_eq!(Event::decode(&[1; 3]), None);
    }
}
