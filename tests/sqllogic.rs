//! Runs every `tests/slt/*.slt` in a session of its own.
//!
//! The format is [sqllogictest](https://sqlite.org/sqllogictest)'s, and values are written as
//! DataFusion's own tests write them: floats rounded to 12 decimals, an empty string as `(empty)`,
//! the lines of a cell that has several (a plan) as rows `01)first`, `02)--second`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Float32Type, Float64Type};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use async_trait::async_trait;
use datafusion::error::{DataFusionError, Result};
use datafusion::prelude::SessionContext;
use sqllogictest::harness::{self, Arguments, Failed, Trial};
use sqllogictest::{AsyncDB, DBOutput, DefaultColumnType, Runner};

struct Session(SessionContext);

#[async_trait]
impl AsyncDB for Session {
    type Error = DataFusionError;
    type ColumnType = DefaultColumnType;

    async fn run(&mut self, sql: &str) -> Result<DBOutput<DefaultColumnType>> {
        let frame = self.0.sql(sql).await?;
        let types: Vec<_> = frame.schema().fields().iter().map(column_type).collect();
        let batches = frame.collect().await?;
        if types.is_empty() {
            return Ok(DBOutput::StatementComplete(0));
        }
        let mut rows = Vec::new();
        for batch in &batches {
            for row in 0..batch.num_rows() {
                rows.extend(lines(cells(batch, row)?));
            }
        }
        Ok(DBOutput::Rows { types, rows })
    }

    async fn shutdown(&mut self) {}
}

fn column_type(field: &Arc<Field>) -> DefaultColumnType {
    match field.data_type() {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => DefaultColumnType::Text,
        t if t.is_integer() => DefaultColumnType::Integer,
        t if t.is_floating() => DefaultColumnType::FloatingPoint,
        _ => DefaultColumnType::Any,
    }
}

fn cells(batch: &RecordBatch, row: usize) -> Result<Vec<String>> {
    batch.columns().iter().map(|column| cell(column, row)).collect()
}

fn cell(column: &ArrayRef, row: usize) -> Result<String> {
    if column.is_null(row) {
        return Ok("NULL".to_owned());
    }
    Ok(match column.data_type() {
        DataType::Float32 => decimal(&column.as_primitive::<Float32Type>().value(row).to_string()),
        DataType::Float64 => decimal(&column.as_primitive::<Float64Type>().value(row).to_string()),
        _ => {
            let options = FormatOptions::default().with_null("NULL");
            let text = ArrayFormatter::try_new(column, &options)?.value(row).to_string();
            if text.is_empty() { "(empty)".to_owned() } else { text }
        }
    })
}

/// Rounds to 12 decimals; a float's shortest decimal form comes in.
fn decimal(shortest: &str) -> String {
    let decimals = shortest.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    let rounded = match shortest.parse::<f64>() {
        Ok(value) if decimals > 12 => format!("{value:.12}")
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned(),
        _ => shortest.to_owned(),
    };
    match rounded.as_str() {
        "-0" => "0".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        _ => rounded,
    }
}

/// A row of which the last cell has several lines becomes several rows. Leading spaces mean
/// something in a plan, and nothing in sqllogictest: they become dashes.
fn lines(mut cells: Vec<String>) -> Vec<Vec<String>> {
    match cells.pop() {
        Some(last) if last.contains('\n') => {
            let plan = last.lines().enumerate().map(|(i, line)| {
                let text = line.trim_start();
                vec![format!("{:02}){}{text}", i + 1, "-".repeat(line.len() - text.len()))]
            });
            std::iter::once(cells).chain(plan).collect()
        }
        last => {
            cells.extend(last);
            vec![cells]
        }
    }
}

fn run(file: &Path) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut runner = Runner::new(|| async { pomona::session().map(Session) });
        runner.run_file_async(file).await?;
        Ok(())
    })
}

fn main() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/slt");
    let files: Vec<PathBuf> = folder
        .read_dir()?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    let scripts = files
        .into_iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "slt"));
    let mut tests: Vec<_> = scripts
        .map(|file| {
            let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            Trial::test(name, move || run(&file))
        })
        .collect();
    tests.sort_by(|a, b| a.name().cmp(b.name()));
    harness::run(&Arguments::from_args(), tests).exit()
}
