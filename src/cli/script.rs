//! Scripts: a text becomes statements and commands, each with its line, and variables become text.
//!
//! | in SQL | becomes |
//! |---|---|
//! | `:'name'` | the value as a string literal, quotes doubled |
//! | `:"name"` | the value as a quoted identifier |
//! | `:name` | the value as it is |
//!
//! Strings, comments, casts (`::`) and the colons of slices and struct literals (`a[1:n]`,
//! `{'k':'v'}`: a colon that touches what is left of it) are left alone. A line that starts with a
//! backslash, between two statements, is a command:
//!
//! | command | does |
//! |---|---|
//! | `\set name value` | sets a variable |
//! | `\default name value` | sets a variable unless it is set: a script's defaults, below `-v` |
//! | `\echo text` | prints a heading |
//! | `\i file` | runs a file; relative to the script |
//! | `\require table message` | ends the script with the message unless the table or view has a row |
//!
//! A command's text may hold variables too (`\default out :target/out.parquet`). After a value that
//! ends in `/`, one `/` that follows is dropped: a folder may be given with its slash or without.
//!
//! Pure: nothing here reads a file or prints.

use std::collections::BTreeMap;
use std::ops::Range;

use datafusion::sql::sqlparser::dialect::Dialect;
use datafusion::sql::sqlparser::tokenizer::{Token, TokenWithSpan, Tokenizer, Whitespace};

use crate::stores::redact;

/// What is wrong with a script, and where.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ScriptError {
    /// Counted from 1.
    pub(crate) line: usize,
    /// For a person.
    pub(crate) message: String,
}

impl ScriptError {
    fn new(line: usize, message: impl Into<String>) -> Self {
        Self {
            line,
            message: message.into(),
        }
    }
}

/// The variables of a session, by name.
#[derive(Debug, Default, Clone)]
pub(crate) struct Variables(BTreeMap<String, String>);

impl Variables {
    /// Sets a variable, whatever it was.
    ///
    /// # Errors
    /// Where `name` cannot be written behind a colon.
    pub(crate) fn set(&mut self, name: &str, value: String) -> Result<(), String> {
        if !is_name(name) {
            return Err(format!(
                "'{name}' is no name of a variable: letters, digits and _, no digit first"
            ));
        }
        self.0.insert(name.to_owned(), value);
        Ok(())
    }

    /// The value of a variable.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// All of them, sorted by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    fn require(&self, name: &str) -> Result<&str, String> {
        self.get(name)
            .ok_or_else(|| format!("variable {name} is not set: pass -v {name}=…"))
    }

    /// Replaces every `:name` in the text of a command; text in single quotes is taken as it is, without them.
    ///
    /// # Errors
    /// Where a variable is not set.
    pub(crate) fn expand(&self, text: &str) -> Result<String, String> {
        let mut expanded = String::with_capacity(text.len());
        let mut rest = text;
        let mut before = ' ';
        while let Some(c) = rest.chars().next() {
            let after = &rest[c.len_utf8()..];
            let name_len = after.find(|c: char| !is_name_char(c)).unwrap_or(after.len());
            let name = &after[..name_len];
            if c == '\''
                && !before.is_alphanumeric()
                && let Some((quoted, tail)) = split_quoted(after)
            {
                expanded.push_str(&quoted);
                rest = tail;
            } else if c == ':' && !before.is_alphanumeric() && is_name(name) {
                let value = self.require(name)?;
                expanded.push_str(value);
                rest = &after[name_len..];
                if value.ends_with('/') {
                    rest = rest.strip_prefix('/').unwrap_or(rest);
                }
            } else {
                expanded.push(c);
                rest = after;
            }
            before = c;
        }
        Ok(expanded)
    }
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn is_name(name: &str) -> bool {
    name.chars().all(is_name_char) && name.starts_with(|c: char| !c.is_ascii_digit())
}

/// Splits `it''s' tail` into `it's` and ` tail`; `None` where the quote is not closed.
fn split_quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let (part, tail) = rest.split_once('\'')?;
        value.push_str(part);
        match tail.strip_prefix('\'') {
            Some(tail) => {
                value.push('\'');
                rest = tail;
            }
            None => return Some((value, tail)),
        }
    }
}

