//! [onnxruntime](ort): the fast engine, where its shared library is found.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use ort::ep;
use ort::logging::LogLevel;
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, PrepackedWeights, SessionBuilder};
use ort::value::{DynValue, Tensor, TensorRef};
use parking_lot::{Condvar, Mutex};
use prost::Message;
use tempfile::TempDir;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::tensor_shape_proto::Dimension;
use tract_onnx::pb::tensor_shape_proto::dimension::Value as Size;
use tract_onnx::pb::{ModelProto, StringStringEntryProto, TensorProto, TensorShapeProto, ValueInfoProto, type_proto};

use super::super::protobuf;
use super::library::Library;
use super::{Engine, EngineError, panic_message, shape_of_one};
use crate::settings::Device;

pub(super) const NAME: &str = "onnxruntime";

/// Images per run on the processor: more gain nothing there, and each takes memory. ResNet50 on two cores:
/// 34.4 images per second with one, 36.2 with four, 33.4 with eight, 34.2 with sixteen.
const CPU_ROWS: usize = 4;
/// A GPU wants many at once.
const CUDA_ROWS: usize = 32;
/// What a session holds for one image of a batch, in bytes of its input: ResNet50 takes 10 MB for 0.6 MB.
const ACTIVATIONS: usize = 20;
/// Smaller weights are not worth sharing.
const MIN_SHARED_BYTES: usize = 4096;

/// A network, and the sessions that run it.
///
/// A session has one thread and runs one batch at a time; there are as many as threads run the network at
/// once, up to the cores. So work on many batches keeps all cores busy without one waiting for another,
/// which is about a tenth faster than one session whose operators are divided among the cores.
///
/// The sessions share their weights. onnxruntime shares only what it is given as values, not what it reads
/// or makes while it optimizes the graph: so the graph is optimized once and written, its weights are taken
/// out, and every session gets the rest with the values. ResNet50 on two cores takes 210 MB so, and 610 MB
/// with two sessions of their own.
pub struct OnnxRuntimeEngine {
    recipe: Recipe,
    batch_rows: usize,
    output_shape: Vec<usize>,
    weight_bytes: usize,
    sessions: Mutex<Sessions>,
    returned: Condvar,
}

struct Sessions {
    idle: Vec<Session>,
    /// Sessions that may still be made.
    left: usize,
}

/// How a session is made.
struct Recipe {
    library: &'static Library,
    device: Device,
    input_shape: [usize; 4],
    /// The network's file, for sessions to come.
    network: Vec<u8>,
    /// Values that all sessions share, by name. Then the network is without them.
    weights: Vec<(String, Arc<DynValue>)>,
    prepacked: PrepackedWeights,
}

impl fmt::Debug for OnnxRuntimeEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnnxRuntimeEngine")
            .field("input_shape", &self.recipe.input_shape)
            .field("output_shape", &self.output_shape)
            .field("batch_rows", &self.batch_rows)
            .finish_non_exhaustive()
    }
}

impl OnnxRuntimeEngine {
    /// Optimizes a network for images of `input_shape` (with a batch of one), and runs it.
    ///
    /// # Errors
    /// Where onnxruntime does not know an operator, the shapes do not fit each other, the output is not
    /// float32, or the device is not there.
    pub fn load(
        library: &'static Library,
        network: ModelProto,
        input_shape: [usize; 4],
        device: Device,
    ) -> Result<Self, EngineError> {
        let loaded = catch_unwind(AssertUnwindSafe(|| {
            Self::try_load(library, network, input_shape, device)
        }));
        loaded
            .unwrap_or_else(|panic| Err(panic_message(panic.as_ref())))
            .map_err(|cause| failed("load", cause))
    }

