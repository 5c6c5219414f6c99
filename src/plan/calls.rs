//! Calls that run a network: which they are, where an expression makes them, and columns in their place.

use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, TableReference};
use datafusion::error::Result;
use datafusion::logical_expr::expr::{AggregateFunction, Case, ScalarFunction};
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{BinaryExpr, Expr, LogicalPlan, Operator};

/// The functions that run a network.
const NETWORKS: [&str; 2] = ["embed", "resnet_embed"];

/// Whether `expr` runs a network, and gives the same vector for the same row of its own input.
pub(super) fn runs_network(expr: &Expr) -> bool {
    matches!(
        expr,
        Expr::ScalarFunction(call)
            if NETWORKS.contains(&call.func.name())
                && !call.args.iter().any(|arg| arg.is_volatile() || arg.contains_outer())
    )
}

/// Whether anything in `expr` is volatile for another reason than that it runs a network.
pub(super) fn is_random(expr: &Expr) -> Result<bool> {
    expr.exists(|expr| Ok(expr.is_volatile_node() && !runs_network(expr)))
}

/// Whether a node of `plan` or of its subqueries calls a network.
pub(super) fn plan_runs_network(plan: &LogicalPlan) -> Result<bool> {
    let mut found = false;
    plan.apply_with_subqueries(|node| {
        node.apply_expressions(|expr| {
            found |= expr.exists(|expr| Ok(runs_network(expr)))?;
            Ok(stop_if(found))
        })?;
        Ok(stop_if(found))
    })?;
    Ok(found)
}

pub(super) fn stop_if(found: bool) -> TreeNodeRecursion {
    match found {
        true => TreeNodeRecursion::Stop,
        false => TreeNodeRecursion::Continue,
    }
}

/// A call of a network.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) expr: Expr,
    /// How often it stands somewhere.
    pub(super) uses: usize,
    /// Is it made for each row, or in a branch that some rows do not take?
    pub(super) sure: bool,
}

/// Calls of networks, each once.
#[derive(Debug, Clone, Default)]
pub(super) struct Calls(Vec<Call>);

impl Calls {
    /// The calls that `exprs` make.
    pub(super) fn of<'a>(exprs: impl IntoIterator<Item = &'a Expr>) -> Result<Self> {
        let mut calls = Self::default();
        for expr in exprs {
            calls.visit(expr, true)?;
        }
        Ok(calls)
    }

    /// The calls that a predicate makes. Each of its conjuncts counts for each row: DataFusion moves those
    /// without a call below the computation.
    pub(super) fn of_predicate(predicate: &Expr) -> Result<Self> {
        Self::of(split_conjunction(predicate))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Call> {
        self.0.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The position of `call`, together with an equal one that is there.
    pub(super) fn add(&mut self, call: Call) -> usize {
        match self.0.iter_mut().enumerate().find(|(_, known)| known.expr == call.expr) {
            Some((position, known)) => {
                known.uses += call.uses;
                known.sure |= call.sure;
                position
            }
            None => {
                self.0.push(call);
                self.0.len() - 1
            }
        }
    }

    fn visit(&mut self, expr: &Expr, sure: bool) -> Result<()> {
        if runs_network(expr) {
            self.add(Call {
                expr: expr.clone(),
                uses: 1,
                sure,
            });
            return Ok(());
        }
        let Some((always, sometimes)) = branches(expr) else {
            expr.apply_children(|child| {
                self.visit(child, sure)?;
                Ok(TreeNodeRecursion::Continue)
            })?;
            return Ok(());
        };
        for child in always {
            self.visit(child, sure)?;
        }
        for child in sometimes {
            self.visit(child, false)?;
        }
        Ok(())
    }
}

/// The children that `expr` evaluates for each row and those that it may not, if it tells them apart.
fn branches(expr: &Expr) -> Option<(Vec<&Expr>, Vec<&Expr>)> {
    match expr {
        Expr::ScalarFunction(ScalarFunction { func, args }) => func.conditional_arguments(args),
        Expr::BinaryExpr(BinaryExpr {
            left,
            op: Operator::And | Operator::Or,
            right,
        }) => Some((vec![left.as_ref()], vec![right.as_ref()])),
        Expr::Case(Case {
            expr,
            when_then_expr,
            else_expr,
        }) => {
            let mut always: Vec<&Expr> = expr.as_deref().into_iter().collect();
            let mut sometimes: Vec<&Expr> = vec![];
            for (i, (when, then)) in when_then_expr.iter().enumerate() {
                match i {
                    0 => always.push(when),
                    _ => sometimes.push(when),
                }
                sometimes.push(then);
            }
            sometimes.extend(else_expr.as_deref());
            Some((always, sometimes))
        }
        // Rows that are filtered out are not evaluated.
        Expr::AggregateFunction(AggregateFunction { params, .. }) => {
            let filter = params.filter.as_deref()?;
            let order = params.order_by.iter().map(|sort| &sort.expr);
            Some((vec![filter], params.args.iter().chain(order).collect()))
        }
        _ => None,
    }
}

/// `expr` with columns in the place of what `column_of` knows.
pub(super) fn replace(expr: Expr, column_of: impl Fn(&Expr) -> Option<Column>) -> Result<Transformed<Expr>> {
    expr.transform_down(|expr| {
        Ok(match column_of(&expr) {
            Some(column) => Transformed::new(Expr::Column(column), true, TreeNodeRecursion::Jump),
            None => Transformed::no(expr),
        })
    })
}

/// `expr` without the names that it was given.
pub(super) fn unaliased(expr: &Expr) -> &Expr {
    match expr {
        Expr::Alias(alias) => unaliased(&alias.expr),
        expr => expr,
    }
}

/// `expr` under the name that a schema has for it.
pub(super) fn named(expr: Expr, (qualifier, name): (Option<&TableReference>, &str)) -> Expr {
    let (its_qualifier, its_name) = expr.qualified_name();
    if its_qualifier.as_ref() == qualifier && its_name == name {
        return expr;
    }
    expr.unalias().alias_qualified(qualifier.cloned(), name)
}
