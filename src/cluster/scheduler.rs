//! `pomona scheduler`: takes plans, cuts them into stages, gives their tasks to executors that ask for work.
//!
//! Executors ask (Ballista's pull-staged policy) instead of being told. So an executor that cannot read a
//! task says why, where a push loses the reason; nobody but the executor's network must be crossed; all of
//! it goes over TLS; and an executor finds a scheduler that comes back.

use std::collections::BTreeSet;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::get;
use ballista_core::JobId;
use ballista_core::config::TaskSchedulingPolicy;
use ballista_core::ids::new_instance_id;
use ballista_core::serde::protobuf::job_status;
use ballista_core::serde::protobuf::scheduler_grpc_server::SchedulerGrpcServer;
use ballista_core::utils::get_time_before;
use ballista_scheduler::cluster::BallistaCluster;
use ballista_scheduler::config::{SchedulerConfig, TaskDistributionPolicy};
use ballista_scheduler::scheduler_process::create_scheduler;
use ballista_scheduler::scheduler_server::{JobIdGenerator, SchedulerServer};
use ballista_scheduler::state::execution_graph::ExecutionGraphBox;
use ballista_scheduler::state::execution_stage::ExecutionStage;
use clap::Args;
use datafusion::common::exec_datafusion_err;
use datafusion::common::runtime::SpawnedTask;
use datafusion::error::Result;
use datafusion::execution::{SessionState, SessionStateBuilder};
use datafusion::prelude::SessionConfig;
use datafusion_proto::protobuf::{LogicalPlanNode, PhysicalPlanNode};
use http_body_util::BodyExt;
use pomona_udfs::memory::MemoryBudget;
use pomona_udfs::settings::PomonaOptions;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task_local;
use tokio::time::{Instant, sleep, sleep_until};
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::{TcpConnectInfo, TcpIncoming};

use super::health::{self, Ready};
use super::tls::{Tls, TlsArgs, TlsFiles, cause};
use super::{DEFAULT_PORT, MESSAGE_BYTES, VERSION, VERSION_HEADER, base_config, codec};
use crate::session;
use crate::stores::PomonaStores;

/// The calls that bring a query: one whose client follows it, and one whose client asks for it now and then.
const FOLLOWED: &str = "/ballista.protobuf.SchedulerGrpc/ExecuteQueryPush";
const SUBMITTED: &str = "/ballista.protobuf.SchedulerGrpc/ExecuteQuery";

/// The question for work.
const WORK: &str = "/ballista.protobuf.SchedulerGrpc/PollWork";

/// How often the number of executors, or of jobs, is looked at where somebody waits for it.
const LOOK: Duration = Duration::from_millis(100);

/// Clients that have just heard of the end of their query may still ask for its metrics.
const LAST_QUESTIONS: Duration = Duration::from_secs(1);

/// The time for connections to close.
const CLOSING: Duration = Duration::from_secs(2);

/// Ballista looks for heartbeats that it takes for alive for 3 minutes; what is lost is done again.
const EXECUTOR_TIMEOUT: u64 = 20;
const EXPIRY_CHECK: u64 = 5;
const NO_EXECUTORS: u64 = 30;

/// Seconds that a query waits for a first executor.
const EXECUTOR_WAIT: u64 = 10;

/// Seconds that running queries have when the scheduler is to end.
const GRACE: u64 = 25;

/// Seconds that a client has to read the rows of its query.
const ROWS_KEPT: u64 = 24 * 60 * 60;

/// Between the questions whether a client's or an executor's machine is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

task_local! {
    /// The job that a call has made, once it has.
    static JOB: Arc<OnceLock<JobId>>;
}

type Scheduler = SchedulerServer<LogicalPlanNode, PhysicalPlanNode>;

#[derive(Debug, Args)]
pub(crate) struct SchedulerArgs {
    /// The address to listen on; 0.0.0.0 is every address of the machine
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    bind_host: String,

    /// The port to listen on; 0 takes a free one
    #[arg(short = 'p', long, value_name = "PORT", default_value_t = DEFAULT_PORT)]
    bind_port: u16,

    /// The name of this machine for others (executors report to the address of their --scheduler)
    #[arg(long, value_name = "HOST")]
    external_host: Option<String>,

