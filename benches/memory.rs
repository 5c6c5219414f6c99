//! The most memory that the main job holds with ResNet50 (Keras's topology, weights from a seed). How it
//! grows to 100,000 images is told by `growth`, with a cheaper model.
//!
//! ```text
//! cargo bench --bench memory                              200 images
//! cargo bench --bench memory -- 200 1000 2000             as many as you like
//! cargo bench --bench memory -- 200 --memory 700MB        under a ceiling
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
    let mut numbers = vec![];
    let mut ceiling = vec![];
    let mut arguments = std::env::args().skip(1).filter(|text| text != "--bench");
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--memory" => ceiling = vec![argument, arguments.next().unwrap()],
            number => numbers.push(number.parse().unwrap()),
        }
    }
    if numbers.is_empty() {
        numbers.push(200_usize);
    }

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resnet50.onnx");
    fs::write(&file, networks::onnx("resnet50-keras", 64, 224)).unwrap();
    let models = folder.path().join("models");
    success(
        pomona()
            .args(["model", "add", "resnet50", "--preset", "keras"])
            .arg(&file)
            .arg("--dir")
            .arg(&models),
    );
    for images in numbers {
        let source = folder.path().join(format!("fruits-{images}"));
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
                .args(&ceiling)
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
}
