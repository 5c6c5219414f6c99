//! Every fit within the engine: groups, filters, windows, memory, and models in files.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, FixedSizeListArray, Float32Array, Int64Array, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema};
use common::{Case, assert_close, column, failure, largest, numbers, query_numbers, run, value};
use datafusion::datasource::MemTable;
use datafusion::prelude::SessionContext;

/// Each fit, with the functions that take its model.
const FITS: [(&str, &[&str]); 5] = [
    (
        "standardize_fit(v)",
        &["standardize(v, model)", "standardize(v, model, false, true)"],
    ),
    (
        "pca_fit(v, 3)",
        &["pca_transform(v, model)", "pca_inverse(pca_transform(v, model), model)"],
    ),
    ("pca_fit(v, 0.9)", &["pca_transform(v, pca_truncate(model, 2))"]),
    ("lda_fit(v, label)", &["classify(v, model)", "classify_proba(v, model)"]),
    (
        "logistic_fit(v, label)",
        &["classify(v, model)", "classify_proba(v, model, 2)"],
    ),
];

/// What the rows' order may change: logistic regression stops where its steps have become small.
fn tolerance(fit: &str) -> f64 {
    if fit.starts_with("logistic") { 1e-5 } else { 1e-10 }
}

fn assert_same_model(fit: &str, found: &ArrayRef, expected: &ArrayRef) {
    let expected = numbers(expected);
    assert_close(fit, &numbers(found), &expected, tolerance(fit), largest(&expected));
}

#[tokio::test]
async fn groups_are_fitted_apart() {
    let session = Case::load("classifiers/booleans").session(4, false);
    let split = "SELECT *, id % 3 AS side FROM t";
    for (fit, _) in FITS {
        let sql = format!("SELECT {fit} FROM ({split}) GROUP BY side ORDER BY side");
        let grouped = column(&session, &sql).await;
        for side in 0..3 {
            let alone = value(&session, &format!("SELECT {fit} FROM t WHERE id % 3 = {side}")).await;
            assert_same_model(fit, &grouped.slice(side, 1), &alone);
        }
    }
}

#[tokio::test]
async fn a_group_without_rows_has_no_model() {
    let session = Case::load("classifiers/booleans").session(2, false);
    for (fit, _) in FITS {
        let sql = format!("SELECT {fit} FILTER (WHERE id % 3 = 1) FROM t GROUP BY id % 3 ORDER BY id % 3");
        let grouped = column(&session, &sql).await;
        assert_eq!((grouped.is_null(0), grouped.is_null(2)), (true, true), "{fit}");
        let alone = value(&session, &format!("SELECT {fit} FROM t WHERE id % 3 = 1")).await;
        assert_same_model(fit, &grouped.slice(1, 1), &alone);

        let model = value(&session, &format!("SELECT {fit} FROM t WHERE id < 0")).await;
        assert!(model.is_null(0), "{fit}");
    }
}

#[tokio::test]
async fn rows_without_a_vector_or_a_label_are_nothing_to_fit() {
    for partitions in [1, 4] {
        let session = Case::load("classifiers/booleans").session(partitions, false);
        for (fit, _) in FITS {
            let labelled = fit.contains("label");
            let told = |rows: usize| match labelled {
                true => format!("_fit: none of {rows} rows has both a vector and a label: there is nothing to fit"),
                false => format!("_fit: all {rows} vectors of the fit, or of a group of it, are NULL or empty"),
            };
            for (columns, nothing) in [
                ("arrow_cast(NULL, 'List(Float64)') AS v, label", true),
                ("arrow_cast(make_array(), 'List(Float64)') AS v, label", true),
                ("v, NULL::boolean AS label", labelled),
            ] {
                let sql = format!("SELECT {fit} FROM (SELECT {columns} FROM t)");
                if nothing {
                    let message = failure(&session, &sql).await;
                    assert!(message.contains(&told(80)), "{fit} of {columns}: {message}");
                } else {
                    assert!(value(&session, &sql).await.is_valid(0), "{fit} of {columns}");
                }
            }
            // One such group is enough.
            let known = "CASE WHEN id < 60 THEN arrow_cast(v, 'List(Float64)') END AS v";
            let sql = format!("SELECT {fit} FROM (SELECT id, label, {known} FROM t) GROUP BY id < 60");
            let message = failure(&session, &sql).await;
            assert!(message.contains(&told(20)), "{fit}: {message}");
        }
    }
}

