//! A run from its first step to its last: steps, what follows them, and checkpoints.

use std::ops::Range;
use std::path::PathBuf;

use super::pace::{Pace, StepRate};
use super::resolve::{resolve_epochs, resolve_vocabulary};
use super::start::{Start, begin, loader_options, restore};
use super::{Console, Interrupt, Outcome, Run};
use crate::backend::Backend;
use crate::checkpoint::{self, Snapshot, TrainerState};
use crate::config::{Config, Dtype, Format};
use crate::data::batch::Batch;
use crate::data::dataset::{Dataset, HeldOut};
use crate::data::loader::Prefetch;
use crate::engine::{Plan, Rows, StepOutcome, StepUnderWay, Trainer};
use crate::error::{Error, Result};
use crate::generate::{Sampling, generate};
use crate::hf::TokenizerFiles;
use crate::metrics::{Evaluation, SampleRecord, SessionRecord, StepRecord};
use crate::optim;
use crate::plan::{FLOPS_FORMULA, flops_per_token};
use crate::rundir::{LineLog, RunDir};
use crate::throughput::TokenCost;

/// Batches prepared ahead of the step that trains.
const BATCHES_AHEAD: usize = 4;

/// A sample: tokens that start it, at most, and tokens that follow.
const PROMPT_TOKENS: usize = 128;
const SAMPLE_TEMPERATURE: f64 = 0.8;
const SAMPLE_TOP_P: f64 = 0.95;

/// Prepares a run on this device, and trains.
pub fn train_on<B: Backend>(
    backend: B,
    run: Run,
    interrupt: Interrupt,
    console: &mut Console,
) -> Result<Outcome> {
    let Run { mut config, folder, resume } = run;
    let directory = match resume {
        true => RunDir::resume(&folder)?,
        false => RunDir::create(&folder)?,
    };
    let dataset = Dataset::open(&config, &folder.join("data"), true)?;
    resolve_vocabulary(&mut config, dataset.tokenizer());
    console.say(format!(
        "{}: {dataset}, {} tokens in the vocabulary",
        config.data.train.join(", "),
        dataset.tokenizer().vocab()
    ));
    let loader = dataset.loader(loader_options(&config), None)?;
    resolve_epochs(&mut config, loader.rows_per_epoch(), console)?;

    let plan = Plan::new(&config, &backend)?;
    let token_cost = TokenCost {
        flops: flops_per_token(&config.model, &plan.table, config.data.sequence),
        flops_formula: FLOPS_FORMULA,
        peak_flops_per_second: backend.peak_flops_per_second(),
    };
    console.say(format!(
        "{} parameters on {}\n{}",
        plan.table.parameters(),
        backend.name(),
        plan.memory()
    ));
    let machine = backend.machine();
    let pace = Pace::new(token_cost, plan.memory().total, backend.sensors());
    let mut trainer = Trainer::new(plan, &config, backend)?;
    let Start { state, loader, saved } = match resume {
        true => restore(&mut trainer, &directory, &config, &dataset, loader, console)?,
        false => begin(&mut trainer, &config, loader)?,
    };
    directory.write_config(&config.to_toml()?)?;
    directory.sessions()?.append(&SessionRecord::new(state.step, machine))?;
    let mut session = Session {
        metrics: directory.metrics()?,
        samples: directory.samples()?,
        loader: Prefetch::new(loader, BATCHES_AHEAD)?,
        prompt: dataset.prompt(PROMPT_TOKENS.min(config.model.max_sequence / 2))?,
        trainer,
        directory,
        config,
        dataset,
        state,
        interrupt,
        saved,
        pace,
        ahead: None,
    };
    let outcome = session.run(console);
    console.finish();
    outcome
}

