//! `isobath plan`: what a configuration costs, without data or device.

use clap::Args;
use isobath::plan::PlanReport;

use super::config::ConfigArgs;
use super::output;

#[derive(Args, Debug)]
pub struct PlanArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: PlanArgs) -> anyhow::Result<()> {
    let report = PlanReport::new(&args.config.resolve()?)?;
    if args.json { output::print_json(&report) } else { output::print(&report.to_string()) }
}