    /// Serves /healthz and /readyz on a port of their own too, always without TLS; 0 takes a free one. Without
    /// it they are at --bind-port
    #[arg(long, value_name = "PORT")]
    bind_health_port: Option<u16>,

    /// Executors that /readyz waits for
    #[arg(long, value_name = "N", default_value_t = 1)]
    min_ready_executors: usize,

    /// Seconds that a query waits for a first executor before it fails
    #[arg(long, value_name = "SECONDS", default_value_t = EXECUTOR_WAIT)]
    executor_wait_seconds: u64,

    /// An executor that was not heard of for so long is lost, and its tasks run elsewhere
    #[arg(long, value_name = "SECONDS", default_value_t = EXECUTOR_TIMEOUT, value_parser = clap::value_parser!(u64).range(10..))]
    executor_timeout_seconds: u64,

    /// How often lost executors are looked for
    #[arg(long, value_name = "SECONDS", default_value_t = EXPIRY_CHECK, value_parser = clap::value_parser!(u64).range(1..))]
    expire_dead_executor_interval_seconds: u64,

    /// Seconds that running queries wait for an executor when the last one is lost
    #[arg(long, value_name = "SECONDS", default_value_t = NO_EXECUTORS)]
    no_executors_grace_period_seconds: u64,

    /// Seconds from when an executor said that it ends until what it held is computed again
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    executor_termination_grace_period: u64,

    /// Tries of a task whose input or output failed
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    task_max_failures: u64,

    /// Tries of a stage whose rows were lost with an executor
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    stage_max_failures: u64,

    /// Seconds after which executors delete the rows of a query that ended, whether its client has read them or
    /// not; a client that has read them all says so, and they are deleted then
    #[arg(long, value_name = "SECONDS", default_value_t = ROWS_KEPT)]
    finished_job_data_clean_up_interval_seconds: u64,

    /// Seconds after which the scheduler forgets a query that ended
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    finished_job_state_clean_up_interval_seconds: u64,

    /// The largest message that it takes, in bytes: a plan, with its listing
    #[arg(long, value_name = "BYTES", default_value_t = MESSAGE_BYTES as u32)]
    grpc_server_max_decoding_message_size: u32,

    /// The largest message that it sends, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = MESSAGE_BYTES as u32)]
    grpc_server_max_encoding_message_size: u32,

    /// Seconds that running queries have to end when the scheduler is asked to (Ctrl-C, SIGTERM; twice: at once)
    #[arg(long, value_name = "SECONDS", default_value_t = GRACE)]
    shutdown_grace_seconds: u64,

    #[command(flatten)]
    tls: TlsArgs,
}

impl SchedulerArgs {
    fn config(&self, port: u16) -> SchedulerConfig {
        SchedulerConfig {
            external_host: self.external_host.clone().unwrap_or_else(|| named(&self.bind_host)),
            bind_host: self.bind_host.clone(),
            bind_port: port,
            min_ready_executors: self.min_ready_executors,
            executor_timeout_seconds: self.executor_timeout_seconds,
            expire_dead_executor_interval_seconds: self.expire_dead_executor_interval_seconds,
            no_executors_grace_period_seconds: self.no_executors_grace_period_seconds,
            executor_termination_grace_period: self.executor_termination_grace_period,
            task_max_failures: self.task_max_failures as usize,
            stage_max_failures: self.stage_max_failures as usize,
            finished_job_data_clean_up_interval_seconds: self.finished_job_data_clean_up_interval_seconds,
            finished_job_state_clean_up_interval_seconds: self.finished_job_state_clean_up_interval_seconds,
            grpc_server_max_decoding_message_size: self.grpc_server_max_decoding_message_size,
            grpc_server_max_encoding_message_size: self.grpc_server_max_encoding_message_size,
            ..scheduler_config()
        }
    }
}

/// What a machine calls itself that listens on `host`.
fn named(host: &str) -> String {
    match host.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() => "localhost".to_owned(),
        _ => host.to_owned(),
    }
}

