//! Queue pair state machines, sans-IO: they take events and the time, and say what to do
