//! Networks as their exporters write them, in their real sizes: a file becomes a model, and one
//! function embeds with all of them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;
#[path = "common/networks.rs"]
mod networks;

use std::fs;
use std::path::Path;

use common::{failure, pomona, rows, success, vectors};
use pomona::SessionBuilder;
use pomona::udfs::settings::PomonaOptions;

/// Adds the file of a network by the command line, as a user does.
fn add(folder: &Path, name: &str, preset: &str, network: &[u8]) -> std::process::Command {
    let file = folder.join(format!("{name}.onnx"));
    fs::write(&file, network).unwrap();
    let mut command = pomona();
    command
        .args(["model", "add", name, "--preset", preset])
        .arg(&file)
        .arg("--dir")
        .arg(folder.join("models"));
    command
}

#[tokio::test]
async fn resnet50_of_keras_and_of_torchvision_embed_through_one_function() {
    let folder = tempfile::tempdir().unwrap();
    let options = PomonaOptions {
        models_dir: folder.path().join("models").display().to_string(),
        ..PomonaOptions::default()
    };
    for (kind, preset, name) in [
        ("resnet50-keras", "keras", "resnet50"),
        ("resnet50-torchvision", "torchvision", "torch"),
    ] {
        success(&mut add(folder.path(), name, preset, &networks::onnx(kind, 64, 224)));
        let session = SessionBuilder::new().with_options(options.clone()).build().unwrap();
        let query = format!(
            "SELECT embed(content, '{name}') AS pooled, embed(content, '{name}', 'flatten') AS flat, \
             embed(content, '{name}', 'logits') AS logits FROM images('sample://fruits/Test/') LIMIT 1"
        );
        let embedded = rows(&session, &query).await.unwrap();
        let [pooled, flat, logits] = ["pooled", "flat", "logits"].map(|column| vectors(&embedded, column).remove(0));
        assert_eq!(
            (pooled.len(), flat.len(), logits.len()),
            (2048, 100_352, 1000),
            "{kind}"
        );
        assert!(pooled.iter().any(|value| *value > 0.0), "{kind}");

        // Keras writes height, width, channels; PyTorch channels, height, width.
        let channel_of = |i: usize| if preset == "keras" { i % 2048 } else { i / 49 };
        let mut averaged = vec![0.0; 2048];
        for (i, value) in flat.iter().enumerate() {
            averaged[channel_of(i)] += value / 49.0;
        }
        for (averaged, pooled) in averaged.iter().zip(&pooled) {
            assert!(
                (averaged - pooled).abs() <= 1e-4 * (1.0 + pooled.abs()),
                "{kind}: {averaged} {pooled}"
            );
        }
    }
    // The default model of resnet_embed is the one that was added under its name.
    let session = SessionBuilder::new().with_options(options).build().unwrap();
    let query = "SELECT resnet_embed(content) AS a, embed(content, 'resnet50') AS b \
                 FROM images('sample://fruits/Test/') LIMIT 1";
    let embedded = rows(&session, query).await.unwrap();
    assert_eq!(vectors(&embedded, "a"), vectors(&embedded, "b"));
}

#[test]
fn broken_networks_are_refused_with_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    for (kind, cause) in [("two-inputs", "input"), ("rank-2", "rank"), ("truncated", "ONNX")] {
        let error = failure(&mut add(folder.path(), kind, "keras", &networks::onnx(kind, 8, 64)));
        assert!(
            error.contains(&format!("{kind}.onnx")) && error.contains(cause),
            "{error}"
        );
        assert!(!error.contains("panicked"), "{error}");
        assert!(!folder.path().join("models").join(kind).exists());
    }
}
