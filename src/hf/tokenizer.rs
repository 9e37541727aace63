//! The tokenizer of a folder: tokenizer.json as it is, and the small files that name its special
//! tokens. How text becomes tokens is not decided here.

use serde_json::{Value, json};

/// What a folder needs to know of a tokenizer.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct TokenizerFiles {
    /// The contents of tokenizer.json, copied byte for byte.
    pub json: String,
    /// Id of the token that starts a text, if the model was trained with one.
    pub bos: Option<u32>,
    /// Id of the token that ends a document; generation stops there.
    pub eos: Option<u32>,
}

impl TokenizerFiles {
    /// tokenizer_config.json: `AutoTokenizer` takes the class and the special tokens from it.
    pub(super) fn config(&self, max_sequence: usize) -> Value {
        let parsed: Value = serde_json::from_str(&self.json).unwrap_or_default();
        let text = |id: Option<u32>| id.and_then(|id| token_text(&parsed, id));
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_sequence,
            "clean_up_tokenization_spaces": false,
        });
        for (key, text) in [("bos_token", text(self.bos)), ("eos_token", text(self.eos))] {
            if let Some(text) = text {
                config[key] = text.into();
            }
        }
        config
    }
}

/// The text of a token: special tokens first, then the vocabulary.
fn token_text(tokenizer: &Value, id: u32) -> Option<String> {
    let has_id = |value: &Value| value.as_u64() == Some(id.into());
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let special = added.filter(|token| has_id(&token["id"])).find_map(|t| t["content"].as_str());
    let vocabulary = || {
        let mut entries = tokenizer["model"]["vocab"].as_object().into_iter().flatten();
        entries.find(|(_, value)| has_id(value)).map(|(text, _)| text.as_str())
    };
    special.or_else(vocabulary).map(str::to_string)
}
