//! src/stock: whole and pruned models as stock folders.

use std::fs;
use std::path::{Path, PathBuf};

use isobath::config::{Dtype, ModelConfig, Placement};
use isobath::cpu::Cpu;
use isobath::engine::{Evaluator, Rows};
use isobath::hf::{self, Export, TokenizerFiles};
use isobath::model::parameters::ParameterTable;
use isobath::stock::{Layers, Request, Written, write};
use tempfile::tempdir;

use crate::hf::random_parameters;
use crate::support::{isobath, small_model, tokens};

/// The tokenizer `bytes`, so that the folder is complete.
fn folder_of(config: &ModelConfig, folder: &Path) -> (ParameterTable, Vec<f32>) {
    let table = ParameterTable::new(config);
    let parameters = random_parameters(&table, 7);
    let json = isobath::data::tokenizer::Tokenizer::bytes().unwrap().json().to_string();
    let tokenizer = TokenizerFiles { json, bos: Some(3), eos: Some(256) };
    fs::create_dir_all(folder).unwrap();
    let dtype = Dtype::F32;
    let export = Export { config, table: &table, tokenizer: &tokenizer, dtype };
    export.write(folder, &parameters[..]).unwrap();
    (table, parameters)
}

fn lns() -> ModelConfig {
    ModelConfig { layers: 5, vocab: 257, ..small_model() }
}

fn losses(folder: &Path) -> Vec<f32> {
    let (config, table, parameters) = hf::load_for_inference(folder).unwrap();
    let mut model =
        Evaluator::new(&config, &table, &parameters, [2, 32], Cpu::<f32>::new()).unwrap();
    let ids = tokens(1, 64, 257);
    model.losses(Rows::new(&ids, &ids)).unwrap().to_vec()
}

fn request(model: PathBuf, layers: &str, out: PathBuf) -> Request {
    let without = if layers.is_empty() { Layers::default() } else { layers.parse().unwrap() };
    Request { model, without, out, dtype: Dtype::F32 }
}

/// Layer l of an LNS model keeps the scale 1/sqrt(l), wherever it stands afterwards: the same
/// losses as a `pre` model made of the layers that stay, each with its gains divided by hand.
#[test]
fn layers_that_stay_keep_their_depth_scale() {
    let folder = tempdir().unwrap();
    let (whole, out) = (folder.path().join("whole"), folder.path().join("pruned"));
    let config = lns();
    let (table, parameters) = folder_of(&config, &whole);
    let written = write(&request(whole.clone(), "2..3", out.clone())).unwrap();
    assert_eq!((written.layers, &written.removed[..]), (3, &[2, 3][..]));

    let pre = ModelConfig { layers: 3, placement: Placement::Pre, ..config };
    let pre_table = ParameterTable::new(&pre);
    let mut expected = vec![0.0; pre_table.stored_elements()];
    for (to, entry) in pre_table.entries().iter().enumerate() {
        // The name of the same parameter in the whole model, and the layer that it belongs to.
        let mut parts: Vec<String> = entry.name.split('.').map(str::to_string).collect();
        let mut layer = 1;
        if parts.len() == 3 {
            layer = [1, 4, 5][parts[1].parse::<usize>().unwrap() - 1];
            parts[1] = layer.to_string();
        }
        let from = table.entries().iter().find(|from| from.name == parts.join(".")).unwrap();
        let norm = parts.len() == 3 && parts[2].ends_with("norm");
        let values = parameters[from.range()].iter();
        let divisor = if norm { (layer as f32).sqrt() } else { 1.0 };
        let to = pre_table.entries()[to].range();
        expected[to].iter_mut().zip(values).for_each(|(to, value)| *to = value / divisor);
    }
    let mut model =
        Evaluator::new(&pre, &pre_table, &expected, [2, 32], Cpu::<f32>::new()).unwrap();
    let ids = tokens(1, 64, 257);
    let expected = model.losses(Rows::new(&ids, &ids)).unwrap().to_vec();
    assert_eq!(losses(&out), expected);
    assert_ne!(losses(&out), losses(&whole));
    // The folder is a whole one, with its tokenizer and ids, and says that it is `pre`.
    assert_eq!(hf::model_config(&out).unwrap().placement, Placement::Pre);
    let config = fs::read_to_string(out.join("config.json")).unwrap();
    assert!(config.contains("\"bos_token_id\": 3") && config.contains("\"eos_token_id\": 256"));
    let [a, b] = [&whole, &out].map(|at| fs::read(at.join("tokenizer.json")).unwrap());
    assert!(a == b, "another tokenizer");
}

#[test]
fn an_exported_model_computes_the_same_bits_and_bf16_halves_it() {
    let folder = tempdir().unwrap();
    let (whole, out) = (folder.path().join("whole"), folder.path().join("stock"));
    folder_of(&lns(), &whole);
    let exported = write(&request(whole.clone(), "", out.clone())).unwrap();
    assert_eq!(losses(&out), losses(&whole));
    let narrow =
        Request { dtype: Dtype::Bf16, ..request(whole.clone(), "", folder.path().join("bf16")) };
    let narrow: Written = write(&narrow).unwrap();
    assert_eq!(narrow.parameters, exported.parameters);
    let size = |at: &Path| fs::metadata(at.join("model.safetensors")).unwrap().len();
    assert!(size(&narrow.out) * 2 < size(&out) + 20_000 && size(&narrow.out) < size(&out));
}

#[test]
fn what_cannot_be_written_is_refused_and_leaves_nothing() {
    let folder = tempdir().unwrap();
    let whole = folder.path().join("whole");
    folder_of(&lns(), &whole);
    let out = folder.path().join("out");
    let refused = |layers: &str| write(&request(whole.clone(), layers, out.clone())).unwrap_err();
    assert!(refused("6").to_string().contains("layer 6 of a model with 5"));
    assert!(refused("1..5").to_string().contains("no layer would stay"));
    for text in ["", "0", "3..2", "a", "1..", "1..2,x", "1..9999999"] {
        assert!(text.parse::<Layers>().unwrap_err().to_string().contains("count from 1"), "{text}");
    }
    let sandwich = folder.path().join("sandwich");
    folder_of(&ModelConfig { placement: Placement::Sandwich, ..lns() }, &sandwich);
    let error = write(&request(sandwich, "1", out.clone())).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    for part in ["placement \"sandwich\"", "a norm after a branch", "isobath eval"] {
        assert!(error.to_string().contains(part), "no {part:?} in {error}");
    }
    fs::create_dir(&out).unwrap();
    assert!(refused("1").to_string().contains("exists already"));
    fs::remove_dir(&out).unwrap();
    let left: Vec<_> =
        fs::read_dir(folder.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn the_program_prunes_and_the_pruned_folder_is_evaluated() {
    let folder = tempdir().unwrap();
    let (whole, out) = (folder.path().join("whole"), folder.path().join("out"));
    folder_of(&lns(), &whole);
    let run = |arguments: &[&str]| {
        let output = isobath().args(arguments).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{message}");
        String::from_utf8(output.stdout).unwrap()
    };
    let [whole, out] = [&whole, &out].map(|path| path.to_str().unwrap());
    let text = run(&["prune", whole, "--layers", "2,4..5", "--out", out]);
    assert!(text.contains("layers      2, 3 removed"), "{text}");
    let data = crate::support::text_file(folder.path(), 3000);
    let json = run(&["eval", out, "--data", data.to_str().unwrap(), "--device", "cpu", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["loss"].as_f64().unwrap() > 1.0);
}
