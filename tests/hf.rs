//! Hugging Face folders: what is written is stock LLaMA, what is read is what was written, and
//! what cannot be used is refused by name. Files are checked with the `safetensors` crate itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use isobath::config::{
    self, DEFAULT_LAYER_SCALE, DEFAULT_MIX_POST, InitKind, LnsPosition, ModelConfig, NormKind,
    Placement,
};
use isobath::cpu::Cpu;
use isobath::engine::{Evaluator, Rows};
use isobath::hf::{self, Export, TokenizerFiles};
use isobath::model::parameters::ParameterTable;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

/// GQA (4 heads share 2), an FFN that is stored padded (13 as 16), untied, LNS.
pub fn small_model() -> ModelConfig {
    ModelConfig {
        hidden: 32,
        layers: 5,
        heads: 4,
        kv_heads: 2,
        ffn: 13,
        vocab: 70,
        max_sequence: 64,
        norm: NormKind::Rms,
        placement: Placement::Lns,
        lns_position: LnsPosition::AfterNorm,
        mix_post: DEFAULT_MIX_POST,
        layer_scale: DEFAULT_LAYER_SCALE,
        norm_eps: 1e-6,
        rope_theta: 10000.0,
        tied: false,
        init: InitKind::Normal,
        init_std: 0.02,
        embedding_std: 0.03,
    }
}

/// A word-level tokenizer of 70 entries; `</s>` ends a text.
pub fn small_tokenizer() -> TokenizerFiles {
    let mut vocab: BTreeMap<String, u32> = (1..70).map(|id| (format!("word{id}"), id)).collect();
    vocab.insert("</s>".to_string(), 0);
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": 0, "content": "</s>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "</s>"},
    });
    TokenizerFiles { json: json.to_string(), bos: None, eos: Some(0) }
}

/// Values in (-1, 1) with full 24-bit mantissas; a given seed gives the same ones.
pub fn noise(elements: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 39) as f32 / (1 << 24) as f32 - 1.0
    };
    (0..elements).map(|_| next()).collect()
}

/// Noise where a tensor lies, zero where padding lies; gains around 1.
pub fn random_parameters(table: &ParameterTable, seed: u64) -> Vec<f32> {
    let values = noise(table.stored_elements(), seed);
    let mut parameters = vec![0.0; table.stored_elements()];
    for parameter in table.entries() {
        let stored_columns = parameter.stored.columns();
        for tensor in &parameter.tensors {
            for row in tensor.first_row..tensor.first_row + tensor.shape.rows() {
                let start = parameter.offset + row * stored_columns;
                for i in start..start + tensor.shape.columns() {
                    let gain = parameter.name.contains("norm");
                    parameters[i] = if gain { 1.0 + 0.5 * values[i] } else { values[i] };
                }
            }
        }
    }
    parameters
}

pub fn assert_same_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: element {i} is {a:e}, expected {b:e}");
    }
}

fn export(config: &ModelConfig, parameters: &[f32], dtype: config::Dtype, folder: &Path) {
    let table = &ParameterTable::new(config);
    let tokenizer = &small_tokenizer();
    let export = Export { config, table, tokenizer, dtype };
    let written = export.write(folder, parameters).unwrap();
    let bytes: u64 = written.iter().map(|(_, fingerprint)| fingerprint.bytes).sum();
    assert_eq!(export.bytes().unwrap(), bytes, "announced bytes");
    for (name, fingerprint) in written {
        assert_eq!(fs::metadata(folder.join(&name)).unwrap().len(), fingerprint.bytes, "{name}");
    }
}

