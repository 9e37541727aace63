//! Whole models on the kernels: ten training steps and every gradient against the CPU, the same
//! bits whatever the schedule, and text from a cache.

use isobath::backend::{Backend, Footprint};
use isobath::config::{Attention, Config, Dtype, LnsPosition, ModelConfig, Placement, Recompute};
use isobath::cpu::Cpu;
use isobath::cuda::host::{Host, Options};
use isobath::cuda::{Cuda, Driver, Family, Fusion, Fusions};
use isobath::engine::{DecoderPlan, Evaluator, Parameters, Plan, Rows, Trainer};
use isobath::model::init::initial_parameters;
use isobath::model::parameters::ParameterTable;
use isobath::optim;
use isobath::tensor::IGNORE_INDEX;

use super::counting::Counting;
use super::machines::*;
use super::plain::Plain;
use crate::support::{run_config, small_model, tokens};

const STEPS: u64 = 10;

/// LNS with grouped kv heads, an odd FFN and vocabulary, a sequence that no tile divides.
fn config(dtype: Dtype, recompute: Recompute) -> Config {
    let model = ModelConfig {
        hidden: 128,
        layers: 3,
        heads: 4,
        kv_heads: 2,
        ffn: 203,
        vocab: 257,
        init_std: 0.06,
        ..small_model()
    };
    let mut config = run_config(&model);
    config.dtype = dtype;
    config.data.sequence = 37;
    config.train.steps = STEPS;
    config.train.recompute = recompute;
    config.train.grad_accumulation = 2;
    config.train.z_loss = 1e-4;
    config.optimizer.lr = 3e-3;
    config
}

/// Tokens and targets of one micro-batch of text; some targets are not predicted.
fn batch(config: &Config, step: u64, micro_batch: u64) -> (Vec<i32>, Vec<i32>) {
    let count = config.train.micro_batch * config.data.sequence;
    let start = (2 * step + micro_batch) as usize * count;
    let text = &crate::data::AUSTEN.as_bytes()[start..=start + count];
    let ids: Vec<i32> = text.iter().map(|&byte| i32::from(byte)).collect();
    let mut targets = ids[1..].to_vec();
    targets.iter_mut().step_by(11).for_each(|target| *target = IGNORE_INDEX);
    (ids[..count].to_vec(), targets)
}

/// Where documents begin, where tokens attend to their own alone: at a third of each row, at the
/// next token, and at three quarters.
fn document_starts(config: &Config) -> Option<Vec<i32>> {
    let sequence = config.data.sequence;
    let begins = [0, sequence / 3, sequence / 3 + 1, sequence * 3 / 4];
    let start =
        |at: usize| begins.into_iter().rfind(|&begin| begin <= at % sequence).unwrap() as i32;
    let tokens = config.train.micro_batch * sequence;
    (config.data.attention == Attention::Document).then(|| (0..tokens).map(start).collect())
}

struct Trained {
    losses: Vec<f64>,
    /// Of the first step, in table order.
    gradients: Vec<f64>,
    grad_norm: f64,
    /// After the last step.
    parameters: Vec<f32>,
}

fn trained<B: Backend>(config: &Config, steps: u64, backend: B) -> Trained {
    let plan = Plan::new(config, &backend).unwrap();
    let mut trainer = Trainer::new(plan, config, backend).unwrap();
    let parameters = initial_parameters(trainer.table(), config.seed);
    trainer.set_parameters(&parameters).unwrap();
    let mut losses = Vec::new();
    let starts = document_starts(config);
    let document_starts = starts.as_deref();
    let (mut gradients, mut grad_norm) = (Vec::new(), 0.0);
    for step in 1..=steps {
        let batches = [batch(config, step, 0), batch(config, step, 1)];
        let rows = batches.iter();
        let rows = rows.map(|(tokens, targets)| Rows { tokens, targets, document_starts });
        let outcome = trainer.accumulate(rows).unwrap();
        losses.push(outcome.loss);
        if step == 1 {
            grad_norm = outcome.grad_norm;
            gradients = trainer.gradients().unwrap().into_iter().map(f64::from).collect();
        }
        let lr = optim::learning_rate(&config.optimizer, step, config.train.steps);
        trainer.update(&config.optimizer, step, lr).unwrap();
    }
    let [parameters, ..] = trainer.state().unwrap();
    Trained { losses, gradients, grad_norm, parameters }
}

