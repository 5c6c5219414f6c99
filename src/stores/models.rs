//! Models in object stores: `SET pomona.models_dir = 's3://bucket/models/'`.
//!
//! A model's two files are copied once into the user's cache, or where `POMONA_CACHE` says:
//!
//! ```text
//! CACHE/models/s3%3A%2F%2Fbucket%2Fmodels/resnet50/HASH/model.onnx
//!                                                      preprocessor_config.json
//!                                                      version
//!                                         .42.0.new/        being copied, or left by a process that was killed
//! ```
//!
//! A copy appears whole, under the hash of what was written, so processes may share a cache. Its `version` is
//! what the store said of the objects: as long as it says the same (two HEADs every few seconds) the copy is
//! current. A query that names the hash needs no look at the store. The cache may be deleted at any time.

use std::collections::HashMap;
use std::fmt::Display;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, mpsc};
use std::time::{Duration, Instant, SystemTime};
use std::{env, fs, io, process};

use datafusion::common::runtime::{JoinSet, SpawnedTask};
use datafusion::common::{exec_datafusion_err, exec_err, internal_datafusion_err, plan_datafusion_err, plan_err};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::object_store::ObjectStoreRegistry;
use futures::future::ready;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path as Key;
use object_store::{GetOptions, ObjectMeta, ObjectStore};
use parking_lot::Mutex;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use pomona_udfs::embed::registry::{self, CONFIG_FILE, MAX_CONFIG_BYTES, MAX_MODEL_BYTES, MODEL_FILE, RemoteModels};
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;
use url::Url;

use super::{Cause, PomonaStores, cause_of, into_datafusion, redact};

/// Where copies are kept, in place of the user's cache.
const CACHE_VARIABLE: &str = "POMONA_CACHE";

/// What the store said of the objects that a copy is of.
const VERSION_FILE: &str = "version";

/// How long what the store said is believed.
const FRESH: Duration = Duration::from_secs(3);

/// A request has 30 seconds, so large files are read in parts; some at the same time.
const PART_BYTES: u64 = 8 << 20;
const PARTS: usize = 4;

/// Whoever has more folders in one place has no models there.
const MAX_LISTED: usize = 1000;
const HEADS: usize = 16;

/// What is older was left by a process that was killed.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// What a URL is not written as in the name of a folder.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Has this process read models from URLs, with the credentials of its environment.
pub(crate) fn register() {
    static MODELS: LazyLock<Arc<ModelFolders>> = LazyLock::new(|| {
        let usual = || Some(dirs::cache_dir()?.join("pomona"));
        let cache = env::var_os(CACHE_VARIABLE).filter(|folder| !folder.is_empty());
        let cache = cache.map(PathBuf::from).or_else(usual);
        Arc::new(ModelFolders::new(PomonaStores::new(), cache, FRESH))
    });
    registry::set_remote_models(Arc::clone(&MODELS) as _);
}

/// Models that are copied from object stores.
#[derive(Debug)]
struct ModelFolders(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    stores: PomonaStores,
    cache: Option<PathBuf>,
    fresh: Duration,
    /// By the folder of their copies.
    seen: Mutex<HashMap<PathBuf, Slot>>,
}

/// Whoever comes while the store is asked waits for the answer.
type Slot = Arc<tokio::sync::Mutex<Option<Seen>>>;

/// What the store said of a model.
#[derive(Debug)]
struct Seen {
    at: Instant,
    /// The copy, if there is such a model.
    answer: Result<Option<PathBuf>, Arc<DataFusionError>>,
}

impl ModelFolders {
    fn new(stores: PomonaStores, cache: Option<PathBuf>, fresh: Duration) -> Self {
        Self(Arc::new(Inner {
            stores,
            cache,
            fresh,
            seen: Mutex::default(),
        }))
    }
}

impl RemoteModels for ModelFolders {
    fn fetch(&self, url: &str, name: &str, pin: Option<&str>) -> Result<Option<PathBuf>> {
        let model = Model::new(url, name)?;
        let copies = self.0.copies(&model)?;
        if let Some(copy) = pin.map(|pin| copies.join(pin)).filter(|copy| is_whole(copy)) {
            return Ok(Some(copy));
        }
        let (inner, pin) = (Arc::clone(&self.0), pin.map(str::to_owned));
        wait(async move { inner.current(&model, &copies, pin.as_deref()).await })?
    }

