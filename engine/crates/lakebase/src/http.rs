//! Calls of admin ports.

use std::{path::PathBuf, time::Duration};

use identity::{Tls, TlsFiles};
use reqwest::{Method, blocking};
use safekeeper::api::Failure;
use serde::{Serialize, de::DeserializeOwned};

/// An admin port answers in milliseconds; longer than this is a dead process.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The certificate that commands present.
#[derive(clap::Args, Clone)]
pub(crate) struct TlsArguments {
    /// Directory with ca.pem, NAME.pem and NAME.key; without it nothing is encrypted, and URLs must be http://
    #[arg(long, value_name = "DIR", requires = "tls_name")]
    tls_dir: Option<PathBuf>,
    /// NAME of the certificate in that directory
    #[arg(long, value_name = "NAME", requires = "tls_dir")]
    tls_name: Option<String>,
}

impl TlsArguments {
    /// The files, if a certificate is given.
    pub(crate) fn files(&self) -> Option<TlsFiles> {
        let (dir, name) = (self.tls_dir.as_ref()?, self.tls_name.as_ref()?);
        Some(TlsFiles {
            ca: dir.join("ca.pem"),
            certificate: dir.join(format!("{name}.pem")),
            key: dir.join(format!("{name}.key")),
        })
    }
}

/// A client of admin ports.
pub(crate) struct Client {
    http: blocking::Client,
    has_certificate: bool,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// No answer.
    #[error("{url}: {reason}")]
    Transport { url: String, reason: String },
    /// The answer is no.
    #[error("{url}: {} ({})", failure.message, failure.error)]
    Refused { url: String, failure: Failure },
}

impl Client {
    /// # Errors
    /// The certificate files cannot be used.
    pub(crate) fn new(tls: &TlsArguments) -> Result<Self, Box<dyn std::error::Error>> {
        // reqwest asks for the process-wide one even where it is given a whole configuration. Fails when it is set already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = blocking::Client::builder().timeout(TIMEOUT).no_proxy();
        if let Some(files) = tls.files() {
            let config = Tls::load(files)?.client_config();
            builder = builder.tls_backend_preconfigured((*config).clone());
        } else {
            // Only http:// is called without a certificate; the system's roots need not be there for it.
            builder = builder.tls_certs_only([]);
        }
        Ok(Self { http: builder.build()?, has_certificate: tls.tls_dir.is_some() })
    }

    pub(crate) fn get<T: DeserializeOwned>(&self, base: &str, path: &str) -> Result<T, CallError> {
        self.call(Method::GET, base, path, None::<&()>)
    }

    /// # Errors
    /// See [`CallError`].
    pub(crate) fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        base: &str,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, CallError> {
        let url = format!("{}{path}", base.trim_end_matches('/'));
        let failed = |reason: String| CallError::Transport { url: url.clone(), reason };
        host_of(base).map_err(|reason| CallError::Transport { url: base.to_owned(), reason })?;
        if base.starts_with("https:") && !self.has_certificate {
            return Err(failed("https:// needs a certificate: give --tls-dir and --tls-name".to_owned()));
        }
        let mut request = self.http.request(method, &url);
        if let Some(body) = body {
            request = request.json(body);
        }
        let transport = |error: &dyn std::error::Error| {
            // reqwest hides the cause ("connection refused") behind its own text.
            let mut cause = error;
            while let Some(source) = cause.source() {
                cause = source;
            }
            failed(explained(&cause.to_string()))
        };
        let response = request.send().map_err(|error| transport(&error))?;
        let status = response.status();
        let text = response.text().map_err(|error| transport(&error))?;
        if status.is_success() {
            return serde_json::from_str(&text).map_err(|error| {
                failed(format!("not the expected answer; is this another process's port? ({error})"))
            });
        }
        let failure = serde_json::from_str(&text)
            .unwrap_or_else(|_| Failure { error: status.as_u16().to_string(), message: text.trim().to_owned() });
        Err(CallError::Refused { url, failure })
    }
}

/// The libraries' words for a wrong port or scheme, with what to look at.
fn explained(cause: &str) -> String {
    let hint = if cause.contains("invalid HTTP version") {
        "is this an admin port, and does it want https:// with --tls-dir and --tls-name?"
    } else if cause.contains("InvalidContentType") {
        "is this an admin port, and does it want http://?"
    } else if cause.contains("UnknownIssuer") {
        "its certificate is of another authority than ca.pem"
    } else if cause.contains("NotValidForName") {
        "its certificate was issued without this host"
    } else {
        return cause.to_owned();
    };
    format!("{cause}; {hint}")
}

/// The host of a URL such as `https://host:port/`, with brackets for IPv6.
pub(crate) fn host_of(url: &str) -> Result<&str, String> {
    let wrong = || "expected http://HOST:PORT or https://HOST:PORT".to_owned();
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://")).ok_or_else(wrong)?;
    let (host, port) = rest.trim_end_matches('/').rsplit_once(':').ok_or_else(wrong)?;
    if host.is_empty() || port.parse::<u16>().is_err() { Err(wrong()) } else { Ok(host) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_urls() {
        for (url, host) in [("http://a:1", "a"), ("https://[::1]:7003/", "[::1]"), ("https://127.0.0.1:1", "127.0.0.1")]
        {
            assert_eq!(Ok(host), host_of(url));
        }
        for url in ["a:1", "http://a", "ftp://a:1", "http://:1", "http://a:x"] {
            assert!(host_of(url).is_err(), "{url}");
        }
    }
}
