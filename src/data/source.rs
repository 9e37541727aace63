//! Shards, or tokens in memory, as one stream of tokens and documents.
//!
//! A source is cheap to clone and may show only a range of the stream, so that training and
//! held-out tokens can lie in the same shards.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::data::shard::{Record, Shard};
use crate::data::tokenizer::Tokenizer;
use crate::{Error, Result};

/// One stream of tokens, made of segments in order.
#[derive(Clone)]
pub struct TokenSource {
    segments: Arc<Vec<Segment>>,
    tokens: u64,
    documents: u64,
    text_bytes: u64,
    end_of_text: Option<u32>,
}

/// A range of one shard or of one allocation.
#[derive(Clone)]
struct Segment {
    store: Store,
    /// Tokens within the store.
    range: Range<u64>,
    /// Documents within the store that have a token in `range`.
    documents: Range<u64>,
    /// Place of the first token in the stream.
    first_token: u64,
    /// Place of the first document in the stream. If the document is the rest of the preceding
    /// segment's last one, that one's place.
    first_document: u64,
}

#[derive(Clone)]
enum Store {
    Shard(Arc<Shard>),
    Memory(Arc<Memory>),
}

struct Memory {
    tokens: Vec<u32>,
    records: Vec<Record>,
}

impl Store {
    fn tokens(&self) -> u64 {
        match self {
            Store::Shard(shard) => shard.len(),
            Store::Memory(memory) => memory.tokens.len() as u64,
        }
    }

    fn documents(&self) -> u64 {
        match self {
            Store::Shard(shard) => shard.documents(),
            Store::Memory(memory) => memory.records.len() as u64,
        }
    }

    fn record(&self, index: u64) -> Result<Record> {
        match self {
            Store::Shard(shard) => shard.record(index),
            Store::Memory(memory) => Ok(memory.records[index as usize]),
        }
    }

    /// Where document `index` begins.
    fn begin(&self, index: u64) -> Result<Record> {
        if index == 0 { Ok(Record::default()) } else { self.record(index - 1) }
    }

    fn read(&self, range: Range<u64>, out: &mut Vec<u32>) -> Result<()> {
        match self {
            Store::Shard(shard) => shard.read(range, out),
            Store::Memory(memory) => {
                out.extend_from_slice(&memory.tokens[range.start as usize..range.end as usize]);
                Ok(())
            }
        }
    }

    fn continues(&self) -> bool {
        matches!(self, Store::Shard(shard) if shard.continues())
    }

    /// Number of documents that end at or before `token`.
    fn documents_until(&self, token: u64) -> Result<u64> {
        let (mut low, mut high) = (0, self.documents());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.record(middle)?.tokens <= token {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }
}

impl TokenSource {
    /// All tokens of `shards`, in order. `tokenizer` must be the one that made them.
    ///
    /// Errors: no shards; shards of another tokenizer.
    pub fn from_shards(shards: Vec<Shard>, tokenizer: &Tokenizer) -> Result<Self> {
        for shard in &shards {
            shard.check_tokenizer(tokenizer)?;
        }
        let mut parts = vec![];
        for shard in shards {
            let store = Store::Shard(Arc::new(shard));
            parts.push((store.clone(), 0..store.tokens()));
        }
        Self::assemble(parts, tokenizer)
    }

    /// Documents in memory: tokens, and the bytes of text that they were made of.
    ///
    /// Errors: ids that `tokenizer` does not have.
    pub fn from_documents(documents: Vec<(Vec<u32>, u64)>, tokenizer: &Tokenizer) -> Result<Self> {
        let mut memory = Memory { tokens: vec![], records: vec![] };
        let mut text_bytes = 0;
        for (tokens, bytes) in documents {
            memory.tokens.extend(tokens);
            text_bytes += bytes;
            let end = Record { tokens: memory.tokens.len() as u64, text_bytes };
            match memory.records.last_mut() {
                Some(last) if last.tokens == end.tokens => *last = end,
                None if end.tokens == 0 => {}
                _ => memory.records.push(end),
            }
        }
        if let Some(id) = memory.tokens.iter().find(|&&id| id as usize >= tokenizer.vocab()) {
            return Err(Error::Usage {
                what: format!("token {id} is outside the vocabulary of {}", tokenizer.vocab()),
                remedy: "give the tokenizer that made the tokens".into(),
            });
        }
        let store = Store::Memory(Arc::new(memory));
        let range = 0..store.tokens();
        Self::assemble(vec![(store, range)], tokenizer)
    }

