//! Supervised fine-tuning: answers are learnt, layers rest, epochs are counted.

use std::fs;
use std::path::{Path, PathBuf};

use isobath::config::{Attention, Config, Format, ModelConfig, Rows as RowKind};
use isobath::cpu::Cpu;
use isobath::engine::{Plan, Rows, Trainer};
use isobath::model::init::initial_parameters;
use isobath::optim::LayerSampling;
use isobath::rundir::checkpoint_folder;
use isobath::train::{Console, Interrupt, Run, train};
use serde_json::{Value, json};
use tempfile::tempdir;

use super::{assert_same_state, assert_succeeds, copy_folder, run};
use crate::data::assert_message;
use crate::support::{isobath, metrics, run_config, set_state, small_model, tokens};

/// Writes (question, answer) lines.
fn chat(folder: &Path, count: usize) -> PathBuf {
    let words = ["hill", "lane", "carriage", "letter", "ball", "sister", "garden", "tea"];
    let line = |i: usize| {
        let (question, answer) =
            (format!("{}?", words[i % 8]), format!("{}!", words[(i * 5 + 3) % 8]));
        json!({ "instruction": question.repeat(1 + i / 8), "output": answer }).to_string() + "\n"
    };
    let path = folder.join("chat.jsonl");
    fs::write(&path, (0..count).map(line).collect::<String>()).unwrap();
    path
}

fn tuning(data: &Path) -> Config {
    let mut config = run_config(&ModelConfig { vocab: 0, max_sequence: 128, ..small_model() });
    config.data.train = vec![data.display().to_string()];
    config.data.format = Format::Supervised;
    config.data.attention = Attention::Document;
    config.data.sequence = 96;
    config
}

