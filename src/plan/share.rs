//! [`SharingPlanner`]: copies of a subplan that run a network over the same rows read one computation.
//!
//! DataFusion inlines a CTE, a view and a subquery wherever they are named. Each projection that runs a
//! network is split in two: what it computes from the vectors stays, and the vectors come from a leaf,
//! `Shared`, which all projections over the same rows have in common.
//!
//! ```text
//! Projection: path, pca_transform(embed(content), <subquery>)     Projection: path, pca_transform(_, <subquery>)
//!   TableScan: path, content                                        Shared 0
//! subquery:                                                       subquery:
//!   Aggregate: pca_fit(_1, 5)                                       Aggregate: pca_fit(_1, 5)
//!     Projection: embed(content) AS _1                                Projection: _ AS _1
//!       TableScan: content                                              Shared 0
//!                                                                 Shared 0:
//!                                                                   Projection: path, embed(content)
//!                                                                     TableScan: path, content
//! ```
//!
//! What only renames columns between a projection and its rows, an alias or a projection of columns, is left
//! out of what is shared.
//!
//! Where copies read different rows, because filters were moved below their projections, they share the rows
//! that any of them wants, and each filters them, unless something of the query ends early.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use datafusion::catalog::Session;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, DFSchemaRef, internal_datafusion_err};
use datafusion::error::Result;
use datafusion::execution::context::QueryPlanner;
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::utils::{conjunction, disjunction, split_conjunction};
use datafusion::logical_expr::{
    Expr, Extension, Filter, LogicalPlan, Projection, TableProviderFilterPushDown, TableScan, TableScanBuilder,
    UserDefinedLogicalNode, UserDefinedLogicalNodeCore,
};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_planner::{DefaultPhysicalPlanner, ExtensionPlanner, PhysicalPlanner};

use super::calls::{Calls, is_random, named, plan_runs_network, replace, runs_network, stop_if, unaliased};
use super::exec::{SharedExec, SharedInput};
use super::merge::{Moved, merge, projection};

/// DataFusion's planner, which plans what a query shares once.
#[derive(Debug)]
pub(crate) struct SharingPlanner;

#[async_trait]
impl QueryPlanner for SharingPlanner {
    async fn create_physical_plan(
        &self,
        logical_plan: &LogicalPlan,
        session: &dyn Session,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        if !plan_runs_network(logical_plan)? {
            return DefaultPhysicalPlanner::default()
                .create_physical_plan(logical_plan, session)
                .await;
        }
        let (plan, shared) = share(logical_plan.clone())?;
        let mut inputs: Vec<Arc<SharedInput>> = Vec::with_capacity(shared.len());
        for (id, input) in shared.iter().enumerate() {
            // What is shared may read what was found before.
            let input = planner(&inputs).create_physical_plan(input, session).await?;
            inputs.push(Arc::new(SharedInput::new(id, input)));
        }
        planner(&inputs).create_physical_plan(&plan, session).await
    }
}

fn planner(inputs: &[Arc<SharedInput>]) -> DefaultPhysicalPlanner {
    DefaultPhysicalPlanner::with_extension_planners(vec![Arc::new(SharedPlanner(inputs.to_vec()))])
}

/// Plans [`Shared`].
struct SharedPlanner(Vec<Arc<SharedInput>>);

#[async_trait]
impl ExtensionPlanner for SharedPlanner {
    async fn plan_extension(
        &self,
        _planner: &dyn PhysicalPlanner,
        node: &dyn UserDefinedLogicalNode,
        _logical_inputs: &[&LogicalPlan],
        _physical_inputs: &[Arc<dyn ExecutionPlan>],
        _session: &dyn Session,
        _planning_ctx: &PhysicalPlanningContext,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let Some(node) = node.as_any().downcast_ref::<Shared>() else {
            return Ok(None);
        };
        let input = self.0.get(node.id);
        Ok(input.map(|input| Arc::new(SharedExec::new(Arc::clone(input))) as Arc<dyn ExecutionPlan>))
    }
}

/// A place in a plan that reads what is shared.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Shared {
    id: usize,
    /// The computations that it stands for: see [`depth`].
    depth: usize,
    schema: DFSchemaRef,
}

impl PartialOrd for Shared {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        (self == other).then_some(Ordering::Equal)
    }
}

impl UserDefinedLogicalNodeCore for Shared {
    fn name(&self) -> &str {
        "Shared"
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![]
    }

    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }

    fn expressions(&self) -> Vec<Expr> {
        vec![]
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Shared: id={}", self.id)
    }

    fn with_exprs_and_inputs(&self, _exprs: Vec<Expr>, _inputs: Vec<LogicalPlan>) -> Result<Self> {
        Ok(self.clone())
    }
}

