//! config.json: written so that transformers 4.57 and 5.x agree, read from any stock LLaMA folder.
//!
//! transformers 4.x knows `rope_theta` only, 5.x prefers `rope_parameters`; both are written, and
//! when reading they must not contradict each other. What this program cannot compute (biases,
//! scaled rope, other architectures) is refused by the key's name. Our own facts stand under
//! `isobath`, which transformers ignores.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{CONFIG, TokenizerFiles};
use crate::config::rules::{MOST_FFN, MOST_HIDDEN, MOST_LAYERS, MOST_SEQUENCE, MOST_VOCAB};
use crate::config::{
    DEFAULT_LAYER_SCALE, DEFAULT_MIX_POST, InitKind, LnsPosition, ModelConfig, NormKind, Placement,
};
use crate::error::{Error, Result};
use crate::model::placement;

/// rope_theta where a folder tells none.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// What we add to config.json, to restore from our own folders what stock LLaMA has no word for.
#[derive(Serialize, Deserialize)]
struct Ours {
    version: u32,
    norm: NormKind,
    placement: Placement,
    #[serde(default = "after_norm")]
    lns_position: LnsPosition,
    #[serde(default = "default_mix_post")]
    mix_post: f64,
    /// The placement that was trained, where the weights hold what it adds; since version 2.
    trained: Option<Placement>,
    trained_position: Option<LnsPosition>,
    /// Why this is no stock LLaMA.
    not_stock: Option<String>,
    /// The written gains are divided by the depth scale of the placement.
    gains: Gains,
    init: InitKind,
    init_std: f64,
    embedding_std: f64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Gains {
    Folded,
}

/// What folders of version 1 mean.
fn after_norm() -> LnsPosition {
    LnsPosition::AfterNorm
}

fn default_mix_post() -> f64 {
    DEFAULT_MIX_POST
}

const OUR_VERSION: u32 = 2;

/// The keys of a config.json that decide what is computed.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    initializer_range: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<Rope>,
    rope_scaling: Option<Rope>,
    partial_rotary_factor: Option<f64>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    sliding_window: Option<usize>,
    tie_word_embeddings: Option<bool>,
    quantization_config: Option<Value>,
    isobath: Option<Ours>,
}

#[derive(Deserialize)]
struct Rope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

pub(super) fn to_json(config: &ModelConfig, tokenizer: &TokenizerFiles, dtype: &str) -> Value {
    // For a network that is no LLaMA, a name that transformers does not know, so that it does not
    // load the weights into another one.
    let not_stock = not_stock(config);
    let (model_type, architecture) = match &not_stock {
        None => ("llama", "LlamaForCausalLM"),
        Some(_) => ("isobath", "IsobathForCausalLM"),
    };
    let written = placement::folded(config);
    let folds = written != *config;
    let ours = Ours {
        version: OUR_VERSION,
        norm: config.norm,
        placement: written.placement,
        lns_position: written.lns_position,
        mix_post: config.mix_post,
        trained: folds.then_some(config.placement),
        trained_position: folds.then_some(config.lns_position),
        not_stock,
        gains: Gains::Folded,
        init: config.init,
        init_std: config.init_std,
        embedding_std: config.embedding_std,
    };
    json!({
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim(),
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "torch_dtype": dtype,
        "use_cache": true,
        "isobath": ours,
    })
}

/// Why transformers cannot run this model, whatever is folded; `None`: it can.
pub fn not_stock(config: &ModelConfig) -> Option<String> {
    match config.norm {
        NormKind::Layer => {
            Some("model.norm is \"layer\", and stock LLaMA has RMSNorms".to_string())
        }
        NormKind::Rms => placement::stock_obstacle(config).map(|why| match config.placement {
            Placement::Lns => format!("lns_position \"{}\": {why}", config.lns_position),
            placement => format!("placement \"{placement}\": {why}"),
        }),
    }
}

