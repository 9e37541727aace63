//! What the build made of kernels/: machine code for GPUs, and why there is none.

/// The compiled kernel files, by name; empty without nvcc.
pub const FATBINS: &[(&str, &[u8])] = &[];
/// "80,90a"
pub const ARCHITECTURES: &str = "";
/// Which nvcc compiled them, or why none did.
pub const NVCC: Result<&str, &str> = Err("this build script does not look for nvcc");
/// Which C++ compiler built device simt, or why none did.
pub const CXX: Result<&str, &str> = Err("this build script does not look for a C++ compiler");
