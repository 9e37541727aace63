//! `isobath plan`: what a configuration costs, without data or device; on a machine that is named
//! but not here, also how long it takes at least, and how long it is expected to. Of a run that
//! starts from a folder, the folder's model is planned, as it would be trained.

use clap::Args;
use clap::builder::PossibleValuesParser;
use isobath::config::DeviceKind;
use isobath::cuda::peaks::{MACHINES, Peaks};
use isobath::plan::PlanReport;
use isobath::predict::MachinePlan;
use isobath::train::adopt_initial_model;
use serde::Serialize;

use super::config::ValueArgs;
use super::output;

#[derive(Args, Debug)]
pub struct PlanArgs {
    #[command(flatten)]
    values: ValueArgs,
    /// Device to plan for; h200 or h100 (which need not be here): also the least and the expected
    /// time of a training step by kernel family, and the largest micro-batch at each level of
    /// recomputation and with each way to store optimizer state
    #[arg(long, value_parser = PossibleValuesParser::new(devices()))]
    device: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn devices() -> impl Iterator<Item = &'static str> {
    let machines = MACHINES.iter().map(|machine| machine.short_name);
    DeviceKind::NAMES.iter().copied().chain(machines)
}

pub fn run(args: PlanArgs) -> anyhow::Result<()> {
    let machine = args.device.as_deref().and_then(Peaks::of_short_name);
    let device = match machine {
        Some(_) => Some(DeviceKind::Cuda.name()),
        None => args.device.as_deref(),
    };
    let mut config = args.values.resolve(device)?;
    if !args.values.are_of_run() {
        adopt_initial_model(&mut config)?;
    }
    match machine {
        Some(machine) => print(&args, &MachinePlan::new(&config, machine)?),
        None => print(&args, &PlanReport::new(&config)?),
    }
}

fn print(args: &PlanArgs, report: &(impl Serialize + ToString)) -> anyhow::Result<()> {
    if args.json { output::print_json(report) } else { output::print(&report.to_string()) }
}
