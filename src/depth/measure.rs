//! One model, measured: a pass over the text that needs nothing but the model, the Jacobians of
//! sampled tokens, and a second pass for what was fitted in the first.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use super::affine::{AffineMap, Explained, Moments};
use super::finite;
use super::jacobian::{self, Sample};
use super::report::{DepthReport, Jacobian, JacobianReport, Linear, LinearReport, Skipped};
use super::request::{Progress, Request, Setup};
use super::streams::StreamSums;
use super::task::change_of_accuracy;
use crate::backend::Backend;
use crate::config::LnsPosition;
use crate::data::batch::Batch;
use crate::data::source::TokenSource;
use crate::data::windows::Windows;
use crate::device::{Device, on_device};
use crate::engine::{Backward, Layerwise, Rows};
use crate::error::Result;
use crate::evaluate::Text;
use crate::hf;
use crate::loaded::LoadedModel;
use crate::rundir;
use crate::tensor::IGNORE_INDEX;

/// Tokens whose streams are in host memory at one time.
const TOKENS_AT_ONCE: usize = 256;

/// Reads the model and the text, and measures; `progress` sees (work done, of), and once more from
/// the beginning for a task.
pub fn measure(request: &Request, mut progress: impl FnMut(u64, u64)) -> Result<DepthReport> {
    let model = LoadedModel::open(&request.model)?;
    finite::check_parameters(&model)?;
    let text = Text::open(&model, &request.data, &request.field)?;
    let task = request.task.as_ref().map(|task| task.prompts(&model)).transpose()?;
    let device = Device::choose(request.device)?;
    let dtype = device.computes_in(request.dtype)?;
    let mut report = on_device!(device, dtype, |backend| {
        measure_on(backend, request, &model, &text.tokens, &mut progress)
    })?;
    let Some(prompts) = task else { return Ok(report) };
    // Another shape, and so other programs: the first ones and their memory are gone by now.
    let (prompts, batch) = (&prompts, request.batch);
    report.task = Some(on_device!(device, dtype, |backend| {
        change_of_accuracy(&model, prompts, batch, backend, progress)
    })?);
    Ok(report)
}

/// Sum and number of losses.
#[derive(Clone, Copy, Default)]
struct LossSum {
    sum: f64,
    tokens: u64,
}

impl LossSum {
    fn add(&mut self, losses: &[f32], predicted: usize) {
        self.sum += losses.iter().map(|&loss| loss as f64).sum::<f64>();
        self.tokens += predicted as u64;
    }

    fn mean(&self) -> f64 {
        self.sum / self.tokens as f64
    }
}

/// On any backend, for tests in f64; [`measure`] chooses one.
pub fn measure_on<B: Backend>(
    backend: B,
    request: &Request,
    model: &LoadedModel,
    text: &TokenSource,
    progress: impl FnMut(u64, u64),
) -> Result<DepthReport> {
    let setup = Setup::new(request, model, text)?;
    let LoadedModel { config, table, parameters, .. } = model;
    let backward = Backward {
        gradient: setup.gradient,
        jacobian: (setup.jacobian_tokens > 0)
            .then_some([setup.jacobian_rows, setup.jacobian_context]),
    };
    let size = [setup.batch, setup.sequence];
    let layerwise = Layerwise::new(config, table, parameters, size, backward, backend)?;
    let progress = Progress { done: 0, of: setup.work(), report: progress };
    let mut session = Session { setup, layerwise, model, text, request, progress };

    let first = session.first_pass()?;
    let gradient_norm = match session.setup.gradient {
        true => Some(session.layerwise.gradient_norms()?),
        false => None,
    };
    let jacobian = session.jacobians(&first.samples)?;
    let linear = session.linear(&first)?;

    let loss = first.whole.mean();
    let skipped = session.setup.skipped.then(|| {
        first.skipped.iter().map(|losses| skipped(losses.mean(), loss)).collect::<Vec<_>>()
    });
    let report = DepthReport {
        model: model.folder.clone(),
        placement: trained_placement(&model.folder)?,
        step: rundir::run_and_step(&model.folder).map(|(_, step)| step),
        data: request.data.clone(),
        layers: config.layers,
        hidden: config.hidden,
        tokens: first.whole.tokens,
        sequence: session.setup.sequence,
        loss,
        perplexity: loss.exp(),
        variance: first.sums.variance(),
        angular: first.sums.angular(),
        skipped,
        gradient_norm,
        jacobian,
        linear,
        task: None,
    };
    finite::check_report(&report)?;
    Ok(report)
}

fn skipped(loss: f64, whole: f64) -> Skipped {
    Skipped {
        loss,
        perplexity: loss.exp(),
        loss_increase: loss - whole,
        perplexity_increase: loss.exp() - whole.exp(),
    }
}

