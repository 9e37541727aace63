//! src/depth: every measurement against a formula or a model written out in plain f64 loops, and
//! the command from a run to its files.

mod plain;

use std::fs;
use std::path::{Path, PathBuf};

use isobath::config::{DeviceKind, Dtype, LnsPosition, ModelConfig, Placement};
use isobath::cpu::Cpu;
use isobath::data::source::TokenSource;
use isobath::depth::{
    DepthReport, Explained, Jacobian, Measure, Moments, Request, angular_distance, measure_on,
    rescaled,
};
use isobath::engine::{Backward, Layerwise, Plan, Rows, Trainer};
use isobath::hf::Export;
use isobath::loaded::LoadedModel;
use isobath::model::init::initial_parameters;
use isobath::model::parameters::ParameterTable;
use serde_json::Value;
use tempfile::{TempDir, tempdir};

use crate::hf::{random_parameters, small_model, small_tokenizer};
use crate::support::{assert_close, isobath, normals, run_config, text_file, tiny_run, tokens};
use plain::{Plain, Stream, apply, dot, solve};

/// Random, with branches of about the size of the stream.
fn moderate_parameters(table: &ParameterTable) -> Vec<f32> {
    let mut parameters = random_parameters(table, 7);
    for parameter in table.entries().iter().filter(|p| p.name.starts_with("layers.")) {
        let gain = parameter.name.contains("norm");
        let scale = if gain { 1.0 } else { 0.4 };
        parameters[parameter.range()].iter_mut().for_each(|value| *value *= scale);
    }
    parameters
}

/// A folder that holds the model, and what `depth` reads from it.
fn loaded(config: &ModelConfig, parameters: &[f32]) -> (TempDir, LoadedModel) {
    let folder = tempdir().unwrap();
    let table = &ParameterTable::new(config);
    let tokenizer = &small_tokenizer();
    let dtype = Dtype::F32;
    Export { config, table, tokenizer, dtype }.write(folder.path(), parameters).unwrap();
    let model = LoadedModel::open(folder.path()).unwrap();
    (folder, model)
}

fn request(measures: &[Measure], sequence: usize, batch: usize) -> Request {
    Request {
        model: PathBuf::new(),
        data: Vec::new(),
        field: "text".to_string(),
        tokens: 0,
        sequence: Some(sequence),
        batch,
        measures: measures.to_vec(),
        jacobian_tokens: 3,
        jacobian_context: 5,
        task: None,
        device: DeviceKind::Cpu,
        dtype: None,
    }
}

fn measured_in_f64(model: &LoadedModel, ids: &[i32], request: &Request) -> DepthReport {
    let ids = ids.iter().map(|&id| id as u32).collect();
    let source = TokenSource::from_tokens(ids, &model.tokenizer).unwrap();
    let (mut last, mut of) = (0, 0);
    let progress = |done, all| {
        assert!(done >= last, "progress goes back from {last} to {done}");
        (last, of) = (done, all);
    };
    let report = measure_on(Cpu::<f64>::new(), request, model, &source, progress).unwrap();
    assert_eq!(last, of, "progress ends at its end");
    report
}

