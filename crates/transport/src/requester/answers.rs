//! What the peer's answers do to the requester.

use freeflow_types::{Opcode, WcStatus, rnr_timer_ns};
use freeflow_wire::{BthOpcode, Headers, NakCode, Service, Syndrome};

use super::{Fate, HEADER_BYTES, Part, Requester, RequesterEvent, Sample};
use crate::connection::extend;
use crate::selective::{self, Selective};

/// RNR retry count that means "for ever" (`ibv_modify_qp(3)`).
const RNR_FOR_EVER: u8 = 7;

impl Requester {
    /// An answer, or a notification of congestion, has come, with so many bytes of payload. What
    /// it means is appended to `events`. Answers to nothing that is under way are ignored.
    pub fn on_response(
        &mut self,
        headers: &Headers,
        payload: usize,
        now: u64,
        events: &mut Vec<RequesterEvent>,
    ) {
        let opcode = headers.bth.opcode;
        if opcode == BthOpcode::CNP {
            return self.on_congestion();
        }
        let ours = opcode.is_response()
            && opcode.service() == self.connection.service()
            && self.connection.qp_type.is_reliable();
        if self.dead || !ours || self.flight.is_empty() {
            return;
        }
        if self.connection.selective
            && let Some(report) = Selective::read(headers)
        {
            self.on_selective(report, now, events);
            return self.settle(events);
        }
        let at = extend(self.flight.oldest(), headers.bth.psn);
        if at < self.flight.oldest() || at >= self.flight.end() {
            return;
        }
        match (opcode.with_service(Service::Rc), headers.aeth) {
            (BthOpcode::RC_ACK, Some(aeth)) => match aeth.syndrome {
                Syndrome::Ack { .. } => {
                    let missing = self.acknowledge(at + 1, now, events);
                    self.repair(missing);
                }
                Syndrome::RnrNak { timer } => self.on_not_ready(at, timer, now, events),
                Syndrome::Nak(code) => self.on_nak(at, code, now, events),
                Syndrome::Reserved(_) => {}
            },
            (BthOpcode::RC_ATOMIC_ACK, _) => {
                if let Some(value) = headers.atomic_ack {
                    self.on_result(at, value, now, events);
                }
            }
            _ if opcode.is_read_response() => self.on_data(at, payload, now, events),
            _ => {}
        }
        self.settle(events);
    }

    /// All before `end` is acknowledged. True if answers before it, which the peer sent earlier,
    /// have not come.
    fn acknowledge(&mut self, end: u64, now: u64, events: &mut Vec<RequesterEvent>) -> bool {
        let end = end.min(self.flight.end());
        let before = self.flight.oldest();
        let mut arrived = 0;
        while self.flight.oldest() < end {
            let at = self.flight.oldest();
            let Some(slot) = self.slots.front() else {
                break;
            };
            if slot.is_answered() && self.flight.fate(at) != Some(Fate::Answered) {
                break;
            }
            arrived += self.answer(at);
            self.pop(events);
        }
        if self.connection.selective {
            // What is behind a missing answer is acknowledged all the same.
            for psn in self.flight.oldest()..end {
                if self.slot_at(psn).is_some_and(|s| s.is_answered()) {
                    self.flight.executed(psn);
                } else {
                    arrived += self.answer(psn);
                }
            }
        }
        self.progress(before, arrived, now, events);
        self.flight.oldest() < end
    }

    /// One is answered; returns the bytes that have left the network.
    fn answer(&mut self, psn: u64) -> u64 {
        self.flight.answer(psn).unwrap_or(0).into()
    }

    /// Takes the oldest sequence number, which is answered, out of the account.
    fn pop(&mut self, events: &mut Vec<RequesterEvent>) {
        let at = self.flight.oldest();
        self.flight.pop();
        let Some(slot) = self.slots.front() else {
            return;
        };
        if slot.is_answered() && slot.rest_of_unit(at) == 1 {
            self.answers_due = self.answers_due.saturating_sub(1);
        }
        if at + 1 == slot.end() {
            self.complete_front(events);
        }
    }

