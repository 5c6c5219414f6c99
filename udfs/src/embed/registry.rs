//! Models by name: where they are looked for, and the ones that are loaded.
//!
//! A model is a folder `NAME/` with `model.onnx` and `preprocessor_config.json`. Folders are looked
//! for in `pomona.models_dir`, in what [`set_process_models_dir`] names, in `POMONA_MODELS`, in
//! `./models` and in `pomona/models` of the user's data directory; then come the models that the
//! program itself holds. The first of a name counts. The first three are folders, separated as in
//! `PATH`, or one URL of an object store, from which a model is copied to this machine once.
//!
//! A name may carry the hash that the model must have, `resnet50@sha256:…` ([`pin`]): a query is
//! planned with one model and runs with no other, on whatever machine.
//!
//! Loaded models stay: all queries and partitions of a process share them.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fmt::{self, Debug, Display};
use std::fs::{self, File};
use std::hash::Hash;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::SystemTime;

use datafusion::common::{exec_datafusion_err, plan_datafusion_err, plan_err};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::human_readable_size;
use parking_lot::{Condvar, Mutex, RwLock};
use sha2::{Digest, Sha256};
use tract_onnx::pb::ModelProto;

use super::engines::{self, Engine, EngineSettings};
use super::graph::{GraphError, Output, headless, image_input};
use super::pinned;
use super::places::{Place, remote, search_path};
pub use super::places::{RemoteModels, set_process_models_dir, set_remote_models, user_models_dir};
use super::preprocess::Preprocess;
use super::protobuf::{self, ReadError};
use super::readout::Readout;
use super::strides::skip_unread;
use crate::memory::MemoryBudget;
use crate::settings::PomonaOptions;

/// The network, in a model's folder.
pub const MODEL_FILE: &str = "model.onnx";
/// Its preprocessing, in a model's folder.
pub const CONFIG_FILE: &str = "preprocessor_config.json";

/// The most bytes of a model's preprocessing.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// The most bytes of a network: a protobuf message has at most 2 GiB.
pub const MAX_MODEL_BYTES: u64 = 2 << 30;

/// A model that the program holds.
#[derive(Clone, Copy)]
struct Bundled {
    config: &'static str,
    onnx: &'static [u8],
}

impl Debug for Bundled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bundled")
            .field("onnx_bytes", &self.onnx.len())
            .finish_non_exhaustive()
    }
}

static BUNDLED: RwLock<BTreeMap<&'static str, Bundled>> = RwLock::new(BTreeMap::new());

/// Adds a model that the program holds, so that every process of the program finds it.
///
/// # Errors
/// Where the name cannot be one.
pub fn register_bundled(name: &'static str, preprocessor_config: &'static str, onnx: &'static [u8]) -> Result<()> {
    check_name(name)?;
    BUNDLED.write().insert(
        name,
        Bundled {
            config: preprocessor_config,
            onnx,
        },
    );
    Ok(())
}

/// Where the files of a model are.
#[derive(Debug, Clone)]
enum Files {
    Folder(PathBuf),
    /// A copy of what is at the URL.
    Copy {
        url: String,
        folder: PathBuf,
    },
    Program(Bundled),
}

/// Name and canonical folder, none for what the program holds.
type Identity = (String, Option<PathBuf>);

/// A model that was found, not yet loaded.
#[derive(Debug, Clone)]
pub struct ModelSource {
    name: String,
    files: Files,
    /// The hash that it must have.
    pin: Option<String>,
}

impl ModelSource {
    fn new(name: &str, files: Files) -> Self {
        Self {
            name: name.to_owned(),
            files,
            pin: None,
        }
    }

