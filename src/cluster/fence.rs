//! [`FenceExec`]: where a plan ends to know what it knows of its rows.
//!
//! The client's plan says of each node in which order it hands out its rows, which columns are constant, which are
//! equal; it sorts nothing twice, and merges partitions where one is needed. On a cluster much of this does not hold.
//! A shuffle keeps no order, and the stage behind it is told nothing of its rows; the sides of a join are swapped when
//! the scheduler knows how large they are; an aggregate that could end its groups one by one over sorted rows cannot
//! over shuffled ones; and merges that no node asks for are taken out. Above a fence nobody takes any of this for
//! granted, neither here nor on the scheduler.

use std::fmt;
use std::iter::repeat;
use std::sync::Arc;

use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{Statistics, internal_err};
use datafusion::error::Result;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{Distribution, EquivalenceProperties, LexOrdering, OrderingRequirements};
use datafusion::physical_plan::aggregates::AggregateExec;
use datafusion::physical_plan::coalesce_partitions::CoalescePartitionsExec;
use datafusion::physical_plan::execution_plan::CardinalityEffect;
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::joins::{CrossJoinExec, HashJoinExec, NestedLoopJoinExec};
use datafusion::physical_plan::limit::{GlobalLimitExec, LocalLimitExec};
use datafusion::physical_plan::repartition::RepartitionExec;
use datafusion::physical_plan::sorts::sort::SortExec;
use datafusion::physical_plan::sorts::sort_preserving_merge::SortPreservingMergeExec;
use datafusion::physical_plan::{
    ChildStats, DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, InputDistributionRequirements,
    PhysicalExpr, PlanProperties, StatisticsArgs,
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

/// The node, behind a fence if it says more than is known on a cluster. The first rows of an order that it does not have
/// are taken there.
pub(super) fn fenced(node: Arc<dyn ExecutionPlan>) -> Arc<dyn ExecutionPlan> {
    let is_join = node.is::<HashJoinExec>() || node.is::<NestedLoopJoinExec>() || node.is::<CrossJoinExec>();
    let is_exchange =
        node.is::<RepartitionExec>() || node.is::<CoalescePartitionsExec>() || node.is::<SortPreservingMergeExec>();
    let is_ordered = node.output_ordering().is_some();
    let knows_more = match is_exchange {
        true => {
            let rows = node.equivalence_properties();
            let order = node.is::<SortPreservingMergeExec>();
            !rows.eq_group().is_empty() || (is_ordered && !order) || rows.oeq_class().len() > 1
        }
        false => is_ordered && (is_join || node.is::<AggregateExec>()),
    };
    if !knows_more {
        return node;
    }
    if let (true, Some(fetch), Some(order)) = (is_join, node.fetch(), node.output_ordering())
        && let Some(all) = node.with_fetch(None)
    {
        let rows: Arc<dyn ExecutionPlan> = Arc::new(FenceExec::new(all, false));
        let sort = SortExec::new(order.clone(), rows).with_preserve_partitioning(true);
        return Arc::new(sort.with_fetch(Some(fetch)));
    }
    Arc::new(FenceExec::new(node, false))
}

/// All rows in one partition, for a node that does not say that it needs them so.
pub(super) fn whole(rows: Arc<dyn ExecutionPlan>) -> Arc<dyn ExecutionPlan> {
    Arc::new(FenceExec::new(Arc::new(CoalescePartitionsExec::new(rows)), true))
}

/// Hands rows on, and says nothing of them but the order in which they have just been merged.
#[derive(Debug)]
pub(crate) struct FenceExec {
    input: Arc<dyn ExecutionPlan>,
    /// Must all rows be in one partition?
    whole: bool,
    properties: Arc<PlanProperties>,
}

impl FenceExec {
    pub(crate) fn new(input: Arc<dyn ExecutionPlan>, whole: bool) -> Self {
        let mut known = EquivalenceProperties::new(input.schema());
        if let Some(merge) = input.downcast_ref::<SortPreservingMergeExec>() {
            known.add_ordering(merge.expr().clone());
        }
        let properties = input.properties().as_ref().clone().with_eq_properties(known);
        Self {
            input,
            whole,
            properties: Arc::new(properties),
        }
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.whole
    }
}

impl DisplayAs for FenceExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.whole { "FenceExec: whole" } else { "FenceExec" })
    }
}

impl ExecutionPlan for FenceExec {
    fn name(&self) -> &'static str {
        "FenceExec"
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

    fn input_distribution_requirements(&self) -> InputDistributionRequirements {
        InputDistributionRequirements::new(vec![match self.whole {
            true => Distribution::SinglePartition,
            false => Distribution::UnspecifiedDistribution,
        }])
    }

    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false]
    }

    fn with_new_children(self: Arc<Self>, mut children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        let (Some(input), true) = (children.pop(), children.is_empty()) else {
            return internal_err!("FenceExec has one child");
        };
        Ok(Arc::new(Self::new(input, self.whole)))
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
            _ => internal_err!("FenceExec has one child"),
        }
    }

    fn cardinality_effect(&self) -> CardinalityEffect {
        CardinalityEffect::Equal
    }
}
