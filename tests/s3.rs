//! The table and the whole chain on a real S3 server: what is asked of it, and what goes wrong.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;
#[expect(dead_code, reason = "every test takes the helpers that it needs")]
#[path = "common/s3.rs"]
mod server;

use std::process::Command;
use std::time::{Duration, Instant};

use common::{failure, integers, pomona, rows, strings, success, vectors};
use datafusion::error::Result;
use datafusion::prelude::SessionContext;
use server::{Fault, S3Server, SECRET_KEY, picture};

const LABELS: [&str; 3] = ["Apple", "Kiwi", "Lemon"];

/// A server whose bucket `fruits` holds four images of each label.
fn fruits() -> S3Server {
    let server = S3Server::start(&["fruits"]);
    for (i, label) in LABELS.iter().enumerate() {
        for image in 0..4 {
            server.put(
                "fruits",
                &format!("Training/{label}/{image}.png"),
                &picture(i as u8 * 10 + image),
            );
        }
    }
    server
}

/// A session with the table `fruits` on a location of this server.
async fn table(server: &S3Server, location: &str, options: &str) -> Result<SessionContext> {
    table_with(&server.options(), location, options).await
}

async fn table_with(aws: &str, location: &str, options: &str) -> Result<SessionContext> {
    let session = pomona::session()?;
    let sql = format!("CREATE EXTERNAL TABLE fruits STORED AS IMAGES LOCATION '{location}' OPTIONS ({aws} {options})");
    rows(&session, &sql).await?;
    Ok(session)
}

/// The binary, with the server's address and credentials in its environment.
fn pomona_on(server: &S3Server) -> Command {
    let mut command = pomona();
    command.envs(server.environment());
    command
}

#[tokio::test]
async fn counting_labels_gets_nothing() {
    let server = fruits();
    let session = table(&server, "s3://fruits/Training/", "").await.unwrap();
    server.take_requests();
    let counts = rows(
        &session,
        "SELECT label, count(*) AS n FROM fruits GROUP BY label ORDER BY label",
    )
    .await
    .unwrap();
    assert_eq!(strings(&counts, "label"), LABELS);
    assert_eq!(integers(&counts, "n"), [4, 4, 4]);
    let requests = server.take_requests();
    assert!(
        requests.iter().all(|request| request.operation == "ListObjectsV2"),
        "{requests:?}"
    );
}

#[tokio::test]
async fn a_filter_on_the_label_gets_its_images_alone() {
    let server = fruits();
    let session = table(&server, "s3://fruits/Training/", "").await.unwrap();
    server.take_requests();
    let sql = "SELECT path, image_info(content)['width'] AS width FROM fruits WHERE label = 'Kiwi' ORDER BY path";
    let kiwis = rows(&session, sql).await.unwrap();
    let keys: Vec<_> = (0..4).map(|image| format!("Training/Kiwi/{image}.png")).collect();
    assert_eq!(
        strings(&kiwis, "path"),
        keys.iter().map(|key| format!("s3://fruits/{key}")).collect::<Vec<_>>()
    );
    assert_eq!(integers(&kiwis, "width"), [8; 4]);
    assert_eq!(server.take_keys("GetObject"), keys);

    let explain = "EXPLAIN SELECT content FROM fruits WHERE label = 'Kiwi'";
    let plan = strings(&rows(&session, explain).await.unwrap(), "plan").concat();
    let bytes: usize = (10..14).map(|shade| picture(shade).len()).sum();
    let told = format!("location=s3://fruits/Training/, listed=12, pruned=8, to_fetch=4, bytes={bytes}");
    assert!(plan.contains(&told), "{plan}");
    assert_eq!(server.take_keys("GetObject"), Vec::<String>::new());
}

#[tokio::test]
async fn a_limit_stops_getting() {
    let server = S3Server::start(&["fruits"]);
    for image in 0..200 {
        server.put("fruits", &format!("Apple/{image}.png"), &picture(image));
    }
    let session = table(&server, "s3://fruits/", "").await.unwrap();
    let limited = rows(&session, "SELECT content FROM fruits LIMIT 5").await.unwrap();
    assert_eq!(limited.num_rows(), 5);
    assert_eq!(server.take_keys("GetObject").len(), 5);
}

#[tokio::test]
async fn pages_are_listed_to_the_end() {
    let server = fruits();
    server.set_page_size(5);
    let session = table(&server, "s3://fruits/Training/", "").await.unwrap();
    assert_eq!(
        integers(&rows(&session, "SELECT count(*) AS n FROM fruits").await.unwrap(), "n"),
        [12]
    );
}

