//! The program `isobath`: arguments in, an exit code out. Everything else is in cli/ and below.
//!
//! Exit codes: 0 done, 2 wrong usage or input, 1 anything else.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::report(&error),
    }
}
