//! `standardize_fit`, `standardize`, `pca_fit` and `pca_transform` through SQL, against scikit-learn.
//!
//! `tests/references/make_statistics.py` in the workspace makes the vectors and what is expected.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, FixedSizeListArray, Float32Array, Float64Array, RecordBatch, StructArray,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Float32Type, Float64Type, Int64Type, Schema};
use datafusion::datasource::MemTable;
use datafusion::prelude::{SessionConfig, SessionContext};
use linfa::DatasetBase;
use linfa::traits::Fit;
use linfa_reduction::Pca;
use ndarray::Array2;
use serde_json::Value;

type Matrix = Vec<Vec<f64>>;

/// A file of `tests/references/statistics/`.
struct Case {
    values: Value,
}

impl Case {
    fn load(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/references/statistics");
        let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
        Self {
            values: serde_json::from_str(&text).unwrap(),
        }
    }

    fn vector(&self, field: &str) -> Vec<f64> {
        serde_json::from_value(self.values[field].clone()).unwrap()
    }

    fn matrix(&self, field: &str) -> Matrix {
        serde_json::from_value(self.values[field].clone()).unwrap()
    }

    fn k(&self) -> usize {
        serde_json::from_value(self.values["k"].clone()).unwrap()
    }

    /// The components whose eigenvalues are equal, in groups.
    fn clusters(&self) -> Vec<Vec<usize>> {
        serde_json::from_value(self.values["clusters"].clone()).unwrap()
    }

    /// Vectors as a column of their element type.
    fn column(&self, rows: &[Vec<f64>]) -> ArrayRef {
        let size = self.vector("mean").len();
        let numbers = rows.iter().flatten();
        let values: ArrayRef = match self.values["element"].as_str().unwrap() {
            "f32" => Arc::new(Float32Array::from_iter_values(numbers.map(|x| *x as f32))),
            _ => Arc::new(Float64Array::from_iter_values(numbers.copied())),
        };
        let field = Arc::new(Field::new_list_field(values.data_type().clone(), true));
        Arc::new(FixedSizeListArray::new(
            field,
            i32::try_from(size).unwrap(),
            values,
            None,
        ))
    }

    /// A session whose table `t` has the vectors `v` dealt out to partitions, one after another, a few
    /// to a batch; in reverse where asked.
    fn session(&self, partitions: usize, reverse: bool) -> SessionContext {
        let mut rows = self.matrix("vectors");
        if reverse {
            rows.reverse();
        }
        let schema = Arc::new(Schema::new(vec![Field::new(
            "v",
            self.column(&[]).data_type().clone(),
            true,
        )]));
        let batches = |first: usize| -> Vec<RecordBatch> {
            let mine: Matrix = rows.iter().skip(first).step_by(partitions).cloned().collect();
            let batch = |rows: &[Vec<f64>]| RecordBatch::try_new(Arc::clone(&schema), vec![self.column(rows)]).unwrap();
            mine.chunks(7).map(batch).collect()
        };
        let table = MemTable::try_new(Arc::clone(&schema), (0..partitions).map(batches).collect()).unwrap();
        let mut session = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(partitions));
        pomona_udfs::register_all(&mut session).unwrap();
        session.register_table("t", Arc::new(table)).unwrap();
        session
    }
}

/// The one value that a query returns.
async fn value(session: &SessionContext, sql: &str) -> ArrayRef {
    let batches = session.sql(sql).await.unwrap().collect().await.unwrap();
    let rows: Vec<_> = batches.iter().filter(|batch| batch.num_rows() > 0).collect();
    assert_eq!((rows.len(), rows[0].num_rows()), (1, 1), "{sql}");
    Arc::clone(rows[0].column(0))
}

/// The vectors that a query returns, one after another.
async fn vectors(session: &SessionContext, sql: &str) -> Vec<f64> {
    let lists = DataType::List(Arc::new(Field::new_list_field(DataType::Float64, true)));
    let mut values = vec![];
    for batch in session.sql(sql).await.unwrap().collect().await.unwrap() {
        let column = cast(batch.column(0), &lists).unwrap();
        values.extend(column.as_list::<i32>().iter().flat_map(|row| numbers(&row.unwrap())));
    }
    values
}

