//! [`HoistNetworks`]: a call of a network becomes a column, computed once, below all that use it.
//!
//! ```text
//! Projection: embed(content) AS v                    Projection: _1 AS v
//!   Sort: distance(embed(content), x)                  Sort: distance(_1, x)
//!     Filter: distance(embed(content), x) < 0.2          Filter: distance(_1, x) < 0.2
//!       TableScan: path, content                           Projection: path, content, embed(content) AS _1
//!                                                            TableScan: path, content
//! ```
//!
//! The rule runs after DataFusion's own, which move filters to where they belong and copy expressions on
//! the way, and again in each pass of the optimizer; a plan that is in this form stays as it is.

use std::sync::Arc;

use datafusion::common::alias::AliasGenerator;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, DFSchema};
use datafusion::error::Result;
use datafusion::logical_expr::expr_fn::scalar_subquery;
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::{
    Aggregate, Expr, Join, JoinType, LogicalPlan, LogicalPlanBuilder, Projection, Sort, SortExpr, SubqueryAlias,
};
use datafusion::optimizer::{OptimizerConfig, OptimizerRule};

use super::calls::{Call, Calls, named, plan_runs_network, replace, runs_network, unaliased};

/// What computed columns are called.
const PREFIX: &str = "__pomona_embed";

/// A sort that finds the first rows before they are computed holds their contents, and cannot spill: beyond
/// so many, computing the others costs less than memory that may not be there.
const MOST_FIRST: usize = 1024;

/// The optimizer rule.
#[derive(Debug)]
pub(crate) struct HoistNetworks;

impl OptimizerRule for HoistNetworks {
    fn name(&self) -> &str {
        "hoist_networks"
    }

    fn rewrite(&self, plan: LogicalPlan, config: &dyn OptimizerConfig) -> Result<Transformed<LogicalPlan>> {
        if !plan_runs_network(&plan)? {
            return Ok(Transformed::no(plan));
        }
        let mut hoist = Hoist {
            names: config.alias_generator(),
            is_alone: computations(&plan)? == 1,
            changed: false,
        };
        let plan = hoist.alone(plan)?;
        Ok(Transformed::new_transformed(plan.data, hoist.changed))
    }
}

