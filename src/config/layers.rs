//! Layers: defaults < preset < file < `--set`, and the way back to a file.
//!
//! A preset has a value for every key, so its TOML table is the schema: it says which keys exist
//! and of what type each is. Values from outside replace it one at a time, so that a value which
//! does not fit is reported with its key and with the place that it came from.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use toml::de::{DeTable, DeValue, ValueDeserializer};
use toml::{Spanned, Table, Value};

use super::{Config, nearest, presets};
use crate::error::{Error, Result};

/// The key in a file that names the preset below it. Not part of a [`Config`].
const PRESET: &str = "preset";

impl Config {
    /// Preset, then file, then `sets` (each `key=value`), the later ones stronger. The file may
    /// name the preset (`preset = "130m"`); `preset` is stronger; the last resort is `demo`.
    ///
    /// Errors: a file that cannot be read or is not TOML; a key or preset that does not exist; a
    /// value of the wrong type. What the values mean together is for [`Config::validate`].
    pub fn resolve(preset: Option<&str>, file: Option<&Path>, sets: &[String]) -> Result<Self> {
        let text = match file {
            Some(path) => {
                let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
                Some(String::from_utf8(bytes).map_err(|_| Error::Config {
                    what: format!("{}: the file is not UTF-8 text", path.display()),
                    remedy: "give a TOML file".into(),
                })?)
            }
            None => None,
        };
        let mut document = match (file, &text) {
            (Some(path), Some(text)) => Some(Document::parse(text, Some(path))?),
            _ => None,
        };
        let named = match &mut document {
            Some(document) => document.take_preset()?,
            None => None,
        };
        let preset = preset.or(named.as_deref()).unwrap_or(presets::DEFAULT);
        let mut layers = Layers::new(Config::preset(preset)?)?;
        if let Some(document) = document {
            layers.lay_file(document)?;
        }
        for set in sets {
            layers.lay_flag(set)?;
        }
        layers.finish()
    }

    /// This configuration with some values changed, each `key=value`. Errors: as
    /// [`Config::resolve`].
    pub fn with_sets(&self, sets: &[String]) -> Result<Self> {
        let mut layers = Layers::new(self.clone())?;
        sets.iter().try_for_each(|set| layers.lay_flag(set))?;
        layers.finish()
    }

    /// Reads what [`Config::to_toml`] wrote.
    ///
    /// Errors: as [`Config::resolve`]; also a key that is missing, because a value from some
    /// preset in its place would silently be another run.
    pub fn from_toml(text: &str) -> Result<Self> {
        let mut layers = Layers::new(Config::preset(presets::DEFAULT)?)?;
        layers.lay_file(Document::parse(text, None)?)?;
        let missing: Vec<String> = leaves(&layers.table)
            .into_iter()
            .filter(|key| !layers.laid.contains(key))
            .map(|key| format!("`{key}`"))
            .collect();
        if !missing.is_empty() {
            return Err(Error::Config {
                what: format!("the saved configuration lacks {}", missing.join(", ")),
                remedy: "add the missing keys, or start from a preset instead".into(),
            });
        }
        layers.finish()
    }

    /// Every key with its value; [`Config::from_toml`] reads back an equal configuration.
    ///
    /// Errors: a whole number that TOML cannot hold (above 2^63 - 1); a path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String> {
        // Larger numbers would be written, but not read back.
        Table::try_from(self).map_err(unwritable)?;
        toml::to_string(self).map_err(unwritable)
    }
}

fn unwritable(error: toml::ser::Error) -> Error {
    Error::Config {
        what: format!("the configuration cannot be written as TOML: {error}"),
        remedy: "use numbers below 2^63 and paths that are UTF-8".into(),
    }
}

/// Where a value came from, for messages.
enum Origin<'a> {
    File { path: Option<&'a Path>, line: usize },
    Flag,
}

impl fmt::Display for Origin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File { path: Some(path), line } => write!(f, "{}:{line}", path.display()),
            Origin::File { path: None, line } => write!(f, "line {line}"),
            Origin::Flag => write!(f, "--set"),
        }
    }
}

/// A parsed file that still knows its lines.
struct Document<'a> {
    path: Option<&'a Path>,
    text: &'a str,
    table: DeTable<'a>,
}

impl<'a> Document<'a> {
    fn parse(text: &'a str, path: Option<&'a Path>) -> Result<Self> {
        let table = DeTable::parse(text).map_err(|error| Error::Config {
            what: match (path, error.span()) {
                (path, Some(span)) => {
                    let origin = Origin::File { path, line: line(text, span.start) };
                    format!("{origin}: {}", error.message())
                }
                (_, None) => error.message().to_string(),
            },
            remedy: "write TOML: `key = value` lines under `[table]` headings, strings in quotes"
                .into(),
        })?;
        Ok(Document { path, text, table: table.into_inner() })
    }

