//! The commit that a build is of, for what a run records about itself.
//!
//! For the crate, where they are known: ISOBATH_COMMIT, forty hexadecimal digits, and
//! ISOBATH_COMMIT_CHANGED, "true" where a file that the build is made of differs from it. Without
//! git, or outside of a checkout of this project, neither is set and nothing fails.

use std::path::Path;
use std::process::{Command, Stdio};

/// What a build is made of.
const MADE_OF: [&str; 7] =
    ["src", "kernels", "build", "build.rs", "assets", "Cargo.toml", "Cargo.lock"];

/// Tells cargo the commit, and when to ask again: when HEAD moves, and when the sources change.
/// Then the crate is compiled again in any case, but for a commit of what was built before.
pub fn tell(root: &Path) {
    let Some(top) = git(root, &["rev-parse", "--show-toplevel"]) else { return };
    // A copy of this project inside another's repository is not of that one's commit.
    if Path::new(&top).canonicalize().ok() != root.canonicalize().ok() {
        return;
    }
    let Some(commit) = git(root, &["rev-parse", "HEAD"]) else { return };
    let mut status = vec!["status", "--porcelain", "--"];
    status.extend(MADE_OF);
    let Some(changes) = git(root, &status) else { return };
    println!("cargo::rustc-env=ISOBATH_COMMIT={commit}");
    println!("cargo::rustc-env=ISOBATH_COMMIT_CHANGED={}", !changes.is_empty());
    for source in MADE_OF {
        println!("cargo::rerun-if-changed={source}");
    }
    // The log of HEAD grows with every commit, checkout and reset. Cargo runs a build script every
    // time if a file that it names is missing.
    for moved in ["logs/HEAD", "HEAD"] {
        if let Some(path) = git(root, &["rev-parse", "--git-path", moved])
            && root.join(&path).exists()
        {
            println!("cargo::rerun-if-changed={path}");
        }
    }
}

/// What git says, without its line end; `None` where it fails or is not there.
fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("git");
    command.arg("--no-optional-locks").arg("-C").arg(root).args(arguments);
    let done = command.stdin(Stdio::null()).output().ok()?;
    let said = String::from_utf8(done.stdout).ok()?;
    done.status.success().then(|| said.trim_end().to_string())
}
