//! Fits as aggregates: what all of them share between DataFusion and their numerics.

use std::fmt::Debug;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{DataType, FieldRef, UInt64Type};
use datafusion::common::{ScalarValue, exec_err, internal_datafusion_err, internal_err, not_impl_err};
use datafusion::error::Result;
use datafusion::logical_expr::Accumulator;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};

use super::model::ModelKind;
use super::moments::{Moments, Spread, State, Summary};
use super::sliding::Sliding;
use super::state::{self, Numbers, numbers, numbers_type};
use super::vectors::{Vector, VectorColumn};

/// A fit that needs the moments of its vectors and nothing else.
pub(super) trait Fit: Debug + Copy + Send + Sync + 'static {
    /// What it needs to know around the mean.
    type Spread: Spread;

    /// The name of the aggregate.
    fn name(&self) -> &'static str;

    /// The kind of model it makes.
    fn kind(&self) -> &'static ModelKind;

    /// What the spread is to be like.
    fn plan(&self) -> <Self::Spread as Spread>::Plan;

    /// Checks the length of the vectors, before anything of that size is allocated.
    ///
    /// # Errors
    /// Where the fit cannot take so many features.
    fn check_features(&self, features: usize) -> Result<()>;

    /// The bytes that [`Self::columns`] allocates, beside the spread.
    fn workspace(&self, features: usize) -> usize;

    /// The model's fields.
    ///
    /// # Errors
    /// Where the rows are too few, or do not lead to a model.
    fn columns(&self, moments: &Summary<'_, Self::Spread>) -> Result<Vec<ArrayRef>>;
}

/// The fields of the state of a [`FitAccumulator`].
pub(super) fn state_fields(args: &StateFieldsArgs) -> Vec<FieldRef> {
    let fields = [
        ("count", DataType::UInt64),
        ("origin", numbers_type()),
        ("shift", numbers_type()),
        ("spread", numbers_type()),
        ("pending", numbers_type()),
        ("ignored", DataType::UInt64),
    ];
    state::state_fields(args, fields)
}

/// Refuses `fit(DISTINCT …)`: vectors are compared nowhere, so it would ignore the word.
///
/// # Errors
/// Where the call has it.
pub(super) fn refuse_distinct(name: &str, args: &AccumulatorArgs) -> Result<()> {
    if args.is_distinct {
        return not_impl_err!("{name}(DISTINCT …): select the distinct vectors in a subquery first");
    }
    Ok(())
}

/// The bytes that the model of a few rows takes while it is made, as far as a pool is asked for them. The
/// models of many groups are made one after another: together they take no more than one of them, and that
/// may be forgotten where it is little.
pub(super) fn if_large(bytes: usize) -> usize {
    const LITTLE: usize = 32 << 20;
    if bytes > LITTLE { bytes } else { 0 }
}

/// The length of the vectors of a call's first argument, where their type says it.
pub(super) fn known_features(args: &AccumulatorArgs) -> Option<usize> {
    match args.expr_fields.first().map(|field| field.data_type()) {
        Some(DataType::FixedSizeList(_, size @ 1..)) => Some(*size as usize),
        _ => None,
    }
}

/// The error of a vector whose length is not that of those before it.
///
/// # Errors
/// Always.
pub(super) fn length_error<T>(name: &str, features: usize, length: usize) -> Result<T> {
    exec_err!(
        "{name}: vectors of different lengths, {features} and {length}: all vectors of a fit, or of a group of it, \
         have the same length"
    )
}

/// The accumulator of a [`Fit`].
#[derive(Debug)]
pub(super) struct FitAccumulator<F: Fit> {
    fit: F,
    moments: Moments<F::Spread>,
    /// Rows without a vector.
    ignored: u64,
}

impl<F: Fit> FitAccumulator<F> {
    /// An accumulator for a call with `args`, whose first argument is the vector.
    ///
    /// # Errors
    /// For DISTINCT, and where the vectors' type says already that they are too long.
    pub(super) fn boxed(fit: F, args: &AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        refuse_distinct(fit.name(), args)?;
        if let Some(features) = known_features(args) {
            fit.check_features(features)?;
        }
        Ok(Self::empty(fit))
    }

