//! Runs scripts and statements.
//!
//! Two runtimes: queries compute on the engine's threads, and the front, on the main thread, prints and
//! waits for Ctrl-C. A network that holds every thread of the engine cannot delay it, nor the next
//! statement, which gets an engine of its own.

use std::cell::Cell;
use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{SchemaRef, UInt64Type};
use datafusion::common::runtime::SpawnedTask;
use datafusion::common::tree_node::{Transformed, TransformedResult, TreeNode, TreeNodeRecursion};
use datafusion::common::{internal_err, plan_datafusion_err};
use datafusion::config::Dialect as DialectName;
use datafusion::datasource::listing::ListingTableUrl;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::{LogicalPlan, Statement as PlanStatement};
use datafusion::prelude::SessionContext;
use datafusion::sql::parser::Statement as SqlStatement;
use datafusion::sql::sqlparser::ast;
use datafusion::sql::sqlparser::dialect::{Dialect, GenericDialect, dialect_from_str};
use datafusion_cli::catalog::substitute_tilde;
use futures::StreamExt;
use pomona_udfs::embed::engines;
use pomona_udfs::settings::PomonaOptions;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{mpsc, oneshot};

use super::print::{Out, PrintOptions, ResultPrinter, note};
use super::script::{self, Command, Step, Variables};
use crate::stores::{self, PomonaStores};

/// How long an interrupted or failed statement may take to give up its uploads, and those to be aborted.
const ABORT_TIME: Duration = Duration::from_secs(5);

/// Scripts that include each other: more is a circle.
const MAX_DEPTH: usize = 32;

/// Why a run ends before its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// A statement or command failed: the message for the person.
    Failed(String),
    /// Ctrl-C.
    Interrupted,
    /// Nobody reads standard output any more.
    Closed,
}

impl From<DataFusionError> for Stop {
    fn from(error: DataFusionError) -> Self {
        let message = error.strip_backtrace();
        // What the planner says around the message of a function whose arguments have wrong types.
        let inner = message
            .split_once("user-defined coercion failed with: ")
            .map(|(_, rest)| rest.split(" No function matches").next().unwrap_or(rest).to_owned());
        Self::Failed(inner.unwrap_or(message))
    }
}

/// A text to run, the name that errors give it, and the folder that its `\i` starts from.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) text: String,
    pub(crate) folder: PathBuf,
}

/// The threads that queries compute on.
pub(crate) struct Engine {
    handle: Handle,
    /// Always there, until it is dropped.
    runtime: Option<Runtime>,
}

impl Engine {
    /// Starts a thread for each core.
    pub(crate) fn start() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread().enable_all().build()?;
        Ok(Self {
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
        })
    }
}

impl Drop for Engine {
    // A network that still computes for an interrupted query is not waited for.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Runs scripts and statements in one session.
pub(crate) struct Runner {
    pub(crate) ctx: SessionContext,
    pub(crate) print: PrintOptions,
    pub(crate) variables: Variables,
    pub(crate) out: Out,
    engine: Engine,
}

/// What a statement gives.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Rows; `whole` where every row and value is shown, as of a plan.
    Rows { whole: bool },
    /// The number of rows that it wrote; in a folder there are several files.
    Written { in_folder: bool },
    /// Nothing.
    Nothing,
}

impl Runner {
    /// Runs in `ctx`, with its queries on `engine`.
    pub(crate) fn new(ctx: SessionContext, engine: Engine, print: PrintOptions, variables: Variables) -> Self {
        Self {
            ctx,
            print,
            variables,
            out: Out::stdout(),
            engine,
        }
    }

    /// The SQL dialect of the session.
    pub(crate) fn dialect(&self) -> Box<dyn Dialect> {
        dialect_from_str(dialect_name(&self.ctx)).unwrap_or_else(|| Box::new(GenericDialect {}))
    }

