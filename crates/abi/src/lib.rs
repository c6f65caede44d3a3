//! The C structures and constants of libibverbs, newest layout
