//! Tokenizers: text to ids and back.
//!
//! Two kinds: any Hugging Face tokenizer.json, and a built-in one whose ids are the bytes. Text is
//! only text: a special token spelled out in it (`<|endoftext|>`) is encoded as ordinary
//! characters, no start token is added, and a truncation or padding set in the file is ignored,
//! because it would lose text silently. End-of-text tokens are the caller's to add.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    Tokenizer as HuggingFace, Trainer,
};

use crate::data::pretokens::{Part, for_each_part};
use crate::{Error, Result};

/// The end-of-text token of the built-in tokenizers.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// What other tokenizers call it, in the order of preference.
const END_OF_TEXT_NAMES: [&str; 8] = [
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|eos|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<|im_end|>",
];

/// Bytes of text in one encoding call: big enough that the call's own cost vanishes, small enough
/// for the crate's tables (some 60 bytes for a byte of text) to stay in the cache.
pub const PIECE_BYTES: usize = 64 << 10;

/// Bytes that are searched for a place where a cut changes no token, before any place is taken.
const LONGEST_PIECE_BYTES: usize = 16 * PIECE_BYTES;

/// Bytes of preceding text that a piece is encoded with where a cut could change tokens.
const CONTEXT_BYTES: usize = 256;

/// Pre-tokens whose ids a thread remembers: some 10 MB.
const REMEMBERED_WORDS: usize = 100_000;

type WordIds = HashMap<Box<str>, Box<[u32]>>;

thread_local! {
    /// Ids of the pre-tokens that this thread has met, and the instance that made them.
    static WORDS: RefCell<(u64, WordIds)> = RefCell::default();
}

/// Number of the next instance; 0 is none.
static NEXT_INSTANCE: AtomicU64 = AtomicU64::new(1);

pub use crate::config::BYTE_VOCAB;

/// Text to ids and back. Immutable, shared between threads.
pub struct Tokenizer {
    kind: Kind,
    /// Tells this tokenizer's words from another's in a thread's memory.
    instance: u64,
    /// Where it came from, for messages.
    origin: PathBuf,
    /// Canonical tokenizer.json.
    json: String,
    fingerprint: [u8; 32],
    vocab: usize,
    end_of_text: Option<u32>,
    cuts: Cuts,
    /// Bytes of text of each id, if those do not depend on its neighbours; 0 for special tokens.
    id_bytes: Option<Vec<u32>>,
}

enum Kind {
    Bytes,
    HuggingFace(Box<HuggingFace>),
}

/// Where a text can be cut into pieces that are encoded on their own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cuts {
    /// Between any two characters.
    Anywhere,
    /// Between a character and white space: GPT-2's pattern has no pre-token across that.
    BeforeWhitespace,
    /// Before a space, or after a letter at the end of a line, and encoded with some context.
    WithContext,
}

impl Tokenizer {
    /// The built-in tokenizer: the id of byte b is b, and `<|endoftext|>` is 256.
    pub fn bytes() -> Result<Self> {
        let origin = Path::new("bytes");
        let alphabet = byte_alphabet();
        let vocab: [(String, u32); BYTE_VOCAB] = std::array::from_fn(|id| {
            let token = alphabet.get(id).map_or(END_OF_TEXT.to_string(), char::to_string);
            (token, id as u32)
        });
        let model = BPE::builder().vocab_and_merges(vocab, vec![]).build();
        let json = byte_level_json(model.map_err(|error| broken(origin, error))?, origin)?;
        Self::from_json(json.as_bytes(), origin)
    }

    /// `bytes`, or the path of a Hugging Face tokenizer.json.
    ///
    /// Errors: a file that is missing, or that the `tokenizers` crate does not understand.
    pub fn open(spec: &str) -> Result<Self> {
        if spec == "bytes" {
            return Self::bytes();
        }
        let path = Path::new(spec);
        let json = std::fs::read(path).map_err(Error::io("read the tokenizer", path))?;
        Self::from_json(&json, path)
    }

