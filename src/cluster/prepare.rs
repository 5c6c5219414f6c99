//! What a plan needs before it can travel.
//!
//! 1. [`with_values`]: uncorrelated scalar subqueries run first, and their values stand in the plan. DataFusion
//!    reads them from a place that is shared by the plan's nodes, which does not exist between processes;
//!    Ballista makes joins of them, which repeat a model in every row. As a value, a model travels once with
//!    each task.
//! 2. [`with_pinned_models`]: names of models become names with hashes, so that no executor runs another.
//! 3. [`distribute`]: what reads objects goes to the cluster, as far as executors can see them. Rows that only
//!    the client has, such as those of `information_schema`, travel in the plan. A file of this machine is
//!    written here, and so is what executors would write otherwise.
//!
//! What a plan loses when it is written down (an option of a format, a direction of a window) or on its way through
//! Ballista (the order of a join's rows, a limit below a join) is either put so that it is not lost, done here, or
//! refused.

use std::sync::Arc;

use arrow::array::RecordBatch;
use datafusion::catalog::TableProvider;
use datafusion::catalog::memory::{DataSourceExec, MemorySourceConfig};
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{JoinType, exec_datafusion_err, exec_err, plan_datafusion_err, plan_err};
use datafusion::datasource::file_format::csv::CsvSink;
use datafusion::datasource::file_format::json::JsonSink;
use datafusion::datasource::file_format::parquet::ParquetSink;
use datafusion::datasource::physical_plan::{FileScanConfig, FileSink};
use datafusion::datasource::sink::DataSinkExec;
use datafusion::datasource::source_as_provider;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::human_readable_size;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::execution::{SendableRecordBatchStream, SessionState, TaskContext};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::{Expr, LogicalPlan, lit};
use datafusion::physical_plan::coalesce_partitions::CoalescePartitionsExec;
use datafusion::physical_plan::joins::{CrossJoinExec, NestedLoopJoinExec};
use datafusion::physical_plan::limit::GlobalLimitExec;
use datafusion::physical_plan::recursive_query::RecursiveQueryExec;
use datafusion::physical_plan::{ExecutionPlan, ExecutionPlanProperties, replace_children_if_necessary};
use datafusion::scalar::ScalarValue;
use futures::future::BoxFuture;
use futures::{FutureExt, TryStreamExt};
use pomona_udfs::embed::registry::{self, ModelSettings};
use pomona_udfs::embed::{default_model, model_argument};
use pomona_udfs::settings::PomonaOptions;
use url::Url;

use super::MESSAGE_BYTES;
use super::fence::{fenced, in_order, is_exchange, is_merge, needed_orders, whole};
use super::grant::{Grant, GrantExec};
use super::planner::{self, Remote};
use super::written::{self, can_be_written, can_travel};
use crate::sink::unguarded;
use crate::stores::PomonaStores;
use crate::table::FetchExec;

/// Rows that should not travel with each task.
const MANY_BYTES: usize = 1 << 20;

/// Replaces each uncorrelated scalar subquery by its value.
///
/// # Errors
/// What the subqueries say, and more than one row.
pub(super) async fn with_values(
    plan: LogicalPlan,
    remote: &Remote,
    session: &SessionState,
    context: &Arc<TaskContext>,
) -> Result<LogicalPlan> {
    let mut subqueries = vec![];
    plan.apply(|node| {
        node.apply_expressions(|expr| {
            expr.apply(|expr| {
                if let Some(subquery) = uncorrelated(expr) {
                    subqueries.push(Arc::clone(subquery));
                }
                Ok(TreeNodeRecursion::Continue)
            })
        })
    })?;
    let mut values: Vec<(Arc<LogicalPlan>, ScalarValue)> = vec![];
    for subquery in subqueries {
        if known(&values, &subquery)?.is_none() {
            let query = subquery.as_ref().clone();
            let run = planner::run(remote.clone(), session.clone(), query, Arc::clone(context));
            let value = value(&subquery, run).await?;
            values.push((subquery, value));
        }
    }
    if values.is_empty() {
        return Ok(plan);
    }
    with_expressions(plan, |expr| {
        let value = match uncorrelated(&expr) {
            Some(subquery) => known(&values, subquery)?,
            None => None,
        };
        Ok(match value {
            Some(value) => Transformed::yes(Expr::Literal(value.clone(), None)),
            None => Transformed::no(expr),
        })
    })
}

/// The value of a subquery that has run already. Scans are equal that read different tables of the same name,
/// as two calls of a table function are: their tables must be the same too.
fn known<'a>(values: &'a [(Arc<LogicalPlan>, ScalarValue)], subquery: &LogicalPlan) -> Result<Option<&'a ScalarValue>> {
    for (ran, value) in values {
        if ran.as_ref() == subquery {
            let (these, those) = (tables(ran)?, tables(subquery)?);
            if these.len() == those.len() && these.iter().zip(&those).all(|(a, b)| Arc::ptr_eq(a, b)) {
                return Ok(Some(value));
            }
        }
    }
    Ok(None)
}

