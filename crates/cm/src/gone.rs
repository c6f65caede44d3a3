//! Answers in the name of an address that nobody has.

use freeflow_wire::cm::{Drep, Mad, Message, Rej, Rejected, SidrRep};

use crate::connection::emit;

/// What a message is answered with that is for an address which nobody has, or has any more, so
/// that its sender does not wait in vain: who asks for a connection or a service is rejected, and
/// who asks for an end is told that it has come. None if nobody waits for an answer; and, unless it is
/// `sure` that the other side is gone, for messages of what has begun: it may only be out of reach.
pub fn answer_for_the_gone(mad: &[u8], sure: bool) -> Option<Vec<u8>> {
    let mad = Mad::parse(mad).ok()?;
    let answer = match mad.message {
        Message::Req(req) => {
            Message::Rej(Rej::new(0, req.local_id, Rejected::Req, Rej::INVALID_GID))
        }
        Message::Rep(rep) if sure => Message::Rej(Rej::new(
            rep.remote_id,
            rep.local_id,
            Rejected::Rep,
            Rej::INVALID_COMM_ID,
        )),
        Message::Dreq(dreq) if sure => Message::Drep(Drep::new(dreq.remote_id, dreq.local_id)),
        Message::SidrReq(req) => Message::SidrRep(SidrRep::without_qp(&req, SidrRep::UNSUPPORTED)),
        _ => return None,
    };
    emit(mad.transaction, mad.modifier, answer)
}