/// Tokens and targets of each window.
fn windows(ids: &[i32], sequence: usize) -> Vec<(Vec<i32>, Vec<i32>)> {
    let starts = (0..ids.len() - 1).step_by(sequence);
    let window = |start: usize| {
        let end = (start + sequence).min(ids.len() - 1);
        (ids[start..end].to_vec(), ids[start + 1..end + 1].to_vec())
    };
    starts.map(window).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn angles_are_those_of_hand_and_never_nan() {
    let cases: [(&[f32], &[f32], f64); 7] = [
        (&[1.0, 0.0], &[3.0, 0.0], 0.0),
        (&[1.0, 0.0], &[-0.5, 0.0], 1.0),
        (&[1.0, 0.0], &[0.0, 2.0], 0.5),
        (&[1.0, 0.0], &[1.0, 1.0], 0.25),
        (&[1.0, 0.0, 0.0], &[1.0, 3f32.sqrt(), 0.0], 1.0 / 3.0),
        (&[0.0, 0.0], &[1.0, 2.0], 0.5),
        // Nine features: eight at once and one alone.
        (&[1.0; 9], &[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -8.0], 0.5),
    ];
    for (a, b, expected) in cases {
        let found = angular_distance(a, b);
        assert!((found - expected).abs() < 1e-8, "{a:?} and {b:?}: {found}, not {expected}");
    }
    // Without a clamp some of these have a cosine just above 1, whose arccos is NaN.
    for seed in 0..200 {
        let a: Vec<f32> = normals(seed, 37).iter().map(|&x| x as f32).collect();
        let b: Vec<f32> = a.iter().map(|x| x * 4.0).collect();
        let found = angular_distance(&a, &b);
        assert!((0.0..1e-7).contains(&found), "seed {seed}: {found}");
    }
}

#[test]
fn rows_are_rescaled_between_their_first_and_99th_percentile() {
    // numpy: percentile([0..4], [1, 99]) = 0.04, 3.96
    let found = rescaled(&[4.0, 1.0, 2.0, 3.0, 0.0]);
    let expected = [1.0, 0.96 / 3.92, 0.5, 2.96 / 3.92, 0.0];
    assert_close("rescaled", &found, &expected, 1e-12);
    assert_eq!(rescaled(&[0.3]), [0.0]);
    assert_eq!(rescaled(&[0.3, 0.3]), [0.0, 0.0]);
}

/// What a report says, from the plain model: (loss, variance [L+1], angle by pair, skipped [L]).
fn expected(plain: &Plain, ids: &[i32], sequence: usize) -> (f64, Vec<f64>, Vec<f64>, Vec<f64>) {
    let layers = plain.config.layers;
    let mut losses = Vec::new();
    let mut variance = vec![Vec::new(); layers + 1];
    let mut angles = vec![Vec::new(); layers * (layers + 1) / 2];
    let mut skipped = vec![Vec::new(); layers];
    for (tokens, targets) in windows(ids, sequence) {
        let streams = plain.streams(&tokens);
        losses.extend(plain.losses_after(layers, &streams[layers], &targets));
        for layer in 1..=layers {
            let without = plain.losses_after(layer, &streams[layer - 1], &targets);
            skipped[layer - 1].extend(without);
        }
        for t in 0..tokens.len() {
            for (variance, stream) in variance.iter_mut().zip(&streams) {
                let (x, c) = (&stream[t], plain.config.hidden as f64);
                let average = x.iter().sum::<f64>() / c;
                variance.push(x.iter().map(|x| (x - average).powi(2)).sum::<f64>() / (c - 1.0));
            }
            let mut angles = angles.iter_mut();
            for n in 1..=layers {
                for l in 0..=layers - n {
                    let (a, b) = (&streams[l][t], &streams[l + n][t]);
                    let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
                    angles.next().unwrap().push(cosine.acos() / std::f64::consts::PI);
                }
            }
        }
    }
    let means = |lists: Vec<Vec<f64>>| lists.iter().map(|list| mean(list)).collect();
    (mean(&losses), means(variance), means(angles), means(skipped))
}

/// A small model of each placement that does not become another when it is exported.
fn placements() -> impl Iterator<Item = ModelConfig> {
    let lns = [LnsPosition::AfterNorm, LnsPosition::BeforeNorm].map(|lns| (Placement::Lns, lns));
    let others =
        [Placement::Pre, Placement::Post, Placement::Deepnorm, Placement::Mix, Placement::Sandwich]
            .map(|placement| (placement, LnsPosition::AfterNorm));
    // Of five layers, two are post under `mix`.
    let model = |(placement, lns_position)| ModelConfig {
        placement,
        lns_position,
        mix_post: 0.4,
        ..small_model()
    };
    lns.into_iter().chain(others).map(model)
}

#[test]
fn stream_and_skipped_losses_are_those_of_plain_loops_and_keep_every_depth_scale() {
    for config in placements() {
        let table = &ParameterTable::new(&config);
        let parameters = &moderate_parameters(table);
        let (_folder, model) = loaded(&config, parameters);
        let plain = Plain { config: &config, table, parameters };
        // 90 predictions: five windows of 16 and one of 10; the second batch of four is half empty.
        let ids = tokens(3, 91, config.vocab);
        let measures = [Measure::Variance, Measure::Angular, Measure::Skipped];
        let report = measured_in_f64(&model, &ids, &request(&measures, 16, 4));
        let (loss, variance, angles, skipped) = expected(&plain, &ids, 16);

        assert_eq!((report.layers, report.hidden), (config.layers, config.hidden));
        assert_eq!((report.tokens, report.sequence), (90, 16));
        let placement = match config.lns_position {
            LnsPosition::AfterNorm => config.placement.name(),
            _ => "lns before-norm",
        };
        assert_eq!(report.placement.as_deref(), Some(placement));
        assert_eq!(report.step, None);
        assert_close("loss", &[report.loss, report.perplexity], &[loss, loss.exp()], 1e-5);
        assert_close("variance", &report.variance.unwrap(), &variance, 1e-5);
        let found = report.angular.unwrap();
        let rows: Vec<usize> = found.distance.iter().map(Vec::len).collect();
        assert_eq!(rows, [5, 4, 3, 2, 1]);
        assert_close("angles", &found.distance.concat(), &angles, 1e-5);
        for (row, raw) in found.rescaled.iter().zip(&found.distance) {
            assert_eq!(*row, rescaled(raw));
        }
        let found = report.skipped.unwrap();
        let losses: Vec<f64> = found.iter().map(|skipped| skipped.loss).collect();
        assert_close("losses without a layer", &losses, &skipped, 1e-5);
        for (found, expected) in found.iter().zip(&skipped) {
            let pairs = [
                ("loss increase", found.loss_increase, expected - loss),
                ("perplexity", found.perplexity, expected.exp()),
                ("perplexity increase", found.perplexity_increase, expected.exp() - loss.exp()),
            ];
            for (what, found, expected) in pairs {
                assert!((found - expected).abs() < 1e-4 * expected.abs().max(1.0), "{what}");
            }
        }
        // The error that this excludes: later layers move up, and their scale with them.
        if (config.placement, config.lns_position) == (Placement::Lns, LnsPosition::AfterNorm) {
            let mut shifted = Vec::new();
            for (tokens, targets) in windows(&ids, 16) {
                let mut stream = plain.embed(&tokens);
                for layer in 2..=config.layers {
                    stream = plain.block_at_depth(layer, layer - 1, &stream);
                }
                shifted.extend(plain.losses_after(config.layers, &stream, &targets));
            }
            let difference = (mean(&shifted) - skipped[0]).abs();
            assert!(difference > 1e-3, "the test could not see it: {difference:e}");
        }
    }
}

#[test]
fn a_skipped_layer_leaves_the_model_as_it_was() {
    let config = small_model();
    let table = ParameterTable::new(&config);
    let parameters = moderate_parameters(&table);
    let (inputs, targets) = (tokens(1, 32, config.vocab), tokens(2, 32, config.vocab));
    let mut layerwise = Layerwise::new(
        &config,
        &table,
        &parameters,
        [2, 16],
        Backward { gradient: true, jacobian: None },
        Cpu::<f32>::new(),
    )
    .unwrap();
    let rows = Rows::new(&inputs, &targets);
    let whole = layerwise.forward(rows).unwrap().to_vec();
    let without: Vec<Vec<f32>> =
        (1..=5).map(|layer| layerwise.losses_without(layer).unwrap().to_vec()).collect();
    layerwise.accumulate_gradient(1.0).unwrap();
    for layer in (1..=5).rev() {
        assert_eq!(layerwise.losses_without(layer).unwrap(), without[layer - 1], "layer {layer}");
        assert_ne!(without[layer - 1], whole, "layer {layer}");
    }
    assert_eq!(layerwise.forward(rows).unwrap(), whole);
}

#[test]
fn gradient_norms_are_those_of_a_training_step() {
    let config = small_model();
    let table = ParameterTable::new(&config);
    let parameters = moderate_parameters(&table);
    let ids = tokens(3, 65, config.vocab);
    // LNS is folded into the gains that `depth` reads, and a gradient with respect to those is
    // sqrt(depth) times as large: the training step is of the folded model.
    let (_folder, model) = loaded(&config, &parameters);
    let report = measured_in_f64(&model, &ids, &request(&[Measure::Gradient], 16, 2));

    let mut run = run_config(&model.config);
    run.train.micro_batch = 4;
    run.data.sequence = 16;
    let cpu = Cpu::<f64>::new();
    let mut trainer = Trainer::new(Plan::new(&run, &cpu).unwrap(), &run, cpu).unwrap();
    trainer.set_parameters(&model.parameters).unwrap();
    let rows = Rows::new(&ids[..64], &ids[1..65]);
    trainer.accumulate([rows].into_iter()).unwrap();
    let gradients = trainer.gradients().unwrap();
    let norm = |layer: usize| {
        let prefix = format!("layers.{layer}.");
        let ours = model.table.entries().iter().filter(|entry| entry.name.starts_with(&prefix));
        let values = ours.flat_map(|entry| &gradients[entry.range()]);
        values.map(|&value| (value as f64).powi(2)).sum::<f64>().sqrt()
    };
    let expected: Vec<f64> = (1..=config.layers).map(norm).collect();
    assert_close("gradient norms", &report.gradient_norm.unwrap(), &expected, 1e-6);
}

fn layerwise_for_jacobians(
    config: &ModelConfig,
    parameters: &[f32],
    size: [usize; 2],
) -> Layerwise<Cpu<f64>> {
    let table = ParameterTable::new(config);
    let backward = Backward { gradient: false, jacobian: Some(size) };
    Layerwise::new(config, &table, parameters, [1, 4], backward, Cpu::new()).unwrap()
}

fn of_f32(values: &[f32], columns: usize) -> Stream {
    values.chunks(columns).map(|row| row.iter().map(|&value| value as f64).collect()).collect()
}

#[test]
fn jacobians_are_those_of_finite_differences() {
    for config in placements() {
        let table = &ParameterTable::new(&config);
        let parameters = &moderate_parameters(table);
        let plain = Plain { config: &config, table, parameters };
        let c = config.hidden;
        // 32 products in rounds of 13, the last of 6.
        let mut layerwise = layerwise_for_jacobians(&config, parameters, [13, 6]);
        let noise: Vec<f32> = normals(5, 6 * c).iter().map(|&x| x as f32).collect();
        let stream = of_f32(&noise, c);
        for (layer, token) in [(1, 0), (2, 3), (5, 5)] {
            let found = layerwise.jacobian(layer, &noise, token).unwrap();
            let step = 1e-5;
            let mut expected = vec![0.0; c * c];
            for j in 0..c {
                let [above, below] = [step, -step].map(|step| {
                    let mut moved = stream.clone();
                    moved[token][j] += step;
                    plain.block(layer, &moved)[token].clone()
                });
                for i in 0..c {
                    expected[i * c + j] = (above[i] - below[i]) / (2.0 * step);
                }
            }
            let found: Vec<f64> = found.iter().map(|&value| value as f64).collect();
            let what = format!("{}, layer {layer}, token {token}", config.placement);
            assert_close(&what, &found, &expected, 2e-6);
        }
    }
}

/// Token 0 attends to itself alone, so without an FFN y = x + O V n(x), and with the RMS r of x
/// J = I + O V G (I - x x^T / (C r^2)) / r.
#[test]
fn the_jacobian_of_a_known_block_is_exact() {
    let config = ModelConfig { kv_heads: 4, norm_eps: 1e-12, ..small_model() };
    let table = &ParameterTable::new(&config);
    let mut parameters = moderate_parameters(table);
    let (c, layer) = (config.hidden, 3);
    for entry in table.entries().iter().filter(|entry| entry.name.ends_with(".down")) {
        parameters[entry.range()].fill(0.0);
    }
    let plain = Plain { config: &config, table, parameters: &parameters };
    let noise: Vec<f32> = normals(6, 2 * c).iter().map(|&x| x as f32).collect();
    let x = &of_f32(&noise, c)[0];
    let r = (dot(x, x) / c as f64).sqrt();
    let gain = &plain.of_layer(layer, "input_layernorm")[0];
    let (o, v) =
        (plain.of_layer(layer, "self_attn.o_proj"), plain.of_layer(layer, "self_attn.v_proj"));
    let mut expected = vec![0.0; c * c];
    for j in 0..c {
        // Column j: what happens to unit vector j.
        let depth_scale = (layer as f64).sqrt();
        let normed: Vec<f64> = (0..c)
            .map(|i| {
                let unit = if i == j { 1.0 } else { 0.0 };
                gain[i] / depth_scale * (unit - x[i] * x[j] / (c as f64 * r * r)) / r
            })
            .collect();
        let column = apply(&o, &apply(&v, &normed));
        for i in 0..c {
            expected[i * c + j] = column[i] + if i == j { 1.0 } else { 0.0 };
        }
    }
    let mut layerwise = layerwise_for_jacobians(&config, &parameters, [32, 2]);
    let found = layerwise.jacobian(layer, &noise, 0).unwrap();
    let wide: Vec<f64> = found.iter().map(|&value| value as f64).collect();
    assert_close("jacobian", &wide, &expected, 1e-6);
    assert!(Jacobian::of(&found, c).relative_distance > 0.1, "not the identity");
}

#[test]
fn a_jacobian_is_told_by_diagonal_off_diagonal_and_distance_to_the_identity() {
    let found = Jacobian::of(&[1.0, 2.0, 3.0, 4.0], 2);
    let found = [found.diagonal_mean, found.off_diagonal_norm, found.relative_distance];
    let expected = [2.5, 13f64.sqrt(), (22f64 / 2.0).sqrt()];
    assert_close("of [[1, 2], [3, 4]]", &found, &expected, 1e-12);

    // A model whose blocks add nothing: the identity, and linear to the last bit.
    let config = small_model();
    let table = ParameterTable::new(&config);
    let mut parameters = moderate_parameters(&table);
    for entry in table.entries() {
        if entry.name.ends_with(".down") || entry.name.ends_with(".attention_out") {
            parameters[entry.range()].fill(0.0);
        }
    }
    let (_folder, model) = loaded(&config, &parameters);
    let ids = tokens(3, 161, config.vocab);
    let measures = [Measure::Jacobian, Measure::Linear, Measure::Skipped, Measure::Angular];
    let report = measured_in_f64(&model, &ids, &request(&measures, 16, 4));
    let jacobian = report.jacobian.unwrap();
    assert_eq!((jacobian.tokens, jacobian.context, jacobian.blocks.len()), (3, 5, 5));
    for block in &jacobian.blocks {
        assert_eq!(
            (block.diagonal_mean, block.off_diagonal_norm, block.relative_distance),
            (1.0, 0.0, 0.0)
        );
    }
    for block in report.linear.unwrap().blocks {
        assert_eq!((block.loss_increase, block.explained), (0.0, 1.0));
    }
    assert!(report.skipped.unwrap().iter().all(|skipped| skipped.loss_increase == 0.0));
    assert!(report.angular.unwrap().distance.concat().iter().all(|&angle| angle < 1e-7));
}

/// Rows [n][C] as `Moments` takes them.
fn random_rows(seed: u64, n: usize, c: usize) -> Vec<f32> {
    normals(seed, n * c).iter().map(|&x| x as f32).collect()
}

#[test]
fn an_affine_block_is_found_and_features_that_depend_on_each_other_do_no_harm() {
    let (n, c) = (300, 9);
    let weight = normals(8, c * c);
    // y = x + x W + b
    let block = |inp: &[f32]| -> Vec<f32> {
        let token = |x: &[f32]| {
            let y = |j: usize| {
                let sum: f64 = (0..c).map(|i| x[i] as f64 * weight[i * c + j]).sum();
                (x[j] as f64 + sum + j as f64) as f32
            };
            (0..c).map(y).collect::<Vec<f32>>()
        };
        inp.chunks(c).flat_map(token).collect()
    };
    type Change = fn(&mut [f32]);
    let explained = |change: Change| {
        let rows = |seed| {
            let mut rows = random_rows(seed, n, c);
            rows.chunks_mut(c).for_each(change);
            rows
        };
        let (fitted, judged) = (rows(1), rows(2));
        let mut moments = Moments::new(c);
        for part in fitted.chunks(100 * c) {
            moments.add(part, &block(part));
        }
        assert_eq!(moments.tokens(), n as u64);
        let map = moments.solve().unwrap();
        let mapped = map.apply(&judged);
        let wide = |rows: &[f32]| rows.iter().map(|&value| value as f64).collect::<Vec<f64>>();
        assert_close("map", &wide(&mapped), &wide(&block(&judged)), 1e-6);
        let mut explained = Explained::new(c);
        explained.add(&judged, &block(&judged), &mapped);
        explained.share()
    };
    let changes: [(&str, Change); 6] = [
        ("full rank", |_| {}),
        ("a feature twice", |x| x[3] = x[5]),
        ("a feature that is the sum of two", |x| x[0] = x[1] + x[2]),
        ("a constant, and one that is never there", |x| (x[4], x[7]) = (3.0, 0.0)),
        ("a large feature twice", |x| (x[3], x[5]) = (1e4 + x[5], 1e4 + x[5])),
        ("features of very different size", |x| (x[1], x[2]) = (1e4 + x[1], 1e-4 * x[2])),
    ];
    for (what, change) in changes {
        let share = explained(change);
        assert!(share > 1.0 - 1e-6, "{what}: {share}");
    }
}

/// Against normal equations for [x, 1], solved by elimination, on the plain model's streams.
#[test]
fn the_loss_with_an_affine_block_is_that_of_plain_least_squares() {
    let small = small_model();
    let config = ModelConfig { hidden: 8, heads: 2, kv_heads: 1, layers: 3, ..small };
    let table = &ParameterTable::new(&config);
    let parameters = &moderate_parameters(table);
    let (_folder, model) = loaded(&config, parameters);
    let plain = Plain { config: &config, table, parameters };
    // 16 windows of 16 in batches of 3: batches 0, 2, 4 are fitted on.
    let (ids, c) = (tokens(4, 251, config.vocab), config.hidden);
    let report = measured_in_f64(&model, &ids, &request(&[Measure::Linear], 16, 3));
    let found = report.linear.unwrap();
    let windows = windows(&ids, 16);
    let fitted = |window: &usize| (window / 3).is_multiple_of(2);
    let all: Vec<Vec<Stream>> = windows.iter().map(|(tokens, _)| plain.streams(tokens)).collect();
    let count = |pick: &dyn Fn(&usize) -> bool| -> usize {
        (0..windows.len()).filter(pick).map(|window| windows[window].0.len()).sum()
    };
    assert_eq!(found.fitted_tokens as usize, count(&fitted));

    let mut whole = Vec::new();
    for window in (0..windows.len()).filter(|window| !fitted(window)) {
        let stream = &all[window][config.layers];
        whole.extend(plain.losses_after(config.layers, stream, &windows[window].1));
    }
    for layer in 1..=config.layers {
        let (mut xx, mut xy) = (vec![vec![0.0; c + 1]; c + 1], vec![vec![0.0; c]; c + 1]);
        let one = |x: &[f64]| x.iter().copied().chain([1.0]).collect::<Vec<f64>>();
        for window in (0..windows.len()).filter(fitted) {
            for (x, y) in all[window][layer - 1].iter().zip(&all[window][layer]) {
                let x = one(x);
                for i in 0..=c {
                    (0..=c).for_each(|j| xx[i][j] += x[i] * x[j]);
                    (0..c).for_each(|j| xy[i][j] += x[i] * y[j]);
                }
            }
        }
        let map = solve(xx, xy);
        let (mut losses, mut left, mut changes) = (Vec::new(), 0.0, Vec::new());
        for window in (0..windows.len()).filter(|window| !fitted(window)) {
            let mapped: Stream = all[window][layer - 1]
                .iter()
                .map(|x| {
                    let x = one(x);
                    (0..c).map(|j| (0..=c).map(|i| x[i] * map[i][j]).sum()).collect()
                })
                .collect();
            for (t, y) in all[window][layer].iter().enumerate() {
                left += (0..c).map(|j| (y[j] - mapped[t][j]).powi(2)).sum::<f64>();
                let x = &all[window][layer - 1][t];
                changes.push((0..c).map(|j| y[j] - x[j]).collect::<Vec<f64>>());
            }
            losses.extend(plain.losses_after(layer, &mapped, &windows[window].1));
        }
        let variance: f64 = (0..c)
            .map(|j| {
                let change: Vec<f64> = changes.iter().map(|change| change[j]).collect();
                let average = mean(&change);
                change.iter().map(|change| (change - average).powi(2)).sum::<f64>()
            })
            .sum();
        let block = &found.blocks[layer - 1];
        let found = [block.loss, block.loss_increase, block.explained];
        let increase = mean(&losses) - mean(&whole);
        let expected = [mean(&losses), increase, 1.0 - left / variance];
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found - expected).abs() < 2e-5, "layer {layer}, {i}: {found}, {expected}");
        }
    }
}

