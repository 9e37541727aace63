//! Files that are on disk when a function returns.
//!
//! `fsync` of a file does not make its name durable: the folder that holds it must be synced too,
//! which [`sync_folder`] does. What is written through [`HashedFile`] is counted and hashed on
//! the way, so that nothing is read back. Nothing here knows what the bytes mean.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Bytes of one write and one read.
pub const CHUNK_BYTES: usize = 1 << 20;

/// Size and hash of a file's contents.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Fingerprint {
    pub bytes: u64,
    /// 64 hexadecimal digits.
    pub sha256: String,
}

impl Fingerprint {
    /// Of a file, read to its end.
    pub fn of_file(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        let (mut hash, mut bytes, mut chunk) = (Sha256::new(), 0, vec![0; CHUNK_BYTES]);
        loop {
            match file.read(&mut chunk) {
                Ok(0) => return Ok(Fingerprint { bytes, sha256: hexadecimal(hash) }),
                Ok(n) => {
                    hash.update(&chunk[..n]);
                    bytes += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("read", path)(e)),
            }
        }
    }
}

/// The digest as 64 hexadecimal digits.
pub fn hexadecimal(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A new file that is hashed while it is written.
pub struct HashedFile {
    path: PathBuf,
    inner: BufWriter<Hashing>,
}

struct Hashing {
    file: File,
    hash: Sha256,
    bytes: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl HashedFile {
    /// The file must not exist yet. Its mode is 0644, less what the umask takes away.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create_new(path).map_err(Error::io("create", path))?;
        let hashing = Hashing { file, hash: Sha256::new(), bytes: 0 };
        let inner = BufWriter::with_capacity(CHUNK_BYTES, hashing);
        Ok(HashedFile { path: path.to_path_buf(), inner })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.inner.write_all(bytes).map_err(Error::io("write", &self.path))
    }

    /// Returns when the contents are on disk.
    pub fn finish(mut self) -> Result<Fingerprint> {
        self.inner.flush().map_err(Error::io("write", &self.path))?;
        let Hashing { file, hash, bytes } = self.inner.get_ref();
        file.sync_all().map_err(Error::io("sync", &self.path))?;
        Ok(Fingerprint { bytes: *bytes, sha256: hexadecimal(hash.clone()) })
    }
}

/// Writes a new small file; returns when its contents are on disk.
pub fn write_new(path: &Path, contents: &[u8]) -> Result<Fingerprint> {
    let mut file = HashedFile::create(path)?;
    file.write(contents)?;
    file.finish()
}

/// What the names of [`replace`]'s temporary files begin with, before the name of the file.
pub const TEMPORARY: &str = ".tmp-";

/// Writes a file, or replaces it, as a whole: after a crash it holds the old contents or the new
/// ones. Several processes may do so at one time; the last one's contents stay. The mode is that
/// of the file that was there, else 0644, less what the umask takes away.
pub fn replace(path: &Path, contents: &[u8]) -> Result<()> {
    let folder = folder_of(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mode = fs::metadata(path).map_or(0o644, |there| there.permissions().mode());
    let mut temporary = tempfile::Builder::new()
        .prefix(&format!("{TEMPORARY}{name}-"))
        .permissions(PermissionsExt::from_mode(mode))
        .tempfile_in(folder)
        .map_err(Error::io("create a file in", folder))?;
    temporary.write_all(contents).map_err(Error::io("write", path))?;
    temporary.as_file().sync_all().map_err(Error::io("sync", path))?;
    temporary.persist(path).map_err(|error| Error::io("replace", path)(error.error))?;
    sync_folder(folder)
}

/// The folder that a file lies in.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Makes the names in a folder durable.
pub fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io("sync", folder))
}

/// Removes a file or a folder with all it holds; one that is not there is no error.
pub fn remove_if_present(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}
