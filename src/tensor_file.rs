//! safetensors files, written and read as a stream.
//!
//! A writer takes the list of tensors first and then their elements in that order, so a model is
//! never held twice; a reader takes any range of a tensor's elements and gives f32. Header types
//! and their checks are those of the `safetensors` crate. Every error names the file.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};

pub use safetensors::Dtype;

use crate::durable::{CHUNK_BYTES, Fingerprint, HashedFile};
use crate::error::{Error, Result};

/// Bytes of the header's length at the start of a file.
const LENGTH_BYTES: usize = 8;
/// What the `safetensors` crate allows as well.
const MAX_HEADER_BYTES: u64 = 100_000_000;

const _: () = assert!(cfg!(target_endian = "little"), "safetensors files are little-endian");

/// One tensor that is to be written.
#[derive(Clone, Debug)]
pub struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Entry {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Length, header and padding, as they stand before the tensors' bytes.
fn header(path: &Path, entries: &[Entry]) -> Result<Vec<u8>> {
    let mut end = 0;
    let infos = entries.iter().map(|entry| {
        let start = end;
        end += entry.bytes();
        let (dtype, shape) = (entry.dtype, entry.shape.clone());
        (entry.name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    // transformers before 4.46 refuses a file without this key
    let format = HashMap::from([("format".to_string(), "pt".to_string())]);
    let metadata = Metadata::new(Some(format), infos.collect())
        .map_err(|e| unusable(path, format!("the tensors make no safetensors file: {e}")))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| unusable(path, e.to_string()))?;
    json.resize(json.len().next_multiple_of(LENGTH_BYTES), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

/// Size of the file that [`TensorWriter`] makes of these entries.
pub fn file_bytes(path: &Path, entries: &[Entry]) -> Result<u64> {
    let tensors: usize = entries.iter().map(Entry::bytes).sum();
    Ok((header(path, entries)?.len() + tensors) as u64)
}

/// Takes the elements of all entries, in the order of the entries.
pub struct TensorWriter {
    file: HashedFile,
    path: PathBuf,
    missing_bytes: usize,
}

impl TensorWriter {
    pub fn create(path: &Path, entries: &[Entry]) -> Result<Self> {
        let header = header(path, entries)?;
        let mut file = HashedFile::create(path)?;
        file.write(&header)?;
        let missing_bytes = entries.iter().map(Entry::bytes).sum();
        Ok(TensorWriter { file, path: path.to_path_buf(), missing_bytes })
    }

    pub fn write_f32(&mut self, values: &[f32]) -> Result<()> {
        self.write(bytemuck::cast_slice(values))
    }

    pub fn write_bf16(&mut self, values: &[bf16]) -> Result<()> {
        self.write(bytemuck::cast_slice(values))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.missing_bytes = self
            .missing_bytes
            .checked_sub(bytes.len())
            .ok_or_else(|| unusable(&self.path, "more elements than the header tells".into()))?;
        self.file.write(bytes)
    }

    /// Returns when the file is on disk.
    pub fn finish(self) -> Result<Fingerprint> {
        if self.missing_bytes > 0 {
            return Err(unusable(&self.path, "fewer elements than the header tells".into()));
        }
        self.file.finish()
    }
}

/// An open file whose header was read and agrees with the file's size.
#[derive(Debug)]
pub struct TensorReader {
    file: File,
    path: PathBuf,
    metadata: Metadata,
    first_byte: u64,
}

impl TensorReader {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let size = file.metadata().map_err(Error::io("read", path))?.len();
        let mut length = [0; LENGTH_BYTES];
        if size < LENGTH_BYTES as u64 {
            return Err(unusable(path, format!("has {size} bytes, too few for a header")));
        }
        file.read_exact_at(&mut length, 0).map_err(Error::io("read", path))?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES || header_bytes > size - LENGTH_BYTES as u64 {
            let what = format!(
                "has {size} bytes, and a header of {header_bytes} is announced: \
                 truncated, or no safetensors file"
            );
            return Err(unusable(path, what));
        }
        let mut json = vec![0; header_bytes as usize];
        file.read_exact_at(&mut json, LENGTH_BYTES as u64).map_err(Error::io("read", path))?;
        let metadata: Metadata = serde_json::from_slice(&json)
            .map_err(|e| unusable(path, format!("the header cannot be read: {e}")))?;
        let first_byte = LENGTH_BYTES as u64 + header_bytes;
        let expected = first_byte.saturating_add(metadata.data_len() as u64);
        if size != expected {
            let state = if size < expected { "truncated" } else { "longer than it should be" };
            let what =
                format!("has {size} bytes, {expected} are expected from its header: {state}");
            return Err(unusable(path, what));
        }
        Ok(TensorReader { file, path: path.to_path_buf(), metadata, first_byte })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names in the order in which the tensors lie in the file.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.metadata.info(name)
    }

    /// Reads elements `first..first + out.len()` of a tensor of type BF16, F16 or F32 into `out`.
    pub fn read(&self, name: &str, first: usize, out: &mut [f32]) -> Result<()> {
        let missing = || unusable(&self.path, format!("has no tensor {name}"));
        let info = self.info(name).ok_or_else(missing)?;
        let widen: fn([u8; 2]) -> f32 = match info.dtype {
            Dtype::F32 => return self.read_bytes(info, first * 4, bytemuck::cast_slice_mut(out)),
            Dtype::BF16 => |bytes| bf16::from_le_bytes(bytes).to_f32(),
            Dtype::F16 => |bytes| f16::from_le_bytes(bytes).to_f32(),
            other => {
                let what = format!("{name} has type {other}; BF16, F16 and F32 can be read");
                return Err(unusable(&self.path, what));
            }
        };
        let mut chunk = vec![0; (out.len() * 2).min(CHUNK_BYTES)];
        for (i, out) in out.chunks_mut(CHUNK_BYTES / 2).enumerate() {
            let chunk = &mut chunk[..out.len() * 2];
            self.read_bytes(info, first * 2 + i * CHUNK_BYTES, chunk)?;
            for (out, bytes) in out.iter_mut().zip(chunk.as_chunks::<2>().0) {
                *out = widen(*bytes);
            }
        }
        Ok(())
    }

    fn read_bytes(&self, info: &TensorInfo, offset: usize, out: &mut [u8]) -> Result<()> {
        let (start, end) = info.data_offsets;
        if offset + out.len() > end - start {
            return Err(unusable(&self.path, "more was asked of a tensor than it has".into()));
        }
        let at = self.first_byte + (start + offset) as u64;
        self.file.read_exact_at(out, at).map_err(Error::io("read", &self.path))
    }
}

fn unusable(path: &Path, what: String) -> Error {
    let remedy = "copy the file again from where it came, or use another checkpoint".to_string();
    Error::Checkpoint { path: path.to_path_buf(), what, remedy }
}
