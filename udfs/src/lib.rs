//! SQL functions that take images to features, fewer dimensions and classes, for any
//! [Apache DataFusion](datafusion) session.
//!
//! | module | what is in it |
//! |---|---|
//! | [`image`] | the image type, decoding, resizing, cropping, inspecting, encoding |
//! | [`embed`] | networks: the registry of models, preprocessing, engines, `embed` and `models()` |
//! | [`ml`] | statistics over vectors: standardizing and principal components |
//! | [`memory`] | the ceiling of a session's memory |
//! | [`settings`] | the `pomona.*` settings that the functions read |
//! | [`policy`] | what happens to a row whose image is broken |
//!
//! ```
//! # fn main() -> datafusion::error::Result<()> {
//! let mut ctx = datafusion::prelude::SessionContext::new();
//! pomona_udfs::register_all(&mut ctx)?;
//! # Ok(())
//! # }
//! ```
//!
//! The functions know nothing of where images come from: they work on any Binary column.

pub mod embed;
pub mod image;
pub mod memory;
pub mod ml;
pub mod policy;
pub mod settings;

use std::sync::Arc;

use datafusion::error::Result;
use datafusion::execution::FunctionRegistry;
use datafusion::logical_expr::{AggregateUDF, ScalarUDF};

/// Every scalar function of this crate.
pub fn scalar_functions() -> Vec<Arc<ScalarUDF>> {
    [image::functions(), embed::functions(), ml::scalar_functions()].concat()
}

/// Every aggregate function of this crate.
pub fn aggregate_functions() -> Vec<Arc<AggregateUDF>> {
    ml::aggregate_functions()
}

/// Registers every scalar and aggregate function of this crate.
///
/// A registry holds no table functions: [`embed::ModelsFunction`] is registered with
/// `SessionContext::register_udtf`. Settings are read when
/// [`PomonaOptions`](settings::PomonaOptions) is among the session's extensions; without it the
/// defaults hold. `pomona.models_dir` is needed while a query is planned, which a registry does not
/// tell a function: where it is set from the start, hand [`scalar_functions`] to the
/// `SessionStateBuilder`, which does, or set it by `SET` afterwards.
///
/// # Errors
/// What the registry refuses; a [`SessionContext`](datafusion::prelude::SessionContext) refuses
/// nothing and replaces functions of the same name.
pub fn register_all(registry: &mut dyn FunctionRegistry) -> Result<()> {
    for function in scalar_functions() {
        registry.register_udf(function)?;
    }
    for function in aggregate_functions() {
        registry.register_udaf(function)?;
    }
    Ok(())
}
