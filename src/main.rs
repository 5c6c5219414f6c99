//! The `pomona` binary: arguments in, exit status out, and what only a process of its own can decide, its
//! allocators.

use std::process::ExitCode;

/// Decoding and inference allocate large buffers from many threads; the system's allocator keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    keep_large_blocks_apart();
    pomona::cli::main(std::env::args_os())
}

/// glibc gives a large block back to the system when it is freed, but from then on takes blocks of that size
/// from heaps that hardly ever shrink; a network that onnxruntime loads leaves 200 MB in them. It does not
/// where the limit is set, which it reads when a program starts: so the program starts once more.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_large_blocks_apart() {
    use std::os::unix::process::CommandExt;

    const LIMIT: &str = "MALLOC_MMAP_THRESHOLD_";
    if std::env::var_os(LIMIT).is_some() {
        return;
    }
    let mut arguments = std::env::args_os();
    if let (Ok(program), Some(name)) = (std::env::current_exe(), arguments.next()) {
        // It returns only where it fails, and then it was worth a try.
        let _ = std::process::Command::new(program)
            .arg0(name)
            .args(arguments)
            .env(LIMIT, "131072")
            .exec();
    }
}
