//! The `pomona` binary as a person or a script runs it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A folder of its own, where nothing of the user's is found.
struct Place(TempDir);

struct Ran {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// The files below a folder, sorted; with those that are being written.
    fn files(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(folder)) else {
            return Vec::new();
        };
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pomona"));
        command.args(args).current_dir(self.0.path()).env("HOME", self.0.path());
        for variable in [
            "POMONA_MODELS",
            "XDG_DATA_HOME",
            "XDG_STATE_HOME",
            "DATAFUSION_EXPLAIN_FORMAT",
        ] {
            command.env_remove(variable);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        let output = self.command(args).output().unwrap();
        Ran {
            status: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs what must succeed and gives standard output.
    fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.status, 0, "{args:?}: {}", ran.stderr);
        ran.stdout
    }
}

fn ended(child: &mut Child, within: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    while start.elapsed() < within {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    None
}

#[test]
fn a_result_goes_to_stdout_and_the_rest_to_stderr() {
    let ran = Place::new().run(&["-c", "SELECT 1 AS a, 'x' AS b; SELECT NULL AS n"]);
    insta::assert_snapshot!(ran.stdout, @r"
    +---+---+
    | a | b |
    +---+---+
    | 1 | x |
    +---+---+
    +------+
    | n    |
    +------+
    | NULL |
    +------+
    ");
    assert_eq!(
        ran.stderr.matches("1 row(s) fetched. Elapsed ").count(),
        2,
        "{}",
        ran.stderr
    );
}

#[test]
fn quiet_prints_results_only() {
    let ran = Place::new().run(&[
        "-q",
        "--format",
        "csv",
        "-c",
        "CREATE TABLE t AS VALUES (1, [1.5, 2.5]), (2, NULL); SELECT column1 AS i, column2 AS v FROM t ORDER BY i;",
    ]);
    insta::assert_snapshot!(ran.stdout, @r#"
    i,v
    1,"[1.5, 2.5]"
    2,
    "#);
    assert_eq!(ran.stderr, "");
}

#[test]
fn json_is_one_array_over_all_batches() {
    let json = Place::new().ok(&[
        "--format",
        "json",
        "-c",
        "SELECT value AS v FROM generate_series(1, 100) ORDER BY v",
    ]);
    let rows: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 100);
}

#[test]
fn a_table_shows_the_first_rows_and_counts_all() {
    let ran = Place::new().run(&[
        "--maxrows",
        "2",
        "-c",
        "SELECT value AS v FROM generate_series(1, 1000) ORDER BY v",
    ]);
    insta::assert_snapshot!(ran.stdout, @r"
    +---+
    | v |
    +---+
    | 1 |
    | 2 |
    | . |
    | . |
    | . |
    +---+
    ");
    assert!(
        ran.stderr.contains("1000 row(s) fetched, the first 2 shown"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_script_stops_at_the_first_failure_and_names_it() {
    let place = Place::new();
    place.write(
        "job.sql",
        "SELECT 'one' AS v;\n\n-- fails\nSELECT no_such_column\nFROM (SELECT 1);\nSELECT 'two' AS v;\n",
    );
    let ran = place.run(&["-q", "--format", "csv", "-f", "job.sql"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (1, "v\none\n"));
    assert!(
        ran.stderr.starts_with("job.sql:4: ") && ran.stderr.contains("no_such_column"),
        "{}",
        ran.stderr
    );
    assert!(
        ran.stderr.ends_with("\nSELECT no_such_column\nFROM (SELECT 1)\n"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_parser_names_the_line_of_the_file() {
    let place = Place::new();
    place.write("job.sql", "SELECT 1;\n\nSELECT (1\n  2);\n");
    let ran = place.run(&["-q", "-f", "job.sql"]);
    assert!(
        ran.stderr.starts_with("job.sql:3: ") && ran.stderr.contains("Line: 4"),
        "{}",
        ran.stderr
    );
}

#[test]
fn wrong_arguments_end_with_status_2() {
    let place = Place::new();
    for args in [
        &["-f", "no_such_file.sql"] as &[&str],
        &["--format", "xml"],
        &["-v", "no_value"],
        &["--on-error", "ignore"],
        &["--memory", "much"],
    ] {
        let ran = place.run(args);
        assert_eq!(ran.status, 2, "{args:?}");
        assert!(
            !ran.stderr.contains("panicked") && !ran.stderr.is_empty(),
            "{args:?}: {}",
            ran.stderr
        );
    }
    let ran = place.run(&["-c", "SELECT 1", "-f", "no_such_file.sql"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (2, ""));
    assert!(ran.stderr.contains("no_such_file.sql"), "{}", ran.stderr);
}

#[test]
fn variables_come_from_the_arguments_or_the_script() {
    let place = Place::new();
    place.write(
        "lib/defaults.sql",
        "\\default name World\n\\default greeting 'Hello, ':name\n",
    );
    place.write(
        "job.sql",
        "\\i lib/defaults.sql\n\\echo A :name\nSELECT :'greeting' AS \"g\", :n + 1 AS n;\n",
    );
    let run = |args: &[&str]| place.ok(&[&["--format", "csv", "-f", "job.sql"][..], args].concat());
    assert_eq!(run(&["-v", "n=1"]), "A World\ng,n\n\"Hello, World\",2\n");
    assert_eq!(
        run(&["-v", "n=2", "-v", "name=it's"]),
        "A it's\ng,n\n\"Hello, it's\",3\n"
    );

    let ran = place.run(&["-q", "-f", "job.sql"]);
    assert_eq!(ran.status, 1);
    assert!(
        ran.stderr.starts_with("job.sql:3: variable n is not set: pass -v n=…"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_script_ends_where_what_it_requires_is_not_there() {
    let place = Place::new();
    place.write(
        "job.sql",
        "CREATE VIEW v AS SELECT 1 AS n WHERE :n = 1;\n\\require v no row: is :n 1?\nSELECT n FROM v;\n\\require t none\n",
    );
    let run = |n: &str| place.run(&["-q", "--format", "csv", "-f", "job.sql", "-v", n]);
    let ran = run("n=2");
    assert_eq!((ran.status, ran.stdout.as_str()), (1, ""));
    assert!(ran.stderr.starts_with("job.sql:2: no row: is 2 1?"), "{}", ran.stderr);

    let ran = run("n=1");
    assert_eq!((ran.status, ran.stdout.as_str()), (1, "n\n1\n"));
    assert!(ran.stderr.starts_with("job.sql:4: "), "{}", ran.stderr);
}

#[test]
fn commands_and_scripts_run_in_the_order_given() {
    let place = Place::new();
    place.write("job.sql", "SELECT count(*) AS n FROM t;");
    let output = place.ok(&[
        "-q",
        "--format",
        "csv",
        "-c",
        "CREATE TABLE t AS VALUES (1)",
        "-f",
        "job.sql",
        "-c",
        "INSERT INTO t VALUES (2)",
        "-f",
        "job.sql",
    ]);
    assert_eq!(output, "n\n1\nn\n2\n");
}

#[test]
fn standard_input_is_a_script() {
    let place = Place::new();
    let mut child = place
        .command(&["-q", "--format", "csv"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"SELECT ';' AS v;\nSELECT nope;")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "v\n;\n");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().starts_with("stdin:2: "));
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let place = Place::new();
    let endless = "SELECT value FROM generate_series(1, 100000000000)";
    let mut child = place.command(&["--format", "csv", "-c", endless]).spawn().unwrap();
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut first)
        .unwrap();
    assert_eq!(first, "value\n");
    let status = ended(&mut child, Duration::from_secs(60));
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(
        (status.and_then(|status| status.code()), stderr.as_str()),
        (Some(0), "")
    );
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_at_once_and_leaves_nothing() {
    let place = Place::new();
    let columns = (0..8)
        .map(|i| format!("random() AS c{i}"))
        .collect::<Vec<_>>()
        .join(", ");
    let endless = format!(
        "SET datafusion.execution.batch_size = 8192; \
         COPY (SELECT {columns} FROM generate_series(1, 100000000000)) TO 'out/numbers.parquet'"
    );
    let mut child = place.command(&["-c", &endless]).spawn().unwrap();
    // Until there is something to leave.
    let start = Instant::now();
    while place.files("out").is_empty() && start.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(20));
    }
    assert!(!place.files("out").is_empty(), "nothing was written");

    Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    let interrupted = Instant::now();
    let status = ended(&mut child, Duration::from_secs(30)).and_then(|status| status.code());
    assert_eq!(status, Some(130));
    assert!(
        interrupted.elapsed() < Duration::from_secs(10),
        "{:?}",
        interrupted.elapsed()
    );
    assert_eq!(place.files("out"), [""; 0]);
}

#[test]
fn images_can_be_read() {
    let place = Place::new();
    let table = place.ok(&[
        "-c",
        "SELECT * FROM images('sample://fruits/Training/') ORDER BY path LIMIT 5",
    ]);
    assert_eq!(table.matches("jpeg, ").count(), 5, "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 120), "{table}");

    let query = "SELECT decode_image(content) AS image, embed(content, 'resnet-mini') AS embedding \
                 FROM images('sample://fruits/Training/') LIMIT 1";
    let table = place.ok(&["-c", query]);
    assert!(
        table.contains("image 100x100x3") && table.contains("… 128 values]"),
        "{table}"
    );

    let csv = place.ok(&[
        "-q",
        "--format",
        "csv",
        "-c",
        &query.replace("decode_image(content) AS image, ", ""),
    ]);
    assert_eq!(csv.matches(',').count(), 127, "{csv}");
    let full = place.ok(&[
        "-q",
        "--full",
        "-c",
        &query.replace("decode_image(content) AS image, ", ""),
    ]);
    assert!(!full.contains('…'), "{full}");
}

#[test]
fn broken_images_fail_or_become_null_and_are_counted() {
    let place = Place::new();
    place.write("photos/Kiwi/broken.jpg", "this is no picture");
    let query = "SELECT label, decode_image(content) AS image FROM images('photos/')";
    let ran = place.run(&["-c", query]);
    assert_eq!(ran.status, 1);
    assert!(
        ran.stderr.contains("decode") && ran.stderr.contains("image_error(content)"),
        "{}",
        ran.stderr
    );

    let ran = place.run(&["--on-error", "null", "-c", query]);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("| Kiwi  | NULL  |"), "{}", ran.stdout);
    assert!(
        ran.stderr.contains("1 value(s) became NULL: decode 1"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_failed_copy_leaves_the_old_file() {
    let place = Place::new();
    place.ok(&["-q", "-c", "COPY (SELECT 1 AS v) TO 'out.parquet'"]);
    let good = fs::read(place.path("out.parquet")).unwrap();
    let copy = "COPY (SELECT 1 / (1000 - value) AS v FROM generate_series(1, 1000)) TO 'out.parquet'";
    assert_eq!(place.run(&["-q", "-c", copy]).status, 1);
    assert_eq!(fs::read(place.path("out.parquet")).unwrap(), good);
    assert_eq!(place.files(""), ["out.parquet"]);
}

#[test]
fn secrets_of_a_failing_statement_are_not_printed() {
    let create = "CREATE EXTERNAL TABLE t STORED AS PARQUET LOCATION 's3://no-such-bucket-of-pomona/x.parquet' \
                  OPTIONS ('aws.access_key_id' 'AKIAHIDDEN', 'aws.secret_access_key' 'hidden', 'aws.no_such_option' '1')";
    let ran = Place::new().run(&["-c", create]);
    assert_eq!(ran.status, 1);
    assert!(
        ran.stderr.contains("CREATE EXTERNAL TABLE t") && !ran.stderr.to_lowercase().contains("hidden"),
        "{}",
        ran.stderr
    );
}

#[test]
fn secrets_of_a_copy_are_not_in_its_plan() {
    let place = Place::new();
    for explain in ["EXPLAIN", "EXPLAIN VERBOSE", "EXPLAIN FORMAT INDENT"] {
        let plan = place.ok(&[
            "-c",
            &format!(
                "{explain} COPY (SELECT 1 AS v) TO 's3://bucket/v.parquet' \
                 OPTIONS ('aws.access_key_id' 'AKIAHIDDEN', 'aws.secret_access_key' 'hidden', 'aws.region' 'eu-west-1')"
            ),
        ]);
        assert!(!plan.contains("hidden") && !plan.contains("AKIAHIDDEN"), "{plan}");
    }
}

#[test]
fn models_are_listed_and_an_unknown_preset_names_the_known() {
    let place = Place::new();
    let list = place.ok(&["model", "list"]);
    assert!(
        list.contains("resnet-mini") && list.contains("96x96") && list.contains("128"),
        "{list}"
    );
    let ran = place.run(&["model", "add", "net", "net.onnx", "--preset", "wrong"]);
    assert_eq!(ran.status, 2);
    assert!(ran.stderr.contains("torchvision"), "{}", ran.stderr);
    let ran = place.run(&["model", "add", "net", "no_such.onnx", "--preset", "keras"]);
    assert_eq!(ran.status, 1);
    assert!(ran.stderr.contains("no_such.onnx"), "{}", ran.stderr);
}

#[test]
fn a_model_is_added_and_used() {
    let place = Place::new();
    let network = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/resnet-mini/model.onnx");
    let network = network.to_str().unwrap();
    let add = [
        "model",
        "add",
        "mine",
        network,
        "--preset",
        "torchvision",
        "--dir",
        "nets",
    ];
    place.ok(&add);
    assert_eq!(place.files("nets/mine"), ["model.onnx", "preprocessor_config.json"]);
    assert_eq!(place.run(&add).status, 1, "it exists already");
    place.ok(&[&add[..], &["--force"]].concat());

    let query = "SELECT array_length(embed(content, 'mine')) AS n FROM images('sample://fruits/Test/') LIMIT 1";
    assert_eq!(
        place.ok(&["-q", "--format", "csv", "--models-dir", "nets", "-c", query]),
        "n\n128\n"
    );
}

#[test]
fn a_sample_is_written() {
    let place = Place::new();
    place.ok(&["sample", "data", "--images", "22", "--seed", "7"]);
    let count = "SELECT count(*) AS n FROM images('data/')";
    assert_eq!(place.ok(&["-q", "--format", "csv", "-c", count]), "n\n22\n");
}

#[test]
fn functions_are_documented_with_the_output_of_their_examples() {
    let text = Place::new().ok(&["functions"]);
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let written = fs::read_to_string(project.join("docs/functions.md")).unwrap();
    assert!(
        text == written,
        "docs/functions.md is behind: cargo run --release -- functions > docs/functions.md"
    );
    let readme = fs::read_to_string(project.join("README.md")).unwrap();
    let summary = text.lines().filter(|line| line.starts_with("| [`"));
    let missing: Vec<_> = summary
        .map(|line| line.replacen("](#", "](docs/functions.md#", 1))
        .filter(|line| !readme.contains(line))
        .collect();
    assert!(missing.is_empty(), "README.md lacks\n{}", missing.join("\n"));
}

#[test]
fn the_scripts_run_and_run_again() {
    let place = Place::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
    let mut scripts: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    scripts.sort();
    // It applies what classify.sql wrote.
    scripts.sort_by_key(|script| script.ends_with("apply.sql"));
    for script in scripts {
        let script = script.to_str().unwrap();
        for _ in 0..2 {
            let ran = place.run(&["-f", script]);
            assert_eq!(ran.status, 0, "{script}: {}", ran.stderr);
        }
    }
    let features = "SELECT count(*) AS n, min(array_length(features)) AS k FROM 'output/features.parquet'";
    let training = "SELECT count(*) AS n, 25 AS k FROM images('sample://fruits/Training/')";
    let csv = |query| place.ok(&["-q", "--format", "csv", "-c", query]);
    assert_eq!(csv(features), csv(training));
}

#[test]
fn a_plan_is_printed_whole() {
    let plan = Place::new().ok(&[
        "--maxrows",
        "1",
        "-c",
        "EXPLAIN FORMAT INDENT SELECT 1 + value FROM generate_series(1, 9)",
    ]);
    assert!(
        plan.contains("logical_plan") && plan.contains("physical_plan") && !plan.contains("| .  "),
        "{plan}"
    );
}
