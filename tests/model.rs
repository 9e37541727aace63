//! src/model: first values, and what LayerNorm Scaling does to a forward pass.

use isobath::config::{ModelConfig, Placement};
use isobath::cpu::Cpu;
use isobath::engine::{Evaluator, Rows};
use isobath::model::init::initial_parameters;
use isobath::model::parameters::{Init, ParameterTable};

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
            (Init::Ones, name) => {
                assert!(name.ends_with("norm"), "{name}");
                assert!(values.iter().all(|&value| value == 1.0), "{name}");
                continue;
            }
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
            for norm in [block.attention_norm, block.ffn_norm] {
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
        model.losses(Rows { tokens: &inputs, targets: &targets }).unwrap().to_vec()
    };
    let found = losses(&lns, &parameters);
    assert_same_bits("losses", &found, &losses(&pre, &divided(&mut (1..=5))));
    // Each layer from the second on is scaled; the final norm and the first layer are not.
    for without in 2..=5 {
        let mut others = (1..=5).filter(|&layer| layer != without);
        assert_ne!(found, losses(&pre, &divided(&mut others)), "layer {without}");
    }
}