fn simt(options: Options, dtype: Dtype, products: Option<Family>) -> Cuda {
    Cuda::new(Box::new(Host::new(options).unwrap()), dtype, products).unwrap()
}

/// 1 - cosine of the angle between two gradients.
fn angle(found: &[f64], exact: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    1.0 - dot(found, exact) / (dot(found, found) * dot(exact, exact)).sqrt()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

fn gradients_by_name<'a>(
    config: &Config,
    gradients: &'a [f64],
) -> impl Iterator<Item = (String, &'a [f64])> {
    let entries = ParameterTable::new(&config.model).entries().to_vec();
    entries.into_iter().map(|entry| (entry.name.clone(), &gradients[entry.range()]))
}

#[test]
fn ten_steps_in_f32_are_those_of_the_cpu() {
    let config = config(Dtype::F32, Recompute::None);
    let expected = trained(&config, STEPS, Cpu::<f32>::new());
    for machine in machines() {
        let backend = Cuda::new(machine, Dtype::F32, None).unwrap();
        check_parity(&config, &expected, &trained(&config, STEPS, backend));
    }
}

fn check_parity(config: &Config, expected: &Trained, found: &Trained) {
    for (step, (found, expected)) in found.losses.iter().zip(&expected.losses).enumerate() {
        let error = (found - expected).abs() / expected;
        println!("step {}: {expected}, error {error:.2e}", step + 1);
        assert!(error < 1e-5, "step {}: {found} for {expected}", step + 1);
    }
    assert!(expected.losses.last() < expected.losses.first(), "{:?}", expected.losses);
    let exact = gradients_by_name(config, &expected.gradients);
    for ((name, exact), (_, found)) in exact.zip(gradients_by_name(config, &found.gradients)) {
        let (angle, ratio) = (angle(found, exact), norm(found) / norm(exact));
        assert!(angle < 1e-9, "{name}: 1 - cosine {angle:e}");
        assert!((ratio - 1.0).abs() < 1e-5, "{name}: norm {ratio} times the CPU's");
    }
}

/// Against the same steps in f64: as exact as the plain bf16 formulas, up to a factor of two.
#[test]
fn ten_steps_in_bf16_are_as_exact_as_the_plain_formulas() {
    let config = config(Dtype::Bf16, Recompute::None);
    let exact = trained(&config, STEPS, Cpu::<f64>::new());
    let plain = trained(&config, STEPS, Plain::default());
    let choices = [None, Some(Family::Sm80)];
    let runs =
        choices.iter().flat_map(|&choice| machines().into_iter().map(move |it| (it, choice)));
    for (machine, products) in runs {
        let device = machine.device();
        let found = trained(&config, STEPS, Cuda::new(machine, Dtype::Bf16, products).unwrap());
        check_bf16(&format!("{device} {products:?}"), &config, &found, &plain, &exact);
    }
}

