//! The table function `images(location [, path_pattern])`.

use std::sync::Arc;

use datafusion::catalog::{TableFunctionArgs, TableFunctionImpl, TableProvider};
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TransformedResult};
use datafusion::common::{TableReference, plan_err};
use datafusion::datasource::source_as_provider;
use datafusion::error::Result;
use datafusion::logical_expr::{Expr, LogicalPlan, LogicalPlanBuilder, TableScan};
use datafusion::optimizer::AnalyzerRule;

use super::{ImageTable, ImagesOptions};

/// The table function.
#[derive(Debug, Default)]
pub struct ImagesFunction;

impl TableFunctionImpl for ImagesFunction {
    fn call_with_args(&self, args: TableFunctionArgs) -> Result<Arc<dyn TableProvider>> {
        let texts: Option<Vec<&str>> = args
            .exprs()
            .iter()
            .map(|expr| match expr {
                Expr::Literal(value, _) => value.try_as_str().flatten(),
                _ => None,
            })
            .collect();
        let (location, path_pattern) = match texts.as_deref() {
            Some([location]) => (*location, None),
            Some([location, pattern]) => (*location, Some(*pattern)),
            _ => {
                return plan_err!(
                    "images takes a location and maybe a path pattern, as strings: images('s3://bucket/folder/')"
                );
            }
        };
        let options = ImagesOptions {
            path_pattern: path_pattern.map(str::to_owned),
            ..ImagesOptions::default()
        };
        let mut table = ImageTable::try_new(&[location.to_owned()], &options, None)?;
        table.store(args.session())?;
        let pattern = path_pattern.map(|pattern| format!(", '{pattern}'")).unwrap_or_default();
        let location: String = table.lister.locations().iter().map(ToString::to_string).collect();
        table.call = Some(format!("images('{location}'{pattern})"));
        Ok(Arc::new(table))
    }
}

/// Gives the tables of different calls different names. DataFusion calls all of them `images()`, and takes
/// scans for the same by their tables' names: of two subqueries it would run the first for both.
#[derive(Debug)]
pub(crate) struct TellApart;

impl AnalyzerRule for TellApart {
    fn name(&self) -> &'static str {
        "tell_images_apart"
    }

    fn analyze(&self, plan: LogicalPlan, _config: &ConfigOptions) -> Result<LogicalPlan> {
        plan.transform_up_with_subqueries(|node| match &node {
            LogicalPlan::TableScan(scan) => match named(scan)? {
                Some(named) => Ok(Transformed::yes(named)),
                None => Ok(Transformed::no(node)),
            },
            _ => Ok(Transformed::no(node)),
        })
        .data()
    }
}

/// The scan of a table that a call made, named by the call; its columns keep their qualifier.
fn named(scan: &TableScan) -> Result<Option<LogicalPlan>> {
    let Ok(table) = source_as_provider(&scan.source) else {
        return Ok(None);
    };
    let Some(call) = table.downcast_ref::<ImageTable>().and_then(|table| table.call.as_ref()) else {
        return Ok(None);
    };
    if scan.table_name.table() == call {
        return Ok(None);
    }
    let name = TableReference::bare(call.as_str());
    LogicalPlanBuilder::scan(name, Arc::clone(&scan.source), scan.projection.clone())?
        .alias(scan.table_name.clone())?
        .build()
        .map(Some)
}
