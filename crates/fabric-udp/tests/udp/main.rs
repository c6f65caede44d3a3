//! The fabric over sockets: of this host, between namespaces, and against the kernel's own RoCE.

mod common;
mod loopback;
mod namespaces;
mod rxe;
