//! What a plan that is written down has no place for, so that it would be lost on the way to an executor without a
//! word. Such a query is refused ([`check`], [`lossy_window`]), such a file is read by the client ([`can_travel`]) or
//! written by it ([`can_be_written`]).

use std::any::Any;
use std::sync::Arc;

use datafusion::catalog::memory::{DataSourceExec, MemorySourceConfig};
use datafusion::common::config::TableParquetOptions;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::common::{plan_datafusion_err, plan_err};
use datafusion::datasource::file_format::csv::CsvSink;
use datafusion::datasource::file_format::file_compression_type::FileCompressionType;
use datafusion::datasource::file_format::json::JsonSink;
use datafusion::datasource::file_format::parquet::ParquetSink;
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::{CsvSource, FileScanConfig, FileSource, JsonSource, ParquetSource};
use datafusion::datasource::sink::DataSink;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::expr::NullTreatment;
use datafusion::logical_expr::{Expr, LogicalPlan};
use datafusion::physical_expr::window::StandardWindowExpr;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::aggregates::AggregateExec;
use datafusion::physical_plan::limit::GlobalLimitExec;
use datafusion::physical_plan::windows::{BoundedWindowAggExec, WindowAggExec, WindowUDFExpr};
use object_store::memory::InMemory;

/// The most levels of a query. A plan that is written down has at most 100, and an operator takes two of them.
const MOST_LEVELS: usize = 90;

/// The most levels of a physical plan, which has no aliases, and what Ballista adds.
const MOST_OPERATORS: usize = 60;

/// Refuses a query that is nested so deeply that its plan could not be read. To plan it would take more stack than a
/// thread has.
///
/// # Errors
/// What to do instead.
pub(super) fn check_levels(query: &LogicalPlan) -> Result<()> {
    let mut open = vec![(query, 0)];
    while let Some((node, above)) = open.pop() {
        let level = above + usize::from(!matches!(node, LogicalPlan::SubqueryAlias(_)));
        if level > MOST_LEVELS {
            return Err(nested_too_deeply());
        }
        open.extend(node.inputs().into_iter().map(|input| (input, level)));
    }
    Ok(())
}

/// The same of a physical plan.
///
/// # Errors
/// What to do instead.
pub(super) fn check_operators(plan: &Arc<dyn ExecutionPlan>) -> Result<()> {
    let mut open = vec![(plan, 1)];
    while let Some((node, level)) = open.pop() {
        if level > MOST_OPERATORS {
            return Err(nested_too_deeply());
        }
        open.extend(node.children().into_iter().map(|child| (child, level + 1)));
    }
    Ok(())
}

/// A plan with more levels than can be read.
pub(super) fn nested_too_deeply() -> DataFusionError {
    plan_datafusion_err!(
        "this query is nested too deeply for a cluster, whose plans have at most 100 levels: write a step of it to a table \
         (CREATE TABLE … AS), and go on from that"
    )
}

/// Refuses a node of which a part would be lost.
///
/// # Errors
/// What cannot run on a cluster, and what to write instead.
pub(super) fn check(node: &Arc<dyn ExecutionPlan>) -> Result<()> {
    check_limits(node)?;
    check_windows(node)?;
    check_groups(node)
}

/// Why a query must not go to a cluster whose window functions would lose a part on the way: a plan that is
/// written down has no place for it.
pub(super) fn lossy_window(query: &LogicalPlan) -> Result<Option<DataFusionError>> {
    let mut lost = None;
    query.apply_with_subqueries(|node| {
        node.apply_expressions(|expr| {
            expr.apply(|expr| {
                if let Expr::WindowFunction(window) = expr {
                    let part = match &window.params {
                        params if params.filter.is_some() => "FILTER; write CASE WHEN … THEN … END as its argument",
                        params if params.null_treatment == Some(NullTreatment::IgnoreNulls) => {
                            "IGNORE NULLS; write what it reads to a table (CREATE TABLE … AS), and run it on that"
                        }
                        _ => return Ok(TreeNodeRecursion::Continue),
                    };
                    let name = window.fun.name().to_owned();
                    lost.get_or_insert_with(|| {
                        plan_datafusion_err!("{name}(…) OVER (…) cannot run on a cluster with {part}")
                    });
                }
                Ok(TreeNodeRecursion::Continue)
            })
        })
    })?;
    Ok(lost)
}

