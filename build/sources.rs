//! What kernels/ holds: kernel files, the CPU machine's files, and the headers of both.
//!
//! A kernel file is compiled for every architecture of the build, unless its name ends in _sm90,
//! which is sm_90a, or a line of its header comment names what it is for: `// Architectures: sm_90a`
//! (several: `sm_90a, sm_100a`).

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

const MARKER: &str = "// Architectures:";

pub struct Sources {
    /// kernels/*.cu
    pub kernels: Vec<KernelFile>,
    /// kernels/host/*.cpp
    pub machine: Vec<SourceFile>,
    headers: u64,
}

pub struct SourceFile {
    pub stem: String,
    pub path: PathBuf,
    text: String,
}

pub struct KernelFile {
    pub file: SourceFile,
    /// Such as ["90a"]; `None`: all.
    architectures: Option<Vec<String>>,
}

impl Sources {
    pub fn read(root: &Path) -> Result<Self, String> {
        let folder = root.join("kernels");
        let mut headers = DefaultHasher::new();
        for folder in [&folder, &folder.join("device"), &folder.join("host")] {
            for extension in ["cuh", "h"] {
                for header in files(folder, extension)? {
                    header.path.hash(&mut headers);
                    header.text.hash(&mut headers);
                }
            }
        }
        let kernels = files(&folder, "cu")?.into_iter().map(KernelFile::new);
        Ok(Sources {
            kernels: kernels.collect::<Result<_, _>>()?,
            machine: files(&folder.join("host"), "cpp")?,
            headers: headers.finish(),
        })
    }

    /// Changes with everything that the object made of `file` by `command` depends on.
    pub fn fingerprint(&self, file: &SourceFile, command: &[String]) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.headers, &file.text, command).hash(&mut hasher);
        hasher.finish()
    }
}

impl KernelFile {
    /// Those of the build that the file is for.
    pub fn architectures_of<'a>(&self, build: &'a [String]) -> Vec<&'a str> {
        let is_for = |name: &&String| self.architectures.as_ref().is_none_or(|a| a.contains(name));
        build.iter().filter(is_for).map(String::as_str).collect()
    }

    fn new(file: SourceFile) -> Result<Self, String> {
        let header = file.text.lines().take_while(|line| line.starts_with("//"));
        let Some(names) = header.filter_map(|line| line.strip_prefix(MARKER)).next() else {
            let architectures = file.stem.ends_with("_sm90").then(|| vec!["90a".to_string()]);
            return Ok(KernelFile { file, architectures });
        };
        let mut architectures = vec![];
        for name in names.split(',').map(str::trim) {
            let Some(number) = name.strip_prefix("sm_").filter(|number| !number.is_empty()) else {
                return Err(format!(
                    "{}: `{name}` in the line `{MARKER}` is no architecture\n\
                     remedy: write `{MARKER} sm_90a`, several separated by commas",
                    file.path.display()
                ));
            };
            architectures.push(number.to_string());
        }
        Ok(KernelFile { file, architectures: Some(architectures) })
    }
}

/// The folder's files with this extension, by name; none where there is no folder.
fn files(folder: &Path, extension: &str) -> Result<Vec<SourceFile>, String> {
    if !folder.exists() {
        return Ok(vec![]);
    }
    let failed = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
    let mut found = vec![];
    for entry in fs::read_dir(folder).map_err(|error| failed(folder, error))? {
        let path = entry.map_err(|error| failed(folder, error))?.path();
        if path.extension().is_none_or(|found| found != extension) || !path.is_file() {
            continue;
        }
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let stem = stem.ok_or(format!("{}: not a UTF-8 name", path.display()))?.to_string();
        let text = fs::read_to_string(&path).map_err(|error| failed(&path, error))?;
        found.push(SourceFile { stem, path, text });
    }
    found.sort_by(|a, b| a.stem.cmp(&b.stem));
    Ok(found)
}
