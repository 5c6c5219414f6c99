//! The client's side of a cluster: submits a physical plan, follows its job, fetches its rows.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use ballista_core::client::BallistaClient;
use ballista_core::config::BallistaConfig;
use ballista_core::error::BallistaError;
use ballista_core::extension::{BallistaConfigGrpcEndpoint, EndpointOverrideFn};
use ballista_core::serde::protobuf::execute_query_params::Query;
use ballista_core::serde::protobuf::get_job_status_result::FlightProxy;
use ballista_core::serde::protobuf::job_status::Status;
use ballista_core::serde::protobuf::scheduler_grpc_client::SchedulerGrpcClient;
use ballista_core::serde::protobuf::{
    CleanJobDataParams, ExecuteQueryParams, GetJobMetricsParams, GetJobStatusParams, GetJobStatusResult, KeyValuePair,
    OperatorMetricsSet, PartitionLocation,
};
use ballista_core::utils::{GrpcClientConfig, create_grpc_client_endpoint};
use ballista_core::version;
use datafusion::common::{config_err, exec_datafusion_err, exec_err, internal_datafusion_err};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::SendableRecordBatchStream;
use datafusion::physical_plan::metrics::MetricsSet;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::prelude::SessionConfig;
use futures::{StreamExt, TryStreamExt};
use tonic::codec::Streaming;
use tonic::transport::Channel;
use url::Url;

use super::local::LocalCluster;
use super::tls::{Tls, TlsFiles, cause};
use super::written::nested_too_deeply;
use super::{DEFAULT_PORT, MESSAGE_BYTES, tell_version};
use crate::stores;

/// A scheduler that is there answers within it.
const CONNECT: Duration = Duration::from_secs(5);

/// Between the questions whether the scheduler's machine is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A plan of half a gigabyte takes a while to arrive and to be read, and a scheduler answers when there is an executor
/// (its --executor-wait-seconds). One that is gone is missed by [`KEEP_ALIVE`].
const ANSWER_SECONDS: u64 = 3600;

/// The most characters of an operator that EXPLAIN ANALYZE shows.
const MOST_SHOWN: usize = 400;

/// The tries, and the milliseconds between them, to fetch a part of the rows.
const FETCH_TRIES: u8 = 3;
const FETCH_WAIT: u64 = 500;

/// How Ballista says that a job waited in vain for another executor.
const EXECUTORS_LOST: &str = "all executors were lost";

type Scheduler = SchedulerGrpcClient<Channel>;

/// A cluster, as a client sees it.
pub(crate) struct Cluster {
    host: String,
    port: u16,
    tls: Option<Tls>,
    /// The cluster of `local:N`, which lives as long as its session.
    local: Option<LocalCluster>,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cluster").field(&self.to_string()).finish()
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "df://{}:{}", self.host, self.port)
    }
}

impl Cluster {
    /// The cluster at `url`: `df://host:port`, or `local:N`, which is started here. Nothing is asked of a
    /// scheduler yet.
    ///
    /// # Errors
    /// Where `url` is none of these, the files of TLS cannot be read, or `local:N` cannot be started.
    pub(crate) fn open(url: &str, tls: Option<&TlsFiles>) -> Result<Self> {
        if let Some(cores) = url.strip_prefix("local:") {
            let cores = match cores.parse() {
                Ok(cores @ 1..=1024) => cores,
                _ => return config_err!("--cluster {url}: local:N takes the number of cores, 1 to 1024: local:2"),
            };
            if tls.is_some() {
                return config_err!("--cluster {url} stays in this process: it takes no TLS");
            }
            let local = LocalCluster::start(cores)?;
            return Ok(Self {
                host: "127.0.0.1".to_owned(),
                port: local.port(),
                tls: None,
                local: Some(local),
            });
        }
        // A host, a port, and nothing else: no user, path or query.
        let parsed = Url::parse(url).ok().filter(|parsed| {
            parsed.scheme() == "df"
                && matches!(parsed.path(), "" | "/")
                && parsed.host_str().is_some_and(|host| {
                    let port = parsed.port().map(|port| format!(":{port}")).unwrap_or_default();
                    parsed.as_str().trim_end_matches('/') == format!("df://{host}{port}")
                })
        });
        let Some((host, port)) = parsed.as_ref().and_then(|u| Some((u.host_str()?, u.port()))) else {
            return config_err!(
                "there is no cluster '{}': it is df://host:port of a scheduler (port {DEFAULT_PORT} where none is said), \
                 or local:N",
                stores::redact(url)
            );
        };
        Ok(Self {
            host: host.to_owned(),
            port: port.unwrap_or(DEFAULT_PORT),
            tls: tls.map(TlsFiles::load).transpose()?,
            local: None,
        })
    }