/// A configuration for [`serve`], or for Ballista's
/// [`start_server`](ballista_scheduler::scheduler_process::start_server): Pomona's codecs, functions and settings,
/// on this machine's loopback, for executors that ask for work.
pub fn scheduler_config() -> SchedulerConfig {
    SchedulerConfig {
        bind_port: DEFAULT_PORT,
        scheduling_policy: TaskSchedulingPolicy::PullStaged,
        // Not one executor full before the next one gets anything.
        task_distribution: TaskDistributionPolicy::RoundRobin,
        executor_timeout_seconds: EXECUTOR_TIMEOUT,
        expire_dead_executor_interval_seconds: EXPIRY_CHECK,
        no_executors_grace_period_seconds: NO_EXECUTORS,
        finished_job_data_clean_up_interval_seconds: ROWS_KEPT,
        job_id_generator: Some(Arc::new(JobIds)),
        grpc_server_max_decoding_message_size: MESSAGE_BYTES as u32,
        grpc_server_max_encoding_message_size: MESSAGE_BYTES as u32,
        grpc_client_max_message_size: MESSAGE_BYTES as u32,
        override_config_producer: Some(Arc::new(|| {
            base_config().with_option_extension(PomonaOptions::default())
        })),
        override_session_builder: Some(Arc::new(state)),
        override_physical_codec: Some(codec::physical_codec("the scheduler")),
        ..SchedulerConfig::default()
    }
}

/// Runs a scheduler behind `listener`, with TLS if there are certificates, until `stop` and the end of its queries, which
/// have 25 seconds then.
///
/// Unlike Ballista's `start_server` it refuses queries that no executor asks for, cancels those whose client has left,
/// and counts rows once where an executor is lost and a stage runs again.
///
/// # Errors
/// Where the configuration or the certificates cannot be used.
pub async fn serve(
    config: SchedulerConfig,
    listener: TcpListener,
    tls: Option<&TlsFiles>,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    session::register_models()?;
    let tls = tls.map(TlsFiles::load).transpose()?;
    let serving = Serving::start(config, Duration::from_secs(EXECUTOR_WAIT), listener, tls.as_ref()).await?;
    serving.until(stop, Duration::from_secs(GRACE)).await
}

/// Names jobs, and tells the call that brought one its name.
struct JobIds;

#[async_trait]
impl JobIdGenerator for JobIds {
    async fn next_id(&self) -> String {
        let id = new_instance_id();
        JOB.try_with(|job| job.set(JobId::from(id.clone())).ok()).ok();
        id
    }
}

/// The session that a plan is decoded in. It runs nothing.
fn state(config: SessionConfig) -> Result<SessionState> {
    let runtime = session::runtime(Arc::new(PomonaStores::new()), Arc::new(MemoryBudget::default()));
    let mut builder = SessionStateBuilder::new_with_default_features()
        .with_config(config)
        .with_runtime_env(runtime.build_arc()?);
    builder
        .scalar_functions()
        .get_or_insert_default()
        .extend(pomona_udfs::scalar_functions());
    builder
        .aggregate_functions()
        .get_or_insert_default()
        .extend(pomona_udfs::aggregate_functions());
    Ok(builder.build())
}

/// Runs a scheduler until the process is asked to end. `say` tells the person where it listens.
///
/// # Errors
/// Where its address or the files of TLS cannot be used.
pub(crate) async fn run(args: SchedulerArgs, say: &dyn Fn(&str)) -> Result<()> {
    session::register_models()?;
    let (listener, address) = health::listen(&args.bind_host, args.bind_port, "--bind-port").await?;
    let health = match args.bind_health_port {
        Some(port) => Some(health::listen(&args.bind_host, port, "--bind-health-port").await?),
        None => None,
    };
    let config = args.config(address.port());
    let wait = Duration::from_secs(args.executor_wait_seconds);
    let grace = Duration::from_secs(args.shutdown_grace_seconds);
    let tls = args.tls.files().map(|files| files.load()).transpose()?;
    let server = Serving::start(config, wait, listener, tls.as_ref()).await?;

    let mut told = format!("pomona scheduler listens on {address}");
    let _health = health.map(|(listener, address)| {
        told.push_str(&format!(" (health: {address})"));
        SpawnedTask::spawn(health::serve(listener, server.gate.routes()))
    });
    say(&told);
    if let Some(warning) = health::exposure(address, tls.is_some()) {
        say(warning);
    }
    server.until(health::asked_to_end(), grace).await
}