    fn list(&self, url: &str) -> Result<Vec<String>> {
        let (inner, place) = (Arc::clone(&self.0), Place::parse(url)?);
        wait(async move { inner.names(&place).await })?
    }
}

/// Runs `work` on the I/O runtime while the calling thread waits, whatever runtime that belongs to.
fn wait<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T> {
    let handle = super::io::handle()?;
    let (sender, receiver) = mpsc::sync_channel(1);
    let mut task = JoinSet::new();
    task.spawn_on(
        async move {
            let _ = sender.send(work.await);
        },
        handle,
    );
    let wait = || {
        let received = receiver.recv();
        received.map_err(|_| internal_datafusion_err!("the I/O runtime lost a task"))
    };
    // A thread of that very runtime hands its other work on, or `work` would wait for it.
    match Handle::try_current() {
        Ok(current) if current.id() == handle.id() => tokio::task::block_in_place(wait),
        _ => wait(),
    }
}

/// Runs what blocks beside the threads that do I/O.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    SpawnedTask::spawn_blocking(work)
        .join_unwind()
        .await
        .map_err(|e| DataFusionError::ExecutionJoin(Box::new(e)))?
}

/// A folder of models in an object store.
#[derive(Debug, Clone)]
struct Place {
    /// As it was written, without slashes at its end.
    url: String,
    /// 's3://bucket'
    store: Url,
    prefix: Key,
}

impl Place {
    /// Reads a URL.
    ///
    /// # Errors
    /// Where it is none, or holds what is a secret; that is not repeated.
    fn parse(url: &str) -> Result<Self> {
        let wrong = |cause: &dyn Display| plan_datafusion_err!("'{}' is no place for models: {cause}", redact(url));
        let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong(&"it is no URL"))?;
        let (authority, key) = rest.split_once('/').unwrap_or((rest, ""));
        let is_web = matches!(scheme, "http" | "https");
        let is_azure = matches!(scheme, "az" | "abfs" | "abfss");
        let is_container = is_azure && authority.split_once('@').is_some_and(|(user, _)| !user.contains(':'));
        let has_token = (is_web || is_azure) && rest.contains(['?', '#']);
        if has_token || (authority.contains('@') && !is_container) {
            return plan_err!(
                "the URL of a folder of models (pomona.models_dir) holds no user name, no password and no token: \
                 credentials come from the environment"
            );
        }
        if authority.is_empty() != (scheme == "file") {
            return Err(wrong(&"a URL is s3://bucket/models/, or file:///folder/models/"));
        }
        let key = key.trim_end_matches('/');
        let prefix = if is_web {
            Key::from_url_path(key)
        } else {
            Key::parse(key)
        };
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            store: Url::parse(&format!("{scheme}://{authority}/")).map_err(|e| wrong(&e))?,
            prefix: prefix.map_err(|e| wrong(&e))?,
        })
    }
}

/// A model in an object store.
#[derive(Debug)]
struct Model {
    place: Place,
    name: String,
}

impl Model {
    fn new(url: &str, name: &str) -> Result<Self> {
        registry::check_name(name)?;
        Ok(Self {
            place: Place::parse(url)?,
            name: name.to_owned(),
        })
    }

    fn key(&self, file: &str) -> Key {
        self.place.prefix.clone().join(self.name.as_str()).join(file)
    }

    /// An error of one of its files.
    fn broken(&self, file: &str, cause: impl Display) -> DataFusionError {
        let Self { place, name } = self;
        exec_datafusion_err!("model '{name}': {}/{name}/{file}: {cause}", place.url)
    }

    /// The store's error says what of which object, why and what to do.
    fn unreadable(&self, error: &object_store::Error) -> DataFusionError {
        exec_datafusion_err!(
            "model '{}' cannot be looked for in {}, which pomona.models_dir, --models-dir or POMONA_MODELS names: {}",
            self.name,
            self.place.url,
            into_datafusion(error).message()
        )
    }
}

