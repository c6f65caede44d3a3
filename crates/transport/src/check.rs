//! Which send requests are legal, whoever executes them.

use freeflow_types::{MAX_MESSAGE, Mtu, Opcode, QpCap, QpType, SendFlags};

use crate::qp::Outcome;

/// Why a send request is refused (`ibv_post_send(3)`: EINVAL).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// The transport service does not have the operation (IBTA volume 1, table 61).
    #[error("operation {0:?} does not exist on {1:?}")]
    Opcode(Opcode, QpType),
    /// More elements than the queue pair was created for.
    #[error("{0} elements, at most {1}")]
    Elements(u32, u32),
    /// Inline data with an operation that sends none.
    #[error("operation {0:?} cannot be inline")]
    InlineOpcode(Opcode),
    /// More inline bytes than the queue pair was created for.
    #[error("{0} inline bytes, at most {1}")]
    Inline(u64, u32),
    /// An atomic, or an atomic write that is not inline, is of one element; all are of 8 bytes.
    #[error("an atomic of {0} elements and {1} bytes")]
    Atomic(u32, u64),
    /// Operations on memory windows, and flushes, have no data of their own.
    #[error("operation {0:?} with {1} elements and {2} bytes")]
    Data(Opcode, u32, u64),
    /// A datagram fits one packet, a message 2^31 bytes.
    #[error("{0} bytes, at most {1}")]
    Length(u64, u64),
}

impl PostError {
    /// How a request fails that was posted all the same.
    pub fn outcome(self) -> Outcome {
        match self {
            PostError::Length(..) => Outcome::LocalLength,
            _ => Outcome::LocalQpOperation,
        }
    }
}

/// Checks a send request of `elements` and `len` bytes in all.
pub fn check_send(
    qp_type: QpType,
    cap: &QpCap,
    opcode: Opcode,
    flags: SendFlags,
    elements: u32,
    len: u64,
    mtu: Mtu,
) -> Result<(), PostError> {
    if !opcode.allowed_on(qp_type) {
        return Err(PostError::Opcode(opcode, qp_type));
    }
    if flags.contains(SendFlags::INLINE) {
        if opcode.is_read_like() {
            return Err(PostError::InlineOpcode(opcode));
        }
        if len > cap.max_inline.into() {
            return Err(PostError::Inline(len, cap.max_inline));
        }
    } else if elements > cap.max_send_sge {
        return Err(PostError::Elements(elements, cap.max_send_sge));
    }
    let one = elements == 1 || flags.contains(SendFlags::INLINE);
    if opcode.is_word() && (!one || len != 8) {
        return Err(PostError::Atomic(elements, len));
    }
    if (opcode.is_local() || opcode == Opcode::Flush) && (elements, len) != (0, 0) {
        return Err(PostError::Data(opcode, elements, len));
    }
    let longest = if qp_type == QpType::Ud {
        mtu.bytes().into()
    } else {
        MAX_MESSAGE
    };
    if len > longest {
        Err(PostError::Length(len, longest))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAP: QpCap = QpCap {
        max_send_wr: 1,
        max_recv_wr: 1,
        max_send_sge: 2,
        max_recv_sge: 1,
        max_inline: 64,
    };

    fn check(t: QpType, o: Opcode, f: SendFlags, n: u32, len: u64) -> Result<(), PostError> {
        check_send(t, &CAP, o, f, n, len, Mtu::B4096)
    }

    #[test]
    fn limits_are_exact() {
        let (none, inline) = (SendFlags::empty(), SendFlags::INLINE);
        let (rc, ud) = (QpType::Rc, QpType::Ud);
        assert_eq!(check(rc, Opcode::Send, none, 2, MAX_MESSAGE), Ok(()));
        assert_eq!(
            check(rc, Opcode::Send, none, 2, MAX_MESSAGE + 1),
            Err(PostError::Length(MAX_MESSAGE + 1, MAX_MESSAGE))
        );
        assert_eq!(
            check(rc, Opcode::Send, none, 3, 1),
            Err(PostError::Elements(3, 2))
        );
        assert_eq!(check(rc, Opcode::RdmaWrite, inline, 9, 64), Ok(()));
        assert_eq!(
            check(rc, Opcode::RdmaWrite, inline, 1, 65),
            Err(PostError::Inline(65, 64))
        );
        assert_eq!(
            check(rc, Opcode::RdmaRead, inline, 1, 1),
            Err(PostError::InlineOpcode(Opcode::RdmaRead))
        );
        assert_eq!(check(rc, Opcode::FetchAdd, none, 1, 8), Ok(()));
        assert_eq!(
            check(rc, Opcode::FetchAdd, none, 1, 4),
            Err(PostError::Atomic(1, 4))
        );
        assert_eq!(check(rc, Opcode::AtomicWrite, none, 1, 8), Ok(()));
        assert_eq!(check(rc, Opcode::AtomicWrite, inline, 0, 8), Ok(()));
        assert_eq!(
            check(rc, Opcode::AtomicWrite, none, 2, 8),
            Err(PostError::Atomic(2, 8))
        );
        assert_eq!(
            check(rc, Opcode::AtomicWrite, inline, 0, 7),
            Err(PostError::Atomic(0, 7))
        );
        for bare in [Opcode::BindMw, Opcode::LocalInv, Opcode::Flush] {
            assert_eq!(check(rc, bare, none, 0, 0), Ok(()));
            assert_eq!(
                check(rc, bare, none, 1, 0),
                Err(PostError::Data(bare, 1, 0))
            );
            assert_eq!(
                check(rc, bare, inline, 0, 1),
                Err(PostError::Data(bare, 0, 1))
            );
        }
        assert_eq!(check(ud, Opcode::Send, none, 1, 4096), Ok(()));
        assert_eq!(
            check(ud, Opcode::Send, none, 1, 4097),
            Err(PostError::Length(4097, 4096))
        );
        assert_eq!(
            check(ud, Opcode::RdmaWrite, none, 1, 1),
            Err(PostError::Opcode(Opcode::RdmaWrite, ud))
        );
    }
}
