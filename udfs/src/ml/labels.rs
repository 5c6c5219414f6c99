//! Labels: what a classifier tells apart.

use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, StringArray};
use arrow::datatypes::{DataType, Int64Type};
use datafusion::common::{internal_err, plan_err};
use datafusion::error::Result;

/// The types that labels have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LabelType {
    /// strings, `Utf8`
    Text,
    /// whole numbers, `Int64`
    Integer,
    /// `Boolean`
    Boolean,
}

impl LabelType {
    /// All of them.
    pub(super) const ALL: [Self; 3] = [Self::Text, Self::Integer, Self::Boolean];

    /// As what values of a type are labels.
    ///
    /// # Errors
    /// A plan error for a type that does not name things.
    pub(super) fn of(function: &str, data_type: &DataType) -> Result<Self> {
        match data_type {
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => Ok(Self::Text),
            DataType::Dictionary(_, values) => Self::of(function, values),
            DataType::Boolean => Ok(Self::Boolean),
            t if t.is_integer() => Ok(Self::Integer),
            // What SQL makes of some whole numbers: row_number() OVER () % 2.
            DataType::Decimal32(_, 0)
            | DataType::Decimal64(_, 0)
            | DataType::Decimal128(_, 0)
            | DataType::Decimal256(_, 0) => Ok(Self::Integer),
            t if t.is_numeric() => plan_err!(
                "{function} takes labels that are strings, whole numbers or booleans, not {t}: CAST(label AS BIGINT) \
                 makes whole numbers"
            ),
            other => plan_err!("{function} takes labels that are strings, whole numbers or booleans, not {other}"),
        }
    }

    /// The SQL type.
    pub(super) fn data_type(self) -> DataType {
        match self {
            Self::Text => DataType::Utf8,
            Self::Integer => DataType::Int64,
            Self::Boolean => DataType::Boolean,
        }
    }
}

/// A label. Labels of one column are of one type, and sort as that type does.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Label {
    /// of [`LabelType::Text`]
    Text(String),
    /// of [`LabelType::Integer`]
    Integer(i64),
    /// of [`LabelType::Boolean`]
    Boolean(bool),
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(label) => write!(f, "'{label}'"),
            Self::Integer(label) => write!(f, "{label}"),
            Self::Boolean(label) => write!(f, "{label}"),
        }
    }
}

/// A column of labels.
#[derive(Debug)]
pub(super) enum LabelColumn<'a> {
    /// of [`LabelType::Text`]
    Text(&'a StringArray),
    /// of [`LabelType::Integer`]
    Integer(&'a Int64Array),
    /// of [`LabelType::Boolean`]
    Boolean(&'a BooleanArray),
}

impl<'a> LabelColumn<'a> {
    /// Reads a column of a type that [`LabelType::data_type`] gives.
    ///
    /// # Errors
    /// An internal error where the planner let another type through.
    pub(super) fn try_new(array: &'a dyn Array) -> Result<Self> {
        match array.data_type() {
            DataType::Utf8 => Ok(Self::Text(array.as_string())),
            DataType::Int64 => Ok(Self::Integer(array.as_primitive::<Int64Type>())),
            DataType::Boolean => Ok(Self::Boolean(array.as_boolean())),
            other => internal_err!("expected labels, found {other}"),
        }
    }

    /// The label of row `i`; `None` where it is NULL.
    pub(super) fn get(&self, i: usize) -> Option<Label> {
        match self {
            Self::Text(labels) => labels.is_valid(i).then(|| Label::Text(labels.value(i).to_owned())),
            Self::Integer(labels) => labels.is_valid(i).then(|| Label::Integer(labels.value(i))),
            Self::Boolean(labels) => labels.is_valid(i).then(|| Label::Boolean(labels.value(i))),
        }
    }
}

/// Labels as a column of [`LabelType::data_type`]; NULL where a label is of another type.
pub(super) fn label_array<'a>(label_type: LabelType, labels: impl IntoIterator<Item = Option<&'a Label>>) -> ArrayRef {
    let labels = labels.into_iter();
    match label_type {
        LabelType::Text => Arc::new(StringArray::from_iter(labels.map(|label| match label {
            Some(Label::Text(label)) => Some(label),
            _ => None,
        }))),
        LabelType::Integer => Arc::new(Int64Array::from_iter(labels.map(|label| match label {
            Some(Label::Integer(label)) => Some(*label),
            _ => None,
        }))),
        LabelType::Boolean => Arc::new(BooleanArray::from_iter(labels.map(|label| match label {
            Some(Label::Boolean(label)) => Some(*label),
            _ => None,
        }))),
    }
}
