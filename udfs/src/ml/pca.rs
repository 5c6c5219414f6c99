//! Principal component analysis, exact, from merged moments.
//!
//! The reference is scikit-learn's `PCA(svd_solver="full")`: vectors are centred, the variance that a
//! component explains is s² / (n - 1), its ratio is over the total variance and not only over that of
//! the components kept, and the sign of a component makes its largest loading positive.
//!
//! `linfa_reduction::Pca` is not used: it needs all rows in memory, where a fit here sees them once
//! and in parts; its `explained_variance` divides by k - 1 instead of n - 1, and its ratio sums over
//! the k components kept. Its components and singular values are right, and `tests/statistics.rs`
//! compares ours with them. What is decomposed here is the scatter matrix, by faer's solver for
//! symmetric matrices (tridiagonal form, divide and conquer).

use std::sync::{Arc, LazyLock};

use arrow::array::{ArrayRef, Float64Array, ListArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, FieldRef, Schema};
use datafusion::common::utils::take_function_args;
use datafusion::common::{ScalarValue, exec_datafusion_err, exec_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::{
    Accumulator, AggregateUDFImpl, ColumnarValue, Documentation, ScalarFunctionArgs, ScalarUDFImpl, Signature,
    Volatility,
};
use datafusion_macros::user_doc;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par, Side};

use super::fit::{Fit, FitAccumulator, state_fields};
use super::model::{ModelKind, Models, count_column, list_column};
use super::moments::{Scatter, Spread, Summary};
use super::vectors::{VectorBuilder, VectorColumn, coerce_vector, element_type, list_of};

/// The most features that the exact method takes: their scatter matrix has 512 MiB.
const MAX_FEATURES: usize = 8192;

/// The most vectors that are centred and projected together.
const BLOCK_ROWS: usize = 256;

/// Loadings that are this close to the largest one, relatively, are as large: which of them comes
/// out ahead is a matter of rounding, and the sign must not be.
const LOADING_TOLERANCE: f64 = 1e-8;

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
        ],
    )
});

/// `pca_fit(v, k)`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "Fits the first k principal components of vectors. Returns a model for `pca_transform`, a struct \
                   {count, mean, components, explained_variance, explained_variance_ratio, singular_values, \
                   total_variance}: components are k rows of loadings from the largest variance down, the ratio is \
                   the share in the variance of all features. Exact, in one pass, for up to 8,192 features. NULL and \
                   empty vectors are ignored; without any other vector the model is NULL.",
    syntax_example = "pca_fit(vector, k)",
    sql_example = r#"```sql