/// One step of a script.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// An SQL statement.
    Sql(Statement),
    /// A line that starts with a backslash.
    Command {
        /// Counted from 1.
        line: usize,
        /// What it says.
        command: Command,
    },
}

/// A command of a script; its texts are not expanded yet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Sets a variable.
    Set(String, String),
    /// Sets a variable unless it is set.
    Default(String, String),
    /// Prints a heading.
    Echo(String),
    /// Runs a file.
    Include(String),
    /// Fails with a message unless a table has a row.
    Require(String, String),
}

impl Command {
    /// Reads a command without its backslash; `None` where it is none of a script's commands.
    ///
    /// # Errors
    /// Where an argument is missing.
    pub(crate) fn parse(line: &str) -> Option<Result<Self, String>> {
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let assignment = |make: fn(String, String) -> Self| {
            let (name, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
            match is_name(name) {
                true => Ok(make(name.to_owned(), value.trim_start().to_owned())),
                false => Err(format!("\\{word} takes a name and a value: \\{word} target output/")),
            }
        };
        Some(match word {
            "set" => assignment(Self::Set),
            "default" => assignment(Self::Default),
            "echo" => Ok(Self::Echo(rest.to_owned())),
            "i" if rest.is_empty() => Err("\\i takes a file".to_owned()),
            "i" => Ok(Self::Include(rest.to_owned())),
            "require" => match rest.split_once(char::is_whitespace) {
                Some((table, message)) => Ok(Self::Require(table.to_owned(), message.trim_start().to_owned())),
                None => Err("\\require takes a table and a message: \\require images there are no images".to_owned()),
            },
            _ => return None,
        })
    }
}

/// An SQL statement whose variables are not filled in yet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Statement {
    /// The line that it starts on, counted from 1.
    pub(crate) line: usize,
    /// As it is written, with the values of secrets left out.
    shown: String,
    pieces: Vec<Piece>,
}

#[derive(Debug, PartialEq, Eq)]
enum Piece {
    Sql(String),
    Raw(String),
    Literal(String),
    Identifier(String),
}

impl Statement {
    /// The statement with its variables filled in, on the line that it has in its script: so an error of
    /// the parser names that line.
    ///
    /// # Errors
    /// Where a variable is not set.
    pub(crate) fn sql(&self, variables: &Variables) -> Result<String, ScriptError> {
        let mut sql = "\n".repeat(self.line - 1);
        for piece in &self.pieces {
            let require = |name: &str| {
                variables
                    .require(name)
                    .map_err(|message| ScriptError::new(self.line, message))
            };
            match piece {
                Piece::Sql(text) => sql.push_str(text),
                Piece::Raw(name) => sql.push_str(require(name)?),
                Piece::Literal(name) => sql.push_str(&quoted(require(name)?, '\'')),
                Piece::Identifier(name) => sql.push_str(&quoted(require(name)?, '"')),
            }
        }
        Ok(sql)
    }

    /// The beginning of the statement, for an error message.
    pub(crate) fn shown(&self) -> String {
        const LINES: usize = 8;
        const CHARS: usize = 500;
        let mut shown: String = self.shown.chars().take(CHARS).collect();
        let end = shown.match_indices('\n').nth(LINES - 1).map(|(end, _)| end);
        shown.truncate(end.unwrap_or(shown.len()));
        if shown.len() < self.shown.len() {
            shown.push_str(" …");
        }
        shown
    }
}

/// Puts `text` between quotes and doubles those in it.
fn quoted(text: &str, quote: char) -> String {
    let doubled = text.replace(quote, &format!("{quote}{quote}"));
    format!("{quote}{doubled}{quote}")
}

