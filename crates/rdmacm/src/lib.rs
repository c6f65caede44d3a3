//! librdmacm.so.1: it names the versions of librdmacm's symbols and needs libibverbs.so.1, which
//! has the symbols themselves, so that both libraries share one state.