/// At initialisation branches are uncorrelated with the stream, so variances add. With matrices of
/// variance 1/C and rows of one token, attention passes its normed input's variance s twice, and
/// SwiGLU adds (F/C) s E[silu(sqrt(s) z)^2]; s is 1 in Pre-LN and 1/l under LNS.
#[test]
fn variance_grows_with_depth_at_initialisation_as_theory_says() {
    let expectation = |s: f64| {
        let steps = 4000;
        let sum: f64 = (0..steps)
            .map(|i| {
                let z = -8.0 + 16.0 * (i as f64 + 0.5) / steps as f64;
                let x = s.sqrt() * z;
                let silu = x / (1.0 + (-x).exp());
                silu * silu * (-z * z / 2.0).exp()
            })
            .sum();
        sum * 16.0 / steps as f64 / (2.0 * std::f64::consts::PI).sqrt()
    };
    let hidden = 192;
    let base = ModelConfig {
        hidden,
        layers: 12,
        heads: 4,
        kv_heads: 4,
        ffn: 192,
        init_std: 1.0 / (hidden as f64).sqrt(),
        embedding_std: 1.0,
        ..small_model()
    };
    for placement in [Placement::Pre, Placement::Lns] {
        let config = ModelConfig { placement, ..base.clone() };
        let parameters = initial_parameters(&ParameterTable::new(&config), 5);
        let (_folder, model) = loaded(&config, &parameters);
        let ids: Vec<i32> = (0..65).map(|i| i % 64).collect();
        let report = measured_in_f64(&model, &ids, &request(&[Measure::Variance], 1, 64));
        let variance = report.variance.unwrap();
        let mut expected = vec![variance[0]];
        for layer in 1..=config.layers {
            let s = if placement == Placement::Lns { 1.0 / layer as f64 } else { 1.0 };
            let ffn = config.ffn as f64 / hidden as f64 * s * expectation(s);
            expected.push(expected[layer - 1] + s + ffn);
        }
        for (layer, (found, expected)) in variance.iter().zip(&expected).enumerate() {
            let ratio = found / expected;
            assert!((0.9..1.1).contains(&ratio), "{placement}, layer {layer}: ratio {ratio}");
        }
        // Linear: the second half adds as much as the first. Harmonic: 0.65 / 2.5 of it.
        let half = config.layers / 2;
        let first = variance[half] - variance[0];
        let share = (variance[config.layers] - variance[half]) / first;
        let expected = (expected[config.layers] - expected[half]) / (expected[half] - expected[0]);
        assert!((share - expected).abs() < 0.1, "{placement}: {share}, expected {expected}");
    }
}

