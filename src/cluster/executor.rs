//! `pomona executor`: asks a scheduler for tasks, runs them, and keeps their rows until they are fetched.
//!
//! ```text
//!             poll_work: free cores, what ended ──►
//! executor                                           scheduler
//!             ◄── tasks           cancel_tasks ◄──
//!    ▲
//!    └── do_get: rows, for other executors and for clients
//! ```
//!
//! It opens the connection to the scheduler and needs none back, except that a cancelled task otherwise ends
//! at its end. When the scheduler is away it asks on; a scheduler that comes back learns of it that way.

use std::env;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use arrow_flight::flight_service_server::FlightServiceServer;
use ballista_core::config::TaskSchedulingPolicy;
use ballista_core::extension::SessionConfigExt;
use ballista_core::ids::new_instance_id;
use ballista_core::serde::protobuf::executor_grpc_server::{ExecutorGrpc, ExecutorGrpcServer};
use ballista_core::serde::protobuf::scheduler_grpc_client::SchedulerGrpcClient;
use ballista_core::serde::protobuf::{
    CancelTasksParams, CancelTasksResult, ExecutorRegistration, ExecutorStoppedParams, LaunchMultiTaskParams,
    LaunchMultiTaskResult, LaunchTaskParams, LaunchTaskResult, PollWorkParams, RemoveJobDataParams,
    RemoveJobDataResult, StopExecutorParams, StopExecutorResult,
};
use ballista_core::serde::{BallistaCodec, BallistaLogicalExtensionCodec};
use ballista_core::utils::{GrpcClientConfig, GrpcServerConfig, create_grpc_client_endpoint, create_grpc_server};
use ballista_executor::execution_loop::poll_loop;
use ballista_executor::executor::Executor;
use ballista_executor::executor_process::{ExecutorProcessConfig, satisfy_dir_ttl, structure_executor_metadata};
use ballista_executor::flight_service::BallistaFlightService;
use ballista_executor::health::ExecutorHealth;
use ballista_executor::metrics::LoggingMetricsCollector;
use ballista_executor::runtime_cache::DefaultSessionRuntimeCache;
use clap::Args;
use datafusion::common::runtime::SpawnedTask;
use datafusion::common::{config_datafusion_err, exec_datafusion_err, internal_datafusion_err};
use datafusion::error::{DataFusionError, Result};
use datafusion_proto::protobuf::LogicalPlanNode;
use futures::poll;
use pomona_udfs::embed::registry;
use pomona_udfs::memory::{MemoryBudget, parse_size};
use pomona_udfs::settings::PomonaOptions;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{Instant, interval, sleep};
use tonic::transport::Channel;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status};

use super::codec::TaskPlan;
use super::engine::Engine;
use super::health::{self, Ready, bracketed, host_port};
use super::tls::{Tls, TlsArgs, cause};
use super::{DEFAULT_PORT, MESSAGE_BYTES, base_config, codec, tell_version};
use crate::session;
use crate::stores::PomonaStores;

/// Between the tries to reach the scheduler at the start.
const RETRY: Duration = Duration::from_millis(500);

/// How often to look whether the scheduler answers.
const LOOK: Duration = Duration::from_secs(1);

/// At the end the loop is made to report what ended last, so often and so far apart.
const LAST_REPORTS: usize = 5;
const LAST_REPORT: Duration = Duration::from_millis(200);

/// A call that another process answers within it, or never.
const ANSWER: Duration = Duration::from_secs(5);

/// The answer to the question for work holds the plans of all tasks that are given.
const WORK_SECONDS: u64 = 300;

/// The time for connections to close: rows that are being fetched get it too.
const CLOSING: Duration = Duration::from_secs(5);

/// Between the questions whether the scheduler's machine is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Rows that nobody told to delete: the scheduler that could is gone.
const DATA_SECONDS: u64 = 24 * 60 * 60;
const CLEAN_UP_SECONDS: u64 = 30 * 60;

/// What is spilled, in the work folder, beside the folders of the jobs.
const SPILL: &str = "spill";

/// How the names of work folders start, and the file in them that is locked.
const FOLDER: &str = "pomona-executor-";
const LOCK: &str = "lock";

