//! `standardize` and the `pca_*` functions through SQL, against scikit-learn and Spark's formulas.
//!
//! `tests/references/make_statistics.py` in the workspace makes the vectors and what is expected.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, FixedSizeListArray, Float64Array, RecordBatch, StructArray};
use arrow::datatypes::{DataType, Field};
use common::{Case, Matrix, assert_close, dot, field, model, number, query_numbers, run, value, word};
use datafusion::prelude::SessionContext;
use linfa::DatasetBase;
use linfa::traits::Fit;
use linfa_reduction::Pca;
use ndarray::Array2;

const CASES: [&str; 7] = [
    "separated",
    "separated_f32",
    "offset",
    "clustered",
    "rank_3",
    "few_rows",
    "constant",
];

/// In the others some components are not determined, and neither is what they make of a vector.
const DETERMINED: [&str; 5] = ["separated", "separated_f32", "offset", "few_rows", "constant"];

fn load(name: &str) -> Case {
    Case::load(&format!("statistics/{name}"))
}

/// What the figures allow of an explained variance, relatively.
fn tolerance(name: &str) -> f64 {
    match name {
        "separated_f32" => 1e-5,
        "offset" => 1e-6,
        _ => 1e-8,
    }
}

fn k(case: &Case) -> usize {
    serde_json::from_value(case.values["k"].clone()).unwrap()
}

fn total_variance(case: &Case) -> f64 {
    case.values["total_variance"].as_f64().unwrap()
}

/// The components whose eigenvalues are equal, in groups.
fn clusters(case: &Case) -> Vec<Vec<usize>> {
    serde_json::from_value(case.values["clusters"].clone()).unwrap()
}

