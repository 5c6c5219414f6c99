//! [`merge`]: one plan that gives the rows of two, with the columns of both.
//!
//! Copies of a CTE or of a view start as equals; then DataFusion removes from each the columns that its
//! copy is not asked for, and hoisting names columns anew.

use std::sync::Arc;

use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, DFSchema};
use datafusion::datasource::source_as_provider;
use datafusion::error::Result;
use datafusion::logical_expr::{
    Expr, Filter, Join, JoinType, Limit, LogicalPlan, Projection, Sort, SubqueryAlias, TableScan, TableScanBuilder,
    TableSource,
};

use super::calls::is_random;

/// A plan in the place of two.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) plan: LogicalPlan,
    /// Where each column of the first is now.
    pub(super) first: Vec<usize>,
    /// Where each column of the second is now.
    pub(super) second: Vec<usize>,
}

/// One plan with the rows and columns of two; none if their rows may differ.
pub(super) fn merge(first: &LogicalPlan, second: &LogicalPlan) -> Result<Option<Merged>> {
    match (first, second) {
        (LogicalPlan::TableScan(a), LogicalPlan::TableScan(b)) => scans(a, b),
        (LogicalPlan::Projection(a), LogicalPlan::Projection(b)) => projections(a, b),
        (LogicalPlan::Join(a), LogicalPlan::Join(b)) => joins(a, b),
        (LogicalPlan::SubqueryAlias(a), LogicalPlan::SubqueryAlias(b)) => above(&a.input, &b.input, |input, _, _| {
            let alias = SubqueryAlias::try_new(input, a.alias.clone())?;
            Ok(Some(LogicalPlan::SubqueryAlias(alias)))
        }),
        (LogicalPlan::Filter(a), LogicalPlan::Filter(b)) => {
            above(&a.input, &b.input, |input, first, second| {
                match both(&a.predicate, &b.predicate, first, second)? {
                    Some(predicate) => Ok(Some(LogicalPlan::Filter(Filter::try_new(predicate, input)?))),
                    None => Ok(None),
                }
            })
        }
        (LogicalPlan::Limit(a), LogicalPlan::Limit(b)) if a.skip == b.skip && a.fetch == b.fetch => {
            above(&a.input, &b.input, |input, _, _| {
                Ok(Some(LogicalPlan::Limit(Limit { input, ..a.clone() })))
            })
        }
        (LogicalPlan::Sort(a), LogicalPlan::Sort(b)) if a.fetch == b.fetch && a.expr.len() == b.expr.len() => {
            above(&a.input, &b.input, |input, first, second| {
                let mut exprs = Vec::with_capacity(a.expr.len());
                for (a, b) in a.expr.iter().zip(&b.expr) {
                    let Some(expr) = both(&a.expr, &b.expr, first, second)? else {
                        return Ok(None);
                    };
                    let is_same_order = (a.asc, a.nulls_first) == (b.asc, b.nulls_first);
                    if !is_same_order {
                        return Ok(None);
                    }
                    exprs.push(a.with_expr(expr));
                }
                Ok(Some(LogicalPlan::Sort(Sort {
                    expr: exprs,
                    input,
                    fetch: a.fetch,
                })))
            })
        }
        (a, b) => equals(a, b),
    }
}

/// From the columns of a plan to those of another that holds them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moved<'a> {
    from: &'a DFSchema,
    to: &'a DFSchema,
    positions: &'a [usize],
}

impl<'a> Moved<'a> {
    pub(super) fn new(from: &'a DFSchema, to: &'a DFSchema, positions: &'a [usize]) -> Self {
        Self { from, to, positions }
    }

    pub(super) fn column(&self, column: &Column) -> Result<Column> {
        let position = self.from.index_of_column(column)?;
        let moved = self.positions.get(position).copied().unwrap_or(position);
        Ok(Column::from(self.to.qualified_field(moved)))
    }

    pub(super) fn expr(&self, expr: &Expr) -> Result<Expr> {
        let expr = expr.clone().transform_down(|expr| match &expr {
            Expr::Column(column) => {
                let moved = Expr::Column(self.column(column)?);
                Ok(Transformed::new(moved, true, TreeNodeRecursion::Jump))
            }
            _ => Ok(Transformed::no(expr)),
        })?;
        Ok(expr.data)
    }
}

