//! A cluster of real processes on loopback, each with a folder of its own.
//!
//! Nothing here waits for a time to pass: it waits for what is to happen, and no longer than [`WAIT`].
//! Whatever a process said is printed when a test fails.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::pomona;
use crate::server::{EXECUTOR, S3Server};

/// For anything that happens at all. A lost executor is noticed after 10 seconds.
pub(crate) const WAIT: Duration = Duration::from_secs(90);

const LOOK: Duration = Duration::from_millis(20);

/// Waits until a condition holds.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < WAIT, "in {WAIT:?} it did not happen that {what}");
        sleep(LOOK);
    }
}

/// Status and body of a GET over HTTP, if somebody answers.
pub(crate) fn http_get(address: &str, path: &str) -> Option<(u16, String)> {
    let mut connection = TcpStream::connect(address).ok()?;
    connection.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(
        connection,
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    .ok()?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).ok()?;
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer.split("\r\n\r\n").nth(1)?.to_owned()))
}

/// What a process writes to a pipe, as it writes it.
struct Heard {
    text: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Heard {
    fn start(pipe: impl Read + Send + 'static) -> Self {
        let text = Arc::<Mutex<String>>::default();
        let written = Arc::clone(&text);
        let reader = thread::spawn(move || {
            let mut lines = BufReader::new(pipe);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                written.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
                line.clear();
            }
        });
        Self {
            text,
            reader: Some(reader),
        }
    }

    fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    /// Reads to the end, which comes with that of the process.
    fn finish(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.join().ok();
        }
    }
}

/// A process that has ended.
pub(crate) struct Ran {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Standard output of what must have succeeded.
    pub(crate) fn success(self) -> String {
        assert!(self.status.success(), "{}\n{}{}", self.status, self.stdout, self.stderr);
        self.stdout
    }

    /// All that was said by what must have failed.
    pub(crate) fn failure(self) -> String {
        let said = self.stdout + &self.stderr;
        assert!(!self.status.success(), "it did not fail: {said}");
        said
    }
}

/// A process. It is killed when it is dropped.
pub(crate) struct Process {
    name: String,
    child: Child,
    stdout: Heard,
    stderr: Heard,
}

impl Process {
    /// Starts a command; `name` is what a failing test calls it.
    pub(crate) fn start(name: &str, command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            name: name.to_owned(),
            stdout: Heard::start(child.stdout.take().unwrap()),
            stderr: Heard::start(child.stderr.take().unwrap()),
            child,
        }
    }

    /// Waits for the end.
    pub(crate) fn finish(&mut self) -> Ran {
        let mut status = None;
        wait_until(&format!("{} ended", self.name), || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        self.stdout.finish();
        self.stderr.finish();
        Ran {
            status: status.unwrap(),
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
        }
    }

    /// Runs a command to its end.
    pub(crate) fn run(command: &mut Command) -> Ran {
        Self::start("the client", command).finish()
    }

    /// What it has written to standard output and error so far.
    pub(crate) fn said(&self) -> String {
        self.stdout.text() + &self.stderr.text()
    }

    /// The line that starts like this, once it is there.
    fn line(&mut self, start: &str) -> String {
        let mut found = None;
        wait_until(&format!("{} said '{start} …'", self.name), || {
            let said = self.stderr.text();
            // A line that is not at its end may hold half a port.
            let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
            found = whole.lines().find(|line| line.starts_with(start)).map(str::to_owned);
            let ended = found.is_none() && self.child.try_wait().unwrap().is_some();
            assert!(!ended, "{} ended: {said}", self.name);
            found.is_some()
        });
        found.unwrap()
    }

    /// Ends it at once, as SIGKILL does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to end, with SIGTERM.
    pub(crate) fn terminate(&self) {
        self.signal("-TERM");
    }

    /// Sends it a signal: `-INT`.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }
}

impl Drop for Process {
    #[expect(clippy::print_stderr, reason = "what is needed to understand a failure")]
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        self.stdout.finish();
        self.stderr.finish();
        if thread::panicking() {
            eprintln!("──── {} said ────\n{}", self.name, self.said());
        }
    }
}

/// A scheduler or an executor.
pub(crate) struct Role {
    pub(crate) process: Process,
    /// What it is reached at: the scheduler by the others, an executor for its rows.
    pub(crate) address: String,
    /// The address of `/healthz` and `/readyz`.
    pub(crate) health: String,
}

impl Role {
    /// The status of `/healthz` or `/readyz`, if somebody answers.
    pub(crate) fn status(&self, path: &str) -> Option<u16> {
        http_get(&self.health, path).map(|(status, _)| status)
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.status("/readyz") == Some(200)
    }
}

/// What a test adds to the command of a role (`scheduler`, `executor-0`, …) or of a `client`.
type Setup<'a> = Box<dyn Fn(&str, &mut Command) + 'a>;

/// A scheduler and executors of one core each.
pub(crate) struct Cluster<'a> {
    setup: Setup<'a>,
    pub(crate) scheduler: Role,
    pub(crate) executors: Vec<Role>,
    /// Schedulers that ended, for what they said.
    past: Vec<Role>,
    folder: TempDir,
}