/// A work folder is locked within it.
const NEW: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(crate) struct ExecutorArgs {
    /// The address of the scheduler
    #[arg(long, value_name = "HOST:PORT", value_parser = scheduler_address, conflicts_with_all = ["scheduler_host", "scheduler_port"], required_unless_present = "scheduler_host")]
    scheduler: Option<(String, u16)>,

    /// The host of the scheduler, as with --scheduler
    #[arg(long, value_name = "HOST")]
    scheduler_host: Option<String>,

    /// The port of the scheduler, as with --scheduler
    #[arg(long, value_name = "PORT", requires = "scheduler_host")]
    scheduler_port: Option<u16>,

    /// Seconds to wait for the scheduler at the start, which may still have to give up an executor of the same --id;
    /// later it is waited for without end
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    scheduler_connect_timeout_seconds: u64,

    /// The address to listen on; 0.0.0.0 is every address of the machine
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    bind_host: String,

    /// The port where rows are fetched; 0 takes a free one
    #[arg(short = 'p', long, value_name = "PORT", default_value_t = 50051)]
    bind_port: u16,

    /// The port where the scheduler cancels tasks; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 50052)]
    bind_grpc_port: u16,

    /// The port of /healthz and /readyz; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 50053)]
    bind_health_port: u16,

    /// The name or address under which others reach this machine [default: the one that the scheduler sees]
    #[arg(long, value_name = "HOST")]
    external_host: Option<String>,

    /// The name of this executor in errors and logs [default: a new one]
    #[arg(long, value_name = "ID")]
    id: Option<String>,

    /// Tasks that run at the same time [default: the cores of this machine]
    #[arg(short = 'c', long, value_name = "N")]
    vcores: Option<NonZeroUsize>,

    /// The folder where it makes one of its own, deleted at the end, for rows between stages and for what is
    /// spilled [default: the system's for temporary files]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,

    /// The most memory of all tasks together (4GB, 512MB); then they spill to disk, or fail
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory_pool_size: Option<usize>,

    /// Seconds after which rows are deleted that no scheduler asks to delete; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = DATA_SECONDS)]
    job_data_ttl_seconds: u64,

    /// How often such rows are looked for
    #[arg(long, value_name = "SECONDS", default_value_t = CLEAN_UP_SECONDS, value_parser = clap::value_parser!(u64).range(1..))]
    job_data_clean_up_interval_seconds: u64,

    /// The largest message that it takes, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = MESSAGE_BYTES as u32)]
    grpc_server_max_decoding_message_size: u32,

    /// The largest message that it sends, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = MESSAGE_BYTES as u32)]
    grpc_server_max_encoding_message_size: u32,

    #[command(flatten)]
    tls: TlsArgs,
}

fn scheduler_address(text: &str) -> Result<(String, u16), String> {
    let bare = text.strip_prefix("df://").unwrap_or(text);
    let (host, port) = match bare.rsplit_once(':') {
        // [::1] without a port.
        Some(_) if bare.ends_with(']') => (bare, DEFAULT_PORT),
        Some((host, port)) => (host, port.parse().map_err(|_| format!("'{port}' is no port"))?),
        None => (bare, DEFAULT_PORT),
    };
    match host.is_empty() || host.contains('/') {
        true => Err("it is the scheduler's host:port, as 127.0.0.1:50050".to_owned()),
        false => Ok((host.to_owned(), port)),
    }
}

impl ExecutorArgs {
    /// Takes `--memory` for the limit where there is no other.
    pub(crate) fn or_memory(mut self, memory: Option<usize>) -> Self {
        self.memory_pool_size = self.memory_pool_size.or(memory);
        self
    }

    fn scheduler(&self) -> (String, u16) {
        let (host, port) = self.scheduler.clone().unzip();
        (
            host.or_else(|| self.scheduler_host.clone()).unwrap_or_default(),
            port.or(self.scheduler_port).unwrap_or(DEFAULT_PORT),
        )
    }
}

/// A configuration for [`start_executor_process`](ballista_executor::executor_process::start_executor_process):
/// Pomona's codecs, functions, stores and settings, on this machine's loopback, without a limit of memory. It
/// asks its scheduler for work.
///
/// # Errors
/// Where the bundled model cannot be registered.
pub fn executor_config(scheduler_host: &str, scheduler_port: u16) -> Result<ExecutorProcessConfig> {
    session::register_models()?;
    Ok(ExecutorProcessConfig {
        scheduler_host: scheduler_host.to_owned(),
        scheduler_port,
        ..process_config(&new_instance_id(), None, None, None)
    })
}

/// The configuration of an executor whose tasks share `memory` bytes, and spill into `spill`.
fn process_config(id: &str, memory: Option<usize>, spill: Option<PathBuf>, tls: Option<&Tls>) -> ExecutorProcessConfig {
    let memory = Arc::new(MemoryBudget::fixed(memory));
    let options = PomonaOptions {
        memory: Arc::clone(&memory),
        ..PomonaOptions::default()
    };
    let mut settings = base_config().with_option_extension(options);
    if let Some(tls) = tls {
        settings = settings
            .with_ballista_use_tls(true)
            .with_ballista_override_create_grpc_client_endpoint(tls.endpoint_override());
    }
    ExecutorProcessConfig {
        executor_id: id.to_owned(),
        task_scheduling_policy: TaskSchedulingPolicy::PullStaged,
        grpc_max_decoding_message_size: MESSAGE_BYTES as u32,
        grpc_max_encoding_message_size: MESSAGE_BYTES as u32,
        job_data_ttl_seconds: DATA_SECONDS,
        job_data_clean_up_interval_seconds: CLEAN_UP_SECONDS,
        // Ballista's pools, one for each task; ours is one for the process.
        memory_pool_size: Some(0),
        override_execution_engine: Some(Arc::new(Engine::new(format!("executor '{id}'")))),
        override_function_registry: Some(Arc::new(codec::functions())),
        override_config_producer: Some(Arc::new(move || settings.clone())),
        override_runtime_producer: Some(Arc::new(move |_| {
            let runtime = session::runtime(Arc::new(PomonaStores::new()), Arc::clone(&memory));
            match &spill {
                Some(folder) => runtime.with_temp_file_path(folder),
                None => runtime,
            }
            .build_arc()
        })),
        override_physical_codec: Some(codec::physical_codec(format!("executor '{id}'"))),
        ..ExecutorProcessConfig::default()
    }
}

