//! What routers say to each other: frames of a length of two bytes, big endian, and a body.
//!
//! The first frame of each side is its [`Preamble`], whose form never changes. All others are
//! [`Message`]s of the version that both then know to be the highest that both speak.

use serde::{Deserialize, Serialize};

/// Longest body of a frame, in bytes.
pub const MAX_FRAME: usize = 1024;

/// Versions of the protocol that this release speaks: from, to.
pub const VERSIONS: (u16, u16) = (1, 1);

/// Least payload bytes of a packet that a router may be able to receive.
pub const MIN_SEGMENT: u32 = 256;

/// Most payload bytes of a packet: those of a UDP datagram over IPv4.
pub const MAX_SEGMENT: u32 = 65_507;

/// Feature: single packets are sent again, and what came out of order is kept.
pub const SELECTIVE: u32 = 1;

/// Feature: the CRC of packets may cover their headers alone.
pub const HEADER_CRC: u32 = 2;

const MAGIC: [u8; 4] = *b"FFLK";

/// The first thing that is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// Lowest version spoken.
    pub from: u16,
    /// Highest version spoken.
    pub to: u16,
}

impl Preamble {
    /// Of this release.
    pub const OURS: Preamble = Preamble {
        from: VERSIONS.0,
        to: VERSIONS.1,
    };

    /// The body of its frame.
    pub fn emit(&self) -> [u8; 8] {
        let [m0, m1, m2, m3] = MAGIC;
        let ([f0, f1], [t0, t1]) = (self.from.to_be_bytes(), self.to.to_be_bytes());
        [m0, m1, m2, m3, f0, f1, t0, t1]
    }

    /// Reads a body. What later releases may add behind it is skipped.
    pub fn parse(body: &[u8]) -> Result<Self, DecodeError> {
        let (&magic, rest) = body.split_first_chunk().ok_or(DecodeError::Malformed)?;
        let (&from, rest) = rest.split_first_chunk().ok_or(DecodeError::Malformed)?;
        let (&to, _) = rest.split_first_chunk().ok_or(DecodeError::Malformed)?;
        let (from, to) = (u16::from_be_bytes(from), u16::from_be_bytes(to));
        if magic != MAGIC || from > to {
            return Err(DecodeError::Malformed);
        }
        Ok(Preamble { from, to })
    }

    /// The highest version that both speak.
    pub fn agree(&self, other: &Preamble) -> Option<u16> {
        let (from, to) = (self.from.max(other.from), self.to.min(other.to));
        (from <= to).then_some(to)
    }
}

/// What is said afterwards, in version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Who it is, and what it can do.
    Hello(Hello),
    /// The other's hello has arrived, and nothing that belongs to an earlier incarnation of the
    /// other is sent to it any more.
    Ready {
        /// The other's incarnation.
        incarnation: u64,
    },
    /// Nothing, so that the other knows that there still is somebody.
    Alive,
}

/// A router introduces itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Random, new at each start, never 0.
    pub incarnation: u64,
    /// Payload bytes of the longest packet that the path to the other takes, as this side sees it:
    /// from [`MIN_SEGMENT`] to [`MAX_SEGMENT`].
    pub segment: u32,
    /// What it can do beside the standard, such as [`SELECTIVE`]; unknown bits are ignored.
    pub features: u32,
}

impl Hello {
    fn is_valid(&self) -> bool {
        self.incarnation != 0 && (MIN_SEGMENT..=MAX_SEGMENT).contains(&self.segment)
    }
}

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Longer than [`MAX_FRAME`].
    #[error(
        "a frame of {0} bytes exceeds the limit of {MAX_FRAME}; is one of the two routers without \
         TLS (--insecure)?"
    )]
    TooLong(usize),
    /// Not the encoding of any message, or with values that cannot be.
    #[error("what it says is not of this protocol")]
    Malformed,
}

/// Encodes a message's body.
pub fn encode(message: &Message) -> Vec<u8> {
    // A message of numbers always has an encoding.
    postcard::to_stdvec(message).unwrap_or_default()
}

/// Decodes a body, which must be one message with nothing behind it.
pub fn decode(body: &[u8]) -> Result<Message, DecodeError> {
    match postcard::take_from_bytes(body) {
        Ok((Message::Hello(hello), _)) if !hello.is_valid() => Err(DecodeError::Malformed),
        Ok((message, [])) => Ok(message),
        _ => Err(DecodeError::Malformed),
    }
}

