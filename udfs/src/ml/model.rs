//! Models as SQL values: the structs that fits return and functions take.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, ListArray, StructArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Float64Type};
use datafusion::common::utils::SingleRowListArrayBuilder;
use datafusion::common::{ScalarValue, exec_datafusion_err, exec_err, internal_datafusion_err, internal_err, plan_err};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::ColumnarValue;

/// A kind of model: the fit that makes it and the struct it is.
#[derive(Debug)]
pub(super) struct ModelKind {
    fit: &'static str,
    fields: Fields,
}

impl ModelKind {
    /// The kind that the aggregate `fit` makes.
    pub(super) fn new<const N: usize>(fit: &'static str, fields: [(&str, DataType); N]) -> Self {
        let fields = fields
            .into_iter()
            .map(|(name, data_type)| Field::new(name, data_type, true))
            .collect();
        Self { fit, fields }
    }

    /// The name of the aggregate that makes it.
    pub(super) fn fit(&self) -> &'static str {
        self.fit
    }

    /// The SQL type.
    pub(super) fn data_type(&self) -> DataType {
        DataType::Struct(self.fields.clone())
    }

    /// A model, from arrays of one row in the order of the fields.
    ///
    /// # Errors
    /// Where the arrays do not fit the fields.
    pub(super) fn build(&self, columns: Vec<ArrayRef>) -> Result<ScalarValue> {
        Ok(ScalarValue::Struct(Arc::new(StructArray::try_new(
            self.fields.clone(),
            columns,
            None,
        )?)))
    }

    /// The type to which a model argument is coerced. A model that comes from a file may have its
    /// fields in another order, integers where all numbers are whole, or another type of list:
    /// [`Self::read`] takes it as it is.
    ///
    /// # Errors
    /// A plan error that says what was expected and what was found.
    pub(super) fn coerce(&self, function: &str, found: &DataType) -> Result<DataType> {
        match found {
            DataType::Null => Ok(self.data_type()),
            DataType::Struct(fields) if self.has(fields) => Ok(found.clone()),
            other => plan_err!(
                "{function} takes the model that {} makes, {}, not {other}",
                self.fit,
                self.data_type()
            ),
        }
    }

    fn has(&self, found: &Fields) -> bool {
        let mut wanted = self.fields.iter();
        found.len() == self.fields.len()
            && wanted.all(|wanted| {
                let field = found.find(wanted.name());
                field.is_some_and(|(_, field)| depth(field.data_type()) == depth(wanted.data_type()))
            })
    }

    /// Reads the model argument of a call of `function` on `rows` rows.
    ///
    /// # Errors
    /// Where the planner let another type through.
    pub(super) fn read<'a>(&'a self, function: &'a str, argument: &ColumnarValue, rows: usize) -> Result<Models<'a>> {
        let (models, constant) = match argument {
            ColumnarValue::Scalar(model) => (model.to_array()?, true),
            ColumnarValue::Array(models) => (Arc::clone(models), false),
        };
        let Some(models) = models.as_struct_opt() else {
            return internal_err!("expected models of {}, found {}", self.fit, models.data_type());
        };
        let column = |field: &FieldRef| -> Result<ArrayRef> {
            match models.column_by_name(field.name()) {
                Some(column) => Ok(cast(column, field.data_type())?),
                None => internal_err!("a model of {} has no {}", self.fit, field.name()),
            }
        };
        let columns = self.fields.iter().map(column).collect::<Result<Vec<_>>>()?;
        let models = StructArray::try_new(self.fields.clone(), columns, models.nulls().cloned())?;
        Ok(Models {
            kind: self,
            function,
            models,
            constant,
            rows,
        })
    }
}

/// A column of one row, a count.
pub(super) fn count_column(count: u64) -> ArrayRef {
    Arc::new(Int64Array::from(vec![count as i64]))
}

/// A column of one row, a list of these elements.
pub(super) fn list_column(elements: ArrayRef) -> ArrayRef {
    Arc::new(SingleRowListArrayBuilder::new(elements).build_list_array())
}

