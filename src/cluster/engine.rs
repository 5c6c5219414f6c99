//! Runs a task on an executor: its sinks write all or nothing, and its errors say where they come from.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ballista_core::JobId;
use ballista_core::client::BallistaClient;
use ballista_core::client_pool::{BallistaClientPool, PooledClient};
use ballista_core::error::BallistaError;
use ballista_core::extension::BallistaConfigGrpcEndpoint;
use ballista_core::serde::protobuf::{RuntimeStatsReport, ShuffleWritePartition, TaskColumnStats, WindowStateReport};
use ballista_core::utils::GrpcClientConfig;
use ballista_executor::execution_engine::{DefaultExecutionEngine, ExecutionEngine, QueryStageExecutor};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::TaskContext;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::metrics::MetricsSet;
use datafusion::prelude::SessionConfig;
use parking_lot::Mutex;

use crate::sink::AllOrNothing;

/// A connection that nobody used for so long is closed.
const IDLE: Duration = Duration::from_secs(30);

/// The bits of a file's number that count; those before them are of this process alone.
const COUNTING: u32 = 24;

/// The number of a new file of rows, as no other process has it.
///
/// Ballista's own is that of the task, which is given again when a stage runs again. The task of before may still be
/// writing then; and an executor that finds a file of that name takes it for the one that it is to read, although
/// that is another executor's.
fn new_file() -> usize {
    static PROCESS: LazyLock<usize> = LazyLock::new(|| RandomState::new().hash_one(std::process::id()) as usize);
    static FILES: AtomicUsize = AtomicUsize::new(0);
    let count = FILES.fetch_add(1, Ordering::Relaxed) & ((1 << COUNTING) - 1);
    ((*PROCESS << COUNTING) | count) & isize::MAX as usize
}

/// Ballista's engine, whose errors name the executor.
pub(crate) struct Engine {
    inner: DefaultExecutionEngine,
    node: Arc<str>,
}

impl Engine {
    /// `node` is what errors call this process: `executor 'id' (host:port)`.
    pub(crate) fn new(node: impl Into<Arc<str>>) -> Self {
        Self {
            inner: DefaultExecutionEngine::with_client_pool(Arc::new(Connections::default())),
            node: node.into(),
        }
    }
}

impl ExecutionEngine for Engine {
    fn create_query_stage_exec(
        &self,
        job_id: JobId,
        stage_id: usize,
        task_id: usize,
        global_output_partition_ids: Vec<usize>,
        plan: Arc<dyn ExecutionPlan>,
        work_dir: &str,
        config: &SessionConfig,
    ) -> Result<Arc<dyn QueryStageExecutor>> {
        // It goes into the names of files alone.
        let file = new_file();
        log::debug!("task {task_id} of stage {stage_id} of job {job_id} writes file {file}");
        let inner = AllOrNothing
            .optimize(plan, config.options())
            .and_then(|plan| {
                let partitions = global_output_partition_ids;
                self.inner
                    .create_query_stage_exec(job_id, stage_id, file, partitions, plan, work_dir, config)
            })
            .map_err(|e| named(&self.node, e))?;
        Ok(Arc::new(Task {
            inner,
            node: Arc::clone(&self.node),
        }))
    }
}

/// A task whose errors name the executor.
#[derive(Debug)]
struct Task {
    inner: Arc<dyn QueryStageExecutor>,
    node: Arc<str>,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl QueryStageExecutor for Task {
    async fn execute_query_stage(
        &self,
        task_id: usize,
        context: Arc<TaskContext>,
    ) -> Result<Vec<ShuffleWritePartition>> {
        let written = self.inner.execute_query_stage(task_id, context).await;
        written.map_err(|e| named(&self.node, e))
    }

    fn collect_plan_metrics(&self) -> Vec<MetricsSet> {
        self.inner.collect_plan_metrics()
    }

    fn collect_runtime_stats_reports(&self) -> Vec<RuntimeStatsReport> {
        self.inner.collect_runtime_stats_reports()
    }

    fn collect_window_state_reports(&self) -> Result<Vec<WindowStateReport>> {
        self.inner.collect_window_state_reports()
    }

    fn collect_column_stats(&self) -> Vec<TaskColumnStats> {
        self.inner.collect_column_stats()
    }
}

/// The error, with the executor's name before it.
fn named(node: &str, error: DataFusionError) -> DataFusionError {
    match is_recoverable(&error) {
        true => error,
        false => DataFusionError::Execution(format!("{node}: {}", message(&error))),
    }
}

/// The error that Ballista's nodes have wrapped.
fn unwrapped(error: &DataFusionError) -> &DataFusionError {
    match error {
        DataFusionError::Shared(inner) => unwrapped(inner),
        DataFusionError::External(inner) => match inner.downcast_ref() {
            Some(BallistaError::DataFusionError(inner)) => unwrapped(inner),
            _ => error,
        },
        _ => error,
    }
}

/// What it says, without the names of the types around it.
fn message(error: &DataFusionError) -> String {
    let error = unwrapped(error);
    match error {
        DataFusionError::External(inner) => match inner.downcast_ref() {
            Some(BallistaError::ArrowError(inner)) => inner.to_string(),
            _ => error.message().into_owned(),
        },
        _ => error.message().into_owned(),
    }
}

/// Does the scheduler try again? It tells by the types: I/O that failed, and rows that could not be fetched
/// from another executor.
fn is_recoverable(error: &DataFusionError) -> bool {
    if matches!(error.find_root(), DataFusionError::IoError(_)) {
        return true;
    }
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        match error.downcast_ref() {
            Some(BallistaError::DataFusionError(inner)) => return is_recoverable(inner),
            // As Ballista has it.
            Some(BallistaError::ArrowError(inner)) => next = Some(inner),
            Some(_) => return true,
            None => next = error.source(),
        }
    }
    false
}