/// Is it a leaf that Ballista can slice, and of which nothing is lost on the way? Rows that are made up (a count
/// that statistics know) have no metrics, and Ballista loses the rows of a task beside theirs; it drops the
/// limit of a table in memory; and how a file is packed has no place in a plan that is written down.
pub(super) fn can_travel(leaf: &Arc<dyn ExecutionPlan>) -> Result<bool> {
    let Some(source) = leaf.downcast_ref::<DataSourceExec>().map(DataSourceExec::data_source) else {
        return Ok(false);
    };
    if source.is::<MemorySourceConfig>() {
        return Ok(source.fetch().is_none());
    }
    let Some(files) = source.downcast_ref::<FileScanConfig>() else {
        return Ok(false);
    };
    let format = files.file_source();
    let is_plain = files.file_compression_type == FileCompressionType::UNCOMPRESSED;
    // Of other formats (Avro, Arrow) executors know less than the client.
    let is_known = if let Some(parquet) = format.downcast_ref::<ParquetSource>() {
        !is_encrypted(parquet.table_parquet_options())
    } else if let Some(csv) = format.downcast_ref::<CsvSource>() {
        csv.terminator().is_none()
    } else {
        format.is::<JsonSource>() && !is_json_array(files, format)?
    };
    Ok(is_plain && is_known)
}

/// Is it JSON that is one array? The format tells nobody, but refuses to read such a file in parts.
fn is_json_array(files: &FileScanConfig, format: &Arc<dyn FileSource>) -> Result<bool> {
    let store = Arc::new(InMemory::new());
    let opener = format.with_batch_size(1).create_file_opener(store, files, 0)?;
    Ok(opener.open(PartitionedFile::new("part", 2).with_range(0, 1)).is_err())
}

/// Would an executor write the same files as the client? A plan has no place for keys to encrypt Parquet with and for
/// what else a Parquet file says of itself, nor for the formats of dates and times in CSV, of which it makes empty ones
/// where none are said, nor for how hard to compress.
pub(super) fn can_be_written(sink: &dyn DataSink) -> bool {
    if let Some(parquet) = sink.downcast_ref::<ParquetSink>() {
        let options = parquet.parquet_options();
        return !is_encrypted(options) && options.key_value_metadata.is_empty();
    }
    if let Some(csv) = sink.downcast_ref::<CsvSink>() {
        let fields = sink.schema().flattened_fields();
        let is_temporal = fields.iter().any(|field| field.data_type().is_temporal());
        return !is_temporal && csv.writer_options().compression_level.is_none();
    }
    let json = sink.downcast_ref::<JsonSink>();
    json.is_some_and(|json| json.writer_options().compression_level.is_none())
}

/// Is a file of these options encrypted, or read with keys?
fn is_encrypted(options: &TableParquetOptions) -> bool {
    let crypto = &options.crypto;
    crypto.file_encryption.is_some() || crypto.file_decryption.is_some() || crypto.factory_id.is_some()
}

/// Numbers of rows that a plan that is written down cannot hold: it has 32 bits for them.
fn check_limits(node: &Arc<dyn ExecutionPlan>) -> Result<()> {
    let skipped = node.downcast_ref::<GlobalLimitExec>().map(GlobalLimitExec::skip);
    match node.fetch().max(skipped) {
        Some(rows) if u32::try_from(rows).is_err() => plan_err!(
            "LIMIT and OFFSET go up to {} on a cluster, and this query has {rows}",
            u32::MAX
        ),
        _ => Ok(()),
    }
}

/// Windows that go the other way than their sort, which the optimizer spared a second one. A plan that is written
/// down does not tell, and the functions that count from a row mind.
fn check_windows(node: &Arc<dyn ExecutionPlan>) -> Result<()> {
    let windows = None
        .or_else(|| {
            node.downcast_ref::<BoundedWindowAggExec>()
                .map(BoundedWindowAggExec::window_expr)
        })
        .or_else(|| node.downcast_ref::<WindowAggExec>().map(WindowAggExec::window_expr));
    let functions = windows.unwrap_or_default().iter().filter_map(|window| {
        let window: &dyn Any = window.as_any();
        let function = window.downcast_ref::<StandardWindowExpr>()?.get_standard_func_expr();
        function.as_any().downcast_ref::<WindowUDFExpr>()
    });
    for function in functions {
        let is_counting = ["lag", "lead", "nth_value"].contains(&function.fun().name());
        // It tells nobody else.
        if is_counting && format!("{function:?}").contains("is_reversed: true") {
            return plan_err!(
                "{0}(…) OVER (…) cannot run on a cluster beside a window in the opposite order: write one of the two to a \
                 table (CREATE TABLE … AS), and compute the other from that",
                function.fun().name()
            );
        }
    }
    Ok(())
}

/// Groups by nothing at all (`GROUPING SETS (())`), which are written as no groups.
fn check_groups(node: &Arc<dyn ExecutionPlan>) -> Result<()> {
    let groups = node.downcast_ref::<AggregateExec>().map(AggregateExec::group_expr);
    match groups {
        Some(groups) if groups.is_empty() && groups.has_grouping_set() => plan_err!(
            "GROUPING SETS, ROLLUP and CUBE of nothing cannot run on a cluster: all rows are one group where there is no \
             GROUP BY"
        ),
        _ => Ok(()),
    }
}
