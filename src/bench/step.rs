//! A whole training step, as `isobath train` runs it: micro-batches forward and backward, gradient
//! norm, update. Random tokens; the time between two updates' ends, with all that the host does.
//! Then once more, launch by launch, for the time of each family of kernels; and without fusions,
//! to see what each is worth.

use std::time::Duration;

use super::launched::{FamilyShare, WithEvents, shares};
use super::report::{Row, StepDetails, TimedRows};
use super::step_request::StepRequest;
use super::timing::{Timing, between, integers_below, samples};
use crate::config::Config;
use crate::cuda::{Cuda, Driver, Fusion, Fusions, StreamId, Switches};
use crate::engine::{Plan, Rows, StepUnderWay, Trainer};
use crate::error::{Error, Result};
use crate::model::parameters::ParameterTable;
use crate::model::{self, init::initial_parameters};
use crate::optim;
use crate::plan::{FLOPS_FORMULA, PlanReport};
use crate::predict::Sizes;
use crate::predict::cost::Cost;
use crate::sensors::{Conditions, Monitor};
use crate::throughput::MemoryUse;

/// Which training step, and without which fusions it is timed once more.
#[derive(Clone, Default, Debug)]
pub struct TimedStepRequest {
    pub step: StepRequest,
    /// Sets of fusions, each left out together.
    pub without: Vec<Vec<Fusion>>,
}

/// Steps before the first that counts: kernels are loaded, buffers touched.
const WARM_UP: u64 = 2;

/// How often a GPU is asked for its clocks.
const READINGS_EVERY: Duration = Duration::from_millis(200);

/// Times steps with all fusions; then without each set of them, and at last once more with all:
/// the machine may have become slower meanwhile. `open` opens the machine for each time; the last
/// one is closed before, since both need its memory.
///
/// Errors: a fusion that this machine does not have.
pub(super) fn rows(
    open: &mut dyn FnMut() -> Result<Box<dyn Driver>>,
    config: &Config,
    without: &[Vec<Fusion>],
    asked: Option<usize>,
    table: &mut TimedRows,
) -> Result<()> {
    let without = present(open, config, without)?;
    let parameters = initial_parameters(&ParameterTable::new(&config.model), config.seed);
    let step = Step { config, parameters: &parameters, switches: Switches::from_env()?, asked };
    let timed = step.time(open, &[])?;
    let whole = Row::new(cost(config, "", &[])?, &timed.timing);
    (table.told)(&whole);
    let families = step.families(open)?;
    let details = timed.details(config, &[], families);
    table.push(Row { step: Some(details), ..whole });
    if without.is_empty() {
        return Ok(());
    }
    let mut others = vec![];
    for without in &without {
        let timed = step.time(open, without)?;
        let row = Row::new(cost(config, "", without)?, &timed.timing);
        (table.told)(&row);
        let details = timed.details(config, without, vec![]);
        others.push(Row { step: Some(details), ..row });
    }
    let timed = step.time(open, &[])?;
    let again = Row::new(cost(config, ", again", &[])?, &timed.timing);
    (table.told)(&again);
    let details = timed.details(config, &[], vec![]);
    others.push(Row { step: Some(details), ..again.clone() });
    let first = table.rows.last().expect("it was just timed").median_microseconds;
    let between = f64::midpoint(first, again.median_microseconds);
    for row in &mut others {
        let all = if row.what == again.what { first } else { between };
        let percent = 100.0 * (row.median_microseconds / all - 1.0);
        row.step.iter_mut().for_each(|step| step.percent_over_fused = Some(percent));
    }
    table.rows.extend(others);
    Ok(())
}

