//! `isobath conformance`: does this device do what every wrapper of kernels/ is meant to do?
//!
//! Each case is named before it runs. One that faults on a GPU, or does not end, ends the process:
//! goldens and report of what came before are written then, and --from goes on behind it.

use std::path::PathBuf;
use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use isobath::config::DeviceKind;
use isobath::cuda::conformance::{Case, Goldens, Report, chosen, record, replay, utc_date};
use isobath::cuda::{host, open};

use super::output;

/// Of one case, the loading of all kernels and a sanitizer included.
const LIMIT: Duration = Duration::from_secs(15);

#[derive(Args, Debug)]
pub struct ConformanceArgs {
    /// cuda or simt; auto is a GPU if there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceKind,
    /// This case alone; may be repeated
    #[arg(long = "case", value_name = "NAME")]
    cases: Vec<String>,
    /// Begin with this case
    #[arg(long, value_name = "NAME")]
    from: Option<String>,
    /// Write what a GPU does as the golden outputs into FOLDER (tests/goldens); what it does not give
    /// stays as it is there
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
    let watched = watch(ending.clone());
    let mut progress = |case: &Case, goldens: &Goldens, report: &Report| {
        eprintln!("{}", case.name);
        let under_way = (Instant::now(), case.clone(), goldens.clone(), report.clone());
        *watched.lock().unwrap_or_else(PoisonError::into_inner) = Some(under_way);
    };
    let (goldens, report) = match &ending.record {
        Some(folder) => {
            let before = Goldens::of_folder(folder)?;
            let date = utc_date(SystemTime::now().duration_since(UNIX_EPOCH)?);
            record(driver.as_mut(), cases, &before, &date, &mut progress)?
        }
        None => {
            let goldens = Goldens::compiled_in()?;
            let report = replay(driver.as_mut(), cases, &goldens, &mut progress)?;
            (goldens, report)
        }
    };
    *watched.lock().unwrap_or_else(PoisonError::into_inner) = None;
    ending.finish(&goldens, &report)
}

/// What becomes of the results.
#[derive(Clone)]
struct Ending {
    record: Option<PathBuf>,
    json: bool,
}

impl Ending {
    fn finish(&self, goldens: &Goldens, report: &Report) -> anyhow::Result<()> {
        if let Some(folder) = &self.record {
            goldens.save(folder)?;
        }
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

/// The case that runs, since when, and what is known.
type UnderWay = Option<(Instant, Case, Goldens, Report)>;

/// Ends the process when a case does not end: nobody can take a kernel off a GPU.
fn watch(ending: Ending) -> Arc<Mutex<UnderWay>> {
    let watched = Arc::new(Mutex::new(UnderWay::None));
    let seen = Arc::clone(&watched);
    thread::spawn(move || {
        loop {
            thread::sleep(LIMIT / 50);
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            let hanging = seen.take_if(|(since, ..)| since.elapsed() > LIMIT);
            let Some((_, case, goldens, mut report)) = hanging else { continue };
            report.hangs(&case, LIMIT);
            if let Err(error) = ending.finish(&goldens, &report) {
                eprintln!("error: {error}");
            }
            process::exit(1);
        }
    });
    watched
}