impl Inner {
    /// The folder of a model's copies.
    fn copies(&self, model: &Model) -> Result<PathBuf> {
        let Some(cache) = &self.cache else {
            return exec_err!(
                "model '{}' cannot be copied to this machine: the user has no folder for caches. Name one: \
                 {CACHE_VARIABLE}=FOLDER",
                model.name
            );
        };
        let place = utf8_percent_encode(&model.place.url, ENCODED).to_string();
        Ok(cache.join("models").join(place).join(&model.name))
    }

    /// The copy of what the store has now; where `pin` is wanted, only that is believed without a look.
    async fn current(&self, model: &Model, copies: &Path, pin: Option<&str>) -> Result<Option<PathBuf>> {
        let came = Instant::now();
        let slot = Arc::clone(self.seen.lock().entry(copies.to_owned()).or_default());
        let mut seen = slot.lock().await;
        if let Some(Seen { at, answer }) = &*seen {
            match answer {
                Ok(None) if at.elapsed() < self.fresh => return Ok(None),
                Ok(Some(copy))
                    if at.elapsed() < self.fresh && is_whole(copy) && pin.is_none_or(|pin| copy.ends_with(pin)) =>
                {
                    return Ok(Some(copy.clone()));
                }
                // It was found out for all that waited.
                Err(error) if *at >= came => return Err(DataFusionError::Shared(Arc::clone(error))),
                _ => {}
            }
        }
        let answer = self.look(model, copies).await.map_err(Arc::new);
        let given = match &answer {
            Ok(copy) => Ok(copy.clone()),
            Err(error) => Err(DataFusionError::Shared(Arc::clone(error))),
        };
        let at = Instant::now();
        *seen = Some(Seen { at, answer });
        given
    }

    /// Asks the store, and copies what is new.
    async fn look(&self, model: &Model, copies: &Path) -> Result<Option<PathBuf>> {
        let store = self.stores.get_store(&model.place.store)?;
        let [network, config] = [MODEL_FILE, CONFIG_FILE].map(|file| model.key(file));
        let heads = futures::future::try_join(head(&store, &network), head(&store, &config)).await;
        let (network, config) = match heads.map_err(|e| model.unreadable(&e))? {
            (None, None) => return Ok(None),
            (Some(network), Some(config)) => (network, config),
            (network, _) => {
                let missing = if network.is_none() { MODEL_FILE } else { CONFIG_FILE };
                let cause = format!("there is no such object; a model's folder holds {MODEL_FILE} and {CONFIG_FILE}");
                return Err(model.broken(missing, cause));
            }
        };
        let version = [&network, &config].map(version).concat();
        let (known, wanted) = (copies.to_owned(), version.clone());
        if let Some(copy) = blocking(move || Ok(find(&known, &wanted))).await? {
            return Ok(Some(copy));
        }
        log::info!("copying model '{}' from {}", model.name, model.place.url);
        let parent = copies.to_owned();
        let draft = blocking(move || Draft::new(&parent)).await?;
        for (file, object, max_bytes) in [
            (MODEL_FILE, network, MAX_MODEL_BYTES),
            (CONFIG_FILE, config, MAX_CONFIG_BYTES),
        ] {
            if object.size > max_bytes {
                let cause = format!("it has {} bytes, more than {max_bytes}", object.size);
                return Err(model.broken(file, cause));
            }
            copy(&store, object, &draft.0.join(file))
                .await
                .map_err(|failure| match failure {
                    Failure::Read(error) => model.unreadable(&error),
                    Failure::Replaced => model.broken(file, "it was replaced while it was read: run the query again"),
                    Failure::Write(error) => error,
                })?;
        }
        let (name, copies) = (model.name.clone(), copies.to_owned());
        blocking(move || draft.keep(&name, &copies, &version)).await.map(Some)
    }

