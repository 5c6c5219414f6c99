//! The same SQL on a cluster: real schedulers and executors, an S3 server that knows who asks it, and what
//! goes wrong.

#![cfg(all(feature = "cluster", unix))]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/cluster.rs"]
mod cluster;
#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;
#[path = "common/queries.rs"]
mod queries;
#[expect(dead_code, reason = "every test takes the helpers that it needs")]
#[path = "common/s3.rs"]
mod server;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, FixedSizeListArray, Float32Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, SchemaRef};
use arrow::util::display::array_value_to_string;
use async_trait::async_trait;
use cluster::{Cluster, Process, WAIT, http_get, wait_until, with_credentials};
use common::{pomona, reference, rows, strings};
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::datasource::MemTable;
use datafusion::error::Result;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{Expr, TableType};
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, PhysicalExpr, PlanProperties};
use datafusion::prelude::SessionContext;
use pomona::SessionBuilder;
use queries::Queries;
use server::{EXECUTOR, Fault, S3Server, SECRET_KEY, picture};

// ── What is compared ────────────────────────────────────────────────────────────────────────────────

/// A cluster computes sums in another order.
const EXACT: f64 = 1e-6;

/// Printed numbers have four digits, of which the last may be rounded up or down.
const PRINTED: f64 = 2e-3;

/// Words and numbers; no frames of tables, whose widths are those of the numbers.
fn tokens(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c.is_whitespace() || ",:|[]{}()\"'…%".contains(c))
        .filter(|token| !token.chars().all(|c| c == '+' || c == '-'))
}

/// Is it a number that is no integer?
fn is_float(token: &str) -> bool {
    token.parse::<i64>().is_err() && token.parse::<f64>().is_ok()
}

fn is_same(found: &str, expected: &str, tolerance: f64) -> bool {
    let is_close = |a: &str, b: &str| match (a.parse::<f64>(), b.parse::<f64>()) {
        (Ok(a), Ok(b)) if a.is_finite() && b.is_finite() => (a - b).abs() <= tolerance * b.abs().max(1.0),
        _ => false,
    };
    let (mut found, mut expected) = (tokens(found), tokens(expected));
    loop {
        match (found.next(), expected.next()) {
            (None, None) => return true,
            (Some(a), Some(b)) if a == b => {}
            (Some(a), Some(b)) if (is_float(a) || is_float(b)) && is_close(a, b) => {}
            _ => return false,
        }
    }
}

/// The rows, each a line, as they come.
fn lines(rows: &RecordBatch) -> Vec<String> {
    let line = |row| {
        let cells = rows
            .columns()
            .iter()
            .map(|column| array_value_to_string(column, row).unwrap());
        cells.collect::<Vec<_>>().join(" | ")
    };
    (0..rows.num_rows()).map(line).collect()
}

/// The same in an order that does not depend on the last digits of numbers.
fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort_by_cached_key(|line| {
        let (numbers, words): (Vec<_>, Vec<_>) = tokens(line).partition(|token| is_float(token));
        let rounded = numbers
            .iter()
            .map(|number| format!("{:.3}", number.parse::<f64>().unwrap()));
        (
            words.into_iter().map(str::to_owned).collect::<Vec<_>>(),
            rounded.collect::<Vec<_>>(),
        )
    });
    lines
}

/// How two results differ, whose order nobody asked for.
fn difference(found: &RecordBatch, expected: &RecordBatch) -> Option<String> {
    differs(found, expected, false)
}

/// How two results differ, in their order too if it `is_ordered`.
fn differs(found: &RecordBatch, expected: &RecordBatch, is_ordered: bool) -> Option<String> {
    let names = |rows: &RecordBatch| -> Vec<String> {
        let schema = rows.schema();
        schema.fields().iter().map(|field| field.name().clone()).collect()
    };
    if names(found) != names(expected) {
        return Some(format!("columns {:?}, not {:?}", names(found), names(expected)));
    }
    let lines = |rows| match is_ordered {
        true => lines(rows),
        false => sorted(lines(rows)),
    };
    let (found, expected) = (lines(found), lines(expected));
    if found.len() != expected.len() {
        return Some(format!(
            "{} rows, not {}:\n{}\nnot\n{}",
            found.len(),
            expected.len(),
            found.join("\n"),
            expected.join("\n")
        ));
    }
    let different = found.iter().zip(&expected).find(|(a, b)| !is_same(a, b, EXACT));
    different.map(|(found, expected)| format!("the row\n{found}\nnot\n{expected}"))
}

/// A query's rows, or an error that does not let a test hang.
async fn timely(session: &SessionContext, sql: &str) -> Result<RecordBatch> {
    let ran = tokio::time::timeout(WAIT, rows(session, sql)).await;
    assert!(ran.is_ok(), "in {WAIT:?} it did not end: {sql}");
    ran.unwrap()
}

/// Runs every query here and there; all that differ are told together.
async fn assert_same(here: &SessionContext, there: &SessionContext, queries: &[&str]) {
    let mut wrong = vec![];
    for query in queries {
        let expected = timely(here, query)
            .await
            .map_err(|e| e.context((*query).to_owned()))
            .unwrap();
        match timely(there, query).await {
            Ok(found) => {
                let is_ordered = query.rfind("ORDER BY") > query.rfind(')');
                wrong.extend(differs(&found, &expected, is_ordered).map(|how| format!("{query}\ngives {how}")));
            }
            Err(error) => wrong.push(format!("{query}\nfails: {error}")),
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n\n{}",
        wrong.len(),
        queries.len(),
        wrong.join("\n\n")
    );
}

/// Every part is in the text.
fn check(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
}

// ── What is computed with ───────────────────────────────────────────────────────────────────────────

const LABELS: [&str; 4] = ["Apple", "Kiwi", "Lemon", "Plum"];

/// Eight tasks of eight images.
const IMAGES_OF_LABEL: u8 = 16;

/// A server with 16 images of each label in the bucket `fruits`, and an empty bucket `results`.
fn fruits() -> S3Server {
    let server = S3Server::start(&["fruits", "results"]);
    for (i, label) in LABELS.iter().enumerate() {
        for image in 0..IMAGES_OF_LABEL {
            let shade = i as u8 * IMAGES_OF_LABEL + image;
            server.put("fruits", &format!("Training/{label}/{image:02}.png"), &picture(shade));
        }
    }
    server
}

/// Reads every image, in one stage and the merge of its rows.
const WIDTHS: &str = "SELECT path, label, image_info(content)['width'] AS width \
                      FROM images('s3://fruits/Training/') ORDER BY path";

/// Reads every image, in two stages.
const BY_LABEL: &str = "SELECT label, count(*) AS n, count(DISTINCT path) AS paths, \
                               sum(image_info(content)['width']) AS width \
                        FROM images('s3://fruits/Training/') GROUP BY label ORDER BY label";

fn widths(server: &S3Server) -> String {
    let rows = server.keys("fruits").into_iter().map(|key| {
        let label = key.split('/').nth(1).unwrap();
        format!("s3://fruits/{key},{label},8\n")
    });
    "path,label,width\n".to_owned() + &rows.collect::<String>()
}

fn by_label() -> String {
    let n = u32::from(IMAGES_OF_LABEL);
    let rows = LABELS.map(|label| format!("{label},{n},{n},{}\n", n * 8));
    "label,n,paths,width\n".to_owned() + &rows.concat()
}

/// The binary without a cluster, with the credentials of a server.
fn pomona_on(server: &S3Server) -> Command {
    let mut command = pomona();
    command.envs(server.environment());
    command
}

/// Lets executors begin to read images, and go on when each of the first `executors` has begun: so each has
/// a task.
fn begin_together(server: &S3Server, executors: usize) {
    wait_until("every executor reads", || {
        (0..executors).all(|i| server.gets_of(&format!("{EXECUTOR}{i}")) > 0)
    });
    server.release_gets();
}

/// The keys of the images that were read since the server was last asked, and who read them. Nobody but
/// executors has, and executors have listed nothing.
fn images_read(server: &S3Server) -> (Vec<String>, BTreeSet<String>) {
    let requests = server.take_requests();
    let by_executor = |client: &str| client.starts_with(EXECUTOR);
    assert!(
        requests
            .iter()
            .all(|request| request.operation != "ListObjectsV2" || !by_executor(&request.client)),
        "{requests:?}"
    );
    let is_image = |key: &str| key.starts_with("Training/") || key.starts_with("Test/");
    let read = requests
        .into_iter()
        .filter(|request| request.operation == "GetObject" && is_image(&request.key));
    let (mut keys, readers): (Vec<_>, BTreeSet<_>) = read.map(|request| (request.key, request.client)).unzip();
    assert!(readers.iter().all(|reader| by_executor(reader)), "{readers:?}");
    keys.sort();
    (keys, readers)
}

/// Pseudo-random numbers in -1..1, the same in every run.
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }
}

/// Rows `i`, `label`, `v`: vectors with three strong directions, in noise.
fn vectors(rows: usize, width: usize) -> RecordBatch {
    let mut random = noise(42);
    let mut values = Vec::with_capacity(rows * width);
    for _ in 0..rows {
        let [a, b, c] = [9.0, 5.0, 2.0].map(|strength| strength * random());
        values.extend((0..width).map(|j| {
            let x = j as f32 * 0.01;
            a * x.sin() + b * (3.0 * x).cos() + c * (7.0 * x).sin() + 0.05 * random()
        }));
    }
    let item = Arc::new(Field::new_list_field(DataType::Float32, true));
    let values = Arc::new(Float32Array::from(values));
    let v = FixedSizeListArray::try_new(item, i32::try_from(width).unwrap(), values, None).unwrap();
    let i = Int64Array::from_iter_values(0..i64::try_from(rows).unwrap());
    let label = StringArray::from_iter_values((0..rows).map(|row| LABELS[row % LABELS.len()]));
    let columns: [(&str, ArrayRef); 3] = [("i", Arc::new(i)), ("label", Arc::new(label)), ("v", Arc::new(v))];
    RecordBatch::try_from_iter(columns).unwrap()
}

