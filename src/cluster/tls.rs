//! Certificates. With them each role shows who it is, and refuses whom the same authority did not sign.

use std::error::Error;
use std::fmt::{self, Display};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ballista_core::extension::EndpointOverrideFn;
use clap::Args;
use datafusion::common::{config_datafusion_err, config_err};
use datafusion::error::Result;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tonic::codegen::http::Uri;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, ServerTlsConfig};

/// Who does not answer a handshake within it is no role of ours.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What Ballista sets for the connections that fetch rows, where an endpoint is made anew.
const CONNECTION_WINDOW: u32 = 64 << 20;
const STREAM_WINDOW: u32 = 16 << 20;
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const KEEP_ALIVE_ANSWER: Duration = Duration::from_secs(20);

/// The files of TLS, as PEM.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The certificates of the authority that signed those of all roles.
    pub ca: PathBuf,
    /// The certificate of this role, followed by what leads from it to the authority's.
    pub cert: Option<PathBuf>,
    /// The private key that belongs to `cert`.
    pub key: Option<PathBuf>,
}

/// The options of TLS on a command line.
#[derive(Debug, Default, Args)]
pub(crate) struct TlsArgs {
    /// Talks over TLS: the certificates (PEM) of the authority that signed those of all roles
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,

    /// The certificate (PEM) to show to the others
    #[arg(long, value_name = "FILE", requires = "tls_ca", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The private key (PEM) of that certificate
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

impl TlsArgs {
    /// Is TLS asked for?
    pub(crate) fn is_given(&self) -> bool {
        self.tls_ca.is_some()
    }

    /// The files, where TLS is asked for.
    pub(crate) fn files(self) -> Option<TlsFiles> {
        Some(TlsFiles {
            ca: self.tls_ca?,
            cert: self.tls_cert,
            key: self.tls_key,
        })
    }
}

impl TlsFiles {
    /// Reads the files and checks that they fit together.
    ///
    /// # Errors
    /// Where a file is missing, holds no certificate or key, or the key is not that of the certificate.
    pub(crate) fn load(&self) -> Result<Tls> {
        // More than one library for it is linked in: without a choice, rustls panics.
        aws_lc_rs::default_provider().install_default().ok();

        let ca = read(&self.ca, "--tls-ca")?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&ca, &self.ca, "--tls-ca")? {
            roots.add(certificate).map_err(|e| unfit(&self.ca, "--tls-ca", &e))?;
        }
        let mut client = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&ca))
            .timeout(HANDSHAKE);
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some(identity(cert, key, roots)?),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                return config_err!("a certificate and its private key go together: give --tls-cert and --tls-key");
            }
        };
        if let Some(identity) = &identity {
            client = client.identity(identity.clone());
        }
        Ok(Tls {
            ca: Certificate::from_pem(ca),
            identity,
            client,
        })
    }
}

/// A certificate and the key that belongs to it.
fn identity(cert_file: &Path, key_file: &Path, roots: RootCertStore) -> Result<Identity> {
    let cert = read(cert_file, "--tls-cert")?;
    let key = read(key_file, "--tls-key")?;
    let chain = certificates(&cert, cert_file, "--tls-cert")?;
    let key_der = PrivateKeyDer::from_pem_slice(&key).map_err(|e| unfit(key_file, "--tls-key", &e))?;
    ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| config_datafusion_err!("TLS cannot be set up: {e}"))?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key_der)
        .map_err(|e| {
            config_datafusion_err!(
                "the private key {} (--tls-key) does not fit the certificate {} (--tls-cert): {e}",
                key_file.display(),
                cert_file.display()
            )
        })?;
    Ok(Identity::from_pem(cert, key))
}

fn read(file: &Path, option: &str) -> Result<Vec<u8>> {
    fs::read(file).map_err(|e| config_datafusion_err!("cannot read {} ({option}): {e}", file.display()))
}

fn certificates(pem: &[u8], file: &Path, option: &str) -> Result<Vec<CertificateDer<'static>>> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = parsed.map_err(|e| unfit(file, option, &e))?;
    if found.is_empty() {
        return Err(unfit(file, option, &"there is no certificate in it"));
    }
    Ok(found)
}

fn unfit(file: &Path, option: &str, cause: &dyn Display) -> datafusion::error::DataFusionError {
    config_datafusion_err!(
        "{} cannot be used for {option}: {cause}. It takes a PEM file (-----BEGIN …-----)",
        file.display()
    )
}

