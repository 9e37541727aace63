//! Shards: token ids on disk, memory-mapped.
//!
//! A file is a header, the ids (u16 if all fit, else u32), one record for each document (where its
//! ids and its text end), and a CRC-32 for each block of the two. All numbers are little-endian.
//! Opening reads only the header and compares sizes, so it is instant for any size; a block is
//! checked when it is first read, so no flipped bit reaches a model. A set of shards is written
//! under temporary names, synced, and renamed when all is done: it is there whole or not at all.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::{Pod, Zeroable};
use memmap2::Mmap;

use crate::data::tokenizer::Tokenizer;
use crate::durable::sync_folder;
use crate::{Error, Result};

/// File name extension of shards.
pub const EXTENSION: &str = "tok";

/// Bytes of ids after which a new shard begins.
pub const DEFAULT_SHARD_BYTES: u64 = 1 << 30;

const MAGIC: [u8; 8] = *b"ISOBATH\n";
const VERSION: u32 = 1;

/// Bytes under one checksum. A random row touches one or two blocks: small blocks keep that cheap
/// on a cold disk, and 64 KiB still cost only 4 bytes of checksum.
const BLOCK_BYTES: u64 = 64 << 10;

/// Documents in a shard, so that the writer's memory is bounded whatever their length.
const MOST_DOCUMENTS: usize = 4 << 20;

const HEADER_BYTES: u64 = size_of::<Header>() as u64;
const RECORD_BYTES: u64 = size_of::<Record>() as u64;

/// The first bytes of a shard. `crc` covers all fields before it.
#[derive(Clone, Copy, PartialEq, Debug, Pod, Zeroable)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    /// 2 or 4.
    id_bytes: u32,
    tokens: u64,
    documents: u64,
    /// Bytes of the text that the ids were made of.
    text_bytes: u64,
    /// Every id is below this.
    vocab: u64,
    tokenizer: [u8; 32],
    /// Number of this shard in its set, and the size of the set.
    part: u32,
    parts: u32,
    /// 1 if the first document is the rest of the preceding shard's last one.
    continues: u32,
    /// CRC-32 of the block checksums.
    checksums_crc: u32,
    unused: [u32; 7],
    crc: u32,
}

/// Where a document ends, counted from the shard's beginning.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Record {
    pub tokens: u64,
    pub text_bytes: u64,
}

impl Header {
    fn crc(&self) -> u32 {
        let bytes = bytemuck::bytes_of(self);
        crc32fast::hash(&bytes[..std::mem::offset_of!(Header, crc)])
    }

    /// Bytes under checksums: ids, then records.
    fn payload_bytes(&self) -> Option<u64> {
        let ids = self.tokens.checked_mul(u64::from(self.id_bytes))?;
        ids.checked_add(self.documents.checked_mul(RECORD_BYTES)?)
    }

    fn file_bytes(&self) -> Option<u64> {
        let payload = self.payload_bytes()?;
        payload
            .div_ceil(BLOCK_BYTES)
            .checked_mul(4)?
            .checked_add(payload)?
            .checked_add(HEADER_BYTES)
    }
}

/// One open shard. Reading is `&self` and safe from several threads.
pub struct Shard {
    path: PathBuf,
    header: Header,
    map: Mmap,
    /// One bit for each block: 1 once its checksum was right.
    checked: Vec<AtomicU64>,
}