/// Writes rows that have a column `i` into so many Parquet files of a folder.
async fn write_parts(batch: RecordBatch, folder: &Path, parts: usize) {
    let session = pomona::session().unwrap();
    session.register_batch("batch", batch).unwrap();
    fs::create_dir_all(folder).unwrap();
    for part in 0..parts {
        let file = folder.join(format!("part-{part}.parquet"));
        let copy = format!(
            "COPY (SELECT * FROM batch WHERE i % {parts} = {part}) TO '{}'",
            file.display()
        );
        rows(&session, &copy).await.unwrap();
    }
}

/// The files of the bundled model.
fn bundled_model() -> [(&'static str, Vec<u8>); 2] {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/resnet-mini");
    ["model.onnx", "preprocessor_config.json"].map(|file| (file, fs::read(folder.join(file)).unwrap()))
}

/// Adds the bundled model as `mini-two` to a folder of models; `other` with another preprocessing.
fn add_model(models: &Path, other: bool) {
    let folder = models.join("mini-two");
    fs::create_dir_all(&folder).unwrap();
    for (file, content) in bundled_model() {
        fs::write(folder.join(file), content).unwrap();
    }
    if other {
        let raw = r#"{"size": {"height": 96, "width": 96}, "do_rescale": false, "do_normalize": false}"#;
        fs::write(folder.join("preprocessor_config.json"), raw).unwrap();
    }
}

// ── The scripts ─────────────────────────────────────────────────────────────────────────────────────

#[tokio::test(flavor = "multi_thread")]
async fn scripts_give_the_same_and_every_image_is_read_once() {
    let server = S3Server::start(&["fruits", "local", "cluster"]);
    Process::run(pomona_on(&server).args(["sample", "s3://fruits/", "--images", "110"])).success();
    let images = server.keys("fruits");
    let training: Vec<_> = images
        .iter()
        .filter(|key| key.starts_with("Training/"))
        .cloned()
        .collect();
    let cluster = Cluster::start(2, with_credentials(&server));

    for (script, source, variables, read, written) in [
        (
            "fruits",
            "s3://fruits/Training/",
            &[][..],
            &training,
            &["embeddings", "features"][..],
        ),
        (
            "choose_k",
            "s3://fruits/",
            &["-v", "components=10", "-v", "ks=2, 5, 10"][..],
            &images,
            &["labelled", "sides", "scores"][..],
        ),
        (
            "classify",
            "s3://fruits/",
            &["-v", "k=10"][..],
            &images,
            &["labelled", "sides", "classifier", "predictions"][..],
        ),
    ] {
        let arguments = |bucket: &str| -> Vec<String> {
            let said = [
                "-f".to_owned(),
                format!("sql/{script}.sql"),
                "-v".to_owned(),
                format!("source={source}"),
                "-v".to_owned(),
                format!("target=s3://{bucket}/{script}/"),
            ];
            said.into_iter()
                .chain(variables.iter().map(|word| (*word).to_owned()))
                .collect()
        };
        let expected = Process::run(pomona_on(&server).args(["-q"]).args(arguments("local"))).success();

        server.take_requests();
        server.hold_gets("T", 0);
        let mut run = Process::start(script, cluster.client().args(arguments("cluster")));
        begin_together(&server, 2);
        let found = run.finish().success();

        let (keys, readers) = images_read(&server);
        assert_eq!(&keys, read, "{script}");
        assert_eq!(readers.len(), 2, "{script}: {readers:?}");
        assert!(
            is_same(&found, &expected, PRINTED),
            "{script} prints\n{found}\nnot\n{expected}"
        );
        let session = pomona::session().unwrap();
        for file in written {
            let path = format!("{script}/{file}.parquet");
            let read = |bucket: &str| format!("SELECT * FROM '{}'", server.folder(bucket).join(&path).display());
            let found = rows(&session, &read("cluster")).await.unwrap();
            let expected = rows(&session, &read("local")).await.unwrap();
            assert!(expected.num_rows() > 0, "{path}");
            assert_eq!(difference(&found, &expected), None, "{path}");
        }
    }
}

#[test]
fn a_cluster_in_one_process_runs_the_main_job() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("fruits");
    Process::run(pomona().arg("sample").arg(&source).args(["--images", "60"])).success();
    let run = |cluster: &[&str], target: &str| {
        let target = folder.path().join(target);
        let mut command = pomona();
        command
            .arg("-q")
            .args(cluster)
            .args(["-f", "sql/fruits.sql", "-v", "k=5", "-v"]);
        command.arg(format!("source={}/Training/", source.display())).arg("-v");
        command.arg(format!("target={}/", target.display()));
        (Process::run(&mut command).success(), target.join("features.parquet"))
    };
    let (expected, _) = run(&[], "local");
    let (found, features) = run(&["--cluster", "local:2"], "cluster");
    assert!(is_same(&found, &expected, PRINTED), "{found}\nnot\n{expected}");
    assert!(features.is_file());
}

// ── Executors come and go ───────────────────────────────────────────────────────────────────────────

#[test]
fn an_executor_that_comes_late_gets_tasks_of_a_running_query() {
    let server = fruits();
    let mut cluster = Cluster::start(1, with_credentials(&server));
    server.hold_gets("Training/", 0);
    let mut query = cluster.query(WIDTHS);
    wait_until("the first executor reads", || server.gets_of("executor-0") > 0);
    assert_eq!(server.gets_of("executor-1"), 0);
    // What an autoscaler asks for: the tasks that run, and those that wait.
    let told = http_get(&cluster.scheduler_address(), "/tasks");
    assert_eq!(
        told.map(|(_, body)| body.trim().to_owned()).as_deref(),
        Some("{\"tasks\":8}")
    );
    cluster.add();
    begin_together(&server, 2);
    assert_eq!(query.finish().success(), widths(&server));
    let (keys, readers) = images_read(&server);
    assert_eq!(keys, server.keys("fruits"));
    assert_eq!(readers.len(), 2);
}

/// The executor that has sent most GETs.
fn busiest(server: &S3Server, executors: usize) -> usize {
    (0..executors)
        .max_by_key(|i| server.gets_of(&format!("{EXECUTOR}{i}")))
        .unwrap()
}

#[test]
fn the_query_of_a_client_that_leaves_is_cancelled() {
    let server = fruits();
    let cluster = Cluster::start(1, with_credentials(&server));
    let tasks = || http_get(&cluster.scheduler_address(), "/tasks").map(|(_, body)| body);
    for signal in ["-INT", "-TERM", "-KILL"] {
        server.take_requests();
        server.hold_gets("Training/", 0);
        let mut query = cluster.query(WIDTHS);
        wait_until("the executor reads", || server.gets_of("executor-0") > 0);
        assert_eq!(tasks().as_deref(), Some("{\"tasks\":8}\n"));
        query.signal(signal);
        assert!(!query.finish().status.success());
        wait_until("nothing is to be done", || {
            tasks().as_deref() == Some("{\"tasks\":0}\n")
        });
        server.release_gets();
        assert!(images_read(&server).0.len() <= 16, "{signal}");
    }
    // And the executor goes on with the next.
    assert_eq!(cluster.query(WIDTHS).finish().success(), widths(&server));
}

#[test]
fn an_executor_that_starts_again_under_its_name_takes_over() {
    let server = fruits();
    let mut cluster = Cluster::start(1, with_credentials(&server));
    server.hold_gets("Training/", 0);
    let mut query = cluster.query(WIDTHS);
    wait_until("the executor reads", || server.gets_of("executor-0") > 0);
    cluster.restart_executor();
    server.release_gets();
    assert_eq!(query.finish().success(), widths(&server));
}

// Ballista finds a lost executor by its silence, runs its tasks again, and those stages whose rows went with
// it. So the query does not fail.
#[test]
fn a_query_survives_an_executor_that_is_killed_in_its_first_task() {
    let server = fruits();
    let mut cluster = Cluster::start(2, with_credentials(&server));
    server.hold_gets("Training/", 0);
    let mut query = cluster.query(WIDTHS);
    wait_until("both executors read", || {
        server.gets_of("executor-0") > 0 && server.gets_of("executor-1") > 0
    });
    cluster.executors[0].process.kill();
    server.release_gets();
    assert_eq!(query.finish().success(), widths(&server));
}

#[test]
fn a_query_survives_an_executor_that_is_killed_with_rows_that_others_need() {
    let server = fruits();
    let mut cluster = Cluster::start(2, with_credentials(&server));
    // Of 64 images in tasks of 8, 40 are read. Who has read more than 8 has finished a task.
    server.hold_gets("Training/", 40);
    let mut query = cluster.query(BY_LABEL);
    wait_until("a task is finished, and both executors wait", || {
        let gets = ["executor-0", "executor-1"].map(|executor| server.gets_of(executor));
        gets.iter().sum::<usize>() > 40 && gets.iter().all(|gets| *gets > 0)
    });
    let victim = busiest(&server, 2);
    assert!(server.gets_of(&format!("{EXECUTOR}{victim}")) > 16);
    cluster.executors[victim].process.kill();
    server.release_gets();
    assert_eq!(query.finish().success(), by_label());
}

