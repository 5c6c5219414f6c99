//! [`FetchExec`]: from rows of a listing to rows with content.
//!
//! ```text
//! FetchExec            reads the objects of each row, on the I/O runtime
//!   DataSourceExec     the listing: path, size, and the other columns that the query reads
//! ```
//!
//! The listing is a leaf that DataFusion and Ballista know how to slice and to send; a leaf of our
//! own would run more than once on Ballista and return rows twice. When a query does not read
//! `content`, the node hands the listing's columns on and reads nothing.
//!
//! Data flow of one partition:
//! 1. Rows come from the listing, in order.
//! 2. A GET is queued for each, as long as their number and their bytes (known from the listing) are
//!    within bounds. Each is a task of its own, so that it goes on whatever else waits; all partitions
//!    together have `pomona.fetch_concurrency` of them under way.
//! 3. Their results are taken in order. `pomona.on_error` decides about objects that cannot be read.
//! 4. Rows whose objects have arrived become a batch, which a channel of one place hands to the
//!    query. Only then are its bytes given back.
//!
//! More GETs are queued than may be under way: while a batch waits for the query, or the first object
//! of a batch for its server, the others are read already.

#[cfg(feature = "cluster")]
mod wire;

use std::collections::VecDeque;
use std::fmt;
use std::mem;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use arrow::array::{
    ArrayRef, AsArray, BinaryBuilder, Int64Array, RecordBatch, RecordBatchOptions, StringArray, UInt32Array,
};
use arrow::compute::{SortOptions, take};
use arrow::datatypes::{Int64Type, SchemaRef};
use bytes::Bytes;
use datafusion::common::runtime::{JoinSet, SpawnedTask};
use datafusion::common::stats::Precision;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Statistics, internal_datafusion_err, internal_err};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::{EquivalenceProperties, LexOrdering, PhysicalSortExpr};
use datafusion::physical_plan::execution_plan::{CardinalityEffect, EmissionType};
use datafusion::physical_plan::limit::LimitStream;
use datafusion::physical_plan::metrics::{
    BaselineMetrics, Count, ExecutionPlanMetricsSet, MetricBuilder, MetricsSet, Time,
};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    ChildStats, ChildrenPropertiesMode, DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties,
    Partitioning, PhysicalExpr, PlanProperties, ReplaceChildrenOptions, StatisticsArgs,
};
use futures::stream::{BoxStream, FuturesOrdered};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{GetOptions, GetResultPayload, ObjectStore};
use pomona_udfs::policy::{RowError, RowPolicy, Stage};
use pomona_udfs::settings::PomonaOptions;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

#[cfg(feature = "cluster")]
pub(crate) use self::wire::FetchWire;
use super::location::Base;
use crate::stores::{Cause, GivenOptions, cause_of, into_datafusion, io};

/// GETs that are queued for each that may be under way.
const QUEUED: usize = 4;

/// The largest value of a Binary column, and the most that a batch of it holds.
const MAX_BATCH_BYTES: usize = i32::MAX as usize;

/// A batch of so many bytes is handed on, however few its rows are: functions that give images hold all of a
/// batch, and pixels take ten to forty times the bytes of their JPEG.
const HANDED_ON_BYTES: usize = 4 << 20;

/// What a [`FetchExec`] does, in plain values.
#[derive(Debug, Clone)]
pub(crate) struct FetchSpec {
    /// The store that the objects are in.
    pub(crate) base: Base,
    /// The table's locations, to be shown.
    pub(crate) locations: Vec<String>,
    /// The columns that the node returns.
    pub(crate) schema: SchemaRef,
    /// Where each of them comes from: a column of the listing, or, if `None`, the object.
    pub(crate) columns: Vec<Option<usize>>,
    /// Objects that LIST returned.
    pub(crate) listed: usize,
    /// Objects among them that are no rows of this query.
    pub(crate) pruned: usize,
    /// Objects to read.
    pub(crate) to_fetch: usize,
    /// Their bytes.
    pub(crate) bytes: u64,
    /// The options that the table's own store was made of.
    pub(crate) given: GivenOptions,
}

impl FetchSpec {
    fn reads_content(&self) -> bool {
        self.columns.contains(&None)
    }

