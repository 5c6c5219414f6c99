//! Decoding, resizing and embedding: 64 images that are in memory, on one core.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[expect(dead_code, reason = "every benchmark takes the helpers that it needs")]
mod common;

use common::{Engine, criterion};
use criterion::Throughput;

const IMAGES: usize = 64;

fn main() {
    let engine = Engine::new(1);
    let small = format!("CREATE TABLE small AS SELECT content FROM images('sample://fruits/Training/') LIMIT {IMAGES}");
    engine.run(&small);
    // As large as a phone's photo after the first reduction, and as a network takes it.
    engine
        .run("CREATE TABLE large AS SELECT encode_image(resize(content, 1024, 768), 'jpeg', 90) AS content FROM small");
    engine.run("CREATE TABLE decoded AS SELECT decode_image(content) AS image FROM large");
    engine.run("CREATE TABLE network AS SELECT resize(content, 96, 96, 'bilinear') AS image FROM small");

    let mut criterion = criterion();
    let mut group = criterion.benchmark_group("image");
    group.throughput(Throughput::Elements(IMAGES as u64));
    for (name, expression, table) in [
        ("decode 100x100 JPEG", "decode_image(content)", "small"),
        ("decode 1024x768 JPEG", "decode_image(content)", "large"),
        ("size from the header", "image_info(content)", "large"),
        (
            "resize 1024x768 to 224x224 nearest",
            "resize(image, 224, 224, 'nearest')",
            "decoded",
        ),
        (
            "resize 1024x768 to 224x224 bilinear",
            "resize(image, 224, 224, 'bilinear')",
            "decoded",
        ),
        (
            "resize 1024x768 to 224x224 bicubic",
            "resize(image, 224, 224)",
            "decoded",
        ),
        (
            "resize 1024x768 to 224x224 lanczos",
            "resize(image, 224, 224, 'lanczos')",
            "decoded",
        ),
        ("decode and resize 1024x768 JPEG", "resize(content, 224, 224)", "large"),
        (
            "embed 96x96 pixels with resnet-mini",
            "embed(image, 'resnet-mini')",
            "network",
        ),
        (
            "embed 100x100 JPEG with resnet-mini",
            "embed(content, 'resnet-mini')",
            "small",
        ),
    ] {
        let sql = format!("SELECT {expression} FROM {table}");
        assert_eq!(engine.run(&sql), IMAGES);
        group.bench_function(name, |bencher| bencher.iter(|| engine.run(&sql)));
    }
    group.finish();
    criterion.final_summary();
}