/// The stage that reads images needs rows of another, which are lost with the executor: so all of it runs again,
/// also the tasks whose rows are still there on the other executor.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_stage_that_runs_again_count_once() {
    let server = fruits();
    write_parts(vectors(60, 2), &server.folder("results").join("vectors"), 6).await;
    let mut cluster = Cluster::start(2, with_credentials(&server));
    server.hold_gets("Training/", 40);
    let counted = BY_LABEL.replace(
        " GROUP BY",
        " CROSS JOIN (SELECT sum(i) AS total FROM 's3://results/vectors/') WHERE total > 0 GROUP BY",
    );
    let mut query = cluster.query(&counted);
    wait_until("tasks are finished, and both executors wait", || {
        let gets = ["executor-0", "executor-1"].map(|executor| server.gets_below(executor, "Training/"));
        gets.iter().sum::<usize>() > 40 && gets.iter().all(|gets| *gets > 8)
    });
    cluster.executors[0].process.kill();
    server.release_gets();
    assert_eq!(query.finish().success(), by_label());
}

#[test]
fn what_is_written_while_an_executor_is_killed_holds_every_row_once() {
    let server = fruits();
    let mut cluster = Cluster::start(2, with_credentials(&server));
    server.hold_gets("Training/", 40);
    let mut query = cluster.query(&format!("COPY ({WIDTHS}) TO 's3://results/widths.csv'"));
    wait_until("both executors wait", || {
        server.gets_of("executor-0") + server.gets_of("executor-1") > 40
    });
    let victim = busiest(&server, 2);
    cluster.executors[victim].process.kill();
    server.release_gets();
    query.finish().success();
    let written = fs::read_to_string(server.folder("results").join("widths.csv")).unwrap();
    assert_eq!(written, widths(&server));
    assert_eq!(server.keys("results"), ["widths.csv"]);
}

#[test]
fn an_executor_that_is_asked_to_end_finishes_its_tasks() {
    let server = fruits();
    let mut cluster = Cluster::start(2, with_credentials(&server));
    server.hold_gets("Training/", 0);
    let mut query = cluster.query(BY_LABEL);
    wait_until("both executors read", || {
        server.gets_of("executor-0") > 0 && server.gets_of("executor-1") > 0
    });
    let leaving = &mut cluster.executors[0];
    leaving.process.terminate();
    wait_until("it is ready no more", || !leaving.is_ready());
    let asked = server.gets_of("executor-0");
    server.release_gets();
    let ended = leaving.process.finish();
    assert!(ended.status.success(), "{}\n{}", ended.status, ended.stderr);
    assert_eq!(query.finish().success(), by_label());
    // It had asked for the images of one task, and took no other.
    assert!(asked <= 8 && server.gets_of("executor-0") <= 8);
}

#[test]
fn a_scheduler_that_starts_again_finds_its_executors() {
    let server = fruits();
    let mut cluster = Cluster::start(2, with_credentials(&server));
    server.hold_gets("Training/", 0);
    let mut query = cluster.query(BY_LABEL);
    wait_until("an executor reads", || server.gets_of("executor-0") > 0);
    cluster.scheduler.process.kill();
    let killed = Instant::now();
    let error = query.finish().failure();
    assert!(killed.elapsed() < SECONDS, "{:?}", killed.elapsed());
    check(
        &error,
        &[&cluster.scheduler_address(), "was lost", "Run the query again"],
    );
    server.release_gets();

    wait_until("the executors miss it", || {
        cluster
            .executors
            .iter()
            .all(|executor| executor.status("/readyz") == Some(503) && executor.status("/healthz") == Some(200))
    });
    cluster.restart_scheduler();
    wait_until("the executors are back", || {
        cluster.scheduler.is_ready() && cluster.executors.iter().all(|executor| executor.is_ready())
    });
    assert_eq!(cluster.query(BY_LABEL).finish().success(), by_label());
}

// ── Large states ────────────────────────────────────────────────────────────────────────────────────

/// The state of each partial fit is a triangle of 2,048 x 2,049 / 2 numbers: more than the 16 MiB that a
/// gRPC message may have by default.
#[tokio::test(flavor = "multi_thread")]
async fn a_pca_of_2048_features_on_three_executors() {
    let server = S3Server::start(&["vectors"]);
    write_parts(vectors(180, 2048), &server.folder("vectors").join("rows"), 6).await;
    let sql = "CREATE EXTERNAL TABLE vectors STORED AS PARQUET LOCATION 's3://vectors/rows/'; \
               SELECT pca_fit(v, 3) AS model FROM vectors";
    let expected = Process::run(pomona_on(&server).args(["-q", "--format", "csv", "-c", sql])).success();

    let cluster = Cluster::start(3, with_credentials(&server));
    server.take_requests();
    server.hold_gets("rows/", 0);
    let mut query = cluster.query(sql);
    begin_together(&server, 3);
    let found = query.finish().success();
    assert!(is_same(&found, &expected, EXACT), "{found}\nnot\n{expected}");
}

// ── The same rows ───────────────────────────────────────────────────────────────────────────────────

