//! What a cluster costs and gains: scheduler, executors and client are processes of their own on this machine.
//!
//! ```text
//! cargo bench --bench cluster                             all, in about fifteen minutes on two cores
//! cargo bench --bench cluster -- scaling                  the main job on 1 and on 2 executors of one core each
//! cargo bench --bench cluster -- scaling resnet-mini 4000 another model, so many images
//! cargo bench --bench cluster -- growth 1000000           so many objects through a stub of a network
//! cargo bench --bench cluster -- model                    the bytes of a model: as a value, and repeated by a join
//! ```

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[expect(dead_code, reason = "every benchmark takes the helpers that it needs")]
#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/common/networks.rs"]
mod networks;

use std::fs;
use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use common::{pomona, success};
use image::{ImageFormat, RgbImage};

/// One after the other, so that what else the machine does meets all.
const ROUNDS: usize = 3;

/// A process that is not ready within it never will be.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).filter(|text| text != "--bench").collect();
    let number = arguments.iter().find_map(|text| text.parse().ok());
    let kind = arguments.first().map(String::as_str);
    let asked = |name: &str| kind.is_none_or(|kind| kind == name);
    let folder = tempfile::tempdir().unwrap();
    if asked("scaling") {
        let model = arguments.get(1).filter(|text| text.parse::<usize>().is_err());
        scaling(
            folder.path(),
            model.map_or("resnet50", String::as_str),
            number.unwrap_or(640),
        );
    }
    if asked("growth") {
        growth(folder.path(), number.unwrap_or(1_000_000));
    }
    if asked("model") {
        repeated_model(folder.path());
    }
}

/// A process of a cluster. It is killed when it is dropped.
struct Node {
    child: Child,
    /// Where it listens.
    address: String,
}

impl Node {
    /// Starts a role on one core, or on all, and waits until it says where it listens.
    fn start(core: Option<usize>, environment: &[(&str, String)], arguments: &[&str]) -> Self {
        let mut child = on_core(core, arguments)
            .envs(environment.iter().cloned())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (told, lines) = mpsc::channel();
        let errors = BufReader::new(child.stderr.take().unwrap());
        // Reads on to the end: a role that cannot write its log would stop.
        thread::spawn(move || {
            errors
                .lines()
                .map_while(Result::ok)
                .for_each(|line| drop(told.send(line)))
        });
        let mut said = String::new();
        let address = loop {
            let line = lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| fail(&format!("pomona {arguments:?} does not start:\n{said}")));
            if let Some((_, rest)) = line.split_once(" listens on ") {
                break rest.split([' ', ',']).next().unwrap().to_owned();
            }
            said.push_str(&line);
            said.push('\n');
        };
        Self { child, address }
    }

    /// The most memory that it has held, in MiB.
    fn peak(&self) -> u64 {
        peak_memory(self.child.id()).unwrap_or(0) >> 20
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[expect(clippy::panic, reason = "a benchmark fails by panicking")]
fn fail(cause: &str) -> ! {
    panic!("{cause}")
}

/// The program, on one core or on all.
fn on_core(core: Option<usize>, arguments: &[&str]) -> Command {
    let mut command = pomona();
    if let Some(core) = core {
        let mut pinned = Command::new("taskset");
        pinned.args(["-c", &core.to_string()]).arg(command.get_program());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => pinned.env(name, value),
                None => pinned.env_remove(name),
            };
        }
        if let Some(folder) = command.get_current_dir() {
            pinned.current_dir(folder);
        }
        command = pinned;
    }
    command.args(arguments);
    command
}

/// The cores that this process may use. Only Linux tells.
fn cores() -> Vec<usize> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let ranges = list.unwrap_or_default().trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
    });
    ranges.flatten().collect()
}

