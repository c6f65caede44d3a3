//! One connection, or one look-up of a datagram service: a state, the message that is repeated
//! until it is answered, and what the two sides agreed on.

use freeflow_session::CmDetail;
use freeflow_types::{Gid, Psn, QpType, Qpn};
use freeflow_wire::cm::{Mad, Message, Mra, Rej, Rejected, Rep, SidrRep};
use serde::{Deserialize, Serialize};

use crate::id::Port;
use crate::manager::Output;

/// Code of the time in which the other side must answer (Linux: `CMA_CM_RESPONSE_TIMEOUT`).
pub(crate) const RESPONSE_TIMEOUT: u8 = 20;

/// How often a message is repeated (`CMA_MAX_CM_RETRIES`).
pub(crate) const MAX_RETRIES: u8 = 15;

/// Code of a packet's lifetime on RoCE (`CMA_IBOE_PACKET_LIFETIME`).
pub(crate) const PACKET_LIFETIME: u8 = 18;

/// Code of the time that a program has to accept, once the other side asks again
/// (`CMA_CM_MRA_SETTING`).
const SERVICE_TIMEOUT: u8 = 24;

/// Codes of times from outside are not taken for more than that, some two minutes: no message
/// makes anything wait for hours.
const LONGEST_TIMEOUT: u8 = 25;

/// Nanoseconds of a code, as Linux counts them: 2^(code - 8) milliseconds.
pub(crate) fn timeout_ns(code: u8) -> u64 {
    let code = code.min(LONGEST_TIMEOUT);
    1_000_000 << code.saturating_sub(8)
}

/// States (IBTA volume 1, 12.9.6), without those that differ in a receipt alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum State {
    ReqSent,
    ReqRcvd,
    RepSent,
    RepRcvd,
    Established,
    DreqSent,
    DreqRcvd,
    TimeWait,
    SidrReqSent,
    SidrReqRcvd,
    /// Answered; the answer is kept for requests that come again.
    SidrAnswered,
    /// It came to nothing, or is over.
    Closed,
}

/// What a connection's id is to be told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Told {
    Response {
        detail: CmDetail,
        private: Vec<u8>,
        ece: Option<(u32, u32)>,
    },
    Established,
    Service {
        qpn: Qpn,
        qkey: u32,
        private: Vec<u8>,
    },
    Rejected {
        reason: u16,
        private: Vec<u8>,
    },
    /// With the status of an answer, or none if there was no answer.
    Unreachable {
        status: Option<u8>,
        private: Vec<u8>,
    },
    Disconnected {
        answered: bool,
    },
    TimewaitExit,
}

/// What a queue pair gets of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Agreed {
    pub(crate) qp_type: QpType,
    pub(crate) remote_qpn: u32,
    /// First number of what this side receives: its own choice.
    pub(crate) rq_psn: u32,
    /// First number of what this side sends: the other side's choice.
    pub(crate) sq_psn: u32,
    pub(crate) responder_resources: u8,
    pub(crate) initiator_depth: u8,
    pub(crate) retry_count: u8,
    pub(crate) rnr_retry_count: u8,
    /// Code, 1 to 5.
    pub(crate) path_mtu: u8,
    pub(crate) traffic_class: u8,
    pub(crate) flow_label: u32,
    pub(crate) ack_timeout: u8,
}

/// A connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Connection {
    /// This side's name for it.
    pub(crate) local: u32,
    /// The other side's; 0 until it is known.
    pub(crate) remote: u32,
    /// The id it is of; none once that is gone.
    pub(crate) id: Option<u32>,
    pub(crate) port: Port,
    pub(crate) peer: Gid,
    pub(crate) state: State,
    /// This side began it.
    pub(crate) active: bool,
    pub(crate) transaction: u64,
    pub(crate) local_qpn: u32,
    pub(crate) agreed: Agreed,
    /// What is sent until it is answered, or answers what comes again.
    pub(crate) message: Vec<u8>,
    pub(crate) retries: u8,
    /// Nanoseconds between repeats.
    pub(crate) interval: u64,
    pub(crate) deadline: Option<u64>,
    /// The other side has asked for more time since the message was sent last: it may do so once.
    pub(crate) receipt: bool,
    /// The deadline that the manager's timers know.
    pub(crate) armed: Option<u64>,
}

impl Connection {
    /// Sends a message.
    pub(crate) fn send(&mut self, message: Message, out: &mut Vec<Output>) {
        self.keep(message, 0);
        self.again(out);
    }

