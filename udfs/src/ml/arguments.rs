//! Constant arguments: what makes a model, or is the same for all rows.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::Schema;
use datafusion::common::{ScalarValue, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::function::AccumulatorArgs;
use datafusion::logical_expr::{ColumnarValue, Signature, Volatility};

/// The signature of a function that checks its own types, with the names of its arguments, of which
/// the last may be optional: `f(a, b => 1)`.
pub(super) fn signature<const N: usize>(names: [&str; N]) -> Signature {
    let signature = Signature::user_defined(Volatility::Immutable);
    // Fails for a name that stands twice; the function then takes arguments by position alone.
    signature
        .clone()
        .with_parameter_names(names.map(str::to_owned).to_vec())
        .unwrap_or(signature)
}

/// Argument `index` of a call of an aggregate; `None` where the call has none there.
///
/// # Errors
/// A plan error where it is not a constant: it makes the model, so it cannot differ from row to row.
pub(super) fn aggregate_constant(args: &AccumulatorArgs, function: &str, index: usize) -> Result<Option<ScalarValue>> {
    let Some(argument) = args.exprs.get(index) else {
        return Ok(None);
    };
    let no_columns = RecordBatch::new_empty(Arc::new(Schema::empty()));
    match argument.evaluate(&no_columns) {
        Ok(ColumnarValue::Scalar(value)) => Ok(Some(value)),
        _ => plan_err!("{function} takes argument {} as a constant, not {argument}", index + 1),
    }
}

/// Argument `index` of a call of a scalar function; `None` where the call has none there.
///
/// # Errors
/// Where it is not a constant.
pub(super) fn scalar_constant<'a>(
    args: &'a [ColumnarValue],
    function: &str,
    index: usize,
) -> Result<Option<&'a ScalarValue>> {
    match args.get(index) {
        None => Ok(None),
        Some(ColumnarValue::Scalar(value)) => Ok(Some(value)),
        Some(ColumnarValue::Array(_)) => plan_err!("{function} takes argument {} as a constant", index + 1),
    }
}
