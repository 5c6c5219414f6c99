//! Fitting and applying models: vectors that are in memory, on one core.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[expect(dead_code, reason = "every benchmark takes the helpers that it needs")]
mod common;

use std::sync::Arc;

use arrow::array::{ArrayRef, FixedSizeListArray, Float32Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};
use common::{Engine, criterion};
use criterion::Throughput;
use datafusion::datasource::MemTable;

const ROWS: usize = 2048;
const BATCH: usize = 32;

/// Vectors with correlated elements: what a linear congruential generator draws, summed up along
/// the vector.
fn vectors(dimensions: usize) -> MemTable {
    let element = Arc::new(Field::new_list_field(DataType::Float32, false));
    let size = i32::try_from(dimensions).unwrap();
    let data_type = DataType::FixedSizeList(Arc::clone(&element), size);
    let schema = Arc::new(Schema::new(vec![Field::new("v", data_type, false)]));
    let mut state = 1_u32;
    let mut batch = || {
        let mut sum = 0.0;
        let values = Float32Array::from_iter_values((0..BATCH * dimensions).map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let drawn = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
            sum = if i % dimensions == 0 { drawn } else { 0.9 * sum + drawn };
            sum
        }));
        let lists = FixedSizeListArray::new(Arc::clone(&element), size, Arc::new(values), None);
        RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(lists) as ArrayRef]).unwrap()
    };
    let batches = (0..ROWS / BATCH).map(|_| batch()).collect();
    MemTable::try_new(Arc::clone(&schema), vec![batches]).unwrap()
}

fn main() {
    let engine = Engine::new(1);
    let mut criterion = criterion();
    for dimensions in [128, 512] {
        engine
            .session
            .register_table(format!("v{dimensions}"), Arc::new(vectors(dimensions)))
            .unwrap();
        let mut group = criterion.benchmark_group(format!("{dimensions} dimensions"));
        group.throughput(Throughput::Elements(ROWS as u64));
        for (function, fit) in [
            ("standardize", "standardize_fit(v)"),
            ("pca_transform", "pca_fit(v, 25)"),
        ] {
            let model = format!("{function}_model_{dimensions}");
            engine.run(&format!(
                "CREATE TABLE {model} AS SELECT {fit} AS model FROM v{dimensions}"
            ));
            for (name, sql) in [
                (fit, format!("SELECT {fit} FROM v{dimensions}")),
                (
                    function,
                    format!("SELECT {function}(v, (SELECT model FROM {model})) FROM v{dimensions}"),
                ),
            ] {
                group.bench_function(name, |bencher| bencher.iter(|| engine.run(&sql)));
            }
        }
        group.finish();
    }
    criterion.final_summary();
}
