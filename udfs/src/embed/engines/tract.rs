//! [tract](tract_onnx): pure Rust, always there.
//!
//! # What was tried
//! Processor time of one thread per image, in milliseconds: the least of many runs on a Sapphire Rapids
//! Xeon (AVX-512) with mimalloc. At the rate of the processor's best matrix products ResNet50 takes 53.
//!
//! | | ResNet50, Keras | ResNet50, torchvision | SqueezeNet 1.1 |
//! |---|---|---|---|
//! | batch of 1, tract as it is | 81 | 85 | 9.1 |
//! | pixels gathered first, where that pays | 73 | 75 | 9.1 |
//! | and [unread positions](super::super::strides) skipped: **taken** | 63 | 75 | 9.1 |
//! | and batch normalization folded into the weights | 62 | | |
//! | batch of 2 / 4 / 16, tract as it is | 107 / 104 / 130 | 94 / 97 / 115 | 10.8 / 11.0 / 11.5 |
//! | batch of 2 / 4 / 16, skipped and folded | 78 / 78 / 89 | | |
//!
//! So images go through one at a time. With more, tract moves axes back and forth between convolutions,
//! and gathers the pixels of all before it multiplies. A symbolic batch is no faster, and Keras's ResNet50
//! cannot be optimized with one. A state that is kept from run to run saves nothing measurable: each run
//! makes its own. Other layouts are not worth trying: a network in NHWC costs one Transpose at its input,
//! and 1x1 convolutions are matrix products already, with bias, sum and Relu done on their tiles.

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tract_onnx::pb::{ModelProto, NodeProto, TensorProto};
use tract_onnx::prelude::*;
use tract_onnx::tract_core::knobs::KnobScope;
use tract_onnx::tract_core::plan;
use tract_onnx::tract_hir::ops::unimpl::UnimplementedOp;

use super::{Engine, EngineError, panic_message, shape_of_one};

pub(super) const NAME: &str = "tract";
/// tract puts whole nodes into its messages.
const MAX_CAUSE: usize = 600;
/// What a loaded network takes, in its weights: tract packs them for its matrix products.
const PACKED: usize = 2;
/// What a run takes, in its input: ResNet50 39 MB for 0.6 MB, SqueezeNet 23 MB.
const ACTIVATIONS: usize = 64;

/// From here on the weights of a 3x3 convolution, in bytes, fill a core's cache.
const LARGE_WEIGHTS: usize = 1 << 20;
/// How tract is to arrange the convolutions of networks with large weights. As it is, it gathers the pixels
/// for 3x3 ones while it multiplies, again and again for blocks of weights. So it does so before, where that
/// takes up to 2 MiB: ResNet50's products for maps of 14x14 run at 146 instead of 78 GFLOP/s, for 7x7 at 109
/// instead of 50, and gathering takes 4 ms. Larger maps have smaller weights, and stay as they are. So do
/// networks without large weights: SqueezeNet would take 5% longer, and ResNets of its size 20%.
const GATHER_FIRST: [(&str, &str); 2] = [
    ("TRACT_LAZY_IM2COL_MIN_KERNEL", "10"),
    ("TRACT_LAZY_IM2COL_MAX_EAGER_BYTES", "2097152"),
];

