//! What the tests of the statistics share: the references as tables, and models as numbers.

use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, FixedSizeListArray, Float32Array, Float64Array, Int64Array, RecordBatch,
    StringArray, StructArray,
};
use arrow::compute::concat;
use arrow::datatypes::{DataType, Field, Float32Type, Float64Type, Int64Type, Schema};
use datafusion::datasource::MemTable;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::prelude::{SessionConfig, SessionContext};
use serde_json::Value;

pub(crate) type Matrix = Vec<Vec<f64>>;

/// A file below `tests/references/`.
pub(crate) struct Case {
    pub(crate) values: Value,
    vectors: Matrix,
}

impl Case {
    /// The file of this name, such as `statistics/offset`.
    pub(crate) fn load(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/references");
        let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
        let values: Value = serde_json::from_str(&text).unwrap();
        let vectors = matrix(&values["vectors"]);
        Self { values, vectors }
    }

    /// The same vectors at another place.
    pub(crate) fn moved(mut self, by: f64) -> Self {
        self.vectors.iter_mut().flatten().for_each(|x| *x += by);
        self
    }

    pub(crate) fn vectors(&self) -> &[Vec<f64>] {
        &self.vectors
    }

    pub(crate) fn vector(&self, field: &str) -> Vec<f64> {
        vector(&self.values[field])
    }

    pub(crate) fn matrix(&self, field: &str) -> Matrix {
        matrix(&self.values[field])
    }

    /// The rows in these places as columns of their types: `id`, `v`, and `label` where there are any.
    fn columns(&self, rows: &[usize]) -> Vec<(&'static str, ArrayRef)> {
        let ids = rows.iter().map(|row| i64::try_from(*row).unwrap());
        let mut columns: Vec<(_, ArrayRef)> = vec![
            ("id", Arc::new(Int64Array::from_iter_values(ids))),
            ("v", self.vectors_column(rows)),
        ];
        if let Some(labels) = self.values["labels"].as_array() {
            let labels = rows.iter().map(|row| &labels[*row]);
            let column: ArrayRef = match &self.values["labels"][0] {
                Value::String(_) => Arc::new(StringArray::from_iter(labels.map(Value::as_str))),
                Value::Bool(_) => Arc::new(BooleanArray::from_iter(labels.map(Value::as_bool))),
                _ => Arc::new(Int64Array::from_iter(labels.map(Value::as_i64))),
            };
            columns.push(("label", column));
        }
        columns
    }

    fn vectors_column(&self, rows: &[usize]) -> ArrayRef {
        let numbers = rows.iter().flat_map(|row| &self.vectors[*row]);
        let values: ArrayRef = match self.values["element"].as_str().unwrap() {
            "f32" => Arc::new(Float32Array::from_iter_values(numbers.map(|x| *x as f32))),
            _ => Arc::new(Float64Array::from_iter_values(numbers.copied())),
        };
        let field = Arc::new(Field::new_list_field(values.data_type().clone(), true));
        let size = i32::try_from(self.vectors[0].len()).unwrap();
        Arc::new(FixedSizeListArray::new(field, size, values, None))
    }

    /// A session whose table `t` has the rows dealt out to partitions, one after another, a few to a
    /// batch; in reverse where asked.
    pub(crate) fn session(&self, partitions: usize, reverse: bool) -> SessionContext {
        let mut rows: Vec<usize> = (0..self.vectors.len()).collect();
        if reverse {
            rows.reverse();
        }
        let fields = self.columns(&[]).into_iter();
        let fields = fields.map(|(name, column)| Field::new(name, column.data_type().clone(), true));
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        let batches = |first: usize| -> Vec<RecordBatch> {
            let mine: Vec<usize> = rows.iter().skip(first).step_by(partitions).copied().collect();
            let batch = |rows: &[usize]| {
                let columns = self.columns(rows).into_iter().map(|(_, column)| column);
                RecordBatch::try_new(Arc::clone(&schema), columns.collect()).unwrap()
            };
            mine.chunks(7).map(batch).collect()
        };
        let table = MemTable::try_new(Arc::clone(&schema), (0..partitions).map(batches).collect()).unwrap();
        let session = session(partitions, None);
        session.register_table("t", Arc::new(table)).unwrap();
        session
    }
}

pub(crate) fn vector(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap()
}

