//! The one integration test binary; its modules mirror src/.

<<<<<<< HEAD
mod checkpoint;
mod cpu;
mod data;
mod hf;
mod support;
mod tape;
=======
mod data;
mod random;
>>>>>>> data
