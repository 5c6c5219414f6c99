//! THE builder: settings + object stores + functions + table factories become a [`SessionContext`].

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};

use async_trait::async_trait;
use datafusion::catalog::{
    DynamicFileCatalog, MemoryCatalogProviderList, Session, TableProvider, TableProviderFactory, UrlTableFactory,
};
use datafusion::common::plan_err;
use datafusion::config::{ConfigNonZeroUsize, ConfigOptions, MaxRowGroupBytes};
use datafusion::datasource::listing::{ListingTable, ListingTableConfig, ListingTableConfigExt, ListingTableUrl};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::TrackConsumersPool;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::execution::{SessionState, SessionStateBuilder};
use datafusion::logical_expr::CreateExternalTable;
use datafusion::prelude::{SessionConfig, SessionContext};
use datafusion_cli::catalog::substitute_tilde;
use datafusion_cli::functions::ParquetMetadataFunc;
use datafusion_cli::object_storage::{AwsOptions, GcpOptions};
use parking_lot::RwLock;
use pomona_udfs::embed::{ModelsFunction, registry};
use pomona_udfs::memory::{BudgetPool, MemoryBudget};
use pomona_udfs::settings::PomonaOptions;

#[cfg(feature = "cluster")]
use crate::cluster::{self, Cluster, tls::TlsFiles};
use crate::plan::{HoistNetworks, SharingPlanner, ShowShared};
use crate::sink::AllOrNothing;
use crate::stores::{PomonaStores, models};
use crate::table::{ImageTableFactory, ImagesFunction, TellApart};

/// Rows per batch. DataFusion counts rows, not bytes: its 8,192 photos of 5 MB would be 40 GB, and a
/// decoded one is ten times its file.
const BATCH_SIZE: usize = 32;

/// Bytes per row group of a Parquet file. The writer holds a row group until it is full, and
/// DataFusion's million rows are 8 GB of embeddings.
const ROW_GROUP_BYTES: usize = 16 << 20;

/// The session with every default: all functions, stores, tables and the bundled model.
///
/// # Errors
/// Where the machine gives no folder for files that are spilled.
pub fn session() -> Result<SessionContext> {
    SessionBuilder::new().build()
}

/// Builds a [`SessionContext`] that knows everything of Pomona.
///
/// ```
/// # fn main() -> datafusion::error::Result<()> {
/// use pomona::SessionBuilder;
/// use pomona::udfs::settings::{OnError, PomonaOptions};
///
/// let ctx = SessionBuilder::new()
///     .with_memory_limit(4 << 30)
///     .with_options(PomonaOptions { on_error: OnError::Null, ..PomonaOptions::default() })
///     .build()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct SessionBuilder {
    config: SessionConfig,
    memory_limit: Option<usize>,
    options: Option<PomonaOptions>,
    #[cfg(feature = "cluster")]
    cluster: Option<String>,
    #[cfg(feature = "cluster")]
    tls: Option<TlsFiles>,
}

impl SessionBuilder {
    /// A builder with every default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts from settings of the caller.
    ///
    /// Where they have DataFusion's default, four of them get Pomona's: `batch_size` (32 rows, since
    /// rows are images), the row groups of Parquet files (16 MiB, since a row may be a wide vector),
    /// `schema_force_view_types` (off, for the small batches: see there) and `information_schema` (on).
    /// Any other value is kept.
    #[must_use]
    pub fn with_config(mut self, config: SessionConfig) -> Self {
        self.config = config;
        self
    }

    /// The most bytes that the session may hold: encoded objects, images, tensors, models, fits and the
    /// operators of all queries together; what can be spilled is spilled to disk before. Without it
    /// there is no limit. It can be changed later: `SET pomona.memory_limit = '4GB'`.
    #[must_use]
    pub fn with_memory_limit(mut self, bytes: usize) -> Self {
        self.memory_limit = Some(bytes);
        self
    }

    /// The `pomona.*` settings.
    #[must_use]
    pub fn with_options(mut self, options: PomonaOptions) -> Self {
        self.options = Some(options);
        self
    }

    /// Runs queries on a cluster: `df://host:port` is the address of its scheduler; `local:N` is one in this
    /// process, with N cores, to try things out. What reads no object still runs here.
    #[cfg(feature = "cluster")]
    #[must_use]
    pub fn cluster(mut self, url: impl Into<String>) -> Self {
        self.cluster = Some(url.into());
        self
    }

    /// The certificates to reach the cluster with.
    #[cfg(feature = "cluster")]
    #[must_use]
    pub fn cluster_tls(mut self, files: TlsFiles) -> Self {
        self.tls = Some(files);
        self
    }

