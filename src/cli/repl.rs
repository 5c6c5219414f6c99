//! `pomona` without arguments: statements as they are typed.

use std::borrow::Cow;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use arrow::array::AsArray;
use clap::ValueEnum;
use datafusion::DATAFUSION_VERSION;
use datafusion::error::{DataFusionError, Result};
use datafusion::sql::sqlparser::dialect::{GenericDialect, dialect_from_str};
use datafusion_cli::helper::CliHelper;
use datafusion_cli::print_format::PrintFormat;
use pomona_udfs::embed::engines::library;
use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::config::{CompletionType, Config};
use rustyline::error::ReadlineError;
use rustyline::highlight::{CmdKind, Highlighter};
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Context, Editor, Helper};

use super::functions;
use super::print::note;
use super::run::{self, Runner, Stop};
use super::script::{self, Command, Step};

const COMMANDS: &str = "\
\\d                   the tables
\\d NAME              the columns of a table
\\h                   the functions of Pomona
\\h NAME              a function
\\i FILE              runs a script
\\set [NAME VALUE]    sets a variable, or lists them
\\echo TEXT           prints a text
\\require TABLE TEXT  fails with a text unless a table has a row
\\pset format FORMAT  table, csv, tsv, json, nd-json or automatic
\\timing              prints times, or does not
\\quiet [true|false]  prints results only, or everything
\\?                   this list
\\q                   ends";

const USER_TABLES: &str = "SELECT table_schema, table_name, table_type FROM information_schema.tables \
                           WHERE table_schema <> 'information_schema'";

const USER_COLUMNS: &str = "SELECT table_name FROM information_schema.tables WHERE table_schema <> 'information_schema' \
                            UNION SELECT column_name FROM information_schema.columns \
                            WHERE table_schema <> 'information_schema'";

/// What runs networks, and how to get the fast engine where it is not there.
fn engine_line() -> String {
    match library::library() {
        Ok(library) => format!(
            "Networks run on onnxruntime{} ({}).",
            library
                .version()
                .map(|version| format!(" {version}"))
                .unwrap_or_default(),
            library.path().display()
        ),
        Err(error) => format!("Networks run on tract. onnxruntime is several times as fast, but {error}."),
    }
}

/// Reads statements and commands until the person ends it. `cluster` is where queries run, if not here.
pub(super) async fn run(runner: &mut Runner, cluster: Option<&str>) -> Result<(), Stop> {
    let failed = |error: ReadlineError| Stop::Failed(format!("cannot read from the terminal: {error}"));
    let config = Config::builder().completion_type(CompletionType::List).build();
    let mut editor: Editor<ReplHelper, DefaultHistory> = Editor::with_config(config).map_err(failed)?;
    let history = history();
    if let Some(history) = &history {
        // There is none the first time.
        editor.load_history(history).ok();
    }
    if !runner.print.quiet {
        note(format_args!(
            "Pomona {} (DataFusion {DATAFUSION_VERSION}). Try: SELECT * FROM images('sample://fruits/Training/') LIMIT 5;",
            env!("CARGO_PKG_VERSION")
        ));
        note(match cluster {
            Some(url) => format!("What reads images or files runs on the cluster {url}, networks on its executors."),
            None => engine_line(),
        });
    }

    loop {
        editor.set_helper(Some(ReplHelper::new(runner).await));
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        if line.trim().is_empty() {
            continue;
        }
        editor.add_history_entry(line.trim()).map_err(failed)?;
        if let Some(history) = &history {
            // What cannot be kept is not worth an end.
            editor.append_history(history).ok();
        }
        let step = match last_command(&line) {
            Some((open, command)) => {
                if !open.trim().is_empty() {
                    note("The statement above it has no ';' and did not run.");
                }
                self::command(runner, command).await
            }
            None => statements(runner, &line).await.map(|()| Next::Line),
        };
        match step {
            Ok(Next::Line) => {}
            Ok(Next::End) | Err(Stop::Closed) => return Ok(()),
            Err(Stop::Failed(message)) => note(format_args!("{message}\n")),
            Err(Stop::Interrupted) => note("Interrupted."),
        }
    }
}

