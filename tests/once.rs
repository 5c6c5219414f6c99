//! The network runs once per image, whatever the query looks like.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "every test takes the helpers that it needs")]
mod common;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, Float64Type};
use arrow::util::display::array_value_to_string;
use common::{rows, strings};
use datafusion::error::Result;
use datafusion::prelude::{SessionConfig, SessionContext};
use pomona::SessionBuilder;
use pomona::udfs::embed::graph::Output;
use pomona::udfs::embed::registry::{ModelSettings, load};
use tokio::sync::{Mutex, MutexGuard};

/// Images of the views and tables: ten of each of three labels.
const IMAGES: u64 = 30;

/// Tests share the model, and so the counter.
static COUNTER: Mutex<()> = Mutex::const_new(());

/// Images that went through the network in this process.
fn inferred() -> u64 {
    load("resnet-mini", Output::Pooled, &ModelSettings::default())
        .unwrap()
        .inferred()
}

/// A query's rows, and the images that the network saw for them.
async fn counted(session: &SessionContext, sql: &str) -> Result<(RecordBatch, u64)> {
    let before = inferred();
    let rows = rows(session, sql).await.map_err(|e| e.context(sql.to_owned()))?;
    Ok((rows, inferred() - before))
}

/// A session with
/// - the view `few`: path, content, label
/// - the view `embedded`: path, label, v, computed by the network
/// - the table `vectors`: the same, computed before
/// - the table `one`: v of the first image
async fn session() -> (SessionContext, MutexGuard<'static, ()>) {
    let guard = COUNTER.lock().await;
    let session = pomona::session().unwrap();
    let (_, calls) = prepare(&session).await.unwrap();
    assert_eq!(calls, IMAGES, "CREATE TABLE AS");
    (session, guard)
}

async fn prepare(session: &SessionContext) -> Result<(RecordBatch, u64)> {
    rows(
        session,
        "CREATE VIEW few AS SELECT path, content, label FROM images('sample://fruits/Training/')
         WHERE label IN ('Apple', 'Kiwi', 'Lemon') AND path LIKE '%/00_.jpg'",
    )
    .await?;
    rows(
        session,
        "CREATE VIEW embedded AS SELECT path, label, embed(content, 'resnet-mini') AS v FROM few",
    )
    .await?;
    let created = counted(session, "CREATE TABLE vectors AS SELECT * FROM embedded").await?;
    rows(
        session,
        "CREATE TABLE one AS SELECT v FROM vectors ORDER BY path LIMIT 1",
    )
    .await?;
    Ok(created)
}

/// Equal rows, in the same order; numbers to within a thousandth.
fn assert_same(query: &str, found: &RecordBatch, expected: &RecordBatch) {
    assert_eq!(found.num_rows(), expected.num_rows(), "{query}");
    assert!(found.num_rows() > 0, "{query}");
    assert_eq!(found.num_columns(), expected.num_columns(), "{query}");
    for (i, field) in expected.schema().fields().iter().enumerate() {
        assert_eq!(found.schema().field(i).name(), field.name(), "{query}");
        let (a, b) = (found.column(i), expected.column(i));
        if !field.data_type().is_floating() {
            for row in 0..a.len() {
                let text = |column| array_value_to_string(column, row).unwrap();
                assert_eq!(text(a), text(b), "{query}: {} {row}", field.name());
            }
            continue;
        }
        let (a, b) = (
            cast(a, &DataType::Float64).unwrap(),
            cast(b, &DataType::Float64).unwrap(),
        );
        for (a, b) in a
            .as_primitive::<Float64Type>()
            .iter()
            .zip(b.as_primitive::<Float64Type>())
        {
            let is_close = match (a, b) {
                (Some(a), Some(b)) => (a - b).abs() <= 1e-3 * b.abs().max(1.0),
                (a, b) => a == b,
            };
            assert!(is_close, "{query}: {} is {a:?}, not {b:?}", field.name());
        }
    }
}