#[tokio::test]
async fn a_frame_is_fitted_as_its_rows_alone() {
    let session = Case::load("classifiers/booleans").session(1, false);
    for (fit, _) in FITS {
        // A classifier needs two rows of each label.
        let (before, after) = if fit.contains("label") { (9, 9) } else { (3, 0) };
        let fit = fit.replace("3)", "1)");
        for (start, first) in [
            (format!("{before} PRECEDING"), before),
            ("UNBOUNDED PRECEDING".to_owned(), 80),
        ] {
            let end = if after == 0 {
                "CURRENT ROW".to_owned()
            } else {
                format!("{after} FOLLOWING")
            };
            let sql = format!("SELECT {fit} OVER (ORDER BY id ROWS BETWEEN {start} AND {end}) FROM t ORDER BY id");
            let models = column(&session, &sql).await;
            assert_eq!(models.len(), 80);
            for row in (1..80).step_by(6) {
                let (first, last) = (row - first, row + after);
                let alone = format!("SELECT {fit} FROM t WHERE id BETWEEN {first} AND {last}");
                let model = models.slice(usize::try_from(row).unwrap(), 1);
                assert_same_model(
                    &format!("{fit} from {first} to {last}"),
                    &model,
                    &value(&session, &alone).await,
                );
            }
        }
    }
}