    /// The node's columns of these rows of the listing. They are copied: a slice would be counted by
    /// operators, and sent over the network, with the whole listing behind it.
    fn assemble(&self, rows: &RecordBatch, content: Option<&ArrayRef>) -> Result<RecordBatch> {
        let every_row = UInt32Array::from_iter_values((0..).take(rows.num_rows()));
        let columns = self
            .columns
            .iter()
            .map(|column| match column {
                Some(i) => rows.columns().get(*i).map(|column| take(column, &every_row, None)),
                None => content.cloned().map(Ok),
            })
            .map(|column| -> Result<ArrayRef> {
                Ok(column.ok_or_else(|| internal_datafusion_err!("FetchExec lacks a column"))??)
            })
            .collect::<Result<_>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
        Ok(RecordBatch::try_new_with_options(
            Arc::clone(&self.schema),
            columns,
            &options,
        )?)
    }
}

/// Reads the objects of a listing's rows.
#[derive(Debug)]
pub(crate) struct FetchExec {
    input: Arc<dyn ExecutionPlan>,
    spec: Arc<FetchSpec>,
    /// The store of a table with credentials of its own; else it is the session's.
    store: Option<Arc<dyn ObjectStore>>,
    /// The most rows that each partition returns.
    limit: Option<usize>,
    /// GETs of all partitions that may be under way.
    gets: OnceLock<Arc<Semaphore>>,
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
}

impl FetchExec {
    /// A node above `input`, a listing with the columns `path` and `size` if content is read.
    pub(crate) fn new(
        input: Arc<dyn ExecutionPlan>,
        spec: FetchSpec,
        store: Option<Arc<dyn ObjectStore>>,
        limit: Option<usize>,
    ) -> Self {
        let properties = Arc::new(properties(&input, &spec));
        Self {
            input,
            spec: Arc::new(spec),
            store,
            limit,
            gets: OnceLock::new(),
            properties,
            metrics: ExecutionPlanMetricsSet::new(),
        }
    }

    /// The same node with other parts, and metrics of its own.
    fn with(&self, input: Arc<dyn ExecutionPlan>, limit: Option<usize>, properties: Arc<PlanProperties>) -> Self {
        Self {
            input,
            spec: Arc::clone(&self.spec),
            store: self.store.clone(),
            limit,
            gets: OnceLock::new(),
            properties,
            metrics: ExecutionPlanMetricsSet::new(),
        }
    }
}

/// How the rows of a listing are sorted.
pub(crate) fn by_path(path: usize) -> PhysicalSortExpr {
    let options = SortOptions {
        descending: false,
        nulls_first: false,
    };
    PhysicalSortExpr::new(Arc::new(Column::new("path", path)), options)
}

fn properties(input: &Arc<dyn ExecutionPlan>, spec: &FetchSpec) -> PlanProperties {
    let orderings = input.equivalence_properties().oeq_class().iter();
    let orderings = orderings.filter_map(|ordering| LexOrdering::new(returned(ordering, spec)));
    PlanProperties::new(
        EquivalenceProperties::new_with_orderings(Arc::clone(&spec.schema), orderings.collect::<Vec<_>>()),
        Partitioning::UnknownPartitioning(input.output_partitioning().partition_count()),
        EmissionType::Incremental,
        input.boundedness(),
    )
}

/// How rows are sorted after the node that were sorted so before it: up to a column that it does not return.
fn returned(ordering: &LexOrdering, spec: &FetchSpec) -> Vec<PhysicalSortExpr> {
    let sorts = ordering.iter().map_while(|sort| {
        let listed = sort.expr.downcast_ref::<Column>()?;
        let index = spec.columns.iter().position(|column| *column == Some(listed.index()))?;
        let column = Column::new(spec.schema.fields().get(index)?.name(), index);
        Some(PhysicalSortExpr::new(Arc::new(column), sort.options))
    });
    sorts.collect()
}

