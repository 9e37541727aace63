//! Depth diagnostics: what each layer of a model contributes.
//!
//! [`measure`] reads a text through [`crate::engine::Layerwise`] and fills a [`DepthReport`]:
//! `request` says what is asked and checks sizes, the sums over the stream are in `streams`, least
//! squares in `affine`, Jacobians in `jacobian`, accuracies in `task`; `finite` refuses what is not
//! finite, `figures` draws and `files` keeps a report. No definition stands anywhere but beside its
//! code.

mod affine;
mod figures;
mod files;
mod finite;
mod jacobian;
mod measure;
mod report;
mod request;
mod streams;
mod task;

pub use affine::{AffineMap, Explained, Moments};
pub use figures::{figures, variance_over_training};
pub use files::{ReportFiles, reports_of_run};
pub use measure::{measure, measure_on};
pub use report::{
    Angular, DepthReport, Jacobian, JacobianReport, Linear, LinearReport, Skipped, TaskReport,
};
pub use request::{Measure, Request};
pub use streams::{StreamSums, angular_distance, rescaled};
pub use task::TaskRequest;