#[test]
fn padding_counts_nowhere() {
    let config = small_model();
    let parameters = moderate_parameters(&ParameterTable::new(&config));
    let (_folder, model) = loaded(&config, &parameters);
    let ids = tokens(9, 75, config.vocab);
    let measures = [Measure::Variance, Measure::Angular, Measure::Skipped, Measure::Gradient];
    // 74 predictions: the last window has 10 tokens, and three of the four windows of the second
    // batch of four are empty.
    let numbers = |batch: usize| -> [Vec<f64>; 4] {
        let report = measured_in_f64(&model, &ids, &request(&measures, 16, batch));
        assert_eq!(report.tokens, 74);
        [
            report.variance.unwrap(),
            report.angular.unwrap().distance.concat(),
            report.skipped.unwrap().iter().map(|skipped| skipped.loss).collect(),
            report.gradient_norm.unwrap(),
        ]
    };
    for (i, (padded, single)) in numbers(4).iter().zip(&numbers(1)).enumerate() {
        assert_close(measures[i].name(), padded, single, 1e-6);
    }
}

/// A trained run, the text after its training text, and the arguments to measure it.
struct Case {
    folder: TempDir,
    run: PathBuf,
    text: PathBuf,
}

impl Case {
    fn new(sets: &[&str]) -> Self {
        let folder = tempdir().unwrap();
        let text = text_file(folder.path(), 4000);
        let run = folder.path().join("run");
        assert!(isobath().args(tiny_run(&text, &run, sets)).output().unwrap().status.success());
        Case { folder, run, text }
    }