/// The sets, of all fusions those that the machine has. Errors: others that it does not have.
fn present(
    open: &mut dyn FnMut() -> Result<Box<dyn Driver>>,
    config: &Config,
    without: &[Vec<Fusion>],
) -> Result<Vec<Vec<Fusion>>> {
    if without.is_empty() {
        return Ok(vec![]);
    }
    let backend = Cuda::new(open()?, config.dtype, None)?;
    let heads = model::heads(&config.model);
    let sets = without.iter().map(|set| {
        let found: Vec<Fusion> = set.iter().copied().filter(|it| backend.has(*it, heads)).collect();
        let lacking = set.iter().find(|it| !found.contains(it));
        match lacking.filter(|_| set.len() < Fusion::ALL.len()) {
            None => Ok(found),
            Some(fusion) => Err(Error::Usage {
                what: format!(
                    "--without {fusion}: the kernels for {} and a head dim of {} on this machine \
                     have no such fusion, so that the step would be the same",
                    config.dtype, heads.head_dim
                ),
                remedy: "leave it out, or time bf16 on compute capability 9.0".to_string(),
            }),
        }
    });
    sets.collect()
}

/// What every timing of a step has in common.
struct Step<'a> {
    config: &'a Config,
    parameters: &'a [f32],
    switches: Switches,
    /// Samples.
    asked: Option<usize>,
}

struct TimedStep {
    timing: Timing,
    memory: MemoryUse,
    conditions: Option<Conditions>,
}

impl Step<'_> {
    /// As training runs them.
    fn time(
        &self,
        open: &mut dyn FnMut() -> Result<Box<dyn Driver>>,
        without: &[Fusion],
    ) -> Result<TimedStep> {
        let Step { config, parameters, switches, asked } = *self;
        let driver = open()?;
        let samples = samples(&*driver, asked) as u64;
        let fusions = Fusions::without(without);
        let mut steps = Steps::new(driver, config, parameters, switches, fusions)?;
        let monitor = steps.driver().sensors().map(|it| Monitor::start(it, READINGS_EVERY));
        let mut events = vec![];
        for step in 1..=WARM_UP + samples {
            steps.run()?;
            if step < WARM_UP {
                continue;
            }
            let event = steps.driver().new_event()?;
            steps.driver().record(event, StreamId::MAIN)?;
            events.push(event);
            if step == WARM_UP {
                steps.free_after_warm_up = steps.driver().own_free_bytes();
            }
            monitor.iter().for_each(|monitor| monitor.training(true));
        }
        steps.wait()?;
        let timing = Timing::new(between(steps.driver(), &events)?, 1);
        steps.driver().synchronize()?;
        let conditions = monitor.and_then(Monitor::finish);
        Ok(TimedStep { timing, memory: steps.memory(), conditions })
    }

    /// Launch by launch, with events in between.
    fn families(
        &self,
        open: &mut dyn FnMut() -> Result<Box<dyn Driver>>,
    ) -> Result<Vec<FamilyShare>> {
        let Step { config, parameters, switches, asked } = *self;
        let (driver, launched) = WithEvents::new(open()?);
        let samples = samples(&driver, asked) as u64;
        let one_by_one = Switches { graphs: false, ..switches };
        let fusions = Fusions::default();
        let mut steps = Steps::new(Box::new(driver), config, parameters, one_by_one, fusions)?;
        let mut timed = vec![];
        for step in 1..=WARM_UP + samples {
            if step <= WARM_UP {
                steps.run()?;
                continue;
            }
            launched.start();
            steps.run()?;
            steps.wait()?;
            timed.push(launched.finish(steps.driver())?);
        }
        shares(&timed)
    }
}

impl TimedStep {
    fn details(
        self,
        config: &Config,
        without: &[Fusion],
        families: Vec<FamilyShare>,
    ) -> StepDetails {
        StepDetails {
            tokens_per_second: config.tokens_per_step() as f64 / self.timing.median() * 1e6,
            without: without.to_vec(),
            percent_over_fused: None,
            families,
            memory: self.memory,
            conditions: self.conditions,
        }
    }
}

