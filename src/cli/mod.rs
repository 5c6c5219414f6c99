//! The command line of the `pomona` binary, one file per subcommand.
//!
//! | file | what |
//! |---|---|
//! | `script.rs` | a text becomes statements and commands; variables (pure) |
//! | `run.rs` | runs scripts and statements, Ctrl-C |
//! | `print.rs` | tables that can be read, csv, tsv, json |
//! | `repl.rs` | `pomona`: statements as they are typed |
//! | `model.rs` | `pomona model add`, `pomona model list` |
//! | `sample.rs` | `pomona sample` |
//! | `cluster.rs` | `pomona scheduler`, `pomona executor` |
//! | [`functions`] | `pomona functions`: the functions' documentation |

#[cfg(feature = "cluster")]
mod cluster;
pub mod functions;
mod model;
mod print;
mod repl;
mod run;
mod sample;
mod script;

use std::env;
use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgMatches, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use datafusion::config::ConfigOptions;
use datafusion::error::Result;
use datafusion::logical_expr::ExplainFormat;
use datafusion::prelude::SessionConfig;
use datafusion_cli::print_format::PrintFormat;
use datafusion_cli::print_options::MaxRows;
use log::LevelFilter;
use pomona_udfs::memory::parse_size;
use pomona_udfs::settings::{OnError, PomonaOptions};
use tokio::runtime::Builder;

use self::print::{PrintOptions, note};
use self::run::{Engine, Runner, Source, Stop};
use self::script::Variables;
use crate::SessionBuilder;

/// The exit status where the arguments are wrong or a script cannot be read, as clap has it.
const USAGE: u8 = 2;
/// The exit status after Ctrl-C: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

/// SQL on images: decode, resize, embed, standardize and reduce pictures in object stores.
///
/// Without -c, -f or a subcommand, statements are read from the terminal, or from standard input.
#[derive(Debug, Parser)]
#[command(name = "pomona", version)]
struct CommandLine {
    #[command(subcommand)]
    action: Option<Action>,

    /// Runs SQL, one or more statements between semicolons; -c and -f run in the order given
    #[arg(short, long, value_name = "SQL", allow_hyphen_values = true)]
    command: Vec<String>,

    /// Runs a script (- is standard input); stops at the first statement that fails
    #[arg(short, long, value_name = "FILE")]
    file: Vec<PathBuf>,

    /// Sets a variable of scripts: :'name' is its value as a string, :name its text
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    variable: Vec<(String, String)>,

    #[command(flatten)]
    print: PrintArgs,

    #[command(flatten)]
    session: SessionArgs,

    #[cfg(feature = "cluster")]
    #[command(flatten)]
    cluster: cluster::ClientArgs,

    /// What is logged to standard error: off, error, warn, info or debug [default: warn for scheduler and
    /// executor, otherwise off]
    #[arg(long, value_name = "LEVEL", global = true)]
    log_level: Option<LevelFilter>,
}

#[derive(Debug, Args)]
struct PrintArgs {
    /// How results are printed; automatic is a table
    #[arg(long, value_enum, default_value_t = PrintFormat::Automatic, global = true)]
    format: PrintFormat,

    /// Prints results only: no headings, row counts and times
    #[arg(short, long, global = true)]
    quiet: bool,

    /// Prints values in tables as they are, not abridged
    #[arg(long, global = true)]
    full: bool,

    /// The most rows that a table shows; none: all
    #[arg(long, value_name = "N", default_value = "40", global = true)]
    maxrows: MaxRows,
}

#[derive(Debug, Args)]
struct SessionArgs {
    /// The most memory that the session may use (4GB, 512MB); then queries spill to disk, or fail
    #[arg(long, value_name = "SIZE", value_parser = parse_size, global = true)]
    memory: Option<usize>,

    /// What happens to a row whose image is broken: fail (the query) or null (the value)
    #[arg(long, value_name = "fail|null", default_value = "fail", global = true)]
    on_error: OnError,