fn components(model: &StructArray, features: usize) -> Matrix {
    let components = field(model, "components");
    components.chunks_exact(features).map(<[f64]>::to_vec).collect()
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

#[tokio::test]
async fn means_and_standard_deviations() {
    for name in CASES {
        let case = load(name);
        let model = model(&case.session(2, false), "standardize_fit(v)").await;
        assert_close(name, &field(&model, "mean"), &case.vector("mean"), 1e-12, 0.0);
        assert_close(
            name,
            &field(&model, "std"),
            &case.vector("std"),
            if name == "offset" { 1e-9 } else { 1e-12 },
            0.0,
        );
        assert_eq!(number(&model, "count"), case.vectors().len() as f64);
    }
}

#[tokio::test]
async fn standardized_vectors() {
    for name in CASES {
        let case = load(name);
        let session = case.session(1, false);
        let (mean, std) = (case.vector("mean"), case.vector("std"));
        let tolerance = if name == "separated_f32" { 1e-6 } else { 1e-9 };
        let standardized = async |options: &str| {
            let sql = format!("SELECT standardize(v, (SELECT standardize_fit(v) FROM t){options}) FROM t LIMIT 3");
            query_numbers(&session, &sql).await
        };
        let expected = case.matrix("standardized").concat();
        assert_close(name, &standardized("").await, &expected, tolerance, 1.0);
        assert_close(name, &standardized(", true, true").await, &expected, tolerance, 1.0);

        // Spark's StandardScaler: a constant feature becomes 0 by scaling, with its mean or without.
        let scaled = |x: f64, std: f64| if std == 0.0 { 0.0 } else { x / std };
        let largest = common::largest(&case.vectors().concat());
        let options: [(&str, Formula<'_>, f64); 3] = [
            (", with_mean => false", &|x, _, std| scaled(x, std), largest),
            (", true, with_std => false", &|x, mean, _| x - mean, 1.0),
            (", with_mean => false, with_std => false", &|x, _, _| x, largest),
        ];
        for (options, formula, scale) in options {
            let features = |row: &Vec<f64>| -> Vec<f64> {
                let features = row.iter().zip(&mean).zip(&std);
                features.map(|((x, mean), std)| formula(*x, *mean, *std)).collect()
            };
            let expected: Vec<f64> = case.vectors()[..3].iter().flat_map(features).collect();
            let found = standardized(options).await;
            assert_close(&format!("{name}{options}"), &found, &expected, tolerance, scale);
        }
    }
}

/// What becomes of a number, from its feature's mean and standard deviation.
type Formula<'a> = &'a dyn Fn(f64, f64, f64) -> f64;

/// The fields of a model that the spectrum decides.
fn assert_spectrum(name: &str, case: &Case, model: &StructArray, expected: &[f64]) {
    // The zeros of a rank-deficient case are zeros beside the rest.
    let (tolerance, total) = (tolerance(name), total_variance(case));
    let variance = field(model, "explained_variance");
    assert!(
        variance.is_sorted_by(|a, b| a >= b) && variance.iter().all(|x| *x >= 0.0),
        "{name}: {variance:?}"
    );
    assert_close(name, &variance, expected, tolerance, total * 1e-6);
    let ratio: Vec<f64> = expected.iter().map(|x| x / total).collect();
    assert_close(name, &field(model, "explained_variance_ratio"), &ratio, tolerance, 1e-6);
    // Squared: the root of a zero that rounding has moved is no longer small.
    let squared = field(model, "singular_values")
        .iter()
        .map(|x| x * x)
        .collect::<Vec<_>>();
    let freedom = (case.vectors().len() - 1) as f64;
    let scatter: Vec<f64> = expected.iter().map(|x| x * freedom).collect();
    assert_close(name, &squared, &scatter, 2.0 * tolerance, total * freedom * 1e-6);
    assert_close(name, &[number(model, "total_variance")], &[total], tolerance, 0.0);
}

#[tokio::test]
async fn explained_variance() {
    for name in CASES {
        let case = load(name);
        let model = model(&case.session(2, false), &format!("pca_fit(v, {})", k(&case))).await;
        assert_spectrum(name, &case, &model, &case.vector("explained_variance"));
        let ratio = case.vector("explained_variance_ratio");
        let found = field(&model, "explained_variance_ratio");
        assert_close(name, &found, &ratio, tolerance(name), 1e-6);
        assert_eq!(word(&model, "method"), "exact");
        assert_eq!(number(&model, "explained_variance_error"), 0.0);
    }
}

#[tokio::test]
async fn without_a_number_all_components_are_kept() {
    for name in CASES {
        let case = load(name);
        let session = case.session(2, false);
        let model = model(&session, "pca_fit(v)").await;
        let spectrum = case.vector("spectrum");
        assert_spectrum(name, &case, &model, &spectrum);
        let features = case.vectors()[0].len();
        assert_eq!(components(&model, features).len(), spectrum.len(), "{name}");

        // Nothing is lost on the way there and back.
        let sql = "SELECT pca_inverse(pca_transform(v, model), model) FROM t \
                   CROSS JOIN (SELECT pca_fit(v) AS model FROM t) ORDER BY id";
        let rows = case.vectors().concat();
        let tolerance = if name == "separated_f32" { 1e-5 } else { 1e-11 };
        let scale = common::largest(&rows);
        assert_close(name, &query_numbers(&session, sql).await, &rows, tolerance, scale);
    }
}

#[tokio::test]
async fn as_many_components_as_explain_a_share() {
    for name in CASES {
        let case = load(name);
        let session = case.session(2, false);
        run(&session, "CREATE TABLE whole AS SELECT pca_fit(v) AS model FROM t").await;
        let shares: Vec<(f64, usize)> = serde_json::from_value(case.values["components_for"].clone()).unwrap();
        for (share, k) in shares {
            let sql = format!("SELECT pca_components_for(model, {share:?}) FROM whole");
            assert_eq!(query_numbers(&session, &sql).await, [k as f64], "{name}: {share}");

            let truncated = value(&session, &format!("SELECT pca_truncate(model, {k}) FROM whole")).await;
            let by_share = model(&session, &format!("pca_fit(v, {share:?})")).await;
            let by_number = model(&session, &format!("pca_fit(v, {k})")).await;
            assert_eq!(field(&by_share, "explained_variance").len(), k, "{name}: {share}");
            for part in ["count", "mean", "explained_variance", "explained_variance_ratio"] {
                let expected = field(&by_number, part);
                for found in [&by_share, truncated.as_struct()] {
                    assert_close(name, &field(found, part), &expected, 1e-9, 1e-9);
                }
            }
            assert_eq!(truncated.data_type(), by_number.data_type());
        }
    }
}

#[tokio::test]
async fn directions() {
    for name in CASES {
        let case = load(name);
        let model = model(&case.session(2, false), &format!("pca_fit(v, {})", k(&case))).await;
        assert_directions(name, &case, &components(&model, case.vectors()[0].len()));
    }
}

fn assert_directions(name: &str, case: &Case, found: &[Vec<f64>]) {
    let expected = case.matrix("components");
    for cluster in clusters(case) {
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

#[tokio::test]
async fn transformed_vectors() {
    for name in DETERMINED {
        let case = load(name);
        let session = case.session(1, false);
        run(
            &session,
            &format!("CREATE TABLE pca AS SELECT pca_fit(v, {}) AS model FROM t", k(&case)),
        )
        .await;
        let scores = "pca_transform(v, (SELECT model FROM pca))";
        let found = query_numbers(&session, &format!("SELECT {scores} FROM t LIMIT 3")).await;
        let tolerance = if name == "separated_f32" { 1e-5 } else { 1e-8 };
        let scale = common::largest(&case.vector("std"));
        let transformed = case.matrix("transformed");
        assert_close(name, &found, &transformed.concat(), tolerance, scale);

        // As scikit-learn's inverse_transform: the scores' combination of the components, and the mean.
        let (components, mean) = (case.matrix("components"), case.vector("mean"));
        let inverse = |scores: &Vec<f64>| -> Vec<f64> {
            let along = |j: usize| {
                scores
                    .iter()
                    .zip(&components)
                    .map(|(score, axis)| score * axis[j])
                    .sum::<f64>()
            };
            (0..mean.len()).map(|j| mean[j] + along(j)).collect()
        };
        let expected: Vec<f64> = transformed.iter().flat_map(inverse).collect();
        let sql = format!("SELECT pca_inverse({scores}, (SELECT model FROM pca)) FROM t LIMIT 3");
        let scale = scale.max(common::largest(&mean));
        assert_close(name, &query_numbers(&session, &sql).await, &expected, tolerance, scale);
    }
}

#[tokio::test]
async fn partitions_in_any_order_agree() {
    for name in CASES {
        let case = load(name);
        let fit = format!("pca_fit(v, {})", k(&case));
        let one = model(&case.session(1, false), &fit).await;
        let one_std = field(&model(&case.session(1, false), "standardize_fit(v)").await, "std");
        let (total, features) = (total_variance(&case), case.vectors()[0].len());
        for (partitions, reverse) in [
            (1, true),
            (2, false),
            (2, true),
            (7, false),
            (7, true),
            (64, false),
            (64, true),
        ] {
            let session = case.session(partitions, reverse);
            let many = model(&session, &fit).await;
            let variance = (field(&many, "explained_variance"), field(&one, "explained_variance"));
            assert_close(name, &variance.0, &variance.1, 1e-10, total * 1e-3);
            assert_close(name, &field(&many, "mean"), &field(&one, "mean"), 1e-10, 1e-3);
            let std = field(&model(&session, "standardize_fit(v)").await, "std");
            assert_close(name, &std, &one_std, 1e-10, 0.0);
            let (ours, theirs) = (components(&many, features), components(&one, features));
            for cluster in clusters(&case).iter().filter(|cluster| cluster.len() == 1) {
                assert_close(name, &ours[cluster[0]], &theirs[cluster[0]], 1e-10, 1.0);
            }
        }
    }
}

#[tokio::test]
async fn vectors_too_long_for_the_exact_method() {
    // Zeros change nothing but the method, which is exact for so few directions.
    for name in CASES {
        let case = load(name);
        let list = "arrow_cast(v, 'List(Float64)')";
        let fit = format!("pca_fit(array_resize({list}, 9000, 0.0::double), {})", k(&case));
        for partitions in [1, 3] {
            let long = model(&case.session(partitions, false), &fit).await;
            assert_spectrum(name, &case, &long, &case.vector("explained_variance"));
            let mut directions = components(&long, 9000);
            directions
                .iter_mut()
                .for_each(|row| row.truncate(case.vectors()[0].len()));
            assert_directions(name, &case, &directions);
            assert_eq!(word(&long, "method"), "incremental");
            let error = number(&long, "explained_variance_error");
            assert!((0.0..=1e-9 * total_variance(&case)).contains(&error), "{name}: {error}");
        }
    }
}

/// A session whose table `t` has these vectors.
fn table_of(rows: &[Vec<f64>]) -> SessionContext {
    let element = Arc::new(Field::new_list_field(DataType::Float64, true));
    let values = Arc::new(Float64Array::from(rows.concat()));
    let size = i32::try_from(rows[0].len()).unwrap();
    let vectors: ArrayRef = Arc::new(FixedSizeListArray::new(element, size, values, None));
    let session = common::session(1, None);
    let batch = RecordBatch::try_from_iter([("v", vectors)]).unwrap();
    session.register_batch("t", batch).unwrap();
    session
}

/// Uniform in [-0.5, 0.5), the same at all times.
fn random(count: usize) -> Vec<f64> {
    let mut state = 1_u64;
    let next = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / f64::from(1 << 24) - 0.5
    };
    (0..count).map(next).collect()
}

/// From this many features on, few components are found without all others.
const MANY: usize = 512;
const ROWS: usize = 600;

fn assert_orthonormal(name: &str, axes: &[Vec<f64>]) {
    for (i, axis) in axes.iter().enumerate() {
        for (j, other) in axes.iter().enumerate() {
            let off = dot(axis, other) - f64::from(u8::from(i == j));
            assert!(off.abs() < 1e-9, "{name}: components {i} and {j}: {off}");
        }
    }
}

#[tokio::test]
async fn few_components_of_many_are_the_first_of_all() {
    const K: usize = 20;
    // The spread falls from axis to axis; then the axes are turned: mirrored at a plane.
    let normal = random(MANY);
    let length = dot(&normal, &normal);
    let turned = |row: &[f64]| -> Vec<f64> {
        let spread = |j: usize| 8.0 * 0.85_f64.powi(j as i32);
        let row: Vec<f64> = row.iter().enumerate().map(|(j, x)| 3.0 + spread(j) * x).collect();
        let share = 2.0 * dot(&row, &normal) / length;
        row.iter().zip(&normal).map(|(x, normal)| x - share * normal).collect()
    };
    let rows: Vec<Vec<f64>> = random(ROWS * MANY).chunks_exact(MANY).map(turned).collect();
    let session = table_of(&rows);
    let few = model(&session, &format!("pca_fit(v, {K})")).await;
    let all = model(&session, "pca_fit(v)").await;

    let (found, expected) = (field(&few, "explained_variance"), field(&all, "explained_variance"));
    assert_eq!((found.len(), expected.len()), (K, MANY));
    assert_close("variance", &found, &expected[..K], 1e-10, expected[0]);
    for part in ["mean", "total_variance"] {
        assert_close(part, &field(&few, part), &field(&all, part), 1e-12, 1.0);
    }

    let (found, expected) = (components(&few, MANY), components(&all, MANY));
    assert_orthonormal("few", &found);
    let space: Vec<_> = expected[..K].iter().collect();
    for (i, (axis, other)) in found.iter().zip(&expected).enumerate() {
        let sine = distance_from(axis, &space);
        assert!(sine < 1e-7, "component {i} leaves the subspace by {sine}");
        let cosine = dot(axis, other);
        assert!(cosine > 1.0 - 1e-9, "the cosine of component {i} is {cosine}");
    }
}

#[tokio::test]
async fn few_components_of_rows_that_are_equal_or_in_a_line() {
    let (direction, places) = (random(MANY), random(ROWS));
    let rows = |value: &dyn Fn(usize, usize) -> f64| -> Matrix {
        let row = |i: usize| (0..MANY).map(|j| value(i, j)).collect();
        (0..ROWS).map(row).collect()
    };
    for (name, rows) in [
        ("equal", rows(&|_, j| direction[j])),
        ("alternating", rows(&|i, _| (i % 2) as f64)),
        ("a line", rows(&|i, j| places[i] * direction[j])),
        ("a line far away", rows(&|i, j| 1e3 + places[i] * direction[j])),
    ] {
        let variance = |j: usize| {
            let mean = rows.iter().map(|row| row[j]).sum::<f64>() / ROWS as f64;
            rows.iter().map(|row| (row[j] - mean).powi(2)).sum::<f64>() / (ROWS - 1) as f64
        };
        let total: f64 = match name {
            "equal" => 0.0,
            _ => (0..MANY).map(variance).sum(),
        };
        let session = table_of(&rows);
        for k in [1, 5] {
            let what = format!("{name}, {k} components");
            let model = model(&session, &format!("pca_fit(v, {k})")).await;
            let mut expected = vec![0.0; k];
            expected[0] = total;
            assert_close(&what, &field(&model, "explained_variance"), &expected, 1e-9, total);
            assert_close(&what, &[number(&model, "total_variance")], &[total], 1e-9, 0.0);
            let axes = components(&model, MANY);
            assert_eq!(axes.len(), k, "{what}");
            assert_orthonormal(&what, &axes);
        }
    }
}

#[tokio::test]
async fn linfa_finds_the_same_components() {
    for name in ["separated", "constant"] {
        let case = load(name);
        // Its solver is iterative, and meant for a few components of many.
        let (rows, k) = (case.vectors(), 2);
        let records = Array2::from_shape_vec((rows.len(), rows[0].len()), rows.concat()).unwrap();
        let peer = Pca::params(k).fit(&DatasetBase::from(records)).unwrap();
        let model = model(&case.session(2, false), &format!("pca_fit(v, {k})")).await;
        for (ours, theirs) in components(&model, rows[0].len()).iter().zip(peer.components().rows()) {
            let cosine = dot(ours, &theirs.to_vec()).abs();
            assert!(cosine > 1.0 - 1e-9, "{name}: {cosine}");
        }
        let singular = field(&model, "singular_values");
        assert_close(name, &singular, &peer.singular_values().to_vec(), 1e-6, 0.0);

        // What keeps us from using it: it divides by k - 1 where the sample has n - 1 degrees of freedom.
        let scale = (rows.len() - 1) as f64 / (k - 1) as f64;
        let variance = field(&model, "explained_variance");
        let variance: Vec<f64> = variance.iter().map(|x| x * scale).collect();
        assert_close(name, &variance, &peer.explained_variance().to_vec(), 1e-5, 0.0);
    }
}
