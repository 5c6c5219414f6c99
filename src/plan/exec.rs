//! [`SharedExec`]: a leaf that reads a computation which other leaves of the plan read too.
//!
//! What is shared is planned and optimized alone, once, so that all leaves have one input in common
//! whatever is done around them. The first leaf shows it in EXPLAIN.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use datafusion::common::config::ConfigOptions;
use datafusion::common::internal_err;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode, TreeNodeRecursion};
use datafusion::error::Result;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::execution_plan::CardinalityEffect;
use datafusion::physical_plan::metrics::{BaselineMetrics, ExecutionPlanMetricsSet, MetricsSet, SpillMetrics};
use datafusion::physical_plan::{
    ChildrenPropertiesMode, DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, PlanProperties,
    ReplaceChildrenOptions,
};
use parking_lot::Mutex;

use super::buffer::Buffer;

/// What several leaves read.
#[derive(Debug)]
pub(super) struct SharedInput {
    id: usize,
    plan: Arc<dyn ExecutionPlan>,
    readers: AtomicUsize,
    is_shown: AtomicBool,
    executions: Mutex<Vec<Execution>>,
}

/// The buffers of one execution of the plan, by partition.
///
/// A plan may be executed more than once; each time it has another context.
struct Execution {
    context: Weak<TaskContext>,
    buffers: Vec<Option<Arc<Buffer>>>,
}

impl fmt::Debug for Execution {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Execution").finish_non_exhaustive()
    }
}

impl SharedInput {
    pub(super) fn new(id: usize, plan: Arc<dyn ExecutionPlan>) -> Self {
        Self {
            id,
            plan,
            readers: AtomicUsize::new(0),
            is_shown: AtomicBool::new(false),
            executions: Mutex::default(),
        }
    }

    /// The buffer of a partition in the execution that `context` belongs to.
    fn buffer(
        &self,
        partition: usize,
        context: &Arc<TaskContext>,
        metrics: &ExecutionPlanMetricsSet,
    ) -> Result<Arc<Buffer>> {
        let partitions = self.plan.output_partitioning().partition_count();
        if partition >= partitions {
            return internal_err!("SharedExec has {partitions} partitions, not {partition}");
        }
        let mut executions = self.executions.lock();
        executions.retain(|execution| execution.context.strong_count() > 0);
        let is_this = |execution: &Execution| std::ptr::eq(execution.context.as_ptr(), Arc::as_ptr(context));
        let position = match executions.iter().position(is_this) {
            Some(position) => position,
            None => {
                executions.push(Execution {
                    context: Arc::downgrade(context),
                    buffers: vec![None; partitions],
                });
                executions.len() - 1
            }
        };
        let Some(buffer) = executions
            .get_mut(position)
            .and_then(|execution| execution.buffers.get_mut(partition))
        else {
            return internal_err!("SharedExec lost an execution");
        };
        if let Some(known) = &*buffer {
            return Ok(Arc::clone(known));
        }
        let input = self.plan.execute(partition, Arc::clone(context))?;
        let readers = self.readers.load(Ordering::Relaxed);
        let spills = SpillMetrics::new(metrics, partition);
        let new = Buffer::new(input, readers, (partition, partitions), context, spills);
        Ok(Arc::clone(buffer.insert(Arc::new(new))))
    }
}

/// Reads what is shared.
#[derive(Debug)]
pub(super) struct SharedExec {
    input: Arc<SharedInput>,
    /// Its number among those that read the input.
    reader: usize,
    shows_input: bool,
    metrics: ExecutionPlanMetricsSet,
}

impl SharedExec {
    /// One reader more.
    pub(super) fn new(input: Arc<SharedInput>) -> Self {
        let reader = input.readers.fetch_add(1, Ordering::Relaxed);
        Self {
            input,
            reader,
            shows_input: false,
            metrics: ExecutionPlanMetricsSet::new(),
        }
    }
}

impl DisplayAs for SharedExec {
    fn fmt_as(&self, t: DisplayFormatType, f: &mut fmt::Formatter) -> fmt::Result {
        let (id, readers) = (self.input.id, self.input.readers.load(Ordering::Relaxed));
        match t {
            DisplayFormatType::Default | DisplayFormatType::Verbose => {
                write!(f, "SharedExec: id={id}, readers={readers}")
            }
            DisplayFormatType::TreeRender => {
                writeln!(f, "id={id}")?;
                writeln!(f, "readers={readers}")
            }
        }
    }
}

impl ExecutionPlan for SharedExec {
    fn name(&self) -> &'static str {
        "SharedExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        self.input.plan.properties()
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        match self.shows_input {
            true => vec![&self.input.plan],
            false => vec![],
        }
    }

    fn maintains_input_order(&self) -> Vec<bool> {
        vec![true; self.children().len()]
    }

    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false; self.children().len()]
    }

    // The input is everybody's: whatever is put in its place here, it is what runs.
    fn replace_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
        _options: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        match children.len() == self.children().len() {
            true => Ok(self),
            false => internal_err!("SharedExec has {} children", self.children().len()),
        }
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
        let buffer = self.input.buffer(partition, &context, &self.metrics)?;
        let metrics = BaselineMetrics::new(&self.metrics, partition);
        match buffer.read(self.reader, metrics) {
            Some(reader) => Ok(Box::pin(reader)),
            // It has taken its rows, and wants them again.
            None => self.input.plan.execute(partition, context),
        }
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }

    fn cardinality_effect(&self) -> CardinalityEffect {
        CardinalityEffect::Equal
    }
}

/// Shows each shared input once: below the first leaf that reads it.
///
/// It is the last rule, so that the others see leaves.
#[derive(Debug)]
pub(crate) struct ShowShared;

impl PhysicalOptimizerRule for ShowShared {
    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, _config: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        let shown = plan.transform_up(|node| {
            let Some(exec) = node
                .downcast_ref::<SharedExec>()
                .filter(|exec| !exec.input.is_shown.swap(true, Ordering::Relaxed))
            else {
                return Ok(Transformed::no(node));
            };
            let shown = SharedExec {
                input: Arc::clone(&exec.input),
                reader: exec.reader,
                shows_input: true,
                metrics: exec.metrics.clone(),
            };
            Ok(Transformed::yes(Arc::new(shown) as Arc<dyn ExecutionPlan>))
        });
        shown.data()
    }

    fn name(&self) -> &str {
        "show_shared"
    }

    fn schema_check(&self) -> bool {
        true
    }
}