    /// The model in `folder`.
    pub(super) fn in_folder(name: &str, folder: PathBuf) -> Self {
        Self::new(name, Files::Folder(folder))
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The model's folder, its URL, or `bundled`.
    pub fn location(&self) -> String {
        match &self.files {
            Files::Folder(folder) => folder.display().to_string(),
            Files::Copy { url, .. } => url.clone(),
            Files::Program(_) => "bundled".to_owned(),
        }
    }

    /// The folder on this machine.
    fn folder(&self) -> Option<&Path> {
        match &self.files {
            Files::Folder(folder) | Files::Copy { folder, .. } => Some(folder),
            Files::Program(_) => None,
        }
    }

    /// Identifies the model among all that are loaded: two folders may hold one name.
    fn identity(&self) -> Identity {
        let folder = self
            .folder()
            .map(|folder| folder.canonicalize().unwrap_or_else(|_| folder.to_owned()));
        (self.name.clone(), folder)
    }

    /// Changes when one of the model's files does.
    fn stamp(&self) -> Stamp {
        let Some(folder) = self.folder() else {
            return [None, None];
        };
        [MODEL_FILE, CONFIG_FILE].map(|file| {
            let metadata = fs::metadata(folder.join(file)).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        })
    }

    /// The length of the network's file; 0 where there is none.
    fn bytes(&self, stamp: &Stamp) -> u64 {
        match &self.files {
            Files::Folder(_) | Files::Copy { .. } => stamp[0].map_or(0, |(_, length)| length),
            Files::Program(bundled) => bundled.onnx.len() as u64,
        }
    }

    /// An error of the model: bad set-up, whatever `pomona.on_error` says.
    fn broken(&self, file: &str, cause: impl Display) -> DataFusionError {
        let file = match &self.files {
            Files::Folder(folder) => folder.join(file).display().to_string(),
            Files::Copy { url, .. } => format!("{url}/{file}"),
            Files::Program(_) => format!("{file} (bundled)"),
        };
        plan_datafusion_err!("model '{}': {file}: {cause}", self.name)
    }

    /// Opens one of the model's files; with its length.
    fn open(&self, file: &str, max_bytes: u64) -> Result<(Box<dyn Read>, u64)> {
        let broken = |e: io::Error| match e.kind() {
            io::ErrorKind::NotFound => self.broken(
                file,
                format!(
                    "there is no such file; a model's folder holds {MODEL_FILE} and {CONFIG_FILE}, and \
                     pomona model add {} FILE.onnx --preset keras|torchvision|tf|raw writes both",
                    self.name
                ),
            ),
            _ => self.broken(file, e),
        };
        match &self.files {
            Files::Folder(folder) | Files::Copy { folder, .. } => {
                let opened = File::open(folder.join(file)).map_err(broken)?;
                let metadata = opened.metadata().map_err(broken)?;
                if !metadata.is_file() || metadata.len() > max_bytes {
                    return Err(self.broken(file, format!("it is no file of at most {max_bytes} bytes")));
                }
                // A file that grows while it is read stays bounded too.
                Ok((Box::new(opened.take(max_bytes)), metadata.len()))
            }
            Files::Program(bundled) => {
                let bytes = match file {
                    CONFIG_FILE => bundled.config.as_bytes(),
                    _ => bundled.onnx,
                };
                Ok((Box::new(bytes), bytes.len() as u64))
            }
        }
    }

    fn read_config(&self) -> Result<String> {
        let mut config = String::new();
        let (mut file, _) = self.open(CONFIG_FILE, MAX_CONFIG_BYTES)?;
        file.read_to_string(&mut config)
            .map_err(|e| self.broken(CONFIG_FILE, e))?;
        Ok(config)
    }

    /// The network, and the sha256 of its file.
    fn read_network(&self) -> Result<(ModelProto, String)> {
        let (inner, length) = self.open(MODEL_FILE, MAX_MODEL_BYTES)?;
        let mut file = Hashed {
            inner,
            sha256: Sha256::new(),
        };
        let network = usize::try_from(length)
            .map_err(io::Error::other)
            .map_err(ReadError::from)
            .and_then(|length| protobuf::read(&mut file, length))
            .map_err(|e| self.broken(MODEL_FILE, format!("it is no ONNX network, or cut off: {e}")))?;
        Ok((network, format!("{:x}", file.sha256.finalize())))
    }

    /// The model's hash, without a look at what its files hold.
    fn read_hash(&self) -> Result<String> {
        let (mut network, _) = self.open(MODEL_FILE, MAX_MODEL_BYTES)?;
        let mut sha256 = Sha256::new();
        io::copy(&mut network, &mut sha256).map_err(|e| self.broken(MODEL_FILE, e))?;
        Ok(pinned::hash(
            &format!("{:x}", sha256.finalize()),
            self.read_config()?.as_bytes(),
        ))
    }

    /// The model's hash, read once until its files change.
    fn hash(&self) -> Result<String> {
        HASHES.get_or_make(self.identity(), self.stamp(), || self.read_hash())
    }

    /// Refuses a model that is not the one that is wanted.
    fn check(&self, hash: &str) -> Result<()> {
        if let Files::Copy { folder, .. } = &self.files
            && folder
                .file_name()
                .and_then(OsStr::to_str)
                .is_some_and(|name| pinned::is_hash(name) && name != hash)
            && self.pin.as_deref().is_none_or(|pin| folder.ends_with(pin))
        {
            return plan_err!(
                "model '{}': its copy in {} is damaged, it has sha256 {hash}: delete it, and run the query again",
                self.name,
                folder.display()
            );
        }
        let Some(pin) = self.pin.as_deref().filter(|pin| *pin != hash) else {
            return Ok(());
        };
        let remedy = match &self.files {
            Files::Folder(_) => {
                "copy the same model to this node, or set pomona.models_dir to a URL that all nodes read".to_owned()
            }
            Files::Copy { .. } => "it was replaced there since: run the query again".to_owned(),
            Files::Program(_) => "run the same version of Pomona on all nodes".to_owned(),
        };
        plan_err!(
            "model '{}': {} ({MODEL_FILE} and {CONFIG_FILE}) has sha256 {hash}, the query was planned with {pin}: {remedy}",
            self.name,
            self.location()
        )
    }
}

/// A reader that computes the hash of what goes through it.
struct Hashed<R> {
    inner: R,
    sha256: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.sha256.update(&buffer[..read]);
        Ok(read)
    }
}