    /// So many bytes have left the network. `before` was the oldest before that.
    fn progress(&mut self, before: u64, arrived: u64, now: u64, events: &mut Vec<RequesterEvent>) {
        while self.flight.fate(self.flight.oldest()) == Some(Fate::Answered)
            && self.slots.front().is_some_and(|s| s.aborted.is_none())
        {
            self.pop(events);
        }
        if arrived == 0 && self.flight.oldest() == before {
            return;
        }
        if let Some(Sample { psn, sent, copied }) = self.sample {
            let fate = self.flight.fate(psn);
            if fate.is_none_or(|f| matches!(f, Fate::Answered | Fate::Held)) {
                let time = now.saturating_sub(sent);
                match copied {
                    false => self.window.on_rtt(time),
                    true => self.window.on_rtt_at_most(time),
                }
                self.sample = None;
            }
        }
        // A window that is not made use of has nothing to grow for (RFC 7661).
        if self.limited && self.window() <= 2 * (self.flight.under_way() + arrived) {
            let full = f64::from(self.connection.segment() + HEADER_BYTES);
            self.window.on_ack(arrived as f64 / full, now);
        } else {
            self.window.on_unused(now);
        }
        (self.timeouts, self.rnr_naks, self.probes) = (0, 0, 0);
        (self.probe_at, self.overdue_at) = (None, None);
        if !self.flight.is_empty() {
            self.start_timers(now);
        }
    }

    /// After answers: finds what is lost. `missing`: the peer sent answers that have not come.
    fn repair(&mut self, missing: bool) {
        if self.connection.selective {
            if self.flight.lose_overtaken() {
                self.on_congestion();
            }
        } else if missing && self.back_at != Some(self.flight.oldest()) {
            // Go back once; the answers to what was sent before say the same again.
            self.back_at = Some(self.flight.oldest());
            self.on_congestion();
            self.flight.lose_all();
        }
    }

    fn on_nak(&mut self, at: u64, code: NakCode, now: u64, events: &mut Vec<RequesterEvent>) {
        let missing = self.acknowledge(at, now, events);
        if missing || self.flight.oldest() != at {
            return self.repair(missing);
        }
        let status = match code {
            NakCode::PsnSequence => {
                // A second report is the network's doing, unless it had time to be of the copy.
                let heard = self.reported.is_some_and(|(psn, when)| {
                    let copy = self.window.srtt().max(1);
                    psn == at && now.saturating_sub(when) < copy
                });
                if !heard {
                    self.reported = Some((at, now));
                    self.on_congestion();
                    if self.connection.selective {
                        self.lose_unheld();
                    } else {
                        self.flight.lose_all();
                    }
                    self.flight.lose(at);
                }
                return;
            }
            NakCode::InvalidRequest | NakCode::InvalidRdRequest => WcStatus::RemInvReqErr,
            NakCode::RemoteAccess => WcStatus::RemAccessErr,
            NakCode::RemoteOperation => WcStatus::RemOpErr,
        };
        self.fail(status, events);
    }

    fn on_not_ready(&mut self, at: u64, timer: u8, now: u64, events: &mut Vec<RequesterEvent>) {
        let missing = self.acknowledge(at, now, events);
        if missing || self.flight.oldest() != at {
            return self.repair(missing);
        }
        if self.ready_at.is_some() {
            // The network has doubled the answer.
            return;
        }
        let limit = self.connection.rnr_retry;
        if limit != RNR_FOR_EVER && self.rnr_naks >= limit {
            return self.fail(WcStatus::RnrRetryExcErr, events);
        }
        self.rnr_naks = self.rnr_naks.saturating_add(1);
        // The peer answers: it is not lost (IBTA volume 1, 9.7.5.2.8).
        (self.timeouts, self.probes) = (0, 0);
        self.sample = None;
        (self.probe_at, self.overdue_at) = (None, None);
        self.ready_at = Some(now.saturating_add(rnr_timer_ns(timer)));
        self.reported = None;
        self.flight.lose_all();
        self.flight.lose(at);
        self.recovery_end = self.flight.end();
    }