/// Nodes with the columns of their inputs, if `node` can be above both.
fn above(
    first: &LogicalPlan,
    second: &LogicalPlan,
    node: impl Fn(Arc<LogicalPlan>, Moved<'_>, Moved<'_>) -> Result<Option<LogicalPlan>>,
) -> Result<Option<Merged>> {
    let Some(inputs) = merge(first, second)? else {
        return Ok(None);
    };
    let input = Arc::new(inputs.plan);
    let plan = node(
        Arc::clone(&input),
        Moved::new(first.schema(), input.schema(), &inputs.first),
        Moved::new(second.schema(), input.schema(), &inputs.second),
    )?;
    Ok(plan.map(|plan| Merged {
        plan,
        first: inputs.first,
        second: inputs.second,
    }))
}

/// The expression that two are, where they are the same.
fn both(a: &Expr, b: &Expr, first: Moved<'_>, second: Moved<'_>) -> Result<Option<Expr>> {
    let (moved_a, moved_b) = (first.expr(a)?, second.expr(b)?);
    Ok((moved_a == moved_b && is_certain(&moved_a)? && has_same_sources(&moved_a, &moved_b)?).then_some(moved_a))
}

fn is_certain(expr: &Expr) -> Result<bool> {
    Ok(!is_random(expr)? && !expr.contains_outer())
}

fn scans(a: &TableScan, b: &TableScan) -> Result<Option<Merged>> {
    if a.table_name != b.table_name
        || a.filters != b.filters
        || a.fetch != b.fetch
        || !is_same_source(&a.source, &b.source)
    {
        return Ok(None);
    }
    let (of_a, of_b) = (projection(a), projection(b));
    let mut union: Vec<usize> = of_a.iter().chain(&of_b).copied().collect();
    union.sort_unstable();
    union.dedup();
    let positions = |columns: &[usize]| columns.iter().filter_map(|c| union.binary_search(c).ok()).collect();
    let (first, second) = (positions(&of_a), positions(&of_b));
    let scan = TableScanBuilder::from(a.clone())
        .with_projection(Some(union.clone()))
        .build()?;
    Ok(Some(Merged {
        plan: LogicalPlan::TableScan(scan),
        first,
        second,
    }))
}

/// The columns that a scan reads.
pub(super) fn projection(scan: &TableScan) -> Vec<usize> {
    match &scan.projection {
        Some(columns) => columns.clone(),
        None => (0..scan.source.schema().fields().len()).collect(),
    }
}

fn projections(a: &Projection, b: &Projection) -> Result<Option<Merged>> {
    let Some(inputs) = merge(&a.input, &b.input)? else {
        return Ok(None);
    };
    let input = Arc::new(inputs.plan);
    let first = Moved::new(a.input.schema(), input.schema(), &inputs.first);
    let second = Moved::new(b.input.schema(), input.schema(), &inputs.second);
    let mut exprs = Vec::with_capacity(a.expr.len());
    for expr in &a.expr {
        exprs.push(first.expr(expr)?);
    }
    let mut of_b = Vec::with_capacity(b.expr.len());
    for expr in &b.expr {
        let expr = second.expr(expr)?;
        let mut known = None;
        for (i, other) in exprs.iter().enumerate() {
            let (bare, other) = (expr.clone().unalias(), other.clone().unalias());
            if bare == other && has_same_sources(&bare, &other)? {
                known = Some(i);
                break;
            }
        }
        of_b.push(match known {
            Some(position) => position,
            None => {
                let taken = exprs
                    .iter()
                    .any(|other| other.qualified_name().1 == expr.qualified_name().1);
                let name = format!("__pomona_shared_{}", exprs.len());
                exprs.push(if taken { expr.unalias().alias(name) } else { expr });
                exprs.len() - 1
            }
        });
    }
    for expr in &exprs {
        if !is_certain(expr)? {
            return Ok(None);
        }
    }
    let first = (0..a.expr.len()).collect();
    Ok(Some(Merged {
        plan: LogicalPlan::Projection(Projection::try_new(exprs, input)?),
        first,
        second: of_b,
    }))
}