    /// Is the scheduler on this machine, so that its executors are expected to see the same files?
    pub(crate) fn is_here(&self) -> bool {
        let host = self.host.trim_matches(['[', ']']);
        self.local.is_some() || host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    fn endpoint_override(&self) -> Option<EndpointOverrideFn> {
        self.tls.as_ref().map(Tls::endpoint_override)
    }

    /// A connection to the scheduler, which has answered.
    async fn connect(&self) -> Result<Scheduler> {
        let mut config = GrpcClientConfig::from(&BallistaConfig::default());
        config.connect_timeout_seconds = CONNECT.as_secs();
        config.timeout_seconds = ANSWER_SECONDS;
        config.http2_keepalive_interval_seconds = KEEP_ALIVE.as_secs();
        let url = format!("http://{}:{}", self.host, self.port);
        let mut endpoint = create_grpc_client_endpoint(url, Some(&config)).map_err(|e| self.unreachable(&cause(&e)))?;
        if let Some(customize) = self.endpoint_override() {
            endpoint = customize(endpoint).map_err(|e| self.unreachable(&e.to_string()))?;
        }
        let channel = endpoint.connect().await.map_err(|e| self.unreachable(&cause(&e)))?;
        let mut scheduler = SchedulerGrpcClient::new(channel)
            .max_encoding_message_size(MESSAGE_BYTES)
            .max_decoding_message_size(MESSAGE_BYTES);
        // What listens there may be anything: it is asked of a job that it cannot know.
        let greeting = scheduler.get_job_status(GetJobStatusParams::default());
        match tokio::time::timeout(CONNECT, greeting).await {
            Ok(Ok(_)) => Ok(scheduler),
            Ok(Err(status)) => Err(self.unreachable(&words(&status))),
            Err(_) => Err(self.unreachable(&format!("it does not answer within {} s", CONNECT.as_secs()))),
        }
    }

    fn unreachable(&self, cause: &str) -> DataFusionError {
        exec_datafusion_err!(
            "cannot reach the scheduler at {}:{}: {cause}. Is it running (pomona scheduler; port {DEFAULT_PORT} where none \
             is said), is the address that of --cluster, and do both use TLS or neither (--tls-ca, --tls-cert, \
             --tls-key), with certificates of one authority?",
            self.host,
            self.port
        )
    }

    /// Runs an encoded physical plan, whose rows have this schema.
    ///
    /// # Errors
    /// Where the scheduler cannot be reached or is lost, and what the job's executors say.
    pub(crate) async fn run(self: Arc<Self>, job: Job) -> Result<SendableRecordBatchStream> {
        let Job {
            plan,
            schema,
            session,
            settings,
            told,
        } = job;
        let mut scheduler = self.connect().await?;
        let mut request = tonic::Request::new(ExecuteQueryParams {
            query: Some(Query::PhysicalPlan(plan)),
            settings,
            session_id: session,
            operation_id: String::new(),
        });
        version::insert_version_header(request.metadata_mut());
        tell_version(request.metadata_mut());
        let answer = scheduler
            .execute_query_push(request)
            .await
            .map_err(|e| self.refused(&e))?;
        version::check_compatibility(
            Some(ballista_core::BALLISTA_VERSION),
            version::version_from_metadata(answer.metadata()),
        )
        .map_err(|cause| exec_datafusion_err!("the scheduler at {}:{}: {cause}", self.host, self.port))?;

        let Ended { job, parts, proxy } = self.follow(answer.into_inner()).await?;
        if let Some(told) = told {
            let job_id = job.clone();
            let metrics = scheduler.get_job_metrics(GetJobMetricsParams { job_id }).await;
            let stages = metrics.map_err(|e| self.lost(&words(&e)))?.into_inner().stages;
            told(describe(&stages)?);
        }
        let fetched = futures::stream::iter(parts)
            .then(move |part| Arc::clone(&self).fetch(part, proxy.clone()))
            .try_flatten();
        // Executors keep the rows no longer than anybody needs them.
        let cleaned = futures::stream::once(async move {
            if let Err(status) = scheduler
                .clean_job_data(CleanJobDataParams {
                    job_id: job,
                    remove_stage_ids: vec![],
                })
                .await
            {
                log::warn!(
                    "the rows of the query stay on their executors for now: {}",
                    words(&status)
                );
            }
        });
        let rows = fetched.chain(cleaned.filter_map(|()| async { None }));
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, rows)))
    }

    /// Waits for the end of a job. A scheduler cancels the job of a client that stops to wait.
    async fn follow(&self, mut statuses: Streaming<GetJobStatusResult>) -> Result<Ended> {
        while let Some(news) = statuses.next().await {
            let GetJobStatusResult { status, flight_proxy } = news.map_err(|e| self.lost(&words(&e)))?;
            let Some(status) = status else { continue };
            match status.status {
                Some(Status::Successful(job)) => {
                    return Ok(Ended {
                        job: status.job_id,
                        parts: latest(job.partition_location),
                        proxy: flight_proxy,
                    });
                }
                Some(Status::Failed(job)) => return Err(self.failed(&job.error)),
                Some(Status::Queued(_) | Status::Running(_)) | None => {}
            }
        }
        Err(self.lost("the connection ended before the query"))
    }

    /// The rows of one partition, from the executor that holds them.
    async fn fetch(
        self: Arc<Self>,
        part: PartitionLocation,
        proxy: Option<FlightProxy>,
    ) -> Result<SendableRecordBatchStream> {
        let layout = part.layout();
        let (Some(executor), Some(partition)) = (part.executor_meta, part.partition_id) else {
            return exec_err!("the scheduler does not say where the rows of the query are");
        };
        let port = u16::try_from(executor.port).unwrap_or_default();
        let (host, from) = match proxy {
            Some(FlightProxy::Local(true)) => (self.host.clone(), self.port),
            Some(FlightProxy::External(address)) => match address.rsplit_once(':') {
                Some((host, port)) => (host.to_owned(), port.parse().unwrap_or_default()),
                None => (address, port),
            },
            Some(FlightProxy::Local(false)) | None => (executor.host.clone(), port),
        };
        let failed = |cause: String| {
            exec_datafusion_err!(
                "the rows of the query cannot be fetched from executor '{}' ({}:{port}): {cause}. Can this machine reach \
                 that address (--external-host of the executor), is the executor still running, and has it not deleted \
                 them meanwhile (--finished-job-data-clean-up-interval-seconds of the scheduler)? Then run the query again",
                executor.id,
                executor.host
            )
        };
        let customize = self
            .endpoint_override()
            .map(|f| Arc::new(BallistaConfigGrpcEndpoint::new(f)));
        let mut client = BallistaClient::try_new(
            &host,
            from,
            MESSAGE_BYTES,
            self.tls.is_some(),
            customize,
            FETCH_TRIES,
            FETCH_WAIT,
            0,
            0,
        )
        .await
        .map_err(|e| failed(e.to_string()))?;
        client
            .fetch_partition_proxied(
                &executor.id,
                &partition.into(),
                part.file_id,
                layout,
                &executor.host,
                port,
                true,
            )
            .await
            .map_err(|e| failed(e.to_string()))
    }

    /// The scheduler did not take the plan.
    fn refused(&self, status: &tonic::Status) -> DataFusionError {
        if status.message().contains("RecursionLimitReached") {
            return nested_too_deeply();
        }
        exec_datafusion_err!(
            "the scheduler at {}:{} refused the query: {}",
            self.host,
            self.port,
            told_by_executor(&words(status))
        )
    }

    /// The job failed.
    fn failed(&self, error: &str) -> DataFusionError {
        if error.contains(EXECUTORS_LOST) {
            return exec_datafusion_err!(
                "the query needs an executor, and the scheduler at {0}:{1} has none left: {error}. Start one (pomona \
                 executor --scheduler {0}:{1}) and run the query again",
                self.host,
                self.port
            );
        }
        DataFusionError::Execution(told_by_executor(error))
    }

    fn lost(&self, cause: &str) -> DataFusionError {
        exec_datafusion_err!(
            "the scheduler at {}:{} was lost while the query ran ({cause}): what it knew of the query is gone with it. \
             Run the query again when the scheduler is back; executors find it by themselves",
            self.host,
            self.port
        )
    }
}