    /// A tokenizer from the contents of a tokenizer.json; `origin` is named in messages.
    pub fn from_json(json: &[u8], origin: &Path) -> Result<Self> {
        let mut inner = HuggingFace::from_bytes(json).map_err(|error| broken(origin, error))?;
        inner.with_truncation(None).map_err(|error| broken(origin, error))?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(true);
        let json = inner.to_string(false).map_err(|error| broken(origin, error))?;
        let layout: Value = serde_json::from_str(&json).map_err(|error| broken(origin, error))?;

        let entries = inner.get_vocab(true);
        let Some(largest) = entries.values().max() else {
            return Err(broken(origin, "its vocabulary is empty"));
        };
        let vocab = *largest as usize + 1;
        let end_of_text = END_OF_TEXT_NAMES.iter().find_map(|name| inner.token_to_id(name));
        let id_bytes = (layout["decoder"]["type"] == "ByteLevel").then(|| id_bytes(&inner, vocab));
        let is_bytes = layout["model"]["type"] == "BPE"
            && layout["model"]["merges"].as_array().is_some_and(Vec::is_empty)
            && layout["normalizer"].is_null()
            && entries.len() == BYTE_VOCAB
            && end_of_text == Some(BYTE_VOCAB as u32 - 1)
            && byte_alphabet()
                .iter()
                .zip(0..)
                .all(|(c, id)| entries.get(&c.to_string()) == Some(&id));
        let cuts = if is_bytes { Cuts::Anywhere } else { cuts(&layout) };
        if let ModelWrapper::BPE(model) = inner.get_model() {
            let mut model = model.clone();
            model.dropout = None; // the same text is the same tokens
            model.resize_cache(REMEMBERED_WORDS);
            inner.with_model(model);
        }
        Ok(Tokenizer {
            instance: NEXT_INSTANCE.fetch_add(1, Ordering::Relaxed),
            kind: if is_bytes { Kind::Bytes } else { Kind::HuggingFace(Box::new(inner)) },
            origin: origin.to_path_buf(),
            fingerprint: Sha256::digest(json.as_bytes()).into(),
            json,
            vocab,
            end_of_text,
            cuts,
            id_bytes,
        })
    }

    /// Trains a byte-level BPE (GPT-2's pattern) of `vocab` entries: `<|endoftext|>` is 0, the 256
    /// bytes follow, then the merges. The same texts give the same tokenizer. Texts too small for
    /// so many merges give a smaller vocabulary. All cores work; long texts are cut for that.
    ///
    /// Errors: `vocab` below 257; no text.
    pub fn train<S: AsRef<str> + Send>(
        texts: impl IntoIterator<Item = S, IntoIter: Send>,
        vocab: usize,
    ) -> Result<Self> {
        let name = format!("train:{vocab}");
        let origin = Path::new(&name);
        check_trainable(vocab)?;
        let mut trainer = BpeTrainer::builder()
            .vocab_size(vocab)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let pattern = ByteLevel::default().add_prefix_space(false);
        let alphabet = byte_alphabet();
        let words = |piece: &str| {
            let mut words = vec![];
            for_each_part(piece, |part| match part {
                Part::Word(word) => {
                    words.push(word.bytes().map(|byte| alphabet[usize::from(byte)]).collect());
                    Ok(())
                }
                Part::Unsplit(text) => {
                    let mut split = PreTokenizedString::from(text);
                    pattern.pre_tokenize(&mut split)?;
                    let found = split.get_splits(OffsetReferential::Original, OffsetType::None);
                    words.extend(found.into_iter().map(|(word, _, _)| word.to_string()));
                    Ok::<_, tokenizers::Error>(())
                }
            })?;
            Ok(words)
        };
        let pieces = texts.into_iter().flat_map(|text| {
            let text = text.as_ref();
            pieces(text, Cuts::BeforeWhitespace)
                .into_iter()
                .map(|piece| text[piece].to_string())
                .collect::<Vec<_>>()
        });
        trainer.feed(pieces, words).map_err(|error| broken(origin, error))?;
        if trainer.get_word_count() == 0 {
            return Err(Error::Usage {
                what: "there is no text to train a tokenizer on".into(),
                remedy: "give files that are not empty".into(),
            });
        }
        let mut model = BPE::default();
        trainer.train(&mut model).map_err(|error| broken(origin, error))?;
        Self::from_json(byte_level_json(model, origin)?.as_bytes(), origin)
    }