/// A network, optimized for this machine and one image at a time.
///
/// Networks whose exporter wrote a batch of one into a Reshape run too.
pub struct TractEngine {
    plan: Arc<TypedRunnableModel>,
    input_shape: [usize; 4],
    output_shape: Vec<usize>,
    weight_bytes: usize,
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
        unwound(|| Self::try_load(model, input_shape), String::new).map_err(|error| failed("load", &error))
    }

    fn try_load(model: &ModelProto, input_shape: [usize; 4]) -> TractResult<Self> {
        check_quantized_softmax(model)?;
        // The shapes that exporters note for values between nodes name their batch, which is one here.
        let graph = onnx().with_ignore_value_info(true).model_for_proto_model(model)?;
        check_operators(&graph)?;
        let weights = || model.graph.iter().flat_map(|graph| &graph.initializer);
        let gather = if weights().any(has_large_kernels) {
            &GATHER_FIRST[..]
        } else {
            &[]
        };
        let plan = KnobScope::new(gather.iter().copied())?.enter(|| {
            graph
                .with_input_fact(0, f32::fact(input_shape).into())?
                .into_optimized()?
                .into_runnable()
        })?;
        let mut engine = Self {
            plan,
            input_shape,
            output_shape: vec![],
            weight_bytes: weights().map(bytes).sum(),
        };
        let zeros = vec![0.0; input_shape.iter().product()];
        engine.output_shape = engine.run_one(&zeros, |output| {
            output.try_as_plain_ram()?.as_slice::<f32>()?;
            shape_of_one(output.shape()).map_err(TractError::msg)
        })?;
        Ok(engine)
    }

    /// Runs one image. An error names the node that fails.
    fn run_one<T>(&self, image: &[f32], read: impl FnOnce(&Tensor) -> TractResult<T>) -> TractResult<T> {
        let input = Tensor::from_shape(&self.input_shape, image)?;
        let running = Cell::new(None);
        let at = || match running.get() {
            Some(id) => {
                let node = self.plan.model().node(id);
                format!("node {} ({}): ", node.name, node.op.name())
            }
            None => String::new(),
        };
        let run = || {
            let mut state = self.plan.spawn()?;
            state.run_plan_with_eval(tvec!(input.into()), |context, state, node, inputs| {
                running.set(Some(node.id));
                plan::eval(context, state, node, inputs)
            })
        };
        let outputs = unwound(run, at)?;
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

    fn batch_rows(&self) -> usize {
        1
    }

    fn memory(&self, threads: usize) -> usize {
        let input = self.input_shape.iter().product::<usize>() * size_of::<f32>();
        let output = self.output_shape.iter().product::<usize>() * size_of::<f32>();
        PACKED * self.weight_bytes + threads * (ACTIVATIONS * input + 2 * output)
    }

    fn run(&self, batch: &[f32], rows: usize, output: &mut [f32]) -> Result<(), EngineError> {
        let images = batch.chunks_exact(self.input_shape.iter().product());
        let outputs = output.chunks_exact_mut(self.output_shape.iter().product());
        for (image, output) in images.zip(outputs).take(rows) {
            self.run_one(image, |values| {
                let values = values.try_as_plain_ram()?.as_slice::<f32>()?;
                if values.len() != output.len() {
                    return Err(TractError::msg(format!("its output has {} values now", values.len())));
                }
                output.copy_from_slice(values);
                Ok(())
            })
            .map_err(|error| failed("run", &error))?;
        }
        Ok(())
    }
}

/// Fails where the graph has operators that tract does not know, and names one.
fn check_operators(graph: &InferenceModel) -> TractResult<()> {
    let mut unknown = graph.nodes().iter().filter(|node| node.op_is::<UnimplementedOp>());
    let Some(node) = unknown.next() else { return Ok(()) };
    let name = node.op.name();
    let operator = name
        .strip_prefix("Unimplemented(")
        .and_then(|name| name.strip_suffix(')'))
        .unwrap_or(&name);
    let more = match unknown.count() {
        0 => String::new(),
        others => format!("; nor those of {others} other nodes"),
    };
    Err(TractError::msg(format!(
        "it does not know the operator {operator} of the node '{}'{more}",
        node.name
    )))
}

/// Fails where a softmax stands between quantized values: tract 0.23.9 then gives 1 everywhere.
fn check_quantized_softmax(model: &ModelProto) -> TractResult<()> {
    let nodes = || model.graph.iter().flat_map(|graph| &graph.node);
    let made = |operator: &'static str| nodes().filter(move |node| node.op_type == operator);
    let dequantized: HashSet<&str> = made("DequantizeLinear")
        .flat_map(|node| node.output.iter().map(String::as_str))
        .collect();
    let quantized: HashSet<&str> = made("QuantizeLinear")
        .filter_map(|node| node.input.first().map(String::as_str))
        .collect();
    let is_between = |node: &&NodeProto| {
        node.input.iter().any(|name| dequantized.contains(name.as_str()))
            && node.output.iter().any(|name| quantized.contains(name.as_str()))
    };
    match made("Softmax").find(is_between) {
        Some(node) => Err(TractError::msg(format!(
            "it computes Softmax between quantized values wrongly, at the node '{}'",
            node.name
        ))),
        None => Ok(()),
    }
}

