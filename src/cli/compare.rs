//! `isobath compare`: several variants of one configuration, on the same data from the same seeds.

use std::path::PathBuf;

use clap::Args;
use isobath::Result;
use isobath::compare::{COMPARISON, Request, Variant, compare};
use isobath::report::{Heading, page, read_runs};
use isobath::train::{Console, Interrupt, default_folder};
use jiff::Timestamp;

use super::config::ConfigArgs;
use super::output;

/// The page of all runs, in the folder of a comparison.
const PAGE: &str = "report.html";

#[derive(Args, Debug)]
pub struct CompareArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Norm placements to train, separated by commas; the others are compared with the first
    #[arg(
        long,
        value_name = "PLACEMENT,...",
        value_delimiter = ',',
        required_unless_present = "variants"
    )]
    norms: Vec<String>,
    /// Another variant, for instance fast:model.placement=lns,optimizer.lr=8e-3; may be repeated
    #[arg(long = "variant", value_name = "NAME:KEY=VALUE,...", id = "variants")]
    variants: Vec<String>,
    /// Runs of each variant, with seeds that count up from the configuration's
    #[arg(long, value_name = "N", default_value = "1")]
    seeds: u64,
    /// Folder of all runs [default: runs/NAME]; what is there already is continued or only read
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl CompareArgs {
    /// Errors: a placement or variant that cannot be read; those of the configuration.
    fn request(&self) -> Result<Request> {
        let base = self.config.resolve()?;
        let norms = self.norms.iter().map(|name| Variant::of_placement(name));
        let others = self.variants.iter().map(|text| Variant::parse(text));
        let variants = norms.chain(others).collect::<Result<_>>()?;
        let folder = self.out.clone().unwrap_or_else(|| default_folder(&base.name));
        Ok(Request { base, variants, seeds: self.seeds, folder })
    }
}

pub fn run(args: CompareArgs) -> anyhow::Result<()> {
    let request = args.request()?;
    let Some(comparison) = compare(&request, Interrupt::listen()?, &mut Console::new())? else {
        eprintln!("stopped; the same command goes on");
        return Ok(());
    };
    // Runs of a variant that diverged at its first step have nothing to draw.
    let folders = comparison.variants.iter().flat_map(|variant| &variant.runs);
    let folders: Vec<PathBuf> =
        folders.filter(|run| run.step > 0).map(|run| run.folder.clone()).collect();
    let page_at = request.folder.join(PAGE);
    if !folders.is_empty() {
        let heading = Heading { title: Some(request.base.name.clone()), made: Timestamp::now() };
        let page = page(&heading, &read_runs(&folders)?);
        output::save(&page_at, page.as_bytes())?;
        eprintln!("report      {}", page_at.display());
    }
    eprintln!("runs        {}", request.folder.display());
    eprintln!("comparison  {}", request.folder.join(COMPARISON).display());
    if args.json {
        return output::print_json(&comparison);
    }
    output::print(&comparison.to_string())
}