    /// Folders with models, looked through before the usual ones; separated as in PATH
    #[arg(long, value_name = "DIR", global = true)]
    models_dir: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Adds a network, or lists those that there are
    Model {
        #[command(subcommand)]
        action: model::Action,
    },
    /// Writes the sample data set, labelled pictures of fruits, into a folder or to a URL
    Sample(sample::Arguments),
    /// Cuts the queries of clients (--cluster) into tasks for executors
    #[cfg(feature = "cluster")]
    Scheduler(crate::cluster::scheduler::SchedulerArgs),
    /// Runs the tasks of a scheduler
    #[cfg(feature = "cluster")]
    Executor(crate::cluster::executor::ExecutorArgs),
    /// Prints the documentation of all functions, with the output of their examples, as Markdown
    Functions,
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("a variable is name=value")?;
    // Checks the name where the message still points at the argument.
    Variables::default().set(name, String::new())?;
    Ok((name.to_owned(), value.to_owned()))
}

/// The command line. The help of `scheduler` and `executor` leaves out what is for queries and their results.
fn command() -> Command {
    let mut command = CommandLine::command();
    // Passes the global options on to the subcommands.
    command.build();
    command.mut_subcommands(|subcommand| {
        let hidden: &[&str] = match subcommand.get_name() {
            "scheduler" => &["format", "quiet", "full", "maxrows", "on_error", "memory", "models_dir"],
            "executor" => &["format", "quiet", "full", "maxrows", "on_error", "memory"],
            _ => &[],
        };
        subcommand.mut_args(|argument| {
            let hide = hidden.contains(&argument.get_id().as_str());
            let is_hidden = argument.is_hide_set();
            argument.hide(hide || is_hidden)
        })
    })
}

/// Runs the command line and gives the exit status.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed = command().try_get_matches_from(args).and_then(|matches| {
        let command_line = CommandLine::from_arg_matches(&matches)?;
        Ok((command_line, matches))
    });
    let (command_line, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            error.print().ok();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE));
        }
    };
    #[cfg(feature = "cluster")]
    let command_line = match cluster::role(command_line) {
        Ok(status) => return status,
        Err(command_line) => *command_line,
    };
    log_to_stderr(command_line.log_level.unwrap_or(LevelFilter::Off));
    let sources = match sources(&command_line, &matches) {
        Ok(sources) => sources,
        Err(message) => {
            note(format_args!("pomona: {message}"));
            return ExitCode::from(USAGE);
        }
    };
    // Two runtimes: see `run`.
    let runtimes = Engine::start().and_then(|engine| Ok((engine, Builder::new_current_thread().enable_all().build()?)));
    let (engine, front) = match runtimes {
        Ok(runtimes) => runtimes,
        Err(error) => {
            note(format_args!("pomona: cannot start threads: {error}"));
            return ExitCode::FAILURE;
        }
    };
    match front.block_on(run(command_line, sources, engine)) {
        Ok(()) | Err(Stop::Closed) => ExitCode::SUCCESS,
        Err(Stop::Interrupted) => {
            note("Interrupted.");
            ExitCode::from(INTERRUPTED)
        }
        Err(Stop::Failed(message)) => {
            note(message);
            ExitCode::FAILURE
        }
    }
}

/// Logs what this program, Ballista and DataFusion say from `level` on; of what is below them (HTTP, TLS, cloud
/// SDKs) warnings.
fn log_to_stderr(level: LevelFilter) {
    let mut logger = env_logger::Builder::new();
    logger.filter_level(level.min(LevelFilter::Warn));
    for module in ["pomona", "ballista", "datafusion"] {
        logger.filter_module(module, level);
    }
    if level == LevelFilter::Warn {
        // It warns 20 times a second while the scheduler is away; `cluster::executor` says so once.
        logger.filter_module("ballista_executor::execution_loop", LevelFilter::Error);
        // Of each task that ends after its query: that its job is not found.
        logger.filter_module("ballista_scheduler::state::task_manager", LevelFilter::Off);
        // Seven lines where there are no credentials, which public buckets do not need.
        logger.filter_module("aws_config", LevelFilter::Error);
    }
    logger.init();
}

/// What -c and -f say, in their order. Every file is read before the first statement runs.
fn sources(command_line: &CommandLine, matches: &ArgMatches) -> Result<Vec<Source>, String> {
    let indices = |id: &str| matches.indices_of(id).into_iter().flatten();
    let commands = command_line.command.iter().map(|sql| Ok(here("-c", sql.clone())));
    let files = command_line.file.iter().map(|file| match file.as_os_str() == "-" {
        true => standard_input(),
        false => run::read(file),
    });
    let mut sources: Vec<_> = indices("command")
        .zip(commands)
        .chain(indices("file").zip(files))
        .collect();
    sources.sort_by_key(|(index, _)| *index);
    sources.into_iter().map(|(_, source)| source).collect()
}

