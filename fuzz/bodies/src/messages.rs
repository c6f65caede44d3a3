//! Decoding what comes over sockets.

use freeflow_session::{Event, decode_reply, decode_request, encode_reply, encode_request};
use freeflow_types::DeviceLimits;

/// Bytes as a request, a reply and an event: what is understood is what would have been said.
pub fn messages(data: &[u8]) {
    if let Ok(request) = decode_request(data) {
        let _ = request.validate(&DeviceLimits::default());
        let again = encode_request(&request).map(|bytes| decode_request(&bytes));
        assert_eq!(again, Some(Ok(request)));
    }
    if let Ok(reply) = decode_reply(data) {
        let again = encode_reply(&reply).map(|bytes| decode_reply(&bytes));
        assert_eq!(again, Some(Ok(reply)));
    }
    if let Some(event) = Event::decode(data) {
        assert_eq!(Event::decode(&event.encode()), Some(event));
    }
}