impl<'a> Cluster<'a> {
    /// A cluster that is ready, with so many executors; without one it cannot be.
    pub(crate) fn start(executors: usize, setup: impl Fn(&str, &mut Command) + 'a) -> Self {
        let setup: Setup<'a> = Box::new(setup);
        let folder = TempDir::new().unwrap();
        let scheduler = scheduler(&folder, &setup, "0", executors.max(1));
        let mut cluster = Self {
            setup,
            scheduler,
            executors: vec![],
            past: vec![],
            folder,
        };
        for _ in 0..executors {
            cluster.add();
        }
        if executors > 0 {
            wait_until("the scheduler is ready", || cluster.scheduler.is_ready());
        }
        cluster
    }

    /// Starts one more executor; it is called `executor-N` and has that for an access key.
    pub(crate) fn add(&mut self) {
        let executor = self.executor(self.executors.len(), ["0"; 3]);
        self.executors.push(executor);
    }

    /// Kills the first executor and starts it again under the same name, at the same port.
    pub(crate) fn restart_executor(&mut self) {
        let port = self.executors[0].address.rsplit_once(':').unwrap().1.to_owned();
        self.executors[0].process.kill();
        let again = self.executor(0, [&port, "0", "0"]);
        self.past.push(std::mem::replace(&mut self.executors[0], again));
    }

    fn executor(&self, index: usize, ports: [&str; 3]) -> Role {
        let name = format!("{EXECUTOR}{index}");
        let mut command = command(&self.folder, &name);
        let scheduler = self.scheduler_address();
        command.args(["executor", "--scheduler", &scheduler, "--id", &name, "--vcores", "1"]);
        for (option, port) in ["--bind-port", "--bind-grpc-port", "--bind-health-port"]
            .iter()
            .zip(ports)
        {
            command.args([option, port]);
        }
        command
            .arg("--work-dir")
            .arg(self.folder.path().join(&name).join("work"));
        (self.setup)(&name, &mut command);
        let mut process = Process::start(&name, &mut command);
        let line = process.line(&format!("pomona executor '{name}' listens on "));
        let role = Role {
            process,
            address: between(&line, " listens on ", " "),
            health: between(&line, "(health: ", ")"),
        };
        wait_until(&format!("{name} is ready"), || role.is_ready());
        role
    }

    /// Starts the scheduler again, on its port.
    pub(crate) fn restart_scheduler(&mut self) {
        let address = self.scheduler_address();
        let (_, port) = address.rsplit_once(':').unwrap();
        let scheduler = scheduler(&self.folder, &self.setup, port, self.executors.len());
        self.past.push(std::mem::replace(&mut self.scheduler, scheduler));
    }

    /// The address of the scheduler, on loopback, wherever else it listens.
    pub(crate) fn scheduler_address(&self) -> String {
        self.scheduler.address.replace("0.0.0.0", "127.0.0.1")
    }

    /// What a client connects to.
    pub(crate) fn url(&self) -> String {
        format!("df://{}", self.scheduler_address())
    }

    /// A client that prints results only.
    pub(crate) fn client(&self) -> Command {
        let mut command = command(&self.folder, "client");
        command.args(["-q", "--cluster", &self.url()]);
        (self.setup)("client", &mut command);
        command
    }

    /// Starts a query whose rows are printed as csv.
    pub(crate) fn query(&self, sql: &str) -> Process {
        Process::start("the client", self.client().args(["--format", "csv", "-c", sql]))
    }

    /// All that scheduler and executors have said.
    pub(crate) fn said(&self) -> String {
        let roles = self.past.iter().chain([&self.scheduler]).chain(&self.executors);
        roles.map(|role| role.process.said()).collect()
    }
}

/// The binary, at home in a folder of this name.
fn command(folder: &TempDir, name: &str) -> Command {
    let home: PathBuf = folder.path().join(name);
    std::fs::create_dir_all(&home).unwrap();
    let mut command = pomona();
    command.env("HOME", home);
    command
}

fn scheduler(folder: &TempDir, setup: &Setup<'_>, port: &str, executors: usize) -> Role {
    let mut command = command(folder, "scheduler");
    command.args(["scheduler", "--bind-port", port, "--bind-health-port", "0"]);
    command.args(["--min-ready-executors", &executors.to_string()]);
    command.args(["--executor-timeout-seconds", "10"]);
    command.args(["--expire-dead-executor-interval-seconds", "1"]);
    command.args(["--executor-wait-seconds", "5"]);
    setup("scheduler", &mut command);
    let mut process = Process::start("scheduler", &mut command);
    let line = process.line("pomona scheduler listens on ");
    Role {
        process,
        address: between(&line, " listens on ", " "),
        health: between(&line, "(health: ", ")"),
    }
}

fn between(line: &str, before: &str, after: &str) -> String {
    let (_, rest) = line.split_once(before).unwrap();
    rest.split(after).next().unwrap().to_owned()
}

/// Gives executors and clients the credentials of a server, executors by names of their own.
pub(crate) fn with_credentials(server: &S3Server) -> impl Fn(&str, &mut Command) {
    move |name: &str, command: &mut Command| match name {
        "scheduler" => {}
        "client" => {
            command.envs(server.environment());
        }
        executor => {
            command.envs(server.environment_of(executor));
        }
    }
}