/// A scheduler that serves.
pub(crate) struct Serving {
    gate: Arc<Gate>,
    /// Ends the server; connections close when their calls have ended.
    end: oneshot::Sender<()>,
    served: SpawnedTask<Result<()>>,
}

impl Serving {
    /// Starts a scheduler behind `listener`. A query waits up to `wait` for an executor.
    pub(crate) async fn start(
        config: SchedulerConfig,
        wait: Duration,
        listener: TcpListener,
        tls: Option<&Tls>,
    ) -> Result<Self> {
        let address = config.scheduler_endpoint();
        let failed = |cause: String| exec_datafusion_err!("the scheduler at {address} cannot start: {cause}");
        let (decoded, encoded) = (
            config.grpc_server_max_decoding_message_size as usize,
            config.grpc_server_max_encoding_message_size as usize,
        );
        config.validate().map_err(|e| failed(e.to_string()))?;
        let cluster = BallistaCluster::new_from_config(&config)
            .await
            .map_err(|e| failed(e.to_string()))?;
        let scheduler: Scheduler = create_scheduler(cluster, with_tls(config, tls))
            .await
            .map_err(|e| failed(e.to_string()))?;

        let service = SchedulerGrpcServer::new(scheduler.clone())
            .max_decoding_message_size(decoded)
            .max_encoding_message_size(encoded);
        let gate = Arc::new(Gate {
            scheduler,
            wait,
            address: address.clone(),
            ending: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
        });
        let routes = Routes::new(service)
            .into_axum_router()
            .merge(gate.routes())
            .layer(middleware::from_fn_with_state(Arc::clone(&gate), admit));
        // Liveness is asked for over HTTP/1.
        let mut server = Server::builder()
            .accept_http1(true)
            .http2_keepalive_interval(Some(KEEP_ALIVE));
        if let Some(tls) = tls {
            server = server.tls_config(tls.server()?).map_err(|e| failed(cause(&e)))?;
        }
        let (end, ended) = oneshot::channel::<()>();
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let serving = server
            .add_routes(Routes::from(routes))
            .serve_with_incoming_shutdown(incoming, async {
                ended.await.ok();
            });
        let served = SpawnedTask::spawn(async move {
            serving
                .await
                .map_err(|e| exec_datafusion_err!("the scheduler at {address} stopped: {}", cause(&e)))
        });
        Ok(Self { gate, end, served })
    }

    /// Serves until `stop`; then takes no more queries, and gives the running ones up to `grace`, or until the
    /// process is asked to end once more.
    pub(crate) async fn until(self, stop: impl Future<Output = ()>, grace: Duration) -> Result<()> {
        let Self { gate, end, mut served } = self;
        let drained = async {
            stop.await;
            gate.ending.store(true, Ordering::Release);
            let deadline = Instant::now() + grace;
            let jobs_end = async {
                let scheduler = &gate.scheduler;
                if scheduler.running_job_number() + scheduler.pending_job_number() > 0 {
                    log::warn!("the scheduler ends as soon as its queries have ended");
                    while scheduler.running_job_number() + scheduler.pending_job_number() > 0 {
                        sleep(LOOK).await;
                    }
                    sleep(LAST_QUESTIONS).await;
                }
            };
            tokio::select! {
                () = jobs_end => {}
                () = sleep_until(deadline) => log::warn!("the scheduler ends, and with it the queries that still run"),
                () = health::asked_to_end() => {}
            }
        };
        tokio::select! {
            served = served.join_unwind_mut() => {
                return served.unwrap_or_else(|e| Err(exec_datafusion_err!("the scheduler was stopped: {e}")));
            }
            () = drained => {}
        }
        end.send(()).ok();
        tokio::time::timeout(CLOSING, served.join_unwind_mut()).await.ok();
        Ok(())
    }
}