/// What is to be run.
pub(crate) struct Job {
    /// The physical plan.
    pub(crate) plan: Vec<u8>,
    /// What its rows look like.
    pub(crate) schema: SchemaRef,
    /// The session's id.
    pub(crate) session: String,
    pub(crate) settings: Vec<KeyValuePair>,
    /// Is told the stages that ran, with their metrics.
    pub(crate) told: Option<Box<dyn FnOnce(String) + Send>>,
}

/// The settings of a session that executors are to know, which see the files of this machine if `is_here`.
pub(crate) fn settings(config: &SessionConfig, is_here: bool) -> Vec<KeyValuePair> {
    let entries = config.options().entries().into_iter();
    entries
        .filter(|entry| match entry.key.as_str() {
            // Of this process.
            "pomona.memory_limit" | "ballista.client.use_tls" => false,
            // Folders of this machine; a URL is everybody's.
            "pomona.models_dir" => is_here || entry.value.as_deref().is_some_and(|dir| dir.contains("://")),
            _ => true,
        })
        .map(|entry| KeyValuePair {
            // The plan is as the client wants it. Where there may be more partitions, the scheduler cuts what one task
            // of it does into parts, of which then every task does all.
            value: match entry.key.as_str() {
                "datafusion.execution.target_partitions" => Some("1".to_owned()),
                "datafusion.optimizer.repartition_file_scans" => Some("false".to_owned()),
                _ => entry.value,
            },
            key: entry.key,
        })
        .collect()
}

