//! The `images.*` options of `CREATE EXTERNAL TABLE … STORED AS IMAGES`.

use std::collections::HashMap;

use datafusion::common::config_err;
use datafusion::error::Result;

/// The names of images that can be decoded.
const DEFAULT_GLOB: &str = "*.{bmp,gif,jfif,jpe,jpeg,jpg,png,tif,tiff,webp}";

/// What an image table is asked to show.
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
        Self {
            path_pattern: None,
            glob: DEFAULT_GLOB.to_owned(),
            recursive: true,
            metadata: false,
        }
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
            match key.as_str() {
                "images.path_pattern" => images.path_pattern = Some(value.clone()),
                "images.glob" => images.glob = value.clone(),
                "images.recursive" => images.recursive = parse_bool(key, value)?,
                "images.metadata" => images.metadata = parse_bool(key, value)?,
                key if key.starts_with("aws.") || key.starts_with("gcp.") => {}
                key => {
                    // Without a dot DataFusion takes an option for one of a file format.
                    let key = key.strip_prefix("format.").unwrap_or(key);
                    return config_err!(
                        "an image table has no option '{key}'; there are: images.path_pattern, images.glob, \
                         images.recursive, images.metadata, and aws.* and gcp.* for its store"
                    );
                }
            }
        }
        Ok(images)
    }
}

fn parse_bool(key: &str, value: &str) -> Result<bool> {
    match value.to_ascii_lowercase().parse() {
        Ok(value) => Ok(value),
        Err(_) => config_err!("{key} is true or false, not '{value}'"),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<ImagesOptions> {
        let options = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        ImagesOptions::from_map(&options)
    }

    #[test]
    fn options_are_read_and_unknown_ones_told() {
        let flat = read(&[("images.recursive", "FALSE"), ("aws.region", "x")]).unwrap();
        assert!(!flat.recursive && !flat.metadata);
        for key in ["images.golb", "format.glob", "csv.x"] {
            let error = read(&[(key, "x")]).unwrap_err().to_string();
            assert!(error.contains("images.glob"), "{error}");
        }
        assert!(read(&[("images.metadata", "maybe")]).is_err());
    }
}
