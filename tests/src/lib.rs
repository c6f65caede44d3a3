//! End to end tests: unmodified programs over FreeFlow.