#[tokio::test]
async fn folders_of_a_large_table_are_listed_at_the_same_time() {
    let server = S3Server::start(&["fruits"]);
    let labels: Vec<_> = (0..6).map(|label| format!("Label {label}")).collect();
    for label in &labels {
        for image in 0..400 {
            server.put("fruits", &format!("Training/{label}/{image}.png"), b"x");
        }
    }
    server.set_page_size(100);
    let session = table(&server, "s3://fruits/Training/", "").await.unwrap();
    server.take_requests();
    let sql = "SELECT label, count(*) AS n FROM fruits GROUP BY label ORDER BY label";
    let counts = rows(&session, sql).await.unwrap();
    assert_eq!(strings(&counts, "label"), labels);
    assert_eq!(integers(&counts, "n"), [400; 6]);
    let lists = server.take_keys("ListObjectsV2");
    let of = |prefix: &str| lists.iter().filter(|key| *key == prefix).count();
    // The last label by itself, in four pages; the first with all others.
    assert_eq!((of("Training/Label 5/"), of("Training/Label 0/")), (4, 0), "{lists:?}");
    // One more tells the labels, and at most two were read or asked for where the front met the others.
    assert!((24..=27).contains(&lists.len()), "{lists:?}");

    // A limit asks for no more than its first page.
    let sql = "SELECT path FROM fruits LIMIT 5";
    assert_eq!(rows(&session, sql).await.unwrap().num_rows(), 5);
    assert_eq!(server.take_keys("ListObjectsV2"), ["Training/"]);
}

#[tokio::test]
async fn keys_may_hold_any_character() {
    let server = S3Server::start(&["fruits"]);
    let files = [
        "a b.png",
        "100%.png",
        "%41.png",
        "a+b.png",
        "grün é 果.png",
        "a#b?c&d=e.png",
        "it's.png",
    ];
    for (shade, file) in files.iter().enumerate() {
        server.put(
            "fruits",
            &format!("Training/Cactus fruit + 50%/{file}"),
            &picture(shade as u8),
        );
    }
    let session = table(&server, "s3://fruits/Training/", "").await.unwrap();
    server.take_requests();
    let sql = "SELECT label, image_error(content) IS NULL AS good FROM fruits";
    let all = rows(&session, sql).await.unwrap();
    assert_eq!(strings(&all, "label"), ["Cactus fruit + 50%"; 7]);
    assert_eq!(strings(&all, "good"), ["true"; 7]);
    let mut keys = files.map(|file| format!("Training/Cactus fruit + 50%/{file}"));
    keys.sort();
    assert_eq!(server.take_keys("GetObject"), keys);

    // A path that was read finds its object again, as a filter and as a location.
    let paths = strings(&rows(&session, "SELECT path FROM fruits").await.unwrap(), "path");
    server.take_requests();
    for path in &paths {
        let sql = format!(
            "SELECT count(content) AS n FROM fruits WHERE path = '{}'",
            path.replace('\'', "''")
        );
        assert_eq!(integers(&rows(&session, &sql).await.unwrap(), "n"), [1], "{path}");
    }
    assert_eq!(server.take_keys("GetObject"), keys);
}

#[tokio::test]
async fn empty_prefixes_empty_objects_and_folder_markers() {
    let server = fruits();
    server.mark_folder("Training/");
    server.mark_folder("Training/Apple/");
    let session = table(&server, "s3://fruits/Training/", "").await.unwrap();
    let count = "SELECT count(*) AS n FROM fruits";
    assert_eq!(integers(&rows(&session, count).await.unwrap(), "n"), [12]);

    let session = table(&server, "s3://fruits/Validation/", "").await.unwrap();
    assert_eq!(integers(&rows(&session, count).await.unwrap(), "n"), [0]);
    let nothing = rows(
        &session,
        "SELECT path, label, embed(content, 'resnet-mini') FROM fruits",
    )
    .await
    .unwrap();
    assert_eq!(nothing.num_rows(), 0);

    server.put("fruits", "Empty/Apple/0.png", b"");
    let session = table(&server, "s3://fruits/Empty/", "").await.unwrap();
    let empty = rows(&session, "SELECT image_error(content) AS error FROM fruits")
        .await
        .unwrap();
    assert!(strings(&empty, "error")[0].contains("empty"), "{empty:?}");
}

#[tokio::test]
async fn a_pattern_narrows_the_listing() {
    let server = fruits();
    let pattern = ", 'images.path_pattern' '{split}/{label}/*'";
    let session = table(&server, "s3://fruits/", pattern).await.unwrap();
    server.take_requests();
    let sql = "SELECT count(*) AS n FROM fruits WHERE split = 'Training' AND label = 'Kiwi'";
    assert_eq!(integers(&rows(&session, sql).await.unwrap(), "n"), [4]);
    assert_eq!(server.take_keys("ListObjectsV2"), ["Training/Kiwi/"]);
    let sql = "SELECT count(*) AS n FROM fruits WHERE split = 'Training' AND label <> 'Kiwi'";
    assert_eq!(integers(&rows(&session, sql).await.unwrap(), "n"), [8]);
    assert_eq!(server.take_keys("ListObjectsV2"), ["Training/"]);
}