/// What goes from the scheduler to an executor (an end of a task) goes the same way.
fn with_tls(config: SchedulerConfig, tls: Option<&Tls>) -> Arc<SchedulerConfig> {
    Arc::new(match tls {
        Some(tls) => config
            .with_use_tls(true)
            .with_override_create_grpc_client_endpoint(tls.endpoint_override()),
        None => config,
    })
}

/// Decides which queries are taken.
struct Gate {
    scheduler: Scheduler,
    /// For a first executor.
    wait: Duration,
    address: String,
    ending: AtomicBool,
    /// Queries that wait for a first executor.
    waiting: AtomicUsize,
}

/// A query that waits.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Gate {
    /// Health, and `/tasks`, which tells an autoscaler how much there is to do.
    fn routes(self: &Arc<Self>) -> Router {
        let gate = Arc::clone(self);
        let tasks = move || {
            let gate = Arc::clone(&gate);
            async move { format!("{{\"tasks\":{}}}\n", gate.tasks().await) }
        };
        health::routes(self.ready()).route("/tasks", get(tasks))
    }

    /// The tasks that run or could, and one for each query that waits for a first executor.
    async fn tasks(&self) -> usize {
        let mut tasks = self.waiting.load(Ordering::Acquire);
        for job in self.scheduler.state.task_manager.get_running_job_cache().values() {
            let graph = job.execution_graph.read().await;
            tasks += graph.available_tasks() + graph.running_tasks().len();
        }
        tasks
    }

    fn ready(self: &Arc<Self>) -> Ready {
        let gate = Arc::clone(self);
        Arc::new(move || {
            if gate.ending.load(Ordering::Acquire) {
                return Err("it is ending".to_owned());
            }
            match gate.scheduler.is_ready() {
                true => Ok(()),
                false => Err("it waits for executors".to_owned()),
            }
        })
    }

    /// Without an executor a query would wait for ever.
    async fn open(&self) -> Result<(), Status> {
        let deadline = Instant::now() + self.wait;
        let _waiting = Waiting::new(&self.waiting);
        loop {
            if self.ending.load(Ordering::Acquire) {
                return Err(Status::unavailable(
                    "it is ending and takes no more queries: run it again when it is back",
                ));
            }
            if self.has_executor().await {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Status::failed_precondition(format!(
                    "no executor asked it for work within {} s: start one (pomona executor --scheduler {})",
                    self.wait.as_secs(),
                    self.address
                )));
            }
            sleep(LOOK).await;
        }
    }

    /// Cancels a job, if it still runs.
    async fn cancel(&self, job: JobId) {
        let manager = &self.scheduler.state.task_manager;
        loop {
            let status = manager.get_job_status(&job).await.ok().flatten();
            let status = status.and_then(|status| status.status);
            if !matches!(
                status,
                Some(job_status::Status::Queued(_) | job_status::Status::Running(_))
            ) {
                return;
            }
            // Before it is there nothing can be cancelled.
            if manager.get_running_job_cache().contains_key(&job) {
                break;
            }
            sleep(LOOK).await;
        }
        log::info!("the client of job {job} has left: it is cancelled");
        if let Err(error) = self.scheduler.cancel_job(job).await {
            log::warn!("a job cannot be cancelled: {error}");
        }
    }

    /// Has what is left of stages that are to run again computed again. Where a stage's input goes with a lost
    /// executor, all of its tasks run again, and the rows that they have already left on other executors stay in the
    /// list of the next stage (Ballista 55), where they would count twice. So these executors are lost to the query.
    ///
    /// Tasks are given in answers to executors, and what they give back comes with their questions. Between the loss
    /// and the first of these rows there is a question, at which this is called.
    async fn drop_stale_rows(&self) {
        let manager = &self.scheduler.state.task_manager;
        let mut cancelled = vec![];
        for (job, info) in manager.get_running_job_cache().iter() {
            if holders_of_stale_rows(&*info.execution_graph.read().await).is_empty() {
                continue;
            }
            let mut graph = info.execution_graph.write().await;
            for executor in holders_of_stale_rows(&graph) {
                log::warn!("rows of job {job} on executor '{executor}' are computed again: their stage runs again");
                match graph.reset_stages_on_lost_executor(&executor) {
                    Ok((_, tasks)) => cancelled.extend(tasks),
                    Err(error) => graph.fail_job(format!("the rows that executors have cannot be counted: {error}")),
                }
            }
        }
        if cancelled.is_empty() {
            return;
        }
        if let Err(error) = self
            .scheduler
            .state
            .executor_manager
            .cancel_running_tasks(cancelled)
            .await
        {
            log::warn!("tasks whose rows nobody needs run on: {error}");
        }
    }

    async fn has_executor(&self) -> bool {
        let state = &self.scheduler.state;
        let alive = Duration::from_secs(get_time_before(state.config.executor_timeout_seconds));
        let executors = state.executor_manager.get_executors_state().await.unwrap_or_default();
        executors
            .iter()
            .any(|(_, heard, _)| heard.is_some_and(|heard| heard > alive))
    }
}

