//! The router: sessions, engine, placement, accounting
