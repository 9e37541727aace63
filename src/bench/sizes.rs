//! Which sizes cannot be timed at all.

use crate::error::{Error, Result};

/// Elements of the largest buffer that is tried: 16 Ti. Below it nothing that is counted overflows.
const MOST_ELEMENTS: usize = 1 << 44;

/// Whether a buffer of these sizes can be counted. Errors: one of them is 0, or they are too many.
pub(super) fn check(what: &str, sizes: &[usize]) -> Result<()> {
    let elements = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    match elements {
        Some(1..=MOST_ELEMENTS) => Ok(()),
        _ => {
            let sizes: Vec<String> = sizes.iter().map(ToString::to_string).collect();
            Err(impossible(format!("{what} of {}", sizes.join(" x "))))
        }
    }
}

pub(super) fn impossible(what: String) -> Error {
    Error::Usage {
        what: format!("{what} cannot be timed"),
        remedy: "give sizes from 1 to what fits the device's memory".to_string(),
    }
}
