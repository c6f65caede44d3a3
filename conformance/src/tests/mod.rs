//! The tests, by theme.

use crate::suite::Test;

/// Declares the modules and lists their tests.
macro_rules! themes {
    ($($theme:ident),* $(,)?) => {
        $(mod $theme;)*

        /// All tests.
        pub(crate) fn all() -> impl Iterator<Item = &'static Test> {
            [$($theme::TESTS),*].into_iter().flatten()
        }
    };
}

themes! {
    device, data, post, inline, completions, errors, access, states, drain, rnr, atomics, events, order,
    destroy, datagram, extended, threads, fork, regions, queues, moderation, srq, xrc, windows, multicast, domains,
}
