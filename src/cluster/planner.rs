//! The query planner of a session with a cluster.
//!
//! Every query becomes a [`ClusterExec`], which does its work when it runs: subqueries first (see
//! `prepare`), then the physical plan, as a session without a cluster makes it, then the cluster. What
//! reads no object, as a look at a table in memory, stays in the client.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use datafusion::catalog::Session;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{DFSchemaRef, internal_datafusion_err, internal_err};
use datafusion::error::Result;
use datafusion::execution::context::QueryPlanner;
use datafusion::execution::{SendableRecordBatchStream, SessionState, TaskContext};
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::{Expr, Extension, LogicalPlan, UserDefinedLogicalNode, UserDefinedLogicalNodeCore};
use datafusion::physical_expr::EquivalenceProperties;
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::metrics::{ExecutionPlanMetricsSet, MetricBuilder, MetricsSet};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PhysicalExpr, PlanProperties, execute_stream,
};
use datafusion::physical_planner::{DefaultPhysicalPlanner, ExtensionPlanner, PhysicalPlanner};
use datafusion_proto::physical_plan::AsExecutionPlan;
use datafusion_proto::protobuf::PhysicalPlanNode;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt};
use parking_lot::Mutex;
use prost::Message;

use super::client::{Cluster, Job, settings};
use super::codec::physical_codec;
use super::{MESSAGE_BYTES, plan_apart, prepare, written};

/// Plans queries for a cluster.
#[derive(Debug)]
pub(crate) struct ClusterPlanner(Arc<Cluster>);

impl ClusterPlanner {
    pub(crate) fn new(cluster: Arc<Cluster>) -> Self {
        Self(cluster)
    }
}

#[async_trait]
impl QueryPlanner for ClusterPlanner {
    async fn create_physical_plan(&self, plan: &LogicalPlan, session: &dyn Session) -> Result<Arc<dyn ExecutionPlan>> {
        match plan {
            // The plan that the cluster would get.
            LogicalPlan::Explain(_) | LogicalPlan::DescribeTable(_) => {
                DefaultPhysicalPlanner::default()
                    .create_physical_plan(plan, session)
                    .await
            }
            LogicalPlan::Analyze(analyze) => {
                let mut analyze = analyze.clone();
                let node = ClusterNode(Arc::clone(&analyze.input));
                analyze.input = Arc::new(LogicalPlan::Extension(Extension { node: Arc::new(node) }));
                let planner = AnalyzePlanner(Arc::clone(&self.0));
                DefaultPhysicalPlanner::with_extension_planners(vec![Arc::new(planner)])
                    .create_physical_plan(&LogicalPlan::Analyze(analyze), session)
                    .await
            }
            query => Ok(Arc::new(ClusterExec::try_new(&self.0, query.clone(), session, false)?)),
        }
    }
}

/// A query under EXPLAIN ANALYZE.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd)]
struct ClusterNode(Arc<LogicalPlan>);

impl UserDefinedLogicalNodeCore for ClusterNode {
    fn name(&self) -> &'static str {
        "Cluster"
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![]
    }

    fn schema(&self) -> &DFSchemaRef {
        self.0.schema()
    }

    fn expressions(&self) -> Vec<Expr> {
        vec![]
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Cluster")
    }

    fn with_exprs_and_inputs(&self, _exprs: Vec<Expr>, _inputs: Vec<LogicalPlan>) -> Result<Self> {
        Ok(self.clone())
    }
}

/// Plans [`ClusterNode`].
struct AnalyzePlanner(Arc<Cluster>);

#[async_trait]
impl ExtensionPlanner for AnalyzePlanner {
    async fn plan_extension(
        &self,
        _planner: &dyn PhysicalPlanner,
        node: &dyn UserDefinedLogicalNode,
        _logical_inputs: &[&LogicalPlan],
        _physical_inputs: &[Arc<dyn ExecutionPlan>],
        session: &dyn Session,
        _planning_ctx: &PhysicalPlanningContext,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let Some(ClusterNode(query)) = node.as_any().downcast_ref() else {
            return Ok(None);
        };
        let exec = ClusterExec::try_new(&self.0, query.as_ref().clone(), session, true)?;
        Ok(Some(Arc::new(exec)))
    }
}

/// Runs a query: on the cluster what reads objects, here what is left.
#[derive(Debug)]
struct ClusterExec {
    cluster: Arc<Cluster>,
    query: LogicalPlan,
    session: SessionState,
    /// Are the stages to be shown, with their metrics?
    analyze: bool,
    /// The stages that ran.
    stages: Arc<Mutex<String>>,
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
}

