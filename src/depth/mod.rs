//! Depth diagnostics: what each layer of a model contributes.

mod report;

pub use report::{
    Angular, DepthReport, Jacobian, JacobianReport, Linear, LinearReport, Skipped, TaskReport,
};
