//! Fits as aggregates: what all of them share between DataFusion and their numerics.

use std::fmt::Debug;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, LargeListArray};
use arrow::datatypes::{DataType, Field, FieldRef, Float64Type, UInt64Type};
use datafusion::common::utils::SingleRowListArrayBuilder;
use datafusion::common::{ScalarValue, exec_err, internal_datafusion_err, internal_err, not_impl_err};
use datafusion::error::Result;
use datafusion::logical_expr::Accumulator;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::format_state_name;

use super::model::ModelKind;
use super::moments::{Moments, Spread, State, Summary};
use super::vectors::{Vector, VectorColumn};

/// A fit that needs the moments of its vectors and nothing else.
pub(super) trait Fit: Debug + Send + Sync + 'static {
    /// What it needs to know around the mean.
    type Spread: Spread;

    /// The kind of model it makes.
    fn kind(&self) -> &'static ModelKind;

    /// Checks the length of the vectors, before anything of that size is allocated.
    ///
    /// # Errors
    /// Where the fit cannot take so many features.
    fn check_features(&self, features: usize) -> Result<()>;

    /// The model's fields.
    ///
    /// # Errors
    /// Where the rows are too few, or do not lead to a model.
    fn columns(&self, moments: &Summary<'_, Self::Spread>) -> Result<Vec<ArrayRef>>;
}

/// The fields of the state of a [`FitAccumulator`].
pub(super) fn state_fields(args: &StateFieldsArgs) -> Vec<FieldRef> {
    // A LargeList: the triangles of many groups together pass the 2^31 numbers that a List can hold.
    let numbers = DataType::LargeList(Arc::new(Field::new_list_field(DataType::Float64, true)));
    let fields = [
        ("count", DataType::UInt64),
        ("origin", numbers.clone()),
        ("shift", numbers.clone()),
        ("spread", numbers.clone()),
        ("pending", numbers),
    ];
    let field = |(name, data_type)| Arc::new(Field::new(format_state_name(args.name, name), data_type, true));
    fields.into_iter().map(field).collect()
}

/// The accumulator of a [`Fit`].
#[derive(Debug)]
pub(super) struct FitAccumulator<F: Fit> {
    fit: F,
    moments: Moments<F::Spread>,
}

impl<F: Fit> FitAccumulator<F> {
    /// An accumulator for a call with `args`, whose first argument is the vector.
    ///
    /// # Errors
    /// For DISTINCT, and where the vectors' type says already that they are too long.
    pub(super) fn boxed(fit: F, args: &AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        let name = fit.kind().fit();
        if args.is_distinct {
            return not_impl_err!("{name}(DISTINCT …): select the distinct vectors in a subquery first");
        }
        if let Some(DataType::FixedSizeList(_, size @ 1..)) = args.expr_fields.first().map(|field| field.data_type()) {
            fit.check_features(*size as usize)?;
        }
        Ok(Box::new(Self {
            fit,
            moments: Moments::new(),
        }))
    }

    fn check_length(&self, length: usize) -> Result<()> {
        match self.moments.features() {
            0 => self.fit.check_features(length),
            features if features == length => Ok(()),
            features => exec_err!(
                "{}: vectors of different lengths, {features} and {length}: all vectors of a fit, or of a group of \
                 it, have the same length",
                self.fit.kind().fit()
            ),
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
            return internal_err!("{} got no vectors", self.fit.kind().fit());
        };
        let vectors = VectorColumn::try_new(self.fit.kind().fit(), vectors.as_ref())?;
        for i in 0..vectors.len() {
            if let Some(vector) = vectors.get(i)? {
                self.push(vector)?;
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
        } = std::mem::replace(&mut self.moments, Moments::new()).into_state();
        let numbers = |values: Vec<f64>| {
            SingleRowListArrayBuilder::new(Arc::new(Float64Array::from(values))).build_large_list_scalar()
        };
        Ok(vec![
            ScalarValue::UInt64(Some(count)),
            numbers(origin),
            numbers(shift),
            numbers(spread),
            numbers(pending),
        ])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        let [counts, origins, shifts, spreads, pending] = states else {
            return internal_err!("expected 5 columns of state, found {}", states.len());
        };
        let counts = counts
            .as_primitive_opt::<UInt64Type>()
            .ok_or_else(|| internal_datafusion_err!("expected counts, found {}", counts.data_type()))?;
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
            return ScalarValue::try_from(&kind.data_type());
        };
        if !moments.spread.total().is_finite() || !moments.mean.iter().all(|x| x.is_finite()) {
            return exec_err!(
                "{}: the vectors hold numbers whose squares are too large for Float64",
                kind.fit()
            );
        }
        kind.build(self.fit.columns(&moments)?)
    }

    fn size(&self) -> usize {
        size_of_val(self) + self.moments.allocated()
    }
}

/// A column of lists of numbers, as this module writes them.
struct Numbers<'a> {
    lists: &'a LargeListArray,
    values: &'a [f64],
}

impl<'a> Numbers<'a> {
    fn try_new(array: &'a ArrayRef) -> Result<Self> {
        let lists = array.as_list_opt::<i64>();
        let values = lists.and_then(|lists| lists.values().as_primitive_opt::<Float64Type>());
        match (lists, values) {
            (Some(lists), Some(values)) => Ok(Self {
                lists,
                values: values.values(),
            }),
            _ => internal_err!("expected lists of numbers, found {}", array.data_type()),
        }
    }

    fn get(&self, i: usize) -> &'a [f64] {
        let offsets = self.lists.value_offsets();
        &self.values[offsets[i] as usize..offsets[i + 1] as usize]
    }
}
