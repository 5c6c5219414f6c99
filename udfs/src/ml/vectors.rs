//! Columns of vectors: reading and building them, whichever list type they have.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, FixedSizeListArray, Float32Array, Float64Array, GenericListArray, NullBufferBuilder,
    OffsetSizeTrait,
};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, FieldRef, Float32Type, Float64Type};
use datafusion::common::{exec_datafusion_err, exec_err, internal_err, plan_err};
use datafusion::error::{DataFusionError, Result};

/// A list of `element`, as `List` in models and results.
pub(super) fn list_of(element: DataType) -> DataType {
    DataType::List(Arc::new(Field::new_list_field(element, true)))
}

/// The type to which an argument that must be a vector is coerced: its own where the elements are
/// `Float32` or `Float64`, and `Float64` elements where they are other numbers.
///
/// # Errors
/// A plan error for anything else.
pub(super) fn coerce_vector(function: &str, data_type: &DataType) -> Result<DataType> {
    let element = |field: &FieldRef| match field.data_type() {
        DataType::Float32 | DataType::Float64 => Some(Arc::clone(field)),
        t if t.is_numeric() || t.is_null() => Some(Arc::new(field.as_ref().clone().with_data_type(DataType::Float64))),
        _ => None,
    };
    let coerced = match data_type {
        DataType::Null => Some(list_of(DataType::Float64)),
        DataType::FixedSizeList(field, size) => element(field).map(|field| DataType::FixedSizeList(field, *size)),
        DataType::List(field) | DataType::ListView(field) => element(field).map(DataType::List),
        DataType::LargeList(field) | DataType::LargeListView(field) => element(field).map(DataType::LargeList),
        _ => None,
    };
    match coerced {
        Some(coerced) => Ok(coerced),
        None => plan_err!("{function} takes a vector, a list of numbers, not {data_type}"),
    }
}

/// The element type of a vector type that [`coerce_vector`] gave.
///
/// # Errors
/// An internal error where the planner let another type through.
pub(super) fn element_type(data_type: &DataType) -> Result<&DataType> {
    match data_type {
        DataType::FixedSizeList(field, _) | DataType::List(field) | DataType::LargeList(field) => Ok(field.data_type()),
        other => internal_err!("expected a vector, found {other}"),
    }
}

/// A vector of at least one number, all of them finite.
#[derive(Debug, Clone, Copy)]
pub(super) enum Vector<'a> {
    /// `Float32` elements
    F32(&'a [f32]),
    /// `Float64` elements
    F64(&'a [f64]),
}

impl Vector<'_> {
    /// The number of elements.
    pub(super) fn len(self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }

    /// Appends the elements to `out`.
    pub(super) fn extend_into(self, out: &mut Vec<f64>) {
        match self {
            Self::F32(values) => out.extend(values.iter().copied().map(f64::from)),
            Self::F64(values) => out.extend_from_slice(values),
        }
    }

    /// The first element that is NaN or infinite, and where it is.
    fn first_not_finite(self) -> Option<(usize, f64)> {
        // A fold that cannot leave early is one that vectorizes.
        let finite = match self {
            Self::F32(values) => values.iter().fold(true, |finite, x| finite & x.is_finite()),
            Self::F64(values) => values.iter().fold(true, |finite, x| finite & x.is_finite()),
        };
        if finite {
            return None;
        }
        let mut values = Vec::with_capacity(self.len());
        self.extend_into(&mut values);
        values.into_iter().enumerate().find(|(_, x)| !x.is_finite())
    }
}

#[derive(Debug)]
enum Layout<'a> {
    Fixed(usize),
    List(&'a [i32]),
    LargeList(&'a [i64]),
}

/// A column of vectors.
#[derive(Debug)]
pub(super) struct VectorColumn<'a> {
    function: &'a str,
    rows: usize,
    nulls: Option<&'a NullBuffer>,
    layout: Layout<'a>,
    values: Vector<'a>,
    value_nulls: Option<&'a NullBuffer>,
}

impl<'a> VectorColumn<'a> {
    /// Reads `array` as vectors; `function` is named in errors.
    ///
    /// # Errors
    /// An internal error where the planner let another type through.
    pub(super) fn try_new(function: &'a str, array: &'a dyn Array) -> Result<Self> {
        let (layout, values) = match array.data_type() {
            DataType::FixedSizeList(..) => {
                let lists = array.as_fixed_size_list();
                (Layout::Fixed(lists.value_length() as usize), lists.values())
            }
            DataType::List(_) => {
                let lists = array.as_list::<i32>();
                (Layout::List(lists.value_offsets()), lists.values())
            }
            DataType::LargeList(_) => {
                let lists = array.as_list::<i64>();
                (Layout::LargeList(lists.value_offsets()), lists.values())
            }
            other => return internal_err!("expected vectors, found {other}"),
        };
        let value_nulls = values.nulls().filter(|nulls| nulls.null_count() > 0);
        let values = match values.data_type() {
            DataType::Float32 => Vector::F32(values.as_primitive::<Float32Type>().values()),
            DataType::Float64 => Vector::F64(values.as_primitive::<Float64Type>().values()),
            other => return internal_err!("expected vectors of Float32 or Float64, found {other}"),
        };
        Ok(Self {
            function,
            rows: array.len(),
            nulls: array.nulls(),
            layout,
            values,
            value_nulls,
        })
    }

