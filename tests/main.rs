//! The one integration test binary; its modules mirror src/.

mod cpu;
mod support;
mod tape;