/// Runs an executor until the process is asked to end, and then its tasks to their end. `say` tells the person
/// where it listens; `models_dir` are folders of models that it looks through first.
///
/// # Errors
/// Where its addresses, its folder or the files of TLS cannot be used, and where no scheduler takes it.
pub(crate) async fn run(args: ExecutorArgs, models_dir: Option<String>, say: &dyn Fn(&str)) -> Result<()> {
    session::register_models()?;
    if let Some(dirs) = models_dir {
        registry::set_process_models_dir(dirs);
    }
    let (scheduler_host, scheduler_port) = args.scheduler();
    let id = args.id.unwrap_or_else(new_instance_id);
    let tls = args.tls.files().map(|files| files.load()).transpose()?;
    let rows = health::listen(&args.bind_host, args.bind_port, "--bind-port").await?;
    let control = health::listen(&args.bind_host, args.bind_grpc_port, "--bind-grpc-port").await?;
    let probes = health::listen(&args.bind_host, args.bind_health_port, "--bind-health-port").await?;
    let work = WorkDir::open(args.work_dir)?;

    let config = ExecutorProcessConfig {
        scheduler_host,
        scheduler_port,
        bind_host: args.bind_host,
        external_host: args.external_host,
        vcores: args.vcores.map_or(0, NonZeroUsize::get),
        job_data_ttl_seconds: args.job_data_ttl_seconds,
        job_data_clean_up_interval_seconds: args.job_data_clean_up_interval_seconds,
        grpc_max_decoding_message_size: args.grpc_server_max_decoding_message_size,
        grpc_max_encoding_message_size: args.grpc_server_max_encoding_message_size,
        ..process_config(&id, args.memory_pool_size, Some(work.spill()), tls.as_ref())
    };
    let scheduler = host_port(&config.scheduler_host, config.scheduler_port);
    let patience = Duration::from_secs(args.scheduler_connect_timeout_seconds);
    let (address, probes_address) = (rows.1, probes.1);

    let registered: Arc<OnceLock<Ready>> = Arc::default();
    let ready: Ready = {
        let registered = Arc::clone(&registered);
        Arc::new(move || match registered.get() {
            Some(ready) => ready(),
            None => Err("it waits for its scheduler".to_owned()),
        })
    };
    let _probes = SpawnedTask::spawn(health::serve(probes.0, health::routes(ready)));
    let stop = health::asked_to_end();
    tokio::pin!(stop);
    let worker = tokio::select! {
        worker = Worker::start(config, rows, control, &work, tls.as_ref(), patience) => worker?,
        () = &mut stop => return Ok(()),
    };
    registered.set(worker.ready()).ok();
    say(&format!(
        "pomona executor '{id}' listens on {address} (health: {probes_address}), scheduler {scheduler}"
    ));
    if let Some(warning) = health::exposure(address, tls.is_some()) {
        say(warning);
    }
    worker.until(stop).await
}

/// The folder of an executor: one folder for the rows of each job, and one for what is spilled. It is deleted at
/// the end, and nothing else of the folder that it is in ever is, but those of executors that were killed.
pub(crate) struct WorkDir {
    folder: tempfile::TempDir,
    /// Locked for as long as this process lives.
    _lock: File,
}

impl WorkDir {
    /// Makes it within a folder, which may be made too.
    pub(crate) fn open(within: Option<PathBuf>) -> Result<Self> {
        let within = within.unwrap_or_else(env::temp_dir);
        let made = fs::create_dir_all(&within).and_then(|()| {
            sweep(&within)?;
            let folder = tempfile::Builder::new().prefix(FOLDER).tempdir_in(&within)?;
            let lock = File::create(folder.path().join(LOCK))?;
            lock.try_lock()?;
            fs::create_dir(folder.path().join(SPILL))?;
            Ok(Self { folder, _lock: lock })
        });
        made.map_err(|e| {
            exec_datafusion_err!(
                "cannot make a folder for rows in {}: {e}. --work-dir takes another one",
                within.display()
            )
        })
    }

    fn spill(&self) -> PathBuf {
        self.folder.path().join(SPILL)
    }

