//! The tape: recording, gradients of a whole model, recomputation, and the memory plan.

use std::collections::BTreeMap;

use isobath::Error;
use isobath::backend::HeadSpec;
use isobath::config::{Attention, LnsPosition, ModelConfig, NormKind, Placement, Recompute};
use isobath::cpu::{Cpu, Float};
use isobath::engine::{Plan, Rows, Trainer};
use isobath::model::parameters::ParameterTable;
use isobath::model::pieces::{BlockTape, record_block};
use isobath::model::{record_decode, record_loss};
use isobath::tape::{Access, External, Program, Purpose, Step, Tape, ValueId};
use isobath::tensor::{BufferId, IGNORE_INDEX, Kind, Shape, View};

use crate::support::{assert_close, normals, run_config, small_model, tokens};

fn trainer<T: Float>(
    model: &ModelConfig,
    size: [usize; 2],
    recompute: Recompute,
) -> Trainer<Cpu<T>> {
    trainer_of(Attention::Row, model, size, recompute)
}

fn trainer_of<T: Float>(
    attention: Attention,
    model: &ModelConfig,
    [batch, sequence]: [usize; 2],
    recompute: Recompute,
) -> Trainer<Cpu<T>> {
    let mut config = run_config(model);
    config.data.attention = attention;
    config.train.micro_batch = batch;
    config.data.sequence = sequence;
    config.train.grad_accumulation = 2; // one test splits a step in two
    config.train.recompute = recompute;
    config.train.z_loss = 1e-3;
    let cpu = Cpu::<T>::new();
    let plan = Plan::new(&config, &cpu).unwrap();
    let mut trainer = Trainer::new(plan, &config, cpu).unwrap();
    let parameters = parameters(trainer.table());
    trainer.set_parameters(&parameters).unwrap();
    trainer
}

/// Random matrices, gains around 1, zeros in the padding.
fn parameters(table: &ParameterTable) -> Vec<f32> {
    let random = normals(11, table.stored_elements());
    let mut flat = vec![0.0f32; table.stored_elements()];
    for parameter in table.entries() {
        let columns = parameter.stored.columns();
        if parameter.tensors.is_empty() {
            // The gain of a branch: as large as its first value.
            flat[parameter.range()].iter_mut().for_each(|gain| *gain = 0.6);
        }
        for tensor in &parameter.tensors {
            for row in 0..tensor.shape.rows() {
                let at = parameter.offset + (tensor.first_row + row) * columns;
                for i in at..at + tensor.shape.columns() {
                    let gain = parameter.stored.sizes().len() == 1;
                    flat[i] = (if gain { 1.0 } else { 0.0 } + 0.2 * random[i]) as f32;
                }
            }
        }
    }
    flat
}

/// Rows with some targets that are not predicted.
fn rows(seed: u64, count: usize, vocab: usize) -> (Vec<i32>, Vec<i32>) {
    let mut targets = tokens(seed + 1, count, vocab);
    targets.iter_mut().step_by(7).for_each(|target| *target = IGNORE_INDEX);
    (tokens(seed, count, vocab), targets)
}

fn check_model_gradients(model: ModelConfig) {
    let size = [2, 9];
    let mut trainer = trainer::<f64>(&model, size, Recompute::None);
    let (tokens, targets) = rows(5, 18, model.vocab);
    let loss = |trainer: &mut Trainer<Cpu<f64>>| {
        let rows = [Rows::new(&tokens, &targets)];
        trainer.accumulate(rows.into_iter()).unwrap()
    };
    // Losses are handed out as f32; their f64 values lie after the gradient's norm instead, so
    // the differences are taken over a loss summed in f64: L = sum of losses / predicted.
    let outcome = loss(&mut trainer);
    assert!(outcome.loss > 1.0 && outcome.grad_norm > 1e-2, "{outcome:?}");
    let gradients: Vec<f64> = trainer.gradients().unwrap().iter().map(|&g| g as f64).collect();
    let table = trainer.table().clone();
    let step = 1e-3;
    for parameter in table.entries() {
        let range = parameter.range();
        let all = &gradients[range.clone()];
        // The largest elements of the gradient, and some others.
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by(|&a, &b| all[b].abs().total_cmp(&all[a].abs()));
        let chosen: Vec<usize> = order
            .iter()
            .copied()
            .take(3)
            .chain((0..all.len()).step_by(all.len() / 4 + 1))
            .collect();
        let mut numeric = Vec::new();
        for &i in &chosen {
            let mut at = |offset: f64| {
                let (cpu, view) = trainer.device();
                let kept = cpu.values(view)[range.start + i];
                cpu.values_mut(view)[range.start + i] = kept + offset;
                let loss = exact_loss(&mut trainer, &tokens, &targets);
                let (cpu, view) = trainer.device();
                cpu.values_mut(view)[range.start + i] = kept;
                loss
            };
            // Fourth order: (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12 h
            let near = at(step) - at(-step);
            let far = at(2.0 * step) - at(-2.0 * step);
            numeric.push((8.0 * near - far) / (12.0 * step));
        }
        let found: Vec<f64> = chosen.iter().map(|&i| all[i]).collect();
        assert_close(&parameter.name, &found, &numeric, 1e-6);
    }
}

