//! The main job on the sample: list, fetch, decode, resize, embed, standardize, components, Parquet.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[expect(dead_code, reason = "every benchmark takes the helpers that it needs")]
mod common;
#[path = "common/job.rs"]
mod job;

use common::{Engine, criterion};
use criterion::Throughput;

/// In the sample.
const IMAGES: u64 = 320;

fn main() {
    let target = tempfile::tempdir().unwrap();
    let mut criterion = criterion();
    let mut group = criterion.benchmark_group("chain");
    group.throughput(Throughput::Elements(IMAGES));
    for partitions in [1, 2] {
        let engine = Engine::new(partitions);
        group.bench_function(format!("{partitions} partitions"), |bencher| {
            bencher.iter(|| job::run(&engine, "sample://fruits/Training/", "resnet-mini", target.path()))
        });
    }
    group.finish();
    criterion.final_summary();
}
