//! Finding onnxruntime's shared library, and loading it once per process.
//!
//! It is looked for, in this order:
//! 1. where `ORT_DYLIB_PATH` says (the file, or its folder), and then nowhere else;
//! 2. beside the program, and in `lib` there; in the folders of `LD_LIBRARY_PATH` and its like; in the
//!    usual folders of the system;
//! 3. in Python installations, whose package `onnxruntime` (or `onnxruntime-gpu`) holds it: the active
//!    environment, the interpreters on `PATH`, pyenv's, the system's and the user's packages.
//!
//! No interpreter is run, and the working directory is not looked at.

use std::env;
use std::error::Error;
use std::fmt::{self, Display};
use std::fs::{self, File};
use std::io::Read;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::LoadDynamicError;
use ort::environment::Environment;

use super::panic_message;

/// The variable that names the library.
pub const VARIABLE: &str = "ORT_DYLIB_PATH";
/// The oldest version that is accepted.
pub const OLDEST_VERSION: &str = "1.17";

/// The library, loaded.
#[derive(Debug)]
pub struct Library {
    path: PathBuf,
    environment: Environment,
}

impl Library {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version, where the file's name tells it.
    pub fn version(&self) -> Option<String> {
        let file = self.path.canonicalize().ok()?;
        version_of(file.file_name()?.to_str()?)
    }

    /// What sessions are made in.
    pub(super) fn environment(&self) -> &Environment {
        &self.environment
    }
}

/// Why there is no library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LibraryError {
    /// It is nowhere.
    NotFound {
        /// Where was looked.
        looked_in: Vec<PathBuf>,
    },
    /// It is there, and cannot be used.
    Unusable {
        /// The file, or where it should be.
        path: PathBuf,
        /// Why not.
        cause: String,
    },
}

impl Display for LibraryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound { .. } => write!(
                f,
                "onnxruntime's library is not found. To get it: pip install onnxruntime (version {OLDEST_VERSION} or \
                 newer), or {VARIABLE}=/path/to/libonnxruntime.so"
            ),
            Self::Unusable { path, cause } => write!(
                f,
                "onnxruntime at {} cannot be used: {cause} (version {OLDEST_VERSION} or newer, for this machine's \
                 processor, is needed: pip install onnxruntime, or {VARIABLE}=/path/to/libonnxruntime.so)",
                path.display()
            ),
        }
    }
}

/// The library of this process: the first that can be used, found and loaded on the first call.
///
/// # Errors
/// Where there is none; the same on every call.
pub fn library() -> Result<&'static Library, &'static LibraryError> {
    static LIBRARY: OnceLock<Result<Library, LibraryError>> = OnceLock::new();
    LIBRARY.get_or_init(load_first).as_ref()
}

fn load_first() -> Result<Library, LibraryError> {
    let (candidates, looked_in) = candidates()?;
    let mut failure = LibraryError::NotFound { looked_in };
    for path in candidates {
        match load(&path) {
            Ok(environment) => return Ok(Library { path, environment }),
            // The first says most: it is the one that was meant.
            Err(cause) if matches!(failure, LibraryError::NotFound { .. }) => {
                failure = LibraryError::Unusable { path, cause };
            }
            Err(_) => {}
        }
    }
    Err(failure)
}

fn load(path: &Path) -> Result<Environment, String> {
    if is_for_another_machine(path) {
        // The loader says that there is no such file.
        return Err(format!(
            "it is built for another processor, this one is {}",
            env::consts::ARCH
        ));
    }
    let loaded = catch_unwind(|| {
        let builder = ort::init_from(path).map_err(|error| match &error {
            // What the system's loader says of the file.
            LoadDynamicError::Dlopen { error: cause, .. } => {
                cause.source().map_or_else(|| cause.to_string(), ToString::to_string)
            }
            _ => error.to_string(),
        })?;
        builder
            .with_name("pomona")
            .with_telemetry(false)
            .build()
            .map_err(|e| e.to_string())
    });
    loaded.unwrap_or_else(|panic| Err(panic_message(panic.as_ref())))
}