    /// The number of rows.
    pub(super) fn len(&self) -> usize {
        self.rows
    }

    /// The vector of row `i`; `None` where it is NULL or empty.
    ///
    /// # Errors
    /// Where it holds a NULL, NaN or an infinity.
    pub(super) fn get(&self, i: usize) -> Result<Option<Vector<'a>>> {
        let range = self.range(i);
        if range.is_empty() || self.nulls.is_some_and(|nulls| nulls.is_null(i)) {
            return Ok(None);
        }
        let null = self
            .value_nulls
            .and_then(|nulls| range.clone().find(|&at| nulls.is_null(at)));
        if let Some(at) = null {
            return self.bad_element(i, at - range.start, &"NULL");
        }
        let vector = match self.values {
            Vector::F32(values) => Vector::F32(&values[range]),
            Vector::F64(values) => Vector::F64(&values[range]),
        };
        match vector.first_not_finite() {
            Some((at, value)) => self.bad_element(i, at, &value),
            None => Ok(Some(vector)),
        }
    }

    fn range(&self, i: usize) -> Range<usize> {
        match self.layout {
            Layout::Fixed(size) => i * size..(i + 1) * size,
            Layout::List(offsets) => offsets[i] as usize..offsets[i + 1] as usize,
            Layout::LargeList(offsets) => offsets[i] as usize..offsets[i + 1] as usize,
        }
    }

    // Elements are counted from 1, as SQL does: the message's number can be typed into v[…].
    fn bad_element<T>(&self, row: usize, at: usize, value: &dyn std::fmt::Display) -> Result<T> {
        exec_err!(
            "{}: element {} of a vector is {value} (row {} of its batch), but vectors hold finite numbers only: \
             leave such vectors out, or set them to NULL",
            self.function,
            at + 1,
            row + 1
        )
    }
}

#[derive(Debug)]
enum Elements {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

/// Builds a column of vectors from `f64` values.
#[derive(Debug)]
pub(super) struct VectorBuilder {
    data_type: DataType,
    elements: Elements,
    /// The end of each row in `elements`, after a leading 0.
    ends: Vec<usize>,
    nulls: NullBufferBuilder,
}

impl VectorBuilder {
    /// A builder for `rows` rows of a vector type.
    ///
    /// # Errors
    /// An internal error where the type is not one of vectors.
    pub(super) fn try_new(data_type: &DataType, rows: usize) -> Result<Self> {
        let elements = match element_type(data_type)? {
            DataType::Float32 => Elements::F32(vec![]),
            DataType::Float64 => Elements::F64(vec![]),
            other => return internal_err!("expected elements of Float32 or Float64, found {other}"),
        };
        let mut ends = Vec::with_capacity(rows + 1);
        ends.push(0);
        Ok(Self {
            data_type: data_type.clone(),
            elements,
            ends,
            nulls: NullBufferBuilder::new(rows),
        })
    }

    /// Appends a vector.
    pub(super) fn append(&mut self, values: impl IntoIterator<Item = f64>) {
        self.extend(values);
        self.nulls.append_non_null();
    }

    /// Appends NULL.
    pub(super) fn append_null(&mut self) {
        // A row of a FixedSizeList has its place even where it is NULL.
        let size = match self.data_type {
            DataType::FixedSizeList(_, size) => size as usize,
            _ => 0,
        };
        self.extend(std::iter::repeat_n(0.0, size));
        self.nulls.append_null();
    }

    fn extend(&mut self, values: impl IntoIterator<Item = f64>) {
        let end = match &mut self.elements {
            Elements::F32(elements) => {
                elements.extend(values.into_iter().map(|x| x as f32));
                elements.len()
            }
            Elements::F64(elements) => {
                elements.extend(values);
                elements.len()
            }
        };
        self.ends.push(end);
    }

