//! Multiple-choice tasks; one module for each part of src/tasks.

mod command;
mod draw;
mod file;
mod prompt;
mod score;

use std::fs;
use std::path::Path;

use isobath::data::tokenizer::Tokenizer;
use isobath::tasks::{Prompts, Style, Task};
use tempfile::tempdir;

/// A task from the text of one file.
fn task(name: &str, text: &str) -> isobath::Result<Task> {
    let folder = tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    Task::open(&path)
}

/// A folder as MMLU's archive has them: two subjects, three and two questions, two examples each.
fn mmlu(folder: &Path) {
    let row = |question: &str, answer: char| format!("{question},one,two,three,four,{answer}\n");
    let rows = |questions: &[(&str, char)]| -> String {
        questions.iter().map(|&(question, answer)| row(question, answer)).collect()
    };
    let files = [
        ("test/world_facts_test.csv", rows(&[("Q1", 'A'), ("Q2", 'B'), ("Q3", 'D')])),
        ("test/anatomy_test.csv", rows(&[("Q4", 'C'), ("Q5", 'A')])),
        ("dev/world_facts_dev.csv", rows(&[("E1", 'B'), ("E2", 'A')])),
        ("dev/anatomy_dev.csv", rows(&[("E3", 'D'), ("E4", 'C')])),
    ];
    for (name, text) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

fn bytes(task: &Task, style: Option<Style>, shots: usize, window: usize) -> Prompts {
    Prompts::new(task, &Tokenizer::bytes().unwrap(), style, shots, window).unwrap()
}
