//! The `pomona.*` settings: `SET pomona.on_error = 'null'`, `SHOW pomona.on_error`.
//!
//! DataFusion finds an extension of the configuration by its prefix, so there is one for all of
//! Pomona; it is here because the functions read it.

use std::any::Any;
use std::fmt::{self, Display};
use std::str::FromStr;
use std::sync::Arc;

use datafusion::common::config::{ConfigEntry, ConfigExtension, ConfigOptions, ExtensionOptions};
use datafusion::common::config_err;
use datafusion::error::{DataFusionError, Result};

use crate::memory::{MemoryBudget, parse_size};
use crate::policy::FailureCounts;

/// A setting that is one of a few words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $setting:literal, $one_of:literal: $($(#[$word_doc:meta])* $variant:ident = $word:literal),+) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$word_doc])* $variant),+
        }

        impl Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$variant => $word),+
                })
            }
        }

        impl FromStr for $name {
            type Err = DataFusionError;

            fn from_str(value: &str) -> Result<Self> {
                match value.to_ascii_lowercase().as_str() {
                    $($word => Ok(Self::$variant),)+
                    other => config_err!("{} is {}, not '{other}'", $setting, $one_of),
                }
            }
        }
    };
}

words! {
    /// What happens to a row whose image cannot be read, decoded or processed.
    OnError, "pomona.on_error", "'fail' or 'null'":
    /// The query fails.
    Fail = "fail",
    /// The result is NULL, and the row is counted.
    Null = "null"
}

words! {
    /// What runs networks.
    EngineChoice, "pomona.engine", "'auto', 'onnxruntime' or 'tract'":
    /// onnxruntime where its library is found and takes the network, otherwise tract.
    Auto = "auto",
    /// onnxruntime, or an error.
    OnnxRuntime = "onnxruntime",
    /// tract, which is part of the program.
    Tract = "tract"
}

words! {
    /// Where networks run.
    Device, "pomona.device", "'cpu' or 'cuda'":
    /// On the processor's cores.
    Cpu = "cpu",
    /// On the first NVIDIA GPU, by an onnxruntime that was built for it.
    Cuda = "cuda"
}

words! {
    /// How JPEGs are decoded that are much larger than what is needed of them.
    DecodeMode, "pomona.decode", "'exact' or 'fast'":
    /// Every pixel, as Pillow does.
    Exact = "exact",
    /// By a smaller transform, to some eighths of their size, before they are resized.
    Fast = "fast"
}

/// The `pomona.*` settings of a session.
#[derive(Debug, Clone)]
pub struct PomonaOptions {
    /// What happens to a row whose image is broken.
    pub on_error: OnError,
    /// The most pixels (width times height) that an image may claim to have before it is decoded,
    /// and that a function may produce.
    pub max_image_pixels: u64,
    /// Folders that hold models, separated as in `PATH`, or one URL; before the usual ones.
    pub models_dir: String,
    /// The most objects that one scan reads at the same time.
    pub fetch_concurrency: usize,
    /// The most bytes of encoded objects that one scan holds.
    pub fetch_bytes: usize,
    /// The largest object that is read, in bytes.
    pub max_object_bytes: usize,
    /// What runs networks.
    pub engine: EngineChoice,
    /// Where networks run.
    pub device: Device,
    /// How large JPEGs are decoded.
    pub decode: DecodeMode,
    /// On a cluster, the most bytes of images that a task reads, each image counted as 256 KiB more.
    pub task_bytes: usize,
    /// On a cluster, folders that all nodes see at the same place; separated as in `PATH`.
    pub shared_paths: String,
    /// The ceiling of the session's memory; `pomona.memory_limit` is its limit. Clones share it.
    pub memory: Arc<MemoryBudget>,
    /// Rows that became NULL; not a setting, but it travels with them into the functions.
    pub failures: Arc<FailureCounts>,
}

impl Default for PomonaOptions {
    fn default() -> Self {
        Self {
            on_error: OnError::Fail,
            max_image_pixels: 178_956_970,
            models_dir: String::new(),
            fetch_concurrency: 128,
            fetch_bytes: 64 << 20,
            max_object_bytes: 256 << 20,
            engine: EngineChoice::Auto,
            device: Device::Cpu,
            decode: DecodeMode::Exact,
            task_bytes: 128 << 20,
            shared_paths: String::new(),
            memory: Arc::default(),
            failures: Arc::default(),
        }
    }
}