#[test]
fn what_was_learnt_is_answered() {
    let folder = tempdir().unwrap();
    let data = chat(folder.path(), 8);
    let out = folder.path().join("run");
    let mut config = tuning(&data);
    (config.data.held_out, config.train.micro_batch) = (0.0, 1);
    (config.train.steps, config.optimizer.lr, config.optimizer.weight_decay) = (240, 8e-3, 0.0);
    run(&config, &out, false);
    let losses: Vec<f64> =
        metrics(&out).iter().map(|step| step["loss"].as_f64().unwrap()).collect();
    assert!(losses[0] > 4.0 && losses[239] < 0.1, "{} to {}", losses[0], losses[239]);
    for (question, answer) in [("hill?", "letter!"), ("ball?", "tea!")] {
        let arguments =
            ["generate", out.to_str().unwrap(), "--ask", question, "--temperature", "0"];
        let output = isobath().args(arguments).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let expected = format!("### User:\n{question}\n\n### Assistant:\n{answer}\n");
        assert_eq!(text, expected, "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8(output.stderr).unwrap().contains("the model ended the text"));
    }
    let output = isobath().args(["generate", "x", "--ask", "a", "--prompt", "b"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn examples_that_share_a_row_lose_what_each_loses_alone() {
    let folder = tempdir().unwrap();
    let data = chat(folder.path(), 40);
    let held_out = |rows| {
        let mut config = tuning(&data);
        (config.data.held_out, config.train.steps, config.optimizer.lr) = (0.5, 1, 1e-12);
        config.optimizer.warmup = 0;
        config.data.rows = rows;
        let out = folder.path().join(format!("{rows}"));
        run(&config, &out, false);
        let step = metrics(&out).remove(0);
        ["val_loss", "val_bits_per_byte"].map(|name| step[name].as_f64().unwrap())
    };
    let (packed, alone) = (held_out(RowKind::Packed), held_out(RowKind::Document));
    for (packed, alone) in packed.into_iter().zip(alone) {
        assert!((packed - alone).abs() < 1e-6 * alone, "{packed} packed, {alone} alone");
    }
    // Of the bytes of the answers alone: their words, the mark after each, and an end of no bytes.
    let bits_per_token = packed[0] / std::f64::consts::LN_2;
    let answers: Vec<String> = fs::read_to_string(&data)
        .unwrap()
        .lines()
        .skip(20)
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["output"].as_str().unwrap().into())
        .collect();
    let bytes = answers.concat().len() as f64;
    let expected = bits_per_token * (bytes + 20.0) / bytes;
    assert!((packed[1] - expected).abs() < 1e-9, "{} bits, expected {expected}", packed[1]);
}

#[test]
fn sampled_layers_are_resumed_in_every_bit() {
    let folder = tempdir().unwrap();
    let data = chat(folder.path(), 50);
    let [base, whole, halves] = ["base", "whole", "halves"].map(|name| folder.path().join(name));
    let mut config = tuning(&data);
    config.model.layers = 5;
    config.train.steps = 2;
    run(&config, &base, false);

    config.train.init_from = Some(base);
    (config.train.epochs, config.train.steps) = (2.0, 999_999);
    (config.train.grad_accumulation, config.train.eval_every) = (2, 3);
    (config.optimizer.sampled_layers, config.optimizer.sample_interval) = (2, 3);
    config.data.tokenizer = String::new(); // that of the model
    config.checkpoint.every = 4;
    config.checkpoint.keep_last = 0;
    let outcome = run(&config, &whole, false);
    let saved = Config::resolve(None, Some(&whole.join("run.toml")), &[]).unwrap();
    assert_eq!((saved.train.steps, saved.train.epochs), (outcome.steps, 2.0));
    assert!((5..40).contains(&outcome.steps), "{} steps", outcome.steps);
    copy_folder(&whole, &halves);
    for step in (5..=outcome.steps).filter(|step| step.is_multiple_of(4) || *step == outcome.steps)
    {
        fs::remove_dir_all(checkpoint_folder(&halves, step)).unwrap();
    }
    run(&saved, &halves, true);
    assert_eq!(metrics(&whole), metrics(&halves));
    assert_same_state(&whole, &halves, outcome.steps);

    // Other frozen layers would be another run.
    let mut other = saved.clone();
    other.optimizer.sampled_layers = 1;
    let again = Run { config: other, folder: halves, resume: true };
    let refused = train(again, Interrupt::none(), &mut Console::quiet());
    assert_message(refused, &["optimizer.sampled_layers is 1, the checkpoint has 2"]);
}

#[test]
fn a_frozen_layer_keeps_every_bit_and_the_others_move_as_without_any() {
    let mut config = run_config(&ModelConfig { layers: 4, ..small_model() });
    (config.optimizer.clip, config.train.steps) = (0.0, 6);
    let trainer = |sampled| {
        let mut config = config.clone();
        (config.optimizer.sampled_layers, config.optimizer.sample_interval) = (sampled, 2);
        let cpu = Cpu::<f32>::new();
        let mut trainer = Trainer::new(Plan::new(&config, &cpu).unwrap(), &config, cpu).unwrap();
        let parameters = initial_parameters(trainer.table(), 3);
        trainer.set_parameters(&parameters).unwrap();
        trainer
    };
    let ids = tokens(1, 64, 53);
    let targets = tokens(2, 64, 53);
    let rows = || std::iter::once(Rows::new(&ids, &targets));
    let (mut all, mut some) = (trainer(0), trainer(2));
    let table = all.table().clone();
    let mut sampling = LayerSampling::new(config.seed, 4, 2, 2);
    for update in 1..=6 {
        sampling.go_to(update);
        let state = some.state().unwrap();
        set_state(&mut all, &state);
        some.begin(update);
        all.begin(update);
        let [found, plain] = [&mut some, &mut all].map(|it| it.accumulate(rows()).unwrap());
        assert_eq!(found.loss, plain.loss);
        let gradients = some.gradients().unwrap();
        let norm = gradients.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!((found.grad_norm - norm).abs() < 1e-5 * norm, "the norm of what is trained");
        assert!(found.grad_norm < plain.grad_norm);
        some.update(&config.optimizer, update, 1e-3).unwrap();
        let now = some.state().unwrap();
        for layer in 1..=4 {
            let range = table.block_range(layer);
            let same = (0..3).all(|i| now[i][range.clone()] == state[i][range.clone()]);
            assert_eq!(same, sampling.count(layer).is_none(), "layer {layer}, update {update}");
            let Some(count) = sampling.count(layer) else { continue };
            // The same step of the whole model, with this layer's own bias correction.
            set_state(&mut all, &state);
            all.accumulate(rows()).unwrap();
            all.update(&config.optimizer, count, 1e-3).unwrap();
            let whole = all.state().unwrap();
            for i in 0..3 {
                assert!(now[i][range.clone()] == whole[i][range.clone()], "layer {layer}");
            }
        }
        let embedding = table.get(table.embedding()).range();
        assert!(now[0][embedding.clone()] != state[0][embedding], "the embedding is frozen");
        let head = table.get(table.head()).range();
        assert!(now[0][head.clone()] != state[0][head], "the head is frozen");
    }
    let refused = some.update(&config.optimizer, 9, 1e-3);
    assert_message(refused, &["update 9 with the gradient of update 6"]);
}

#[test]
fn epochs_are_counted_in_steps_and_said() {
    let folder = tempdir().unwrap();
    let data = chat(folder.path(), 30);
    let out = folder.path().join("run");
    let train = format!("data.train={data:?}");
    let sets = [
        "model.hidden=16",
        "model.layers=2",
        "model.heads=2",
        "model.kv_heads=1",
        "model.ffn=24",
        "data.tokenizer=bytes",
        "data.rows=document",
        "data.held_out=0.2",
        "dtype=f32",
        "train.micro_batch=5",
        "train.epochs=1.5",
        &train,
    ];
    let arguments = |preset: &str, more: &[&str]| -> Vec<String> {
        let start =
            ["train", "--preset", preset, "--device", "cpu", "--out", out.to_str().unwrap()];
        let sets = sets.iter().chain(more).flat_map(|set| ["--set", set]);
        start.into_iter().chain(sets).map(String::from).collect()
    };
    let refused = isobath().args(arguments("sft", &["optimizer.warmup=9"])).output().unwrap();
    let message = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{message}");
    assert!(
        message.contains("optimizer.warmup = 9: longer than the run, train.steps = 8"),
        "{message}"
    );

    // 24 examples, 36 rows in 1.5 epochs, 8 steps of 5.
    let message = assert_succeeds(&arguments("sft-lisa", &["optimizer.sampled_layers=1"]));
    for part in [
        "24 training examples",
        "6 held out",
        "train.epochs = 1.5: 8 steps of 5 rows, 24 rows in an epoch (train.steps is not read)",
        "--ask",
    ] {
        assert!(message.contains(part), "no {part:?} in {message}");
    }
    assert_eq!(metrics(&out).len(), 8);
}

#[test]
fn what_cannot_be_tuned_on_is_refused() {
    let folder = tempdir().unwrap();
    let data = chat(folder.path(), 10);
    let refused = |change: fn(&mut Config)| {
        let mut config = tuning(&data);
        change(&mut config);
        let run = Run { config, folder: folder.path().join("run"), resume: false };
        let found = train(run, Interrupt::none(), &mut Console::quiet());
        let _ = fs::remove_dir_all(folder.path().join("run"));
        found
    };
    assert_message(
        refused(|config| config.data.tokenizer = "train:300".into()),
        &["data.tokenizer is train:300", "--init"],
    );
    assert_message(
        refused(|config| config.data.train = vec!["bundled:austen".into()]),
        &["bundled:austen", "no .jsonl file"],
    );
    assert_message(
        refused(|config| config.data.sequence = 8),
        &["chat.jsonl", "has an answer within 8 tokens"],
    );
}