impl Shard {
    /// Maps `path` and validates its header and size; contents are checked when they are read.
    ///
    /// Errors: a missing file, a file that is no shard or of another version, one cut short.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bad = |what: String, remedy: &str| Error::Data {
            path: path.to_path_buf(),
            what,
            remedy: remedy.into(),
        };
        let file = File::open(path).map_err(Error::io("open the shard", path))?;
        let found = file.metadata().map_err(Error::io("read the size of", path))?.len();
        if found == 0 {
            return Err(bad("the shard is empty".into(), AGAIN));
        }
        // SAFETY: the map is read-only and never handed out; ids are copied out of it. Shards are
        // renamed into place complete, and nothing in this program writes to one afterwards.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map the shard", path))?;
        if !map.starts_with(&MAGIC) {
            return Err(bad(
                "is not a shard of tokens".into(),
                "give .tok files as `isobath data prepare` writes them",
            ));
        }
        let Some(bytes) = map.get(..HEADER_BYTES as usize) else {
            return Err(bad(format!("the shard is cut short: {found} bytes"), AGAIN));
        };
        let header: Header = bytemuck::pod_read_unaligned(bytes);
        if header.version != VERSION {
            return Err(bad(
                format!("the shard has version {}, this program reads {VERSION}", header.version),
                AGAIN,
            ));
        }
        let expected = header.file_bytes();
        if header.crc != header.crc() || !matches!(header.id_bytes, 2 | 4) || expected.is_none() {
            return Err(bad("the shard's header is damaged".into(), AGAIN));
        }
        let expected = expected.unwrap_or_default();
        if found != expected {
            let how = if found < expected { "cut short" } else { "too long" };
            return Err(bad(
                format!("the shard is {how}: {found} bytes, its header says {expected}"),
                AGAIN,
            ));
        }
        let blocks = header.payload_bytes().unwrap_or_default().div_ceil(BLOCK_BYTES);
        let checked = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let shard = Shard { path: path.to_path_buf(), header, map, checked };
        if crc32fast::hash(shard.checksums()) != header.checksums_crc {
            return Err(bad("the shard's checksums are damaged".into(), AGAIN));
        }
        Ok(shard)
    }

    /// Appends the ids of `range` to `out`.
    ///
    /// Errors: a damaged block. Panics if `range` is not within `0..len()`.
    pub fn read(&self, range: Range<u64>, out: &mut Vec<u32>) -> Result<()> {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of {}", self.len());
        let size = u64::from(self.header.id_bytes);
        let bytes = self.payload(range.start * size..range.end * size)?;
        out.reserve(bytes.len() / size as usize);
        match size {
            2 => out.extend(
                bytes.chunks_exact(2).map(|id| u32::from(u16::from_le_bytes([id[0], id[1]]))),
            ),
            _ => out.extend(
                bytes.chunks_exact(4).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])),
            ),
        }
        Ok(())
    }

    /// Checks every block. Errors: the first damaged one, by number.
    pub fn verify(&self) -> Result<()> {
        self.payload(0..self.header.payload_bytes().unwrap_or_default()).map(|_| ())
    }

    /// Number of tokens.
    pub fn len(&self) -> u64 {
        self.header.tokens
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of documents, one that began in the preceding shard included.
    pub fn documents(&self) -> u64 {
        self.header.documents
    }

    /// Tokens of document `index`, its end-of-text token included.
    pub fn document(&self, index: u64) -> Result<Range<u64>> {
        let start = if index == 0 { 0 } else { self.record(index - 1)?.tokens };
        Ok(start..self.record(index)?.tokens)
    }

    /// Bytes of the text that the tokens were made of.
    pub fn text_bytes(&self) -> u64 {
        self.header.text_bytes
    }

    /// Of the tokenizer: [`Tokenizer::fingerprint`].
    pub fn fingerprint(&self) -> [u8; 32] {
        self.header.tokenizer
    }

    /// Every id is below this.
    pub fn vocab(&self) -> usize {
        self.header.vocab as usize
    }

    /// Bytes of an id on disk: 2 or 4.
    pub fn id_bytes(&self) -> u32 {
        self.header.id_bytes
    }

    /// Version of the file's layout.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// Number of this shard in its set, from 0, and the size of the set.
    pub fn part(&self) -> (u32, u32) {
        (self.header.part, self.header.parts)
    }

    /// Whether the first document is the rest of the preceding shard's last one.
    pub fn continues(&self) -> bool {
        self.header.continues == 1
    }

    /// A number that changes with any byte of the contents.
    pub fn content_crc(&self) -> u32 {
        self.header.checksums_crc
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where document `index` ends.
    pub(crate) fn record(&self, index: u64) -> Result<Record> {
        let first = self.header.tokens * u64::from(self.header.id_bytes) + index * RECORD_BYTES;
        Ok(bytemuck::pod_read_unaligned(self.payload(first..first + RECORD_BYTES)?))
    }

    /// Errors unless `tokenizer` made this shard.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<()> {
        if self.fingerprint() == tokenizer.fingerprint() {
            return Ok(());
        }
        Err(Error::Data {
            path: self.path.clone(),
            what: format!(
                "the shard was made with the tokenizer {}, not with {} ({})",
                short(&self.fingerprint()),
                tokenizer.origin().display(),
                short(&tokenizer.fingerprint())
            ),
            remedy: "give the tokenizer.json that lies beside the shards, or prepare them again"
                .into(),
        })
    }

    fn checksums(&self) -> &[u8] {
        let payload = self.header.payload_bytes().unwrap_or_default();
        &self.map[(HEADER_BYTES + payload) as usize..]
    }

    /// Bytes `range` of ids and records, with all blocks that it touches checked.
    fn payload(&self, range: Range<u64>) -> Result<&[u8]> {
        let all = &self.map[HEADER_BYTES as usize..self.map.len() - self.checksums().len()];
        for block in range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES) {
            let (word, bit) = ((block / 64) as usize, 1 << (block % 64));
            if self.checked[word].load(Ordering::Relaxed) & bit != 0 {
                continue;
            }
            let start = (block * BLOCK_BYTES) as usize;
            let end = all.len().min(start + BLOCK_BYTES as usize);
            let stored = &self.checksums()[block as usize * 4..][..4];
            if crc32fast::hash(&all[start..end]).to_le_bytes() != stored {
                return Err(Error::Data {
                    path: self.path.clone(),
                    what: format!(
                        "block {block} of the shard is damaged (bytes {}..{})",
                        HEADER_BYTES as usize + start,
                        HEADER_BYTES as usize + end
                    ),
                    remedy: AGAIN.into(),
                });
            }
            self.checked[word].fetch_or(bit, Ordering::Relaxed);
        }
        Ok(&all[range.start as usize..range.end as usize])
    }
}