/// A connection, and since when nobody uses it.
type Idle = (BallistaClient, Instant);

/// Where a connection goes, and how it is made.
type Target = (String, u16, GrpcClientConfig);

/// Connections to other executors, kept for the next task: a shuffle makes one for each pair of its tasks,
/// and a machine has 28,000 ports. (Ballista has the same, but does not lend it.)
#[derive(Clone, Default)]
struct Connections(Arc<Mutex<HashMap<Target, Vec<Idle>>>>);

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connections").field(&self.0.lock().len()).finish()
    }
}

impl Connections {
    fn close_idle(&self) {
        self.0.lock().retain(|_, idle| {
            idle.retain(|(_, since)| since.elapsed() < IDLE);
            !idle.is_empty()
        });
    }
}

#[async_trait]
impl BallistaClientPool for Connections {
    async fn acquire(
        &self,
        host: &str,
        port: u16,
        config: &GrpcClientConfig,
        customize_endpoint: Option<Arc<BallistaConfigGrpcEndpoint>>,
    ) -> ballista_core::error::Result<PooledClient> {
        self.close_idle();
        let target = (host.to_owned(), port, config.clone());
        let kept = self.0.lock().get_mut(&target).and_then(Vec::pop);
        let client = match kept {
            Some((client, _)) => client,
            None => {
                BallistaClient::try_new(
                    host,
                    port,
                    config.max_message_size,
                    config.use_tls,
                    customize_endpoint,
                    config.io_retries_times,
                    config.io_retry_wait_time_ms,
                    config.initial_connection_window_size,
                    config.initial_stream_window_size,
                )
                .await?
            }
        };
        let kept = self.clone();
        let keep = move |client| kept.0.lock().entry(target).or_default().push((client, Instant::now()));
        Ok(PooledClient::new(client, Box::new(keep)))
    }

    async fn evict_idle(&self) {
        self.close_idle();
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use arrow::error::ArrowError;
    use datafusion::common::exec_datafusion_err;

    use super::*;

    #[test]
    fn an_error_names_the_executor() {
        let error = named(
            "executor 'a' (h:1)",
            exec_datafusion_err!("decode: it is no image").context("s3://b/x.jpg"),
        );
        assert!(matches!(error, DataFusionError::Execution(_)), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains("executor 'a' (h:1): ") && text.contains("decode: it is no image"),
            "{text}"
        );
    }

    #[test]
    fn an_error_of_arrow_loses_its_wrapping() {
        let cast = ArrowError::CastError("Cannot cast string 'x' to value of Int32 type".to_owned());
        let wrapped = DataFusionError::Shared(Arc::new(BallistaError::ArrowError(Box::new(cast)).into_datafusion()));
        assert_eq!(
            named("executor 'a' (h:1)", wrapped).to_string(),
            "Execution error: executor 'a' (h:1): Cast error: Cannot cast string 'x' to value of Int32 type"
        );
    }

    #[test]
    fn what_the_scheduler_tries_again_keeps_its_type() {
        let lost = || BallistaError::FetchFailed("b".to_owned(), 1, 2, "gone".to_owned());
        let recoverable = [
            lost().into_datafusion(),
            lost().into_datafusion().context("while joining"),
            DataFusionError::from(ArrowError::ExternalError(Box::new(lost()))),
            DataFusionError::from(io::Error::other("disk")),
            DataFusionError::from(io::Error::other("disk")).context("while sorting"),
        ];
        for error in recoverable {
            let before = error.to_string();
            assert_eq!(named("executor 'a'", error).to_string(), before);
        }
    }
}