/// What the first pass leaves.
struct FirstPass {
    whole: LossSum,
    /// Of the whole model, on the batches that judge the affine maps.
    judged: LossSum,
    sums: StreamSums,
    /// [L]
    skipped: Vec<LossSum>,
    /// [L], empty where no maps are wanted.
    moments: Vec<Moments>,
    samples: Vec<Sample>,
}

struct Session<'a, B, F> {
    setup: Setup,
    layerwise: Layerwise<B>,
    model: &'a LoadedModel,
    text: &'a TokenSource,
    request: &'a Request,
    progress: Progress<F>,
}

impl<'a, B: Backend, F: FnMut(u64, u64)> Session<'a, B, F> {
    fn windows(&self) -> Result<Windows<'a>> {
        let Setup { sequence, batch, .. } = self.setup;
        Windows::new(self.text, sequence, batch, self.request.tokens)
    }

    fn first_pass(&mut self) -> Result<FirstPass> {
        let Setup { layers, hidden, sequence, predicted, .. } = self.setup;
        let Setup { variance, angular, jacobian_tokens, jacobian_context, .. } = self.setup;
        let moments = if self.setup.linear { layers } else { 0 };
        let mut pass = FirstPass {
            whole: LossSum::default(),
            judged: LossSum::default(),
            sums: StreamSums::new(layers + 1, hidden, variance, angular),
            skipped: vec![LossSum::default(); layers],
            moments: (0..moments).map(|_| Moments::new(hidden)).collect(),
            samples: jacobian::samples(jacobian_tokens, predicted, sequence, jacobian_context),
        };
        for (i, batch) in self.windows()?.enumerate() {
            let (i, batch) = (i as u64, batch?);
            let losses = self.forward(&batch)?;
            pass.whole.add(&losses, batch.predicted);
            let fits = self.setup.linear && Setup::fits(i);
            if !fits {
                pass.judged.add(&losses, batch.predicted);
            }
            if pass.sums.wanted() || fits {
                self.read_streams(&batch, fits, &mut pass)?;
            }
            self.read_samples(i, &mut pass.samples)?;
            self.progress.advance(layers as u64);
            if self.setup.skipped {
                for (layer, sum) in (1..).zip(&mut pass.skipped) {
                    sum.add(self.layerwise.losses_without(layer)?, batch.predicted);
                    self.progress.advance((layers - layer) as u64);
                }
            }
            if self.setup.gradient {
                self.layerwise.accumulate_gradient((1.0 / predicted as f64) as f32)?;
                self.progress.advance(self.setup.gradient_work());
            }
        }
        Ok(pass)
    }

    /// Losses that are finite; else the place where the stream first is not.
    fn forward(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let rows = Rows::new(&batch.tokens, &batch.targets);
        let losses = self.layerwise.forward(rows)?.to_vec();
        if losses.iter().all(|loss| loss.is_finite()) {
            return Ok(losses);
        }
        let mut stream = vec![0.0; losses.len() * self.setup.hidden];
        for layer in 0..=self.setup.layers {
            self.layerwise.read_stream(layer, 0..losses.len(), &mut stream)?;
            if !stream.iter().all(|value| value.is_finite()) {
                return Err(finite::stream_not_finite(&self.model.folder, layer));
            }
        }
        Err(finite::losses_not_finite(&self.model.folder))
    }

    /// Adds every token that predicts something.
    fn read_streams(&mut self, batch: &Batch, fits: bool, pass: &mut FirstPass) -> Result<()> {
        let c = self.setup.hidden;
        let mut streams = vec![Vec::new(); self.setup.layers + 1];
        for tokens in pieces(batch.targets.len()) {
            for (layer, stream) in streams.iter_mut().enumerate() {
                stream.resize(tokens.len() * c, 0.0);
                self.layerwise.read_stream(layer, tokens.clone(), stream)?;
                keep_counted(stream, &batch.targets[tokens.clone()], c);
            }
            if pass.sums.wanted() {
                pass.sums.add(&streams);
            }
            if fits {
                for (moments, around) in pass.moments.iter_mut().zip(streams.windows(2)) {
                    moments.add(&around[0], &around[1]);
                }
            }
        }
        Ok(())
    }

    fn read_samples(&mut self, batch: u64, samples: &mut [Sample]) -> Result<()> {
        let Setup { layers, hidden, sequence, jacobian_context: context, .. } = self.setup;
        let windows = self.setup.batch as u64;
        let ours = batch * windows..(batch + 1) * windows;
        for i in jacobian::of_windows(samples, ours.clone()) {
            let sample = &mut samples[i];
            let start = (sample.window - ours.start) as usize * sequence;
            for layer in 0..layers {
                let mut stream = vec![0.0; context * hidden];
                self.layerwise.read_stream(layer, start..start + context, &mut stream)?;
                sample.streams.push(stream);
            }
        }
        Ok(())
    }

    fn jacobians(&mut self, samples: &[Sample]) -> Result<Option<JacobianReport>> {
        if samples.is_empty() {
            return Ok(None);
        }
        let mut blocks = Vec::with_capacity(self.setup.layers);
        for layer in 1..=self.setup.layers {
            let mut all = Vec::with_capacity(samples.len());
            for sample in samples {
                let stream = &sample.streams[layer - 1];
                let jacobian = self.layerwise.jacobian(layer, stream, sample.position)?;
                all.push(Jacobian::of(&jacobian, self.setup.hidden));
                self.progress.advance(self.setup.jacobian_work());
            }
            blocks.push(Jacobian::mean(&all));
        }
        let context = self.setup.jacobian_context;
        Ok(Some(JacobianReport { tokens: samples.len(), context, blocks }))
    }

    /// Solves for the maps and judges each on the batches that it was not fitted on.
    fn linear(&mut self, first: &FirstPass) -> Result<Option<LinearReport>> {
        if !self.setup.linear {
            return Ok(None);
        }
        let Setup { layers, hidden, .. } = self.setup;
        let unsolved = |i| finite::stream_not_finite(&self.model.folder, i + 1);
        let maps = first.moments.par_iter().enumerate();
        let maps: Vec<AffineMap> = maps
            .map(|(i, moments)| moments.solve().ok_or_else(|| unsolved(i)))
            .collect::<Result<_>>()?;
        self.progress.advance(layers as u64);
        let mut losses = vec![LossSum::default(); layers];
        let mut explained: Vec<Explained> = (0..layers).map(|_| Explained::new(hidden)).collect();
        for (i, batch) in self.windows()?.enumerate() {
            let batch = batch?;
            if Setup::fits(i as u64) {
                continue;
            }
            self.forward(&batch)?;
            self.progress.advance(layers as u64);
            for (i, map) in maps.iter().enumerate() {
                let layer = i + 1;
                self.replace(layer, map, &batch, &mut explained[i])?;
                losses[i].add(self.layerwise.losses_of_changed(layer)?, batch.predicted);
                self.progress.advance((layers - layer) as u64);
            }
        }
        let whole = first.judged.mean();
        let blocks = losses.iter().zip(&explained).map(|(losses, explained)| Linear {
            loss: losses.mean(),
            loss_increase: losses.mean() - whole,
            explained: explained.share(),
        });
        Ok(Some(LinearReport {
            fitted_tokens: first.moments[0].tokens(),
            blocks: blocks.collect(),
        }))
    }

    /// Applies the map to the stream before block `layer`. The result takes the place of the stream
    /// after the block in [`Layerwise::losses_of_changed`].
    fn replace(
        &mut self,
        layer: usize,
        map: &AffineMap,
        batch: &Batch,
        explained: &mut Explained,
    ) -> Result<()> {
        let c = self.setup.hidden;
        for tokens in pieces(batch.targets.len()) {
            let [mut inp, mut out] = [0, 1].map(|_| vec![0.0; tokens.len() * c]);
            self.layerwise.read_stream(layer - 1, tokens.clone(), &mut inp)?;
            self.layerwise.read_stream(layer, tokens.clone(), &mut out)?;
            let mut mapped = map.apply(&inp);
            self.layerwise.write_changed(tokens.start, &mapped)?;
            for stream in [&mut inp, &mut out, &mut mapped] {
                keep_counted(stream, &batch.targets[tokens.clone()], c);
            }
            explained.add(&inp, &out, &mapped);
        }
        Ok(())
    }
}

fn pieces(tokens: usize) -> impl Iterator<Item = Range<usize>> {
    (0..tokens).step_by(TOKENS_AT_ONCE).map(move |start| start..tokens.min(start + TOKENS_AT_ONCE))
}

/// Removes the tokens that predict nothing: padding. `stream` [n,C], `targets` [n].
fn keep_counted(stream: &mut Vec<f32>, targets: &[i32], hidden: usize) {
    let mut kept = 0;
    for (t, _) in targets.iter().enumerate().filter(|(_, target)| **target != IGNORE_INDEX) {
        stream.copy_within(t * hidden..(t + 1) * hidden, kept);
        kept += hidden;
    }
    stream.truncate(kept);
}

/// The placement that was trained, with its LNS position where that is not the method's; `None` for
/// a folder of others.
fn trained_placement(folder: &Path) -> Result<Option<String>> {
    Ok(hf::trained_placement(folder)?.map(|(placement, position)| match position {
        LnsPosition::AfterNorm => placement.to_string(),
        position => format!("{placement} {position}"),
    }))
}
