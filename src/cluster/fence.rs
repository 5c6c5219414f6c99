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

use datafusion::error::Result;
use datafusion::physical_expr::{Distribution, EquivalenceProperties, LexOrdering, OrderingRequirements};
use datafusion::physical_plan::aggregates::AggregateExec;
use datafusion::physical_plan::coalesce_partitions::CoalescePartitionsExec;
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::joins::{CrossJoinExec, HashJoinExec, NestedLoopJoinExec};
use datafusion::physical_plan::limit::{GlobalLimitExec, LocalLimitExec};
use datafusion::physical_plan::repartition::RepartitionExec;
use datafusion::physical_plan::sorts::sort::SortExec;
use datafusion::physical_plan::sorts::sort_preserving_merge::SortPreservingMergeExec;
use datafusion::physical_plan::{ExecutionPlan, ExecutionPlanProperties, PlanProperties};

use super::hand_on::{HandOnExec, Purpose};

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
    let is_ordered = node.output_ordering().is_some();
    let knows_more = match is_exchange(&node) {
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
        let rows: Arc<dyn ExecutionPlan> = Arc::new(FenceExec::new(all, Fence { whole: false }));
        let sort = SortExec::new(order.clone(), rows).with_preserve_partitioning(true);
        return Arc::new(sort.with_fetch(Some(fetch)));
    }
    Arc::new(FenceExec::new(node, Fence { whole: false }))
}

/// All rows in one partition, for a node that does not say that it needs them so.
pub(super) fn whole(rows: Arc<dyn ExecutionPlan>) -> Arc<dyn ExecutionPlan> {
    let rows = Arc::new(CoalescePartitionsExec::new(rows));
    Arc::new(FenceExec::new(rows, Fence { whole: true }))
}

/// Are rows of several partitions merged here?
pub(super) fn is_merge(node: &Arc<dyn ExecutionPlan>) -> bool {
    node.is::<CoalescePartitionsExec>() || node.is::<SortPreservingMergeExec>()
}

/// Do rows come from another stage here?
pub(super) fn is_exchange(node: &Arc<dyn ExecutionPlan>) -> bool {
    is_merge(node) || node.is::<RepartitionExec>()
}

/// Where nothing is said of rows but the order in which they have just been merged.
#[derive(Debug, Clone)]
pub(crate) struct Fence {
    /// Must all rows be in one partition?
    pub(crate) whole: bool,
}

pub(crate) type FenceExec = HandOnExec<Fence>;

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.whole { ": whole" } else { "" })
    }
}

impl Purpose for Fence {
    const NAME: &'static str = "FenceExec";
    const MAINTAINS_ORDER: bool = false;

    fn distribution(&self) -> Distribution {
        match self.whole {
            true => Distribution::SinglePartition,
            false => Distribution::UnspecifiedDistribution,
        }
    }

    fn properties(&self, input: &Arc<dyn ExecutionPlan>) -> Arc<PlanProperties> {
        let mut known = EquivalenceProperties::new(input.schema());
        if let Some(merge) = input.downcast_ref::<SortPreservingMergeExec>() {
            known.add_ordering(merge.expr().clone());
        }
        Arc::new(input.properties().as_ref().clone().with_eq_properties(known))
    }
}
