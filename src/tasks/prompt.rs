//! What a model reads of a task: for every choice the tokens, and how many of the last are scored.
//!
//! A prompt is the subject's description, the examples with their answers, and the question, each
//! apart from the next by an empty line. As lm-evaluation-harness does it, white space at the end
//! of the context goes to the continuation; context and whole text are tokenized each on its own,
//! and the whole's tokens after as many as the context has are the continuation's; a row that is
//! too long loses tokens on its left.

use std::path::PathBuf;

use rayon::prelude::*;

use super::file::{Subject, Task, at_line};
use super::question::{Asked, Flaw, Question, Style};
use crate::data::tokenizer::Tokenizer;
use crate::{Error, Result};

/// A task in tokens, ready to be scored with as many models of one tokenizer as one likes.
#[derive(Clone, PartialEq, Debug)]
pub struct Prompts {
    pub path: PathBuf,
    pub style: Style,
    /// Examples before each question.
    pub shots: usize,
    /// Names of the subjects.
    pub subjects: Vec<String>,
    /// Subject by subject.
    pub questions: Vec<Prompt>,
    /// Questions that lost tokens on their left.
    pub truncated: usize,
    /// Id that rows are filled up with.
    pub padding: i32,
}

/// A question in tokens.
#[derive(Clone, PartialEq, Debug)]
pub struct Prompt {
    /// Index of its subject.
    pub subject: usize,
    /// Line of its file; 0: it was not read from one.
    pub line: u64,
    /// Index of the right choice.
    pub answer: usize,
    pub choices: Vec<Candidate>,
    pub truncated: bool,
}

/// A choice in tokens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Context and continuation: at most one more than the model's window, at least two.
    pub tokens: Vec<i32>,
    /// How many of the last tokens are the continuation: at least one, and never the first token.
    pub scored: usize,
    /// Length of the choice without the space before it.
    pub characters: usize,
    pub bytes: usize,
}

impl Prompts {
    /// Asks the questions of `task` with `shots` examples before each: the subject's own examples,
    /// or else its first questions, which are then not scored.
    ///
    /// - `style`: the task's own if `None`.
    /// - `window`: tokens that the model reads at most.
    ///
    /// Errors: too few examples, a question that cannot be asked in this style, a choice that is
    /// longer than the window or has no token of its own, a window of 0.
    pub fn new(
        task: &Task,
        tokenizer: &Tokenizer,
        style: Option<Style>,
        shots: usize,
        window: usize,
    ) -> Result<Self> {
        let style = style.unwrap_or(task.style);
        let reader = Reader::new(tokenizer, window)?;
        let mut questions = vec![];
        for (index, subject) in task.subjects.iter().enumerate() {
            let (examples, scored) = split(subject, shots)?;
            let flaw = examples.iter().chain(scored).find_map(|question| {
                question.flaw(style).map(|flaw| at_line(&subject.path, question.line, flaw))
            });
            if let Some(flaw) = flaw {
                return Err(flaw);
            }
            let mut before =
                subject.topic.as_deref().map_or(String::new(), |topic| style.description(topic));
            before.extend(examples.iter().map(|example| example.shot(style)));
            let read = |question: &Question| {
                let read = reader.prompt(&before, question, style, index);
                read.map_err(|error| match error {
                    Unreadable::Flaw(flaw) => at_line(&subject.path, question.line, flaw),
                    Unreadable::Error(error) => error,
                })
            };
            let read: Vec<Prompt> = scored.par_iter().map(read).collect::<Result<_>>()?;
            questions.extend(read);
        }
        Ok(Prompts {
            path: task.path.clone(),
            style,
            shots,
            subjects: task.subjects.iter().map(|subject| subject.name.clone()).collect(),
            truncated: questions.iter().filter(|question| question.truncated).count(),
            questions,
            padding: tokenizer.end_of_text().unwrap_or(0) as i32,
        })
    }

    /// Input tokens of the longest row, at most the window: the S of the [B,S] rows.
    pub fn sequence(&self) -> usize {
        self.candidates().map(|candidate| candidate.tokens.len() - 1).max().unwrap_or(1)
    }

    /// All choices of all questions, in order.
    pub fn candidates(&self) -> impl Iterator<Item = &Candidate> {
        self.questions.iter().flat_map(|question| &question.choices)
    }
}