/// How many projections of a plan and of its subqueries run a network.
fn computations(plan: &LogicalPlan) -> Result<usize> {
    let mut count = 0;
    plan.apply_with_subqueries(|node| {
        if let LogicalPlan::Projection(node) = node
            && !Calls::of(&node.expr)?.is_empty()
        {
            count += 1;
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(count)
}

struct Hoist<'a> {
    names: &'a AliasGenerator,
    /// Nobody could share what is computed.
    is_alone: bool,
    changed: bool,
}

/// A plan, and for each call that it was asked for the column that holds its result, if it has one.
type Visited = (LogicalPlan, Vec<Option<Column>>);

impl Hoist<'_> {
    /// A plan whose parent asks for nothing, with the columns that it had.
    fn alone(&mut self, plan: LogicalPlan) -> Result<Transformed<LogicalPlan>> {
        let (plan, _) = self.visit(plan, &Calls::default())?;
        Ok(Transformed::yes(plan))
    }

    /// A plan whose parent makes the calls `asked`, over its columns, and would rather have their results.
    ///
    /// All columns that the plan had are there. If it was asked for anything there may be more.
    fn visit(&mut self, plan: LogicalPlan, asked: &Calls) -> Result<Visited> {
        let plan = plan.map_subqueries(|subquery| self.alone(subquery))?.data;
        let plan = self.without_constants(plan)?;
        let plan = self.after_top(plan)?;
        let columns = plan.schema().columns();
        let (plan, found) = match plan {
            LogicalPlan::Projection(node) => self.projection(node, asked)?,
            LogicalPlan::SubqueryAlias(node) => self.subquery_alias(node, asked)?,
            LogicalPlan::Join(node) => self.join(node, asked)?,
            LogicalPlan::Aggregate(node) => (self.aggregate(node)?, none(asked)),
            node @ (LogicalPlan::Filter(_) | LogicalPlan::Sort(_) | LogicalPlan::Limit(_) | LogicalPlan::Window(_)) => {
                self.unary(node, asked)?
            }
            node => self.barrier(node, asked)?,
        };
        if !asked.is_empty() || plan.schema().columns() == columns {
            return Ok((plan, found));
        }
        let exprs = columns.into_iter().map(Expr::Column).collect();
        Ok((project(exprs, plan)?, found))
    }

    /// A node that nothing passes.
    fn barrier(&mut self, node: LogicalPlan, asked: &Calls) -> Result<Visited> {
        let node = node.map_children(|child| self.alone(child))?.data;
        Ok((node, none(asked)))
    }

    /// Calls that read no column would run once per batch: a scalar subquery runs once.
    fn without_constants(&mut self, plan: LogicalPlan) -> Result<LogicalPlan> {
        let is_evaluated_per_batch = match &plan {
            LogicalPlan::Projection(node) => !matches!(node.input.as_ref(), LogicalPlan::EmptyRelation(_)),
            LogicalPlan::Filter(_) | LogicalPlan::Sort(_) | LogicalPlan::Join(_) | LogicalPlan::Aggregate(_) => true,
            _ => false,
        };
        if !is_evaluated_per_batch {
            return Ok(plan);
        }
        let names = NamePreserver::new(&plan);
        let plan = plan.map_expressions(|expr| {
            let name = names.save(&expr);
            let expr = expr.transform_down(|expr| {
                if !runs_network(&expr) || !expr.column_refs().is_empty() || expr.contains_outer() {
                    return Ok(Transformed::no(expr));
                }
                let once = LogicalPlanBuilder::empty(true).project([expr])?.build()?;
                let once = scalar_subquery(Arc::new(once));
                Ok(Transformed::new(once, true, TreeNodeRecursion::Jump))
            })?;
            self.changed |= expr.transformed;
            Ok(expr.update_data(|expr| name.restore(expr)))
        })?;
        Ok(plan.data)
    }

    /// The first rows of a sorted table are found before they are computed, if the order allows.
    ///
    /// They are sorted above too: DataFusion computes in several partitions, and merges those by an order that
    /// is wanted there. Where rows arrive in order, that sort costs nothing.
    fn after_top(&mut self, plan: LogicalPlan) -> Result<LogicalPlan> {
        let LogicalPlan::Sort(sort) = &plan else {
            return Ok(plan);
        };
        let leaves_out = |fetch: usize| fetch <= MOST_FIRST && sort.input.max_rows().is_none_or(|rows| rows > fetch);
        if !self.is_alone || !sort.fetch.is_some_and(leaves_out) {
            return Ok(plan);
        }
        let Some(input) = find_first(&sort.input, &sort.expr, sort.fetch)? else {
            return Ok(plan);
        };
        self.changed = true;
        Ok(LogicalPlan::Sort(Sort {
            input: Arc::new(input),
            ..sort.clone()
        }))
    }

    fn projection(&mut self, node: Projection, asked: &Calls) -> Result<Visited> {
        enum Place {
            Nowhere,
            Output(usize),
            Below(usize),
        }

        let mut calls = Calls::of(&node.expr)?;
        if calls.is_empty() && asked.is_empty() {
            return self.barrier(LogicalPlan::Projection(node), asked);
        }
        let own = calls.len();
        let mut places = Vec::with_capacity(asked.len());
        for call in asked.iter() {
            places.push(match below(call, &node.schema, &node.expr)? {
                None => Place::Nowhere,
                Some(call) => match node.expr.iter().position(|expr| *unaliased(expr) == call.expr) {
                    Some(output) => Place::Output(output),
                    None => Place::Below(calls.add(call)),
                },
            });
        }

        let (input, mut columns) = self.visit(Arc::unwrap_or_clone(node.input), &calls)?;
        let input = self.compute(input, &calls, &mut columns, |i, call| {
            i < own && call.sure && call.uses > 1
        })?;
        let mut exprs = Vec::with_capacity(node.expr.len());
        for (expr, (qualifier, field)) in node.expr.into_iter().zip(node.schema.iter()) {
            let expr = self.substitute(expr, &calls, &columns)?;
            exprs.push(named(expr, (qualifier, field.name().as_str())));
        }
        let mut found = Vec::with_capacity(places.len());
        for place in places {
            found.push(match place {
                Place::Nowhere => None,
                Place::Output(output) => Some(Column::from(node.schema.qualified_field(output))),
                Place::Below(i) => columns
                    .get(i)
                    .cloned()
                    .flatten()
                    .map(|column| self.pass(column, &mut exprs)),
            });
        }
        Ok((project(exprs, input)?, found))
    }

    fn subquery_alias(&mut self, node: SubqueryAlias, asked: &Calls) -> Result<Visited> {
        let inner: Vec<Expr> = node.input.schema().columns().into_iter().map(Expr::Column).collect();
        let mut calls = Calls::default();
        let mut places = Vec::with_capacity(asked.len());
        for call in asked.iter() {
            places.push(below(call, &node.schema, &inner)?.map(|call| calls.add(call)));
        }
        if calls.is_empty() {
            return self.barrier(LogicalPlan::SubqueryAlias(node), asked);
        }
        let (input, columns) = self.visit(Arc::unwrap_or_clone(node.input), &calls)?;
        let input = Arc::new(input);
        let node = SubqueryAlias::try_new(Arc::clone(&input), node.alias)?;
        let outer = |column: &Column| {
            let position = input.schema().maybe_index_of_column(column)?;
            Some(Column::from(node.schema.qualified_field(position)))
        };
        let found = places
            .into_iter()
            .map(|place| columns.get(place?)?.as_ref().and_then(outer))
            .collect();
        Ok((LogicalPlan::SubqueryAlias(node), found))
    }

    /// A node that hands on all columns of its input.
    fn unary(&mut self, node: LogicalPlan, asked: &Calls) -> Result<Visited> {
        let mut calls = match &node {
            LogicalPlan::Filter(filter) => Calls::of_predicate(&filter.predicate)?,
            node => Calls::of(&node.expressions())?,
        };
        let own = calls.len();
        // A window's own columns are not its input's.
        let Some(input) = node.inputs().first().map(|input| (*input).clone()) else {
            return self.barrier(node, asked);
        };
        let passed = input.schema().columns();
        // Below them there may be rows that they leave out.
        let stops = match &node {
            LogicalPlan::Limit(_) => true,
            LogicalPlan::Sort(sort) => sort.fetch.is_some(),
            _ => false,
        };
        let mut places = Vec::with_capacity(asked.len());
        for call in asked.iter() {
            let passes = call
                .expr
                .column_refs()
                .into_iter()
                .all(|column| passed.contains(column));
            places.push(passes.then(|| {
                calls.add(Call {
                    sure: call.sure && !stops,
                    ..call.clone()
                })
            }));
        }
        if calls.is_empty() {
            return self.barrier(node, asked);
        }

        let (input, mut columns) = self.visit(input, &calls)?;
        let input = self.compute(input, &calls, &mut columns, |i, call| i < own && call.sure)?;
        let names = NamePreserver::new(&node);
        let mut exprs = vec![];
        for expr in node.expressions() {
            let name = names.save(&expr);
            let expr = self.substitute(expr, &calls, &columns)?;
            exprs.push(match &node {
                LogicalPlan::Window(_) => name.restore(expr),
                _ => expr,
            });
        }
        let found = places
            .into_iter()
            .map(|place| columns.get(place?).cloned().flatten())
            .collect();
        Ok((node.with_new_exprs(exprs, vec![input])?, found))
    }

    /// A join's conditions run for each pair: what they call is computed on the side that it reads.
    ///
    /// What is called above a join stays there, for the rows that are left, unless that is for each pair too.
    fn join(&mut self, node: Join, asked: &Calls) -> Result<Visited> {
        let mut calls = Calls::of(node.on.iter().flat_map(|(left, right)| [left, right]))?;
        if let Some(filter) = &node.filter {
            for call in Calls::of_predicate(filter)?.iter() {
                calls.add(call.clone());
            }
        }
        let own = calls.len();
        let mut places = Vec::with_capacity(asked.len());
        for call in asked.iter() {
            let is_preserved = match side(call, &node) {
                Some(Side::Left) => !matches!(node.join_type, JoinType::Right | JoinType::Full),
                Some(Side::Right) => !matches!(node.join_type, JoinType::Left | JoinType::Full),
                None => false,
            };
            places.push(is_preserved.then(|| calls.add(call.clone())));
        }
        if calls.is_empty() {
            return self.barrier(LogicalPlan::Join(node), asked);
        }

        let (mut left_calls, mut right_calls) = (Calls::default(), Calls::default());
        let sides: Vec<Option<(Side, usize)>> = calls
            .iter()
            .map(|call| {
                Some(match side(call, &node)? {
                    Side::Left => (Side::Left, left_calls.add(call.clone())),
                    Side::Right => (Side::Right, right_calls.add(call.clone())),
                })
            })
            .collect();
        let both = left_calls.iter().any(|call| call.sure) && right_calls.iter().any(|call| call.sure);
        let for_each_pair = node.join_type == JoinType::Inner && (both || node.on.is_empty());
        let goes_down = |wanted: Side| {
            let here = sides.clone();
            move |i: usize, call: &Call| {
                let is_own = here.iter().take(own).any(|place| *place == Some((wanted, i)));
                is_own || for_each_pair && call.sure
            }
        };

        let (left, mut left_columns) = self.visit(Arc::unwrap_or_clone(node.left), &left_calls)?;
        let left = self.compute(left, &left_calls, &mut left_columns, goes_down(Side::Left))?;
        let (right, mut right_columns) = self.visit(Arc::unwrap_or_clone(node.right), &right_calls)?;
        let right = self.compute(right, &right_calls, &mut right_columns, goes_down(Side::Right))?;
        let columns: Vec<Option<Column>> = sides
            .iter()
            .map(|place| match *place {
                Some((Side::Left, i)) => left_columns.get(i).cloned().flatten(),
                Some((Side::Right, i)) => right_columns.get(i).cloned().flatten(),
                None => None,
            })
            .collect();

        let mut on = Vec::with_capacity(node.on.len());
        for (left, right) in node.on {
            on.push((
                self.substitute(left, &calls, &columns)?,
                self.substitute(right, &calls, &columns)?,
            ));
        }
        let filter = match node.filter {
            Some(filter) => Some(self.substitute(filter, &calls, &columns)?),
            None => None,
        };
        let node = Join::try_new(
            Arc::new(left),
            Arc::new(right),
            on,
            filter,
            node.join_type,
            node.join_constraint,
            node.null_equality,
            node.null_aware,
        )?;
        let found = places
            .into_iter()
            .map(|place| columns.get(place?).cloned().flatten())
            .collect();
        Ok((LogicalPlan::Join(node), found))
    }

    fn aggregate(&mut self, node: Aggregate) -> Result<LogicalPlan> {
        let calls = Calls::of(node.group_expr.iter().chain(&node.aggr_expr))?;
        if calls.is_empty() {
            return Ok(self.barrier(LogicalPlan::Aggregate(node), &calls)?.0);
        }
        let (input, mut columns) = self.visit(Arc::unwrap_or_clone(node.input), &calls)?;
        let input = self.compute(input, &calls, &mut columns, |_, call| call.sure)?;
        let mut substitute = |exprs: Vec<Expr>| -> Result<Vec<Expr>> {
            exprs
                .into_iter()
                .map(|expr| self.substitute(expr, &calls, &columns))
                .collect()
        };
        let (groups, aggregates) = (substitute(node.group_expr)?, substitute(node.aggr_expr)?);
        let aggregate = Aggregate::try_new(Arc::new(input), groups, aggregates)?;
        let columns = aggregate.schema.columns();
        if columns == node.schema.columns() {
            return Ok(LogicalPlan::Aggregate(aggregate));
        }
        // A grouping set has no place for an alias: names are restored above.
        let exprs = columns
            .into_iter()
            .zip(node.schema.iter())
            .map(|(column, (qualifier, field))| named(Expr::Column(column), (qualifier, field.name().as_str())))
            .collect();
        project(exprs, LogicalPlan::Aggregate(aggregate))
    }

    /// `input` with one column more for each call that nobody below has computed and that belongs `here`.
    fn compute(
        &mut self,
        input: LogicalPlan,
        calls: &Calls,
        columns: &mut [Option<Column>],
        here: impl Fn(usize, &Call) -> bool,
    ) -> Result<LogicalPlan> {
        let mut computed = vec![];
        for (i, (call, column)) in calls.iter().zip(columns).enumerate() {
            if column.is_none() && here(i, call) {
                let name = self.names.next(PREFIX);
                computed.push(call.expr.clone().alias(&name));
                *column = Some(Column::new_unqualified(name));
            }
        }
        if computed.is_empty() {
            return Ok(input);
        }
        self.changed = true;
        let passed = input.schema().columns().into_iter().map(Expr::Column);
        let exprs = passed.chain(computed).collect();
        project(exprs, input)
    }

    /// Makes a projection hand on a column of its input: the column above.
    fn pass(&self, column: Column, exprs: &mut Vec<Expr>) -> Column {
        let expr = Expr::Column(column.clone());
        if exprs.contains(&expr) {
            return column;
        }
        if column.name.starts_with(PREFIX) {
            exprs.push(expr);
            return column;
        }
        // Its name may mean something else above.
        let name = self.names.next(PREFIX);
        exprs.push(expr.alias(&name));
        Column::new_unqualified(name)
    }

    /// `expr` with columns in the place of the calls that have one.
    fn substitute(&mut self, expr: Expr, calls: &Calls, columns: &[Option<Column>]) -> Result<Expr> {
        let column_of = |expr: &Expr| {
            let position = calls.iter().position(|call| call.expr == *expr)?;
            columns.get(position)?.clone()
        };
        let expr = replace(expr, column_of)?;
        self.changed |= expr.transformed;
        Ok(expr.data)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Left,
    Right,
}

/// The side of a join that a call reads.
fn side(call: &Call, join: &Join) -> Option<Side> {
    let columns = call.expr.column_refs();
    let reads_only = |plan: &LogicalPlan| columns.iter().all(|column| plan.schema().has_column(column));
    if columns.is_empty() {
        None
    } else if reads_only(&join.left) {
        Some(Side::Left)
    } else if reads_only(&join.right) {
        Some(Side::Right)
    } else {
        None
    }
}

/// A call over the columns of `schema` as one over what they are made of; none if that is no call any
/// more, or gives another value each time.
fn below(call: &Call, schema: &DFSchema, made_of: &[Expr]) -> Result<Option<Call>> {
    let expr = sources(&call.expr, schema, made_of)?;
    Ok(expr.filter(runs_network).map(|expr| Call { expr, ..call.clone() }))
}

/// `expr` over what the columns of `schema` are made of; none if that gives another value each time.
fn sources(expr: &Expr, schema: &DFSchema, made_of: &[Expr]) -> Result<Option<Expr>> {
    let mut is_sure = true;
    let expr = expr.clone().transform_down(|expr| {
        let Expr::Column(column) = &expr else {
            return Ok(Transformed::no(expr));
        };
        let source = schema.maybe_index_of_column(column).and_then(|i| made_of.get(i));
        Ok(match source {
            Some(source) if !source.is_volatile() => {
                Transformed::new(unaliased(source).clone(), true, TreeNodeRecursion::Jump)
            }
            _ => {
                is_sure = false;
                Transformed::no(expr)
            }
        })
    })?;
    Ok(is_sure.then_some(expr.data))
}

/// `plan` with its first rows found below the projection that runs a network; none if there is none below
/// nodes that only rename or compute columns, or if the order is one of what networks give.
fn find_first(plan: &LogicalPlan, keys: &[SortExpr], fetch: Option<usize>) -> Result<Option<LogicalPlan>> {
    let (input, made_of, is_here) = match plan {
        LogicalPlan::Projection(node) => (&node.input, node.expr.clone(), !Calls::of(&node.expr)?.is_empty()),
        LogicalPlan::SubqueryAlias(node) => {
            let columns = node.input.schema().columns();
            (&node.input, columns.into_iter().map(Expr::Column).collect(), false)
        }
        _ => return Ok(None),
    };
    let mut below = Vec::with_capacity(keys.len());
    for key in keys {
        match sources(&key.expr, plan.schema(), &made_of)? {
            Some(expr) if Calls::of([&expr])?.is_empty() => below.push(key.with_expr(expr)),
            _ => return Ok(None),
        }
    }
    let input = match is_here {
        true => Some(LogicalPlan::Sort(Sort {
            expr: below,
            input: Arc::clone(input),
            fetch,
        })),
        false => find_first(input, &below, fetch)?,
    };
    input
        .map(|input| plan.with_new_exprs(plan.expressions(), vec![input]))
        .transpose()
}

fn none(asked: &Calls) -> Vec<Option<Column>> {
    vec![None; asked.len()]
}

fn project(exprs: Vec<Expr>, input: LogicalPlan) -> Result<LogicalPlan> {
    Ok(LogicalPlan::Projection(Projection::try_new(exprs, Arc::new(input))?))
}
