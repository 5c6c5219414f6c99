//! The threads that do I/O, apart from those that compute: a convolution that holds a worker
//! thread must not stall what is being read or written.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use async_trait::async_trait;
use datafusion::common::runtime::JoinSet;
use datafusion::common::{exec_datafusion_err, internal_err};
use datafusion::error::{DataFusionError, Result};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, SpawnedReqwestConnector,
};
use tokio::runtime::{Builder, Handle, Runtime};

/// Moving bytes costs little; decoding and inference have the other cores.
const THREADS: usize = 2;

static RUNTIME: LazyLock<std::io::Result<Runtime>> = LazyLock::new(|| {
    Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("pomona-io")
        .enable_all()
        .build()
});

tokio::task_local! {
    /// How many HTTP requests the operation of this task has sent.
    static REQUESTS: Arc<AtomicUsize>;
}

/// The process's I/O runtime.
///
/// # Errors
/// Where its threads cannot be started.
pub(crate) fn handle() -> Result<&'static Handle> {
    match &*RUNTIME {
        Ok(runtime) => Ok(runtime.handle()),
        Err(error) => Err(exec_datafusion_err!("the threads for I/O cannot be started: {error}")),
    }
}

/// Runs `future` on the I/O runtime; dropping what is returned aborts it.
///
/// # Errors
/// Where the I/O runtime cannot be started or `future` panicked.
pub(crate) async fn run<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Result<T> {
    let mut tasks = JoinSet::new();
    tasks.spawn_on(future, handle()?);
    match tasks.join_next().await {
        Some(joined) => joined.map_err(|e| DataFusionError::ExecutionJoin(Box::new(e))),
        None => internal_err!("the I/O runtime lost a task"),
    }
}

/// Runs `future` and counts the HTTP requests that its task sends meanwhile.
pub(crate) async fn count_requests<F: Future>(future: F) -> (F::Output, usize) {
    let requests = Arc::new(AtomicUsize::new(0));
    let output = REQUESTS.scope(Arc::clone(&requests), future).await;
    (output, requests.load(Ordering::Relaxed))
}

/// Connects stores to HTTP on the I/O runtime, so that uploads too go on while the cores compute,
/// and counts requests.
#[derive(Debug)]
pub(crate) struct IoConnector;

impl HttpConnector for IoConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let handle = handle().map_err(|e| object_store::Error::Generic {
            store: "I/O",
            source: e.into(),
        })?;
        let client = SpawnedReqwestConnector::new(handle.clone()).connect(options)?;
        Ok(HttpClient::new(CountingService(client)))
    }
}

#[derive(Debug)]
struct CountingService(HttpClient);

#[async_trait]
impl HttpService for CountingService {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        // Only reading images counts; other tasks have no counter.
        let _ = REQUESTS.try_with(|requests| requests.fetch_add(1, Ordering::Relaxed));
        self.0.execute(request).await
    }
}
