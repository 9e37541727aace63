//! src/generate: the decoder against a forward pass without a cache, the choice of tokens, and
//! text as it comes.

use std::path::Path;

use isobath::config::{DeviceKind, Dtype, ModelConfig};
use isobath::cpu::Cpu;
use isobath::data::Tokenizer;
use isobath::engine::{Decoder, DecoderPlan, Evaluator, Parameters, Rows};
use isobath::generate::{Request, Sampling, generate, generate_text};
use isobath::hf::{Export, TokenizerFiles};
use isobath::model::parameters::ParameterTable;
use isobath::tensor::IGNORE_INDEX;
use tempfile::tempdir;

use crate::hf::random_parameters;
use crate::support::small_model;

const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 1 };

/// Four query heads on two kv heads; room for more than two chunks of a prompt.
fn model() -> (ModelConfig, ParameterTable, Vec<f32>) {
    let config = ModelConfig { vocab: 257, max_sequence: 160, ..small_model() };
    let table = ParameterTable::new(&config);
    let parameters = random_parameters(&table, 9);
    (config, table, parameters)
}

fn prompt(length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| i * 89 % 251).collect()
}

fn decoder(context: usize, cpu: &mut Cpu<f32>) -> Decoder {
    let (config, table, parameters) = model();
    let parameters = Parameters::upload(&table, &parameters, cpu).unwrap();
    let plan = DecoderPlan::new(&config, &table, context, |_| 4).unwrap();
    plan.allocate(&parameters, cpu).unwrap()
}

fn continued(prompt: &[u32], count: usize, sampling: &Sampling) -> Vec<u32> {
    let mut cpu = Cpu::new();
    let mut decoder = decoder(160, &mut cpu);
    let tokenizer = Tokenizer::bytes().unwrap();
    generate(&mut decoder, prompt, count, sampling, &tokenizer, &mut cpu, |_| Ok(true)).unwrap()
}

/// -log softmax at every position of `sequence` for every token, from a forward pass over all of
/// it at once: [position][token].
fn losses_of_all_tokens(sequence: &[u32]) -> Vec<Vec<f32>> {
    let (config, table, parameters) = model();
    let tokens: Vec<i32> = sequence.iter().map(|&token| token as i32).collect();
    let size = [1, tokens.len()];
    let mut model = Evaluator::new(&config, &table, &parameters, size, Cpu::<f32>::new()).unwrap();
    let mut losses = vec![Vec::new(); tokens.len()];
    for class in 0..config.vocab as i32 {
        let targets = vec![class; tokens.len()];
        let found = model.losses(Rows::new(&tokens, &targets)).unwrap();
        losses.iter_mut().zip(found).for_each(|(losses, loss)| losses.push(*loss));
    }
    losses
}

#[test]
fn greedy_text_is_the_argmax_of_a_forward_pass_without_a_cache() {
    for length in [1, 63, 64, 100] {
        let prompt = prompt(length);
        let tokens = continued(&prompt, 40, &GREEDY);
        let sequence = [&prompt[..], &tokens].concat();
        let losses = losses_of_all_tokens(&sequence);
        // The model may also have chosen to end the text, with token 256.
        let end = (tokens.len() < 40).then_some(&256);
        for (i, &token) in tokens.iter().chain(end).enumerate() {
            let losses = &losses[length - 1 + i];
            let best = (0..losses.len()).min_by(|&a, &b| losses[a].total_cmp(&losses[b])).unwrap();
            let (found, least) = (losses[token as usize], losses[best]);
            assert!(found <= least + 2e-5, "token {i} after {length}: {token}, not {best}");
        }
    }
}

#[test]
fn a_forward_pass_over_a_prefix_sees_nothing_of_what_follows() {
    let sequence = prompt(90);
    let (whole, part) = (losses_of_all_tokens(&sequence), losses_of_all_tokens(&sequence[..70]));
    for (a, b) in whole.iter().flatten().zip(part.iter().flatten()) {
        assert!((a - b).abs() <= 1e-4 * b.abs(), "{a} and {b}");
    }
}