    fn keep(&mut self, message: Message, modifier: u32) {
        self.message = emit(self.transaction, modifier, message).unwrap_or_default();
    }

    /// Sends the last message again.
    pub(crate) fn again(&self, out: &mut Vec<Output>) {
        if self.message.is_empty() {
            return;
        }
        out.push(Output::Send {
            from: self.port,
            to: self.peer,
            mad: self.message.clone(),
        });
    }

    /// Sends a message beside the one that is kept.
    fn answer(&self, message: Message, out: &mut Vec<Output>) {
        if let Some(mad) = emit(self.transaction, 0, message) {
            out.push(Output::Send {
                from: self.port,
                to: self.peer,
                mad,
            });
        }
    }

    /// Sends a message, from `at` on, until it is answered.
    pub(crate) fn send_until_answered(
        &mut self,
        (now, at): (u64, u64),
        (message, modifier): (Message, u32),
        out: &mut Vec<Output>,
    ) {
        self.keep(message, modifier);
        self.receipt = false;
        if at > now {
            self.deadline = Some(at);
            self.retries = self.retries.saturating_add(1);
        } else {
            self.again(out);
            self.deadline = Some(now.saturating_add(self.interval));
        }
    }

    pub(crate) fn close(&mut self) {
        self.state = State::Closed;
        self.deadline = None;
    }

    pub(crate) fn enter_time_wait(&mut self, now: u64) {
        self.state = State::TimeWait;
        let code = self.agreed.ack_timeout.clamp(1, RESPONSE_TIMEOUT);
        self.deadline = Some(now.saturating_add(timeout_ns(code)));
    }

    /// It was rejected: that is said again if the other side asks again, and what comes late of it
    /// is not taken for something new.
    pub(crate) fn wait_out(&mut self, now: u64) {
        self.state = State::TimeWait;
        let again = 2 * timeout_ns(RESPONSE_TIMEOUT);
        self.deadline = Some(now.saturating_add(again));
    }

    /// The time has come that its deadline names.
    pub(crate) fn on_timeout(&mut self, now: u64, out: &mut Vec<Output>) -> Option<Told> {
        self.deadline = None;
        let (retried, nobody) = match self.state {
            State::ReqSent | State::RepSent | State::SidrReqSent => {
                let (status, private) = (None, Vec::new());
                (true, Some(Told::Unreachable { status, private }))
            }
            State::DreqSent => (true, Some(Told::Disconnected { answered: false })),
            State::TimeWait => (false, Some(Told::TimewaitExit)),
            _ => (false, None),
        };
        if retried && self.retries > 0 {
            self.retries -= 1;
            self.receipt = false;
            self.again(out);
            self.deadline = Some(now.saturating_add(self.interval));
            return None;
        }
        match self.state {
            State::DreqSent => self.enter_time_wait(now),
            _ if nobody.is_some() => self.close(),
            _ => {}
        }
        nobody
    }

    /// A message has come that names this connection.
    pub(crate) fn on_message(
        &mut self,
        now: u64,
        mad: &Mad,
        out: &mut Vec<Output>,
    ) -> Option<Told> {
        match (&mad.message, self.state) {
            (Message::Req(_), State::ReqRcvd) => {
                self.acknowledge(Rejected::Req, out);
                None
            }
            (Message::Rep(rep), State::ReqSent) => Some(self.on_rep(rep, mad)),
            (Message::Rep(_), State::RepRcvd) => {
                self.acknowledge(Rejected::Rep, out);
                None
            }
            // An answer to what is over, which was lost.
            (Message::Req(_), State::TimeWait) => {
                self.again(out);
                None
            }
            // Too late: this side does not wait any more.
            (Message::Rep(rep), State::Closed) if self.active => {
                self.remote = rep.local_id;
                if let Ok(rej) = self.rej(Rej::TIMEOUT, &[]) {
                    self.answer(rej, out);
                }
                None
            }
            // The last message of the hand-shake was lost, or this one came late.
            (Message::Rep(_), State::Established) if self.active => {
                self.answer(self.rtu(), out);
                None
            }
            (Message::Rtu(_), State::RepSent) => {
                self.state = State::Established;
                self.deadline = None;
                Some(Told::Established)
            }
            (Message::Mra(mra), State::ReqSent) if mra.message == Rejected::Req => {
                self.wait_longer(now, mra.service_timeout)
            }
            (Message::Mra(mra), State::RepSent) if mra.message == Rejected::Rep => {
                self.wait_longer(now, mra.service_timeout)
            }
            (Message::Rej(rej), _) => self.on_rej(now, rej),
            (Message::Dreq(dreq), _) => {
                // It must know which queue pair it disconnects.
                if dreq.qpn != self.local_qpn {
                    return None;
                }
                self.on_dreq(now, mad.transaction, out)
            }
            (Message::Drep(_), State::DreqSent) => {
                self.enter_time_wait(now);
                Some(Told::Disconnected { answered: true })
            }
            (Message::SidrReq(_), State::SidrAnswered) => {
                self.again(out);
                None
            }
            (Message::SidrRep(rep), State::SidrReqSent) => {
                self.close();
                let private = rep.private.to_vec();
                Some(if rep.status == SidrRep::VALID {
                    Told::Service {
                        qpn: Qpn::new(rep.qpn),
                        qkey: rep.qkey,
                        private,
                    }
                } else {
                    let status = Some(rep.status);
                    Told::Unreachable { status, private }
                })
            }
            _ => None,
        }
    }