    /// The column.
    ///
    /// # Errors
    /// Where the column holds more elements than its type can address.
    pub(super) fn finish(mut self) -> Result<ArrayRef> {
        let rows = self.ends.len() - 1;
        let elements: ArrayRef = match self.elements {
            Elements::F32(elements) => Arc::new(Float32Array::from(elements)),
            Elements::F64(elements) => Arc::new(Float64Array::from(elements)),
        };
        let nulls = self.nulls.finish();
        match self.data_type {
            DataType::FixedSizeList(field, size) => Ok(Arc::new(FixedSizeListArray::try_new_with_length(
                field, size, elements, nulls, rows,
            )?)),
            DataType::List(field) => list_array::<i32>(field, &self.ends, elements, nulls),
            DataType::LargeList(field) => list_array::<i64>(field, &self.ends, elements, nulls),
            other => internal_err!("expected a vector, found {other}"),
        }
    }
}

fn list_array<O: OffsetSizeTrait>(
    field: FieldRef,
    ends: &[usize],
    elements: ArrayRef,
    nulls: Option<NullBuffer>,
) -> Result<ArrayRef> {
    let offsets: Option<Vec<O>> = ends.iter().map(|&end| O::from_usize(end)).collect();
    let offsets = offsets.ok_or_else(too_many)?;
    Ok(Arc::new(GenericListArray::<O>::try_new(
        field,
        OffsetBuffer::new(offsets.into()),
        elements,
        nulls,
    )?))
}

fn too_many() -> DataFusionError {
    exec_datafusion_err!("a batch holds more elements than a List can: use a smaller datafusion.execution.batch_size")
}

/// The offsets of lists of these lengths.
///
/// # Errors
/// Where they hold more elements than a List can address.
pub(super) fn offsets(lengths: impl IntoIterator<Item = usize>) -> Result<OffsetBuffer<i32>> {
    let mut end = 0_usize;
    let ends = lengths.into_iter().map(|length| {
        end += length;
        i32::try_from(end).map_err(|_| too_many())
    });
    let ends: Vec<i32> = std::iter::once(Ok(0)).chain(ends).collect::<Result<_>>()?;
    Ok(OffsetBuffer::new(ends.into()))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use arrow::array::{LargeListArray, ListArray};

    use super::*;

    fn read(array: &dyn Array) -> Vec<Option<Vec<f64>>> {
        let column = VectorColumn::try_new("f", array).unwrap();
        let vector = |i| {
            let mut values = vec![];
            column.get(i).unwrap()?.extend_into(&mut values);
            Some(values)
        };
        (0..column.len()).map(vector).collect()
    }

    #[test]
    fn sliced_columns_of_every_layout_read_the_same() {
        let rows = vec![Some(vec![Some(9.0), Some(9.0)]), None, Some(vec![Some(1.0), Some(2.5)])];
        let expected = vec![None, Some(vec![1.0, 2.5])];
        let list = ListArray::from_iter_primitive::<Float64Type, _, _>(rows.clone());
        let large = LargeListArray::from_iter_primitive::<Float64Type, _, _>(rows.clone());
        let fixed = FixedSizeListArray::from_iter_primitive::<Float64Type, _, _>(rows, 2);
        let arrays: [ArrayRef; 3] = [Arc::new(list), Arc::new(large), Arc::new(fixed)];
        for array in arrays {
            assert_eq!(read(array.slice(1, 2).as_ref()), expected);
        }
    }

    #[test]
    fn a_column_is_built_in_the_type_it_was_read_in() {
        let rows = vec![Some(vec![Some(1.0), Some(-2.0)]), None];
        let field = Arc::new(Field::new("x", DataType::Float32, true));
        for data_type in [
            DataType::FixedSizeList(Arc::clone(&field), 2),
            DataType::List(Arc::clone(&field)),
            DataType::LargeList(field),
        ] {
            let mut builder = VectorBuilder::try_new(&data_type, 2).unwrap();
            for row in &rows {
                match row {
                    Some(row) => builder.append(row.iter().flatten().copied()),
                    None => builder.append_null(),
                }
            }
            let array = builder.finish().unwrap();
            assert_eq!(array.data_type(), &data_type);
            assert_eq!(read(array.as_ref()), vec![Some(vec![1.0, -2.0]), None]);
        }
    }

    #[test]
    fn an_element_that_is_no_number_is_named() {
        let nan = ListArray::from_iter_primitive::<Float32Type, _, _>([Some(vec![Some(1.0), Some(f32::NAN)])]);
        let error = VectorColumn::try_new("f", &nan)
            .unwrap()
            .get(0)
            .unwrap_err()
            .to_string();
        assert!(error.contains("f: element 2 of a vector is NaN"), "{error}");
        let null = ListArray::from_iter_primitive::<Float32Type, _, _>([Some(vec![None, Some(1.0)])]);
        let error = VectorColumn::try_new("f", &null)
            .unwrap()
            .get(0)
            .unwrap_err()
            .to_string();
        assert!(error.contains("f: element 1 of a vector is NULL"), "{error}");
    }
}
