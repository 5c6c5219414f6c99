//! Statistics over vectors: standardizing, principal components and classification.
//!
//! A vector is a `FixedSizeList`, `List` or `LargeList` of `Float32` or `Float64` (other numbers are
//! cast to `Float64`). A function that ends in `_fit` is an aggregate: it reads vectors and returns
//! a struct, the model. The scalar function beside it takes the model as its last argument.
//!
//! | fit | model | apply |
//! |---|---|---|
//! | `standardize_fit(v)` | `{count, mean, std}` | `standardize(v, model)` |
//! | `pca_fit(v, k)` | `{count, mean, components, explained_variance, …}` | `pca_transform(v, model)`, `pca_inverse(scores, model)` |
//! | `lda_fit(v, label)`, `logistic_fit(v, label)` | `{kind, labels, coefficients, intercepts, …}` | `classify(v, model)`, `classify_proba(v, model)` |
//!
//! All arithmetic is in `f64`. What a fit holds merges: the results of partitions or machines give
//! the model that all rows together give.
//!
//! NULL and empty vectors give NULL, and fits ignore them. Vectors of another length, NULL, NaN or an
//! infinity inside a vector are errors.

mod arguments;
mod eigen;
mod fit;
mod labels;
mod linear;
mod model;
mod moments;
mod pca;
mod projection;
mod sliding;
mod standardize;
mod state;
mod subspace;
mod vectors;

use std::sync::Arc;

use datafusion::logical_expr::{AggregateUDF, ScalarUDF};

/// The scalar functions of this module, those that apply models.
pub fn scalar_functions() -> Vec<Arc<ScalarUDF>> {
    vec![
        Arc::new(ScalarUDF::from(standardize::Standardize::new())),
        Arc::new(ScalarUDF::from(pca::PcaTransform::new())),
        Arc::new(ScalarUDF::from(pca::PcaInverse::new())),
        Arc::new(ScalarUDF::from(pca::PcaTruncate::new())),
        Arc::new(ScalarUDF::from(pca::PcaComponentsFor::new())),
        Arc::new(ScalarUDF::from(linear::Classify::new())),
        Arc::new(ScalarUDF::from(linear::ClassifyProba::new())),
    ]
}

/// The aggregate functions of this module, those that fit models.
pub fn aggregate_functions() -> Vec<Arc<AggregateUDF>> {
    vec![
        Arc::new(AggregateUDF::from(standardize::StandardizeFit::new())),
        Arc::new(AggregateUDF::from(pca::PcaFit::new())),
        Arc::new(AggregateUDF::from(linear::LdaFit::new())),
        Arc::new(AggregateUDF::from(linear::LogisticFit::new())),
    ]
}
