//! src/model: first values, placements, and what LayerNorm Scaling does to a forward pass.

use isobath::config::{InitKind, LnsPosition, ModelConfig, Placement};
use isobath::cpu::Cpu;
use isobath::engine::{Evaluator, Rows};
use isobath::model::init::initial_parameters;
use isobath::model::parameters::{BlockParameters, BranchParameters, Init, ParameterTable};
use isobath::model::placement::{Order, block_form, block_init};

use crate::hf::{assert_same_bits, random_parameters};
use crate::support::{small_model, tokens};

fn wide_model() -> ModelConfig {
    ModelConfig { hidden: 64, layers: 6, ffn: 125, vocab: 512, init_std: 0.02, ..small_model() }
}

/// For every element of the flat buffer, whether it is padding.
fn padding(table: &ParameterTable) -> Vec<bool> {
    let mut padding = vec![true; table.stored_elements()];
    for parameter in table.entries() {
        let columns = parameter.stored.columns();
        for tensor in &parameter.tensors {
            for row in tensor.first_row..tensor.first_row + tensor.shape.rows() {
                let start = parameter.offset + row * columns;
                padding[start..start + tensor.shape.columns()].fill(false);
            }
        }
    }
    padding
}

#[test]
fn first_values_are_normal_with_the_configured_std_at_every_depth() {
    let config = wide_model();
    let table = ParameterTable::new(&config);
    let flat = initial_parameters(&table, 3);
    let padding = padding(&table);
    assert!(padding.iter().any(|&padding| padding), "a model with padding");
    assert!(flat.iter().zip(&padding).all(|(value, padding)| !padding || *value == 0.0));
    for parameter in table.entries() {
        let values: Vec<f64> =
            parameter.range().filter(|&i| !padding[i]).map(|i| flat[i] as f64).collect();
        let n = values.len() as f64;
        let expected = match (parameter.init, parameter.name.as_str()) {
            (Init::Constant(gain), name) => {
                assert!(name.ends_with("norm") && gain == 1.0, "{name}");
                assert!(values.iter().all(|&value| value == gain), "{name}");
                continue;
            }
            (Init::NormalRows { .. }, name) => panic!("{name} has two deviations"),
            (Init::Normal { .. }, "embedding") => config.embedding_std,
            (Init::Normal { .. }, _) => config.init_std, // in every layer: not scaled with depth
        };
        let mean = values.iter().sum::<f64>() / n;
        let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
        let fourth = values.iter().map(|v| (v / expected).powi(4)).sum::<f64>() / n;
        // five standard errors of each
        let name = &parameter.name;
        assert!(mean.abs() < 5.0 * expected / n.sqrt(), "{name}: mean {mean:e}");
        assert!((std / expected - 1.0).abs() < 5.0 / (2.0 * n).sqrt(), "{name}: std {std:e}");
        assert!((fourth - 3.0).abs() < 5.0 * (96.0 / n).sqrt(), "{name}: 4th moment {fourth}");
    }
}

#[test]
fn first_values_depend_on_the_seed_and_not_on_the_threads() {
    let table = ParameterTable::new(&wide_model());
    let with = |threads: usize, seed: u64| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| initial_parameters(&table, seed))
    };
    let one = with(1, 3);
    assert_same_bits("three threads", &with(3, 3), &one);
    assert_ne!(with(1, 4), one);
    let [first, second] = [1, 2].map(|layer| table.get(table.block(layer).qkv).range());
    assert_ne!(one[first], one[second], "each matrix has values of its own");
}