impl PomonaOptions {
    /// The session's settings, or the defaults where the session has none.
    pub fn from_config(config: &ConfigOptions) -> Self {
        config.extensions.get::<Self>().cloned().unwrap_or_default()
    }
}

impl ConfigExtension for PomonaOptions {
    const PREFIX: &'static str = "pomona";
}

fn parse<T: FromStr<Err: Display>>(key: &str, value: &str) -> Result<T> {
    value
        .parse()
        .map_err(|e| DataFusionError::Configuration(format!("pomona.{key} = '{value}': {e}")))
}

fn parse_positive(key: &str, value: &str) -> Result<usize> {
    match parse(key, value)? {
        0 => config_err!("pomona.{key} must be at least 1"),
        n => Ok(n),
    }
}

impl ExtensionOptions for PomonaOptions {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn cloned(&self) -> Box<dyn ExtensionOptions> {
        Box::new(self.clone())
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "on_error" => self.on_error = value.parse()?,
            "max_image_pixels" => self.max_image_pixels = parse(key, value)?,
            "models_dir" => self.models_dir = value.to_owned(),
            "fetch_concurrency" => self.fetch_concurrency = parse_positive(key, value)?,
            "fetch_bytes" => self.fetch_bytes = parse_positive(key, value)?,
            "max_object_bytes" => self.max_object_bytes = parse_positive(key, value)?,
            "engine" => self.engine = value.parse()?,
            "device" => self.device = value.parse()?,
            "decode" => self.decode = value.parse()?,
            "task_bytes" => self.task_bytes = parse_positive(key, value)?,
            "shared_paths" => self.shared_paths = value.to_owned(),
            "memory_limit" => self.memory.set_limit(if value.eq_ignore_ascii_case("none") {
                None
            } else {
                let bytes = parse_size(value)
                    .map_err(|e| DataFusionError::Configuration(format!("pomona.{key} = '{value}': {e}")))?;
                Some(bytes)
            }),
            _ => {
                let known: Vec<_> = self.entries().into_iter().map(|e| e.key).collect();
                return config_err!("there is no setting pomona.{key}; there are: {}", known.join(", "));
            }
        }
        Ok(())
    }

    // The keys carry the prefix: `df_settings` shows them as they are written in SET, and cluster
    // executors know whose they are.
    fn entries(&self) -> Vec<ConfigEntry> {
        let entry = |key: &str, value: String, description| ConfigEntry {
            key: format!("{}.{key}", Self::PREFIX),
            value: Some(value),
            description,
        };
        vec![
            entry(
                "on_error",
                self.on_error.to_string(),
                "What happens to a row whose image is broken: 'fail' (the query fails) or 'null' (the result is NULL, and counted)",
            ),
            entry(
                "max_image_pixels",
                self.max_image_pixels.to_string(),
                "The most pixels that an image may have; larger ones are refused before memory is taken",
            ),
            entry(
                "models_dir",
                self.models_dir.clone(),
                "Folders that hold models, separated as in PATH, or one URL of an object store (s3://bucket/models/), from which a model is copied once; looked through before the usual ones",
            ),
            entry(
                "fetch_concurrency",
                self.fetch_concurrency.to_string(),
                "The most objects that one scan reads at the same time",
            ),
            entry(
                "fetch_bytes",
                self.fetch_bytes.to_string(),
                "The most bytes of encoded objects that one scan holds",
            ),
            entry(
                "max_object_bytes",
                self.max_object_bytes.to_string(),
                "The largest object that is read, in bytes",
            ),
            entry(
                "engine",
                self.engine.to_string(),
                "What runs networks: 'onnxruntime', 'tract', or 'auto' (onnxruntime where its library is found)",
            ),
            entry("device", self.device.to_string(), "Where networks run: 'cpu' or 'cuda'"),
            entry(
                "decode",
                self.decode.to_string(),
                "How JPEGs are decoded that will shrink by more than 2: 'exact' (as Pillow) or 'fast' (smaller at once)",
            ),
            entry(
                "task_bytes",
                self.task_bytes.to_string(),
                "On a cluster, the most bytes of images that a task reads, each image counted as 256 KiB more",
            ),
            entry(
                "shared_paths",
                self.shared_paths.clone(),
                "On a cluster, folders that all nodes see at the same place, separated as in PATH; other files of the client are refused",
            ),
            entry(
                "memory_limit",
                self.memory.limit().map_or("none".to_owned(), |bytes| bytes.to_string()),
                "The most memory of the session, as '4GB' (units are powers of 1024); 'none': no limit",
            ),
        ]
    }
}