/// The command in the last line of what was typed, and what stands above it: `\q` is a way out of a
/// statement whose ';' was forgotten. So are the words that other shells have.
fn last_command(input: &str) -> Option<(&str, &str)> {
    let (open, last) = input.trim_end().rsplit_once('\n').unwrap_or(("", input));
    let last = last.trim().trim_end_matches(';').trim_end();
    let command = match last.to_ascii_lowercase().as_str() {
        "quit" | "exit" => "q",
        "help" => "?",
        _ => last.strip_prefix('\\')?,
    };
    Some((open, command))
}

/// What follows a command.
enum Next {
    Line,
    End,
}

/// Runs what was typed, up to its first failure.
async fn statements(runner: &mut Runner, text: &str) -> Result<(), Stop> {
    let failed = |error: script::ScriptError| Stop::Failed(error.to_string());
    for step in script::parse(text, runner.dialect().as_ref()).map_err(failed)? {
        match step {
            Step::Sql(statement) => {
                let sql = statement.sql(&runner.variables).map_err(failed)?;
                runner.statement(&sql).await?;
            }
            Step::Command { command, .. } => script_command(runner, command).await?,
        }
    }
    Ok(())
}

/// Runs a command, without its backslash.
async fn command(runner: &mut Runner, line: &str) -> Result<Next, Stop> {
    let (word, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let argument = argument.trim().trim_end_matches(';');
    match (word, argument) {
        ("q", _) => return Ok(Next::End),
        ("?", _) => print(runner, COMMANDS)?,
        ("d", "") => runner.statement(USER_TABLES).await?,
        ("d", table) => runner.statement(&format!("DESCRIBE {table}")).await?,
        ("h", "") => {
            let overview = functions::overview()?;
            print(runner, &overview)?;
        }
        ("h", name) => {
            let help = functions::help(&runner.ctx.state(), &name.to_lowercase())
                .ok_or_else(|| Stop::Failed(format!("there is no function {name}: \\h lists those of Pomona")))?;
            print(runner, &help)?;
        }
        ("set", "") => {
            let set: Vec<_> = runner
                .variables
                .iter()
                .map(|(name, value)| format!("{name} = {value}"))
                .collect();
            print(runner, &set.join("\n"))?;
        }
        ("timing", _) => {
            runner.print.timing = !runner.print.timing;
            note(if runner.print.timing {
                "Times are printed."
            } else {
                "Times are not printed."
            });
        }
        ("quiet", _) => {
            runner.print.quiet = match argument {
                "" => !runner.print.quiet,
                "true" | "on" => true,
                "false" | "off" => false,
                other => return Err(Stop::Failed(format!("\\quiet takes true or false, not {other}"))),
            };
            note(if runner.print.quiet {
                "Results only."
            } else {
                "Results, row counts and times."
            });
        }
        ("pset", _) => {
            let format = argument.strip_prefix("format").map(str::trim);
            match format.map(|format| PrintFormat::from_str(format, true)) {
                Some(Ok(format)) => runner.print.format = format,
                _ => {
                    return Err(Stop::Failed(
                        "\\pset format takes table, csv, tsv, json, nd-json or automatic".into(),
                    ));
                }
            }
        }
        _ => match Command::parse(line) {
            Some(command) => script_command(runner, command.map_err(Stop::Failed)?).await?,
            None => {
                return Err(Stop::Failed(format!(
                    "\\{word} is not a command: \\? lists those that there are"
                )));
            }
        },
    }
    Ok(Next::Line)
}

/// Runs a command that scripts have as well.
async fn script_command(runner: &mut Runner, command: Command) -> Result<(), Stop> {
    match runner.command(command).await? {
        Some(file) => {
            let source = run::read(Path::new(&file)).map_err(Stop::Failed)?;
            runner.script(&source, 0).await
        }
        None => Ok(()),
    }
}

fn print(runner: &mut Runner, text: &str) -> Result<()> {
    writeln!(runner.out, "{text}")
        .and_then(|()| runner.out.flush())
        .map_err(DataFusionError::from)
}

/// The file that keeps what was typed, in the user's state directory. rustyline lets only its owner read it.
fn history() -> Option<PathBuf> {
    let folder = dirs::state_dir().or_else(dirs::data_local_dir)?.join("pomona");
    fs::create_dir_all(&folder).ok()?;
    Some(folder.join("history"))
}

/// Colours and the hint are datafusion-cli's. Its validator is not used: it refuses variables.
struct ReplHelper {
    looks: CliHelper,
    files: FilenameCompleter,
    dialect: String,
    words: Vec<String>,
}

impl ReplHelper {
    async fn new(runner: &Runner) -> Self {
        let dialect = runner.ctx.state().config_options().sql_parser.dialect;
        let color = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self {
            looks: CliHelper::new(&dialect, color),
            files: FilenameCompleter::new(),
            dialect: dialect.as_ref().to_owned(),
            // Without them the line can be typed as well.
            words: words(runner).await.unwrap_or_default(),
        }
    }
}

/// What can be completed: the names of functions, tables and columns.
async fn words(runner: &Runner) -> Result<Vec<String>> {
    let state = runner.ctx.state();
    let functions = [
        state.scalar_functions().keys().cloned().collect::<Vec<_>>(),
        state.aggregate_functions().keys().cloned().collect(),
        state.window_functions().keys().cloned().collect(),
        state.table_functions().keys().cloned().collect(),
    ];
    let mut words = functions.concat();
    for batch in runner.ctx.sql(USER_COLUMNS).await?.collect().await? {
        if let Some(names) = batch.columns().first().and_then(|names| names.as_string_opt::<i32>()) {
            words.extend(names.iter().flatten().map(str::to_owned));
        }
    }
    words.sort_unstable();
    words.dedup();
    Ok(words)
}

impl Completer for ReplHelper {
    type Candidate = Pair;

    fn complete(&self, line: &str, pos: usize, context: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let before = line.get(..pos).unwrap_or(line);
        if before.starts_with("\\i ") || before.matches('\'').count() % 2 == 1 {
            return self.files.complete(line, pos, context);
        }
        let start = before
            .rfind(|c: char| !(c.is_alphanumeric() || c == '_'))
            .map_or(0, |i| {
                // Behind the character, however long it is.
                i + before[i..].chars().next().map_or(0, char::len_utf8)
            });
        let prefix = before[start..].to_lowercase();
        let found = self
            .words
            .iter()
            .filter(|word| !prefix.is_empty() && word.starts_with(&prefix));
        Ok((
            start,
            found
                .map(|word| Pair {
                    display: word.clone(),
                    replacement: word.clone(),
                })
                .collect(),
        ))
    }
}

impl Hinter for ReplHelper {
    type Hint = String;

    fn hint(&self, line: &str, pos: usize, context: &Context<'_>) -> Option<String> {
        self.looks.hint(line, pos, context)
    }
}

impl Highlighter for ReplHelper {
    fn highlight<'l>(&self, line: &'l str, pos: usize) -> Cow<'l, str> {
        self.looks.highlight(line, pos)
    }

    fn highlight_hint<'h>(&self, hint: &'h str) -> Cow<'h, str> {
        self.looks.highlight_hint(hint)
    }

    fn highlight_char(&self, line: &str, pos: usize, kind: CmdKind) -> bool {
        self.looks.highlight_char(line, pos, kind)
    }
}

impl Validator for ReplHelper {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        let input = context.input();
        let dialect = dialect_from_str(&self.dialect).unwrap_or_else(|| Box::new(GenericDialect {}));
        Ok(
            match last_command(input).is_some() || script::is_complete(input, dialect.as_ref()) {
                true => ValidationResult::Valid(None),
                false => ValidationResult::Incomplete,
            },
        )
    }
}

impl Helper for ReplHelper {}
