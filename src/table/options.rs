//! The `images.*` options of `CREATE EXTERNAL TABLE … STORED AS IMAGES`.

use std::any::Any;
use std::collections::HashMap;
use std::fmt::Display;
use std::str::FromStr;

use datafusion::common::config::{ConfigEntry, ConfigExtension, ExtensionOptions};
use datafusion::common::config_err;
use datafusion::error::{DataFusionError, Result};

/// The names of images that can be decoded.
pub(crate) const DEFAULT_GLOB: &str = "*.{bmp,gif,jfif,jpe,jpeg,jpg,png,tif,tiff,webp}";

/// What an image table is asked to show.
///
/// It is a [`ConfigExtension`], so that a session that checks options before a table is created
/// knows them: `ctx.register_table_options_extension(ImagesOptions::default())`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagesOptions {
    /// Where in an object's path its columns are: '{split}/{label}/*'.
    pub path_pattern: Option<String>,
    /// Which objects are images. Case does not count. It is matched with the object's name, or
    /// with the path relative to the location if it holds a slash.
    pub glob: String,
    /// Are folders of the location part of it?
    pub recursive: bool,
    /// Are there the columns `size`, `last_modified` and `e_tag`?
    pub metadata: bool,
}

impl Default for ImagesOptions {
    fn default() -> Self {
        Self { path_pattern: None, glob: DEFAULT_GLOB.to_owned(), recursive: true, metadata: false }
    }
}

impl ImagesOptions {
    /// Reads the options of a statement; those of stores (`aws.*`, `gcp.*`) are left alone.
    ///
    /// # Errors
    /// Options that do not exist, and values that they cannot have.
    pub fn from_map(options: &HashMap<String, String>) -> Result<Self> {
        let mut images = Self::default();
        for (key, value) in options {
            if !key.starts_with("aws.") && !key.starts_with("gcp.") {
                images.set(key, value)?;
            }
        }
        Ok(images)
    }
}

fn parse<T: FromStr<Err: Display>>(key: &str, value: &str) -> Result<T> {
    value.to_ascii_lowercase().parse().map_err(|e| DataFusionError::Configuration(format!("{key} = '{value}': {e}")))
}

impl ConfigExtension for ImagesOptions {
    const PREFIX: &'static str = "images";
}

impl ExtensionOptions for ImagesOptions {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn cloned(&self) -> Box<dyn ExtensionOptions> {
        Box::new(self.clone())
    }

    /// `key` is with its prefix, as options of tables are set.
    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "images.path_pattern" => self.path_pattern = Some(value.to_owned()),
            "images.glob" => self.glob = value.to_owned(),
            "images.recursive" => self.recursive = parse(key, value)?,
            "images.metadata" => self.metadata = parse(key, value)?,
            _ => {
                let known: Vec<_> = self.entries().into_iter().map(|e| e.key).collect();
                // Without a dot DataFusion takes an option for one of a file format.
                let key = key.strip_prefix("format.").unwrap_or(key);
                return config_err!(
                    "an image table has no option '{key}'; there are: {}, and aws.* and gcp.* for its store",
                    known.join(", ")
                );
            }
        }
        Ok(())
    }

    fn entries(&self) -> Vec<ConfigEntry> {
        let entry = |key: &str, value: Option<String>, description| ConfigEntry {
            key: format!("{}.{key}", Self::PREFIX),
            value,
            description,
        };
        vec![
            entry("path_pattern", self.path_pattern.clone(), "Which parts of the path are columns: '{split}/{label}/*'"),
            entry("glob", Some(self.glob.clone()), "Which objects are images"),
            entry("recursive", Some(self.recursive.to_string()), "Whether folders are looked through"),
            entry("metadata", Some(self.metadata.to_string()), "Adds the columns size, last_modified and e_tag"),
        ]
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_unknown_ones_told() {
        let options = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let read = ImagesOptions::from_map(&options(&[("images.recursive", "FALSE"), ("aws.region", "x")])).unwrap();
        assert!(!read.recursive && !read.metadata);
        for key in ["images.golb", "format.glob", "csv.x"] {
            let error = ImagesOptions::from_map(&options(&[(key, "x")])).unwrap_err().to_string();
            assert!(error.contains("images.glob"), "{error}");
        }
        assert!(ImagesOptions::from_map(&options(&[("images.metadata", "maybe")])).is_err());
    }
}