/// A plan with [`Shared`] leaves, and what they read, in the order of their ids.
fn share(mut plan: LogicalPlan) -> Result<(LogicalPlan, Vec<LogicalPlan>)> {
    let mut shared = vec![];
    // The iterations of a recursive query reset what they run.
    if contains(
        &plan,
        |node| matches!(node, LogicalPlan::RecursiveQuery(_)),
        |_| Ok(false),
    )? {
        return Ok((plan, shared));
    }
    // A part that ends early would read rows of the others before its own.
    let is_limited = contains(&plan, |node| matches!(node, LogicalPlan::Limit(_)), is_computation)?;
    // From the inside to the outside: the inputs of computations are compared, and may hold others.
    for level in 0..depth(&plan)? {
        let mut computations = vec![];
        plan = at_level(plan, level, |projection| {
            computations.push(Computation::try_new(&projection)?);
            Ok(LogicalPlan::Projection(projection))
        })?;
        if !is_limited {
            widen(&mut computations)?;
        }
        let mut leaves: Vec<Option<Leaf>> = vec![None; computations.len()];
        for group in group(&computations)? {
            if group.members.len() > 1 {
                let (id, depth) = (shared.len(), level + 1);
                shared.push(group.split(&computations, id, depth, &mut leaves)?);
            }
        }
        let mut rest = leaves.into_iter().zip(&computations);
        plan = at_level(plan, level, |projection| match rest.next() {
            Some((Some(leaf), computation)) => leaf.read(&projection, computation),
            _ => Ok(LogicalPlan::Projection(projection)),
        })?;
    }
    Ok((plan, shared))
}

/// Whether there is such a node that is not below one where the search ends.
fn contains(
    plan: &LogicalPlan,
    is_one: impl Fn(&LogicalPlan) -> bool,
    ends_at: impl Fn(&LogicalPlan) -> Result<bool>,
) -> Result<bool> {
    let mut found = false;
    plan.apply_with_subqueries(|node| {
        found |= is_one(node);
        Ok(match !found && ends_at(node)? {
            true => TreeNodeRecursion::Jump,
            false => stop_if(found),
        })
    })?;
    Ok(found)
}

fn is_computation(plan: &LogicalPlan) -> Result<bool> {
    match plan {
        LogicalPlan::Projection(node) => Ok(!sure_calls(&node.expr)?.is_empty()),
        _ => Ok(false),
    }
}

/// What the expressions of a projection call for each row, and not once for all.
fn sure_calls(exprs: &[Expr]) -> Result<Vec<Expr>> {
    let calls = Calls::of(exprs)?;
    let sure = calls
        .iter()
        .filter(|call| call.sure && !call.expr.column_refs().is_empty());
    Ok(sure.map(|call| call.expr.clone()).collect())
}

/// How many computations there are from a plan down to its leaves, at most.
fn depth(plan: &LogicalPlan) -> Result<usize> {
    let mut deepest = 0;
    plan.apply_subqueries(|subquery| {
        deepest = deepest.max(depth(subquery)?);
        Ok(TreeNodeRecursion::Continue)
    })?;
    plan.apply_children(|child| {
        deepest = deepest.max(depth(child)?);
        Ok(TreeNodeRecursion::Continue)
    })?;
    if let LogicalPlan::Extension(leaf) = plan
        && let Some(shared) = leaf.node.as_any().downcast_ref::<Shared>()
    {
        return Ok(shared.depth);
    }
    Ok(deepest + usize::from(is_computation(plan)?))
}

/// `plan` with other projections in the place of those that run a network and that have `level`
/// computations below them.
fn at_level(
    plan: LogicalPlan,
    level: usize,
    mut f: impl FnMut(Projection) -> Result<LogicalPlan>,
) -> Result<LogicalPlan> {
    let plan = plan.transform_up_with_subqueries(|node| {
        if !is_computation(&node)? {
            return Ok(Transformed::no(node));
        }
        match node {
            LogicalPlan::Projection(node) if depth(&node.input)? == level => Ok(Transformed::yes(f(node)?)),
            node => Ok(Transformed::no(node)),
        }
    })?;
    Ok(plan.data)
}