impl DisplayAs for FetchExec {
    fn fmt_as(&self, t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FetchSpec {
            listed,
            pruned,
            to_fetch,
            bytes,
            ..
        } = self.spec.as_ref();
        let location = self.spec.locations.join(" ");
        match t {
            DisplayFormatType::Default | DisplayFormatType::Verbose => {
                write!(
                    f,
                    "FetchExec: location={location}, listed={listed}, pruned={pruned}, to_fetch={to_fetch}, bytes={bytes}"
                )?;
                self.limit.map_or(Ok(()), |limit| write!(f, ", limit={limit}"))
            }
            DisplayFormatType::TreeRender => {
                writeln!(f, "location={location}")?;
                writeln!(f, "listed={listed}")?;
                writeln!(f, "pruned={pruned}")?;
                writeln!(f, "to_fetch={to_fetch}")?;
                writeln!(f, "bytes={bytes}")?;
                self.limit.map_or(Ok(()), |limit| writeln!(f, "limit={limit}"))
            }
        }
    }
}

impl ExecutionPlan for FetchExec {
    fn name(&self) -> &'static str {
        "FetchExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![true]
    }

    // The listing is split by bytes already; splitting it again would only mix it up.
    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false]
    }

    fn replace_children(
        self: Arc<Self>,
        mut children: Vec<Arc<dyn ExecutionPlan>>,
        options: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let (Some(input), true) = (children.pop(), children.is_empty()) else {
            return internal_err!("FetchExec has one child");
        };
        let properties = match options.children_properties {
            ChildrenPropertiesMode::Keep => Arc::clone(&self.properties),
            ChildrenPropertiesMode::Recompute => Arc::new(properties(&input, &self.spec)),
        };
        Ok(Arc::new(self.with(input, self.limit, properties)))
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        self.replace_children(children, ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let input = self.input.execute(partition, Arc::clone(&context))?;
        let baseline = BaselineMetrics::new(&self.metrics, partition);
        let metrics = FetchMetrics::new(&self.metrics, partition);
        let spec = Arc::clone(&self.spec);
        let rows: BoxStream<'static, Result<RecordBatch>> = if spec.reads_content() {
            let store = match &self.store {
                Some(store) => Arc::clone(store),
                None => context.runtime_env().object_store(spec.base.store())?,
            };
            let config = context.session_config().options();
            let options = PomonaOptions::from_config(config);
            let partitions = self.properties.output_partitioning().partition_count().max(1);
            let consumer = MemoryConsumer::new(format!("FetchExec[{partition}]")).register(context.memory_pool());
            let budget = Budget::new(options.fetch_bytes / partitions, consumer);
            let concurrency = options.fetch_concurrency.clamp(1, Semaphore::MAX_PERMITS);
            let gets = self.gets.get_or_init(|| Arc::new(Semaphore::new(concurrency)));
            let reader = Reader {
                store,
                gets: Arc::clone(gets),
                base: spec.base.clone(),
                max_bytes: options.max_object_bytes.min(MAX_BATCH_BYTES) as u64,
                metrics,
            };
            let pipeline = Pipeline {
                spec,
                input,
                reader: Arc::new(reader),
                policy: RowPolicy::new(&options),
                queued: concurrency.saturating_mul(QUEUED).div_ceil(partitions),
                // A quarter: the next batch is read while one waits for the query.
                batch_bytes: (budget.total as usize / 4).clamp(1, HANDED_ON_BYTES),
                budget,
                remaining: self.limit.unwrap_or(usize::MAX),
                open: VecDeque::new(),
                elapsed_compute: baseline.elapsed_compute().clone(),
            };
            pipeline.into_stream()
        } else {
            input.map(move |rows| spec.assemble(&rows?, None)).boxed()
        };
        let rows = Box::pin(RecordBatchStreamAdapter::new(self.schema(), rows));
        Ok(Box::pin(LimitStream::new(rows, 0, self.limit, baseline)))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }

    fn child_stats_requests(&self, partition: Option<usize>) -> Vec<ChildStats> {
        vec![ChildStats::At(partition)]
    }

    fn statistics_from_inputs(
        &self,
        input_stats: &[Arc<Statistics>],
        args: &StatisticsArgs,
    ) -> Result<Arc<Statistics>> {
        let rows = input_stats.first().map_or(Precision::Absent, |stats| stats.num_rows);
        let partitions = match args.partition() {
            Some(_) => 1,
            None => self.properties.output_partitioning().partition_count(),
        };
        let rows = match self.limit {
            Some(limit) if rows.get_value().is_none_or(|rows| *rows > limit) => match partitions {
                1 => rows.min(&Precision::Exact(limit)),
                n => rows.min(&Precision::Exact(limit.saturating_mul(n))).to_inexact(),
            },
            _ => rows,
        };
        Ok(Arc::new(Statistics::new_unknown(&self.schema()).with_num_rows(rows)))
    }

    fn with_fetch(&self, limit: Option<usize>) -> Option<Arc<dyn ExecutionPlan>> {
        Some(Arc::new(self.with(
            Arc::clone(&self.input),
            limit,
            Arc::clone(&self.properties),
        )))
    }

    fn fetch(&self) -> Option<usize> {
        self.limit
    }

    fn cardinality_effect(&self) -> CardinalityEffect {
        match self.limit {
            Some(_) => CardinalityEffect::LowerEqual,
            None => CardinalityEffect::Equal,
        }
    }
}