/// Is this an ELF file whose class, byte order or machine is not this program's own?
fn is_for_another_machine(path: &Path) -> bool {
    let header = |path: &Path| {
        let mut header = [0; 20];
        File::open(path).ok()?.read_exact(&mut header).ok()?;
        header
            .starts_with(b"\x7fELF")
            .then_some((header[4], header[5], header[18], header[19]))
    };
    let own = env::current_exe().ok().and_then(|program| header(&program));
    header(path).is_some_and(|library| own.is_some_and(|own| own != library))
}

/// Files that may be the library, and the folders that were looked into.
fn candidates() -> Result<(Vec<PathBuf>, Vec<PathBuf>), LibraryError> {
    if let Some(named) = env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        let named = PathBuf::from(named);
        let unusable = |cause: String| LibraryError::Unusable {
            path: named.clone(),
            cause: format!("{cause}, and {VARIABLE} names it"),
        };
        let metadata = fs::metadata(&named).map_err(|e| unusable(e.to_string()))?;
        if metadata.is_dir() {
            let file = in_folder(&named).ok_or_else(|| unusable("the folder does not hold it".to_owned()))?;
            return Ok((vec![file], vec![named]));
        }
        // The loader takes a path without a folder for a name to look up itself.
        let file = named.canonicalize().map_err(|e| unusable(e.to_string()))?;
        return Ok((vec![file], vec![]));
    }
    let mut folders: Vec<PathBuf> = vec![];
    for folder in library_folders().into_iter().chain(python_folders()) {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    Ok((folders.iter().filter_map(|folder| in_folder(folder)).collect(), folders))
}

/// The library in a folder: by its plain name, or the highest version.
fn in_folder(folder: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(folder).ok()?.flatten();
    let names = files.filter_map(|file| file.file_name().into_string().ok());
    let mut libraries: Vec<String> = names.filter(|name| is_library(name)).collect();
    libraries.sort_by_key(|name| {
        let version = version_of(name).unwrap_or_else(|| "9999".to_owned());
        let numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
        numbers.collect::<Vec<_>>()
    });
    Some(folder.join(libraries.pop()?))
}

/// `libonnxruntime.so`, `libonnxruntime.so.1.24.4`, `libonnxruntime.1.24.4.dylib`, `onnxruntime.dll`; not
/// `libonnxruntime_providers_shared.so`.
fn is_library(name: &str) -> bool {
    let Some(rest) = name
        .strip_prefix(env::consts::DLL_PREFIX)
        .and_then(|name| name.strip_prefix("onnxruntime"))
    else {
        return false;
    };
    match env::consts::DLL_EXTENSION {
        "dll" => rest == ".dll",
        "dylib" => rest.starts_with('.') && rest.ends_with(".dylib"),
        extension => {
            let rest = rest.strip_prefix('.').and_then(|rest| rest.strip_prefix(extension));
            let is_version = |rest: &str| rest.split('.').skip(1).all(|number| number.parse::<u32>().is_ok());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.') && is_version(rest))
        }
    }
}

/// The version in a library's name.
fn version_of(name: &str) -> Option<String> {
    let start = name
        .find(".so.")
        .map(|at| at + 4)
        .or_else(|| Some(name.find('.')? + 1))?;
    let version = name[start..].trim_end_matches(".dylib");
    let is_version = version.starts_with(|c: char| c.is_ascii_digit()) && version.contains('.');
    is_version.then(|| version.to_owned())
}