#[test]
fn lns_is_the_pre_model_whose_gains_are_divided_by_the_root_of_the_depth() {
    let lns = ModelConfig { layers: 5, ..small_model() };
    let pre = ModelConfig { placement: Placement::Pre, ..lns.clone() };
    let table = ParameterTable::new(&lns);
    let parameters = random_parameters(&table, 5);
    let divided = |layers: &mut dyn Iterator<Item = usize>| {
        let mut divided = parameters.clone();
        for layer in layers {
            let block = table.block(layer);
            for norm in [block.attention.norm, block.ffn.norm] {
                let gains = &mut divided[table.get(norm).range()];
                gains.iter_mut().for_each(|gain| *gain /= (layer as f32).sqrt());
            }
        }
        divided
    };
    let (inputs, targets) = (tokens(1, 64, lns.vocab), tokens(2, 64, lns.vocab));
    let losses = |config: &ModelConfig, parameters: &[f32]| {
        let table = ParameterTable::new(config);
        let cpu = Cpu::<f32>::new();
        let mut model = Evaluator::new(config, &table, parameters, [2, 32], cpu).unwrap();
        model.losses(Rows::new(&inputs, &targets)).unwrap().to_vec()
    };
    let found = losses(&lns, &parameters);
    assert_same_bits("losses", &found, &losses(&pre, &divided(&mut (1..=5))));
    // Each layer from the second on is scaled; the final norm and the first layer are not.
    for without in 2..=5 {
        let mut others = (1..=5).filter(|&layer| layer != without);
        assert_ne!(found, losses(&pre, &divided(&mut others)), "layer {without}");
    }
}

/// Blocks of a model with three, of which one is post with `mix`.
fn three_blocks(placement: Placement) -> ModelConfig {
    ModelConfig { placement, layers: 3, mix_post: 0.3, ..small_model() }
}

#[test]
fn placements_are_those_of_their_papers() {
    let form = |placement, layer| block_form(&three_blocks(placement), layer);
    let orders = |placement| [1, 2, 3].map(|layer| form(placement, layer).order);
    assert_eq!(orders(Placement::Pre), [Order::Pre; 3]);
    assert_eq!(orders(Placement::Post), [Order::Post; 3]);
    assert_eq!(orders(Placement::Deepnorm), [Order::Post; 3]);
    assert_eq!(orders(Placement::Mix), [Order::Post, Order::Pre, Order::Pre]);
    assert_eq!(orders(Placement::Sandwich), [Order::Sandwich; 3]);
    // alpha = (2L)^(1/4) and beta = (8L)^(-1/4) of 24 layers: 2.632 and 0.269.
    let deep = ModelConfig { layers: 24, ..three_blocks(Placement::Deepnorm) };
    assert!((block_form(&deep, 7).sum.stream_scale - 2.632).abs() < 1e-3);
    let init = block_init(&deep, 7);
    let beta = 0.2687 * deep.init_std;
    assert_eq!([init.query, init.key], [deep.init_std; 2]);
    for std in [init.value, init.attention_out, init.gate_up, init.down] {
        assert!((std / beta - 1.0).abs() < 1e-3, "{std}");
    }
    let depth = |lns_position, layer| {
        let form = block_form(&ModelConfig { lns_position, ..three_blocks(Placement::Lns) }, layer);
        let (attention, ffn) = (form.attention_norm, form.ffn_norm);
        [attention.depth, attention.input_depth, ffn.depth, ffn.input_depth]
    };
    assert_eq!(depth(LnsPosition::AfterNorm, 3), [3, 1, 3, 1]);
    assert_eq!(depth(LnsPosition::BeforeNorm, 3), [1, 3, 1, 3]);
    assert_eq!(depth(LnsPosition::AttentionNorm, 3), [3, 1, 1, 1]);
    assert_eq!(depth(LnsPosition::FfnNorm, 3), [1, 1, 3, 1]);
    assert_eq!(depth(LnsPosition::AfterBranch, 3), [1; 4]);
    assert_eq!(depth(LnsPosition::GainInit, 3), [1; 4]);
}

