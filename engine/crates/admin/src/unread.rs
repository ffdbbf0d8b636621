//! A body that is read only for callers who may make the call.

use axum::{
    Json,
    extract::{FromRequest, Request, rejection::JsonRejection},
};
use identity::{Call, Caller};
use pgtypes::ClusterId;

use crate::ApiError;

/// A request whose body nobody has looked at. The last argument of a handler.
///
/// The permission comes first because the order is visible from outside: a caller that may not call would learn from 400
/// and 422 what a body must look like, and would make the server parse up to a megabyte.
#[derive(Debug)]
pub struct Unread(Request);

impl Unread {
    /// The body, from a caller that may make `call` about `cluster`.
    ///
    /// # Errors
    /// The caller's fault: 403 when it may not, whatever the body is; else 400, 413, 415 or 422 for a body that is no JSON, too
    /// large, of another type, or not a `T`.
    pub async fn authorized<T>(self, call: Call, cluster: ClusterId) -> Result<T, ApiError>
    where
        Json<T>: FromRequest<(), Rejection = JsonRejection>,
    {
        // The server puts it into each request; a router that is served by something else permits nothing.
        let caller = self.0.extensions().get::<Caller>();
        caller.ok_or(identity::NotAllowed::NoCertificate)?.authorize(call, cluster)?;
        let Json(body) = Json::from_request(self.0, &()).await?;
        Ok(body)
    }
}

impl<S: Sync> FromRequest<S> for Unread {
    type Rejection = std::convert::Infallible;

    async fn from_request(request: Request, _: &S) -> Result<Self, Self::Rejection> {
        Ok(Unread(request))
    }
}
