//! What a step, or an evaluation, reads at one time.

use crate::tensor::IGNORE_INDEX;

/// B rows of S tokens and what is to be predicted at each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Batch {
    /// `[B,S]`
    pub tokens: Vec<i32>,
    /// `[B,S]`, `IGNORE_INDEX` where nothing is predicted.
    pub targets: Vec<i32>,
    /// `[B,S]` where each token's document begins in its row, if tokens attend to their own
    /// document alone.
    pub document_starts: Option<Vec<i32>>,
    /// Targets that are predicted.
    pub predicted: usize,
    /// Rows handed out before this batch.
    pub first_row: u64,
}

impl Batch {
    /// A batch in which nothing is predicted; every token is `pad`, and with `documents` every row
    /// one document.
    pub(crate) fn padding(
        [rows, sequence]: [usize; 2],
        documents: bool,
        pad: i32,
        first_row: u64,
    ) -> Self {
        Batch {
            tokens: vec![pad; rows * sequence],
            targets: vec![IGNORE_INDEX; rows * sequence],
            document_starts: documents.then(|| vec![0; rows * sequence]),
            predicted: 0,
            first_row,
        }
    }

    /// Row `row` reads `stream[..S]` and predicts `stream[1..S+1]`, as far as the stream goes.
    pub(crate) fn fill(&mut self, row: usize, sequence: usize, stream: &[u32]) {
        let read = stream.len().min(sequence);
        let predicted = stream.len().saturating_sub(1).min(sequence);
        let start = row * sequence;
        for (token, &id) in self.tokens[start..start + read].iter_mut().zip(stream) {
            *token = id as i32;
        }
        for (target, &id) in self.targets[start..start + predicted].iter_mut().zip(&stream[1..]) {
            *target = id as i32;
        }
        self.predicted += predicted;
    }

    /// Row `row` begins with tokens whose documents begin at `starts`; what follows is padding, a
    /// document of its own.
    pub(crate) fn fill_starts(&mut self, row: usize, sequence: usize, starts: &[i32]) {
        if let Some(all) = &mut self.document_starts {
            let row = &mut all[row * sequence..][..sequence];
            row[..starts.len()].copy_from_slice(starts);
            row[starts.len()..].fill(starts.len() as i32);
        }
    }
}