    fn try_load(
        library: &'static Library,
        network: ModelProto,
        input_shape: [usize; 4],
        device: Device,
    ) -> Result<Self, String> {
        let unwritten = |e: io::Error| format!("it cannot be written to the folder of temporary files: {e}");
        let mut recipe = Recipe {
            library,
            device,
            input_shape,
            network: vec![],
            weights: vec![],
            prepacked: PrepackedWeights::new(),
        };
        let weight_bytes = network.encoded_len();
        let folder = private_folder().map_err(unwritten)?;
        let file = File::create(folder.path().join(NETWORK)).map_err(unwritten)?;
        protobuf::write(with_batches(network, input_shape), file).map_err(unwritten)?;
        let mut session = recipe.session_in(folder.path(), device == Device::Cpu)?;
        let output_shape = recipe.output_shape(&mut session)?;
        let batch_rows = recipe.batch_rows(&mut session);
        if device == Device::Cpu {
            let image = recipe.images(1);
            let expected = recipe.run(&mut session, &image, 1, |_, values| Ok(values.to_vec()))?;
            drop(session);
            session = recipe.share_weights(folder.path(), &image, &expected)?;
        }
        let sessions = match device {
            Device::Cpu => rayon::current_num_threads(),
            Device::Cuda => 1,
        };
        Ok(Self {
            recipe,
            batch_rows,
            output_shape,
            weight_bytes,
            sessions: Mutex::new(Sessions {
                idle: vec![session],
                left: sessions - 1,
            }),
            returned: Condvar::new(),
        })
    }

    /// A session that nobody uses, made or waited for.
    fn take(&self) -> Result<Taken<'_>, String> {
        let mut sessions = self.sessions.lock();
        loop {
            let taken = |session| Taken {
                engine: self,
                session: Some(session),
            };
            if let Some(session) = sessions.idle.pop() {
                return Ok(taken(session));
            }
            if sessions.left > 0 {
                let session = self.recipe.session()?;
                sessions.left -= 1;
                return Ok(taken(session));
            }
            self.returned.wait(&mut sessions);
        }
    }
}

/// A session while a thread runs it; then it goes back, or is made anew where it was lost in a panic.
struct Taken<'a> {
    engine: &'a OnnxRuntimeEngine,
    session: Option<Session>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut sessions = self.engine.sessions.lock();
        match self.session.take() {
            Some(session) => sessions.idle.push(session),
            None => sessions.left += 1,
        }
        drop(sessions);
        self.engine.returned.notify_one();
    }
}

/// A folder for a moment, that nobody else can look into.
fn private_folder() -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("pomona-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700));
    builder.tempdir()
}

/// In such a folder: the network that a session reads.
const NETWORK: &str = "network.onnx";
/// The network as onnxruntime optimized it.
const OPTIMIZED: &str = "optimized.onnx";
/// An empty file. onnxruntime insists that what a graph's weights refer to is there, and does not read it
/// where it has their values.
const ELSEWHERE: &str = "elsewhere";

impl Recipe {
    /// One more session.
    fn session(&self) -> Result<Session, String> {
        let text = |e: io::Error| e.to_string();
        let folder = private_folder().map_err(text)?;
        fs::write(folder.path().join(NETWORK), &self.network).map_err(text)?;
        fs::write(folder.path().join(ELSEWHERE), "").map_err(text)?;
        self.session_in(folder.path(), false)
    }

    /// A session on the network in a folder; its optimized form is written beside it where that is wanted.
    fn session_in(&self, folder: &Path, optimize: bool) -> Result<Session, String> {
        let text = |error: ort::Error<SessionBuilder>| error.to_string();
        let mut builder = Session::builder(self.library.environment()).map_err(|e| e.to_string())?;
        if self.device == Device::Cuda {
            let cuda = ep::CUDA::default().build().error_on_failure();
            builder = builder.with_execution_providers([cuda]).map_err(|e| {
                format!("no CUDA device can be used ({e}): SET pomona.device = 'cpu', or install onnxruntime-gpu")
            })?;
        }
        let level = match self.weights.is_empty() {
            true => GraphOptimizationLevel::All,
            // The file is optimized.
            false => GraphOptimizationLevel::Disable,
        };
        builder = builder.with_intra_threads(1).map_err(text)?;
        builder = builder.with_inter_threads(1).map_err(text)?;
        builder = builder.with_optimization_level(level).map_err(text)?;
        builder = builder.with_prepacked_weights(&self.prepacked).map_err(text)?;
        // Weights that are replaced by packed ones go back to the system.
        builder = builder.with_device_allocated_initializers().map_err(text)?;
        // One block for all activations of a shape is kept for ever, and no faster (56 MB of ResNet50's).
        builder = builder.with_memory_pattern(false).map_err(text)?;
        // Warnings about a file's style are not for the one who runs it.
        builder = builder.with_log_level(LogLevel::Fatal).map_err(text)?;
        if optimize {
            builder = builder
                .with_optimized_model_path(folder.join(OPTIMIZED))
                .map_err(text)?;
        }
        for (name, value) in &self.weights {
            builder = builder.with_initializer(name, Arc::clone(value)).map_err(text)?;
        }
        builder
            .commit_from_file(folder.join(NETWORK))
            .map_err(|e| e.to_string())
    }