/// The executors with rows in the list of a stage, of a stage before it that is to run again as a whole.
fn holders_of_stale_rows(graph: &ExecutionGraphBox) -> BTreeSet<String> {
    let stages = graph.stages();
    let mut holders = BTreeSet::new();
    for (id, stage) in stages {
        let next = match stage {
            ExecutionStage::UnResolved(stage) => &stage.output_links,
            ExecutionStage::Resolved(stage) => &stage.output_links,
            _ => continue,
        };
        for stage in next.iter().filter_map(|id| stages.get(id)) {
            if let ExecutionStage::UnResolved(stage) = stage
                && let Some(rows) = stage.inputs.get(id)
            {
                let rows = rows.partition_locations.values().flatten();
                holders.extend(rows.map(|rows| rows.executor_meta.id.clone()));
            }
        }
    }
    holders
}

/// Passes a call on, unless it comes from another version, with the address that it came from, where the
/// scheduler looks for that of an executor that does not know its own.
async fn admit(State(gate): State<Arc<Gate>>, mut request: Request, next: Next) -> Response {
    if let Some(theirs) = request
        .headers()
        .get(VERSION_HEADER)
        .filter(|theirs| *theirs != VERSION)
    {
        let theirs = String::from_utf8_lossy(theirs.as_bytes());
        return Status::failed_precondition(format!(
            "it runs Pomona {VERSION}, and who asked it {theirs}: run the same version everywhere"
        ))
        .into_http::<Body>();
    }
    let path = request.uri().path();
    let is_followed = path == FOLLOWED;
    if path == WORK {
        gate.drop_stale_rows().await;
    }
    if (is_followed || path == SUBMITTED)
        && let Err(status) = gate.open().await
    {
        return status.into_http::<Body>();
    }
    let peer = request
        .extensions()
        .get::<TcpConnectInfo>()
        .and_then(|c| c.remote_addr());
    if let Some(peer) = peer {
        // What comes over IPv4 to a socket for both has an address of IPv6 that executors cannot use.
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        request.extensions_mut().insert(ConnectInfo(peer));
    }
    if !is_followed {
        return next.run(request).await;
    }
    let attended = Attended {
        gate,
        job: Arc::default(),
    };
    let response = JOB.scope(Arc::clone(&attended.job), next.run(request)).await;
    // The client reads the news of its job for as long as it wants its rows.
    response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _ = &attended;
            frame
        }))
    })
}

/// A job that somebody waits for. When nobody does any more (Ctrl-C, a process or a machine that is gone), it is
/// cancelled.
struct Attended {
    gate: Arc<Gate>,
    job: Arc<OnceLock<JobId>>,
}