/// The most bytes that a process has held. Only Linux tells.
fn peak_memory(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// A scheduler, and an executor for each element: on that core, or on all.
struct Cluster {
    scheduler: Node,
    executors: Vec<Node>,
}

impl Cluster {
    fn start(executors: &[Option<usize>], environment: &[(&str, String)]) -> Self {
        let scheduler = Node::start(None, &[], &["scheduler", "--bind-port", "0"]);
        let executors = executors.iter().map(|core| {
            let ports = ["--bind-port", "0", "--bind-grpc-port", "0", "--bind-health-port", "0"];
            let arguments = [
                &["executor", "--vcores", "1", "--scheduler", &scheduler.address][..],
                &ports,
            ]
            .concat();
            Node::start(*core, environment, &arguments)
        });
        Self {
            executors: executors.collect(),
            scheduler,
        }
    }

    fn client(&self) -> Command {
        let mut command = pomona();
        command.arg("--cluster").arg(format!("df://{}", self.scheduler.address));
        command
    }
}

/// The environment in which a network of this topology is found.
fn add_model(folder: &Path, name: &str, network: (&str, usize, usize), preset: &str) -> (&'static str, String) {
    let (file, models) = (folder.join(format!("{name}.onnx")), folder.join("models"));
    fs::write(&file, networks::onnx(network.0, network.1, network.2)).unwrap();
    success(
        pomona()
            .args(["model", "add", name, "--preset", preset])
            .arg(&file)
            .arg("--dir")
            .arg(&models),
    );
    ("POMONA_MODELS", models.display().to_string())
}

fn sample(folder: &Path, images: usize) -> String {
    let source = folder.join(format!("fruits-{images}"));
    success(
        pomona()
            .arg("sample")
            .arg(&source)
            .args(["--images", &images.to_string()]),
    );
    format!("{}/", source.display())
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// `sql/fruits.sql` without a cluster on one core, on one executor and on two.
#[expect(clippy::print_stdout, reason = "its result")]
fn scaling(folder: &Path, model: &str, images: usize) {
    let cores = cores();
    let taskset = Command::new("taskset").arg("-V").output();
    let [first, second, ..] = cores.as_slice() else {
        println!("scaling: left out, there are fewer than two cores");
        return;
    };
    if taskset.is_err() {
        println!("scaling: left out, there is no `taskset` (of util-linux) to pin executors to cores with");
        return;
    }
    let environment = match model {
        "resnet50" => vec![add_model(folder, model, ("resnet50-keras", 64, 224), "keras")],
        _ => vec![],
    };
    let source = sample(folder, images);
    let job = |mut command: Command, source: &str| {
        let target = folder.join("features");
        command
            .envs(environment.iter().cloned())
            .args(["-q", "-f", "sql/fruits.sql", "-v", &format!("source={source}")])
            .args([
                "-v",
                &format!("model={model}"),
                "-v",
                &format!("target={}/", target.display()),
            ]);
        let started = Instant::now();
        success(&mut command);
        started.elapsed().as_secs_f64()
    };
    let few = sample(folder, 64);
    let with = |executors: &[Option<usize>]| {
        let cluster = Cluster::start(executors, &environment);
        // Every executor loads the network.
        job(cluster.client(), &few);
        job(cluster.client(), &source)
    };
    let mut seconds = [vec![], vec![], vec![]];
    for _ in 0..ROUNDS {
        seconds[0].push(job(on_core(Some(*first), &[]), &source));
        seconds[1].push(with(&[Some(*first)]));
        seconds[2].push(with(&[Some(*first), Some(*second)]));
    }
    let [alone, one, two] = seconds.map(median);
    println!("{images} images with {model}, sql/fruits.sql, medians of {ROUNDS} rounds");
    println!("                         seconds  images/s  of one executor");
    for (name, seconds) in [
        ("one core, no cluster", alone),
        ("one executor", one),
        ("two executors", two),
    ] {
        println!(
            "{name:>23}  {seconds:>7.2}  {:>8.1}  {:>15.2}",
            images as f64 / seconds,
            one / seconds
        );
    }
    println!();
}

/// An S3 server of as many objects as one likes, all of them the same picture.
struct Stub {
    endpoint: String,
    bucket: Arc<Bucket>,
}

struct Bucket {
    objects: usize,
    picture: Vec<u8>,
    lists: AtomicUsize,
    gets: AtomicUsize,
}

const LABELS: usize = 100;

/// Objects that S3 lists at once.
const PAGE: usize = 1000;

impl Stub {
    fn start(objects: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let mut picture = Cursor::new(vec![]);
        RgbImage::from_fn(16, 16, |x, y| image::Rgb([x as u8 * 16, y as u8 * 16, 128]))
            .write_to(&mut picture, ImageFormat::Png)
            .unwrap();
        let bucket = Arc::new(Bucket {
            objects,
            picture: picture.into_inner(),
            lists: AtomicUsize::new(0),
            gets: AtomicUsize::new(0),
        });
        let served = Arc::clone(&bucket);
        thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                let bucket = Arc::clone(&served);
                // A client may hang up whenever it likes.
                thread::spawn(move || bucket.serve(&connection).ok());
            }
        });
        Self { endpoint, bucket }
    }
}

