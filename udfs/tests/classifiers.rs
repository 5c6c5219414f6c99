//! `lda_fit`, `logistic_fit`, `classify` and `classify_proba` through SQL, against scikit-learn.
//!
//! `tests/references/make_classifiers.py` in the workspace makes the vectors and what is expected.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;

use arrow::array::{Array, ArrayRef, AsArray, StructArray};
use arrow::compute::cast;
use arrow::datatypes::DataType;
use common::{Case, Matrix, assert_close, column, field, largest, model, number, query_numbers, word};
use datafusion::prelude::SessionContext;
use serde_json::Value;

/// Labels that are strings, booleans (and a constant feature), and integers (and 20 rows of 50 features).
const CASES: [&str; 3] = ["strings", "booleans", "integers"];

fn load(name: &str) -> Case {
    Case::load(&format!("classifiers/{name}"))
}

/// The models of a case that a fit is compared with, each with the call that makes it.
fn references<'a>(case: &'a Case, fit: &'a str) -> impl Iterator<Item = (String, &'a Value)> {
    let models = case.values[fit].as_array().unwrap().iter();
    models.map(move |reference| {
        let option = match fit {
            "lda" => &reference["shrinkage"],
            _ => &reference["l2"],
        };
        let option = option.to_string().replace('"', "'");
        (format!("{fit}_fit(v, label, {option})"), reference)
    })
}

/// A case's different labels in their order, as text.
fn labels(case: &Case) -> Vec<String> {
    let mut labels: Vec<_> = case.values["labels"].as_array().unwrap().iter().collect();
    let key = |label: &Value| (label.as_i64(), label.as_bool(), label.as_str().map(str::to_owned));
    labels.sort_by_key(|label| key(label));
    labels.dedup();
    labels.into_iter().map(text).collect()
}

fn text(label: &Value) -> String {
    label.as_str().map_or_else(|| label.to_string(), str::to_owned)
}

/// A column of labels as text.
fn texts(labels: &ArrayRef) -> Vec<String> {
    let labels = cast(labels, &DataType::Utf8).unwrap();
    labels
        .as_string::<i32>()
        .iter()
        .map(|label| label.unwrap().to_owned())
        .collect()
}

/// What the model of a fit says of each row, in the order of the rows and of the labels.
async fn probabilities(session: &SessionContext, fit: &str) -> Vec<f64> {
    probabilities_in(session, "t", fit).await
}

/// The same of another table.
async fn probabilities_in(session: &SessionContext, table: &str, fit: &str) -> Vec<f64> {
    let sql = format!("SELECT classify_proba(v, (SELECT {fit} FROM {table})) FROM {table} ORDER BY id");
    let rows = column(session, &sql).await;
    let mut all = vec![];
    for row in rows.as_list::<i32>().iter() {
        let row = row.unwrap();
        let pairs = row.as_struct();
        let (labels, probabilities) = (pairs.column(0), common::numbers(pairs.column(1)));
        assert!(probabilities.is_sorted_by(|a, b| a >= b), "{fit}: {probabilities:?}");
        let integers = labels.data_type() == &DataType::Int64;
        let mut pairs: Vec<_> = texts(labels).into_iter().zip(probabilities).collect();
        pairs.sort_by_key(|(label, _)| (integers.then(|| label.parse::<i64>().unwrap()), label.clone()));
        all.extend(pairs.into_iter().map(|(_, probability)| probability));
    }
    all
}

/// Numbers of each label, less their mean over the labels: that is all that probabilities depend on.
fn contrasts(numbers: &[f64], labels: usize) -> Vec<f64> {
    let width = numbers.len() / labels;
    let mean = |j: usize| numbers.iter().skip(j).step_by(width).sum::<f64>() / labels as f64;
    let means: Vec<f64> = (0..width).map(mean).collect();
    numbers.iter().enumerate().map(|(i, x)| x - means[i % width]).collect()
}

/// What a model says of itself, and of the rows that it was fitted on.
async fn assert_described(session: &SessionContext, fit: &str, case: &Case, model: &StructArray, reference: &Value) {
    assert_eq!(
        texts(&model.column_by_name("labels").unwrap().as_list::<i32>().value(0)),
        labels(case)
    );
    let rows = case.vectors().len() as f64;
    let all: Vec<_> = case.values["labels"].as_array().unwrap().iter().map(text).collect();
    let count = |label: &String| all.iter().filter(|other| *other == label).count() as f64;
    let counts: Vec<f64> = labels(case).iter().map(count).collect();
    assert_eq!(field(model, "label_counts"), counts);
    assert_eq!((number(model, "count"), number(model, "training_rows")), (rows, rows));
    assert_eq!(
        word(model, "kind"),
        if fit.starts_with("lda") { "lda" } else { "logistic" }
    );
    assert!(
        model.column_by_name("converged").unwrap().as_boolean().value(0),
        "{fit}"
    );

    for (name, tolerance) in [("regularization", 1e-10), ("training_accuracy", 1e-12)] {
        let expected = reference[name].as_f64().unwrap();
        assert_close(fit, &[number(model, name)], &[expected], tolerance, 1.0);
    }
    let sql = format!("SELECT count(*) FROM t WHERE classify(v, (SELECT {fit} FROM t)) = label");
    let accuracy = query_numbers(session, &sql).await[0] / rows;
    assert_close(fit, &[accuracy], &[number(model, "training_accuracy")], 1e-12, 1.0);
}