    fn origin(&self, offset: usize) -> Origin<'a> {
        Origin::File { path: self.path, line: line(self.text, offset) }
    }

    /// Removes the preset's name from the file.
    fn take_preset(&mut self) -> Result<Option<String>> {
        let Some(name) = self.table.remove(PRESET) else { return Ok(None) };
        let origin = self.origin(name.span().start);
        match name.into_inner() {
            DeValue::String(name) => Ok(Some(name.into_owned())),
            other => Err(Error::Config {
                what: format!("{origin}: `{PRESET}` is {}, not a name", article(other.type_str())),
                remedy: nearest::one_of("", &presets::preset_names()),
            }),
        }
    }
}

/// 1-based line of a byte.
fn line(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count()
}

struct Layers {
    /// Always a whole configuration.
    table: Table,
    /// Dotted keys that a file or flag has set.
    laid: BTreeSet<String>,
}

impl Layers {
    fn new(lowest: Config) -> Result<Self> {
        Ok(Layers { table: Table::try_from(lowest).map_err(unwritable)?, laid: BTreeSet::new() })
    }

    fn finish(self) -> Result<Config> {
        Config::deserialize(self.table).map_err(|error| Error::Config {
            what: error.message().to_string(),
            remedy: "correct the value".into(),
        })
    }

    fn lay_file(&mut self, mut document: Document) -> Result<()> {
        let table = std::mem::take(&mut document.table);
        self.lay_table(&document, "", table)
    }

    fn lay_table(&mut self, document: &Document, prefix: &str, table: DeTable) -> Result<()> {
        for (name, value) in table {
            let key = format!("{prefix}{}", name.get_ref());
            let key_origin = document.origin(name.span().start);
            let value_origin = document.origin(value.span().start);
            let slot = find(&self.table, &key);
            match (slot, value.get_ref()) {
                (None, given) => return Err(self.unknown(&key, given.is_table(), &key_origin)),
                (Some(Value::Table(_)), DeValue::Table(_)) => {
                    let DeValue::Table(inner) = value.into_inner() else { continue };
                    self.lay_table(document, &format!("{key}."), inner)?;
                }
                _ => self.lay(&key, plain(value, &key, &value_origin)?, &value_origin)?,
            }
        }
        Ok(())
    }

    /// `set` is `key=value`; the value is read as TOML if the key takes no string and it can be,
    /// otherwise as a bare string.
    fn lay_flag(&mut self, set: &str) -> Result<()> {
        let origin = Origin::Flag;
        let Some((key, text)) = set.split_once('=') else {
            return Err(Error::Config {
                what: format!("--set {set}: there is no `=`"),
                remedy: "write --set key=value, for instance --set train.steps=100".into(),
            });
        };
        let (key, text) = (key.trim(), text.trim());
        if key == PRESET {
            return Err(Error::Config {
                what: format!("--set {set}: `{PRESET}` is not a key"),
                remedy: format!("write --preset {text}"),
            });
        }
        let bare = || Value::String(text.to_string());
        let value = match (find(&self.table, key), text.parse::<Value>()) {
            (None, _) => return Err(self.unknown(key, false, &origin)),
            (Some(Value::String(_)), Ok(quoted @ Value::String(_))) => quoted,
            (Some(Value::String(_)), _) => bare(),
            (Some(Value::Array(_)), Ok(list @ (Value::Array(_) | Value::String(_)))) => list,
            (Some(Value::Array(_)), _) if text.is_empty() => Value::Array(vec![]),
            (Some(Value::Array(_)), _) => bare(),
            (Some(_), parsed) => parsed.unwrap_or_else(|_| bare()),
        };
        self.lay(key, value, &origin)
    }

