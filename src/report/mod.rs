//! `isobath report`: runs in, one HTML page out that needs nothing else, neither network nor
//! script.
//!
//! [`read_runs`] reads the folders, groups.rs puts runs together that differ in their seed alone,
//! curves.rs and layers.rs make figures of them, page.rs the page. What comes from outside (names,
//! settings) reaches the page through maud, which escapes it.

mod curves;
mod groups;
mod layers;
mod page;
mod run;

pub use page::{Heading, page};
pub use run::{Run, read_runs};