/// A job that has ended well.
struct Ended {
    job: String,
    /// Where its rows are.
    parts: Vec<PartitionLocation>,
    proxy: Option<FlightProxy>,
}

/// Where the rows of each partition are. Those that were lost with an executor, and computed again, stand there
/// twice, the last ones last.
fn latest(parts: Vec<PartitionLocation>) -> Vec<PartitionLocation> {
    let partition = |part: &PartitionLocation| part.partition_id.as_ref().map(|id| id.partition_id);
    let mut found: BTreeMap<_, PartitionLocation> = BTreeMap::new();
    for part in parts {
        found.insert(partition(&part), part);
    }
    found.into_values().collect()
}

/// What a status says: of a connection its cause, of a server its message.
fn words(status: &tonic::Status) -> String {
    if status.source().is_some() {
        return cause(status);
    }
    match status.message() {
        "" => status.code().description().to_owned(),
        message => message.to_owned(),
    }
}

/// What an executor or a codec said, out of what Ballista wraps around it: the debug form of errors in
/// errors, `Job failed due to stage 1 failed: … DataFusionError(Execution("…"))`.
fn told_by_executor(error: &str) -> String {
    for start in ["Execution(\"", "Plan(\"", "Internal(\"", "ResourcesExhausted(\""] {
        if let Some((_, rest)) = error.rsplit_once(start)
            && let Some(told) = unescape(rest)
        {
            return told;
        }
    }
    error.to_owned()
}

