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

use crate::policy::FailureCounts;

/// What happens to a row whose image cannot be read, decoded or processed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// The query fails.
    Fail,
    /// The result is NULL, and the row is counted.
    Null,
}

impl Display for OnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fail => "fail",
            Self::Null => "null",
        })
    }
}

impl FromStr for OnError {
    type Err = DataFusionError;

    fn from_str(value: &str) -> Result<Self> {
        match value.to_ascii_lowercase().as_str() {
            "fail" => Ok(Self::Fail),
            "null" => Ok(Self::Null),
            other => config_err!("pomona.on_error is 'fail' or 'null', not '{other}'"),
        }
    }
}

/// The `pomona.*` settings of a session.
#[derive(Debug, Clone)]
pub struct PomonaOptions {
    /// What happens to a row whose image is broken.
    pub on_error: OnError,
    /// The most pixels (width times height) that an image may claim to have before it is decoded,
    /// and that a function may produce.
    pub max_image_pixels: u64,
    /// Folders that hold models, before the usual ones; separated as in `PATH`.
    pub models_dir: String,
    /// The most objects that one scan reads at the same time.
    pub fetch_concurrency: usize,
    /// The most bytes of encoded objects that one scan holds.
    pub fetch_bytes: usize,
    /// The largest object that is read, in bytes.
    pub max_object_bytes: usize,
    /// Rows that became NULL; not a setting, but it travels with them into the functions.
    pub failures: Arc<FailureCounts>,
}

impl Default for PomonaOptions {
    fn default() -> Self {
        Self {
            on_error: OnError::Fail,
            max_image_pixels: 178_956_970,
            models_dir: String::new(),
            fetch_concurrency: 32,
            fetch_bytes: 64 << 20,
            max_object_bytes: 256 << 20,
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
                "Folders that hold models, looked through before the usual ones; separated as in PATH",
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
        ]
    }
}