/// Can a model have this name? Letters, digits, `.`, `_` and `-`; it begins with a letter or a digit,
/// so that it names a folder below the search path and nothing else.
fn is_valid_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// Refuses what cannot be the name of a model.
///
/// # Errors
/// Says what a name is made of.
pub fn check_name(name: &str) -> Result<()> {
    if is_valid_name(name) {
        return Ok(());
    }
    plan_err!(
        "'{name}' cannot name a model: a name is letters, digits, '.', '_' and '-', and begins with a letter or a digit"
    )
}

/// Finds a model by its name, pinned or not; `models_dir` is the setting `pomona.models_dir`.
///
/// # Errors
/// Where there is none: the names that exist, where was looked, and how to add one. Where its hash is
/// another than that of the name. Where a URL cannot be read.
pub fn find(name: &str, models_dir: &str) -> Result<ModelSource> {
    let source = locate(name, models_dir)?;
    if source.pin.is_some() {
        source.check(&source.hash()?)?;
    }
    Ok(source)
}

/// Adds the model's hash to its name: `resnet50@sha256:…`, which no other model has on any machine. A name
/// that has a hash stays as it is, and is checked.
///
/// The hash is the sha256 of what `sha256sum model.onnx preprocessor_config.json` prints in the model's folder.
///
/// # Errors
/// As [`find`], and where the model's files cannot be read.
pub fn pin(name: &str, settings: &ModelSettings) -> Result<String> {
    let source = locate(name, &settings.models_dir)?;
    let hash = source.hash()?;
    source.check(&hash)?;
    Ok(pinned::name(&source.name, &hash))
}

/// The hash of the model in `folder`, read anew: what [`pin`] adds to its name.
///
/// # Errors
/// Where its files cannot be read.
pub fn hash_of(name: &str, folder: &Path) -> Result<String> {
    ModelSource::in_folder(name, folder.to_owned()).read_hash()
}

/// Finds a model, whose hash is not checked yet.
fn locate(name: &str, models_dir: &str) -> Result<ModelSource> {
    let (name, pin) = pinned::parse(name)?;
    let places = search_path(models_dir);
    let mut files = None;
    for place in &places {
        files = match place {
            Place::Folder(folder) => Some(folder.join(name))
                .filter(|folder| folder.is_dir())
                .map(Files::Folder),
            Place::Url(url) => remote()?.fetch(url, name, pin)?.map(|folder| Files::Copy {
                url: below(url, name),
                folder,
            }),
        };
        if files.is_some() {
            break;
        }
    }
    match files.or_else(|| BUNDLED.read().get(name).copied().map(Files::Program)) {
        Some(files) => Ok(ModelSource {
            pin: pin.map(str::to_owned),
            ..ModelSource::new(name, files)
        }),
        None => plan_err!("{}", unknown(name, &places)),
    }
}

/// The URL of the model `name` below `url`.
fn below(url: &str, name: &str) -> String {
    format!("{}/{name}", url.trim_end_matches('/'))
}

/// Tells that there is no such model, which there are, and where was looked.
fn unknown(name: &str, places: &[Place]) -> String {
    let mut known = BTreeMap::new();
    let mut looked = vec![];
    for place in places {
        let listed = listed(place);
        looked.push(match (place, &listed) {
            (Place::Folder(folder), _) if folder.is_dir() => folder.display().to_string(),
            (Place::Folder(folder), _) => format!("{} (not there)", folder.display()),
            (Place::Url(url), Ok(_)) => url.clone(),
            (Place::Url(url), Err(error)) => format!("{url} ({})", error.message()),
        });
        known.extend(listed.unwrap_or_default());
    }
    let mut known: Vec<&str> = known.keys().map(String::as_str).collect();
    let bundled = BUNDLED.read();
    known.extend(bundled.keys());
    known.sort_unstable();
    known.dedup();
    format!(
        "there is no model '{name}'. There are: {}. Looked in: {}, and in the program. To add it: \
         pomona model add {name} FILE.onnx --preset keras|torchvision|tf|raw. To look elsewhere: \
         SET pomona.models_dir = 'FOLDER', or the URL of a folder of models, which all nodes of a cluster read",
        if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        },
        looked.join(", ")
    )
}

