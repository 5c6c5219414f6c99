//! The image table: a prefix of an object store as rows of path, content and label.
//!
//! ```sql
//! CREATE EXTERNAL TABLE fruits STORED AS IMAGES LOCATION 's3://bucket/Training/';
//! SELECT label, count(*) FROM images('sample://fruits/Training/') GROUP BY label;
//! ```
//!
//! | module | what is in it |
//! |---|---|
//! | here | [`ImageTable`] and its factory |
//! | `function` | the table function `images` |
//! | `options` | the `images.*` options |
//! | `location` | locations, object keys and paths |
//! | `pattern` | path patterns: columns from the path |
//! | `listing` | LIST in parallel, filters on it, rows |
//! | `fetch` | `FetchExec`, which reads content |
//!
//! A scan lists when the query is planned, so that filters on path, label and metadata are decided
//! before anything is read, and EXPLAIN tells what a query will cost.

mod fetch;
mod function;
mod listing;
mod location;
mod options;
mod pattern;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch, UInt32Array};
use arrow::compute::take_record_batch;
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::memory::{DataSourceExec, MemorySourceConfig};
use datafusion::catalog::{Session, TableProvider, TableProviderFactory};
use datafusion::common::tree_node::TreeNode;
use datafusion::common::{DFSchema, internal_datafusion_err, plan_err, project_schema};
use datafusion::error::Result;
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{CreateExternalTable, Expr, TableProviderFilterPushDown, TableType};
use datafusion::physical_expr::LexOrdering;
use datafusion::physical_plan::ExecutionPlan;
use object_store::ObjectStore;
use pomona_udfs::settings::PomonaOptions;

pub(crate) use self::fetch::FetchExec;
#[cfg(feature = "cluster")]
pub(crate) use self::fetch::FetchWire;
use self::fetch::{FetchSpec, by_path};
pub use self::function::ImagesFunction;
pub(crate) use self::function::TellApart;
use self::listing::{Lister, Listing};
use self::location::Location;
pub use self::options::ImagesOptions;
use crate::stores::{GivenOptions, store_with_options};

/// What an object costs beside its bytes: decoding and inference take about the same time for
/// small images and for large.
const COST_PER_OBJECT: u64 = 256 << 10;

/// Fewer rows are not worth a partition more, and a look at the first few comes in their order.
const MIN_ROWS_PER_PARTITION: usize = 8;

/// Images in an object store, as a table.
///
/// Columns: `path` (Utf8, the full URL), `content` (Binary, the encoded image), `label` (Utf8, the
/// name of the folder, or what the path pattern says), then the pattern's other columns (Utf8), and,
/// if asked for, `size` (Int64, bytes), `last_modified` (Timestamp) and `e_tag` (Utf8).
#[derive(Debug)]
pub struct ImageTable {
    lister: Arc<Lister>,
    schema: SchemaRef,
    /// The store of a table with credentials of its own; else it is the session's.
    store: Option<Arc<dyn ObjectStore>>,
    /// The options that it was made of.
    given: GivenOptions,
    /// The call of `images` that made it.
    call: Option<String>,
}

/// What a session of a cluster has among its settings' extensions: its scans make tasks of
/// `pomona.task_bytes`.
#[derive(Debug)]
pub(crate) struct TaskSize;

impl ImageTable {
    /// A table of the images at `locations`: URLs, or paths of the file system. A table with a
    /// `store` reads from it; else from the session's store for the URL.
    ///
    /// # Errors
    /// Locations that no store can address or that are in several stores, and options that
    /// contradict each other. Nothing is listed yet.
    pub fn try_new(locations: &[String], options: &ImagesOptions, store: Option<Arc<dyn ObjectStore>>) -> Result<Self> {
        let locations = locations
            .iter()
            .map(|text| Location::parse(text))
            .collect::<Result<Vec<_>>>()?;
        if locations.is_empty() {
            return plan_err!("an image table needs a location");
        }
        let lister = Lister::try_new(locations, options)?;
        let schema = table_schema(&lister);
        Ok(Self {
            lister: Arc::new(lister),
            schema,
            store,
            given: GivenOptions::default(),
            call: None,
        })
    }

    fn store(&self, state: &dyn Session) -> Result<Arc<dyn ObjectStore>> {
        match (&self.store, self.lister.locations().first()) {
            (Some(store), _) => Ok(Arc::clone(store)),
            (None, Some(location)) => state.runtime_env().object_store(location.base().store()),
            (None, None) => plan_err!("an image table needs a location"),
        }
    }
}

/// The listing's columns with `content` after `path`, and without the size if it was not asked for.
fn table_schema(lister: &Lister) -> SchemaRef {
    let mut fields: Vec<_> = lister.schema().fields().iter().cloned().collect();
    if !lister.has_metadata() {
        fields.retain(|field| field.name() != "size");
    }
    fields.insert(1, Arc::new(Field::new("content", DataType::Binary, true)));
    Arc::new(Schema::new(fields))
}