/// Are these the weights of a convolution of more than one pixel that fill a core's cache?
fn has_large_kernels(weights: &TensorProto) -> bool {
    matches!(*weights.dims.as_slice(), [_, _, height, width] if height > 1 && width > 1)
        && bytes(weights) >= LARGE_WEIGHTS
}

fn bytes(weights: &TensorProto) -> usize {
    weights.raw_data.len() + size_of::<f32>() * weights.float_data.len()
}

/// What `run` gives; a panic becomes an error, which says where it was. tract has assertions that a
/// malformed graph can hit. Nothing shared is left half-made: what it was building is dropped with the panic.
fn unwound<T>(run: impl FnOnce() -> TractResult<T>, at: impl FnOnce() -> String) -> TractResult<T> {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(TractError::msg(format!("{}{}", at(), panic_message(panic.as_ref())))))
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use tract_onnx::pb::ValueInfoProto;

    use super::super::super::networks::onnx as network;
    use super::*;

    fn model(kind: &str) -> ModelProto {
        onnx()
            .proto_model_for_read(&mut network(kind, 8, 64).as_slice())
            .unwrap()
    }

    #[test]
    fn an_unknown_operator_is_named_with_its_node() {
        let mut model = model("squeezenet");
        let graph = model.graph.as_mut().unwrap();
        graph.node[3].op_type = "Unheard".to_owned();
        let name = graph.node[3].name.clone();
        let error = TractEngine::load(&model, [1, 3, 64, 64]).unwrap_err();
        assert_eq!(error.action, "load");
        assert_eq!(
            error.cause,
            format!("it does not know the operator Unheard of the node '{name}'")
        );
    }

    #[test]
    fn a_softmax_between_quantized_values_is_named() {
        let node = |op_type: &str, input: &str, output: &str| NodeProto {
            op_type: op_type.to_owned(),
            name: format!("{op_type}_0"),
            input: vec![input.to_owned()],
            output: vec![output.to_owned()],
            ..NodeProto::default()
        };
        let nodes = [
            node("DequantizeLinear", "image", "logits"),
            node("Softmax", "logits", "probabilities"),
            node("QuantizeLinear", "probabilities", "codes"),
        ];
        let mut model = model("squeezenet");
        let graph = model.graph.as_mut().unwrap();
        // On one side alone it is right.
        graph.node = nodes[..2].to_vec();
        check_quantized_softmax(&model).unwrap();

        let graph = model.graph.as_mut().unwrap();
        graph.node = nodes.to_vec();
        let error = TractEngine::load(&model, [1, 3, 64, 64]).unwrap_err();
        assert!(
            error.cause.contains("wrongly, at the node 'Softmax_0'"),
            "{}",
            error.cause
        );
    }

    #[test]
    #[expect(clippy::panic, reason = "what tract does")]
    fn a_node_that_panics_is_named() {
        let run = || -> TractResult<()> { panic!("index out of bounds") };
        let error = unwound(run, || "node Conv_1 (OptMatMul): ".to_owned()).unwrap_err();
        assert_eq!(error.to_string(), "node Conv_1 (OptMatMul): index out of bounds");
    }

    /// As shape inference leaves them, and with large kernels, which tract is told how to arrange.
    #[test]
    fn shapes_noted_with_a_symbolic_batch_do_not_matter() {
        let mut model = onnx()
            .proto_model_for_read(&mut network("resnet50-torchvision", 64, 32).as_slice())
            .unwrap();
        let graph = model.graph.as_mut().unwrap();
        assert!(graph.initializer.iter().any(has_large_kernels));
        graph.value_info.push(ValueInfoProto {
            name: graph.node[0].output[0].clone(),
            ..graph.input[0].clone()
        });
        let engine = TractEngine::load(&model, [1, 3, 32, 32]).unwrap();
        assert_eq!(engine.output_shape(), [1000]);

        let image: Vec<f32> = (0..3 * 32 * 32).map(|i| (i * 37 % 256) as f32 / 255.0).collect();
        let mut output = vec![f32::NAN; 1000];
        engine.run(&image, 1, &mut output).unwrap();
        assert!(output.iter().all(|value| value.is_finite()));
    }
}
