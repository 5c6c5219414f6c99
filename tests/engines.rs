//! The engines: which one runs a network, that both give the same, and what is said where one is missing,
//! too old, for another machine, or cannot run a graph.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{failure, onnxruntime, pomona, real_data, success};
use pomona::udfs::embed::engines::library;

const SAMPLE: &str = "(SELECT * FROM images('sample://fruits/Training/') ORDER BY path LIMIT 12)";

/// The program with this library and no other.
fn with_library(library: &Path) -> Command {
    let mut command = pomona();
    command.env(library::VARIABLE, library);
    command
}

/// The program where no library can be found.
fn without_library() -> Command {
    let mut command = pomona();
    for variable in [
        "CONDA_PREFIX",
        "LD_LIBRARY_PATH",
        "PYENV_ROOT",
        "VIRTUAL_ENV",
        library::VARIABLE,
    ] {
        command.env_remove(variable);
    }
    command.env("PATH", "");
    command
}

#[test]
fn both_engines_give_the_same_vectors() {
    let Some(library) = onnxruntime() else { return };
    let real = real_data();
    let mut sources = vec![("resnet-mini", SAMPLE.to_owned(), 12)];
    if let Some(real) = &real {
        let fruits = real.join("data/fruits/Test/");
        sources.push(("squeezenet1.1", format!("images('{}')", fruits.display()), 180));
        sources.push(("resnet-mini", format!("images('{}')", fruits.display()), 180));
    }
    for (model, source, rows) in sources {
        let table = |engine: &str| {
            format!(
                "SET pomona.engine = '{engine}';
                 CREATE TABLE {engine} AS SELECT path, embed(content, '{model}') AS pooled, \
                 embed(content, '{model}', 'flatten') AS map FROM {source};
                 SELECT engine FROM models() WHERE name = '{model}';"
            )
        };
        let compare = "SELECT count(*) AS rows, min(1 - cosine_distance(a.pooled, b.pooled)) > 0.99999 AS pooled, \
                       min(1 - cosine_distance(a.map, b.map)) > 0.99999 AS map \
                       FROM onnxruntime AS a JOIN tract AS b USING (path)";
        let mut command = with_library(library);
        if let Some(real) = &real {
            command.env("POMONA_MODELS", real.join("models"));
        }
        let sql = table("onnxruntime") + &table("tract") + compare;
        let told = success(command.args(["-q", "--format", "csv", "-c", &sql]));
        let expected = format!("engine\nonnxruntime\nengine\ntract\nrows,pooled,map\n{rows},true,true\n");
        assert_eq!(told, expected, "{model}");
    }
}

#[test]
fn the_library_is_found_where_python_keeps_it() {
    let Some(library) = onnxruntime() else { return };
    let home = tempfile::tempdir().unwrap();
    let package = home.path().join("lib/python3.12/site-packages/onnxruntime/capi");
    fs::create_dir_all(&package).unwrap();
    fs::copy(library, package.join("libonnxruntime.so.1.99.0")).unwrap();
    let engine = |command: &mut Command| {
        let sql = "SELECT engine FROM models() WHERE name = 'resnet-mini'";
        success(command.args(["-q", "--format", "csv", "-c", sql]))
    };
    assert_eq!(
        engine(without_library().env("VIRTUAL_ENV", home.path())),
        "engine\nonnxruntime\n"
    );
    // A folder does too.
    assert_eq!(engine(&mut with_library(&package)), "engine\nonnxruntime\n");
}

