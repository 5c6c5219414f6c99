//! Engines: what runs a network.
//!
//! | engine | when |
//! |---|---|
//! | [`onnxruntime`] | where its shared library is found: several times as fast |
//! | [`tract`] | always there: pure Rust, part of the program |

pub mod library;
pub mod onnxruntime;
pub mod tract;

use std::any::Any;
use std::fmt::Debug;

use parking_lot::Mutex;
use tract_onnx::pb::ModelProto;

use self::library::LibraryError;
use self::onnxruntime::OnnxRuntimeEngine;
use self::tract::TractEngine;
use crate::settings::{Device, EngineChoice};

/// Why an engine cannot load or run a network, for a person; the caller names the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the engine {engine} cannot {action} it: {cause}")]
pub struct EngineError {
    /// The engine's name.
    pub engine: &'static str,
    /// What it was about to do.
    pub action: &'static str,
    /// What went wrong.
    pub cause: String,
}

/// A network that is ready to run. Many threads run the same one.
pub trait Engine: Debug + Send + Sync {
    /// The engine's name.
    fn name(&self) -> &'static str;

    /// The shape of the output for one image, without the batch.
    fn output_shape(&self) -> &[usize];

    /// Images per [`Engine::run`] that this engine takes fastest within little memory.
    fn batch_rows(&self) -> usize;

    /// The bytes that the network takes with so many threads running it, estimated.
    fn memory(&self, threads: usize) -> usize;

    /// Runs the network on `rows` images, at most [`Engine::batch_rows`]: `batch` holds their values one
    /// after the other, and so will `output`, which has as many as the rows give.
    ///
    /// # Errors
    /// Where the engine fails; not for any values of the pixels.
    fn run(&self, batch: &[f32], rows: usize, output: &mut [f32]) -> Result<(), EngineError>;
}

/// Which engine is asked for, and where it is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EngineSettings {
    /// `pomona.engine`
    pub choice: EngineChoice,
    /// `pomona.device`
    pub device: Device,
}

/// What a person should know of the choice of an engine, once.
static NOTICE: Mutex<Notice> = Mutex::new(Notice::None);

enum Notice {
    None,
    Waiting(String),
    Said,
}

/// Why networks run on tract although onnxruntime was to be used, the first time that is asked after it
/// happened.
pub fn take_notice() -> Option<String> {
    let mut notice = NOTICE.lock();
    if !matches!(*notice, Notice::Waiting(_)) {
        return None;
    }
    match std::mem::replace(&mut *notice, Notice::Said) {
        Notice::Waiting(text) => Some(text),
        Notice::None | Notice::Said => None,
    }
}

fn give_notice(text: String) {
    log::warn!("{text}");
    let mut notice = NOTICE.lock();
    if matches!(*notice, Notice::None) {
        *notice = Notice::Waiting(text);
    }
}

/// Loads the network of the model `name` for images of `input_shape` (with a batch of one), and runs it once. `again` reads the
/// network a second time, for the second engine: held meanwhile, it would double the memory that it takes.
///
/// # Errors
/// Where the engine that is asked for is not there, or cannot run the network: why, and which other one
/// there is.
pub fn load(
    name: &str,
    network: ModelProto,
    input_shape: [usize; 4],
    again: impl FnOnce() -> Result<ModelProto, String>,
    settings: EngineSettings,
) -> Result<Box<dyn Engine>, EngineError> {
    let EngineSettings { choice, device } = settings;
    let tract = |network: &ModelProto| -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(TractEngine::load(network, input_shape)?))
    };
    let onnxruntime = |library, network| -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(OnnxRuntimeEngine::load(
            library,
            network,
            input_shape,
            device,
        )?))
    };
    match (choice, library_for(choice)) {
        (EngineChoice::Tract, _) if device == Device::Cuda => Err(EngineError {
            engine: tract::NAME,
            action: "load",
            cause: "it runs on the processor alone: SET pomona.engine = 'onnxruntime', or SET pomona.device = 'cpu'"
                .to_owned(),
        }),
        (EngineChoice::Tract, _) => tract(&network).map_err(|mut error| {
            error.cause += "; onnxruntime may be able to: SET pomona.engine = 'onnxruntime'";
            error
        }),
        (EngineChoice::Auto, Ok(library)) if device == Device::Cpu => {
            let error = match onnxruntime(library, network) {
                Ok(engine) => return Ok(engine),
                Err(error) => error,
            };
            let both = |second: String| EngineError {
                cause: format!("{}; {second}", error.cause),
                ..error.clone()
            };
            let network = again().map_err(both)?;
            let engine = tract(&network).map_err(|second| both(second.to_string()))?;
            give_notice(format!("model '{name}': {error}; it runs on tract"));
            Ok(engine)
        }
        (_, Ok(library)) => onnxruntime(library, network).map_err(|mut error| {
            if device == Device::Cpu {
                error.cause += "; tract may be able to: SET pomona.engine = 'tract'";
            }
            error
        }),
        (EngineChoice::Auto, Err(error)) if device == Device::Cpu => {
            if let LibraryError::Unusable { .. } = error {
                give_notice(format!("{error}; networks run on tract, which is slower"));
            }
            tract(&network).map_err(|mut failure| {
                failure.cause = format!("{}; onnxruntime may be able to, but {error}", failure.cause);
                failure
            })
        }
        (_, Err(error)) => Err(EngineError {
            engine: onnxruntime::NAME,
            action: "load",
            cause: match device {
                Device::Cpu => error.to_string(),
                Device::Cuda => format!("{error}; for pomona.device = 'cuda' it is onnxruntime-gpu"),
            },
        }),
    }
}

/// The library is not looked for where it is not wanted.
fn library_for(choice: EngineChoice) -> Result<&'static library::Library, &'static LibraryError> {
    static NOT_WANTED: LibraryError = LibraryError::NotFound { looked_in: Vec::new() };
    match choice {
        EngineChoice::Tract => Err(&NOT_WANTED),
        EngineChoice::Auto | EngineChoice::OnnxRuntime => library::library(),
    }
}

/// The longest output for one image, in values: 64 MiB.
const MAX_VALUES: usize = 1 << 24;

/// The shape of the output for one image, of that for a batch of one.
fn shape_of_one(shape: &[usize]) -> Result<Vec<usize>, String> {
    match shape {
        [1, rest @ ..] if (1..=MAX_VALUES).contains(&rest.iter().product()) => Ok(rest.to_vec()),
        shape => Err(format!(
            "its output for one image is {shape:?}, not [1, …] with 1 to {MAX_VALUES} values"
        )),
    }
}

/// What a panic says.
fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    message.unwrap_or("it panicked").to_owned()
}