/// What EXPLAIN ANALYZE shows.
#[derive(Debug, Clone)]
struct FetchMetrics {
    /// Objects that were asked for.
    gets: Count,
    /// Bytes of the objects that were read.
    bytes_fetched: Count,
    /// Objects that could not be read.
    failures: Count,
    /// HTTP requests beyond the first of each object.
    retries: Count,
    /// The time of all GETs, which run at the same time, added up.
    fetch_time: Time,
}

impl FetchMetrics {
    fn new(metrics: &ExecutionPlanMetricsSet, partition: usize) -> Self {
        let counter = |name: &'static str| MetricBuilder::new(metrics).counter(name, partition);
        Self {
            gets: counter("gets"),
            bytes_fetched: counter("bytes_fetched"),
            failures: counter("failures"),
            retries: counter("retries"),
            fetch_time: MetricBuilder::new(metrics).subset_time("fetch_time", partition),
        }
    }
}

/// One object to read.
#[derive(Debug)]
struct Object {
    /// Its full URL.
    path: String,
    /// Its bytes, as it was listed.
    size: u64,
}

/// Reads single objects.
#[derive(Debug)]
struct Reader {
    store: Arc<dyn ObjectStore>,
    gets: Arc<Semaphore>,
    base: Base,
    /// The largest object that is read.
    max_bytes: u64,
    metrics: FetchMetrics,
}

impl Reader {
    /// What reading `object` will hold in memory.
    fn cost(&self, object: &Object) -> u64 {
        if object.size > self.max_bytes { 0 } else { object.size }
    }

    /// Reads an object; the inner error is about this object alone.
    async fn read(&self, object: &Object) -> Result<Result<Bytes, RowError>> {
        let failure = |cause: &dyn fmt::Display| {
            self.metrics.failures.add(1);
            Ok(Err(RowError::new(Stage::Get, format_args!("{}: {cause}", object.path))))
        };
        if object.size > self.max_bytes {
            return failure(&format_args!(
                "it has {} bytes, more than pomona.max_object_bytes = {}",
                object.size, self.max_bytes
            ));
        }
        let Some(key) = self.base.key_of(&object.path) else {
            return internal_err!("{} is not in {}", object.path, self.base.store());
        };
        let turn = self.gets.acquire().await;
        let _turn = turn.map_err(|e| internal_datafusion_err!("nobody may read any more: {e}"))?;
        self.metrics.gets.add(1);
        let started = Instant::now();
        let (body, requests) = io::count_requests(self.get(&key, object.size)).await;
        self.metrics.fetch_time.add_duration(started.elapsed());
        self.metrics.retries.add(requests.saturating_sub(1));
        match body {
            Ok(Some(body)) => {
                self.metrics.bytes_fetched.add(body.len());
                Ok(Ok(body))
            }
            Ok(None) => failure(&format_args!(
                "it has grown since it was listed with {} bytes; run the query again",
                object.size
            )),
            Err(error) => match cause_of(&error) {
                (Cause::NotFound, _) => failure(&"it is gone: it was deleted after it was listed"),
                // Nothing else will be read either, whatever the policy for single objects is.
                (Cause::Denied | Cause::NoBucket | Cause::WrongRegion | Cause::Unreachable | Cause::NotOpened, _) => {
                    Err(into_datafusion(&error))
                }
                (_, text) => failure(&text),
            },
        }
    }

