//! Checkpoints: a Hugging Face folder plus all that is needed to continue training bit by bit.
//!
//! [`save`] writes a snapshot so that at every instant the run has its earlier checkpoints or
//! those and the new one: temporary folder, every file synced and hashed on the way, the manifest
//! last, one rename. The flat buffers are read in chunks, wherever they lie: saving takes the same
//! host memory, whatever the model. [`latest`] finds the newest folder whose manifest holds; state
//! can only be loaded from a [`Verified`], which only verification makes. [`retain`] deletes old
//! ones.
//!
//! ```text
//! config.json model.safetensors tokenizer.json ...   crate::hf
//! trainer.safetensors   parameters, moment1, moment2: the flat f32 buffers, padding included
//! trainer.json          step, tokens, loader position, configuration
//! MANIFEST.json         size and sha256 of every other file
//! ```

mod manifest;
mod retention;
mod verified;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::config::{self, Config};
use crate::data::loader::LoaderState;
use crate::durable::{Fingerprint, hexadecimal, remove_if_present, write_new};
use crate::error::{Error, Result};
use crate::flat::{Elements, FlatBuffer, ReadFlat, Reader, chunks, with_two_readers};
use crate::hf::{Export, TokenizerFiles};
use crate::metrics::StepRecord;
use crate::model::parameters::ParameterTable;
use crate::rundir::{RunDir, checkpoint_folder};
use crate::tensor_file::{Dtype, Entry, TensorWriter, file_bytes};

use manifest::Manifest;
pub use retention::retain;
pub use verified::{Damaged, Latest, Verified, latest, model_folder, verify};

pub const TRAINER_TENSORS: &str = "trainer.safetensors";
pub const TRAINER: &str = "trainer.json";
pub const MANIFEST: &str = "MANIFEST.json";

/// The first one had fields that nothing needs; it is read, too.
const TRAINER_FORMATS: [u32; 2] = [1, 2];

/// What the training loop knows besides the flat buffers. Earlier versions wrote more, of which
/// nothing is needed: every random stream begins with the configuration's seed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TrainerState {
    /// Steps done, each of them an update of the optimizer: the `t` of its bias correction. The
    /// next one is `step + 1`. Also names the folder.
    pub step: u64,
    /// Tokens that were trained on.
    pub tokens: u64,
    /// Where the data loader stands.
    pub loader: LoaderState,
    /// Wall time spent training, over all processes of this run.
    pub elapsed_seconds: f64,
    /// The line of the last step, if its evaluation or sample was interrupted: it is written when
    /// they are made up for.
    #[serde(rename = "extra")]
    pub pending: Option<StepRecord>,
}

/// A moment of a training run, without its flat buffers; borrows everything.
#[derive(Clone, Copy)]
pub struct Snapshot<'a> {
    pub config: &'a Config,
    pub table: &'a ParameterTable,
    pub state: &'a TrainerState,
    pub tokenizer: &'a TokenizerFiles,
    /// Type of model.safetensors; the trainer's own state is always f32.
    pub dtype: config::Dtype,
}

/// Contents of trainer.json.
#[derive(Serialize, Deserialize)]
struct TrainerFile {
    format: u32,
    /// Program version that wrote it, for people.
    isobath: String,
    /// See [`layout`].
    layout: String,
    config: Value,
    state: TrainerState,
}

/// A checkpoint that this process has written, every byte of which was hashed on its way to the
/// disk and synced: [`retain`] does not read it again.
#[derive(Debug)]
pub struct Saved {
    folder: PathBuf,
}

