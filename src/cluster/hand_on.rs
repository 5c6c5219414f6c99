//! [`HandOnExec`]: a node that hands its rows on as they come. What it is there for is its [`Purpose`].

use std::fmt;
use std::sync::Arc;

use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Statistics, internal_err};
use datafusion::error::Result;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::Distribution;
use datafusion::physical_plan::execution_plan::CardinalityEffect;
use datafusion::physical_plan::{
    ChildStats, DisplayAs, DisplayFormatType, ExecutionPlan, InputDistributionRequirements, PhysicalExpr,
    PlanProperties, StatisticsArgs,
};

/// What a node is there for that does nothing with its rows. Its text is the node's, after the name.
pub(crate) trait Purpose: fmt::Debug + fmt::Display + Clone + Send + Sync + 'static {
    /// The name of the node.
    const NAME: &'static str;

    /// Does the plan above know the order of the rows?
    const MAINTAINS_ORDER: bool;

    /// The partitions that the rows must be in.
    fn distribution(&self) -> Distribution;

    /// What is known of the rows.
    fn properties(&self, input: &Arc<dyn ExecutionPlan>) -> Arc<PlanProperties>;
}

/// Hands rows on.
#[derive(Debug)]
pub(crate) struct HandOnExec<P> {
    input: Arc<dyn ExecutionPlan>,
    purpose: P,
    properties: Arc<PlanProperties>,
}

impl<P: Purpose> HandOnExec<P> {
    pub(crate) fn new(input: Arc<dyn ExecutionPlan>, purpose: P) -> Self {
        let properties = purpose.properties(&input);
        Self {
            input,
            purpose,
            properties,
        }
    }

    pub(crate) fn purpose(&self) -> &P {
        &self.purpose
    }
}

impl<P: Purpose> DisplayAs for HandOnExec<P> {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", P::NAME, self.purpose)
    }
}

impl<P: Purpose> ExecutionPlan for HandOnExec<P> {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![P::MAINTAINS_ORDER]
    }

    fn input_distribution_requirements(&self) -> InputDistributionRequirements {
        InputDistributionRequirements::new(vec![self.purpose.distribution()])
    }

    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false]
    }

    fn with_new_children(self: Arc<Self>, mut children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        let (Some(input), true) = (children.pop(), children.is_empty()) else {
            return internal_err!("{} has one child", P::NAME);
        };
        Ok(Arc::new(Self::new(input, self.purpose.clone())))
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
            _ => internal_err!("{} has one child", P::NAME),
        }
    }

    fn cardinality_effect(&self) -> CardinalityEffect {
        CardinalityEffect::Equal
    }
}