/// Backward passes of attention that rows of 37 tokens do not take: in one, over 8 tiles of keys;
/// in two, over documents of rows too long for the short one, and over heads as wide as they may
/// be.
#[test]
fn every_backward_pass_of_attention_trains_as_on_the_cpu() {
    const STEPS: u64 = 2;
    for (heads, head_dim, sequence, attention, kernel) in [
        (1, 64, 1024, Attention::Row, "attention_backward_sm90_128x64"),
        (2, 64, 300, Attention::Document, "attention_backward_kv_sm90_128x64"),
        (1, 128, 200, Attention::Row, "attention_backward_kv_sm90_128x128"),
    ] {
        let with = |dtype| {
            let mut config = config(dtype, Recompute::None);
            let model = &mut config.model;
            (model.layers, model.hidden, model.ffn) = (1, heads * head_dim, 40);
            (model.heads, model.kv_heads, model.max_sequence) = (heads, 1, sequence);
            (config.data.sequence, config.data.attention) = (sequence, attention);
            config.train.micro_batch = 1;
            config
        };
        let (f32, bf16) = (with(Dtype::F32), with(Dtype::Bf16));
        let exact = trained(&bf16, STEPS, Cpu::<f64>::new());
        let plain = trained(&bf16, STEPS, Plain::default());
        let what = format!("{sequence} tokens, head dim {head_dim}");
        let check = |driver: Box<dyn Driver>| {
            let found = trained(&bf16, STEPS, Cuda::new(driver, Dtype::Bf16, None).unwrap());
            check_bf16(&what, &bf16, &found, &plain, &exact);
        };
        if has_simt() {
            let driver = Counting::new(Host::new(Options::default()).unwrap());
            let counts = driver.counts.clone();
            check(Box::new(driver));
            assert!(counts.borrow().contains_key(kernel), "{kernel}: {counts:?}");
        }
        machines().into_iter().skip(usize::from(has_simt())).for_each(check);
        // In f32 there is one way, and simt is slow in it.
        if sequence < 1024 {
            let expected = trained(&f32, STEPS, Cpu::<f32>::new());
            for machine in machines() {
                let found = trained(&f32, STEPS, Cuda::new(machine, Dtype::F32, None).unwrap());
                check_parity(&f32, &expected, &found);
            }
        }
    }
}

/// Without a fusion its op has a kernel of its own, in each of two layers, and the model is as
/// exact as the plain formulas.
#[test]
fn a_model_without_fusions_trains_as_on_the_cpu() {
    const STEPS: u64 = 2;
    let mut config = config(Dtype::Bf16, Recompute::None);
    config.model.layers = 2;
    let exact = trained(&config, STEPS, Cpu::<f64>::new());
    let plain = trained(&config, STEPS, Plain::default());
    let check = |driver: Box<dyn Driver>, without: &[Fusion]| {
        let backend = Cuda::new(driver, Dtype::Bf16, None).unwrap();
        // Without graphs, so that each launch is counted.
        let backend = backend.with_graphs(false).with_fusions(Fusions::without(without));
        let found = trained(&config, STEPS, backend);
        check_bf16(&format!("without {without:?}"), &config, &found, &plain, &exact);
    };
    let sets = Fusion::ALL.iter().map(|&it| vec![it]).chain([Fusion::ALL.to_vec()]);
    for without in sets {
        if has_simt() {
            let driver = Counting::new(Host::new(Options::default()).unwrap());
            let counts = driver.counts.clone();
            check(Box::new(driver), &without);
            let micro_batches = 2 * STEPS as usize;
            let expected = |fusions: &[Fusion], each: usize| {
                let several = fusions.iter().filter(|it| without.contains(it)).count();
                (several * each * config.model.layers * micro_batches) as u64
            };
            for (kernel, launches) in [
                ("add_bf16", expected(&[Fusion::Residual], 2)),
                ("rotary_bf16", expected(&[Fusion::Rotary, Fusion::RotaryBackward], 1)),
                ("swiglu_forward_bf16", expected(&[Fusion::SwiGlu], 1)),
                ("swiglu_backward_bf16", expected(&[Fusion::SwiGluBackward], 1)),
            ] {
                let found = counts.borrow().get(kernel).copied().unwrap_or(0);
                assert_eq!(found, launches, "{kernel} without {without:?}");
            }
        }
        machines().into_iter().skip(usize::from(has_simt())).for_each(|it| check(it, &without));
    }
}

/// What nvcc makes of the kernels, interpreted: few steps, because that is slow.
#[test]
fn two_steps_on_ptx_are_those_of_the_cpu_and_as_exact_as_the_plain_formulas() {
    const STEPS: u64 = 2;
    let with = |dtype, layers| {
        let config = config(dtype, Recompute::None);
        Config { model: ModelConfig { layers, ..config.model }, ..config }
    };
    let (f32, bf16) = (with(Dtype::F32, 1), with(Dtype::Bf16, 2));
    let open = |dtype| Some(Cuda::new(Box::new(ptx_machine(7)?), dtype, None).unwrap());
    let (Some(in_f32), Some(in_bf16)) = (open(Dtype::F32), open(Dtype::Bf16)) else { return };
    let expected = trained(&f32, STEPS, Cpu::<f32>::new());
    check_parity(&f32, &expected, &trained(&f32, STEPS, in_f32));
    let (exact, plain) =
        (trained(&bf16, STEPS, Cpu::<f64>::new()), trained(&bf16, STEPS, Plain::default()));
    check_bf16("ptx", &bf16, &trained(&bf16, STEPS, in_bf16), &plain, &exact);
}