/// The examples and the scored questions of a subject.
fn split(subject: &Subject, shots: usize) -> Result<(&[Question], &[Question])> {
    let Subject { path, questions, examples, .. } = subject;
    let too_few = |found: usize, what: &str, remedy: &str| Error::Data {
        path: path.clone(),
        what: format!("{shots} examples before each question, but {found} {what}"),
        remedy: remedy.into(),
    };
    if !examples.is_empty() || shots == 0 {
        match examples.get(..shots) {
            Some(shown) => Ok((shown, questions)),
            None => Err(too_few(examples.len(), "to take them from", "give fewer --shots")),
        }
    } else if questions.len() > shots {
        Ok(questions.split_at(shots))
    } else {
        let remedy = "give fewer --shots, or other questions as examples with --shots-from";
        Err(too_few(questions.len(), "questions in all, and examples are not scored", remedy))
    }
}

/// A question that cannot be read: its own fault, whose line the caller knows, or another.
enum Unreadable {
    Flaw(Flaw),
    Error(Error),
}

impl From<Error> for Unreadable {
    fn from(error: Error) -> Self {
        Unreadable::Error(error)
    }
}

/// Turns text into rows.
struct Reader<'a> {
    tokenizer: &'a Tokenizer,
    /// What the tokenizer puts before a text.
    start: Option<u32>,
    /// What a continuation without context follows.
    prefix: Option<u32>,
    window: usize,
}

impl<'a> Reader<'a> {
    fn new(tokenizer: &'a Tokenizer, window: usize) -> Result<Self> {
        if window == 0 {
            return Err(Error::Usage {
                what: "a window of 0 tokens".into(),
                remedy: "give a larger --sequence".into(),
            });
        }
        let start = tokenizer.start_of_text()?;
        Ok(Reader { tokenizer, start, prefix: start.or(tokenizer.end_of_text()), window })
    }

    fn prompt(
        &self,
        before: &str,
        question: &Question,
        style: Style,
        subject: usize,
    ) -> Result<Prompt, Unreadable> {
        let mut truncated = false;
        let mut choices: Vec<Candidate> = vec![];
        for (index, asked) in question.asked(style).iter().enumerate() {
            let (context, continuation) = self.pair(before, asked)?;
            let scored = continuation.len();
            let place = || format!("choice {} of {}", index + 1, question.choices.len());
            if scored == 0 {
                return Err(Unreadable::Flaw(Flaw {
                    what: format!("{} has no token of its own after the context", place()),
                    remedy: "leave the question out, or use another tokenizer".into(),
                }));
            }
            if scored > self.window {
                return Err(Unreadable::Flaw(Flaw {
                    what: format!(
                        "{} has {scored} tokens; the model reads at most {}",
                        place(),
                        self.window
                    ),
                    remedy: "leave the question out, or shorten its choices".into(),
                }));
            }
            let row: Vec<i32> = context.iter().chain(&continuation).map(|&id| id as i32).collect();
            let lost = row.len().saturating_sub(self.window + 1);
            truncated |= lost > 0;
            choices.push(Candidate {
                tokens: row[lost..].to_vec(),
                scored,
                characters: asked.measured.chars().count(),
                bytes: asked.measured.len(),
            });
        }
        let Question { answer, line, .. } = *question;
        Ok(Prompt { subject, line, answer, choices, truncated })
    }

    /// Tokens of the context, at least one, and of the continuation.
    fn pair(&self, before: &str, asked: &Asked) -> Result<(Vec<u32>, Vec<u32>), Unreadable> {
        let whole = [before, &asked.context, &asked.continuation].concat();
        let context_bytes = before.len() + asked.context.len();
        let context = whole[..context_bytes].trim_end_matches(is_space);
        let whole_ids = self.tokenizer.encode(&whole)?;
        let context_ids = self.tokenizer.encode(context)?;
        let continuation = whole_ids.get(context_ids.len()..).unwrap_or_default().to_vec();
        let context: Vec<u32> = self.start.into_iter().chain(context_ids).collect();
        if !context.is_empty() {
            return Ok((context, continuation));
        }
        match self.prefix {
            Some(prefix) => Ok((vec![prefix], continuation)),
            None => Err(Unreadable::Flaw(Flaw {
                what: "the choices stand alone, and the tokenizer has no token to begin with"
                    .into(),
                remedy: "write a context or a question before them".into(),
            })),
        }
    }
}

/// White space as Python's `str.rstrip` sees it.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}
