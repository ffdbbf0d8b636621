//! Errors as JSON.

use axum::{
    Json,
    body::{Body, to_bytes},
    extract::rejection::JsonRejection,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use identity::NotAllowed;

/// Longest text of an extractor's error that is passed on.
const TEXT_BYTES_MAX: usize = 16 << 10;

/// An error response: `{"error": code, "message": text}` with an HTTP status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// For programs: stable, in `snake_case`.
    pub code: String,
    /// For people.
    pub message: String,
}

impl ApiError {
    /// An error of the given status.
    pub fn new(status: StatusCode, code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status, code: code.into(), message: message.into() }
    }

    /// 404 `not_found`.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// 400 `bad_request`.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message)
    }

    /// 409 with a code that says what is in the way.
    pub fn conflict(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, message)
    }

    /// 503 `unavailable`: may work later.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message)
    }
}

impl From<NotAllowed> for ApiError {
    fn from(refused: NotAllowed) -> Self {
        Self::new(StatusCode::FORBIDDEN, "not_allowed", refused.to_string())
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        let status = rejection.status();
        Self::new(status, code_of(status), rejection.body_text())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = serde_json::json!({ "error": self.code, "message": self.message });
        (self.status, Json(body)).into_response()
    }
}

/// The standard's name of a status, as a code.
fn code_of(status: StatusCode) -> String {
    status.canonical_reason().unwrap_or("error").to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_")
}

/// Turns error responses that are not JSON (of axum's routing and extractors) into our form.
pub(crate) async fn as_json(response: Response) -> Response {
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    let json = HeaderValue::from_static("application/json");
    if !is_error || response.headers().get(header::CONTENT_TYPE) == Some(&json) {
        return response;
    }
    // `Allow` and the like stay.
    let (mut parts, body) = response.into_parts();
    parts.headers.remove(header::CONTENT_TYPE);
    parts.headers.remove(header::CONTENT_LENGTH);
    let reason = status.canonical_reason().unwrap_or("error");
    let text = to_bytes(body, TEXT_BYTES_MAX).await.ok().and_then(|bytes| String::from_utf8(bytes.to_vec()).ok());
    let message = text.filter(|text| !text.is_empty()).unwrap_or_else(|| reason.to_owned());
    let body = serde_json::json!({ "error": code_of(status), "message": message }).to_string();
    parts.headers.insert(header::CONTENT_TYPE, json);
    Response::from_parts(parts, Body::from(body))
}
