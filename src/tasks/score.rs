//! From the losses of rows to accuracies with standard errors.
//!
//! A choice's log-likelihood is minus the sum of the losses of its tokens. The prediction is the
//! choice with the largest one (`acc`), or with the largest one divided by the choice's length in
//! characters (`acc_norm`) or bytes (`acc_bytes`), the space before it not counted; of equal ones
//! the first. These are the definitions of lm-evaluation-harness 0.4.13, as are the standard
//! errors: the sample's standard deviation (n - 1) over sqrt(n), pooled over subjects where there
//! are several.

use serde::Serialize;

use super::prompt::{Candidate, Prompt, Prompts};
use crate::engine::Rows;
use crate::tensor::IGNORE_INDEX;
use crate::{Error, Result};

/// A mean of zeros and ones.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Estimate {
    pub mean: f64,
    /// `None` where a subject has a single question.
    pub standard_error: Option<f64>,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Score {
    /// Scored questions.
    pub questions: usize,
    /// Accuracy of choosing at random.
    pub chance: f64,
    pub acc: Estimate,
    pub acc_norm: Estimate,
    pub acc_bytes: Estimate,
    pub subjects: Vec<SubjectScore>,
    /// One for each question, in order.
    #[serde(skip)]
    pub samples: Vec<Sample>,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct SubjectScore {
    pub name: String,
    pub questions: usize,
    pub acc: Estimate,
    pub acc_norm: Estimate,
    pub acc_bytes: Estimate,
}

/// How one question was answered.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Sample {
    pub subject: String,
    /// Line of the subject's file.
    pub line: u64,
    /// Index of the right choice.
    pub answer: usize,
    /// In nats, one for each choice.
    pub log_likelihoods: Vec<f64>,
    /// Whether the likeliest choice is the right one: by the sum, and by it over the length.
    pub acc: bool,
    pub acc_norm: bool,
    pub acc_bytes: bool,
}

/// Scores all questions in rows of [`batch`, `prompts.sequence()`] tokens.
///
/// - `losses` gives the loss (-log p of the target, in nats) of each of the [B,S] tokens of its
///   rows, and anything where the target is [`IGNORE_INDEX`].
/// - `progress` sees (rows done, of).
///
/// Errors: those of `losses`; a log-likelihood that is not finite. Panics if `batch` is 0.
pub fn score(
    prompts: &Prompts,
    batch: usize,
    losses: &mut impl FnMut(Rows) -> Result<Vec<f32>>,
    mut progress: impl FnMut(u64, u64),
) -> Result<Score> {
    let sequence = prompts.sequence();
    let candidates: Vec<&Candidate> = prompts.candidates().collect();
    let mut log_likelihoods = Vec::with_capacity(candidates.len());
    for chunk in candidates.chunks(batch) {
        let mut tokens = vec![prompts.padding; batch * sequence];
        let mut targets = vec![IGNORE_INDEX; batch * sequence];
        for (row, candidate) in chunk.iter().enumerate() {
            let Candidate { tokens: read, scored, .. } = candidate;
            let inputs = read.len() - 1;
            let start = row * sequence;
            tokens[start..start + inputs].copy_from_slice(&read[..inputs]);
            let first = inputs - scored;
            targets[start + first..start + inputs].copy_from_slice(&read[first + 1..]);
        }
        let found = losses(Rows::new(&tokens, &targets))?;
        for (row, candidate) in chunk.iter().enumerate() {
            let end = row * sequence + candidate.tokens.len() - 1;
            let scored = &found[end - candidate.scored..end];
            log_likelihoods.push(-scored.iter().map(|&loss| f64::from(loss)).sum::<f64>());
        }
        progress(log_likelihoods.len() as u64, candidates.len() as u64);
    }
    let mut samples = Vec::with_capacity(prompts.questions.len());
    let mut rest = log_likelihoods.as_slice();
    for prompt in &prompts.questions {
        let (own, others) = rest.split_at(prompt.choices.len());
        rest = others;
        samples.push(sample(prompts, prompt, own)?);
    }
    Ok(summary(prompts, samples))
}