    /// Tokens in memory as one document.
    pub fn from_tokens(tokens: Vec<u32>, tokenizer: &Tokenizer) -> Result<Self> {
        let text_bytes = tokenizer.text_bytes(&tokens)?;
        Self::from_documents(vec![(tokens, text_bytes)], tokenizer)
    }

    /// Only the tokens `range` of this source. A document that is cut keeps what is inside.
    ///
    /// Errors: a damaged shard. Panics if `range` is not within `0..tokens()`.
    pub fn slice(&self, range: Range<u64>, tokenizer: &Tokenizer) -> Result<Self> {
        assert!(range.start <= range.end && range.end <= self.tokens);
        let mut parts = vec![];
        for segment in self.segments.iter() {
            let length = segment.range.end - segment.range.start;
            let start = range.start.clamp(segment.first_token, segment.first_token + length);
            let end = range.end.clamp(segment.first_token, segment.first_token + length);
            if start < end {
                let shift = |token| token - segment.first_token + segment.range.start;
                parts.push((segment.store.clone(), shift(start)..shift(end)));
            }
        }
        Self::assemble(parts, tokenizer)
    }

    fn assemble(parts: Vec<(Store, Range<u64>)>, tokenizer: &Tokenizer) -> Result<Self> {
        let (mut tokens, mut documents, mut text_bytes) = (0, 0, 0);
        let mut segments: Vec<Segment> = vec![];
        for (store, range) in parts.into_iter().filter(|(_, range)| !range.is_empty()) {
            let first = store.documents_until(range.start)?;
            let last = store.documents_until(range.end - 1)?; // the document of the last token
            let joins = range.start == 0 && store.continues() && !segments.is_empty();
            let first_document = documents - u64::from(joins);
            text_bytes += bytes_until(&store, last, range.end, tokenizer)?
                - bytes_until(&store, first, range.start, tokenizer)?;
            segments.push(Segment {
                documents: first..last + 1,
                first_token: tokens,
                first_document,
                store,
                range: range.clone(),
            });
            tokens += range.end - range.start;
            documents = first_document + (last + 1 - first);
        }
        Ok(TokenSource {
            segments: Arc::new(segments),
            tokens,
            documents,
            text_bytes,
            end_of_text: tokenizer.end_of_text(),
        })
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Number of documents that have a token here.
    pub fn documents(&self) -> u64 {
        self.documents
    }

    /// Bytes of the text that the tokens stand for; exact for byte-level tokenizers, also where a
    /// document is cut.
    pub fn text_bytes(&self) -> u64 {
        self.text_bytes
    }

    /// The id that ends documents, if the tokenizer has one.
    pub fn end_of_text(&self) -> Option<u32> {
        self.end_of_text
    }

    /// Appends the tokens `range` of the stream to `out`.
    ///
    /// Errors: a damaged shard. Panics if `range` is not within `0..tokens()`.
    pub fn read(&self, range: Range<u64>, out: &mut Vec<u32>) -> Result<()> {
        assert!(range.start <= range.end && range.end <= self.tokens);
        let mut at = range.start;
        let mut index = self.segments.partition_point(|segment| segment.first_token <= at);
        while at < range.end {
            let segment = &self.segments[index - 1];
            let start = at - segment.first_token + segment.range.start;
            let end = segment.range.end.min(start + range.end - at);
            segment.store.read(start..end, out)?;
            at += end - start;
            index += 1;
        }
        Ok(())
    }

    /// Appends for each token of `range` where its document begins in the range: 0 if it begins at
    /// or before the first token.
    ///
    /// Errors: a damaged shard. Panics if `range` is not within `0..tokens()`.
    pub fn document_starts(&self, range: Range<u64>, out: &mut Vec<i32>) -> Result<()> {
        assert!(range.start <= range.end && range.end <= self.tokens);
        let Some(mut index) = self.document_of(range.start)? else { return Ok(()) };
        let mut at = range.start;
        while at < range.end {
            let document = self.document(index)?;
            let start = document.start.saturating_sub(range.start) as i32;
            let end = document.end.min(range.end);
            out.extend(std::iter::repeat_n(start, (end - at) as usize));
            at = end;
            index += 1;
        }
        Ok(())
    }

    /// Tokens of document `index` of the stream.
    ///
    /// Errors: a damaged shard. Panics if there are not so many.
    pub fn document(&self, index: u64) -> Result<Range<u64>> {
        assert!(index < self.documents, "document {index} of {}", self.documents);
        // The first segment that holds it: the preceding one may end with its beginning.
        let after = self.segments.partition_point(|segment| segment.first_document <= index);
        let mut first = after - 1;
        while first > 0 && self.last_document(first - 1) == index {
            first -= 1;
        }
        let segment = &self.segments[first];
        let local = segment.documents.start + index - segment.first_document;
        let start = segment.store.begin(local)?.tokens.max(segment.range.start);
        let mut last = first;
        while last + 1 < self.segments.len() && self.segments[last + 1].first_document == index {
            last += 1;
        }
        let end_segment = &self.segments[last];
        let local = end_segment.documents.start + index - end_segment.first_document;
        let end = end_segment.store.record(local)?.tokens.min(end_segment.range.end);
        Ok(segment.first_token + start - segment.range.start
            ..end_segment.first_token + end - end_segment.range.start)
    }

    /// The document end nearest to `token`, if there is one within `distance` that leaves tokens
    /// on both sides.
    pub fn boundary_near(&self, token: u64, distance: u64) -> Result<Option<u64>> {
        let Some(at) = self.document_of(token)? else { return Ok(None) };
        let range = self.document(at)?;
        Ok([range.start, range.end]
            .into_iter()
            .filter(|&end| end > 0 && end < self.tokens && end.abs_diff(token) <= distance)
            .min_by_key(|end| end.abs_diff(token)))
    }

    fn document_of(&self, token: u64) -> Result<Option<u64>> {
        let index = self.segments.partition_point(|segment| segment.first_token <= token);
        if token >= self.tokens || index == 0 {
            return Ok(None);
        }
        let segment = &self.segments[index - 1];
        let local = token - segment.first_token + segment.range.start;
        let document = segment.store.documents_until(local)?;
        Ok(Some(segment.first_document + document - segment.documents.start))
    }

    fn last_document(&self, segment: usize) -> u64 {
        let segment = &self.segments[segment];
        segment.first_document + (segment.documents.end - segment.documents.start) - 1
    }

    /// Tells this source from any other: a number from its contents and range.
    pub fn identity(&self) -> u64 {
        let mut low = crc32fast::Hasher::new();
        let mut high = crc32fast::Hasher::new();
        high.update(b"sizes");
        for segment in self.segments.iter() {
            match &segment.store {
                Store::Shard(shard) => low.update(&shard.content_crc().to_le_bytes()),
                Store::Memory(memory) => low.update(bytemuck::cast_slice(&memory.tokens)),
            }
            for number in [segment.range.start, segment.range.end, segment.documents.end] {
                high.update(&number.to_le_bytes());
            }
        }
        u64::from(high.finalize()) << 32 | u64::from(low.finalize())
    }

    /// The first file of the source, for messages.
    pub(crate) fn origin(&self) -> &Path {
        match self.segments.first().map(|segment| &segment.store) {
            Some(Store::Shard(shard)) => shard.path(),
            _ => Path::new("the text"),
        }
    }
}

/// Bytes of text before token `at`, which lies in `document` or at its end.
fn bytes_until(store: &Store, document: u64, at: u64, tokenizer: &Tokenizer) -> Result<u64> {
    const CHUNK: u64 = 1 << 16;
    let begin = store.begin(document)?;
    if at == begin.tokens {
        return Ok(begin.text_bytes);
    }
    let end = store.record(document)?;
    if at == end.tokens {
        return Ok(end.text_bytes);
    }
    let mut bytes = begin.text_bytes;
    let mut ids = vec![];
    for start in (begin.tokens..at).step_by(CHUNK as usize) {
        ids.clear();
        store.read(start..at.min(start + CHUNK), &mut ids)?;
        bytes += tokenizer.text_bytes(&ids)?;
    }
    Ok(bytes.min(end.text_bytes))
}
