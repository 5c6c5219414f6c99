//! `local:N`: a scheduler and an executor in this process, to try out what a cluster does.

use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use datafusion::common::exec_datafusion_err;
use datafusion::error::Result;
use tokio::runtime::Builder;
use tokio::sync::oneshot;

use super::executor::{WorkDir, Worker, local_config};
use super::health;
use super::scheduler::{Serving, scheduler_config};

/// The roles wait more than they work; tasks have threads of their own.
const THREADS: usize = 2;

/// For what is on this machine.
const PATIENCE: Duration = Duration::from_secs(5);

const HOST: &str = "127.0.0.1";

/// A cluster in this process. It ends when it is dropped.
pub(crate) struct LocalCluster {
    port: u16,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl LocalCluster {
    /// Starts a scheduler, and an executor that runs `vcores` tasks at the same time.
    ///
    /// # Errors
    /// Where threads cannot be started, or no port or folder can be had.
    pub(crate) fn start(vcores: usize) -> Result<Self> {
        let failed = |cause: &dyn std::fmt::Display| exec_datafusion_err!("local:{vcores} cannot be started: {cause}");
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("pomona-local")
            .enable_all()
            .build()
            .map_err(|e| failed(&e))?;
        let (stop, stopped) = oneshot::channel();
        let (told, started) = mpsc::channel();
        // A thread of its own: the caller may be one of a runtime, which must not wait for another.
        let thread = thread::Builder::new().name("pomona-local".to_owned()).spawn(move || {
            runtime.block_on(async {
                match Roles::start(vcores).await {
                    Ok((_roles, port)) => {
                        told.send(Ok(port)).ok();
                        stopped.await.ok();
                    }
                    Err(error) => {
                        told.send(Err(error)).ok();
                    }
                }
            });
            runtime.shutdown_background();
        });
        let thread = thread.map_err(|e| failed(&e))?;
        let port = started
            .recv()
            .map_err(|e| failed(&e))?
            .map_err(|e| failed(&e.strip_backtrace()))?;
        Ok(Self {
            port,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The port of the scheduler, on this machine.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.send(()).ok();
        }
        // It deletes the folder of the executor; it does not wait for tasks.
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Both roles; to drop them ends them. The folder goes last.
struct Roles {
    _executor: Worker,
    _scheduler: Serving,
    _work: WorkDir,
}

impl Roles {
    /// Both, on free ports; with that of the scheduler.
    async fn start(vcores: usize) -> Result<(Self, u16)> {
        let listen = || health::listen(HOST, 0, "local");
        let (listener, address) = listen().await?;
        let mut config = scheduler_config();
        config.bind_port = address.port();
        let scheduler = Serving::start(config, PATIENCE, listener, None).await?;
        let work = WorkDir::open(None)?;
        let config = local_config(address.port(), vcores, &work);
        let executor = Worker::start(config, listen().await?, listen().await?, &work, None, PATIENCE).await?;
        let roles = Self {
            _executor: executor,
            _scheduler: scheduler,
            _work: work,
        };
        Ok((roles, address.port()))
    }
}
