//! [`GrantExec`]: what a session was told of a store, on its way to the executors.
//!
//! `CREATE EXTERNAL TABLE … OPTIONS ('aws.access_key_id' …)` and COPY make stores of their options, which the
//! session then has. An executor makes the same when it reads this node, which hands rows on. They are in no
//! text of a plan.

use std::fmt;
use std::sync::Arc;

use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Statistics, internal_err};
use datafusion::error::Result;
use datafusion::execution::runtime_env::RuntimeEnv;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::execution_plan::CardinalityEffect;
use datafusion::physical_plan::{
    ChildStats, DisplayAs, DisplayFormatType, ExecutionPlan, PhysicalExpr, PlanProperties, StatisticsArgs,
};
use url::Url;

use crate::stores::{GivenOptions, store_with_options};

/// A store, and the options to make it of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) store: Url,
    pub(crate) given: GivenOptions,
}

impl Grant {
    /// Makes the store known.
    pub(crate) fn register(&self, runtime: &RuntimeEnv) -> Result<()> {
        if let Some(made) = store_with_options(&self.store, &self.given.0)? {
            runtime.register_object_store(&self.store, made);
        }
        Ok(())
    }
}

/// What makes a store known to the tasks that run it.
#[derive(Debug)]
pub(crate) struct GrantExec {
    input: Arc<dyn ExecutionPlan>,
    grant: Grant,
    properties: Arc<PlanProperties>,
}

impl GrantExec {
    pub(crate) fn new(input: Arc<dyn ExecutionPlan>, grant: Grant) -> Self {
        let properties = Arc::clone(input.properties());
        Self {
            input,
            grant,
            properties,
        }
    }

    pub(crate) fn grant(&self) -> &Grant {
        &self.grant
    }
}

impl DisplayAs for GrantExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let store = &self.grant.store;
        write!(
            f,
            "GrantExec: {}://{}",
            store.scheme(),
            store.host_str().unwrap_or_default()
        )
    }
}

impl ExecutionPlan for GrantExec {
    fn name(&self) -> &'static str {
        "GrantExec"
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

    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false]
    }

    fn with_new_children(self: Arc<Self>, mut children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        let (Some(input), true) = (children.pop(), children.is_empty()) else {
            return internal_err!("GrantExec has one child");
        };
        Ok(Arc::new(Self::new(input, self.grant.clone())))
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        self.input.execute(partition, context)
    }

    fn child_stats_requests(&self, partition: Option<usize>) -> Vec<ChildStats> {
        vec![ChildStats::At(partition)]
    }

    fn statistics_from_inputs(
        &self,
        input_stats: &[Arc<Statistics>],
        _args: &StatisticsArgs,
    ) -> Result<Arc<Statistics>> {
        match input_stats {
            [input] => Ok(Arc::clone(input)),
            _ => internal_err!("GrantExec has one child"),
        }
    }

    fn cardinality_effect(&self) -> CardinalityEffect {
        CardinalityEffect::Equal
    }
}
