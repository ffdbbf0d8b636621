//! What goes wrong with an object store, as callers see it, and as one attempt sees it.

use std::{fmt, io, path::PathBuf};

use thiserror::Error;

use crate::metrics::Operation;

/// An operation failed for good, as far as its budget of attempts goes.
#[derive(Debug, Error)]
pub enum StorageError {
    /// There is no such object.
    #[error("object {key} is not there")]
    NotFound {
        /// Which.
        key: String,
    },
    /// The store knows who asks, or does not, and says no. The operator has to give rights or credentials.
    #[error("object store denies to {operation} {key}: {cause}; check credentials and rights")]
    Denied {
        /// What was tried.
        operation: Operation,
        /// On which object.
        key: String,
        /// The store's words.
        cause: String,
    },
    /// The store refuses what is asked for, whoever asks: a bucket that is not there, a feature that it lacks.
    #[error("object store refuses to {operation} {key}: {cause}")]
    Rejected {
        /// What was tried.
        operation: Operation,
        /// On which object.
        key: String,
        /// The store's words.
        cause: String,
    },
    /// No attempt worked within the budget. A write may have been done nevertheless.
    #[error("object store did not {operation} {key} in {attempts} attempts: {cause}")]
    Unavailable {
        /// What was tried.
        operation: Operation,
        /// On which object.
        key: String,
        /// How often.
        attempts: u32,
        /// What the last attempt saw.
        cause: String,
    },
    /// The local file of a transfer cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The local file.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// More objects than [`crate::LISTED_MAX`].
    #[error("{directory} has more than {max} objects", max = crate::LISTED_MAX)]
    TooManyObjects {
        /// What was listed.
        directory: String,
    },
}

impl StorageError {
    /// Whether the object is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, StorageError::NotFound { .. })
    }

    /// Whether the same call may work later without anybody's help.
    pub fn is_temporary(&self) -> bool {
        matches!(self, StorageError::Unavailable { .. })
    }
}

/// What one attempt saw.
#[derive(Debug)]
pub(crate) enum AttemptError {
    NotFound,
    AlreadyThere,
    Denied(String),
    Rejected(String),
    /// Worth another attempt.
    Temporary(String),
    /// The local file of a transfer.
    File(PathBuf, io::Error),
}

impl AttemptError {
    pub(crate) fn temporary(cause: impl fmt::Display) -> Self {
        AttemptError::Temporary(cause.to_string())
    }
}

/// Codes of an object that is not there. Services answer 404 for more: for a bucket that is not there, for a user. Taken
/// for a missing object, a wrong bucket would be an empty shard.
const NO_OBJECT: [&str; 4] = ["NoSuchKey", "BlobNotFound", "NoSuchUpload", "NoSuchVersion"];

/// Codes that mean the same in the answer to any request; object_store tells a list's status from no other failure.
const NO_BUCKET: [&str; 2] = ["NoSuchBucket", "ContainerNotFound"];
const DENIED: [&str; 6] = [
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AuthenticationFailed",
    "AuthorizationFailure",
    "XAdminUserNotFound", // versitygw, for InvalidAccessKeyId
];

impl From<object_store::Error> for AttemptError {
    fn from(error: object_store::Error) -> Self {
        use object_store::Error;
        let text = with_cause(&error);
        let code = element(&text, "Code");
        if code.is_some_and(|code| NO_BUCKET.contains(&code)) {
            return AttemptError::Rejected(shortened(&text));
        }
        if code.is_some_and(|code| DENIED.contains(&code)) {
            return AttemptError::Denied(shortened(&text));
        }
        match error {
            Error::NotFound { .. } => match code {
                Some(code) if !NO_OBJECT.contains(&code) => AttemptError::Rejected(shortened(&text)),
                // The answer to a request of the length alone has no words.
                _ => AttemptError::NotFound,
            },
            Error::AlreadyExists { .. } | Error::Precondition { .. } | Error::NotModified { .. } => {
                AttemptError::AlreadyThere
            }
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => AttemptError::Denied(shortened(&text)),
            Error::InvalidPath { .. }
            | Error::NotSupported { .. }
            | Error::NotImplemented { .. }
            | Error::UnknownConfigurationKey { .. } => AttemptError::Rejected(shortened(&text)),
            // All the rest may pass: of a status that nobody knows, a caller learns after the budget.
            _ => AttemptError::Temporary(shortened(&text)),
        }
    }
}

/// The text of an error and of what lies at its bottom: a client says "error sending request" and hides that nobody
/// listens, or that the certificate is unknown.
fn with_cause(error: &object_store::Error) -> String {
    let text = error.to_string();
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let cause = cause.to_string();
    if text.contains(&cause) { text } else { format!("{cause} ({text})") }
}

/// What an element of XML holds.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    Some(rest.split_once("</")?.0)
}

/// The most of a store's answer that goes into an error.
const CAUSE_CHARACTERS_MAX: usize = 300;

/// Where a client asks for credentials that the environment does not have: the metadata services of AWS, Azure and Google.
const METADATA_SERVICES: [&str; 2] = ["//169.254.169.254/", "//metadata.google.internal/"];

/// The words of an answer that help, without what a store echoes of the request: a refused signature comes back with
/// the access key and all that was signed.
fn shortened(text: &str) -> String {
    let words = match (element(text, "Code"), element(text, "Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code.to_owned(),
        _ => text.split_whitespace().collect::<Vec<_>>().join(" "),
    };
    let words = match METADATA_SERVICES.iter().any(|service| text.contains(service)) {
        true => format!(
            "no credentials in the environment (AWS_*, GOOGLE_*, AZURE_*), and none from this machine's metadata service: {words}"
        ),
        false => words,
    };
    words.chars().take(CAUSE_CHARACTERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An AWS store sends the access key and the string to sign back to whoever signed wrongly.
    #[test]
    fn an_error_does_not_repeat_what_was_signed() {
        let text = "Server returned non-2xx status code: 403 Forbidden: <?xml version=\"1.0\"?><Error>\
            <Code>SignatureDoesNotMatch</Code><Message>The signature does not match.</Message>\
            <AWSAccessKeyId>AKIASECRET</AWSAccessKeyId><StringToSign>AWS4-HMAC-SHA256 20261127</StringToSign></Error>";
        assert_eq!("SignatureDoesNotMatch: The signature does not match.", shortened(text));
        assert_eq!(CAUSE_CHARACTERS_MAX, shortened(&"é".repeat(1000)).chars().count());
    }

    /// Whoever forgot the credentials read of a failing request to an address that he has never heard of.
    #[test]
    fn credentials_that_are_nowhere_are_named() {
        let text =
            "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 671us - 403 Forbidden";
        assert!(shortened(text).starts_with("no credentials in the environment"), "{}", shortened(text));
        assert!(shortened("Error performing GET http://127.0.0.1:9/b").starts_with("Error"));
    }

    #[test]
    fn a_missing_bucket_or_user_is_not_a_missing_object() {
        let error = |body: &str| object_store::Error::NotFound { path: "k".to_owned(), source: body.into() };
        assert!(matches!(AttemptError::from(error("<Code>NoSuchKey</Code>")), AttemptError::NotFound));
        assert!(matches!(AttemptError::from(error("")), AttemptError::NotFound));
        for code in ["NoSuchBucket", "ContainerNotFound", "WhatEverElse"] {
            let error = AttemptError::from(error(&format!("<Code>{code}</Code>")));
            assert!(matches!(error, AttemptError::Rejected(_)), "{code}");
        }
    }
}
