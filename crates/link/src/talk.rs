//! One connection's conversation: bytes and the time go in, bytes and what is heard come out.

use crate::message::{
    DecodeError, Frames, HEADER_CRC, Hello, Message, Preamble, SELECTIVE, decode, encode, frame,
};

/// A side that has said nothing for so long says that it is alive, in nanoseconds.
const SAY_AFTER: u64 = 5_000_000_000;

/// One that has heard nothing for so long takes the other for gone.
const HEAR_WITHIN: u64 = 15_000_000_000;

/// Each side is ready within so long.
const READY_WITHIN: u64 = 5_000_000_000;

/// What both sides can do: each comes to the same result, at every connection of the same two
/// incarnations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The other's incarnation.
    pub incarnation: u64,
    /// Version of the protocol.
    pub version: u16,
    /// Payload bytes of the longest packet, in both directions.
    pub segment: u32,
    /// Whether single packets are sent again.
    pub selective: bool,
    /// Whether the CRC of packets may cover their headers alone.
    pub header_crc: bool,
}

/// What is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The other's incarnation. Whoever has seen to it that nothing of an earlier one is sent to the
    /// other any more calls [`Talk::ready`].
    Hello {
        /// Random, new at each start.
        incarnation: u64,
    },
    /// The other sends nothing of an earlier incarnation of ours any more: the link is up.
    Up(Agreed),
}