/// Runs each query over images, with a call for each `EMBED(i)`, and over vectors that were computed
/// before: the rows are the same, and the network sees as many images as given.
async fn check(session: &SessionContext, queries: &[(&str, u64)]) {
    for (query, images) in queries {
        let mut run = query.replace("IMAGES", "few").replace("EMBEDDED", "embedded");
        let mut read = query.replace("IMAGES", "vectors").replace("EMBEDDED", "vectors");
        for alias in ["i", "a", "b"] {
            let call = format!("EMBED({alias})");
            run = run.replace(&call, &format!("embed({alias}.content, 'resnet-mini')"));
            read = read.replace(&call, &format!("{alias}.v"));
        }
        let (expected, none) = counted(session, &read).await.unwrap();
        assert_eq!(none, 0, "{read}");
        let (found, calls) = counted(session, &run).await.unwrap();
        assert_same(&run, &found, &expected);
        let plan = rows(session, &format!("EXPLAIN {run}")).await.unwrap();
        assert_eq!(calls, *images, "{run}\n{}", strings(&plan, "plan").join("\n"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_one_select() {
    let (session, _guard) = session().await;
    check(
        &session,
        &[
            (
                "SELECT i.path, array_element(EMBED(i), 1) AS first FROM IMAGES i
                 WHERE cosine_distance(EMBED(i), (SELECT v FROM one)) < 0.5 ORDER BY i.path",
                IMAGES,
            ),
            (
                "SELECT i.path, cosine_distance(EMBED(i), (SELECT v FROM one)) AS distance FROM IMAGES i
                 WHERE cosine_distance(EMBED(i), (SELECT v FROM one)) < 0.5
                 ORDER BY cosine_distance(EMBED(i), (SELECT v FROM one)), i.path",
                IMAGES,
            ),
            (
                "SELECT i.path, array_element(EMBED(i), 1) AS a, array_element(EMBED(i), 2) AS b FROM IMAGES i
                 ORDER BY i.path",
                IMAGES,
            ),
            (
                "SELECT i.path FROM IMAGES i
                 WHERE array_element(EMBED(i), 1) BETWEEN -100.0 AND 100.0 ORDER BY i.path",
                IMAGES,
            ),
            (
                "SELECT i.label, count(*) AS n, min(array_element(EMBED(i), 1)) AS a, max(array_element(EMBED(i), 2)) AS b
                 FROM IMAGES i GROUP BY i.label HAVING max(array_element(EMBED(i), 2)) > -100.0 ORDER BY i.label",
                IMAGES,
            ),
            (
                "SELECT i.path, row_number() OVER (ORDER BY array_element(EMBED(i), 1), i.path) AS n,
                        array_element(EMBED(i), 1) AS a
                 FROM IMAGES i ORDER BY i.path",
                IMAGES,
            ),
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_struct() {
    let (session, _guard) = session().await;
    let of_struct = "FROM (SELECT named_struct('path', i.path, 'label', i.label, 'v', EMBED(i)) AS s FROM IMAGES i)";
    check(
        &session,
        &[
            (
                &format!(
                    "SELECT s['path'] AS path, array_element(s['v'], 1) AS a, array_element(s['v'], 2) AS b
                     {of_struct} ORDER BY s['path']"
                ),
                IMAGES,
            ),
            (
                &format!(
                    "SELECT s['path'] AS path, s['label'] AS label, cosine_distance(s['v'], (SELECT v FROM one)) AS distance
                     {of_struct} WHERE cosine_distance(s['v'], (SELECT v FROM one)) < 0.5 ORDER BY s['path']"
                ),
                IMAGES,
            ),
            (
                "SELECT i.path, array_element(named_struct('v', EMBED(i))['v'], 1) AS a,
                        array_element(named_struct('v', EMBED(i))['v'], 2) AS b
                 FROM IMAGES i ORDER BY i.path",
                IMAGES,
            ),
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn for_the_images_that_are_asked_for() {
    let (session, _guard) = session().await;
    check(
        &session,
        &[
            (
                "SELECT i.path, array_element(EMBED(i), 1) AS a FROM IMAGES i
                 WHERE i.label = 'Kiwi' AND cosine_distance(EMBED(i), (SELECT v FROM one)) < 3.0 ORDER BY i.path",
                10,
            ),
            (
                "SELECT i.path, CASE WHEN i.label = 'Kiwi' THEN array_element(EMBED(i), 1) END AS a
                 FROM IMAGES i ORDER BY i.path",
                10,
            ),
            ("SELECT count(*) AS n FROM EMBEDDED", 0),
            ("SELECT label FROM EMBEDDED ORDER BY path LIMIT 3", 0),
        ],
    )
    .await;
    // An image to compare with is embedded once, not once per batch.
    let sql = "SELECT path, cosine_distance(embed(content, 'resnet-mini'),
                   embed((SELECT content FROM few ORDER BY path LIMIT 1), 'resnet-mini')) AS distance
               FROM few ORDER BY path";
    let (found, calls) = counted(&session, sql).await.unwrap();
    let expected = "SELECT path, cosine_distance(v, (SELECT v FROM one)) AS distance FROM vectors ORDER BY path";
    assert_same(sql, &found, &rows(&session, expected).await.unwrap());
    assert_eq!(calls, IMAGES + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_joins() {
    let (session, _guard) = session().await;
    check(
        &session,
        &[
            (
                "SELECT a.path, b.path AS other
                 FROM (SELECT * FROM IMAGES WHERE label = 'Apple') a JOIN (SELECT * FROM IMAGES WHERE label = 'Kiwi') b
                      ON cosine_distance(EMBED(a), EMBED(b)) < 0.9
                 ORDER BY a.path, b.path",
                20,
            ),
            (
                "SELECT a.path, b.path AS other, cosine_distance(EMBED(a), EMBED(b)) AS distance
                 FROM IMAGES a JOIN IMAGES b ON a.label = b.label AND a.path < b.path
                 ORDER BY a.path, b.path",
                IMAGES,
            ),
            (
                "SELECT a.path, b.path AS other FROM IMAGES a, IMAGES b
                 WHERE a.path < b.path AND cosine_distance(EMBED(a), EMBED(b)) < 0.5
                 ORDER BY a.path, b.path",
                IMAGES,
            ),
            (
                "SELECT a.path, count(b.path) AS near
                 FROM IMAGES a LEFT JOIN IMAGES b ON a.path <> b.path AND cosine_distance(EMBED(a), EMBED(b)) < 0.3
                 GROUP BY a.path ORDER BY a.path",
                IMAGES,
            ),
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_copies_of_a_subplan() {
    let (session, _guard) = session().await;
    let e = "e AS (SELECT i.path, i.label, EMBED(i) AS v FROM IMAGES i)";
    let with = |query: &str| format!("WITH {e} {query}");
    let queries = [
        (
            with(
                "SELECT x.path, y.label, array_element(x.v, 1) AS a, array_element(y.v, 2) AS b
                  FROM e x JOIN e y ON x.path = y.path ORDER BY x.path",
            ),
            IMAGES,
        ),
        (
            with(
                "SELECT path, array_element(pca_transform(v, (SELECT pca_fit(v, 3) FROM e)), 1) AS component
                  FROM e ORDER BY path",
            ),
            IMAGES,
        ),
        (
            with(
                ", z AS (SELECT path, standardize(v, (SELECT standardize_fit(v) FROM e)) AS z FROM e)
                  SELECT path, array_element(pca_transform(z, (SELECT pca_fit(z, 3) FROM z)), 1) AS component
                  FROM z ORDER BY path",
            ),
            IMAGES,
        ),
        (
            with(
                ", m AS (SELECT label, standardize_fit(v) AS model FROM e GROUP BY label)
                  SELECT e.path, array_element(standardize(e.v, m.model), 1) AS a
                  FROM e JOIN m ON e.label = m.label ORDER BY e.path",
            ),
            IMAGES,
        ),
        (
            with(
                "SELECT path, array_element(v, 1) AS a FROM e WHERE label = 'Kiwi'
                  UNION ALL SELECT path, array_element(v, 1) AS a FROM e WHERE label = 'Lemon' ORDER BY path",
            ),
            20,
        ),
        (
            with(
                "SELECT path, array_element(v, 1) AS a, 'all' AS part FROM e
                  UNION ALL SELECT path, array_element(v, 2) AS a, 'kiwis' AS part FROM e WHERE label = 'Kiwi'
                  ORDER BY path, part",
            ),
            IMAGES,
        ),
        (
            with(
                "SELECT path, classify(v, (SELECT lda_fit(v, label) FROM e WHERE label <> 'Apple')) AS class
                  FROM e WHERE path LIKE '%/000.jpg' OR path LIKE '%/001.jpg' ORDER BY path",
            ),
            20 + 2,
        ),
        (
            "SELECT x.path, cosine_distance(x.v, y.v) AS distance FROM EMBEDDED x JOIN EMBEDDED y
             ON x.label = y.label AND x.path < y.path ORDER BY x.path, y.path"
                .to_owned(),
            IMAGES,
        ),
        (
            "SELECT path FROM EMBEDDED
             WHERE array_element(v, 1) > (SELECT avg(array_element(v, 1)) FROM EMBEDDED) ORDER BY path"
                .to_owned(),
            IMAGES,
        ),
    ];
    let queries: Vec<(&str, u64)> = queries
        .iter()
        .map(|(query, images)| (query.as_str(), *images))
        .collect();
    check(&session, &queries).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_what_is_written() {
    let (session, _guard) = session().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pairs.parquet").display().to_string();
    let pairs = "SELECT x.path, y.path AS other, cosine_distance(x.v, y.v) AS distance
                 FROM embedded x JOIN embedded y ON x.label = y.label AND x.path < y.path";
    let (_, calls) = counted(&session, &format!("COPY ({pairs}) TO '{file}'")).await.unwrap();
    assert_eq!(calls, IMAGES, "COPY");
    let (_, calls) = counted(&session, &format!("CREATE TABLE pairs AS {pairs}"))
        .await
        .unwrap();
    assert_eq!(calls, IMAGES, "CREATE TABLE AS");

    let read = |from: &str| format!("SELECT * FROM {from} ORDER BY path, other");
    let (from_table, calls) = counted(&session, &read("pairs")).await.unwrap();
    assert_eq!(calls, 0);
    assert_eq!(from_table.num_rows(), 3 * 45);
    let (from_file, _) = counted(&session, &read(&format!("'{file}'"))).await.unwrap();
    assert_same("COPY", &from_file, &from_table);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_further_than_a_limit() {
    let guard = COUNTER.lock().await;
    let config = SessionConfig::new().with_target_partitions(1);
    let session = SessionBuilder::new().with_config(config).build().unwrap();
    let e =
        "WITH e AS (SELECT path, label, embed(content, 'resnet-mini') AS v FROM images('sample://fruits/Training/'))";
    for (query, at_most) in [
        ("SELECT path, v FROM e LIMIT 3", 3),
        ("SELECT path, v FROM e ORDER BY label DESC, path LIMIT 3", 3),
        ("SELECT path FROM e WHERE array_element(v, 1) > -100.0 LIMIT 3", 64),
        (
            "SELECT x.path FROM e x JOIN e y ON x.path = y.path
             WHERE array_element(x.v, 1) > -100.0 AND array_element(y.v, 2) > -100.0 LIMIT 3",
            320,
        ),
        (
            "(SELECT path FROM e WHERE array_element(v, 1) > -100.0 LIMIT 3)
             UNION ALL (SELECT path FROM e WHERE array_element(v, 2) > -100.0 LIMIT 3)",
            64,
        ),
    ] {
        let (rows, calls) = counted(&session, &format!("{e} {query}")).await.unwrap();
        assert!(rows.num_rows() >= 3, "{query}");
        assert!(calls <= at_most, "{calls} images: {query}");
    }
    drop(guard);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_time_that_a_query_runs() {
    let (session, _guard) = session().await;
    let sql = "SELECT path, array_element(pca_transform(v, (SELECT pca_fit(v, 3) FROM embedded)), 1) AS component
               FROM embedded ORDER BY path";

    let plan = rows(&session, &format!("EXPLAIN {sql}")).await.unwrap();
    let plan = strings(&plan, "plan").join("\n");
    assert_eq!(plan.matches("SharedExec: id=0, readers=2").count(), 2, "{plan}");
    assert_eq!(plan.matches("FetchExec").count(), 1, "{plan}");

    let (analyzed, calls) = counted(&session, &format!("EXPLAIN ANALYZE {sql}")).await.unwrap();
    let analyzed = strings(&analyzed, "plan").join("\n");
    assert_eq!(calls, IMAGES, "{analyzed}");
    let shared: Vec<&str> = analyzed.lines().filter(|line| line.contains("SharedExec")).collect();
    assert_eq!(shared.len(), 2, "{analyzed}");
    assert!(shared.iter().all(|line| line.contains("output_rows=30")), "{analyzed}");

    let frame = session.sql(sql).await.unwrap();
    let before = inferred();
    let mut collected = vec![];
    for _ in 0..2 {
        let batches = frame.clone().collect().await.unwrap();
        collected.push(concat_batches(&batches[0].schema(), &batches).unwrap());
    }
    assert_same(sql, &collected[0], &collected[1]);
    assert_eq!(inferred() - before, 2 * IMAGES);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_order_that_is_asked_for() {
    let guard = COUNTER.lock().await;
    let config = SessionConfig::new().with_target_partitions(4);
    let session = SessionBuilder::new().with_config(config).build().unwrap();
    for from in [
        "images('sample://fruits/Training/')",
        "(SELECT * FROM images('sample://fruits/Training/')) i",
    ] {
        let sql = format!("SELECT path, embed(content, 'resnet-mini') AS v FROM {from} ORDER BY path LIMIT 100");
        let (rows, calls) = counted(&session, &sql).await.unwrap();
        assert!(strings(&rows, "path").is_sorted(), "{sql}");
        assert_eq!(calls, 100, "{sql}");
    }
    drop(guard);
}

#[tokio::test(flavor = "multi_thread")]
async fn not_where_the_query_leaves_it_out() {
    let guard = COUNTER.lock().await;
    let session = SessionBuilder::new().build().unwrap();
    let v = "embed(content, 'resnet-mini')";
    for (query, images) in [
        (
            format!(
                "SELECT CASE WHEN label = 'Kiwi' AND path LIKE '%/00_.jpg' \
                 THEN array_element({v}, 1) + array_element({v}, 2) END AS sum"
            ),
            // Each of the two runs by itself: one column for both would be computed for all rows.
            20,
        ),
        (
            format!("SELECT standardize_fit({v}) FILTER (WHERE label = 'Kiwi' AND path LIKE '%/00_.jpg') AS model"),
            10,
        ),
    ] {
        let sql = format!("{query} FROM images('sample://fruits/Training/')");
        let (_, calls) = counted(&session, &sql).await.unwrap();
        assert!(calls <= images, "{calls}: {sql}");
    }
    drop(guard);
}