/// Splits a script into its steps.
///
/// # Errors
/// Where a string or comment does not end, a command is unknown, or a statement runs into a command.
pub(crate) fn parse(text: &str, dialect: &dyn Dialect) -> Result<Vec<Step>, ScriptError> {
    let mut steps = Vec::new();
    let (mut sql_start, mut sql_line) = (0, 1);
    for (line, range) in command_lines(text) {
        let sql = &text[sql_start..range.start];
        // Where the SQL before it does not end in a legal state, this line is part of a string or comment.
        let Ok(tokens) = tokens(sql, sql_line, dialect) else {
            continue;
        };
        let command = text[range.clone()].trim();
        for statement in statements(&tokens) {
            if !statement.closed {
                return Err(ScriptError::new(
                    statement.line(),
                    format!("the statement has no ';' before the command {command}"),
                ));
            }
            steps.push(Step::Sql(statement.build()));
        }
        let known = Command::parse(command.strip_prefix('\\').unwrap_or(command)).unwrap_or_else(|| {
            Err(format!(
                "{command} is not a command of a script: those are \\set, \\default, \\echo, \\i and \\require"
            ))
        });
        steps.push(Step::Command {
            line,
            command: known.map_err(|message| ScriptError::new(line, message))?,
        });
        (sql_start, sql_line) = (range.end, line + 1);
    }
    let tokens = tokens(&text[sql_start..], sql_line, dialect)?;
    steps.extend(
        statements(&tokens)
            .into_iter()
            .map(|statement| Step::Sql(statement.build())),
    );
    Ok(steps)
}

/// Does the text end where a statement ends? What a person types is sent when it does.
pub(crate) fn is_complete(text: &str, dialect: &dyn Dialect) -> bool {
    tokens(text, 1, dialect).is_ok_and(|tokens| {
        tokens
            .iter()
            .rev()
            .find(|token| !token.is_space())
            .is_none_or(|token| token.token == Token::SemiColon)
    })
}

/// The lines that start with a backslash: their numbers, and where they are with their line end.
fn command_lines(text: &str) -> impl Iterator<Item = (usize, Range<usize>)> {
    text.split_inclusive('\n')
        .scan(0, |end, line| {
            let start = *end;
            *end += line.len();
            Some((line, start..*end))
        })
        .enumerate()
        .filter(|(_, (line, _))| line.trim_start().starts_with('\\'))
        .map(|(index, (_, range))| (index + 1, range))
}

/// A token, its text and its line.
struct Piecewise<'a> {
    token: Token,
    text: &'a str,
    line: usize,
}

impl Piecewise<'_> {
    fn is_space(&self) -> bool {
        matches!(self.token, Token::Whitespace(_))
    }

    /// Can this end an expression? Then a colon that touches it is an operator, not a variable.
    fn ends_expression(&self) -> bool {
        matches!(
            self.token,
            Token::Word(_)
                | Token::Number(..)
                | Token::SingleQuotedString(_)
                | Token::RParen
                | Token::RBracket
                | Token::RBrace
        )
    }
}

/// Tokenizes `text`, whose first line is line `first_line` of the script.
fn tokens<'a>(text: &'a str, first_line: usize, dialect: &dyn Dialect) -> Result<Vec<Piecewise<'a>>, ScriptError> {
    let absolute = |line: u64| usize::try_from(line).unwrap_or(1).saturating_sub(1) + first_line;
    let tokens = Tokenizer::new(dialect, text)
        .with_unescape(false)
        .tokenize_with_location()
        .map_err(|error| ScriptError::new(absolute(error.location.line), error.message))?;

    // The tokenizer counts lines and characters; the text is cut at bytes.
    let mut chars = text.char_indices().peekable();
    let (mut line, mut column, mut start) = (1_u64, 1_u64, 0);
    let pieces = tokens.into_iter().map(|TokenWithSpan { token, span }| {
        while (line, column) < (span.end.line, span.end.column) {
            match chars.next() {
                Some((_, '\n')) => (line, column) = (line + 1, 1),
                Some(_) => column += 1,
                None => break,
            }
        }
        let end = chars.peek().map_or(text.len(), |(index, _)| *index);
        let piece = Piecewise {
            token,
            text: &text[start..end],
            line: absolute(span.start.line),
        };
        start = end;
        piece
    });
    Ok(pieces.collect())
}

/// The tokens of one statement, without the semicolon and without spaces and comments around it.
struct Unbuilt<'t, 'a> {
    tokens: &'t [Piecewise<'a>],
    closed: bool,
}

