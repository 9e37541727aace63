//! MANIFEST.json: size and sha256 of every file of a checkpoint, and of itself.
//!
//! The file is accepted only if it is byte for byte what this program writes for its contents, so
//! a changed bit anywhere in it is noticed too.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{MANIFEST, TRAINER, TRAINER_TENSORS, not_json};
use crate::durable::{Fingerprint, hexadecimal};
use crate::error::Result;
use crate::hf;

const VERSION: u32 = 1;

/// Files without which a folder is no checkpoint.
const REQUIRED: [&str; 5] = [hf::CONFIG, hf::MODEL, hf::TOKENIZER, TRAINER, TRAINER_TENSORS];

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    version: u32,
    pub step: u64,
    pub files: BTreeMap<String, Fingerprint>,
    /// Of the three fields above.
    sha256: String,
}

impl Manifest {
    pub fn new(step: u64, files: Vec<(String, Fingerprint)>) -> Self {
        let files = files.into_iter().collect();
        let sha256 = digest(VERSION, step, &files);
        Manifest { version: VERSION, step, files, sha256 }
    }

    pub fn bytes(&self) -> Result<Vec<u8>> {
        let mut json = serde_json::to_vec_pretty(self).map_err(|e| not_json(MANIFEST, e))?;
        json.push(b'\n');
        Ok(json)
    }

    /// The error says what is wrong, without the path.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let newer = |version: &serde_json::Value| version.as_u64() > Some(VERSION.into());
        if let Ok(json) = serde_json::from_slice::<serde_json::Value>(bytes)
            && newer(&json["version"])
        {
            return Err(format!("has version {}, this build knows {VERSION}", json["version"]));
        }
        let manifest: Manifest =
            serde_json::from_slice(bytes).map_err(|e| format!("cannot be read: {e}"))?;
        let expected = digest(manifest.version, manifest.step, &manifest.files);
        if manifest.sha256 != expected || manifest.bytes().ok().as_deref() != Some(bytes) {
            return Err("does not have its own hash".to_string());
        }
        for name in manifest.files.keys() {
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(format!("lists {name:?}, which is not a plain file name"));
            }
        }
        match REQUIRED.iter().find(|name| !manifest.files.contains_key(**name)) {
            Some(name) => Err(format!("does not list {name}")),
            None => Ok(manifest),
        }
    }
}

fn digest(version: u32, step: u64, files: &BTreeMap<String, Fingerprint>) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("isobath checkpoint {version} {step}\n"));
    for (name, Fingerprint { bytes, sha256 }) in files {
        hash.update(format!("{bytes} {sha256} {name}\n"));
    }
    hexadecimal(hash)
}