/// The tables that a query reads.
fn tables(query: &LogicalPlan) -> Result<Vec<Arc<dyn TableProvider>>> {
    let mut tables = vec![];
    query.apply_with_subqueries(|node| {
        if let LogicalPlan::TableScan(scan) = node {
            tables.push(source_as_provider(&scan.source)?);
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(tables)
}

/// Does a plan read no objects, so that it runs here?
pub(super) fn stays(plan: &Arc<dyn ExecutionPlan>) -> Result<bool> {
    Ok(!plan.exists(|node| Ok(objects(node).is_some()))?)
}

fn uncorrelated(expr: &Expr) -> Option<&Arc<LogicalPlan>> {
    match expr {
        Expr::ScalarSubquery(query) if query.outer_ref_columns.is_empty() => Some(&query.subquery),
        _ => None,
    }
}

/// The value of a subquery: that of its only row, or NULL where it has none.
async fn value(subquery: &LogicalPlan, run: BoxFuture<'_, Result<SendableRecordBatchStream>>) -> Result<ScalarValue> {
    let mut rows = run.await?;
    let mut value = None;
    while let Some(batch) = rows.try_next().await? {
        if batch.num_rows() > 1 || (batch.num_rows() == 1 && value.is_some()) {
            return exec_err!("Scalar subquery returned more than one row");
        }
        if let (1, Some(column)) = (batch.num_rows(), batch.columns().first()) {
            value = Some(ScalarValue::try_from_array(column, 0)?);
        }
    }
    match value {
        Some(value) => Ok(value),
        None => ScalarValue::try_new_null(subquery.schema().field(0).data_type()),
    }
}

/// Rewrites the expressions of a plan, whose columns keep their names.
fn with_expressions(
    plan: LogicalPlan,
    mut rewrite: impl FnMut(Expr) -> Result<Transformed<Expr>>,
) -> Result<LogicalPlan> {
    let rewritten = plan.transform_up(|node| {
        let names = NamePreserver::new(&node);
        node.map_expressions(|expr| {
            let name = names.save(&expr);
            Ok(expr.transform_up(&mut rewrite)?.update_data(|expr| name.restore(expr)))
        })
    })?;
    Ok(rewritten.data)
}

/// Adds the hash of each model to its name.
///
/// # Errors
/// Models that there are not.
pub(super) fn with_pinned_models(plan: LogicalPlan, session: &SessionState) -> Result<LogicalPlan> {
    let settings = ModelSettings::from(&PomonaOptions::from_config(session.config_options()));
    with_expressions(plan, |mut expr| {
        let Expr::ScalarFunction(call) = &mut expr else {
            return Ok(Transformed::no(expr));
        };
        let Some(index) = model_argument(call.func.name()) else {
            return Ok(Transformed::no(expr));
        };
        if let (Some(name), true) = (default_model(call.func.name()), call.args.len() == index) {
            call.args.push(lit(name));
        }
        let Some(Expr::Literal(value, _)) = call.args.get_mut(index) else {
            return Ok(Transformed::no(expr));
        };
        let pinned = match value.try_as_str().flatten() {
            Some(name) => registry::pin(name, &settings)?,
            None => return Ok(Transformed::no(expr)),
        };
        *value = ScalarValue::Utf8(Some(pinned)).cast_to(&value.data_type())?;
        Ok(Transformed::yes(expr))
    })
}

/// The plan with what reads objects on the cluster, as `remote` makes it; a file of this machine is written
/// here.
///
/// # Errors
/// Files that executors cannot see, and what cannot travel.
pub(super) async fn distribute(
    plan: Arc<dyn ExecutionPlan>,
    session: &SessionState,
    context: &Arc<TaskContext>,
    is_here: bool,
    remote: impl Fn(Arc<dyn ExecutionPlan>) -> Arc<dyn ExecutionPlan>,
) -> Result<Arc<dyn ExecutionPlan>> {
    let traveller = Traveller {
        context: Arc::clone(context),
        stores: session.config().get_extension::<PomonaStores>(),
        shared: PomonaOptions::from_config(session.config_options()).shared_paths,
        is_here,
    };
    if let Some(sink) = plan.downcast_ref::<DataSinkExec>() {
        let target = target(&unguarded(Arc::clone(&plan))?);
        if target.is_none_or(|target| target.scheme() == "file") {
            let input = traveller.prepare_whole(Arc::clone(sink.input())).await?;
            return replace_children_if_necessary(plan, vec![remote(input)]);
        }
    }
    Ok(remote(traveller.prepare_whole(unguarded(plan)?).await?))
}

/// The store of the objects that a node itself reads.
fn objects(node: &Arc<dyn ExecutionPlan>) -> Option<Url> {
    if let Some(fetch) = node.downcast_ref::<FetchExec>() {
        return fetch.reads_content().then(|| url(fetch.store_url()));
    }
    let files = node.downcast_ref::<DataSourceExec>()?;
    let files = files.data_source().downcast_ref::<FileScanConfig>()?;
    Some(url(&files.object_store_url))
}

fn url(store: &ObjectStoreUrl) -> Url {
    AsRef::<Url>::as_ref(store).clone()
}

/// The store that a sink writes files to; `None` where it writes none, or not as the client would.
fn target(node: &Arc<dyn ExecutionPlan>) -> Option<Url> {
    let sink = node.downcast_ref::<DataSinkExec>()?.sink();
    if !can_be_written(sink) {
        return None;
    }
    let config = None
        .or_else(|| sink.downcast_ref::<ParquetSink>().map(FileSink::config))
        .or_else(|| sink.downcast_ref::<CsvSink>().map(FileSink::config))
        .or_else(|| sink.downcast_ref::<JsonSink>().map(FileSink::config))?;
    Some(url(&config.object_store_url))
}

/// Prepares plans to travel.
struct Traveller {
    context: Arc<TaskContext>,
    stores: Option<Arc<PomonaStores>>,
    /// `pomona.shared_paths`
    shared: String,
    /// Are the executors expected to see the files of this machine?
    is_here: bool,
}

impl Traveller {
    /// Prepares a whole plan, whose rows keep their order.
    async fn prepare_whole(&self, plan: Arc<dyn ExecutionPlan>) -> Result<Arc<dyn ExecutionPlan>> {
        let order = plan.output_ordering().cloned();
        let prepared = self.prepare(plan).await?;
        match order {
            Some(order) if prepared.output_partitioning().partition_count() == 1 => in_order(prepared, order),
            _ => Ok(prepared),
        }
    }

    fn prepare(&self, node: Arc<dyn ExecutionPlan>) -> BoxFuture<'_, Result<Arc<dyn ExecutionPlan>>> {
        async move {
            if node.is::<RecursiveQueryExec>() {
                return plan_err!(
                    "WITH RECURSIVE cannot run on a cluster, whose executors do not see the rows of the step before: write \
                     what it reads to a table (CREATE TABLE … AS), and run it on that"
                );
            }
            written::check(&node)?;
            if node.children().is_empty() {
                if !can_travel(&node)? {
                    return self.carried(&node).await;
                }
                self.check_paths(&node)?;
                return Ok(self.granted(&node, Arc::clone(&node)));
            }
            self.check_paths(&node)?;
            let mut children = vec![];
            for (child, order) in node.children().into_iter().zip(needed_orders(&node)) {
                let child = self.prepare(Arc::clone(child)).await?;
                let child = match order {
                    Some(order) => in_order(child, order)?,
                    None => child,
                };
                children.push(match node.is::<FetchExec>() || node.is::<DataSinkExec>() {
                    true => self.granted(&node, child),
                    false => child,
                });
            }
            let is_nested = node.is::<NestedLoopJoinExec>() || node.is::<CrossJoinExec>();
            if let (true, [left, right]) = (is_nested, children.as_mut_slice())
                && right.output_partitioning().partition_count() > 1
                && is_costly(left)
            {
                // Every task of the right needs the whole left: it becomes a stage, and is not read by each.
                *left = Arc::new(CoalescePartitionsExec::new(Arc::clone(left)));
            }
            if let (Some(join), [_, right]) = (node.downcast_ref::<NestedLoopJoinExec>(), children.as_mut_slice())
                && emits_left(*join.join_type())
                && right.output_partitioning().partition_count() > 1
            {
                // Which rows of the left have found none, all partitions of the right decide together.
                *right = whole(Arc::clone(right));
            }
            let limit = node.fetch().filter(|_| is_merge(&node));
            let node = fenced(replace_children_if_necessary(node, children)?);
            // Merges that no node needs are left out by the scheduler, their limits too.
            Ok(match limit {
                Some(limit) => Arc::new(GlobalLimitExec::new(node, 0, Some(limit))),
                None => node,
            })
        }
        .boxed()
    }

    /// `input`, with the credentials for what `node` reads or writes.
    fn granted(&self, node: &Arc<dyn ExecutionPlan>, input: Arc<dyn ExecutionPlan>) -> Arc<dyn ExecutionPlan> {
        let Some(root) = objects(node).or_else(|| target(node)) else {
            return input;
        };
        match self.stores.as_ref().and_then(|stores| stores.granted(&root)) {
            Some(given) => Arc::new(GrantExec::new(input, Grant { store: root, given })),
            None => input,
        }
    }

    /// Files of this machine, which other machines do not have.
    fn check_paths(&self, node: &Arc<dyn ExecutionPlan>) -> Result<()> {
        if self.is_here || objects(node).is_none_or(|store| store.scheme() != "file") {
            return Ok(());
        }
        let paths = paths(node);
        let is_shared = |path: &String| {
            let mut folders = std::env::split_paths(&self.shared);
            folders.any(|folder| !folder.as_os_str().is_empty() && std::path::Path::new(path).starts_with(folder))
        };
        match paths.iter().find(|path| !is_shared(path)) {
            Some(path) => plan_err!(
                "{path} is a file of this machine, which the executors of the cluster do not see: put it into an object \
                 store, or, if it is on a file system that all nodes have at the same place, name that: SET \
                 pomona.shared_paths = '/mnt/shared'"
            ),
            None => Ok(()),
        }
    }

    /// The rows of a leaf that only this process can read, which is read here.
    async fn carried(&self, leaf: &Arc<dyn ExecutionPlan>) -> Result<Arc<dyn ExecutionPlan>> {
        let mut bytes = 0;
        let mut partitions = vec![];
        for partition in 0..leaf.output_partitioning().partition_count() {
            let mut rows = leaf.execute(partition, Arc::clone(&self.context))?;
            let mut batches = vec![];
            while let Some(batch) = rows.try_next().await? {
                bytes += batch.get_array_memory_size();
                if bytes > MESSAGE_BYTES / 2 {
                    return exec_err!(
                        "{} is read by this process alone, and its rows, more than {}, are too many to travel with the \
                         query to the cluster: COPY them TO a Parquet file in an object store, and read that",
                        leaf.name(),
                        human_readable_size(MESSAGE_BYTES / 2)
                    );
                }
                batches.push(batch);
            }
            partitions.push(batches);
        }
        let source = MemorySourceConfig::try_new(&partitions, leaf.schema(), None)?
            .try_with_sort_information(leaf.output_ordering().into_iter().cloned().collect())?;
        Ok(DataSourceExec::from_data_source(source))
    }
}

/// Are there objects to read, or many rows in the plan, before the next stage?
fn is_costly(node: &Arc<dyn ExecutionPlan>) -> bool {
    if is_exchange(node) {
        return false;
    }
    let in_memory = node.downcast_ref::<DataSourceExec>().map(DataSourceExec::data_source);
    let rows = in_memory.and_then(|source| source.downcast_ref::<MemorySourceConfig>());
    let bytes = rows.map_or(0, |rows| {
        let batches = rows.partitions().iter().flatten();
        batches.map(RecordBatch::get_array_memory_size).sum()
    });
    bytes > MANY_BYTES || objects(node).is_some() || node.children().into_iter().any(is_costly)
}

/// The files that a node reads, or the locations of an image table.
fn paths(node: &Arc<dyn ExecutionPlan>) -> Vec<String> {
    if let Some(fetch) = node.downcast_ref::<FetchExec>() {
        return fetch
            .locations()
            .iter()
            .map(|url| url.trim_start_matches("file://").to_owned())
            .collect();
    }
    let files = node.downcast_ref::<DataSourceExec>();
    let files = files.and_then(|exec| exec.data_source().downcast_ref::<FileScanConfig>());
    let groups = files.map(|files| files.file_groups.as_slice()).unwrap_or_default();
    let files = groups.iter().flat_map(|group| group.files());
    files.map(|file| format!("/{}", file.object_meta.location)).collect()
}

/// Does a join return rows of its left side depending on the whole of its right?
fn emits_left(join: JoinType) -> bool {
    matches!(
        join,
        JoinType::Left | JoinType::Full | JoinType::LeftSemi | JoinType::LeftAnti | JoinType::LeftMark
    )
}

/// A plan that cannot be written down for executors.
pub(super) fn cannot_travel(cause: &DataFusionError) -> DataFusionError {
    let cause = cause.strip_backtrace();
    // What follows is all of the plan, with the rows that are in it.
    let cause = cause.split(" Plan: ").next().unwrap_or_default();
    plan_datafusion_err!("this query cannot run on a cluster; run it without --cluster, or in parts: {cause}")
}

/// A plan that is larger than a message may be.
pub(super) fn too_large(bytes: usize) -> DataFusionError {
    exec_datafusion_err!(
        "the plan of this query has {}, a message to the scheduler at most {}: tables in memory travel with the plan (COPY \
         them TO Parquet files in an object store), and so does the listing of an image table (list parts of it: WHERE \
         label = …, or a location for each)",
        human_readable_size(bytes),
        human_readable_size(MESSAGE_BYTES)
    )
}
