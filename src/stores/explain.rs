//! From a store's error to bucket, operation, cause and remedy.
//!
//! A store's own error shows the answer of the server, and S3's answers echo the access key and
//! what was signed. So nothing of an answer is shown but its status, `<Code>` and `<Message>`.

use std::error::Error as StdError;
use std::fmt;

use datafusion::error::DataFusionError;
use object_store::Error;
use object_store::client::{HttpError, HttpErrorKind};
use object_store::path::Path;

/// What was to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Open,
    List,
    Read,
    Write,
    Delete,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::List => "list",
            Self::Read => "read",
            Self::Write => "write",
            Self::Delete => "delete from",
        })
    }
}

/// Why it could not be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The object does not exist.
    NotFound,
    /// The credentials are wrong, or may not do this.
    Denied,
    /// There is no such bucket.
    NoBucket,
    /// The bucket is in another region.
    WrongRegion,
    /// No connection to the endpoint.
    Unreachable,
    /// The listing holds a key that cannot be addressed.
    BadKey,
    /// The server cannot do this.
    Unsupported,
    /// The store was not opened, so that nothing of it can be reached.
    NotOpened,
    /// Anything else.
    Other,
}

/// An error of a store, for a person, without secrets.
#[derive(Debug)]
struct StoreError {
    cause: Cause,
    operation: Operation,
    /// The object or the prefix.
    url: String,
    /// The cause in words.
    text: String,
    /// Where the credentials came from; may be empty.
    credentials: String,
    /// What to do; may be empty.
    remedy: String,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} {}: {}", self.operation, self.url, self.text)?;
        if !self.credentials.is_empty() {
            write!(f, ". Credentials: {}", self.credentials)?;
        }
        if !self.remedy.is_empty() {
            write!(f, ". {}", self.remedy)?;
        }
        Ok(())
    }
}

impl StdError for StoreError {}

/// The explanation that `error` carries, if a store of this crate gave it out.
fn store_error(error: &Error) -> Option<&StoreError> {
    error.source().and_then(|source| source.downcast_ref::<StoreError>())
}

/// Why `error` happened, and that in words.
pub(crate) fn cause_of(error: &Error) -> (Cause, String) {
    match store_error(error) {
        Some(explained) => (explained.cause, explained.text.clone()),
        None => {
            let facts = Facts::of(error);
            let cause = facts.cause(error);
            (cause, facts.text(cause, error))
        }
    }
}

/// `error` as a query's error.
pub(crate) fn into_datafusion(error: &Error) -> DataFusionError {
    DataFusionError::Execution(match store_error(error) {
        Some(explained) => explained.to_string(),
        None => cause_of(error).1,
    })
}

/// `error` with its cause, in words and without secrets, in place of the server's answer. The kind
/// of error stays: callers decide by it.
///
/// `root` is 's3://bucket', `path` the object or prefix in it, and `credentials` says where they
/// came from.
pub(super) fn explain(error: Error, operation: Operation, root: &str, path: Option<&Path>, credentials: &str) -> Error {
    if store_error(&error).is_some() {
        return error;
    }
    let facts = Facts::of(&error);
    let cause = facts.cause(&error);
    let text = facts.text(cause, &error);
    let is_about_one = matches!(
        cause,
        Cause::NotFound | Cause::BadKey | Cause::Unsupported | Cause::Other
    );
    let cause = match operation {
        Operation::Open if is_about_one => Cause::NotOpened,
        _ => cause,
    };
    let scheme = root.split("://").next().unwrap_or_default();
    let shows_credentials = !matches!(cause, Cause::NotFound | Cause::BadKey | Cause::Unsupported);
    let explained = Box::new(StoreError {
        cause,
        operation,
        url: path.map_or_else(|| root.to_owned(), |path| format!("{root}/{path}")),
        text,
        credentials: if shows_credentials {
            credentials.to_owned()
        } else {
            String::new()
        },
        remedy: remedy(cause, scheme, operation, credentials, facts.region.as_deref()),
    });
    match error {
        Error::NotFound { path, .. } => Error::NotFound {
            path,
            source: explained,
        },
        Error::AlreadyExists { path, .. } => Error::AlreadyExists {
            path,
            source: explained,
        },
        Error::Precondition { path, .. } => Error::Precondition {
            path,
            source: explained,
        },
        Error::NotModified { path, .. } => Error::NotModified {
            path,
            source: explained,
        },
        Error::PermissionDenied { path, .. } => Error::PermissionDenied {
            path,
            source: explained,
        },
        Error::Unauthenticated { path, .. } => Error::Unauthenticated {
            path,
            source: explained,
        },
        Error::NotSupported { .. } => Error::NotSupported { source: explained },
        // Says which method of which store, and nothing else.
        Error::NotImplemented { .. } => error,
        _ => Error::Generic {
            store: "store",
            source: explained,
        },
    }
}

