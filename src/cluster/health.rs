//! What the servers of both roles share: a socket, liveness and readiness over HTTP, the end.

use std::fmt::Display;
use std::future::pending;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use ballista_executor::terminate;
use datafusion::common::exec_datafusion_err;
use datafusion::error::Result;
use tokio::net::TcpListener;

/// Is a role ready for work? If not, why.
pub(crate) type Ready = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// `/healthz`, which answers for as long as the process can, and `/readyz`.
///
/// Liveness does not look at the other roles: to start an executor again does not help a scheduler that is
/// away.
pub(crate) fn routes(ready: Ready) -> Router {
    let readyz = move || {
        let answer = match ready() {
            Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
            Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")),
        };
        async { answer }
    };
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
}

/// Serves `routes` for ever.
pub(crate) async fn serve(listener: TcpListener, routes: Router) {
    if let Err(error) = axum::serve(listener, routes).await {
        log::error!("health is no longer served: {error}");
    }
}

/// A socket that listens, and its address; `port` 0 is any free one. `option` says where it comes from.
///
/// # Errors
/// Where it cannot be had: the address, the cause and what to do.
pub(crate) async fn listen(host: &str, port: u16, option: &str) -> Result<(TcpListener, SocketAddr)> {
    let failed = |cause: &std::io::Error| {
        let remedy = match cause.kind() {
            ErrorKind::AddrInUse => {
                format!("stop what listens there, or take another port with {option} (0: a free one)")
            }
            ErrorKind::PermissionDenied => format!("take a port from 1024 on with {option}"),
            _ => "--bind-host takes an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them".to_owned(),
        };
        exec_datafusion_err!("cannot listen on {host}:{port}: {cause}. {remedy}")
    };
    let bare = host.trim_matches(['[', ']']);
    let listener = TcpListener::bind((bare, port)).await.map_err(|e| failed(&e))?;
    let address = listener.local_addr().map_err(|e| failed(&e))?;
    Ok((listener, address))
}

/// Waits until the process is asked to end: Ctrl-C or SIGTERM.
pub(crate) async fn asked_to_end() {
    let interrupted = async {
        if tokio::signal::ctrl_c().await.is_err() {
            pending().await
        }
    };
    let terminated = async {
        if terminate::sig_term().await.is_err() {
            pending().await
        }
    };
    tokio::select! {
        () = interrupted => {}
        () = terminated => {}
    }
}

/// What somebody should know who lets a role listen beyond this machine.
pub(crate) fn exposure(address: SocketAddr, tls: bool) -> Option<&'static str> {
    match (address.ip().is_loopback(), tls) {
        (true, _) => None,
        (false, true) => Some(
            "Listening beyond this machine: whoever has a certificate of the same authority can run queries with this \
             process's credentials, and read what its user can read.",
        ),
        (false, false) => Some(
            "Listening beyond this machine, without TLS: whoever reaches this address can run queries with this \
             process's credentials, and read what its user can read.",
        ),
    }
}

/// The host, with the brackets that an IPv6 address needs in a URL.
pub(crate) fn bracketed(host: &str) -> String {
    match host.contains(':') && !host.starts_with('[') {
        true => format!("[{host}]"),
        false => host.to_owned(),
    }
}

/// `host:port`.
pub(crate) fn host_port(host: &str, port: impl Display) -> String {
    format!("{}:{port}", bracketed(host))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn status(address: SocketAddr, path: &str) -> String {
        let mut connection = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        connection.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn an_unready_role_is_alive() {
        let (listener, address) = listen("127.0.0.1", 0, "--bind-port").await.unwrap();
        let ready: Ready = Arc::new(|| Err("no executor".to_owned()));
        let server = datafusion::common::runtime::SpawnedTask::spawn(serve(listener, routes(ready)));
        assert!(status(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let answer = status(address, "/readyz").await;
        assert!(
            answer.starts_with("HTTP/1.1 503") && answer.ends_with("not ready: no executor\n"),
            "{answer}"
        );
        drop(server);
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_named() {
        let (_listener, address) = listen("127.0.0.1", 0, "--bind-port").await.unwrap();
        let error = listen("127.0.0.1", address.port(), "--bind-port").await.unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains(&address.to_string()) && error.contains("--bind-port"),
            "{error}"
        );

        // TEST-NET-2: no machine has it.
        let error = listen("198.51.100.1", 0, "--bind-port").await.unwrap_err().to_string();
        assert!(
            error.contains("198.51.100.1") && error.contains("--bind-host"),
            "{error}"
        );
    }

    #[test]
    fn what_listens_everywhere_says_so() {
        assert_eq!(exposure("127.0.0.1:1".parse().unwrap(), false), None);
        assert_eq!(exposure("[::1]:1".parse().unwrap(), false), None);
        let open = exposure("0.0.0.0:1".parse().unwrap(), false).unwrap();
        assert!(open.contains("without TLS"), "{open}");
        assert!(exposure("0.0.0.0:1".parse().unwrap(), true).is_some());
    }
}