    /// The session.
    ///
    /// # Errors
    /// Where the machine gives no folder for files that are spilled, where an address is none of a cluster,
    /// and where its certificates cannot be read.
    pub fn build(self) -> Result<SessionContext> {
        register_models()?;

        let (config, memory) = config(self.config, self.options)?;
        if let Some(bytes) = self.memory_limit {
            memory.set_limit(Some(bytes));
        }
        let stores = Arc::new(PomonaStores::new());
        let config = config.with_extension(Arc::clone(&stores));
        #[cfg(feature = "cluster")]
        let (config, cluster) = match &self.cluster {
            Some(url) => {
                let cluster = Cluster::open(url, self.tls.as_ref())?;
                (cluster::client_config(config), Some(Arc::new(cluster)))
            }
            None => (config, None),
        };
        let runtime = runtime(stores, memory);

        let files = Arc::new(FileTables::default());
        let catalogs = DynamicFileCatalog::new(Arc::new(MemoryCatalogProviderList::new()), Arc::clone(&files) as _);
        let builder = SessionStateBuilder::new_with_default_features()
            .with_config(config)
            .with_runtime_env(runtime.build_arc()?)
            .with_catalog_list(Arc::new(catalogs))
            .with_table_factory("IMAGES".to_owned(), Arc::new(ImageTableFactory))
            .with_analyzer_rule(Arc::new(TellApart))
            .with_physical_optimizer_rule(Arc::new(AllOrNothing))
            .with_optimizer_rule(Arc::new(HoistNetworks));
        #[cfg(feature = "cluster")]
        let mut builder = match cluster {
            Some(cluster) => cluster::planned(builder, cluster),
            None => planned(builder),
        };
        #[cfg(not(feature = "cluster"))]
        let mut builder = planned(builder);
        for (format, factory) in builder.table_factories().get_or_insert_default() {
            if format != "IMAGES" {
                *factory = Arc::new(FilesWithStore(Arc::clone(factory)));
            }
        }
        // Through the builder, which shows the functions the settings that they start with.
        builder
            .scalar_functions()
            .get_or_insert_default()
            .extend(pomona_udfs::scalar_functions());
        builder
            .aggregate_functions()
            .get_or_insert_default()
            .extend(pomona_udfs::aggregate_functions());

        let mut state = builder.build();
        // So that `OPTIONS ('aws.region' …)` is understood, whatever is stored there.
        state.register_table_options_extension(AwsOptions::default());
        state.register_table_options_extension(GcpOptions::default());

        let ctx = SessionContext::new_with_state(state);
        ctx.register_udtf("images", Arc::new(ImagesFunction));
        ctx.register_udtf("models", Arc::new(ModelsFunction));
        ctx.register_udtf("parquet_metadata", Arc::new(ParquetMetadataFunc {}));
        files.connect(&ctx);
        Ok(ctx)
    }
}

/// What a query uses twice is computed once.
fn planned(builder: SessionStateBuilder) -> SessionStateBuilder {
    builder
        .with_query_planner(Arc::new(SharingPlanner))
        .with_physical_optimizer_rule(Arc::new(ShowShared))
}

/// What queries run in: `stores`, and memory within a budget.
pub(crate) fn runtime(stores: Arc<PomonaStores>, memory: Arc<MemoryBudget>) -> RuntimeEnvBuilder {
    // The error of a pool that is full names its three largest consumers.
    const NAMED: NonZeroUsize = NonZeroUsize::MIN.saturating_add(2);
    RuntimeEnvBuilder::new()
        .with_object_store_registry(stores)
        .with_memory_pool(Arc::new(TrackConsumersPool::new(BudgetPool(memory), NAMED)))
        // A listing that is kept for ever misses the files that COPY adds; and a file that COPY replaces
        // within a second, with as many bytes, would keep its old statistics.
        .with_object_list_cache_limit(0)
        .with_file_statistics_cache_limit(0)
        .with_metadata_cache_limit(0)
}

/// Where models are, besides folders: in the program, so that a first query needs no file, and at URLs.
pub(crate) fn register_models() -> Result<()> {
    models::register();
    registry::register_bundled(
        "resnet-mini",
        include_str!("../models/resnet-mini/preprocessor_config.json"),
        include_bytes!("../models/resnet-mini/model.onnx"),
    )
}

/// Puts Pomona's settings where the caller left DataFusion's defaults; with the budget that they hold.
fn config(mut config: SessionConfig, options: Option<PomonaOptions>) -> Result<(SessionConfig, Arc<MemoryBudget>)> {
    let theirs = ConfigOptions::new();
    let ours = config.options_mut();
    ours.catalog.information_schema = true;
    if ours.execution.batch_size.get() == theirs.execution.batch_size.get() {
        ours.execution.batch_size = ConfigNonZeroUsize::try_new(BATCH_SIZE)?;
    }
    let parquet = &mut ours.execution.parquet;
    if parquet.max_row_group_bytes.is_none()
        && parquet.max_row_group_size == theirs.execution.parquet.max_row_group_size
    {
        parquet.max_row_group_bytes = Some(MaxRowGroupBytes::try_new(ROW_GROUP_BYTES)?);
        // The parallel writer knows no limit in bytes; encoding is nothing beside inference.
        parquet.allow_single_file_parallelism = false;
    }
    // Each batch of views of strings keeps its own buffer of them, and joins and windows keep many small
    // batches: of 67,500 paths in batches of 32, a join held 1,063 MB as views and 208 MB as strings.
    parquet.schema_force_view_types = false;
    let options = options.unwrap_or_else(|| PomonaOptions::from_config(ours));
    let memory = Arc::clone(&options.memory);
    ours.extensions.insert(options);
    Ok((config, memory))
}