/// The expressions of a projection over its rows, and the rows, without the nodes between them that only
/// rename columns: filters that DataFusion moved below those differ from copy to copy.
fn unnamed(node: &Projection) -> Result<(Vec<Expr>, LogicalPlan)> {
    let mut exprs = node.expr.clone();
    let mut predicates: Vec<Expr> = vec![];
    let mut input = &node.input;
    loop {
        if let LogicalPlan::Filter(filter) = input.as_ref() {
            predicates.push(filter.predicate.clone());
            input = &filter.input;
        } else if let Some((below, positions)) = renamed(input) {
            let moved = Moved::new(input.schema(), below.schema(), &positions);
            for expr in exprs.iter_mut().chain(&mut predicates) {
                *expr = moved.expr(expr)?;
            }
            input = below;
        } else {
            break;
        }
    }
    let mut rows = input.as_ref().clone();
    for predicate in predicates.into_iter().rev() {
        rows = LogicalPlan::Filter(Filter::try_new(predicate, Arc::new(rows))?);
    }
    Ok((exprs, rows))
}

/// The input of a node that only renames columns, and where in it each column of the node is.
fn renamed(plan: &LogicalPlan) -> Option<(&Arc<LogicalPlan>, Vec<usize>)> {
    match plan {
        LogicalPlan::SubqueryAlias(node) => Some((&node.input, (0..node.schema.fields().len()).collect())),
        LogicalPlan::Projection(node) => {
            let columns = node.expr.iter().map(|expr| match unaliased(expr) {
                Expr::Column(column) => node.input.schema().maybe_index_of_column(column),
                _ => None,
            });
            Some((&node.input, columns.collect::<Option<Vec<_>>>()?))
        }
        _ => None,
    }
}

/// A projection that runs a network.
#[derive(Debug)]
struct Computation {
    /// Its rows: see [`unnamed`].
    input: LogicalPlan,
    /// What it calls for each row.
    calls: Vec<Expr>,
    /// The columns that its other expressions read.
    columns: Vec<Column>,
    /// What is true of its rows and not of all that are shared.
    residual: Option<Expr>,
}

impl Computation {
    fn try_new(node: &Projection) -> Result<Self> {
        let (exprs, input) = unnamed(node)?;
        let calls = sure_calls(&exprs)?;
        let mut columns = vec![];
        for expr in &exprs {
            collect_columns(expr, &calls, &mut columns)?;
        }
        Ok(Self {
            input,
            calls,
            columns,
            residual: None,
        })
    }
}

