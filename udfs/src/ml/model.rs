//! Models as SQL values: the structs that fits return and functions take.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array, ListArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, FieldRef, Fields, Float64Type};
use datafusion::common::utils::SingleRowListArrayBuilder;
use datafusion::common::{ScalarValue, exec_datafusion_err, exec_err, internal_datafusion_err, internal_err, plan_err};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::ColumnarValue;

/// A kind of model: what makes it and the struct it is.
#[derive(Debug)]
pub(super) struct ModelKind {
    makers: &'static str,
    fields: Fields,
}

impl ModelKind {
    /// The kind that `makers` make, the names of aggregates in words.
    pub(super) fn new<const N: usize>(makers: &'static str, fields: [(&str, DataType); N]) -> Self {
        let fields = fields
            .into_iter()
            .map(|(name, data_type)| Field::new(name, data_type, true))
            .collect();
        Self { makers, fields }
    }

    /// What makes it.
    pub(super) fn makers(&self) -> &'static str {
        self.makers
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
        let expected = || {
            format!(
                "{function} takes the model that {} makes, {}",
                self.makers,
                names(&self.fields)
            )
        };
        let fields = match found {
            DataType::Null => return Ok(self.data_type()),
            DataType::Struct(fields) => fields,
            other => return plan_err!("{}, not {other}", expected()),
        };
        for wanted in &self.fields {
            let Some((_, field)) = fields.find(wanted.name()) else {
                return plan_err!("{}, but {} has no {}", expected(), names(fields), wanted.name());
            };
            if shape(field.data_type()) != shape(wanted.data_type()) {
                return plan_err!(
                    "{}, with {} of type {}, not {}",
                    expected(),
                    wanted.name(),
                    wanted.data_type(),
                    field.data_type()
                );
            }
        }
        // A field more changes what a model means: that is how later versions tell theirs apart.
        if let Some(unknown) = fields.iter().find(|field| self.fields.find(field.name()).is_none()) {
            return plan_err!(
                "{}, but this one has also {}: a newer version of Pomona made it, and one as new is needed to use it",
                expected(),
                unknown.name()
            );
        }
        Ok(found.clone())
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
            return internal_err!("expected models of {}, found {}", self.makers, models.data_type());
        };
        let column = |field: &FieldRef| -> Result<ArrayRef> {
            match models.column_by_name(field.name()) {
                Some(column) => Ok(cast(column, field.data_type())?),
                None => internal_err!("a model of {} has no {}", self.makers, field.name()),
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

/// A column of one row, a list of numbers.
pub(super) fn numbers_column(numbers: Vec<f64>) -> ArrayRef {
    list_column(Arc::new(Float64Array::from(numbers)))
}

/// A column of one row, a matrix as a list of its rows, from its values row-major.
///
/// # Errors
/// Where the values are no whole rows.
pub(super) fn matrix_column(values: Vec<f64>, columns: usize) -> Result<ArrayRef> {
    Ok(list_column(Arc::new(ListArray::try_new(
        Arc::new(Field::new_list_field(DataType::Float64, true)),
        OffsetBuffer::from_repeated_length(columns, values.len() / columns.max(1)),
        Arc::new(Float64Array::from(values)),
        None,
    )?)))
}

/// The names of fields, as a struct is written.
fn names(fields: &Fields) -> String {
    let names: Vec<_> = fields.iter().map(|field| field.name().as_str()).collect();
    format!("{{{}}}", names.join(", "))
}

/// What lists hold in the end.
#[derive(Debug, PartialEq)]
enum Leaf {
    Number,
    Text,
    Boolean,
}

/// How deep lists are nested, 0 for none, and what they hold; `None` for what no model has.
fn shape(data_type: &DataType) -> Option<(usize, Leaf)> {
    match data_type {
        t if t.is_numeric() => Some((0, Leaf::Number)),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Some((0, Leaf::Text)),
        DataType::Dictionary(_, values) => shape(values),
        DataType::Boolean => Some((0, Leaf::Boolean)),
        DataType::List(field)
        | DataType::LargeList(field)
        | DataType::ListView(field)
        | DataType::LargeListView(field)
        | DataType::FixedSizeList(field, _) => shape(field.data_type()).map(|(depth, leaf)| (depth + 1, leaf)),
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

    /// The function that was called.
    pub(super) fn function(&self) -> &str {
        self.function
    }

    /// For each row of the batch, the row that its model is in.
    pub(super) fn sources(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.rows).map(|row| if self.constant { 0 } else { row })
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
        let values = finite_values(self.list(field)?, row..row + 1).filter(|values| !values.is_empty());
        values.ok_or_else(|| self.broken(field))
    }

    /// The number of columns of a field that holds a matrix: the length of its first row.
    ///
    /// # Errors
    /// Where it has none.
    pub(super) fn width(&self, row: usize, field: &str) -> Result<usize> {
        let rows = self.list(field)?;
        let (start, end) = (rows.value_offsets()[row], rows.value_offsets()[row + 1]);
        let columns = rows.values().as_list_opt::<i32>().filter(|_| start < end);
        let width = columns.map_or(0, |columns| columns.value_length(start as usize) as usize);
        if width == 0 {
            return Err(self.broken(field));
        }
        Ok(width)
    }

    /// A field that holds a matrix of at least one row and of `columns` columns, row-major.
    ///
    /// # Errors
    /// Where it holds anything but finite numbers, rows of another length, or no row.
    pub(super) fn matrix(&self, row: usize, field: &str, columns: usize) -> Result<&[f64]> {
        let rows = self.list(field)?;
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

    /// A field that holds one word of a few.
    ///
    /// # Errors
    /// Where it is none of those that this version knows.
    pub(super) fn word(&self, row: usize, field: &str, known: &[&str]) -> Result<&str> {
        let words = self.column(field)?.as_string_opt::<i32>();
        let word = words
            .filter(|words| words.is_valid(row))
            .map(|words| words.value(row))
            .ok_or_else(|| self.broken(field))?;
        if known.contains(&word) {
            return Ok(word);
        }
        exec_err!(
            "{}: the {field} of its model is '{word}', but this version knows '{}': a newer version of Pomona made \
             it, and one as new is needed to use it",
            self.function,
            known.join("' and '")
        )
    }

    /// The column of a field.
    ///
    /// # Errors
    /// An internal error where the kind has no such field.
    pub(super) fn column(&self, field: &str) -> Result<&ArrayRef> {
        self.models
            .column_by_name(field)
            .ok_or_else(|| internal_datafusion_err!("a model of {} has no {field}", self.kind.makers))
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
            self.kind.makers
        )
    }

    /// The error of a model whose `field` cannot be used.
    pub(super) fn broken(&self, field: &str) -> DataFusionError {
        exec_datafusion_err!(
            "{}: {field} of its model is NULL or empty, of another length than the model's other fields, or not all \
             finite numbers; a model is to be kept as {} made it",
            self.function,
            self.kind.makers
        )
    }

    /// A field of lists.
    ///
    /// # Errors
    /// An internal error where the kind has no such field.
    pub(super) fn list(&self, name: &str) -> Result<&ListArray> {
        self.column(name)?
            .as_list_opt::<i32>()
            .ok_or_else(|| internal_datafusion_err!("{name} of a model of {} is no list", self.kind.makers))
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