/// A model that was listed.
#[derive(Debug, Clone)]
pub struct Listed(Found);

#[derive(Debug, Clone)]
enum Found {
    Here(ModelSource),
    /// The model of this name is below this URL, and perhaps not yet on this machine.
    Below {
        url: String,
        name: String,
    },
}

impl Listed {
    /// The model's name.
    pub fn name(&self) -> &str {
        match &self.0 {
            Found::Here(source) => source.name(),
            Found::Below { name, .. } => name,
        }
    }

    /// The model's folder, its URL, or `bundled`.
    pub fn location(&self) -> String {
        match &self.0 {
            Found::Here(source) => source.location(),
            Found::Below { url, name } => below(url, name),
        }
    }

    /// The model, which is copied to this machine if need be.
    ///
    /// # Errors
    /// Where its URL cannot be read.
    pub fn source(&self) -> Result<ModelSource> {
        match &self.0 {
            Found::Here(source) => Ok(source.clone()),
            Found::Below { url, name } => match remote()?.fetch(url, name, None)? {
                Some(folder) => Ok(ModelSource::new(
                    name,
                    Files::Copy {
                        url: self.location(),
                        folder,
                    },
                )),
                None => plan_err!("model '{name}': {} is gone", self.location()),
            },
        }
    }
}

/// All models that can be found, by name; broken ones too.
///
/// # Errors
/// Where a URL cannot be read.
pub fn list(models_dir: &str) -> Result<Vec<Listed>> {
    let mut models = BTreeMap::new();
    for place in search_path(models_dir) {
        for (name, found) in listed(&place)? {
            models.entry(name).or_insert(found);
        }
    }
    for (name, bundled) in BUNDLED.read().iter() {
        let source = || Listed(Found::Here(ModelSource::new(name, Files::Program(*bundled))));
        models.entry((*name).to_owned()).or_insert_with(source);
    }
    Ok(models.into_values().collect())
}

/// The models of one place, by name.
fn listed(place: &Place) -> Result<BTreeMap<String, Listed>> {
    let mut models = BTreeMap::new();
    match place {
        // A folder of the search path that is not there is no error: two of them are guesses.
        Place::Folder(folder) => {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let (path, name) = (entry.path(), entry.file_name());
                let Some(name) = name.to_str().filter(|name| is_valid_name(name)) else {
                    continue;
                };
                if path.join(MODEL_FILE).is_file() || path.join(CONFIG_FILE).is_file() {
                    let source = ModelSource::in_folder(name, path);
                    models.insert(name.to_owned(), Listed(Found::Here(source)));
                }
            }
        }
        Place::Url(url) => {
            for name in remote()?.list(url)? {
                let url = url.clone();
                models.insert(name.clone(), Listed(Found::Below { url, name }));
            }
        }
    }
    Ok(models)
}

/// What there is to know about a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// Its name.
    pub name: String,
    /// Columns of pixels that it takes.
    pub input_width: u32,
    /// Rows of pixels that it takes.
    pub input_height: u32,
    /// The order of the axes that it takes, `NCHW` or `NHWC`.
    pub layout: String,
    /// Length of its vector.
    pub dimensions: usize,
    /// What is done with an image before the network sees it.
    pub preprocessing: String,
    /// The engine that runs it.
    pub engine: &'static str,
    /// The hash of `model.onnx`.
    pub sha256: String,
    /// Its name with the hash of both its files: see [`pin`].
    pub pinned_name: String,
    /// Its folder, its URL, or `bundled`.
    pub location: String,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// What the session's settings say of models.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelSettings {
    /// `pomona.models_dir`: folders, or a URL, before the usual ones.
    pub models_dir: String,
    /// What runs them.
    pub engine: EngineSettings,
    /// `pomona.memory_limit`, in bytes.
    pub memory_limit: Option<usize>,
}

impl From<&PomonaOptions> for ModelSettings {
    fn from(options: &PomonaOptions) -> Self {
        Self {
            models_dir: options.models_dir.clone(),
            engine: EngineSettings {
                choice: options.engine,
                device: options.device,
            },
            memory_limit: options.memory.limit(),
        }
    }
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self::from(&PomonaOptions::default())
    }
}

/// A network that is ready to embed images.
#[derive(Debug)]
pub struct LoadedModel {
    info: ModelInfo,
    /// The hash of both its files.
    hash: String,
    preprocess: Preprocess,
    engine: Box<dyn Engine>,
    readout: Readout,
    inferred: AtomicU64,
    /// Tells the loaded models of the process apart.
    id: u64,
    running: Mutex<usize>,
    returned: Condvar,
}