    /// Data of a READ, or the bare answer to a FLUSH or ATOMIC WRITE.
    fn on_data(&mut self, at: u64, payload: usize, now: u64, events: &mut Vec<RequesterEvent>) {
        let Some((part, opcode)) = self.part_at(at) else {
            return;
        };
        let rest = self.slot_at(at).map_or(0, |s| s.rest_of_unit(at));
        let bare = matches!(opcode, Opcode::Flush | Opcode::AtomicWrite);
        if !bare && opcode != Opcode::RdmaRead {
            return;
        }
        let missing = self.acknowledge(at, now, events);
        if missing && !self.connection.selective {
            return self.repair(true);
        }
        let expected = if bare { 0 } else { part.len as usize };
        if payload != expected {
            // A response of another length than was asked for (IBTA volume 1, 9.9.2.3).
            if self.flight.oldest() == at {
                self.fail(WcStatus::BadRespErr, events);
            }
            return;
        }
        if let Some(size) = self.flight.answer(at) {
            if expected != 0 {
                events.push(RequesterEvent::Place(part));
            }
            if self.flight.awaits() {
                for psn in at + 1..at + u64::from(rest) {
                    self.flight.executed(psn);
                }
            }
            let before = self.flight.oldest();
            self.progress(before, size.into(), now, events);
        }
        self.repair(missing);
    }

    /// The result of an atomic.
    fn on_result(&mut self, at: u64, value: u64, now: u64, events: &mut Vec<RequesterEvent>) {
        let Some((part, opcode)) = self.part_at(at) else {
            return;
        };
        if !opcode.is_atomic() {
            return;
        }
        let missing = self.acknowledge(at, now, events);
        if missing && !self.connection.selective {
            return self.repair(true);
        }
        if let Some(size) = self.flight.answer(at) {
            let message = part.message;
            events.push(RequesterEvent::Atomic { message, value });
            let before = self.flight.oldest();
            self.progress(before, size.into(), now, events);
        }
        self.repair(missing);
    }

    /// The part of a message's data that belongs to a sequence number.
    fn part_at(&self, at: u64) -> Option<(Part, Opcode)> {
        let slot = self.slot_at(at)?;
        let segment = self.connection.segment();
        let offset = (at.saturating_sub(slot.first) as u32).saturating_mul(segment);
        let part = Part {
            message: slot.message(),
            offset,
            len: slot.work.len.saturating_sub(offset).min(segment),
        };
        Some((part, slot.work.opcode))
    }

    /// A peer that retransmits selectively says what it has.
    fn on_selective(&mut self, report: Selective, now: u64, events: &mut Vec<RequesterEvent>) {
        let expected = extend(self.flight.oldest(), report.expected);
        if expected > self.flight.end() {
            return;
        }
        self.acknowledge(expected, now, events);
        let base = extend(expected, report.base);
        let (before, mut arrived) = (self.flight.oldest(), 0);
        for psn in (0..selective::REPORT).filter(|i| report.bits >> i & 1 != 0) {
            let psn = base.saturating_add(psn.into());
            if psn < expected {
                continue;
            }
            match self.slot_at(psn) {
                Some(slot) if slot.is_answered() => {
                    let count = slot.rest_of_unit(psn);
                    self.flight.expect(psn, count);
                }
                Some(_) => arrived += u64::from(self.flight.hold(psn).unwrap_or(0)),
                None => {}
            }
        }
        self.progress(before, arrived, now, events);
        self.repair(false);
        let oldest = self.flight.oldest();
        if expected == oldest && self.flight.fate(oldest) == Some(Fate::Lost) {
            self.lose_unheld();
        }
    }
}
