//! What the benchmarks share.

use criterion::Criterion;
use datafusion::prelude::{SessionConfig, SessionContext};
use tokio::runtime::Runtime;

/// A session, and the runtime that its queries run on.
pub(crate) struct Engine {
    pub(crate) session: SessionContext,
    runtime: Runtime,
}

impl Engine {
    /// With so many partitions.
    pub(crate) fn new(partitions: usize) -> Self {
        let config = SessionConfig::new().with_target_partitions(partitions);
        Self {
            session: pomona::SessionBuilder::new().with_config(config).build().unwrap(),
            runtime: Runtime::new().unwrap(),
        }
    }

    /// Runs a query to its end; the number of its rows.
    pub(crate) fn run(&self, sql: &str) -> usize {
        self.runtime.block_on(async {
            let batches = self.session.sql(sql).await.unwrap().collect().await.unwrap();
            batches.iter().map(|batch| batch.num_rows()).sum()
        })
    }

    /// Waits for something else.
    pub(crate) fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }
}

/// Few samples: a query takes milliseconds to seconds, far above what a clock cannot tell.
pub(crate) fn criterion() -> Criterion {
    Criterion::default().sample_size(10).configure_from_args()
}