SELECT model['count'] AS vectors, round(model['explained_variance_ratio'][1], 3) AS explained
FROM (SELECT pca_fit(v, 1) AS model FROM (VALUES ([1.0, 2.0]), ([2.0, 4.0]), ([3.0, 7.0])) AS t(v));
```"#,
    argument(
        name = "vector",
        description = "A list of numbers; all of the same length, none NULL or NaN."
    ),
    argument(
        name = "k",
        description = "How many components: a constant, at least 1, at most the features and the vectors."
    )
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct PcaFit {
    signature: Signature,
}

impl PcaFit {
    pub(super) fn new() -> Self {
        Self {
            signature: Signature::user_defined(Volatility::Immutable),
        }
    }
}

impl AggregateUDFImpl for PcaFit {
    fn name(&self) -> &str {
        KIND.fit()
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        let [vector, k] = take_function_args(self.name(), arg_types)?;
        if !k.is_integer() && !k.is_null() {
            return plan_err!(
                "{} takes the number of components as a whole number, not {k}",
                self.name()
            );
        }
        Ok(vec![coerce_vector(self.name(), vector)?, DataType::Int64])
    }

    fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
        Ok(KIND.data_type())
    }

    fn accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        FitAccumulator::boxed(Components { k: constant_k(&args)? }, &args)
    }

    fn state_fields(&self, args: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        Ok(state_fields(&args))
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// The second argument of a call: it makes the model, so it cannot differ from row to row.
fn constant_k(args: &AccumulatorArgs) -> Result<usize> {
    let no_columns = RecordBatch::new_empty(Arc::new(Schema::empty()));
    let value = match args.exprs.get(1).map(|k| k.evaluate(&no_columns)) {
        Some(Ok(ColumnarValue::Scalar(ScalarValue::Int64(k)))) => k,
        _ => return plan_err!("pca_fit takes the number of components as a constant, such as pca_fit(v, 25)"),
    };
    match value.and_then(|k| usize::try_from(k).ok()) {
        Some(k @ 1..) => Ok(k),
        _ => plan_err!(
            "pca_fit: the number of components is at least 1, not {}",
            value.map_or_else(|| "NULL".to_owned(), |k| k.to_string())
        ),
    }
}

#[derive(Debug)]
struct Components {
    k: usize,
}

impl Fit for Components {
    type Spread = Scatter;

    fn kind(&self) -> &'static ModelKind {
        &KIND
    }

    fn check_features(&self, features: usize) -> Result<()> {
        if features > MAX_FEATURES {
            return exec_err!(
                "pca_fit: vectors of {features} features, but it holds a matrix of features x features and takes at \
                 most {MAX_FEATURES}: use a pooled embedding, or fewer features"
            );
        }
        if self.k > features {
            return exec_err!(
                "pca_fit: {} components need vectors of at least as many features, but these have {features}",
                self.k
            );
        }
        Ok(())
    }

    fn columns(&self, moments: &Summary<'_, Scatter>) -> Result<Vec<ArrayRef>> {
        if self.k as u64 > moments.count {
            return exec_err!(
                "pca_fit: {} components need at least as many vectors, but there are {}",
                self.k,
                moments.count
            );
        }
        let features = moments.mean.len();
        let (eigenvalues, components) = largest_eigenpairs(moments.spread.lower(), self.k)?;

        // One vector varies in nothing, and its sum of squares is 0 whatever it is divided by.
        let freedom = moments.count.saturating_sub(1).max(1) as f64;
        let total = moments.spread.total();
        let ratio = |eigenvalue: &f64| if total > 0.0 { eigenvalue / total } else { 0.0 };
        let numbers = |values: Vec<f64>| list_column(Arc::new(Float64Array::from(values)));

        let components = ListArray::try_new(
            Arc::new(Field::new_list_field(DataType::Float64, true)),
            OffsetBuffer::from_repeated_length(features, self.k),
            Arc::new(Float64Array::from(components)),
            None,
        )?;
        Ok(vec![
            count_column(moments.count),
            numbers(moments.mean.clone()),
            list_column(Arc::new(components)),
            numbers(eigenvalues.iter().map(|eigenvalue| eigenvalue / freedom).collect()),
            numbers(eigenvalues.iter().map(ratio).collect()),
            numbers(eigenvalues.iter().map(|eigenvalue| eigenvalue.sqrt()).collect()),
            Arc::new(Float64Array::from(vec![total / freedom])),
        ])
    }
}

/// The `k` largest eigenvalues of a positive semidefinite matrix (d x d, its lower triangle is
/// read), from the largest down, and their eigenvectors (k x d, row-major, of length 1).
fn largest_eigenpairs(matrix: MatRef<'_, f64>, k: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let eigen = matrix
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| exec_datafusion_err!("pca_fit: the eigenvalues of the scatter matrix do not converge"))?;
    let (mut values, mut vectors) = (Vec::with_capacity(k), Vec::with_capacity(k * matrix.ncols()));
    let ascending = eigen.S().column_vector().iter().enumerate();
    for (j, value) in ascending.rev().take(k) {
        // Rounding takes the zeros of a rank-deficient matrix to either side of zero.
        values.push(if *value > 0.0 { *value } else { 0.0 });
        let mut vector: Vec<f64> = eigen.U().col(j).iter().copied().collect();
        fix_sign(&mut vector);
        vectors.append(&mut vector);
    }
    if vectors.iter().chain(&values).any(|x| !x.is_finite()) {
        return exec_err!("pca_fit: the vectors hold numbers whose squares are too large for Float64");
    }
    Ok((values, vectors))
}

/// Makes the largest loading positive, the first of them where several are as large.
fn fix_sign(loadings: &mut [f64]) {
    let largest = loadings.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
    let first = loadings.iter().find(|x| x.abs() >= largest * (1.0 - LOADING_TOLERANCE));
    if first.is_some_and(|x| *x < 0.0) {
        loadings.iter_mut().for_each(|x| *x = -*x);
    }
}

/// `pca_transform(v, model)`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "Takes the mean of the fit from a vector and projects it onto the principal components, with a model \
                   of `pca_fit`. Returns k numbers, of the element type of the vector, Float64 for whole \
                   numbers.",
    syntax_example = "pca_transform(vector, model)",
    sql_example = r#"```sql
