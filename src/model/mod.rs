//! The LLaMA: its parameter table, and its forward pass recorded on the tape.

pub mod parameters;
