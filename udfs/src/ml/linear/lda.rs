//! Linear discriminant analysis from merged moments: a normal distribution for each label, with its own
//! mean and one covariance for all.
//!
//! The reference is scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)`: the pooled
//! covariance divides by the rows, the priors are the labels' shares, and the score of a label with
//! mean `m` and prior `π` is `xᵀ Σ⁻¹ m - ½ mᵀ Σ⁻¹ m + ln π`. Here vectors and means are taken from the
//! overall mean first, which keeps the digits that a common offset would cost; the scores of all labels
//! then differ from the above by the same number, and no probability does.
//!
//! Where vectors of a label do not differ at all, any covariance is too large, and the nearest mean
//! wins: see [`discriminants`].

use std::borrow::Cow;
use std::cmp::Ordering;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, UInt64Array};
use arrow::datatypes::{DataType, FieldRef, UInt64Type};
use datafusion::common::{ScalarValue, exec_datafusion_err, exec_err, internal_err};
use datafusion::error::Result;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::{Accumulator, AggregateUDFImpl, Documentation, Signature};
use datafusion_macros::user_doc;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};

use super::class_moments::{BLOCK_ROWS, ClassMoments, State, Summary};
use super::shrinkage::Shrinkage;
use super::{
    CORRECT_ROWS, LDA, LinearModel, check_label_count, check_labels, coerce_fit, correct, labelled_rows, model_type,
    no_model,
};
use crate::ml::arguments::{aggregate_constant, signature};
use crate::ml::eigen;
use crate::ml::fit::{if_large, known_features, length_error, refuse_distinct};
use crate::ml::labels::{Label, LabelColumn, LabelType, label_array};
use crate::ml::moments::{Scatter, Spread};
use crate::ml::sliding::Sliding;
use crate::ml::state::{self, Numbers, elements, list, list_type, numbers, numbers_type, total};

const NAME: &str = "lda_fit";

/// The most features that it takes: their scatter matrix has 512 MiB.
const MAX_FEATURES: usize = 8192;

/// Rounding moves equal vectors by this much, relative to the distances between the labels' means.
const ROUNDING: f64 = 64.0 * f64::EPSILON;

/// `lda_fit(v, label [, shrinkage])`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "Fits linear discriminant analysis: each label has its mean, and all have one covariance. Returns a \
                   linear model for `classify` and `classify_proba`, a struct {kind, count, labels, label_counts, \
                   coefficients, intercepts, regularization, training_accuracy, training_rows, converged}, in which \
                   regularization is the shrinkage. One pass, for up to 8,192 features. training_accuracy is the \
                   share of rows that the model classifies as they are labelled, of all rows up to about 1,000 and \
                   of a sample beyond. Rows without a vector or a label are ignored; of no rows the model is \
                   NULL.",
    syntax_example = "lda_fit(vector, label [, shrinkage])",
    sql_example = r#"```sql