impl Saved {
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Writes a checkpoint, whose folder is then durable; `read` gives the flat buffers, of the
/// table's stored elements each. If anything fails, the temporary folder is removed and the
/// earlier checkpoints are as they were.
pub fn save(run: &RunDir, snapshot: &Snapshot, read: &mut ReadFlat) -> Result<Saved> {
    let step = snapshot.state.step;
    let trainer = TrainerFile::of(snapshot)?;
    let needed_bytes = snapshot.export().bytes()?
        + file_bytes(Path::new(TRAINER_TENSORS), &flat_entries(snapshot.table))?
        + trainer.len() as u64;
    let saved = run.temporary_checkpoint(step).and_then(|temporary| {
        let saved = write_files(&temporary, snapshot, &trainer, read)
            .and_then(|()| run.publish_checkpoint(&temporary, step));
        if saved.is_err() {
            let _ = remove_if_present(&temporary); // the first error is the one to report
        }
        saved
    });
    match saved {
        Ok(folder) => Ok(Saved { folder }),
        Err(source) => Err(Error::NotSaved {
            path: checkpoint_folder(run.path(), step),
            needed_bytes,
            source: Box::new(source),
        }),
    }
}

fn write_files(
    folder: &Path,
    snapshot: &Snapshot,
    trainer: &[u8],
    read: &mut ReadFlat,
) -> Result<()> {
    let (export, tensors) = (snapshot.export(), folder.join(TRAINER_TENSORS));
    // hashing one file while the other is synced hides most of it
    let (files, tensors) = with_two_readers(
        read,
        |parameters| export.write(folder, parameters),
        |reader| write_flat(&tensors, snapshot.table, reader),
    )?;
    let mut files = files?;
    files.push((TRAINER_TENSORS.to_string(), tensors?));
    files.push((TRAINER.to_string(), write_new(&folder.join(TRAINER), trainer)?));
    let manifest = Manifest::new(snapshot.state.step, files);
    write_new(&folder.join(MANIFEST), &manifest.bytes()?).map(|_| ())
}

fn write_flat(path: &Path, table: &ParameterTable, mut reader: Reader) -> Result<Fingerprint> {
    let mut file = TensorWriter::create(path, &flat_entries(table))?;
    for buffer in FlatBuffer::ALL {
        reader.buffer = buffer;
        for chunk in chunks(table.stored_elements()) {
            file.write_f32(reader.get(chunk)?)?;
        }
    }
    drop(reader); // nothing is read while the file is synced
    file.finish()
}

/// In file order.
fn flat_entries(table: &ParameterTable) -> Vec<Entry> {
    let shape = vec![table.stored_elements()];
    let entry = |buffer: FlatBuffer| {
        let name = buffer.name().to_string();
        Entry { name, dtype: Dtype::F32, shape: shape.clone() }
    };
    FlatBuffer::ALL.map(entry).to_vec()
}

impl Snapshot<'_> {
    fn export(&self) -> Export<'_> {
        Export {
            config: &self.config.model,
            table: self.table,
            tokenizer: self.tokenizer,
            dtype: self.dtype,
        }
    }
}

impl TrainerFile {
    fn of(snapshot: &Snapshot) -> Result<Vec<u8>> {
        let config = serde_json::to_value(snapshot.config);
        let bytes = config.and_then(|config| {
            serde_json::to_vec_pretty(&TrainerFile {
                format: TRAINER_FORMATS[1],
                isobath: env!("CARGO_PKG_VERSION").to_string(),
                layout: layout(snapshot.table),
                config,
                state: snapshot.state.clone(),
            })
        });
        bytes.map_err(|error| not_json(TRAINER, error))
    }
}

fn not_json(file: &str, error: serde_json::Error) -> Error {
    Error::Checkpoint {
        path: file.into(),
        what: format!("cannot be written as JSON: {error}"),
        remedy: "check the configuration for paths that are not UTF-8".into(),
    }
}

/// Hash of where every parameter lies in the flat buffer and what it means there: buffers of
/// equal layout may be exchanged.
fn layout(table: &ParameterTable) -> String {
    let mut hash = Sha256::new();
    for parameter in table.entries() {
        let (name, at) = (&parameter.name, parameter.offset);
        hash.update(format!("{name} {} {at} {}\n", parameter.stored, parameter.depth));
    }
    hash.update(format!("{}", table.stored_elements()));
    hexadecimal(hash)
}
