//! A variant: a name, and what it changes in the configuration that all have in common.

use crate::config::{Config, Placement};
use crate::error::{Error, Result};

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Variant {
    /// Part of a folder's name.
    pub name: String,
    /// key=value, as `--set` takes them.
    pub sets: Vec<String>,
}

impl Variant {
    /// A norm placement by its name. Errors: no placement has it.
    pub fn of_placement(name: &str) -> Result<Self> {
        let placement: Placement = name.parse()?;
        let mut sets = vec![format!("model.placement={placement}")];
        if placement != Placement::Lns {
            sets.push("model.lns_position=after-norm".to_string()); // whatever the base has for lns
        }
        if placement == Placement::Deepnorm {
            sets.push("model.init=xavier".to_string()); // what DeepNet's beta is meant for
        }
        Ok(Variant { name: name.to_string(), sets })
    }

    /// "NAME:key=value,key=value". Errors: no name or nothing changed.
    pub fn parse(text: &str) -> Result<Self> {
        let usage = |what: String| Error::Usage {
            what,
            remedy: "write NAME:key=value,key=value, for instance \
                     fast:model.placement=lns,optimizer.lr=8e-3"
                .to_string(),
        };
        let Some((name, sets)) = text.split_once(':') else {
            return Err(usage(format!("variant `{text}` changes nothing")));
        };
        let mut parts: Vec<String> = Vec::new();
        for part in sets.split(',') {
            // A comma may also stand inside of a list.
            match parts.last_mut() {
                Some(last) if !begins_with_key(part) => *last += &format!(",{part}"),
                _ => parts.push(part.to_string()),
            }
        }
        let sets = parts;
        if name.is_empty() || !sets.iter().all(|set| begins_with_key(set)) {
            return Err(usage(format!("variant `{text}` cannot be read")));
        }
        if sets.iter().any(|set| set.starts_with("seed=") || set.starts_with("name=")) {
            return Err(Error::Usage {
                what: format!("variant `{text}` sets what tells its runs apart"),
                remedy: "use --seeds and --set seed=..., and the name before the colon".to_string(),
            });
        }
        Ok(Variant { name: name.to_string(), sets })
    }

    /// The base with this variant's values.
    pub(super) fn apply(&self, base: &Config) -> Result<Config> {
        base.with_sets(&self.sets)
    }
}

/// "optimizer.lr=..."
fn begins_with_key(text: &str) -> bool {
    let key = text.split_once('=').map_or("", |(key, _)| key);
    !key.is_empty()
        && key.chars().all(|c| c.is_ascii_lowercase() || matches!(c, '.' | '_' | '0'..='9'))
}

/// Refuses no variant, and two of one name.
pub(super) fn check_names(variants: &[Variant]) -> Result<()> {
    if variants.is_empty() {
        return Err(Error::Usage {
            what: "no variant to train".to_string(),
            remedy: "give --norms pre,lns or --variant NAME:key=value".to_string(),
        });
    }
    for (at, variant) in variants.iter().enumerate() {
        if variants[..at].iter().any(|earlier| earlier.name == variant.name) {
            return Err(Error::Usage {
                what: format!("two variants are called `{}`", variant.name),
                remedy: "give each a name of its own".to_string(),
            });
        }
    }
    Ok(())
}