fn statements<'t, 'a>(tokens: &'t [Piecewise<'a>]) -> Vec<Unbuilt<'t, 'a>> {
    let mut statements = Vec::new();
    let mut rest = tokens;
    loop {
        let end = rest.iter().position(|token| token.token == Token::SemiColon);
        let tokens = &rest[..end.unwrap_or(rest.len())];
        let significant = |token: &Piecewise| !token.is_space();
        if let (Some(first), Some(last)) = (
            tokens.iter().position(significant),
            tokens.iter().rposition(significant),
        ) {
            statements.push(Unbuilt {
                tokens: &tokens[first..=last],
                closed: end.is_some(),
            });
        }
        match end {
            Some(end) => rest = &rest[end + 1..],
            None => return statements,
        }
    }
}

impl Unbuilt<'_, '_> {
    fn line(&self) -> usize {
        self.tokens.first().map_or(1, |token| token.line)
    }

    fn build(&self) -> Statement {
        let mut pieces = Vec::new();
        let mut sql = String::new();
        let mut rest = self.tokens;
        let mut before: Option<&Piecewise> = None;
        while let [token, tail @ ..] = rest {
            let touches = before.is_some_and(Piecewise::ends_expression);
            let variable = match tail {
                [next, ..] if token.token == Token::Colon && !touches => variable(&next.token),
                _ => None,
            };
            match (variable, tail) {
                (Some(variable), [next, tail @ ..]) => {
                    pieces.push(Piece::Sql(std::mem::take(&mut sql)));
                    pieces.push(variable);
                    (before, rest) = (Some(next), tail);
                }
                _ => {
                    // A comment of a line needs that line's end, which belongs to its token.
                    sql.push_str(token.text);
                    (before, rest) = (Some(token), tail);
                }
            }
        }
        pieces.push(Piece::Sql(sql));
        pieces.retain(|piece| !matches!(piece, Piece::Sql(text) if text.is_empty()));
        Statement {
            line: self.line(),
            shown: shown(self.tokens),
            pieces,
        }
    }
}

/// The variable that a token behind a colon names.
fn variable(token: &Token) -> Option<Piece> {
    match token {
        Token::SingleQuotedString(name) if is_name(name) => Some(Piece::Literal(name.clone())),
        Token::Word(word) if is_name(&word.value) => match word.quote_style {
            None => Some(Piece::Raw(word.value.clone())),
            Some('"') => Some(Piece::Identifier(word.value.clone())),
            Some(_) => None,
        },
        _ => None,
    }
}

/// The statement as it is written, but a literal that follows the key of a secret is left out:
/// `OPTIONS ('aws.secret_access_key' '…')`. Comments are left out as well.
fn shown(tokens: &[Piecewise]) -> String {
    let names_secret = |text: &str| {
        let text = text.to_ascii_lowercase();
        let marks = ["key", "secret", "token", "password"];
        marks.iter().any(|mark| text.contains(mark))
    };
    let mut shown = String::new();
    let mut after_secret_key = false;
    for token in tokens {
        match &token.token {
            Token::Whitespace(Whitespace::SingleLineComment { .. }) => shown.push('\n'),
            Token::Whitespace(Whitespace::MultiLineComment(_)) => {}
            // A keyword, or a column that has such a name, is told from a key by what follows: a string.
            Token::Word(word) => {
                shown.push_str(token.text);
                after_secret_key = names_secret(&word.value);
            }
            Token::Whitespace(_) | Token::Eq | Token::Period => shown.push_str(token.text),
            literal if is_string(literal) => {
                match after_secret_key {
                    true => shown.push_str("'…'"),
                    // User and password of a URL, and its signature.
                    false if token.text.contains("://") && token.text.contains(['@', '?']) => {
                        shown.push_str(&redact(token.text))
                    }
                    false => shown.push_str(token.text),
                }
                after_secret_key = !after_secret_key && names_secret(token.text);
            }
            _ => {
                shown.push_str(token.text);
                after_secret_key = false;
            }
        }
    }
    shown
}

