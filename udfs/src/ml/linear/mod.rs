//! Classifiers: linear models that tell labels apart.
//!
//! A fit gives, whichever it is, one kind of model: a score for each label, `coefficients · x +
//! intercept`, whose softmax is the label's probability.

mod class_moments;
mod classify;
mod lda;
mod logistic;
mod multinomial;
mod rows;
mod sample;
mod shrinkage;

use std::sync::{Arc, LazyLock};

use arrow::array::{ArrayRef, BooleanArray, Float64Array, Int64Array, StringArray};
use arrow::datatypes::DataType;
use datafusion::common::{ScalarValue, exec_err, internal_err, plan_err};
use datafusion::error::Result;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::labels::{Label, LabelColumn, LabelType, label_array};
use super::model::{ModelKind, count_column, list_column, matrix_column, numbers_column};
use super::vectors::{Vector, VectorColumn, coerce_vector, list_of};

pub(super) use classify::{Classify, ClassifyProba};
pub(super) use lda::LdaFit;
pub(super) use logistic::LogisticFit;

/// The most labels that a classifier tells apart.
const MAX_LABELS: usize = 65_536;

/// The rows whose scores [`correct`] holds at once.
const CORRECT_ROWS: usize = 256;

/// `kind` of a model of `lda_fit`.
const LDA: &str = "lda";

/// `kind` of a model of `logistic_fit`.
const LOGISTIC: &str = "logistic";

static KINDS: LazyLock<[ModelKind; 3]> = LazyLock::new(|| LabelType::ALL.map(new_kind));

fn new_kind(label_type: LabelType) -> ModelKind {
    let numbers = || list_of(DataType::Float64);
    ModelKind::new(
        "lda_fit or logistic_fit",
        [
            ("kind", DataType::Utf8),
            ("count", DataType::Int64),
            ("labels", list_of(label_type.data_type())),
            ("label_counts", list_of(DataType::Int64)),
            ("coefficients", list_of(numbers())),
            ("intercepts", numbers()),
            ("regularization", DataType::Float64),
            ("training_accuracy", DataType::Float64),
            ("training_rows", DataType::Int64),
            ("converged", DataType::Boolean),
        ],
    )
}

/// The kind of model for labels of a type.
fn kind(label_type: LabelType) -> &'static ModelKind {
    let [text, integer, boolean] = &*KINDS;
    match label_type {
        LabelType::Text => text,
        LabelType::Integer => integer,
        LabelType::Boolean => boolean,
    }
}

/// A fitted model.
struct LinearModel<'a> {
    /// [`LDA`] or [`LOGISTIC`]
    kind: &'static str,
    label_type: LabelType,
    /// Sorted.
    labels: Vec<&'a Label>,
    label_counts: Vec<u64>,
    /// labels x features, row-major
    coefficients: Vec<f64>,
    intercepts: Vec<f64>,
    /// The shrinkage, or the weight of the squared coefficients.
    regularization: f64,
    /// The share of the training rows that the model classifies as they are labelled.
    training_accuracy: f64,
    /// The rows that it was found on.
    training_rows: u64,
    converged: bool,
}

impl LinearModel<'_> {
    /// The model as a value.
    fn build(self) -> Result<ScalarValue> {
        if self.coefficients.iter().chain(&self.intercepts).any(|x| !x.is_finite()) {
            return exec_err!(
                "{}_fit: the vectors hold numbers whose squares are too large for Float64",
                self.kind
            );
        }
        let features = self.coefficients.len() / self.labels.len().max(1);
        let counts: Int64Array = self.label_counts.iter().map(|count| Some(*count as i64)).collect();
        kind(self.label_type).build(vec![
            Arc::new(StringArray::from(vec![self.kind])),
            count_column(self.label_counts.iter().sum()),
            list_column(label_array(self.label_type, self.labels.into_iter().map(Some))),
            list_column(Arc::new(counts)),
            matrix_column(self.coefficients, features)?,
            numbers_column(self.intercepts),
            Arc::new(Float64Array::from(vec![self.regularization])),
            Arc::new(Float64Array::from(vec![self.training_accuracy])),
            count_column(self.training_rows),
            Arc::new(BooleanArray::from(vec![self.converged])),
        ])
    }
}

