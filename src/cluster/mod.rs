//! The same SQL on many nodes, with [Apache DataFusion Ballista](https://datafusion.apache.org/ballista/).
//!
//! ```text
//! client                                scheduler              executors
//! SQL ─► plan, list ─► physical plan ─► stages ─► tasks ─────► fetch, decode, embed, fit, write
//!   ▲                                                                │
//!   └────────────────────── rows, from the executors ◄───────────────┘
//! ```
//!
//! The client plans: its catalog, its views and its tables in memory are those of a session without a
//! cluster, and it lists. The scheduler gets a physical plan and cuts it into stages; it needs neither
//! credentials nor models. What a query means is decided in one place, so it means the same.
//!
//! | module | what is in it |
//! |---|---|
//! | `planner` | the query planner of a session with a cluster, and the plan node that runs a query there |
//! | `prepare` | what a plan needs to travel: values of subqueries, hashes of models, rows that only the client has |
//! | `client` | submits a plan, follows its job, fetches its rows |
//! | `codec` | plans as bytes |
//! | `written` | what a plan that is written down would lose: refused, or done by the client |
//! | `fence` | a plan node above which nothing is taken for granted that a cluster does not keep |
//! | `grant` | credentials that were given as options, on their way to the executors |
//! | `hand_on` | what both are: a node that hands rows on |
//! | [`scheduler`], [`executor`] | the two roles |
//! | `engine` | runs a task on an executor, and names the executor in its errors |
//! | `local` | `local:N`: a scheduler and an executor in this process |
//! | [`tls`] | certificates |
//! | `health` | liveness and readiness over HTTP |

mod client;
mod codec;
mod engine;
pub mod executor;
mod fence;
mod grant;
mod hand_on;
mod health;
mod local;
mod planner;
mod prepare;
pub mod scheduler;
pub mod tls;
mod written;

use std::sync::Arc;

use ballista_core::config::BallistaConfig;
use ballista_core::extension::SessionConfigExt;
use ballista_core::optimizer::ballista_default_optimizer_rules;
use datafusion::config::ConfigOptions;
use datafusion::execution::SessionStateBuilder;
use datafusion::prelude::SessionConfig;
use tonic::metadata::{MetadataMap, MetadataValue};

pub(crate) use self::client::Cluster;
use self::planner::ClusterPlanner;
use crate::table::TaskSize;

/// The port of a scheduler where none is said.
pub const DEFAULT_PORT: u16 = 50050;

/// The largest message between the roles, in bytes. Ballista's 16 MiB are too few for the partial state
/// of a PCA of 2,048 features, and for the listing of a million images.
pub const MESSAGE_BYTES: usize = 512 << 20;

/// What all nodes must be of: functions and plans may differ.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The header in which clients and executors tell a scheduler their version.
pub(crate) const VERSION_HEADER: &str = "pomona-version";

/// Tells the version.
pub(crate) fn tell_version(metadata: &mut MetadataMap) {
    metadata.insert(VERSION_HEADER, MetadataValue::from_static(VERSION));
}

/// Parts that queries are cut into where they are hashed, and the files of a table: several for each core
/// of a small cluster, so that a core that has ended finds another.
const TARGET_PARTITIONS: usize = 16;

/// The settings that a role starts with, before those of a query's client.
pub(crate) fn base_config() -> SessionConfig {
    with_ballista(SessionConfig::new_with_ballista())
}

fn with_ballista(config: SessionConfig) -> SessionConfig {
    config
        .with_ballista_grpc_client_max_message_size(MESSAGE_BYTES)
        // A task that is lost costs one partition, and an executor that comes late finds some.
        .set_u64("ballista.scheduler.max_partitions_per_task", 1)
}

/// The settings of a client's session.
pub(crate) fn client_config(mut config: SessionConfig) -> SessionConfig {
    let options = config.options_mut();
    if options.extensions.get::<BallistaConfig>().is_none() {
        options.extensions.insert(BallistaConfig::default());
    }
    if options.execution.target_partitions == ConfigOptions::new().execution.target_partitions {
        options.execution.target_partitions = options.execution.target_partitions.max(TARGET_PARTITIONS);
    }
    plan_apart(options);
    with_ballista(config).with_extension(Arc::new(TaskSize))
}

/// Rows that are dealt out by turns, and filters that one part of a plan finds for another, stay in one
/// process. Ballista takes the first out of a plan, and never ends with the second.
pub(crate) fn plan_apart(options: &mut ConfigOptions) {
    let optimizer = &mut options.optimizer;
    optimizer.enable_round_robin_repartition = false;
    optimizer.enable_dynamic_filter_pushdown = false;
    optimizer.enable_join_dynamic_filter_pushdown = false;
    optimizer.enable_topk_dynamic_filter_pushdown = false;
    optimizer.enable_aggregate_dynamic_filter_pushdown = false;
    // Such a join cannot be written down.
    optimizer.enable_piecewise_merge_join = false;
    // Joins that collect their left side in one partition. Ballista makes them of those that may be, and of the
    // others joins of many partitions, below parents that expect one.
    optimizer.repartition_joins = true;
    optimizer.hash_join_single_partition_threshold = 0;
    optimizer.hash_join_single_partition_threshold_rows = 0;
    // Shuffles keep no order.
    optimizer.prefer_existing_sort = false;
}

/// Queries go to `cluster`. NOT IN becomes joins that executors can run apart.
pub(crate) fn planned(builder: SessionStateBuilder, cluster: Arc<Cluster>) -> SessionStateBuilder {
    builder
        .with_optimizer_rules(ballista_default_optimizer_rules())
        .with_query_planner(Arc::new(ClusterPlanner::new(cluster)))
}
