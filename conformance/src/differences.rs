//! Where the reference, rdma-core 44 on the kernel's rdma_rxe (Linux 6.1), is known to differ from
//! the rule. Such a failure is told, and not counted; a test that passes is counted as any other.

/// A known difference.
pub(crate) struct Difference {
    /// What the device does.
    pub(crate) what: &'static str,
    /// What the suite follows instead.
    pub(crate) right: &'static str,
}

const BAD_KEY: &str = "a local key that is wrong is an operation error, not a protection error";
const NO_EVENT: &str = "queue pairs have no asynchronous events of errors";
const ROUNDED: &str = "queues are deeper than the capacity they tell";
const UNCHECKED: &str = "requests are not checked when they are posted";
const NO_BAD_WR: &str = "bad_wr is not set when the queue pair's state forbids posting";
const STUCK: &str = "now and then, requests of two threads are left in the queue";
const SHORT: &str = "a message longer than its receive is a remote operation error";
const DRAINED: &str = "work posted or pending in SQD is not taken up in RTS";
const RNR_TIMEOUT: &str = "the retransmission timer runs while the peer is not ready";

/// Differences of rxe: test, what it does, which source the suite follows.
const RXE: &[(&str, &str, &str)] = &[
    ("data::too_long_is_refused", UNCHECKED, "IBTA 9.7.4.1.6"),
    (
        "post::send_queue_is_as_deep_as_granted",
        ROUNDED,
        "ibv_create_qp(3)",
    ),
    (
        "extended::start_locks_out_other_threads",
        STUCK,
        "ibv_wr_start(3)",
    ),
    (
        "post::receive_queue_is_as_deep_as_granted",
        ROUNDED,
        "ibv_create_qp(3)",
    ),
    (
        "post::capacities_are_at_least_what_was_asked",
        ROUNDED,
        "ibv_create_qp(3)",
    ),
    ("post::receives_by_state", NO_BAD_WR, "ibv_post_recv(3)"),
    ("post::sends_by_state", NO_BAD_WR, "ibv_post_send(3)"),
    ("post::unknown_opcode", UNCHECKED, "ibv_post_send(3)"),
    (
        "post::operations_of_other_services",
        UNCHECKED,
        "ibv_post_send(3)",
    ),
    (
        "inline::limit_is_counted_in_64_bits",
        "lengths are summed in 32 bits",
        "ibv_post_send(3)",
    ),
    (
        "inline::not_with_reads_and_atomics",
        UNCHECKED,
        "ibv_post_send(3)",
    ),
    (
        "completions::failed_unsignaled_completes",
        BAD_KEY,
        "IBTA 11.6.2",
    ),
    ("errors::bad_lkey", BAD_KEY, "IBTA 11.6.2"),
    ("errors::lkey_of_another_domain", BAD_KEY, "IBTA 11.6.2"),
    ("errors::receive_too_short", SHORT, "IBTA table 57"),
    ("errors::receive_with_bad_lkey", BAD_KEY, "IBTA 11.6.2"),
    (
        "errors::events_at_the_responder",
        NO_EVENT,
        "ibv_get_async_event(3)",
    ),
    ("errors::deregistered_memory", BAD_KEY, "IBTA 11.6.2"),
    ("errors::unreliable_with_bad_lkey", BAD_KEY, "IBTA 11.6.2"),
    (
        "states::table_uc",
        "a path is not changed from SQD to SQD",
        "ibv_modify_qp(3)",
    ),
    (
        "states::values_out_of_range",
        "the P_Key index is not checked",
        "ibv_modify_qp(3)",
    ),
    (
        "states::failure_changes_nothing",
        "the MTU is not checked",
        "ibv_modify_qp(3)",
    ),
    (
        "states::communication_established",
        NO_EVENT,
        "ibv_get_async_event(3)",
    ),
    ("drain::drains_and_tells_once", DRAINED, "IBTA 10.3.1.5"),
    (
        "drain::work_posted_while_drained_waits",
        DRAINED,
        "IBTA 10.3.1.5",
    ),
    (
        "drain::no_event_unless_asked",
        "the event comes always",
        "ibv_modify_qp(3)",
    ),
    ("rnr::for_ever", RNR_TIMEOUT, "IBTA 9.7.5.2.8"),
    ("rnr::is_no_timeout", RNR_TIMEOUT, "IBTA 9.7.5.2.8"),
    (
        "atomics::unaligned",
        "refused when posted, not by the responder",
        "IBTA table 57",
    ),
    (
        "atomics::one_element_of_eight_bytes",
        UNCHECKED,
        "ibv_post_send(3)",
    ),
    (
        "events::errors_are_solicited",
        "errors are not solicited",
        "ibv_req_notify_cq(3)",
    ),
    (
        "events::unacknowledged_async_blocks_destroy",
        NO_EVENT,
        "ibv_get_async_event(3)",
    ),
    (
        "destroy::purges_only_its_own_completions",
        "completions of a destroyed queue pair stay",
        "IBTA 11.2.5.4",
    ),
    (
        "datagram::queue_key_with_the_high_bit",
        "the high bit has no meaning",
        "IBTA 10.2.5",
    ),
    (
        "datagram::beyond_the_mtu",
        "it is sent, in one packet",
        "IBTA 9.8.3",
    ),
    (
        "extended::elements_and_inline_lists",
        "inline data of the extended interface fails",
        "ibv_wr_set_inline_data(3)",
    ),
    (
        "extended::poll_consumes_what_was_read",
        "end_poll does not consume the last completion",
        "ibv_create_cq_ex(3)",
    ),
    ("extended::poll_reads_every_field", BAD_KEY, "IBTA 11.6.2"),
    (
        "queues::overrun",
        "an overrun queue can still be polled",
        "IBTA 11.4.2.1",
    ),
    ("srq::create_and_query", ROUNDED, "ibv_create_srq(3)"),
    (
        "srq::own_receives_are_refused",
        NO_BAD_WR,
        "ibv_post_recv(3)",
    ),
    ("srq::full_and_bad_third", ROUNDED, "ibv_create_srq(3)"),
    (
        "srq::last_request_reached",
        NO_EVENT,
        "ibv_get_async_event(3)",
    ),
    ("srq::error_of_a_receive", SHORT, "IBTA table 57"),
    (
        "windows::bounds_and_rights",
        "the bounds of a window are not checked, only its region's",
        "ibv_bind_mw(3)",
    ),
    (
        "windows::send_with_invalidate",
        "wc_flags are the kernel's, where the bit has another place",
        "ibv_poll_cq(3)",
    ),
    (
        "multicast::every_member_gets_one",
        "the host's IP takes a group's packets only if a socket joined it, as rdma_cm does",
        "ibv_attach_mcast(3)",
    ),
];

/// The known difference of a device in a test.
pub(crate) fn difference(device: &str, test: &str) -> Option<Difference> {
    let (_, what, right) = *RXE.iter().find(|(name, ..)| *name == test)?;
    device
        .starts_with("rxe")
        .then_some(Difference { what, right })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_is_of_a_test() {
        for (name, ..) in RXE {
            assert!(
                crate::tests::all().any(|test| test.name == *name),
                "no test {name}"
            );
        }
    }
}
