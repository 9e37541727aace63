//! The one integration test binary; its modules mirror src/.

mod checkpoint;
mod hf;