/// The mean loss in f64, from the arena of the program that just ran.
fn exact_loss(trainer: &mut Trainer<Cpu<f64>>, tokens: &[i32], targets: &[i32]) -> f64 {
    let rows = Rows::new(tokens, targets);
    let predicted = rows.predicted() as f64;
    trainer.accumulate([rows].into_iter()).unwrap();
    let view = trainer.losses_view();
    let (cpu, _) = trainer.device();
    cpu.values(view).iter().sum::<f64>() / predicted
}

#[test]
fn gradients_of_a_whole_model_match_finite_differences() {
    check_model_gradients(small_model());
    check_model_gradients(ModelConfig { tied: true, ..small_model() });
    check_model_gradients(ModelConfig { norm: NormKind::Layer, kv_heads: 1, ..small_model() });
}

/// Every placement, LNS position and norm; three blocks, so that `mix` has one of them post.
fn placements() -> Vec<ModelConfig> {
    let names = Placement::NAMES.iter().map(|name| name.parse().unwrap());
    let of_placement = names.map(|placement| ModelConfig { placement, ..small_model() });
    let positions = LnsPosition::NAMES.iter().map(|name| name.parse().unwrap());
    let of_position = positions.map(|lns_position| ModelConfig { lns_position, ..small_model() });
    let all = of_placement.chain(of_position);
    all.map(|model| ModelConfig { layers: 3, mix_post: 0.3, ..model }).collect()
}

#[test]
fn gradients_of_every_placement_match_finite_differences() {
    for model in placements() {
        check_model_gradients(model);
    }
    let layer = ModelConfig { norm: NormKind::Layer, layers: 3, ..small_model() };
    check_model_gradients(ModelConfig { placement: Placement::Sandwich, ..layer.clone() });
    check_model_gradients(ModelConfig { lns_position: LnsPosition::BeforeNorm, ..layer });
}

/// From the one that keeps everything to the one that keeps least.
fn levels() -> Vec<Recompute> {
    Recompute::NAMES.iter().map(|name| name.parse().unwrap()).collect()
}

#[test]
fn recomputation_changes_no_bit_of_any_placement() {
    fn check<T: Float>(model: &ModelConfig) {
        let run = |recompute| {
            let mut trainer = trainer::<T>(model, [2, 12], recompute);
            let outcome = step(&mut trainer, model.vocab, 24);
            trainer.update(&run_config(model).optimizer, 1, 1e-3).unwrap();
            let (cpu, view) = trainer.device();
            (outcome, cpu.values(view).to_vec())
        };
        let kept = run(Recompute::None);
        for level in levels() {
            let what = (model.placement, model.lns_position, model.norm);
            assert!(run(level) == kept, "{level}: {what:?}");
        }
    }
    for model in placements() {
        check::<f32>(&model);
        check::<f64>(&ModelConfig { norm: NormKind::Layer, ..model });
    }
}

/// How often a training program runs each op forward.
fn forward_counts(model: &ModelConfig, recompute: Recompute) -> BTreeMap<&'static str, usize> {
    let table = ParameterTable::new(model);
    let recorded = record_loss(model, &table, 2, 24, false, 0.0, None).unwrap();
    let purpose = Purpose::Training { recompute };
    let program = Program::new(recorded.tape, purpose, &[recorded.losses], |_| 4).unwrap();
    let mut counts = BTreeMap::new();
    for step in program.steps() {
        let name = match step {
            Step::Forward(op) => op.name(),
            Step::Fused(fused) => fused.name(),
            Step::Backward(_) | Step::Add { .. } => continue,
        };
        *counts.entry(name).or_insert(0) += 1;
    }
    counts
}

