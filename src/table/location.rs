//! Locations, object keys, and the paths that the table shows.
//!
//! A key is what the store calls an object. A location and a path hold it as it is, spaces, `%`
//! and all: 's3://bucket/Granny Smith/1.jpg'. On the web they are URLs, so there it is
//! percent-encoded.

use std::fmt;
use std::path::{Component, PathBuf};

use datafusion::common::{plan_datafusion_err, plan_err};
use datafusion::error::Result;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion_cli::catalog::substitute_tilde;
use object_store::path::Path;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use url::Url;

use crate::stores::redact;

/// What is written as `%..` in one segment of a URL's path.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The store of a table, and how its objects' paths are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Base {
    store: ObjectStoreUrl,
    /// Are keys percent-encoded in paths?
    encoded: bool,
}

impl Base {
    pub(crate) fn new(store: ObjectStoreUrl) -> Self {
        let encoded = store.as_str().starts_with("http");
        Self { store, encoded }
    }

    /// The store's URL, which finds it in the session: 's3://bucket/'.
    pub(crate) fn store(&self) -> &ObjectStoreUrl {
        &self.store
    }

    /// Is it a server on the web?
    pub(crate) fn is_web(&self) -> bool {
        self.encoded
    }

    /// The full URL of an object.
    pub(crate) fn path_of(&self, key: &Path) -> String {
        let base = self.store.as_str();
        if !self.encoded {
            return format!("{base}{key}");
        }
        let segments: Vec<_> = key
            .as_ref()
            .split('/')
            .map(|segment| utf8_percent_encode(segment, ENCODED).to_string())
            .collect();
        format!("{base}{}", segments.join("/"))
    }

    /// The key of the object with this full URL; `None` where this store has no such key.
    pub(crate) fn key_of(&self, path: &str) -> Option<Path> {
        let key = path.strip_prefix(self.store.as_str())?;
        if self.encoded {
            Path::from_url_path(key).ok()
        } else {
            Path::parse(key).ok()
        }
    }
}

/// A folder or one object of a store.
#[derive(Debug, Clone)]
pub(crate) struct Location {
    base: Base,
    prefix: Path,
    /// Written with a slash at its end, so that it names no object.
    folder: bool,
    /// The path in the file system, if it is there.
    local: Option<PathBuf>,
}

impl Location {
    /// Reads a location: a URL or a path of the file system.
    ///
    /// # Errors
    /// Where it is neither, or names what no store can address. Passwords are refused, and not
    /// repeated.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let folder = text.ends_with('/');
        let Some((scheme, rest)) = text.split_once("://") else {
            return Self::parse_local(text, text);
        };
        let (authority, key) = rest.split_once('/').unwrap_or((rest, ""));
        let is_container = authority.split_once('@').is_some_and(|(user, _)| !user.contains(':'))
            && matches!(scheme, "az" | "abfs" | "abfss");
        if authority.contains('@') && !is_container {
            return plan_err!(
                "a location holds no user name and no password: credentials come from the environment or from options"
            );
        }
        match scheme {
            "file" if authority.is_empty() => return Self::parse_local(text, &format!("/{key}")),
            "file" => {
                return plan_err!("'{text}' is no location: a file's is written file:///folder/…, or as a plain path");
            }
            _ if authority.is_empty() => {
                return plan_err!("'{}' is no location: {scheme}:// names no bucket or host", redact(text));
            }
            _ => {}
        }
        let (store, prefix) = match scheme {
            "http" | "https" => {
                let url =
                    Url::parse(text).map_err(|e| plan_datafusion_err!("'{}' is no location: {e}", redact(text)))?;
                if url.query().is_some() || url.fragment().is_some() {
                    return plan_err!("a location on the web has no '?' and no '#': write them as %3F and %23");
                }
                (url.origin().ascii_serialization(), Path::from_url_path(url.path()))
            }
            "az" | "abfs" | "abfss" if key.contains('?') => {
                return plan_err!("a location holds no SAS token: it comes from AZURE_STORAGE_SAS_KEY");
            }
            // Path::parse would overlook one slash.
            _ if key.starts_with('/') => {
                return plan_err!("'{text}' is no location: an object's key cannot begin with a slash");
            }
            _ => (format!("{scheme}://{authority}"), Path::parse(key)),
        };
        let store = ObjectStoreUrl::parse(&store)
            .map_err(|e| plan_datafusion_err!("'{text}' is no location: {}", e.message()))?;
        let prefix = prefix.map_err(|e| plan_datafusion_err!("'{text}' is no location: {e}"))?;
        Ok(Self {
            base: Base::new(store),
            prefix,
            folder,
            local: None,
        })
    }

    fn parse_local(text: &str, path: &str) -> Result<Self> {
        if path.is_empty() {
            return plan_err!("a location is a URL or a path, not ''");
        }
        let local = absolute(&substitute_tilde(path.to_owned()))
            .map_err(|e| plan_datafusion_err!("'{text}' is no location: {e}"))?;
        let prefix =
            Path::from_absolute_path(&local).map_err(|e| plan_datafusion_err!("'{text}' is no location: {e}"))?;
        let base = Base::new(ObjectStoreUrl::local_filesystem());
        Ok(Self {
            base,
            prefix,
            folder: text.ends_with('/'),
            local: Some(local),
        })
    }

    pub(crate) fn base(&self) -> &Base {
        &self.base
    }

    pub(crate) fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// May it name one object?
    pub(crate) fn may_be_object(&self) -> bool {
        !self.folder && !self.prefix.is_root()
    }

    pub(crate) fn local(&self) -> Option<&PathBuf> {
        self.local.as_ref()
    }

    /// An object's key relative to this location; the name alone, if the location names the object.
    pub(crate) fn relative<'a>(&self, key: &'a Path) -> Option<&'a str> {
        let raw = key.as_ref();
        if self.prefix.is_root() {
            return Some(raw);
        }
        match raw.strip_prefix(self.prefix.as_ref())? {
            "" => raw.rsplit('/').next(),
            rest => rest.strip_prefix('/'),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = if self.folder && !self.prefix.is_root() { "/" } else { "" };
        write!(f, "{}{slash}", self.base.path_of(&self.prefix))
    }
}