    fn text(&self) -> Result<String> {
        let text = self.folder.path().to_str().map(str::to_owned);
        text.ok_or_else(|| {
            config_datafusion_err!(
                "the name of the folder {} (--work-dir) is no UTF-8",
                self.folder.path().display()
            )
        })
    }
}

/// Deletes the folders of executors that were killed: nobody holds their locks. What is new may be about to be
/// locked.
fn sweep(within: &Path) -> io::Result<()> {
    for entry in fs::read_dir(within)? {
        let entry = entry?;
        let folder = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(FOLDER) {
            continue;
        }
        // Anybody may put something there, and to open a pipe waits for ever.
        let lock = folder.join(LOCK);
        if !fs::symlink_metadata(&lock).is_ok_and(|lock| lock.is_file()) {
            continue;
        }
        let is_left = File::open(lock).is_ok_and(|lock| {
            let made = lock.metadata().and_then(|metadata| metadata.modified());
            let is_old = made.is_ok_and(|made| made.elapsed().is_ok_and(|age| age > NEW));
            is_old && lock.try_lock().is_ok()
        });
        if is_left {
            fs::remove_dir_all(folder).ok();
        }
    }
    Ok(())
}

/// An executor that works.
pub(crate) struct Worker {
    id: String,
    scheduler: SchedulerGrpcClient<Channel>,
    executor: Arc<Executor>,
    /// A permit for each core. Who holds all of them has stopped the work.
    free: Arc<Semaphore>,
    cores: u32,
    health: ExecutorHealth,
    ending: Arc<AtomicBool>,
    asking: SpawnedTask<Result<()>>,
    servers: [SpawnedTask<Result<()>>; 2],
    end: tokio::sync::watch::Sender<bool>,
    _watching: [SpawnedTask<()>; 2],
}

impl Worker {
    /// Starts an executor that serves behind the sockets `rows` and `control`, and registers it with its
    /// scheduler, which it waits for no longer than `patience`.
    ///
    /// # Errors
    /// Where no scheduler takes it: its address, the cause, and what to do.
    pub(crate) async fn start(
        mut config: ExecutorProcessConfig,
        rows: (TcpListener, SocketAddr),
        control: (TcpListener, SocketAddr),
        work: &WorkDir,
        tls: Option<&Tls>,
        patience: Duration,
    ) -> Result<Self> {
        config.validate().map_err(|e| config_datafusion_err!("{e}"))?;
        if config.vcores == 0 {
            config.vcores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        }
        let cores = u32::try_from(config.vcores)
            .ok()
            .filter(|cores| *cores as usize <= Semaphore::MAX_PERMITS)
            .ok_or_else(|| {
                config_datafusion_err!("{} tasks at the same time are too many (--vcores)", config.vcores)
            })?;
        config.port = rows.1.port();
        config.grpc_port = control.1.port();
        let id = config.executor_id.clone();
        let (external, shown) = reachable(&config).await;
        config.external_host = external;
        let shown = host_port(&shown, config.port);
        config.override_execution_engine = Some(Arc::new(Engine::new(format!("executor '{id}' ({shown})"))));
        let config = Arc::new(config);

        let mut registration = structure_executor_metadata(&config, cores);
        // A scheduler takes what describes itself in the same way for the same: the tasks of the process that
        // had this --id before would never be given to anybody again.
        if let Some(system) = &mut registration.os_info {
            let incarnation = new_instance_id();
            system.os_ver_long.push_str(&format!(" ({incarnation})"));
        }
        let scheduler = register(&config, &registration, tls, patience).await?;
        let executor = Arc::new(executor(&config, registration, &work.text()?)?);
        let health = ExecutorHealth::new();
        health.mark_heartbeat_ok();
        let free = Arc::new(Semaphore::new(config.vcores));
        let ending = Arc::new(AtomicBool::new(false));

        let logical = Arc::new(BallistaLogicalExtensionCodec::default());
        let physical = config.override_physical_codec.clone();
        let physical = physical.ok_or_else(|| internal_datafusion_err!("an executor without a codec"))?;
        let plans: BallistaCodec<LogicalPlanNode, TaskPlan> = BallistaCodec::new(logical, physical);
        let asking = poll_loop(
            scheduler.clone(),
            Arc::clone(&executor),
            plans,
            None,
            Some(Arc::clone(&free)),
            health.clone(),
        );
        let asking = async { asking.await.map_err(|e| exec_datafusion_err!("{e}")) };

        let (end, ended) = tokio::sync::watch::channel(false);
        let (decoded, encoded) = (
            config.grpc_max_decoding_message_size as usize,
            config.grpc_max_encoding_message_size as usize,
        );
        let flight = FlightServiceServer::new(BallistaFlightService::new(work.text()?))
            .max_decoding_message_size(decoded)
            .max_encoding_message_size(encoded);
        let cancel = ExecutorGrpcServer::new(Control(Arc::clone(&executor)))
            .max_decoding_message_size(decoded)
            .max_encoding_message_size(encoded);
        let mut builder = create_grpc_server(&GrpcServerConfig::default());
        if let Some(tls) = tls {
            builder = builder
                .tls_config(tls.server()?)
                .map_err(|e| config_datafusion_err!("TLS cannot be used: {}", cause(&e)))?;
        }
        let serve = |router: tonic::transport::server::Router, listener: TcpListener| {
            let mut ended = ended.clone();
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            SpawnedTask::spawn(async move {
                let end = async {
                    ended.wait_for(|ended| *ended).await.ok();
                };
                let served = router.serve_with_incoming_shutdown(incoming, end).await;
                served.map_err(|e| exec_datafusion_err!("{}", cause(&e)))
            })
        };
        let servers = [
            serve(builder.clone().add_service(flight), rows.0),
            serve(builder.add_service(cancel), control.0),
        ];
        let address = host_port(&config.scheduler_host, config.scheduler_port);
        let watching = [
            SpawnedTask::spawn(watch(health.clone(), address)),
            SpawnedTask::spawn(clean_up(work.folder.path().to_owned(), Arc::clone(&config))),
        ];
        Ok(Self {
            id,
            scheduler,
            executor,
            free,
            cores,
            health,
            ending,
            asking: SpawnedTask::spawn(asking),
            servers,
            end,
            _watching: watching,
        })
    }

