//! The `pomona` binary: arguments in, exit status out, no logic.

use std::process::ExitCode;

/// Decoding and inference allocate large buffers from many threads; the system's allocator keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    pomona::cli::main(std::env::args_os())
}
