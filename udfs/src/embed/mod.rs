//! Networks: models by name, what they take, the engines that run them, and the functions over them.
//!
//! ```text
//! 'resnet50' ─► registry ─┬─► graph: where the embedding is ─► engine ──────┐
//!                         └─► preprocess ─► pixels as the network sees them ─┴─► readout ─► vector
//!                             content, image ─┘
//! ```
//!
//! A broken or missing model is bad set-up and always fails, whatever `pomona.on_error` says; an
//! image that cannot be decoded, resized or embedded is bad data and follows it.

pub mod engines;
pub mod function;
pub mod graph;
pub mod models;
pub mod preprocess;
mod protobuf;
pub mod readout;
pub mod registry;
pub mod strides;

#[cfg(test)]
#[path = "../../../tests/common/networks.rs"]
mod networks;

use std::sync::Arc;

use datafusion::logical_expr::ScalarUDF;

pub use models::{ModelsFunction, Preset, add_model};
pub use registry::register_bundled;

/// The scalar functions of this module.
pub fn functions() -> Vec<Arc<ScalarUDF>> {
    vec![
        Arc::new(ScalarUDF::from(function::Embed::default())),
        Arc::new(ScalarUDF::from(function::ResnetEmbed::default())),
    ]
}
