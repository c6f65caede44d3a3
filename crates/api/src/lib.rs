//! Versioned types between router, orchestrator and command line
