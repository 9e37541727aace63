//! The one integration test binary; its modules mirror src/.

mod checkpoint;
mod cpu;
mod data;
mod hf;
mod random;
mod support;
mod tape;