/// The text up to its closing quote, of its debug form.
fn unescape(text: &str) -> Option<String> {
    let mut told = String::new();
    let mut characters = text.chars();
    loop {
        match characters.next()? {
            '"' => return Some(told),
            '\\' => match characters.next()? {
                'n' => told.push('\n'),
                't' => told.push('\t'),
                'r' => {}
                'u' => {
                    let code: String = characters.by_ref().skip(1).take_while(|c| *c != '}').collect();
                    told.extend(u32::from_str_radix(&code, 16).ok().and_then(char::from_u32));
                }
                other => told.push(other),
            },
            other => told.push(other),
        }
    }
}

/// A model that is a value of the plan has thousands of numbers.
fn abridged(operator: &str) -> String {
    let mut shown: String = operator.chars().take(MOST_SHOWN).collect();
    if shown.len() < operator.len() {
        shown.push('…');
    }
    shown
}

/// The stages of a job: its operators, their metrics.
fn describe(stages: &[ballista_core::serde::protobuf::JobStageMetrics]) -> Result<String> {
    let mut text = String::new();
    for stage in stages {
        let tasks = stage.partitions;
        write!(text, "\n  stage {}, tasks={tasks}", stage.stage_id)?;
        for operator in &stage.operators {
            let set = OperatorMetricsSet {
                metrics: operator.metrics.clone(),
            };
            let metrics: MetricsSet = set
                .try_into()
                .map_err(|e: BallistaError| internal_datafusion_err!("the metrics of a stage cannot be read: {e}"))?;
            let metrics = metrics.aggregate_by_name().sorted_for_display().timestamps_removed();
            let indent = "  ".repeat(operator.depth as usize + 2);
            let operator = abridged(operator.operator_desc.trim_end());
            write!(text, "\n{indent}{operator}, metrics=[{metrics}]")?;
        }
    }
    Ok(text)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use ballista_core::serde::protobuf::PartitionId;

    use super::*;

    #[test]
    fn addresses_are_checked() {
        let open = |url| Cluster::open(url, None);
        assert_eq!(open("df://host").unwrap().to_string(), "df://host:50050");
        assert!(open("df://127.0.0.1:1").unwrap().is_here() && open("df://localhost:1").unwrap().is_here());
        assert!(open("df://[::1]:1").unwrap().is_here() && !open("df://10.0.0.1").unwrap().is_here());
        for url in [
            "",
            "host:50050",
            "http://host",
            "df://",
            "df://host/path",
            "df://user@host",
            "df://user:password@host",
            "df://host:1?x=1",
            "df://host#x",
            "local:0",
            "local:x",
        ] {
            let error = open(url).unwrap_err().to_string();
            assert!(error.contains("local:") && !error.contains("password"), "{error}");
        }
    }

    #[test]
    fn rows_that_were_computed_again_are_taken_once() {
        let part = |partition_id, file| PartitionLocation {
            partition_id: Some(PartitionId {
                partition_id,
                ..PartitionId::default()
            }),
            file_id: Some(file),
            ..PartitionLocation::default()
        };
        let parts = latest(vec![part(1, 0), part(0, 1), part(1, 2)]);
        let taken: Vec<_> = parts
            .iter()
            .map(|part| (part.partition_id.as_ref().unwrap().partition_id, part.file_id))
            .collect();
        assert_eq!(taken, [(0, Some(1)), (1, Some(2))]);
    }

    #[test]
    fn the_executors_words_come_out_of_their_wrapping() {
        let inner = "executor 'a' (h:1): infer: \"x\"\nnext \u{7f} é";
        let debug = format!(
            "Job failed due to stage 1 failed: Task failed due to runtime execution error: {:?}",
            DataFusionError::Execution(inner.to_owned())
        );
        assert_eq!(told_by_executor(&debug), inner);
        for odd in ["", "Execution(\"open", "Execution(\"a\\", "Stage failed"] {
            assert_eq!(told_by_executor(odd), odd);
        }
    }
}