fn check_bf16(what: &str, config: &Config, found: &Trained, plain: &Trained, exact: &Trained) {
    let largest = |losses: &[f64]| {
        let errors = losses.iter().zip(&exact.losses).map(|(a, b)| (a - b).abs() / b);
        errors.fold(0.0, f64::max)
    };
    // Over few steps the plain formulas may be exact by chance: an eighth of a rounding counts.
    let allowed = 2.0 * largest(&plain.losses).max(2f64.powi(-12));
    let error = largest(&found.losses);
    println!("{what}: loss error {error:.2e}, {:.2} of the tolerance", error / allowed);
    assert!(error <= allowed, "{what}: {error:e} of {allowed:e}: {:?}", found.losses);
    let norm_error = |found: &Trained| (found.grad_norm / exact.grad_norm - 1.0).abs();
    assert!(norm_error(found) <= 2.0 * norm_error(plain).max(2f64.powi(-9)), "{what}");

    let all = gradients_by_name(config, &exact.gradients)
        .zip(gradients_by_name(config, &plain.gradients))
        .zip(gradients_by_name(config, &found.gradients));
    for (((name, exact), (_, plain)), (_, found)) in all {
        // A gradient of one number has no angle but its sign; the cosine itself is rounded.
        let (is, allowed) = (angle(found, exact), 2.0 * angle(plain, exact) + 1e-15);
        assert!(is <= allowed, "{what} {name}: 1 - cosine {is:e} of {allowed:e}");
        let ratio = |values: &[f64]| (norm(values) / norm(exact) - 1.0).abs();
        let (is, allowed) = (ratio(found), 2.0 * ratio(plain).max(2f64.powi(-8)));
        assert!(is <= allowed, "{what} {name}: norm off by {is:e} of {allowed:e}");
    }
}

/// Every placement and LNS position, two steps in f32 and in bf16; one step of those with gains
/// and scales of branches is free of races.
#[test]
fn every_placement_trains_as_on_the_cpu() {
    let placements = Placement::NAMES.iter().map(|name| ModelConfig {
        placement: name.parse().unwrap(),
        ..config(Dtype::F32, Recompute::None).model
    });
    let positions = LnsPosition::NAMES.iter().map(|name| ModelConfig {
        lns_position: name.parse().unwrap(),
        ..config(Dtype::F32, Recompute::None).model
    });
    let steps = 2;
    for model in placements.chain(positions) {
        let what = format!("{} {}", model.placement, model.lns_position);
        println!("{what}");
        let with = |dtype| Config { model: model.clone(), ..config(dtype, Recompute::None) };
        let (f32, bf16) = (with(Dtype::F32), with(Dtype::Bf16));
        let expected = trained(&f32, steps, Cpu::<f32>::new());
        let exact = trained(&bf16, steps, Cpu::<f64>::new());
        let plain = trained(&bf16, steps, Plain::default());
        for machine in machines() {
            let found = trained(&f32, steps, Cuda::new(machine, Dtype::F32, None).unwrap());
            check_parity(&f32, &expected, &found);
        }
        for machine in machines() {
            let found = trained(&bf16, steps, Cuda::new(machine, Dtype::Bf16, None).unwrap());
            check_bf16(&what, &bf16, &found, &plain, &exact);
        }
    }
    if !has_simt() {
        return;
    }
    for placement in [Placement::Deepnorm, Placement::Layerscale, Placement::Skipinit] {
        let mut config = config(Dtype::Bf16, Recompute::None);
        (config.model.placement, config.model.layers) = (placement, 1);
        let options = Options { race: true, ..Options::default() };
        let raced = trained(&config, 1, simt(options, Dtype::Bf16, None));
        let plain = trained(&config, 1, simt(Options::default(), Dtype::Bf16, None));
        assert!(raced.parameters == plain.parameters, "{placement}");
    }
}