async fn model(session: &SessionContext, fit: &str) -> StructArray {
    value(session, &format!("SELECT {fit} FROM t"))
        .await
        .as_struct()
        .clone()
}

async fn failure(session: &SessionContext, sql: &str) -> String {
    match session.sql(sql).await {
        Ok(query) => query.collect().await.unwrap_err().to_string(),
        Err(error) => error.to_string(),
    }
}

/// A model's vector.
fn vector(model: &StructArray, field: &str) -> Vec<f64> {
    numbers(&model.column_by_name(field).unwrap().as_list::<i32>().value(0))
}

fn components(model: &StructArray) -> Matrix {
    let components = model.column_by_name("components").unwrap().as_list::<i32>().value(0);
    components
        .as_list::<i32>()
        .iter()
        .map(|row| numbers(&row.unwrap()))
        .collect()
}

fn numbers(array: &ArrayRef) -> Vec<f64> {
    match array.data_type() {
        DataType::Float32 => array
            .as_primitive::<Float32Type>()
            .values()
            .iter()
            .copied()
            .map(f64::from)
            .collect(),
        _ => array.as_primitive::<Float64Type>().values().to_vec(),
    }
}

/// Each number within `relative` of the expected one, or of `scale` where that is larger.
fn assert_close(name: &str, found: &[f64], expected: &[f64], relative: f64, scale: f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let allowed = relative * expected.abs().max(scale);
        assert!(
            (found - expected).abs() <= allowed,
            "{name}[{i}]: {found} is not {expected} within {allowed:e}"
        );
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// How far `vector`, of length 1, is from the space that `basis` spans: the sine of the angle.
fn distance_from(vector: &[f64], basis: &[&Vec<f64>]) -> f64 {
    let mut rest = vector.to_vec();
    for axis in basis {
        let share = dot(vector, axis);
        rest.iter_mut()
            .zip(axis.iter())
            .for_each(|(x, axis)| *x -= share * axis);
    }
    dot(&rest, &rest).sqrt()
}

const CASES: [&str; 7] = [
    "separated",
    "separated_f32",
    "offset",
    "clustered",
    "rank_3",
    "few_rows",
    "constant",
];

#[tokio::test]
async fn means_and_standard_deviations() {
    for name in CASES {
        let case = Case::load(name);
        let model = model(&case.session(2, false), "standardize_fit(v)").await;
        let std = case.vector("std");
        assert_close(name, &vector(&model, "mean"), &case.vector("mean"), 1e-12, 0.0);
        assert_close(
            name,
            &vector(&model, "std"),
            &std,
            if name == "offset" { 1e-9 } else { 1e-12 },
            0.0,
        );
        let count = model
            .column_by_name("count")
            .unwrap()
            .as_primitive::<Int64Type>()
            .value(0);
        assert_eq!(count, i64::try_from(case.matrix("vectors").len()).unwrap());
    }
}

#[tokio::test]
async fn standardized_vectors() {
    for name in CASES {
        let case = Case::load(name);
        let session = case.session(1, false);
        let sql = "SELECT standardize(v, (SELECT standardize_fit(v) FROM t)) FROM t LIMIT 3";
        let found = vectors(&session, sql).await;
        let tolerance = if name == "separated_f32" { 1e-6 } else { 1e-9 };
        assert_close(name, &found, &case.matrix("standardized").concat(), tolerance, 1.0);
    }
}

#[tokio::test]
async fn explained_variance() {
    for name in CASES {
        let case = Case::load(name);
        let model = model(&case.session(2, false), &format!("pca_fit(v, {})", case.k())).await;
        let tolerance = match name {
            "separated_f32" => 1e-5,
            "offset" => 1e-6,
            _ => 1e-8,
        };
        // The zeros of a rank-deficient case are zeros beside the rest.
        let total = case.values["total_variance"].as_f64().unwrap();
        let variance = vector(&model, "explained_variance");
        assert!(
            variance.is_sorted_by(|a, b| a >= b) && variance.iter().all(|x| *x >= 0.0),
            "{name}: {variance:?}"
        );
        assert_close(
            name,
            &variance,
            &case.vector("explained_variance"),
            tolerance,
            total * 1e-6,
        );
        let ratio = vector(&model, "explained_variance_ratio");
        assert_close(name, &ratio, &case.vector("explained_variance_ratio"), tolerance, 1e-6);
        // Squared: the root of a zero that rounding has moved is no longer small.
        let square = |values: Vec<f64>| -> Vec<f64> { values.iter().map(|x| x * x).collect() };
        let (found, expected) = (
            vector(&model, "singular_values"),
            square(case.vector("singular_values")),
        );
        assert_close(name, &square(found), &expected, 2.0 * tolerance, expected[0] * 1e-6);
        let found = numbers(model.column_by_name("total_variance").unwrap());
        assert_close(name, &found, &[total], tolerance, 0.0);
    }
}

#[tokio::test]
async fn directions() {
    for name in CASES {
        let case = Case::load(name);
        let model = model(&case.session(2, false), &format!("pca_fit(v, {})", case.k())).await;
        let (found, expected) = (components(&model), case.matrix("components"));
        for cluster in case.clusters() {
            if let [i] = cluster[..] {
                // No absolute value: the sign is the reference's, too.
                let cosine = dot(&found[i], &expected[i]);
                assert!(cosine > 1.0 - 1e-10, "{name}: the cosine of component {i} is {cosine}");
            } else {
                let space: Vec<_> = cluster.iter().map(|i| &expected[*i]).collect();
                for i in cluster {
                    let sine = distance_from(&found[i], &space);
                    assert!(sine < 1e-6, "{name}: component {i} leaves its subspace by {sine}");
                }
            }
        }
    }
}

#[tokio::test]
async fn transformed_vectors() {
    // In the other cases some components are not determined.
    for name in ["separated", "separated_f32", "offset", "few_rows", "constant"] {
        let case = Case::load(name);
        let session = case.session(1, false);
        let sql = format!(
            "SELECT pca_transform(v, (SELECT pca_fit(v, {}) FROM t)) FROM t LIMIT 3",
            case.k()
        );
        let found = vectors(&session, &sql).await;
        let tolerance = if name == "separated_f32" { 1e-5 } else { 1e-8 };
        let scale = case.vector("std").iter().fold(0.0_f64, |max, x| max.max(*x));
        assert_close(name, &found, &case.matrix("transformed").concat(), tolerance, scale);
    }
}

#[tokio::test]
async fn partitions_in_any_order_agree() {
    for name in CASES {
        let case = Case::load(name);
        let fit = format!("pca_fit(v, {})", case.k());
        let one = model(&case.session(1, false), &fit).await;
        let one_std = vector(&model(&case.session(1, false), "standardize_fit(v)").await, "std");
        let total = case.values["total_variance"].as_f64().unwrap();
        for (partitions, reverse) in [(1, true), (2, false), (7, true), (64, false)] {
            let session = case.session(partitions, reverse);
            let many = model(&session, &fit).await;
            let variance = (vector(&many, "explained_variance"), vector(&one, "explained_variance"));
            assert_close(name, &variance.0, &variance.1, 1e-10, total * 1e-3);
            assert_close(name, &vector(&many, "mean"), &vector(&one, "mean"), 1e-10, 1e-3);
            let std = vector(&model(&session, "standardize_fit(v)").await, "std");
            assert_close(name, &std, &one_std, 1e-10, 0.0);
            let (ours, theirs) = (components(&many), components(&one));
            for cluster in case.clusters().iter().filter(|cluster| cluster.len() == 1) {
                assert_close(name, &ours[cluster[0]], &theirs[cluster[0]], 1e-10, 1.0);
            }
        }
    }
}

#[tokio::test]
async fn linfa_finds_the_same_components() {
    for name in ["separated", "constant"] {
        let case = Case::load(name);
        // Its solver is iterative, and meant for a few components of many.
        let (rows, k) = (case.matrix("vectors"), 2);
        let records = Array2::from_shape_vec((rows.len(), rows[0].len()), rows.concat()).unwrap();
        let peer = Pca::params(k).fit(&DatasetBase::from(records)).unwrap();
        let model = model(&case.session(2, false), &format!("pca_fit(v, {k})")).await;
        for (ours, theirs) in components(&model).iter().zip(peer.components().rows()) {
            let cosine = dot(ours, &theirs.to_vec()).abs();
            assert!(cosine > 1.0 - 1e-9, "{name}: {cosine}");
        }
        let singular = vector(&model, "singular_values");
        assert_close(name, &singular, &peer.singular_values().to_vec(), 1e-6, 0.0);

        // What keeps us from using it: it divides by k - 1 where the sample has n - 1 degrees of freedom.
        let scale = (rows.len() - 1) as f64 / (k - 1) as f64;
        let variance: Vec<f64> = vector(&model, "explained_variance").iter().map(|x| x * scale).collect();
        assert_close(name, &variance, &peer.explained_variance().to_vec(), 1e-5, 0.0);
    }
}

#[tokio::test]
async fn groups_are_fitted_apart() {
    let session = Case::load("separated").session(4, false);
    let variance = |groups: &str| format!("SELECT model['explained_variance'] FROM ({groups})");
    let mut alone = vec![];
    for side in ["<= 0", "> 0"] {
        let fit = format!("SELECT pca_fit(v, 2) AS model FROM t WHERE v[1] {side}");
        alone.extend(vectors(&session, &variance(&fit)).await);
    }
    let split = "SELECT v, v[1] > 0 AS side FROM t";
    let fits = format!("SELECT side, pca_fit(v, 2) AS model FROM ({split}) GROUP BY side");
    let grouped = vectors(&session, &format!("{} ORDER BY side", variance(&fits))).await;
    assert_eq!(grouped.len(), 4);
    assert_close("grouped", &grouped, &alone, 1e-10, 0.0);
}

#[tokio::test]
async fn models_come_back_from_files_as_they_were() {
    let session = Case::load("separated").session(1, false);
    let folder = tempfile::tempdir().unwrap();
    let run = async |sql: String| session.sql(&sql).await.unwrap().collect().await.unwrap();
    let transform = |table: &str| format!("SELECT pca_transform(v, (SELECT model FROM {table})) FROM t");
    run("CREATE TABLE models AS SELECT pca_fit(v, 3) AS model FROM t".to_owned()).await;
    let expected = vectors(&session, &transform("models")).await;
    assert_eq!(expected.len(), 900);
    for format in ["parquet", "json"] {
        let path = folder.path().join(format!("models.{format}"));
        let path = path.to_str().unwrap();
        run(format!("COPY models TO '{path}' STORED AS {format}")).await;
        run(format!(
            "CREATE EXTERNAL TABLE {format}_models STORED AS {format} LOCATION '{path}'"
        ))
        .await;
        assert_eq!(
            vectors(&session, &transform(&format!("{format}_models"))).await,
            expected,
            "{format}"
        );
    }
}

#[tokio::test]
async fn a_model_beside_every_row_is_still_one_model() {
    let session = Case::load("constant").session(1, false);
    let once = vectors(
        &session,
        "SELECT pca_transform(v, (SELECT pca_fit(v, 2) FROM t)) FROM t",
    )
    .await;
    let joined = "SELECT pca_transform(v, model) FROM t CROSS JOIN (SELECT pca_fit(v, 2) AS model FROM t)";
    assert_close("joined", &vectors(&session, joined).await, &once, 1e-12, 1.0);
}

#[tokio::test]
async fn too_many_features_are_refused_before_memory_is_taken() {
    let session = Case::load("constant").session(1, false);
    let sql = "SELECT pca_fit(array_repeat(1.0, 8193), 2) FROM t";
    let message = failure(&session, sql).await;
    assert!(
        message.contains("8193 features") && message.contains("at most 8192"),
        "{message}"
    );
    // What standardizing holds is no matrix.
    let model = model(&session, "standardize_fit(array_repeat(1.0, 100352))").await;
    assert_eq!(vector(&model, "std").len(), 100_352);
}

#[tokio::test]
async fn a_fit_reserves_its_memory() {
    use datafusion::execution::runtime_env::RuntimeEnvBuilder;

    let runtime = RuntimeEnvBuilder::new()
        .with_memory_limit(8 << 20, 1.0)
        .build_arc()
        .unwrap();
    let mut session = SessionContext::new_with_config_rt(SessionConfig::new().with_target_partitions(1), runtime);
    pomona_udfs::register_all(&mut session).unwrap();
    // 2,048 features are a matrix of 32 MiB.
    let sql = "SELECT pca_fit(array_resize([value::double], 2048, 0.0), 1) FROM range(1, 600)";
    let message = failure(&session, sql).await;
    assert!(message.contains("Resources exhausted"), "{message}");
}
