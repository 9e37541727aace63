//! The layers of kernels that a model asks for, each made once, when a program is prepared.

use std::collections::HashMap;
use std::hash::Hash;

use super::{Cuda, STREAM};
use crate::backend::{self, FlatBuffers, HeadSpec};
use crate::config::Dtype;
use crate::cuda::adamw::AdamW;
use crate::cuda::attention::{
    Angles, Attention, AttentionBackward, AttentionForward, AttentionPlan,
};
use crate::cuda::embedding::Embedding;
use crate::cuda::gemm::{Gemm, GemmPlan, Product};
use crate::cuda::loss::Loss;
use crate::cuda::norm::Norm;
use crate::cuda::offload::Offload;
use crate::cuda::pointwise::Pointwise;
use crate::cuda::residual::ScaledResidual;
use crate::cuda::{Driver, Family};
use crate::error::Result;
use crate::tensor::View;

/// The kernels that were asked for so far.
pub(super) struct Layers {
    pub(super) gemm: Gemm,
    pub(super) pointwise: Pointwise,
    pub(super) products: HashMap<Product, GemmPlan>,
    pub(super) norms: HashMap<usize, Norm>,
    pub(super) residuals: HashMap<usize, ScaledResidual>,
    pub(super) attentions: HashMap<HeadSpec, Attention>,
    pub(super) attention_forwards: HashMap<AttentionForward, AttentionPlan>,
    pub(super) attention_backwards: HashMap<AttentionBackward, AttentionPlan>,
    pub(super) embeddings: HashMap<usize, Embedding>,
    pub(super) losses: HashMap<LossSize, Loss>,
    /// Of each range of the flat buffer that is updated on its own, by its parameters.
    pub(super) optimizers: Vec<(View, AdamW)>,
    /// For moments in host memory.
    pub(super) offload: Option<Offload>,
}

impl Layers {
    /// With those that every model needs.
    pub(super) fn new(
        driver: &mut dyn Driver,
        dtype: Dtype,
        family: Option<Family>,
    ) -> Result<Self> {
        Ok(Layers {
            gemm: Gemm::new(driver, dtype, family)?,
            pointwise: Pointwise::new(driver, dtype)?,
            products: HashMap::new(),
            norms: HashMap::new(),
            residuals: HashMap::new(),
            attentions: HashMap::new(),
            attention_forwards: HashMap::new(),
            attention_backwards: HashMap::new(),
            embeddings: HashMap::new(),
            losses: HashMap::new(),
            optimizers: Vec::new(),
            offload: None,
        })
    }

    pub(super) fn optimizer(&self, buffers: &FlatBuffers) -> &AdamW {
        let mut prepared = self.optimizers.iter();
        let found = prepared.find(|(parameters, _)| *parameters == buffers.parameters);
        &found.expect("the optimizer was prepared").1
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct LossSize {
    pub(super) classes: usize,
    pub(super) columns: usize,
}

pub(super) type Ready<'a, L> = Option<(&'a mut dyn Driver, &'a L)>;

fn ready<'a, L>(preparing: bool, driver: &'a mut dyn Driver, layer: &'a L) -> Ready<'a, L> {
    (!preparing).then_some((driver, layer))
}

/// The layer for `key`, made by `make` if nobody has asked for it yet.
pub(super) fn made<K: Eq + Hash, V>(
    layers: &mut HashMap<K, V>,
    key: K,
    make: impl FnOnce() -> Result<V>,
) -> Result<&V> {
    use std::collections::hash_map::Entry;
    Ok(match layers.entry(key) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => entry.insert(make()?),
    })
}

impl Cuda {
    /// The layer of one kind for `key`, made when it is first asked for, and the driver to launch
    /// it with; `None` while a program is only prepared.
    pub(super) fn norm(&mut self, columns: usize) -> Result<Ready<'_, Norm>> {
        let (driver, dtype) = (&mut *self.driver, self.dtype);
        let norm = made(&mut self.layers.norms, columns, || Norm::new(driver, dtype, columns))?;
        Ok(ready(self.preparing, &mut *self.driver, norm))
    }