/// The name of the folder that an object is in.
pub(crate) fn parent_name(key: &Path) -> Option<&str> {
    key.as_ref().rsplit('/').nth(1)
}

/// An absolute path without `.` and `..`, as the file system understands them.
fn absolute(path: &str) -> std::io::Result<PathBuf> {
    let mut absolute = PathBuf::new();
    for component in std::path::absolute(path)?.components() {
        if component == Component::ParentDir {
            // The parent of a link is that of the folder it leads to.
            absolute = std::fs::canonicalize(&absolute).unwrap_or(absolute);
            absolute.pop();
        } else {
            absolute.push(component);
        }
    }
    Ok(absolute)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn keys_are_raw_but_on_the_web() {
        for (text, key, shown) in [
            (
                "s3://bucket/Granny Smith/50%+ é/",
                "Granny Smith/50%+ é",
                "s3://bucket/Granny Smith/50%+ é/",
            ),
            ("s3://bucket", "", "s3://bucket/"),
            ("sample://fruits/", "", "sample://fruits/"),
            ("https://host:8080/a%20b/c", "a b/c", "https://host:8080/a%20b/c"),
            (
                "abfss://images@acc.dfs.core.windows.net/x",
                "x",
                "abfss://images@acc.dfs.core.windows.net/x",
            ),
            ("file:///a b/../c", "c", "file:///c"),
            ("/a/./b%20c/", "a/b%20c", "file:///a/b%20c/"),
        ] {
            let location = Location::parse(text).unwrap();
            assert_eq!(location.prefix().as_ref(), key, "{text}");
            assert_eq!(location.to_string(), shown, "{text}");
        }
        assert!(
            Location::parse("relative/folder")
                .unwrap()
                .to_string()
                .starts_with("file:///")
        );
    }

    #[test]
    fn paths_and_keys_are_one_to_one() {
        let key = Path::parse("Granny Smith/50%+é.jpg").unwrap();
        for (location, path) in [
            ("s3://b/Granny Smith/", "s3://b/Granny Smith/50%+é.jpg"),
            ("http://h/Granny%20Smith/", "http://h/Granny%20Smith/50%25%2B%C3%A9.jpg"),
        ] {
            let location = Location::parse(location).unwrap();
            assert_eq!(location.base().path_of(&key), path);
            assert_eq!(location.base().key_of(path), Some(key.clone()));
            assert_eq!(location.relative(&key), Some("50%+é.jpg"));
            assert_eq!(location.base().key_of("s3://other/x.jpg"), None);
        }
        assert_eq!(parent_name(&key), Some("Granny Smith"));
        assert_eq!(parent_name(&Path::from("a.jpg")), None);
    }

    #[test]
    fn one_object_is_relative_to_its_folder() {
        let location = Location::parse("s3://b/x/a.jpg").unwrap();
        assert!(location.may_be_object());
        assert_eq!(location.relative(&Path::from("x/a.jpg")), Some("a.jpg"));
        assert_eq!(location.relative(&Path::from("x/a.jpg2")), None);
        assert!(!Location::parse("s3://b/x/").unwrap().may_be_object());
    }

    #[test]
    fn what_is_no_location_is_refused_without_its_password() {
        for text in [
            "",
            "s3://",
            "file://x/y",
            "s3://b//x",
            "s3://b/a/../c",
            "s3://b/a\nb",
            "http://h/a?sig=hunter2",
            "az://c/x?sig=hunter2",
            "s3://u:hunter2@b/x",
        ] {
            let error = Location::parse(text).unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
