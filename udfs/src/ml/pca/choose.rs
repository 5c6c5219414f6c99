//! `pca_truncate(model, k)` and `pca_components_for(model, share)`

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, Int32Array, Int64Array, Int64Builder, ListArray, StructArray, UInt64Array,
};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::compute::take;
use arrow::datatypes::{DataType, Float64Type, Int64Type};
use datafusion::common::utils::take_function_args;
use datafusion::common::{exec_err, internal_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::{ColumnarValue, Documentation, ScalarFunctionArgs, ScalarUDFImpl, Signature};
use datafusion_macros::user_doc;

use super::KIND;
use super::fit::enough;
use crate::ml::arguments::signature;

/// `pca_truncate(model, k)`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "The model of `pca_fit` with its first k components alone: what `pca_fit(vector, k)` had returned. \
                   One fit serves to try several k.",
    syntax_example = "pca_truncate(model, k)",
    sql_example = r#"```sql
SELECT cardinality(pca_truncate(model, 1)['components']) AS components
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
        let models = KIND.read(self.name(), model, args.number_rows)?;
        let k = k.to_array(args.number_rows)?;
        let k = k.as_primitive::<Int64Type>();

        let mut lengths = Vec::with_capacity(args.number_rows);
        for (i, row) in models.sources().enumerate() {
            let length = match k.is_valid(i) && !models.is_null(row) {
                true => {
                    let have = models.vector(row, "explained_variance")?.len();
                    match usize::try_from(k.value(i)) {
                        Ok(k @ 1..) if k <= have => Some(k),
                        _ => {
                            return exec_err!(
                                "pca_truncate: the model has {have} components: k is from 1 to {have}, not {}",
                                k.value(i)
                            );
                        }
                    }
                }
                false => None,
            };
            lengths.push(length);
        }
        // Row i of the result is of the model of row i, or of the only one.
        let sources = models.sources().zip(&lengths);
        let sources: UInt64Array = sources.map(|(row, length)| length.map(|_| row as u64)).collect();
        let column = |field: &str| -> Result<ArrayRef> {
            let column = take(models.column(field)?, &sources, None)?;
            match field {
                "components" | "explained_variance" | "explained_variance_ratio" | "singular_values" => {
                    first(column.as_list(), &lengths)
                }
                _ => Ok(column),
            }
        };
        let DataType::Struct(fields) = KIND.data_type() else {
            return internal_err!("a model is a struct");
        };
        let columns = fields.iter().map(|field| column(field.name())).collect::<Result<_>>()?;
        let nulls = lengths.iter().map(Option::is_some).collect::<Vec<_>>().into();
        Ok(ColumnarValue::Array(Arc::new(StructArray::try_new(
            fields,
            columns,
            Some(nulls),
        )?)))
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// The first `lengths[i]` elements of each list, none where that is `None`.
fn first(lists: &ListArray, lengths: &[Option<usize>]) -> Result<ArrayRef> {
    let starts = lists.value_offsets();
    let kept = lengths.iter().zip(starts).zip(&starts[1..]);
    let ranges = kept.map(|((length, start), end)| *start..end.min(&(start + length.unwrap_or(0) as i32)).to_owned());
    let indexes: Int32Array = ranges.clone().flatten().map(Some).collect();
    let mut offsets = vec![0];
    let mut end = 0;
    for range in ranges {
        end += range.end - range.start;
        offsets.push(end);
    }
    let DataType::List(field) = lists.data_type() else {
        return internal_err!("expected lists, found {}", lists.data_type());
    };
    Ok(Arc::new(ListArray::try_new(
        Arc::clone(field),
        OffsetBuffer::new(ScalarBuffer::from(offsets)),
        take(lists.values(), &indexes, None)?,
        Some(lengths.iter().map(Option::is_some).collect::<Vec<_>>().into()),
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
        let models = KIND.read(self.name(), model, args.number_rows)?;
        let share = share.to_array(args.number_rows)?;
        let share = share.as_primitive::<Float64Type>();
        let mut counts = Int64Builder::with_capacity(args.number_rows);
        for (i, row) in models.sources().enumerate() {
            if share.is_null(i) || models.is_null(row) {
                counts.append_null();
                continue;
            }
            let wanted = share.value(i);
            if !(wanted > 0.0 && wanted <= 1.0) {
                return exec_err!("pca_components_for: the share is above 0.0 and up to 1.0, not {wanted:?}");
            }
            let ratios = models.vector(row, "explained_variance_ratio")?;
            match enough(ratios.iter().copied(), wanted) {
                Some(count) => counts.append_value(count as i64),
                None => {
                    return exec_err!(
                        "pca_components_for: the {} components of the model explain {:.4} of the variance, not \
                         {wanted:?}: fit more of them",
                        ratios.len(),
                        ratios.iter().sum::<f64>()
                    );
                }
            }
        }
        let counts: Int64Array = counts.finish();
        Ok(ColumnarValue::Array(Arc::new(counts)))
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}