/// Makes tables of files, and before them the store that their options ask for (`aws.region`).
#[derive(Debug)]
struct FilesWithStore(Arc<dyn TableProviderFactory>);

#[async_trait]
impl TableProviderFactory for FilesWithStore {
    async fn create(&self, state: &dyn Session, cmd: &CreateExternalTable) -> Result<Arc<dyn TableProvider>> {
        if let Some(stores) = state.config().get_extension::<PomonaStores>() {
            for location in &cmd.locations {
                stores.grant(ListingTableUrl::parse(location)?.as_ref(), &cmd.options)?;
            }
        }
        self.0.create(state, cmd).await
    }
}

/// Tables that are named by their files: `SELECT * FROM 's3://bucket/features.parquet'`.
///
/// As [`SessionContext::enable_url_table`], but a file that cannot be read says why: there, access
/// denied and a missing file alike become "table not found".
#[derive(Debug, Default)]
struct FileTables(OnceLock<Weak<RwLock<SessionState>>>);

impl FileTables {
    fn connect(&self, ctx: &SessionContext) {
        self.0.get_or_init(|| ctx.state_weak_ref());
    }
}

#[async_trait]
impl UrlTableFactory for FileTables {
    async fn try_new(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        let is_file = name.contains('/') || Path::new(name).extension().is_some();
        let Some(state) = self.0.get().and_then(Weak::upgrade).filter(|_| is_file) else {
            return Ok(None);
        };
        let state = state.read().clone();
        let url = ListingTableUrl::parse(substitute_tilde(name.to_owned()))?;
        let config = match ListingTableConfig::new(url).infer_options(&state).await {
            Ok(config) => config,
            Err(DataFusionError::Internal(_)) => return plan_err!("there is no table and no file '{name}'"),
            Err(error) => {
                let hint = format!("'{name}' cannot be read as a table (images are: SELECT * FROM images('{name}'))");
                return Err(error.context(hint));
            }
        };
        let config = config
            .infer_partitions_from_path(&state)
            .await?
            .infer_schema(&state)
            .await?;
        Ok(Some(Arc::new(ListingTable::try_new(config)?)))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    async fn setting(ctx: &SessionContext, name: &str) -> String {
        let sql = format!("SELECT value FROM information_schema.df_settings WHERE name = '{name}'");
        let batches = ctx.sql(&sql).await.unwrap().collect().await.unwrap();
        arrow::util::display::array_value_to_string(batches.first().unwrap().column(0), 0).unwrap()
    }

    #[tokio::test]
    async fn defaults_are_ours_and_the_callers_values_are_kept() {
        let ctx = session().unwrap();
        assert_eq!(setting(&ctx, "datafusion.execution.batch_size").await, "32");
        assert_eq!(setting(&ctx, "pomona.on_error").await, "fail");

        let config = SessionConfig::new()
            .with_batch_size(7)
            .with_option_extension(PomonaOptions {
                models_dir: "/models".to_owned(),
                ..PomonaOptions::default()
            });
        let ctx = SessionBuilder::new().with_config(config).build().unwrap();
        assert_eq!(setting(&ctx, "datafusion.execution.batch_size").await, "7");
        assert_eq!(setting(&ctx, "pomona.models_dir").await, "/models");
    }

    #[tokio::test]
    async fn a_file_is_a_table_and_a_missing_one_is_named() {
        let ctx = session().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("numbers.parquet").display().to_string();
        let query = format!("SELECT v FROM '{file}'");

        let error = ctx.sql(&query).await.unwrap_err().to_string();
        assert!(
            error.contains("there is no table and no file") && error.contains(&file),
            "{error}"
        );

        for rows in [1, 2] {
            let copy = format!("COPY (SELECT value AS v FROM generate_series(1, {rows})) TO '{file}'");
            ctx.sql(&copy).await.unwrap().collect().await.unwrap();
            assert_eq!(ctx.sql(&query).await.unwrap().count().await.unwrap(), rows);
        }
    }

    #[tokio::test]
    async fn vectors_survive_parquet() {
        let ctx = session().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vectors.parquet").display().to_string();
        let copy = format!(
            "COPY (SELECT arrow_cast([1.5, 2.5], 'FixedSizeList(2, Float32)') AS v FROM generate_series(1, 100)) TO '{file}'"
        );
        ctx.sql(&copy).await.unwrap().collect().await.unwrap();
        let table = ctx.sql(&format!("SELECT v FROM '{file}'")).await.unwrap();
        let data_type = table.schema().field(0).data_type().clone();
        assert!(
            matches!(data_type, arrow::datatypes::DataType::FixedSizeList(_, 2)),
            "{data_type}"
        );
        assert_eq!(table.count().await.unwrap(), 100);
    }
}
