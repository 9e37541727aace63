//! `isobath conformance`: does this device do what every wrapper of kernels/ is meant to do?

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use isobath::config::DeviceKind;
use isobath::cuda::conformance::{Goldens, Report, record, replay, utc_date};
use isobath::cuda::{host, open};

use super::output;

#[derive(Args, Debug)]
pub struct ConformanceArgs {
    /// cuda or simt; auto is a GPU if there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceKind,
    /// Write what a GPU does as the golden outputs into FOLDER (tests/goldens)
    #[arg(long, value_name = "FOLDER", conflicts_with = "formulas")]
    record: Option<PathBuf>,
    /// Write the formulas' outputs into FOLDER, except where a GPU has recorded one; needs no
    /// device
    #[arg(long, value_name = "FOLDER")]
    formulas: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: ConformanceArgs) -> anyhow::Result<()> {
    let goldens = Goldens::compiled_in()?;
    if let Some(folder) = args.formulas {
        return Ok(goldens.with_formulas().save(&folder)?);
    }
    let mut driver = open(args.device, host::Options::from_env()?)?;
    let report = match args.record {
        Some(folder) => {
            let (recorded, report) = record(
                driver.as_mut(),
                &goldens,
                &utc_date(SystemTime::now().duration_since(UNIX_EPOCH)?),
            )?;
            recorded.save(&folder)?;
            report
        }
        None => replay(driver.as_mut(), &goldens)?,
    };
    print(&report, args.json)?;
    let Report { failed, .. } = &report;
    anyhow::ensure!(
        failed.is_empty(),
        "{} cases differ: a formula, a kernel, its wrapper or the device is wrong",
        failed.len()
    );
    Ok(())
}

fn print(report: &Report, json: bool) -> anyhow::Result<()> {
    if json { output::print_json(report) } else { output::say!("{report}") }
}