/// A run between two steps.
struct Session<B> {
    trainer: Trainer<B>,
    directory: RunDir,
    config: Config,
    dataset: Dataset,
    loader: Prefetch,
    metrics: LineLog,
    samples: LineLog,
    /// Its line is pending where a step's evaluation or sample was interrupted: a resumed run makes
    /// up for that first.
    state: TrainerState,
    prompt: Vec<u32>,
    interrupt: Interrupt,
    /// The newest checkpoint of this process, or the one that it resumed from.
    saved: Option<(u64, PathBuf)>,
    pace: Pace,
    /// Enqueued after the step that is waited for; `state` knows of it. What follows a step
    /// (evaluation, sample, checkpoint) finds none.
    ahead: Option<Step>,
}

/// A step that is under way.
struct Step {
    under_way: StepUnderWay,
    /// From 1.
    step: u64,
    /// Positions trained on so far, those of this step included.
    tokens: u64,
    lr: f64,
    /// Of the loader.
    rows: Range<u64>,
}

impl<B: Backend> Session<B> {
    fn run(&mut self, console: &mut Console) -> Result<Outcome> {
        let (first_step, steps) = (self.state.step, self.config.train.steps);
        console.start(first_step, steps);
        self.interrupt.arm();
        if self.config.checkpoint.initial && self.state.step == 0 {
            self.save()?;
        }
        let mut evaluation = None;
        let mut sample = None;
        self.pace.run_goes_on();
        while let Some(record) = self.next(console)? {
            let step = record.step;
            (evaluation, sample) = self.conclude(record, console)?;
            self.state.elapsed_seconds += self.pace.run_pauses();
            if self.due(step, self.config.checkpoint.every) {
                self.save()?;
            }
            self.pace.run_goes_on();
        }
        let interrupted = self.state.pending.is_some() || self.state.step < steps;
        let checkpoint = self.save()?;
        let throughput = self.pace.finish(first_step, self.state.step, self.trainer.device().0);
        if let Some(throughput) = &throughput {
            self.directory.throughput()?.append(throughput)?;
        }
        Ok(Outcome {
            folder: self.directory.path().to_path_buf(),
            checkpoint,
            step: self.state.step,
            steps,
            interrupted,
            evaluation: evaluation.filter(|_| !interrupted),
            sample: sample.filter(|_| !interrupted),
            seconds: self.state.elapsed_seconds,
            throughput,
            answers: self.config.data.format == Format::Supervised,
        })
    }

    /// Whether something that happens `every` so many steps, and at the last one, is due after
    /// `step`.
    fn due(&self, step: u64, every: u64) -> bool {
        step == self.config.train.steps || every > 0 && step.is_multiple_of(every)
    }

    /// The line of the next step, or the pending one. `None`: all are done, or somebody
    /// asked to stop and none is under way.
    fn next(&mut self, console: &mut Console) -> Result<Option<StepRecord>> {
        let step = match self.ahead.take() {
            Some(step) => step,
            None if self.interrupt.asked() => return Ok(None),
            None if self.state.pending.is_some() => return Ok(self.state.pending.take()),
            None if self.state.step == self.config.train.steps => return Ok(None),
            None => {
                self.pace.step_begins();
                self.enqueue()?
            }
        };
        let goes_on = self.trainer.steps_ahead() && !self.pauses_after(step.step);
        let ahead = if goes_on { self.enqueue().map(Some) } else { Ok(None) };
        let (ahead, failed) = match ahead {
            Ok(ahead) => (ahead, None),
            Err(error) => (None, Some(error)),
        };
        self.ahead = ahead;
        let record = self.finish(step)?;
        console.step(&record, self.positions(), self.pace.recent());
        match failed {
            None => Ok(Some(record)),
            // Nothing else is due after this step: its line is all.
            Some(error) => self.metrics.append(&record).and(Err(error)),
        }
    }

    /// Whether something is to happen after `step` before the next one begins.
    fn pauses_after(&self, step: u64) -> bool {
        let saves = self.due(step, self.config.checkpoint.every);
        self.interrupt.asked() || self.evaluates_after(step) || self.samples_after(step) || saves
    }

