//! `pomona functions`: the documentation of every function, with the output of its example, as
//! Markdown. `docs/functions.md` is its output.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;

use datafusion::common::exec_datafusion_err;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::SessionState;
use datafusion::logical_expr::Documentation;
use datafusion::prelude::SessionContext;

use super::print::table;
use super::run::{Runner, Stop};

/// A table function has no [`Documentation`].
struct TableFunction {
    name: &'static str,
    syntax: &'static str,
    description: &'static str,
    example: &'static str,
}

const TABLE_FUNCTIONS: [TableFunction; 2] = [
    TableFunction {
        name: "images",
        syntax: "images(location [, path_pattern])",
        description: "The images below a location, as a table: `path` (the full URL), `content` (the encoded bytes, \
                      read only where a query needs them) and `label` (the name of the folder that holds the image). \
                      The location is `s3://…`, `gs://…`, `az://…`, `http(s)://…`, a local folder, or the sample \
                      data set `sample://fruits/`; a path pattern such as `'{split}/{label}/*'` makes columns of its \
                      folders. `CREATE EXTERNAL TABLE … STORED AS IMAGES` takes options as well.",
        example: "SELECT label, count(*) AS images FROM images('sample://fruits/Training/') GROUP BY label ORDER BY label;",
    },
    TableFunction {
        name: "models",
        syntax: "models()",
        description: "The networks that `embed` finds by name, as a table. `pomona model add` adds one.",
        example: "SELECT name, input_width, dimensions, preprocessing FROM models() WHERE name = 'resnet-mini';",
    },
];

/// Prints the documentation of all of Pomona's functions.
pub(super) async fn run(runner: &mut Runner) -> Result<(), Stop> {
    let text = markdown(&runner.ctx).await?;
    runner
        .out
        .write_all(text.as_bytes())
        .and_then(|()| runner.out.flush())
        .map_err(DataFusionError::from)?;
    Ok(())
}

/// The documentation of all of Pomona's functions as Markdown; runs every example in `ctx`.
///
/// # Errors
/// Where an example fails, or a function has no documentation.
pub async fn markdown(ctx: &SessionContext) -> Result<String> {
    let documented = documented()?;
    let mut sections: Vec<&str> = Vec::new();
    for (_, documentation) in &documented {
        if !sections.contains(&documentation.doc_section.label) {
            sections.push(documentation.doc_section.label);
        }
    }

    let mut text = String::from(
        "# Functions\n\n<!-- Written by `pomona functions`, from the functions themselves. -->\n\n\
         | function | does |\n|---|---|\n",
    );
    for function in &TABLE_FUNCTIONS {
        writeln!(
            text,
            "| [`{0}`](#{0}) | {1} |",
            function.name,
            first_sentence(function.description)
        )?;
    }
    for (name, documentation) in &documented {
        writeln!(
            text,
            "| [`{name}`](#{name}) | {} |",
            first_sentence(&documentation.description)
        )?;
    }

    writeln!(text, "\n## Tables")?;
    for function in &TABLE_FUNCTIONS {
        writeln!(
            text,
            "\n### {}\n\n`{}`\n\n{}",
            function.name, function.syntax, function.description
        )?;
        text.push_str(&example(ctx, function.name, function.example).await?);
    }
    for section in sections {
        writeln!(text, "\n## {section}")?;
        for (name, documentation) in documented.iter().filter(|(_, d)| d.doc_section.label == section) {
            writeln!(text, "\n### {name}\n\n{}", described(documentation))?;
            if let Some(sql) = &documentation.sql_example {
                text.push_str(&example(ctx, name, statement(sql)).await?);
            }
        }
    }
    Ok(text)
}

/// Every scalar and aggregate function, in the order in which they are registered.
fn documented() -> Result<Vec<(String, Documentation)>> {
    let scalar = pomona_udfs::scalar_functions();
    let aggregate = pomona_udfs::aggregate_functions();
    let scalar = scalar.iter().map(|f| (f.name().to_owned(), f.documentation().cloned()));
    let aggregate = aggregate
        .iter()
        .map(|f| (f.name().to_owned(), f.documentation().cloned()));
    let documented = scalar.chain(aggregate).map(|(name, documentation)| {
        let documentation = documentation.ok_or_else(|| exec_datafusion_err!("{name} has no documentation"))?;
        Ok((name, documentation))
    });
    documented.collect()
}