/// Schedules, numbers of workers, and recomputation change no bit of losses and parameters.
#[test]
fn every_schedule_trains_the_same_bits() {
    if !has_simt() {
        return;
    }
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let run = |options: Options, recompute| {
            let found = trained(&config(dtype, recompute), 2, simt(options, dtype, None));
            (
                found.losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>(),
                found.parameters.iter().map(|value| value.to_bits()).collect::<Vec<_>>(),
            )
        };
        let first = run(Options { workers: 1, ..Options::default() }, Recompute::None);
        for level in [Recompute::Norms, Recompute::Attention, Recompute::Block] {
            let again = run(Options { workers: 3, ..Options::default() }, level);
            assert!(first == again, "{dtype}: {level} or workers change bits");
        }
        for options in plain_schedules() {
            assert!(first == run(options, Recompute::None), "{dtype}: {options:?} changes bits");
        }
    }
}

/// One micro-batch forward, backward and the update under the race detector.
#[test]
fn a_training_step_is_free_of_races() {
    if !has_simt() {
        return;
    }
    let options = Options { race: true, ..Options::default() };
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let mut config = config(dtype, Recompute::None);
        config.model.layers = 1;
        let raced = trained(&config, 1, simt(options, dtype, None));
        let plain = trained(&config, 1, simt(Options::default(), dtype, None));
        assert_eq!(raced.losses, plain.losses, "{dtype}");
        assert!(raced.parameters == plain.parameters, "{dtype}");
    }
}

/// Token by token from the cache, the logits give the losses of the whole sequence at once.
#[test]
fn decoding_agrees_with_a_forward_pass() {
    for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 0.03)] {
        let config = config(dtype, Recompute::None);
        for (whole, cached) in machines().into_iter().zip(machines()) {
            let [whole, cached] = [whole, cached].map(|it| Cuda::new(it, dtype, None).unwrap());
            check_decoding(&config, whole, cached, tolerance);
        }
    }
}

fn check_decoding(config: &Config, whole: Cuda, mut cached: Cuda, tolerance: f32) {
    let table = ParameterTable::new(&config.model);
    let parameters = initial_parameters(&table, 3);
    let ids = tokens(5, 20, config.model.vocab);
    let size = [1, 19];
    let mut evaluator = Evaluator::new(&config.model, &table, &parameters, size, whole).unwrap();
    let rows = Rows::new(&ids[..19], &ids[1..]);
    let losses = evaluator.losses(rows).unwrap();

    let bytes = |kind| cached.element_bytes(kind);
    let plan = DecoderPlan::new(&config.model, &table, 24, bytes).unwrap();
    let parameters = Parameters::upload(&table, &parameters, &mut cached).unwrap();
    let mut decoder = plan.allocate(&parameters, &mut cached).unwrap();
    for (at, &id) in ids[..19].iter().enumerate() {
        let logits = decoder.push(&[id as u32], &mut cached).unwrap();
        let largest = logits.iter().fold(f32::MIN, |a, &b| a.max(b));
        let sum: f32 = logits.iter().map(|logit| (logit - largest).exp()).sum();
        let loss = largest + sum.ln() - logits[ids[at + 1] as usize];
        let error = (loss - losses[at]).abs() / losses[at];
        assert!(error < tolerance, "{}: token {at}: {loss} for {}", cached.name(), losses[at]);
    }
}

