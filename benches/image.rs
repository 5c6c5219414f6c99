//! Decoding, resizing and embedding: 64 images that are in memory, or one photo of 12 megapixels, on one
//! core.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[expect(dead_code, reason = "every benchmark takes the helpers that it needs")]
mod common;

use common::{Engine, criterion};
use criterion::Throughput;
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;

const IMAGES: usize = 64;

/// A JPEG of 4000 x 3000 pixels, in which a sensor's noise takes as many bits as in a photo.
fn photo() -> Vec<u8> {
    let mut state = 1_u32;
    let picture = RgbImage::from_fn(4000, 3000, |x, y| {
        // xorshift, of which three bits make 0 to 21, about 10 on average.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        let noise = (state & 7) + ((state >> 8) & 7) + ((state >> 16) & 7);
        let level = |value: u32| (value % 230 + noise) as u8;
        image::Rgb([level(x / 16), level(y / 12), level((x / 50 * y / 50) / 16)])
    });
    let mut file = Vec::new();
    picture
        .write_with_encoder(JpegEncoder::new_with_quality(&mut file, 85))
        .unwrap();
    file
}

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

    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("photo.jpg"), photo()).unwrap();
    engine.run(&format!(
        "CREATE TABLE photo AS SELECT content FROM images('{}')",
        folder.path().display()
    ));
    let mut group = criterion.benchmark_group("decode");
    for (table, images, name) in [("small", IMAGES, "100x100"), ("photo", 1, "4000x3000")] {
        group.throughput(Throughput::Elements(images as u64));
        for mode in ["exact", "fast"] {
            engine.run(&format!("SET pomona.decode = '{mode}'"));
            for (step, expression) in [
                ("resize to 224x224", "resize(content, 224, 224)"),
                ("embed with resnet-mini", "embed(content, 'resnet-mini')"),
            ] {
                let sql = format!("SELECT {expression} FROM {table}");
                assert_eq!(engine.run(&sql), images);
                group.bench_function(format!("{mode} {name} JPEG, {step}"), |bencher| {
                    bencher.iter(|| engine.run(&sql));
                });
            }
        }
    }
    group.finish();
    criterion.final_summary();
}
