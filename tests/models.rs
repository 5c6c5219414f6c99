//! Models as files: what NumPy makes of them, and how well they classify real images.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{pomona, real_data, reference, success};
use serde_json::Value;

/// The Python that has numpy and pyarrow; the test that needs it passes without, and says so.
#[expect(clippy::print_stderr, reason = "a skipped test must not look like a passed one")]
fn python() -> Option<Command> {
    let python = std::env::var_os("POMONA_PYTHON").map(Command::new);
    if python.is_none() {
        eprintln!("skipped: POMONA_PYTHON is not set");
    }
    python
}

/// Runs SQL in a process of its own.
fn run(sql: &str) {
    success(pomona().args(["-q", "-c", sql]));
}

/// Runs a query in a process of its own: its rows, each an object.
fn query(sql: &str) -> Vec<Value> {
    serde_json::from_str(&success(pomona().args(["-q", "--format", "json", "-c", sql]))).unwrap()
}

/// Saves a query as `<name>.parquet` and `<name>.json`.
fn save(folder: &Path, name: &str, query: &str) {
    let copy = |format: &str| format!("COPY ({query}) TO '{}/{name}.{format}';", folder.display());
    run(&["parquet", "json"].map(copy).concat());
}

/// Every number within 1e-12 of the expected one, or relatively, and all else equal.
fn assert_same(what: &str, found: &Value, expected: &Value) {
    match (found, expected) {
        (Value::Array(found), Value::Array(expected)) => {
            assert_eq!(found.len(), expected.len(), "{what}");
            found.iter().zip(expected).for_each(|(a, b)| assert_same(what, a, b));
        }
        (Value::Object(found), Value::Object(expected)) => {
            assert!(found.keys().eq(expected.keys()), "{what}");
            found
                .values()
                .zip(expected.values())
                .for_each(|(a, b)| assert_same(what, a, b));
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!((a - b).abs() <= 1e-12 * b.abs().max(1.0), "{what}: {a} is not {b}");
        }
        _ => assert_eq!(found, expected, "{what}"),
    }
}

#[test]
fn numpy_gets_the_same_from_the_saved_models() {
    if python().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let file = |name: &str| format!("{}/{name}", folder.display());

    // Each step is fitted on what the one before has written, and applied to it.
    let embeddings = reference("squeezenet1.1.parquet");
    let vectors = |name: &str, columns: &str, from: &str| {
        run(&format!(
            "COPY (SELECT file, label, {columns} FROM '{from}' ORDER BY label, file) TO '{}'",
            file(name)
        ));
    };
    let apply = |function: &str, model: &str| format!("{function}(v, (SELECT model FROM '{}')) AS v", file(model));
    vectors(
        "raw.parquet",
        "arrow_cast(embedding, 'List(Float64)') AS v",
        embeddings.to_str().unwrap(),
    );
    let fit =
        |name: &str, fit: &str, of: &str| save(folder, name, &format!("SELECT {fit} AS model FROM '{}'", file(of)));
    fit("standard", "standardize_fit(v)", "raw.parquet");
    vectors(
        "standardized.parquet",
        &apply("standardize", "standard.parquet"),
        &file("raw.parquet"),
    );
    fit("pca", "pca_fit(v, 25)", "standardized.parquet");
    vectors(
        "scores.parquet",
        &apply("pca_transform", "pca.parquet"),
        &file("standardized.parquet"),
    );
    fit("lda", "lda_fit(v, label)", "scores.parquet");
    fit("logistic", "logistic_fit(v, label)", "scores.parquet");
    fit("booleans", "lda_fit(v, label = 'Kiwi')", "scores.parquet");
    fit("integers", "logistic_fit(v, length(label))", "scores.parquet");

    for (function, model, of) in [
        ("standardize", "standard", "raw.parquet"),
        ("pca_transform", "pca", "standardized.parquet"),
        ("pca_inverse", "pca", "scores.parquet"),
        ("classify", "lda", "scores.parquet"),
        ("classify", "booleans", "scores.parquet"),
        ("classify", "integers", "scores.parquet"),
        ("classify_proba", "lda", "scores.parquet"),
        ("classify_proba", "logistic", "scores.parquet"),
        ("classify_proba", "integers", "scores.parquet"),
    ] {
        for format in ["parquet", "json"] {
            let model = format!("{model}.{format}");
            let rows = query(&format!(
                "SELECT {} FROM '{}' ORDER BY label, file",
                apply(function, &model),
                file(of)
            ));
            assert_eq!(rows.len(), 480);
            let ours: Value = rows.into_iter().map(|mut row| row["v"].take()).collect();
            let script = reference("apply_model.py");
            let printed = success(
                python()
                    .unwrap()
                    .arg(script)
                    .arg(function)
                    .arg(file(&model))
                    .arg(file(of)),
            );
            let theirs = serde_json::from_str(&printed).unwrap();
            assert_same(&format!("{function} with {model}"), &ours, &theirs);
        }
    }
}

#[test]
fn classifiers_of_real_fruits_are_as_right_as_those_of_scikit_learn() {
    let Some(real) = real_data() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| format!("{}/{name}.parquet", folder.path().display());
    let fruits = real.join("data/fruits");
    let sql = format!(
        "COPY (SELECT path LIKE '%/Test/%' AS test, label, embed(content, 'squeezenet1.1') AS v FROM images('{}/')) TO '{}'",
        fruits.display(),
        file("embeddings"),
    );
    success(
        pomona()
            .env("POMONA_MODELS", real.join("models"))
            .args(["-q", "-c", &sql]),
    );

    run(&format!(
        "COPY (SELECT test, label, standardize(v, (SELECT standardize_fit(v) FROM '{embeddings}' WHERE NOT test)) AS v \
               FROM '{embeddings}') TO '{standardized}'; \
         COPY (SELECT test, label, pca_transform(v, (SELECT pca_fit(v, 25) FROM '{standardized}' WHERE NOT test)) AS v \
               FROM '{standardized}') TO '{components}'",
        embeddings = file("embeddings"),
        standardized = file("standardized"),
        components = file("components"),
    ));
    let expected: Value = serde_json::from_slice(&fs::read(reference("accuracy.json")).unwrap()).unwrap();
    for (features, classifiers) in expected.as_object().unwrap() {
        for (fit, expected) in classifiers.as_object().unwrap() {
            let sql = format!(
                "SELECT count(*) AS rows, \
                        avg((label = classify(v, (SELECT {fit} FROM '{file}' WHERE NOT test)))::double) AS accuracy \
                 FROM '{file}' WHERE test",
                file = file(features),
            );
            let row = query(&sql).remove(0);
            let (accuracy, expected) = (row["accuracy"].as_f64().unwrap(), expected.as_f64().unwrap());
            assert_eq!(row["rows"], 180);
            assert!(
                accuracy >= expected - 0.005,
                "{fit} of {features}: {accuracy} of {expected}"
            );
        }
    }
}