/// Appends a frame.
pub(crate) fn frame(body: &[u8], out: &mut Vec<u8>) {
    let len = u16::try_from(body.len()).unwrap_or(0);
    out.extend(len.to_be_bytes());
    out.extend(body);
}

/// Bytes that have come, as frames.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    /// How many of them are taken.
    taken: usize,
}

impl Frames {
    /// More has come.
    pub fn add(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.taken);
        self.taken = 0;
        self.bytes.extend(bytes);
    }

    /// The body of the next frame that is complete.
    pub fn take(&mut self) -> Result<Option<Vec<u8>>, DecodeError> {
        let left = self.bytes.get(self.taken..).unwrap_or_default();
        let Some((&len, rest)) = left.split_first_chunk() else {
            return Ok(None);
        };
        let len = usize::from(u16::from_be_bytes(len));
        if len > MAX_FRAME {
            return Err(DecodeError::TooLong(len));
        }
        let Some(body) = rest.get(..len) else {
            return Ok(None);
        };
        self.taken += 2 + len;
        Ok(Some(body.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> impl Strategy<Value = Message> {
        (1u64.., MIN_SEGMENT..=MAX_SEGMENT, any::<u32>()).prop_map(
            |(incarnation, segment, features)| {
                Message::Hello(Hello {
                    incarnation,
                    segment,
                    features,
                })
            },
        )
    }

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![
            hello(),
            any::<u64>().prop_map(|incarnation| Message::Ready { incarnation }),
            Just(Message::Alive),
        ]
    }

    proptest! {
        #[test]
        fn what_is_said_is_heard_whatever_its_pieces(
            messages in proptest::collection::vec(message(), 0..8),
            piece in 1usize..40,
        ) {
            let mut bytes = Vec::new();
            for message in &messages {
                frame(&encode(message), &mut bytes);
            }
            let (mut frames, mut heard) = (Frames::default(), Vec::new());
            for piece in bytes.chunks(piece) {
                frames.add(piece);
                while let Some(body) = frames.take().unwrap() {
                    heard.push(decode(&body).unwrap());
                }
            }
            prop_assert_eq!(heard, messages);
        }

        #[test]
        fn a_message_has_one_encoding_and_nothing_behind_it(message in message(), more in any::<u8>()) {
            let mut body = encode(&message);
            prop_assert!(body.len() <= MAX_FRAME);
            body.push(more);
            prop_assert!(decode(&body).is_err());
        }

        #[test]
        fn a_preamble_is_read_as_it_was_written(a in any::<u16>(), b in any::<u16>(), more: Vec<u8>) {
            let ours = Preamble { from: a.min(b), to: a.max(b) };
            let body = [&ours.emit()[..], &more].concat();
            prop_assert_eq!(Preamble::parse(&body), Ok(ours));
        }
    }

    #[test]
    fn the_highest_common_version_is_spoken() {
        let speaks = |from, to| Preamble { from, to };
        assert_eq!(speaks(1, 3).agree(&speaks(2, 5)), Some(3));
        assert_eq!(speaks(2, 5).agree(&speaks(1, 3)), Some(3));
        assert_eq!(speaks(1, 1).agree(&speaks(2, 3)), None);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let hello = Hello {
            incarnation: 1,
            segment: 1024,
            features: !0,
        };
        assert!(decode(&encode(&Message::Hello(hello))).is_ok());
        for bad in [
            Hello {
                incarnation: 0,
                ..hello
            },
            Hello {
                segment: MIN_SEGMENT - 1,
                ..hello
            },
            Hello {
                segment: MAX_SEGMENT + 1,
                ..hello
            },
        ] {
            assert!(decode(&encode(&Message::Hello(bad))).is_err(), "{bad:?}");
        }
        assert!(decode(&[]).is_err());
        assert!(Preamble::parse(b"FFLK\0\x02\0\x01").is_err());
        assert!(Preamble::parse(b"HTTP\0\x01\0\x01").is_err());
        let mut frames = Frames::default();
        frames.add(&[0xFF, 0xFF]);
        assert_eq!(frames.take(), Err(DecodeError::TooLong(0xFFFF)));
    }
}
