//! The one error type of the library.
//!
//! Every variant names what was wrong (op, shape, key or path) and carries the remedy, because the
//! message is all that a person sees; `Shape` alone, which only code that records a tape can cause,
//! has the expected shape instead. `exit_code` is part of the contract of the command line:
//! 2 for wrong usage or input, 1 for anything else.

use std::path::{Path, PathBuf};

use crate::tensor::Shape;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A configuration key that does not exist, or a value that is not allowed.
    #[error("configuration: {what}\n  remedy: {remedy}")]
    Config { what: String, remedy: String },

    /// A text file, shard or tokenizer that cannot be used.
    #[error("{}: {what}\n  remedy: {remedy}", path.display())]
    Data { path: PathBuf, what: String, remedy: String },

    /// A checkpoint or Hugging Face folder that cannot be used.
    #[error("checkpoint {}: {what}\n  remedy: {remedy}", path.display())]
    Checkpoint { path: PathBuf, what: String, remedy: String },

    /// A checkpoint that could not be written. Nothing that was there before is lost.
    #[error(
        "checkpoint {}: not saved, and the earlier ones are as they were; it needs {needed_bytes} \
         bytes\n  {source}",
        path.display()
    )]
    NotSaved { path: PathBuf, needed_bytes: u64, source: Box<Error> },

    /// A wrong argument of a command that is neither a configuration key nor a file.
    #[error("{what}\n  remedy: {remedy}")]
    Usage { what: String, remedy: String },

    /// A failure that no argument and no input caused: a defect of this program, or a system that
    /// refuses what it always has.
    #[error("internal: {what}\n  remedy: {remedy}")]
    Internal { what: String, remedy: String },

    /// The operating system refused something.
    #[error("{action} {}: {source}\n  remedy: {}", path.display(), io_remedy(source))]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },

    /// Two shapes that do not fit one op.
    #[error("{op}: {what} has shape {found}, expected {expected}")]
    Shape { op: &'static str, what: &'static str, found: Shape, expected: Shape },

    /// A backward pass was asked of an op that has none.
    #[error("{op} has no gradient\n  remedy: use it in inference only")]
    NoGradient { op: &'static str },

    /// A device that does not exist here, or cannot do what was asked.
    #[error("device {device}: {what}\n  remedy: {remedy}")]
    Device { device: String, what: String, remedy: String },

    /// A launch that breaks a rule, or a kernel that did something wrong while it ran.
    #[error("kernel {kernel} on {device}: {what}\n  remedy: {remedy}")]
    Launch { kernel: String, device: String, what: String, remedy: String },

    /// A tensor that TMA cannot address in this way.
    #[error("tensor map: {what}\n  remedy: {remedy}")]
    TensorMap { what: String, remedy: String },

    /// The memory plan does not fit.
    #[error(
        "the plan needs {} MiB, {device} has {} MiB free\n{table}\n  remedy: {remedy}",
        needed >> 20,
        available >> 20
    )]
    Memory { device: String, needed: u64, available: u64, table: String, remedy: String },

    /// A loss or gradient norm that is not finite: nothing was written since.
    #[error(
        "{what} is {value} at step {step} (batch rows {first_row}..{end_row}); \
         no checkpoint of it was written\n  remedy: {remedy}"
    )]
    NonFinite {
        what: &'static str,
        value: f64,
        step: u64,
        first_row: u64,
        end_row: u64,
        remedy: String,
    },

    /// Another process is training into this run directory.
    #[error(
        "run {}: another process (pid {holder}) is training here\n  remedy: wait for it, stop it, or choose another --out",
        path.display()
    )]
    Locked { path: PathBuf, holder: String },
}

impl Error {
    /// For `map_err` after a file operation: `fs::read(p).map_err(Error::io("read", p))`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// A launch that a launch layer refuses.
    pub fn launch(kernel: &str, device: &str, what: String, remedy: impl Into<String>) -> Self {
        Error::Launch {
            kernel: kernel.to_string(),
            device: device.to_string(),
            what,
            remedy: remedy.into(),
        }
    }

    /// What a launch layer refuses before anything has run is not a kernel that went wrong: what
    /// was asked for cannot be done on this device.
    pub fn before_running(self) -> Self {
        match self {
            Error::Launch { kernel, device, what, remedy } => {
                Error::Device { device, what: format!("{kernel}: {what}"), remedy }
            }
            other => other,
        }
    }

    /// 2 for wrong usage or input, 1 for anything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Config { .. }
            | Error::Data { .. }
            | Error::Checkpoint { .. }
            | Error::Usage { .. }
            | Error::Shape { .. }
            | Error::NoGradient { .. }
            | Error::Device { .. }
            | Error::Memory { .. }
            | Error::Locked { .. } => 2,
            Error::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => 2,
                _ => 1,
            },
            Error::NotSaved { source, .. } => source.exit_code(),
            Error::Internal { .. }
            | Error::Launch { .. }
            | Error::TensorMap { .. }
            | Error::NonFinite { .. } => 1,
        }
    }
}

fn io_remedy(source: &std::io::Error) -> &'static str {
    use std::io::ErrorKind::*;
    match source.kind() {
        NotFound => "check the path",
        PermissionDenied => "check who owns it and its permissions, or choose another folder",
        StorageFull | QuotaExceeded | FileTooLarge => "free some space, or choose another disk",
        ReadOnlyFilesystem => "choose a folder on a writable file system",
        _ => "see the operating system's message above",
    }
}