#[test]
fn what_no_kernel_can_do_is_refused_before_the_first_step() {
    if !has_simt() {
        return;
    }
    let refused = |change: &dyn Fn(&mut Config)| {
        let mut config = config(Dtype::Bf16, Recompute::None);
        change(&mut config);
        let backend = simt(Options::default(), config.dtype, None);
        let plan = Plan::new(&config, &backend).unwrap();
        Trainer::new(plan, &config, backend).err().expect("a model without kernels").to_string()
    };
    let head_dim = refused(&|config| config.model.heads = 8); // 16 values a head
    for part in ["16", "32, 48, 64, 96", "model.heads"] {
        assert!(head_dim.contains(part), "{head_dim}");
    }
    let hidden = refused(&|config| {
        config.model.hidden = 100;
        config.model.heads = 2;
        config.model.kv_heads = 1;
    });
    assert!(hidden.contains("model.hidden"), "{hidden}");
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_memory_table() {
    if !has_simt() {
        return;
    }
    let mut config = config(Dtype::Bf16, Recompute::None);
    config.model.layers = 100;
    config.model.hidden = 16 << 10;
    config.model.heads = 128;
    config.model.ffn = 64 << 10;
    let backend = simt(Options::default(), config.dtype, None);
    let plan = Plan::new(&config, &backend).unwrap();
    let message = Trainer::new(plan, &config, backend).err().unwrap().to_string();
    for part in ["simt", "working copy", "train.micro_batch"] {
        assert!(message.contains(part), "{message}");
    }
}

/// Rows of three documents each, of which the last tokens are predicted, as packed examples are.
fn answers(config: &Config, update: u64) -> (Vec<i32>, Vec<i32>, Vec<i32>) {
    let (tokens, mut targets) = batch(config, update, 0);
    let mut starts = vec![0; tokens.len()];
    for (at, start) in starts.iter_mut().enumerate() {
        let place = at % config.data.sequence;
        *start = [0, 9, 22].into_iter().filter(|start| *start <= place as i32).max().unwrap();
        if place as i32 - *start < 5 {
            targets[at] = IGNORE_INDEX;
        }
    }
    (tokens, targets, starts)
}

fn fine_tuned<B: Backend>(config: &Config, backend: B) -> ([Vec<f32>; 3], Vec<f64>) {
    let plan = Plan::new(config, &backend).unwrap();
    let mut trainer = Trainer::new(plan, config, backend).unwrap();
    let parameters = initial_parameters(trainer.table(), config.seed);
    trainer.set_parameters(&parameters).unwrap();
    let mut losses = vec![];
    for update in 1..=4 {
        trainer.begin(update);
        let (tokens, targets, starts) = answers(config, update);
        let document_starts = Some(&starts[..]);
        let rows = Rows { tokens: &tokens, targets: &targets, document_starts };
        losses.push(trainer.accumulate(std::iter::once(rows)).unwrap().loss);
        trainer.update(&config.optimizer, update, 1e-3).unwrap();
    }
    (trainer.state().unwrap(), losses)
}

#[test]
fn fine_tuning_moves_the_same_layers_as_on_the_cpu() {
    let mut config = config(Dtype::F32, Recompute::None);
    config.data.attention = Attention::Document;
    config.train.grad_accumulation = 1;
    (config.optimizer.sampled_layers, config.optimizer.sample_interval) = (1, 2);
    let (exact, exact_losses) = fine_tuned(&config, Cpu::<f32>::new());
    let (found, losses) = fine_tuned(&config, simt(Options::default(), Dtype::F32, None));
    for (found, exact) in losses.iter().zip(&exact_losses) {
        assert!((found - exact).abs() < 1e-5, "{losses:?}, on the CPU {exact_losses:?}");
    }
    let table = ParameterTable::new(&config.model);
    let first = initial_parameters(&table, config.seed);
    let mut frozen = 0;
    for layer in 1..=config.model.layers {
        let range = table.block_range(layer);
        let is_frozen = exact[0][range.clone()] == first[range.clone()];
        assert_eq!(found[0][range.clone()] == first[range.clone()], is_frozen, "layer {layer}");
        frozen += usize::from(is_frozen);
        if !is_frozen {
            let moved = |state: &[Vec<f32>; 3]| -> Vec<f64> {
                let pairs = state[0][range.clone()].iter().zip(&first[range.clone()]);
                pairs.map(|(now, first)| f64::from(now - first)).collect()
            };
            let angle = angle(&moved(&found), &moved(&exact));
            assert!(angle < 1e-4, "layer {layer} moved another way: {angle:e}");
        }
    }
    assert!((1..3).contains(&frozen), "{frozen} layers are frozen throughout");
}