/// A folder with a random small model, changed by the caller's configuration.
fn folder_of(config: &ModelConfig) -> (tempfile::TempDir, ParameterTable, Vec<f32>) {
    let folder = tempfile::tempdir().unwrap();
    let table = ParameterTable::new(config);
    let parameters = random_parameters(&table, 7);
    export(config, &parameters, config::Dtype::F32, folder.path());
    (folder, table, parameters)
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(&path, config.to_string()).unwrap();
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let owned = |t: &TensorView| (t.dtype(), t.shape().to_vec(), t.data().to_vec());
    file.tensors().iter().map(|(name, tensor)| (name.clone(), owned(tensor))).collect()
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn edit_tensors(folder: &Path, edit: impl FnOnce(&mut Tensors)) {
    let path = folder.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    edit(&mut tensors);
    write_tensors(&path, &tensors);
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(bytes)
}

fn refusal<T: std::fmt::Debug>(result: isobath::Result<T>) -> String {
    let error = result.expect_err("must be refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    let message = error.to_string();
    assert!(message.contains("remedy: "), "no remedy in: {message}");
    message
}

#[track_caller]
fn assert_contains(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

#[test]
fn a_folder_holds_exactly_the_tensors_of_stock_llama() {
    let config = ModelConfig { layers: 1, ..small_model() };
    let (folder, ..) = folder_of(&config);
    let path = folder.path().join("model.safetensors");
    let found: Vec<(String, Vec<usize>)> =
        read_tensors(&path).into_iter().map(|(name, (_, shape, _))| (name, shape)).collect();
    let expected = [
        ("lm_head.weight", vec![70, 32]),
        ("model.embed_tokens.weight", vec![70, 32]),
        ("model.layers.0.input_layernorm.weight", vec![32]),
        ("model.layers.0.mlp.down_proj.weight", vec![32, 13]),
        ("model.layers.0.mlp.gate_proj.weight", vec![13, 32]),
        ("model.layers.0.mlp.up_proj.weight", vec![13, 32]),
        ("model.layers.0.post_attention_layernorm.weight", vec![32]),
        ("model.layers.0.self_attn.k_proj.weight", vec![16, 32]),
        ("model.layers.0.self_attn.o_proj.weight", vec![32, 32]),
        ("model.layers.0.self_attn.q_proj.weight", vec![32, 32]),
        ("model.layers.0.self_attn.v_proj.weight", vec![16, 32]),
        ("model.norm.weight", vec![32]),
    ];
    let expected: Vec<_> = expected.map(|(name, shape)| (name.to_string(), shape)).to_vec();
    assert_eq!(found, expected);

    let bytes = fs::read(&path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");

    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(folder.path().join(name)).unwrap()).unwrap()
    };
    let json = read("config.json");
    for (key, value) in [
        ("architectures", json!(["LlamaForCausalLM"])),
        ("model_type", json!("llama")),
        ("rope_theta", json!(10000.0)),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": 10000.0})),
        ("head_dim", json!(8)),
        ("num_key_value_heads", json!(2)),
        ("intermediate_size", json!(13)),
        ("torch_dtype", json!("float32")),
        ("eos_token_id", json!(0)),
    ] {
        assert_eq!(json[key], value, "{key}");
    }
    assert_eq!(json["isobath"]["placement"], "lns");
    assert_eq!(json["isobath"]["gains"], "folded");
    assert_eq!(read("tokenizer_config.json")["eos_token"], "</s>");
    assert_eq!(read("generation_config.json")["eos_token_id"], 0);
    let tokenizer = fs::read_to_string(folder.path().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer, small_tokenizer().json);
}

#[test]
fn what_is_imported_is_what_was_exported() {
    for tied in [false, true] {
        for (ffn, kv_heads) in [(13, 2), (16, 4), (1, 1)] {
            let pre = Placement::Pre;
            let config = ModelConfig { tied, ffn, kv_heads, placement: pre, ..small_model() };
            let (folder, table, parameters) = folder_of(&config);
            assert_eq!(hf::model_config(folder.path()).unwrap(), config);
            let model = hf::load(folder.path()).unwrap();
            let mut filled = vec![f32::NAN; table.stored_elements()]; // padding must become zero
            hf::fill(&model, &table, &mut filled).unwrap();
            assert_same_bits(&format!("tied {tied}, ffn {ffn}"), &filled, &parameters);
            let has_head = read_tensors(&folder.path().join("model.safetensors"))
                .contains_key("lm_head.weight");
            assert_eq!(has_head, !tied);
        }
    }
}

#[test]
fn lns_gains_are_exported_as_the_network_applies_them() {
    let config = small_model();
    let (folder, table, parameters) = folder_of(&config);
    let tensors = read_tensors(&folder.path().join("model.safetensors"));
    let gains = |name: &str| f32s(&tensors[name].2);
    for layer in 1..=config.layers {
        let block = table.block(layer);
        let norms = [
            (block.attention.norm, "input_layernorm"),
            (block.ffn.norm, "post_attention_layernorm"),
        ];
        for (id, name) in norms {
            let weights = &parameters[table.get(id).range()];
            let expected: Vec<f32> = weights.iter().map(|w| w / (layer as f32).sqrt()).collect();
            let name = format!("model.layers.{}.{name}.weight", layer - 1);
            assert_same_bits(&name, &gains(&name), &expected);
            assert_eq!(layer == 1, expected == weights, "{name} is scaled if it is not the first");
        }
    }
    let last = table.get(table.final_norm()).range();
    assert_same_bits("model.norm", &gains("model.norm.weight"), &parameters[last]);
}

#[test]
fn an_imported_lns_model_has_its_weights_back_to_one_ulp() {
    let config = small_model();
    let (folder, table, parameters) = folder_of(&config);
    let model = hf::load(folder.path()).unwrap();
    assert_eq!(*model.config(), config, "placement and all the rest are restored");
    let mut filled = vec![0.0; table.stored_elements()];
    hf::fill(&model, &table, &mut filled).unwrap();
    let mut inexact = 0;
    for parameter in table.entries() {
        for i in parameter.range() {
            let ulps = filled[i].to_bits().abs_diff(parameters[i].to_bits());
            let allowed = u32::from(parameter.depth > 1);
            let (found, expected) = (filled[i], parameters[i]);
            let name = &parameter.name;
            assert!(ulps <= allowed, "{name}: element {i} is {found:e}, expected {expected:e}");
            inexact += u32::from(ulps > 0);
        }
    }
    assert!(inexact > 0, "w / sqrt(l) * sqrt(l) rounds somewhere, or the fold was not applied");
}

#[test]
fn inference_uses_the_stored_gains_as_they_are() {
    let config = small_model();
    let (folder, ..) = folder_of(&config);
    let (inference, table, parameters) = hf::load_for_inference(folder.path()).unwrap();
    assert_eq!(inference, ModelConfig { placement: Placement::Pre, ..config });
    assert!(table.entries().iter().all(|p| p.depth == 1));
    let tensors = read_tensors(&folder.path().join("model.safetensors"));
    for layer in 1..=inference.layers {
        let name = format!("model.layers.{}.input_layernorm.weight", layer - 1);
        let stored = table.get(table.block(layer).attention.norm).range();
        assert_same_bits(&name, &parameters[stored], &f32s(&tensors[&name].2));
    }
}

#[test]
fn the_exported_model_computes_the_same_bits() {
    let trained = small_model();
    let (folder, table, parameters) = folder_of(&trained);
    let tokens: Vec<i32> = (0..64).map(|i| i * 37 % 70).collect();
    let targets: Vec<i32> = (0..64).map(|i| i * 11 % 70).collect();
    let losses = |config: &ModelConfig, table: &ParameterTable, parameters: &[f32]| {
        let cpu = Cpu::<f32>::new();
        let mut model = Evaluator::new(config, table, parameters, [2, 32], cpu).unwrap();
        let rows = Rows::new(&tokens, &targets);
        model.losses(rows).unwrap().to_vec()
    };
    let before = losses(&trained, &table, &parameters);
    let (stock, stock_table, stock_parameters) = hf::load_for_inference(folder.path()).unwrap();
    let after = losses(&stock, &stock_table, &stock_parameters);
    assert_same_bits("losses", &after, &before);
    let unscaled = losses(&stock, &stock_table, &parameters);
    assert_ne!(unscaled, before, "without the fold the losses are others");
}

/// Noise around what a gain of a branch may be.
fn with_branch_gains(table: &ParameterTable, parameters: &mut [f32]) {
    for parameter in table.entries().iter().filter(|parameter| parameter.tensors.is_empty()) {
        let values = &mut parameters[parameter.range()];
        values.iter_mut().zip(noise(4096, 9)).for_each(|(gain, noise)| *gain = 0.6 + 0.3 * noise);
    }
}

/// Whatever was trained, a folder computes it; what does not fold has another name and the reason.
#[test]
fn folders_of_every_placement_compute_what_was_trained() {
    let placements = Placement::NAMES.iter().map(|name| name.parse().unwrap());
    let placements = placements.map(|placement| ModelConfig { placement, ..small_model() });
    let positions = LnsPosition::NAMES.iter().map(|name| name.parse().unwrap());
    let positions = positions.map(|lns_position| ModelConfig { lns_position, ..small_model() });
    let tokens: Vec<i32> = (0..64).map(|i| i * 37 % 70).collect();
    let losses = |config: &ModelConfig, table: &ParameterTable, parameters: &[f32]| {
        let cpu = Cpu::<f64>::new();
        let mut model = Evaluator::new(config, table, parameters, [2, 32], cpu).unwrap();
        model.losses(Rows::new(&tokens, &tokens)).unwrap().to_vec()
    };
    let (mut stock, mut others) = (0, 0);
    for config in placements.chain(positions) {
        let config = ModelConfig { layers: 3, mix_post: 0.3, ..config };
        let what = format!("{} {}", config.placement, config.lns_position);
        let table = ParameterTable::new(&config);
        let mut parameters = random_parameters(&table, 7);
        with_branch_gains(&table, &mut parameters);
        let folder = tempfile::tempdir().unwrap();
        export(&config, &parameters, config::Dtype::F32, folder.path());
        let (read, read_table, read_parameters) = hf::load_for_inference(folder.path()).unwrap();
        let before = losses(&config, &table, &parameters);
        let after = losses(&read, &read_table, &read_parameters);
        for (before, after) in before.iter().zip(&after) {
            // Folding rounds each weight once.
            assert!((before - after).abs() < 2e-5 * before.abs(), "{what}: {before} {after}");
        }
        assert_eq!(
            hf::trained_placement(folder.path()).unwrap(),
            Some((config.placement, config.lns_position)),
            "{what}"
        );
        let text = fs::read_to_string(folder.path().join("config.json")).unwrap();
        match hf::not_stock(&config) {
            None => {
                assert_eq!(read.placement, Placement::Pre, "{what}");
                assert!(text.contains("\"LlamaForCausalLM\""), "{what}");
                stock += 1;
            }
            Some(why) => {
                let mut expected = config.clone();
                expected.layer_scale = DEFAULT_LAYER_SCALE;
                assert_eq!(read, expected, "{what}");
                assert!(text.contains("\"model_type\": \"isobath\""), "{what}");
                let reason: Value = serde_json::from_str(&text).unwrap();
                assert_eq!(reason["isobath"]["not_stock"], Value::from(why), "{what}");
                others += 1;
            }
        }
    }
    // post, deepnorm, mix, sandwich and before-norm do not fold.
    assert_eq!((stock, others), (9, 5));
}

#[test]
fn a_stock_model_becomes_lns_without_changing_what_it_computes() {
    let stock = ModelConfig { placement: Placement::Pre, ..small_model() };
    let (folder, pre_table, parameters) = folder_of(&stock);
    edit_config(folder.path(), |c| {
        c.as_object_mut().unwrap().remove("isobath");
    });
    assert_eq!(hf::model_config(folder.path()).unwrap().placement, Placement::Pre);
    let table = ParameterTable::new(&small_model());
    let mut filled = vec![0.0; table.stored_elements()];
    hf::fill(&hf::load(folder.path()).unwrap(), &table, &mut filled).unwrap();
    for layer in 1..=stock.layers {
        let weights = &filled[table.get(table.block(layer).ffn.norm).range()];
        let gains = &parameters[pre_table.get(pre_table.block(layer).ffn.norm).range()];
        for (w, gain) in weights.iter().zip(gains) {
            assert_eq!(*w, gain * (layer as f32).sqrt());
        }
    }
}

#[test]
fn bf16_export_rounds_to_nearest_even() {
    let config = ModelConfig { placement: Placement::Pre, ..small_model() };
    let table = ParameterTable::new(&config);
    let parameters = random_parameters(&table, 3);
    let folder = tempfile::tempdir().unwrap();
    export(&config, &parameters, config::Dtype::Bf16, folder.path());
    let tensors = read_tensors(&folder.path().join("model.safetensors"));
    assert!(tensors.values().all(|(dtype, ..)| *dtype == Dtype::BF16));
    let rounded: Vec<f32> = parameters.iter().map(|w| bf16::from_f32(*w).to_f32()).collect();
    let (_, _, filled) = hf::load_for_inference(folder.path()).unwrap();
    assert_same_bits("bf16", &filled, &rounded);
    let json: Value =
        serde_json::from_slice(&fs::read(folder.path().join("config.json")).unwrap()).unwrap();
    assert_eq!(json["torch_dtype"], "bfloat16");
}

#[test]
fn shards_of_mixed_types_are_read_through_the_index() {
    let config = ModelConfig { placement: Placement::Pre, ..small_model() };
    let (folder, _, parameters) = folder_of(&config);
    let whole = folder.path().join("model.safetensors");
    let mut shards = [Tensors::new(), Tensors::new(), Tensors::new()];
    let mut weight_map = BTreeMap::new();
    for (i, (name, (_, shape, bytes))) in read_tensors(&whole).into_iter().enumerate() {
        let values = f32s(&bytes);
        let narrow = |round: fn(f32) -> u16| {
            values.iter().flat_map(|v| round(*v).to_le_bytes()).collect::<Vec<u8>>()
        };
        let (dtype, bytes) = match i % 3 {
            0 => (Dtype::F32, bytes),
            1 => (Dtype::F16, narrow(|v| f16::from_f32(v).to_bits())),
            _ => (Dtype::BF16, narrow(|v| bf16::from_f32(v).to_bits())),
        };
        weight_map.insert(name.clone(), format!("model-0000{}-of-00003.safetensors", i % 3 + 1));
        shards[i % 3].insert(name, (dtype, shape, bytes));
    }
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("model-0000{}-of-00003.safetensors", i + 1);
        write_tensors(&folder.path().join(name), shard);
    }
    fs::remove_file(whole).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    let json = json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
    fs::write(&index, json.to_string()).unwrap();

    let (_, table, filled) = hf::load_for_inference(folder.path()).unwrap();
    let names: Vec<&String> = weight_map.keys().collect();
    for parameter in table.entries() {
        for tensor in &parameter.tensors {
            let at = names.iter().position(|name| **name == tensor.name).unwrap();
            for row in tensor.first_row..tensor.first_row + tensor.shape.rows() {
                let start = parameter.offset + row * parameter.stored.columns();
                for i in start..start + tensor.shape.columns() {
                    let expected = match at % 3 {
                        0 => parameters[i],
                        1 => f16::from_f32(parameters[i]).to_f32(),
                        _ => bf16::from_f32(parameters[i]).to_f32(),
                    };
                    assert_eq!(filled[i], expected, "{} element {i}", tensor.name);
                }
            }
        }
    }

    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut changed = json.clone();
        edit(&mut changed);
        fs::write(&index, changed.to_string()).unwrap();
        refusal(hf::load(folder.path()))
    };
    let name = "model.norm.weight";
    let elsewhere = edited(&|json| json["weight_map"][name] = json!("../secret.safetensors"));
    assert_contains(&elsewhere, &["../secret.safetensors", "not a plain file name"]);
    let absent = edited(&|json| json["weight_map"][name] = json!("model-00009.safetensors"));
    assert_contains(&absent, &["model-00009.safetensors"]);
    let other = weight_map.values().find(|shard| **shard != weight_map[name]).unwrap();
    let wrong = edited(&|json| json["weight_map"][name] = json!(other));
    assert_contains(&wrong, &[name, other, "does not have it"]);
}