const AGAIN: &str = "copy it again from where it came, or prepare it again from the text";

/// The first digits of a fingerprint, for messages.
pub fn short(fingerprint: &[u8; 32]) -> String {
    fingerprint[..6].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// All shards that `path` names: one file, or a folder's `.tok` files in the order of their names.
///
/// Errors: nothing there; a set of which a part is missing.
pub fn open_all(path: &Path) -> Result<Vec<Shard>> {
    if !path.is_dir() {
        return Ok(vec![Shard::open(path)?]);
    }
    let mut paths = vec![];
    for entry in std::fs::read_dir(path).map_err(Error::io("list", path))? {
        let entry = entry.map_err(Error::io("list", path))?.path();
        let hidden = entry.file_name().is_some_and(|name| name.as_encoded_bytes()[0] == b'.');
        if !hidden && entry.extension().is_some_and(|extension| extension == EXTENSION) {
            paths.push(entry);
        }
    }
    paths.sort();
    if paths.is_empty() {
        return Err(Error::Data {
            path: path.to_path_buf(),
            what: "the folder holds no shards (.tok)".into(),
            remedy: "make some with `isobath data prepare`".into(),
        });
    }
    let shards: Vec<Shard> = paths.iter().map(Shard::open).collect::<Result<_>>()?;
    let mut expected = (0, 0);
    for shard in &shards {
        let (part, parts) = shard.part();
        if expected.0 == expected.1 {
            expected = (0, parts);
        }
        if (part, parts) != expected {
            return Err(missing_part(shard.path(), expected));
        }
        expected.0 += 1;
    }
    if let (Some(last), true) = (shards.last(), expected.0 != expected.1) {
        return Err(missing_part(last.path(), expected));
    }
    Ok(shards)
}

fn missing_part(path: &Path, (part, parts): (u32, u32)) -> Error {
    Error::Data {
        path: path.to_path_buf(),
        what: format!("part {part} of {parts} is missing here"),
        remedy: "copy the missing shard into the folder, or prepare the set again".into(),
    }
}

/// Writes a set of shards `NAME-00000.tok`, ... into a folder, in constant memory.
///
/// Nothing has its final name before [`Self::finish`]; dropped earlier, nothing is left.
pub struct ShardWriter {
    folder: PathBuf,
    name: String,
    template: Header,
    most_tokens: u64,
    /// Bytes of text of each id, where they are known one by one.
    id_text_bytes: Option<Vec<u32>>,
    open: Option<OpenShard>,
    /// Headers of what is written, without `parts`.
    closed: Vec<Header>,
    in_document: bool,
}

struct OpenShard {
    file: BufWriter<File>,
    path: PathBuf,
    header: Header,
    records: Vec<Record>,
    checksums: Vec<u8>,
    hasher: crc32fast::Hasher,
    hashed: u64,
}

impl ShardWriter {
    /// `shard_bytes`: bytes of ids after which the next shard begins.
    ///
    /// Errors: a folder that cannot be made; shards of this name that are there already.
    pub fn create(
        folder: impl AsRef<Path>,
        name: &str,
        tokenizer: &Tokenizer,
        shard_bytes: u64,
    ) -> Result<Self> {
        let folder = folder.as_ref().to_path_buf();
        std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let id_bytes = if tokenizer.vocab() <= 1 << 16 { 2 } else { 4 };
        let template = Header {
            magic: MAGIC,
            version: VERSION,
            id_bytes,
            vocab: tokenizer.vocab() as u64,
            tokenizer: tokenizer.fingerprint(),
            ..Header::zeroed()
        };
        let writer = ShardWriter {
            folder,
            name: name.to_string(),
            template,
            most_tokens: (shard_bytes / u64::from(id_bytes)).max(1),
            id_text_bytes: tokenizer.id_bytes().map(<[u32]>::to_vec),
            open: None,
            closed: vec![],
            in_document: false,
        };
        let first = writer.final_path(0);
        if first.exists() {
            return Err(Error::Data {
                path: first,
                what: "is there already".into(),
                remedy: "choose another name or folder, or delete it".into(),
            });
        }
        Ok(writer)
    }

    /// Appends `ids`, made of `text_bytes` bytes of text, to the current document.
    ///
    /// Errors: an id that the tokenizer does not have; a full disk.
    pub fn push(&mut self, ids: &[u32], text_bytes: u64) -> Result<()> {
        if let Some(id) = ids.iter().find(|&&id| u64::from(id) >= self.template.vocab) {
            return Err(Error::Usage {
                what: format!("token {id} is outside the vocabulary of {}", self.template.vocab),
                remedy: "write the shard with the tokenizer that made the tokens".into(),
            });
        }
        let mut rest = ids;
        let mut rest_bytes = text_bytes;
        while !rest.is_empty() {
            let most_tokens = self.most_tokens;
            let room = (most_tokens - self.shard()?.header.tokens) as usize;
            if room == 0 {
                // The document goes on in the next shard.
                self.shard()?.end_document();
                self.close_shard()?;
                self.in_document = true;
                continue;
            }
            let (now, later) = rest.split_at(room.min(rest.len()));
            let bytes = match &self.id_text_bytes {
                _ if later.is_empty() => rest_bytes,
                Some(bytes) => now.iter().map(|&id| u64::from(bytes[id as usize])).sum(),
                // Divided as the tokens are; the sum is exact.
                None => (u128::from(rest_bytes) * now.len() as u128 / rest.len() as u128) as u64,
            }
            .min(rest_bytes);
            let shard = self.shard()?;
            shard.write_ids(now)?;
            shard.header.text_bytes += bytes;
            (rest, rest_bytes) = (later, rest_bytes - bytes);
            self.in_document = true;
        }
        Ok(())
    }

    /// Ends the current document; one without a token is not recorded.
    pub fn end_document(&mut self) -> Result<()> {
        let most_tokens = self.most_tokens;
        self.in_document = false;
        if let Some(shard) = &mut self.open {
            shard.end_document();
            if shard.header.tokens >= most_tokens || shard.records.len() >= MOST_DOCUMENTS {
                self.close_shard()?;
            }
        }
        Ok(())
    }

    /// Syncs all to disk and gives the shards their names, which it returns.
    ///
    /// Errors: nothing was written; a full disk.
    pub fn finish(mut self) -> Result<Vec<PathBuf>> {
        if self.in_document {
            self.end_document()?;
        }
        self.close_shard()?;
        if self.closed.is_empty() {
            return Err(Error::Data {
                path: self.final_path(0),
                what: "there is no text to write a shard of".into(),
                remedy: "give files that are not empty".into(),
            });
        }
        for (part, header) in self.closed.iter().enumerate() {
            let path = self.temporary_path(part);
            let mut header = Header { parts: self.closed.len() as u32, ..*header };
            header.crc = header.crc();
            let write = || {
                let mut file = File::options().write(true).open(&path)?;
                file.write_all(bytemuck::bytes_of(&header))?;
                file.sync_all()
            };
            write().map_err(Error::io("write", &path))?;
        }
        let parts = std::mem::take(&mut self.closed).len();
        for part in (0..parts).rev() {
            let path = self.final_path(part);
            std::fs::rename(self.temporary_path(part), &path)
                .map_err(Error::io("rename", &path))?;
        }
        sync_folder(&self.folder)?;
        Ok((0..parts).map(|part| self.final_path(part)).collect())
    }

    fn final_path(&self, part: usize) -> PathBuf {
        self.folder.join(format!("{}-{part:05}.{EXTENSION}", self.name))
    }

    fn temporary_path(&self, part: usize) -> PathBuf {
        self.folder.join(format!(".{}-{part:05}.{EXTENSION}.partial", self.name))
    }

    fn shard(&mut self) -> Result<&mut OpenShard> {
        let part = self.closed.len();
        let shard = match self.open.take() {
            Some(shard) => shard,
            None => {
                let path = self.temporary_path(part);
                let header = Header {
                    part: part as u32,
                    continues: u32::from(self.in_document && part > 0),
                    ..self.template
                };
                OpenShard::create(path, header)?
            }
        };
        Ok(self.open.insert(shard))
    }

    fn close_shard(&mut self) -> Result<()> {
        if let Some(shard) = &mut self.open {
            self.closed.push(shard.close()?);
            self.open = None;
        }
        Ok(())
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        let written = self.closed.len() + usize::from(self.open.take().is_some());
        for part in 0..written {
            let _ = std::fs::remove_file(self.temporary_path(part));
        }
    }
}

impl OpenShard {
    fn create(path: PathBuf, header: Header) -> Result<Self> {
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&[0; HEADER_BYTES as usize]).map_err(Error::io("write", &path))?;
        Ok(OpenShard {
            file,
            path,
            header,
            records: vec![],
            checksums: vec![],
            hasher: crc32fast::Hasher::new(),
            hashed: 0,
        })
    }

    fn write_ids(&mut self, ids: &[u32]) -> Result<()> {
        self.header.tokens += ids.len() as u64;
        let bytes: Vec<u8> = match self.header.id_bytes {
            2 => ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect(),
            _ => ids.iter().flat_map(|&id| id.to_le_bytes()).collect(),
        };
        self.write(&bytes)
    }

    fn end_document(&mut self) {
        let end = Record { tokens: self.header.tokens, text_bytes: self.header.text_bytes };
        match self.records.last_mut() {
            // No token since the last document: its text, if any, stays with that one.
            Some(last) if last.tokens == end.tokens => last.text_bytes = end.text_bytes,
            None if end.tokens == 0 => {}
            _ => self.records.push(end),
        }
    }

    /// Writes records and checksums, and returns the header but for what the set decides.
    fn close(&mut self) -> Result<Header> {
        let records = std::mem::take(&mut self.records);
        self.header.documents = records.len() as u64;
        self.write(bytemuck::cast_slice(&records))?;
        if !self.hashed.is_multiple_of(BLOCK_BYTES) {
            self.end_block();
        }
        self.header.checksums_crc = crc32fast::hash(&self.checksums);
        self.file.write_all(&self.checksums).map_err(Error::io("write", &self.path))?;
        self.file.flush().map_err(Error::io("write", &self.path))?;
        let file = self.file.get_mut();
        file.seek(SeekFrom::Start(0)).map_err(Error::io("write", &self.path))?;
        file.sync_data().map_err(Error::io("sync", &self.path))?;
        Ok(self.header)
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))?;
        while !bytes.is_empty() {
            let room = BLOCK_BYTES - self.hashed % BLOCK_BYTES;
            let (now, later) = bytes.split_at(bytes.len().min(room as usize));
            self.hasher.update(now);
            self.hashed += now.len() as u64;
            if self.hashed.is_multiple_of(BLOCK_BYTES) {
                self.end_block();
            }
            bytes = later;
        }
        Ok(())
    }

    fn end_block(&mut self) {
        let crc = std::mem::take(&mut self.hasher).finalize();
        self.checksums.extend(crc.to_le_bytes());
    }
}
