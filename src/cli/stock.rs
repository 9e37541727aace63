//! `isobath export` and `isobath prune`: a model as a stock Hugging Face LLaMA folder, whole or
//! without some of its layers.

use std::path::PathBuf;

use clap::Args;
use isobath::config::Dtype;
use isobath::stock::{Layers, Request, Written, write};

use super::output;

#[derive(Args, Debug)]
struct Common {
    /// A run, a checkpoint, or any Hugging Face LLaMA folder
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Folder to write; must not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Type of the written weights: f32 or bf16
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
pub struct ExportArgs {
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug)]
pub struct PruneArgs {
    #[command(flatten)]
    common: Common,
    /// Layers to remove, counted from 1: 7, or 3..5 (which includes 5), or 3..5,9
    #[arg(long, value_name = "A..B")]
    layers: Layers,
}

pub fn export(args: ExportArgs) -> anyhow::Result<()> {
    run(args.common, Layers::default())
}

pub fn prune(args: PruneArgs) -> anyhow::Result<()> {
    run(args.common, args.layers)
}

fn run(common: Common, without: Layers) -> anyhow::Result<()> {
    let Common { model, out, dtype, json } = common;
    let written = write(&Request { model, without, out, dtype })?;
    if json {
        return output::print_json(&written);
    }
    let Written { model, out, removed, layers, parameters, bytes } = written;
    let removed = match removed.len() {
        0 => String::new(),
        count => format!(", {count} removed"),
    };
    output::print(&format!(
        "read        {}\nwritten     {}\nlayers      {layers}{removed}\nparameters  {parameters}\n\
         bytes       {bytes}\n",
        model.display(),
        out.display()
    ))
}
