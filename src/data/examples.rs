//! Supervised examples: tokens, which of them are predicted, and rows made of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::data::batch::Batch;
use crate::data::packing::best_fit;
use crate::data::shuffle::Permutation;
use crate::{Error, Result};

/// One prompt and answer, or several in turn.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Example {
    pub tokens: Vec<u32>,
    /// For each token.
    pub predicted: Vec<bool>,
}

impl Example {
    /// Appends tokens that are only read.
    pub fn read(&mut self, tokens: &[u32]) {
        self.push(tokens, false);
    }

    /// Appends tokens that are predicted.
    pub fn predict(&mut self, tokens: &[u32]) {
        self.push(tokens, true);
    }

    fn push(&mut self, tokens: &[u32], predicted: bool) {
        self.tokens.extend_from_slice(tokens);
        self.predicted.resize(self.tokens.len(), predicted);
    }
}

/// Many examples, one after another.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Examples {
    tokens: Vec<u32>,
    predicted: Vec<bool>,
    /// Where each example ends in both.
    ends: Vec<usize>,
}

impl Examples {
    pub fn push(&mut self, example: Example) {
        self.tokens.extend(example.tokens);
        self.predicted.extend(example.predicted);
        self.ends.push(self.tokens.len());
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Tokens of example `index`, and which of them are predicted.
    pub fn get(&self, index: usize) -> (&[u32], &[bool]) {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        let range = start..self.ends[index];
        (&self.tokens[range.clone()], &self.predicted[range])
    }

    /// Takes off the last `share`, rounded to whole examples.
    pub fn split_off(&mut self, share: f64) -> Examples {
        let kept = self.len() - (self.len() as f64 * share).round() as usize;
        let mut rest = Examples::default();
        for index in kept..self.len() {
            let (tokens, predicted) = self.get(index);
            rest.push(Example { tokens: tokens.to_vec(), predicted: predicted.to_vec() });
        }
        self.ends.truncate(kept);
        let tokens = self.ends.last().copied().unwrap_or(0);
        self.tokens.truncate(tokens);
        self.predicted.truncate(tokens);
        rest
    }
}

/// Rows of S tokens, each of one example or of as many as fit; cheap to clone.
#[derive(Clone)]
pub struct ExampleRows {
    examples: Arc<Examples>,
    /// The examples of each row.
    rows: Arc<Vec<Vec<u32>>>,
    sequence: usize,
    /// What is read where nothing is.
    pad: i32,
    cut: usize,
    left_out: usize,
    origin: PathBuf,
}

impl ExampleRows {
    /// With `packed`, several examples share a row ([`best_fit`], equal lengths in an order that
    /// `seed` decides). An example longer than a row loses its end; one that then has nothing to
    /// predict is left out.
    ///
    /// `pad`: the token that fills rows up. `origin`: for messages.
    ///
    /// Errors: no example with something to predict.
    pub fn new(
        examples: Examples,
        sequence: usize,
        packed: bool,
        seed: u64,
        pad: u32,
        origin: &Path,
    ) -> Result<Self> {
        let count = examples.len() as u64;
        let (mut order, mut cut) = (vec![], 0);
        let shuffled = Permutation::new(count, seed, u64::MAX);
        for at in 0..count {
            let index = if packed { shuffled.at(at) } else { at } as usize;
            let (tokens, predicted) = examples.get(index);
            let read = read_tokens(tokens, sequence);
            if predicted.iter().skip(1).take(read).any(|&predicted| predicted) {
                order.push(index as u32);
                cut += usize::from(tokens.len() > read + 1);
            }
        }
        if order.is_empty() {
            return Err(Error::Data {
                path: origin.to_path_buf(),
                what: format!(
                    "none of the {count} examples has an answer within {sequence} tokens"
                ),
                remedy: "set data.sequence to a larger number, or give other examples".into(),
            });
        }
        let left_out = examples.len() - order.len();
        let rows = if packed {
            let length = |&index: &u32| read_tokens(examples.get(index as usize).0, sequence);
            let lengths: Vec<usize> = order.iter().map(length).collect();
            let mut rows = best_fit(&lengths, sequence);
            rows.iter_mut().flatten().for_each(|item| *item = order[*item as usize]);
            // The longest are packed first, and the first rows have to be like any others.
            let shuffled = Permutation::new(rows.len() as u64, seed, u64::MAX - 1);
            let count = rows.len() as u64;
            (0..count).map(|at| std::mem::take(&mut rows[shuffled.at(at) as usize])).collect()
        } else {
            order.into_iter().map(|index| vec![index]).collect()
        };
        Ok(ExampleRows {
            examples: Arc::new(examples),
            rows: Arc::new(rows),
            sequence,
            pad: pad as i32,
            cut,
            left_out,
            origin: origin.to_path_buf(),
        })
    }