#[test]
fn a_tied_folder_may_hold_the_head_if_it_is_the_embedding() {
    let config = ModelConfig { tied: true, placement: Placement::Pre, ..small_model() };
    let (folder, _, parameters) = folder_of(&config);
    edit_tensors(folder.path(), |tensors| {
        tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
    });
    let (_, _, filled) = hf::load_for_inference(folder.path()).unwrap();
    assert_same_bits("tied", &filled, &parameters);
    edit_tensors(folder.path(), |tensors| {
        let head = tensors.get_mut("lm_head.weight").unwrap();
        head.2[100] ^= 1;
    });
    let message = refusal(hf::load(folder.path()));
    assert_contains(&message, &["lm_head.weight is not model.embed_tokens.weight"]);
}

#[test]
fn a_layernorm_network_does_not_pass_for_a_llama() {
    let config = ModelConfig { norm: NormKind::Layer, ..small_model() };
    let (folder, ..) = folder_of(&config);
    let json: Value =
        serde_json::from_slice(&fs::read(folder.path().join("config.json")).unwrap()).unwrap();
    assert_eq!(json["model_type"], "isobath");
    assert_eq!(json["architectures"], json!(["IsobathForCausalLM"]));
    assert_eq!(hf::load_for_inference(folder.path()).unwrap().0.norm, NormKind::Layer);
    edit_config(folder.path(), |c| c["isobath"] = Value::Null);
    assert_contains(&refusal(hf::load(folder.path())), &["the key isobath is missing"]);
}

