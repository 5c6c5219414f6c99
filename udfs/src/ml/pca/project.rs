//! `pca_transform(v, model)` and `pca_inverse(scores, model)`

use arrow::datatypes::DataType;
use datafusion::common::utils::take_function_args;
use datafusion::error::Result;
use datafusion::logical_expr::{ColumnarValue, Documentation, ScalarFunctionArgs, ScalarUDFImpl, Signature};
use datafusion_macros::user_doc;
use faer::MatRef;

use super::{EXACT, INCREMENTAL, KIND};
use crate::ml::arguments::signature;
use crate::ml::model::Models;
use crate::ml::projection::{Projection, project};
use crate::ml::vectors::{VectorBuilder, coerce_vector, element_type, list_of};

/// `pca_transform(v, model)`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "Takes the mean of the fit from a vector and projects it onto the principal components, with a model \
                   of `pca_fit`. Returns k numbers, of the element type of the vector, Float64 for whole \
                   numbers.",
    syntax_example = "pca_transform(vector, model)",
    sql_example = r#"```sql
SELECT round(pca_transform([5.0, 2.0], (
    SELECT pca_fit(v, 1) FROM (VALUES ([1.0, 2.0]), ([2.0, 2.0]), ([3.0, 2.0])) AS t(v)
))[1], 3) AS score;
```"#,
    argument(
        name = "vector",
        description = "A list of numbers, as long as those of the fit. NULL or empty: NULL."
    ),
    argument(name = "model", description = "What `pca_fit` returned.")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(in crate::ml) struct PcaTransform {
    signature: Signature,
}

impl PcaTransform {
    pub(in crate::ml) fn new() -> Self {
        Self {
            signature: signature(["vector", "model"]),
        }
    }
}

impl ScalarUDFImpl for PcaTransform {
    fn name(&self) -> &str {
        "pca_transform"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        coerce(self.name(), arg_types)
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        projected_type(self.name(), arg_types)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        invoke(self.name(), &args, |model| Projection {
            before: Some(model.mean),
            matrix: model.components.transpose(),
            after: None,
        })
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// `pca_inverse(scores, model)`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "Takes what `pca_transform` returned back to where the vectors were: the point of the components' \
                   subspace that is closest to the vector. Its distance from the vector is what the components do \
                   not explain.",
    syntax_example = "pca_inverse(scores, model)",
    sql_example = r#"```sql
WITH pca AS (SELECT pca_fit(v, 1) AS model FROM (VALUES ([1.0, 2.0]), ([2.0, 4.0]), ([3.0, 6.0])) AS t(v))
SELECT round(inverse[1], 3) AS x, round(inverse[2], 3) AS y
FROM (SELECT pca_inverse(pca_transform([5.0, 11.0], model), model) AS inverse FROM pca);
```"#,
    argument(
        name = "scores",
        description = "A list of numbers, as many as the model has components. NULL or empty: NULL."
    ),
    argument(name = "model", description = "What `pca_fit` returned.")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(in crate::ml) struct PcaInverse {
    signature: Signature,
}

impl PcaInverse {
    pub(in crate::ml) fn new() -> Self {
        Self {
            signature: signature(["scores", "model"]),
        }
    }
}

impl ScalarUDFImpl for PcaInverse {
    fn name(&self) -> &str {
        "pca_inverse"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        coerce(self.name(), arg_types)
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        projected_type(self.name(), arg_types)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        invoke(self.name(), &args, |model| Projection {
            before: None,
            matrix: model.components,
            after: Some(model.mean),
        })
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

fn coerce(function: &str, arg_types: &[DataType]) -> Result<Vec<DataType>> {
    let [vector, model] = take_function_args(function, arg_types)?;
    Ok(vec![coerce_vector(function, vector)?, KIND.coerce(function, model)?])
}

// The number of components is known when the query runs, not when it is planned.
fn projected_type(function: &str, arg_types: &[DataType]) -> Result<DataType> {
    let [vector, _] = take_function_args(function, arg_types)?;
    Ok(list_of(element_type(vector)?.clone()))
}

/// What a projection needs of a model.
pub(super) struct Basis<'a> {
    mean: &'a [f64],
    /// k x d
    pub(super) components: MatRef<'a, f64>,
}

impl<'a> Basis<'a> {
    /// Reads and checks the model in `row`.
    ///
    /// # Errors
    /// Where it is not as `pca_fit` made it, or a newer version did.
    pub(super) fn read(models: &'a Models<'_>, row: usize) -> Result<Self> {
        models.word(row, "method", &[EXACT, INCREMENTAL])?;
        let mean = models.vector(row, "mean")?;
        let components = models.matrix(row, "components", mean.len())?;
        let k = components.len() / mean.len();
        Ok(Self {
            mean,
            components: MatRef::from_row_major_slice(components, k, mean.len()),
        })
    }
}

fn invoke(
    function: &str,
    args: &ScalarFunctionArgs,
    projection: impl for<'m> Fn(Basis<'m>) -> Projection<'m>,
) -> Result<ColumnarValue> {
    let [vectors, model] = take_function_args(function, &args.args)?;
    let vectors = vectors.to_array(args.number_rows)?;
    let models = KIND.read(function, model, args.number_rows)?;
    let mut projected = VectorBuilder::try_new(args.return_type(), args.number_rows)?;
    project(
        vectors.as_ref(),
        &models,
        |row| Ok(projection(Basis::read(&models, row)?)),
        |_, vector| {
            match vector {
                Some(vector) => projected.append(vector.iter().copied()),
                None => projected.append_null(),
            }
            Ok(())
        },
    )?;
    Ok(ColumnarValue::Array(projected.finish()?))
}