fn sample(prompts: &Prompts, prompt: &Prompt, log_likelihoods: &[f64]) -> Result<Sample> {
    if let Some(value) = log_likelihoods.iter().find(|value| !value.is_finite()) {
        return Err(Error::Data {
            path: prompts.path.clone(),
            what: format!(
                "the model's log-likelihood of a choice in line {} is {value}",
                prompt.line
            ),
            remedy:
                "its weights are damaged or overflow in this dtype: use an earlier checkpoint, \
                     or --dtype f32"
                    .into(),
        });
    }
    let chosen = |length: fn(&Candidate) -> usize| {
        let choices = prompt.choices.iter().zip(log_likelihoods);
        let scores = choices.map(|(choice, value)| value / length(choice) as f64);
        first_largest(scores) == prompt.answer
    };
    Ok(Sample {
        subject: prompts.subjects[prompt.subject].clone(),
        line: prompt.line,
        answer: prompt.answer,
        log_likelihoods: log_likelihoods.to_vec(),
        acc: chosen(|_| 1),
        acc_norm: chosen(|choice| choice.characters),
        acc_bytes: chosen(|choice| choice.bytes),
    })
}

/// Index of the largest value; of the first one where several are.
fn first_largest(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (index, value) in values.enumerate() {
        if value > best.1 {
            best = (index, value);
        }
    }
    best.0
}

fn summary(prompts: &Prompts, samples: Vec<Sample>) -> Score {
    let questions = samples.len();
    let counts = prompts.questions.iter().map(|question| question.choices.len());
    let chance = counts.map(|choices| 1.0 / choices as f64).sum::<f64>() / questions as f64;
    let mut subjects = vec![];
    for (index, name) in prompts.subjects.iter().enumerate() {
        let own = prompts.questions.iter().zip(&samples);
        let own = own.filter(|(prompt, _)| prompt.subject == index).map(|(_, sample)| sample);
        let own: Vec<&Sample> = own.collect();
        let estimate = |right: fn(&Sample) -> bool| {
            Estimate::of(own.iter().filter(|sample| right(sample)).count(), own.len())
        };
        subjects.push(SubjectScore {
            name: name.clone(),
            questions: own.len(),
            acc: estimate(|sample| sample.acc),
            acc_norm: estimate(|sample| sample.acc_norm),
            acc_bytes: estimate(|sample| sample.acc_bytes),
        });
    }
    let pooled = |estimate: fn(&SubjectScore) -> Estimate| {
        Estimate::pooled(subjects.iter().map(|subject| (estimate(subject), subject.questions)))
    };
    Score {
        questions,
        chance,
        acc: pooled(|subject| subject.acc),
        acc_norm: pooled(|subject| subject.acc_norm),
        acc_bytes: pooled(|subject| subject.acc_bytes),
        subjects,
        samples,
    }
}

impl Estimate {
    /// Of `right` ones among `count` questions.
    fn of(right: usize, count: usize) -> Self {
        let (right, count) = (right as f64, count as f64);
        let mean = right / count;
        let squares = right * (1.0 - mean).powi(2) + (count - right) * mean.powi(2);
        let standard_error = (count > 1.0).then(|| (squares / (count - 1.0) / count).sqrt());
        Estimate { mean, standard_error }
    }

    /// Of the questions of all subjects together; the variance is pooled:
    /// sum (n_i - 1) s_i^2 / (sum n_i - k), over sum n_i.
    fn pooled(subjects: impl Iterator<Item = (Estimate, usize)> + Clone) -> Self {
        let all: f64 = subjects.clone().map(|(_, questions)| questions as f64).sum();
        let weighted = subjects.clone().map(|(estimate, n)| estimate.mean * n as f64);
        let mean = weighted.sum::<f64>() / all;
        let groups = subjects.clone().count() as f64;
        let squares: Option<f64> = subjects
            .map(|(Estimate { standard_error, .. }, n)| {
                standard_error.map(|error| (n as f64 - 1.0) * error.powi(2) * n as f64)
            })
            .sum();
        let standard_error = squares.map(|squares| (squares / (all - groups) / all).sqrt());
        Estimate { mean, standard_error }
    }
}
