//! Replayed work: the bits of work that is launched kernel by kernel, what the host is left to
//! launch, and what cannot be recorded.

use std::collections::BTreeMap;

use isobath::backend::Backend;
use isobath::config::{Attention, Config, Dtype, ModelConfig, Recompute};
use isobath::cuda::host::{Asynchronous, Host, Options, Order};
use isobath::cuda::{AHEAD, Cuda, GRAPHS, OVERLAP, Switches};
use isobath::engine::{Plan, Rows, Trainer};
use isobath::model::init::initial_parameters;
use isobath::optim;
use isobath::tensor::{Kind, Shape, View};

use super::counting::{Counting, Counts};
use super::driver::assert_refused;
use super::machines::*;
use crate::support::{run_config, set_state, small_model, tokens};

pub const STEPS: u64 = 6;

pub fn config(dtype: Dtype, micro_batches: usize) -> Config {
    let model = ModelConfig {
        hidden: 64,
        layers: 3,
        heads: 2,
        kv_heads: 1,
        ffn: 75,
        init_std: 0.1,
        ..small_model()
    };
    let mut config = run_config(&model);
    config.dtype = dtype;
    config.data.sequence = 21;
    config.train.grad_accumulation = micro_batches;
    config.train.steps = STEPS;
    config.optimizer.lr = 3e-3;
    config
}

pub fn with_documents(config: Config) -> Config {
    let mut config = config;
    config.data.attention = Attention::Document;
    config
}

/// One of three layers moves, another one every second step.
pub fn with_sampled_layers(config: Config) -> Config {
    let mut config = config;
    (config.optimizer.sampled_layers, config.optimizer.sample_interval) = (1, 2);
    config
}

pub fn with_narrow_moments(config: Config) -> Config {
    let mut config = config;
    config.optimizer.moments = Dtype::Bf16;
    config
}

struct Batch {
    tokens: Vec<i32>,
    targets: Vec<i32>,
    document_starts: Option<Vec<i32>>,
}

impl Batch {
    fn new(config: &Config, seed: u64) -> Self {
        let sequence = config.data.sequence;
        let count = config.train.micro_batch * sequence;
        let ids = tokens(seed, count + 1, config.model.vocab);
        // The second document of a row begins elsewhere in every batch.
        let second = 3 + seed as usize % 9;
        let start = |at: usize| if at % sequence < second { 0 } else { second as i32 };
        let documents = config.data.packs_documents();
        Batch {
            tokens: ids[..count].to_vec(),
            targets: ids[1..].to_vec(),
            document_starts: documents.then(|| (0..count).map(start).collect()),
        }
    }

    fn rows(&self) -> Rows<'_> {
        let document_starts = self.document_starts.as_deref();
        Rows { tokens: &self.tokens, targets: &self.targets, document_starts }
    }
}