#[test]
fn a_level_computes_again_what_it_says_and_nothing_else() {
    let layers = 3;
    let again = |model: &ModelConfig, level| {
        let once = forward_counts(model, Recompute::None);
        let mut counts = forward_counts(model, level);
        assert_eq!(counts["gradients of linear, swiglu"], layers, "{level}");
        assert_eq!(counts["gradients of attention, rotary"], layers, "{level}");
        counts.iter_mut().for_each(|(name, count)| *count -= once.get(name).unwrap_or(&0));
        counts.retain(|_, count| *count > 0);
        counts.into_iter().collect::<Vec<_>>()
    };
    let pre = ModelConfig { layers, ..small_model() };
    let [norms, attention, block] =
        [Recompute::Norms, Recompute::Attention, Recompute::Block].map(|it| again(&pre, it));
    // SwiGLU of gate and up, which are not multiplied again.
    assert_eq!(norms, [("norm", 2 * layers), ("swiglu", layers)]);
    let [itself, qkv] = [("attention", layers), ("linear, rotary", layers)];
    assert_eq!(attention, [itself, qkv, ("norm", 2 * layers), ("swiglu", layers)]);
    // The projection after attention, and gate and up; not the product that ends the block.
    let [projection, gate_up] = [("linear", layers), ("linear, swiglu", layers)];
    assert_eq!(block, [itself, projection, qkv, gate_up, ("norm", 2 * layers)]);

    // The norm after the FFN is the residual stream between blocks, and kept.
    let post = ModelConfig { placement: Placement::Post, ..pre.clone() };
    assert_eq!(again(&post, Recompute::Norms), [("norm", layers), ("swiglu", layers)]);
    // Nobody reads again what the norms after the branches gave.
    let sandwich = ModelConfig { placement: Placement::Sandwich, ..pre };
    assert_eq!(again(&sandwich, Recompute::Norms), norms);
}

#[test]
fn every_parameter_gets_a_gradient() {
    let model = small_model();
    let mut trainer = trainer::<f32>(&model, [2, 16], Recompute::None);
    let (tokens, targets) = rows(3, 32, model.vocab);
    trainer.accumulate([Rows::new(&tokens, &targets)].into_iter()).unwrap();
    let gradients = trainer.gradients().unwrap();
    for parameter in trainer.table().entries() {
        for tensor in &parameter.tensors {
            let first = parameter.offset + tensor.first_row * parameter.stored.columns();
            let rows = tensor.shape.rows() * parameter.stored.columns();
            let largest = gradients[first..first + rows].iter().fold(0f32, |m, g| m.max(g.abs()));
            assert!(largest > 1e-7, "{}: largest gradient {largest:e}", tensor.name);
        }
    }
}

#[test]
fn padding_of_an_odd_ffn_and_vocabulary_gets_no_gradient() {
    let model = small_model(); // F 37 is stored as 40
    let mut trainer = trainer::<f32>(&model, [1, 8], Recompute::None);
    let (tokens, targets) = rows(3, 8, model.vocab);
    trainer.accumulate([Rows::new(&tokens, &targets)].into_iter()).unwrap();
    let gradients = trainer.gradients().unwrap();
    let table = trainer.table();
    let mut padded = 0;
    for parameter in table.entries() {
        let columns = parameter.stored.columns();
        let mut real = vec![false; parameter.stored.elements()];
        for tensor in &parameter.tensors {
            for row in tensor.first_row..tensor.first_row + tensor.shape.rows() {
                real[row * columns..][..tensor.shape.columns()].fill(true);
            }
        }
        for (i, _) in real.iter().enumerate().filter(|(_, real)| !**real) {
            padded += 1;
            assert_eq!(gradients[parameter.offset + i], 0.0, "{} element {i}", parameter.name);
        }
    }
    // 3 columns of three matrices in each block; vocabulary 53 is stored as 56, in two tables.
    assert_eq!(padded, model.layers * 3 * 3 * model.hidden + 2 * 3 * model.hidden);
}

