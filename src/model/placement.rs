//! What stands around the two branches of a block: the one place that knows what each placement
//! means. [`super::block`] records it, [`super::parameters`] makes the table for it, and the export
//! asks it what folds into a stock LLaMA.
//!
//! ```text
//! pre        x = a x + b g f(N(x))          f: attention, then FFN
//! post       x = N(a x + b g f(x))          a, b: numbers; g: learnt, a vector or a number
//! sandwich   x = a x + b g N(f(N(x)))
//! ```

use crate::config::{InitKind, LnsPosition, ModelConfig, Placement};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    Pre,
    Post,
    Sandwich,
}

/// N(x / sqrt(input_depth)) gain / sqrt(depth)
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct NormForm {
    pub depth: usize,
    pub input_depth: usize,
    /// What the gain starts from.
    pub gain: f64,
}

impl NormForm {
    const PLAIN: NormForm = NormForm { depth: 1, input_depth: 1, gain: 1.0 };
}

/// The learnt factor of a branch, and what it starts from.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum BranchGain {
    /// [C]
    Channels(f64),
    /// [1]
    Scalar(f64),
}

/// a x + b g f
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SumForm {
    pub stream_scale: f64,
    pub branch_scale: f64,
    pub gain: Option<BranchGain>,
}

impl SumForm {
    const PLAIN: SumForm = SumForm { stream_scale: 1.0, branch_scale: 1.0, gain: None };

    /// x + f, which the projection out of the branch does itself.
    pub fn is_plain(&self) -> bool {
        *self == Self::PLAIN
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BlockForm {
    pub order: Order,
    pub attention_norm: NormForm,
    pub ffn_norm: NormForm,
    /// Of both branches.
    pub sum: SumForm,
}

/// How block `layer` (from 1) of a model is built.
pub fn block_form(config: &ModelConfig, layer: usize) -> BlockForm {
    let plain = BlockForm {
        order: Order::Pre,
        attention_norm: NormForm::PLAIN,
        ffn_norm: NormForm::PLAIN,
        sum: SumForm::PLAIN,
    };
    let post = BlockForm { order: Order::Post, ..plain };
    let layers = config.layers as f64;
    match config.placement {
        Placement::Pre => plain,
        Placement::Lns => lns(plain, config.lns_position, layer),
        Placement::Post => post,
        Placement::Deepnorm => {
            let stream_scale = (2.0 * layers).powf(0.25);
            BlockForm { sum: SumForm { stream_scale, ..SumForm::PLAIN }, ..post }
        }
        Placement::Mix if layer <= post_blocks(config) => post,
        Placement::Mix => plain,
        Placement::Sandwich => BlockForm { order: Order::Sandwich, ..plain },
        Placement::Layerscale => gained(plain, BranchGain::Channels(config.layer_scale)),
        Placement::Skipinit => gained(plain, BranchGain::Scalar(layers.sqrt().recip())),
    }
}

fn lns(plain: BlockForm, position: LnsPosition, layer: usize) -> BlockForm {
    let root = (layer as f64).sqrt();
    let after = NormForm { depth: layer, ..NormForm::PLAIN };
    let both = |norm| BlockForm { attention_norm: norm, ffn_norm: norm, ..plain };
    match position {
        LnsPosition::AfterNorm => both(after),
        LnsPosition::BeforeNorm => both(NormForm { input_depth: layer, ..NormForm::PLAIN }),
        LnsPosition::AfterBranch => {
            BlockForm { sum: SumForm { branch_scale: root.recip(), ..SumForm::PLAIN }, ..plain }
        }
        LnsPosition::AttentionNorm => BlockForm { attention_norm: after, ..plain },
        LnsPosition::FfnNorm => BlockForm { ffn_norm: after, ..plain },
        LnsPosition::GainInit => both(NormForm { gain: root.recip(), ..NormForm::PLAIN }),
    }
}

fn gained(plain: BlockForm, gain: BranchGain) -> BlockForm {
    BlockForm { sum: SumForm { gain: Some(gain), ..SumForm::PLAIN }, ..plain }
}

/// Blocks that `mix` makes post.
fn post_blocks(config: &ModelConfig) -> usize {
    (config.mix_post * config.layers as f64).round() as usize
}

/// Standard deviations of the first values of a block's matrices.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BlockInit {
    pub query: f64,
    pub key: f64,
    pub value: f64,
    pub attention_out: f64,
    pub gate_up: f64,
    pub down: f64,
}

/// The first values of block `layer` (from 1).
pub fn block_init(config: &ModelConfig, layer: usize) -> BlockInit {
    let (c, f) = (config.hidden, config.ffn);
    let (q, kv) = (config.heads * config.head_dim(), config.kv_heads * config.head_dim());
    let std = |rows: usize, columns: usize| match config.init {
        InitKind::Xavier => (2.0 / (rows + columns) as f64).sqrt(),
        InitKind::Normal | InitKind::Scaled | InitKind::DepthScaled => config.init_std,
    };
    let outputs = match config.init {
        InitKind::Normal | InitKind::Xavier => 1.0,
        InitKind::Scaled => (2.0 * config.layers as f64).sqrt().recip(),
        InitKind::DepthScaled => (2.0 * layer as f64).sqrt().recip(),
    };
    let beta = match config.placement {
        Placement::Deepnorm => (8.0 * config.layers as f64).powf(-0.25),
        _ => 1.0,
    };
    BlockInit {
        query: std(q, c),
        key: std(kv, c),
        value: beta * std(kv, c),
        attention_out: beta * outputs * std(c, q),
        gate_up: beta * std(f, c),
        down: beta * outputs * std(c, f),
    }
}

/// Why the model is no stock LLaMA, whatever is folded into its weights; `None`: it is one.
///
/// What folds: scales after a norm go into its gain; scales and learnt factors of a branch go into
/// the rows of the projection out of it.
pub fn stock_obstacle(config: &ModelConfig) -> Option<&'static str> {
    let forms = || (1..=config.layers).map(|layer| block_form(config, layer));
    if forms().any(|form| form.order == Order::Post) {
        return Some(
            "a norm over the residual stream cannot be folded: stock LLaMA has none there",
        );
    }
    if forms().any(|form| form.order == Order::Sandwich) {
        return Some("a norm after a branch cannot be folded: stock LLaMA has none there");
    }
    if forms().any(|form| form.attention_norm.input_depth != 1) {
        return Some(
            "a scale before a norm changes only its epsilon, and stock LLaMA has one for all",
        );
    }
    None
}

/// The placement that the folder of a model has: what is folded into projections cannot be told
/// from them any more.
pub fn folded(config: &ModelConfig) -> ModelConfig {
    let kept = |form: BlockForm| form.sum.is_plain();
    let folds = stock_obstacle(config).is_none();
    if folds && !(1..=config.layers).all(|layer| kept(block_form(config, layer))) {
        return stock(config);
    }
    config.clone()
}

/// The same sizes as stock LLaMA computes them.
pub fn stock(config: &ModelConfig) -> ModelConfig {
    ModelConfig {
        placement: Placement::Pre,
        lns_position: LnsPosition::AfterNorm,
        ..config.clone()
    }
}