impl LoadedModel {
    /// Reads, cuts, optimizes and runs a network once.
    pub(super) fn open(source: &ModelSource, output: Output, engine: EngineSettings) -> Result<Self> {
        let config = source.read_config()?;
        let (network, sha256) = source.read_network()?;
        let hash = pinned::hash(&sha256, config.as_bytes());
        source.check(&hash)?;
        let input = image_input(&network).map_err(|e| source.broken(MODEL_FILE, e))?;
        let preprocess = Preprocess::new(&config, &input).map_err(|e| source.broken(CONFIG_FILE, e))?;
        let cut = |network| {
            let mut network = headless(network, &input, output)?;
            skip_unread(&mut network.model);
            Ok::<_, GraphError>(network)
        };
        let network = cut(network).map_err(|e| source.broken(MODEL_FILE, e))?;
        let shape = input.shape(preprocess.height(), preprocess.width());
        let again = || {
            let (network, _) = source.read_network().map_err(|e| e.message().into_owned())?;
            Ok(cut(network).map_err(|e| e.to_string())?.model)
        };
        let layout = network.layout;
        let engine = engines::load(&source.name, network.model, shape, again, engine)
            .map_err(|e| source.broken(MODEL_FILE, e))?;
        let (readout, dimensions) = Readout::new(output, input.layout, layout, engine.output_shape())
            .map_err(|e| source.broken(MODEL_FILE, e))?;
        let info = ModelInfo {
            name: source.name.clone(),
            input_width: preprocess.width(),
            input_height: preprocess.height(),
            layout: input.layout.to_string(),
            dimensions,
            preprocessing: preprocess.to_string(),
            engine: engine.name(),
            sha256,
            pinned_name: pinned::name(&source.name, &hash),
            location: source.location(),
        };
        Ok(Self {
            info,
            hash,
            preprocess,
            engine,
            readout,
            inferred: AtomicU64::new(0),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            running: Mutex::new(0),
            returned: Condvar::new(),
        })
    }

    /// What there is to know about the model.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The model's preprocessing.
    pub fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    /// The length of a vector.
    pub fn dimensions(&self) -> usize {
        self.info.dimensions
    }

    /// The most rows that [`LoadedModel::infer`] takes, and with which it is fastest.
    pub fn batch_rows(&self) -> usize {
        self.engine.batch_rows()
    }

    /// How many threads may run the network, so that it stays within the session's memory; it is
    /// reserved there.
    ///
    /// # Errors
    /// Where the memory is too small even for one.
    pub fn threads(&self, memory: &MemoryBudget) -> Result<usize> {
        let cores = rayon::current_num_threads();
        memory
            .keep_model(self.id, cores, |threads| self.engine.memory(threads))
            .map_err(|e| exec_datafusion_err!("infer: model '{}': {e}", self.info.name))
    }

    /// Images that went through the network since it was loaded.
    pub fn inferred(&self) -> u64 {
        self.inferred.load(Ordering::Relaxed)
    }

    /// Embeds `rows` preprocessed images, at most [`LoadedModel::batch_rows`], one after the other in
    /// `batch`; so are the vectors. Waits while `threads` others run the network.
    ///
    /// # Errors
    /// Where the engine fails.
    pub fn infer(&self, batch: &[f32], rows: usize, threads: usize, vectors: &mut [f32]) -> Result<()> {
        let turn = self.turn(threads);
        let failed = |e| exec_datafusion_err!("infer: model '{}': {e}", self.info.name);
        if self.readout == Readout::Copy {
            self.engine.run(batch, rows, vectors).map_err(failed)?;
        } else {
            let length: usize = self.engine.output_shape().iter().product();
            let mut values = vec![0.0; rows * length];
            self.engine.run(batch, rows, &mut values).map_err(failed)?;
            drop(turn);
            let vectors = vectors.chunks_exact_mut(self.info.dimensions);
            for (values, vector) in values.chunks_exact(length).zip(vectors) {
                self.readout.apply(values, vector);
            }
        }
        self.inferred.fetch_add(rows as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Waits until fewer than `threads` run the network.
    fn turn(&self, threads: usize) -> Turn<'_> {
        let mut running = self.running.lock();
        while *running >= threads {
            self.returned.wait(&mut running);
        }
        *running += 1;
        Turn(self)
    }
}

/// One thread's turn at the network.
struct Turn<'a>(&'a LoadedModel);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.running.lock() -= 1;
        // Those that wait may allow different numbers of threads.
        self.0.returned.notify_all();
    }
}

/// Modification time and length of a model's files.
type Stamp = [Option<(SystemTime, u64)>; 2];
type Slot<V> = Arc<Mutex<Option<V>>>;