impl ClusterExec {
    fn try_new(cluster: &Arc<Cluster>, query: LogicalPlan, session: &dyn Session, analyze: bool) -> Result<Self> {
        let session = session.as_any().downcast_ref::<SessionState>();
        let mut session = session
            .ok_or_else(|| internal_datafusion_err!("a session with a cluster is a SessionState"))?
            .clone();
        // Whatever was SET.
        plan_apart(session.config_mut().options_mut());
        let properties = single_partition(Arc::new(query.schema().as_arrow().clone()));
        Ok(Self {
            cluster: Arc::clone(cluster),
            query,
            session,
            analyze,
            stages: Arc::default(),
            properties,
            metrics: ExecutionPlanMetricsSet::new(),
        })
    }
}

fn single_partition(schema: arrow::datatypes::SchemaRef) -> Arc<PlanProperties> {
    Arc::new(PlanProperties::new(
        EquivalenceProperties::new(schema),
        Partitioning::UnknownPartitioning(1),
        EmissionType::Incremental,
        Boundedness::Bounded,
    ))
}

impl DisplayAs for ClusterExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterExec: {}{}", self.cluster, self.stages.lock())
    }
}

impl ExecutionPlan for ClusterExec {
    fn name(&self) -> &'static str {
        "ClusterExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![]
    }

    fn with_new_children(self: Arc<Self>, _children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        if partition != 0 {
            return internal_err!("ClusterExec has one partition, not {partition}");
        }
        let (session, query) = (self.session.clone(), self.query.clone());
        let remote = Remote {
            cluster: Arc::clone(&self.cluster),
            stages: self.analyze.then(|| Arc::clone(&self.stages)),
            metrics: self.metrics.clone(),
        };
        let rows = MetricBuilder::new(&self.metrics).output_rows(partition);
        let stream = futures::stream::once(run(remote, session, query, context))
            .try_flatten()
            .inspect_ok(move |batch| rows.add(batch.num_rows()));
        Ok(Box::pin(RecordBatchStreamAdapter::new(self.schema(), stream.boxed())))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }
}

/// Where a query runs, and where it says what it did.
#[derive(Clone)]
pub(super) struct Remote {
    cluster: Arc<Cluster>,
    stages: Option<Arc<Mutex<String>>>,
    metrics: ExecutionPlanMetricsSet,
}

/// Runs a query; here, if it reads no objects.
pub(super) fn run(
    remote: Remote,
    session: SessionState,
    query: LogicalPlan,
    context: Arc<TaskContext>,
) -> BoxFuture<'static, Result<SendableRecordBatchStream>> {
    async move {
        written::check_levels(&query)?;
        let query = prepare::with_values(query, &remote, &session, &context).await?;
        let query = prepare::with_pinned_models(query, &session)?;
        let lossy = written::lossy_window(&query)?;
        let plan = DefaultPhysicalPlanner::default()
            .create_physical_plan(&query, &session)
            .await?;
        if prepare::stays(&plan)? {
            return execute_stream(plan, context);
        }
        if let Some(refused) = lossy {
            return Err(refused);
        }
        written::check_operators(&plan)?;
        let plan = prepare::distribute(plan, &session, &context, remote.cluster.is_here(), |plan| {
            Arc::new(RemoteExec::new(remote.clone(), session.clone(), plan)) as Arc<dyn ExecutionPlan>
        })
        .await?;
        execute_stream(plan, context)
    }
    .boxed()
}

/// Rows that a cluster computes.
struct RemoteExec {
    remote: Remote,
    session: SessionState,
    /// What executors run. It is no child: nothing here may change or run it.
    plan: Arc<dyn ExecutionPlan>,
    properties: Arc<PlanProperties>,
}

impl RemoteExec {
    fn new(remote: Remote, session: SessionState, plan: Arc<dyn ExecutionPlan>) -> Self {
        let properties = single_partition(plan.schema());
        Self {
            remote,
            session,
            plan,
            properties,
        }
    }
}

impl fmt::Debug for RemoteExec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteExec")
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

impl DisplayAs for RemoteExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteExec: {}", self.remote.cluster)
    }
}

impl ExecutionPlan for RemoteExec {
    fn name(&self) -> &'static str {
        "RemoteExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![]
    }

    fn with_new_children(self: Arc<Self>, _children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn execute(&self, _partition: usize, _context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let codec = physical_codec("the client");
        let plan = PhysicalPlanNode::try_from_physical_plan(Arc::clone(&self.plan), codec.as_ref())
            .map_err(|e| prepare::cannot_travel(&e))?
            .encode_to_vec();
        let Remote {
            cluster,
            stages,
            metrics,
        } = self.remote.clone();
        MetricBuilder::new(&metrics).counter("plan_bytes", 0).add(plan.len());
        if plan.len() > MESSAGE_BYTES {
            return Err(prepare::too_large(plan.len()));
        }
        let told = stages.map(|stages| Box::new(move |text: String| stages.lock().push_str(&text)) as Box<_>);
        let job = Job {
            plan,
            schema: self.schema(),
            session: self.session.session_id().to_owned(),
            settings: settings(self.session.config(), cluster.is_here()),
            told,
        };
        let schema = self.schema();
        let rows = futures::stream::once(cluster.run(job)).try_flatten().boxed();
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, rows)))
    }
}
