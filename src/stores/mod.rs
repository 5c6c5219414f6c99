//! Object stores from a URL, the environment and a table's options.
//!
//! | module | what is in it |
//! |---|---|
//! | here | [`PomonaStores`], the registry: which store serves a URL |
//! | `cloud` | building a store: credentials, region, endpoint, retries |
//! | `lazy` | the store that the registry gives out: opened on first use, with errors that explain |
//! | `explain` | from a store's error to bucket, operation, cause and remedy, without secrets |
//! | `models` | models in object stores, copied to this machine |
//! | `upload` | uploads that are aborted when they are given up |
//! | `io` | the threads that do I/O, and the counting of HTTP requests |

mod cloud;
mod explain;
pub(crate) mod io;
mod lazy;
pub(crate) mod models;
mod upload;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use datafusion::common::config::ExtensionOptions;
use datafusion::common::{config_err, internal_err, plan_err};
use datafusion::error::Result;
use datafusion::execution::object_store::ObjectStoreRegistry;
use datafusion_cli::object_storage::{AwsOptions, GcpOptions};
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use parking_lot::RwLock;
use url::{Position, Url};

pub(crate) use self::explain::{Cause, cause_of, into_datafusion, redact};
use self::lazy::LazyStore;
pub use self::upload::wait_for_aborts;
use crate::sample::SampleStore;

/// The kinds of locations there are, for messages.
const LOCATIONS: &str = "s3://bucket/…, gs://bucket/…, az://container/…, abfss://container@account.dfs.core.windows.net/…, \
     https://host/… (WebDAV), file:///folder/…, a plain path, and sample://fruits/";

const CLOUD_SCHEMES: [&str; 9] = ["s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https"];

const AWS_OPTIONS: [&str; 10] = [
    "access_key_id",
    "secret_access_key",
    "session_token",
    "region",
    "endpoint",
    "allow_http",
    "skip_signature",
    "nosign",
    "oss",
    "cos",
];

const GCP_OPTIONS: [&str; 3] = [
    "service_account_path",
    "service_account_key",
    "application_credentials_path",
];

/// The stores of a session: one for every bucket, made when a URL first asks for it.
///
/// Making one needs no network and no credentials; those are looked for when it is first used.
/// A store that was registered for a URL is used for it, whatever the environment says.
#[derive(Debug, Default)]
pub struct PomonaStores {
    stores: RwLock<HashMap<String, Arc<dyn ObjectStore>>>,
    /// What statements said of stores, by their roots; executors of a cluster make the same stores of it.
    given: RwLock<HashMap<String, GivenOptions>>,
}

impl PomonaStores {
    /// A registry without stores.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers the store that `options` ask for at `url`, if they say anything of stores.
    ///
    /// # Errors
    /// As [`store_with_options`].
    pub(crate) fn grant(&self, url: &Url, options: &HashMap<String, String>) -> Result<()> {
        if let Some(store) = store_with_options(url, options)? {
            self.register_store(url, store);
            self.given.write().insert(root(url), GivenOptions::of(options));
        }
        Ok(())
    }

    /// What [`Self::grant`] was told of the store at `url`.
    #[cfg(feature = "cluster")]
    pub(crate) fn granted(&self, url: &Url) -> Option<GivenOptions> {
        self.given.read().get(&root(url)).cloned()
    }
}

/// The options of a statement that say how its store is reached; secrets are among them.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct GivenOptions(pub(crate) HashMap<String, String>);

impl GivenOptions {
    /// Those of `options` that are about stores.
    pub(crate) fn of(options: &HashMap<String, String>) -> Self {
        let about_stores = options
            .iter()
            .filter(|(key, _)| key.starts_with("aws.") || key.starts_with("gcp."));
        Self(about_stores.map(|(key, value)| (key.clone(), value.clone())).collect())
    }
}

// By hand: they hold secrets.
impl fmt::Debug for GivenOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GivenOptions").finish_non_exhaustive()
    }
}

impl ObjectStoreRegistry for PomonaStores {
    fn register_store(&self, url: &Url, store: Arc<dyn ObjectStore>) -> Option<Arc<dyn ObjectStore>> {
        let root = root(url);
        let mut stores = self.stores.write();
        // datafusion-cli registers again what it got from here.
        if let Some(held) = stores.get(&root)
            && Arc::ptr_eq(held, &store)
        {
            return Some(store);
        }
        self.given.write().remove(&root);
        let store = Arc::new(LazyStore::opened(root.clone(), store));
        stores.insert(root, store)
    }

    fn deregister_store(&self, url: &Url) -> Result<Arc<dyn ObjectStore>> {
        let root = root(url);
        match self.stores.write().remove(&root) {
            Some(store) => Ok(store),
            None => internal_err!("no store is registered for {root}"),
        }
    }

    fn get_store(&self, url: &Url) -> Result<Arc<dyn ObjectStore>> {
        let root = root(url);
        if let Some(store) = self.stores.read().get(&root) {
            return Ok(Arc::clone(store));
        }
        let store = store_of(url, StoreOptions::default())?;
        Ok(Arc::clone(self.stores.write().entry(root).or_insert(store)))
    }
}