/// Values that are made once per key and remade when the key's stamp changes.
struct Cache<K, V>(Mutex<HashMap<K, (Stamp, Slot<V>)>>);

impl<K: Eq + Hash, V: Clone> Cache<K, V> {
    fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    /// Whoever comes while a value is made waits for it; other keys are not held up, and a failure
    /// is not kept.
    fn get_or_make(&self, key: K, stamp: Stamp, make: impl FnOnce() -> Result<V>) -> Result<V> {
        let slot = {
            let mut slots = self.0.lock();
            let (held, slot) = slots.entry(key).or_insert_with(|| (stamp, Slot::default()));
            if *held != stamp {
                (*held, *slot) = (stamp, Slot::default());
            }
            Arc::clone(slot)
        };
        let mut value = slot.lock();
        match &*value {
            Some(made) => Ok(made.clone()),
            None => Ok(value.insert(make()?).clone()),
        }
    }
}

static LOADED: LazyLock<Cache<(Identity, Output, EngineSettings), Arc<LoadedModel>>> = LazyLock::new(Cache::new);
static HASHES: LazyLock<Cache<Identity, String>> = LazyLock::new(Cache::new);
static DESCRIBED: LazyLock<Cache<(Identity, EngineSettings), ModelInfo>> = LazyLock::new(Cache::new);

/// The model `name`, pinned or not, ready to give `output`.
///
/// # Errors
/// Where there is no such model, it has another hash than its name says, or it is broken: its file, what is
/// wrong with it and what to do.
pub fn load(name: &str, output: Output, settings: &ModelSettings) -> Result<Arc<LoadedModel>> {
    let source = locate(name, &settings.models_dir)?;
    let stamp = source.stamp();
    let bytes = source.bytes(&stamp);
    if let Some(limit) = settings.memory_limit
        && bytes > limit as u64 * 2 / 3
    {
        // Reading it would take what the limit is to protect.
        return Err(source.broken(
            MODEL_FILE,
            format!(
                "the network has {} and takes half as much again to run, the session has {} in all: raise the limit (SET \
                 pomona.memory_limit = '…', or --memory), or take a smaller model",
                human_readable_size(usize::try_from(bytes).unwrap_or(usize::MAX)),
                human_readable_size(limit)
            ),
        ));
    }
    let key = (source.identity(), output, settings.engine);
    let model = LOADED.get_or_make(key, stamp, || {
        let model = LoadedModel::open(&source, output, settings.engine)?;
        // Who pins its name next need not read it again.
        HASHES.get_or_make(source.identity(), stamp, || Ok(model.hash.clone()))?;
        Ok(Arc::new(model))
    })?;
    source.check(&model.hash)?;
    Ok(model)
}

