//! A question, and the text that a model reads of it.
//!
//! The wording is that of lm-evaluation-harness: "Question: ...\nAnswer:" with the choices' texts
//! after it (ARC, PIQA and others), or MMLU's list of choices with their letters after it. Which
//! tokens that becomes is decided in `prompt`.

use crate::config::choice::choice;

/// What is wrong with a line, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Flaw {
    pub what: String,
    pub remedy: String,
}

/// One question with one right answer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Question {
    /// What stands before the question, or the text that the choices continue. May be empty.
    pub context: String,
    /// Empty where the choices continue `context`.
    pub question: String,
    pub choices: Vec<String>,
    /// What is scored after each choice, in place of the choice itself: the choices are then
    /// beginnings of one sentence that this text ends (WinoGrande).
    pub ending: Option<String>,
    /// Index of the right choice.
    pub answer: usize,
    /// Line of the file, from 1; 0: it was not read from one.
    pub line: u64,
}

choice! {
    /// What is scored of a choice.
    pub enum Style {
        /// Its text, after the question.
        Texts = "texts",
        /// Its letter, after the question and the list of all choices.
        Letters = "letters",
    }
}

/// One choice as the model is asked for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Asked<'a> {
    pub context: String,
    /// With the space that stands before it.
    pub continuation: String,
    /// What length-normalised log-likelihoods are divided by the length of.
    pub measured: &'a str,
}

/// One letter a choice, in order.
const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// The letter of choice `index`, which is below 26.
pub(super) fn letter(index: usize) -> &'static str {
    &LETTERS[index..index + 1]
}

/// Which choice a letter means.
pub(super) fn letter_index(text: &str) -> Option<usize> {
    if text.len() == 1 { LETTERS.find(text) } else { None }
}

impl Question {
    /// What makes it impossible to ask in this style.
    pub(super) fn flaw(&self, style: Style) -> Option<Flaw> {
        let empty = self.choices.iter().position(|choice| choice.trim().is_empty());
        let (what, remedy) = match (style, empty) {
            (Style::Texts, None) => return None,
            (Style::Texts, Some(index)) => (
                format!("choice {} of {} is empty", index + 1, self.choices.len()),
                "write a text for every choice",
            ),
            (Style::Letters, _) if self.ending.is_some() => {
                ("its choices are parts of a sentence".to_string(), "ask it with --style texts")
            }
            (Style::Letters, _) if self.choices.len() > LETTERS.len() => {
                ("there are more choices than letters".to_string(), "ask it with --style texts")
            }
            (Style::Letters, _) => return None,
        };
        Some(Flaw { what, remedy: remedy.into() })
    }

    /// All choices in the order of the file, without the examples that come before.
    pub(super) fn asked(&self, style: Style) -> Vec<Asked<'_>> {
        let context = self.stem(style);
        let choices = self.choices.iter().enumerate();
        choices
            .map(|(index, choice)| match (style, &self.ending) {
                (Style::Letters, _) => Asked {
                    context: context.clone(),
                    continuation: format!(" {}", letter(index)),
                    measured: letter(index),
                },
                (Style::Texts, None) => Asked {
                    context: context.clone(),
                    continuation: format!(" {choice}"),
                    measured: choice,
                },
                (Style::Texts, Some(ending)) => Asked {
                    context: choice.clone(),
                    continuation: format!(" {ending}"),
                    measured: choice,
                },
            })
            .collect()
    }

    /// The question with its right answer, as an example before another one.
    pub(super) fn shot(&self, style: Style) -> String {
        let Asked { context, continuation, .. } = &self.asked(style)[self.answer];
        format!("{context}{continuation}\n\n")
    }

    /// What the choices are scored after.
    fn stem(&self, style: Style) -> String {
        let Question { context, question, .. } = self;
        let asked = match (style, context.as_str(), question.as_str()) {
            (Style::Texts, _, "") => return context.clone(),
            (Style::Texts, "", _) => format!("Question: {question}"),
            (Style::Texts, _, _) => format!("{context}\nQuestion: {question}"),
            (Style::Letters, "", _) => question.clone(),
            (Style::Letters, _, "") => context.clone(),
            (Style::Letters, _, _) => format!("{context}\n{question}"),
        };
        let list = match style {
            Style::Texts => String::new(),
            Style::Letters => {
                let lines = self.choices.iter().enumerate();
                lines.map(|(index, choice)| format!("\n{}. {choice}", letter(index))).collect()
            }
        };
        format!("{asked}{list}\nAnswer:")
    }
}

impl Style {
    /// The line that names the subject of MMLU's questions.
    pub(super) fn description(self, topic: &str) -> String {
        let kind = match self {
            Style::Texts => "questions",
            Style::Letters => "multiple choice questions",
        };
        format!("The following are {kind} (with answers) about {topic}.\n\n")
    }
}