    fn evaluates_after(&self, step: u64) -> bool {
        self.dataset.holds_out() && self.due(step, self.config.train.eval_every)
    }

    fn samples_after(&self, step: u64) -> bool {
        self.config.train.sample_tokens > 0 && self.due(step, self.config.train.sample_every)
    }

    /// What follows a step: evaluation and sample if they are due, then its line in the metrics.
    /// If somebody asks to stop meanwhile, the line stays pending.
    fn conclude(
        &mut self,
        mut record: StepRecord,
        console: &Console,
    ) -> Result<(Option<Evaluation>, Option<SampleRecord>)> {
        let last = record.step == self.config.train.steps;
        if self.evaluates_after(record.step) && record.evaluation.is_none() {
            let most = if last { 0 } else { self.config.train.eval_tokens };
            let Some(evaluation) = self.evaluate(most)? else {
                self.state.pending = Some(record);
                return Ok((None, None));
            };
            console.evaluation(record.step, &evaluation);
            record.evaluation = Some(evaluation);
        }
        let mut sample = None;
        if self.samples_after(record.step) {
            sample = self.sample(record.step)?;
            match &sample {
                None => {
                    self.state.pending = Some(record);
                    return Ok((None, None));
                }
                Some(text) if !last => {
                    console.say(format!("step {}: {}|{}", text.step, text.prompt, text.text));
                }
                Some(_) => {}
            }
        }
        self.metrics.append(&record)?;
        Ok((record.evaluation, sample))
    }

    /// Positions in an optimizer step.
    fn positions(&self) -> u64 {
        let train = &self.config.train;
        (train.micro_batch * train.grad_accumulation * self.config.data.sequence) as u64
    }

    /// Waits for a step's losses, and where no other one is under way, for its update. How long it
    /// took is counted from the end of the one before, if it was enqueued by then.
    ///
    /// Errors: a loss or gradient that is not finite, with which nothing was updated if it was the
    /// gradient. The step after it may have run; no checkpoint knows of either.
    fn finish(&mut self, step: Step) -> Result<StepRecord> {
        let Step { under_way, step, tokens, lr, rows } = step;
        let outcome = self.trainer.outcome(under_way)?;
        check_finite(&outcome, step, rows)?;
        if self.ahead.is_none() {
            self.trainer.wait()?;
        }
        let (positions, another) = (self.positions(), self.ahead.is_some());
        let rate = self.pace.step_ends(positions, another, self.trainer.device().0);
        let StepOutcome { loss, grad_norm, .. } = outcome;
        let StepRate { tokens_per_second, mfu } = rate;
        let evaluation = None;
        Ok(StepRecord { step, tokens, loss, grad_norm, lr, tokens_per_second, mfu, evaluation })
    }

    /// One optimizer step, for [`Session::finish`] to wait for.
    fn enqueue(&mut self) -> Result<Step> {
        let step = self.state.step + 1;
        let count = self.config.train.grad_accumulation;
        let batches: Vec<Batch> =
            (0..count).map(|_| self.loader.next_batch()).collect::<Result<_>>()?;
        let first_row = batches.first().map_or(0, |batch| batch.first_row);
        let end_row = first_row + (count * self.config.train.micro_batch) as u64;
        let optimizer = &self.config.optimizer;
        let lr = optim::learning_rate(optimizer, step, self.config.train.steps);
        let under_way = self.trainer.range(c"step", |trainer| {
            trainer.begin(step);
            let under_way = trainer.enqueue(batches.iter().map(rows))?;
            trainer.range(c"update", |trainer| trainer.update(optimizer, step, lr))?;
            Ok(under_way)
        })?;
        self.state.step = step;
        self.state.tokens += self.positions();
        Ok(Step { under_way, step, tokens: self.state.tokens, lr, rows: first_row..end_row })
    }