    pub fn rows(&self) -> u64 {
        self.rows.len() as u64
    }

    /// Examples that are in rows.
    pub fn examples(&self) -> usize {
        self.examples.len() - self.left_out
    }

    /// Examples whose end did not fit into a row.
    pub fn cut(&self) -> usize {
        self.cut
    }

    /// Examples whose answer did not fit into a row.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// Tokens that rows read, padding left out.
    pub fn tokens(&self) -> u64 {
        let read = |&index: &u32| read_tokens(self.example(index).0, self.sequence) as u64;
        self.rows.iter().flatten().map(read).sum()
    }

    /// Puts row `index` into a batch of padding.
    pub(crate) fn fill(&self, batch: &mut Batch, row: usize, index: u64) {
        let sequence = self.sequence;
        let place = row * sequence..(row + 1) * sequence;
        let tokens = &mut batch.tokens[place.clone()];
        let targets = &mut batch.targets[place];
        let mut starts = Vec::with_capacity(sequence);
        for &example in &self.rows[index as usize] {
            let (ids, predicted) = self.example(example);
            let (start, read) = (starts.len(), read_tokens(ids, sequence));
            for at in 0..read {
                tokens[start + at] = ids[at] as i32;
                if predicted[at + 1] {
                    targets[start + at] = ids[at + 1] as i32;
                    batch.predicted += 1;
                }
            }
            starts.resize(start + read, start as i32);
        }
        batch.fill_starts(row, sequence, &starts);
    }

    /// The first rows, in order, that predict `most_tokens` or a few more; 0: all.
    pub(crate) fn first(&self, most_tokens: u64) -> Self {
        let mut left = most_tokens;
        let enough = self.rows.iter().position(|row| {
            let begins_behind_enough = most_tokens > 0 && left == 0;
            left = left.saturating_sub(self.predicted(row).count() as u64);
            begins_behind_enough
        });
        let rows = self.rows[..enough.unwrap_or(self.rows.len())].to_vec();
        ExampleRows { rows: Arc::new(rows), ..self.clone() }
    }

    /// All tokens that are predicted.
    pub fn predicted_tokens(&self) -> Vec<u32> {
        self.rows.iter().flat_map(|row| self.predicted(row)).collect()
    }

    fn predicted<'a>(&'a self, row: &'a [u32]) -> impl Iterator<Item = u32> + 'a {
        row.iter().flat_map(|&example| {
            let (ids, predicted) = self.example(example);
            let targets = ids.iter().zip(predicted).skip(1).take(read_tokens(ids, self.sequence));
            targets.filter(|(_, predicted)| **predicted).map(|(&id, _)| id)
        })
    }

    pub(crate) fn pad(&self) -> i32 {
        self.pad
    }

    pub(crate) fn origin(&self) -> &Path {
        &self.origin
    }

    /// Tells these examples from any others.
    pub(crate) fn identity(&self) -> u64 {
        let mut low = crc32fast::Hasher::new();
        let mut high = crc32fast::Hasher::new();
        low.update(bytemuck::cast_slice(&self.examples.tokens));
        let predicted: Vec<u8> = self.examples.predicted.iter().map(|&it| u8::from(it)).collect();
        high.update(&predicted);
        for row in self.rows.iter() {
            high.update(bytemuck::cast_slice(row));
            high.update(b"row");
        }
        u64::from(high.finalize()) << 32 | u64::from(low.finalize())
    }

    fn example(&self, index: u32) -> (&[u32], &[bool]) {
        self.examples.get(index as usize)
    }
}

/// The last token is only predicted.
fn read_tokens(tokens: &[u32], sequence: usize) -> usize {
    tokens.len().saturating_sub(1).min(sequence)
}

/// Batches over all rows, once and in order; the last is filled up with padding.
pub(crate) fn batches(
    rows: ExampleRows,
    micro_batch: usize,
    documents: bool,
) -> impl Iterator<Item = Batch> {
    let count = rows.rows();
    (0..count).step_by(micro_batch).map(move |first| {
        let size = [micro_batch, rows.sequence];
        let mut batch = Batch::padding(size, documents, rows.pad, first);
        for index in first..count.min(first + micro_batch as u64) {
            rows.fill(&mut batch, (index - first) as usize, index);
        }
        batch
    })
}
