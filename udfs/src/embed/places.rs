//! Where models are looked for: folders, and URLs of object stores.
//!
//! What reads object stores is not part of this crate: the program hands it in, see [`RemoteModels`].

use std::env;
use std::ffi::OsStr;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

use datafusion::common::plan_err;
use datafusion::error::Result;
use parking_lot::RwLock;

/// The environment's search path.
const MODELS_VARIABLE: &str = "POMONA_MODELS";

/// Reads models from URLs: `s3://bucket/models/` holds the folder of each model.
pub trait RemoteModels: Debug + Send + Sync {
    /// A folder of this machine with a copy of the two files of the model `name` below `url`; `None` where
    /// there is no such model. With `pin`, the hash of what is wanted, a copy that is here already needs no
    /// look at the store. Blocks the calling thread.
    ///
    /// The hash is checked by who asked: where the store has another model by now, its copy is returned.
    ///
    /// # Errors
    /// Where the store cannot be read: the URL, the cause and what to do, without secrets.
    fn fetch(&self, url: &str, name: &str, pin: Option<&str>) -> Result<Option<PathBuf>>;

    /// The names of the models below `url`. Blocks the calling thread.
    ///
    /// # Errors
    /// Where the store cannot be read.
    fn list(&self, url: &str) -> Result<Vec<String>>;
}

static REMOTE: RwLock<Option<Arc<dyn RemoteModels>>> = RwLock::new(None);

/// Hands in what reads models from URLs, for all of the process.
pub fn set_remote_models(remote: Arc<dyn RemoteModels>) {
    *REMOTE.write() = Some(remote);
}

/// What reads models from URLs.
///
/// # Errors
/// Where the program has handed in nothing.
pub(super) fn remote() -> Result<Arc<dyn RemoteModels>> {
    match &*REMOTE.read() {
        Some(remote) => Ok(Arc::clone(remote)),
        // The URL may hold a password: what would refuse it is not there.
        None => plan_err!(
            "pomona.models_dir or {MODELS_VARIABLE} is a URL, and this program reads models from folders only: copy the \
             models to a folder, and name that"
        ),
    }
}

static PROCESS_DIRS: RwLock<String> = RwLock::new(String::new());

/// Names the folders, or the URL, that this process looks through after `pomona.models_dir`, whatever the
/// session is: an executor's `--models-dir`.
pub fn set_process_models_dir(dirs: String) {
    *PROCESS_DIRS.write() = dirs;
}

/// The folder of the user's own models.
pub fn user_models_dir() -> Option<PathBuf> {
    Some(dirs::data_dir()?.join("pomona").join("models"))
}

/// A place that holds models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Folder(PathBuf),
    Url(String),
}

/// The places to look in, one after the other, before the program itself.
pub(super) fn search_path(models_dir: &str) -> Vec<Place> {
    let variable = env::var_os(MODELS_VARIABLE).unwrap_or_default();
    let mut places = split(models_dir.as_ref());
    places.extend(split(PROCESS_DIRS.read().as_str().as_ref()));
    places.extend(split(&variable));
    let usual = [Some(PathBuf::from("models")), user_models_dir()];
    places.extend(usual.into_iter().flatten().map(Place::Folder));
    places
}

/// What has `://` in it is one URL; anything else is folders, separated as in `PATH`.
fn split(dirs: &OsStr) -> Vec<Place> {
    match dirs.to_str() {
        Some(url) if url.contains("://") => vec![Place::Url(url.trim().to_owned())],
        _ => env::split_paths(dirs)
            .filter(|folder| !folder.as_os_str().is_empty())
            .map(Place::Folder)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_one_place_and_a_path_list_many() {
        let folder = |path: &str| Place::Folder(path.into());
        let url = |url: &str| Place::Url(url.to_owned());
        for (dirs, expected) in [
            ("", vec![]),
            ("/a", vec![folder("/a")]),
            ("s3://bucket/a:b/", vec![url("s3://bucket/a:b/")]),
            (" file:///a ", vec![url("file:///a")]),
        ] {
            assert_eq!(split(dirs.as_ref()), expected, "{dirs}");
        }
        #[cfg(unix)]
        assert_eq!(split("/a::b".as_ref()), [folder("/a"), folder("b")]);
        assert_eq!(
            search_path("s3://bucket/models").first(),
            Some(&url("s3://bucket/models"))
        );
    }
}
