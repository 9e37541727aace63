//! kernels/ on every machine there is: the CPU machine under several schedules and with its race
//! detector, and a GPU where one is.

mod gemm;
mod machines;
mod norm;