    /// Runs a script up to its end or to the first failure, whose message names file and line.
    pub(crate) async fn script(&mut self, source: &Source, depth: usize) -> Result<(), Stop> {
        let at = |line: usize, message: &dyn Display| Stop::Failed(format!("{}:{line}: {message}", source.name));
        let steps = script::parse(&source.text, self.dialect().as_ref()).map_err(|e| at(e.line, &e))?;
        for step in steps {
            match step {
                Step::Sql(statement) => {
                    let sql = statement.sql(&self.variables).map_err(|e| at(e.line, &e))?;
                    self.statement(&sql).await.map_err(|stop| match stop {
                        Stop::Failed(message) => at(statement.line, &format!("{message}\n{}", statement.shown())),
                        stop => stop,
                    })?;
                }
                Step::Command { line, command } => {
                    let include = self.command(command).await.map_err(|stop| match stop {
                        Stop::Failed(message) => at(line, &message),
                        stop => stop,
                    })?;
                    if let Some(file) = include {
                        let included = read(&source.folder.join(file)).map_err(|message| at(line, &message))?;
                        if depth == MAX_DEPTH {
                            return Err(at(line, &"scripts include each other in a circle"));
                        }
                        Box::pin(self.script(&included, depth + 1)).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Runs a script's command; the file to run is returned.
    pub(crate) async fn command(&mut self, command: Command) -> Result<Option<String>, Stop> {
        let expand = |text: &str| self.variables.expand(text).map_err(Stop::Failed);
        match command {
            Command::Set(name, value) => {
                let value = expand(&value)?;
                self.variables.set(&name, value).map_err(Stop::Failed)?;
            }
            Command::Default(name, value) => {
                if self.variables.get(&name).is_none() {
                    let value = expand(&value)?;
                    self.variables.set(&name, value).map_err(Stop::Failed)?;
                }
            }
            Command::Echo(text) => {
                let text = expand(&text)?;
                if !self.print.quiet {
                    writeln!(self.out, "{text}")
                        .and_then(|()| self.out.flush())
                        .map_err(DataFusionError::from)?;
                }
            }
            Command::Include(file) => return expand(&file).map(Some),
            Command::Require(table, message) => {
                let (table, message) = (expand(&table)?, expand(&message)?);
                if !self.has_rows(&table).await? {
                    return Err(Stop::Failed(message));
                }
            }
        }
        if self.out.closed() { Err(Stop::Closed) } else { Ok(None) }
    }

    /// Has a table or view at least one row?
    async fn has_rows(&mut self, table: &str) -> Result<bool, Stop> {
        let (ctx, sql) = (self.ctx.clone(), format!("SELECT 1 FROM {table} LIMIT 1"));
        let mut query = {
            let _engine = self.engine.handle.enter();
            SpawnedTask::spawn(async move { ctx.sql(&sql).await?.count().await })
        };
        tokio::select! {
            biased;
            Ok(()) = tokio::signal::ctrl_c() => {
                self.engine = Engine::start().map_err(DataFusionError::from)?;
                Err(Stop::Interrupted)
            }
            rows = join(&mut query) => Ok(rows? > 0),
        }
    }

    /// Runs one statement and prints what it gives.
    pub(crate) async fn statement(&mut self, sql: &str) -> Result<(), Stop> {
        // Of a statement that failed.
        drop(self.failures().take());
        let (started, starts) = oneshot::channel();
        let (sender, mut rows) = mpsc::channel(1);
        let mut interrupt = pin!(tokio::signal::ctrl_c());
        let tasks_before = self.engine.handle.metrics().num_alive_tasks();
        let mut query = {
            let _engine = self.engine.handle.enter();
            SpawnedTask::spawn(execute(self.ctx.clone(), sql.to_owned(), started, sender))
        };

        let mut kind = Kind::Nothing;
        let result = tokio::select! {
            biased;
            Ok(()) = &mut interrupt => Err(Stop::Interrupted),
            result = self.results(starts, &mut rows, &mut query, &mut kind) => result,
        };
        if result.is_err() {
            drop(query);
            if let Kind::Written { in_folder } = kind {
                self.abort_uploads(tasks_before).await;
                if in_folder && result == Err(Stop::Interrupted) {
                    note("The folder that was written to may hold some of the statement's files.");
                }
            }
            if result == Err(Stop::Interrupted) {
                self.engine = Engine::start().map_err(DataFusionError::from)?;
            }
        }
        result
    }

    /// Prints the rows of a query as they come.
    async fn results(
        &mut self,
        starts: oneshot::Receiver<(SchemaRef, Kind)>,
        rows: &mut mpsc::Receiver<RecordBatch>,
        query: &mut SpawnedTask<Result<()>>,
        kind: &mut Kind,
    ) -> Result<(), Stop> {
        let started = Instant::now();
        let Ok((schema, found)) = starts.await else {
            return Ok(join(query).await?);
        };
        *kind = found;
        let summary = match found {
            Kind::Rows { whole } => {
                let format = self.ctx.state().config_options().format.clone();
                let closed = self.out.closed_flag();
                let mut printer = ResultPrinter::new(&mut self.out, &self.print, format, schema, whole);
                while let Some(batch) = rows.recv().await {
                    printer.write(&batch)?;
                    stop_if(&closed)?;
                }
                join(query).await?;
                let printed = printer.finish()?;
                stop_if(&closed)?;
                match printed.shown < printed.rows {
                    true => format!(
                        "{} row(s) fetched, the first {} shown (--maxrows).",
                        printed.rows, printed.shown
                    ),
                    false => format!("{} row(s) fetched.", printed.rows),
                }
            }
            Kind::Written { .. } => {
                let mut written = 0;
                while let Some(batch) = rows.recv().await {
                    let counts = batch
                        .columns()
                        .first()
                        .and_then(|counts| counts.as_primitive_opt::<UInt64Type>());
                    written += counts.map_or(0, |counts| counts.values().iter().sum::<u64>());
                }
                join(query).await?;
                format!("{written} row(s) written.")
            }
            Kind::Nothing => {
                while rows.recv().await.is_some() {}
                join(query).await?;
                String::new()
            }
        };
        self.summarize(&summary, started.elapsed());
        Ok(())
    }

    fn summarize(&self, summary: &str, elapsed: Duration) {
        if let Some(notice) = engines::take_notice() {
            note(format_args!("Notice: {notice}.\n"));
        }
        if self.print.quiet {
            return;
        }
        let elapsed = match self.print.timing {
            true => format!("Elapsed {:.3} seconds.", elapsed.as_secs_f64()),
            false => String::new(),
        };
        let line = format!("{summary} {elapsed}");
        if !line.trim().is_empty() {
            note(format_args!("{}\n", line.trim()));
        }
        let failed = self.failures().take();
        if !failed.is_empty() {
            let rows: u64 = failed.iter().map(|(_, rows)| rows).sum();
            let stages: Vec<_> = failed.iter().map(|(stage, rows)| format!("{stage} {rows}")).collect();
            note(format_args!(
                "{rows} value(s) became NULL: {} (pomona.on_error = 'null')\n",
                stages.join(", ")
            ));
        }
    }

    /// Waits until the tasks of a query that was dropped are gone, whose writers give up their uploads, and
    /// until those are cleaned away. A task that computes ends when it next gives up its thread.
    async fn abort_uploads(&self, tasks_before: usize) {
        let gone = async {
            while self.engine.handle.metrics().num_alive_tasks() > tasks_before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let in_time = tokio::time::timeout(ABORT_TIME, gone).await.is_ok();
        if !in_time || !stores::wait_for_aborts(ABORT_TIME) {
            note("Uploads were not aborted in time: parts of them may stay at their store.");
        }
    }

    fn failures(&self) -> Arc<pomona_udfs::policy::FailureCounts> {
        PomonaOptions::from_config(self.ctx.state().config_options()).failures
    }
}

fn stop_if(closed: &Rc<Cell<bool>>) -> Result<(), Stop> {
    if closed.get() { Err(Stop::Closed) } else { Ok(()) }
}

/// Reads a script.
pub(crate) fn read(path: &Path) -> Result<Source, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    Ok(Source {
        name: path.display().to_string(),
        text,
        folder,
    })
}

/// Waits for the end of a query that has sent its last row.
async fn join<T: 'static>(query: &mut SpawnedTask<Result<T>>) -> Result<T> {
    query.await.map_err(|e| DataFusionError::ExecutionJoin(Box::new(e)))?
}

fn dialect_name(ctx: &SessionContext) -> DialectName {
    ctx.state().config_options().sql_parser.dialect
}

/// Plans a statement, says what it gives, and sends its rows.
async fn execute(
    ctx: SessionContext,
    sql: String,
    started: oneshot::Sender<(SchemaRef, Kind)>,
    rows: mpsc::Sender<RecordBatch>,
) -> Result<()> {
    let statement = ctx.state().sql_to_statement(&sql, &dialect_name(&ctx))?;
    let shows_setting =
        matches!(&statement, SqlStatement::Statement(s) if matches!(**s, ast::Statement::ShowVariable { .. }));
    let plan = ctx.state().statement_to_plan(statement).await?;
    register_stores(&ctx, &plan)?;
    let plan = without_store_options(plan)?;
    let kind = match &plan {
        LogicalPlan::Copy(copy) => {
            let target = Path::new(&copy.output_url);
            Kind::Written {
                in_folder: copy.output_url.ends_with('/') || target.extension().is_none(),
            }
        }
        LogicalPlan::Dml(_) => Kind::Written { in_folder: false },
        LogicalPlan::Statement(PlanStatement::Execute(_)) => Kind::Rows { whole: false },
        LogicalPlan::Ddl(_) | LogicalPlan::Statement(_) => Kind::Nothing,
        LogicalPlan::Explain(_) | LogicalPlan::Analyze(_) | LogicalPlan::DescribeTable(_) => Kind::Rows { whole: true },
        _ => Kind::Rows { whole: shows_setting },
    };
    let mut stream = ctx.execute_logical_plan(plan).await?.execute_stream().await?;
    started
        .send((stream.schema(), kind))
        .map_err(|_| plan_datafusion_err!("the statement was given up"))?;
    while let Some(batch) = stream.next().await {
        if rows.send(batch?).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Makes the store of a `COPY`'s target from its options, as `aws.region`. Tables do so themselves.
fn register_stores(ctx: &SessionContext, plan: &LogicalPlan) -> Result<()> {
    let LogicalPlan::Copy(copy) = plan else {
        return Ok(());
    };
    match ctx.state().config().get_extension::<PomonaStores>() {
        Some(stores) => stores.grant(ListingTableUrl::parse(&copy.output_url)?.as_ref(), &copy.options),
        None => internal_err!("a session without stores"),
    }
}

/// The plan of a `COPY`, to a place in the home folder where it says `~`, without the options that
/// its store was made with: EXPLAIN would print them.
fn without_store_options(plan: LogicalPlan) -> Result<LogicalPlan> {
    let plan = plan.transform_down(|node| {
        Ok(match node {
            LogicalPlan::Copy(mut copy) => {
                copy.options
                    .retain(|key, _| !key.starts_with("aws.") && !key.starts_with("gcp."));
                copy.output_url = substitute_tilde(copy.output_url);
                Transformed::yes(LogicalPlan::Copy(copy))
            }
            LogicalPlan::Explain(mut explain) => {
                // The plan as it was first, in words.
                explain.stringified_plans.clear();
                explain.plan = Arc::new(without_store_options(Arc::unwrap_or_clone(explain.plan))?);
                Transformed::new(LogicalPlan::Explain(explain), true, TreeNodeRecursion::Jump)
            }
            other => Transformed::no(other),
        })
    });
    plan.data()
}
