//! The network library's core: session, objects, posting and polling
