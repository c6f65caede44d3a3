//! The C ABI, held against the installed libraries and headers of rdma-core.

mod device;
mod layout;
mod loading;
mod support;
mod symbols;
