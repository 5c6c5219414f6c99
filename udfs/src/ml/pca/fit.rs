//! `pca_fit(v [, components])`

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, StringArray};
use arrow::datatypes::{DataType, FieldRef};
use datafusion::common::{ScalarValue, exec_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::{Accumulator, AggregateUDFImpl, Documentation, Signature};
use datafusion_macros::user_doc;

use super::decompose::Eigen;
use super::{EXACT, INCREMENTAL, KIND, MAX_EXACT_FEATURES, MAX_WIDE_COMPONENTS};
use crate::ml::arguments::{aggregate_constant, signature};
use crate::ml::fit::{Fit, FitAccumulator, state_fields};
use crate::ml::model::{ModelKind, count_column, matrix_column, numbers_column};
use crate::ml::moments::{Scatter, Spread, Summary};
use crate::ml::subspace::Subspace;
use crate::ml::vectors::coerce_vector;

/// Rows that the incremental method keeps beside one for each component.
const OVERSAMPLING: usize = 64;

/// `pca_fit(v [, components])`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "Fits principal components of vectors, in one pass. Returns a model for `pca_transform`, a struct \
                   {count, mean, components, explained_variance, explained_variance_ratio, singular_values, \
                   total_variance, method, explained_variance_error}: components are rows of loadings from the \
                   largest variance down, the ratio is the share in the variance of all features. Up to 8,192 \
                   features the method is 'exact'; beyond it is 'incremental', needs a number of components, at \
                   most 1,024, and no explained variance is less than the exact one by more than \
                   explained_variance_error. NULL and empty vectors are ignored; of no rows the model is \
                   NULL.",
    syntax_example = "pca_fit(vector [, components])",
    sql_example = r#"```sql
SELECT model['count'] AS vectors, round(model['explained_variance_ratio'][1], 3) AS explained
FROM (SELECT pca_fit(v, 1) AS model FROM (VALUES ([1.0, 2.0]), ([2.0, 4.0]), ([3.0, 7.0])) AS t(v));
```"#,
    argument(
        name = "vector",
        description = "A list of numbers; all of the same length, none NULL or NaN."
    ),
    argument(
        name = "components",
        description = "A constant: a whole number says how many, at most the features and the vectors; a share \
                       above 0.0 and up to 1.0, as many as explain that share of the variance. All, if it is not \
                       given."
    )
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(in crate::ml) struct PcaFit {
    signature: Signature,
}

impl PcaFit {
    pub(in crate::ml) fn new() -> Self {
        Self {
            signature: signature(["vector", "components"]),
        }
    }
}

impl AggregateUDFImpl for PcaFit {
    fn name(&self) -> &str {
        "pca_fit"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        match arg_types {
            [vector] => Ok(vec![coerce_vector(self.name(), vector)?]),
            [vector, components] => Ok(vec![
                coerce_vector(self.name(), vector)?,
                coerce_components(components)?,
            ]),
            _ => plan_err!(
                "pca_fit takes a vector and the number of components, not {} arguments",
                arg_types.len()
            ),
        }
    }

    fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
        Ok(KIND.data_type())
    }

    fn accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        FitAccumulator::boxed(Pca::try_new(&args)?, &args)
    }

    fn create_sliding_accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        FitAccumulator::sliding(Pca::try_new(&args)?, &args)
    }

    fn state_fields(&self, args: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        Ok(state_fields(&args))
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

fn coerce_components(data_type: &DataType) -> Result<DataType> {
    match data_type {
        t if t.is_integer() => Ok(DataType::Int64),
        t if t.is_floating() || t.is_decimal() => Ok(DataType::Float64),
        other => plan_err!(
            "pca_fit takes a whole number of components, or a share of the variance such as 0.95, not {}",
            if other.is_null() {
                "NULL".to_owned()
            } else {
                other.to_string()
            }
        ),
    }
}

/// The components to be kept.
#[derive(Debug, Clone, Copy)]
enum Components {
    All,
    Count(usize),
    Share(f64),
}

#[derive(Debug, Clone, Copy)]
struct Pca {
    components: Components,
}

impl Pca {
    fn try_new(args: &AccumulatorArgs) -> Result<Self> {
        let components = match aggregate_constant(args, "pca_fit", 1)? {
            None => Components::All,
            Some(ScalarValue::Int64(Some(k))) => match usize::try_from(k) {
                Ok(k @ 1..) => Components::Count(k),
                _ => return plan_err!("pca_fit: the number of components is at least 1, not {k}"),
            },
            Some(ScalarValue::Float64(Some(share))) if share > 0.0 && share <= 1.0 => Components::Share(share),
            Some(ScalarValue::Float64(Some(share))) => {
                return plan_err!(
                    "pca_fit: the share of the variance is above 0.0 and up to 1.0, not {share:?}; a number of \
                     components is written without a point"
                );
            }
            Some(other) => return plan_err!("pca_fit: the number of components is at least 1, not {other}"),
        };
        Ok(Self { components })
    }

    /// How many eigenvalues are needed to say how many are kept, where there are `most`.
    fn at_least(&self, most: usize) -> usize {
        match self.components {
            Components::Count(k) => k,
            Components::All | Components::Share(_) => most,
        }
    }

    /// How many of `values`, falling and with the sum `total`, are kept, where there are `most`.
    fn chosen(&self, values: &[f64], total: f64, most: usize) -> usize {
        match self.components {
            Components::All => most,
            Components::Count(k) => k,
            // Without any variance, any component explains all there is.
            Components::Share(_) if total == 0.0 => 1,
            Components::Share(share) => enough(values.iter().map(|value| value / total), share).unwrap_or(most),
        }
    }
}

/// Shares of the variance whose sum misses the wanted one by this much miss it by rounding.
const SHARE_TOLERANCE: f64 = 1e-12;

/// How many shares it takes, from the first on, to reach a sum.
pub(super) fn enough(shares: impl Iterator<Item = f64>, sum: f64) -> Option<usize> {
    let sum = sum - SHARE_TOLERANCE;
    let mut reached = 0.0;
    let before = shares.take_while(|share| {
        reached += share;
        reached < sum
    });
    let before = before.count();
    (reached >= sum).then_some(before + 1)
}

impl Fit for Pca {
    type Spread = PcaSpread;

    fn name(&self) -> &'static str {
        "pca_fit"
    }

    fn kind(&self) -> &'static ModelKind {
        &KIND
    }

    fn plan(&self) -> usize {
        match self.components {
            Components::Count(k) => k + k.max(OVERSAMPLING),
            Components::All | Components::Share(_) => OVERSAMPLING,
        }
    }

    fn check_features(&self, features: usize) -> Result<()> {
        match self.components {
            Components::Count(k) if k > features => exec_err!(
                "pca_fit: {k} components need vectors of at least as many features, but these have {features}"
            ),
            Components::Count(1..=MAX_WIDE_COMPONENTS) => Ok(()),
            _ if features <= MAX_EXACT_FEATURES => Ok(()),
            _ => exec_err!(
                "pca_fit: vectors of {features} features: beyond {MAX_EXACT_FEATURES} it takes a number of \
                 components, at most {MAX_WIDE_COMPONENTS}, such as pca_fit(v, 100); pca_components_for tells from \
                 the model how many reach a share"
            ),
        }
    }

    fn workspace(&self, features: usize) -> usize {
        let numbers = match features {
            // The eigenvectors, and the solver's two matrices of that size.
            0..=MAX_EXACT_FEATURES => 3 * features * features,
            // The same for the rows.
            _ => 3 * self.plan() * features,
        };
        numbers * size_of::<f64>()
    }

    fn columns(&self, moments: &Summary<'_, PcaSpread>) -> Result<Vec<ArrayRef>> {
        let features = moments.mean.len();
        let most = usize::try_from(moments.count).map_or(features, |count| features.min(count));
        if let Components::Count(k @ 1..) = self.components
            && k > most
        {
            return exec_err!("pca_fit: {k} components need at least as many vectors, but there are {most}");
        }
        let (eigen, error) = match &*moments.spread {
            PcaSpread::Matrix(scatter) => (Eigen::of_matrix(scatter.lower(), self.at_least(most))?, 0.0),
            PcaSpread::Rows(subspace) => (Eigen::of_rows(subspace.rows(), features)?, subspace.error()),
        };
        let total = moments.spread.total();
        let k = self.chosen(eigen.values(), total, most);
        let values = &eigen.values()[..k];

        // One vector varies in nothing, and its sum of squares is 0 whatever it is divided by.
        let freedom = moments.count.saturating_sub(1).max(1) as f64;
        let ratio = |value: &f64| if total > 0.0 { value / total } else { 0.0 };
        let method = if features > MAX_EXACT_FEATURES {
            INCREMENTAL
        } else {
            EXACT
        };
        Ok(vec![
            count_column(moments.count),
            numbers_column(moments.mean.clone()),
            matrix_column(eigen.vectors(k)?, features)?,
            numbers_column(values.iter().map(|value| value / freedom).collect()),
            numbers_column(values.iter().map(ratio).collect()),
            numbers_column(values.iter().map(|value| value.sqrt()).collect()),
            Arc::new(Float64Array::from(vec![total / freedom])),
            Arc::new(StringArray::from(vec![method])),
            Arc::new(Float64Array::from(vec![error / freedom])),
        ])
    }
}

/// The spread that principal components are found in.
#[derive(Debug)]
enum PcaSpread {
    /// Exact.
    Matrix(Scatter),
    /// Of vectors too long for that; or of a few vectors, and then exact.
    Rows(Subspace),
}

impl Spread for PcaSpread {
    /// The rows that [`Subspace`] keeps.
    type Plan = usize;

    fn zeros(rank: usize, features: usize) -> Self {
        match features {
            0..=MAX_EXACT_FEATURES => Self::Matrix(Scatter::zeros((), features)),
            _ => Self::Rows(Subspace::zeros(rank, features)),
        }
    }

    fn block_rows(rank: usize, features: usize) -> usize {
        match features {
            0..=MAX_EXACT_FEATURES => Scatter::block_rows((), features),
            _ => Subspace::block_rows(rank, features),
        }
    }

    fn add_rows(&mut self, rows: &[f64], features: usize) {
        match self {
            Self::Matrix(scatter) => scatter.add_rows(rows, features),
            Self::Rows(subspace) => subspace.add_rows(rows, features),
        }
    }

    // Many small groups of long vectors: no matrix of features x features for any of them.
    fn of_few_rows(_rank: usize, rows: &[f64], features: usize) -> Self {
        let count = rows.len() / features;
        if count < features {
            Self::Rows(Subspace::of_few_rows(count, rows, features))
        } else {
            Self::Matrix(Scatter::of_few_rows((), rows, features))
        }
    }

    fn packed_len(rank: usize, features: usize) -> usize {
        match features {
            0..=MAX_EXACT_FEATURES => Scatter::packed_len((), features),
            _ => Subspace::packed_len(rank, features),
        }
    }

    fn pack(&self) -> Vec<f64> {
        match self {
            Self::Matrix(scatter) => scatter.pack(),
            Self::Rows(subspace) => subspace.pack(),
        }
    }

    fn add_packed(&mut self, packed: &[f64], features: usize) {
        match self {
            Self::Matrix(scatter) => scatter.add_packed(packed, features),
            Self::Rows(subspace) => subspace.add_packed(packed, features),
        }
    }

    fn total(&self) -> f64 {
        match self {
            Self::Matrix(scatter) => scatter.total(),
            Self::Rows(subspace) => subspace.total(),
        }
    }

    fn bytes(rank: usize, features: usize) -> usize {
        match features {
            0..=MAX_EXACT_FEATURES => Scatter::bytes((), features),
            _ => Subspace::bytes(rank, features),
        }
    }
}
