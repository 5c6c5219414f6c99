//! `pomona sample`.

use clap::Args;
use datafusion::datasource::listing::ListingTableUrl;
use datafusion_cli::catalog::substitute_tilde;

use super::print::{note, size};
use super::run::{Runner, Stop};
use crate::sample::{SAMPLE_IMAGES, SAMPLE_SEED, write_sample};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// A folder, or a URL such as s3://bucket/fruits/
    #[arg(value_name = "DIR|URL")]
    target: String,
    /// How many images there are, in Training/ and Test/ together
    #[arg(long, value_name = "N", default_value_t = SAMPLE_IMAGES)]
    images: usize,
    /// Another seed draws other pictures
    #[arg(long, value_name = "S", default_value_t = SAMPLE_SEED)]
    seed: u64,
}

pub(super) async fn run(arguments: Arguments, runner: &Runner) -> Result<(), Stop> {
    let Arguments { target, images, seed } = arguments;
    let url = ListingTableUrl::parse(substitute_tilde(target.clone()))?;
    let store = runner.ctx.runtime_env().object_store(&url)?;
    let summary = write_sample(store, url.prefix().clone(), images, seed).await?;
    note(format_args!(
        "Wrote {} images to learn from and {} to test with, {}, to {target}.",
        summary.training,
        summary.test,
        size(summary.bytes)
    ));
    Ok(())
}
