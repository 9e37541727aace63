//! Multiple-choice tasks: how often a model finds the right answer likelier than the others.
//!
//! A [`Task`] (questions from files) and a tokenizer make [`Prompts`] (what the model reads), and
//! [`score`] asks for the losses of their tokens: whoever calls it decides which model answers, be
//! it one without a block. [`evaluate()`] does all of it for a model on disk; [`draw`] makes a task
//! of any text. Formats and definitions are those of lm-evaluation-harness 0.4.13.

mod draw;
mod evaluate;
mod file;
mod layouts;
mod prompt;
mod question;
mod score;

pub use draw::{DrawOptions, draw, json_lines};
pub use evaluate::{Report, Request, evaluate};
pub use file::{Subject, Task};
pub use prompt::{Candidate, Prompt, Prompts};
pub use question::{Question, Style};
pub use score::{Estimate, Sample, Score, SubjectScore, score};

/// The version of lm-evaluation-harness whose formats and definitions these are.
pub const HARNESS: &str = "0.4.13";
