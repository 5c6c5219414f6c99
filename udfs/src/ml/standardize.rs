//! Standardizing: every feature with mean 0 and standard deviation 1.
//!
//! As Spark's `StandardScaler`: the sample standard deviation (n - 1), and a constant feature becomes
//! 0.0. scikit-learn's divides by n instead.

use std::sync::LazyLock;

use arrow::array::ArrayRef;
use arrow::datatypes::{DataType, FieldRef};
use datafusion::common::utils::take_function_args;
use datafusion::common::{ScalarValue, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::{
    Accumulator, AggregateUDFImpl, ColumnarValue, Documentation, ScalarFunctionArgs, ScalarUDFImpl, Signature,
};
use datafusion_macros::user_doc;

use super::arguments::{scalar_constant, signature};
use super::fit::{Fit, FitAccumulator, state_fields};
use super::model::{ModelKind, Models, count_column, numbers_column};
use super::moments::{Squares, Summary};
use super::vectors::{VectorBuilder, VectorColumn, coerce_vector, list_of};

static KIND: LazyLock<ModelKind> = LazyLock::new(|| {
    ModelKind::new(
        "standardize_fit",
        [
            ("count", DataType::Int64),
            ("mean", list_of(DataType::Float64)),
            ("std", list_of(DataType::Float64)),
        ],
    )
});

/// `standardize_fit(v)`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "Fits the mean and the sample standard deviation of each feature of vectors. Returns a model, a \
                   struct {count, mean, std}, for `standardize`. NULL and empty vectors are ignored; of no rows the model is NULL.",
    syntax_example = "standardize_fit(vector)",
    sql_example = r#"```sql
SELECT standardize_fit(v) AS model FROM (VALUES ([1.0, 10.0]), ([2.0, 10.0]), ([3.0, 10.0])) AS t(v);
```"#,
    argument(
        name = "vector",
        description = "A list of numbers; all of the same length, none NULL or NaN."
    )
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct StandardizeFit {
    signature: Signature,
}

impl StandardizeFit {
    pub(super) fn new() -> Self {
        Self {
            signature: signature(["vector"]),
        }
    }
}

impl AggregateUDFImpl for StandardizeFit {
    fn name(&self) -> &str {
        KIND.makers()
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        let [vector] = take_function_args(self.name(), arg_types)?;
        Ok(vec![coerce_vector(self.name(), vector)?])
    }

    fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
        Ok(KIND.data_type())
    }

    fn accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        FitAccumulator::boxed(MeanAndStd, &args)
    }

    fn create_sliding_accumulator(&self, args: AccumulatorArgs) -> Result<Box<dyn Accumulator>> {
        FitAccumulator::sliding(MeanAndStd, &args)
    }

    fn state_fields(&self, args: StateFieldsArgs) -> Result<Vec<FieldRef>> {
        Ok(state_fields(&args))
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

#[derive(Debug, Clone, Copy)]
struct MeanAndStd;

impl Fit for MeanAndStd {
    type Spread = Squares;

    fn name(&self) -> &'static str {
        KIND.makers()
    }

    fn kind(&self) -> &'static ModelKind {
        &KIND
    }

    fn plan(&self) {}

    fn check_features(&self, _features: usize) -> Result<()> {
        Ok(())
    }

    fn workspace(&self, features: usize) -> usize {
        2 * features * size_of::<f64>()
    }

    fn columns(&self, moments: &Summary<'_, Squares>) -> Result<Vec<ArrayRef>> {
        // One row varies in nothing: its features are constant.
        let freedom = moments.count.saturating_sub(1).max(1) as f64;
        let std = moments.spread.values().iter().map(|square| (square / freedom).sqrt());
        Ok(vec![
            count_column(moments.count),
            numbers_column(moments.mean.clone()),
            numbers_column(std.collect()),
        ])
    }
}

/// `standardize(v, model)`
#[user_doc(
    doc_section(label = "Statistics"),
    description = "Removes the mean of each feature and scales it to unit variance, with a model of `standardize_fit`. \
                   A feature that was constant in the fit becomes 0.0. The result has the type of the vector, of \
                   Float64 for whole numbers.",
    syntax_example = "standardize(vector, model [, with_mean [, with_std]])",
    sql_example = r#"```sql
SELECT standardize([4.0, 10.0], (
    SELECT standardize_fit(v) FROM (VALUES ([1.0, 10.0]), ([2.0, 10.0]), ([3.0, 10.0])) AS t(v)
)) AS standardized;
```"#,
    argument(
        name = "vector",
        description = "A list of numbers, as long as those of the fit. NULL or empty: NULL."
    ),
    argument(name = "model", description = "What `standardize_fit` returned."),
    argument(
        name = "with_mean",
        description = "Whether to remove the mean: true, if it is not given. `with_mean => false` keeps zeros zero."
    ),
    argument(
        name = "with_std",
        description = "Whether to scale to unit variance: true, if it is not given; needs with_mean before it."
    )
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Standardize {
    signature: Signature,
}

impl Standardize {
    pub(super) fn new() -> Self {
        Self {
            signature: signature(["vector", "model", "with_mean", "with_std"]),
        }
    }
}

impl ScalarUDFImpl for Standardize {
    fn name(&self) -> &str {
        "standardize"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
        let [vector, model, options @ ..] = arg_types else {
            return plan_err!(
                "standardize takes a vector and a model, not {} arguments",
                arg_types.len()
            );
        };
        if options.len() > 2 || options.iter().any(|option| *option != DataType::Boolean) {
            return plan_err!("standardize takes with_mean and with_std as true or false behind the model");
        }
        let mut types = vec![coerce_vector(self.name(), vector)?, KIND.coerce(self.name(), model)?];
        types.extend_from_slice(options);
        Ok(types)
    }

    fn return_type(&self, arg_types: &[DataType]) -> Result<DataType> {
        match arg_types {
            [vector, ..] => Ok(vector.clone()),
            [] => plan_err!("standardize takes a vector and a model"),
        }
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let [vectors, model, ..] = args.args.as_slice() else {
            return plan_err!("standardize takes a vector and a model");
        };
        let option = |index| match scalar_constant(&args.args, self.name(), index)? {
            None => Ok(true),
            Some(ScalarValue::Boolean(Some(value))) => Ok(*value),
            Some(other) => plan_err!("standardize takes argument {} as true or false, not {other}", index + 1),
        };
        let (with_mean, with_std) = (option(2)?, option(3)?);
        let vectors = vectors.to_array(args.number_rows)?;
        let models = KIND.read(self.name(), model, args.number_rows)?;
        let vectors = VectorColumn::try_new(self.name(), vectors.as_ref())?;
        let standardized = VectorBuilder::try_new(args.return_type(), args.number_rows)?;
        Ok(ColumnarValue::Array(match (with_mean, with_std) {
            (true, true) => scale(&vectors, &models, standardized, |x, mean, std| (x - mean) / std),
            (false, true) => scale(&vectors, &models, standardized, |x, _, std| x / std),
            (true, false) => apply(&vectors, &models, standardized, |x, mean, _| x - mean),
            (false, false) => apply(&vectors, &models, standardized, |x, _, _| x),
        }?))
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.doc()
    }
}

/// [`apply`], and 0 where the standard deviation is.
fn scale(
    vectors: &VectorColumn<'_>,
    models: &Models<'_>,
    standardized: VectorBuilder,
    formula: impl Fn(f64, f64, f64) -> f64,
) -> Result<ArrayRef> {
    let guarded = |x, mean, std| if std == 0.0 { 0.0 } else { formula(x, mean, std) };
    apply(vectors, models, standardized, guarded)
}

/// `formula(x, mean, std)` for each feature of each vector.
fn apply(
    vectors: &VectorColumn<'_>,
    models: &Models<'_>,
    mut standardized: VectorBuilder,
    formula: impl Fn(f64, f64, f64) -> f64,
) -> Result<ArrayRef> {
    let mut row = vec![];
    for run in models.runs() {
        if models.is_null(run.start) {
            run.for_each(|_| standardized.append_null());
            continue;
        }
        let (mean, std) = (models.vector(run.start, "mean")?, models.vector(run.start, "std")?);
        if std.len() != mean.len() {
            return Err(models.broken("std"));
        }
        for i in run {
            let Some(vector) = vectors.get(i)? else {
                standardized.append_null();
                continue;
            };
            models.check_length(vector.len(), mean.len())?;
            row.clear();
            vector.extend_into(&mut row);
            let features = row.iter().zip(mean).zip(std);
            standardized.append(features.map(|((x, mean), std)| formula(*x, *mean, *std)));
        }
    }
    standardized.finish()
}
