//! [tract](tract_onnx): pure Rust, always there.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tract_onnx::pb::ModelProto;
use tract_onnx::prelude::*;

use super::{Engine, EngineError};

const NAME: &str = "tract";
/// The longest output for one image, in values: 64 MiB.
const MAX_VALUES: usize = 1 << 24;
/// tract puts whole nodes into its messages.
const MAX_CAUSE: usize = 600;

/// A network, optimized for this machine.
///
/// The plan is for a batch of one: networks whose exporter wrote the batch size into a Reshape run
/// too, and larger batches gain tract little (it computes one image after the other, on one thread).
pub struct TractEngine {
    plan: Arc<TypedRunnableModel>,
    input_shape: [usize; 4],
    output_shape: Vec<usize>,
}

impl fmt::Debug for TractEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TractEngine")
            .field("input_shape", &self.input_shape)
            .field("output_shape", &self.output_shape)
            .finish_non_exhaustive()
    }
}

impl TractEngine {
    /// Optimizes a network for images of `input_shape` (with a batch of one), and runs it once.
    ///
    /// # Errors
    /// Where tract does not know an operator, the shapes do not fit each other, or the output is not
    /// float32.
    pub fn load(model: &ModelProto, input_shape: [usize; 4]) -> Result<Self, EngineError> {
        // tract has assertions that a malformed graph can hit. Nothing shared is left half-made:
        // what it was building is dropped with the panic.
        let loaded = catch_unwind(AssertUnwindSafe(|| Self::try_load(model, input_shape)));
        match loaded {
            Ok(Ok(engine)) => Ok(engine),
            Ok(Err(error)) => Err(failed("load", &error)),
            Err(panic) => Err(failed("load", &TractError::msg(panic_message(panic.as_ref())))),
        }
    }

    fn try_load(model: &ModelProto, input_shape: [usize; 4]) -> TractResult<Self> {
        let plan = onnx()
            .model_for_proto_model(model)?
            .with_input_fact(0, f32::fact(input_shape).into())?
            .into_optimized()?
            .into_runnable()?;
        let mut engine = Self {
            plan,
            input_shape,
            output_shape: vec![],
        };
        let zeros = vec![0.0; input_shape.iter().product()];
        engine.output_shape = engine.run_one(&zeros, |output| {
            let values = output.try_as_plain_ram()?.as_slice::<f32>()?.len();
            match output.shape() {
                [1, shape @ ..] if (1..=MAX_VALUES).contains(&values) => Ok(shape.to_vec()),
                shape => Err(TractError::msg(format!(
                    "its output for one image is {shape:?}, not [1, …] with 1 to {MAX_VALUES} values"
                ))),
            }
        })?;
        Ok(engine)
    }

    fn run_one<T>(&self, image: &[f32], read: impl FnOnce(&Tensor) -> TractResult<T>) -> TractResult<T> {
        let input = Tensor::from_shape(&self.input_shape, image)?;
        let outputs = self.plan.run(tvec!(input.into()))?;
        let output = outputs.first().ok_or_else(|| TractError::msg("it has no output"))?;
        read(output)
    }
}

impl Engine for TractEngine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_shape(&self) -> &[usize] {
        &self.output_shape
    }

    fn run(&self, batch: &[f32], rows: usize) -> Result<Vec<f32>, EngineError> {
        let length: usize = self.output_shape.iter().product();
        let mut values = Vec::with_capacity(rows * length);
        for image in batch.chunks_exact(self.input_shape.iter().product()).take(rows) {
            self.run_one(image, |output| {
                values.extend_from_slice(output.try_as_plain_ram()?.as_slice::<f32>()?);
                Ok(())
            })
            .map_err(|error| failed("run", &error))?;
        }
        Ok(values)
    }
}

fn failed(action: &'static str, error: &TractError) -> EngineError {
    let mut cause = format!("{error:#}");
    if let Some((end, _)) = cause.char_indices().nth(MAX_CAUSE) {
        cause.truncate(end);
        cause.push('…');
    }
    EngineError {
        engine: NAME,
        action,
        cause,
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    message.unwrap_or("it panicked").to_owned()
}
