//! Building the store of a URL: credentials, region, endpoint, retries.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use datafusion_cli::object_storage::{
    AwsOptions, GcpOptions, get_gcs_object_store_builder, get_s3_object_store_builder,
};
use object_store::aws::AmazonS3ConfigKey;
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::GoogleConfigKey;
use object_store::http::HttpBuilder;
use object_store::{BackoffConfig, ClientConfigKey, Error, ObjectStore, Result, RetryConfig};
use url::Url;

use super::StoreOptions;
use super::explain::redact;
use super::io::{self, IoConnector};

const USER_AGENT: &str = concat!("pomona/", env!("CARGO_PKG_VERSION"));

/// The longest that finding credentials and a bucket's region may take. Away from Amazon the SDK
/// gives up looking for an instance's after about ten seconds.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// An endpoint that cannot be reached is an error within 20 seconds (a connection is tried for 5),
/// one that refuses within 3; a busy one gets time to recover.
fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(2),
            base: 2.0,
        },
        max_retries: 5,
        retry_timeout: Duration::from_secs(15),
    }
}

/// Opens the store of a URL of the cloud or the web, and says where its credentials came from.
///
/// # Errors
/// Where the configuration is contradictory, or credentials or region cannot be found out.
pub(super) async fn open(url: &Url, options: &StoreOptions) -> Result<(Arc<dyn ObjectStore>, String)> {
    match url.scheme() {
        "s3" | "s3a" => {
            // On the I/O runtime: the SDK's connections belong to the runtime that opened them.
            let (url, options) = (url.clone(), options.aws.clone());
            let opening = tokio::time::timeout(OPEN_TIMEOUT, io::run(async move { open_s3(&url, options).await }));
            match opening.await {
                Ok(opened) => opened.map_err(|e| failure(&e))?,
                Err(_) => Err(failure(&format_args!(
                    "finding credentials and the bucket's region took longer than {} s. Set AWS_REGION or the option \
                     aws.region, and AWS_ENDPOINT_URL or the option aws.endpoint where the bucket is not Amazon's",
                    OPEN_TIMEOUT.as_secs()
                ))),
            }
        }
        "gs" | "gcs" => open_gcs(url, &options.gcp),
        "az" | "abfs" | "abfss" => open_azure(url),
        _ => {
            let store = HttpBuilder::new()
                .with_url(url.origin().ascii_serialization())
                .with_config(ClientConfigKey::AllowHttp, "true")
                .with_config(ClientConfigKey::UserAgent, USER_AGENT)
                .with_retry(retries())
                .with_http_connector(IoConnector)
                .build()?;
            Ok((Arc::new(store), String::new()))
        }
    }
}

async fn open_s3(url: &Url, mut options: AwsOptions) -> Result<(Arc<dyn ObjectStore>, String)> {
    let variables = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
    let endpoint = options
        .endpoint
        .clone()
        .or_else(|| variables.into_iter().find_map(variable));
    if let Some(endpoint) = &endpoint {
        // The client panics on what is none.
        let is_address = |url: Url| matches!(url.scheme(), "http" | "https") && url.has_host();
        if !Url::parse(endpoint).is_ok_and(is_address) {
            return Err(failure(&format_args!(
                "the endpoint '{}' is no address: it is https://host or http://host:port",
                redact(endpoint)
            )));
        }
        // Without a region Amazon is asked for the bucket's, which is not there.
        if options.region.is_none()
            && variable("AWS_REGION")
                .or_else(|| variable("AWS_DEFAULT_REGION"))
                .is_none()
        {
            options.region = Some("us-east-1".to_owned());
        }
        // Who writes http:// means it.
        if options.allow_http.is_none() && endpoint.starts_with("http://") {
            options.allow_http = Some(true);
        }
    }
    let asked = options.clone();
    if options
        .skip_signature
        .unwrap_or_else(|| variable("AWS_SKIP_SIGNATURE").is_some_and(|v| is_true(&v)))
    {
        sign_nothing(&mut options);
    }
    let mut builder = match get_s3_object_store_builder(url, &options, false).await {
        // Nobody gave credentials, and there is no instance to ask either: a bucket may be public.
        Err(_) if !configured() => {
            sign_nothing(&mut options);
            get_s3_object_store_builder(url, &options, false).await
        }
        built => built,
    }
    .map_err(|e| failure(&e))?;
    if let Some(endpoint) = &options.endpoint {
        // Else AWS_ENDPOINT_URL_S3 would come before the option.
        builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
    }
    let unsigned = builder
        .get_config_value(&AmazonS3ConfigKey::SkipSignature)
        .is_some_and(|v| is_true(&v));
    let credentials = s3_credentials(&asked, unsigned, variable);
    let store = builder
        .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::UserAgent), USER_AGENT)
        .with_retry(retries())
        .with_http_connector(IoConnector)
        .build()?;
    Ok((Arc::new(store), credentials))
}

/// Has requests go out unsigned. Keys that are there, if empty, keep the SDK from looking for others.
fn sign_nothing(options: &mut AwsOptions) {
    options.skip_signature = Some(true);
    options.access_key_id = Some(String::new());
    options.secret_access_key = Some(String::new());
}