/// The store that `options` (`aws.*`, `gcp.*`) ask for at `url`; `None` when they say nothing of
/// stores, so that the session's own serves.
///
/// # Errors
/// Options that do not exist, that are incomplete, or that do not belong to the URL's scheme.
pub fn store_with_options(url: &Url, options: &HashMap<String, String>) -> Result<Option<Arc<dyn ObjectStore>>> {
    let mut store_options = StoreOptions::default();
    let mut given = false;
    for (key, value) in options {
        match key.split_once('.') {
            Some(("aws", option)) => {
                check_option(url, key, option, &["s3", "s3a"], &AWS_OPTIONS)?;
                store_options.aws.set(key, value)?;
            }
            Some(("gcp", option)) => {
                check_option(url, key, option, &["gs", "gcs"], &GCP_OPTIONS)?;
                store_options.gcp.set(key, value)?;
            }
            _ => continue,
        }
        given = true;
    }
    if store_options.aws.access_key_id.is_some() != store_options.aws.secret_access_key.is_some() {
        return config_err!("aws.access_key_id and aws.secret_access_key are given together or not at all");
    }
    given.then(|| store_of(url, store_options)).transpose()
}

fn check_option(url: &Url, key: &str, option: &str, schemes: &[&str], known: &[&str]) -> Result<()> {
    if !known.contains(&option) {
        return config_err!("there is no option {key}; there are: {}", known.join(", "));
    }
    if !schemes.contains(&url.scheme()) {
        return config_err!(
            "the option {key} is for {}, not for {}",
            schemes.join(" and "),
            url.scheme()
        );
    }
    Ok(())
}

/// What a table's own options say of its store.
#[derive(Clone, Default)]
struct StoreOptions {
    aws: AwsOptions,
    gcp: GcpOptions,
}

// By hand: the options hold secrets.
impl fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreOptions").finish_non_exhaustive()
    }
}

fn store_of(url: &Url, options: StoreOptions) -> Result<Arc<dyn ObjectStore>> {
    let root = root(url);
    let store = match url.scheme() {
        "file" => LazyStore::opened(root, Arc::new(LocalFileSystem::new())),
        "sample" if url.host_str() == Some("fruits") => LazyStore::opened(root, Arc::new(SampleStore::new())),
        "sample" => return plan_err!("there is no sample data set {root}/; there is: sample://fruits/"),
        scheme if CLOUD_SCHEMES.contains(&scheme) => LazyStore::new(root, url.clone(), options),
        scheme => return plan_err!("{scheme}:// is no location that can be read or written; there are: {LOCATIONS}"),
    };
    Ok(Arc::new(store))
}

/// The part of a URL that says which store it is: 's3://bucket'. Never a password.
fn root(url: &Url) -> String {
    let host = &url[Position::BeforeHost..Position::AfterPort];
    match url.scheme() {
        // What is a user's name elsewhere is a container's here.
        scheme @ ("az" | "abfs" | "abfss") if !url.username().is_empty() => {
            format!("{scheme}://{}@{host}", url.username())
        }
        scheme => format!("{scheme}://{host}"),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    fn options(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn one_store_serves_a_bucket_and_a_registered_one_comes_first() {
        let stores = PomonaStores::new();
        let made = stores.get_store(&url("s3://bucket/a/b.jpg")).unwrap();
        assert!(Arc::ptr_eq(&made, &stores.get_store(&url("s3://bucket/c")).unwrap()));
        assert!(!Arc::ptr_eq(&made, &stores.get_store(&url("s3://other/")).unwrap()));

        stores.register_store(&url("s3://bucket"), Arc::new(InMemory::new()));
        let registered = stores.get_store(&url("s3://bucket/a")).unwrap();
        assert!(!Arc::ptr_eq(&made, &registered));
        // Registering what came from here wraps it no further.
        stores.register_store(&url("s3://bucket"), Arc::clone(&registered));
        assert!(Arc::ptr_eq(
            &registered,
            &stores.get_store(&url("s3://bucket/a")).unwrap()
        ));
    }

    #[test]
    fn unknown_schemes_list_the_known() {
        let error = PomonaStores::new()
            .get_store(&url("hdfs://host/x"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("s3://bucket/"), "{error}");
    }

    #[test]
    fn roots_hold_containers_but_no_passwords() {
        assert_eq!(
            root(&url("https://user:secret@host:8080/a?sig=secret")),
            "https://host:8080"
        );
        assert_eq!(
            root(&url("abfss://images@acc.dfs.core.windows.net/x")),
            "abfss://images@acc.dfs.core.windows.net"
        );
        assert_eq!(root(&url("file:///a/b")), "file://");
    }

    #[test]
    fn options_are_checked() {
        let bucket = url("s3://bucket/");
        assert!(
            store_with_options(&bucket, &options(&[("images.glob", "*")]))
                .unwrap()
                .is_none()
        );
        assert!(
            store_with_options(&bucket, &options(&[("aws.region", "eu-west-1")]))
                .unwrap()
                .is_some()
        );
        for (url, pairs) in [
            (&bucket, [("aws.regoin", "x")]),
            (&bucket, [("aws.access_key_id", "x")]),
            (&url("gs://bucket/"), [("aws.region", "x")]),
        ] {
            assert!(store_with_options(url, &options(&pairs)).is_err(), "{pairs:?}");
        }
    }
}