/// What a role needs to talk over TLS.
#[derive(Clone)]
pub(crate) struct Tls {
    ca: Certificate,
    identity: Option<Identity>,
    client: ClientTlsConfig,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

impl Tls {
    /// Makes an endpoint one of TLS. An address that starts with `https://` keeps everything else of its
    /// endpoint; of an `http://` one the request timeout is lost, which tonic tells nobody.
    pub(crate) fn endpoint_override(&self) -> EndpointOverrideFn {
        let tls = self.client.clone();
        Arc::new(move |endpoint: Endpoint| {
            let endpoint = match endpoint.uri().scheme_str() {
                Some("https") => endpoint,
                _ => over_tls(&endpoint)?,
            };
            Ok(endpoint.tls_config(tls.clone())?)
        })
    }

    /// The configuration of a server: it shows its certificate and asks for the client's.
    ///
    /// # Errors
    /// Where there is no certificate to show.
    pub(crate) fn server(&self) -> Result<ServerTlsConfig> {
        let Some(identity) = &self.identity else {
            return config_err!(
                "a scheduler and an executor show a certificate: give --tls-cert and --tls-key with --tls-ca"
            );
        };
        Ok(ServerTlsConfig::new()
            .identity(identity.clone())
            .client_ca_root(self.ca.clone())
            .timeout(HANDSHAKE))
    }
}

/// The same address over TLS.
fn over_tls(endpoint: &Endpoint) -> Result<Endpoint, Box<dyn Error + Send + Sync>> {
    let mut parts = endpoint.uri().clone().into_parts();
    parts.scheme = Some("https".parse()?);
    let made = Endpoint::from(Uri::from_parts(parts)?)
        .tcp_nodelay(true)
        .tcp_keepalive(endpoint.get_tcp_keepalive())
        .connect_timeout(endpoint.get_connect_timeout().unwrap_or(HANDSHAKE))
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_ANSWER)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_stream_window_size(STREAM_WINDOW);
    Ok(made)
}

/// The cause at the end of a chain: "connection refused", not "transport error".
pub(crate) fn cause(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    /// Self-signed, for localhost, valid until 2126; each with the key beside it.
    const CERT: &str = include_str!("../../tests/references/tls/cert.pem");
    const KEY: &str = include_str!("../../tests/references/tls/key.pem");
    const OTHER_KEY: &str = include_str!("../../tests/references/tls/other-key.pem");

    fn files(folder: &Path, cert: Option<&str>, key: Option<&str>) -> TlsFiles {
        let write = |name: &str, text: &str| {
            let file = folder.join(name);
            fs::write(&file, text).unwrap();
            file
        };
        TlsFiles {
            ca: write("ca.pem", CERT),
            cert: cert.map(|text| write("cert.pem", text)),
            key: key.map(|text| write("key.pem", text)),
        }
    }

    #[test]
    fn files_that_fit_are_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let tls = files(folder.path(), Some(CERT), Some(KEY)).load().unwrap();
        tls.server().unwrap();
        for address in ["http://localhost:50050", "https://localhost:50050"] {
            let endpoint = tls.endpoint_override()(Endpoint::from_static(address)).unwrap();
            assert_eq!(endpoint.uri().to_string(), "https://localhost:50050/");
        }
        // A client need not show one, where the server does not ask.
        let tls = files(folder.path(), None, None).load().unwrap();
        let error = tls.server().unwrap_err().to_string();
        assert!(error.contains("--tls-cert"), "{error}");
    }

    #[test]
    fn files_that_do_not_fit_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = TlsFiles {
            ca: folder.path().join("missing.pem"),
            cert: None,
            key: None,
        };
        let cases = [
            (missing, "missing.pem (--tls-ca): No such file"),
            (files(folder.path(), Some(CERT), None), "--tls-cert and --tls-key"),
            (files(folder.path(), Some("text"), Some(KEY)), "no certificate in it"),
        ];
        for (files, expected) in cases {
            let error = files.load().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        for key in [OTHER_KEY, CERT, ""] {
            let error = files(folder.path(), Some(CERT), Some(key))
                .load()
                .unwrap_err()
                .to_string();
            assert!(error.contains("key.pem") && error.contains("--tls-key"), "{error}");
            assert!(!error.contains("PRIVATE"), "{error}");
        }
    }
}