    /// The names of the models in a place.
    async fn names(&self, place: &Place) -> Result<Vec<String>> {
        let unreadable = |error: &object_store::Error| {
            exec_datafusion_err!("models in {}: {}", place.url, into_datafusion(error).message())
        };
        let store = self.stores.get_store(&place.store)?;
        let listed = match store.list_with_delimiter(Some(&place.prefix)).await {
            Ok(listed) => listed,
            // A web server may have models, but no list of them.
            Err(error) if cause_of(&error).0 == Cause::Unsupported => return Ok(vec![]),
            Err(error) => return Err(unreadable(&error)),
        };
        let folders = listed.common_prefixes.iter().filter_map(Key::filename);
        let models: Vec<Model> = folders.filter_map(|name| Model::new(&place.url, name).ok()).collect();
        if models.len() > MAX_LISTED {
            return exec_err!(
                "models in {}: it holds {} folders, and at most {MAX_LISTED} can be models: give them a folder of their \
                 own",
                place.url,
                models.len()
            );
        }
        stream::iter(models)
            .map(|model| {
                let store = Arc::clone(&store);
                async move {
                    let found = head(&store, &model.key(MODEL_FILE)).await?;
                    Ok::<_, object_store::Error>(found.map(|_| model.name))
                }
            })
            .buffered(HEADS)
            .try_filter_map(|name| ready(Ok(name)))
            .try_collect()
            .await
            .map_err(|error| unreadable(&error))
    }
}

