//! Files of questions, read and checked: .jsonl, MMLU's .csv, or a folder of either.
//!
//! A .csv row is a question, four choices and the letter of the right one, without a header, as in
//! MMLU's own archive. A folder is one task of several subjects, one file each; a folder with
//! test/ in it means that one, and dev/ beside it holds the examples that come before questions.
//! Every error names the file and, where there is one, the line.

use std::fs;
use std::path::{Path, PathBuf};

use super::layouts;
use super::question::{Flaw, Question, Style, letter_index};
use crate::{Error, Result};

/// Columns of MMLU's layout.
const MMLU_COLUMNS: usize = 6;

/// Endings of MMLU's file names, by the part of the data set.
const PARTS: [&str; 3] = ["_test", "_dev", "_val"];

const EXTENSIONS: [&str; 2] = ["jsonl", "csv"];

/// Questions that are scored together.
#[derive(Clone, PartialEq, Debug)]
pub struct Task {
    /// The file or folder.
    pub path: PathBuf,
    /// How its questions are asked by default: the letters for .csv, the texts for .jsonl.
    pub style: Style,
    /// At least one.
    pub subjects: Vec<Subject>,
}

/// The questions of one file: at least one.
#[derive(Clone, PartialEq, Debug)]
pub struct Subject {
    pub path: PathBuf,
    /// The file's name without `_test.csv` and the like.
    pub name: String,
    /// What the line above its questions says that they are about; `None`: there is no such line.
    pub topic: Option<String>,
    pub questions: Vec<Question>,
    /// Questions of which the first ones may be shown with their answers; not scored.
    pub examples: Vec<Question>,
}

impl Task {
    /// Reads a .jsonl file, a .csv file, or a folder of them.
    ///
    /// Errors: nothing to read there; a line that is no question, a question with fewer than two
    /// choices or an answer that is none of them.
    pub fn open(path: &Path) -> Result<Self> {
        let within = path.join("test");
        let found = if within.is_dir() { &within } else { path };
        let mut subjects = vec![];
        for file in files(found)? {
            subjects.push(Subject::open(&file)?);
        }
        let is_csv = subjects.iter().all(|subject| subject.topic.is_some());
        let style = if is_csv { Style::Letters } else { Style::Texts };
        Ok(Task { path: path.to_path_buf(), style, subjects })
    }

    /// Takes the examples from another file or folder: all subjects from its only one, or each from
    /// the one of its name.
    pub fn with_examples_from(mut self, path: &Path) -> Result<Self> {
        let other = Task::open(path)?;
        for subject in &mut self.subjects {
            let named = other.subjects.iter().find(|source| source.name == subject.name);
            let source = match other.subjects.as_slice() {
                [only] => Some(only),
                _ => named,
            };
            subject.examples = match source {
                Some(source) => source.questions.clone(),
                None => {
                    return Err(bad(
                        path,
                        format!("has no examples for the subject {}", subject.name),
                        "give a folder with a file for each subject, or one file for all",
                    ));
                }
            };
        }
        Ok(self)
    }

    pub fn questions(&self) -> usize {
        self.subjects.iter().map(|subject| subject.questions.len()).sum()
    }
}

impl Subject {
    fn open(path: &Path) -> Result<Self> {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if path.extension().is_some_and(|extension| extension == "csv") {
            let part = PARTS.iter().find_map(|part| stem.strip_suffix(part));
            let name = part.map_or(stem.clone(), str::to_string);
            Ok(Subject {
                path: path.to_path_buf(),
                topic: Some(name.replace('_', " ")),
                questions: read_csv(path)?,
                examples: match examples_beside(path, &name) {
                    Some(beside) => read_csv(&beside)?,
                    None => vec![],
                },
                name,
            })
        } else {
            let questions = read_lines(path)?;
            let path = path.to_path_buf();
            Ok(Subject { path, name: stem, topic: None, questions, examples: vec![] })
        }
    }
}

/// dev/NAME_dev.csv beside test/NAME_test.csv, if it is there.
fn examples_beside(path: &Path, name: &str) -> Option<PathBuf> {
    let folder = path.parent()?;
    let is_test = fs::canonicalize(folder).is_ok_and(|folder| folder.ends_with("test"));
    let beside = folder.join("../dev").join(format!("{name}_dev.csv"));
    (is_test && beside.exists()).then_some(beside)
}

