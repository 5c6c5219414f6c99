//! How time and memory grow with the number of images, and of objects in a listing. Each number is a
//! process of its own, so that its most memory is its own.
//!
//! ```text
//! cargo bench --bench growth                              all, in about five minutes on two cores
//! cargo bench --bench growth -- images 1000 10000         the main job with resnet-mini
//! cargo bench --bench growth -- labels 1000 1000000       SELECT label, count(*) … GROUP BY label
//! cargo bench --bench growth -- count 1000 1000000        SELECT count(*)
//! cargo bench --bench growth -- labels 1000000 latency=50 the same, with 50 ms for every page of LIST
//! ```

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[expect(dead_code, reason = "every benchmark takes the helpers that it needs")]
mod common;
#[path = "common/job.rs"]
mod job;
#[path = "common/store.rs"]
mod store;

use std::num::NonZero;
use std::process::Command;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use common::Engine;
use store::{RepeatedStore, sample_images};

/// The program's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The first argument of a process that measures one number.
const MEASURE: &str = "--measure";

const LABELS: usize = 100;

/// A kind of work, and the numbers that it is measured with unless others are asked for.
const KINDS: [(&str, &[usize]); 3] = [
    ("images", &[1_000, 10_000, 100_000]),
    ("labels", &[1_000, 10_000, 100_000, 1_000_000]),
    ("count", &[1_000, 10_000, 100_000, 1_000_000]),
];

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).filter(|text| text != "--bench").collect();
    if let [first, kind, number, latency] = arguments.as_slice()
        && first == MEASURE
    {
        let latency = Duration::from_millis(latency.parse().unwrap());
        return measure(kind, number.parse().unwrap(), latency);
    }
    let numbers: Vec<usize> = arguments.iter().filter_map(|text| text.parse().ok()).collect();
    let latency = arguments.iter().find_map(|text| text.strip_prefix("latency="));
    let asked = |kind: &str| arguments.iter().any(|text| text == kind);
    let asks = KINDS.iter().any(|(kind, _)| asked(kind));
    for (kind, usual) in KINDS {
        if asked(kind) || !asks {
            let numbers = if numbers.is_empty() { usual } else { numbers.as_slice() };
            compare(kind, numbers, latency.unwrap_or("0"));
        }
    }
}

/// Does one piece of work; prints its seconds and the most bytes that the process has held.
#[expect(clippy::print_stdout, reason = "its result")]
fn measure(kind: &str, number: usize, latency: Duration) {
    let engine = Engine::new(available_parallelism().map_or(1, NonZero::get));
    let source = RepeatedStore::new(sample_images(&engine), number, LABELS, latency).register(&engine);
    let target = tempfile::tempdir().unwrap();
    let started = Instant::now();
    match kind {
        "images" => job::run(&engine, source, "resnet-mini", target.path()),
        "labels" => {
            let sql = format!("SELECT label, count(*) FROM images('{source}') GROUP BY label");
            assert!(engine.run(&sql) <= LABELS);
        }
        _ => assert_eq!(engine.run(&format!("SELECT count(*) FROM images('{source}')")), 1),
    }
    println!("{} {}", started.elapsed().as_secs_f64(), most_memory());
}

/// The most bytes that this process has held. Only Linux tells.
fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

/// Prints one line for each number: what it took, beside what the first lets expect.
#[expect(clippy::print_stdout, reason = "its result")]
fn compare(kind: &str, numbers: &[usize], latency: &str) {
    println!("{kind:>10}  seconds  per second  us each  of linear  peak MiB  bytes each");
    let mut first = None;
    for number in numbers {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([MEASURE, kind, &number.to_string(), latency])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let measured = String::from_utf8(output.stdout).unwrap();
        let (seconds, peak) = measured.trim().split_once(' ').unwrap();
        let (seconds, peak): (f64, f64) = (seconds.parse().unwrap(), peak.parse().unwrap());
        let count = *number as f64;
        let (first_count, first_seconds, first_peak) = *first.get_or_insert((count, seconds, peak));
        let each = (peak - first_peak) / (count - first_count);
        println!(
            "{number:>10}  {seconds:>7.2}  {:>10.0}  {:>7.2}  {:>9.2}  {:>8.0}  {:>10}",
            count / seconds,
            seconds / count * 1e6,
            (seconds / count) / (first_seconds / first_count),
            peak / f64::from(1 << 20),
            if each.is_finite() {
                format!("{each:.0}")
            } else {
                "-".to_owned()
            }
        );
    }
    println!();
}