/// The columns that `expr` reads besides those that `calls` do.
fn collect_columns(expr: &Expr, calls: &[Expr], columns: &mut Vec<Column>) -> Result<()> {
    expr.apply(|expr| {
        if calls.contains(expr) {
            return Ok(TreeNodeRecursion::Jump);
        }
        if let Expr::Column(column) = expr
            && !columns.contains(column)
        {
            columns.push(column.clone());
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(())
}

/// The rows of a computation: those of `base` of which all `conjuncts` are true.
struct Rows {
    base: LogicalPlan,
    conjuncts: Vec<Expr>,
}

impl Rows {
    fn of(input: &LogicalPlan) -> Result<Self> {
        let mut conjuncts: Vec<Expr> = vec![];
        let mut add = |expr: &Expr| {
            if !conjuncts.contains(expr) {
                conjuncts.push(expr.clone());
            }
        };
        let mut base = input;
        while let LogicalPlan::Filter(filter) = base {
            let runs_network = filter.predicate.exists(|expr| Ok(runs_network(expr)))?;
            if is_random(&filter.predicate)? || runs_network || contains_subquery(&filter.predicate)? {
                break;
            }
            split_conjunction(&filter.predicate).into_iter().for_each(&mut add);
            base = filter.input.as_ref();
        }
        let base = match base {
            // A limit counts the rows that pass the filters, and ends early: it stays as it is.
            LogicalPlan::TableScan(scan) if scan.fetch.is_none() => {
                scan.filters.iter().for_each(&mut add);
                let columns = columns_for(scan, &scan.filters)?;
                let scan = TableScanBuilder::from(scan.clone())
                    .with_filters(vec![])
                    .with_projection(Some(columns));
                LogicalPlan::TableScan(scan.build()?)
            }
            base => base.clone(),
        };
        Ok(Self { base, conjuncts })
    }

    /// These rows without their conjuncts, but with others; none if those read a column that is not there.
    fn with(&self, conjuncts: &[Expr]) -> Result<Option<LogicalPlan>> {
        let mut left = vec![];
        let base = match &self.base {
            LogicalPlan::TableScan(scan) if scan.fetch.is_none() => {
                let offered: Vec<&Expr> = conjuncts.iter().collect();
                let supported = scan.source.supports_filters_pushdown(&offered)?;
                let mut filters = vec![];
                for (conjunct, support) in conjuncts.iter().zip(supported) {
                    if support != TableProviderFilterPushDown::Unsupported {
                        filters.push(conjunct.clone());
                    }
                    if support != TableProviderFilterPushDown::Exact {
                        left.push(conjunct.clone());
                    }
                }
                let columns = columns_for(scan, &left)?;
                let scan = TableScanBuilder::from(scan.clone())
                    .with_filters(filters)
                    .with_projection(Some(columns));
                LogicalPlan::TableScan(scan.build()?)
            }
            base => {
                left.extend_from_slice(conjuncts);
                base.clone()
            }
        };
        let is_there = |column: &Column| base.schema().has_column(column);
        if !left.iter().flat_map(Expr::column_refs).all(is_there) {
            return Ok(None);
        }
        Ok(Some(match conjunction(left) {
            Some(predicate) => LogicalPlan::Filter(Filter::try_new(predicate, Arc::new(base))?),
            None => base,
        }))
    }
}

/// The columns that a scan reads, and those that `exprs` do.
fn columns_for(scan: &TableScan, exprs: &[Expr]) -> Result<Vec<usize>> {
    let mut columns = projection(scan);
    for column in exprs.iter().flat_map(Expr::column_refs) {
        columns.push(scan.source.schema().index_of(&column.name)?);
    }
    columns.sort_unstable();
    columns.dedup();
    Ok(columns)
}

fn contains_subquery(expr: &Expr) -> Result<bool> {
    expr.exists(|expr| {
        Ok(matches!(
            expr,
            Expr::ScalarSubquery(_) | Expr::Exists(_) | Expr::InSubquery(_) | Expr::SetComparison(_)
        ))
    })
}

/// Filters of computations that make the same call over rows of one table are moved above the call: what
/// they share are the rows that any of them wants.
fn widen(computations: &mut [Computation]) -> Result<()> {
    let rows = computations
        .iter()
        .map(|computation| Rows::of(&computation.input))
        .collect::<Result<Vec<_>>>()?;
    let mut clusters: Vec<Vec<usize>> = vec![];
    'computations: for (i, (its_rows, computation)) in rows.iter().zip(computations.iter()).enumerate() {
        for cluster in &mut clusters {
            let Some((first, other)) = cluster
                .first()
                .and_then(|first| rows.get(*first).zip(computations.get(*first)))
            else {
                continue;
            };
            let is_common = computation.calls.iter().any(|call| other.calls.contains(call));
            if is_common && merge(&first.base, &its_rows.base)?.is_some() {
                cluster.push(i);
                continue 'computations;
            }
        }
        clusters.push(vec![i]);
    }
    for cluster in clusters {
        let members: Vec<&Rows> = cluster.iter().filter_map(|i| rows.get(*i)).collect();
        let is_common = |conjunct: &Expr| members.iter().all(|rows| rows.conjuncts.contains(conjunct));
        let residuals: Vec<Option<Expr>> = members
            .iter()
            .map(|rows| conjunction(rows.conjuncts.iter().filter(|conjunct| !is_common(conjunct)).cloned()))
            .collect();
        if residuals.iter().all(Option::is_none) {
            continue;
        }
        let mut conjuncts: Vec<Expr> = members
            .first()
            .map(|rows| {
                rows.conjuncts
                    .iter()
                    .filter(|conjunct| is_common(conjunct))
                    .cloned()
                    .collect()
            })
            .unwrap_or_default();
        // One that wants all rows has no residual.
        let any = residuals.iter().cloned().collect::<Option<Vec<_>>>();
        conjuncts.extend(any.and_then(disjunction));
        let inputs = members.iter().map(|rows| rows.with(&conjuncts));
        let Some(inputs) = inputs.collect::<Result<Option<Vec<_>>>>()? else {
            continue;
        };
        for ((i, input), residual) in cluster.iter().zip(inputs).zip(residuals) {
            let Some(computation) = computations.get_mut(*i) else {
                continue;
            };
            computation.input = input;
            if let Some(residual) = &residual {
                collect_columns(residual, &[], &mut computation.columns)?;
            }
            computation.residual = residual;
        }
    }
    Ok(())
}

/// Computations over the same rows that have a call in common.
struct Group {
    /// Their input.
    input: LogicalPlan,
    /// All their calls, over the input.
    calls: Vec<Expr>,
    /// Each computation, and where the columns of its own input are in the common one.
    members: Vec<(usize, Vec<usize>)>,
}

fn group(computations: &[Computation]) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = vec![];
    'computations: for (i, computation) in computations.iter().enumerate() {
        for group in &mut groups {
            if group.take(i, computation)? {
                continue 'computations;
            }
        }
        groups.push(Group {
            input: computation.input.clone(),
            calls: computation.calls.clone(),
            members: vec![(i, (0..computation.input.schema().fields().len()).collect())],
        });
    }
    Ok(groups)
}