fn step<T: Float>(trainer: &mut Trainer<Cpu<T>>, vocab: usize, count: usize) -> (u64, Vec<u32>) {
    let (tokens, targets) = rows(3, count, vocab);
    let rows = Rows::new(&tokens, &targets);
    let outcome = trainer.accumulate([rows, rows].into_iter()).unwrap();
    let gradients = trainer.gradients().unwrap();
    (outcome.loss.to_bits(), gradients.iter().map(|g| g.to_bits()).collect())
}

#[test]
fn recomputation_saves_memory_and_changes_no_bit() {
    let model = ModelConfig { layers: 4, ..small_model() };
    let config = |recompute| {
        let mut config = run_config(&model);
        config.train.grad_accumulation = 2; // one test splits a step in two
        config.train.recompute = recompute;
        Plan::new(&config, &Cpu::<f32>::new()).unwrap().arena_bytes()
    };
    assert!(config(Recompute::Block) < config(Recompute::None) * 6 / 10);
    assert!(levels().windows(2).all(|pair| config(pair[1]) < config(pair[0])));
    let kept = step(&mut trainer::<f32>(&model, [2, 70], Recompute::None), model.vocab, 140);
    for level in levels() {
        let again = step(&mut trainer::<f32>(&model, [2, 70], level), model.vocab, 140);
        assert_eq!(kept.0, again.0, "{level}: loss");
        assert!(kept.1 == again.1, "{level}: gradients");
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let model = ModelConfig { hidden: 128, ffn: 352, vocab: 1000, ..small_model() };
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut trainer = trainer::<f32>(&model, [4, 128], Recompute::None);
            let outcome = step(&mut trainer, model.vocab, 512);
            trainer.update(&run_config(&model).optimizer, 1, 1e-3).unwrap();
            let parameters: Vec<u32> =
                trainer.state().unwrap()[0].iter().map(|p| p.to_bits()).collect();
            (outcome, parameters)
        })
    };
    let one = run(1);
    for threads in [2, 3, 5] {
        assert!(one == run(threads), "{threads} threads differ from one");
    }
}

#[test]
fn accumulated_micro_batches_weigh_every_token_the_same() {
    let model = small_model();
    let (tokens, mut targets) = rows(3, 32, model.vocab);
    targets[18..30].fill(IGNORE_INDEX); // the second half predicts far fewer tokens
    let mut whole = trainer::<f64>(&model, [2, 16], Recompute::None);
    let expected = whole.accumulate([Rows::new(&tokens, &targets)].into_iter()).unwrap();
    let mut halves = trainer::<f64>(&model, [1, 16], Recompute::None);
    let rows = tokens.chunks(16).zip(targets.chunks(16));
    let rows = rows.map(|(tokens, targets)| Rows::new(tokens, targets));
    let found = halves.accumulate(rows).unwrap();
    assert_eq!(found.predicted, expected.predicted);
    assert_close("loss", &[found.loss], &[expected.loss], 1e-7);
    let wide = |gradients: Vec<f32>| gradients.into_iter().map(f64::from).collect::<Vec<_>>();
    let (found, expected) = (halves.gradients().unwrap(), whole.gradients().unwrap());
    assert_close("gradients", &wide(found), &wide(expected), 1e-6);
}