#[test]
fn rope_theta_is_found_in_either_place() {
    let (folder, ..) = folder_of(&small_model());
    let theta = |top: Value, nested: Value| {
        edit_config(folder.path(), |c| {
            c["rope_theta"] = top;
            c["rope_parameters"] = nested;
        });
        hf::model_config(folder.path())
    };
    let nested = json!({"rope_type": "default", "rope_theta": 500000.0});
    assert_eq!(theta(json!(500000.0), Value::Null).unwrap().rope_theta, 500000.0);
    assert_eq!(theta(Value::Null, nested.clone()).unwrap().rope_theta, 500000.0);
    assert_eq!(theta(json!(500000), nested.clone()).unwrap().rope_theta, 500000.0);
    assert_eq!(theta(Value::Null, Value::Null).unwrap().rope_theta, 10000.0);
    let message = refusal(theta(json!(10000.0), nested));
    assert_contains(&message, &["rope_theta is 10000", "500000 in rope_parameters"]);
}

#[test]
fn what_this_program_does_not_compute_is_refused_by_name() {
    let cases = [
        ("model_type", json!("qwen2"), "model_type is \"qwen2\""),
        ("attention_bias", json!(true), "attention_bias is true"),
        ("mlp_bias", json!(true), "mlp_bias is true"),
        ("hidden_act", json!("gelu"), "hidden_act is \"gelu\""),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "\"linear\" rope scaling"),
        ("rope_parameters", json!({"rope_type": "llama3", "rope_theta": 1e4}), "\"llama3\" rope"),
        ("partial_rotary_factor", json!(0.5), "partial_rotary_factor is 0.5"),
        ("quantization_config", json!({"bits": 4}), "quantization_config"),
        ("head_dim", json!(16), "head_dim is 16"),
        ("num_attention_heads", json!(5), "num_attention_heads 5 does not divide hidden_size 32"),
        ("num_key_value_heads", json!(3), "num_key_value_heads 3 does not divide"),
        ("hidden_size", json!(0), "hidden_size is 0"),
        ("vocab_size", json!(1u64 << 40), "vocab_size is 1099511627776"),
        ("num_hidden_layers", json!(1 << 20), "num_hidden_layers is 1048576"),
        ("rms_norm_eps", json!(-1.0), "rms_norm_eps is -1"),
        ("vocab_size", Value::Null, "vocab_size is missing"),
        ("vocab_size", json!("many"), "cannot be read"),
        (
            "isobath",
            json!({"version": 3, "norm": "rms", "placement": "lns", "gains": "folded",
            "init": "normal", "init_std": 0.02, "embedding_std": 0.02}),
            "isobath.version is 3",
        ),
    ];
    for (key, value, expected) in cases {
        let (folder, ..) = folder_of(&small_model());
        edit_config(folder.path(), |c| c[key] = value);
        let message = refusal(hf::load(folder.path()));
        assert_contains(&message, &[expected, "config.json"]);
    }
}

