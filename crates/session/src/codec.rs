//! Encoding: postcard, one message per packet, nothing after it.

use serde::{Serialize, de::DeserializeOwned};

use crate::{Errno, MAX_MESSAGE_BYTES, Reply, Request};

/// Why bytes are not a message.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Longer than [`MAX_MESSAGE_BYTES`].
    #[error("message of {0} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")]
    TooLong(usize),
    /// Not the encoding of any message.
    #[error("bytes are no message of this protocol version")]
    Malformed,
    /// A message, and then more.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(DecodeError::TooLong(bytes.len()));
    }
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(DecodeError::Trailing(rest.len())),
        Err(_) => Err(DecodeError::Malformed),
    }
}

fn encode<T: Serialize>(message: &T) -> Option<Vec<u8>> {
    let bytes = postcard::to_stdvec(message).ok()?;
    (bytes.len() <= MAX_MESSAGE_BYTES).then_some(bytes)
}

/// Decodes what a library sent.
pub fn decode_request(bytes: &[u8]) -> Result<Request, DecodeError> {
    decode(bytes)
}

/// Encodes a request; `None` if it exceeds [`MAX_MESSAGE_BYTES`].
pub fn encode_request(request: &Request) -> Option<Vec<u8>> {
    encode(request)
}

/// Decodes what a router answered.
pub fn decode_reply(bytes: &[u8]) -> Result<Result<Reply, Errno>, DecodeError> {
    decode(bytes)
}

/// Encodes an answer; `None` if it exceeds [`MAX_MESSAGE_BYTES`].
pub fn encode_reply(reply: &Result<Reply, Errno>) -> Option<Vec<u8>> {
    encode(reply)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Handle;

    #[test]
    fn round_trip_and_trailing_bytes() {
        let request = Request::AllocPd { context: Handle(7) };
        let mut bytes = encode_request(&request).unwrap();
        assert_eq!(decode_request(&bytes), Ok(request));
        bytes.push(0);
        assert_eq!(decode_request(&bytes), Err(DecodeError::Trailing(1)));
        let reply = Err(Errno(12));
        assert_eq!(decode_reply(&encode_reply(&reply).unwrap()), Ok(reply));
    }

    #[test]
    fn garbage_is_refused() {
        assert_eq!(decode_request(&[0xFF; 64]), Err(DecodeError::Malformed));
        assert_eq!(decode_request(&[]), Err(DecodeError::Malformed));
        let long = vec![0; MAX_MESSAGE_BYTES + 1];
        assert_eq!(
            decode_request(&long),
            Err(DecodeError::TooLong(MAX_MESSAGE_BYTES + 1))
        );
    }
}