/// A row of three documents has the losses and gradients of three rows of one.
#[test]
fn packed_documents_train_as_if_alone() {
    let model = small_model();
    let lengths = [9, 1, 22];
    let (tokens, targets) = rows(3, 32, model.vocab);
    let starts: Vec<i32> = [0, 9, 10].iter().zip(lengths).flat_map(|(&s, n)| vec![s; n]).collect();
    let packed = Rows { document_starts: Some(&starts), ..Rows::new(&tokens, &targets) };
    let (mut apart, mut apart_targets) = (vec![0; 96], vec![IGNORE_INDEX; 96]);
    for (row, length) in lengths.into_iter().enumerate() {
        let (from, to) = (starts.iter().position(|&s| s == [0, 9, 10][row]).unwrap(), row * 32);
        apart[to..to + length].copy_from_slice(&tokens[from..from + length]);
        apart_targets[to..to + length].copy_from_slice(&targets[from..from + length]);
    }
    let mut alone = trainer::<f64>(&model, [3, 32], Recompute::None);
    let expected = alone.accumulate([Rows::new(&apart, &apart_targets)].into_iter()).unwrap();
    let wide = |gradients: Vec<f32>| gradients.into_iter().map(f64::from).collect::<Vec<_>>();
    let expected_gradients = wide(alone.gradients().unwrap());
    for recompute in levels() {
        let mut row = trainer_of::<f64>(Attention::Document, &model, [1, 32], recompute);
        let found = row.accumulate([packed].into_iter()).unwrap();
        assert_eq!(found.predicted, expected.predicted);
        assert_close("loss", &[found.loss], &[expected.loss], 1e-7);
        assert_close("gradients", &wide(row.gradients().unwrap()), &expected_gradients, 1e-6);
        let (losses, predicted) = row.evaluate(packed).unwrap();
        let plain = alone.evaluate(Rows::new(&apart, &apart_targets)).unwrap();
        assert_eq!(predicted, plain.1);
        assert_close("evaluation", &[losses], &[plain.0], 1e-6);
        // Rows without starts are one document each, as everywhere.
        let whole = Rows::new(&tokens, &targets);
        let mut of_rows = trainer::<f64>(&model, [1, 32], recompute);
        let expected = of_rows.accumulate([whole].into_iter()).unwrap();
        assert_eq!(row.accumulate([whole].into_iter()).unwrap(), expected);
        assert_ne!(expected.loss, found.loss);
    }
}