fn joins(a: &Join, b: &Join) -> Result<Option<Merged>> {
    let has_all_columns = matches!(
        a.join_type,
        JoinType::Inner | JoinType::Left | JoinType::Right | JoinType::Full
    );
    let is_same_join = (a.join_type, a.null_equality, a.on.len(), a.filter.is_some())
        == (b.join_type, b.null_equality, b.on.len(), b.filter.is_some());
    if !has_all_columns || !is_same_join {
        return equals(&LogicalPlan::Join(a.clone()), &LogicalPlan::Join(b.clone()));
    }
    let (Some(left), Some(right)) = (merge(&a.left, &b.left)?, merge(&a.right, &b.right)?) else {
        return Ok(None);
    };
    let (left_columns, columns) = (
        left.plan.schema().fields().len(),
        left.plan.schema().join(right.plan.schema())?,
    );
    let positions = |left: &[usize], right: &[usize]| -> Vec<usize> {
        let right = right.iter().map(|position| position + left_columns);
        left.iter().copied().chain(right).collect()
    };
    let (first, second) = (
        positions(&left.first, &right.first),
        positions(&left.second, &right.second),
    );
    let of_a = Moved::new(&a.schema, &columns, &first);
    let of_b = Moved::new(&b.schema, &columns, &second);
    let mut on = Vec::with_capacity(a.on.len());
    for ((left_a, right_a), (left_b, right_b)) in a.on.iter().zip(&b.on) {
        match (both(left_a, left_b, of_a, of_b)?, both(right_a, right_b, of_a, of_b)?) {
            (Some(left), Some(right)) => on.push((left, right)),
            _ => return Ok(None),
        }
    }
    let filter = match (&a.filter, &b.filter) {
        (Some(filter_a), Some(filter_b)) => match both(filter_a, filter_b, of_a, of_b)? {
            Some(filter) => Some(filter),
            None => return Ok(None),
        },
        _ => None,
    };
    let join = Join::try_new(
        Arc::new(left.plan),
        Arc::new(right.plan),
        on,
        filter,
        a.join_type,
        a.join_constraint,
        a.null_equality,
        a.null_aware,
    )?;
    Ok(Some(Merged {
        plan: LogicalPlan::Join(join),
        first,
        second,
    }))
}

/// Plans that are equal as they are.
fn equals(a: &LogicalPlan, b: &LogicalPlan) -> Result<Option<Merged>> {
    if a != b || sources(a)?.len() != sources(b)?.len() {
        return Ok(None);
    }
    if !sources(a)?.iter().zip(sources(b)?).all(|(a, b)| is_same_source(a, &b)) {
        return Ok(None);
    }
    let mut is_every_expr_certain = true;
    a.apply_with_subqueries(|node| {
        node.apply_expressions(|expr| {
            is_every_expr_certain &= is_certain(expr)?;
            Ok(TreeNodeRecursion::Continue)
        })
    })?;
    let same: Vec<usize> = (0..a.schema().fields().len()).collect();
    Ok(is_every_expr_certain.then(|| Merged {
        plan: a.clone(),
        first: same.clone(),
        second: same,
    }))
}

/// Plans are equal if their tables have the same names. These are the tables.
fn sources(plan: &LogicalPlan) -> Result<Vec<Arc<dyn TableSource>>> {
    let mut sources = vec![];
    plan.apply_with_subqueries(|node| {
        if let LogicalPlan::TableScan(scan) = node {
            sources.push(Arc::clone(&scan.source));
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(sources)
}

/// Whether equal expressions read the same tables in their subqueries.
fn has_same_sources(a: &Expr, b: &Expr) -> Result<bool> {
    let of_expr = |expr: &Expr| -> Result<Vec<Arc<dyn TableSource>>> {
        let mut found = vec![];
        expr.apply(|expr| {
            let subquery = match expr {
                Expr::ScalarSubquery(subquery) => subquery,
                Expr::Exists(exists) => &exists.subquery,
                Expr::InSubquery(in_subquery) => &in_subquery.subquery,
                Expr::SetComparison(comparison) => &comparison.subquery,
                _ => return Ok(TreeNodeRecursion::Continue),
            };
            found.extend(sources(&subquery.subquery)?);
            Ok(TreeNodeRecursion::Continue)
        })?;
        Ok(found)
    };
    let (of_a, of_b) = (of_expr(a)?, of_expr(b)?);
    Ok(of_a.len() == of_b.len() && of_a.iter().zip(&of_b).all(|(a, b)| is_same_source(a, b)))
}

fn is_same_source(a: &Arc<dyn TableSource>, b: &Arc<dyn TableSource>) -> bool {
    Arc::ptr_eq(a, b)
        || match (source_as_provider(a), source_as_provider(b)) {
            (Ok(a), Ok(b)) => Arc::ptr_eq(&a, &b),
            _ => false,
        }
}
