//! What another router says over a link.

use freeflow_link::{Frames, Heard, Hello, MAX_FRAME, SELECTIVE, Talk, decode, encode};

/// Bytes as a peer's side of a conversation, in pieces as long as the first byte says; and as one
/// message: what is understood is what would have been said.
pub fn links(data: &[u8]) {
    if let Ok(message) = decode(data) {
        assert_eq!(decode(&encode(&message)), Ok(message));
    }
    let Some((&piece, said)) = data.split_first() else {
        return;
    };
    let mut frames = Frames::default();
    frames.add(said);
    while let Ok(Some(body)) = frames.take() {
        assert!(body.len() <= MAX_FRAME);
    }
    let offer = Hello {
        incarnation: 1,
        segment: 4096,
        features: SELECTIVE,
    };
    let mut talk = Talk::new(offer, 0);
    let mut heard = Vec::new();
    for (n, piece) in said.chunks(usize::from(piece).max(1)).enumerate() {
        let now = n as u64;
        if talk.receive(piece, now, &mut heard).is_err() || talk.on_time(now).is_err() {
            break;
        }
        assert!(talk.next_timeout() > now);
    }
    match heard[..] {
        [] | [Heard::Hello { .. }] => assert!(!talk.is_up()),
        [Heard::Hello { incarnation }, Heard::Up(agreed)] => {
            assert!(talk.is_up() && incarnation == agreed.incarnation);
            assert!(incarnation > 1 && agreed.segment <= offer.segment);
        }
        _ => panic!("heard {heard:?}"),
    }
}