#[tokio::test]
async fn an_overloaded_server_is_asked_again() {
    let server = fruits();
    server.fail("Training/Kiwi/2.png", Fault::SlowDown(2));
    let session = table(&server, "s3://fruits/Training/", "").await.unwrap();
    server.take_requests();
    let plan = rows(
        &session,
        "EXPLAIN ANALYZE SELECT content FROM fruits WHERE label = 'Kiwi'",
    )
    .await
    .unwrap();
    let plan = strings(&plan, "plan").concat();
    assert_eq!(server.take_keys("GetObject").len(), 4 + 2);
    assert!(
        plan.contains("gets=4") && plan.contains("retries=2") && plan.contains("failures=0"),
        "{plan}"
    );
}

#[tokio::test]
async fn an_object_that_is_gone_follows_the_policy() {
    let server = fruits();
    let session = table(&server, "s3://fruits/Training/", "").await.unwrap();
    server.fail("Training/Kiwi/2.png", Fault::Vanish);
    let error = rows(&session, "SELECT content FROM fruits")
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("get: s3://fruits/Training/Kiwi/2.png") && error.contains("it is gone"),
        "{error}"
    );

    let server = fruits();
    let session = table(&server, "s3://fruits/Training/", "").await.unwrap();
    server.fail("Training/Kiwi/2.png", Fault::Vanish);
    rows(&session, "SET pomona.on_error = 'null'").await.unwrap();
    let sql = "SELECT count(*) AS n, count(content) AS contents FROM fruits";
    let counts = rows(&session, sql).await.unwrap();
    assert_eq!(
        (integers(&counts, "n"), integers(&counts, "contents")),
        (vec![12], vec![11])
    );
}

/// The error of reading images, which holds no secret. No policy for bad images hides it.
async fn error_of(aws: &str, location: &str) -> String {
    let read = async {
        let session = table_with(aws, location, "").await?;
        rows(&session, "SET pomona.on_error = 'null'").await?;
        rows(&session, "SELECT content FROM fruits").await
    };
    let error = read.await.unwrap_err().to_string();
    assert!(
        !error.contains(SECRET_KEY) && !error.contains("wrong/secret"),
        "{error}"
    );
    error
}

#[tokio::test]
async fn errors_name_bucket_operation_cause_credentials_and_remedy() {
    let server = fruits();
    let location = "s3://fruits/Training/";
    let check = |error: &str, parts: &[&str]| {
        for part in parts {
            assert!(error.contains(part), "'{part}' is not in: {error}");
        }
    };

    let error = error_of(&server.options_with("wrong/secret"), location).await;
    check(
        &error,
        &[
            "cannot list s3://fruits/Training",
            "access denied",
            "aws.access_key_id",
            "Check",
        ],
    );

    let error = error_of(&server.options(), "s3://fruit/Training/").await;
    check(
        &error,
        &[
            "cannot list s3://fruit/Training",
            "no such bucket",
            "aws.access_key_id",
            "Check the name",
        ],
    );

    let unreachable = server.options().replace(&server.endpoint(), "http://127.0.0.1:1");
    let error = error_of(&unreachable, location).await;
    check(
        &error,
        &[
            "cannot list s3://fruits/Training",
            "cannot be reached",
            "aws.access_key_id",
            "aws.endpoint",
        ],
    );

    server.fail("Training/Kiwi/2.png", Fault::Deny);
    let error = error_of(&server.options(), location).await;
    check(
        &error,
        &[
            "cannot read s3://fruits/Training/Kiwi/2.png",
            "access denied",
            "aws.access_key_id",
            "Check",
        ],
    );

    server.move_to("eu-west-3");
    let error = error_of(&server.options(), location).await;
    check(
        &error,
        &[
            "cannot list s3://fruits/Training",
            "another region",
            "aws.access_key_id",
            "aws.region",
        ],
    );
}