impl Group {
    /// Whether the computation is one of this group. If so, it is from now on.
    fn take(&mut self, i: usize, computation: &Computation) -> Result<bool> {
        let Some(merged) = merge(&self.input, &computation.input)? else {
            return Ok(false);
        };
        let ours = Moved::new(self.input.schema(), merged.plan.schema(), &merged.first);
        let mut calls = self
            .calls
            .iter()
            .map(|call| ours.expr(call))
            .collect::<Result<Vec<_>>>()?;
        let theirs = Moved::new(computation.input.schema(), merged.plan.schema(), &merged.second);
        let mut is_common = false;
        for call in &computation.calls {
            let call = theirs.expr(call)?;
            match calls.contains(&call) {
                true => is_common = true,
                false => calls.push(call),
            }
        }
        if !is_common {
            return Ok(false);
        }
        for (_, positions) in &mut self.members {
            for position in positions {
                *position = merged.first.get(*position).copied().unwrap_or(*position);
            }
        }
        self.members.push((i, merged.second));
        self.calls = calls;
        self.input = merged.plan;
        Ok(true)
    }

    /// What the members share, and a leaf for each of them.
    fn split(
        self,
        computations: &[Computation],
        id: usize,
        depth: usize,
        leaves: &mut [Option<Leaf>],
    ) -> Result<LogicalPlan> {
        let mut outputs: Vec<Expr> = vec![];
        let mut reads = vec![];
        for (i, positions) in &self.members {
            let computation = computations
                .get(*i)
                .ok_or_else(|| internal_datafusion_err!("a group of computations that are not there"))?;
            let moved = Moved::new(computation.input.schema(), self.input.schema(), positions);
            let columns = computation.columns.iter().cloned().map(Expr::Column);
            let mut read = vec![];
            for expr in computation.calls.iter().cloned().chain(columns) {
                let output = moved.expr(&expr)?;
                let position = outputs.iter().position(|known| *known == output).unwrap_or_else(|| {
                    outputs.push(output);
                    outputs.len() - 1
                });
                read.push((expr, position));
            }
            reads.push((*i, read));
        }
        let plan = Projection::try_new(outputs, Arc::new(self.input))?;
        for (i, read) in reads {
            let columns = read
                .into_iter()
                .map(|(expr, position)| (expr, Column::from(plan.schema.qualified_field(position))))
                .collect();
            if let Some(leaf) = leaves.get_mut(i) {
                *leaf = Some(Leaf {
                    shared: Shared {
                        id,
                        depth,
                        schema: Arc::clone(&plan.schema),
                    },
                    columns,
                });
            }
        }
        Ok(LogicalPlan::Projection(plan))
    }
}

/// What a computation reads in the place of its input.
#[derive(Debug, Clone)]
struct Leaf {
    shared: Shared,
    /// The columns that hold its calls, and the columns that it read.
    columns: Vec<(Expr, Column)>,
}

impl Leaf {
    /// The computation without its calls, over the leaf.
    fn read(self, node: &Projection, computation: &Computation) -> Result<LogicalPlan> {
        let column_of = |expr: &Expr| {
            let known = self.columns.iter().find(|(known, _)| known == expr);
            known.map(|(_, column)| column.clone())
        };
        let mut input = LogicalPlan::Extension(Extension {
            node: Arc::new(self.shared.clone()),
        });
        if let Some(residual) = &computation.residual {
            let predicate = replace(residual.clone(), column_of)?.data;
            input = LogicalPlan::Filter(Filter::try_new(predicate, Arc::new(input))?);
        }
        let (over_rows, _) = unnamed(node)?;
        let mut exprs = Vec::with_capacity(over_rows.len());
        for (expr, (qualifier, field)) in over_rows.into_iter().zip(node.schema.iter()) {
            let expr = replace(expr, column_of)?.data;
            exprs.push(named(expr, (qualifier, field.name().as_str())));
        }
        Ok(LogicalPlan::Projection(Projection::try_new(exprs, Arc::new(input))?))
    }
}