/// Sizes whose products do not fit into 64 bits: the key is named before anything is multiplied.
#[test]
fn sizes_that_no_model_has_are_refused_by_name() {
    let sizes = [
        ("hidden_size", 1 << 17),
        ("intermediate_size", 1 << 20),
        ("num_hidden_layers", 1 << 14),
        ("vocab_size", 1 << 24),
        ("max_position_embeddings", 1 << 24),
        ("num_attention_heads", 1 << 10),
        ("num_key_value_heads", 1 << 10),
    ];
    let (folder, ..) = folder_of(&small_model());
    let with = |large: Option<(&str, u64)>| {
        edit_config(folder.path(), |c| {
            for (key, size) in sizes.into_iter().chain(large) {
                c[key] = json!(size);
            }
            c["head_dim"] = Value::Null;
        });
        refusal(hf::load(folder.path()))
    };
    // the largest sizes: they can be counted, and other weights are missed
    assert_contains(&with(None), &["model.embed_tokens.weight has shape"]);
    for (key, most) in sizes {
        for size in [(1 << 17) + (most << 3), 3 << 24, 1 << 63, u64::MAX] {
            let message = with(Some((key, size)));
            assert_contains(&message, &[&format!("{key} is {size}"), "config.json", "remedy: "]);
        }
    }
}

