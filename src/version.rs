//! Which program this is: its version, and the commit that it was built from (build/commit.rs).

use serde::{Deserialize, Serialize};

/// A program, as a run records it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Program {
    pub version: String,
    /// Forty hexadecimal digits; `None` for a build outside of a git checkout.
    pub commit: Option<String>,
    /// Whether the sources differed from the commit.
    pub changed: Option<bool>,
}

impl Program {
    /// The one that runs.
    pub fn this() -> Self {
        Program {
            version: env!("CARGO_PKG_VERSION").to_string(),
            commit: option_env!("ISOBATH_COMMIT").map(str::to_string),
            changed: option_env!("ISOBATH_COMMIT_CHANGED").map(|changed| changed == "true"),
        }
    }

    /// Twelve digits of the commit, "with changes" where there were some; `None` if not recorded.
    pub fn commit_words(&self) -> Option<String> {
        let short: String = self.commit.as_ref()?.chars().take(12).collect();
        let changed = self.changed == Some(true);
        Some(if changed { format!("{short} with changes") } else { short })
    }
}