    /// Replaces the network by its optimized form with its weights taken out, and makes a session of it.
    /// Where that cannot be read again, or gives other values, sessions stay on the network as it was.
    fn share_weights(&mut self, folder: &Path, image: &[f32], expected: &[f32]) -> Result<Session, String> {
        let shared = self.try_share_weights(&folder.join(OPTIMIZED)).and_then(|mut session| {
            let values = self.run(&mut session, image, 1, |_, values| Ok(values.to_vec()))?;
            match are_alike(&values, expected) {
                true => Ok(session),
                false => Err("it gives other values than before".to_owned()),
            }
        });
        shared.or_else(|cause| {
            log::debug!("onnxruntime's sessions do not share the weights: {cause}");
            self.weights.clear();
            self.network = fs::read(folder.join(NETWORK)).map_err(|e| e.to_string())?;
            self.session()
        })
    }

    fn try_share_weights(&mut self, optimized: &Path) -> Result<Session, String> {
        let text = |e: io::Error| e.to_string();
        let optimized = File::open(optimized).map_err(text)?;
        let length = optimized.metadata().map_err(text)?.len();
        let mut network = protobuf::read(optimized, length as usize).map_err(|e| e.to_string())?;
        let graph = network.graph.as_mut().ok_or("it has no graph")?;
        let mut weights = vec![];
        for tensor in &mut graph.initializer {
            if let Some(value) = take_value(tensor)? {
                tensor.data_location = Some(DataLocation::External as i32);
                tensor.external_data = vec![StringStringEntryProto {
                    key: "location".to_owned(),
                    value: ELSEWHERE.to_owned(),
                }];
                weights.push((tensor.name.clone(), Arc::new(value)));
            }
        }
        if weights.is_empty() {
            return Err("it has no weights".to_owned());
        }
        self.network = network.encode_to_vec();
        self.weights = weights;
        self.session()
    }

    fn values(&self) -> usize {
        self.input_shape.iter().product()
    }

    /// Some values, all different images.
    fn images(&self, rows: usize) -> Vec<f32> {
        (0..rows * self.values())
            .map(|i| (i * 7 % 251) as f32 / 251.0)
            .collect()
    }

    fn run<T>(
        &self,
        session: &mut Session,
        batch: &[f32],
        rows: usize,
        read: impl FnOnce(&[i64], &[f32]) -> Result<T, String>,
    ) -> Result<T, String> {
        let [_, a, b, c] = self.input_shape;
        let input = TensorRef::from_array_view(([rows, a, b, c], batch)).map_err(|e| e.to_string())?;
        let outputs = session.run(ort::inputs![input]).map_err(|e| e.to_string())?;
        let (shape, values) = outputs[0].try_extract_tensor::<f32>().map_err(|e| e.to_string())?;
        read(shape, values)
    }

    /// The shape of the output for one image.
    fn output_shape(&self, session: &mut Session) -> Result<Vec<usize>, String> {
        self.run(session, &self.images(1), 1, |shape, _| {
            let sides = shape.iter().map(|side| usize::try_from(*side));
            shape_of_one(&sides.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?)
        })
    }

    /// Rows per run: one where the network was written for one, which some exporters do in a Reshape.
    fn batch_rows(&self, session: &mut Session) -> usize {
        let images = self.images(2);
        let both = self.run(session, &images, 2, |_, values| Ok(values.to_vec()));
        let each: Result<Vec<_>, _> = images
            .chunks_exact(self.values())
            .map(|image| self.run(session, image, 1, |_, values| Ok(values.to_vec())))
            .collect();
        match (both, each.map(|each| each.concat())) {
            (Ok(both), Ok(each)) if are_alike(&both, &each) => match self.device {
                Device::Cpu => CPU_ROWS,
                Device::Cuda => CUDA_ROWS,
            },
            _ => 1,
        }
    }
}

