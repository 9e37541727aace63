//! Windows for evaluation: every token but the first, predicted exactly once, in order.
//!
//! Consecutive, non-overlapping windows of S input tokens without a start token; the last, shorter
//! one is included and padded, as is the last batch, so that all batches have one shape.

use crate::data::loader::Batch;
use crate::data::source::TokenSource;
use crate::{Error, Result};

/// Batches over a source, once; an iterator that can be made anew for every evaluation.
pub struct Windows<'a> {
    source: &'a TokenSource,
    sequence: usize,
    micro_batch: usize,
    /// Tokens that may be predicted.
    predicted: u64,
    next: u64,
}

impl<'a> Windows<'a> {
    /// `most_tokens`: predict no more than so many, from the beginning; 0: all.
    ///
    /// Errors: fewer than two tokens; a sequence or micro-batch of 0.
    pub fn new(
        source: &'a TokenSource,
        sequence: usize,
        micro_batch: usize,
        most_tokens: u64,
    ) -> Result<Self> {
        if sequence == 0 || micro_batch == 0 {
            return Err(Error::Config {
                what: "data.sequence and train.micro_batch must be at least 1".into(),
                remedy: "set both".into(),
            });
        }
        if source.tokens() < 2 {
            return Err(Error::Data {
                path: source.origin().to_path_buf(),
                what: format!("{} tokens leave nothing to predict", source.tokens()),
                remedy: "give more text to evaluate on".into(),
            });
        }
        let all = source.tokens() - 1;
        let predicted = if most_tokens == 0 { all } else { all.min(most_tokens) };
        Ok(Windows { source, sequence, micro_batch, predicted, next: 0 })
    }

    /// Targets over all batches.
    pub fn predicted_tokens(&self) -> u64 {
        self.predicted
    }

    /// Bytes of the text, for bits per byte; `None` if only a part of it is read.
    pub fn text_bytes(&self) -> Option<u64> {
        (self.predicted == self.source.tokens() - 1).then(|| self.source.text_bytes())
    }

    /// Number of batches.
    pub fn batches(&self) -> u64 {
        self.predicted.div_ceil(self.sequence as u64).div_ceil(self.micro_batch as u64)
    }
}

impl Iterator for Windows<'_> {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        let sequence = self.sequence as u64;
        if self.next * sequence >= self.predicted {
            return None;
        }
        let pad = self.source.end_of_text().unwrap_or(0) as i32;
        let mut batch = Batch::padding(self.micro_batch, self.sequence, pad, self.next);
        let mut stream = Vec::with_capacity(self.sequence + 1);
        for row in 0..self.micro_batch {
            let start = (self.next + row as u64) * sequence;
            if start >= self.predicted {
                break;
            }
            stream.clear();
            let end = (start + sequence).min(self.predicted) + 1;
            if let Err(error) = self.source.read(start..end, &mut stream) {
                self.next = u64::MAX / sequence; // ends the iteration
                return Some(Err(error));
            }
            batch.fill(row, self.sequence, &stream);
        }
        self.next += self.micro_batch as u64;
        Some(Ok(batch))
    }
}
