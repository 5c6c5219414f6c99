//! Pinned names: `resnet50@sha256:…` is the model of that name with these very files.
//!
//! What decides the vectors is the network and its preprocessing, so the hash is of both: it is the sha256
//! of what `sha256sum model.onnx preprocessor_config.json` prints in the model's folder, and
//! `sha256sum model.onnx preprocessor_config.json | sha256sum` tells it.

use datafusion::common::plan_err;
use datafusion::error::Result;
use sha2::{Digest, Sha256};

use super::registry::{CONFIG_FILE, MODEL_FILE, check_name};

/// What stands between a name and its hash.
const MARK: &str = "@sha256:";

/// The name of a model, with the hash that it must have, if it is pinned.
///
/// # Errors
/// Where the name cannot be one, or what follows it is no hash.
pub(super) fn parse(text: &str) -> Result<(&str, Option<&str>)> {
    let Some((name, _)) = text.split_once('@') else {
        check_name(text)?;
        return Ok((text, None));
    };
    check_name(name)?;
    match text[name.len()..].strip_prefix(MARK) {
        Some(hash) if is_hash(hash) => Ok((name, Some(hash))),
        _ => plan_err!(
            "'{text}' names no model: a name with a hash is {name}{MARK} and 64 digits of 0-9 and a-f, the output of \
             sha256sum {MODEL_FILE} {CONFIG_FILE} | sha256sum in the model's folder"
        ),
    }
}

/// Is it a hash, as one is written down?
pub(super) fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The name with its hash.
pub(super) fn name(name: &str, hash: &str) -> String {
    format!("{name}{MARK}{hash}")
}

/// The hash of a model, from that of its network's file and the bytes of its preprocessing.
pub(super) fn hash(network_sha256: &str, config: &[u8]) -> String {
    let config_sha256 = Sha256::digest(config);
    let listed = format!("{network_sha256}  {MODEL_FILE}\n{config_sha256:x}  {CONFIG_FILE}\n");
    format!("{:x}", Sha256::digest(listed))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_64_lower_case_digits() {
        let hash = "0123456789abcdef".repeat(4);
        assert_eq!(parse("resnet50").unwrap(), ("resnet50", None));
        let pinned = name("resnet50", &hash);
        assert_eq!(parse(&pinned).unwrap(), ("resnet50", Some(hash.as_str())));
        for (wrong, told) in [
            (format!("resnet50@{hash}"), "64 digits"),
            (format!("resnet50@sha256:{}", &hash[1..]), "64 digits"),
            (format!("resnet50@sha256:{}", hash.to_uppercase()), "64 digits"),
            (format!("resnet50@sha256:{hash}@sha256:{hash}"), "64 digits"),
            (format!("../resnet50@sha256:{hash}"), "cannot name a model"),
            ("@".to_owned(), "cannot name a model"),
        ] {
            let error = parse(&wrong).unwrap_err().to_string();
            assert!(error.contains(told), "{wrong}: {error}");
        }
    }

    #[test]
    fn the_hash_is_that_of_sha256sum() {
        // printf network > model.onnx; printf '{}' > preprocessor_config.json
        let network = format!("{:x}", Sha256::digest(b"network"));
        assert_eq!(
            hash(&network, b"{}"),
            "ff086dca29e844cabb2cf96c11b1293ea539c4f5dd2ad1d3e99b577d8c8e26f0"
        );
    }
}
