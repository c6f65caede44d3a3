//! Conversion of an application's pages, in place, to pages of a shared memfd