    /// The object's bytes; `None` if there are more than `size`.
    async fn get(&self, key: &Path, size: u64) -> object_store::Result<Option<Bytes>> {
        let object = self.store.get_opts(key, GetOptions::default()).await?;
        if object.meta.size > size {
            return Ok(None);
        }
        if matches!(object.payload, GetResultPayload::File(..)) {
            return object.bytes().await.map(Some);
        }
        let mut body = object.into_stream();
        let mut chunks: Vec<Bytes> = vec![];
        let mut held = 0;
        while let Some(chunk) = body.try_next().await? {
            // A server may send more than it said.
            held += chunk.len() as u64;
            if held > size {
                return Ok(None);
            }
            chunks.push(chunk);
        }
        Ok(Some(match chunks.pop() {
            None => Bytes::new(),
            Some(chunk) if chunks.is_empty() => chunk,
            Some(chunk) => {
                chunks.push(chunk);
                chunks.concat().into()
            }
        }))
    }
}

/// Bounds the bytes that one partition holds. Each partition has its own, so that a merge above,
/// which reads one partition and lets the others wait, cannot come to a standstill.
#[derive(Debug)]
struct Budget {
    permits: Arc<Semaphore>,
    /// Bytes in all.
    total: u32,
    memory: MemoryReservation,
}

/// A part of a budget, given back when it is dropped.
#[derive(Debug)]
struct Held {
    _permit: OwnedSemaphorePermit,
    _memory: MemoryReservation,
}

impl Budget {
    fn new(bytes: usize, memory: MemoryReservation) -> Self {
        let total = u32::try_from(bytes).unwrap_or(u32::MAX).max(1);
        Self {
            permits: Arc::new(Semaphore::new(total as usize)),
            total,
            memory,
        }
    }

    /// Holds `bytes` if they are free; what is larger than the budget takes all of it.
    fn try_hold(&self, bytes: u64) -> Result<Option<Held>> {
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX).clamp(1, self.total);
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_many_owned(permits) else {
            return Ok(None);
        };
        let memory = self.memory.new_empty();
        match memory.try_grow(usize::try_from(bytes).unwrap_or(usize::MAX)) {
            Ok(()) => Ok(Some(Held {
                _permit: permit,
                _memory: memory,
            })),
            // What is held will be given back.
            Err(_) if self.permits.available_permits() + (permits as usize) < self.total as usize => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits until nothing is held, then holds `bytes`.
    async fn hold_alone(&self, bytes: u64) -> Result<Held> {
        let all = Arc::clone(&self.permits).acquire_many_owned(self.total).await;
        drop(all);
        match self.try_hold(bytes)? {
            Some(held) => Ok(held),
            None => internal_err!("the budget of FetchExec is held by nobody, but not free"),
        }
    }
}

/// A batch of the listing whose objects are being read.
#[derive(Debug)]
struct Open {
    rows: RecordBatch,
    paths: StringArray,
    sizes: Int64Array,
    /// Rows whose GET has begun.
    started: usize,
    /// Rows that were handed on.
    emitted: usize,
    /// The objects of the rows that come next; `None` where it could not be read.
    contents: Vec<Option<Bytes>>,
    bytes: usize,
    held: Vec<Held>,
}

impl Open {
    fn try_new(rows: RecordBatch) -> Result<Self> {
        let (Some(paths), Some(sizes)) = (
            rows.column_by_name("path")
                .and_then(|column| column.as_string_opt::<i32>()),
            rows.column_by_name("size")
                .and_then(|column| column.as_primitive_opt::<Int64Type>()),
        ) else {
            return internal_err!("FetchExec reads a listing with path and size, not {}", rows.schema());
        };
        let (paths, sizes) = (paths.clone(), sizes.clone());
        Ok(Self {
            rows,
            paths,
            sizes,
            started: 0,
            emitted: 0,
            contents: vec![],
            bytes: 0,
            held: vec![],
        })
    }