fn library_folders() -> Vec<PathBuf> {
    let mut folders = vec![];
    if let Some(folder) = env::current_exe().ok().as_deref().and_then(Path::parent) {
        folders.extend([folder.to_owned(), folder.join("lib")]);
    }
    for variable in ["LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH"] {
        if let Some(paths) = env::var_os(variable) {
            folders.extend(env::split_paths(&paths).filter(|path| path.is_absolute()));
        }
    }
    let usual = [
        "/usr/local/lib",
        "/usr/lib",
        "/usr/lib64",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/opt/onnxruntime/lib",
        "/opt/homebrew/lib",
    ];
    folders.extend(usual.map(PathBuf::from));
    folders
}

/// Folders `onnxruntime/capi` of Python installations.
fn python_folders() -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .iter()
        .filter_map(env::var_os)
        .map(PathBuf::from)
        .filter(|prefix| prefix.is_absolute())
        .collect();
    for folder in env::split_paths(&env::var_os("PATH").unwrap_or_default()) {
        for name in ["python3", "python"] {
            let interpreter = folder.join(name);
            if !folder.is_absolute() || !interpreter.is_file() {
                continue;
            }
            // An environment's interpreter is a link to the one that it was made with; both may have it.
            let real = interpreter.canonicalize().unwrap_or_else(|_| interpreter.clone());
            let prefixes_of = [interpreter, real].map(|file| Some(file.parent()?.parent()?.to_owned()));
            prefixes.extend(prefixes_of.into_iter().flatten());
        }
    }
    let pyenv = env::var_os("PYENV_ROOT")
        .map(PathBuf::from)
        .filter(|root| root.is_absolute());
    if let Some(versions) = pyenv.and_then(|root| fs::read_dir(root.join("versions")).ok()) {
        prefixes.extend(versions.flatten().map(|version| version.path()));
    }
    prefixes.extend([PathBuf::from("/usr/local"), PathBuf::from("/usr")]);
    prefixes.extend(dirs::home_dir().map(|home| home.join(".local")));

    let mut folders = vec![];
    for prefix in prefixes {
        let mut packages = vec![prefix.join("Lib").join("site-packages")];
        for lib in ["lib", "lib64"] {
            let versions = fs::read_dir(prefix.join(lib)).into_iter().flatten().flatten();
            let mut versions: Vec<PathBuf> = versions
                .filter(|entry| {
                    entry
                        .file_name()
                        .to_str()
                        .is_some_and(|name| name.starts_with("python3"))
                })
                .map(|entry| entry.path())
                .collect();
            versions.sort();
            for version in versions.into_iter().rev() {
                packages.extend(["site-packages", "dist-packages"].map(|name| version.join(name)));
            }
        }
        let packages = packages
            .into_iter()
            .map(|folder| folder.join("onnxruntime").join("capi"));
        folders.extend(packages.filter(|folder| folder.is_dir()));
    }
    folders
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn the_newest_library_of_a_folder_is_taken_and_no_provider() {
        let folder = tempfile::tempdir().unwrap();
        let add = |name: &str| fs::write(folder.path().join(name), "").unwrap();
        let found = || Some(in_folder(folder.path())?.file_name()?.to_str()?.to_owned());
        add("libonnxruntime_providers_shared.so");
        add("libonnxruntime.so.bak");
        assert_eq!(found(), None);
        for (name, expected) in [
            ("libonnxruntime.so.1.9.0", "libonnxruntime.so.1.9.0"),
            ("libonnxruntime.so.1.31.1", "libonnxruntime.so.1.31.1"),
            ("libonnxruntime.so.1.17.0", "libonnxruntime.so.1.31.1"),
            ("libonnxruntime.so", "libonnxruntime.so"),
        ] {
            add(name);
            assert_eq!(found().as_deref(), Some(expected));
        }
    }

    #[test]
    fn versions() {
        assert_eq!(version_of("libonnxruntime.so.1.31.1").as_deref(), Some("1.31.1"));
        assert_eq!(version_of("libonnxruntime.1.24.4.dylib").as_deref(), Some("1.24.4"));
        assert_eq!(version_of("libonnxruntime.so"), None);
        assert_eq!(version_of("onnxruntime.dll"), None);
    }
}
