//! The servers over real sockets.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use admin::{ApiError, Unread, serve, serve_metrics};
use axum::{
    Extension, Json, Router,
    extract::Path,
    routing::{get, post, put},
};
use identity::{Call, Caller, Role, Tls, ca};
use pgtypes::ClusterId;
use prometheus_client::{metrics::counter::Counter, registry::Registry};
use rustls::{ClientConnection, StreamOwned};

const CLUSTER: ClusterId = ClusterId([5; 16]);

fn router() -> Router {
    async fn who(Extension(caller): Extension<Caller>) -> String {
        match caller {
            Caller::Certified(peer) => peer.to_string(),
            Caller::Unchecked => "anyone".to_owned(),
        }
    }
    async fn fence(body: Unread) -> Result<Json<u64>, ApiError> {
        Ok(Json(body.authorized(Call::Fence, CLUSTER).await?))
    }
    async fn square(Path(number): Path<u32>) -> String {
        (number * number).to_string()
    }
    Router::new().route("/who", get(who)).route("/fence", post(fence)).route("/square/{number}", put(square))
}

/// Sends one request and reads until the server closes.
fn exchange(mut stream: impl Read + Write, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    // A server that closes without TLS's own farewell is an error here; what came before is what counts.
    let _ended = stream.read_to_string(&mut response);
    response
}

fn get_request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
}

fn post_request(path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}

fn plain(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

struct Certificates(PathBuf);

impl Certificates {
    fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("admin-{}", uuid::Uuid::new_v4()));
        ca::init(&dir, CLUSTER).unwrap();
        Self(dir)
    }

    fn issue(&self, role: Role, name: &str) -> Tls {
        Tls::load(ca::issue(&self.0, role, name, &["127.0.0.1".to_owned()]).unwrap()).unwrap()
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _left_behind = std::fs::remove_dir_all(&self.0);
    }
}

fn encrypted(address: SocketAddr, tls: &Tls) -> StreamOwned<ClientConnection, TcpStream> {
    let session = ClientConnection::new(tls.client_config(), "127.0.0.1".try_into().unwrap()).unwrap();
    StreamOwned::new(session, plain(address))
}

#[test]
fn handlers_learn_who_calls_and_refuse_by_role() {
    let certificates = Certificates::new();
    let server = serve("127.0.0.1:0", Some(certificates.issue(Role::Safekeeper, "sk-1")), router()).unwrap();
    let (operator, compute) = (certificates.issue(Role::Operator, "op"), certificates.issue(Role::Compute, "pg-1"));

    let who = exchange(encrypted(server.address(), &compute), &get_request("/who"));
    assert!(who.ends_with(&format!("compute pg-1 of {CLUSTER}")), "{who}");

    let fenced = exchange(encrypted(server.address(), &operator), &post_request("/fence", "7"));
    assert!(fenced.starts_with("HTTP/1.1 200") && fenced.ends_with('7'), "{fenced}");

    // The same answer whatever the body is: it was not looked at.
    let body = r#"{"error":"not_allowed","message":"a certificate with role compute may not call fence"}"#;
    for sent in ["7", "\"seven\"", "}{", ""] {
        let refused = exchange(encrypted(server.address(), &compute), &post_request("/fence", sent));
        assert!(refused.starts_with("HTTP/1.1 403") && refused.ends_with(body), "{sent}: {refused}");
    }
    server.stop();
}

#[test]
fn plain_bytes_on_a_tls_port_reach_no_handler() {
    let certificates = Certificates::new();
    let server = serve("127.0.0.1:0", Some(certificates.issue(Role::Safekeeper, "sk-1")), router()).unwrap();
    let answer = {
        let mut stream = plain(server.address());
        stream.write_all(get_request("/who").as_bytes()).unwrap();
        let mut bytes = Vec::new();
        let _ended = stream.read_to_end(&mut bytes);
        bytes
    };
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    server.stop();
}

#[test]
fn every_error_is_json() {
    let server = serve("127.0.0.1:0", None, router()).unwrap();
    let large = format!("\"{}\"", "x".repeat((1 << 20) + 1));
    for (request, status, code) in [
        (get_request("/nowhere"), 404, "not_found"),
        (get_request("/fence"), 405, "method_not_allowed"),
        (post_request("/fence", "7x"), 400, "bad_request"),
        (post_request("/fence", "\"seven\""), 422, "unprocessable_entity"),
        (post_request("/fence", &large), 413, "payload_too_large"),
        (post_request("/fence", "7").replace("application/json", "text/plain"), 415, "unsupported_media_type"),
        ("PUT /square/x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_owned(), 400, "bad_request"),
    ] {
        let response = exchange(plain(server.address()), &request);
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(code, body["error"], "{head} {body}");
        assert!(!body["message"].as_str().unwrap().is_empty());
    }
    let who = exchange(plain(server.address()), &get_request("/who"));
    assert!(who.ends_with("anyone"), "{who}");
    server.stop();
}

#[test]
fn garbage_is_answered_and_the_server_goes_on() {
    let server = serve("127.0.0.1:0", None, router()).unwrap();
    for garbage in ["\0\u{1}\u{2}\r\n\r\n".to_owned(), format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 17))] {
        let response = exchange(plain(server.address()), &garbage);
        assert!(response.starts_with("HTTP/1.1 4"), "{response}");
    }
    assert!(exchange(plain(server.address()), &get_request("/who")).starts_with("HTTP/1.1 200"));
    server.stop();
}

#[test]
fn stopping_lets_a_request_finish_and_accepts_no_more() {
    let entered = Arc::new(tokio::sync::Notify::new());
    let signal = entered.clone();
    let router = Router::new().route(
        "/slow",
        get(move || async move {
            signal.notify_one();
            tokio::time::sleep(Duration::from_millis(200)).await;
            "done"
        }),
    );
    let server = serve("127.0.0.1:0", None, router).unwrap();
    let address = server.address();
    let client = std::thread::spawn(move || exchange(plain(address), &get_request("/slow")));
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(entered.notified());
    server.stop();
    let response = client.join().unwrap();
    assert!(response.starts_with("HTTP/1.1 200") && response.ends_with("done"), "{response}");
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn metrics_and_health_are_served() {
    let mut registry = Registry::default();
    let appends = Counter::<u64>::default();
    registry.register("appends", "Appends received", appends.clone());
    appends.inc_by(3);
    let server = serve_metrics("127.0.0.1:0", registry).unwrap();
    let metrics = exchange(plain(server.address()), &get_request("/metrics"));
    assert!(metrics.contains("content-type: application/openmetrics-text"), "{metrics}");
    assert!(metrics.contains("appends_total 3\n") && metrics.ends_with("# EOF\n"), "{metrics}");
    assert!(exchange(plain(server.address()), &get_request("/healthz")).ends_with("ok\n"));
    server.stop();
}

#[test]
fn address_that_is_taken_is_named() {
    let server = serve("127.0.0.1:0", None, router()).unwrap();
    let address = server.address().to_string();
    let error = serve(&address, None, router()).err().unwrap().to_string();
    assert!(error.contains(&address), "{error}");
    server.stop();
}
