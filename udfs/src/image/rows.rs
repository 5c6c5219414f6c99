//! What the functions of this module share: the types of their arguments, constants that the
//! planner sees, and the loop over the rows of a batch.

use arrow::array::{Array, ArrayRef, AsArray, Int64Array};
use arrow::datatypes::{DataType, Int64Type};
use datafusion::common::{ScalarValue, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::{ColumnarValue, ReturnFieldArgs, ScalarFunctionArgs};

use super::{Image, ImageBuilder, ImageColumn, ImageView, coerce_content, coerce_content_or_image, coerce_image};
use crate::policy::{RowError, RowPolicy, Stage};
use crate::settings::PomonaOptions;

/// What an argument is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Content,
    Image,
    ContentOrImage,
    Integer,
    Text,
}

/// The types to which the arguments of `function` are coerced; the last `optional` ones may be absent.
///
/// # Errors
/// A plan error where their number or types are wrong.
pub(super) fn coerce(
    function: &str,
    parameters: &[(&str, Kind)],
    optional: usize,
    types: &[DataType],
) -> Result<Vec<DataType>> {
    let required = parameters.len() - optional;
    if types.len() < required || types.len() > parameters.len() {
        let names: Vec<_> = parameters.iter().map(|(name, _)| *name).collect();
        let (first, last) = names.split_at(required);
        let last: String = last.iter().map(|name| format!(" [, {name}]")).collect();
        return plan_err!("{function}({}{last}) got {} arguments", first.join(", "), types.len());
    }
    let coerced = parameters.iter().zip(types).map(|((name, kind), t)| match kind {
        Kind::Content => coerce_content(function, t),
        Kind::Image => coerce_image(function, t),
        Kind::ContentOrImage => coerce_content_or_image(function, t),
        Kind::Integer if t.is_integer() || t.is_null() => Ok(DataType::Int64),
        Kind::Integer => plan_err!("{function}: {name} is an integer, not {t}"),
        Kind::Text if t.is_string() || t.is_null() => Ok(DataType::Utf8),
        Kind::Text => plan_err!("{function}: {name} is a string, not {t}"),
    });
    coerced.collect()
}

/// The constant integer that is argument `i`; `None` where it is no constant, NULL or absent.
pub(super) fn constant_integer(args: &ReturnFieldArgs<'_>, i: usize) -> Option<i64> {
    let constant = args.scalar_arguments.get(i).copied().flatten()?;
    match constant.cast_to(&DataType::Int64) {
        Ok(ScalarValue::Int64(value)) => value,
        _ => None,
    }
}

/// The constant string that is argument `i`; `None` where it is no constant, NULL or absent.
pub(super) fn constant_text<'a>(args: &ReturnFieldArgs<'a>, i: usize) -> Option<&'a str> {
    args.scalar_arguments.get(i).copied().flatten()?.try_as_str().flatten()
}

/// Evaluates a function over the columns of a batch; over columns of one row where all arguments
/// are constants.
///
/// # Errors
/// Those of `function`.
pub(super) fn evaluate(
    args: &ScalarFunctionArgs,
    function: impl Fn(&[ArrayRef], &PomonaOptions) -> Result<ArrayRef>,
) -> Result<ColumnarValue> {
    let columns = ColumnarValue::values_to_arrays(&args.args)?;
    let options = PomonaOptions::from_config(&args.config_options);
    function(&columns, &options).map(ColumnarValue::Array)
}

/// Reads a row of `N` integer columns; `None` where one of them is NULL.
pub(super) fn integers<const N: usize>(columns: [&ArrayRef; N]) -> impl Fn(usize) -> Option<[i64; N]> {
    let columns: [&Int64Array; N] = columns.map(|column| column.as_primitive::<Int64Type>());
    move |row| {
        let valid = columns.iter().all(|column| column.is_valid(row));
        valid.then(|| columns.map(|column| column.value(row)))
    }
}

/// Reads a row of a string column; `None` for NULL.
pub(super) fn text<'a>(column: &'a ArrayRef) -> impl Fn(usize) -> Option<&'a str> {
    let column = column.as_string::<i32>();
    move |row| column.is_valid(row).then(|| column.value(row))
}

/// Hands the outcome of each row to `append`: `None` where an argument is NULL, or where the row
/// failed and the policy makes it NULL.
///
/// # Errors
/// Those of `outcome` (the call is wrong, whatever the policy says) and of `append`, and a failed
/// row where the policy says so.
pub(super) fn for_each_row<T>(
    rows: usize,
    options: &PomonaOptions,
    outcome: impl Fn(usize) -> Result<Option<Result<T, RowError>>>,
    mut append: impl FnMut(Option<T>) -> Result<()>,
) -> Result<()> {
    let policy = RowPolicy::new(options);
    for row in 0..rows {
        let value = match outcome(row)? {
            Some(outcome) => policy.apply(outcome)?,
            None => None,
        };
        append(value)?;
    }
    Ok(())
}

/// Applies `kernel` to the image of each row and its `parameters`, which are `None` where one is
/// NULL. They are read before the image: a wrong call fails before a pixel is touched.
///
/// # Errors
/// As [`for_each_row`].
pub(super) fn for_each_image<P, T>(
    images: &ArrayRef,
    stage: Stage,
    options: &PomonaOptions,
    parameters: impl Fn(usize) -> Result<Option<P>>,
    kernel: impl Fn(ImageView<'_>, P) -> Result<T, RowError>,
    append: impl FnMut(Option<T>) -> Result<()>,
) -> Result<()> {
    let column = ImageColumn::try_new(images.as_ref())?;
    let outcome = |row: usize| -> Result<Option<Result<T, RowError>>> {
        if images.is_null(row) {
            return Ok(None);
        }
        let Some(parameters) = parameters(row)? else {
            return Ok(None);
        };
        Ok(column.get(row, stage).map(|image| kernel(image?, parameters)))
    };
    for_each_row(images.len(), options, outcome, append)
}

/// [`for_each_image`] into a column of images.
///
/// # Errors
/// As [`for_each_row`], and where the column becomes too large.
pub(super) fn map_images<P>(
    images: &ArrayRef,
    stage: Stage,
    options: &PomonaOptions,
    parameters: impl Fn(usize) -> Result<Option<P>>,
    kernel: impl Fn(ImageView<'_>, P) -> Result<Image, RowError>,
) -> Result<ArrayRef> {
    let mut builder = ImageBuilder::with_capacity(images.len());
    for_each_image(images, stage, options, parameters, kernel, |image: Option<Image>| {
        builder.append(image.as_ref().map(Image::view))
    })?;
    Ok(builder.finish())
}