#[test]
fn documents_that_are_none_are_refused() {
    let model = small_model();
    let (tokens, targets) = rows(3, 16, model.vocab);
    let mut trainer = trainer_of::<f32>(Attention::Document, &model, [2, 8], Recompute::None);
    let good = [0, 0, 2, 2, 2, 5, 5, 7, 0, 1, 1, 1, 1, 1, 1, 1];
    let whole = Rows::new(&tokens, &targets);
    fn packed<'a>(starts: &'a [i32], whole: Rows<'a>) -> Rows<'a> {
        Rows { document_starts: Some(starts), ..whole }
    }
    trainer.accumulate([packed(&good, whole)].into_iter()).unwrap();
    for (at, start, why) in [
        (2, 3, "row 0: the document of token 2 is said to begin at 3"),
        (3, 1, "row 0: the document of token 3 is said to begin at 1"),
        (8, 1, "row 1: the document of token 0 is said to begin at 1"),
        (8, -1, "row 1: the document of token 0 is said to begin at -1"),
    ] {
        let mut starts = good;
        starts[at] = start;
        let error =
            trainer.accumulate([packed(&starts, whole)].into_iter()).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        let error = trainer.evaluate(packed(&starts, whole)).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    let short =
        trainer.accumulate([packed(&good[..8], whole)].into_iter()).unwrap_err().to_string();
    assert!(short.contains("8 document starts"), "{short}");
    let mut of_rows = self::trainer::<f32>(&model, [2, 8], Recompute::None);
    for error in [
        of_rows.accumulate([packed(&good, whole)].into_iter()).map(|_| ()).unwrap_err(),
        of_rows.evaluate(packed(&good, whole)).map(|_| ()).unwrap_err(),
    ] {
        assert!(error.to_string().contains("data.attention"), "{error}");
    }
}

/// Plays a program and checks that nothing overwrites what is still to be read.
fn check_memory(program: Program, kept: &[ValueId]) {
    let arena = BufferId(0);
    let elsewhere =
        View { buffer: BufferId(1), offset: 0, kind: Kind::Statistic, shape: Shape::new(&[0]) };
    let bytes = program.arena_bytes();
    let steps = program.steps().to_vec();
    let bound = program.bind(arena, |external, _| match external {
        External::Parameter(_) | External::ParameterGradient(_) | External::Cache(_) => elsewhere,
    });
    let mut owner = std::collections::HashMap::new(); // value -> view, while its content stands
    let mut check = |id, view: View, access: Access, at: usize| {
        if view.buffer != arena {
            return;
        }
        let end = view.offset + 4 * view.shape.elements();
        assert!(end <= bytes, "step {at}: a view leaves the arena");
        if access != Access::Read {
            owner.retain(|other, (start, other_end)| {
                *other == id || *other_end <= view.offset || end <= *start
            });
        }
        if access == Access::Write {
            owner.insert(id, (view.offset, end));
        } else if !is_input(&steps, id) {
            assert!(owner.contains_key(&id), "step {at} reads {id:?}, which was overwritten");
        }
    };
    for (at, (step, views)) in steps.iter().zip(bound.steps()).enumerate() {
        let operands = step.operands().into_iter().zip(views.operands());
        let (mut read, written): (Vec<_>, Vec<_>) =
            operands.partition(|((_, access), _)| *access == Access::Read);
        // The second of two steps that are one reads what the first writes.
        read.retain(|((id, _), _)| !written.iter().any(|((other, _), _)| other == id));
        for ((id, access), (view, _)) in read.into_iter().chain(written) {
            check(id, view, access, at);
        }
    }
    for &id in kept {
        check(id, bound.view(id), Access::Read, steps.len());
    }
}

/// Whether a value is never written by the program.
fn is_input(steps: &[Step<ValueId>], id: ValueId) -> bool {
    !steps.iter().any(|step| step.operands().contains(&(id, Access::Write)))
}

#[test]
fn planned_memory_is_never_overwritten_before_its_last_read() {
    let model = ModelConfig { layers: 3, ..small_model() };
    let table = ParameterTable::new(&model);
    let training = levels().into_iter().map(|recompute| Purpose::Training { recompute });
    for purpose in training.chain([Purpose::Inference]) {
        let recorded = record_loss(&model, &table, 2, 24, false, 0.0, None).unwrap();
        let kept = [recorded.losses];
        let program = Program::new(recorded.tape, purpose, &kept, |_| 4).unwrap();
        let total: usize = program.memory().lines.iter().map(|line| line.bytes).sum();
        assert!(program.arena_bytes() < total, "{purpose:?} shares no memory");
        check_memory(program, &kept);
    }
    let BlockTape { tape, inp, out, .. } = record_block(&model, &table, 2, [2, 24]).unwrap();
    let purpose = Purpose::VectorJacobian { out: Some(out), inp };
    let program = Program::new(tape, purpose, &[out], |_| 4).unwrap();
    let d_inp = program.gradient(inp).unwrap();
    check_memory(program, &[out, d_inp]);
}

#[test]
fn an_op_without_a_gradient_is_refused_when_the_program_is_made() {
    let model = small_model();
    let recorded = record_decode(&model, &ParameterTable::new(&model), 1, 8).unwrap();
    let mut tape = recorded.tape;
    let head = tape.external("head", &[53, 56], Kind::Activation, External::Parameter(0));
    let (targets, scale) = (tape.index_input("targets", &[1]), tape.input("scale", &[1]));
    let losses = tape.cross_entropy(recorded.logits, head, targets, scale, 53, 0.0).unwrap();
    let purpose = Purpose::Training { recompute: Recompute::None };
    let error = Program::new(tape, purpose, &[losses], |_| 4).unwrap_err();
    assert!(matches!(error, Error::NoGradient { op: "cached attention" }), "{error}");
}

/// What runs as one step: a product and what follows it, unless somebody else has to do with what
/// lies between the two.
#[test]
fn a_product_joins_what_follows_it() {
    let [t, c, f] = [6, 8, 16];
    let bytes = |kind| if kind == Kind::Index { 4 } else { 8 };
    let weight = |tape: &mut Tape, index, sizes: [usize; 2]| {
        tape.external("weight", &sizes, Kind::Statistic, External::Parameter(index))
    };
    let fused = |program: &Program| -> Vec<&'static str> {
        let name = |step: &Step<_>| match step {
            Step::Fused(fused) => Some(fused.name()),
            _ => None,
        };
        program.steps().iter().filter_map(name).collect()
    };

    let rotary = |residual: bool| {
        let mut tape = Tape::new();
        let inp = tape.activation_input("inp", &[t, c]);
        let stream = tape.activation_input("stream", &[t, 3 * c]);
        let [table, positions] =
            [tape.input("table", &[t, 4]), tape.index_input("positions", &[t])];
        let w = weight(&mut tape, 0, [3 * c, c]);
        let qkv = tape.linear("qkv", inp, w, residual.then_some(stream)).unwrap();
        let heads = HeadSpec { heads: 2, kv_heads: 2, head_dim: 4 };
        tape.rotary(heads, table, positions, qkv).unwrap();
        Program::new(tape, Purpose::Inference, &[qkv], bytes).unwrap()
    };
    assert_eq!(fused(&rotary(false)), ["linear, rotary"]);
    assert!(fused(&rotary(true)).is_empty(), "an addend comes between them");

    // The gradient of inp by way of SwiGLU and two products; `twice`: the product of gate and up
    // has another reader, whose gradient is added.
    let ffn = |residual: bool, twice: bool| {
        let mut tape = Tape::new();
        let inp = tape.activation_input("inp", &[t, c]);
        let stream = tape.activation_input("stream", &[t, 2 * f]);
        let [w, u, v] = [[2 * f, c], [c, f], [c, f]];
        let w = weight(&mut tape, 0, w);
        let gate_up = tape.linear("gate and up", inp, w, residual.then_some(stream)).unwrap();
        let product = tape.swiglu(gate_up).unwrap();
        let u = weight(&mut tape, 1, u);
        let mut out = tape.linear("down", product, u, None).unwrap();
        if twice {
            let v = weight(&mut tape, 2, v);
            out = tape.linear("down again", product, v, Some(out)).unwrap();
        }
        let purpose = Purpose::VectorJacobian { out: Some(out), inp };
        Program::new(tape, purpose, &[out], bytes).unwrap()
    };
    let [forward, backward] = ["linear, swiglu", "gradients of linear, swiglu"];
    assert_eq!(fused(&ffn(false, false)), [forward, backward]);
    assert_eq!(fused(&ffn(true, false)), [backward], "gate and up have an addend");
    assert_eq!(fused(&ffn(false, true)), [forward], "two gradients make that of the product");
}