/// Mistral's layout is LLaMA's, unless attention has a window.
#[test]
fn a_mistral_without_a_sliding_window_is_a_llama() {
    let (folder, ..) = folder_of(&small_model());
    let with = |window: Value| {
        edit_config(folder.path(), |c| {
            c["model_type"] = json!("mistral");
            c["sliding_window"] = window;
            c.as_object_mut().unwrap().remove("isobath");
        });
        hf::load(folder.path())
    };
    assert_eq!(with(Value::Null).unwrap().config().placement, Placement::Pre);
    let message = refusal(with(json!(4096)));
    assert_contains(&message, &["sliding_window is 4096", "config.json"]);
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let (folder, ..) = folder_of(&small_model());
    let path = folder.path().join("model.safetensors");
    let whole = read_tensors(&path);
    let changed = |edit: &dyn Fn(&mut Tensors)| {
        let mut tensors = whole.clone();
        edit(&mut tensors);
        write_tensors(&path, &tensors);
        refusal(hf::load(folder.path()))
    };
    let name = "model.layers.2.mlp.up_proj.weight";
    let missing = changed(&|tensors| {
        tensors.remove(name);
    });
    assert_contains(&missing, &["missing", name]);
    let headless = changed(&|tensors| {
        tensors.remove("lm_head.weight");
    });
    assert_contains(&headless, &["missing: lm_head.weight", "tie_word_embeddings"]);
    let extra = changed(&|tensors| {
        for i in 0..5 {
            tensors.insert(format!("model.extra.{i}"), (Dtype::F32, vec![1], vec![0; 4]));
        }
    });
    assert_contains(&extra, &["model.extra.0, model.extra.1, model.extra.2 and 2 more"]);
    let shape = changed(&|tensors| {
        tensors.get_mut(name).unwrap().1 = vec![32, 13];
    });
    assert_contains(&shape, &[name, "[32, 13]", "[13, 32]"]);
    let dtype = changed(&|tensors| {
        tensors.get_mut(name).unwrap().0 = Dtype::I32;
    });
    assert_contains(&dtype, &[name, "I32"]);

    // a buffer that old exports hold is no error
    edit_tensors(folder.path(), |tensors| {
        *tensors = whole.clone();
        let frequencies = (Dtype::F32, vec![4], vec![0; 16]);
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), frequencies);
    });
    hf::load(folder.path()).unwrap();

    let model = hf::load(folder.path()).unwrap();
    let deeper = ParameterTable::new(&ModelConfig { layers: 6, ..small_model() });
    let mut buffer = vec![0.0; deeper.stored_elements()];
    let message = refusal(hf::fill(&model, &deeper, &mut buffer));
    assert_contains(&message, &["model.layers.5.input_layernorm.weight"]);
    let short = refusal_of_shape(hf::fill(&model, &deeper, &mut buffer[1..]));
    assert_contains(&short, &["flat buffer"]);
}

