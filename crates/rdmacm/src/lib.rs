//! librdmacm.so.1: names the versions and needs libibverbs.so.1
