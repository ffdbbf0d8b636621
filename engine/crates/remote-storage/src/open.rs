//! From a URL to a store.

use std::{fmt::Display, path::PathBuf, sync::Arc, time::Duration};

use object_store::{
    ClientConfigKey, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    local::LocalFileSystem,
    multipart::MultipartStore,
    path::Path,
};
use thiserror::Error;

#[cfg(feature = "faults")]
use crate::faults::Faults;
use crate::{
    backend::{Backend, Writes},
    local::LocalDirectory,
};

/// A URL that names no store that can be used.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Not one of the forms that are known.
    #[error("{url}: not file:///DIRECTORY, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX")]
    Url {
        /// What was given.
        url: String,
    },
    /// Its settings, which come from the environment, make no client.
    #[error("{url}: {cause}")]
    Settings {
        /// What was given.
        url: String,
        /// What is wrong.
        cause: String,
    },
    /// The directory cannot be made or read.
    #[error("{path}: {source}", path = path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The thread or what it needs was refused by the operating system.
    #[error("thread of the object store: {0}")]
    Thread(std::io::Error),
}

/// A service that does not take a connection in this time is not there.
const CONNECT_TIMEOUT: &str = "5 seconds";

/// Settings of HTTP that are the same for each service. Attempts have timeouts of their own (`retry.rs`); this one is
/// above the longest.
fn client_settings(http_only: bool) -> Vec<(ClientConfigKey, String)> {
    let mut settings = vec![
        (ClientConfigKey::ConnectTimeout, CONNECT_TIMEOUT.to_owned()),
        (ClientConfigKey::Timeout, "600 seconds".to_owned()),
    ];
    if http_only {
        settings.push((ClientConfigKey::NoSystemCertificates, "true".to_owned()));
    }
    settings
}

/// object_store makes one attempt: those that follow are ours, counted and within our budget.
fn one_attempt() -> RetryConfig {
    RetryConfig { max_retries: 0, retry_timeout: Duration::ZERO, ..RetryConfig::default() }
}

/// Makes a client, at the second try without the system's root certificates: an image of a container may have none, and
/// `http://` needs none.
fn build<T>(make: impl Fn(bool) -> object_store::Result<T>) -> object_store::Result<T> {
    make(false).or_else(|error| make(true).map_err(|_| error))
}

/// The store that a URL names. Credentials, region and endpoint come from the environment that the services' own tools
/// read: `AWS_*`, `GOOGLE_*`, `AZURE_*`.
///
/// # Errors
/// See [`OpenError`].
pub(crate) fn open(full_url: &str) -> Result<Backend, OpenError> {
    let malformed = || OpenError::Url { url: full_url.to_owned() };
    #[cfg(feature = "faults")]
    let (url, faults) = Faults::of_url(full_url)
        .map_err(|cause| OpenError::Settings { url: full_url.to_owned(), cause: cause.to_string() })?;
    #[cfg(not(feature = "faults"))]
    let url = full_url;
    // A user and password in a URL, or parameters, are not for us; and they would end up in logs.
    if url.contains(['?', '#', '@']) {
        return Err(malformed());
    }
    let (scheme, rest) = url.split_once("://").ok_or_else(malformed)?;
    // Reqwest takes the process-wide provider of TLS. Fails when it is set already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (store, writes, prefix): (Arc<dyn ObjectStore>, Writes, &str) = if scheme == "file" {
        let path = PathBuf::from(rest);
        if !path.is_absolute() {
            return Err(malformed());
        }
        let failed = |source| OpenError::Directory { path: path.clone(), source };
        let directory = LocalDirectory::open(&path).map_err(failed)?;
        let store =
            LocalFileSystem::new_with_prefix(directory.root()).map_err(|error| failed(std::io::Error::other(error)))?;
        (Arc::new(store), Writes::Local(Arc::new(directory)), "")
    } else {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(malformed());
        }
        let (store, writes) = service(scheme, bucket, full_url)?;
        (store, Writes::Service(writes), prefix)
    };
    let prefix = Path::parse(prefix).map_err(|_| malformed())?;
    Ok(Backend {
        store,
        writes,
        prefix,
        #[cfg(feature = "faults")]
        faults,
    })
}

type Service = (Arc<dyn ObjectStore>, Arc<dyn MultipartStore>);

fn service(scheme: &str, bucket: &str, url: &str) -> Result<Service, OpenError> {
    fn both<T: ObjectStore + MultipartStore>(store: T) -> Service {
        let store = Arc::new(store);
        (store.clone(), store)
    }
    let failed = |error: &dyn Display| OpenError::Settings { url: url.to_owned(), cause: error.to_string() };
    if scheme == "s3" && endpoint_is_refused() {
        return Err(failed(&"AWS_ENDPOINT_URL is http://, unencrypted: set AWS_ALLOW_HTTP=true if that is meant"));
    }
    match scheme {
        "s3" => build(|http_only| {
            let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(one_attempt());
            for (key, value) in client_settings(http_only) {
                builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
            }
            builder.build()
        })
        .map(both),
        "gs" => build(|http_only| {
            let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).with_retry(one_attempt());
            for (key, value) in client_settings(http_only) {
                builder = builder.with_config(GoogleConfigKey::Client(key), value);
            }
            builder.build()
        })
        .map(both),
        "az" => build(|http_only| {
            let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket).with_retry(one_attempt());
            for (key, value) in client_settings(http_only) {
                builder = builder.with_config(AzureConfigKey::Client(key), value);
            }
            builder.build()
        })
        .map(both),
        _ => return Err(OpenError::Url { url: url.to_owned() }),
    }
    .map_err(|error| failed(&error))
}

/// Whether each request would fail because it goes unencrypted, without a word of why.
fn endpoint_is_refused() -> bool {
    let settings = AmazonS3Builder::from_env();
    let http = |url: String| url.starts_with("http://");
    let allowed = settings.get_config_value(&AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp));
    settings.get_config_value(&AmazonS3ConfigKey::Endpoint).is_some_and(http) && allowed.as_deref() != Some("true")
}
