//! `pomona model add` and `pomona model list`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use datafusion::common::plan_datafusion_err;
use datafusion::error::Result;
use pomona_udfs::embed::{Preset, add_model, registry};

use super::print::note;
use super::run::{Runner, Stop};

#[derive(Debug, Subcommand)]
pub(super) enum Action {
    /// Adds a network under a name: checks it by running it once, and keeps it with its preprocessing
    Add(Add),
    /// Lists the networks that embed() finds
    List,
}

#[derive(Debug, Args)]
pub(super) struct Add {
    /// The name that embed(image, 'name') takes
    name: String,
    /// The network: one image goes in
    #[arg(value_name = "FILE.onnx")]
    file: PathBuf,
    /// How images were prepared when it was trained
    #[arg(long, value_name = "keras|torchvision|tf|raw")]
    preset: Preset,
    /// The folder of models that it is added to [default: the user's]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Replaces a network of the same name
    #[arg(long)]
    force: bool,
}

const LIST: &str = "SELECT name, input_width || 'x' || input_height AS input, dimensions, \
                    coalesce(error, preprocessing) AS preprocessing, engine, left(sha256, 12) AS sha256, location \
                    FROM models() ORDER BY name";

pub(super) async fn run(action: Action, runner: &mut Runner) -> Result<(), Stop> {
    match action {
        Action::Add(arguments) => Ok(add(arguments)?),
        Action::List => {
            runner.print.timing = false;
            runner.statement(LIST).await
        }
    }
}

fn add(arguments: Add) -> Result<()> {
    let Add {
        name,
        file,
        preset,
        dir,
        force,
    } = arguments;
    let usual = registry::user_models_dir();
    let is_usual = dir.is_none() || dir == usual;
    let folder = dir
        .or(usual)
        .ok_or_else(|| plan_datafusion_err!("there is no folder for the user's data: give one with --dir DIR"))?;
    let info = add_model(&name, &file, preset, &folder, force)?;
    note(format_args!(
        "Added {}: images of {}x{} become {} numbers. It is in {}.",
        info.name, info.input_width, info.input_height, info.dimensions, info.location
    ));
    if !is_usual {
        note(format_args!(
            "It is found with --models-dir {0}, or SET pomona.models_dir = '{0}'.",
            folder.display()
        ));
    }
    Ok(())
}