/// The model of no rows, NULL.
///
/// # Errors
/// Where there were rows, all of which were ignored.
fn no_model(function: &str, label_type: LabelType, ignored: u64) -> Result<ScalarValue> {
    if ignored > 0 {
        return exec_err!("{function}: none of {ignored} rows has both a vector and a label: there is nothing to fit");
    }
    ScalarValue::try_from(&kind(label_type).data_type())
}

/// The types to which the arguments of a fit are coerced: a vector, a label and perhaps an option.
fn coerce_fit(function: &str, arg_types: &[DataType]) -> Result<Vec<DataType>> {
    match arg_types {
        [vector, label, option @ ..] if option.len() <= 1 => {
            let mut types = vec![
                coerce_vector(function, vector)?,
                LabelType::of(function, label)?.data_type(),
            ];
            types.extend_from_slice(option);
            Ok(types)
        }
        _ => plan_err!(
            "{function} takes a vector, a label and one option, not {} arguments",
            arg_types.len()
        ),
    }
}

/// The type of the model of a call with arguments of these types.
fn model_type(function: &str, arg_types: &[DataType]) -> Result<DataType> {
    match arg_types {
        [_, label, ..] => Ok(kind(LabelType::of(function, label)?).data_type()),
        _ => plan_err!("{function} takes a vector and a label"),
    }
}

/// Calls `push` for each row that has a vector and a label; how many have not.
fn labelled_rows(
    function: &str,
    values: &[ArrayRef],
    mut push: impl FnMut(Vector<'_>, Label) -> Result<()>,
) -> Result<u64> {
    let [vectors, labels, ..] = values else {
        return internal_err!("{function} got no vectors and labels");
    };
    let vectors = VectorColumn::try_new(function, vectors.as_ref())?;
    let labels = LabelColumn::try_new(labels.as_ref())?;
    let mut ignored = 0;
    for i in 0..vectors.len() {
        match (vectors.get(i)?, labels.get(i)) {
            (Some(vector), Some(label)) => push(vector, label)?,
            _ => ignored += 1,
        }
    }
    Ok(ignored)
}

/// Checks that there is something to tell apart; the labels are in their order.
fn check_labels<'a>(function: &str, counts: impl IntoIterator<Item = (&'a Label, u64)>) -> Result<()> {
    let counts: Vec<_> = counts.into_iter().collect();
    if let [(label, count)] = counts.as_slice() {
        return exec_err!(
            "{function}: all {count} vectors of the fit, or of a group of it, have the label {label}: a classifier \
             needs at least two labels to tell apart"
        );
    }
    if let Some((label, _)) = counts.iter().find(|(_, count)| *count == 1) {
        return exec_err!(
            "{function}: only one vector has the label {label}: each label needs at least two, or leave it out with \
             WHERE"
        );
    }
    Ok(())
}

/// Checks the number of labels before more are kept: a column that numbers its rows is no label.
fn check_label_count(function: &str, count: usize) -> Result<()> {
    if count > MAX_LABELS {
        return exec_err!("{function}: more than {MAX_LABELS} different labels: is this the column of labels?");
    }
    Ok(())
}

/// How many rows, row-major, have the label with the highest score.
fn correct(coefficients: &[f64], intercepts: &[f64], features: usize, rows: &[f64], labels: &[usize]) -> u64 {
    let mut scores = vec![];
    let mut sum = 0;
    for (rows, labels) in rows.chunks(CORRECT_ROWS * features).zip(labels.chunks(CORRECT_ROWS)) {
        scores.resize(labels.len() * intercepts.len(), 0.0);
        matmul(
            MatMut::from_row_major_slice_mut(&mut scores, labels.len(), intercepts.len()),
            Accum::Replace,
            MatRef::from_row_major_slice(rows, labels.len(), features),
            MatRef::from_row_major_slice(coefficients, intercepts.len(), features).transpose(),
            1.0,
            Par::Seq,
        );
        for (scores, label) in scores.chunks_exact_mut(intercepts.len()).zip(labels) {
            scores
                .iter_mut()
                .zip(intercepts)
                .for_each(|(score, intercept)| *score += intercept);
            sum += u64::from(best(scores) == *label);
        }
    }
    sum
}

/// Where the highest score is, the first of equals.
fn best(scores: &[f64]) -> usize {
    let mut best = 0;
    for (i, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = i;
        }
    }
    best
}
