//! Networks of 8 bits against what onnxruntime itself makes of them; `tests/references/make_quantized.py`
//! has made both.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;

use std::collections::BTreeMap;
use std::fs;

use common::{reference, rows, vectors};
use datafusion::prelude::SessionContext;
use pomona::SessionBuilder;
use pomona::udfs::settings::PomonaOptions;

/// By model and output: the vector of `picture.png`.
type Vectors = BTreeMap<String, BTreeMap<String, Vec<f64>>>;

fn expected() -> Vectors {
    let file = reference("quantized").join("vectors.json");
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

/// A session that finds the quantized models, and runs them on this engine.
async fn session(engine: &str) -> SessionContext {
    let options = PomonaOptions {
        models_dir: reference("quantized").display().to_string(),
        ..PomonaOptions::default()
    };
    let session = SessionBuilder::new().with_options(options).build().unwrap();
    rows(&session, &format!("SET pomona.engine = '{engine}'"))
        .await
        .unwrap();
    session
}

fn query(model: &str, output: &str) -> String {
    let picture = reference("picture.png");
    format!(
        "SELECT embed(content, '{model}', '{output}') AS v FROM images('{}')",
        picture.display()
    )
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Equal but for a pixel or a value of 8 bits that is rounded to the other side.
fn assert_close(what: &str, found: &[f64], expected: &[f64]) {
    let cosine = cosine(found, expected);
    assert!(cosine > 0.9999, "{what}: cosine {cosine}");
    // A cosine does not see a wrong scale.
    let length = |v: &[f64]| v.iter().map(|value| value * value).sum::<f64>().sqrt();
    let ratio = length(found) / length(expected);
    assert!((ratio - 1.0).abs() < 0.01, "{what}: {ratio} times as long");
}

#[tokio::test]
async fn onnxruntime_embeds_with_both_forms_of_quantized_networks() {
    if common::onnxruntime().is_none() {
        return;
    }
    let session = session("onnxruntime").await;
    let expected = expected();
    assert_eq!(expected.len(), 6);
    for (model, outputs) in &expected {
        for (output, expected) in outputs {
            let what = format!("{model} {output}");
            let embedded = rows(&session, &query(model, output)).await.unwrap();
            assert_close(&what, &vectors(&embedded, "v").remove(0), expected);
        }
    }
}

#[tokio::test]
async fn tract_embeds_alike_or_names_the_node_and_the_other_engine() {
    let session = session("tract").await;
    for (model, outputs) in &expected() {
        for (output, expected) in outputs {
            let what = format!("{model} {output}");
            match rows(&session, &query(model, output)).await {
                Ok(embedded) => assert_close(&what, &vectors(&embedded, "v").remove(0), expected),
                Err(error) => {
                    let error = error.to_string();
                    // onnxruntime's quantizer names a node `n7_quant` that was `n7`.
                    for part in [model, "_quant", "SET pomona.engine = 'onnxruntime'"] {
                        assert!(error.contains(part), "{what}: no {part} in: {error}");
                    }
                }
            }
        }
    }
}