    /// The loss on held-out text, of which there is some; none if somebody asked to stop meanwhile.
    fn evaluate(&mut self, most_tokens: u64) -> Result<Option<Evaluation>> {
        let HeldOut { batches, text_bytes } = self.dataset.held_out(&self.config, most_tokens)?;
        let (mut sum, mut predicted) = (0.0, 0);
        for batch in batches {
            if self.interrupt.asked() {
                return Ok(None);
            }
            let batch = batch?;
            let evaluate = |trainer: &mut Trainer<B>| trainer.evaluate(rows(&batch));
            let (losses, count) = self.trainer.range(c"evaluation", evaluate)?;
            sum += losses;
            predicted += count;
        }
        Ok(Some(Evaluation::new(sum, predicted, text_bytes)))
    }

    /// A continuation of the prompt; none if somebody asked to stop meanwhile.
    fn sample(&mut self, step: u64) -> Result<Option<SampleRecord>> {
        let sampling = Sampling {
            temperature: SAMPLE_TEMPERATURE,
            top_k: 0,
            top_p: SAMPLE_TOP_P,
            seed: self.config.seed ^ step,
        };
        let tokenizer = self.dataset.tokenizer();
        let interrupt = self.interrupt;
        let decoder = self.trainer.decoder();
        let (decoder, backend) = decoder.expect("a run that draws samples has planned for them");
        let go_on = |_| Ok(!interrupt.asked());
        let (prompt, count) = (&self.prompt, self.config.train.sample_tokens);
        let tokens = generate(decoder, prompt, count, &sampling, tokenizer, backend, go_on)?;
        if interrupt.asked() {
            return Ok(None);
        }
        let prompt = tokenizer.decode(&self.prompt)?;
        let whole = tokenizer.decode(&[&self.prompt[..], &tokens].concat())?;
        let text = whole.strip_prefix(&prompt).unwrap_or(&whole).to_string();
        let record = SampleRecord { step, prompt, text };
        self.samples.append(&record)?;
        Ok(Some(record))
    }

    /// Writes a checkpoint of this step, if this process has not yet.
    fn save(&mut self) -> Result<PathBuf> {
        if let Some((step, folder)) = &self.saved
            && *step == self.state.step
        {
            return Ok(folder.clone());
        }
        self.metrics.sync()?;
        self.state.loader = self.loader.state();
        let tokenizer = TokenizerFiles {
            json: self.dataset.tokenizer().json().to_string(),
            bos: None,
            eos: self.dataset.tokenizer().end_of_text(),
        };
        let table = self.trainer.table().clone();
        let snapshot = Snapshot {
            config: &self.config,
            table: &table,
            state: &self.state,
            tokenizer: &tokenizer,
            dtype: Dtype::F32,
        };
        let trainer = &mut self.trainer;
        let saved = checkpoint::save(&self.directory, &snapshot, &mut |buffer, first, values| {
            trainer.read_flat(buffer, first, values)
        })?;
        checkpoint::retain(&self.directory, &self.config.checkpoint, Some(&saved))?;
        let folder = saved.folder().to_path_buf();
        self.saved = Some((self.state.step, folder.clone()));
        Ok(folder)
    }
}

/// A batch as the engine reads it.
fn rows(batch: &Batch) -> Rows<'_> {
    let Batch { tokens, targets, document_starts, .. } = batch;
    Rows { tokens, targets, document_starts: document_starts.as_deref() }
}

fn check_finite(outcome: &StepOutcome, step: u64, rows: Range<u64>) -> Result<()> {
    let Range { start: first_row, end: end_row } = rows;
    for (what, value) in [("loss", outcome.loss), ("gradient norm", outcome.grad_norm)] {
        if !value.is_finite() {
            let remedy = "lower optimizer.lr, lengthen optimizer.warmup or set optimizer.clip, \
                          then continue from the last checkpoint with --resume"
                .to_string();
            return Err(Error::NonFinite { what, value, step, first_row, end_row, remedy });
        }
    }
    Ok(())
}
