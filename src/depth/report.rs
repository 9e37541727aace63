//! What `isobath depth` measures: the one JSON that it prints, draws and hands to the report.
//!
//! Layers count from 1 in words; lists have the first layer first. "Stream" is the residual stream:
//! entry 0 is the embedding, entry l the output of block l. A measurement that was not asked for
//! is `None` and `null`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DepthReport {
    /// The folder that was read.
    pub model: PathBuf,
    /// Placement that the model was trained with, as its folder says; `None` for a folder of
    /// others.
    pub placement: Option<String>,
    /// Optimizer steps that led to the checkpoint; `None` where the folder is none of a run's.
    pub step: Option<u64>,
    pub data: Vec<String>,
    pub layers: usize,
    pub hidden: usize,
    /// Tokens that the measurements below read, where they do not say another number.
    pub tokens: u64,
    /// Tokens in a window.
    pub sequence: usize,
    /// Of the whole model on those tokens, in nats.
    pub loss: f64,
    pub perplexity: f64,
    /// [L+1]: mean over tokens of the variance over features (divided by C - 1) of the stream.
    pub variance: Option<Vec<f64>>,
    pub angular: Option<Angular>,
    /// [L]
    pub skipped: Option<Vec<Skipped>>,
    /// [L]: Euclidean norm of the gradient of the mean loss over the block's parameters.
    pub gradient_norm: Option<Vec<f64>>,
    pub jacobian: Option<JacobianReport>,
    pub linear: Option<LinearReport>,
    pub task: Option<TaskReport>,
}

/// Mean over all tokens of arccos(cosine similarity) / pi between the stream at two depths:
/// "The Curse of Depth", equation 1.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Angular {
    /// Row n - 1, column l: between the inputs of blocks l + 1 and l + 1 + n; rows get shorter:
    /// row n - 1 has L + 1 - n entries.
    pub distance: Vec<Vec<f64>>,
    /// As the paper's heat maps: each row clipped to its 1st and 99th percentile and scaled to
    /// 0..1.
    pub rescaled: Vec<Vec<f64>>,
}

/// The model without one block; every other block keeps its depth scale.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Skipped {
    pub loss: f64,
    pub perplexity: f64,
    /// Against the whole model.
    pub loss_increase: f64,
    pub perplexity_increase: f64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct JacobianReport {
    /// Sampled tokens.
    pub tokens: usize,
    /// They stand among the first so many of their windows.
    pub context: usize,
    /// [L]
    pub blocks: Vec<Jacobian>,
}

/// J = d block(x)_t / d x_t of one token, [C,C]; means over the sampled tokens.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Jacobian {
    pub diagonal_mean: f64,
    /// Frobenius norm of J without its diagonal.
    pub off_diagonal_norm: f64,
    /// ||J - I||_F / ||I||_F
    pub relative_distance: f64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct LinearReport {
    /// Tokens that the maps were fitted on; the losses are of other tokens.
    pub fitted_tokens: u64,
    /// [L]
    pub blocks: Vec<Linear>,
}

/// The model with one block replaced by the affine map that fits it best.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Linear {
    pub loss: f64,
    /// Against the whole model on the same tokens.
    pub loss_increase: f64,
    /// Share of the variance of the block's output minus its input that the map explains, on the
    /// tokens of the loss.
    pub explained: f64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TaskReport {
    pub task: PathBuf,
    pub shots: usize,
    pub questions: usize,
    /// Of the whole model, by length-normalised log-likelihood, 0..1.
    pub accuracy: f64,
    /// `None` where there is a single question.
    pub standard_error: Option<f64>,
    /// [L]: accuracy without the block minus accuracy with it, in percentage points (negative:
    /// the block helps).
    pub change: Vec<f64>,
}