#[test]
fn a_public_bucket_needs_no_credentials() {
    let server = fruits();
    let query = |bucket: &str| {
        let mut command = pomona_on(&server);
        command
            .env_remove("AWS_ACCESS_KEY_ID")
            .env_remove("AWS_SECRET_ACCESS_KEY");
        let sql = format!("SELECT count(content) AS n FROM images('s3://{bucket}/Training/')");
        command.args(["-q", "--format", "csv", "-c", &sql]);
        command
    };
    let error = failure(&mut query("fruits"));
    assert!(
        error.contains("cannot list s3://fruits/Training") && error.contains("AWS_ACCESS_KEY_ID"),
        "{error}"
    );
    server.make_public("fruits");
    assert_eq!(success(&mut query("fruits")), "n\n12\n");

    // Who says that nothing is signed does not wait for an instance's metadata either.
    let mut unsigned = query("fruits");
    unsigned
        .env("AWS_SKIP_SIGNATURE", "true")
        .env_remove("AWS_EC2_METADATA_DISABLED");
    assert_eq!(success(&mut unsigned), "n\n12\n");
}

#[test]
fn a_file_that_is_replaced_within_a_second_is_read_anew() {
    let server = fruits();
    let replace_and_read = |value: i32| {
        format!(
            "COPY (SELECT {value} AS v) TO 's3://fruits/v.parquet' STORED AS PARQUET; \
             SELECT max(v) AS v FROM 's3://fruits/v.parquet';"
        )
    };
    let sql = [1, 2, 3].map(replace_and_read).concat();
    let read = success(pomona_on(&server).args(["-q", "--format", "csv", "-c", &sql]));
    assert_eq!(read, "v\n1\nv\n2\nv\n3\n");
}

#[test]
fn a_large_result_is_uploaded_in_parts() {
    let server = S3Server::start(&["results"]);
    let copy = "SET datafusion.execution.batch_size = 8192; \
                COPY (SELECT random() AS v FROM generate_series(1, 3000000)) TO 's3://results/random.parquet'";
    success(pomona_on(&server).args(["-q", "-c", copy]));
    let requests = server.take_requests();
    let count = |operation| requests.iter().filter(|request| request.operation == operation).count();
    assert_eq!(
        (count("CreateMultipartUpload"), count("CompleteMultipartUpload")),
        (1, 1),
        "{requests:?}"
    );
    assert!(count("UploadPart") > 1);
    let query = "SELECT count(v) AS n FROM 's3://results/random.parquet'";
    let read = success(pomona_on(&server).args(["-q", "--format", "csv", "-c", query]));
    assert_eq!(read, "n\n3000000\n");
}

#[cfg(unix)]
#[test]
fn an_interrupted_upload_is_taken_back() {
    let server = S3Server::start(&["results"]);
    let copy = "COPY (SELECT random() AS v FROM generate_series(1, 100000000000)) TO 's3://results/random.parquet'";
    let mut child = pomona_on(&server).args(["-q", "-c", copy]).spawn().unwrap();
    let asked = |operation| {
        server
            .take_requests()
            .iter()
            .any(|request| request.operation == operation)
    };
    let started = Instant::now();
    while !asked("UploadPart") {
        assert!(started.elapsed() < Duration::from_secs(60), "no upload has begun");
        std::thread::sleep(Duration::from_millis(20));
    }
    success(Command::new("kill").args(["-INT", &child.id().to_string()]));
    let interrupted = Instant::now();
    assert!(!child.wait().unwrap().success());
    assert!(
        interrupted.elapsed() < Duration::from_secs(10),
        "Ctrl-C took {:?}",
        interrupted.elapsed()
    );
    assert!(asked("AbortMultipartUpload"));
    assert!(server.keys("results").is_empty());
}

#[test]
fn the_main_job_from_and_to_s3() {
    let server = S3Server::start(&["fruits", "results"]);
    success(pomona_on(&server).args(["sample", "s3://fruits/", "--images", "110"]));
    let images = server.keys("fruits");
    let training = images.iter().filter(|key| key.starts_with("Training/")).count();
    assert!((70..90).contains(&training), "{training}");

    let variables = [
        "-v",
        "source=s3://fruits/Training/",
        "-v",
        "target=s3://results/fruits/",
    ];
    success(pomona_on(&server).args(["-q", "-f", "sql/fruits.sql"]).args(variables));
    let written = server.folder("results").join("fruits/features.parquet");
    let read = async {
        let session = pomona::session()?;
        rows(
            &session,
            &format!("SELECT path, label, features FROM '{}'", written.display()),
        )
        .await
    };
    let features = tokio::runtime::Runtime::new().unwrap().block_on(read).unwrap();
    assert_eq!(features.num_rows(), training);
    assert!(vectors(&features, "features").iter().all(|vector| vector.len() == 25));
    for (path, label) in strings(&features, "path").iter().zip(strings(&features, "label")) {
        let key = path.strip_prefix("s3://fruits/").unwrap();
        assert!(
            key.starts_with(&format!("Training/{label}/")) && images.contains(&key.to_owned()),
            "{path}"
        );
    }
}