impl Bucket {
    /// Answers the requests of one connection.
    fn serve(&self, mut connection: &TcpStream) -> std::io::Result<()> {
        connection.set_nodelay(true)?;
        let mut lines = BufReader::new(connection);
        loop {
            let (mut request, mut header) = (String::new(), String::new());
            if lines.read_line(&mut request)? == 0 {
                return Ok(());
            }
            while lines.read_line(&mut header)? > 2 {
                header.clear();
            }
            let target = request.split(' ').nth(1).unwrap_or_default();
            let (status, tag, body) = match target.split_once('?') {
                Some((_, parameters)) => {
                    self.lists.fetch_add(1, Ordering::Relaxed);
                    ("200 OK", String::new(), self.list(parameters).into_bytes())
                }
                None => {
                    self.gets.fetch_add(1, Ordering::Relaxed);
                    match self.object(target) {
                        Some(object) => ("200 OK", tag(object), self.picture.clone()),
                        None => ("404 Not Found", String::new(), vec![]),
                    }
                }
            };
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\
                 ETag: \"{tag}\"\r\n\r\n",
                body.len()
            );
            connection.write_all(&[head.as_bytes(), &body].concat())?;
        }
    }

    fn of_a_label(&self) -> usize {
        self.objects.div_ceil(LABELS).max(1)
    }

    /// 'Training/label-042/0001234.png'
    fn key(&self, object: usize) -> String {
        let each = self.of_a_label();
        format!("Training/label-{:03}/{:07}.png", object / each, object % each)
    }

    fn object(&self, key: &str) -> Option<usize> {
        let (label, number) = key.split_once("label-")?.1.split_once('/')?;
        let number: usize = number.strip_suffix(".png")?.parse().ok()?;
        let object = label.parse::<usize>().ok()? * self.of_a_label() + number;
        (object < self.objects).then_some(object)
    }

    /// A page of ListObjectsV2.
    fn list(&self, parameters: &str) -> String {
        let parameter = |name: &str| {
            let mut pairs = parameters.split('&').filter_map(|pair| pair.split_once('='));
            let value = pairs.find_map(|(key, value)| (key == name).then_some(value));
            value.unwrap_or_default().replace("%2F", "/")
        };
        let prefix = parameter("prefix");
        let each = self.of_a_label();
        let below = match prefix.strip_prefix("Training/label-") {
            Some(label) => {
                let label: usize = label.trim_end_matches('/').parse().unwrap_or(LABELS);
                self.objects.min(label * each)..self.objects.min((label + 1) * each)
            }
            None => 0..self.objects,
        };
        let mut answer = "<ListBucketResult>".to_owned();
        let mut next = None;
        if parameter("delimiter") == "/" && !prefix.contains("label-") {
            for label in 0..self.objects.div_ceil(each) {
                answer.push_str(&format!(
                    "<CommonPrefixes><Prefix>Training/label-{label:03}/</Prefix></CommonPrefixes>"
                ));
            }
        } else {
            // A token is where the next page starts.
            let start = parameter("continuation-token").parse().unwrap_or(below.start);
            let end = below.end.min(start + PAGE);
            next = (end < below.end).then_some(end);
            for object in start..end {
                answer.push_str(&format!(
                    "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                     <ETag>&quot;{}&quot;</ETag><Size>{}</Size></Contents>",
                    self.key(object),
                    tag(object),
                    self.picture.len()
                ));
            }
        }
        if let Some(next) = next {
            answer.push_str(&format!("<NextContinuationToken>{next}</NextContinuationToken>"));
        }
        answer.push_str(&format!(
            "<IsTruncated>{}</IsTruncated></ListBucketResult>",
            next.is_some()
        ));
        answer
    }
}

fn tag(object: usize) -> String {
    format!("{object:032x}")
}

/// The numbers after `name=` in a plan with metrics: `tasks=12`, `plan_bytes=56.0 M`.
fn metrics(plan: &str, name: &str) -> Vec<String> {
    let values = plan.split(name).filter_map(|rest| rest.strip_prefix('='));
    values
        .map(|rest| {
            rest.split([',', ']', '\n', '|'])
                .next()
                .unwrap_or_default()
                .trim()
                .to_owned()
        })
        .collect()
}

