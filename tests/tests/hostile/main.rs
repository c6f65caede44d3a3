//! Hostile clients: whatever one says or writes, the router goes on, others are not touched, and
//! nothing is left behind.

mod limits;
mod memory;
mod objects;
mod regions;
mod reuse;
mod rings;
mod scene;
mod socket;
mod tenants;
