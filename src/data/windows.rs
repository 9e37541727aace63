//! Windows for evaluation: every token but the first, predicted exactly once, in order.
//!
//! Consecutive, non-overlapping windows of S input tokens without a start token; the last, shorter
//! one is included and padded, as is the last batch, so that all batches have one shape.

use crate::data::batch::Batch;
use crate::data::source::TokenSource;
use crate::{Error, Result};

/// Batches over a source, once; an iterator that can be made anew for every evaluation.
pub struct Windows<'a> {
    source: &'a TokenSource,
    sequence: usize,
    micro_batch: usize,
    documents: bool,
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
        Ok(Windows { source, sequence, micro_batch, documents: false, predicted, next: 0 })
    }

    /// Batches that say where documents begin in their windows, if `documents`.
    pub fn of_documents(self, documents: bool) -> Self {
        Windows { documents, ..self }
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
        let size = [self.micro_batch, self.sequence];
        let mut batch = Batch::padding(size, self.documents, pad, self.next);
        let mut stream = Vec::with_capacity(self.sequence + 1);
        let mut starts = vec![];
        for row in 0..self.micro_batch {
            let start = (self.next + row as u64) * sequence;
            if start >= self.predicted {
                break;
            }
            stream.clear();
            starts.clear();
            let end = (start + sequence).min(self.predicted);
            let mut read = self.source.read(start..end + 1, &mut stream);
            if self.documents {
                read = read.and_then(|()| self.source.document_starts(start..end, &mut starts));
            }
            if let Err(error) = read {
                self.next = u64::MAX / sequence; // ends the iteration
                return Some(Err(error));
            }
            batch.fill(row, self.sequence, &stream);
            batch.fill_starts(row, self.sequence, &starts);
        }
        self.next += self.micro_batch as u64;
        Some(Ok(batch))
    }
}