/// What a profiler shows as the backward pass: all gradients, the first of which is a fused one
/// where a block ends with its FFN.
#[test]
fn the_backward_pass_of_a_block_begins_with_its_first_gradient() {
    let model = small_model();
    let table = ParameterTable::new(&model);
    let BlockTape { tape, inp, out, .. } = record_block(&model, &table, 2, [2, 24]).unwrap();
    let purpose = Purpose::VectorJacobian { out: Some(out), inp };
    let program = Program::new(tape, purpose, &[out], |_| 4).unwrap();
    let first = program.steps().iter().position(Step::is_backward).unwrap();
    let (forward, backward) = program.steps().split_at(first);
    let is_op = |step: &Step<_>| match step {
        Step::Forward(_) => true,
        Step::Fused(fused) => !fused.is_backward(),
        Step::Backward(_) | Step::Add { .. } => false,
    };
    assert!(forward.iter().all(is_op), "{forward:?}");
    assert!(!backward.iter().any(is_op), "{backward:?}");
    assert!(matches!(backward[0], Step::Fused(_)), "{:?}", backward[0]);
}

#[test]
fn recording_refuses_shapes_that_do_not_fit_by_name() {
    let mut tape = Tape::new();
    let weight = tape.external("weight", &[5, 6], Kind::Activation, External::Parameter(0));
    let inp = tape.input("inp", &[3, 7]);
    let error = tape.linear("out", inp, weight, None).unwrap_err().to_string();
    assert_eq!(error, "linear: weight has shape [5, 6], expected [5, 7]");
    let positions = tape.index_input("positions", &[3]);
    let table = tape.input("table", &[8, 4]);
    let heads = HeadSpec { heads: 2, kv_heads: 1, head_dim: 4 };
    let error = tape.rotary(heads, table, positions, inp).unwrap_err().to_string();
    assert_eq!(error, "rotary: qkv has shape [3, 7], expected [3, 16]");
}

#[test]
fn a_plan_that_does_not_fit_is_refused_with_the_numbers() {
    let mut config = run_config(&small_model());
    config.train.micro_batch = 1 << 30;
    let cpu = Cpu::<f32>::new();
    let plan = Plan::new(&config, &cpu).unwrap();
    let message = Trainer::new(plan, &config, cpu).err().unwrap().to_string();
    for part in ["the plan needs", "cpu has", "train.micro_batch", "gate and up"] {
        assert!(message.contains(part), "{part:?} is not in {message}");
    }
}
