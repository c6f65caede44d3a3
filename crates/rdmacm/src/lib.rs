//! librdmacm.so.1: it names the versions of librdmacm's symbols and needs libibverbs.so.1, which
//! has the symbols themselves, so that both libraries share one state.
//!
//! Without the standard library, which would be all there is in the file.

#![cfg_attr(not(test), no_std)]

/// Nothing here can panic, but the compiler asks for a handler.
#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