#[test]
fn decoded_logits_are_those_of_the_whole_sequence() {
    let sequence = prompt(100);
    let losses = losses_of_all_tokens(&sequence);
    let mut cpu = Cpu::new();
    let mut decoder = decoder(100, &mut cpu);
    for (range, at) in [(0..70, 69), (70..71, 70), (71..100, 99)] {
        let logits = decoder.push(&sequence[range], &mut cpu).unwrap();
        let highest = logits.iter().fold(f32::MIN, |max, logit| max.max(*logit)) as f64;
        let sum: f64 = logits.iter().map(|&logit| (logit as f64 - highest).exp()).sum();
        for (logit, loss) in logits.iter().zip(&losses[at]) {
            let found = highest + sum.ln() - *logit as f64;
            assert!((found - *loss as f64).abs() < 1e-4, "at {at}: {found} and {loss}");
        }
    }
    assert_eq!(decoder.room(), 0);
    assert!(decoder.push(&[1], &mut cpu).is_err());
}

#[test]
fn one_likeliest_token_is_greedy_and_a_seed_decides_the_rest() {
    let prompt = prompt(10);
    let greedy = continued(&prompt, 30, &GREEDY);
    let random = Sampling { temperature: 1.5, ..GREEDY };
    assert_eq!(continued(&prompt, 30, &Sampling { top_k: 1, ..random }), greedy);
    assert_eq!(continued(&prompt, 30, &Sampling { top_p: 1e-9, ..random }), greedy);
    assert_eq!(continued(&prompt, 30, &random), continued(&prompt, 30, &random));
    assert_ne!(
        continued(&prompt, 30, &random),
        continued(&prompt, 30, &Sampling { seed: 2, ..random })
    );
}

/// How often each token is chosen, and how often it should be; five standard errors apart at most.
fn check_frequencies(sampling: Sampling, expected: [f64; 5]) {
    let logits = [0.3, 2.0, -1.0, 1.2, 1.2];
    let draws = 20_000;
    let mut counts = [0u64; 5];
    (0..draws).for_each(|index| counts[sampling.choose(&logits, index) as usize] += 1);
    for (count, p) in counts.iter().zip(expected) {
        let (found, error) = (*count as f64 / draws as f64, (p * (1.0 - p) / draws as f64).sqrt());
        assert!(
            (found - p).abs() <= 5.0 * error,
            "{sampling:?}: {counts:?}, expected {expected:?}"
        );
    }
}

#[test]
fn tokens_are_as_frequent_as_the_softmax_says() {
    let softmax = |temperature: f64, kept: [bool; 5]| {
        let weights: [f64; 5] = std::array::from_fn(|i| {
            let logit = [0.3f32, 2.0, -1.0, 1.2, 1.2][i] as f64;
            if kept[i] { (logit / temperature).exp() } else { 0.0 }
        });
        weights.map(|weight| weight / weights.iter().sum::<f64>())
    };
    let all = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 3 };
    check_frequencies(all, softmax(1.0, [true; 5]));
    check_frequencies(Sampling { temperature: 0.5, ..all }, softmax(0.5, [true; 5]));
    check_frequencies(Sampling { temperature: 3.0, ..all }, softmax(3.0, [true; 5]));
    // Of equal logits the lower id comes first.
    let two = [false, true, false, true, false];
    check_frequencies(Sampling { top_k: 2, ..all }, softmax(1.0, two));
    // 0.45 and 0.20 are the two likeliest: together they pass 0.6, one alone does not.
    check_frequencies(Sampling { top_p: 0.6, ..all }, softmax(1.0, two));
    check_frequencies(Sampling { top_k: 4, ..all }, softmax(1.0, [true, true, false, true, true]));
    check_frequencies(
        Sampling { temperature: 0.0, ..all },
        softmax(1.0, [false, true, false, false, false]),
    );
}

