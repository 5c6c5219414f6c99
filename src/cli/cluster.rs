//! `pomona scheduler` and `pomona executor`, and the options of their clients.

use std::process::ExitCode;

use clap::Args;
use log::LevelFilter;
use tokio::runtime::Builder;

use super::print::note;
use super::{Action, CommandLine, SessionArgs, USAGE, log_to_stderr};
use crate::SessionBuilder;
use crate::cluster::tls::TlsArgs;
use crate::cluster::{executor, scheduler};

/// Where queries run.
#[derive(Debug, Args)]
pub(super) struct ClientArgs {
    /// Runs queries on a cluster: df://HOST:PORT of its scheduler, port 50050 where none is said; local:N tries one
    /// out in this process, with N tasks at the same time
    #[arg(long, value_name = "URL")]
    cluster: Option<String>,

    #[command(flatten)]
    tls: TlsArgs,
}

impl ClientArgs {
    fn is_given(&self) -> bool {
        self.cluster.is_some() || self.tls.is_given()
    }

    /// The address of the cluster.
    pub(super) fn url(&self) -> Option<String> {
        self.cluster.clone()
    }

    /// `builder`, on the cluster.
    pub(super) fn on(self, builder: SessionBuilder) -> SessionBuilder {
        let builder = match self.cluster {
            Some(url) => builder.cluster(url),
            None => builder,
        };
        match self.tls.files() {
            Some(files) => builder.cluster_tls(files),
            None => builder,
        }
    }
}

/// Runs a role until it is asked to end, and gives the exit status; the command line back where it asks for none.
pub(super) fn role(command_line: CommandLine) -> Result<ExitCode, Box<CommandLine>> {
    if !matches!(command_line.action, Some(Action::Scheduler(_) | Action::Executor(_))) {
        if command_line.cluster.cluster.is_none() && command_line.cluster.tls.is_given() {
            note("pomona: --tls-ca, --tls-cert and --tls-key are for a cluster: give --cluster too");
            return Ok(ExitCode::from(USAGE));
        }
        return Err(Box::new(command_line));
    }
    if !command_line.command.is_empty() || !command_line.file.is_empty() || command_line.cluster.is_given() {
        note("pomona: -c, -f, --cluster and its --tls-… are for queries: they do not go before scheduler and executor");
        return Ok(ExitCode::from(USAGE));
    }
    log_to_stderr(command_line.log_level.unwrap_or(LevelFilter::Warn));
    let say = |line: &str| note(line);
    let runtime = match Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            note(format_args!("pomona: cannot start threads: {error}"));
            return Ok(ExitCode::FAILURE);
        }
    };
    let SessionArgs { memory, models_dir, .. } = command_line.session;
    let ended = runtime.block_on(async {
        match command_line.action {
            Some(Action::Scheduler(args)) => scheduler::run(args, &say).await,
            Some(Action::Executor(args)) => executor::run(args.or_memory(memory), models_dir, &say).await,
            _ => Ok(()),
        }
    });
    // A task that still computes is not waited for.
    runtime.shutdown_background();
    Ok(match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note(format_args!("pomona: {}", error.strip_backtrace()));
            ExitCode::FAILURE
        }
    })
}