/// How deep lists of numbers are nested: 0 for a number, `None` for what is no number in the end.
fn depth(data_type: &DataType) -> Option<usize> {
    match data_type {
        t if t.is_numeric() => Some(0),
        DataType::List(field)
        | DataType::LargeList(field)
        | DataType::ListView(field)
        | DataType::LargeListView(field)
        | DataType::FixedSizeList(field, _) => depth(field.data_type()).map(|depth| depth + 1),
        _ => None,
    }
}

/// The models of a batch: one for all rows, or one per row.
#[derive(Debug)]
pub(super) struct Models<'a> {
    kind: &'a ModelKind,
    function: &'a str,
    models: StructArray,
    constant: bool,
    rows: usize,
}

impl Models<'_> {
    /// The rows of the batch, in runs that have the same model: that of the run's first row.
    ///
    /// A model that is joined to every row, as Ballista does with a subquery, is still one model;
    /// comparing it is cheap beside using it.
    pub(super) fn runs(&self) -> Vec<Range<usize>> {
        if self.constant {
            return std::iter::once(0..self.rows).collect();
        }
        let mut runs: Vec<Range<usize>> = vec![];
        for row in 0..self.rows {
            match runs.last_mut() {
                Some(run) if self.models.slice(run.start, 1) == self.models.slice(row, 1) => run.end = row + 1,
                _ => runs.push(row..row + 1),
            }
        }
        runs
    }

    /// Is the model of this row NULL?
    pub(super) fn is_null(&self, row: usize) -> bool {
        self.models.is_null(row)
    }

    /// A field that holds a vector.
    ///
    /// # Errors
    /// Where it is empty, or holds anything but finite numbers.
    pub(super) fn vector(&self, row: usize, field: &str) -> Result<&[f64]> {
        let values = finite_values(self.field(field)?, row..row + 1).filter(|values| !values.is_empty());
        values.ok_or_else(|| self.broken(field))
    }

    /// A field that holds a matrix of at least one row and of `columns` columns, row-major.
    ///
    /// # Errors
    /// Where it holds anything but finite numbers, rows of another length, or no row.
    pub(super) fn matrix(&self, row: usize, field: &str, columns: usize) -> Result<&[f64]> {
        let rows = self.field(field)?;
        let offsets = rows.value_offsets();
        let range = offsets[row] as usize..offsets[row + 1] as usize;
        let rectangle = rows
            .values()
            .as_list_opt::<i32>()
            .filter(|_| rows.is_valid(row) && !range.is_empty())
            .filter(|rows| range.clone().all(|i| rows.value_length(i) as usize == columns));
        rectangle
            .and_then(|rows| finite_values(rows, range))
            .ok_or_else(|| self.broken(field))
    }

    /// Checks the length of a vector against the model's.
    ///
    /// # Errors
    /// Where they differ.
    pub(super) fn check_length(&self, vector: usize, model: usize) -> Result<()> {
        if vector == model {
            return Ok(());
        }
        exec_err!(
            "{}: a vector has {vector} elements, but the model of {} has {model}: it was fitted on other vectors",
            self.function,
            self.kind.fit
        )
    }

    /// The error of a model whose `field` cannot be used.
    pub(super) fn broken(&self, field: &str) -> DataFusionError {
        exec_datafusion_err!(
            "{}: {field} of its model is NULL or empty, not of the mean's length, or not all finite numbers; a \
             model is to be kept as {} made it",
            self.function,
            self.kind.fit
        )
    }

    fn field(&self, name: &str) -> Result<&ListArray> {
        self.models
            .column_by_name(name)
            .and_then(|column| column.as_list_opt::<i32>())
            .ok_or_else(|| internal_datafusion_err!("a model of {} has no list {name}", self.kind.fit))
    }
}

/// The values of the lists in `rows`, one after another; `None` where one is NULL or not finite.
fn finite_values(lists: &ListArray, rows: Range<usize>) -> Option<&[f64]> {
    let offsets = lists.value_offsets();
    let (start, end) = (offsets[rows.start] as usize, offsets[rows.end] as usize);
    let values = lists.values().as_primitive_opt::<Float64Type>()?;
    let complete = rows.clone().all(|row| lists.is_valid(row))
        && values
            .nulls()
            .is_none_or(|nulls| nulls.slice(start, end - start).null_count() == 0);
    let values = &values.values()[start..end];
    (complete && values.iter().all(|x| x.is_finite())).then_some(values)
}