#[test]
fn scaled_first_values_are_those_of_the_table() {
    let with = |init, layer| block_init(&ModelConfig { init, layers: 8, ..small_model() }, layer);
    let std = small_model().init_std;
    let normal = with(InitKind::Normal, 5);
    assert_eq!([normal.query, normal.value, normal.attention_out, normal.down], [std; 4]);
    for layer in [1, 5] {
        let scaled = with(InitKind::Scaled, layer);
        assert_eq!([scaled.attention_out, scaled.down], [std * 0.25; 2], "1/sqrt(2 x 8)");
        assert_eq!([scaled.query, scaled.value, scaled.gate_up], [std; 3]);
    }
    let deep = with(InitKind::DepthScaled, 2);
    assert_eq!([deep.attention_out, deep.down], [std * 0.5; 2], "1/sqrt(2 x 2)");
    let xavier = with(InitKind::Xavier, 1);
    assert_eq!(xavier.down, (2.0 / (24.0 + 37.0f64)).sqrt());
    let of_kv = (2.0 / (12.0 + 24.0f64)).sqrt(); // 2 kv heads of 6
    assert_eq!([xavier.key, xavier.value], [of_kv; 2]);
    assert_eq!(xavier.query, (2.0 / 48.0f64).sqrt());
}

#[test]
fn the_same_seed_draws_the_same_matrices_for_every_placement() {
    let pre = three_blocks(Placement::Pre);
    let pre_table = ParameterTable::new(&pre);
    let expected = initial_parameters(&pre_table, 9);
    for name in ["lns", "post", "mix", "sandwich", "layerscale", "skipinit"] {
        let table = ParameterTable::new(&three_blocks(name.parse().unwrap()));
        let found = initial_parameters(&table, 9);
        for layer in 1..=3 {
            let pairs = table.block(layer).matrices().into_iter();
            for (ours, theirs) in pairs.zip(pre_table.block(layer).matrices()) {
                let (ours, theirs) = (table.get(ours), pre_table.get(theirs));
                let what = format!("{name} {}", ours.name);
                assert_same_bits(&what, &found[ours.range()], &expected[theirs.range()]);
            }
        }
        let head = |table: &ParameterTable| table.get(table.head()).range();
        assert_same_bits(name, &found[head(&table)], &expected[head(&pre_table)]);
    }
}

#[test]
fn deepnorm_and_gains_have_their_first_values() {
    let config = ModelConfig { hidden: 256, heads: 4, ..three_blocks(Placement::Deepnorm) };
    let table = ParameterTable::new(&config);
    let flat = initial_parameters(&table, 3);
    let qkv = table.get(table.block(2).qkv);
    let values = &flat[qkv.range()];
    let std = |rows: std::ops::Range<usize>| {
        let part = &values[rows.start * 256..rows.end * 256];
        (part.iter().map(|v| f64::from(v * v)).sum::<f64>() / part.len() as f64).sqrt()
    };
    // 4 heads of 64 and 2 kv heads: q and k are 384 rows, v 128 more.
    let beta = (8.0 * 3.0f64).powf(-0.25);
    assert!((std(0..384) / config.init_std - 1.0).abs() < 0.01, "{}", std(0..384));
    assert!((std(384..512) / config.init_std / beta - 1.0).abs() < 0.02, "{}", std(384..512));

    let gain = |placement: Placement, branch: fn(&BlockParameters) -> BranchParameters| {
        let table = ParameterTable::new(&three_blocks(placement));
        let gain = branch(&table.block(2)).gain.expect("a gain");
        initial_parameters(&table, 3)[table.get(gain).range()].to_vec()
    };
    let layer_scale = small_model().layer_scale as f32;
    assert_eq!(gain(Placement::Layerscale, |block| block.ffn), [layer_scale; 24]);
    assert_eq!(gain(Placement::Skipinit, |block| block.attention), [(1.0 / 3.0f64.sqrt()) as f32]);
    let config =
        ModelConfig { lns_position: LnsPosition::GainInit, ..three_blocks(Placement::Lns) };
    let table = ParameterTable::new(&config);
    let gains = &initial_parameters(&table, 3)[table.get(table.block(3).ffn.norm).range()];
    assert_eq!(gains, [(1.0 / 3.0f64.sqrt()) as f32; 24]);
}
