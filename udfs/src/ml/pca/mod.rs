//! Principal component analysis from merged moments, in one pass.
//!
//! The reference is scikit-learn's `PCA(svd_solver="full")`: vectors are centred, the variance that a
//! component explains is s² / (n - 1), its ratio is over the total variance and not only over that of
//! the components kept, and the sign of a component makes its largest loading positive.
//!
//! Up to [`MAX_EXACT_FEATURES`] the method is exact: what is decomposed is the scatter matrix, by
//! faer's solver for symmetric matrices (tridiagonal form, divide and conquer), for a few components of
//! many features by the block Lanczos method of [`decompose`], or, where the rows are few, the rows. Beyond, it is that of [`subspace`](super::subspace), and the model says so.
//!
//! `linfa_reduction::Pca` is not used: it needs all rows in memory, where a fit here sees them once
//! and in parts; its `explained_variance` divides by k - 1 instead of n - 1, and its ratio sums over
//! the k components kept. Its components and singular values are right, and `tests/statistics.rs`
//! compares ours with them.

mod choose;
mod decompose;
mod fit;
mod project;

use std::sync::LazyLock;

use arrow::datatypes::DataType;

use super::model::ModelKind;
use super::vectors::list_of;

pub(super) use choose::{PcaComponentsFor, PcaTruncate};
pub(super) use fit::PcaFit;
pub(super) use project::{PcaInverse, PcaTransform};

/// The most features that the exact method takes: their scatter matrix has 512 MiB.
const MAX_EXACT_FEATURES: usize = 8192;

/// The most components of vectors beyond that.
const MAX_WIDE_COMPONENTS: usize = 1024;

/// `method` of a model whose numbers are exact.
const EXACT: &str = "exact";

/// `method` of a model of [`subspace`](super::subspace).
const INCREMENTAL: &str = "incremental";

static KIND: LazyLock<ModelKind> = LazyLock::new(|| {
    let numbers = || list_of(DataType::Float64);
    ModelKind::new(
        "pca_fit",
        [
            ("count", DataType::Int64),
            ("mean", numbers()),
            ("components", list_of(numbers())),
            ("explained_variance", numbers()),
            ("explained_variance_ratio", numbers()),
            ("singular_values", numbers()),
            ("total_variance", DataType::Float64),
            ("method", DataType::Utf8),
            ("explained_variance_error", DataType::Float64),
        ],
    )
});