    /// Puts one value in the place of the one below it, if it is of the same type.
    fn lay(&mut self, key: &str, value: Value, origin: &Origin) -> Result<()> {
        let inner = self.keys_of(key);
        let Some(slot) = find_mut(&mut self.table, key) else {
            return Err(self.unknown(key, false, origin));
        };
        let given = value.to_string();
        let wrong_type = |expected: &str, found: &str| Error::Config {
            what: format!("{origin}: {key} = {given}: expected {expected}, found {found}"),
            remedy: format!("set `{key}` to {expected}"),
        };
        let value = match (&*slot, value) {
            (Value::Float(_), Value::Integer(whole)) => Value::Float(whole as f64),
            (Value::Array(_), one @ Value::String(_)) => Value::Array(vec![one]),
            (Value::Array(_), Value::Array(list)) => {
                match list.iter().find(|item| !item.is_str()) {
                    Some(item) => return Err(wrong_type("a list of strings", &kind_of(item))),
                    None => Value::Array(list),
                }
            }
            // No key takes a negative whole number.
            (Value::Integer(_), Value::Integer(negative @ ..0)) => {
                return Err(wrong_type(WHOLE_NUMBER, &negative.to_string()));
            }
            (Value::Table(_), _) => {
                return Err(Error::Config {
                    what: format!("{origin}: `{key}` is a table, not a value"),
                    remedy: format!("set one of its keys: {inner}"),
                });
            }
            (slot, value) if slot.same_type(&value) => value,
            (slot, value) => return Err(wrong_type(expected_by(slot), &kind_of(&value))),
        };
        *slot = value;
        // The type is right, so this refuses values that are none of a key's names.
        Config::deserialize(self.table.clone()).map_err(|error| Error::Config {
            what: format!("{origin}: {key} = {given}: there is no such value"),
            remedy: error.message().to_string(),
        })?;
        self.laid.insert(key.to_string());
        Ok(())
    }

    fn unknown(&self, key: &str, is_table: bool, origin: &Origin) -> Error {
        let all = if is_table { tables(&self.table) } else { leaves(&self.table) };
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let what = if is_table { "table" } else { "key" };
        let nearest = nearest::nearest_key(key, &all).unwrap_or_default();
        let table = key.rsplit_once('.').map_or("", |(table, _)| table);
        Error::Config {
            what: format!("{origin}: unknown {what} `{key}`; nearest: `{nearest}`"),
            remedy: match find(&self.table, table) {
                Some(Value::Table(_)) => format!("[{table}] has {}", self.keys_of(table)),
                _ => format!(
                    "the tables are {}; outside them there are {} and {PRESET}",
                    tables(&self.table).join(", "),
                    scalars(&self.table).join(", "),
                ),
            },
        }
    }

    /// Names of the keys of one table, for a message.
    fn keys_of(&self, table: &str) -> String {
        match find(&self.table, table) {
            Some(Value::Table(inner)) => inner.keys().cloned().collect::<Vec<_>>().join(", "),
            _ => String::new(),
        }
    }
}

const WHOLE_NUMBER: &str = "a whole number from 0";

fn expected_by(slot: &Value) -> &'static str {
    match slot {
        Value::String(_) => "a string",
        Value::Integer(_) => WHOLE_NUMBER,
        Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Array(_) => "a list of strings",
        Value::Table(_) => "a table",
        Value::Datetime(_) => "a date",
    }
}

fn kind_of(value: &Value) -> String {
    match value {
        Value::Float(_) => "a number with a fraction or exponent".to_string(),
        other => article(other.type_str()),
    }
}

fn article(noun: &str) -> String {
    let article = if noun.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {noun}")
}

/// A value without its places in the text.
fn plain(value: Spanned<DeValue>, key: &str, origin: &Origin) -> Result<Value> {
    Value::deserialize(ValueDeserializer::from(value)).map_err(|error| Error::Config {
        what: format!("{origin}: {key}: {}", error.message()),
        remedy: "use a value that TOML can hold; whole numbers end at 2^63 - 1".into(),
    })
}

fn find<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        None => table.get(key),
        Some((first, rest)) => find(table.get(first)?.as_table()?, rest),
    }
}

fn find_mut<'a>(table: &'a mut Table, key: &str) -> Option<&'a mut Value> {
    match key.split_once('.') {
        None => table.get_mut(key),
        Some((first, rest)) => find_mut(table.get_mut(first)?.as_table_mut()?, rest),
    }
}

/// Dotted names of all keys that hold a value.
fn leaves(table: &Table) -> Vec<String> {
    let mut keys = Vec::new();
    for (name, value) in table {
        match value {
            Value::Table(inner) => {
                keys.extend(leaves(inner).into_iter().map(|key| format!("{name}.{key}")));
            }
            _ => keys.push(name.clone()),
        }
    }
    keys
}

/// Keys of this table alone that hold a value.
fn scalars(table: &Table) -> Vec<String> {
    table.iter().filter(|(_, value)| !value.is_table()).map(|(name, _)| name.clone()).collect()
}

fn tables(table: &Table) -> Vec<String> {
    table.iter().filter(|(_, value)| value.is_table()).map(|(name, _)| name.clone()).collect()
}