/// Everything that a run gives, as bits.
#[derive(Default, PartialEq)]
pub struct Trained {
    /// Losses and gradient norms.
    outcomes: Vec<[u64; 2]>,
    /// Of every step.
    pub gradients: Vec<Vec<u32>>,
    /// Losses of evaluations, and logits of samples.
    held_out: Vec<u64>,
    logits: Vec<u32>,
    /// Parameters and both moments after the last step.
    state: [Vec<u32>; 3],
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn trainer(config: &Config, backend: Cuda) -> Trainer<Cuda> {
    let plan = Plan::new(config, &backend).unwrap();
    let mut trainer = Trainer::new(plan, config, backend).unwrap();
    let parameters = initial_parameters(trainer.table(), config.seed);
    trainer.set_parameters(&parameters).unwrap();
    trainer
}

fn batches(config: &Config, step: u64) -> Vec<Batch> {
    // One step has a single micro-batch, as the last one of an epoch may.
    let count = if step == 4 { 1 } else { config.train.grad_accumulation as u64 };
    (0..count).map(|i| Batch::new(config, 10 * step + i)).collect()
}

fn step(config: &Config, trainer: &mut Trainer<Cuda>, step: u64, trained: &mut Trained) {
    trainer.begin(step);
    let batches = batches(config, step);
    let outcome = trainer.accumulate(batches.iter().map(Batch::rows)).unwrap();
    trained.outcomes.push([outcome.loss.to_bits(), outcome.grad_norm.to_bits()]);
    trained.gradients.push(bits(&trainer.gradients().unwrap()));
    let lr = optim::learning_rate(&config.optimizer, step, config.train.steps);
    trainer.update(&config.optimizer, step, lr).unwrap();
}

fn finish(mut trainer: Trainer<Cuda>, trained: Trained) -> Trained {
    Trained { state: trainer.state().unwrap().map(|values| bits(&values)), ..trained }
}

pub fn trained(config: &Config, steps: u64, backend: Cuda) -> Trained {
    let (mut trainer, mut trained) = (trainer(config, backend), Trained::default());
    (1..=steps).for_each(|at| step(config, &mut trainer, at, &mut trained));
    finish(trainer, trained)
}

/// Each step is enqueued before the previous one is waited for; without gradients.
pub fn trained_ahead(config: &Config, steps: u64, backend: Cuda) -> Trained {
    trained_ahead_with(config, steps, backend, |_| ())
}

/// `enqueued` is called after each step that was.
pub fn trained_ahead_with(
    config: &Config,
    steps: u64,
    backend: Cuda,
    mut enqueued: impl FnMut(u64),
) -> Trained {
    let (mut trainer, mut trained) = (trainer(config, backend), Trained::default());
    let mut before = None;
    let mut see = |trainer: &mut Trainer<Cuda>, step| {
        let outcome = trainer.outcome(step).unwrap();
        trained.outcomes.push([outcome.loss.to_bits(), outcome.grad_norm.to_bits()]);
    };
    for step in 1..=steps {
        trainer.begin(step);
        let batches = batches(config, step);
        let under_way = trainer.enqueue(batches.iter().map(Batch::rows)).unwrap();
        let lr = optim::learning_rate(&config.optimizer, step, config.train.steps);
        trainer.update(&config.optimizer, step, lr).unwrap();
        before.replace(under_way).into_iter().for_each(|step| see(&mut trainer, step));
        enqueued(step);
    }
    before.into_iter().for_each(|step| see(&mut trainer, step));
    finish(trainer, trained)
}

#[track_caller]
pub fn assert_same(what: &str, replayed: &Trained, launched: &Trained) {
    assert!(replayed.outcomes == launched.outcomes, "{what}: losses or norms");
    let pairs = replayed.gradients.iter().zip(&launched.gradients);
    let differs = pairs.clone().position(|(replayed, launched)| replayed != launched);
    assert!(differs.is_none(), "{what}: gradients of step {}", differs.unwrap_or(0) + 1);
    assert!(pairs.len() == launched.gradients.len(), "{what}: steps");
    assert!(replayed.held_out == launched.held_out, "{what}: evaluations");
    assert!(replayed.logits == launched.logits, "{what}: samples");
    assert!(replayed.state == launched.state, "{what}: parameters or moments");
    // What does not move would be equal, too.
    assert!(
        launched.gradients.windows(2).all(|pair| pair[0] != pair[1]),
        "{what}: equal gradients"
    );
}

/// `test`: of two backends of the same machine, the first one replays and the other one does not.
fn on_machines(dtype: Dtype, mut test: impl FnMut(Cuda, Cuda)) {
    for (replays, launches) in machines().into_iter().zip(machines()) {
        let [replays, launches] =
            [replays, launches].map(|machine| Cuda::new(machine, dtype, None).unwrap());
        test(replays, launches.with_graphs(false));
    }
}

#[test]
fn replayed_steps_give_the_bits_of_launched_ones() {
    let recomputed = |mut config: Config| {
        config.train.recompute = Recompute::Block;
        config
    };
    let cases = [
        ("one micro-batch", config(Dtype::Bf16, 1)),
        ("three micro-batches", config(Dtype::Bf16, 3)),
        ("f32", config(Dtype::F32, 2)),
        ("recompute", recomputed(config(Dtype::Bf16, 2))),
        ("documents", with_documents(config(Dtype::Bf16, 2))),
        ("sampled layers", with_sampled_layers(config(Dtype::Bf16, 2))),
        ("moments in bf16", with_narrow_moments(config(Dtype::F32, 2))),
    ];
    for (what, config) in cases {
        on_machines(config.dtype, |replays, launches| {
            let replayed = trained(&config, STEPS, replays);
            assert_same(what, &replayed, &trained(&config, STEPS, launches));
        });
    }
}

/// The replaying run is also begun anew from its state in the middle, where it records again.
#[test]
fn evaluations_samples_and_a_resumption_in_between_change_no_bit() {
    let config = with_narrow_moments(with_sampled_layers(config(Dtype::Bf16, 2)));
    let held_out = Batch::new(&config, 1000);
    let run = |first: Cuda, second: Option<Cuda>| {
        let (mut trainer, mut trained) = (self::trainer(&config, first), Trained::default());
        let mut second = second;
        for at in 1..=STEPS {
            step(&config, &mut trainer, at, &mut trained);
            if at % 3 == 0 {
                for _ in 0..2 {
                    let (loss, _) = trainer.evaluate(held_out.rows()).unwrap();
                    trained.held_out.push(loss.to_bits());
                }
                let (decoder, backend) = trainer.decoder().unwrap();
                decoder.clear();
                for token in [1, 2, 3] {
                    let logits = decoder.push(&[token], backend).unwrap();
                    trained.logits.extend(bits(logits));
                }
            }
            if let Some(backend) = second.take_if(|_| at == 5) {
                let state = trainer.state().unwrap();
                trainer = self::trainer(&config, backend);
                set_state(&mut trainer, &state);
            }
        }
        finish(trainer, trained)
    };
    let again = machines().into_iter().map(|it| Cuda::new(it, config.dtype, None).unwrap());
    let mut again: Vec<Cuda> = again.collect();
    on_machines(config.dtype, |replays, launches| {
        let replayed = run(replays, Some(again.remove(0)));
        let launched = run(launches, None);
        assert_same("with evaluations", &replayed, &launched);
        assert!(launched.held_out.windows(2).any(|pair| pair[0] != pair[1]), "nothing was learnt");
    });
}

/// Two micro-batches of two steps: recorded, then replayed, with every access checked.
#[test]
fn replayed_steps_are_free_of_races() {
    if !has_simt() {
        return;
    }
    let mut config = config(Dtype::Bf16, 2);
    config.model.layers = 1;
    let on = |options| Cuda::new(Box::new(Host::new(options).unwrap()), config.dtype, None);
    let order = Order::Random;
    let options =
        Options { race: true, order, asynchronous: Asynchronous::Anytime, ..Options::default() };
    let launched = trained(&config, 2, on(Options::default()).unwrap().with_graphs(false));
    assert_same("race", &trained(&config, 2, on(options).unwrap()), &launched);
}

/// Calls of the driver that enqueue, in each of three steps.
fn calls(config: &Config, graphs: bool) -> Vec<BTreeMap<String, u64>> {
    let counts = Counts::default();
    let host = Host::new(Options::default()).unwrap();
    let driver = Box::new(Counting { counts: counts.clone(), ..Counting::new(host) });
    let backend = Cuda::new(driver, config.dtype, None).unwrap().with_graphs(graphs);
    let mut trainer = trainer(config, backend);
    let calls = (1..=3).map(|at| {
        counts.borrow_mut().clear();
        step(config, &mut trainer, at, &mut Trained::default());
        counts.borrow().clone()
    });
    calls.collect()
}

/// For each micro-batch one graph, the copies of its tokens, targets and documents into place, and
/// of its losses out of it; for each step what it sends (the scale of its gradient, tokens, targets
/// and documents of all micro-batches, the update's scalars), what it reads (losses, norm), and the
/// update; where layers rest, a fill for each that does, the norm's two kernels, and an update with
/// scalars of its own for each part that does not.
#[test]
fn the_host_launches_once_for_each_micro_batch() {
    if !has_simt() {
        return;
    }
    let expected = |calls: &[(&str, u64)]| -> BTreeMap<String, u64> {
        calls.iter().map(|&(name, count)| (name.to_string(), count)).collect()
    };
    // What is waited for is this test's look at the gradient.
    let look = ("copy and wait", 1);
    let whole = |copies| expected(&[("adamw_update_f32", 1), ("copy", copies), look, ("graph", 3)]);
    let plain = config(Dtype::Bf16, 3);
    let sampled = with_sampled_layers(plain.clone());
    let frozen = [
        ("adamw_norm_partials", 1),
        ("adamw_norm_total", 1),
        ("adamw_update_f32", 3), // before the layers, after them, and one of them
        ("copy", 9 + 8),
        look,
        ("fill", 2),
        ("graph", 3),
    ];
    let cases = [
        ("whole", &plain, whole(9 + 6)),
        ("documents", &with_documents(plain.clone()), whole(12 + 7)),
        ("sampled layers", &sampled, expected(&frozen)),
    ];
    let total = |calls: &BTreeMap<String, u64>| calls.values().sum::<u64>();
    for (what, config, expected) in cases {
        let (replayed, launched) = (calls(config, true), calls(config, false));
        println!("{what}: {} calls instead of {}", total(&replayed[1]), total(&launched[1]));
        // The first step, too: what it replays was recorded before.
        assert!(replayed.iter().all(|calls| *calls == expected), "{what}: {replayed:?}");
        assert!(launched.iter().all(|calls| *calls == launched[0]), "{what}: {launched:?}");
    }
}

#[test]
fn a_step_without_micro_batches_is_refused() {
    if !has_simt() {
        return;
    }
    let config = config(Dtype::Bf16, 2);
    let host = Box::new(Host::new(Options::default()).unwrap());
    let mut trainer = trainer(&config, Cuda::new(host, config.dtype, None).unwrap());
    let none = trainer.accumulate(std::iter::empty());
    assert_refused(none.map(|_| ()), &["without micro-batches", "give at least one"]);
}

#[test]
fn what_cannot_be_recorded_is_refused_and_the_backend_stays_as_it_was() {
    for machine in machines() {
        let mut backend = Cuda::new(machine, Dtype::F32, None).unwrap();
        let buffer = backend.allocate("four numbers", 16).unwrap();
        let shape = Shape::new(&[4]);
        let view = View { buffer, offset: 0, kind: Kind::Statistic, shape };
        let mut refused = |part: &str, work: &dyn Fn(&mut Cuda) -> isobath::Result<()>| {
            backend.write(view, &[1.0; 4]).unwrap();
            let recording = backend.record(|backend| {
                backend.zero(view)?;
                work(backend)
            });
            assert_refused(recording.map(|_| ()), &[part, "cannot be recorded", "begin_capture"]);
            // Nothing ran, and nothing is being recorded any more.
            let mut values = [0.0; 4];
            backend.read(view, &mut values).unwrap();
            assert_eq!(values, [1.0; 4]);
            backend.driver().synchronize().unwrap();
        };
        refused("a copy from host memory", &|backend| backend.write(view, &[2.0; 4]));
        refused("a copy to host memory", &|backend| backend.read(view, &mut [0.0; 4]));
        refused("an allocation", &|backend| backend.allocate("more", 16).map(|_| ()));
        refused("waiting for the device", &|backend| backend.driver().synchronize());
        refused("a second capture", &|backend| backend.record(|_| Ok(())).map(|_| ()));

        let recording = backend.record(|backend| backend.zero(view)).unwrap().unwrap();
        for _ in 0..2 {
            backend.write(view, &[1.0; 4]).unwrap();
            backend.replay(recording).unwrap();
            let mut values = [1.0; 4];
            backend.read(view, &mut values).unwrap();
            assert_eq!(values, [0.0; 4]);
        }

        let mut backend = backend.with_graphs(false);
        let nothing = backend.record(|_| panic!("work that is not recorded is not run"));
        assert_eq!(nothing.unwrap(), None);
    }
}

#[test]
fn variables_say_how_work_is_launched() {
    let wanted = |variable: &str, value: &str| {
        Switches::from_variables(|name| (name == variable).then(|| value.into()))
    };
    let default = Switches { graphs: true, overlap: true, steps_ahead: None };
    assert_eq!(wanted("ISOBATH_OTHER", "0").unwrap(), default);
    for (variable, off, on) in [
        (GRAPHS, Switches { graphs: false, ..default }, default),
        (OVERLAP, Switches { overlap: false, ..default }, default),
        (
            AHEAD,
            Switches { steps_ahead: Some(false), ..default },
            Switches { steps_ahead: Some(true), ..default },
        ),
    ] {
        assert_eq!([wanted(variable, "0"), wanted(variable, "1")].map(Result::unwrap), [off, on]);
        let refused = wanted(variable, "off").map(|_| ());
        assert_refused(refused, &[&format!("{variable}: `off`"), "from 0 to 1"]);
    }
}