    pub(crate) fn ready(&self) -> Ready {
        let (health, ending) = (self.health.clone(), Arc::clone(&self.ending));
        Arc::new(move || match (ending.load(Ordering::Acquire), health.is_ready()) {
            (true, _) => Err("it is ending".to_owned()),
            (false, false) => Err("the scheduler does not answer".to_owned()),
            (false, true) => Ok(()),
        })
    }

    /// Works until `stop`; then takes no more tasks and ends when its tasks have ended, or when the process is
    /// asked to end once more.
    pub(crate) async fn until(mut self, stop: impl Future<Output = ()>) -> Result<()> {
        let id = self.id.clone();
        let failed = |what: &str, ended: Result<Result<()>, tokio::task::JoinError>| {
            let cause = match ended {
                Ok(Ok(())) => "it ended".to_owned(),
                Ok(Err(error)) => error.strip_backtrace(),
                Err(error) => error.to_string(),
            };
            Err(exec_datafusion_err!("executor '{id}': {what}: {cause}"))
        };
        let [rows, control] = &mut self.servers;
        tokio::select! {
            () = stop => {}
            ended = self.asking.join_unwind_mut() => return failed("it asks for no more work", ended),
            ended = rows.join_unwind_mut() => return failed("its rows are no longer served", ended),
            ended = control.join_unwind_mut() => return failed("it no longer hears of cancelled queries", ended),
        }
        let at_once = tokio::select! {
            () = self.drain() => false,
            () = health::asked_to_end() => {
                log::warn!("executor '{id}' ends before its tasks");
                true
            }
        };
        tokio::select! {
            () = self.leave(at_once) => {}
            () = health::asked_to_end() => {}
        }
        Ok(())
    }

    /// Tells the scheduler, and lets go of its connections.
    async fn leave(self, at_once: bool) {
        // So that it is not registered again by its next question.
        let Self {
            id,
            asking,
            mut scheduler,
            servers,
            end,
            ..
        } = self;
        drop(asking);
        let stopped = scheduler.executor_stopped(ExecutorStoppedParams {
            executor_id: id,
            reason: "it was asked to end".to_owned(),
        });
        let patience = if at_once { LOOK } else { ANSWER };
        if let Ok(Err(error)) = tokio::time::timeout(patience, stopped).await {
            log::warn!("the scheduler could not be told that the executor ends: {error}");
        }
        end.send(true).ok();
        if at_once {
            return;
        }
        for server in servers {
            tokio::time::timeout(CLOSING, server.join_unwind()).await.ok();
        }
    }

    /// Takes every core as it comes free, and lets the loop report what ended last.
    async fn drain(&self) {
        self.ending.store(true, Ordering::Release);
        let running = self.cores as usize - self.free.available_permits().min(self.cores as usize);
        if running > 0 || self.executor.active_task_count() > 0 {
            log::warn!("executor '{}' ends as soon as its tasks have ended", self.id);
        }
        if let Ok(permits) = self.free.acquire_many(self.cores).await {
            permits.forget();
        }
        if running == 0 {
            return;
        }
        for _ in 0..LAST_REPORTS {
            // The loop waits for a core, and its report has to wait with it. It is lent one; it never keeps
            // it (it would be given a task), as somebody queues behind it.
            let mut behind = std::pin::pin!(self.free.acquire());
            if poll!(behind.as_mut()).is_pending() {
                self.free.add_permits(1);
                if let Ok(permit) = behind.await {
                    permit.forget();
                }
            }
            sleep(LAST_REPORT).await;
        }
    }
}

