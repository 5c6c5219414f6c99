//! [`UnorderedExec`]: rows whose order the rest of a plan must not rely on.
//!
//! The client's plan says in which order a node hands out its rows, and sorts nothing twice. On a cluster three
//! kinds of nodes do not keep their word: the sides of a join are swapped when the scheduler knows how large they
//! are, a shuffle keeps no order, and an aggregate that could end its groups one by one over sorted rows cannot over
//! shuffled ones. Above this node nobody takes the order for granted, neither here nor on the scheduler, which leaves
//! out sorts that it takes for unnecessary.

use std::fmt;
use std::iter::repeat;
use std::sync::Arc;

use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Statistics, internal_err};
use datafusion::error::Result;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{LexOrdering, OrderingRequirements};
use datafusion::physical_plan::aggregates::AggregateExec;
use datafusion::physical_plan::execution_plan::CardinalityEffect;
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::joins::{CrossJoinExec, HashJoinExec, NestedLoopJoinExec};
use datafusion::physical_plan::limit::{GlobalLimitExec, LocalLimitExec};
use datafusion::physical_plan::repartition::RepartitionExec;
use datafusion::physical_plan::sorts::sort::SortExec;
use datafusion::physical_plan::{
    ChildStats, DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, PhysicalExpr, PlanProperties,
    StatisticsArgs,
};

/// The order that a node needs of each child's rows: to work at all, or to take the first of them.
pub(super) fn needed_orders(node: &Arc<dyn ExecutionPlan>) -> Vec<Option<LexOrdering>> {
    let takes_first = node.is::<GlobalLimitExec>()
        || node.is::<LocalLimitExec>()
        || (node.is::<FilterExec>() && node.fetch().is_some());
    let required = node.required_input_ordering().into_iter().chain(repeat(None));
    let children = node.children().into_iter();
    children
        .zip(required)
        .map(|(child, required)| match required {
            Some(OrderingRequirements::Hard(alternatives)) => alternatives.into_iter().next().map(LexOrdering::from),
            _ if takes_first => child.output_ordering().cloned(),
            _ => None,
        })
        .collect()
}

/// Rows in an order, sorted within their partitions if they are not.
pub(super) fn in_order(rows: Arc<dyn ExecutionPlan>, order: LexOrdering) -> Result<Arc<dyn ExecutionPlan>> {
    match rows.equivalence_properties().ordering_satisfy(order.clone())? {
        true => Ok(rows),
        false => Ok(Arc::new(SortExec::new(order, rows).with_preserve_partitioning(true))),
    }
}

/// The node, above which nobody relies on an order that it does not have on a cluster. The first rows of such an
/// order are taken above it.
pub(super) fn unordered(node: Arc<dyn ExecutionPlan>) -> Arc<dyn ExecutionPlan> {
    if !promises_too_much(&node) {
        return node;
    }
    let is_join = node.is::<HashJoinExec>() || node.is::<NestedLoopJoinExec>();
    if let (true, Some(fetch), Some(order)) = (is_join, node.fetch(), node.output_ordering())
        && let Some(all) = node.with_fetch(None)
    {
        let rows: Arc<dyn ExecutionPlan> = Arc::new(UnorderedExec::new(all));
        let sort = SortExec::new(order.clone(), rows).with_preserve_partitioning(true);
        return Arc::new(sort.with_fetch(Some(fetch)));
    }
    Arc::new(UnorderedExec::new(node))
}

/// Does a node say an order that it may not have on a cluster?
fn promises_too_much(node: &Arc<dyn ExecutionPlan>) -> bool {
    node.properties().output_ordering().is_some()
        && (node.is::<HashJoinExec>()
            || node.is::<NestedLoopJoinExec>()
            || node.is::<CrossJoinExec>()
            || node.is::<RepartitionExec>()
            || node.is::<AggregateExec>())
}

/// Hands rows on, and says nothing of their order.
#[derive(Debug)]
pub(crate) struct UnorderedExec {
    input: Arc<dyn ExecutionPlan>,
    properties: Arc<PlanProperties>,
}

impl UnorderedExec {
    pub(crate) fn new(input: Arc<dyn ExecutionPlan>) -> Self {
        let mut equivalences = input.properties().equivalence_properties().clone();
        equivalences.clear_orderings();
        let properties = input.properties().as_ref().clone().with_eq_properties(equivalences);
        Self {
            input,
            properties: Arc::new(properties),
        }
    }
}

impl DisplayAs for UnorderedExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UnorderedExec")
    }
}

impl ExecutionPlan for UnorderedExec {
    fn name(&self) -> &'static str {
        "UnorderedExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![false]
    }

    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false]
    }

    fn with_new_children(self: Arc<Self>, mut children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        let (Some(input), true) = (children.pop(), children.is_empty()) else {
            return internal_err!("UnorderedExec has one child");
        };
        Ok(Arc::new(Self::new(input)))
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
            _ => internal_err!("UnorderedExec has one child"),
        }
    }

    fn cardinality_effect(&self) -> CardinalityEffect {
        CardinalityEffect::Equal
    }
}
