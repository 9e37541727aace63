//! The command line: one file per subcommand, each a thin layer over a function of the library.
//!
//! Raw arguments are what clap parsed; each command turns them into checked values before it does
//! anything. What a command was asked for goes to stdout; everything else goes to stderr.

mod bench;
mod compare;
mod config;
mod conformance;
mod data;
mod depth;
mod eval;
mod generate;
mod info;
mod model;
mod output;
mod plan;
mod report;
mod stock;
mod train;

use std::io::{self, Write};
use std::process::ExitCode;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, Subcommand};

/// Pretrains LLaMA models, with LayerNorm Scaling.
#[derive(Parser, Debug)]
#[command(name = "isobath", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Train a model: without arguments, the bundled demo
    Train(train::TrainArgs),
    /// Train several variants on the same data from the same seeds, and tabulate the results
    Compare(compare::CompareArgs),
    /// Measure the loss of a model on a text
    Eval(eval::EvalArgs),
    /// Continue a text
    Generate(generate::GenerateArgs),
    /// Write a model as a stock Hugging Face LLaMA folder
    Export(stock::ExportArgs),
    /// Write a model without some of its layers as a stock Hugging Face LLaMA folder
    Prune(stock::PruneArgs),
    /// Train a tokenizer, turn text into shards, look into shards
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Count parameters, FLOPs and bytes of a configuration, without data or device
    Plan(plan::PlanArgs),
    /// Measure what each layer of a model contributes
    Depth(depth::DepthArgs),
    /// Time kernels on a GPU, or run and check them on the CPU machine
    Bench(bench::BenchArgs),
    /// Compare what every kernel wrapper does on a device with its golden output
    Conformance(conformance::ConformanceArgs),
    /// Make one page of figures from runs
    Report(report::ReportArgs),
    /// Show the devices, presets and texts of this build
    Info(info::InfoArgs),
}

/// Parses the process's arguments and runs the command. Wrong arguments end the process here,
/// with clap's message and exit code 2.
pub fn run() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Train(args) => train::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Export(args) => stock::export(args),
        Command::Prune(args) => stock::prune(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Data(command) => data::run(command),
        Command::Plan(args) => plan::run(args),
        Command::Depth(args) => depth::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Conformance(args) => conformance::run(args),
        Command::Report(args) => report::run(args),
        Command::Info(args) => info::run(args),
    }
}

/// Tells a person what went wrong, and the caller of the process which kind of failure it was.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if output::reader_left(error) {
        return ExitCode::SUCCESS;
    }
    let mut text = format!("error: {error}");
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // The library's messages contain those of the operating system.
        if !text.contains(&cause) {
            text.push_str("\n  because: ");
            text.push_str(&cause);
        }
    }
    // With stderr closed there is nobody to tell.
    let _ = writeln!(io::stderr(), "{text}");
    let code = error.chain().find_map(|cause| cause.downcast_ref::<isobath::Error>());
    ExitCode::from(code.map_or(1, isobath::Error::exit_code))
}

/// One of the names of a choice, which `--help` lists.
fn one_of<T>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: FromStr<Err = isobath::Error> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| name.parse::<T>())
}
