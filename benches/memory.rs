//! The most memory that the main job holds with ResNet50 (Keras's topology, weights from a seed):
//!
//! ```text
//! cargo bench --bench memory              200 images
//! cargo bench --bench memory -- 2000      as many as you like
//! ```

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[expect(dead_code, reason = "every benchmark takes the helpers that it needs")]
#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/common/networks.rs"]
mod networks;

use std::fs;
use std::time::Instant;

use common::{peak_memory, pomona, success};

#[expect(clippy::print_stdout, reason = "its result")]
fn main() {
    let images = std::env::args()
        .find_map(|argument| argument.parse().ok())
        .unwrap_or(200_usize);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resnet50.onnx");
    fs::write(&file, networks::onnx("resnet50-keras", 64, 224)).unwrap();
    let (models, source) = (folder.path().join("models"), folder.path().join("fruits"));
    success(
        pomona()
            .args(["model", "add", "resnet50", "--preset", "keras"])
            .arg(&file)
            .arg("--dir")
            .arg(&models),
    );
    success(
        pomona()
            .arg("sample")
            .arg(&source)
            .args(["--images", &images.to_string()]),
    );

    let started = Instant::now();
    let peak = peak_memory(
        pomona()
            .env("POMONA_MODELS", &models)
            .args(["-q", "-f", "sql/fruits.sql", "-v", "model=resnet50", "-v"])
            .arg(format!("source={}/", source.display()))
            .arg("-v")
            .arg(format!("target={}/", folder.path().join("out").display())),
    );
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{images} images with ResNet50: {} MiB at most, {seconds:.0} s",
        peak >> 20
    );
}