    /// Ids of `text`, without an end-of-text token. One call on one core: see
    /// [`Self::encode_long`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match &self.kind {
            Kind::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Kind::HuggingFace(inner) if self.cuts == Cuts::BeforeWhitespace => {
                self.encode_words(inner, text)
            }
            Kind::HuggingFace(inner) => self.encode_whole(inner, text),
        }
    }

    fn encode_whole(&self, inner: &HuggingFace, text: &str) -> Result<Vec<u32>> {
        let encoding =
            inner.encode_fast(text, false).map_err(|error| broken(&self.origin, error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The same ids as [`Self::encode_whole`], several times faster: a pre-token that this thread
    /// has met costs one look-up, and the crate's offset bookkeeping is left out.
    fn encode_words(&self, inner: &HuggingFace, text: &str) -> Result<Vec<u32>> {
        WORDS.with_borrow_mut(|(instance, words)| {
            if *instance != self.instance {
                *instance = self.instance;
                words.clear();
            }
            let mut ids = Vec::with_capacity(text.len() / 3);
            for_each_part(text, |part| {
                let (Part::Word(part) | Part::Unsplit(part)) = part;
                if let Some(known) = words.get(part) {
                    ids.extend_from_slice(known);
                    return Ok(());
                }
                let fresh = self.encode_whole(inner, part)?;
                ids.extend_from_slice(&fresh);
                if words.len() < REMEMBERED_WORDS && part.len() <= 64 {
                    words.insert(part.into(), fresh.into());
                }
                Ok(())
            })?;
            Ok(ids)
        })
    }

    /// As [`Self::encode`], for a text of any length and on all cores.
    pub fn encode_long(&self, text: &str) -> Result<Vec<u32>> {
        let pieces: Vec<Vec<u32>> = pieces(text, self.cuts)
            .into_par_iter()
            .map(|piece| self.encode_after(self.context(&text[..piece.start]), &text[piece]))
            .collect::<Result<_>>()?;
        Ok(pieces.concat())
    }

    /// Ids of `text` where it stands right after `context`, the end of the same document. Without
    /// effect for tokenizers whose pieces do not depend on what precedes them.
    pub fn encode_after(&self, context: &str, text: &str) -> Result<Vec<u32>> {
        if context.is_empty() || self.cuts != Cuts::WithContext {
            return self.encode(text);
        }
        let before = self.encode(context)?;
        let both = self.encode(&[context, text].concat())?;
        match both.strip_prefix(before.as_slice()) {
            Some(ids) => Ok(ids.to_vec()),
            // A token lies across the cut, so the preceding piece has already spent its first half.
            None => self.encode(text),
        }
    }

    /// The end of `preceding` that the piece after it has to be encoded with.
    pub fn context<'a>(&self, preceding: &'a str) -> &'a str {
        match self.cuts {
            Cuts::Anywhere | Cuts::BeforeWhitespace => "",
            Cuts::WithContext => {
                let start = preceding.len().saturating_sub(CONTEXT_BYTES);
                &preceding[preceding.ceil_char_boundary(start)..]
            }
        }
    }

    /// Where `text` may be cut so that its first part, at least one piece long if there is that
    /// much, is encoded as it would be in the whole; `None` if more text is needed to say.
    pub fn cut(&self, text: &str) -> Option<usize> {
        cut(text, self.cuts)
    }

    /// Text of `ids`; bytes that are no UTF-8 become U+FFFD. Special tokens are spelled out.
    ///
    /// Errors: an id that the tokenizer does not have.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        match &self.kind {
            Kind::Bytes => {
                let mut text = Vec::with_capacity(ids.len());
                for &id in ids {
                    match u8::try_from(id) {
                        Ok(byte) => text.push(byte),
                        Err(_) if Some(id) == self.end_of_text => text.extend(END_OF_TEXT.bytes()),
                        Err(_) => return Err(self.unknown_id(id)),
                    }
                }
                Ok(String::from_utf8_lossy(&text).into_owned())
            }
            Kind::HuggingFace(inner) => {
                if let Some(&id) = ids.iter().find(|&&id| inner.id_to_token(id).is_none()) {
                    return Err(self.unknown_id(id));
                }
                inner.decode(ids, false).map_err(|error| broken(&self.origin, error))
            }
        }
    }

    /// Decodes ids one by one, for text that is shown while it is generated.
    pub fn stream(&self) -> Stream<'_> {
        Stream { tokenizer: self, window: vec![], shown_ids: 0, shown_text: String::new() }
    }

    /// Bytes of text that `ids` stand for; special tokens have none.
    pub fn text_bytes(&self, ids: &[u32]) -> Result<u64> {
        match (&self.id_bytes, &self.kind) {
            (Some(bytes), _) => ids
                .iter()
                .map(|&id| match bytes.get(id as usize) {
                    Some(&bytes) => Ok(u64::from(bytes)),
                    None => Err(self.unknown_id(id)),
                })
                .sum(),
            (None, Kind::HuggingFace(inner)) => {
                let text = inner.decode(ids, true).map_err(|error| broken(&self.origin, error))?;
                Ok(text.len() as u64)
            }
            (None, Kind::Bytes) => Ok(ids.iter().filter(|&&id| id < 256).count() as u64),
        }
    }

    /// Bytes of text of each id, if those do not depend on its neighbours.
    pub(crate) fn id_bytes(&self) -> Option<&[u32]> {
        self.id_bytes.as_deref()
    }

    /// Size of the id space: the largest id and one.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// The id that ends a document; `None` if the tokenizer has no token by a known name.
    pub fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }

    /// The id that tokenizer.json has put before every text, as Llama's do; [`Self::encode`] leaves
    /// it out.
    pub fn start_of_text(&self) -> Result<Option<u32>> {
        let Kind::HuggingFace(inner) = &self.kind else { return Ok(None) };
        let text = "a";
        let marked = inner.encode_fast(text, true).map_err(|error| broken(&self.origin, error))?;
        let plain = self.encode(text)?;
        Ok(match marked.get_ids() {
            [first, rest @ ..] if rest.starts_with(&plain) => Some(*first),
            _ => None,
        })
    }

    /// SHA-256 of [`Self::json`]: shards and checkpoints carry it.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// The canonical tokenizer.json, which Hugging Face's libraries read. It reads back as a
    /// tokenizer of the same fingerprint.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// Where it came from: a path, `bytes`, or `train:N`.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    fn unknown_id(&self, id: u32) -> Error {
        Error::Data {
            path: self.origin.clone(),
            what: format!("there is no token {id}; the tokenizer has {} ids", self.vocab),
            remedy: "use the tokenizer that the tokens were made with".into(),
        }
    }
}