impl Drop for Attended {
    fn drop(&mut self) {
        if let (Some(job), Ok(runtime)) = (self.job.get().cloned(), Handle::try_current()) {
            let gate = Arc::clone(&self.gate);
            drop(runtime.spawn(async move { gate.cancel(job).await }));
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use ballista_core::serde::protobuf::scheduler_grpc_client::SchedulerGrpcClient;
    use ballista_core::serde::protobuf::{ExecuteQueryParams, PollWorkParams};
    use clap::Parser;
    use datafusion::execution::FunctionRegistry;
    use tonic::metadata::MetadataMap;

    use super::*;

    #[derive(Debug, Parser)]
    struct CommandLine {
        #[command(flatten)]
        args: SchedulerArgs,
    }

    fn parse(args: &[&str]) -> Result<SchedulerArgs, String> {
        CommandLine::try_parse_from([&["scheduler"][..], args].concat())
            .map(|line| line.args)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_stay_on_this_machine_and_find_what_is_lost_soon() {
        let config = parse(&[]).unwrap().config(DEFAULT_PORT);
        assert_eq!((config.bind_host.as_str(), config.bind_port), ("127.0.0.1", 50050));
        assert_eq!(config.scheduler_endpoint(), "127.0.0.1:50050");
        assert_eq!(config.executor_timeout_seconds, 20);
        assert_eq!(config.grpc_server_max_decoding_message_size as usize, MESSAGE_BYTES);
        assert!(!config.is_push_staged_scheduling());
    }

    #[test]
    fn arguments_reach_the_configuration_and_wrong_ones_are_refused() {
        let args = parse(&[
            "-p",
            "0",
            "--executor-timeout-seconds",
            "60",
            "--task-max-failures",
            "2",
        ])
        .unwrap();
        let config = args.config(4711);
        assert_eq!((config.bind_port, config.executor_timeout_seconds), (4711, 60));
        assert_eq!(config.task_max_failures, 2);
        for (wrong, named) in [
            (["--bind-port", "65536"], "--bind-port"),
            (["--executor-timeout-seconds", "1"], "--executor-timeout-seconds"),
            (["--tls-cert", "cert.pem"], "--tls-key"),
        ] {
            let error = parse(&wrong).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn the_scheduler_knows_our_functions() {
        let state = state(base_config()).unwrap();
        assert!(state.udf("embed").is_ok() && state.udaf("pca_fit").is_ok() && state.udf("make_array").is_ok());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_scheduler_without_executors_says_so_and_ends() {
        let (listener, address) = health::listen("127.0.0.1", 0, "--bind-port").await.unwrap();
        let config = parse(&[]).unwrap().config(address.port());
        let serving = Serving::start(config, Duration::ZERO, listener, None).await.unwrap();
        let refused = serving.gate.open().await.unwrap_err();
        assert!(refused.message().contains(&address.to_string()), "{refused}");
        assert!((serving.gate.ready())().is_err());
        serving
            .until(std::future::ready(()), Duration::from_secs(5))
            .await
            .unwrap();
        assert!(tokio::net::TcpStream::connect(address).await.is_err());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_program_serves_until_it_wants_no_more() {
        let (listener, address) = health::listen("127.0.0.1", 0, "--bind-port").await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = SpawnedTask::spawn(async move {
            let stop = async { stopped.await.unwrap_or_default() };
            serve(scheduler_config(), listener, None, stop).await
        });
        let mut scheduler = SchedulerGrpcClient::connect(format!("http://{address}")).await.unwrap();
        let refused = scheduler.execute_query_push(ExecuteQueryParams::default());
        assert!(refused.await.map(drop).unwrap_err().message().contains("no executor"));
        stop.send(()).unwrap();
        served.join().await.unwrap().unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_is_of_another_version_is_told_so() {
        let (listener, address) = health::listen("127.0.0.1", 0, "--bind-port").await.unwrap();
        let config = parse(&[]).unwrap().config(address.port());
        let serving = Serving::start(config, Duration::ZERO, listener, None).await.unwrap();
        let mut scheduler = SchedulerGrpcClient::connect(format!("http://{address}")).await.unwrap();
        let told = |metadata: &mut MetadataMap| {
            metadata.insert(VERSION_HEADER, "0.0.1".parse().unwrap());
        };
        let mut query = tonic::Request::new(ExecuteQueryParams::default());
        told(query.metadata_mut());
        let mut work = tonic::Request::new(PollWorkParams::default());
        told(work.metadata_mut());
        let refused = [
            scheduler.execute_query_push(query).await.map(drop).unwrap_err(),
            scheduler.poll_work(work).await.map(drop).unwrap_err(),
        ];
        for status in refused {
            let message = status.message();
            assert_eq!(status.code(), tonic::Code::FailedPrecondition);
            assert!(message.contains(VERSION) && message.contains("0.0.1"), "{message}");
        }
        drop(serving);
    }
}