/// Runs a command that must succeed: what it printed, its seconds, and the most MiB that it held.
fn measured(command: &mut Command) -> (String, f64, u64) {
    let started = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let process = child.id();
    let mut printed = child.stdout.take().unwrap();
    let reader = thread::spawn(move || {
        let mut text = String::new();
        printed.read_to_string(&mut text).unwrap();
        text
    });
    let mut peak = 0;
    let status = loop {
        // The kernel keeps the maximum; it is gone once the process has ended.
        peak = peak.max(peak_memory(process).unwrap_or(0));
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None => thread::sleep(Duration::from_millis(5)),
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    let text = reader.join().unwrap();
    assert!(status.success(), "{command:?}\n{text}");
    (text, seconds, peak >> 20)
}

/// Many objects through scheduler and two executors; the network is next to nothing.
#[expect(clippy::print_stdout, reason = "its result")]
fn growth(folder: &Path, objects: usize) {
    let stub = Stub::start(objects);
    let environment = [
        add_model(folder, "stub", ("vgg", 4, 16), "raw"),
        ("AWS_ENDPOINT_URL", stub.endpoint.clone()),
        ("AWS_SKIP_SIGNATURE", "true".to_owned()),
    ];
    let cluster = Cluster::start(&[None, None], &environment);
    let query = "SELECT standardize_fit(embed(content, 'stub')) FROM images('s3://bench/Training/')";
    let run = |sql: &str| {
        let mut command = cluster.client();
        command.envs(environment.clone());
        measured(command.args([
            "-q",
            "--full",
            "-c",
            &format!("SET datafusion.explain.format = 'indent'; {sql}"),
        ]))
    };
    let (_, planning, _) = run(&format!("EXPLAIN {query}"));
    let lists = stub.bucket.lists.load(Ordering::Relaxed);
    let (plan, seconds, client) = run(&format!("EXPLAIN ANALYZE {query}"));
    let gets = stub.bucket.gets.load(Ordering::Relaxed);
    let tasks: Vec<_> = metrics(&plan, "tasks");
    println!("{objects} objects, a stub of a network, two executors of one core");
    println!("listing and planning     {planning:>9.2} s, {lists} LIST");
    println!(
        "the whole query          {seconds:>9.2} s, {:.0} objects/s",
        objects as f64 / seconds
    );
    println!("objects fetched          {gets:>9}");
    println!("tasks, by stage          {:>9}", tasks.join(" + "));
    println!(
        "plan                     {:>9}",
        metrics(&plan, "plan_bytes").join(" + ")
    );
    println!("client, at most          {client:>9} MiB");
    println!("scheduler, at most       {:>9} MiB", cluster.scheduler.peak());
    for executor in &cluster.executors {
        println!("an executor, at most     {:>9} MiB", executor.peak());
    }
    println!();
    assert_eq!(gets, objects, "every object is fetched once");
}

/// A model as a value of the plan against a join that puts it beside every row.
#[expect(clippy::print_stdout, reason = "its result")]
fn repeated_model(folder: &Path) {
    // ResNet50's 2,048 features, of small pictures: how they look does not matter here.
    let environment = [add_model(folder, "wide", ("resnet50-keras", 64, 64), "keras")];
    let (source, vectors) = (sample(folder, 400), folder.join("vectors.parquet"));
    let vectors = vectors.display();
    let embed = format!("COPY (SELECT embed(content, 'wide') AS v FROM images('{source}')) TO '{vectors}'");
    success(pomona().envs(environment.clone()).args(["-q", "-c", &embed]));

    let cluster = Cluster::start(&[None, None], &environment);
    let table = format!(
        "SET datafusion.explain.format = 'indent'; CREATE TABLE pca AS SELECT pca_fit(v, 25) AS model FROM '{vectors}';"
    );
    println!("pca_transform of 400 x 2,048, k = 25, two executors");
    for (name, query) in [
        (
            "a value: (SELECT model FROM pca)",
            format!("SELECT pca_transform(v, (SELECT model FROM pca)) FROM '{vectors}'"),
        ),
        (
            "a join: CROSS JOIN pca",
            format!("SELECT pca_transform(v, model) FROM '{vectors}' CROSS JOIN pca"),
        ),
    ] {
        let sql = format!("{table} EXPLAIN ANALYZE {query}");
        let (plan, seconds, client) = measured(cluster.client().args(["-q", "--full", "-c", &sql]));
        println!("{name}: {seconds:.2} s with the fit, client {client} MiB");
        println!(
            "  plan {}, tasks {}",
            metrics(&plan, "plan_bytes").join(" + "),
            metrics(&plan, "tasks").join(" + ")
        );
        for line in plan.lines().filter(|line| line.contains("output_bytes=")) {
            let operator = line
                .trim_matches([' ', '|'])
                .split([':', ','])
                .next()
                .unwrap_or_default();
            let bytes = metrics(line, "output_bytes");
            println!("  {:<28} {}", operator.trim(), bytes.join(" "));
        }
    }
    println!();
}