#[test]
fn settings_that_are_no_numbers_are_refused() {
    GREEDY.validate().unwrap();
    for sampling in [
        Sampling { temperature: f64::NAN, ..GREEDY },
        Sampling { temperature: -0.1, ..GREEDY },
        Sampling { temperature: f64::INFINITY, ..GREEDY },
        Sampling { top_p: 0.0, ..GREEDY },
        Sampling { top_p: 1.1, ..GREEDY },
        Sampling { top_p: f64::NAN, ..GREEDY },
    ] {
        assert_eq!(sampling.validate().unwrap_err().exit_code(), 2, "{sampling:?}");
    }
}

fn export(folder: &Path) {
    let (config, table, parameters) = model();
    let json = Tokenizer::bytes().unwrap().json().to_string();
    let tokenizer = TokenizerFiles { json, bos: None, eos: Some(256) };
    let (config, table, parameters, tokenizer) = (&config, &table, &parameters[..], &tokenizer);
    let dtype = Dtype::F32;
    Export { config, table, tokenizer, dtype }.write(folder, parameters).unwrap();
}

#[test]
fn pieces_of_text_make_the_whole_text() {
    let folder = tempdir().unwrap();
    export(folder.path());
    let request = Request {
        model: folder.path().to_path_buf(),
        prompt: "Ünd so ".to_string(),
        tokens: 100,
        sampling: Sampling { temperature: 2.0, ..GREEDY },
        device: DeviceKind::Cpu,
        dtype: None,
    };
    let mut pieces = Vec::new();
    let generated = generate_text(&request, |piece| {
        pieces.push(piece.to_string());
        true
    });
    assert_eq!(pieces[0], request.prompt);
    let tokenizer = Tokenizer::bytes().unwrap();
    let prompt = tokenizer.encode(&request.prompt).unwrap();
    let tokens = continued(&prompt, 100, &request.sampling);
    assert_eq!(generated.unwrap().tokens, tokens.len());
    let bytes: Vec<u8> = tokens.iter().map(|&token| token as u8).collect();
    let whole = tokenizer.decode(&tokens).unwrap();
    assert_eq!(pieces[1..].concat(), whole, "{bytes:x?}");

    let mut shown = 0;
    let left = generate_text(&request, |_| {
        shown += 1;
        false
    });
    assert_eq!((left.unwrap().tokens, shown <= 2), (0, true), "a reader who leaves at once");
}

#[test]
fn the_context_ends_a_text_and_a_longer_prompt_is_refused() {
    let folder = tempdir().unwrap();
    export(folder.path());
    let request = |prompt: usize| Request {
        model: folder.path().to_path_buf(),
        prompt: "a".repeat(prompt),
        tokens: usize::MAX,
        sampling: Sampling { temperature: 1.0, ..GREEDY },
        device: DeviceKind::Cpu,
        dtype: None,
    };
    let generated = generate_text(&request(159), |_| true).unwrap();
    assert_eq!(
        (generated.tokens, generated.stopped),
        (2, "the end of the model's longest sequence")
    );
    let mut shown = String::new();
    let refused = generate_text(&request(160), |piece| {
        shown += piece;
        true
    });
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("160 tokens") && message.contains("at most 160"), "{message}");
    assert_eq!(shown, "", "nothing is shown of a prompt that cannot be continued");
}

#[test]
fn a_target_that_is_not_predicted_has_no_loss() {
    let (config, table, parameters) = model();
    let mut model =
        Evaluator::new(&config, &table, &parameters, [1, 8], Cpu::<f32>::new()).unwrap();
    let rows = Rows::new(&[1; 8], &[IGNORE_INDEX; 8]);
    assert_eq!(model.evaluate(rows).unwrap(), (0.0, 0));
}
