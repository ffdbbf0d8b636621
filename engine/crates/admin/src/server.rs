//! The HTTP server: one thread, bounded connections, time limits, TLS from files that may change.

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener},
    pin::pin,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    http::{Request, StatusCode},
    response::{IntoResponse, Response},
};
use hyper::{
    body::Incoming,
    server::conn::http1,
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use identity::{Caller, NotAllowed, Tls};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use crate::{ApiError, Notices, error::as_json};

/// Largest request body.
const BODY_BYTES_MAX: usize = 1 << 20;
/// Buffer of a connection, and so the longest head of a request.
const BUFFER_BYTES: usize = 64 << 10;
/// Connections served at once; more wait in the listening queue.
const CONNECTIONS_MAX: usize = 64;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// From the first byte of a request's head to its last; an idle connection is closed after it, too.
const HEAD_LIMIT: Duration = Duration::from_secs(30);
/// From the head of a request to its response.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// How long a stopping server waits for requests that are being answered.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Pause after a failed `accept`, which fails at once again while the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// A running server. Dropping it stops it without waiting.
#[must_use = "dropping the server stops it"]
pub struct Server {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Where it listens; with the port that was chosen when it was to listen on port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops accepting, lets requests in progress finish for at most 5 s, and waits for the thread.
    pub fn stop(mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed where it happened.
            let _panicked = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// Serves `router` on `listen` (`host:port`) from a thread of its own, with TLS and required client certificates, or,
/// without `tls`, plain. Handlers find an `Extension<Caller>`.
///
/// # Errors
/// The address cannot be bound, or the thread cannot be started.
pub fn serve(listen: &str, tls: Option<Tls>, router: Router) -> io::Result<Server> {
    let listener = TcpListener::bind(listen)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {listen}: {error}")))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let router = router
        .fallback(|| async { ApiError::not_found("no such path") })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(axum::middleware::map_response(as_json));
    let (stop, stopping) = watch::channel(false);
    let thread = thread::Builder::new().name("http".to_owned()).spawn(move || {
        runtime.block_on(async move {
            match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => accept(listener, tls, router, stopping).await,
                Err(error) => tracing::error!(%error, %address, "the HTTP server cannot start"),
            }
        });
    })?;
    Ok(Server { address, stop, thread: Some(thread) })
}

async fn accept(
    listener: tokio::net::TcpListener,
    tls: Option<Tls>,
    router: Router,
    mut stopping: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // A caller with a wrong certificate or a broken client tries again for ever.
    let (notices, started) = (Arc::new(Notices::default()), Instant::now());
    let now = move || pgtypes::Instant(started.elapsed().as_nanos() as u64);
    loop {
        let place = tokio::select! {
            place = places.clone().acquire_owned() => place,
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    if notices.is_new("accept", now()) {
                        tracing::warn!(%error, "HTTP connection not accepted");
                    }
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        let (tls, router, stopping, notices) = (tls.clone(), router.clone(), stopping.clone(), notices.clone());
        tokio::spawn(async move {
            if let Err(error) = connection(stream, tls, router, stopping).await
                && notices.is_new(&format!("{} {}", peer.ip(), error.kind()), now())
            {
                tracing::warn!(%peer, %error, "HTTP connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    // All places free: every connection has ended.
    let _timed_out = timeout(STOP_LIMIT, places.acquire_many(CONNECTIONS_MAX as u32)).await;
}

#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("TLS handshake: {0}")]
    Handshake(#[from] io::Error),
    #[error("TLS handshake: took longer than {HANDSHAKE_LIMIT:?}")]
    HandshakeTimeout,
    #[error(transparent)]
    Http(#[from] hyper::Error),
}

impl ConnectionError {
    /// What is logged once per address: without the contents, which the caller could vary.
    fn kind(&self) -> &'static str {
        match self {
            ConnectionError::Handshake(_) => "handshake",
            ConnectionError::HandshakeTimeout => "handshake time",
            ConnectionError::Http(_) => "http",
        }
    }
}

async fn connection(
    stream: TcpStream,
    tls: Option<Tls>,
    router: Router,
    stopping: watch::Receiver<bool>,
) -> Result<(), ConnectionError> {
    stream.set_nodelay(true)?;
    let Some(tls) = tls else {
        return http(stream, Ok(Caller::Unchecked), router, stopping).await;
    };
    let handshake = TlsAcceptor::from(tls.server_config()).accept(stream);
    let stream = timeout(HANDSHAKE_LIMIT, handshake).await.map_err(|_| ConnectionError::HandshakeTimeout)??;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let caller = Caller::of_certificate(certificate.map(AsRef::as_ref));
    http(stream, caller, router, stopping).await
}

async fn http(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    caller: Result<Caller, NotAllowed>,
    router: Router,
    mut stopping: watch::Receiver<bool>,
) -> Result<(), ConnectionError> {
    let router = TowerToHyperService::new(router);
    let service = service_fn(|mut request: Request<Incoming>| {
        let answer = match &caller {
            Ok(caller) => {
                request.extensions_mut().insert(caller.clone());
                Ok(router.call(request))
            }
            // The certificate was verified but names nobody: the caller is told so instead of a closed connection.
            Err(refused) => Err(ApiError::from(refused.clone())),
        };
        async move { Ok::<Response, Infallible>(respond(answer).await) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_LIMIT)
            .max_buf_size(BUFFER_BYTES)
            .serve_connection(TokioIo::new(stream), service)
    );
    let ended = tokio::select! {
        result = connection.as_mut() => Some(result),
        _ = stopping.wait_for(|stop| *stop) => None,
    };
    let result = match ended {
        Some(result) => result,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    match result {
        // Idle for too long, or gone in the middle of a request: nobody is there to be told, and no fault of ours.
        Err(error) if error.is_timeout() || error.is_incomplete_message() => Ok(()),
        other => Ok(other?),
    }
}

async fn respond(answer: Result<impl Future<Output = Result<Response, Infallible>>, ApiError>) -> Response {
    match answer {
        Err(error) => error.into_response(),
        Ok(response) => match timeout(REQUEST_LIMIT, response).await {
            Ok(Ok(response)) => response,
            Ok(Err(impossible)) => match impossible {},
            Err(_) => {
                let message =
                    format!("no answer within {REQUEST_LIMIT:?}; the request may or may not have been carried out");
                ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message).into_response()
            }
        },
    }
}
