//! A stream of Zstandard frames as text files have them: frames that follow one another are one
//! text, skippable frames are passed over, and checksums are held against what came out (RFC 8878,
//! sections 3.1 and 3.1.2).

use std::io::{BufRead, Error, ErrorKind, Read, Result};

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// Reads what the frames of `source` hold.
///
/// Errors: those of `source`; `InvalidData` for what is no frame, or a damaged one;
/// `UnexpectedEof` where the last frame does not end.
pub struct Frames<R> {
    source: R,
    decoder: FrameDecoder,
    /// Whether the decoder has begun a frame that it has not given out whole.
    within: bool,
    /// Bytes of the frame that were given out.
    given: u64,
}

impl<R: BufRead> Frames<R> {
    pub fn new(source: R) -> Self {
        Frames { source, decoder: FrameDecoder::new(), within: false, given: 0 }
    }

    /// Begins the next frame that holds something; false at the end of the source.
    fn begin(&mut self) -> Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            use FrameDecoderError::ReadFrameHeaderError as Header;
            match self.decoder.reset(&mut self.source) {
                Ok(()) => {
                    (self.within, self.given) = (true, 0);
                    return Ok(true);
                }
                Err(Header(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    let mut skipped = (&mut self.source).take(length.into());
                    if std::io::copy(&mut skipped, &mut std::io::sink())? < length.into() {
                        return Err(ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(damaged(error)),
            }
        }
        Ok(false)
    }

    /// What the frame says of its content, against its content.
    fn end(&mut self) -> Result<()> {
        self.within = false;
        let size = self.decoder.content_size(); // 0: it says none
        if size != 0 && size != self.given {
            return Err(damaged("a frame's content is not as long as it says"));
        }
        let wanted = self.decoder.get_checksum_from_data();
        if wanted.is_some() && wanted != self.decoder.get_calculated_checksum() {
            return Err(damaged("a frame's checksum is not that of its content"));
        }
        Ok(())
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, out: &mut [u8]) -> Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        while self.within || self.begin()? {
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let block = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.source, block).map_err(damaged)?;
            }
            match self.decoder.read(out)? {
                0 => self.end()?,
                read => {
                    self.given += read as u64;
                    return Ok(read);
                }
            }
        }
        Ok(0)
    }
}

/// As damage, unless the source ended or could not be read.
fn damaged(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    let error = error.into();
    let first: &(dyn std::error::Error + 'static) = &*error;
    let kind = std::iter::successors(Some(first), |it| it.source())
        .find_map(|it| it.downcast_ref::<Error>())
        .map_or(ErrorKind::InvalidData, Error::kind);
    Error::new(kind, error)
}