SELECT model['labels'] AS labels, model['label_counts'] AS label_counts, model['training_accuracy'] AS training_accuracy
FROM (
    SELECT lda_fit(v, label) AS model
    FROM (VALUES ([1.0, 1.0], 'Kiwi'), ([1.0, 2.0], 'Kiwi'), ([2.0, 1.0], 'Kiwi'),
                 ([5.0, 5.0], 'Plum'), ([5.0, 6.0], 'Plum'), ([6.0, 5.0], 'Plum')) AS t(v, label)
);
```"#,
    argument(
        name = "vector",
        description = "A list of numbers; all of the same length, none NULL or NaN."
    ),
    argument(
        name = "label",
        description = "A string, a whole number or a boolean: at least two different ones, each of at least two \
                       vectors."
    ),
    argument(
        name = "shrinkage",
        description = "How far the covariance is moved towards one that is the same in all directions: a constant, \
                       from 0 (not at all: where it is singular, by its pseudo-inverse) to 1; or 'auto', the \
                       default, which finds it from the data (Ledoit-Wolf, Rao-Blackwellized) and scales features \
                       to unit variance for it. A number is for features of like scale: standardize first."
    )
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(in crate::ml) struct LdaFit {
    signature: Signature,
}

impl LdaFit {
    pub(in crate::ml) fn new() -> Self {
        Self {
            signature: signature(["vector", "label", "shrinkage"]),
        }
    }
}

impl AggregateUDFImpl for LdaFit {
    fn name(&self) -> &str {
        NAME
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        let mut types = coerce_fit(NAME, arg_types)?;
        if let [_, _, shrinkage] = types.as_mut_slice() {
            *shrinkage = Shrinkage::coerce(NAME, shrinkage)?;
        }
        Ok(types)
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        model_type(NAME, arg_types)
    }

    fn accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        Ok(Box::new(LdaAccumulator::try_new(&args)?))
    }

    fn create_sliding_accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        let LdaAccumulator {
            label_type, shrinkage, ..
        } = LdaAccumulator::try_new(&args)?;
        Ok(Sliding::boxed(move || {
            Box::new(LdaAccumulator::new(label_type, shrinkage))
        }))
    }

    fn state_fields(&self, args: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        let labels = label_type(args.input_fields)?.data_type();
        let fields = [
            ("labels", list_type(labels.clone())),
            ("counts", list_type(DataType::UInt64)),
            ("origin", numbers_type()),
            ("shifts", numbers_type()),
            ("within", numbers_type()),
            ("pending", numbers_type()),
            ("pending_labels", list_type(labels.clone())),
            ("sample", numbers_type()),
            ("sample_labels", list_type(labels)),
            ("ignored", DataType::UInt64),
        ];
        Ok(state::state_fields(&args, fields))
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// The type of the labels of a call with these arguments.
fn label_type(arguments: &[FieldRef]) -> Result<LabelType> {
    match arguments {
        [_, label, ..] => LabelType::of(NAME, label.data_type()),
        _ => internal_err!("{NAME} got no labels"),
    }
}

#[derive(Debug)]
struct LdaAccumulator {
    label_type: LabelType,
    shrinkage: Shrinkage,
    moments: ClassMoments,
    /// Rows without a vector or a label.
    ignored: u64,
}

impl LdaAccumulator {
    fn try_new(args: &AccumulatorArgs) -> Result<Self> {
        refuse_distinct(NAME, args)?;
        if let Some(features) = known_features(args) {
            check_features(features)?;
        }
        let shrinkage = Shrinkage::try_new(NAME, aggregate_constant(args, NAME, 2)?)?;
        Ok(Self::new(label_type(args.expr_fields)?, shrinkage))
    }

    fn new(label_type: LabelType, shrinkage: Shrinkage) -> Self {
        Self {
            label_type,
            shrinkage,
            moments: ClassMoments::default(),
            ignored: 0,
        }
    }

    fn check_length(&self, length: usize) -> Result<()> {
        match self.moments.features() {
            0 => check_features(length),
            features if features == length => Ok(()),
            features => length_error(NAME, features, length),
        }
    }

    /// The bytes that the model takes while it is made: the factor of the covariance, or the
    /// covariance, its eigenvectors and three matrices to find them, and the rows of the sample.
    fn workspace(&self) -> usize {
        let (features, labels) = (self.moments.features(), self.moments.label_count());
        let matrices = if self.shrinkage == Shrinkage::Fixed(0.0) { 5 } else { 1 };
        // The coefficients, what they are projected to, and those of the model.
        let numbers = features * (matrices * features + 3 * labels) + CORRECT_ROWS * labels;
        numbers * size_of::<f64>() + self.moments.sample_bytes()
    }
}

fn check_features(features: usize) -> Result<()> {
    if features > MAX_FEATURES {
        return exec_err!(
            "{NAME}: vectors of {features} features, but it holds a matrix of features x features and takes at most \
             {MAX_FEATURES}: reduce them with pca_fit and pca_transform first"
        );
    }
    Ok(())
}

impl Accumulator for LdaAccumulator {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.ignored += labelled_rows(NAME, values, |vector, label| {
            self.check_length(vector.len())?;
            self.moments.push(vector, label);
            check_label_count(NAME, self.moments.label_count())
        })?;
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let state = std::mem::take(&mut self.moments).into_state();
        let labels = |labels: &[Label]| list(label_array(self.label_type, labels.iter().map(Some)));
        Ok(vec![
            labels(&state.labels),
            list(Arc::new(UInt64Array::from(state.counts))),
            numbers(state.origin.into_owned()),
            numbers(state.shifts.into_owned()),
            numbers(state.within.into_owned()),
            numbers(state.pending.into_owned()),
            labels(&state.pending_labels),
            numbers(state.sample.into_owned()),
            labels(&state.sample_labels),
            ScalarValue::UInt64(Some(std::mem::take(&mut self.ignored))),
        ])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        let [
            labels,
            counts,
            origins,
            shifts,
            withins,
            pending,
            pending_labels,
            samples,
            sample_labels,
            ignored,
        ] = states
        else {
            return internal_err!("expected 10 columns of state, found {}", states.len());
        };
        let (origins, shifts) = (Numbers::try_new(origins)?, Numbers::try_new(shifts)?);
        let (withins, pending) = (Numbers::try_new(withins)?, Numbers::try_new(pending)?);
        let samples = Numbers::try_new(samples)?;
        self.ignored += total(ignored)?;
        for i in 0..labels.len() {
            let part = State {
                labels: read_labels(labels, i)?,
                counts: read_counts(counts, i)?,
                origin: Cow::Borrowed(origins.get(i)),
                shifts: Cow::Borrowed(shifts.get(i)),
                within: Cow::Borrowed(withins.get(i)),
                pending: Cow::Borrowed(pending.get(i)),
                pending_labels: read_labels(pending_labels, i)?,
                sample: Cow::Borrowed(samples.get(i)),
                sample_labels: read_labels(sample_labels, i)?,
            };
            if part.origin.is_empty() {
                continue;
            }
            self.check_length(part.origin.len())?;
            self.moments.merge(&part);
            check_label_count(NAME, self.moments.label_count())?;
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        let mut few = self.moments.copy_of_few();
        let Some(summary) = few.as_mut().unwrap_or(&mut self.moments).summary() else {
            return no_model(NAME, self.label_type, self.ignored);
        };
        check_label_count(NAME, summary.labels.len())?;
        let counts = summary.counts.iter().copied();
        check_labels(NAME, summary.labels.iter().copied().zip(counts))?;

        let Discriminants {
            coefficients,
            intercepts,
            shrinkage,
        } = discriminants(&summary, self.shrinkage)?;

        let labels = summary.sample.labels();
        let labels: Vec<usize> = labels
            .filter_map(|label| summary.labels.binary_search(&label).ok())
            .collect();
        let rows = summary.sample.rows();
        let correct = correct(&coefficients, &intercepts, summary.origin.len(), &rows, &labels);
        LinearModel {
            kind: LDA,
            label_type: self.label_type,
            labels: summary.labels,
            label_counts: summary.counts,
            coefficients,
            intercepts,
            regularization: shrinkage,
            training_accuracy: correct as f64 / labels.len() as f64,
            training_rows: labels.len() as u64,
            converged: true,
        }
        .build()
    }

    fn size(&self) -> usize {
        // A pool is asked for what the model will take as well: when it is made, it is too late to ask.
        let workspace = if self.moments.has_matrix() {
            self.workspace()
        } else {
            if_large(Scatter::bytes((), self.moments.features()) + self.workspace())
        };
        size_of_val(self) + self.moments.allocated() + workspace
    }
}

fn read_labels(column: &ArrayRef, i: usize) -> Result<Vec<Label>> {
    let elements = elements(column, i)?;
    let labels = LabelColumn::try_new(elements.as_ref())?;
    Ok((0..elements.len()).filter_map(|at| labels.get(at)).collect())
}

fn read_counts(column: &ArrayRef, i: usize) -> Result<Vec<u64>> {
    match elements(column, i)?.as_primitive_opt::<UInt64Type>() {
        Some(counts) => Ok(counts.values().to_vec()),
        None => internal_err!("expected lists of counts, found {}", column.data_type()),
    }
}

/// A score for each label: `coefficients · x + intercept`.
#[derive(Debug)]
struct Discriminants {
    /// labels x features, row-major
    coefficients: Vec<f64>,
    intercepts: Vec<f64>,
    /// What was used.
    shrinkage: f64,
}

/// The discriminants of labels with these moments.
///
/// Where the vectors of each label are equal but for rounding, there is no covariance to find. Scores
/// are then those of a covariance that is the same in all directions and as small as rounding: the
/// nearest mean wins, as it does for any covariance that shrinks to nothing.
///
/// # Errors
/// Where the numbers are too large for their squares.
fn discriminants(moments: &Summary<'_>, shrinkage: Shrinkage) -> Result<Discriminants> {
    let features = moments.origin.len();
    let rows: u64 = moments.counts.iter().sum();
    let shares: Vec<f64> = moments.counts.iter().map(|count| *count as f64 / rows as f64).collect();

    // The overall mean, less the origin. It starts from a label's mean: where all are equal, so is it.
    let first = moments.shifts[0];
    let mut centre = first.to_vec();
    for (share, shift) in shares.iter().zip(&moments.shifts) {
        let deltas = shift.iter().zip(first).map(|(x, first)| x - first);
        centre
            .iter_mut()
            .zip(deltas)
            .for_each(|(sum, delta)| *sum += share * delta);
    }

    let mut coefficients = Vec::with_capacity(moments.labels.len() * features);
    for shift in &moments.shifts {
        coefficients.extend(shift.iter().zip(&centre).map(|(x, centre)| x - centre));
    }

    // Of a feature, on average.
    let within = moments.within.total() / (rows as f64 * features as f64);
    let squares = coefficients
        .chunks_exact(features)
        .map(|mean| mean.iter().map(|x| x * x).sum::<f64>());
    let between = squares.zip(&shares).map(|(square, share)| square * share).sum::<f64>() / features as f64;
    if !(within.is_finite() && between.is_finite()) {
        return exec_err!("{NAME}: the vectors hold numbers whose squares are too large for Float64");
    }

    let scatter = moments.within.lower();
    let (shrinkage, ridge) = shrinkage.of(scatter, rows, within);
    let rounding = ROUNDING * ROUNDING * between;
    let (scale, ridge) = if within > rounding {
        ((1.0 - shrinkage) / rows as f64, ridge)
    } else {
        (0.0, vec![rounding; features])
    };
    let covariance = Covariance { scatter, scale, ridge };
    covariance.solve(MatMut::from_column_major_slice_mut(
        &mut coefficients,
        features,
        moments.labels.len(),
    ))?;

    // Between the overall mean and that of a label only its share tells them apart.
    let intercept = |((coefficients, shift), share): ((&[f64], &&[f64]), &f64)| {
        let half_way = centre
            .iter()
            .zip(*shift)
            .zip(moments.origin)
            .map(|((centre, x), origin)| origin + (centre + x) / 2.0);
        share.ln() - coefficients.iter().zip(half_way).map(|(a, b)| a * b).sum::<f64>()
    };
    let intercepts = coefficients
        .chunks_exact(features)
        .zip(&moments.shifts)
        .zip(&shares)
        .map(intercept)
        .collect();
    Ok(Discriminants {
        coefficients,
        intercepts,
        shrinkage,
    })
}

/// `scale * scatter` with `ridge` added to its diagonal, positive semidefinite; of the scatter the lower
/// triangle is read.
///
/// All is done by one thread: with more, faer's last digits depend on how many there are.
#[derive(Debug, Clone)]
struct Covariance<'a> {
    scatter: MatRef<'a, f64>,
    scale: f64,
    ridge: Vec<f64>,
}

impl Covariance<'_> {
    /// Multiplies columns by the inverse, or where there is none by the pseudo-inverse.
    fn solve(&self, mut columns: MatMut<'_, f64>) -> Result<()> {
        if self.ridge.iter().all(|ridge| *ridge > 0.0) && self.solve_definite(columns.as_mut()) {
            return Ok(());
        }
        self.solve_semidefinite(columns)
    }

    /// By Cholesky's decomposition. Leaves the columns as they are and says so with `false` where the
    /// matrix is not positive definite to rounding.
    fn solve_definite(&self, columns: MatMut<'_, f64>) -> bool {
        let mut factor = self.lower();
        let factored = eigen::cholesky(factor.as_mut());
        if factored {
            let scratch = llt::solve::solve_in_place_scratch::<f64>(factor.ncols(), columns.ncols(), Par::Seq);
            let memory = &mut MemBuffer::new(scratch);
            llt::solve::solve_in_place(factor.as_ref(), columns, Par::Seq, MemStack::new(memory));
        }
        factored
    }

    /// The matrix, its upper triangle 0.
    fn lower(&self) -> Mat<f64> {
        let features = self.scatter.ncols();
        Mat::from_fn(features, features, |i, j| match i.cmp(&j) {
            Ordering::Less => 0.0,
            Ordering::Equal => self.scale * self.scatter[(i, j)] + self.ridge[i],
            Ordering::Greater => self.scale * self.scatter[(i, j)],
        })
    }

    /// By the eigenvectors. An eigenvalue counts as zero where it may
    /// be what rounding has left of the largest one, in the sum over a block or in the solver.
    fn solve_semidefinite(&self, mut columns: MatMut<'_, f64>) -> Result<()> {
        let features = self.scatter.ncols();
        let (values, vectors) = eigen::of_symmetric(self.lower().as_ref())
            .ok_or_else(|| exec_datafusion_err!("{NAME}: the eigenvalues of the covariance do not converge"))?;
        let largest = values.iter().fold(0.0_f64, |largest, value| largest.max(*value));
        let zero = largest * f64::EPSILON * features.max(BLOCK_ROWS) as f64;

        let mut projected = Mat::<f64>::zeros(features, columns.ncols());
        matmul(
            projected.as_mut(),
            Accum::Replace,
            vectors.transpose(),
            columns.as_ref(),
            1.0,
            Par::Seq,
        );
        for j in 0..projected.ncols() {
            for (x, value) in projected.col_as_slice_mut(j).iter_mut().zip(&values) {
                *x = if *value > zero { *x / value } else { 0.0 };
            }
        }
        matmul(
            columns.as_mut(),
            Accum::Replace,
            vectors.as_ref(),
            projected.as_ref(),
            1.0,
            Par::Seq,
        );
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use arrow::array::{ListArray, StringArray};
    use arrow::datatypes::Float64Type;

    use super::super::best;
    use super::*;
    use crate::ml::vectors::Vector;

    const FEATURES: usize = 4;

    /// Rows of three labels with an offset; deterministic.
    fn rows(count: usize) -> Vec<([f64; FEATURES], i64)> {
        let noise = |i: usize, j: usize| ((i * 7919 + j * 104_729) % 1009) as f64 / 100.0 - (i * j % 13) as f64;
        let label = |i: usize| [0, 1, 0, 2, 0, 1][i % 6];
        let row = |i| {
            let centre = |j: usize| if j as i64 == label(i) { 5.0 } else { 0.0 };
            (std::array::from_fn(|j| 1e6 + centre(j) + noise(i, j)), label(i))
        };
        (0..count).map(row).collect()
    }

    fn moments(rows: &[(impl AsRef<[f64]>, i64)]) -> ClassMoments {
        let mut moments = ClassMoments::default();
        for (row, label) in rows {
            moments.push(Vector::F64(row.as_ref()), Label::Integer(*label));
        }
        moments
    }

    fn fitted(rows: &[(impl AsRef<[f64]>, i64)], shrinkage: Shrinkage) -> Discriminants {
        discriminants(&moments(rows).summary().unwrap(), shrinkage).unwrap()
    }

    fn scores(of: &Discriminants, x: &[f64]) -> Vec<f64> {
        let dot = |coefficients: &[f64]| coefficients.iter().zip(x).map(|(a, b)| a * b).sum::<f64>();
        let coefficients = of.coefficients.chunks_exact(x.len());
        coefficients
            .zip(&of.intercepts)
            .map(|(coefficients, intercept)| dot(coefficients) + intercept)
            .collect()
    }

    fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() <= tolerance, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn coefficients_solve_the_shrunk_covariance() {
        let rows = rows(700);
        for shrinkage in [0.0, 0.3, 1.0] {
            let found = fitted(&rows, Shrinkage::Fixed(shrinkage));
            let mut moments = moments(&rows);
            let summary = moments.summary().unwrap();
            let covariance = Mat::from_fn(FEATURES, FEATURES, |i, j| {
                let scatter = summary.within.lower()[(i.max(j), i.min(j))];
                let ridge = if i == j {
                    summary.within.total() / FEATURES as f64
                } else {
                    0.0
                };
                ((1.0 - shrinkage) * scatter + shrinkage * ridge) / 700.0
            });
            // The coefficients of two labels differ as their means do.
            for label in [1, 2] {
                let of = |label: usize| &found.coefficients[label * FEATURES..][..FEATURES];
                let difference = Mat::from_fn(FEATURES, 1, |i, _| of(label)[i] - of(0)[i]);
                let product = &covariance * &difference;
                let means = summary.shifts[label].iter().zip(summary.shifts[0]);
                let means: Vec<f64> = means.map(|(a, b)| a - b).collect();
                assert_close(product.col_as_slice(0), &means, 1e-12);
            }
            // Half way between two means only the labels' shares tell them apart.
            let middle = (0..FEATURES).map(|j| summary.origin[j] + (summary.shifts[1][j] + summary.shifts[2][j]) / 2.0);
            let scores = scores(&found, &middle.collect::<Vec<_>>());
            let shares = (summary.counts[1] as f64 / summary.counts[2] as f64).ln();
            assert_close(&[scores[1] - scores[2]], &[shares], 1e-8);
        }
    }

    #[test]
    fn a_feature_that_stands_twice_is_shared() {
        let rows = rows(60);
        let once = fitted(&rows, Shrinkage::Fixed(0.0));
        let doubled: Vec<_> = rows
            .iter()
            .map(|(row, label)| ([row.as_slice(), &row[..1]].concat(), *label))
            .collect();
        let twice = fitted(&doubled, Shrinkage::Fixed(0.0));
        let both = once
            .coefficients
            .chunks_exact(FEATURES)
            .zip(twice.coefficients.chunks_exact(FEATURES + 1));
        for (once, twice) in both {
            let half = once[0] / 2.0;
            assert_close(twice, &[half, once[1], once[2], once[3], half], 1e-11);
        }
    }

    #[test]
    fn without_variance_the_nearest_mean_wins() {
        let mut rows = vec![([1e6, 0.1], 7); 1000];
        rows.extend([([1e6 + 1.0, 0.1], 8); 2]);
        for shrinkage in [Shrinkage::Auto, Shrinkage::Fixed(0.0)] {
            let found = fitted(&rows, shrinkage);
            assert_eq!(best(&scores(&found, &[1e6 + 0.4, 0.3])), 0);
            assert_eq!(best(&scores(&found, &[1e6 + 0.6, 0.3])), 1);
        }
    }

    #[test]
    fn the_state_carries_what_the_model_needs() {
        let labels = ["Kiwi", "Plum", "Äpfel"];
        let accumulator = || LdaAccumulator::new(LabelType::Text, Shrinkage::Auto);
        let batch = |rows: &[&([f64; FEATURES], i64)]| -> Vec<ArrayRef> {
            let vectors = rows.iter().map(|(row, _)| Some(row.iter().copied().map(Some)));
            let labels = rows.iter().map(|(_, label)| Some(labels[*label as usize]));
            vec![
                Arc::new(ListArray::from_iter_primitive::<Float64Type, _, _>(vectors)),
                Arc::new(labels.collect::<StringArray>()),
            ]
        };
        let rows = rows(900);
        let fit = |partitions: usize| {
            let mut merged = accumulator();
            for partition in 0..partitions {
                let mut part = accumulator();
                let rows: Vec<_> = rows.iter().skip(partition).step_by(partitions).collect();
                part.update_batch(&batch(&rows)).unwrap();
                let state = part.state().unwrap();
                let state: Vec<_> = state.iter().map(|column| column.to_array().unwrap()).collect();
                merged.merge_batch(&state).unwrap();
            }
            let ScalarValue::Struct(model) = merged.evaluate().unwrap() else {
                return (0, vec![]);
            };
            let coefficients = model.column_by_name("coefficients").unwrap().as_list::<i32>().value(0);
            let coefficients = coefficients
                .as_list::<i32>()
                .values()
                .as_primitive::<Float64Type>()
                .values()
                .to_vec();
            let rows = model.column_by_name("training_rows").unwrap();
            (
                rows.as_primitive::<arrow::datatypes::Int64Type>().value(0),
                coefficients,
            )
        };
        let whole = fit(1);
        assert_eq!((whole.0, whole.1.len()), (900, 3 * FEATURES));
        for partitions in [2, 7, 450] {
            let parts = fit(partitions);
            assert_eq!(parts.0, 900);
            assert_close(&parts.1, &whole.1, 1e-11);
        }
    }
}
