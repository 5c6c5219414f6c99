//! What the integration tests share.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, RecordBatch};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type};
use datafusion::error::Result;
use datafusion::prelude::SessionContext;
use pomona::udfs::embed::engines::library::library;

/// The folder with the real images (`data/`) and models (`models/`); the tests that need it pass
/// without it, and say so.
#[expect(clippy::print_stderr, reason = "a skipped test must not look like a passed one")]
pub(crate) fn real_data() -> Option<PathBuf> {
    let folder = std::env::var_os("POMONA_REAL_DATA").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: POMONA_REAL_DATA is not set");
    }
    folder
}

/// onnxruntime's library; the tests that need it pass without it, and say so.
#[expect(clippy::print_stderr, reason = "a skipped test must not look like a passed one")]
pub(crate) fn onnxruntime() -> Option<&'static Path> {
    match library() {
        Ok(library) => Some(library.path()),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// A file that the references' script made, see `tests/references/make_images.py`.
pub(crate) fn reference(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/references")
        .join(name)
}

/// The rows of a query, or nothing of a statement.
pub(crate) async fn rows(session: &SessionContext, sql: &str) -> Result<RecordBatch> {
    let frame = session.sql(sql).await?;
    let planned = Arc::clone(frame.schema().inner());
    let batches = frame.collect().await?;
    let schema = batches.first().map_or(planned, RecordBatch::schema);
    Ok(concat_batches(&schema, &batches)?)
}

fn column(rows: &RecordBatch, name: &str, data_type: &DataType) -> ArrayRef {
    cast(rows.column_by_name(name).unwrap(), data_type).unwrap()
}

/// A column of strings.
pub(crate) fn strings(rows: &RecordBatch, name: &str) -> Vec<String> {
    let column = column(rows, name, &DataType::Utf8);
    column
        .as_string::<i32>()
        .iter()
        .map(|value| value.unwrap().to_owned())
        .collect()
}

/// A column of integers.
pub(crate) fn integers(rows: &RecordBatch, name: &str) -> Vec<i64> {
    let column = column(rows, name, &DataType::Int64);
    column.as_primitive::<Int64Type>().iter().map(Option::unwrap).collect()
}

/// A column of vectors.
pub(crate) fn vectors(rows: &RecordBatch, name: &str) -> Vec<Vec<f64>> {
    let lists = column(
        rows,
        name,
        &DataType::List(Field::new_list_field(DataType::Float64, true).into()),
    );
    let lists = lists.as_list::<i32>();
    lists
        .iter()
        .map(|vector| vector.unwrap().as_primitive::<Float64Type>().values().to_vec())
        .collect()
}

/// The `pomona` binary, started in the project's folder, out of reach of the credentials, settings
/// and models of whoever runs the tests.
pub(crate) fn pomona() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pomona"));
    for (name, _) in std::env::vars_os() {
        if ["AWS_", "POMONA_", "XDG_"]
            .iter()
            .any(|prefix| name.to_string_lossy().starts_with(prefix))
        {
            command.env_remove(name);
        }
    }
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("HOME", env!("CARGO_TARGET_TMPDIR"))
        .env("AWS_EC2_METADATA_DISABLED", "true");
    command
}

/// Standard output of a command that must succeed.
pub(crate) fn success(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", told(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Everything that a command which must fail has said.
pub(crate) fn failure(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?}\n{}", told(&output));
    told(&output)
}

/// Runs a command that must succeed; the most memory that it held, in bytes. Only Linux tells.
pub(crate) fn peak_memory(command: &mut Command) -> u64 {
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        // The kernel keeps the maximum, so that looking now and then is enough. It is gone once the
        // process has ended.
        let kibibytes = std::fs::read_to_string(&status).ok().and_then(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
            line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
        });
        peak = peak.max(kibibytes.unwrap_or(0) * 1024);
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{command:?}: {status}");
            return peak;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn told(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|bytes| String::from_utf8_lossy(bytes))
        .concat()
}
