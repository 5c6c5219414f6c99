//! Engines: what runs a network.

pub mod tract;

use std::fmt::Debug;

/// Why an engine cannot load or run a network, for a person; the caller names the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the engine {engine} cannot {action} it: {cause}")]
pub struct EngineError {
    /// The engine's name.
    pub engine: &'static str,
    /// What it was about to do.
    pub action: &'static str,
    /// What went wrong.
    pub cause: String,
}

/// A network that is ready to run. Many threads run the same one.
pub trait Engine: Debug + Send + Sync {
    /// The engine's name.
    fn name(&self) -> &'static str;

    /// The shape of the output for one image, without the batch.
    fn output_shape(&self) -> &[usize];

    /// Runs the network on `rows` images: `batch` holds their values one after the other, and so
    /// does the result.
    ///
    /// # Errors
    /// Where the engine fails; not for any values of the pixels.
    fn run(&self, batch: &[f32], rows: usize) -> Result<Vec<f32>, EngineError>;
}
