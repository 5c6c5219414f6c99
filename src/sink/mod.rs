//! `COPY` and `INSERT` write all or nothing.
//!
//! DataFusion's file sinks end their files when their input ends, and an input that fails ends like any
//! other: a query that breaks at its thousandth image leaves a valid file of 999 rows in the place of
//! the good one. [`AllOrNothing`] holds the failed input open instead, closes the [`gate`] that stands
//! before the object stores, and drops the writers, which aborts their uploads.

mod gate;

use std::fmt;
use std::future::pending;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion::datasource::sink::{DataSink, DataSinkExec};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::metrics::MetricsSet;
#[cfg(feature = "cluster")]
use datafusion::physical_plan::replace_children_if_necessary;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan};
use futures::StreamExt;
use gate::Gate;
use tokio::sync::oneshot;

/// Makes every sink of a plan write all or nothing.
#[derive(Debug)]
pub(crate) struct AllOrNothing;

impl PhysicalOptimizerRule for AllOrNothing {
    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, _config: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        let guarded = plan.transform_up(|node| {
            let Some(exec) = node
                .downcast_ref::<DataSinkExec>()
                .filter(|exec| !exec.sink().is::<GuardedSink>())
            else {
                return Ok(Transformed::no(node));
            };
            let sink = Arc::new(GuardedSink(exec.clone()));
            let guarded = DataSinkExec::new(Arc::clone(exec.input()), sink, exec.sort_order().clone());
            Ok(Transformed::yes(Arc::new(guarded) as Arc<dyn ExecutionPlan>))
        });
        guarded.data()
    }

    fn name(&self) -> &str {
        "all_or_nothing"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// `plan` with the sink itself where its root is guarded: an executor guards what it runs by itself.
#[cfg(feature = "cluster")]
pub(crate) fn unguarded(plan: Arc<dyn ExecutionPlan>) -> Result<Arc<dyn ExecutionPlan>> {
    let exec = plan.downcast_ref::<DataSinkExec>();
    let guarded = exec.and_then(|exec| Some((exec, exec.sink().downcast_ref::<GuardedSink>()?)));
    match guarded {
        Some((exec, GuardedSink(sink))) => {
            let sink = Arc::new(sink.clone()) as Arc<dyn ExecutionPlan>;
            replace_children_if_necessary(sink, vec![Arc::clone(exec.input())])
        }
        None => Ok(plan),
    }
}

/// The sink of the plan that it holds (which does not lend it as an `Arc`), dropped when its input fails.
#[derive(Debug)]
struct GuardedSink(DataSinkExec);

#[async_trait]
impl DataSink for GuardedSink {
    fn metrics(&self) -> Option<MetricsSet> {
        self.0.sink().metrics()
    }

    fn schema(&self) -> &SchemaRef {
        self.0.sink().schema()
    }

    async fn write_all(&self, data: SendableRecordBatchStream, context: &Arc<TaskContext>) -> Result<u64> {
        let (failed, failure) = oneshot::channel();
        let gate = Gate::default();
        let context = gate.context(context)?;
        let mut written = self.0.sink().write_all(held_at_error(data, failed), &context);
        // Behind `written`, and so dropped before it: where the query fails and where it is given up.
        let _closing = gate.closing();
        tokio::select! {
            biased;
            Ok(error) = failure => Err(error),
            written = &mut written => written,
        }
    }
}

impl DisplayAs for GuardedSink {
    fn fmt_as(&self, t: DisplayFormatType, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.sink().fmt_as(t, f)
    }
}

/// `data`, but the first error goes to `failed`, and the stream never goes on.
fn held_at_error(
    data: SendableRecordBatchStream,
    failed: oneshot::Sender<DataFusionError>,
) -> SendableRecordBatchStream {
    let schema = data.schema();
    let mut failed = Some(failed);
    let held = data.then(move |batch| {
        let failed = if batch.is_err() { failed.take() } else { None };
        async move {
            match (batch, failed) {
                (Err(error), Some(failed)) => {
                    failed.send(error).ok();
                    pending().await
                }
                (batch, _) => batch,
            }
        }
    });
    Box::pin(RecordBatchStreamAdapter::new(schema, held))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use datafusion::prelude::SessionContext;

    /// Rows 1 to 99,999 divide; row 100,000 does not.
    const BREAKS_LATE: &str = "SELECT 1 / (100000 - value) AS v FROM generate_series(1, 100000)";

    async fn run(ctx: &SessionContext, sql: &str) -> datafusion::error::Result<usize> {
        ctx.sql(sql)
            .await?
            .collect()
            .await
            .map(|batches| batches.iter().map(|batch| batch.num_rows()).sum())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_query_that_fails_leaves_the_old_file() {
        let ctx = crate::session().unwrap();
        let folder = tempfile::tempdir().unwrap();
        for format in ["parquet", "csv", "json", "arrow"] {
            let file = folder.path().join(format!("numbers.{format}"));
            let copy = |query: &str| format!("COPY ({query}) TO '{}'", file.display());
            run(&ctx, &copy("SELECT 1 AS v")).await.unwrap();
            let good = std::fs::read(&file).unwrap();

            let error = run(&ctx, &copy(BREAKS_LATE)).await.unwrap_err();
            assert!(error.to_string().contains("ivide by zero"), "{error}");
            assert_eq!(std::fs::read(&file).unwrap(), good, "{format}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_query_that_fails_leaves_no_new_file() {
        let ctx = crate::session().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("parts");
        let copy = format!("COPY ({BREAKS_LATE}) TO '{}/' STORED AS PARQUET", target.display());
        run(&ctx, &copy).await.unwrap_err();
        let left = std::fs::read_dir(&target).map_or(0, |entries| {
            entries
                .filter(|e| {
                    e.as_ref()
                        .is_ok_and(|e| e.file_name().to_string_lossy().ends_with(".parquet"))
                })
                .count()
        });
        assert_eq!(left, 0);
    }
}