/// Ids in, complete text out; see [`Tokenizer::stream`].
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    /// The last ids shown, which the decoder may need as context, then those not yet shown.
    window: Vec<u32>,
    shown_ids: usize,
    /// Text of `window[..shown_ids]`.
    shown_text: String,
}

impl Stream<'_> {
    /// Takes one id and returns the text that is now certain: empty while a character is
    /// unfinished.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.window.push(id);
        // A character has at most four bytes: four ids without one are bytes that are no UTF-8.
        let unfinished = self.window.len() - self.shown_ids < 4;
        self.show(unfinished)
    }

    /// The rest, when no more ids come.
    pub fn finish(mut self) -> Result<String> {
        self.show(false)
    }

    fn show(&mut self, may_wait: bool) -> Result<String> {
        if self.window.len() == self.shown_ids {
            return Ok(String::new());
        }
        let text = self.tokenizer.decode(&self.window)?;
        if may_wait && text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        // A character shown before it was complete may read differently now.
        let same = text.chars().zip(self.shown_text.chars()).take_while(|(a, b)| a == b);
        let same_bytes: usize = same.map(|(a, _)| a.len_utf8()).sum();
        let fresh = text[same_bytes..].to_string();
        self.window.drain(..self.shown_ids);
        self.shown_ids = self.window.len();
        self.shown_text = self.tokenizer.decode(&self.window)?;
        Ok(fresh)
    }
}

/// The character that byte-level tokenizers write for each byte (GPT-2, `bytes_to_unicode`).
fn byte_alphabet() -> [char; 256] {
    let mut next = 256u32;
    std::array::from_fn(|byte| match byte as u8 {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => byte as u8 as char,
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    })
}

