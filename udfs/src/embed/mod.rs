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
mod pinned;
mod places;
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

/// Which argument of a function, counted from 0, names a model.
pub fn model_argument(name: &str) -> Option<usize> {
    matches!(name, function::EMBED | function::RESNET_EMBED).then_some(1)
}

/// The model of a function that is called without that argument.
pub fn default_model(name: &str) -> Option<&'static str> {
    (name == function::RESNET_EMBED).then_some(function::RESNET)
}

/// The scalar functions of this module.
pub fn functions() -> Vec<Arc<ScalarUDF>> {
    vec![
        Arc::new(ScalarUDF::from(function::Embed::default())),
        Arc::new(ScalarUDF::from(function::ResnetEmbed::default())),
    ]
}