/// A text whose `\i` starts from the working directory.
fn here(name: &str, text: String) -> Source {
    Source {
        name: name.to_owned(),
        text,
        folder: PathBuf::new(),
    }
}

fn standard_input() -> Result<Source, String> {
    let text = io::read_to_string(io::stdin()).map_err(|e| format!("cannot read standard input: {e}"))?;
    Ok(here("stdin", text))
}

async fn run(command_line: CommandLine, mut sources: Vec<Source>, engine: Engine) -> Result<(), Stop> {
    let CommandLine {
        action,
        variable,
        print,
        session,
        #[cfg(feature = "cluster")]
        cluster,
        ..
    } = command_line;
    let builder = open(session)?;
    #[cfg(feature = "cluster")]
    let (url, builder) = (cluster.url(), cluster.on(builder));
    #[cfg(not(feature = "cluster"))]
    let url: Option<String> = None;
    let ctx = builder.build()?;
    let print = PrintOptions {
        format: print.format,
        quiet: print.quiet,
        full: print.full,
        maxrows: print.maxrows,
        timing: true,
    };
    let mut variables = Variables::default();
    for (name, value) in variable {
        variables.set(&name, value).map_err(Stop::Failed)?;
    }
    let mut runner = Runner::new(ctx, engine, print, variables);
    if action.is_some() && !sources.is_empty() {
        return Err(Stop::Failed(
            "-c and -f run SQL: they do not go with a subcommand".to_owned(),
        ));
    }
    match action {
        Some(Action::Model { action }) => return model::run(action, &mut runner).await,
        Some(Action::Sample(arguments)) => return sample::run(arguments, &runner).await,
        Some(Action::Functions) => return functions::run(&mut runner).await,
        // Has run.
        #[cfg(feature = "cluster")]
        Some(Action::Scheduler(_) | Action::Executor(_)) => return Ok(()),
        None => {}
    }
    if sources.is_empty() {
        if io::stdin().is_terminal() {
            return repl::run(&mut runner, url.as_deref()).await;
        }
        sources.push(standard_input().map_err(Stop::Failed)?);
    }
    for source in &sources {
        runner.script(source, 0).await?;
    }
    Ok(())
}

/// Opens the session: settings from the environment (`DATAFUSION_…`), then from the arguments.
fn open(args: SessionArgs) -> Result<SessionBuilder> {
    let mut config = ConfigOptions::from_env()?;
    // As datafusion-cli has it, where the environment says nothing else.
    if env::var_os("DATAFUSION_EXPLAIN_FORMAT").is_none() {
        config.explain.format = ExplainFormat::Tree;
    }
    if env::var_os("DATAFUSION_FORMAT_NULL").is_none() {
        config.format.null = "NULL".to_owned();
    }
    let options = PomonaOptions {
        on_error: args.on_error,
        models_dir: args.models_dir.unwrap_or_default(),
        ..PomonaOptions::default()
    };
    let mut builder = SessionBuilder::new()
        .with_config(SessionConfig::from(config))
        .with_options(options);
    if let Some(bytes) = args.memory {
        builder = builder.with_memory_limit(bytes);
    }
    Ok(builder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        CommandLine::command().debug_assert();
    }

    #[test]
    #[cfg(feature = "cluster")]
    #[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
    fn roles_show_their_own_options_and_take_no_sql() {
        let help = |role: &str| {
            let mut command = command();
            let role = command.find_subcommand_mut(role).unwrap();
            role.render_long_help().to_string()
        };
        for role in ["scheduler", "executor"] {
            let help = help(role);
            assert!(help.contains("--bind-port") && help.contains("--log-level"), "{help}");
            assert!(!help.contains("--maxrows") && !help.contains("--on-error"), "{help}");
        }
        assert!(help("executor").contains("--models-dir") && help("model").contains("--maxrows"));

        for args in [
            &["pomona", "-c", "SELECT 1", "scheduler"][..],
            &["pomona", "--cluster", "local:1", "scheduler"],
        ] {
            let command_line = CommandLine::try_parse_from(args).unwrap();
            assert!(cluster::role(command_line).is_ok());
        }
    }
}