/// Up to rounding.
fn are_alike(a: &[f32], b: &[f32]) -> bool {
    let is_alike = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-3 * (1.0 + a.abs()) || a.is_nan() && b.is_nan();
    a.len() == b.len() && a.iter().zip(b).all(is_alike)
}

/// Takes a weight's values out of a tensor; none where it is small, or of a type that is rarely large.
fn take_value(tensor: &mut TensorProto) -> Result<Option<DynValue>, String> {
    if tensor.raw_data.len() < MIN_SHARED_BYTES {
        return Ok(None);
    }
    let shape = tensor.dims.clone();
    let value = match DataType::try_from(tensor.data_type) {
        Ok(DataType::Float) => {
            let values = tensor
                .raw_data
                .as_chunks()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes));
            Tensor::from_array((shape, values.collect::<Vec<f32>>())).map(Tensor::into_dyn)
        }
        Ok(DataType::Int8) => {
            let values = tensor.raw_data.iter().map(|byte| byte.cast_signed());
            Tensor::from_array((shape, values.collect::<Vec<i8>>())).map(Tensor::into_dyn)
        }
        Ok(DataType::Uint8) => Tensor::from_array((shape, tensor.raw_data.clone())).map(Tensor::into_dyn),
        _ => return Ok(None),
    };
    tensor.raw_data = Vec::new();
    value.map(Some).map_err(|e| e.to_string())
}

impl Engine for OnnxRuntimeEngine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn output_shape(&self) -> &[usize] {
        &self.output_shape
    }

    fn batch_rows(&self) -> usize {
        self.batch_rows
    }

    fn memory(&self, threads: usize) -> usize {
        let input = self.recipe.values() * size_of::<f32>() * self.batch_rows;
        let output = self.output_shape.iter().product::<usize>() * size_of::<f32>() * self.batch_rows;
        let own = match self.recipe.weights.is_empty() {
            true => self.weight_bytes,
            false => 0,
        };
        self.weight_bytes + threads * (own + ACTIVATIONS * input + 2 * output)
    }

    fn run(&self, batch: &[f32], rows: usize, output: &mut [f32]) -> Result<(), EngineError> {
        let mut taken = self.take().map_err(|cause| failed("run", cause))?;
        let batch = &batch[..rows * self.recipe.values()];
        let ran = catch_unwind(AssertUnwindSafe(|| {
            let mut session = taken.session.take().ok_or("its session is lost")?;
            self.recipe.run(&mut session, batch, rows, |shape, values| {
                if values.len() != output.len() {
                    return Err(format!("its output for {rows} images is {shape:?}"));
                }
                output.copy_from_slice(values);
                Ok(())
            })?;
            taken.session = Some(session);
            Ok(())
        }));
        ran.unwrap_or_else(|panic| Err(panic_message(panic.as_ref())))
            .map_err(|cause| failed("run", cause))
    }
}

/// The network with a batch of any size: exporters often write 1 into it, and into the shapes that they
/// note along the graph.
fn with_batches(mut network: ModelProto, input_shape: [usize; 4]) -> ModelProto {
    if let Some(graph) = &mut network.graph {
        graph.value_info.clear();
        for output in &mut graph.output {
            if let Some(shape) = tensor_shape(output) {
                *shape = None;
            }
        }
        let weights: Vec<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
        let image = graph
            .input
            .iter_mut()
            .find(|input| !weights.contains(&input.name.as_str()));
        if let Some(shape) = image.and_then(tensor_shape) {
            let dim = |value| Dimension {
                value: Some(value),
                ..Dimension::default()
            };
            let [_, sides @ ..] = input_shape;
            let sides = sides.map(|side| dim(Size::DimValue(side as i64)));
            let mut dims = vec![dim(Size::DimParam("batch".to_owned()))];
            dims.extend(sides);
            *shape = Some(TensorShapeProto { dim: dims });
        }
    }
    network
}

fn tensor_shape(value: &mut ValueInfoProto) -> Option<&mut Option<TensorShapeProto>> {
    let type_proto::Value::TensorType(tensor) = value.r#type.as_mut()?.value.as_mut()?;
    Some(&mut tensor.shape)
}

fn failed(action: &'static str, cause: String) -> EngineError {
    EngineError {
        engine: NAME,
        action,
        cause,
    }
}
