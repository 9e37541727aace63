//! Work that is the same whenever it runs: recorded once, then replayed.
//!
//! On a GPU a recording is a CUDA graph: one call of the driver instead of one for each kernel. The
//! work must enqueue the same on the same places each time; what differs lies in device memory and
//! is written before. A backend that records nothing runs the work itself.

use crate::backend::{Backend, Recording};
use crate::error::Result;

#[derive(Default)]
pub(super) struct Replay {
    recording: Option<Recording>,
}

impl Replay {
    /// Records `work` now, so that no run of it has to: a recording takes memory of the device.
    pub(super) fn record<B: Backend>(
        &mut self,
        backend: &mut B,
        work: impl Fn(&mut B) -> Result<()>,
    ) -> Result<()> {
        if self.recording.is_none() {
            self.recording = backend.record(work)?;
        }
        Ok(())
    }

    /// `work` was prepared, and is the same in every call.
    pub(super) fn run<B: Backend>(
        &mut self,
        backend: &mut B,
        work: impl Fn(&mut B) -> Result<()>,
    ) -> Result<()> {
        self.record(backend, &work)?;
        match self.recording {
            Some(recording) => backend.replay(recording),
            None => work(backend),
        }
    }
}
