//! Lists of numbers as columns of an accumulator's state.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, LargeListArray};
use arrow::datatypes::{DataType, Field, FieldRef, Float64Type, UInt64Type};
use datafusion::common::utils::SingleRowListArrayBuilder;
use datafusion::common::{ScalarValue, internal_datafusion_err, internal_err};
use datafusion::error::Result;
use datafusion::logical_expr::function::StateFieldsArgs;
use datafusion::logical_expr::utils::format_state_name;

/// The type of a list of numbers. A LargeList: the triangles of many groups together pass the 2^31
/// numbers that a List can hold.
pub(super) fn numbers_type() -> DataType {
    list_type(DataType::Float64)
}

/// Fields of a state, from names and types.
pub(super) fn state_fields<const N: usize>(args: &StateFieldsArgs, fields: [(&str, DataType); N]) -> Vec<FieldRef> {
    let field = |(name, data_type)| Arc::new(Field::new(format_state_name(args.name, name), data_type, true));
    fields.into_iter().map(field).collect()
}

/// Elements as one row of a column of LargeLists.
pub(super) fn list(elements: ArrayRef) -> ScalarValue {
    SingleRowListArrayBuilder::new(elements).build_large_list_scalar()
}

/// Numbers as one row of a column of [`Numbers`].
pub(super) fn numbers(values: Vec<f64>) -> ScalarValue {
    list(Arc::new(Float64Array::from(values)))
}

/// The elements of row `i` of a column of lists.
///
/// # Errors
/// An internal error where the column is something else.
pub(super) fn elements(column: &ArrayRef, i: usize) -> Result<ArrayRef> {
    let lists = column.as_list_opt::<i64>();
    let lists = lists.ok_or_else(|| internal_datafusion_err!("expected lists, found {}", column.data_type()))?;
    Ok(lists.value(i))
}

/// A column of lists of numbers.
pub(super) struct Numbers<'a> {
    lists: &'a LargeListArray,
    values: &'a [f64],
}

impl<'a> Numbers<'a> {
    /// Reads what [`numbers`] wrote.
    ///
    /// # Errors
    /// An internal error where the column is something else.
    pub(super) fn try_new(array: &'a ArrayRef) -> Result<Self> {
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

    /// The numbers of row `i`.
    pub(super) fn get(&self, i: usize) -> &'a [f64] {
        let offsets = self.lists.value_offsets();
        &self.values[offsets[i] as usize..offsets[i + 1] as usize]
    }
}

/// The type of a LargeList of `element`.
pub(super) fn list_type(element: DataType) -> DataType {
    DataType::LargeList(Arc::new(Field::new_list_field(element, true)))
}

/// The sum of a column of counts.
///
/// # Errors
/// An internal error where the column is something else.
pub(super) fn total(counts: &ArrayRef) -> Result<u64> {
    match counts.as_primitive_opt::<UInt64Type>() {
        Some(counts) => Ok(counts.values().iter().sum()),
        None => internal_err!("expected counts, found {}", counts.data_type()),
    }
}