/// Ballista's executor, with one set of stores for each session.
fn executor(config: &ExecutorProcessConfig, registration: ExecutorRegistration, work_dir: &str) -> Result<Executor> {
    let missing = |what: &str| internal_datafusion_err!("an executor without {what}");
    let settings = config.override_config_producer.clone();
    let runtime = config.override_runtime_producer.clone();
    let engine = config.override_execution_engine.clone();
    let functions = config.override_function_registry.clone();
    let runtime = runtime.ok_or_else(|| missing("a runtime"))?;
    let sessions = DefaultSessionRuntimeCache::new(
        Arc::clone(&runtime),
        Arc::new(|runtime, _, _| Ok(runtime)),
        config.session_runtime_cache_capacity,
    );
    let executor = Executor::new(
        registration,
        work_dir,
        runtime,
        settings.ok_or_else(|| missing("settings"))?,
        functions.ok_or_else(|| missing("functions"))?,
        Arc::new(LoggingMetricsCollector::default()),
        config.vcores,
        engine.ok_or_else(|| missing("an engine"))?,
    );
    Ok(executor.with_session_runtime_cache(Some(Arc::new(sessions))))
}

/// The name under which others reach this executor, `None` for the address that its scheduler sees; and what
/// errors call it.
async fn reachable(config: &ExecutorProcessConfig) -> (Option<String>, String) {
    if let Some(host) = &config.external_host {
        let host = bracketed(host);
        return (Some(host.clone()), host);
    }
    let bound: Option<IpAddr> = config.bind_host.trim_matches(['[', ']']).parse().ok();
    let ip = match bound {
        Some(ip) if ip.is_unspecified() => own_address(config).await.ok(),
        bound => bound,
    };
    match ip.map(|ip| ip.to_canonical()) {
        Some(ip @ IpAddr::V6(_)) => {
            let host = bracketed(&ip.to_string());
            (Some(host.clone()), host)
        }
        Some(ip) => (None, ip.to_string()),
        None => (None, config.bind_host.clone()),
    }
}

/// The address of this machine on the way to its scheduler. Nothing is sent.
async fn own_address(config: &ExecutorProcessConfig) -> io::Result<IpAddr> {
    let host = config.scheduler_host.trim_matches(['[', ']']);
    let mut found = tokio::net::lookup_host((host, config.scheduler_port)).await?;
    let scheduler = found.next().ok_or(io::ErrorKind::NotFound)?;
    let any: IpAddr = match scheduler {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(scheduler).await?;
    Ok(socket.local_addr()?.ip())
}

/// Connects to the scheduler and makes the executor known to it.
async fn register(
    config: &ExecutorProcessConfig,
    registration: &ExecutorRegistration,
    tls: Option<&Tls>,
    patience: Duration,
) -> Result<SchedulerGrpcClient<Channel>> {
    let address = host_port(&config.scheduler_host, config.scheduler_port);
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).max(ANSWER);
        let tried = tokio::time::timeout(left, try_register(config, registration, tls, &address));
        let error = match tried.await {
            Ok(Ok(scheduler)) => return Ok(scheduler),
            Ok(Err(error)) => error,
            Err(_) => Refusal::Unreachable(format!(
                "what listens there does not answer within {} s",
                left.as_secs()
            )),
        };
        let (waits, told) = match error {
            Refusal::Unreachable(cause) => (
                true,
                exec_datafusion_err!(
                    "executor '{}' cannot reach the scheduler at {address}: {cause}. Is it running (pomona scheduler), \
                     is the address right (--scheduler), and do both use TLS or neither?",
                    config.executor_id
                ),
            ),
            Refusal::Refused(status) => (
                status.code() == Code::AlreadyExists,
                exec_datafusion_err!(
                    "the scheduler at {address} refused executor '{}': {}{}",
                    config.executor_id,
                    match status.message() {
                        "" => status.code().description(),
                        message => message,
                    },
                    match status.code() {
                        Code::AlreadyExists => ". Another executor has this --id: end it, or take another one",
                        // It says what to do.
                        Code::FailedPrecondition => "",
                        _ =>
                            ". Is it a scheduler of this version, and do both use TLS or neither (--tls-ca, --tls-cert, \
                              --tls-key)?",
                    }
                ),
            ),
            Refusal::Never(error) => (false, error),
        };
        if !waits || Instant::now() + RETRY > deadline {
            return Err(told);
        }
        sleep(RETRY).await;
    }
}

/// Why a scheduler does not take an executor.
enum Refusal {
    /// It may later.
    Unreachable(String),
    Refused(Status),
    Never(DataFusionError),
}

