//! The main job on images that come at once against images that take 50 ms each, as every answer of
//! S3 does from another region, LIST included. Fetching ahead should hide nearly all of it.
//!
//! ```text
//! cargo bench --bench latency                     2,000 images with resnet-mini
//! cargo bench --bench latency -- resnet50 500     another model, so many images
//! ```

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[expect(dead_code, reason = "every benchmark takes the helpers that it needs")]
mod common;
#[path = "common/job.rs"]
mod job;
#[path = "common/store.rs"]
mod store;

use std::num::NonZero;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use common::Engine;
use store::{RepeatedStore, sample_images};

const LATENCY: Duration = Duration::from_millis(50);

const LABELS: usize = 8;

/// One after the other, so that what else the machine does meets both.
const ROUNDS: usize = 5;

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

#[expect(clippy::print_stdout, reason = "its result")]
fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).filter(|text| text != "--bench").collect();
    let model = arguments.first().map_or("resnet-mini", String::as_str);
    let images: usize = arguments.get(1).map_or(2000, |text| text.parse().unwrap());

    let engine = Engine::new(available_parallelism().map_or(1, NonZero::get));
    let contents = sample_images(&engine);
    let run = |images, latency| {
        let source = RepeatedStore::new(Arc::clone(&contents), images, LABELS, latency).register(&engine);
        let target = tempfile::tempdir().unwrap();
        let started = Instant::now();
        job::run(&engine, source, model, target.path());
        started.elapsed().as_secs_f64()
    };
    // Loads the model.
    run(64, Duration::ZERO);
    let rounds = (0..ROUNDS).map(|_| (run(images, Duration::ZERO), run(images, LATENCY)));
    let (at_once, later): (Vec<_>, Vec<_>) = rounds.unzip();
    let (at_once, later) = (median(at_once), median(later));
    println!(
        "{images} images with {model}, medians of {ROUNDS} rounds: {at_once:.2} s, with {} ms of latency {later:.2} s: \
         {:.3} times as long",
        LATENCY.as_millis(),
        later / at_once
    );
}