fn byte_level_json(model: BPE, origin: &Path) -> Result<String> {
    let mut tokenizer = HuggingFace::new(model);
    let byte_level = ByteLevel::default().add_prefix_space(false);
    tokenizer.with_pre_tokenizer(Some(byte_level));
    tokenizer.with_decoder(Some(byte_level));
    tokenizer
        .add_special_tokens([AddedToken::from(END_OF_TEXT, true)])
        .map_err(|error| broken(origin, error))?;
    tokenizer.to_string(false).map_err(|error| broken(origin, error))
}

/// Bytes of text of each id under a ByteLevel decoder: one for each character of the token.
fn id_bytes(tokenizer: &HuggingFace, vocab: usize) -> Vec<u32> {
    let added: BTreeMap<u32, AddedToken> =
        tokenizer.get_added_tokens_decoder().into_iter().collect();
    (0..vocab as u32)
        .map(|id| match added.get(&id) {
            Some(token) if token.special => 0,
            Some(token) => token.content.len() as u32,
            None => tokenizer.id_to_token(id).map_or(0, |token| token.chars().count() as u32),
        })
        .collect()
}

/// What the layout allows: GPT-2's own, in which special tokens are the only added ones, is known;
/// anything else is treated as depending on context.
fn cuts(layout: &Value) -> Cuts {
    let pre_tokenizer = &layout["pre_tokenizer"];
    let plain_byte_level = pre_tokenizer["type"] == "ByteLevel"
        && pre_tokenizer["add_prefix_space"] == false
        && pre_tokenizer["use_regex"] == true;
    let added_are_special = layout["added_tokens"]
        .as_array()
        .is_none_or(|tokens| tokens.iter().all(|token| token["special"] == true));
    if plain_byte_level && layout["normalizer"].is_null() && added_are_special {
        Cuts::BeforeWhitespace
    } else {
        Cuts::WithContext
    }
}

fn pieces(text: &str, cuts: Cuts) -> Vec<std::ops::Range<usize>> {
    let mut pieces = vec![];
    let mut start = 0;
    while start < text.len() {
        let length = cut(&text[start..], cuts).unwrap_or(text.len() - start);
        pieces.push(start..start + length);
        start += length;
    }
    pieces
}

/// Where a long text may be cut so that its words stay whole, for training; `None`: not yet.
pub(crate) fn cut_between_words(text: &str) -> Option<usize> {
    cut(text, Cuts::BeforeWhitespace)
}

fn cut(text: &str, cuts: Cuts) -> Option<usize> {
    if text.len() <= PIECE_BYTES {
        return None;
    }
    let first = text.floor_char_boundary(PIECE_BYTES);
    if cuts == Cuts::Anywhere {
        return Some(first);
    }
    let last = text.floor_char_boundary(LONGEST_PIECE_BYTES.min(text.len()));
    let mut previous = text[..first].chars().next_back()?;
    for (offset, character) in text[first..last].char_indices() {
        let allowed = match cuts {
            Cuts::Anywhere => true,
            Cuts::BeforeWhitespace => !previous.is_whitespace() && character.is_whitespace(),
            Cuts::WithContext => match character {
                ' ' => !previous.is_whitespace(),
                '\n' => previous.is_ascii_alphanumeric(),
                _ => false,
            },
        };
        if allowed {
            return Some(first + offset);
        }
        previous = character;
    }
    (text.len() >= LONGEST_PIECE_BYTES).then_some(last)
}

/// Errors for a vocabulary that [`Tokenizer::train`] cannot make.
pub(crate) fn check_trainable(vocab: usize) -> Result<()> {
    if vocab >= BYTE_VOCAB {
        return Ok(());
    }
    Err(Error::Usage {
        what: format!("a byte-level tokenizer of {vocab} entries does not exist"),
        remedy: format!("ask for at least {BYTE_VOCAB}: 256 bytes and {END_OF_TEXT}"),
    })
}

fn broken(origin: &Path, error: impl std::fmt::Display) -> Error {
    Error::Data {
        path: origin.to_path_buf(),
        what: format!("cannot be used as a tokenizer: {error}"),
        remedy: "give `bytes`, or a tokenizer.json as Hugging Face's tokenizers library writes it"
            .into(),
    }
}