SELECT round(pca_transform([5.0, 2.0], (
    SELECT pca_fit(v, 1) FROM (VALUES ([1.0, 2.0]), ([2.0, 2.0]), ([3.0, 2.0])) AS t(v)
))[1], 3) AS score;
```"#,
    argument(
        name = "vector",
        description = "A list of numbers, as long as those of the fit. NULL or empty: NULL."
    ),
    argument(name = "model", description = "What `pca_fit` returned.")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct PcaTransform {
    signature: Signature,
}

impl PcaTransform {
    pub(super) fn new() -> Self {
        Self {
            signature: Signature::user_defined(Volatility::Immutable),
        }
    }
}

impl ScalarUDFImpl for PcaTransform {
    fn name(&self) -> &str {
        "pca_transform"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        let [vector, model] = take_function_args(self.name(), arg_types)?;
        Ok(vec![
            coerce_vector(self.name(), vector)?,
            KIND.coerce(self.name(), model)?,
        ])
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        let [vector, _] = take_function_args(self.name(), arg_types)?;
        Ok(list_of(element_type(vector)?.clone()))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [vectors, model] = take_function_args(self.name(), &args.args)?;
        let vectors = vectors.to_array(args.number_rows)?;
        let models = KIND.read(self.name(), model, args.number_rows)?;
        let vectors = VectorColumn::try_new(self.name(), vectors.as_ref())?;
        let scores = VectorBuilder::try_new(args.return_type(), args.number_rows)?;
        Ok(ColumnarValue::Array(transform(&vectors, &models, scores)?))
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// `(x - mean) · componentsᵀ` for each vector, as one matrix product for a block of them.
fn transform(vectors: &VectorColumn<'_>, models: &Models<'_>, mut scores: VectorBuilder) -> Result<ArrayRef> {
    let mut present = Vec::with_capacity(BLOCK_ROWS);
    let mut centred = vec![];
    let mut products: Vec<f64> = vec![];
    for run in models.runs() {
        if models.is_null(run.start) {
            run.for_each(|_| scores.append_null());
            continue;
        }
        let mean = models.vector(run.start, "mean")?;
        let features = mean.len();
        let components = models.matrix(run.start, "components", features)?;
        let k = components.len() / features;

        for block in run.clone().step_by(BLOCK_ROWS) {
            present.clear();
            centred.clear();
            for i in block..run.end.min(block + BLOCK_ROWS) {
                let vector = vectors.get(i)?;
                present.push(vector.is_some());
                let Some(vector) = vector else { continue };
                models.check_length(vector.len(), features)?;
                let start = centred.len();
                vector.extend_into(&mut centred);
                centred[start..].iter_mut().zip(mean).for_each(|(x, mean)| *x -= mean);
            }
            let rows = present.iter().filter(|present| **present).count();
            products.resize(rows * k, 0.0);
            if rows > 0 {
                matmul(
                    MatMut::from_row_major_slice_mut(&mut products, rows, k),
                    Accum::Replace,
                    MatRef::from_row_major_slice(&centred, rows, features),
                    MatRef::from_row_major_slice(components, k, features).transpose(),
                    1.0,
                    Par::Seq,
                );
            }
            let mut products = products.chunks_exact(k);
            for present in &present {
                match present.then(|| products.next()).flatten() {
                    Some(product) => scores.append(product.iter().copied()),
                    None => scores.append_null(),
                }
            }
        }
    }
    scores.finish()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use faer::Mat;

    use super::*;

    #[test]
    fn eigenvalues_fall_and_eigenvectors_are_rows() {
        let matrix = Mat::from_fn(3, 3, |i, j| if i == j { [1.0, 9.0, 4.0][i] } else { 0.0 });
        let (values, vectors) = largest_eigenpairs(matrix.as_ref(), 2).unwrap();
        for (found, expected) in values
            .iter()
            .chain(&vectors)
            .zip([9.0, 4.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
        {
            assert!((found - expected).abs() < 1e-14, "{values:?} {vectors:?}");
        }
    }

    #[test]
    fn a_matrix_without_variance_still_has_directions() {
        for features in [1, 2, 3, 200] {
            let (values, vectors) = largest_eigenpairs(Mat::zeros(features, features).as_ref(), features).unwrap();
            assert!(values.iter().all(|value| *value == 0.0));
            let length: f64 = vectors.iter().map(|x| x * x).sum();
            assert!((length - features as f64).abs() < 1e-9);
        }
    }

    #[test]
    fn the_sign_does_not_hang_on_rounding() {
        for tiny in [-1e-15, 0.0, 1e-15] {
            let mut loadings = [-0.5, 0.5 + tiny, 0.1];
            fix_sign(&mut loadings);
            assert_eq!(loadings[0], 0.5);
        }
        let mut loadings = [0.1, -0.9, 0.2];
        fix_sign(&mut loadings);
        assert_eq!(loadings, [-0.1, 0.9, -0.2]);
    }
}