/// `path` itself, or the files of a folder by name.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let known = |path: &Path| path.extension().is_some_and(|e| EXTENSIONS.iter().any(|k| e == *k));
    let remedy = "give a .jsonl file, a .csv file in MMLU's layout, or a folder of them";
    if !fs::metadata(path).map_err(Error::io("open the task", path))?.is_dir() {
        return match known(path) {
            true => Ok(vec![path.to_path_buf()]),
            false => Err(bad(path, "is neither .jsonl nor .csv".into(), remedy)),
        };
    }
    let mut files = vec![];
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        let file = entry.map_err(Error::io("list", path))?.path();
        if known(&file) && file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    let is_csv = |file: &PathBuf| file.extension().is_some_and(|extension| extension == "csv");
    match files.iter().filter(|file| is_csv(file)).count() {
        _ if files.is_empty() => Err(bad(path, "holds no .jsonl and no .csv file".into(), remedy)),
        csv if csv > 0 && csv < files.len() => Err(bad(
            path,
            "holds .jsonl and .csv files together, which are asked in two ways".into(),
            "put them into two folders",
        )),
        _ => Ok(files),
    }
}

fn read_lines(path: &Path) -> Result<Vec<Question>> {
    let bytes = fs::read(path).map_err(Error::io("open the task", path))?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
        bad(path, format!("line {line}: no UTF-8"), "convert the file to UTF-8")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let questions = lines.map(|(index, line)| {
        let number = index as u64 + 1;
        checked(layouts::question(line), number).map_err(|flaw| at_line(path, number, flaw))
    });
    not_empty(path, questions.collect::<Result<_>>()?)
}

fn read_csv(path: &Path) -> Result<Vec<Question>> {
    let file = fs::File::open(path).map_err(Error::io("open the task", path))?;
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(file);
    let mut questions = vec![];
    let mut record = csv::StringRecord::new();
    loop {
        match reader.read_record(&mut record) {
            Ok(false) => return not_empty(path, questions),
            Ok(true) => {}
            Err(error) => {
                let line = error.position().map_or(1, csv::Position::line);
                let flaw = Flaw {
                    what: format!("cannot be read: {error}"),
                    remedy: "save the file as comma-separated values in UTF-8".into(),
                };
                return Err(at_line(path, line, flaw));
            }
        }
        let line = record.position().map_or(1, csv::Position::line);
        questions.push(checked(mmlu(&record), line).map_err(|flaw| at_line(path, line, flaw))?);
    }
}

/// A row of MMLU's layout.
fn mmlu(record: &csv::StringRecord) -> Result<Question, Flaw> {
    if record.len() != MMLU_COLUMNS {
        return Err(Flaw {
            what: format!("{} columns, not {MMLU_COLUMNS}", record.len()),
            remedy: "give question,A,B,C,D,letter in each row, texts with commas in quotes".into(),
        });
    }
    let letter = record[MMLU_COLUMNS - 1].trim();
    let Some(answer) = letter_index(letter) else {
        return Err(Flaw {
            what: format!("the answer `{letter}` is no letter"),
            remedy: "end each row with one of A, B, C, D; a row of column names does not belong \
                     into the file"
                .into(),
        });
    };
    Ok(Question {
        question: record[0].trim().to_string(),
        choices: (1..MMLU_COLUMNS - 1).map(|column| record[column].to_string()).collect(),
        answer,
        ..Question::default()
    })
}

/// Refuses what cannot be scored in any style.
fn checked(question: Result<Question, Flaw>, line: u64) -> Result<Question, Flaw> {
    let question = question?;
    let choices = question.choices.len();
    let (what, remedy) = if choices < 2 {
        (format!("{choices} choice, so there is nothing to choose"), "give at least two choices")
    } else if question.answer >= choices {
        (
            format!("the answer is choice {} of {choices}", question.answer + 1),
            "give the index of the right choice (from 0) or its letter (from A)",
        )
    } else if question.ending.as_deref() == Some("") {
        ("nothing follows the gap `_`".to_string(), "leave the question out")
    } else {
        return Ok(Question { line, ..question });
    };
    Err(Flaw { what, remedy: remedy.into() })
}

fn not_empty(path: &Path, questions: Vec<Question>) -> Result<Vec<Question>> {
    match questions.is_empty() {
        true => Err(bad(path, "holds no question".into(), "give one question a line")),
        false => Ok(questions),
    }
}

pub(super) fn at_line(path: &Path, line: u64, flaw: Flaw) -> Error {
    bad(path, format!("line {line}: {}", flaw.what), &flaw.remedy)
}

fn bad(path: &Path, what: String, remedy: &str) -> Error {
    Error::Data { path: path.to_path_buf(), what, remedy: remedy.into() }
}