async fn try_register(
    config: &ExecutorProcessConfig,
    registration: &ExecutorRegistration,
    tls: Option<&Tls>,
    address: &str,
) -> Result<SchedulerGrpcClient<Channel>, Refusal> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let client = GrpcClientConfig {
        connect_timeout_seconds: ANSWER.as_secs(),
        // Tasks that are given and do not arrive are lost to all: large plans take their time.
        timeout_seconds: WORK_SECONDS,
        // A machine that is gone closes no connection: after half a minute a new one is opened.
        http2_keepalive_interval_seconds: KEEP_ALIVE.as_secs(),
        ..GrpcClientConfig::default()
    };
    let mut endpoint = create_grpc_client_endpoint(format!("{scheme}://{address}"), Some(&client)).map_err(|e| {
        Refusal::Never(config_datafusion_err!(
            "'{address}' is no address of a scheduler (--scheduler): {}",
            cause(&e)
        ))
    })?;
    if let Some(tls) = tls {
        endpoint = tls.endpoint_override()(endpoint)
            .map_err(|e| Refusal::Never(config_datafusion_err!("TLS cannot be used with '{address}': {e}")))?;
    }
    let channel = endpoint.connect().await.map_err(|e| Refusal::Unreachable(cause(&e)))?;
    let mut scheduler = SchedulerGrpcClient::new(channel)
        .max_encoding_message_size(config.grpc_max_encoding_message_size as usize)
        .max_decoding_message_size(config.grpc_max_decoding_message_size as usize);
    // The first question, for no work: it registers, and shows whether the other side lets us in.
    let mut first = Request::new(PollWorkParams {
        metadata: Some(registration.clone()),
        num_free_vcores: 0,
        task_status: vec![],
    });
    tell_version(first.metadata_mut());
    match scheduler.poll_work(first).await {
        Ok(_) => Ok(scheduler),
        Err(status) => Err(match status.code() {
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => {
                Refusal::Unreachable(cause(&status))
            }
            _ => Refusal::Refused(status),
        }),
    }
}

/// Tells in the log when the scheduler stops to answer, and when it is back: once, not at each question.
async fn watch(health: ExecutorHealth, scheduler: String) {
    let mut answered = true;
    loop {
        sleep(LOOK).await;
        match (answered, health.is_ready()) {
            (true, false) => log::warn!("the scheduler at {scheduler} does not answer; it is asked on"),
            (false, true) => log::warn!("the scheduler at {scheduler} answers again"),
            _ => {}
        }
        answered = health.is_ready();
    }
}

/// Deletes the rows of jobs that nobody has touched for long.
async fn clean_up(work: PathBuf, config: Arc<ExecutorProcessConfig>) {
    if config.job_data_ttl_seconds == 0 {
        return;
    }
    let mut often = interval(Duration::from_secs(config.job_data_clean_up_interval_seconds.max(1)));
    loop {
        often.tick().await;
        if let Err(error) = delete_old(&work, config.job_data_ttl_seconds).await {
            log::warn!("old rows in {} cannot be deleted: {error}", work.display());
        }
    }
}

async fn delete_old(work: &Path, seconds: u64) -> ballista_core::error::Result<()> {
    let mut entries = tokio::fs::read_dir(work).await?;
    while let Some(entry) = entries.next_entry().await? {
        let path = entry.path();
        if path.ends_with(SPILL) || !entry.file_type().await?.is_dir() {
            continue;
        }
        if !satisfy_dir_ttl(entry, seconds).await? {
            log::info!("deleting {}", path.display());
            tokio::fs::remove_dir_all(path).await?;
        }
    }
    Ok(())
}

/// What a scheduler may tell an executor that asks for its work by itself.
struct Control(Arc<Executor>);

impl Control {
    fn refused<T>() -> Result<Response<T>, Status> {
        Err(Status::failed_precondition(
            "this executor asks for its tasks by itself",
        ))
    }
}

#[tonic::async_trait]
impl ExecutorGrpc for Control {
    async fn cancel_tasks(&self, request: Request<CancelTasksParams>) -> Result<Response<CancelTasksResult>, Status> {
        let mut cancelled = true;
        for task in request.into_inner().task_infos {
            let (stage, id) = (task.stage_id as usize, task.task_id as usize);
            let found = self.0.cancel_task(task.job_id.into(), stage, id).await;
            cancelled &= found.unwrap_or(false);
        }
        Ok(Response::new(CancelTasksResult { cancelled }))
    }

    /// A scheduler says it to those that it takes for dead. Who hears it is not: its next question registers it
    /// again.
    async fn stop_executor(&self, _: Request<StopExecutorParams>) -> Result<Response<StopExecutorResult>, Status> {
        log::warn!("the scheduler had given up this executor; its tasks run elsewhere");
        Ok(Response::new(StopExecutorResult {}))
    }

    async fn launch_task(&self, _: Request<LaunchTaskParams>) -> Result<Response<LaunchTaskResult>, Status> {
        Self::refused()
    }

    async fn launch_multi_task(
        &self,
        _: Request<LaunchMultiTaskParams>,
    ) -> Result<Response<LaunchMultiTaskResult>, Status> {
        Self::refused()
    }

