//! `isobath conformance`: does this device do what every wrapper of kernels/ is meant to do?
//!
//! Each case is named before it runs. One that faults on a GPU, or does not end, ends the process:
//! goldens and report of what came before are written then, and --from goes on after it.

use std::path::PathBuf;
use std::process;
use std::time::{Duration, Instant};

use clap::Args;
use isobath::config::DeviceKind;
use isobath::cuda::conformance::{Case, Golden, Goldens, Report, Watch, chosen, record, replay};
use isobath::cuda::{host, open};
use jiff::Timestamp;

use super::output;

/// Of one case, the loading of all kernels and a sanitizer included.
const LIMIT: Duration = Duration::from_secs(15);
/// What was recorded is on disk so often, whoever ends the process.
const SAVED_EVERY: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
pub struct ConformanceArgs {
    /// cuda or simt; auto is a GPU if there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceKind,
    /// Run only this case; may be repeated
    #[arg(long = "case", value_name = "NAME")]
    cases: Vec<String>,
    /// Begin with this case
    #[arg(long, value_name = "NAME")]
    from: Option<String>,
    /// Write what a GPU does as the golden outputs into FOLDER (tests/goldens); the others stay as
    /// they are
    #[arg(long, value_name = "FOLDER", conflicts_with = "formulas")]
    record: Option<PathBuf>,
    /// Write the formulas' outputs into FOLDER, except where a GPU has recorded one; needs no
    /// device
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["cases", "from"])]
    formulas: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: ConformanceArgs) -> anyhow::Result<()> {
    if let Some(folder) = args.formulas {
        return Ok(Goldens::compiled_in()?.with_formulas().save(&folder)?);
    }
    let ending = Ending { record: args.record, json: args.json };
    let cases = chosen(&args.cases, args.from.as_deref())?;
    let mut driver = open(args.device, host::Options::from_env()?)?;
    let hung = ending.clone();
    let watch = Watch::start(LIMIT, move |goldens, report| {
        if let Err(error) = hung.finish(goldens, report) {
            eprintln!("error: {error}");
        }
        process::exit(1);
    });
    let mut saved = Instant::now();
    let mut progress = |case: &Case, golden: &Golden, goldens: &Goldens, report: &Report| {
        eprintln!("{}", case.name);
        watch.begins(case, golden, goldens, report);
        if saved.elapsed() > SAVED_EVERY {
            // At the end it is said why that cannot be.
            let _ = ending.save(goldens);
            saved = Instant::now();
        }
    };
    let (goldens, report) = match &ending.record {
        Some(folder) => {
            let before = Goldens::of_folder(folder)?;
            let date = Timestamp::now().strftime("%Y-%m-%d").to_string();
            record(driver.as_mut(), cases, &before, &date, &mut progress)?
        }
        None => {
            let goldens = Goldens::compiled_in()?;
            let report = replay(driver.as_mut(), cases, &goldens, &mut progress)?;
            (goldens, report)
        }
    };
    watch.ends();
    ending.finish(&goldens, &report)
}

/// What becomes of the results.
#[derive(Clone)]
struct Ending {
    record: Option<PathBuf>,
    json: bool,
}

impl Ending {
    fn save(&self, goldens: &Goldens) -> isobath::Result<()> {
        self.record.as_ref().map_or(Ok(()), |folder| goldens.save(folder))
    }

    fn finish(&self, goldens: &Goldens, report: &Report) -> anyhow::Result<()> {
        self.save(goldens)?;
        if self.json {
            output::print_json(report)?;
        } else {
            output::say!("{report}")?;
        }
        anyhow::ensure!(
            report.failed.is_empty(),
            "{} cases failed: a formula, a kernel, its wrapper or the device is wrong",
            report.failed.len()
        );
        Ok(())
    }
}
