//! An object store that answers at once against one whose every answer takes 50 ms, as S3's do from
//! another region: with concurrent fetches it should cost little.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use arrow::array::AsArray;
use common::{Engine, criterion};
use criterion::Throughput;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::throttle::{ThrottleConfig, ThrottledStore};
use object_store::{ObjectStoreExt, PutPayload};
use url::Url;

const IMAGES: usize = 256;

/// A store that holds sample images, and lets every request wait.
fn store(engine: &Engine, latency: Duration) -> ThrottledStore<InMemory> {
    engine.wait(async {
        let sql = format!(
            "SELECT arrow_cast(content, 'Binary') AS content FROM images('sample://fruits/Training/') LIMIT {IMAGES}"
        );
        let batches = engine.session.sql(&sql).await.unwrap().collect().await.unwrap();
        let contents = batches
            .iter()
            .flat_map(|batch| batch.column(0).as_binary::<i32>().iter().flatten());
        let images = InMemory::new();
        for (i, content) in contents.enumerate() {
            let path = Path::from(format!("Training/fruit/{i}.jpg"));
            images.put(&path, PutPayload::from(content.to_vec())).await.unwrap();
        }
        let waits = ThrottleConfig {
            wait_get_per_call: latency,
            wait_list_per_call: latency,
            wait_list_with_delimiter_per_call: latency,
            ..ThrottleConfig::default()
        };
        ThrottledStore::new(images, waits)
    })
}

fn main() {
    let engine = Engine::new(2);
    let mut criterion = criterion();
    for (name, sql) in [
        ("fetch", "SELECT content FROM images('s3://bench/Training/')"),
        (
            "fetch and embed",
            "SELECT embed(content, 'resnet-mini') FROM images('s3://bench/Training/')",
        ),
    ] {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(IMAGES as u64));
        for latency in [Duration::ZERO, Duration::from_millis(50)] {
            let bucket = Url::parse("s3://bench").unwrap();
            engine
                .session
                .register_object_store(&bucket, Arc::new(store(&engine, latency)));
            group.bench_function(format!("{latency:?}"), |bencher| bencher.iter(|| engine.run(sql)));
        }
        group.finish();
    }
    criterion.final_summary();
}