fn cost(config: &Config, detail: &str, without: &[Fusion]) -> Result<Cost> {
    let names: Vec<String> = without.iter().map(ToString::to_string).collect();
    let what = match names.is_empty() {
        true => format!("step, {}{detail}", config.dtype),
        false => format!("step, {}, without {}", config.dtype, names.join(", ")),
    };
    Ok(Cost {
        op: "step",
        what,
        dtype: config.dtype,
        sizes: Sizes::Step {
            preset: config.name.clone(),
            b: config.train.micro_batch,
            s: config.data.sequence,
            grad_accumulation: config.train.grad_accumulation,
            model: Box::new(config.model.clone()),
            optimizer: Box::new(config.optimizer.clone()),
        },
        bytes: 0,
        bytes_formula: "",
        flops: PlanReport::new(config)?.flops_per_token * config.tokens_per_step(),
        flops_formula: FLOPS_FORMULA,
        exponentials: 0,
        kernels: 1,
        product: None,
        link_bytes: 0,
    })
}

/// Training steps on the same random tokens.
struct Steps<'a> {
    trainer: Trainer<Cuda>,
    config: &'a Config,
    ids: Vec<i32>,
    planned: u64,
    free_after_warm_up: Option<u64>,
    /// Enqueued.
    done: u64,
    /// The last one, as long as nobody has waited for it.
    under_way: Option<StepUnderWay>,
}

impl<'a> Steps<'a> {
    fn new(
        driver: Box<dyn Driver>,
        config: &'a Config,
        parameters: &[f32],
        switches: Switches,
        fusions: Fusions,
    ) -> Result<Self> {
        let backend = Cuda::new(driver, config.dtype, None)?
            .with_switches(switches)
            .with_fusions(fusions)
            .with_deterministic(config.train.deterministic);
        let plan = Plan::new(config, &backend)?;
        let planned = plan.memory().total;
        let mut trainer = Trainer::new(plan, config, backend)?;
        trainer.set_parameters(parameters)?;
        let ids = integers_below(1, config.model.vocab, config.tokens_per_step() as usize + 1);
        let free_after_warm_up = None;
        Ok(Steps { trainer, config, ids, planned, free_after_warm_up, done: 0, under_way: None })
    }

    fn driver(&mut self) -> &mut dyn Driver {
        self.trainer.device().0.driver()
    }

    fn memory(&mut self) -> MemoryUse {
        MemoryUse::of(self.planned, self.free_after_warm_up, self.trainer.device().0)
    }

    /// Enqueues a step and waits for the one before, or for this one, as training does. Errors: its
    /// loss is not finite.
    fn run(&mut self) -> Result<()> {
        let Steps { trainer, config, ids, .. } = self;
        let step = self.done + 1;
        let (batch, count) = (config.train.micro_batch, config.train.grad_accumulation);
        let tokens = batch * config.data.sequence;
        let micro_batches = (0..count).map(|i| {
            let at = i * tokens;
            Rows::new(&ids[at..at + tokens], &ids[at + 1..at + 1 + tokens])
        });
        let lr = optim::learning_rate(&config.optimizer, step, config.train.steps.max(step + 1));
        let under_way = trainer.range(c"step", |trainer| {
            trainer.begin(step);
            let under_way = trainer.enqueue(micro_batches)?;
            trainer.range(c"update", |trainer| trainer.update(&config.optimizer, step, lr))?;
            Ok(under_way)
        })?;
        self.wait()?;
        self.done = step;
        self.under_way = Some(under_way);
        if self.trainer.steps_ahead() { Ok(()) } else { self.wait() }
    }

    /// For the last step that was enqueued. Errors: its loss is not finite.
    fn wait(&mut self) -> Result<()> {
        let Some(under_way) = self.under_way.take() else { return Ok(()) };
        let outcome = self.trainer.outcome(under_way)?;
        let rows = self.config.train.grad_accumulation * self.config.train.micro_batch;
        check_finite(outcome.loss, self.done, rows)
    }
}

fn check_finite(loss: f64, step: u64, rows: usize) -> Result<()> {
    if loss.is_finite() {
        return Ok(());
    }
    Err(Error::NonFinite {
        what: "the loss",
        value: loss,
        step,
        first_row: 0,
        end_row: rows as u64,
        remedy: "choose a smaller optimizer.lr or model.init_std".to_string(),
    })
}