/// Why a conversation is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// No version in common.
    #[error(
        "it speaks versions {from} to {to} of the protocol, this router {} to {}; install releases \
         on both hosts that have one in common",
        Preamble::OURS.from, Preamble::OURS.to
    )]
    Version {
        /// Lowest that the other speaks.
        from: u16,
        /// Highest.
        to: u16,
    },
    /// Bytes that are no message.
    #[error(transparent)]
    Malformed(#[from] DecodeError),
    /// A message that does not belong there.
    #[error("it speaks out of turn")]
    Order,
    /// It takes this router for another.
    #[error("it means an earlier incarnation of this router")]
    Mistaken,
    /// The other is this router itself.
    #[error("it is this router itself; the map gives the router's own address to another host")]
    Own,
    /// Nothing is heard any more.
    #[error("it has been silent for {} s", .0 / 1_000_000_000)]
    Silent(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Preamble,
    Hello { version: u16 },
    Ready(Agreed),
    Up,
}

/// One side of a conversation.
#[derive(Debug)]
pub struct Talk {
    offer: Hello,
    stage: Stage,
    frames: Frames,
    out: Vec<u8>,
    began: u64,
    heard: u64,
    said: u64,
}

impl Talk {
    /// Begins to talk.
    pub fn new(offer: Hello, now: u64) -> Self {
        let mut talk = Talk {
            offer,
            stage: Stage::Preamble,
            frames: Frames::default(),
            out: Vec::new(),
            began: now,
            heard: now,
            said: now,
        };
        frame(&Preamble::OURS.emit(), &mut talk.out);
        talk
    }

    /// Whether the link is up.
    pub fn is_up(&self) -> bool {
        self.stage == Stage::Up
    }

    /// Takes what has come; what is heard is appended.
    pub fn receive(&mut self, bytes: &[u8], now: u64, heard: &mut Vec<Heard>) -> Result<(), Ended> {
        self.frames.add(bytes);
        while let Some(body) = self.frames.take()? {
            self.heard = now;
            self.hear(&body, now, heard)?;
        }
        Ok(())
    }

    fn hear(&mut self, body: &[u8], now: u64, heard: &mut Vec<Heard>) -> Result<(), Ended> {
        if self.stage == Stage::Preamble {
            let theirs = Preamble::parse(body)?;
            let Preamble { from, to } = theirs;
            let version = Preamble::OURS.agree(&theirs);
            let version = version.ok_or(Ended::Version { from, to })?;
            self.stage = Stage::Hello { version };
            self.say(&Message::Hello(self.offer), now);
            return Ok(());
        }
        match (self.stage, decode(body)?) {
            (Stage::Hello { version }, Message::Hello(theirs)) => {
                let incarnation = theirs.incarnation;
                if incarnation == self.offer.incarnation {
                    return Err(Ended::Own);
                }
                let features = self.offer.features & theirs.features;
                self.stage = Stage::Ready(Agreed {
                    incarnation,
                    version,
                    segment: self.offer.segment.min(theirs.segment),
                    selective: features & SELECTIVE != 0,
                    header_crc: features & HEADER_CRC != 0,
                });
                heard.push(Heard::Hello { incarnation });
            }
            (Stage::Ready(agreed), Message::Ready { incarnation }) => {
                if incarnation != self.offer.incarnation {
                    return Err(Ended::Mistaken);
                }
                self.stage = Stage::Up;
                heard.push(Heard::Up(agreed));
            }
            (Stage::Ready(_) | Stage::Up, Message::Alive) => {}
            _ => return Err(Ended::Order),
        }
        Ok(())
    }

    /// Nothing of an earlier incarnation of the other is sent to it any more.
    pub fn ready(&mut self, incarnation: u64, now: u64) {
        self.say(&Message::Ready { incarnation }, now);
    }

    fn say(&mut self, message: &Message, now: u64) {
        frame(&encode(message), &mut self.out);
        self.said = now;
    }

    /// Looks at the time.
    pub fn on_time(&mut self, now: u64) -> Result<(), Ended> {
        let (since, patience) = match self.stage {
            Stage::Up => (self.heard, HEAR_WITHIN),
            _ => (self.began, READY_WITHIN),
        };
        let silent = now.saturating_sub(since);
        if silent >= patience {
            return Err(Ended::Silent(silent));
        }
        if self.is_up() && now.saturating_sub(self.said) >= SAY_AFTER {
            self.say(&Message::Alive, now);
        }
        Ok(())
    }

    /// When [`Self::on_time`] is to be called at the latest.
    pub fn next_timeout(&self) -> u64 {
        match self.stage {
            Stage::Up => (self.heard + HEAR_WITHIN).min(self.said + SAY_AFTER),
            _ => self.began + READY_WITHIN,
        }
    }

    /// What is to be sent.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn offer(incarnation: u64, segment: u32, features: u32) -> Hello {
        Hello {
            incarnation,
            segment,
            features,
        }
    }

    /// Moves bytes until nobody has any more to say; what each has heard.
    fn converse(a: &mut Talk, b: &mut Talk, now: u64) -> [Vec<Heard>; 2] {
        let mut heard = [Vec::new(), Vec::new()];
        loop {
            let (to_b, to_a) = (a.take_output(), b.take_output());
            if to_a.is_empty() && to_b.is_empty() {
                return heard;
            }
            for (n, (talk, bytes)) in [(&mut *a, to_a), (&mut *b, to_b)].into_iter().enumerate() {
                let mut new = Vec::new();
                talk.receive(&bytes, now, &mut new).unwrap();
                for &what in &new {
                    if let Heard::Hello { incarnation } = what {
                        talk.ready(incarnation, now);
                    }
                }
                heard[n].extend(new);
            }
        }
    }

    #[test]
    fn both_agree_on_what_both_can() {
        let mut a = Talk::new(offer(7, 8192, SELECTIVE | HEADER_CRC), 0);
        let mut b = Talk::new(offer(9, 1408, SELECTIVE | 4), 0);
        let [by_a, by_b] = converse(&mut a, &mut b, 1);
        let agreed = |incarnation| Agreed {
            incarnation,
            version: 1,
            segment: 1408,
            selective: true,
            header_crc: false,
        };
        let heard = |incarnation| [Heard::Hello { incarnation }, Heard::Up(agreed(incarnation))];
        assert_eq!((by_a, by_b), (heard(9).to_vec(), heard(7).to_vec()));
        assert!(a.is_up() && b.is_up());
    }

    #[test]
    fn nothing_is_up_before_the_other_has_forgotten_what_was() {
        let mut a = Talk::new(offer(7, 1024, 0), 0);
        let mut b = Talk::new(offer(9, 1024, 0), 0);
        let mut heard = Vec::new();
        a.receive(&b.take_output(), 0, &mut heard).unwrap();
        b.receive(&a.take_output(), 0, &mut heard).unwrap();
        a.receive(&b.take_output(), 0, &mut heard).unwrap();
        let hello = |incarnation| Heard::Hello { incarnation };
        assert_eq!(heard, [hello(7), hello(9)]);
        assert!(!a.is_up() && !b.is_up());
        // What it says is for another.
        a.ready(8, 0);
        let mistaken = b.receive(&a.take_output(), 0, &mut heard);
        assert_eq!(mistaken, Err(Ended::Mistaken));
    }

    #[test]
    fn a_link_without_traffic_lives_and_one_without_a_peer_does_not() {
        let mut a = Talk::new(offer(7, 1024, 0), 0);
        let mut b = Talk::new(offer(9, 1024, 0), 0);
        converse(&mut a, &mut b, 0);
        for second in 1..100 {
            let now = second * SECOND;
            a.on_time(now).unwrap();
            b.on_time(now).unwrap();
            converse(&mut a, &mut b, now);
        }
        let last = 99 * SECOND;
        assert!(a.next_timeout() > last);
        let mut now = last;
        while a.on_time(now).is_ok() {
            a.take_output();
            assert!(a.next_timeout() > now, "a timer of the past");
            now = a.next_timeout();
        }
        assert!(now <= last + HEAR_WITHIN);
    }

    #[test]
    fn who_says_nothing_is_not_waited_for() {
        let mut a = Talk::new(offer(7, 1024, 0), 0);
        a.on_time(READY_WITHIN - 1).unwrap();
        assert_eq!(a.next_timeout(), READY_WITHIN);
        assert_eq!(a.on_time(READY_WITHIN), Err(Ended::Silent(READY_WITHIN)));
        // Chatter is no progress.
        let mut b = Talk::new(offer(9, 1024, 0), 0);
        let mut heard = Vec::new();
        b.receive(&a.take_output(), READY_WITHIN - 1, &mut heard)
            .unwrap();
        assert!(b.on_time(READY_WITHIN).is_err());
    }

    #[test]
    fn versions_without_one_in_common_are_told() {
        let mut a = Talk::new(offer(7, 1024, 0), 0);
        let mut theirs = Vec::new();
        frame(&Preamble { from: 2, to: 3 }.emit(), &mut theirs);
        let ended = a.receive(&theirs, 0, &mut Vec::new()).unwrap_err();
        assert_eq!(ended, Ended::Version { from: 2, to: 3 });
        assert!(ended.to_string().contains("2 to 3"), "{ended}");
    }

    #[test]
    fn it_is_not_itself() {
        let mut a = Talk::new(offer(7, 1024, 0), 0);
        let mut b = Talk::new(offer(7, 1024, 0), 0);
        let mut heard = Vec::new();
        b.receive(&a.take_output(), 0, &mut heard).unwrap();
        let ended = a.receive(&b.take_output(), 0, &mut heard);
        assert_eq!(ended, Err(Ended::Own));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_borne(bytes: Vec<u8>, good in 0usize..4, piece in 1usize..50) {
            let mut theirs = Vec::new();
            if good > 0 {
                frame(&Preamble::OURS.emit(), &mut theirs);
            }
            if good > 1 {
                frame(&encode(&Message::Hello(offer(9, 1024, 1))), &mut theirs);
            }
            if good > 2 {
                frame(&encode(&Message::Ready { incarnation: 7 }), &mut theirs);
            }
            theirs.extend(bytes);
            let mut a = Talk::new(offer(7, 1024, 1), 0);
            let mut heard = Vec::new();
            for piece in theirs.chunks(piece) {
                if a.receive(piece, 1, &mut heard).is_err() {
                    break;
                }
            }
            prop_assert!(heard.len() <= 2);
            prop_assert_eq!(a.is_up(), heard.len() == 2);
        }
    }
}
