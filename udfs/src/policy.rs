//! What happens to a row whose image is broken: `pomona.on_error`.

use std::fmt::{self, Display};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use datafusion::common::config::ConfigOptions;
use datafusion::error::{DataFusionError, Result};

use crate::settings::{OnError, PomonaOptions};

/// The part of the chain that a row failed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Reading an object from its store.
    Get,
    /// From encoded bytes to pixels.
    Decode,
    /// Cutting a rectangle out of an image.
    Crop,
    /// From one size to another.
    Resize,
    /// From pixels to encoded bytes.
    Encode,
    /// From pixels to the network's output.
    Infer,
}

impl Stage {
    const ALL: [Self; 6] = [
        Self::Get,
        Self::Decode,
        Self::Crop,
        Self::Resize,
        Self::Encode,
        Self::Infer,
    ];
}

impl Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "get",
            Self::Decode => "decode",
            Self::Crop => "crop",
            Self::Resize => "resize",
            Self::Encode => "encode",
            Self::Infer => "infer",
        })
    }
}

/// Why one row has no result: bad data, never a bad set-up.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{stage}: {cause}")]
pub struct RowError {
    /// Where in the chain it happened.
    pub stage: Stage,
    /// What was wrong with the data, for a person.
    pub cause: String,
}

impl RowError {
    /// An error of `stage`, told by `cause`.
    pub fn new(stage: Stage, cause: impl Display) -> Self {
        Self {
            stage,
            cause: cause.to_string(),
        }
    }
}

/// Rows that became NULL, by stage. Shared by all queries of a session.
#[derive(Debug, Default)]
pub struct FailureCounts([AtomicU64; Stage::ALL.len()]);

impl FailureCounts {
    /// Counts one row that failed in `stage`.
    pub fn add(&self, stage: Stage) {
        self.0[stage as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The stages with failed rows and how many there were; sets the counts back to zero.
    pub fn take(&self) -> Vec<(Stage, u64)> {
        let counts = Stage::ALL.map(|stage| (stage, self.0[stage as usize].swap(0, Ordering::Relaxed)));
        counts.into_iter().filter(|(_, count)| *count > 0).collect()
    }
}

/// Applies `pomona.on_error` to the rows of one batch.
#[derive(Debug, Clone)]
pub struct RowPolicy {
    on_error: OnError,
    failures: Arc<FailureCounts>,
}

impl RowPolicy {
    /// The policy that the session's settings ask for.
    pub fn from_config(config: &ConfigOptions) -> Self {
        Self::new(&PomonaOptions::from_config(config))
    }

    /// The policy of `options`.
    pub fn new(options: &PomonaOptions) -> Self {
        Self {
            on_error: options.on_error,
            failures: Arc::clone(&options.failures),
        }
    }

    /// Passes a result on; a failed row is `None`, and counted, where the policy says so.
    ///
    /// # Errors
    /// Where the policy is `fail`: stage, cause, and how to go on.
    pub fn apply<T>(&self, row: Result<T, RowError>) -> Result<Option<T>> {
        match row {
            Ok(value) => Ok(Some(value)),
            Err(error) => match self.on_error {
                OnError::Null => {
                    self.failures.add(error.stage);
                    Ok(None)
                }
                OnError::Fail => {
                    let listing = match error.stage {
                        Stage::Get => "",
                        Stage::Decode => {
                            " To list such objects: SELECT path, image_error(content) FROM <table> \
                             WHERE image_error(content) IS NOT NULL."
                        }
                        _ => " The image itself can be decoded.",
                    };
                    Err(DataFusionError::Execution(format!(
                        "{error}.{listing} To get NULL instead: SET pomona.on_error = 'null'"
                    )))
                }
            },
        }
    }
}