#[tokio::test]
async fn discriminants_equal_scikit_learn() {
    for name in CASES {
        let case = load(name);
        let session = case.session(2, false);
        for (fit, reference) in references(&case, "lda") {
            let what = format!("{name}: {fit}");
            let model = model(&session, &fit).await;
            assert_described(&session, &fit, &case, &model, reference).await;
            for part in ["coefficients", "intercepts"] {
                let expected = match &reference[part][0] {
                    Value::Array(_) => common::matrix(&reference[part]).concat(),
                    _ => common::vector(&reference[part]),
                };
                let found = contrasts(&field(&model, part), labels(&case).len());
                assert_close(&what, &found, &expected, 1e-9, largest(&expected));
            }
            let expected: Matrix = common::matrix(&reference["probabilities"]);
            let found = probabilities(&session, &fit).await;
            assert_close(&what, &found, &expected.concat(), 1e-9, 1.0);
        }
    }
}

#[tokio::test]
async fn without_an_option_the_shrinkage_is_automatic_and_l2_is_1() {
    for name in CASES {
        let session = load(name).session(1, false);
        for (short, long) in [
            ("lda_fit(v, label)", "lda_fit(v, label, shrinkage => 'auto')"),
            (
                "logistic_fit(v, label)",
                "logistic_fit(vector => v, label => label, l2 => 1.0)",
            ),
        ] {
            let (short, long) = (model(&session, short).await, model(&session, long).await);
            assert_eq!(short, long);
        }
    }
}

#[tokio::test]
async fn logistic_regression_equals_scikit_learn() {
    for name in CASES {
        let case = load(name);
        let session = case.session(2, false);
        for (fit, reference) in references(&case, "logistic") {
            let model = model(&session, &fit).await;
            assert_described(&session, &fit, &case, &model, reference).await;
            let expected: Matrix = common::matrix(&reference["probabilities"]);
            let found = probabilities(&session, &fit).await;
            assert_close(&format!("{name}: {fit}"), &found, &expected.concat(), 1e-6, 1.0);
        }
    }
}

#[tokio::test]
async fn an_offset_changes_nothing() {
    for name in CASES {
        let case = load(name).moved(1e6);
        let session = case.session(2, false);
        for (fit, reference) in references(&case, "lda").chain(references(&case, "logistic")) {
            let expected: Matrix = common::matrix(&reference["probabilities"]);
            let found = probabilities(&session, &fit).await;
            assert_close(&format!("{name}: {fit}"), &found, &expected.concat(), 1e-6, 1.0);
        }
    }
}

#[tokio::test]
async fn units_change_nothing_where_the_shrinkage_is_automatic() {
    for name in CASES {
        let case = load(name);
        let session = case.session(2, false);
        let expected = probabilities(&session, "lda_fit(v, label)").await;
        // From 1e-6 to 1e6, in either direction.
        for step in [3, -3] {
            let scaled = |j: usize| format!("l[{}] * 1e{}", j + 1, step * (j as i32 % 5 - 2));
            let scaled: Vec<String> = (0..case.vectors()[0].len()).map(scaled).collect();
            let sql = format!(
                "CREATE OR REPLACE TABLE scaled AS SELECT id, label, [{}] AS v \
                 FROM (SELECT id, label, arrow_cast(v, 'List(Float64)') AS l FROM t)",
                scaled.join(", ")
            );
            common::run(&session, &sql).await;
            let found = probabilities_in(&session, "scaled", "lda_fit(v, label, 'auto')").await;
            assert_close(name, &found, &expected, 1e-8, 1.0);
        }
    }
}

#[tokio::test]
async fn partitions_in_any_order_agree() {
    for name in CASES {
        let case = load(name);
        let sessions = [
            (1, true),
            (2, false),
            (2, true),
            (7, false),
            (7, true),
            (64, false),
            (64, true),
        ]
        .map(|(partitions, reverse)| case.session(partitions, reverse));
        let one = case.session(1, false);
        for (fit, _) in references(&case, "lda") {
            let expected = model(&one, &fit).await;
            for session in &sessions {
                let found = model(session, &fit).await;
                for part in ["coefficients", "intercepts", "regularization", "training_accuracy"] {
                    let expected = field(&expected, part);
                    let scale = largest(&expected);
                    assert_close(&format!("{name}: {fit}"), &field(&found, part), &expected, 1e-10, scale);
                }
            }
        }
        for (fit, _) in references(&case, "logistic") {
            let expected = probabilities(&one, &fit).await;
            for session in &sessions {
                let found = probabilities(session, &fit).await;
                assert_close(&format!("{name}: {fit}"), &found, &expected, 1e-5, 1.0);
            }
        }
    }
}

#[tokio::test]
async fn beyond_a_thousand_rows_the_accuracy_is_that_of_a_sample() {
    let noisy = "SELECT [1.7 * sin(value * 0.7) + value % 3, cos(value * 1.3) + value % 2] AS v, value % 3 AS label \
                 FROM range(5000)";
    let mut seen = vec![];
    for partitions in [1, 4] {
        let session = common::session(partitions, None);
        common::run(&session, &format!("CREATE VIEW t AS {noisy}")).await;
        let lda = model(&session, "lda_fit(v, label)").await;
        let rows = number(&lda, "training_rows");
        assert!((900.0..=1100.0).contains(&rows), "{rows}");
        assert_eq!(number(&lda, "count"), 5000.0);
        let sql = "SELECT avg((classify(v, (SELECT lda_fit(v, label) FROM t)) = label)::double) FROM t";
        let accuracy = query_numbers(&session, sql).await[0];
        let sampled = number(&lda, "training_accuracy");
        // Three standard errors of 1,000 draws are 0.045.
        assert!(
            (sampled - accuracy).abs() < 0.05,
            "{sampled} of a sample, {accuracy} of all"
        );
        seen.push((rows, sampled));

        let logistic = model(&session, "logistic_fit(v, label)").await;
        assert_eq!(number(&logistic, "training_rows"), 5000.0);
    }
    assert_eq!(seen[0], seen[1], "a hash draws the sample, not chance");
}