    fn next_object(&mut self) -> Option<Object> {
        let i = self.started;
        (i < self.rows.num_rows()).then(|| {
            self.started += 1;
            Object {
                path: self.paths.value(i).to_owned(),
                size: u64::try_from(self.sizes.value(i)).unwrap_or(0),
            }
        })
    }
}

/// A batch that is ready, and what it holds of the budget until the query takes it.
struct Fetched {
    batch: RecordBatch,
    held: Vec<Held>,
}

/// Reads the objects of one partition.
struct Pipeline {
    spec: Arc<FetchSpec>,
    input: SendableRecordBatchStream,
    reader: Arc<Reader>,
    policy: RowPolicy,
    /// GETs that are queued, or whose objects wait for those before them.
    queued: usize,
    /// Bytes with which a batch is handed on, however few its rows are.
    batch_bytes: usize,
    budget: Budget,
    /// Rows that may still begin.
    remaining: usize,
    /// The oldest first.
    open: VecDeque<Open>,
    elapsed_compute: Time,
}

impl Pipeline {
    /// Begins when it is first polled, ends when it is dropped.
    fn into_stream(self) -> BoxStream<'static, Result<RecordBatch>> {
        let start = async move {
            let (sender, receiver) = mpsc::channel(1);
            let mut task = JoinSet::new();
            task.spawn_on(self.run(sender), io::handle()?);
            Ok::<_, DataFusionError>(futures::stream::unfold(
                (receiver, task),
                |(mut receiver, mut task)| async move {
                    if let Some(Fetched { batch, held }) = receiver.recv().await {
                        drop(held);
                        return Some((Ok(batch), (receiver, task)));
                    }
                    // All batches have come; the task says whether they are all there are.
                    let error = match task.join_next().await? {
                        Ok(Ok(())) => return None,
                        Ok(Err(error)) => error,
                        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                        Err(error) => DataFusionError::ExecutionJoin(Box::new(error)),
                    };
                    Some((Err(error), (receiver, task)))
                },
            ))
        };
        futures::stream::once(start).try_flatten().boxed()
    }

    async fn run(mut self, sender: mpsc::Sender<Fetched>) -> Result<()> {
        let mut reading = FuturesOrdered::new();
        let mut next = None;
        loop {
            while reading.len() < self.queued {
                if next.is_none() {
                    next = self.next_object().await?;
                }
                let Some(object) = next.take() else { break };
                match self.budget.try_hold(self.reader.cost(&object))? {
                    Some(held) => reading.push_back(self.start(object, held)),
                    None => {
                        next = Some(object);
                        break;
                    }
                }
            }
            if let Some(read) = reading.next().await {
                let (content, held) = read.map_err(|e| DataFusionError::ExecutionJoin(Box::new(e)))??;
                self.push(self.policy.apply(content)?, held, &sender).await?;
            } else if self.open.front().is_some_and(|open| !open.contents.is_empty()) {
                // What has been read leaves no room for the next object.
                self.flush(&sender).await?;
            } else if let Some(object) = next.take() {
                // Only what waits for the query holds memory now.
                let held = self.budget.hold_alone(self.reader.cost(&object)).await?;
                reading.push_back(self.start(object, held));
            } else {
                return Ok(());
            }
        }
    }

    /// The next row of the listing.
    async fn next_object(&mut self) -> Result<Option<Object>> {
        while self.remaining > 0 {
            if let Some(object) = self.open.back_mut().and_then(Open::next_object) {
                self.remaining -= 1;
                return Ok(Some(object));
            }
            match self.input.next().await.transpose()? {
                Some(rows) if rows.num_rows() == 0 => {}
                Some(rows) => self
                    .open
                    .push_back(Open::try_new(rows.slice(0, rows.num_rows().min(self.remaining)))?),
                None => self.remaining = 0,
            }
        }
        Ok(None)
    }

    /// Queues a GET, as a task that is aborted when it is dropped.
    fn start(&self, object: Object, held: Held) -> SpawnedTask<Result<(Result<Bytes, RowError>, Held)>> {
        let reader = Arc::clone(&self.reader);
        SpawnedTask::spawn(async move { Ok((reader.read(&object).await?, held)) })
    }