/// What a folder says of itself besides its model: the placement that was trained.
pub fn trained_placement(folder: &Path) -> Result<Option<(Placement, LnsPosition)>> {
    let raw = read(folder)?;
    Ok(raw.isobath.map(|ours| {
        (ours.trained.unwrap_or(ours.placement), ours.trained_position.unwrap_or(ours.lns_position))
    }))
}

/// The model that a folder holds. A folder that this program wrote gets its placement back; any
/// other is `pre`, which is what stock LLaMA computes.
pub fn model_config(folder: &Path) -> Result<ModelConfig> {
    validated(read(folder)?, &folder.join(CONFIG))
}

fn read(folder: &Path) -> Result<Raw> {
    let path = folder.join(CONFIG);
    let text = fs::read(&path).map_err(Error::io("read", &path))?;
    serde_json::from_slice(&text)
        .map_err(|e| refused(&path, format!("cannot be read: {e}"), "repair or replace the file"))
}

fn validated(raw: Raw, path: &Path) -> Result<ModelConfig> {
    let family = match (&raw.model_type, &raw.architectures) {
        (Some(model_type), _) => model_type.clone(),
        (None, Some(names)) if names.iter().any(|n| n.eq_ignore_ascii_case("LlamaForCausalLM")) => {
            "llama".to_string()
        }
        (None, names) => names.iter().flatten().next().cloned().unwrap_or_default(),
    };
    if !["llama", "mistral", "isobath"].contains(&family.as_str()) {
        let what = format!("model_type is \"{family}\"");
        let remedy = "use a folder with model_type \"llama\" (or \"mistral\": the same layout)";
        return Err(refused(path, what, remedy));
    }
    if family == "isobath" && raw.isobath.is_none() {
        let what = "model_type is \"isobath\", but the key isobath is missing".to_string();
        return Err(refused(path, what, "use the config.json that isobath wrote"));
    }
    if let Some(version) = raw.isobath.as_ref().map(|o| o.version).filter(|v| *v > OUR_VERSION) {
        let what = format!("isobath.version is {version}, this build knows up to {OUR_VERSION}");
        return Err(refused(path, what, "use the isobath that wrote it, or a newer one"));
    }
    unsupported(&raw, path)?;

    let size = |key: &str, value: Option<usize>, most: usize| match value {
        Some(size) if (1..=most).contains(&size) => Ok(size),
        Some(size) => {
            let what = format!("{key} is {size}, not from 1 to {most}");
            Err(refused(path, what, "repair the file"))
        }
        None => Err(refused(path, format!("{key} is missing"), "repair the file")),
    };
    let number = |key: &str, value: f64| match value {
        value if value.is_finite() && value > 0.0 => Ok(value),
        value => Err(refused(path, format!("{key} is {value}"), "repair the file")),
    };
    let hidden = size("hidden_size", raw.hidden_size, MOST_HIDDEN)?;
    let layers = size("num_hidden_layers", raw.num_hidden_layers, MOST_LAYERS)?;
    let heads = size("num_attention_heads", raw.num_attention_heads, MOST_HIDDEN)?;
    let kv_heads = raw.num_key_value_heads.or(Some(heads));
    let kv_heads = size("num_key_value_heads", kv_heads, MOST_HIDDEN)?;
    let ffn = size("intermediate_size", raw.intermediate_size, MOST_FFN)?;
    let vocab = size("vocab_size", raw.vocab_size, MOST_VOCAB)?;
    let max_sequence = raw.max_position_embeddings.or(Some(2048));
    let max_sequence = size("max_position_embeddings", max_sequence, MOST_SEQUENCE)?;
    let inconsistent = if !hidden.is_multiple_of(heads) {
        Some(format!("num_attention_heads {heads} does not divide hidden_size {hidden}"))
    } else if !heads.is_multiple_of(kv_heads) {
        Some(format!("num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}"))
    } else if !(hidden / heads).is_multiple_of(2) {
        Some(format!("the head dimension {} is odd", hidden / heads))
    } else {
        let other = raw.head_dim.filter(|d| *d != hidden / heads);
        other.map(|d| format!("head_dim is {d}, not hidden_size / heads = {}", hidden / heads))
    };
    if let Some(what) = inconsistent {
        return Err(refused(path, what, "use a LLaMA whose heads share hidden_size evenly"));
    }
    let init_std = number("initializer_range", raw.initializer_range.unwrap_or(0.02))?;
    let ours = raw.isobath.as_ref();
    Ok(ModelConfig {
        hidden,
        layers,
        heads,
        kv_heads,
        ffn,
        vocab,
        max_sequence,
        norm: ours.map_or(NormKind::Rms, |o| o.norm),
        placement: ours.map_or(Placement::Pre, |o| o.placement),
        lns_position: ours.map_or(LnsPosition::AfterNorm, |o| o.lns_position),
        mix_post: ours.map_or(DEFAULT_MIX_POST, |o| o.mix_post),
        layer_scale: DEFAULT_LAYER_SCALE,
        norm_eps: number("rms_norm_eps", raw.rms_norm_eps.unwrap_or(1e-6))?,
        rope_theta: number("rope_theta", rope_theta(&raw, path)?)?,
        tied: raw.tie_word_embeddings.unwrap_or(false),
        init: ours.map_or(InitKind::Normal, |o| o.init),
        init_std: ours.map_or(init_std, |o| o.init_std),
        embedding_std: ours.map_or(init_std, |o| o.embedding_std),
    })
}