#[async_trait]
impl TableProvider for ImageTable {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        filters
            .iter()
            .map(|filter| {
                Ok(if is_about_listing(filter, self.lister.schema())? {
                    TableProviderFilterPushDown::Exact
                } else {
                    TableProviderFilterPushDown::Unsupported
                })
            })
            .collect()
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let store = self.store(state)?;
        let predicate = conjunction(filters.to_vec())
            .map(|filter| state.create_physical_expr(filter, &DFSchema::try_from(Arc::clone(self.lister.schema()))?))
            .transpose()?;
        let schema = project_schema(&self.schema, projection)?;
        let columns = needed_columns(self.lister.schema(), &schema);
        let listing = self.lister.list(store, predicate, limit, columns).await?;

        let partitions = Partitions {
            target: state.config().target_partitions(),
            task_bytes: state.config().get_extension::<TaskSize>().map(|_| {
                let options = PomonaOptions::from_config(state.config_options());
                options.task_bytes as u64
            }),
        };
        let (leaf, mut spec) = plan(&self.lister, &listing, schema, partitions)?;
        spec.given = self.given.clone();
        Ok(Arc::new(FetchExec::new(leaf, spec, self.store.clone(), limit)))
    }
}

/// Can the listing decide this filter, once and for all?
fn is_about_listing(filter: &Expr, listing: &Schema) -> Result<bool> {
    let known = filter
        .column_refs()
        .iter()
        .all(|column| listing.index_of(&column.name).is_ok());
    let needs_query = filter.exists(|expr| {
        Ok(matches!(
            expr,
            Expr::ScalarSubquery(_)
                | Expr::InSubquery(_)
                | Expr::Exists(_)
                | Expr::SetComparison(_)
                | Expr::OuterReferenceColumn(..)
                | Expr::Placeholder(_)
        ))
    })?;
    Ok(known && !needs_query && !filter.is_volatile())
}

/// The columns of the listing that it takes to return the columns of `schema`.
fn needed_columns(listing: &Schema, schema: &Schema) -> Vec<usize> {
    let is_read = |name: &str| schema.index_of(name).is_ok();
    let is_needed = |name: &str| is_read(name) || (is_read("content") && matches!(name, "path" | "size"));
    let fields = listing.fields().iter().enumerate();
    let needed: Vec<_> = fields
        .clone()
        .filter(|(_, field)| is_needed(field.name()))
        .map(|(i, _)| i)
        .collect();
    if !needed.is_empty() {
        return needed;
    }
    // Rows without columns cannot be taken apart; numbers are the smallest.
    fields
        .filter(|(_, field)| field.name() == "size")
        .map(|(i, _)| i)
        .collect()
}

/// How many partitions a scan has.
#[derive(Debug, Clone, Copy)]
struct Partitions {
    target: usize,
    /// On a cluster, what a partition may cost, if content is read.
    task_bytes: Option<u64>,
}

impl Partitions {
    /// For rows that cost so much together.
    fn of(self, rows: usize, cost: u64) -> usize {
        let tasks = self.task_bytes.map_or(1, |bytes| cost.div_ceil(bytes.max(1)));
        let tasks = usize::try_from(tasks).unwrap_or(usize::MAX);
        self.target.max(tasks).min(rows.div_ceil(MIN_ROWS_PER_PARTITION)).max(1)
    }
}

/// The listing as a leaf, and what [`FetchExec`] makes of it.
fn plan(
    lister: &Lister,
    listing: &Listing,
    schema: SchemaRef,
    partitions: Partitions,
) -> Result<(Arc<dyn ExecutionPlan>, FetchSpec)> {
    let rows = &listing.rows;
    let columns = schema
        .fields()
        .iter()
        .map(|field| rows.schema_ref().index_of(field.name()).ok())
        .collect::<Vec<_>>();
    let reads_content = columns.contains(&None);
    let (partitions, bytes) = if reads_content {
        let sizes = rows
            .column_by_name("size")
            .and_then(|column| column.as_primitive_opt::<Int64Type>())
            .ok_or_else(|| internal_datafusion_err!("a listing has no sizes"))?;
        let sizes = sizes.values().iter().map(|size| u64::try_from(*size).unwrap_or(0));
        let costs = sizes.clone().map(|size| size.saturating_add(COST_PER_OBJECT));
        let cost = costs.clone().fold(0, u64::saturating_add);
        let dealt = deal(costs, partitions.of(rows.num_rows(), cost))
            .into_iter()
            .map(|part| Ok(vec![take_record_batch(rows, &UInt32Array::from(part))?]))
            .collect::<Result<Vec<_>>>()?;
        (dealt, sizes.fold(0, u64::saturating_add))
    } else {
        (shares(rows, partitions.of(rows.num_rows(), 0)), 0)
    };

    let ordering = rows.schema_ref().index_of("path").ok();
    let ordering = ordering.and_then(|path| LexOrdering::new([by_path(path)]));
    let source = MemorySourceConfig::try_new(&partitions, rows.schema(), None)?
        .try_with_sort_information(ordering.into_iter().collect())?;
    let base = lister.locations().first().map(|location| location.base().clone());
    let spec = FetchSpec {
        base: base.ok_or_else(|| internal_datafusion_err!("a listing has no location"))?,
        locations: lister.locations().iter().map(ToString::to_string).collect(),
        schema,
        columns,
        listed: listing.listed,
        pruned: listing.pruned,
        to_fetch: if reads_content { rows.num_rows() } else { 0 },
        bytes,
        given: GivenOptions::default(),
    };
    let leaf: Arc<dyn ExecutionPlan> = DataSourceExec::from_data_source(source);
    Ok((leaf, spec))
}