fn refusal_of_shape(result: isobath::Result<()>) -> String {
    result.expect_err("must be refused").to_string()
}

#[test]
fn an_empty_folder_and_other_weight_files_are_refused() {
    let (folder, ..) = folder_of(&small_model());
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    fs::write(folder.path().join("pytorch_model.bin"), b"PK").unwrap();
    let message = refusal(hf::load(folder.path()));
    assert_contains(&message, &["model.safetensors", "save_pretrained"]);
    let message = refusal(hf::load(&folder.path().join("absent")));
    assert_contains(&message, &["absent", "config.json"]);
}

#[test]
fn a_truncated_or_damaged_header_never_panics() {
    let config = ModelConfig { layers: 1, ..small_model() };
    let (folder, ..) = folder_of(&config);
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [0, 7, 8, 9, header - 1, header, header + 1, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let message = refusal(hf::load(folder.path()));
        assert_contains(&message, &["model.safetensors", &format!("{length} bytes")]);
    }
    fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
    assert_contains(&refusal(hf::load(folder.path())), &["longer than it should be"]);

    let mut refused = 0;
    let mut damaged = whole.clone();
    for bit in (0..header * 8).step_by(5) {
        damaged[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &damaged).unwrap();
        refused += u32::from(hf::load(folder.path()).is_err());
        damaged[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(refused as usize > header, "only {refused} of {} flips refused", header * 8 / 5);
}