/// Names the first key that asks for something this program does not compute.
fn unsupported(raw: &Raw, path: &Path) -> Result<()> {
    let ropes = [("rope_parameters", &raw.rope_parameters), ("rope_scaling", &raw.rope_scaling)];
    let scaled = ropes.iter().find_map(|(key, rope)| {
        let kind = rope.as_ref()?.rope_type.as_deref().filter(|kind| *kind != "default")?;
        Some(format!("{key} asks for \"{kind}\" rope scaling"))
    });
    let partial = [raw.partial_rotary_factor]
        .into_iter()
        .chain(ropes.iter().map(|(_, rope)| rope.as_ref()?.partial_rotary_factor))
        .flatten()
        .find(|factor| *factor != 1.0);
    let activation = raw.hidden_act.as_deref().filter(|act| *act != "silu" && *act != "swish");
    let what = if raw.attention_bias == Some(true) {
        Some("attention_bias is true".to_string())
    } else if raw.mlp_bias == Some(true) {
        Some("mlp_bias is true".to_string())
    } else if let Some(window) = raw.sliding_window {
        Some(format!("sliding_window is {window}"))
    } else if scaled.is_some() {
        scaled
    } else if let Some(factor) = partial {
        Some(format!("partial_rotary_factor is {factor}"))
    } else if let Some(activation) = activation {
        Some(format!("hidden_act is \"{activation}\""))
    } else {
        raw.quantization_config.as_ref().map(|_| "quantization_config: quantized".to_string())
    };
    let remedy = "supported: LLaMA without biases and sliding window, with plain rope, SwiGLU and bf16, f16 \
                  or f32";
    what.map_or(Ok(()), |what| Err(refused(path, what, remedy)))
}

fn rope_theta(raw: &Raw, path: &Path) -> Result<f64> {
    let nested = [&raw.rope_parameters, &raw.rope_scaling];
    let nested = nested.into_iter().flatten().find_map(|rope| rope.rope_theta);
    match (raw.rope_theta, nested) {
        (Some(top), Some(nested)) if top != nested => {
            let what = format!("rope_theta is {top}, and {nested} in rope_parameters");
            let remedy = "transformers 4 and 5 would compute different models: make them equal";
            Err(refused(path, what, remedy))
        }
        (top, nested) => Ok(nested.or(top).unwrap_or(DEFAULT_ROPE_THETA)),
    }
}

fn refused(path: &Path, what: String, remedy: &str) -> Error {
    Error::Checkpoint { path: path.to_path_buf(), what, remedy: remedy.to_string() }
}