const DENIED: [&str; 14] = [
    "AccessDenied",
    "AccountProblem",
    "AllAccessDisabled",
    "AuthenticationFailed",
    "AuthorizationFailure",
    "AuthorizationPermissionMismatch",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "NotSignedUp",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "UnauthorizedAccess",
];

const NO_BUCKET: [&str; 3] = ["ContainerNotFound", "NoSuchBucket", "FilesystemNotFound"];

const WRONG_REGION: [&str; 3] = [
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
];

/// What an error says, as far as it may be shown.
#[derive(Debug, Default)]
struct Facts {
    /// '403 Forbidden'
    status: String,
    code: String,
    message: String,
    /// The region that the server expects.
    region: Option<String>,
    transport: Option<HttpErrorKind>,
    io: Option<std::io::ErrorKind>,
    /// The last error of the chain: 'Connection refused (os error 111)'.
    innermost: String,
    redirected: bool,
}

impl Facts {
    fn of(error: &Error) -> Self {
        let text = error.to_string();
        let shown = |name| element(&text, name).map(|value| clean(value, 300)).unwrap_or_default();
        let mut facts = Self {
            status: text
                .split_once("status code: ")
                .map(|(_, rest)| clean(rest.split([':', '<']).next().unwrap_or_default(), 40))
                .unwrap_or_default(),
            code: shown("Code"),
            message: shown("Message"),
            region: Some(shown("Region"))
                .filter(|r| !r.is_empty() && r.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')),
            redirected: text.contains("redirect without LOCATION"),
            ..Self::default()
        };
        let mut source = error.source();
        while let Some(cause) = source {
            if let Some(http) = cause.downcast_ref::<HttpError>() {
                facts.transport = Some(http.kind());
            }
            if let Some(io) = cause.downcast_ref::<std::io::Error>() {
                facts.io = Some(io.kind());
            }
            facts.innermost = redact(&cause.to_string());
            source = cause.source();
        }
        facts
    }

    fn cause(&self, error: &Error) -> Cause {
        let code = self.code.as_str();
        let status = self.status.get(..3).unwrap_or_default();
        if matches!(error, Error::InvalidPath { .. }) {
            Cause::BadKey
        } else if matches!(error, Error::NotSupported { .. } | Error::NotImplemented { .. }) {
            Cause::Unsupported
        } else if NO_BUCKET.contains(&code) {
            Cause::NoBucket
        } else if WRONG_REGION.contains(&code) || self.redirected || matches!(status, "301" | "307") {
            Cause::WrongRegion
        // An archived object answers 403 too, but has no other credentials to offer.
        } else if DENIED.contains(&code) || (matches!(status, "401" | "403") && code != "InvalidObjectState") {
            Cause::Denied
        } else if matches!(self.transport, Some(HttpErrorKind::Connect | HttpErrorKind::Timeout)) {
            Cause::Unreachable
        } else if matches!(error, Error::NotFound { .. }) {
            Cause::NotFound
        } else if matches!(status, "405" | "501") {
            Cause::Unsupported
        } else if self.io == Some(std::io::ErrorKind::PermissionDenied) {
            Cause::Denied
        } else {
            Cause::Other
        }
    }

    /// The cause in words.
    fn text(&self, cause: Cause, error: &Error) -> String {
        let what = match cause {
            Cause::NotFound => return "it does not exist".to_owned(),
            Cause::Unreachable => return format!("the endpoint cannot be reached ({})", self.innermost),
            Cause::BadKey => {
                return format!(
                    "it holds an object whose key cannot be addressed ({})",
                    clean(&error.to_string(), 300)
                );
            }
            Cause::Denied => "access denied",
            Cause::NoBucket => "there is no such bucket",
            Cause::WrongRegion => "the bucket is in another region",
            Cause::Unsupported => "the store cannot do this",
            Cause::Other if self.status.is_empty() => {
                return redact(&match error {
                    Error::Generic { source, .. } => source.to_string(),
                    error => error.to_string(),
                });
            }
            Cause::Other | Cause::NotOpened => "the store refused",
        };
        let answer = match (self.status.as_str(), self.code.as_str(), self.message.as_str()) {
            ("", "", _) => self.innermost.clone(),
            (status, "", _) => status.to_owned(),
            ("", code, message) => format!("{code}: {message}"),
            (status, code, message) => format!("{status}, {code}: {message}"),
        };
        format!("{what} ({answer})")
    }
}

/// What to do about `cause`; empty where the cause says it.
fn remedy(cause: Cause, scheme: &str, operation: Operation, credentials: &str, region: Option<&str>) -> String {
    let s3 = matches!(scheme, "s3" | "s3a");
    match cause {
        Cause::Denied if s3 && credentials.starts_with("none") => {
            "If the bucket is not public, give credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or \
             the options aws.access_key_id and aws.secret_access_key"
                .to_owned()
        }
        Cause::Denied if scheme == "file" => "Check the permissions of the file or folder".to_owned(),
        Cause::Denied if matches!(scheme, "gs" | "gcs") => {
            "Check that the credentials are valid and allow this (GOOGLE_APPLICATION_CREDENTIALS, or the option \
             gcp.service_account_path); a public bucket needs GOOGLE_SKIP_SIGNATURE=true"
                .to_owned()
        }
        Cause::Denied => format!("Check that the credentials are valid and may {operation} it"),
        Cause::NoBucket if s3 => {
            "Check the name, and the endpoint (AWS_ENDPOINT_URL, option aws.endpoint)".to_owned()
        }
        Cause::NoBucket => "Check the name".to_owned(),
        Cause::WrongRegion => match region {
            Some(region) => format!("Set AWS_REGION={region} or the option aws.region '{region}'"),
            None => "Set AWS_REGION or the option aws.region to the bucket's region".to_owned(),
        },
        Cause::Unreachable if s3 => {
            "Check the network, and the endpoint (AWS_ENDPOINT_URL, option aws.endpoint)".to_owned()
        }
        Cause::Unreachable => "Check the address and the network".to_owned(),
        Cause::BadKey => "Rename or delete that object, or choose a location that does not hold it".to_owned(),
        Cause::Unsupported if matches!(scheme, "http" | "https") => {
            "A location on the web must be a WebDAV server, or name one image".to_owned()
        }
        Cause::NotOpened if s3 => {
            "Check AWS_REGION and AWS_ENDPOINT_URL in the environment of the process that reads or writes (on a cluster, \
             each executor), or the options aws.region and aws.endpoint"
                .to_owned()
        }
        Cause::NotOpened => "Check the environment of the process that reads or writes (on a cluster, each executor)".to_owned(),
        Cause::Unsupported | Cause::NotFound | Cause::Other => String::new(),
    }
}

/// What stands between `<name>` and `</name>`.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    rest.split_once(&format!("</{name}>")).map(|(value, _)| value)
}