    /// Adds the next row's object, and hands a batch on where it is complete.
    async fn push(&mut self, content: Option<Bytes>, held: Held, sender: &mpsc::Sender<Fetched>) -> Result<()> {
        let bytes = content.as_ref().map_or(0, Bytes::len);
        if self
            .open
            .front()
            .is_some_and(|open| open.bytes.saturating_add(bytes) > MAX_BATCH_BYTES)
        {
            self.flush(sender).await?;
        }
        let Some(open) = self.open.front_mut() else {
            return internal_err!("FetchExec read an object of no row");
        };
        open.contents.push(content);
        open.bytes += bytes;
        open.held.push(held);
        let is_last = open.emitted + open.contents.len() == open.rows.num_rows();
        if is_last || open.bytes >= self.batch_bytes {
            self.flush(sender).await
        } else {
            Ok(())
        }
    }

    /// Hands the rows whose objects have come on.
    async fn flush(&mut self, sender: &mpsc::Sender<Fetched>) -> Result<()> {
        let Some(open) = self.open.front_mut().filter(|open| !open.contents.is_empty()) else {
            return Ok(());
        };
        let (contents, held) = (mem::take(&mut open.contents), mem::take(&mut open.held));
        let rows = open.rows.slice(open.emitted, contents.len());
        open.emitted += contents.len();
        open.bytes = 0;
        if open.emitted == open.rows.num_rows() {
            self.open.pop_front();
        }
        let timer = self.elapsed_compute.timer();
        let batch = self.spec.assemble(&rows, Some(&content_array(contents)))?;
        timer.done();
        // Nobody receives any more when the query has ended; then this task is aborted.
        let _ = sender.send(Fetched { batch, held }).await;
        Ok(())
    }
}