/// What the store says of an object, if there is one.
async fn head(store: &Arc<dyn ObjectStore>, key: &Key) -> object_store::Result<Option<ObjectMeta>> {
    match store.get_opts(key, GetOptions::new().with_head(true)).await {
        Ok(object) => Ok(Some(object.meta)),
        Err(error) if cause_of(&error).0 == Cause::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What changes when an object is replaced, on one line.
fn version(object: &ObjectMeta) -> String {
    let (size, modified) = (object.size, object.last_modified.timestamp_micros());
    format!("{size} {modified} {:?}\n", object.e_tag)
}

/// Why an object was not copied.
#[derive(Debug)]
enum Failure {
    Read(object_store::Error),
    Replaced,
    Write(DataFusionError),
}

/// Copies an object of that size and version to a new file.
async fn copy(store: &Arc<dyn ObjectStore>, object: ObjectMeta, target: &Path) -> Result<(), Failure> {
    let failed = |e| Failure::Write(unwritable(target, &e));
    let mut file = tokio::fs::File::create_new(target).await.map_err(failed)?;
    // An empty object is a part, too.
    let starts: Vec<u64> = (0..object.size.div_ceil(PART_BYTES).max(1))
        .map(|part| part * PART_BYTES)
        .collect();
    let mut parts = stream::iter(starts)
        .map(|start| part(Arc::clone(store), object.clone(), start))
        .buffered(PARTS);
    while let Some(part) = parts.try_next().await? {
        file.write_all(&part).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    // A copy is renamed to what it is: after a power failure it must not be there without its bytes.
    file.sync_all().await.map_err(failed)
}

/// The part of an object from `start` on.
async fn part(store: Arc<dyn ObjectStore>, object: ObjectMeta, start: u64) -> Result<Vec<u8>, Failure> {
    let end = object.size.min(start + PART_BYTES);
    let mut options = GetOptions::new();
    // Not all web servers know ranges.
    if (start, end) != (0, object.size) {
        options = options.with_range(Some(start..end));
    }
    let got = store.get_opts(&object.location, options).await.map_err(Failure::Read)?;
    let length = (end - start) as usize;
    if version(&got.meta) != version(&object) {
        return Err(Failure::Replaced);
    }
    let mut body = got.into_stream();
    let mut bytes = Vec::with_capacity(length);
    while let Some(chunk) = body.try_next().await.map_err(Failure::Read)? {
        // A server may send more than it said.
        if chunk.len() > length - bytes.len() {
            return Err(Failure::Replaced);
        }
        bytes.extend_from_slice(&chunk);
    }
    match bytes.len() == length {
        true => Ok(bytes),
        false => Err(Failure::Replaced),
    }
}

/// Is this a whole copy of a model?
fn is_whole(copy: &Path) -> bool {
    [MODEL_FILE, CONFIG_FILE].iter().all(|file| copy.join(file).is_file())
}

/// The copy of this version among all.
fn find(copies: &Path, version: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(copies).ok()?.flatten();
    entries
        .filter(|entry| !is_draft(entry))
        .map(|entry| entry.path())
        .find(|copy| is_whole(copy) && fs::read(copy.join(VERSION_FILE)).is_ok_and(|held| held == version.as_bytes()))
}

fn is_draft(entry: &fs::DirEntry) -> bool {
    entry.file_name().as_encoded_bytes().starts_with(b".")
}

fn unwritable(path: &Path, cause: &io::Error) -> DataFusionError {
    exec_datafusion_err!(
        "{}: the copy of a model cannot be written: {cause}. To keep copies elsewhere: {CACHE_VARIABLE}=FOLDER",
        path.display()
    )
}

/// A copy that is being written; it is removed unless it is kept.
#[derive(Debug)]
struct Draft(PathBuf);

impl Draft {
    /// A new folder among the copies, without those that were left there.
    fn new(copies: &Path) -> Result<Self> {
        let failed = |e| unwritable(copies, &e);
        fs::create_dir_all(copies).map_err(failed)?;
        for entry in fs::read_dir(copies).map_err(failed)?.flatten().filter(is_draft) {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let age = |at| SystemTime::now().duration_since(at).ok();
            if modified.ok().and_then(age).is_some_and(|age| age > ABANDONED) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        // Processes of other machines may have this one's id.
        for number in 0..10_000 {
            let folder = copies.join(format!(".{}.{number}.new", process::id()));
            match fs::create_dir(&folder) {
                Ok(()) => return Ok(Self(folder)),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(failed(e)),
            }
        }
        exec_err!("{} is full of unfinished copies: delete it", copies.display())
    }

    /// Moves the copy to where its hash says.
    fn keep(self, name: &str, copies: &Path, version: &str) -> Result<PathBuf> {
        let failed = |e| unwritable(&self.0, &e);
        let note = self.0.join(VERSION_FILE);
        fs::write(&note, version).map_err(failed)?;
        let kept = copies.join(registry::hash_of(name, &self.0)?);
        if fs::rename(&self.0, &kept).is_ok() {
            return Ok(kept);
        }
        if is_whole(&kept) {
            // These bytes are there, from another process or another version of the objects.
            fs::rename(&note, kept.join(VERSION_FILE)).map_err(failed)?;
            return Ok(kept);
        }
        // Somebody took files out of it.
        fs::remove_dir_all(&kept).map_err(failed)?;
        fs::rename(&self.0, &kept).map_err(failed)?;
        Ok(kept)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // What cannot be removed is no copy, and goes with the next.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use object_store::memory::InMemory;
    use object_store::{ObjectStoreExt, PutPayload};

    use super::*;

    const URL: &str = "s3://bucket/my models/";

    struct World {
        store: Arc<InMemory>,
        cache: tempfile::TempDir,
    }

    impl World {
        fn new() -> Self {
            Self {
                store: Arc::default(),
                cache: tempfile::tempdir().unwrap(),
            }
        }

        /// What a process has, that believes what it saw for so long.
        fn process(&self, fresh: Duration) -> ModelFolders {
            let stores = PomonaStores::new();
            stores.register_store(&Url::parse("s3://bucket").unwrap(), Arc::clone(&self.store) as _);
            ModelFolders::new(stores, Some(self.cache.path().to_owned()), fresh)
        }

        fn put(&self, key: &str, bytes: Vec<u8>) {
            let key = Key::parse(key).unwrap();
            futures::executor::block_on(self.store.put(&key, PutPayload::from(bytes))).unwrap();
        }

        fn add(&self, name: &str, network: &[u8]) {
            self.put(&format!("my models/{name}/{MODEL_FILE}"), network.to_owned());
            self.put(&format!("my models/{name}/{CONFIG_FILE}"), b"{}".to_vec());
        }

        fn remove(&self, key: &str) {
            futures::executor::block_on(self.store.delete(&Key::parse(key).unwrap())).unwrap();
        }

        /// The entries of the folder of a model's copies.
        fn copies(&self, name: &str) -> Vec<PathBuf> {
            let place = self
                .cache
                .path()
                .join("models/s3%3A%2F%2Fbucket%2Fmy%20models")
                .join(name);
            let entries = fs::read_dir(place).into_iter().flatten();
            entries.map(|entry| entry.unwrap().path()).collect()
        }
    }

    fn hash(copy: &Path) -> String {
        copy.file_name().unwrap().to_str().unwrap().to_owned()
    }

    #[test]
    fn a_model_is_copied_once_and_a_replaced_one_again() {
        let world = World::new();
        // Three parts.
        let network: Vec<u8> = (0..(PART_BYTES as usize * 2 + 5)).map(|i| (i % 251) as u8).collect();
        world.add("vgg", &network);
        let process = world.process(Duration::ZERO);
        let copy = process.fetch(URL, "vgg", None).unwrap().unwrap();
        assert_eq!(fs::read(copy.join(MODEL_FILE)).unwrap(), network);
        assert_eq!(hash(&copy), registry::hash_of("vgg", &copy).unwrap());
        assert_eq!(process.fetch(URL, "vgg", None).unwrap().unwrap(), copy);
        assert_eq!(world.copies("vgg"), std::slice::from_ref(&copy));

        // The same bytes again: only what the store says of them is new.
        let noted = fs::read(copy.join(VERSION_FILE)).unwrap();
        world.add("vgg", &network);
        assert_eq!(process.fetch(URL, "vgg", None).unwrap().unwrap(), copy);
        assert_ne!(fs::read(copy.join(VERSION_FILE)).unwrap(), noted);
        assert_eq!(world.copies("vgg"), std::slice::from_ref(&copy));

        // Other bytes: another copy, for those too who want what was there.
        world.add("vgg", b"other");
        let other = process.fetch(URL, "vgg", None).unwrap().unwrap();
        assert_eq!(fs::read(other.join(MODEL_FILE)).unwrap(), b"other");
        assert_eq!(
            process.fetch(URL, "vgg", Some(&"0".repeat(64))).unwrap().unwrap(),
            other
        );
        // The first is still here, and whole.
        assert_eq!(process.fetch(URL, "vgg", Some(&hash(&copy))).unwrap().unwrap(), copy);
        assert_eq!(registry::hash_of("vgg", &copy).unwrap(), hash(&copy));
    }

    #[test]
    fn a_copy_is_used_without_a_look_at_the_store() {
        let world = World::new();
        world.add("vgg", b"network");
        let process = world.process(Duration::from_secs(3600));
        let copy = process.fetch(URL, "vgg", None).unwrap().unwrap();
        assert_eq!(process.fetch(URL, "none", None).unwrap(), None);
        for file in [MODEL_FILE, CONFIG_FILE] {
            world.remove(&format!("my models/vgg/{file}"));
        }
        assert_eq!(process.fetch(URL, "vgg", None).unwrap().as_ref(), Some(&copy));
        // A process that has seen nothing yet.
        let process = world.process(Duration::ZERO);
        assert_eq!(
            process.fetch(URL, "vgg", Some(&hash(&copy))).unwrap().as_ref(),
            Some(&copy)
        );
        assert_eq!(process.fetch(URL, "vgg", None).unwrap(), None);
        // What was taken from the cache is copied again.
        world.add("vgg", b"network");
        fs::remove_file(copy.join(MODEL_FILE)).unwrap();
        assert_eq!(process.fetch(URL, "vgg", Some(&hash(&copy))).unwrap(), Some(copy));
    }

    #[test]
    fn processes_share_a_cache_and_a_killed_one_leaves_no_model() {
        let world = World::new();
        world.add("vgg", b"network");
        let first = world.process(Duration::ZERO).fetch(URL, "vgg", None).unwrap().unwrap();
        let copies = first.parent().unwrap().to_owned();
        fs::remove_dir_all(&first).unwrap();
        let draft = copies.join(format!(".{}.0.new", process::id()));
        fs::create_dir(&draft).unwrap();
        fs::write(draft.join(MODEL_FILE), b"netw").unwrap();

        let processes = [world.process(Duration::ZERO), world.process(Duration::ZERO)];
        let found: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|i| &processes[i % 2])
                .map(|process| scope.spawn(move || process.fetch(URL, "vgg", None).unwrap().unwrap()))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(found.iter().all(|copy| *copy == first && is_whole(copy)));
        let mut left = world.copies("vgg");
        left.sort();
        assert_eq!(left, [draft, first]);
    }

    #[test]
    fn what_is_no_model_is_an_error_and_leaves_nothing() {
        let world = World::new();
        let process = world.process(Duration::ZERO);
        world.add("large", b"network");
        let config = format!("my models/large/{CONFIG_FILE}");
        world.put(&config, vec![b' '; MAX_CONFIG_BYTES as usize + 1]);
        let error = process.fetch(URL, "large", None).unwrap_err().to_string();
        assert!(
            error.contains("1048577 bytes") && error.contains(CONFIG_FILE),
            "{error}"
        );
        assert!(world.copies("large").is_empty());
        world.remove(&config);
        let error = process.fetch(URL, "large", None).unwrap_err().to_string();
        assert!(
            error.contains("s3://bucket/my models/large/preprocessor_config.json: there is no such object"),
            "{error}"
        );
        for name in ["../large", "a/b", ".hidden", ""] {
            let error = process.fetch(URL, name, None).unwrap_err().to_string();
            assert!(error.contains("cannot name a model"), "{error}");
        }
        let blind = ModelFolders::new(PomonaStores::new(), None, FRESH);
        let error = blind.fetch(URL, "large", None).unwrap_err().to_string();
        assert!(error.contains(CACHE_VARIABLE), "{error}");
    }

    #[test]
    fn a_folder_of_this_machine_is_a_place_too() {
        let models = tempfile::tempdir().unwrap();
        let url = format!("file://{}/", models.path().display());
        for name in ["vgg", "no-model", ".hidden"] {
            fs::create_dir(models.path().join(name)).unwrap();
        }
        fs::write(models.path().join("vgg").join(MODEL_FILE), b"network").unwrap();
        fs::write(models.path().join("vgg").join(CONFIG_FILE), b"{}").unwrap();
        let process = World::new().process(FRESH);
        assert_eq!(process.list(&url).unwrap(), ["vgg"]);
        let cache = tempfile::tempdir().unwrap();
        let process = ModelFolders::new(PomonaStores::new(), Some(cache.path().to_owned()), FRESH);
        let copy = process.fetch(&url, "vgg", None).unwrap().unwrap();
        assert_eq!(fs::read(copy.join(MODEL_FILE)).unwrap(), b"network");
        assert_eq!(process.fetch(&url, "no-model", None).unwrap(), None);
    }

    #[test]
    fn every_thread_may_wait() {
        let world = World::new();
        world.add("vgg", b"network");
        let process = Arc::new(world.process(Duration::ZERO));
        // More of the runtime's own threads than there are.
        let found = futures::executor::block_on(async {
            let mut tasks = JoinSet::new();
            for _ in 0..16 {
                let process = Arc::clone(&process);
                tasks.spawn_on(
                    async move { process.fetch(URL, "vgg", None).unwrap().is_some() },
                    super::super::io::handle().unwrap(),
                );
            }
            tasks.join_all().await
        });
        assert_eq!(found, [true; 16]);
        let alone = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert!(
            alone
                .block_on(async { process.fetch(URL, "vgg", None).unwrap() })
                .is_some()
        );
    }

    #[test]
    fn a_url_holds_no_secret_and_shows_none() {
        for url in [
            "https://user:hunter2@host/models/",
            "https://host/models/?sig=hunter2",
            "https://host?sig=hunter2",
            "az://container/models?sig=hunter2",
            "s3://key:hunter2@bucket/models",
        ] {
            let error = Place::parse(url).unwrap_err().to_string();
            assert!(error.contains("credentials come from the environment"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        for url in ["s3://", "file://host/models", "models", "s3://bucket/a//b"] {
            assert!(Place::parse(url).is_err(), "{url}");
        }
        let container = Place::parse("abfss://images@acc.dfs.core.windows.net/models/").unwrap();
        assert_eq!(container.prefix.as_ref(), "models");
    }

    #[test]
    fn a_store_that_cannot_be_reached_is_named_to_all_that_wait() {
        let cache = tempfile::tempdir().unwrap();
        let process = ModelFolders::new(PomonaStores::new(), Some(cache.path().to_owned()), FRESH);
        let url = "http://127.0.0.1:9/models/";
        let error = process.fetch(url, "vgg", None).unwrap_err().to_string();
        for part in [
            "'vgg'",
            "http://127.0.0.1:9/models",
            "cannot be reached",
            "Check the address",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}
