//! A model as a stock Hugging Face LLaMA folder: whole, or without some of its layers.
//!
//! Depth scales are folded into the weights before a layer is removed, so the layers that stay
//! compute what they computed. A model that does not fold is refused with the reason.

use std::collections::BTreeSet;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::model_folder;
use crate::config::{Dtype, ModelConfig};
use crate::data::tokenizer::Tokenizer;
use crate::durable::{folder_of, sync_folder};
use crate::error::{Error, Result};
use crate::hf::{self, Export, TokenizerFiles};
use crate::model::parameters::{BlockParameters, ParameterId, ParameterTable};

/// Layers counted from 1: "7", "3..5" (which includes 5), or several of these, "3..5,9".
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Layers(BTreeSet<usize>);

impl Layers {
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().copied()
    }
}

impl FromStr for Layers {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let layers: Option<Vec<RangeInclusive<usize>>> = text.split(',').map(range).collect();
        match layers {
            Some(ranges) => Ok(Layers(ranges.into_iter().flatten().collect())),
            None => Err(Error::Usage {
                what: format!("`{text}` names no layers"),
                remedy: "count from 1 and write 7, or 3..5 (which includes 5), or 3..5,9"
                    .to_string(),
            }),
        }
    }
}

/// `None`: unreadable, empty or with layer 0.
fn range(text: &str) -> Option<RangeInclusive<usize>> {
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    let range = first.trim().parse().ok()?..=last.trim().parse().ok()?;
    // A range over all numbers would be a long one.
    let readable = *range.start() > 0 && range.start() <= range.end() && *range.end() <= 1 << 20;
    readable.then_some(range)
}

/// What to write and where.
#[derive(Clone, Debug)]
pub struct Request {
    /// A run, a checkpoint, or any Hugging Face LLaMA folder.
    pub model: PathBuf,
    /// Layers to leave out; none for the whole model.
    pub without: Layers,
    /// Must not exist.
    pub out: PathBuf,
    pub dtype: Dtype,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Written {
    /// The folder that was read.
    pub model: PathBuf,
    pub out: PathBuf,
    /// Layers that were left out, counted from 1.
    pub removed: Vec<usize>,
    pub layers: usize,
    pub parameters: u64,
    pub bytes: u64,
}

/// Writes the folder as a whole or not at all.
///
/// Errors: a model that does not fold; layers that it does not have, or all of them; a folder that
/// exists.
pub fn write(request: &Request) -> Result<Written> {
    let Request { model, without, out, dtype } = request;
    let folder = model_folder(model)?;
    let trained = hf::model_config(&folder)?;
    if let Some(why) = hf::not_stock(&trained) {
        return Err(Error::Checkpoint {
            path: folder,
            what: format!("is no stock LLaMA, and cannot become one: {why}"),
            remedy: "keep the checkpoint: `isobath eval`, `generate` and `depth` read it".into(),
        });
    }
    check_layers(without, &trained)?;
    if out.exists() {
        return Err(Error::Usage {
            what: format!("{} exists already", out.display()),
            remedy: "choose another folder with --out".to_string(),
        });
    }
    let (config, table, parameters) = hf::load_for_inference(&folder)?;
    let kept: Vec<usize> = (1..=config.layers).filter(|layer| !without.0.contains(layer)).collect();
    let smaller = ModelConfig { layers: kept.len(), ..config };
    let smaller_table = ParameterTable::new(&smaller);
    let parameters = without_layers(&table, &parameters, &kept, &smaller_table);
    let tokenizer = tokenizer_files(&folder)?;
    let export =
        Export { config: &smaller, table: &smaller_table, tokenizer: &tokenizer, dtype: *dtype };
    let parent = folder_of(out);
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    let temporary = tempfile::Builder::new()
        .prefix(".unfinished-")
        .tempdir_in(parent)
        .map_err(Error::io("create a folder in", parent))?;
    let files = export.write(temporary.path(), &parameters[..])?;
    fs::rename(temporary.path(), out).map_err(Error::io("create", out))?;
    let _ = temporary.keep(); // it has its name now
    sync_folder(parent)?;
    Ok(Written {
        model: folder,
        out: out.clone(),
        removed: without.iter().collect(),
        layers: smaller.layers,
        parameters: smaller_table.parameters() as u64,
        bytes: files.iter().map(|(_, fingerprint)| fingerprint.bytes).sum(),
    })
}

fn check_layers(without: &Layers, config: &ModelConfig) -> Result<()> {
    let usage = |what: String, remedy: String| Err(Error::Usage { what, remedy });
    match without.0.last() {
        Some(&layer) if layer > config.layers => usage(
            format!("layer {layer} of a model with {}", config.layers),
            format!("name layers from 1 to {}", config.layers),
        ),
        _ if without.0.len() == config.layers => {
            usage("no layer would stay".to_string(), "name fewer layers".to_string())
        }
        _ => Ok(()),
    }
}

/// The parameters of `kept` layers, in the smaller model's flat buffer.
fn without_layers(
    table: &ParameterTable,
    parameters: &[f32],
    kept: &[usize],
    smaller: &ParameterTable,
) -> Vec<f32> {
    let mut flat = vec![0.0; smaller.stored_elements()];
    let mut copy = |from: ParameterId, to: ParameterId| {
        flat[smaller.get(to).range()].copy_from_slice(&parameters[table.get(from).range()]);
    };
    copy(table.embedding(), smaller.embedding());
    copy(table.final_norm(), smaller.final_norm());
    if table.head() != table.embedding() {
        copy(table.head(), smaller.head());
    }
    // A stock block: two norms and four matrices.
    let all = |block: BlockParameters| {
        block.matrices().into_iter().chain([block.attention.norm, block.ffn.norm])
    };
    for (at, &layer) in kept.iter().enumerate() {
        let pairs = all(table.block(layer)).zip(all(smaller.block(at + 1)));
        pairs.for_each(|(from, to)| copy(from, to));
    }
    flat
}

/// The tokenizer of a folder, with the ids that its config.json names.
fn tokenizer_files(folder: &Path) -> Result<TokenizerFiles> {
    let path = folder.join(hf::TOKENIZER);
    let tokenizer = Tokenizer::open(&path.to_string_lossy())?;
    let path = folder.join(hf::CONFIG);
    let text = fs::read(&path).map_err(Error::io("read", &path))?;
    let config: Value = serde_json::from_slice(&text).unwrap_or_default();
    // Some folders list several ends of text; the tokenizer knows which one it is.
    let id = |key: &str| config[key].as_u64().and_then(|id| u32::try_from(id).ok());
    Ok(TokenizerFiles {
        json: tokenizer.json().to_string(),
        bos: id("bos_token_id"),
        eos: id("eos_token_id").or(tokenizer.end_of_text()),
    })
}
