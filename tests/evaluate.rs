//! src/evaluate.rs: the reported loss against a computation by hand.

use std::fs;
use std::path::Path;

use isobath::config::DeviceKind;
use isobath::cpu::Cpu;
use isobath::engine::{Evaluator, Rows};
use isobath::evaluate::{Report, Request, evaluate};
use isobath::loaded::LoadedModel;
use isobath::train::{Console, Interrupt, Run, train};
use tempfile::{TempDir, tempdir};

use crate::data::AUSTEN;
use crate::support::{metrics, run_config, small_model};

/// 1000 bytes of held-out text, and a run that was evaluated on it.
fn trained() -> (TempDir, String) {
    let folder = tempdir().unwrap();
    let [text, valid] = ["text.txt", "valid.txt"].map(|name| folder.path().join(name));
    fs::write(&text, &AUSTEN[..4000]).unwrap();
    fs::write(&valid, &AUSTEN[10_000..11_000]).unwrap();
    let valid = valid.display().to_string();
    let mut config = run_config(&small_model());
    config.model.vocab = 0;
    config.data.train = vec![text.display().to_string()];
    config.data.valid = vec![valid.clone()];
    config.data.sequence = 48;
    config.optimizer.lr = 1e-2;
    let run = Run { config, folder: folder.path().join("run"), resume: false };
    train(run, Interrupt::none(), &mut Console::quiet()).unwrap();
    (folder, valid)
}

fn report(model: &Path, data: &str, sequence: usize, batch: usize) -> Report {
    let request = Request {
        model: model.to_path_buf(),
        data: vec![data.to_string()],
        field: "text".to_string(),
        sequence: Some(sequence),
        batch,
        device: DeviceKind::Cpu,
        dtype: None,
    };
    evaluate(&request, |_, _| {}).unwrap()
}

#[track_caller]
fn assert_near(what: &str, found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 1e-9, "{what}: {found}, expected {expected}");
}

#[test]
fn the_loss_is_the_mean_over_every_token_but_the_first_whatever_the_batch() {
    let (folder, valid) = trained();
    let run = folder.path().join("run");
    let model = LoadedModel::open(&run).unwrap();
    let text = fs::read(&valid).unwrap();
    // The bytes and the end of the document; 1000 predictions.
    let ids: Vec<i32> = text.iter().map(|&byte| byte as i32).chain([256]).collect();
    for sequence in [48, 37, 64] {
        let (mut sum, mut count) = (0.0, 0);
        for start in (0..1000).step_by(sequence) {
            let length = sequence.min(1000 - start);
            let LoadedModel { config, table, parameters, .. } = &model;
            let size = [1, length];
            let mut one =
                Evaluator::new(config, table, parameters, size, Cpu::<f32>::new()).unwrap();
            let tokens = &ids[start..start + length];
            let targets = &ids[start + 1..start + 1 + length];
            for loss in one.losses(Rows::new(tokens, targets)).unwrap() {
                sum += *loss as f64;
                count += 1;
            }
        }
        assert_eq!(count, 1000);
        let loss = sum / 1000.0;
        for batch in [1, 3, 8] {
            let found = report(&run, &valid, sequence, batch);
            // A shorter window takes another way through the kernels: a few units in f32.
            let near = (found.loss / loss - 1.0).abs() < 1e-6;
            assert!(near, "{batch} windows of {sequence}: {} and {loss}", found.loss);
            assert_eq!((found.tokens, found.text_bytes, found.sequence), (1000, 1000, sequence));
            assert_near("perplexity", found.perplexity, found.loss.exp());
            let bits = found.loss * 1000.0 / std::f64::consts::LN_2 / 1000.0;
            assert_near("bits per byte", found.bits_per_byte, bits);
        }
    }
}

#[test]
fn a_checkpoint_has_the_loss_that_its_run_reported() {
    let (folder, valid) = trained();
    let run = folder.path().join("run");
    let last = metrics(&run).pop().unwrap();
    let found = report(&run, &valid, 48, 2);
    assert_near("loss", found.loss, last["val_loss"].as_f64().unwrap());
    assert_near("bits", found.bits_per_byte, last["val_bits_per_byte"].as_f64().unwrap());
    assert_near("perplexity", found.perplexity, last["val_perplexity"].as_f64().unwrap());
    assert_eq!(last["val_tokens"], found.tokens);
}
