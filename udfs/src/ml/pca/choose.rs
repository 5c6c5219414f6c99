//! `pca_truncate(model, k)` and `pca_components_for(model, share)`

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Builder, ListArray, StructArray, UInt64Array};
use arrow::buffer::NullBuffer;
use arrow::compute::take;
use arrow::datatypes::{DataType, FieldRef, Float64Type, Int64Type};
use datafusion::common::utils::take_function_args;
use datafusion::common::{ScalarValue, exec_err, internal_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::{ColumnarValue, Documentation, ScalarFunctionArgs, ScalarUDFImpl, Signature};
use datafusion_macros::user_doc;

use super::KIND;
use super::fit::enough;
use super::project::Basis;
use crate::ml::arguments::signature;
use crate::ml::model::Models;
use crate::ml::vectors::offsets;

/// `pca_truncate(model, k)`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "The model of `pca_fit` with its first k components alone. Where the method is 'exact', that is \
                   what `pca_fit(vector, k)` returns: one fit serves to try several k.",
    syntax_example = "pca_truncate(model, k)",
    sql_example = r#"```sql
SELECT array_length(pca_truncate(model, 1)['components']) AS components
FROM (SELECT pca_fit(v) AS model FROM (VALUES ([1.0, 2.0]), ([2.0, 4.0]), ([3.0, 7.0])) AS t(v));
```"#,
    argument(name = "model", description = "What `pca_fit` returned."),
    argument(
        name = "k",
        description = "How many components: at least 1, at most those of the model."
    )
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(in crate::ml) struct PcaTruncate {
    signature: Signature,
}

impl PcaTruncate {
    pub(in crate::ml) fn new() -> Self {
        Self {
            signature: signature(["model", "k"]),
        }
    }
}

impl ScalarUDFImpl for PcaTruncate {
    fn name(&self) -> &str {
        "pca_truncate"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        let [model, k] = take_function_args(self.name(), arg_types)?;
        if !k.is_integer() && !k.is_null() {
            return plan_err!("pca_truncate takes the number of components as a whole number, not {k}");
        }
        Ok(vec![KIND.coerce(self.name(), model)?, DataType::Int64])
    }

    fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
        Ok(KIND.data_type())
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [model, k] = take_function_args(self.name(), &args.args)?;
        by_row(&args, |rows| {
            let models = KIND.read(self.name(), model, rows)?;
            let k = k.to_array(rows)?;
            let k = k.as_primitive::<Int64Type>();
            let mut kept = Vec::with_capacity(rows);
            for (i, row) in models.sources().enumerate() {
                if k.is_null(i) || models.is_null(row) {
                    kept.push(None);
                    continue;
                }
                let have = components(&models, row)?;
                match usize::try_from(k.value(i)) {
                    Ok(k @ 1..) if k <= have => kept.push(Some((row, k))),
                    _ => {
                        return exec_err!(
                            "pca_truncate: the model has {have} components: k is from 1 to {have}, not {}",
                            k.value(i)
                        );
                    }
                }
            }
            let sources: UInt64Array = kept.iter().map(|kept| kept.map(|(row, _)| row as u64)).collect();
            let column = |field: &FieldRef| match field.name().as_str() {
                name @ ("components" | "explained_variance" | "explained_variance_ratio" | "singular_values") => {
                    first(models.list(name)?, &kept)
                }
                name => Ok(take(models.column(name)?, &sources, None)?),
            };
            let DataType::Struct(fields) = KIND.data_type() else {
                return internal_err!("a model is a struct");
            };
            let columns = fields.iter().map(column).collect::<Result<_>>()?;
            Ok(Arc::new(StructArray::try_new(fields, columns, Some(valid(&kept)))?))
        })
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// Calls `array` for the rows of a call, or once where all arguments are constants: a model is large.
fn by_row(args: &ScalarFunctionArgs, array: impl FnOnce(usize) -> Result<ArrayRef>) -> Result<ColumnarValue> {
    let constant = args.args.iter().all(|arg| matches!(arg, ColumnarValue::Scalar(_)));
    if constant {
        return Ok(ColumnarValue::Scalar(ScalarValue::try_from_array(&array(1)?, 0)?));
    }
    Ok(ColumnarValue::Array(array(args.number_rows)?))
}

/// How many components the model in `row` has.
fn components(models: &Models<'_>, row: usize) -> Result<usize> {
    let count = Basis::read(models, row)?.components.nrows();
    for field in ["explained_variance", "explained_variance_ratio", "singular_values"] {
        if models.vector(row, field)?.len() != count {
            return Err(models.broken(field));
        }
    }
    Ok(count)
}

fn valid<T>(kept: &[Option<T>]) -> NullBuffer {
    kept.iter().map(Option::is_some).collect()
}

/// Of each list in a row that is kept its first elements; NULL where none is.
fn first(lists: &ListArray, kept: &[Option<(usize, usize)>]) -> Result<ArrayRef> {
    let starts = lists.value_offsets();
    let ranges = kept.iter().flatten().map(|(row, k)| {
        let start = starts[*row] as u64;
        start..start + *k as u64
    });
    let indexes: UInt64Array = ranges.flatten().map(Some).collect();
    let lengths = kept.iter().map(|kept| kept.map_or(0, |(_, k)| k));
    let DataType::List(field) = lists.data_type() else {
        return internal_err!("expected lists, found {}", lists.data_type());
    };
    Ok(Arc::new(ListArray::try_new(
        Arc::clone(field),
        offsets(lengths)?,
        take(lists.values(), &indexes, None)?,
        Some(valid(kept)),
    )?))
}

/// `pca_components_for(model, share)`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "How many of the components of a model of `pca_fit` it takes to explain a share of the variance. An \
                   error if all of them do not reach it.",
    syntax_example = "pca_components_for(model, share)",
    sql_example = r#"```sql
SELECT pca_components_for(model, 0.9) AS components
FROM (SELECT pca_fit(v) AS model FROM (VALUES ([1.0, 2.0]), ([2.0, 4.0]), ([3.0, 7.0])) AS t(v));
```"#,
    argument(name = "model", description = "What `pca_fit` returned."),
    argument(name = "share", description = "Above 0.0, up to 1.0.")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(in crate::ml) struct PcaComponentsFor {
    signature: Signature,
}

impl PcaComponentsFor {
    pub(in crate::ml) fn new() -> Self {
        Self {
            signature: signature(["model", "share"]),
        }
    }
}

impl ScalarUDFImpl for PcaComponentsFor {
    fn name(&self) -> &str {
        "pca_components_for"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        let [model, share] = take_function_args(self.name(), arg_types)?;
        if !share.is_numeric() && !share.is_null() {
            return plan_err!("pca_components_for takes the share of the variance as a number, not {share}");
        }
        Ok(vec![KIND.coerce(self.name(), model)?, DataType::Float64])
    }

    fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
        Ok(DataType::Int64)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [model, share] = take_function_args(self.name(), &args.args)?;
        by_row(&args, |rows| {
            let models = KIND.read(self.name(), model, rows)?;
            let share = share.to_array(rows)?;
            let share = share.as_primitive::<Float64Type>();
            let mut counts = Int64Builder::with_capacity(rows);
            for (i, row) in models.sources().enumerate() {
                if share.is_null(i) || models.is_null(row) {
                    counts.append_null();
                    continue;
                }
                let wanted = share.value(i);
                if !(wanted > 0.0 && wanted <= 1.0) {
                    return exec_err!("pca_components_for: the share is above 0.0 and up to 1.0, not {wanted:?}");
                }
                let have = components(&models, row)?;
                let ratios = models.vector(row, "explained_variance_ratio")?;
                // Without any variance, any component explains all there is.
                let constant = ratios.iter().all(|ratio| *ratio == 0.0);
                match enough(ratios.iter().copied(), wanted) {
                    Some(count) => counts.append_value(count as i64),
                    None if constant => counts.append_value(1),
                    None => {
                        return exec_err!(
                            "pca_components_for: the {have} components of the model explain {:.4} of the variance, \
                             not {wanted:?}: fit more of them",
                            ratios.iter().sum::<f64>()
                        );
                    }
                }
            }
            Ok(Arc::new(counts.finish()))
        })
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}