    /// One for frames that lose rows as well as gain them.
    ///
    /// # Errors
    /// As [`Self::boxed`].
    pub(super) fn sliding(fit: F, args: &AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        Self::boxed(fit, args)?;
        Ok(Sliding::boxed(move || Self::empty(fit)))
    }

    fn empty(fit: F) -> Box<dyn Accumulator> {
        Box::new(Self {
            fit,
            moments: Moments::new(fit.plan()),
            ignored: 0,
        })
    }

    fn check_length(&self, length: usize) -> Result<()> {
        match self.moments.features() {
            0 => self.fit.check_features(length),
            features if features == length => Ok(()),
            features => length_error(self.fit.name(), features, length),
        }
    }

    fn push(&mut self, vector: Vector<'_>) -> Result<()> {
        self.check_length(vector.len())?;
        self.moments.push(vector);
        Ok(())
    }
}

impl<F: Fit> Accumulator for FitAccumulator<F> {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        let [vectors, ..] = values else {
            return internal_err!("{} got no vectors", self.fit.name());
        };
        let vectors = VectorColumn::try_new(self.fit.name(), vectors.as_ref())?;
        for i in 0..vectors.len() {
            match vectors.get(i)? {
                Some(vector) => self.push(vector)?,
                None => self.ignored += 1,
            }
        }
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let State {
            count,
            origin,
            shift,
            spread,
            pending,
        } = std::mem::replace(&mut self.moments, Moments::new(self.fit.plan())).into_state();
        Ok(vec![
            ScalarValue::UInt64(Some(count)),
            numbers(origin),
            numbers(shift),
            numbers(spread),
            numbers(pending),
            ScalarValue::UInt64(Some(std::mem::take(&mut self.ignored))),
        ])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        let [counts, origins, shifts, spreads, pending, ignored] = states else {
            return internal_err!("expected 6 columns of state, found {}", states.len());
        };
        let counts = counts
            .as_primitive_opt::<UInt64Type>()
            .ok_or_else(|| internal_datafusion_err!("expected counts, found {}", counts.data_type()))?;
        self.ignored += state::total(ignored)?;
        let (origins, shifts) = (Numbers::try_new(origins)?, Numbers::try_new(shifts)?);
        let (spreads, pending) = (Numbers::try_new(spreads)?, Numbers::try_new(pending)?);
        for i in 0..counts.len() {
            let (origin, shift) = (origins.get(i), shifts.get(i));
            if origin.is_empty() {
                continue;
            }
            self.check_length(origin.len())?;
            if counts.value(i) > 0 {
                self.moments.merge(counts.value(i), origin, shift, spreads.get(i));
            }
            for row in pending.get(i).chunks_exact(origin.len()) {
                self.moments.push(Vector::F64(row));
            }
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        let kind = self.fit.kind();
        let Some(moments) = self.moments.summary() else {
            if self.ignored > 0 {
                return exec_err!(
                    "{}: all {} vectors of the fit, or of a group of it, are NULL or empty: there is nothing to fit",
                    self.fit.name(),
                    self.ignored
                );
            }
            return ScalarValue::try_from(&kind.data_type());
        };
        if !moments.spread.total().is_finite() || !moments.mean.iter().all(|x| x.is_finite()) {
            return exec_err!(
                "{}: the vectors hold numbers whose squares are too large for Float64",
                self.fit.name()
            );
        }
        kind.build(self.fit.columns(&moments)?)
    }

    fn size(&self) -> usize {
        // A pool is asked for what the model will take as well: when it is made, it is too late to ask.
        let workspace = if self.moments.spreads() {
            self.fit.workspace(self.moments.features())
        } else {
            // The rows once more, and what their decomposition takes.
            if_large(4 * self.moments.allocated())
        };
        size_of_val(self) + self.moments.allocated() + workspace
    }
}