    /// Exit code, stdout, stderr.
    fn depth(&self, model: &Path, more: &[&str]) -> (Option<i32>, String, String) {
        let (model, text) = (model.to_str().unwrap(), self.text.to_str().unwrap());
        let defaults = [["--tokens", "600"], ["--sequence", "32"], ["--jacobian-tokens", "2"]];
        let defaults = defaults.iter().filter(|pair| !more.contains(&pair[0])).flatten();
        let command = ["depth", model, "--data", text, "--device", "cpu"];
        let output = isobath().args(command).args(defaults).args(more).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    /// The model of the run as other people would give it away: no placement, no manifest.
    fn foreign(&self, edit: impl FnOnce(&mut Value)) -> PathBuf {
        let from = self.run.join("checkpoints/step-00000008");
        let to = self.folder.path().join("foreign");
        fs::create_dir_all(&to).unwrap();
        for name in ["model.safetensors", "tokenizer.json"] {
            fs::copy(from.join(name), to.join(name)).unwrap();
        }
        let config = fs::read(from.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        config.as_object_mut().unwrap().remove("isobath").unwrap();
        edit(&mut config);
        fs::write(to.join("config.json"), config.to_string()).unwrap();
        to
    }
}

fn count_marks(svg: &Path, mark: &str) -> usize {
    let text = fs::read_to_string(svg).unwrap();
    roxmltree::Document::parse(&text).unwrap();
    text.matches(mark).count()
}

#[test]
fn a_run_is_measured_into_its_own_folder() {
    let case = Case::new(&["model.layers=3", "checkpoint.every=4"]);
    let (code, out, message) = case.depth(&case.run, &["--json"]);
    assert_eq!(code, Some(0), "{message}");
    let report: DepthReport = serde_json::from_str(&out).unwrap();
    assert_eq!((report.layers, report.hidden, report.step), (3, 16, Some(8)));
    assert_eq!((report.tokens, report.sequence), (600, 32));
    assert_eq!(report.placement.as_deref(), Some("lns"));
    let fields: Value = serde_json::from_str(&out).unwrap();
    for (field, entries) in [("variance", 4), ("skipped", 3), ("gradient_norm", 3)] {
        assert_eq!(fields[field].as_array().unwrap().len(), entries, "{field}");
    }
    for field in ["jacobian", "linear"] {
        assert_eq!(fields[field]["blocks"].as_array().unwrap().len(), 3, "{field}");
    }
    assert_eq!(fields["angular"]["distance"].as_array().unwrap().len(), 3);
    assert_eq!(fields["task"], Value::Null);

    let depth = case.run.join("depth");
    let kept = fs::read(depth.join("step-00000008.json")).unwrap();
    assert_eq!(serde_json::from_slice::<DepthReport>(&kept).unwrap(), report);
    // One mark for each layer, or pair of layers; each says in a title what it stands for.
    let (point, bar, cell) = (")</title>", ", layer ", "<title>layer ");
    let marks = [
        ("variance", point, 4),
        ("angular", cell, 6),
        ("angular-rescaled", cell, 6),
        ("skipped", bar, 3),
        ("gradient", point, 3),
        ("jacobian", point, 2 * 3),
        ("linear", bar, 3),
    ];
    for (name, mark, expected) in marks {
        let svg = depth.join(format!("step-00000008-{name}.svg"));
        assert_eq!(count_marks(&svg, mark), expected, "{name}");
        assert_eq!(count_marks(&svg, "prefers-color-scheme"), 1, "{name}: light and dark");
    }
    assert_eq!(fs::read_dir(&depth).unwrap().count(), 1 + marks.len());

    // A part of it, as a table, somewhere else.
    let out_folder = case.folder.path().join("out");
    let more = ["--measure", "variance,skipped", "--out", out_folder.to_str().unwrap()];
    let (code, table, message) = case.depth(&case.run.join("checkpoints/step-00000004"), &more);
    assert_eq!(code, Some(0), "{message}");
    let header = table.lines().find(|line| line.contains("layer  ")).unwrap();
    let columns: Vec<&str> = header.split_whitespace().collect();
    assert_eq!(columns, ["layer", "variance", "skipped"]);
    assert_eq!(table.lines().skip_while(|line| *line != header).count(), 1 + 3);
    let mut names: Vec<String> = fs::read_dir(&out_folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let stem = "step-00000004";
    let expected = [format!("{stem}-skipped.svg"), format!("{stem}-variance.svg")];
    assert_eq!(names[..2], expected);
    assert_eq!(names[2..], [format!("{stem}.json")]);
}

/// Measuring one thing more, or again, loses nothing of the same tokens; other tokens are refused.
#[test]
fn what_was_measured_before_stays() {
    let case = Case::new(&[]);
    let measured = |more: &[&str]| {
        let (code, _, message) = case.depth(&case.run, more);
        let kept = fs::read(case.run.join("depth/step-00000008.json")).unwrap();
        (code, message, serde_json::from_slice::<DepthReport>(&kept).unwrap())
    };
    let (_, _, first) = measured(&["--measure", "variance"]);
    let (code, message, both) = measured(&["--measure", "skipped"]);
    assert_eq!(code, Some(0), "{message}");
    assert_eq!(both.variance, first.variance);
    assert!(both.skipped.is_some());
    let (code, message, after) = measured(&["--measure", "variance", "--tokens", "300"]);
    assert_eq!(code, Some(2), "{message}");
    assert!(message.contains("other tokens (600 of") && message.contains("--out"), "{message}");
    assert_eq!(after, both);
    // What it has can be measured again on others.
    let (code, message, after) = measured(&["--measure", "variance,skipped", "--tokens", "300"]);
    assert_eq!((code, after.tokens), (Some(0), 300), "{message}");
}

#[test]
fn every_checkpoint_of_a_run_is_measured() {
    let case = Case::new(&["checkpoint.every=4"]);
    let more = ["--every-checkpoint", "--measure", "variance", "--json"];
    let (code, out, message) = case.depth(&case.run, &more);
    assert_eq!(code, Some(0), "{message}");
    let all: Value = serde_json::from_str(&out).unwrap();
    let steps: Vec<u64> = all["checkpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|report| report["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [4, 8]);
    let reports = isobath::depth::reports_of_run(&case.run).unwrap();
    assert_eq!(reports.iter().map(|report| report.step).collect::<Vec<_>>(), [Some(4), Some(8)]);
    assert_ne!(reports[0].variance, reports[1].variance);
    let over_training = case.run.join("depth/variance-over-training.svg");
    // Two series of an embedding and two layers each.
    assert_eq!(count_marks(&over_training, ")</title>"), 2 * 3);
    let (code, _, message) = case.depth(case.folder.path(), &["--every-checkpoint"]);
    assert_eq!(code, Some(2));
    assert!(message.contains("has no checkpoints"), "{message}");
}

#[test]
fn folders_of_others_are_measured_or_refused_by_name() {
    let case = Case::new(&["model.placement=pre"]);
    let (_, own, _) = case.depth(&case.run, &["--json"]);
    let own: DepthReport = serde_json::from_str(&own).unwrap();
    let folder = case.foreign(|_| {});
    let (code, out, message) = case.depth(&folder, &["--json"]);
    assert_eq!(code, Some(0), "{message}");
    let report: DepthReport = serde_json::from_str(&out).unwrap();
    assert_eq!((report.placement.as_deref(), report.step), (None, None));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 3, "nothing is written beside it");
    let same = DepthReport { model: own.model.clone(), placement: own.placement.clone(), ..report };
    assert_eq!(DepthReport { step: own.step, ..same }, own);

    let out_folder = case.folder.path().join("out");
    let more = ["--measure", "angular", "--out", out_folder.to_str().unwrap()];
    assert_eq!(case.depth(&folder, &more).0, Some(0));
    for name in ["depth.json", "depth-angular.svg", "depth-angular-rescaled.svg"] {
        assert!(out_folder.join(name).exists(), "{name}");
    }

    case.foreign(|config| config["model_type"] = "qwen2".into());
    let (code, out, message) = case.depth(&folder, &[]);
    assert_eq!((code, out.as_str()), (Some(2), ""));
    assert!(message.contains("model_type is \"qwen2\""), "{message}");
}

#[test]
fn weights_that_are_not_finite_are_named_and_so_is_what_overflows() {
    let case = Case::new(&["model.layers=3"]);
    let folder = case.foreign(|_| {});
    let path = folder.join("model.safetensors");
    let good = fs::read(&path).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    // Element [2, 5] of [24, 16] in f32.
    let written = |value: f32| {
        let mut bytes = good.clone();
        let file = safetensors::SafeTensors::deserialize(&good).unwrap();
        let data = file.tensor(name).unwrap().data();
        let start = data.as_ptr() as usize - good.as_ptr() as usize + 4 * (2 * 16 + 5);
        bytes[start..start + 4].copy_from_slice(&value.to_le_bytes());
        fs::write(&path, bytes).unwrap();
    };
    for value in [f32::NAN, f32::INFINITY] {
        written(value);
        let (code, out, message) = case.depth(&folder, &["--json"]);
        assert_eq!((code, out.as_str()), (Some(2), ""));
        let expected = format!("{name} holds {value} at [2, 5]");
        assert!(message.contains(&expected), "{message}");
    }
    written(f32::MAX);
    let (code, _, message) = case.depth(&folder, &["--json"]);
    assert_eq!(code, Some(2));
    assert!(message.contains("no longer finite after layer 2"), "{message}");
}

#[test]
fn what_cannot_be_measured_is_refused_with_the_numbers() {
    let case = Case::new(&["train.steps=1"]);
    let refused = |more: &[&str], parts: &[&str]| {
        let (code, out, message) = case.depth(&case.run, more);
        assert_eq!((code, out.as_str()), (Some(2), ""), "{message}");
        for part in parts {
            assert!(message.contains(part), "no {part:?} in {message}");
        }
    };
    refused(&["--measure", "depth"], &["variance, angular, skipped, gradient, jacobian, linear"]);
    refused(&["--sequence", "65"], &["at most 64"]);
    // One window; and two of 20 tokens, which are fewer than 2 (16 + 1).
    let one = ["--measure", "linear", "--tokens", "32"];
    refused(&one, &["16 features", "1 windows", "leave linear out"]);
    let two = ["--measure", "linear", "--tokens", "40", "--sequence", "20"];
    refused(&two, &["fitted on 20 of 40", "they need 34"]);
    refused(&["--data", "no.txt"], &["no.txt"]);
    assert!(!case.run.join("depth").exists());
}

/// Each changed model is also made by hand: the layer's two output matrices are zero, so it adds
/// nothing, and `isobath eval --task` scores that folder.
#[test]
fn a_task_loses_what_it_loses_without_the_layer() {
    let case = Case::new(&["model.layers=3", "train.steps=40", "optimizer.lr=0.01"]);
    let from = case.run.join("checkpoints/step-00000040");
    let questions = case.folder.path().join("questions.jsonl");
    let words: Vec<&str> = crate::data::AUSTEN.split_whitespace().skip(200).collect();
    let lines: Vec<String> = words
        .chunks_exact(12)
        .take(40)
        .enumerate()
        .map(|(i, words)| {
            let (context, right, wrong) = (words[..3].join(" "), words[3], words[9]);
            let answer = i % 2;
            let choices = if answer == 0 { [right, wrong] } else { [wrong, right] };
            serde_json::json!({"context": context, "choices": choices, "answer": answer})
                .to_string()
        })
        .collect();
    fs::write(&questions, lines.join("\n")).unwrap();
    let questions = questions.to_str().unwrap();
    let accuracy = |model: &Path| {
        let arguments = ["eval", model.to_str().unwrap(), "--task", questions, "--device", "cpu"];
        let output = isobath().args(arguments).args(["--shots", "1", "--json"]).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        let score: Value = serde_json::from_slice(&output.stdout).expect(&message);
        [score["acc_norm"]["mean"].as_f64().unwrap(), score["questions"].as_f64().unwrap()]
    };
    let more = ["--measure", "skipped", "--task", questions, "--shots", "1", "--json"];
    let (code, out, message) = case.depth(&case.run, &more);
    assert_eq!(code, Some(0), "{message}");
    let report: DepthReport = serde_json::from_str(&out).unwrap();
    let found = report.task.unwrap();
    let [whole, count] = accuracy(&from);
    assert_eq!((found.accuracy, found.questions as f64, found.shots), (whole, count, 1));
    assert!(found.standard_error.unwrap() > 0.0);

    for (layer, change) in (1..=3).zip(&found.change) {
        let folder = case.folder.path().join(format!("without-{layer}"));
        fs::create_dir(&folder).unwrap();
        for name in ["config.json", "tokenizer.json"] {
            fs::copy(from.join(name), folder.join(name)).unwrap();
        }
        let mut bytes = fs::read(from.join("model.safetensors")).unwrap();
        for name in ["self_attn.o_proj", "mlp.down_proj"] {
            let name = format!("model.layers.{}.{name}.weight", layer - 1);
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let data = file.tensor(&name).unwrap().data();
            let start = data.as_ptr() as usize - bytes.as_ptr() as usize;
            let range = start..start + data.len();
            bytes[range].fill(0);
        }
        fs::write(folder.join("model.safetensors"), bytes).unwrap();
        let expected = 100.0 * (accuracy(&folder)[0] - whole);
        assert!((change - expected).abs() < 1e-9, "layer {layer}: {change}, not {expected}");
    }
    assert!(found.change.iter().any(|&change| change != 0.0), "{:?}", found.change);
    let svg = case.run.join("depth/step-00000040-task.svg");
    assert_eq!(count_marks(&svg, ", layer "), 3);
    let (code, _, message) = case.depth(&case.run, &["--task", "no.jsonl"]);
    assert_eq!(code, Some(2));
    assert!(message.contains("no.jsonl"), "{message}");
}
