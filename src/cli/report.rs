//! `isobath report`: one page of figures from runs.

use std::path::PathBuf;

use clap::Args;
use isobath::report::{Heading, page, read_runs};
use jiff::Timestamp;

use super::output::{save, say};

#[derive(Args, Debug)]
pub struct ReportArgs {
    /// Folders that `isobath train` wrote, or folders of them
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// Where to write the page; replaced if it is there
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
    /// Heading of the page [default: the names of the runs]
    #[arg(long)]
    title: Option<String>,
}

pub fn run(args: ReportArgs) -> anyhow::Result<()> {
    let runs = read_runs(&args.runs)?;
    let heading = Heading { title: args.title, made: Timestamp::now() };
    save(&args.out, page(&heading, &runs).as_bytes())?;
    say!("{}", args.out.display())
}