/// `text` on one line, not longer than `max` characters.
fn clean(text: &str, max: usize) -> String {
    let line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(max)
        .collect();
    line.trim().to_owned()
}

/// `text` without what must not be shown: answers of servers, passwords and queries in URLs,
/// keys and signatures.
pub(crate) fn redact(text: &str) -> String {
    // An answer is XML, HTML or JSON.
    let text = text.split(['<', '{']).next().unwrap_or_default();
    let words: Vec<_> = clean(text, 1000).split_whitespace().map(redact_word).collect();
    clean(&words.join(" "), 300)
}

fn redact_word(word: &str) -> String {
    const HIDDEN: &str = "[hidden]";
    const MARKS: [&str; 7] = [
        "signature=",
        "credential=",
        "secret=",
        "password=",
        "token=",
        "key=",
        "keyid=",
    ];
    let lower = word.to_ascii_lowercase();
    let is_key_id = |part: &str| {
        part.len() >= 16
            && (part.starts_with("AKIA") || part.starts_with("ASIA"))
            && part.chars().all(|c| c.is_ascii_alphanumeric())
    };
    if let Some((scheme, rest)) = word.split_once("://") {
        let rest = rest.split(['?', '#']).next().unwrap_or_default();
        let (authority, path) = match rest.split_once('/') {
            Some((authority, path)) => (authority, format!("/{path}")),
            None => (rest, String::new()),
        };
        let host = authority.rsplit('@').next().unwrap_or_default();
        return format!("{scheme}://{host}{path}");
    }
    let has_key_id = word.split(|c: char| !c.is_ascii_alphanumeric()).any(is_key_id);
    if has_key_id || MARKS.iter().any(|mark| lower.contains(mark)) {
        HIDDEN.to_owned()
    } else {
        word.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORBIDDEN: &str = "Error performing GET http://u:hunter2@127.0.0.1:9000/b?list-type=2&X-Amz-Signature=abc in 5ms - \
        Server returned non-2xx status code: 403 Forbidden: <?xml version=\"1.0\"?><Error><Code>SignatureDoesNotMatch</Code>\
        <Message>The request signature we calculated does not match</Message><AWSAccessKeyId>AKIAIOSFODNN7EXAMPLE</AWSAccessKeyId>\
        <StringToSign>AWS4-HMAC-SHA256 abc</StringToSign><CanonicalRequest>GET /b</CanonicalRequest></Error>";

    fn generic(text: &str) -> Error {
        Error::Generic {
            store: "S3",
            source: text.into(),
        }
    }

    fn explained(error: Error) -> String {
        let path = Path::from("Training");
        explain(error, Operation::List, "s3://b", Some(&path), "the environment").to_string()
    }

    #[test]
    fn an_answer_of_s3_is_told_without_what_it_echoes() {
        let text = explained(generic(FORBIDDEN));
        for part in [
            "cannot list s3://b/Training",
            "access denied (403 Forbidden, SignatureDoesNotMatch",
            "the environment",
        ] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
        for secret in ["AKIA", "AWS4", "hunter2", "Canonical", "abc"] {
            assert!(!text.contains(secret), "{secret} is in: {text}");
        }
    }

    #[test]
    fn causes_have_remedies() {
        let answer = |code: &str, status: &str| {
            generic(&format!(
                "status code: {status}: <Error><Code>{code}</Code><Region>eu-west-3</Region></Error>"
            ))
        };
        for (error, part) in [
            (answer("NoSuchBucket", "404 Not Found"), "no such bucket"),
            (
                answer("AuthorizationHeaderMalformed", "400 Bad Request"),
                "AWS_REGION=eu-west-3",
            ),
            (
                generic("Received redirect without LOCATION, this normally"),
                "another region",
            ),
            (answer("InvalidAccessKeyId", "403 Forbidden"), "access denied"),
            (
                answer("SlowDown", "503 Service Unavailable"),
                "503 Service Unavailable, SlowDown",
            ),
        ] {
            let text = explained(error);
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }

    #[test]
    fn the_kind_of_error_stays_and_it_is_explained_once() {
        let gone = Error::NotFound {
            path: "a".into(),
            source: "no".into(),
        };
        let once = explain(gone, Operation::Read, "s3://b", None, "");
        assert!(matches!(once, Error::NotFound { .. }));
        assert_eq!(cause_of(&once).0, Cause::NotFound);
        let text = once.to_string();
        assert_eq!(explain(once, Operation::List, "s3://c", None, "x").to_string(), text);
    }

    #[test]
    fn secrets_are_redacted() {
        for (text, expected) in [
            (
                "GET https://me:pw@host/a/b?sig=x#y failed",
                "GET https://host/a/b failed",
            ),
            ("no key AKIAIOSFODNN7EXAMPLE, sorry", "no key [hidden] sorry"),
            (
                "Authorization Credential=AB/20/us Signature=ff",
                "Authorization [hidden] [hidden]",
            ),
            ("answer: {\"token\": \"x\"}", "answer:"),
            ("Missing SecretAccessKey", "Missing SecretAccessKey"),
            ("two\nlines", "two lines"),
        ] {
            assert_eq!(redact(text), expected);
        }
    }
}
