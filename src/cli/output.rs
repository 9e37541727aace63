//! What a command gives: on stdout the answer itself, as text or as one JSON object, and files that
//! the user named.

use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Context;
use isobath::durable::{folder_of, replace};
use isobath::{Error, Result};
use serde::Serialize;

/// Writes all of `text`; `println!` would panic when nobody reads it.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to stdout")
}

/// `println!` as [`print`]: `say!("{} tokens", tokens)?`.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::output::print(&format!("{}\n", format_args!($($text)*))) };
}
pub(super) use say;

/// One JSON object and a line end.
pub fn print_json(answer: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(answer).context("cannot write JSON")?;
    text.push('\n');
    print(&text)
}

/// Writes a file that the user named, and the folders above it, as a whole or not at all. What is
/// there and is no file of its own (a pipe, a link such as /dev/stdout) is written through.
pub fn save(path: &Path, contents: &[u8]) -> Result<()> {
    if is_stdout(path) {
        let mut out = io::stdout().lock();
        let written = out.write_all(contents).and_then(|()| out.flush());
        return written.map_err(Error::io("write", path));
    }
    if fs::symlink_metadata(path).is_ok_and(|there| !there.is_file()) {
        return fs::write(path, contents).map_err(Error::io("write", path));
    }
    let folder = folder_of(path);
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    replace(path, contents)
}

/// Opened anew, a file that stdout goes to would be written from its beginning, by both.
fn is_stdout(path: &Path) -> bool {
    let stdout = io::stdout().as_fd().try_clone_to_owned().map(File::from);
    let place = |there: Metadata| (there.dev(), there.ino());
    let (there, stdout) = (fs::metadata(path), stdout.and_then(|stdout| stdout.metadata()));
    there.ok().map(place).is_some_and(|there| stdout.is_ok_and(|stdout| place(stdout) == there))
}

/// Whether the reader of a pipe went away (`isobath info | head -1`): no failure of ours.
pub fn reader_left(error: &anyhow::Error) -> bool {
    let is_broken_pipe = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref().is_some_and(is_broken_pipe))
}
