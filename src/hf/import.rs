//! Reads a Hugging Face LLaMA folder into a flat parameter buffer.
//!
//! [`load`] opens the files and compares every tensor's name and shape with the parameter table of
//! the folder's config.json; nothing large is allocated before that. [`fill`] then reads into a
//! buffer laid out by any table that asks for the same tensors. A gain becomes
//! `w = gain * sqrt(depth)`, the inverse of the export; with placement `pre`, `w` is the gain.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{CONFIG, INDEX, MODEL, folder_config};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::parameters::{Init, Parameter, ParameterTable};
use crate::model::placement;
use crate::tensor::Shape;
use crate::tensor_file::{Dtype, TensorReader};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// Buffers that old exports hold; the model computes them itself.
const IGNORED_SUFFIX: &str = ".rotary_emb.inv_freq";
/// Tensors that an error message names before it says "and N more".
const NAMED: usize = 3;

/// An open folder whose tensors are those of its configuration.
#[derive(Debug)]
pub struct HfModel {
    folder: PathBuf,
    config: ModelConfig,
    files: Vec<TensorReader>,
    /// Tensor name to index into `files`.
    located: BTreeMap<String, usize>,
}

impl HfModel {
    /// As [`super::model_config`].
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn file(&self, tensor: &str) -> Option<&TensorReader> {
        self.located.get(tensor).map(|file| &self.files[*file])
    }

    fn refused(&self, what: String, remedy: &str) -> Error {
        Error::Checkpoint { path: self.folder.clone(), what, remedy: remedy.to_string() }
    }

    /// Compares names, shapes and types with those that a table asks for.
    fn check(&self, table: &ParameterTable) -> Result<()> {
        let wanted = || table.entries().iter().flat_map(|p| &p.tensors);
        let mut missing = Vec::new();
        for tensor in wanted() {
            let Some(file) = self.file(&tensor.name) else {
                missing.push(tensor.name.as_str());
                continue;
            };
            let Some(info) = file.info(&tensor.name) else { continue };
            if info.shape != tensor.shape.sizes() {
                let what = format!(
                    "{} has shape {:?}, expected {} from {CONFIG}",
                    tensor.name, info.shape, tensor.shape
                );
                return Err(self.refused(what, "use the config.json that belongs to the weights"));
            }
            if !matches!(info.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32) {
                let what = format!("{} has type {}", tensor.name, info.dtype);
                return Err(self.refused(what, "convert the weights to bf16, f16 or f32"));
            }
        }
        if !missing.is_empty() {
            let remedy = if missing == [HEAD] {
                "set tie_word_embeddings (model.tied) to true if the head is the embedding"
            } else {
                "use a complete folder, and the config.json that belongs to the weights"
            };
            return Err(self.refused(format!("missing: {}", listed(&missing)), remedy));
        }
        let names: std::collections::HashSet<&str> = wanted().map(|t| t.name.as_str()).collect();
        let extra = |name: &&str| {
            let tied_head = *name == HEAD && self.config.tied;
            !names.contains(name) && !name.ends_with(IGNORED_SUFFIX) && !tied_head
        };
        let extra: Vec<&str> = self.located.keys().map(String::as_str).filter(extra).collect();
        if !extra.is_empty() {
            let what = format!("has tensors that this model does not use: {}", listed(&extra));
            return Err(self.refused(what, "use a stock LLaMA, and its own config.json"));
        }
        Ok(())
    }

    /// A tied folder may hold the head a second time; it must then be the embedding.
    fn check_tied_head(&self) -> Result<()> {
        let (Some(head), Some(embedding)) = (self.file(HEAD), self.file(EMBEDDING)) else {
            return Ok(());
        };
        if !self.config.tied {
            return Ok(());
        }
        let shape = |file: &TensorReader, name| file.info(name).map(|info| info.shape.clone());
        let mut equal = shape(head, HEAD) == shape(embedding, EMBEDDING);
        let (rows, columns) = (self.config.vocab, self.config.hidden);
        let (mut ours, mut theirs) = (vec![0.0; columns], vec![0.0; columns]);
        for row in 0..rows {
            if !equal {
                break;
            }
            head.read(HEAD, row * columns, &mut ours)?;
            embedding.read(EMBEDDING, row * columns, &mut theirs)?;
            equal = ours.iter().zip(&theirs).all(|(a, b)| a.to_bits() == b.to_bits());
        }
        let what = format!("tie_word_embeddings is true, but {HEAD} is not {EMBEDDING}");
        let remedy = "set tie_word_embeddings to false, or remove the head";
        if equal { Ok(()) } else { Err(self.refused(what, remedy)) }
    }
}