    pub(super) fn scaled_residual(&mut self, columns: usize) -> Result<Ready<'_, ScaledResidual>> {
        let (driver, dtype) = (&mut *self.driver, self.dtype);
        let make = || ScaledResidual::new(driver, dtype, columns);
        let residual = made(&mut self.layers.residuals, columns, make)?;
        Ok(ready(self.preparing, &mut *self.driver, residual))
    }

    pub(super) fn attention(&mut self, heads: HeadSpec) -> Result<Ready<'_, Attention>> {
        let (driver, dtype, family) = (&mut *self.driver, self.dtype, self.family);
        let deterministic = self.deterministic;
        let make =
            || Ok(Attention::new(driver, dtype, heads, family)?.with_deterministic(deterministic));
        let attention = made(&mut self.layers.attentions, heads, make)?;
        Ok(ready(self.preparing, &mut *self.driver, attention))
    }

    pub(super) fn attend(&mut self, pass: AttentionForward) -> Result<()> {
        self.attention(pass.spec.heads)?;
        let Layers { attentions, attention_forwards, .. } = &mut self.layers;
        let (driver, attention) = (&mut *self.driver, &attentions[&pass.spec.heads]);
        let make = || attention.plan_forward(driver, &pass);
        let plan = made(attention_forwards, pass, make)?;
        if self.preparing { Ok(()) } else { plan.launch(&mut *self.driver, STREAM) }
    }

    /// Rotated back by `angles`, if there are any.
    pub(super) fn attend_backward(
        &mut self,
        op: backend::AttentionBackward,
        angles: Option<Angles>,
    ) -> Result<()> {
        let op = op.map(&mut |view, _| self.address(view));
        let backend::AttentionBackward { spec, qkv, document_starts, out, log_sum_exp, .. } = op;
        let forward = AttentionForward { spec, qkv, document_starts, out, log_sum_exp };
        let (d_out, delta, d_qkv) = (op.d_out, op.delta, op.d_qkv);
        let pass = AttentionBackward { forward, d_out, delta, d_qkv, angles };
        let heads = spec.heads;
        self.attention(heads)?;
        let Layers { attentions, attention_backwards, .. } = &mut self.layers;
        let attention = attentions.get_mut(&heads).expect("it was just made");
        let driver = &mut *self.driver;
        let make = || attention.plan_backward(driver, &pass);
        let plan = made(attention_backwards, pass, make)?;
        if self.preparing { Ok(()) } else { plan.launch(&mut *self.driver, STREAM) }
    }

    pub(super) fn embedding(&mut self, columns: usize) -> Result<Ready<'_, Embedding>> {
        let (driver, dtype) = (&mut *self.driver, self.dtype);
        let make = || Embedding::new(driver, dtype, columns);
        let embedding = made(&mut self.layers.embeddings, columns, make)?;
        Ok(ready(self.preparing, &mut *self.driver, embedding))
    }

    pub(super) fn loss(&mut self, size: LossSize) -> Result<Ready<'_, Loss>> {
        let (driver, dtype) = (&mut *self.driver, self.dtype);
        let make = || Loss::new(driver, dtype, size.classes, size.columns);
        let loss = made(&mut self.layers.losses, size, make)?;
        Ok(ready(self.preparing, &mut *self.driver, loss))
    }

    pub(super) fn pointwise(&mut self) -> Ready<'_, Pointwise> {
        ready(self.preparing, &mut *self.driver, &self.layers.pointwise)
    }

    pub(super) fn multiply(&mut self, product: Product) -> Result<()> {
        let Layers { gemm, products, .. } = &mut self.layers;
        let driver = &mut *self.driver;
        let plan = made(products, product, || gemm.plan(driver, &product))?;
        if self.preparing { Ok(()) } else { plan.launch(&mut *self.driver, STREAM) }
    }
}
