//! The whole chain on the sample: list, fetch, decode, resize, embed, standardize, components.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[expect(dead_code, reason = "every benchmark takes the helpers that it needs")]
mod common;

use common::{Engine, criterion};
use criterion::Throughput;

const IMAGES: usize = 160;

fn chain(engine: &Engine) {
    engine.run(&format!(
        "CREATE OR REPLACE TABLE embedded AS SELECT path, label, embed(content, 'resnet-mini') AS embedding \
         FROM (SELECT * FROM images('sample://fruits/Training/') LIMIT {IMAGES})"
    ));
    engine.run(
        "CREATE OR REPLACE TABLE standardized AS SELECT path, label, \
         standardize(embedding, (SELECT standardize_fit(embedding) FROM embedded)) AS embedding FROM embedded",
    );
    let rows = engine.run(
        "SELECT path, label, pca_transform(embedding, (SELECT pca_fit(embedding, 25) FROM standardized)) AS features \
         FROM standardized",
    );
    assert_eq!(rows, IMAGES);
}

fn main() {
    let mut criterion = criterion();
    let mut group = criterion.benchmark_group("chain");
    group.throughput(Throughput::Elements(IMAGES as u64));
    for partitions in [1, 2] {
        let engine = Engine::new(partitions);
        group.bench_function(format!("{partitions} partitions"), |bencher| {
            bencher.iter(|| chain(&engine))
        });
    }
    group.finish();
    criterion.final_summary();
}