#[tokio::test]
async fn models_come_back_from_files_as_they_were() {
    for labels in ["strings", "booleans", "integers"] {
        let session = Case::load(&format!("classifiers/{labels}")).session(1, false);
        for (fit, functions) in FITS {
            let folder = tempfile::tempdir().unwrap();
            run(
                &session,
                &format!("CREATE OR REPLACE TABLE models AS SELECT {fit} AS model FROM t"),
            )
            .await;
            let model = value(&session, "SELECT model FROM models").await;
            for format in ["parquet", "json"] {
                let path = folder.path().join(format!("models.{format}"));
                let path = path.to_str().unwrap();
                run(&session, &format!("COPY models TO '{path}' STORED AS {format}")).await;
                run(
                    &session,
                    &format!("CREATE OR REPLACE EXTERNAL TABLE saved STORED AS {format} LOCATION '{path}'"),
                )
                .await;
                let saved = value(&session, "SELECT model FROM saved").await;
                for (field, expected) in model.as_struct().fields().iter().zip(model.as_struct().columns()) {
                    let what = format!("{} of {fit} from {format}", field.name());
                    let found = saved.as_struct().column_by_name(field.name()).unwrap();
                    let found = cast(found, expected.data_type()).unwrap();
                    let bits = |of: &ArrayRef| numbers(of).into_iter().map(f64::to_bits).collect::<Vec<_>>();
                    assert_eq!(bits(&found), bits(expected), "{what}");
                    assert_eq!(&found, expected, "{what}");
                }
                for function in functions {
                    let apply = |table: &str| format!("SELECT {function} FROM t CROSS JOIN {table} ORDER BY id");
                    let expected = column(&session, &apply("models")).await;
                    assert!(expected.len() >= 20 && expected.null_count() == 0);
                    let found = column(&session, &apply("saved")).await;
                    assert_eq!(&found, &expected, "{function} of {fit} from {format}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_model_beside_every_row_is_still_one_model() {
    let session = Case::load("classifiers/booleans").session(1, false);
    for (fit, functions) in FITS {
        for function in functions {
            let once = function.replace("model", &format!("(SELECT {fit} FROM t)"));
            let once = column(&session, &format!("SELECT {once} FROM t ORDER BY id")).await;
            let joined = format!("SELECT {function} FROM t CROSS JOIN (SELECT {fit} AS model FROM t) ORDER BY id");
            let joined = column(&session, &joined).await;
            assert_eq!(joined.data_type(), once.data_type());
            assert_close(function, &numbers(&joined), &numbers(&once), tolerance(fit), 1.0);
            if joined.data_type() == &DataType::Boolean {
                assert_eq!(&joined, &once);
            }
        }
    }
}

#[tokio::test]
async fn many_small_groups_need_no_matrix_each() {
    let session = common::session(2, Some(512 << 20));
    let rows = "SELECT value / 2 AS pair, array_resize([sin(value), cos(value), value % 7], 512, 0.5::double) AS v \
                FROM range(10000)";
    let fits = format!("SELECT pair, pca_fit(v, 1) AS model FROM ({rows}) GROUP BY pair");
    let sql = format!(
        "SELECT [count(*), min(model['count']), max(model['count']), \
                 sum(array_length(model['components'], 2))::bigint] FROM ({fits})"
    );
    assert_eq!(query_numbers(&session, &sql).await, [5000.0, 2.0, 2.0, 5000.0 * 512.0]);
}

/// The rows of a table `wide`, 100 to a batch.
#[derive(Clone, Copy)]
struct Wide {
    features: usize,
    labels: usize,
    partitions: usize,
    batches: usize,
}

/// 4 partitions of 600 rows.
const MANY_ROWS: Wide = Wide {
    features: 2048,
    labels: 4,
    partitions: 4,
    batches: 6,
};

/// A session with this memory, and a table `wide`.
fn narrow_session(wide: Wide, memory: usize) -> SessionContext {
    let Wide {
        features,
        labels,
        partitions,
        batches,
    } = wide;
    let size = i32::try_from(features).unwrap();
    let element = Arc::new(Field::new_list_field(DataType::Float32, true));
    let vectors = DataType::FixedSizeList(Arc::clone(&element), size);
    let schema = Arc::new(Schema::new(vec![
        Field::new("v", vectors, true),
        Field::new("label", DataType::Int64, true),
    ]));
    let batch = |first: usize| {
        let number = |i: usize, j: usize| ((i * 7919 + j * 104_729) % 1009) as f32;
        let numbers = (first..first + 100).flat_map(|i| (0..features).map(move |j| number(i, j)));
        let values = Arc::new(Float32Array::from_iter_values(numbers));
        let vectors = FixedSizeListArray::new(Arc::clone(&element), size, values, None);
        let labels = Int64Array::from_iter_values((0..100).map(|i| (i % labels) as i64));
        RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(vectors), Arc::new(labels)]).unwrap()
    };
    let partition = |first: usize| -> Vec<RecordBatch> {
        let starts = (0..batches).map(|i| 100 * (batches * first + i));
        starts.map(batch).collect()
    };
    let table = MemTable::try_new(Arc::clone(&schema), (0..partitions).map(partition).collect()).unwrap();
    let session = common::session(partitions, Some(memory));
    session.register_table("wide", Arc::new(table)).unwrap();
    session
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fit_reserves_its_memory() {
    // 2,048 features are a matrix of 32 MiB in each partition; the rows are 38 MiB in all.
    for (fit, mebibytes) in [
        ("pca_fit(v, 1)", 64),
        ("pca_fit(v)", 64),
        ("lda_fit(v, label)", 64),
        ("logistic_fit(v, label)", 16),
    ] {
        let session = narrow_session(MANY_ROWS, mebibytes << 20);
        let message = failure(&session, &format!("SELECT {fit} FROM wide")).await;
        assert!(message.contains("Resources exhausted"), "{fit}: {message}");
        // What standardizing holds is no matrix, and no rows.
        // In a session of its own: the failed query may not have given back all of its memory yet.
        let session = narrow_session(MANY_ROWS, mebibytes << 20);
        let count = "SELECT standardize_fit(v)['count'] FROM wide";
        assert_eq!(query_numbers(&session, count).await, [2400.0]);
    }
    let session = narrow_session(MANY_ROWS, 1 << 30);
    let count = "SELECT pca_fit(v, 1)['count'] FROM wide";
    assert_eq!(query_numbers(&session, count).await, [2400.0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fit_of_few_rows_reserves_what_its_model_takes() {
    // The rows are 1.6 MiB and 6.3 MiB: it is the matrix, and the steps of the coefficients, that take more.
    for (fit, features, labels, batches) in [
        ("lda_fit(v, label)", 4096, 4, 1),
        ("logistic_fit(v, label)", 8192, 50, 2),
    ] {
        let wide = Wide {
            features,
            labels,
            partitions: 1,
            batches,
        };
        let message = failure(&narrow_session(wide, 64 << 20), &format!("SELECT {fit} FROM wide")).await;
        assert!(message.contains("Resources exhausted"), "{fit}: {message}");
        let count = "SELECT standardize_fit(v)['count'] FROM wide";
        let session = narrow_session(wide, 64 << 20);
        assert_eq!(query_numbers(&session, count).await, [100.0 * batches as f64]);
    }
}
