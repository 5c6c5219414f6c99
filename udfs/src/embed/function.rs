//! [`Embed`] and [`ResnetEmbed`]: the SQL functions `embed` and `resnet_embed`.

use std::cell::RefCell;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, FixedSizeListArray, Float32Array, NullBufferBuilder};
use arrow::datatypes::{DataType, Field, FieldRef};
use datafusion::common::HashMap;
use datafusion::common::config::ConfigOptions;
use datafusion::common::hash_map::Entry;
use datafusion::common::{ScalarValue, exec_err, internal_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::{
    ColumnarValue, Documentation, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
};
use datafusion_macros::user_doc;
use rayon::prelude::*;

use super::graph::Output;
use super::registry::{self, LoadedModel, ModelSettings};
use crate::image::decode::decoding_bytes;
use crate::image::{Scratch, SourceColumn, coerce_content_or_image};
use crate::memory::Share;
use crate::policy::{RowError, RowPolicy, Stage};
use crate::settings::PomonaOptions;

/// The most values of a batch of vectors: 1 GiB.
const MAX_VALUES: usize = 1 << 28;
/// The model of `resnet_embed` where none is named.
pub(super) const RESNET: &str = "resnet50";

pub(super) const EMBED: &str = "embed";
pub(super) const RESNET_EMBED: &str = "resnet_embed";

/// `embed(content_or_image, model [, output])`
#[user_doc(
    doc_section(label = "Embeddings"),
    description = "Embeds an image: gives the vector of features that a neural network computes from it. Encoded bytes \
and images of any size go through the model's own preprocessing; an image that already has the size the model takes is \
only normalized. The length of the vector is known when the query is planned.",
    syntax_example = "embed(content_or_image, model [, output])",
    sql_example = r"```sql
SELECT label, array_length(embed(content, 'resnet-mini')) AS dimensions
FROM (SELECT * FROM images('sample://fruits/Training/') ORDER BY path LIMIT 1);
```",
    argument(
        name = "content_or_image",
        description = "The encoded bytes of an image, or a decoded image."
    ),
    argument(
        name = "model",
        description = "The name of a model, as a literal: `SELECT name FROM models()` lists them. With a hash \
(`pinned_name` in `models()`) it is that very model or an error."
    ),
    argument(
        name = "output",
        description = "`'pooled'` (default): the last feature map, averaged over its positions; a classification head is \
left out. `'flatten'`: the last feature map as it is, in the order height, width, channels for models that take NHWC, \
channels, height, width for NCHW. `'logits'`: what the classification head gives, before its softmax."
    ),
    related_udf(name = "resnet_embed")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Embed {
    signature: Signature,
    /// The session's settings: at planning they cannot be asked for.
    models: ModelSettings,
}

/// `resnet_embed(content_or_image [, model])`
#[user_doc(
    doc_section(label = "Embeddings"),
    description = "Embeds an image with ResNet50, or another network: `embed` with a default model, `resnet50`. \
Without its classification head ResNet50 gives 2,048 features. The model is not part of the program: add it with \
`pomona model add resnet50 FILE.onnx --preset keras`.",
    syntax_example = "resnet_embed(content_or_image [, model])",
    sql_example = r"```sql
SELECT label, array_length(resnet_embed(content, 'resnet-mini')) AS dimensions
FROM (SELECT * FROM images('sample://fruits/Training/') ORDER BY path LIMIT 1);
```",
    argument(
        name = "content_or_image",
        description = "The encoded bytes of an image, or a decoded image."
    ),
    argument(
        name = "model",
        description = "The name of a model, as a literal; default `'resnet50'`."
    ),
    related_udf(name = "embed")
)]
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct ResnetEmbed {
    signature: Signature,
    /// The session's settings: at planning they cannot be asked for.
    models: ModelSettings,
}

/// Both functions are one, with and without a default model; they differ in name and documentation.
macro_rules! embed_function {
    ($function:ident, $name:expr, $arguments:pat, $usage:literal) => {
        impl Default for $function {
            fn default() -> Self {
                Self::new(ModelSettings::default())
            }
        }

        impl $function {
            fn new(models: ModelSettings) -> Self {
                // The same image has the same vector. But what is volatile the optimizer neither repeats nor
                // moves, and running a network twice costs more than anything that it could gain.
                Self {
                    signature: Signature::user_defined(Volatility::Volatile),
                    models,
                }
            }
        }

        impl ScalarUDFImpl for $function {
            fn name(&self) -> &str {
                $name
            }

            fn signature(&self) -> &Signature {
                &self.signature
            }

            fn coerce_types(&self, arg_types: &[DataType]) -> Result<Vec<DataType>> {
                match arg_types.len() {
                    $arguments => coerce($name, arg_types),
                    found => plan_err!("{} takes {}, not {found} arguments", $name, $usage),
                }
            }

            fn return_type(&self, _arg_types: &[DataType]) -> Result<DataType> {
                internal_err!(
                    "the type of {} is in return_field_from_args: it depends on the model",
                    $name
                )
            }

            fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
                return_field($name, &self.models, args.scalar_arguments)
            }

            fn with_updated_config(&self, config: &ConfigOptions) -> Option<ScalarUDF> {
                Some(Self::new(ModelSettings::from(&PomonaOptions::from_config(config))).into())
            }

            fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
                invoke($name, &args)
            }

            fn documentation(&self) -> Option<&Documentation> {
                self.doc()
            }
        }
    };
}

embed_function!(Embed, EMBED, 2..=3, "(content_or_image, 'model' [, 'output'])");
embed_function!(ResnetEmbed, RESNET_EMBED, 1..=2, "(content_or_image [, 'model'])");

/// The first argument is content or an image; the others are strings, kept as they are: a cast
/// would hide that they are literals.
fn coerce(function: &str, arg_types: &[DataType]) -> Result<Vec<DataType>> {
    let coerce = |(i, data_type): (usize, &DataType)| match data_type {
        _ if i == 0 => coerce_content_or_image(function, data_type),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Ok(data_type.clone()),
        other => plan_err!("{function} names its model and output in strings, not {other}"),
    };
    arg_types.iter().enumerate().map(coerce).collect()
}

/// Loads the model that the literals among the arguments name.
fn load(function: &str, models: &ModelSettings, arguments: &[Option<&ScalarValue>]) -> Result<Arc<LoadedModel>> {
    let literal = |i: usize| match arguments.get(i) {
        None => Ok(None),
        Some(argument) => match argument.and_then(|value| value.try_as_str()).flatten() {
            Some(text) => Ok(Some(text)),
            None => plan_err!(
                "{function} needs its model and output as literals, like {function}(content, 'resnet-mini'): the length \
                 of the vector is part of the query's type"
            ),
        },
    };
    let model = literal(1)?.unwrap_or(RESNET);
    let output = match literal(2)?.unwrap_or("pooled").parse::<Output>() {
        Ok(output) => output,
        Err(cause) => return plan_err!("{function}: {cause}"),
    };
    registry::load(model, output, models)
}

fn return_field(function: &str, models: &ModelSettings, arguments: &[Option<&ScalarValue>]) -> Result<FieldRef> {
    let model = load(function, models, arguments)?;
    Ok(Arc::new(Field::new(
        function,
        embedding_type(model.dimensions())?,
        true,
    )))
}

/// The SQL type of a vector.
fn embedding_type(dimensions: usize) -> Result<DataType> {
    match i32::try_from(dimensions) {
        Ok(length) => Ok(DataType::FixedSizeList(
            Arc::new(Field::new_list_field(DataType::Float32, true)),
            length,
        )),
        Err(_) => plan_err!("a vector of {dimensions} values is longer than {}", i32::MAX),
    }
}

fn invoke(function: &str, args: &ScalarFunctionArgs) -> Result<ColumnarValue> {
    let options = PomonaOptions::from_config(&args.config_options);
    let literals: Vec<Option<&ScalarValue>> = args
        .args
        .iter()
        .map(|argument| match argument {
            ColumnarValue::Scalar(value) => Some(value),
            ColumnarValue::Array(_) => None,
        })
        .collect();
    let model = load(function, &ModelSettings::from(&options), &literals)?;
    if embedding_type(model.dimensions())? != *args.return_type() {
        return exec_err!(
            "model '{}' gives {} values here, and gave another number where the query was planned: it was replaced, \
             or another model has its name on this machine",
            model.info().name,
            model.dimensions()
        );
    }
    match args.args.first() {
        Some(ColumnarValue::Array(sources)) => Ok(ColumnarValue::Array(embed(sources, &model, &options)?)),
        Some(ColumnarValue::Scalar(source)) => {
            let vector = embed(&source.to_array()?, &model, &options)?;
            Ok(ColumnarValue::Scalar(ScalarValue::try_from_array(&vector, 0)?))
        }
        None => internal_err!("{function} without arguments"),
    }
}

/// Embeds a column of encoded bytes or images, on all cores.
fn embed(sources: &ArrayRef, model: &LoadedModel, options: &PomonaOptions) -> Result<ArrayRef> {
    let (rows, dimensions) = (sources.len(), model.dimensions());
    if rows.checked_mul(dimensions).is_none_or(|length| length > MAX_VALUES) {
        return exec_err!(
            "infer: {rows} rows with vectors of {dimensions} values are too much memory at once: \
             SET datafusion.execution.batch_size to at most {}",
            (MAX_VALUES / dimensions).max(1)
        );
    }
    let column = SourceColumn::try_new(sources.as_ref())?;
    let embedder = Embedder {
        model,
        options,
        policy: RowPolicy::new(options),
        threads: model.threads(&options.memory)?,
    };
    let (distinct, repeated) = distinct_rows(&column, rows);
    // A thread takes some rows through all stages: so the cores are busy however few partitions there are,
    // and an image's pixels are read again while they are in the core's cache.
    let embedded: Vec<Result<Vectors>> = distinct
        .par_chunks(model.batch_rows())
        .map(|rows| WORKER.with_borrow_mut(|worker| embedder.run(&column, rows, worker)))
        .collect();

    let mut all = Vectors::new(rows, dimensions);
    let mut failed = HashMap::new();
    for (rows, vectors) in distinct.chunks(model.batch_rows()).zip(embedded) {
        let vectors = vectors?;
        for ((row, vector), valid) in rows
            .iter()
            .zip(vectors.values.chunks_exact(dimensions))
            .zip(vectors.valid)
        {
            all.values[row * dimensions..][..dimensions].copy_from_slice(vector);
            all.valid[*row] = valid;
        }
        failed.extend(vectors.failed.into_iter().map(|(i, stage)| (rows[i], stage)));
    }
    for (row, first) in repeated {
        all.values
            .copy_within(first * dimensions..(first + 1) * dimensions, row * dimensions);
        all.valid[row] = all.valid[first];
        // Each row is counted, however many share its image.
        if let Some(stage) = failed.get(&first) {
            options.failures.add(*stage);
        }
    }
    all.finish()
}

/// The rows to embed, and those that repeat an earlier row's bytes or pixels (as joins do), with that row.
fn distinct_rows(column: &SourceColumn<'_>, rows: usize) -> (Vec<usize>, Vec<(usize, usize)>) {
    let (mut distinct, mut repeated) = (vec![], vec![]);
    let mut seen: HashMap<(u32, u32, &[u8]), usize> = HashMap::new();
    for row in 0..rows {
        let key = match column {
            SourceColumn::Content(column) => column.get(row).map(|content| (0, 0, content)),
            SourceColumn::Image(column) => match column.get(row, Stage::Infer) {
                Some(Ok(image)) => Some((image.width, image.height, image.data)),
                Some(Err(_)) | None => None,
            },
        };
        match key.map(|key| seen.entry(key)) {
            Some(Entry::Occupied(first)) => repeated.push((row, *first.get())),
            Some(Entry::Vacant(entry)) => {
                entry.insert(row);
                distinct.push(row);
            }
            None => distinct.push(row),
        }
    }
    (distinct, repeated)
}

/// What a thread keeps from one batch to the next.
#[derive(Default)]
struct Worker {
    /// Preprocessed images, one after the other.
    batch: Vec<f32>,
    scratch: Scratch,
}

thread_local! {
    static WORKER: RefCell<Worker> = RefCell::default();
}

/// Embeds rows of one column, on any thread.
struct Embedder<'a> {
    model: &'a LoadedModel,
    options: &'a PomonaOptions,
    policy: RowPolicy,
    /// Threads that may run the network.
    threads: usize,
}

impl Embedder<'_> {
    /// Reserves what decoding takes, while others that decode give theirs back.
    fn hold_pixels(&self, content: &[u8]) -> Result<Option<Share>, RowError> {
        if self.options.memory.limit().is_none() {
            return Ok(None);
        }
        let Some(bytes) = decoding_bytes(content, self.options.max_image_pixels) else {
            return Ok(None);
        };
        let share = self.options.memory.share(bytes, "the image");
        share
            .map(Some)
            .map_err(|error| RowError::new(Stage::Decode, error.message()))
    }

    /// The vectors of `rows`, which are at most [`LoadedModel::batch_rows`].
    fn run(&self, column: &SourceColumn<'_>, rows: &[usize], worker: &mut Worker) -> Result<Vectors> {
        let (model, options) = (self.model, self.options);
        let preprocess = model.preprocess();
        let values = preprocess.values();
        worker.batch.resize(values * model.batch_rows(), 0.0);
        let mut vectors = Vectors::new(rows.len(), model.dimensions());
        let mut prepared = Vec::with_capacity(rows.len());
        for (i, row) in rows.iter().enumerate() {
            let input = &mut worker.batch[prepared.len() * values..][..values];
            let result = match column {
                SourceColumn::Content(column) => match column.get(*row) {
                    Some(content) => {
                        let (mode, max_pixels) = (options.decode, options.max_image_pixels);
                        Some(self.hold_pixels(content).and_then(|_held| {
                            preprocess.run_encoded(content, mode, max_pixels, &mut worker.scratch, input)
                        }))
                    }
                    None => None,
                },
                SourceColumn::Image(column) => column.get(*row, Stage::Infer).map(|image| {
                    let image = image?;
                    if preprocess.fits(image) {
                        preprocess.normalize(image, input);
                        return Ok(());
                    }
                    preprocess.run(image, options.max_image_pixels, &mut worker.scratch, input)
                }),
            };
            let Some(result) = result else { continue };
            let result = result.map_err(|error| vectors.fail(i, error));
            if self.policy.apply(result)?.is_some() {
                prepared.push(i);
            }
        }
        if prepared.is_empty() {
            return Ok(vectors);
        }
        let mut inferred = vec![0.0; prepared.len() * model.dimensions()];
        model.infer(&worker.batch, prepared.len(), self.threads, &mut inferred)?;
        for (i, vector) in prepared.iter().zip(inferred.chunks_exact(model.dimensions())) {
            let checked = if vector.iter().all(|value| value.is_finite()) {
                Ok(())
            } else {
                let cause = format!(
                    "model '{}' gives NaN or infinite values for this image",
                    model.info().name
                );
                Err(RowError::new(Stage::Infer, cause))
            };
            let checked = checked.map_err(|error| vectors.fail(*i, error));
            if self.policy.apply(checked)?.is_some() {
                vectors.values[i * model.dimensions()..][..model.dimensions()].copy_from_slice(vector);
                vectors.valid[*i] = true;
            }
        }
        Ok(vectors)
    }
}

/// A column of vectors that is being filled.
struct Vectors {
    values: Vec<f32>,
    valid: Vec<bool>,
    /// Rows that failed, with the stage.
    failed: Vec<(usize, Stage)>,
    dimensions: usize,
}

impl Vectors {
    fn fail(&mut self, row: usize, error: RowError) -> RowError {
        self.failed.push((row, error.stage));
        error
    }

    fn new(rows: usize, dimensions: usize) -> Self {
        Self {
            values: vec![0.0; rows * dimensions],
            valid: vec![false; rows],
            failed: vec![],
            dimensions,
        }
    }

    fn finish(self) -> Result<ArrayRef> {
        let DataType::FixedSizeList(field, length) = embedding_type(self.dimensions)? else {
            return internal_err!("the type of a vector is a list");
        };
        let mut nulls = NullBufferBuilder::new(self.valid.len());
        nulls.append_slice(&self.valid);
        let values = Arc::new(Float32Array::from(self.values));
        Ok(Arc::new(FixedSizeListArray::try_new(
            field,
            length,
            values,
            nulls.finish(),
        )?))
    }
}
