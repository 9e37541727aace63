//! The rules of a capture.

use super::StreamId;
use crate::error::{Error, Result};

/// Which stream is being captured, and what is allowed meanwhile.
#[derive(Default, Debug)]
pub struct Capture {
    stream: Option<StreamId>,
}

impl Capture {
    /// Whether work on `stream` is recorded now. Errors: another stream is being captured.
    pub fn records(&self, device: &str, stream: StreamId) -> Result<bool> {
        match self.stream {
            None => Ok(false),
            Some(captured) if captured == stream => Ok(true),
            Some(_) => refuse_in_capture(device, "work on another stream"),
        }
    }

    /// Errors: a stream is being captured; `action` is what cannot be recorded.
    pub fn forbid(&self, device: &str, action: &str) -> Result<()> {
        match self.stream {
            None => Ok(()),
            Some(_) => refuse_in_capture(device, action),
        }
    }

    pub fn begin(&mut self, device: &str, stream: StreamId) -> Result<()> {
        self.forbid(device, "a second capture")?;
        self.stream = Some(stream);
        Ok(())
    }

    pub fn end(&mut self, device: &str, stream: StreamId) -> Result<()> {
        if self.stream != Some(stream) {
            return Err(Error::Device {
                device: device.to_string(),
                what: "this stream is not being captured".to_string(),
                remedy: "call begin_capture first, with the same stream".to_string(),
            });
        }
        self.stream = None;
        Ok(())
    }
}

fn refuse_in_capture<T>(device: &str, action: &str) -> Result<T> {
    Err(Error::Device {
        device: device.to_string(),
        what: format!("{action} cannot be recorded in a graph"),
        remedy: "do it before begin_capture or after end_capture".to_string(),
    })
}