fn listed(names: &[&str]) -> String {
    let first = names[..names.len().min(NAMED)].join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

/// Opens a folder: model.safetensors, or the shards that its index names.
pub fn load(folder: &Path) -> Result<HfModel> {
    let config = folder_config::model_config(folder)?;
    let single = folder.join(MODEL);
    let (files, located) = if single.exists() {
        let file = TensorReader::open(&single)?;
        let located = file.names().into_iter().map(|name| (name, 0)).collect();
        (vec![file], located)
    } else {
        open_shards(folder)?
    };
    let model = HfModel { folder: folder.to_path_buf(), config, files, located };
    model.check(&ParameterTable::new(&model.config))?;
    model.check_tied_head()?;
    Ok(model)
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn open_shards(folder: &Path) -> Result<(Vec<TensorReader>, BTreeMap<String, usize>)> {
    let path = folder.join(INDEX);
    let refused = |what: String, remedy: &str| Error::Checkpoint {
        path: path.clone(),
        what,
        remedy: remedy.to_string(),
    };
    if !path.exists() {
        return Err(Error::Checkpoint {
            path: folder.to_path_buf(),
            what: format!("has neither {MODEL} nor {INDEX}"),
            remedy: "convert other weight files with transformers: save_pretrained(FOLDER)".into(),
        });
    }
    let text = fs::read(&path).map_err(Error::io("read", &path))?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| refused(format!("cannot be read: {e}"), "copy the file again"))?;
    let (mut files, mut opened) = (Vec::<TensorReader>::new(), BTreeMap::new());
    let mut located = BTreeMap::new();
    for (name, shard) in index.weight_map {
        if Path::new(&shard).file_name() != Some(shard.as_ref()) {
            let what = format!("{name} is said to be in {shard}, which is not a plain file name");
            return Err(refused(what, "repair the index"));
        }
        let at = match opened.get(&shard) {
            Some(at) => *at,
            None => {
                files.push(TensorReader::open(&folder.join(&shard))?);
                opened.insert(shard.clone(), files.len() - 1);
                files.len() - 1
            }
        };
        if files[at].info(&name).is_none() {
            let what = format!("{name} is said to be in {shard}, which does not have it");
            return Err(refused(what, "use the index and the shards of one export"));
        }
        located.insert(name, at);
    }
    // a shard may hold tensors that the index forgot: they count as extra, not as unseen
    for (at, file) in files.iter().enumerate() {
        for name in file.names() {
            located.entry(name).or_insert(at);
        }
    }
    Ok((files, located))
}

/// Reads all tensors into `parameters`, which has the `stored_elements()` of the table; padding
/// becomes zero. The table's placement decides how gains become weights.
pub fn fill(model: &HfModel, table: &ParameterTable, parameters: &mut [f32]) -> Result<()> {
    if parameters.len() != table.stored_elements() {
        return Err(Error::Shape {
            op: "hf::fill",
            what: "the flat buffer",
            found: Shape::new(&[parameters.len()]),
            expected: Shape::new(&[table.stored_elements()]),
        });
    }
    parameters.fill(0.0);
    fill_each(model, table, |parameter, values| {
        parameters[parameter.range()].copy_from_slice(values);
        Ok(())
    })
}

/// As [`fill`], but one parameter after the other is given to `take`: only one is in memory at a
/// time.
pub fn fill_each(
    model: &HfModel,
    table: &ParameterTable,
    mut take: impl FnMut(&Parameter, &[f32]) -> Result<()>,
) -> Result<()> {
    model.check(table)?;
    let mut values = Vec::new();
    for parameter in table.entries() {
        values.clear();
        values.resize(parameter.stored.elements(), 0.0);
        fill_one(model, parameter, &mut values)?;
        take(parameter, &values)?;
    }
    Ok(())
}

/// `values` are zeros.
fn fill_one(model: &HfModel, parameter: &Parameter, values: &mut [f32]) -> Result<()> {
    for tensor in &parameter.tensors {
        let Some(file) = model.file(&tensor.name) else { continue };
        let stored_columns = parameter.stored.columns();
        let (rows, columns) = (tensor.shape.rows(), tensor.shape.columns());
        let start = tensor.first_row * stored_columns;
        if columns == stored_columns {
            file.read(&tensor.name, 0, &mut values[start..start + rows * columns])?;
        } else {
            for row in 0..rows {
                let start = start + row * stored_columns;
                file.read(&tensor.name, row * columns, &mut values[start..start + columns])?;
            }
        }
    }
    if let (true, Init::Constant(value)) = (parameter.tensors.is_empty(), parameter.init) {
        values.fill(value as f32); // folded into others by the export
    }
    if parameter.depth != 1 {
        let scale = (parameter.depth as f32).sqrt();
        values.iter_mut().for_each(|gain| *gain *= scale);
    }
    Ok(())
}

/// A folder as `eval` and `generate` use it: where everything folds, placement `pre` and the stored
/// gains as they are, so the network computes what stock LLaMA computes, whatever placement it was
/// trained with; else the placement that was trained.
pub fn load_for_inference(folder: &Path) -> Result<(ModelConfig, ParameterTable, Vec<f32>)> {
    let model = load(folder)?;
    let config = match placement::stock_obstacle(&model.config) {
        None => placement::stock(&model.config),
        Some(_) => model.config.clone(),
    };
    let table = ParameterTable::new(&config);
    let mut parameters = vec![0.0; table.stored_elements()];
    fill(&model, &table, &mut parameters)?;
    Ok((config, table, parameters))
}
