//! SIGINT and SIGTERM: the first asks to finish the step and save, the second ends the process.
//! Before there is anything to save, the first one ends it.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Exit code of a process that a second signal ended: 128 + SIGINT.
const KILLED: i32 = 130;

static ASKED: AtomicBool = AtomicBool::new(false);
/// Whether there is something to save.
static ARMED: AtomicBool = AtomicBool::new(false);

/// Whether somebody asked to stop.
#[derive(Clone, Copy, Debug, Default)]
pub struct Interrupt {
    /// Handlers are installed; else nobody can ask.
    listening: bool,
}

impl Interrupt {
    /// Never interrupted.
    pub fn none() -> Self {
        Interrupt { listening: false }
    }

    /// Installs the handlers, once for the process.
    pub fn listen() -> Result<Self> {
        ctrlc::set_handler(|| {
            if ASKED.swap(true, Ordering::SeqCst) || !ARMED.load(Ordering::SeqCst) {
                std::process::exit(KILLED);
            }
        })
        .map_err(|error| Error::Internal {
            what: format!("signal handlers could not be installed: {error}"),
            remedy: "see the operating system's message".to_string(),
        })?;
        Ok(Interrupt { listening: true })
    }

    /// From now on the first signal only asks.
    pub fn arm(&self) {
        ARMED.store(true, Ordering::SeqCst);
    }

    pub fn asked(&self) -> bool {
        self.listening && ASKED.load(Ordering::SeqCst)
    }
}