    fn on_rep(&mut self, rep: &Rep, mad: &Mad) -> Told {
        self.state = State::RepRcvd;
        self.deadline = None;
        self.remote = rep.local_id;
        // The side of XRC that only receives has its number in another place.
        let qpn = match self.agreed.qp_type {
            QpType::XrcSend => rep.local_eecn,
            _ => rep.qpn,
        };
        self.agreed.remote_qpn = qpn;
        self.agreed.sq_psn = rep.psn.get();
        self.agreed.initiator_depth = rep.responder_resources;
        self.agreed.responder_resources = rep.initiator_depth;
        self.agreed.rnr_retry_count = rep.rnr_retry_count;
        let detail = CmDetail::Connection {
            responder_resources: rep.initiator_depth,
            initiator_depth: rep.responder_resources,
            flow_control: rep.end_to_end_flow_control,
            retry_count: 0,
            rnr_retry_count: rep.rnr_retry_count,
            srq: rep.srq,
            qpn: Qpn::new(qpn),
            psn: Psn::new(rep.psn.get()),
        };
        Told::Response {
            detail,
            private: rep.private.to_vec(),
            ece: crate::handshake::ece(rep.vendor_id, mad.modifier),
        }
    }

    fn on_rej(&mut self, now: u64, rej: &Rej) -> Option<Told> {
        if rej.message == Rejected::Req && self.active && self.state != State::ReqSent {
            // Late: the request was accepted, after all.
            return None;
        }
        match self.state {
            State::ReqSent if rej.reason != Rej::STALE_CONNECTION => self.close(),
            State::ReqSent
            | State::ReqRcvd
            | State::RepSent
            | State::RepRcvd
            | State::Established
            | State::DreqSent => self.enter_time_wait(now),
            _ => return None,
        }
        Some(Told::Rejected {
            reason: rej.reason,
            private: rej.private.to_vec(),
        })
    }

    fn on_dreq(&mut self, now: u64, transaction: u64, out: &mut Vec<Output>) -> Option<Told> {
        match self.state {
            State::Established | State::RepSent => {
                self.transaction = transaction;
                self.state = State::DreqRcvd;
                self.deadline = None;
                Some(Told::Disconnected { answered: true })
            }
            // Both sides began at once.
            State::DreqSent => {
                self.transaction = transaction;
                self.answer(self.drep(), out);
                self.enter_time_wait(now);
                Some(Told::Disconnected { answered: true })
            }
            State::TimeWait | State::Closed => {
                self.transaction = transaction;
                self.answer(self.drep(), out);
                None
            }
            _ => None,
        }
    }

    fn acknowledge(&self, message: Rejected, out: &mut Vec<Output>) {
        let receipt = Mra {
            local_id: self.local,
            remote_id: self.remote,
            message,
            service_timeout: SERVICE_TIMEOUT,
            private: [0; 222],
        };
        self.answer(Message::Mra(receipt), out);
    }

    fn wait_longer(&mut self, now: u64, code: u8) -> Option<Told> {
        if std::mem::replace(&mut self.receipt, true) {
            return None;
        }
        let wait = timeout_ns(code).saturating_add(timeout_ns(self.agreed.ack_timeout));
        self.deadline = Some(now.saturating_add(wait));
        None
    }
}

pub(crate) fn emit(transaction: u64, modifier: u32, message: Message) -> Option<Vec<u8>> {
    let mad = Mad {
        transaction,
        modifier,
        message,
    };
    mad.emit().ok().map(Vec::from)
}