pub(crate) fn matrix(value: &Value) -> Matrix {
    serde_json::from_value(value.clone()).unwrap()
}

/// A session that knows the functions, with a memory limit where one is given.
pub(crate) fn session(partitions: usize, memory: Option<usize>) -> SessionContext {
    let mut runtime = RuntimeEnvBuilder::new();
    if let Some(bytes) = memory {
        runtime = runtime.with_memory_limit(bytes, 1.0);
    }
    let config = SessionConfig::new().with_target_partitions(partitions);
    let mut session = SessionContext::new_with_config_rt(config, runtime.build_arc().unwrap());
    pomona_udfs::register_all(&mut session).unwrap();
    session
}

/// Runs a statement that returns nothing of interest.
pub(crate) async fn run(session: &SessionContext, sql: &str) {
    session.sql(sql).await.unwrap().collect().await.unwrap();
}

/// The one column that a query returns.
pub(crate) async fn column(session: &SessionContext, sql: &str) -> ArrayRef {
    let batches = session.sql(sql).await.unwrap().collect().await.unwrap();
    let columns: Vec<&dyn Array> = batches.iter().map(|batch| batch.column(0).as_ref()).collect();
    concat(&columns).unwrap()
}

/// The one value that a query returns.
pub(crate) async fn value(session: &SessionContext, sql: &str) -> ArrayRef {
    let column = column(session, sql).await;
    assert_eq!(column.len(), 1, "{sql}");
    column
}

/// The numbers that a query returns, of all vectors one after another.
pub(crate) async fn query_numbers(session: &SessionContext, sql: &str) -> Vec<f64> {
    numbers(&column(session, sql).await)
}

/// The model that a fit makes of the table `t`.
pub(crate) async fn model(session: &SessionContext, fit: &str) -> StructArray {
    let model = value(session, &format!("SELECT {fit} FROM t")).await;
    model.as_struct().clone()
}

/// What a query says that must fail.
pub(crate) async fn failure(session: &SessionContext, sql: &str) -> String {
    match session.sql(sql).await {
        Ok(query) => query.collect().await.unwrap_err().to_string(),
        Err(error) => error.to_string(),
    }
}

/// Every number in a column, also those in lists and structs.
pub(crate) fn numbers(array: &ArrayRef) -> Vec<f64> {
    match array.data_type() {
        DataType::Float64 => array.as_primitive::<Float64Type>().values().to_vec(),
        DataType::Float32 => {
            let values = array.as_primitive::<Float32Type>().values();
            values.iter().copied().map(f64::from).collect()
        }
        DataType::Int64 => {
            let values = array.as_primitive::<Int64Type>().values();
            values.iter().map(|x| *x as f64).collect()
        }
        DataType::FixedSizeList(..) => numbers(array.as_fixed_size_list().values()),
        DataType::List(_) => {
            let lists = array.as_list::<i32>();
            let (start, end) = (lists.value_offsets()[0], lists.value_offsets()[lists.len()]);
            numbers(&lists.values().slice(start as usize, (end - start) as usize))
        }
        DataType::Struct(_) => array.as_struct().columns().iter().flat_map(numbers).collect(),
        _ => vec![],
    }
}

/// Every number in a field of a model.
pub(crate) fn field(model: &StructArray, name: &str) -> Vec<f64> {
    numbers(model.column_by_name(name).unwrap())
}

/// A field of a model that is one number.
pub(crate) fn number(model: &StructArray, name: &str) -> f64 {
    let numbers = field(model, name);
    assert_eq!(numbers.len(), 1, "{name}");
    numbers[0]
}

/// A field of a model that is a word.
pub(crate) fn word<'a>(model: &'a StructArray, name: &str) -> &'a str {
    model.column_by_name(name).unwrap().as_string::<i32>().value(0)
}

/// Each number within `relative` of the expected one, or of `scale` where that is larger.
pub(crate) fn assert_close(name: &str, found: &[f64], expected: &[f64], relative: f64, scale: f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let allowed = relative * expected.abs().max(scale);
        assert!(
            (found - expected).abs() <= allowed,
            "{name}[{i}]: {found} is not {expected} within {allowed:e}"
        );
    }
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The largest absolute value.
pub(crate) fn largest(numbers: &[f64]) -> f64 {
    numbers.iter().fold(0.0, |largest, x| x.abs().max(largest))
}