/// A Binary column, of no more than [`MAX_BATCH_BYTES`].
fn content_array(contents: Vec<Option<Bytes>>) -> ArrayRef {
    let bytes = contents.iter().flatten().map(Bytes::len).sum();
    let mut builder = BinaryBuilder::with_capacity(contents.len(), bytes);
    for content in contents {
        builder.append_option(content);
    }
    Arc::new(builder.finish())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use arrow::array::{Array, BinaryArray};
    use arrow::datatypes::{DataType, Field, Schema};
    use datafusion::catalog::memory::MemorySourceConfig;
    use datafusion::execution::object_store::ObjectStoreUrl;
    use datafusion::physical_plan::collect;
    use datafusion::prelude::{SessionConfig, SessionContext};
    use object_store::memory::InMemory;
    use object_store::{ObjectStoreExt, PutPayload};

    use super::*;

    /// Objects 'x/0' and on with these sizes, and a listing of them in batches of three.
    async fn fetch(sizes: &[usize], listed: &[usize], limit: Option<usize>) -> (FetchExec, Arc<dyn ObjectStore>) {
        let store = InMemory::new();
        for (i, size) in sizes.iter().enumerate() {
            let body = PutPayload::from(vec![i as u8; *size]);
            store.put(&Path::from(format!("x/{i}")), body).await.unwrap();
        }
        let schema = Arc::new(Schema::new(vec![
            Field::new("path", DataType::Utf8, false),
            Field::new("size", DataType::Int64, false),
        ]));
        let paths: StringArray = (0..listed.len()).map(|i| Some(format!("mem://b/x/{i}"))).collect();
        let sizes: Int64Array = listed.iter().map(|size| Some(*size as i64)).collect();
        let rows = RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(paths), Arc::new(sizes)]).unwrap();
        let batches: Vec<_> = (0..listed.len())
            .step_by(3)
            .map(|at| rows.slice(at, 3.min(listed.len() - at)))
            .collect();
        let input = MemorySourceConfig::try_new_exec(&[batches], schema, None).unwrap();
        let output = Schema::new(vec![
            Field::new("content", DataType::Binary, true),
            Field::new("path", DataType::Utf8, false),
        ]);
        let spec = FetchSpec {
            base: Base::new(ObjectStoreUrl::parse("mem://b").unwrap()),
            locations: vec!["mem://b/x/".to_owned()],
            schema: Arc::new(output),
            columns: vec![None, Some(0)],
            listed: listed.len(),
            pruned: 0,
            to_fetch: listed.len(),
            bytes: 0,
            given: GivenOptions::default(),
        };
        let store: Arc<dyn ObjectStore> = Arc::new(store);
        (FetchExec::new(input, spec, Some(Arc::clone(&store)), limit), store)
    }

    async fn run(exec: &Arc<FetchExec>, settings: &[(&str, &str)]) -> Result<Vec<RecordBatch>> {
        let mut config = SessionConfig::new();
        let mut options = PomonaOptions::default();
        for (key, value) in settings {
            datafusion::common::config::ExtensionOptions::set(&mut options, key, value)?;
        }
        config.options_mut().extensions.insert(options);
        let context = SessionContext::new_with_config(config);
        collect(Arc::clone(exec) as Arc<dyn ExecutionPlan>, context.task_ctx()).await
    }

    fn lengths(batches: &[RecordBatch]) -> Vec<Option<usize>> {
        let length = |a: &BinaryArray, i| a.is_valid(i).then(|| a.value(i).len());
        let columns = batches.iter().map(|batch| batch.column(0).as_binary::<i32>());
        columns.flat_map(|a| (0..a.len()).map(move |i| length(a, i))).collect()
    }

    fn metric(exec: &FetchExec, name: &str) -> usize {
        exec.metrics()
            .unwrap()
            .sum_by_name(name)
            .map_or(0, |value| value.as_usize())
    }

    #[tokio::test]
    async fn objects_come_in_order_within_any_budget() {
        let sizes = [5, 0, 30, 7, 100, 1, 1, 40];
        for budget in ["1", "8", "40", "64", "1000000"] {
            let (exec, _store) = fetch(&sizes, &sizes, None).await;
            let exec = Arc::new(exec);
            let batches = run(&exec, &[("fetch_bytes", budget), ("fetch_concurrency", "3")])
                .await
                .unwrap();
            assert_eq!(lengths(&batches), sizes.map(Some), "budget {budget}");
            let paths = batches
                .iter()
                .flat_map(|batch| batch.column(1).as_string::<i32>().iter().flatten());
            assert!(
                paths.enumerate().all(|(i, path)| path == format!("mem://b/x/{i}")),
                "budget {budget}"
            );
            assert_eq!((metric(&exec, "gets"), metric(&exec, "bytes_fetched")), (8, 184));
        }
    }

    #[tokio::test]
    async fn a_limit_stops_reading() {
        let sizes = [1; 20];
        let (exec, _store) = fetch(&sizes, &sizes, Some(4)).await;
        let exec = Arc::new(exec);
        let batches = run(&exec, &[]).await.unwrap();
        assert_eq!(lengths(&batches).len(), 4);
        assert_eq!(metric(&exec, "gets"), 4);
    }

    #[tokio::test]
    async fn broken_objects_follow_the_policy() {
        // The second has grown, the third is too large, the fourth is gone.
        let (exec, _store) = fetch(&[1, 9, 50], &[1, 2, 50, 1], None).await;
        let exec = Arc::new(exec);
        let settings = [("max_object_bytes", "20"), ("on_error", "null")];
        let batches = run(&exec, &settings).await.unwrap();
        assert_eq!(lengths(&batches), [Some(1), None, None, None]);
        assert_eq!((metric(&exec, "gets"), metric(&exec, "failures")), (3, 3));
        let error = run(&exec, &[]).await.unwrap_err().to_string();
        assert!(error.contains("get: mem://b/x/1") && error.contains("grown"), "{error}");
    }

    #[tokio::test]
    async fn a_query_that_does_not_read_content_reads_nothing() {
        let (exec, _store) = fetch(&[], &[1; 7], None).await;
        let mut spec = FetchSpec::clone(&exec.spec);
        spec.schema = Arc::new(Schema::new(vec![Field::new("path", DataType::Utf8, false)]));
        spec.columns = vec![Some(0)];
        let exec = Arc::new(FetchExec::new(Arc::clone(&exec.input), spec, None, None));
        let batches = run(&exec, &[]).await.unwrap();
        assert_eq!(batches.iter().map(RecordBatch::num_rows).sum::<usize>(), 7);
        assert_eq!(metric(&exec, "gets"), 0);
    }
}