/// Does the environment, or a file in the home folder, say anything of AWS credentials?
fn configured() -> bool {
    let variables = [
        "AWS_ACCESS_KEY_ID",
        "AWS_CONFIG_FILE",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_PROFILE",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
    ];
    let files = dirs::home_dir().map(|home| [home.join(".aws/credentials"), home.join(".aws/config")]);
    variables.into_iter().any(|name| variable(name).is_some()) || files.into_iter().flatten().any(|file| file.exists())
}

/// Where the credentials of an S3 store come from, in the order in which they are looked for.
fn s3_credentials(options: &AwsOptions, unsigned: bool, variable: impl Fn(&'static str) -> Option<String>) -> String {
    if options.skip_signature == Some(true) {
        "none, as the option aws.skip_signature says".to_owned()
    } else if unsigned && variable("AWS_SKIP_SIGNATURE").is_some() {
        "none, as the environment variable AWS_SKIP_SIGNATURE says".to_owned()
    } else if unsigned {
        "none found (options, environment, profile, web identity, instance), so requests are not signed".to_owned()
    } else if options.access_key_id.is_some() {
        "the options aws.access_key_id and aws.secret_access_key".to_owned()
    } else if variable("AWS_ACCESS_KEY_ID").is_some() {
        "the environment variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".to_owned()
    } else if let Some(profile) = variable("AWS_PROFILE") {
        format!("the AWS profile '{profile}' (environment variable AWS_PROFILE)")
    } else {
        "the AWS SDK's chain (default profile, web identity, container or instance)".to_owned()
    }
}

fn open_gcs(url: &Url, options: &GcpOptions) -> Result<(Arc<dyn ObjectStore>, String)> {
    let store = get_gcs_object_store_builder(url, options)
        .map_err(|e| failure(&e))?
        .with_config(GoogleConfigKey::Client(ClientConfigKey::UserAgent), USER_AGENT)
        .with_retry(retries())
        .with_http_connector(IoConnector)
        .build()?;
    let from_options = [
        &options.service_account_path,
        &options.service_account_key,
        &options.application_credentials_path,
    ]
    .into_iter()
    .any(Option::is_some);
    let credentials = if from_options {
        "the options gcp.*".to_owned()
    } else {
        let variables = [
            "GOOGLE_SKIP_SIGNATURE",
            "GOOGLE_SERVICE_ACCOUNT",
            "GOOGLE_SERVICE_ACCOUNT_PATH",
            "GOOGLE_SERVICE_ACCOUNT_KEY",
            "GOOGLE_APPLICATION_CREDENTIALS",
        ];
        first_variable(&variables, "gcloud's default credentials or the instance's")
    };
    Ok((Arc::new(store), credentials))
}

fn open_azure(url: &Url) -> Result<(Arc<dyn ObjectStore>, String)> {
    let store = MicrosoftAzureBuilder::from_env()
        .with_url(url.as_str())
        .with_config(AzureConfigKey::Client(ClientConfigKey::UserAgent), USER_AGENT)
        .with_retry(retries())
        .with_http_connector(IoConnector)
        .build()?;
    let variables = [
        "AZURE_SKIP_SIGNATURE",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_STORAGE_CLIENT_SECRET",
        "AZURE_CLIENT_SECRET",
        "AZURE_FEDERATED_TOKEN_FILE",
        "AZURE_USE_AZURE_CLI",
    ];
    Ok((Arc::new(store), first_variable(&variables, "the managed identity")))
}

/// The first of these environment variables that is set, or what is used where none is.
fn first_variable(names: &[&'static str], otherwise: &str) -> String {
    match names.iter().find(|name| variable(name).is_some()) {
        Some(name) => format!("the environment variable {name}"),
        None => otherwise.to_owned(),
    }
}

/// An environment variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// As object_store reads a boolean.
fn is_true(value: &str) -> bool {
    ["1", "true", "on", "yes", "y"].contains(&value.to_ascii_lowercase().as_str())
}

fn failure(message: &dyn Display) -> Error {
    Error::Generic {
        store: "store",
        source: redact(&message.to_string()).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_told_by_where_they_come_from() {
        let with_key = AwsOptions {
            access_key_id: Some("id".into()),
            ..AwsOptions::default()
        };
        let unset = |_: &'static str| None;
        let set = |name: &'static str| (name == "AWS_ACCESS_KEY_ID").then(|| "AKIA".to_owned());
        for (options, unsigned, told) in [
            (
                AwsOptions {
                    skip_signature: Some(true),
                    ..AwsOptions::default()
                },
                true,
                "aws.skip_signature",
            ),
            (AwsOptions::default(), true, "none found"),
            (with_key, false, "aws.access_key_id"),
            (AwsOptions::default(), false, "SDK"),
        ] {
            let text = s3_credentials(&options, unsigned, unset);
            assert!(text.contains(told), "{text}");
        }
        let text = s3_credentials(&AwsOptions::default(), false, set);
        assert!(text.contains("AWS_ACCESS_KEY_ID") && !text.contains("AKIA"), "{text}");
    }
}