/// Syntax, description and arguments.
fn described(documentation: &Documentation) -> String {
    let mut text = format!(
        "`{}`\n\n{}",
        documentation.syntax_example,
        documentation.description.trim()
    );
    for syntax in documentation.alternative_syntax.iter().flatten() {
        text.push_str(&format!("\n\nAlso: `{syntax}`"));
    }
    let arguments = documentation.arguments.iter().flatten();
    let arguments: String = arguments
        .map(|(name, meaning)| format!("\n- `{name}`: {}", meaning.trim()))
        .collect();
    if !arguments.is_empty() {
        text.push('\n');
        text.push_str(&arguments);
    }
    text
}

/// What `\h name` prints: of our functions and of DataFusion's. `None` where there is no such function.
pub(super) fn help(state: &SessionState, name: &str) -> Option<String> {
    if let Some(function) = TABLE_FUNCTIONS.iter().find(|function| function.name == name) {
        return Some(format!(
            "{}\n\n{}\n\nExample:\n{}",
            function.syntax, function.description, function.example
        ));
    }
    let documentation = [
        state.scalar_functions().get(name).map(|f| f.documentation()),
        state.aggregate_functions().get(name).map(|f| f.documentation()),
        state.window_functions().get(name).map(|f| f.documentation()),
    ];
    let documentation = documentation.into_iter().flatten().next()?;
    Some(documentation.map_or_else(
        || format!("{name} has no documentation"),
        |documentation| {
            let example = documentation
                .sql_example
                .as_deref()
                .map(|sql| format!("\n\nExample:\n{}", statement(sql)));
            format!(
                "{}{}",
                described(documentation).replace('`', ""),
                example.unwrap_or_default()
            )
        },
    ))
}

/// What `\h` prints: each of our functions with its first sentence.
pub(super) fn overview() -> Result<String> {
    let tables = TABLE_FUNCTIONS
        .iter()
        .map(|f| (f.name.to_owned(), first_sentence(f.description).to_owned()));
    let others = documented()?
        .into_iter()
        .map(|(name, d)| (name, first_sentence(&d.description).to_owned()));
    let mut text = String::new();
    for (name, sentence) in tables.chain(others) {
        writeln!(text, "{name:<18} {sentence}")?;
    }
    text.push_str("\n\\h name tells more; SHOW FUNCTIONS lists those of DataFusion as well.");
    Ok(text)
}

fn first_sentence(text: &str) -> &str {
    let line = text.trim().lines().next().unwrap_or_default();
    line.split_inclusive(". ").next().unwrap_or_default().trim()
}

/// The statement of an example, out of its fences.
fn statement(example: &str) -> &str {
    let inner = example.trim();
    inner
        .strip_prefix("```sql")
        .unwrap_or(inner)
        .trim_end_matches("```")
        .trim()
}

/// An example and what it gives, both fenced.
async fn example(ctx: &SessionContext, name: &str, sql: &str) -> Result<String> {
    let run = async {
        let result = ctx.sql(sql.trim_end_matches(';')).await?;
        let schema = Arc::clone(result.schema().inner());
        table(schema, &result.collect().await?)
    };
    let output = run
        .await
        .map_err(|e| e.context(format!("the example of {name} fails: {sql}")))?;
    Ok(format!("\n```sql\n{sql}\n```\n\n```text\n{}\n```\n", output.trim_end()))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_statement_of_an_example_has_no_fences() {
        assert_eq!(statement("```sql\nSELECT 1;\n```"), "SELECT 1;");
        assert_eq!(statement("SELECT 1;"), "SELECT 1;");
    }

    #[test]
    fn the_first_sentence_is_short() {
        assert_eq!(first_sentence("Resizes an image. More."), "Resizes an image.");
        assert_eq!(first_sentence("\n One.\nTwo."), "One.");
    }

    #[test]
    fn help_knows_our_functions_and_those_of_datafusion() {
        let state = crate::session().unwrap().state();
        for name in ["images", "resize", "pca_fit", "abs", "avg", "row_number"] {
            let text = help(&state, name).unwrap();
            assert!(text.contains(name) && !text.contains("```"), "{name}: {text}");
        }
        assert_eq!(help(&state, "no_such_function"), None);
        assert!(overview().unwrap().contains("pca_transform"));
    }
}