/// A library that says which version it is, and has nothing else; none without a C compiler.
fn library_of_version(folder: &Path, version: &str) -> Option<PathBuf> {
    let (source, library) = (
        folder.join("fake.c"),
        folder.join(format!("libonnxruntime.so.{version}")),
    );
    let code = format!(
        "typedef struct {{ const void* (*api)(unsigned); const char* (*version)(void); }} Base;
         static const void* api(unsigned v) {{ (void)v; return 0; }}
         static const char* version(void) {{ return \"{version}\"; }}
         static const Base base = {{ api, version }};
         const Base* OrtGetApiBase(void) {{ return &base; }}"
    );
    fs::write(&source, code).unwrap();
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(&source)
        .status();
    compiled.is_ok_and(|status| status.success()).then_some(library)
}

#[test]
#[cfg(target_os = "linux")]
fn a_library_that_cannot_be_used_is_named_with_the_cause() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    // The header of a shared object for a processor that this is not (IBM S/390, big-endian).
    let mut foreign = vec![0_u8; 64];
    foreign[..7].copy_from_slice(b"\x7fELF\x02\x02\x01");
    foreign[16..20].copy_from_slice(&[0, 3, 0, 22]);
    let mut cases = vec![
        (folder.path().join("missing.so"), "No such file"),
        (
            file("text.so", &b"this is no library\n".repeat(99)),
            "invalid ELF header",
        ),
        (file("foreign.so", &foreign), "built for another processor"),
    ];
    cases.extend(library_of_version(folder.path(), "1.9.0").map(|library| (library, "got '1.9.0'")));
    let sql = format!("SELECT count(embed(content, 'resnet-mini')) AS n FROM {SAMPLE}");
    for (library, cause) in cases {
        let told = failure(with_library(&library).args(["-c", "SET pomona.engine = 'onnxruntime'", "-c", &sql]));
        for part in [&library.display().to_string(), cause, "1.17", "pip install onnxruntime"] {
            assert!(told.contains(part), "{}: no '{part}' in: {told}", library.display());
        }

        // By itself it goes on with the other engine, and says so once.
        let output = with_library(&library).args(["-c", &sql, "-c", &sql]).output().unwrap();
        assert!(output.status.success());
        let notes = String::from_utf8(output.stderr).unwrap();
        assert_eq!(notes.matches("networks run on tract").count(), 1, "{notes}");
        assert!(notes.contains(&library.display().to_string()), "{notes}");
    }
}

#[test]
fn without_the_library_networks_run_on_tract() {
    let sql = "SELECT engine FROM models() WHERE name = 'resnet-mini'";
    // The system's own folders may hold one.
    if without_library()
        .args(["-c", "SET pomona.engine = 'onnxruntime'", "-c", sql])
        .output()
        .unwrap()
        .status
        .success()
        && onnxruntime().is_some_and(|library| library.starts_with("/usr"))
    {
        return;
    }
    let output = without_library().args(["--format", "csv", "-c", sql]).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "engine\ntract\n");
    assert!(!String::from_utf8(output.stderr).unwrap().contains("Notice"));
    let told = failure(without_library().args([
        "-c",
        "SET pomona.engine = 'onnxruntime'",
        "-c",
        "SELECT embed(content, 'resnet-mini') FROM images('sample://fruits/Training/') LIMIT 1",
    ]));
    assert!(
        told.contains("is not found") && told.contains(library::VARIABLE),
        "{told}"
    );
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    let sql = "SELECT embed(content, 'resnet-mini') FROM images('sample://fruits/Training/') LIMIT 1";
    let run = |engine: &str| {
        failure(pomona().args([
            "-c",
            "SET pomona.device = 'cuda'",
            "-c",
            &format!("SET pomona.engine = '{engine}'"),
            "-c",
            sql,
        ]))
    };
    assert!(run("tract").contains("SET pomona.device = 'cpu'"));
    if onnxruntime().is_some() && !Path::new("/dev/nvidia0").exists() {
        let told = run("onnxruntime");
        assert!(
            told.contains("CUDA") && told.contains("SET pomona.device = 'cpu'"),
            "{told}"
        );
    }
    let told = failure(pomona().args(["-c", "SET pomona.engine = 'tensorflow'"]));
    assert!(told.contains("'auto', 'onnxruntime' or 'tract'"), "{told}");
}

#[test]
fn memory_that_is_too_small_for_the_model_is_an_error_before_the_first_image() {
    let sql = "SELECT embed(content, 'resnet-mini') FROM images('sample://fruits/Training/') LIMIT 1";
    for limited in [
        vec!["--memory", "200KB", "-c", sql],
        vec!["-c", "SET pomona.memory_limit = '200KB'", "-c", sql],
    ] {
        let told = failure(pomona().args(limited));
        for part in ["resnet-mini", "200.0 KB", "--memory"] {
            assert!(told.contains(part), "{told}");
        }
    }
    success(pomona().args(["--memory", "200KB", "-c", "SET pomona.memory_limit = '1GB'", "-c", sql]));
}

#[test]
fn under_a_limit_what_spills_leaves_room_and_a_hostile_header_is_one_row() {
    let folder = tempfile::tempdir().unwrap();
    // Embeddings of 1,000 images and their contents, sorted: more than half of what there is.
    let source = folder.path().join("fruits");
    success(pomona().arg("sample").arg(&source).args(["--images", "1000"]));
    let sql = format!(
        "SELECT count(*) AS n FROM (SELECT path, content, embed(content, 'resnet-mini') AS v \
         FROM images('{}/') ORDER BY v[1], path)",
        source.display()
    );
    let told = success(pomona().args(["-q", "--format", "csv", "--memory", "12MB", "-c", &sql]));
    assert_eq!(told, "n\n1000\n");

    // A PNG of a few bytes that claims 12,000 x 12,000 pixels.
    let broken = folder.path().join("broken");
    fs::create_dir(&broken).unwrap();
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x2e\xe0\0\0\x2e\xe0\x08\x02\0\0\0".to_vec();
    png.extend([0x5d, 0xba, 0x92, 0x0c, 0, 0, 0, 0]);
    fs::write(broken.join("large.png"), png).unwrap();
    let sql = format!(
        "SELECT count(embed(content, 'resnet-mini')) AS n FROM images('{}/')",
        broken.display()
    );
    let told = success(pomona().args([
        "-q",
        "--format",
        "csv",
        "--memory",
        "200MB",
        "--on-error",
        "null",
        "-c",
        &sql,
    ]));
    assert_eq!(told, "n\n0\n");
}

#[test]
fn nothing_stays_in_the_folder_of_temporary_files() {
    let folder = tempfile::tempdir().unwrap();
    let sql = format!("SELECT count(embed(content, 'resnet-mini')) AS n FROM {SAMPLE}");
    success(pomona().env("TMPDIR", folder.path()).args(["-c", &sql]));
    // onnxruntime itself leaves a file of a few bytes, whatever it is asked.
    let files = fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap());
    let bytes: u64 = files.map(|file| file.metadata().unwrap().len()).sum();
    let folders = fs::read_dir(folder.path())
        .unwrap()
        .filter(|file| file.as_ref().unwrap().path().is_dir());
    assert_eq!((folders.count(), bytes < 1024), (0, true));
}