fn is_string(token: &Token) -> bool {
    matches!(
        token,
        Token::SingleQuotedString(_)
            | Token::DoubleQuotedString(_)
            | Token::EscapedStringLiteral(_)
            | Token::UnicodeStringLiteral(_)
            | Token::NationalStringLiteral(_)
            | Token::DollarQuotedString(_)
            | Token::SingleQuotedRawStringLiteral(_)
    )
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use datafusion::sql::sqlparser::dialect::GenericDialect;

    use super::*;

    fn steps(text: &str) -> Vec<Step> {
        parse(text, &GenericDialect {}).unwrap()
    }

    fn error(text: &str) -> ScriptError {
        parse(text, &GenericDialect {}).unwrap_err()
    }

    fn sql_steps(text: &str) -> Vec<Statement> {
        let statements = steps(text).into_iter().filter_map(|step| match step {
            Step::Sql(statement) => Some(statement),
            Step::Command { .. } => None,
        });
        statements.collect()
    }

    /// Each statement's line and SQL.
    fn filled(text: &str, variables: &[(&str, &str)]) -> Vec<(usize, String)> {
        let mut set = Variables::default();
        for (name, value) in variables {
            set.set(name, (*value).to_owned()).unwrap();
        }
        let statements = sql_steps(text).into_iter();
        statements
            .map(|statement| (statement.line, statement.sql(&set).unwrap().trim().to_owned()))
            .collect()
    }

    fn owned(statements: &[(usize, &str)]) -> Vec<(usize, String)> {
        statements
            .iter()
            .map(|(line, sql)| (*line, (*sql).to_owned()))
            .collect()
    }

    #[test]
    fn semicolons_end_statements_but_not_in_strings_and_comments() {
        let text = "-- a; comment\nSELECT ';' AS \"a;b\"; /* ; \n ; */ SELECT\n $$;$$;\n\n;;SELECT 3";
        let expected = [(2, "SELECT ';' AS \"a;b\""), (3, "SELECT\n $$;$$"), (6, "SELECT 3")];
        assert_eq!(filled(text, &[]), owned(&expected));
    }

    #[test]
    fn text_beyond_ascii_and_windows_line_ends() {
        let text = "SELECT 'é🍓';\r\nSELECT 'ü' AS \"ö\" -- ß\r\n, 1;";
        let expected = [(1, "SELECT 'é🍓'"), (2, "SELECT 'ü' AS \"ö\" -- ß\r\n, 1")];
        assert_eq!(filled(text, &[]), owned(&expected));
    }

    #[test]
    fn variables_become_literals_identifiers_and_text() {
        let variables = [("dir", "it's/"), ("table", "a\"b"), ("k", "25")];
        let text = "SELECT :'dir', :\"table\", f(x, :k), :k+:k FROM t WHERE s = ':k' -- :k\n AND x::int = :k";
        let expected = "SELECT 'it''s/', \"a\"\"b\", f(x, 25), 25+25 FROM t WHERE s = ':k' -- :k\n AND x::int = 25";
        assert_eq!(filled(text, &variables), owned(&[(1, expected)]));
    }

    #[test]
    fn colons_of_slices_and_structs_are_no_variables() {
        let text = "SELECT a[1:n], {'a':'b', 'c': 1}, x:y";
        assert_eq!(filled(text, &[]), owned(&[(1, text)]));
    }

    #[test]
    fn an_option_may_be_a_variable() {
        let text = "OPTIONS ('aws.region' :'region')";
        assert_eq!(
            filled(text, &[("region", "eu")]),
            owned(&[(1, "OPTIONS ('aws.region' 'eu')")])
        );
    }

    #[test]
    fn a_variable_that_is_not_set_says_how_to_set_it() {
        for text in ["SELECT 1;\n SELECT :'model'", "SELECT 1;\n SELECT :model"] {
            let statement = sql_steps(text).pop().unwrap();
            let error = statement.sql(&Variables::default()).unwrap_err();
            assert_eq!(error, ScriptError::new(2, "variable model is not set: pass -v model=…"));
        }
    }

    #[test]
    fn sql_keeps_its_line() {
        let statement = sql_steps("-- one\n\nSELECT 1").pop().unwrap();
        assert_eq!(statement.sql(&Variables::default()).unwrap(), "\n\nSELECT 1");
    }

    #[test]
    fn commands_stand_between_statements() {
        let text =
            "\\echo it's\n  \\set a b c\nSELECT '\n\\echo no\n';\n\\i x.sql\n\\default a\n\\require t  no :row\n";
        let commands = [
            (1, Command::Echo("it's".into())),
            (2, Command::Set("a".into(), "b c".into())),
            (6, Command::Include("x.sql".into())),
            (7, Command::Default("a".into(), String::new())),
            (8, Command::Require("t".into(), "no :row".into())),
        ];
        let found: Vec<_> = steps(text)
            .into_iter()
            .filter_map(|step| match step {
                Step::Command { line, command } => Some((line, command)),
                Step::Sql(_) => None,
            })
            .collect();
        assert_eq!(found, commands);
        assert_eq!(filled(text, &[]), owned(&[(3, "SELECT '\n\\echo no\n'")]));
    }

    #[test]
    fn errors_name_the_line() {
        assert_eq!(error("SELECT 1;\nSELECT 'a\n;").line, 2);
        let unfinished = error("\n\nSELECT 1\n\\echo x\n");
        assert_eq!(
            unfinished,
            ScriptError::new(3, "the statement has no ';' before the command \\echo x")
        );
        assert_eq!(error("\\set 1a b").line, 1);
        assert_eq!(error("SELECT 1;\n\\require t").line, 2);
        assert!(error("SELECT 1;\n\\frobnicate").message.contains("\\default"));
    }

    #[test]
    fn commands_expand_variables() {
        let mut variables = Variables::default();
        variables.set("target", "s3://b/out/".into()).unwrap();
        variables.set("dir", "out".into()).unwrap();
        let expand = |text: &str| variables.expand(text);
        assert_eq!(expand(":target/x.parquet").unwrap(), "s3://b/out/x.parquet");
        assert_eq!(expand(":dir/x.parquet").unwrap(), "out/x.parquet");
        assert_eq!(
            expand("sample://fruits/Training/").unwrap(),
            "sample://fruits/Training/"
        );
        assert_eq!(expand("'it''s :dir' :dir").unwrap(), "it's :dir out");
        assert_eq!(expand("it's 12:30, isn't it").unwrap(), "it's 12:30, isn't it");
        assert_eq!(expand(":x").unwrap_err(), "variable x is not set: pass -v x=…");
    }

    #[test]
    fn a_line_is_sent_when_its_statement_ends() {
        let complete = |text| is_complete(text, &GenericDialect {});
        assert!(complete("SELECT 1;") && complete("SELECT ';' ; -- done") && complete(" "));
        assert!(!complete("SELECT 1") && !complete("SELECT ';") && !complete("SELECT 1; SELECT"));
    }

    #[test]
    fn what_is_shown_holds_no_secret_however_it_is_written() {
        for text in [
            "OPTIONS (aws.secret_access_key 'hidden')",
            "OPTIONS (\"aws.secret_access_key\" 'hidden')",
            "OPTIONS ('aws.secret_access_key' E'hidden')",
            "SET aws.session_token = 'hidden'",
            "SELECT * FROM images('https://user:hidden@host/a')",
            "SELECT * FROM images('https://host/a?sig=hidden')",
        ] {
            let shown = sql_steps(text)[0].shown();
            assert!(!shown.contains("hidden"), "{shown}");
        }
        let text = "SELECT path FROM images('s3://bucket/Granny  Smith/') WHERE label = 'a'";
        assert_eq!(sql_steps(text)[0].shown(), text);
    }

    #[test]
    fn what_is_shown_is_short_and_holds_no_secret() {
        let text = "CREATE EXTERNAL TABLE t -- c\n OPTIONS ('aws.secret_access_key' 'abc', 'aws.region' 'eu')";
        let statement = sql_steps(text).pop().unwrap();
        let shown = "CREATE EXTERNAL TABLE t \n OPTIONS ('aws.secret_access_key' '…', 'aws.region' 'eu')";
        assert_eq!(statement.shown(), shown);

        let long = sql_steps(&"SELECT\n".repeat(20)).pop().unwrap();
        assert_eq!(long.shown().lines().count(), 8);
    }
}