    /// It hears of it in the answers to its questions.
    async fn remove_job_data(&self, _: Request<RemoveJobDataParams>) -> Result<Response<RemoveJobDataResult>, Status> {
        Self::refused()
    }
}

/// The configuration of the executor of `local:N`.
pub(crate) fn local_config(port: u16, vcores: usize, work: &WorkDir) -> ExecutorProcessConfig {
    let host = "127.0.0.1";
    ExecutorProcessConfig {
        scheduler_host: host.to_owned(),
        scheduler_port: port,
        external_host: Some(host.to_owned()),
        vcores,
        ..process_config("local", None, Some(work.spill()), None)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct CommandLine {
        #[command(flatten)]
        args: ExecutorArgs,
    }

    fn parse(args: &[&str]) -> Result<ExecutorArgs, String> {
        CommandLine::try_parse_from([&["executor"][..], args].concat())
            .map(|line| line.args)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn the_scheduler_is_said_in_one_word_or_in_two() {
        let scheduler = |args: &[&str]| parse(args).map(|args| args.scheduler());
        let expected = Ok(("host".to_owned(), 4711));
        assert_eq!(scheduler(&["--scheduler", "host:4711"]), expected);
        assert_eq!(scheduler(&["--scheduler", "df://host:4711"]), expected);
        assert_eq!(
            scheduler(&["--scheduler-host", "host", "--scheduler-port", "4711"]),
            expected
        );
        assert_eq!(scheduler(&["--scheduler", "host"]), Ok(("host".to_owned(), 50050)));
        assert_eq!(scheduler(&["--scheduler", "[::1]:1"]), Ok(("[::1]".to_owned(), 1)));
        for (wrong, named) in [
            (&[][..], "--scheduler"),
            (&["--scheduler", "host:port"], "'port' is no port"),
            (&["--scheduler", ":1"], "host:port"),
            (&["--scheduler", "http://host:1"], "host:port"),
            (
                &["--scheduler", "host", "--scheduler-host", "other"],
                "--scheduler-host",
            ),
            (&["--scheduler", "host", "--vcores", "0"], "--vcores"),
            (
                &["--scheduler", "host", "--memory-pool-size", "much"],
                "--memory-pool-size",
            ),
        ] {
            let error = parse(wrong).map(|args| args.scheduler()).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn an_executor_knows_our_functions_and_its_own_budget() {
        let config = process_config("a", Some(1 << 30), None, None);
        let functions = config.override_function_registry.unwrap();
        assert!(functions.scalar_functions.contains_key("embed"));
        assert!(functions.scalar_functions.contains_key("make_array"));
        assert!(functions.aggregate_functions.contains_key("pca_fit"));

        let session = (config.override_config_producer.unwrap())();
        let options = PomonaOptions::from_config(session.options());
        assert_eq!(options.memory.limit(), Some(1 << 30));
        let runtime = || (config.override_runtime_producer.as_ref().unwrap())(&session).unwrap();
        assert!(!Arc::ptr_eq(
            &runtime().object_store_registry,
            &runtime().object_store_registry
        ));
    }

    #[test]
    fn what_is_in_the_folder_that_is_said_stays() {
        let folder = tempfile::tempdir().unwrap();
        let theirs = folder.path().join("rows");
        fs::create_dir_all(theirs.join("photos")).unwrap();
        let ours = WorkDir::open(Some(theirs.clone())).unwrap();
        let path = ours.folder.path().to_owned();
        assert!(path.starts_with(&theirs) && ours.spill().is_dir());
        // What a killed executor left goes, and not what one holds that works.
        let left = theirs.join("pomona-executor-left");
        fs::create_dir_all(&left).unwrap();
        let old = |folder: &Path| {
            let lock = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(folder.join(LOCK));
            lock.unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        };
        old(&left);
        old(&path);
        let other = WorkDir::open(Some(theirs.clone())).unwrap();
        assert!(!left.exists() && path.is_dir() && other.spill().is_dir());
        drop(ours);
        assert!(theirs.join("photos").is_dir() && !path.exists());

        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = WorkDir::open(Some(file)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("--work-dir"), "{error}");
    }

    #[tokio::test]
    async fn a_scheduler_that_is_not_there_is_named_soon() {
        let (listener, address) = health::listen("127.0.0.1", 0, "--bind-port").await.unwrap();
        drop(listener);
        let args = [
            "--scheduler",
            &address.to_string(),
            "--scheduler-connect-timeout-seconds",
            "0",
        ];
        let free = [
            "--bind-port",
            "0",
            "--bind-grpc-port",
            "0",
            "--bind-health-port",
            "0",
            "--id",
            "a",
        ];
        let args = parse(&[&args[..], &free].concat()).unwrap();
        let error = run(args, None, &|_| {}).await.unwrap_err().to_string();
        for part in [
            &address.to_string(),
            "executor 'a'",
            "onnection refused",
            "pomona scheduler",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }
}
