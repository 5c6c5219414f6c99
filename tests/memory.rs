//! The chain holds a bounded number of images, however many there are.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;

use common::{peak_memory, pomona, success};

#[test]
fn memory_does_not_grow_with_the_number_of_images() {
    let [thousand, four_thousand] = ["1000", "4000"].map(|images| {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("fruits");
        success(pomona().arg("sample").arg(&source).args(["--images", images]));
        peak_memory(
            pomona()
                // What is in use is measured: without it the allocator keeps what was freed for a second, which
                // differs by 100 MiB from run to run.
                .env("MIMALLOC_PURGE_DELAY", "0")
                .args(["-q", "-f", "sql/fruits.sql", "-v"])
                .arg(format!("source={}/", source.display()))
                .arg("-v")
                .arg(format!("target={}/", folder.path().join("out").display())),
        )
    });
    let mebibytes = |bytes: u64| bytes >> 20;
    assert!(
        four_thousand < thousand + thousand / 4 + (32 << 20),
        "1,000 images took {} MiB, 4,000 took {} MiB",
        mebibytes(thousand),
        mebibytes(four_thousand)
    );
}