/// Deals rows out to partitions, each to the one that costs least so far.
///
/// Partitions are balanced and sorted like the rows, and neighbours are in different partitions:
/// a query that sorts by path merges all partitions at the same time, where contiguous ones would
/// have to be worked off one after the other.
fn deal(costs: impl Iterator<Item = u64>, partitions: usize) -> Vec<Vec<u32>> {
    let mut dealt = vec![vec![]; partitions];
    let mut cheapest: BinaryHeap<_> = (0..partitions).map(|partition| Reverse((0_u64, partition))).collect();
    for (row, cost) in (0..).zip(costs) {
        let Some(Reverse((load, partition))) = cheapest.pop() else {
            break;
        };
        if let Some(rows) = dealt.get_mut(partition) {
            rows.push(row);
        }
        cheapest.push(Reverse((load.saturating_add(cost), partition)));
    }
    dealt
}

/// Equal shares of rows, one after the other, which hold the rows in common.
fn shares(rows: &RecordBatch, partitions: usize) -> Vec<Vec<RecordBatch>> {
    let share = rows.num_rows().div_ceil(partitions.max(1));
    let share_at = |partition: usize| {
        let start = rows.num_rows().min(partition * share);
        vec![rows.slice(start, share.min(rows.num_rows() - start))]
    };
    (0..partitions).map(share_at).collect()
}

/// Makes image tables: `CREATE EXTERNAL TABLE … STORED AS IMAGES`.
///
/// Register it under `IMAGES`.
#[derive(Debug, Default)]
pub struct ImageTableFactory;

#[async_trait]
impl TableProviderFactory for ImageTableFactory {
    async fn create(&self, state: &dyn Session, cmd: &CreateExternalTable) -> Result<Arc<dyn TableProvider>> {
        if !cmd.schema.fields().is_empty() || !cmd.constraints.is_empty() {
            return plan_err!(
                "an image table has its own columns (path, content, label, and those of images.path_pattern): leave out \
                 the list of columns"
            );
        }
        if !cmd.table_partition_cols.is_empty() {
            return plan_err!(
                "an image table takes columns from the path with OPTIONS (images.path_pattern '{{split}}/{{label}}/*'), \
                 not with PARTITIONED BY"
            );
        }
        if !cmd.order_exprs.is_empty() || cmd.unbounded {
            return plan_err!("an image table is sorted by path and has an end: leave out WITH ORDER and UNBOUNDED");
        }
        let table = ImageTable::try_new(&cmd.locations, &ImagesOptions::from_map(&cmd.options)?, None)?;
        let store = match table.lister.locations().first() {
            Some(location) => store_with_options(location.base().store().as_ref(), &cmd.options)?,
            None => None,
        };
        let given = GivenOptions::of(&cmd.options);
        let table = ImageTable { store, given, ..table };
        // A scheme that does not exist is an error now, not when the table is read.
        table.store(state)?;
        Ok(Arc::new(table))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_cluster_gets_a_partition_for_each_task() {
        let here = Partitions {
            target: 4,
            task_bytes: None,
        };
        assert_eq!((here.of(1000, u64::MAX), here.of(9, 0), here.of(0, 0)), (4, 2, 1));
        let cluster = Partitions {
            task_bytes: Some(100),
            ..here
        };
        assert_eq!((cluster.of(1000, 1001), cluster.of(1000, 9)), (11, 4));
        // However small a task is to be.
        assert_eq!(cluster.of(80, u64::MAX), 10);
    }

    #[test]
    fn partitions_are_balanced_and_sorted() {
        let costs: Vec<u64> = (0..100).map(|i| if i % 10 == 0 { 50 } else { 5 }).collect();
        let dealt = deal(costs.iter().copied(), 4);
        let loads: Vec<u64> = dealt
            .iter()
            .map(|rows| rows.iter().map(|row| costs[*row as usize]).sum())
            .collect();
        assert!(loads.iter().all(|load| load.abs_diff(237) <= 50), "{loads:?}");
        assert!(dealt.iter().all(|rows| rows.is_sorted()));
        assert_eq!(dealt.iter().flatten().collect::<HashSet<_>>().len(), 100);
        assert_eq!(deal([1, 1, 1, 1].into_iter(), 2), [vec![0, 2], vec![1, 3]]);
    }
}