/// What there is to know about a model. It is run for that, but not kept in memory.
///
/// # Errors
/// Where the model is broken: its file, what is wrong with it and what to do.
pub fn describe(source: &ModelSource, engine: EngineSettings) -> Result<ModelInfo> {
    DESCRIBED.get_or_make((source.identity(), engine), source.stamp(), || {
        Ok(LoadedModel::open(source, Output::Pooled, engine)?.info)
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::networks::onnx;
    use super::*;

    const RAW: &str = r#"{"do_rescale": false, "do_normalize": false}"#;

    fn add(models: &Path, name: &str, onnx: &[u8]) {
        fs::create_dir(models.join(name)).unwrap();
        fs::write(models.join(name).join(MODEL_FILE), onnx).unwrap();
        fs::write(models.join(name).join(CONFIG_FILE), RAW).unwrap();
    }

    fn settings(models: &Path) -> ModelSettings {
        ModelSettings {
            models_dir: models.to_str().unwrap().to_owned(),
            ..ModelSettings::default()
        }
    }

    #[test]
    fn networks_of_every_topology_run() {
        let models = tempfile::tempdir().unwrap();
        let settings = settings(models.path());
        for (kind, pooled, positions) in [
            ("resnet50-keras", 256, 2 * 2),
            ("resnet50-torchvision", 256, 2 * 2),
            ("mobilenet-keras", 256, 2 * 2),
            ("squeezenet", 64, 3 * 3),
            ("vgg", 64, 16 * 16),
        ] {
            add(models.path(), kind, &onnx(kind, 8, 64));
            let embed = |output| {
                let model = load(kind, output, &settings).unwrap();
                let image: Vec<u8> = (0..64 * 64 * 3).map(|i| (i * 7 % 251) as u8).collect();
                let image = crate::image::ImageView {
                    width: 64,
                    height: 64,
                    channels: 3,
                    data: &image,
                };
                let mut batch = vec![0.0; model.preprocess().values() * 2];
                model
                    .preprocess()
                    .normalize(image, &mut batch[..model.preprocess().values()]);
                let mut vectors = vec![0.0; model.dimensions() * 2];
                for (image, vector) in batch
                    .chunks_exact(model.preprocess().values())
                    .zip(vectors.chunks_exact_mut(model.dimensions()))
                {
                    model.infer(image, 1, 1, vector).unwrap();
                }
                assert_eq!(model.inferred(), 2, "{kind}");
                assert!(vectors.iter().all(|value| value.is_finite()), "{kind}");
                vectors[..model.dimensions()].to_vec()
            };
            let (vector, map, logits) = (embed(Output::Pooled), embed(Output::Flatten), embed(Output::Logits));
            assert_eq!(
                (vector.len(), map.len(), logits.len()),
                (pooled, pooled * positions, 1000),
                "{kind}"
            );
            // Keras's maps are flattened channels last, the others channels first.
            let mean: f32 = if kind.ends_with("keras") {
                map.iter().step_by(pooled).sum()
            } else {
                map[..positions].iter().sum()
            };
            let mean = mean / positions as f32;
            assert!(
                (mean - vector[0]).abs() <= 1e-4 * mean.abs().max(1.0),
                "{kind}: {mean} {}",
                vector[0]
            );
        }
    }

    #[test]
    fn a_broken_model_names_its_file_and_is_listed() {
        let models = tempfile::tempdir().unwrap();
        let settings = settings(models.path());
        let models_dir = settings.models_dir.as_str();
        for kind in ["two-inputs", "rank-2", "truncated"] {
            add(models.path(), kind, &onnx(kind, 8, 32));
            let error = load(kind, Output::Pooled, &settings).unwrap_err().to_string();
            assert!(error.contains(kind) && error.contains(MODEL_FILE), "{error}");
        }
        add(models.path(), "no-preprocessing", &onnx("vgg", 8, 32));
        fs::remove_file(models.path().join("no-preprocessing").join(CONFIG_FILE)).unwrap();
        let error = load("no-preprocessing", Output::Pooled, &settings)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(CONFIG_FILE) && error.contains("pomona model add no-preprocessing"),
            "{error}"
        );

        let listed = list(models_dir).unwrap();
        let broken = listed.iter().find(|model| model.name() == "rank-2").unwrap();
        assert!(describe(&broken.source().unwrap(), settings.engine).is_err());
    }

    #[test]
    fn an_unknown_name_tells_what_there_is() {
        let models = tempfile::tempdir().unwrap();
        add(models.path(), "vgg", &onnx("vgg", 8, 32));
        let models_dir = models.path().to_str().unwrap();
        let error = find("resnet50", models_dir).unwrap_err().to_string();
        for part in ["'resnet50'", "vgg", models_dir, "pomona model add resnet50"] {
            assert!(error.contains(part), "{error}");
        }
        for name in ["", "../vgg", ".hidden", "a/b", "a\\b", "ä"] {
            assert!(
                find(name, models_dir)
                    .unwrap_err()
                    .to_string()
                    .contains("cannot name a model"),
                "{name}"
            );
        }
    }

    /// `test:///folder` is the folder; it holds what each folder was asked for.
    #[derive(Debug, Default)]
    struct Remote(Mutex<Vec<(String, String, Option<String>)>>);

    impl Remote {
        fn folder(url: &str) -> Result<PathBuf> {
            match url.strip_prefix("test://").map(PathBuf::from) {
                Some(folder) if folder.is_dir() => Ok(folder),
                _ => plan_err!("{url} cannot be reached"),
            }
        }

        /// A URL, and how often it was asked for a model.
        fn serve(folder: &Path) -> (String, impl Fn() -> usize) {
            static REMOTE: LazyLock<Arc<Remote>> = LazyLock::new(Arc::default);
            set_remote_models(Arc::clone(&REMOTE) as _);
            let url = format!("test://{}", folder.display());
            let asked = url.clone();
            (url, move || {
                REMOTE.0.lock().iter().filter(|(url, ..)| *url == asked).count()
            })
        }
    }

    impl RemoteModels for Remote {
        fn fetch(&self, url: &str, name: &str, pin: Option<&str>) -> Result<Option<PathBuf>> {
            let asked = (url.to_owned(), name.to_owned(), pin.map(str::to_owned));
            self.0.lock().push(asked);
            Ok(Some(Self::folder(url)?.join(name)).filter(|folder| folder.is_dir()))
        }

        fn list(&self, url: &str) -> Result<Vec<String>> {
            let entries = fs::read_dir(Self::folder(url)?)?;
            Ok(entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect())
        }
    }

    #[test]
    fn a_pinned_model_is_that_one_or_an_error() {
        let models = tempfile::tempdir().unwrap();
        let settings = settings(models.path());
        add(models.path(), "vgg", &onnx("vgg", 8, 32));
        let name = pin("vgg", &settings).unwrap();
        assert_eq!(name.len(), "vgg@sha256:".len() + 64);
        assert_eq!(pin(&name, &settings).unwrap(), name);
        let loaded = load(&name, Output::Pooled, &settings).unwrap();
        assert!(Arc::ptr_eq(&loaded, &load("vgg", Output::Pooled, &settings).unwrap()));
        assert_eq!(
            (loaded.info().name.as_str(), &loaded.info().pinned_name),
            ("vgg", &name)
        );

        // Another preprocessing is another model.
        fs::write(models.path().join("vgg").join(CONFIG_FILE), "{}").unwrap();
        let other = pin("vgg", &settings).unwrap();
        assert_ne!(other, name);
        let wrong = [
            find(&name, &settings.models_dir).unwrap_err(),
            pin(&name, &settings).unwrap_err(),
            load(&name, Output::Pooled, &settings).unwrap_err(),
        ];
        for error in wrong {
            let error = error.to_string();
            for part in [
                "model 'vgg'",
                &name["vgg@sha256:".len()..],
                &other["vgg@sha256:".len()..],
                settings.models_dir.as_str(),
                "the query was planned with",
                "a URL that all nodes read",
            ] {
                assert!(error.contains(part), "{part}: {error}");
            }
        }
        // The first folder that has the name counts.
        let more = tempfile::tempdir().unwrap();
        add(more.path(), "vgg", &onnx("vgg", 8, 32));
        let both = std::env::join_paths([models.path(), more.path()]).unwrap();
        assert!(find(&name, both.to_str().unwrap()).is_err());
        let both = std::env::join_paths([more.path(), models.path()]).unwrap();
        assert_eq!(
            find(&name, both.to_str().unwrap()).unwrap().location(),
            more.path().join("vgg").display().to_string()
        );
    }

    #[test]
    fn a_url_is_asked_first_and_an_unreachable_one_is_an_error() {
        let models = tempfile::tempdir().unwrap();
        let (url, asked) = Remote::serve(models.path());
        add(models.path(), "far", &onnx("vgg", 8, 32));
        let settings = ModelSettings {
            models_dir: url.clone(),
            ..ModelSettings::default()
        };
        let name = pin("far", &settings).unwrap();
        assert_eq!(
            load(&name, Output::Pooled, &settings).unwrap().info().location,
            format!("{url}/far")
        );
        assert_eq!(asked(), 2);
        let listed = list(&url).unwrap();
        let far = listed.iter().find(|model| model.name() == "far").unwrap();
        assert_eq!(far.location(), format!("{url}/far"));
        assert_eq!(
            describe(&far.source().unwrap(), settings.engine).unwrap().pinned_name,
            name
        );

        // What it does not have is looked for in the next place.
        let near = tempfile::tempdir().unwrap();
        add(near.path(), "near-by", &onnx("vgg", 8, 32));
        set_process_models_dir(near.path().to_str().unwrap().to_owned());
        let found = find("near-by", &url).unwrap().location();
        set_process_models_dir(String::new());
        assert_eq!(found, near.path().join("near-by").display().to_string());
        let error = find("nowhere", &url).unwrap_err().to_string();
        assert!(
            error.contains(&format!("Looked in: {url}")) && error.contains("far"),
            "{error}"
        );
        let before = asked();
        assert!(find("../far", &url).is_err());
        assert_eq!(asked(), before);

        let error = find("far", "test:///no/such/place").unwrap_err().to_string();
        assert!(error.contains("test:///no/such/place cannot be reached"), "{error}");
        assert!(list("test:///no/such/place").is_err());
    }

    #[test]
    fn a_model_is_loaded_once_until_its_files_change() {
        let models = tempfile::tempdir().unwrap();
        let settings = settings(models.path());
        add(models.path(), "vgg", &onnx("vgg", 8, 32));
        let loaded: Vec<_> = std::thread::scope(|scope| {
            let load = || load("vgg", Output::Pooled, &settings).unwrap();
            let threads = [scope.spawn(load), scope.spawn(load)];
            threads.map(|thread| thread.join().unwrap()).into()
        });
        assert!(Arc::ptr_eq(&loaded[0], &loaded[1]));

        fs::write(models.path().join("vgg").join(CONFIG_FILE), "{}").unwrap();
        let reloaded = load("vgg", Output::Pooled, &settings).unwrap();
        assert!(!Arc::ptr_eq(&loaded[0], &reloaded));
        assert!(reloaded.info().preprocessing.contains("/255"));
        assert_eq!(reloaded.info().sha256.len(), 64);
    }
}
