//! Writes a Hugging Face folder from a flat parameter buffer.
//!
//! Tensors are read and written some rows at a time; padding stays behind. A gain is written as
//! `w / (depth as f32).sqrt()`, the expression by which the network itself gets its effective
//! gain, so stock LLaMA computes with the same bits. The folder must exist; every file is on disk
//! when [`Export::write`] returns, and the caller makes the folder's names durable.

use std::path::Path;

use half::bf16;
use serde_json::json;

use super::{CONFIG, GENERATION_CONFIG, MODEL, TOKENIZER, TOKENIZER_CONFIG};
use super::{TokenizerFiles, folder_config};
use crate::config::{self, ModelConfig};
use crate::durable::{Fingerprint, write_new};
use crate::error::{Error, Result};
use crate::flat::{CHUNK_ELEMENTS, Elements};
use crate::model::parameters::{HfTensor, Parameter, ParameterTable, RowScale};
use crate::tensor_file::{Dtype, Entry, TensorWriter, file_bytes};

/// A model that is to be written; borrows everything.
#[derive(Clone, Copy)]
pub struct Export<'a> {
    pub config: &'a ModelConfig,
    pub table: &'a ParameterTable,
    pub tokenizer: &'a TokenizerFiles,
    /// Of model.safetensors: f32, in which nothing is rounded but the folded gains, or bf16,
    /// rounded to nearest even.
    pub dtype: config::Dtype,
}

impl Export<'_> {
    /// Writes the files and tells their names and fingerprints; `parameters` has the table's
    /// stored elements.
    pub fn write(
        &self,
        folder: &Path,
        parameters: impl Elements,
    ) -> Result<Vec<(String, Fingerprint)>> {
        let mut written = Vec::new();
        for (name, contents) in self.small_files()? {
            written.push((name.to_string(), write_new(&folder.join(name), &contents)?));
        }
        written.push((MODEL.to_string(), self.write_model(&folder.join(MODEL), parameters)?));
        Ok(written)
    }

    /// Bytes that [`Export::write`] will put on disk.
    pub fn bytes(&self) -> Result<u64> {
        let small: usize = self.small_files()?.iter().map(|(_, contents)| contents.len()).sum();
        Ok(small as u64 + file_bytes(Path::new(MODEL), &self.entries())?)
    }

    fn small_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let (bos, eos) = (self.tokenizer.bos, self.tokenizer.eos);
        let dtype = match self.dtype {
            config::Dtype::F32 => "float32",
            config::Dtype::Bf16 => "bfloat16",
        };
        let config = folder_config::to_json(self.config, self.tokenizer, dtype);
        let generation = json!({"bos_token_id": bos, "eos_token_id": eos, "do_sample": true});
        let tokenizer = self.tokenizer.config(self.config.max_sequence);
        let pretty = |value: &serde_json::Value| {
            serde_json::to_vec_pretty(value).map_err(|e| Error::Checkpoint {
                path: CONFIG.into(),
                what: format!("cannot be written as JSON: {e}"),
                remedy: "check the model's configuration for numbers that are not finite".into(),
            })
        };
        Ok(vec![
            (CONFIG, pretty(&config)?),
            (GENERATION_CONFIG, pretty(&generation)?),
            (TOKENIZER, self.tokenizer.json.as_bytes().to_vec()),
            (TOKENIZER_CONFIG, pretty(&tokenizer)?),
        ])
    }

    fn tensors(&self) -> impl Iterator<Item = (&Parameter, &HfTensor)> {
        self.table.entries().iter().flat_map(|p| p.tensors.iter().map(move |t| (p, t)))
    }

    fn entries(&self) -> Vec<Entry> {
        let dtype = match self.dtype {
            config::Dtype::F32 => Dtype::F32,
            config::Dtype::Bf16 => Dtype::BF16,
        };
        let entry = |tensor: &HfTensor| Entry {
            name: tensor.name.clone(),
            dtype,
            shape: tensor.shape.sizes().to_vec(),
        };
        self.tensors().map(|(_, tensor)| entry(tensor)).collect()
    }

    fn write_model(&self, path: &Path, mut parameters: impl Elements) -> Result<Fingerprint> {
        let mut file = TensorWriter::create(path, &self.entries())?;
        let (mut folded, mut rounded) = (Vec::new(), Vec::new()); // one row each, reused
        for (parameter, tensor) in self.tensors() {
            let scales = self.row_scales(parameter, &mut parameters)?;
            let stored_columns = parameter.stored.columns();
            let (rows, columns) = (tensor.shape.rows(), tensor.shape.columns());
            let end_row = tensor.first_row + rows;
            let rows_at_one_time = (CHUNK_ELEMENTS / stored_columns).max(1);
            for first_row in (tensor.first_row..end_row).step_by(rows_at_one_time) {
                let rows = first_row..end_row.min(first_row + rows_at_one_time);
                let start = parameter.offset + rows.start * stored_columns;
                let chunk = parameters.get(start..start + rows.len() * stored_columns)?;
                for (row, values) in rows.zip(chunk.chunks_exact(stored_columns)) {
                    let mut values = &values[..columns];
                    folded.clear();
                    if parameter.depth != 1 {
                        let scale = (parameter.depth as f32).sqrt();
                        folded.extend(values.iter().map(|w| w / scale));
                    } else if let Some(scales) = &scales {
                        let scale = scales.of(row);
                        folded.extend(values.iter().map(|w| w * scale));
                    }
                    if !folded.is_empty() {
                        values = &folded;
                    }
                    match self.dtype {
                        config::Dtype::F32 => file.write_f32(values)?,
                        config::Dtype::Bf16 => {
                            rounded.clear();
                            rounded.extend(values.iter().map(|w| bf16::from_f32(*w)));
                            file.write_bf16(&rounded)?;
                        }
                    }
                }
            }
        }
        file.finish()
    }

    /// What the rows of a projection out of a branch are multiplied by.
    fn row_scales(
        &self,
        parameter: &Parameter,
        parameters: &mut impl Elements,
    ) -> Result<Option<RowScales>> {
        let Some(RowScale { constant, parameter: gain }) = parameter.row_scale else {
            return Ok(None);
        };
        let learnt = match gain {
            None => Vec::new(),
            Some(id) => parameters.get(self.table.get(id).range())?.to_vec(),
        };
        Ok(Some(RowScales { constant: constant as f32, learnt }))
    }
}

struct RowScales {
    constant: f32,
    /// One for each row, one for all, or none.
    learnt: Vec<f32>,
}

impl RowScales {
    fn of(&self, row: usize) -> f32 {
        self.constant
            * match self.learnt[..] {
                [] => 1.0,
                [all] => all,
                ref each => each[row],
            }
    }
}