/// Two sessions, here and on a cluster, with the tables `fruits` (images of a server), `numbers` (five
/// Parquet files in it: i 0..199, label, x with NULLs) and `small` (in memory). The executors have no
/// credentials: those of the tables come to them.
async fn sessions(server: &S3Server, cluster: &Cluster<'_>) -> [SessionContext; 2] {
    let batch = {
        let i = Int64Array::from_iter_values(0..200);
        let label = StringArray::from_iter((0..200).map(|i| (i % 7 != 3).then(|| LABELS[i % 4])));
        let x = Int64Array::from_iter((0..200_i64).map(|i| (i % 5 != 0).then_some(i * 37 % 50)));
        let columns: [(&str, ArrayRef); 3] = [("i", Arc::new(i)), ("label", Arc::new(label)), ("x", Arc::new(x))];
        RecordBatch::try_from_iter(columns).unwrap()
    };
    write_parts(batch.clone(), &server.folder("results").join("numbers"), 5).await;
    write_parts(batch, &server.folder("results").join("one"), 1).await;
    server.put("results", "listed.json", br#"[{"i": 3}, {"i": 5}]"#);
    server.put("results", "ended.csv", b"i,x;1,2;3,4;");
    // Nothing tells how large these are before they are read.
    for (name, rows, step) in [("big", 400, 7), ("tiny", 20, 11)] {
        let rows = (0..rows).map(|i| format!("{},{}\n", i % 20, (i * step + 3) % rows));
        server.put(
            "results",
            &format!("{name}.csv"),
            ("k,v\n".to_owned() + &rows.collect::<String>()).as_bytes(),
        );
    }
    let here = pomona::session().unwrap();
    let there = SessionBuilder::new().cluster(cluster.url()).build().unwrap();
    let options = server.options();
    for session in [&here, &there] {
        for sql in [
            format!(
                "CREATE EXTERNAL TABLE fruits STORED AS IMAGES LOCATION 's3://fruits/Training/' OPTIONS ({options})"
            ),
            format!(
                "CREATE EXTERNAL TABLE numbers STORED AS PARQUET LOCATION 's3://results/numbers/' OPTIONS ({options})"
            ),
            format!("CREATE EXTERNAL TABLE one STORED AS PARQUET LOCATION 's3://results/one/' OPTIONS ({options})"),
            format!("CREATE EXTERNAL TABLE big STORED AS CSV LOCATION 's3://results/big.csv' OPTIONS ({options})"),
            format!("CREATE EXTERNAL TABLE tiny STORED AS CSV LOCATION 's3://results/tiny.csv' OPTIONS ({options})"),
            format!(
                "CREATE EXTERNAL TABLE ended (i BIGINT, x BIGINT) STORED AS CSV LOCATION 's3://results/ended.csv' \
                     OPTIONS ({options}, 'format.terminator' ';')"
            ),
            format!(
                "COPY (VALUES (3), (4)) TO 's3://results/packed.csv.gz' STORED AS CSV \
                     OPTIONS ({options}, 'format.compression' 'gzip', 'format.has_header' false)"
            ),
            format!(
                "CREATE EXTERNAL TABLE packed (i BIGINT) STORED AS CSV LOCATION 's3://results/packed.csv.gz' \
                     OPTIONS ({options}, 'format.compression' 'gzip', 'format.has_header' false)"
            ),
            format!(
                "CREATE EXTERNAL TABLE listed STORED AS JSON LOCATION 's3://results/listed.json' \
                     OPTIONS ({options}, 'format.newline_delimited' false)"
            ),
            "CREATE TABLE small AS VALUES ('Apple', 1), ('Kiwi', 2), ('Pear', 3), (NULL, 4)".to_owned(),
            "CREATE VIEW pictures AS SELECT path, label, image_info(content)['width'] AS width FROM fruits".to_owned(),
        ] {
            timely(session, &sql).await.unwrap();
        }
    }
    [here, there]
}

#[tokio::test(flavor = "multi_thread")]
async fn no_query_gives_other_rows() {
    let server = fruits();
    let cluster = Cluster::start(2, |_, _| {});
    let [here, there] = sessions(&server, &cluster).await;
    assert_same(
        &here,
        &there,
        &[
            // Leaves of their own run more than once in Ballista.
            "SELECT count(*) AS n, count(DISTINCT path) AS paths, sum(image_info(content)['width']) AS width FROM fruits",
            "SELECT path, label, content FROM fruits",
            "SELECT count(*) AS n FROM fruits",
            "SELECT label, count(*) AS n FROM fruits GROUP BY label",
            "SELECT count(*) AS n FROM (SELECT content FROM fruits LIMIT 5)",
            "SELECT path, width FROM pictures WHERE label = 'Kiwi' AND width = 8",
            "SELECT path FROM pictures WHERE width > 8",
            // A count that statistics know, beside rows that are read; limits of what is in memory.
            "SELECT label, count(*) AS n FROM numbers GROUP BY label UNION ALL SELECT 'all', count(*) FROM numbers",
            "SELECT 1 AS i UNION ALL SELECT i FROM numbers",
            "SELECT 'all' AS label, count(*) AS n FROM fruits UNION ALL SELECT label, sum(width) FROM pictures GROUP BY label",
            "SELECT count(*) AS n FROM numbers WHERE i IN (SELECT column2 FROM small LIMIT 2)",
            "SELECT label FROM pictures UNION ALL (SELECT column1 FROM small LIMIT 2)",
            // Files that are packed.
            "SELECT n.i FROM numbers n JOIN packed p ON n.i = p.i",
            "SELECT n.i FROM numbers n JOIN listed l ON n.i = l.i",
            "SELECT n.i, e.x FROM numbers n JOIN ended e ON n.i = e.i",
            // Joins with a table so small that one partition of it is collected.
            "SELECT s.column1, n.i FROM small s LEFT JOIN one n ON s.column2 = n.i ORDER BY s.column2, n.i",
            "SELECT s.column1 IS NULL AS missing FROM small s LEFT JOIN one n ON s.column2 = n.i LIMIT 4",
            "SELECT count(*) AS n FROM small s LEFT JOIN one n ON s.column2 = n.i",
            "SELECT s.column1, count(*) AS n FROM small s FULL JOIN one n ON s.column2 = n.i GROUP BY s.column1",
            "SELECT s.column1 FROM small s WHERE EXISTS (SELECT 1 FROM one n WHERE n.i = s.column2) ORDER BY s.column1",
            "SELECT s.column1 FROM small s WHERE NOT EXISTS (SELECT 1 FROM one n WHERE n.i = s.column2 AND n.x > 9)",
            "SELECT count(*) AS n FROM (SELECT * FROM small WHERE column2 > 9) s JOIN one n ON s.column2 = n.i",
            // Limits below joins.
            "SELECT count(*) AS n FROM numbers b JOIN (SELECT i FROM numbers LIMIT 5) n ON b.i = n.i",
            "SELECT count(*) AS n FROM numbers WHERE i IN (SELECT i FROM numbers LIMIT 5)",
            "SELECT count(*) AS n FROM numbers a CROSS JOIN (SELECT i FROM numbers LIMIT 5) n",
            "SELECT count(*) AS n FROM numbers a LEFT JOIN (SELECT i FROM numbers LIMIT 5) n ON a.i < n.i + 1000",
            // Orders that are there already: of a listing, of a join's side.
            "SELECT path FROM fruits ORDER BY path",
            "SELECT path FROM fruits ORDER BY path DESC LIMIT 20",
            "SELECT path, count(content) AS n FROM fruits GROUP BY path ORDER BY path",
            "SELECT path, count(content) AS n FROM fruits GROUP BY path ORDER BY path LIMIT 3",
            "SELECT DISTINCT path FROM pictures WHERE width = 8 ORDER BY path LIMIT 5",
            "SELECT path, count(content) AS n FROM fruits WHERE path LIKE '%/03.png' GROUP BY path ORDER BY path",
            "SELECT path, row_number() OVER (ORDER BY path) AS r FROM (SELECT path, count(content) AS n FROM fruits GROUP BY path)",
            "SELECT path, row_number() OVER (PARTITION BY path ORDER BY label) AS r FROM pictures WHERE path LIKE '%/03.png'",
            "SELECT path, row_number() OVER (PARTITION BY path ORDER BY width) AS r FROM pictures",
            "SELECT path, first_value(width) OVER (ORDER BY path) AS w FROM pictures WHERE path LIKE '%/03.png'",
            "SELECT label, array_agg(path ORDER BY path) AS p FROM pictures WHERE width = 8 GROUP BY label ORDER BY label",
            "SELECT b.k, b.v, t.v AS w FROM big b JOIN tiny t ON b.k = t.k ORDER BY t.v, b.v",
            "SELECT b.k, b.v, t.v AS w FROM big b JOIN tiny t ON b.k = t.k ORDER BY t.v, b.v LIMIT 9",
            "SELECT b.k, b.v, t.v AS w FROM tiny t JOIN big b ON b.k = t.k ORDER BY b.v, t.v LIMIT 9",
            "SELECT b.k, b.v, row_number() OVER (ORDER BY t.v, b.v) AS r FROM big b JOIN tiny t ON b.k = t.k",
            "SELECT b.k, b.v, row_number() OVER (PARTITION BY b.k ORDER BY t.v, b.v) AS r FROM big b RIGHT JOIN tiny t ON b.k = t.k",
            "SELECT f.path FROM small s JOIN fruits f ON f.label = s.column1 WHERE image_info(f.content)['width'] = 8 ORDER BY f.path LIMIT 3",
            "SELECT f.path, s.column2 FROM small s CROSS JOIN pictures f WHERE f.width = 8 ORDER BY f.path, s.column2 LIMIT 7",
            "SELECT t.v, b.v AS w FROM tiny t CROSS JOIN big b ORDER BY b.v, t.v, b.k, t.k LIMIT 11",
            "SELECT t.v, b.v AS w FROM tiny t JOIN big b ON t.v > b.v + 1 ORDER BY b.v, t.v, b.k, t.k LIMIT 11",
            "SELECT k, v FROM (SELECT k, v FROM big ORDER BY v, k LIMIT 30) ORDER BY k, v",
            "SELECT k, lag(v) OVER (PARTITION BY k ORDER BY v) AS b, lead(v) OVER (PARTITION BY k ORDER BY v) AS a FROM big",
            "SELECT k, v, sum(v) OVER (ORDER BY v, k) AS up, sum(v) OVER (ORDER BY v DESC, k DESC) AS down FROM big",
            "SELECT k, v, last_value(k) OVER (ORDER BY v, k) AS up, first_value(k) OVER (ORDER BY v DESC, k DESC) AS f FROM big",
            // Joins of one partition below others, sides that end in a merge, columns that a filter makes constant.
            "SELECT a.i, a.label FROM (SELECT i, label FROM numbers ORDER BY i LIMIT 17) a LEFT ANTI JOIN small s \
             ON a.i = s.column2 WHERE a.i IN (SELECT i FROM numbers WHERE x < 28) ORDER BY a.i LIMIT 18",
            "SELECT count(*) AS n FROM (SELECT label, count(*) AS c FROM numbers GROUP BY label) b WHERE b.label NOT IN \
             (SELECT label FROM (SELECT label, path FROM fruits ORDER BY path LIMIT 9))",
            "SELECT k, v, max(v) OVER (PARTITION BY k ORDER BY v DESC) AS w FROM big WHERE k = 3",
            "SELECT i, label, count(*) OVER (PARTITION BY label) AS n FROM numbers WHERE label = 'Kiwi' ORDER BY i LIMIT 9",
            "SELECT t.v, max(t.k) AS m, count(*) AS n FROM (SELECT k, v FROM tiny UNION ALL SELECT column2, column2 + 1 FROM small) t \
             LEFT ANTI JOIN numbers b ON t.k > b.i + 15 GROUP BY t.v",
            "SELECT t.k, n.i, row_number() OVER (PARTITION BY n.i ORDER BY t.v, t.k, n.x) AS w FROM tiny t \
             LEFT JOIN numbers n ON t.v < n.i - 190",
            // Groups of nothing.
            "SELECT count(*) AS n, label FROM numbers GROUP BY GROUPING SETS ((), (label))",
            "SELECT label, n FROM (SELECT label, count(*) AS n FROM numbers GROUP BY label) UNION ALL \
             SELECT label, n FROM (SELECT label, count(*) AS n FROM one GROUP BY label)",
            // Two tables of one function.
            "SELECT (SELECT count(content) FROM images('sample://fruits/Training/')) AS training, \
                    (SELECT count(content) FROM images('sample://fruits/Test/')) AS test",
            // Sets.
            "SELECT path, width FROM pictures UNION ALL SELECT path, width FROM pictures WHERE label = 'Plum'",
            "SELECT label, width FROM pictures UNION SELECT column1, column2 FROM small",
            "SELECT label FROM pictures WHERE width = 8 INTERSECT SELECT column1 FROM small",
            "SELECT label FROM pictures WHERE width = 8 EXCEPT SELECT column1 FROM small",
            "SELECT DISTINCT label, width FROM pictures",
            "SELECT DISTINCT ON (label) label, i, x FROM numbers WHERE label IS NOT NULL ORDER BY label, i DESC",
            // Joins.
            "SELECT p.path, n.i FROM pictures p JOIN numbers n ON p.label = n.label AND n.i < 20",
            "SELECT p.path, s.column2 AS s FROM pictures p LEFT JOIN small s ON p.label = s.column1 WHERE p.width = 8",
            "SELECT p.path, s.column1 AS s FROM pictures p RIGHT JOIN small s ON p.label = s.column1",
            "SELECT p.label, s.column1 AS s, count(*) AS n FROM pictures p FULL JOIN small s ON p.label = s.column1 \
             GROUP BY p.label, s.column1",
            "SELECT s.column1 AS s, n.i FROM small s CROSS JOIN numbers n WHERE n.i > 195",
            "SELECT a.i, b.i AS j FROM numbers a LEFT JOIN numbers b ON a.i > b.i + 190",
            "SELECT a.i, b.i AS j FROM numbers a RIGHT JOIN numbers b ON a.i > b.i + 190",
            "SELECT a.i, b.i AS j FROM numbers a FULL JOIN numbers b ON a.i > b.i + 190",
            "SELECT s.column1 AS s, n.i FROM small s LEFT JOIN numbers n ON n.i > 193 + s.column2",
            "SELECT n.i, s.column1 AS s FROM numbers n LEFT JOIN small s ON n.i > 196 + s.column2",
            "SELECT a.i FROM numbers a LEFT SEMI JOIN numbers b ON a.i > b.i + 190",
            "SELECT a.i FROM numbers a LEFT ANTI JOIN numbers b ON a.i > b.i + 10",
            "SELECT a.label, count(*) AS n FROM numbers a JOIN numbers b ON a.label = b.label AND a.x < b.x GROUP BY a.label",
            // Subqueries.
            "SELECT i FROM numbers WHERE label NOT IN (SELECT column1 FROM small WHERE column1 IS NOT NULL)",
            "SELECT i FROM numbers WHERE label NOT IN (SELECT column1 FROM small)",
            "SELECT i FROM numbers WHERE x NOT IN (SELECT x FROM numbers WHERE i < 20 AND x IS NOT NULL)",
            "SELECT i FROM numbers WHERE label IN (SELECT column1 FROM small) OR x > 45",
            "SELECT i FROM numbers n WHERE EXISTS (SELECT 1 FROM pictures p WHERE p.label = n.label AND p.width = 8)",
            "SELECT i FROM numbers n WHERE NOT EXISTS (SELECT 1 FROM small s WHERE s.column1 = n.label)",
            "SELECT i FROM numbers WHERE EXISTS (SELECT 1 FROM pictures WHERE width = 9)",
            "SELECT n.i, (SELECT max(m.x) FROM numbers m WHERE m.label = n.label) AS most FROM numbers n",
            "SELECT n.i FROM numbers n WHERE n.x > (SELECT avg(m.x) FROM numbers m WHERE m.label = n.label)",
            "SELECT i, (SELECT max(width) FROM pictures) AS width FROM numbers WHERE i > (SELECT avg(i) FROM numbers)",
            "SELECT i, (SELECT width FROM pictures WHERE width = 9) AS nothing FROM numbers WHERE i < 3",
            "SELECT i FROM numbers WHERE i > (SELECT max(i) - (SELECT min(column2) FROM small) FROM numbers) - 3",
            // Order, groups, windows.
            "SELECT i, label, x FROM numbers ORDER BY x DESC NULLS LAST, i LIMIT 7",
            "SELECT i, label, x FROM numbers ORDER BY label NULLS FIRST, i LIMIT 7 OFFSET 30",
            "SELECT path FROM pictures WHERE width = 8 ORDER BY path DESC LIMIT 3",
            "SELECT label, x, count(*) AS n FROM numbers GROUP BY GROUPING SETS ((label), (x), ())",
            "SELECT label, i % 3 AS r, sum(x) AS s FROM numbers GROUP BY ROLLUP (label, i % 3)",
            "SELECT label, avg(x) AS a, stddev(x) AS s, median(x) AS m, count(DISTINCT x) AS d FROM numbers GROUP BY label",
            "SELECT label, array_agg(i ORDER BY i) AS i, string_agg(x::VARCHAR, ',' ORDER BY i) AS x FROM numbers GROUP BY label",
            "SELECT label, first_value(x ORDER BY i) AS a, last_value(x ORDER BY i) AS z FROM numbers GROUP BY label",
            "SELECT label, count(*) FILTER (WHERE x > 20) AS n FROM numbers GROUP BY label HAVING count(*) > 20",
            "SELECT i, row_number() OVER (PARTITION BY label ORDER BY i) AS n, \
                    sum(x) OVER (PARTITION BY label ORDER BY i ROWS BETWEEN 2 PRECEDING AND CURRENT ROW) AS s FROM numbers",
            "SELECT path, rank() OVER (ORDER BY label) AS r, count(*) OVER () AS n FROM pictures",
            "SELECT i, lag(x) OVER (ORDER BY i) AS before FROM numbers",
            // Rows that only the client has, and rows that become several.
            "SELECT n.i, g.value FROM numbers n JOIN generate_series(190, 210) g ON n.i = g.value",
            "SELECT label, unnest(range(0, i % 3)) AS u FROM numbers",
            "SELECT count(*) AS n FROM numbers CROSS JOIN (SELECT name FROM information_schema.df_settings \
             WHERE name LIKE 'pomona.m%')",
            "SELECT * FROM numbers WHERE false",
            // Images and vectors are values: between stages, too, where the metadata of fields is lost.
            "SELECT label, encode_image(resize(first_value(image ORDER BY path), 4, 4), 'png') AS png FROM \
             (SELECT label, path, decode_image(content) AS image FROM fruits) GROUP BY label",
            "SELECT label, embed(last_value(image ORDER BY path), 'resnet-mini') AS v FROM \
             (SELECT label, path, center_crop(decode_image(content), 4, 4) AS image FROM fruits) GROUP BY label",
            "SELECT path, cosine_distance(v, first_value(v) OVER (PARTITION BY label ORDER BY path)) AS d FROM \
             (SELECT label, path, embed(content, 'resnet-mini') AS v FROM fruits)",
            // Models: fits merge, and their values reach every row.
            "SELECT p.label, embed(f.content, 'resnet-mini') AS v FROM fruits f JOIN pictures p USING (path) \
             WHERE f.path LIKE '%/00.png'",
            "WITH e AS (SELECT path, label, embed(content, 'resnet-mini') AS v FROM fruits) \
             SELECT path, standardize(v, (SELECT standardize_fit(v) FROM e)) AS v FROM e",
            "WITH e AS (SELECT path, label, embed(content, 'resnet-mini') AS v FROM fruits) \
             SELECT path, classify(v, (SELECT lda_fit(array_slice(v, 1, 3), label) FROM e)) IS NULL AS wrong FROM \
             (SELECT path, array_slice(v, 1, 3) AS v FROM e)",
            "WITH e AS (SELECT label, embed(content, 'resnet-mini') AS v FROM fruits), \
                  m AS (SELECT label, standardize_fit(v) AS model FROM e GROUP BY label) \
             SELECT e.label, standardize(e.v, m.model) AS v FROM e JOIN m ON e.label = m.label",
        ],
    )
    .await;
    // What cannot run apart may be refused.
    let recursive = "WITH RECURSIVE up AS (SELECT 1 AS v UNION ALL SELECT v + 1 FROM up WHERE v < 5) \
                     SELECT up.v, n.x FROM up JOIN numbers n ON n.i = up.v";
    match timely(&there, recursive).await {
        Ok(found) => assert_eq!(difference(&found, &timely(&here, recursive).await.unwrap()), None),
        Err(error) => check(&error.to_string(), &["cannot run on a cluster"]),
    }
    for (sql, cause) in [
        (
            "SELECT i, sum(x) FILTER (WHERE x > 20) OVER (ORDER BY i) AS s FROM numbers",
            "FILTER",
        ),
        (
            "SELECT i, last_value(x) IGNORE NULLS OVER (ORDER BY i) AS x FROM numbers",
            "IGNORE NULLS",
        ),
        ("SELECT i FROM numbers WHERE x > 3 LIMIT 4294967298", "4294967295"),
        (
            "SELECT count(*) AS n FROM numbers GROUP BY GROUPING SETS (())",
            "GROUPING SETS",
        ),
        (
            "SELECT i, lag(x) OVER (ORDER BY i) AS before, lag(x) OVER (ORDER BY i DESC) AS after FROM numbers",
            "lag(…) OVER",
        ),
    ] {
        timely(&here, sql).await.unwrap();
        let error = timely(&there, sql).await.unwrap_err().to_string();
        check(&error, &["on a cluster", cause]);
    }
    timely(&there, "CREATE VIEW deep0 AS SELECT i, i AS n FROM numbers")
        .await
        .unwrap();
    for level in 0..60 {
        let view = format!(
            "CREATE VIEW deep{} AS SELECT i, row_number() OVER (ORDER BY n, i) AS n FROM deep{level} WHERE n >= 0",
            level + 1
        );
        timely(&there, &view).await.unwrap();
    }
    let error = timely(&there, "SELECT * FROM deep60").await.unwrap_err();
    check(&error.to_string(), &["nested too deeply for a cluster", "CREATE TABLE"]);
    // Errors of data are words, and name the executor.
    let error = timely(&there, "SELECT 1 / (i - 6) AS q FROM numbers WHERE x > 0").await;
    let error = error.unwrap_err().to_string();
    check(&error, &["executor 'executor-", "Divide by zero"]);
    assert!(!error.contains("ArrowError("), "{error}");
    // What a query of a table writes into a table of the session stays in the session.
    for session in [&here, &there] {
        timely(session, "CREATE TABLE kept AS SELECT path, width FROM pictures")
            .await
            .unwrap();
    }
    assert_same(&here, &there, &["SELECT * FROM kept", "SELECT count(*) AS n FROM kept"]).await;
}

/// `POMONA_RANDOM_QUERIES=SEED:COUNT` runs others, and more of them.
#[tokio::test(flavor = "multi_thread")]
async fn queries_at_random_give_the_same_rows() {
    let asked = std::env::var("POMONA_RANDOM_QUERIES").unwrap_or_else(|_| "1:60".to_owned());
    let (seed, count) = asked.split_once(':').unwrap();
    let server = fruits();
    let cluster = Cluster::start(2, |_, _| {});
    let [here, there] = sessions(&server, &cluster).await;
    let fruit = "(['Apple', 'Kiwi', 'Lemon', 'Plum'])[1 + v % 4]";
    for session in [&here, &there] {
        for view in [
            "nums AS SELECT i, label, x FROM numbers".to_owned(),
            "singles AS SELECT i, label, x FROM one".to_owned(),
            format!("bigs AS SELECT k AS i, {fruit} AS label, v AS x FROM big"),
            format!("tinies AS SELECT k AS i, {fruit} AS label, v AS x FROM tiny"),
            "smalls AS SELECT column2 AS i, column1 AS label, column2 % 3 AS x FROM small".to_owned(),
            "nothing AS SELECT column2 AS i, column1 AS label, column2 AS x FROM small WHERE column2 > 99".to_owned(),
            "pics AS SELECT width + length(path) % 7 AS i, label, length(label) AS x FROM pictures".to_owned(),
        ] {
            timely(session, &format!("CREATE VIEW {view}")).await.unwrap();
        }
    }
    let mut queries = Queries::new(seed.parse().unwrap());
    let queries: Vec<_> = (0..count.parse().unwrap()).map(|_| queries.next()).collect();
    let queries: Vec<_> = queries.iter().map(String::as_str).collect();
    assert_same(&here, &there, &queries).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_plan_cannot_hold_is_not_lost() {
    let server = fruits();
    let cluster = Cluster::start(1, |_, _| {});
    let [here, there] = sessions(&server, &cluster).await;
    // A side of a join that every task needs is read once.
    server.take_requests();
    let joined = "SELECT count(*) AS n FROM (SELECT content FROM fruits WHERE path LIKE '%Kiwi/00.png') a \
                  CROSS JOIN (SELECT content FROM fruits WHERE label <> 'Kiwi') b \
                  WHERE image_info(a.content)['width'] + image_info(b.content)['width'] = 16";
    let found = timely(&there, joined).await.unwrap();
    assert_eq!(lines(&found), ["48"]);
    let mut read = server.take_keys("GetObject");
    read.retain(|key| key.starts_with("Training/"));
    assert_eq!(read.len(), 49, "{read:?}");

    // The default formats of dates and times, and what a file says of itself.
    let options = server.options();
    let written =
        "SELECT i, DATE '2024-01-02' + (i % 3) AS d, TIMESTAMP '2024-01-02 10:20:30' AS t FROM numbers ORDER BY i";
    for (session, bucket) in [(&here, "here"), (&there, "there")] {
        let copy = format!("COPY ({written}) TO 's3://results/{bucket}.csv' OPTIONS ({options})");
        timely(session, &copy).await.unwrap();
    }
    let file = |name: &str| fs::read_to_string(server.folder("results").join(name)).unwrap();
    assert_eq!(file("there.csv"), file("here.csv"));
    assert!(
        file("there.csv").contains(",2024-01-02,2024-01-02T10:20:30"),
        "{}",
        file("there.csv")
    );
    let copy = format!(
        "COPY (SELECT i FROM numbers) TO 's3://results/told.parquet' STORED AS PARQUET \
         OPTIONS ({options}, 'format.metadata::made_of' 'the numbers of a test')"
    );
    timely(&there, &copy).await.unwrap();
    let bytes = fs::read(server.folder("results").join("told.parquet")).unwrap();
    let told = b"the numbers of a test";
    assert!(bytes.windows(told.len()).any(|bytes| bytes == told));

    // Columns that are folders.
    let copy = format!(
        "COPY (SELECT i, x, coalesce(label, 'none') AS label FROM numbers) TO 's3://results/hive/' STORED AS PARQUET \
         PARTITIONED BY (label) OPTIONS ({options})"
    );
    timely(&there, &copy).await.unwrap();
    let table = format!(
        "CREATE EXTERNAL TABLE hive (i BIGINT, x BIGINT, label VARCHAR) STORED AS PARQUET PARTITIONED BY (label) \
         LOCATION 's3://results/hive/' OPTIONS ({options})"
    );
    for session in [&here, &there] {
        timely(session, &table).await.unwrap();
    }
    assert_same(
        &here,
        &there,
        &[
            "SELECT label, count(*) AS n, sum(x) AS x FROM hive GROUP BY label ORDER BY label",
            "SELECT i, label FROM hive WHERE label = 'Kiwi' ORDER BY i DESC LIMIT 5",
            "SELECT h.i, s.column2 FROM hive h JOIN small s ON h.label = s.column1 WHERE h.x > 3",
        ],
    )
    .await;

    // The session's time zone.
    for session in [&here, &there] {
        timely(session, "SET datafusion.execution.time_zone = '+05:00'")
            .await
            .unwrap();
    }
    let day = "'2024-01-0' || (1 + i % 9)::VARCHAR || 'T00:00:00'";
    assert_same(
        &here,
        &there,
        &[&format!(
            "SELECT i, to_timestamp({day})::BIGINT AS t, to_timestamp_millis({day})::BIGINT AS m FROM numbers"
        )],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_function_does_what_its_documentation_shows() {
    let here = pomona::session().unwrap();
    let there = SessionBuilder::new().cluster("local:2").build().unwrap();
    let expected = pomona::cli::functions::markdown(&here).await.unwrap();
    let found = pomona::cli::functions::markdown(&there).await.unwrap();
    for (found, expected) in found.split("\n### ").zip(expected.split("\n### ")) {
        assert!(is_same(found, expected, PRINTED), "{found}\nnot\n{expected}");
    }
    assert_eq!(found.lines().count(), expected.lines().count());
}

// ── Settings ────────────────────────────────────────────────────────────────────────────────────────

#[tokio::test(flavor = "multi_thread")]
async fn settings_reach_executors() {
    let server = fruits();
    server.put("fruits", "Training/Kiwi/broken.png", b"this is no picture");
    let cluster = Cluster::start(2, |_, _| {});
    let [here, there] = sessions(&server, &cluster).await;
    let embedded = "SELECT path, embed(content, 'resnet-mini') IS NULL AS missing FROM fruits";
    let error = timely(&there, embedded).await.unwrap_err().to_string();
    check(&error, &["executor 'executor-", "decode"]);

    for session in [&here, &there] {
        timely(session, "SET pomona.on_error = 'null'").await.unwrap();
    }
    assert_same(&here, &there, &[embedded]).await;
    let missing = format!("SELECT path FROM ({embedded}) WHERE missing");
    let missing = timely(&there, &missing).await.unwrap();
    assert_eq!(strings(&missing, "path"), ["s3://fruits/Training/Kiwi/broken.png"]);

    timely(&there, "SET pomona.on_error = 'fail'").await.unwrap();
    let apples = format!("{embedded} WHERE label = 'Apple'");
    for setting in ["pomona.max_image_pixels", "pomona.max_object_bytes"] {
        let default = format!("SELECT value FROM information_schema.df_settings WHERE name = '{setting}'");
        let default = strings(&timely(&there, &default).await.unwrap(), "value").remove(0);
        timely(&there, &format!("SET {setting} = 10")).await.unwrap();
        let error = timely(&there, &apples).await.unwrap_err().to_string();
        check(&error, &["executor 'executor-", setting]);
        timely(&there, &format!("SET {setting} = {default}")).await.unwrap();
    }
    assert_same(&here, &there, &[&apples]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_of_an_executor_is_its_own() {
    let server = fruits();
    let cluster = Cluster::start(1, |name, command| {
        if name.starts_with(EXECUTOR) {
            command.args(["--memory-pool-size", "1MB"]);
        }
    });
    let [_, there] = sessions(&server, &cluster).await;
    for limit in ["none", "8GB"] {
        timely(&there, &format!("SET pomona.memory_limit = '{limit}'"))
            .await
            .unwrap();
        let sql = "SELECT embed(content, 'resnet-mini') AS v FROM fruits";
        let error = timely(&there, sql).await.unwrap_err().to_string();
        check(&error, &["executor 'executor-0'", "memory"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_travels_once_with_a_task_and_not_with_every_row() {
    // As many partitions of few rows as of many, since each file and partition has its place in the plan.
    let there = SessionBuilder::new().cluster("local:2").build().unwrap();
    timely(&there, "SET datafusion.execution.target_partitions = 2")
        .await
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut plans = vec![];
    for rows in [60, 3000] {
        let files = folder.path().join(rows.to_string());
        write_parts(vectors(rows, 128), &files, 2).await;
        let sql = format!(
            "EXPLAIN ANALYZE SELECT pca_transform(v, (SELECT pca_fit(v, 25) FROM '{0}/')) AS scores FROM '{0}/'",
            files.display()
        );
        let plan = strings(&timely(&there, &sql).await.unwrap(), "plan").concat();
        let (_, told) = plan.split_once("plan_bytes=").unwrap();
        let mut words = told.split([' ', ',', ']']);
        let number: f64 = words.next().unwrap().parse().unwrap();
        let unit = match words.next().unwrap() {
            "K" => 1e3,
            "M" => 1e6,
            _ => 1.0,
        };
        plans.push(number * unit);
    }
    // A model of 25 components of 128 numbers, and its mean: once in the plan of the query.
    let model = f64::from(26 * 128 * 8);
    assert!(plans[0] > model / 2.0 && plans[1] < 3.0 * model, "{plans:?}");
    // With fifty times the rows; parts of files have their ranges.
    assert!((plans[1] - plans[0]).abs() < 0.25 * model, "{plans:?}");
}

// ── Models ──────────────────────────────────────────────────────────────────────────────────────────

const EMBEDDED: &str = "SELECT path, array_element(embed(content, 'mini-two'), 1) AS first \
                        FROM images('s3://fruits/Training/') ORDER BY path";

#[test]
fn a_model_in_an_object_store_comes_to_every_executor_once() {
    let server = S3Server::start(&["fruits", "models"]);
    for image in 0..32 {
        server.put("fruits", &format!("Training/Kiwi/{image:02}.png"), &picture(image));
    }
    for (file, content) in bundled_model() {
        server.put("models", &format!("nets/mini-two/{file}"), &content);
    }
    let bundled = EMBEDDED.replace("mini-two", "resnet-mini");
    let expected = Process::run(pomona_on(&server).args(["-q", "--format", "csv", "-c", &bundled])).success();

    let cluster = Cluster::start(2, with_credentials(&server));
    server.take_requests();
    let sql = format!("SET pomona.models_dir = 's3://models/nets/'; {EMBEDDED}");
    for _ in 0..2 {
        server.hold_gets("Training/", 0);
        let mut query = cluster.query(&sql);
        wait_until("both executors read images", || {
            ["executor-0", "executor-1"].iter().all(|executor| {
                // The network and its preprocessing are two more.
                server.gets_of(executor) > 2
            })
        });
        server.release_gets();
        let found = query.finish().success();
        assert!(is_same(&found, &expected, EXACT), "{found}\nnot\n{expected}");
    }
    let requests = server.take_requests();
    for executor in ["executor-0", "executor-1"] {
        for file in ["model.onnx", "preprocessor_config.json"] {
            let gets = requests.iter().filter(|request| {
                (request.operation, request.client.as_str()) == ("GetObject", executor) && request.key.ends_with(file)
            });
            assert_eq!(gets.count(), 1, "{executor} {file}");
        }
    }
}

/// The hashes of sha256 in a text.
fn hashes(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    words
        .filter(|word| word.len() == 64 && word.chars().all(|c| c.is_ascii_hexdigit()))
        .collect()
}

#[test]
fn an_executor_runs_no_other_model_and_says_which_it_lacks() {
    let server = fruits();
    let folder = tempfile::tempdir().unwrap();
    let models = |name: &str| -> PathBuf { folder.path().join(name) };
    add_model(&models("client"), false);
    add_model(&models("other"), true);
    let cluster = |executors: Option<PathBuf>| {
        let credentials = with_credentials(&server);
        let client = models("client");
        Cluster::start(1, move |name, command| {
            credentials(name, command);
            match name {
                // Of this process alone; --models-dir would go to the executors of this machine.
                "client" => drop(command.env("POMONA_MODELS", &client)),
                "scheduler" => {}
                _ => drop(executors.as_ref().map(|dir| command.arg("--models-dir").arg(dir))),
            }
        })
    };
    let other = cluster(Some(models("other")));
    let error = other.query(EMBEDDED).finish().failure();
    check(&error, &["executor 'executor-0'", "model 'mini-two'"]);
    assert_eq!(hashes(&error).len(), 2, "{error}");

    let lacking = cluster(None);
    let error = lacking.query(EMBEDDED).finish().failure();
    check(&error, &["executor 'executor-0'", "'mini-two'"]);

    let having = cluster(Some(models("client")));
    let found = having.query(EMBEDDED).finish().success();
    assert_eq!(found.lines().count(), 1 + server.keys("fruits").len());
}

// ── Bad input ───────────────────────────────────────────────────────────────────────────────────────

/// Far from what a lost connection takes where nobody looks after it (five minutes), for slow machines.
const SECONDS: Duration = Duration::from_secs(60);

/// The error of a client that must fail within seconds.
fn soon(command: &mut Command) -> String {
    let started = Instant::now();
    let error = Process::run(command).failure();
    assert!(started.elapsed() < SECONDS, "{:?}: {error}", started.elapsed());
    error
}

/// An address where nobody listens.
fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// Reads images that are everywhere.
const SAMPLE: &str = "SELECT count(content) AS n FROM images('sample://fruits/Test/')";

#[test]
fn a_scheduler_that_is_not_there_is_named() {
    let address = free_address();
    let url = format!("df://{address}");
    let error = soon(pomona().args(["--cluster", &url, "-c", SAMPLE]));
    check(&error, &[&address, "cannot reach the scheduler", "pomona scheduler"]);
    let error = soon(
        pomona()
            .args(["executor", "--scheduler", &address, "--id", "alone"])
            .args([
                "--scheduler-connect-timeout-seconds",
                "1",
                "--bind-port",
                "0",
                "--bind-grpc-port",
                "0",
                "--bind-health-port",
                "0",
            ]),
    );
    check(&error, &["executor 'alone'", &address, "--scheduler"]);
    for wrong in ["http://127.0.0.1:50050", "local:0", "df://"] {
        let error = soon(pomona().args(["--cluster", wrong, "-c", SAMPLE]));
        check(&error, &[wrong, "local:N"]);
    }
}

#[test]
fn what_is_no_scheduler_is_told_from_one() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let server = S3Server::start(&["fruits"]);
    let web = server.endpoint().replace("http://", "");
    let cluster = Cluster::start(1, |_, _| {});
    let executor = cluster.executors[0].address.clone();
    for address in [silent, web, executor] {
        let error = soon(pomona().args(["--cluster", &format!("df://{address}"), "-c", SAMPLE]));
        check(
            &error,
            &[&address, "cannot reach the scheduler", "--cluster", "--tls-ca"],
        );
    }
}

#[test]
fn a_cluster_without_executors_says_so() {
    let cluster = Cluster::start(0, |_, _| {});
    let error = soon(cluster.client().args(["-c", SAMPLE]));
    check(
        &error,
        &[
            &cluster.scheduler_address(),
            "no executor",
            "pomona executor --scheduler",
        ],
    );
}

#[test]
fn an_executor_without_credentials_is_named() {
    let server = fruits();
    let cluster = Cluster::start(1, |name, command| match name {
        "client" => {
            command.envs(server.environment());
        }
        _ => {
            command.env("AWS_ENDPOINT_URL", server.endpoint());
        }
    });
    let error = soon(cluster.client().args(["-c", WIDTHS]));
    check(
        &error,
        &["executor 'executor-0'", "s3://fruits/Training/", "AWS_ACCESS_KEY_ID"],
    );
    assert!(!error.contains(SECRET_KEY), "{error}");
}

#[test]
fn an_executor_that_cannot_open_the_store_fails_whatever_the_policy_for_images_is() {
    let server = fruits();
    let cluster = Cluster::start(1, |name, command| match name {
        "client" => {
            command.envs(server.environment());
        }
        _ => {
            command.env("AWS_ENDPOINT_URL", "nowhere");
        }
    });
    let error = soon(cluster.client().args(["--on-error", "null", "-c", WIDTHS]));
    check(
        &error,
        &[
            "executor 'executor-0'",
            "cannot open s3://fruits",
            "'nowhere'",
            "AWS_ENDPOINT_URL",
        ],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_encrypted_stays_so() {
    let server = fruits();
    let cluster = Cluster::start(1, |_, _| {});
    let [here, there] = sessions(&server, &cluster).await;
    let key = "'format.crypto.file_encryption.footer_key_as_hex' '30313233343536373839303132333435'";
    let options = server.options();
    let copy = format!(
        "COPY (SELECT i FROM numbers) TO 's3://results/sealed.parquet' STORED AS PARQUET OPTIONS ({options}, {key})"
    );
    timely(&there, &copy).await.unwrap();
    let written = fs::read(server.folder("results").join("sealed.parquet")).unwrap();
    assert!(written.starts_with(b"PARE"), "{:?}", written.get(..4));
    let table = format!(
        "CREATE EXTERNAL TABLE sealed STORED AS PARQUET LOCATION 's3://results/sealed.parquet' OPTIONS ({options}, {})",
        key.replace("file_encryption", "file_decryption")
    );
    for session in [&here, &there] {
        timely(session, &table).await.unwrap();
    }
    assert_same(&here, &there, &["SELECT n.x FROM sealed s JOIN numbers n ON n.i = s.i"]).await;
}

#[test]
fn files_of_this_machine_are_for_executors_on_it() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("Kiwi");
    fs::create_dir_all(&images).unwrap();
    for shade in 0..9 {
        fs::write(images.join(format!("{shade}.png")), picture(shade)).unwrap();
    }
    let place = folder.path().display();
    let read = format!("SELECT count(content) AS n FROM images('{place}/')");
    let file = folder.path().join("n.parquet");
    let copy = format!(
        "COPY ({read}) TO '{0}'; SELECT n FROM '{0}'; SELECT sum(n) AS n FROM '{0}'",
        file.display()
    );

    // Elsewhere there may be others of the same name, or none. (Nobody says that 0.0.0.0 is this machine, and
    // nothing of what is sent there leaves it.)
    let elsewhere = free_address().replace("127.0.0.1", "0.0.0.0");
    let far = |sql: &str| {
        let mut command = pomona();
        command.args(["--cluster", &format!("df://{elsewhere}"), "-c", sql]);
        soon(&mut command)
    };
    fs::write(folder.path().join("rows.csv"), "v\n1\n").unwrap();
    for sql in [
        read.clone(),
        copy.clone(),
        format!("SELECT sum(v) AS v FROM '{place}/rows.csv'"),
    ] {
        let error = far(&sql);
        check(
            &error,
            &[&place.to_string(), "a file of this machine", "pomona.shared_paths"],
        );
    }
    let shared = format!("SET pomona.shared_paths = '{place}'; {read}");
    check(&far(&shared), &["cannot reach the scheduler", &elsewhere]);

    let cluster = Cluster::start(1, |_, _| {});
    let found = cluster.query(&copy).finish().success();
    assert!(found.ends_with("n\n9\nn\n9\n"), "{found}");
    assert!(file.is_file());
}

/// A table that no executor knows, with a leaf of its own in two partitions.
#[derive(Debug)]
struct OwnTable(MemTable);

#[async_trait]
impl TableProvider for OwnTable {
    fn schema(&self) -> SchemaRef {
        self.0.schema()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let rows = self.0.scan(state, projection, filters, limit).await?;
        Ok(Arc::new(OwnExec(rows)))
    }
}

#[derive(Debug)]
struct OwnExec(Arc<dyn ExecutionPlan>);

impl DisplayAs for OwnExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnExec")
    }
}

impl ExecutionPlan for OwnExec {
    fn name(&self) -> &'static str {
        "OwnExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        self.0.properties()
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![]
    }

    fn with_new_children(self: Arc<Self>, _children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        self.0.execute(partition, context)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_only_the_client_has_travels_by_its_rows() {
    let server = fruits();
    let cluster = Cluster::start(2, |_, _| {});
    let [here, there] = sessions(&server, &cluster).await;
    for session in [&here, &there] {
        let part = |labels: &[&str]| {
            let labels: ArrayRef = Arc::new(StringArray::from(labels.to_vec()));
            RecordBatch::try_from_iter([("label", labels)]).unwrap()
        };
        let parts = vec![vec![part(&["Apple", "Kiwi"])], vec![part(&["Plum"]), part(&["Pear"])]];
        let table = MemTable::try_new(parts[0][0].schema(), parts).unwrap();
        session.register_table("own", Arc::new(OwnTable(table))).unwrap();
    }
    assert_same(
        &here,
        &there,
        &[
            "SELECT * FROM own",
            "SELECT o.label, count(*) AS n, sum(p.width) AS width FROM own o JOIN pictures p ON o.label = p.label \
             GROUP BY o.label",
            "SELECT o.label, p.path FROM own o LEFT JOIN pictures p ON o.label = p.label",
            "SELECT label FROM own UNION ALL SELECT label FROM pictures WHERE width = 8",
            "SELECT path FROM pictures WHERE label NOT IN (SELECT label FROM own)",
        ],
    )
    .await;
}

// ── Secrets ─────────────────────────────────────────────────────────────────────────────────────────

/// No part of the text is the secret: as it is, percent-encoded, or as the numbers of its bytes.
fn assert_no_secret(whose: &str, text: &str) {
    let tail = &SECRET_KEY[SECRET_KEY.len() - 16..];
    let bytes = format!("{:?}", tail.as_bytes());
    for form in [tail, bytes.trim_matches(['[', ']'])] {
        let found = text.lines().find(|line| line.contains(form));
        assert!(found.is_none(), "{whose} has told the secret: {found:?}");
    }
}

#[test]
fn secrets_of_options_reach_executors_and_nobody_else() {
    let server = fruits();
    let cluster = Cluster::start(2, |_, command| {
        command.args(["--log-level", "debug"]);
    });
    let options = server.options();
    let copy = format!(
        "COPY (SELECT path, image_info(content)['width'] AS width FROM pictures) TO 's3://results/widths.parquet' \
         STORED AS PARQUET OPTIONS ({options})"
    );
    let create = format!(
        "CREATE EXTERNAL TABLE pictures STORED AS IMAGES LOCATION 's3://fruits/Training/' OPTIONS ({options}); \
         EXPLAIN {copy}; EXPLAIN VERBOSE {copy}; {copy}; \
         CREATE EXTERNAL TABLE widths STORED AS PARQUET LOCATION 's3://results/widths.parquet' OPTIONS ({options}); "
    );
    let read = "EXPLAIN VERBOSE SELECT label, count(content) AS n FROM pictures GROUP BY label; \
                EXPLAIN ANALYZE VERBOSE SELECT label, count(content) AS n FROM pictures GROUP BY label; \
                EXPLAIN ANALYZE VERBOSE SELECT sum(width) AS width FROM widths; \
                SELECT count(content) AS n FROM pictures; \
                SELECT sum(width) AS width FROM widths;";
    let ran = cluster.query(&(create.clone() + read)).finish();
    assert_no_secret("the client", &ran.stderr);
    let found = ran.success();
    assert_no_secret("a plan", &found);
    assert!(found.ends_with(&format!("n\n64\nwidth\n{}\n", 64 * 8)), "{found}");

    // And of what fails: a PUT and a GET that are denied.
    server.fail("refused.parquet", Fault::Deny);
    let refused = create.replace("widths.parquet", "refused.parquet");
    let error = soon(cluster.client().args(["-c", &refused]));
    check(&error, &["executor 'executor-", "s3://results/refused.parquet"]);
    assert_no_secret("an error", &error);
    server.fail("Training/Kiwi/02.png", Fault::Deny);
    let error = soon(cluster.client().args(["-c", &create]));
    check(&error, &["executor 'executor-", "s3://fruits/Training/Kiwi/02.png"]);
    assert_no_secret("an error", &error);
    assert_no_secret("a role", &cluster.said());
}

// ── Health, and who may come in ─────────────────────────────────────────────────────────────────────

#[test]
fn health_and_readiness_are_told() {
    let mut cluster = Cluster::start(0, |_, _| {});
    let statuses = |cluster: &Cluster<'_>, executor: bool| {
        let role = match executor {
            true => &cluster.executors[0],
            false => &cluster.scheduler,
        };
        [role.status("/healthz"), role.status("/readyz")]
    };
    assert_eq!(statuses(&cluster, false), [Some(200), Some(503)]);
    // The port of the scheduler itself tells it too.
    let told = http_get(&cluster.scheduler_address(), "/readyz");
    assert!(told.as_ref().is_some_and(|(status, _)| *status == 503), "{told:?}");

    cluster.add();
    wait_until("the scheduler is ready", || cluster.scheduler.is_ready());
    assert_eq!(statuses(&cluster, false), [Some(200), Some(200)]);
    assert_eq!(statuses(&cluster, true), [Some(200), Some(200)]);
    assert!(!cluster.said().contains("Listening beyond"), "{}", cluster.said());

    cluster.scheduler.process.terminate();
    let ended = cluster.scheduler.process.finish();
    assert!(ended.status.success(), "{}\n{}", ended.status, ended.stderr);
    wait_until("the executor is ready no more", || !cluster.executors[0].is_ready());
    assert_eq!(statuses(&cluster, true), [Some(200), Some(503)]);
    cluster.executors[0].process.terminate();
    assert!(cluster.executors[0].process.finish().status.success());
}

#[test]
fn who_listens_beyond_this_machine_says_so() {
    let cluster = Cluster::start(1, |name, command| {
        if name != "client" {
            command.args(["--bind-host", "0.0.0.0"]);
        }
    });
    for role in [&cluster.scheduler, &cluster.executors[0]] {
        assert!(role.address.starts_with("0.0.0.0:"), "{}", role.address);
        wait_until("it says so", || {
            role.process
                .said()
                .contains("Listening beyond this machine, without TLS")
        });
    }
    assert_eq!(cluster.query(SAMPLE).finish().success().lines().count(), 2);
}

#[test]
fn with_certificates_everybody_shows_one() {
    let server = fruits();
    let credentials = with_credentials(&server);
    let [authority, certificate, key] =
        ["authority.pem", "node.pem", "node-key.pem"].map(|file| reference("tls").join(file).display().to_string());
    let cluster = Cluster::start(2, |name, command| {
        credentials(name, command);
        command.args(["--tls-ca", &authority, "--tls-cert", &certificate, "--tls-key", &key]);
    });
    server.hold_gets("Training/", 0);
    let mut query = cluster.query(BY_LABEL);
    begin_together(&server, 2);
    assert_eq!(query.finish().success(), by_label());
    let listing = "SELECT path, image_info(content)['width'] AS width FROM images('s3://fruits/Training/')";
    let found = cluster.query(listing).finish().success();
    assert_eq!(found.lines().count(), 1 + server.keys("fruits").len());

    let [stranger, stranger_key] =
        ["cert.pem", "key.pem"].map(|file| reference("tls").join(file).display().to_string());
    for identity in [
        &[][..],
        &["--tls-ca", &authority][..],
        &[
            "--tls-ca",
            &authority,
            "--tls-cert",
            &stranger,
            "--tls-key",
            &stranger_key,
        ],
    ] {
        let mut client = pomona_on(&server);
        client
            .args(["--cluster", &cluster.url(), "-c", BY_LABEL])
            .args(identity);
        let error = soon(&mut client);
        check(&error, &[&cluster.scheduler_address()]);
        assert!(!error.contains("Apple"), "{error}");
    }
    // Nor does an executor come in so.
    let address = cluster.scheduler_address();
    let mut executor = pomona();
    executor.args([
        "executor",
        "--scheduler",
        &address,
        "--scheduler-connect-timeout-seconds",
        "1",
    ]);
    executor.args(["--bind-port", "0", "--bind-grpc-port", "0", "--bind-health-port", "0"]);
    check(&soon(&mut executor), &[&address, "TLS"]);
}
