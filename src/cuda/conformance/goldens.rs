//! The golden outputs on disk: tests/goldens/conformance.json, one case a line.
//!
//! `out` holds the words as hexadecimal text, eight digits each; a long one is "zlib:" and the
//! hexadecimal text of its little-endian bytes as zlib packs them (RFC 1950).

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use flate2::Compression;
use flate2::read::{ZlibDecoder, ZlibEncoder};
use serde::{Deserialize, Serialize};

use super::cases;
use crate::durable::replace;
use crate::error::{Error, Result};

const FILE: &str = "conformance.json";
/// Longer outputs are compressed.
const PLAIN_WORDS: usize = 128;

/// What a case must give.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Golden {
    /// [`Golden::FORMULA`], or the GPU, its driver and the date.
    pub source: String,
    pub out: Vec<u32>,
}

impl Golden {
    pub const FORMULA: &str = "formula";

    /// Whether a GPU gave it.
    pub fn is_recorded(&self) -> bool {
        self.source != Self::FORMULA
    }
}

/// The goldens of all cases, by name.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Goldens(BTreeMap<String, Golden>);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    name: String,
    source: String,
    out: String,
}

impl Goldens {
    /// Those of this build.
    pub fn compiled_in() -> Result<Self> {
        let text = include_str!("../../../tests/goldens/conformance.json");
        Self::parse(text, Path::new("tests/goldens").join(FILE).as_path())
    }

    /// Those that an earlier run wrote into this folder, or of this build. Errors: damage.
    pub fn of_folder(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Self::compiled_in();
        }
        Self::parse(&std::fs::read_to_string(&path).map_err(Error::io("read", &path))?, &path)
    }

    /// `path` is for messages. Errors: no such JSON, a name twice.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let broken = |what: String| Error::Data {
            path: path.to_path_buf(),
            what,
            remedy: "write it again: isobath conformance --formulas FOLDER, or --record"
                .to_string(),
        };
        let lines: Vec<Line> =
            serde_json::from_str(text).map_err(|error| broken(error.to_string()))?;
        let mut goldens = Goldens::default();
        for Line { name, source, out } in lines {
            let out = decode(&out).map_err(|what| broken(format!("case {name}: {what}")))?;
            if goldens.0.insert(name.clone(), Golden { source, out }).is_some() {
                return Err(broken(format!("case {name} stands there twice")));
            }
        }
        Ok(goldens)
    }

    /// Errors: no golden of this name.
    pub fn of(&self, name: &str) -> Result<&Golden> {
        self.0.get(name).ok_or_else(|| Error::Usage {
            what: format!("the case {name} has no golden output"),
            remedy: "write it: isobath conformance --formulas tests/goldens".to_string(),
        })
    }

    pub fn insert(&mut self, name: &str, golden: Golden) {
        self.0.insert(name.to_string(), golden);
    }

    pub fn iter(&self) -> impl Iterator<Item = (&String, &Golden)> {
        self.0.iter()
    }

    /// Formulas for every case that no GPU has recorded; nothing for cases that are gone.
    pub fn with_formulas(mut self) -> Self {
        let golden = |case: super::Case| {
            let recorded = self.0.remove(&case.name).filter(Golden::is_recorded);
            let formula = || Golden { source: Golden::FORMULA.to_string(), out: case.expected };
            (case.name, recorded.unwrap_or_else(formula))
        };
        Goldens(cases().into_iter().map(golden).collect())
    }

    /// Writes the file into this folder. Errors: those of the operating system.
    pub fn save(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let path = folder.join(FILE);
        let text = self.to_text().map_err(Error::io("compress", &path))?;
        replace(&path, text.as_bytes())
    }

    fn to_text(&self) -> std::io::Result<String> {
        let mut lines = vec![];
        for (name, Golden { source, out }) in &self.0 {
            let line = Line { name: name.clone(), source: source.clone(), out: encode(out)? };
            lines.push(serde_json::to_string(&line)?);
        }
        Ok(format!("[\n{}\n]\n", lines.join(",\n")))
    }
}

const COMPRESSED: &str = "zlib:";

fn encode(words: &[u32]) -> std::io::Result<String> {
    if words.len() <= PLAIN_WORDS {
        return Ok(words.iter().map(|word| format!("{word:08x}")).collect());
    }
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut packed = vec![];
    ZlibEncoder::new(bytes.as_slice(), Compression::best()).read_to_end(&mut packed)?;
    Ok(packed.iter().fold(COMPRESSED.to_string(), |text, byte| text + &format!("{byte:02x}")))
}

fn decode(text: &str) -> Result<Vec<u32>, String> {
    let Some(packed) = text.strip_prefix(COMPRESSED) else {
        let word = |digits: &[u8]| number(digits, 8);
        return text.as_bytes().chunks(8).map(word).collect();
    };
    let byte = |digits: &[u8]| number(digits, 2).map(|byte| byte as u8);
    let packed: Vec<u8> = packed.as_bytes().chunks(2).map(byte).collect::<Result<_, _>>()?;
    let mut bytes = vec![];
    let unpacked = ZlibDecoder::new(packed.as_slice()).read_to_end(&mut bytes);
    unpacked.map_err(|error| error.to_string())?;
    let (words, []) = bytes.as_chunks::<4>() else {
        return Err(format!("{} bytes are no whole words", bytes.len()));
    };
    Ok(words.iter().map(|&word| u32::from_le_bytes(word)).collect())
}

fn number(digits: &[u8], length: usize) -> Result<u32, String> {
    let number = std::str::from_utf8(digits).ok().filter(|text| text.len() == length);
    number
        .and_then(|text| u32::from_str_radix(text, 16).ok())
        .ok_or_else(|| format!("{:?} are not {length} digits", String::from_utf8_lossy(digits)))
}
