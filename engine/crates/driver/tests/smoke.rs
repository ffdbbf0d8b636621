//! What the shells rely on holds with io_uring, with polling, and where the kernel forbids io_uring.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    io::{self, Write},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::Command,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use driver::{
    AlignedBuffer, BLOCK_BYTES, Connection, Event, EventFd, File, Listener, OpenOptions, Signals, connect, spawn,
    timeout,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// Set for a child process: the driver that it must have got.
const EXPECTED: &str = "DRIVER_SMOKE_EXPECTED";

#[test]
fn everything_works_with_the_driver_that_the_kernel_allows() {
    let kind = driver::run_core(suite()).unwrap();
    assert_eq!(driver::probe().unwrap(), kind);
    if let Ok(expected) = std::env::var(EXPECTED) {
        assert_eq!(expected, kind.as_str());
    }
}

#[test]
fn everything_works_when_polling_is_asked_for() {
    let mut child = child("polling");
    child.env("LAKEBASE_IO", "polling");
    assert_success(child);
}

#[test]
fn everything_works_under_a_filter_that_forbids_io_uring() {
    let mut child = child("polling");
    // SAFETY: the closure makes two system calls and allocates nothing.
    unsafe { child.pre_exec(forbid_io_uring) };
    assert_success(child);
}

#[test]
fn io_uring_asked_for_and_forbidden_is_an_error() {
    let mut child = child("io_uring");
    child.env("LAKEBASE_IO", "io_uring");
    // SAFETY: as above.
    unsafe { child.pre_exec(forbid_io_uring) };
    let output = child.output().unwrap();
    assert!(!output.status.success());
}

/// Runs the first test again, in a process of its own.
fn child(expected: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "everything_works_with_the_driver_that_the_kernel_allows", "--nocapture"])
        .env(EXPECTED, expected);
    command
}

fn assert_success(mut command: Command) {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "the child ran no test: {text}");
}

/// Makes `io_uring_setup` fail with EPERM from now on, as container runtimes do.
fn forbid_io_uring() -> io::Result<()> {
    let statement = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let filter = [
        // Offset 0 of `struct seccomp_data` is the number of the call.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: `program` and the filter that it points to outlive the calls.
    let result = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

async fn suite() -> driver::DriverKind {
    files_keep_what_was_synced().await;
    files_opened_as_durable_are_so_with_and_without_direct_io().await;
    streams_carry_both_directions(None).await;
    streams_carry_both_directions(Some(tls())).await;
    a_stream_moves_to_another_core(None).await;
    a_stream_moves_to_another_core(Some(tls())).await;
    garbage_is_no_handshake().await;
    a_closer_ends_a_waiting_read().await;
    wake_ups_arrive().await;
    driver::kind()
}

struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

async fn files_keep_what_was_synced() {
    let directory = Directory(std::env::temp_dir().join(format!("driver-smoke-{}", std::process::id())));
    std::fs::create_dir(&directory.0).unwrap();
    let direct = driver::direct_io_works(&directory.0).await.unwrap();
    let path = directory.0.join("file");
    let file = File::open(&path, OpenOptions { write: true, create_new: true, direct, durable: false }).await.unwrap();
    assert_eq!(direct, file.is_direct());
    let size = 3 << 20;
    driver::fill_with_zeros(&file, size + BLOCK_BYTES as u64).await.unwrap();
    driver::sync_directory(&directory.0).await.unwrap();
    assert_eq!(size + BLOCK_BYTES as u64, file.size_bytes().await.unwrap());

    // More writes in flight than threads of a pool would like.
    let writes: Vec<_> = (0..size / BLOCK_BYTES as u64)
        .map(|block| {
            let file = file.clone();
            spawn(async move {
                let mut buffer = AlignedBuffer::zeroed(BLOCK_BYTES);
                buffer.fill(block as u8);
                file.write_at(buffer, block * BLOCK_BYTES as u64).await.0.unwrap();
            })
        })
        .collect();
    for write in writes {
        write.await;
    }
    file.sync_data().await.unwrap();

    let stored = std::fs::read(&path).unwrap();
    assert!(stored[..size as usize].iter().enumerate().all(|(i, &byte)| byte == (i / BLOCK_BYTES) as u8));
    assert!(stored[size as usize..].iter().all(|&byte| byte == 0));
    assert_eq!(stored[5000..15000], file.read_range(5000, 10000).await.unwrap()[..]);
    let beyond = file.read_range(size, 2 * BLOCK_BYTES).await;
    assert_eq!(Some(io::ErrorKind::UnexpectedEof), beyond.err().map(|error| error.kind()));

    let again = File::open(&path, OpenOptions { write: true, create_new: true, direct, durable: false }).await;
    assert_eq!(Some(io::ErrorKind::AlreadyExists), again.err().map(|error| error.kind()));
}

/// The kernel must be asked for durable writes on every file system, those without direct I/O included: nothing else makes
/// them durable, and no write fails where it was not asked.
async fn files_opened_as_durable_are_so_with_and_without_direct_io() {
    let directory = Directory(std::env::temp_dir().join(format!("driver-durable-{}", std::process::id())));
    std::fs::create_dir(&directory.0).unwrap();
    for direct in [false, driver::direct_io_works(&directory.0).await.unwrap()] {
        for durable in [false, true] {
            let path = directory.0.join(format!("direct-{direct}-durable-{durable}"));
            std::fs::write(&path, [0; BLOCK_BYTES]).unwrap();
            let options = OpenOptions { write: true, direct, durable, ..OpenOptions::default() };
            let file = File::open(&path, options).await.unwrap();
            assert_eq!(direct, file.is_direct());
            let asked: Vec<bool> = open_flags(&path).iter().map(|flags| flags & libc::O_DSYNC != 0).collect();
            assert!(
                asked.contains(&durable) && !asked.contains(&!durable),
                "direct {direct}, durable {durable}: {asked:?}"
            );
            file.write_at(AlignedBuffer::zeroed(BLOCK_BYTES), 0).await.0.unwrap();
        }
    }
}

/// Flags of each descriptor of this process that leads to `path` (proc(5), fdinfo).
fn open_flags(path: &std::path::Path) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let entry = entry.unwrap();
        if std::fs::read_link(entry.path()).is_ok_and(|target| target == path) {
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", entry.file_name().display())).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            found.push(i32::from_str_radix(flags.trim(), 8).unwrap());
        }
    }
    found
}

type Configs = (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>, Vec<u8>);

/// A server and a client that trust each other, and the client's certificate.
fn tls() -> Configs {
    let mut authority_params = rcgen::CertificateParams::new(vec![]).unwrap();
    authority_params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let authority = authority_params.self_signed(&authority_key).unwrap();
    let issuer = rcgen::Issuer::new(authority_params, authority_key);
    let issue = || {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        (certificate.der().clone(), PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der())))
    };
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.der().clone()).unwrap();
    let roots = Arc::new(roots);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build().unwrap();
    let (certificate, key) = issue();
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let (certificate, key) = issue();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate.clone()], key)
        .unwrap();
    (Arc::new(server), Arc::new(client), certificate.to_vec())
}

/// Two ends of a connection, client first.
async fn pair(tls: &Option<Configs>) -> (Connection, Connection) {
    let listener = Listener::listen("127.0.0.1:0").unwrap();
    let address = listener.local_address().unwrap().to_string();
    let server_config = tls.as_ref().map(|tls| tls.0.clone());
    let server = spawn(async move {
        let connection = listener.accept().await.unwrap();
        match server_config {
            None => connection,
            Some(config) => connection.upgrade_server(config).await.unwrap(),
        }
    });
    let client = connect(&address, Duration::from_secs(5)).await.unwrap();
    let client = match tls {
        None => client,
        Some(tls) => client.upgrade_client(tls.1.clone(), "localhost").await.unwrap(),
    };
    (client, server.await)
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| (i.wrapping_mul(31) >> 3) as u8 ^ seed as u8).collect()
}

async fn read_to_end(mut reader: driver::Reader) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let (result, buffer) = reader.read(Vec::with_capacity(100_000)).await;
        if result.unwrap() == 0 {
            return bytes;
        }
        bytes.extend_from_slice(&buffer);
    }
}

async fn streams_carry_both_directions(tls: Option<Configs>) {
    const LENGTH: usize = 4 << 20;
    let (client, server) = pair(&tls).await;
    assert_eq!(tls.as_ref().map(|tls| tls.2.clone()), server.peer_certificate());
    let (client_reader, mut client_writer) = client.into_split();
    let (server_reader, mut server_writer) = server.into_split();
    // Both send before either has read all: a reader that needed the writer's turn would block here.
    let to_server = spawn(async move {
        let parts = pattern(LENGTH, 1).chunks(70_001).map(<[u8]>::to_vec).collect();
        client_writer.write_vectored(parts).await.0.unwrap();
        client_writer.shutdown().await.unwrap();
        client_writer
    });
    let to_client = spawn(async move {
        for part in pattern(LENGTH, 2).chunks(33_333) {
            server_writer.write_all(part.to_vec()).await.0.unwrap();
        }
        server_writer.shutdown().await.unwrap();
        server_writer
    });
    let at_server = spawn(read_to_end(server_reader));
    assert!(pattern(LENGTH, 2) == read_to_end(client_reader).await);
    assert!(pattern(LENGTH, 1) == at_server.await);
    to_server.await;
    to_client.await;
}

async fn a_stream_moves_to_another_core(tls: Option<Configs>) {
    let (client, mut server) = pair(&tls).await;
    let (mut client_reader, mut client_writer) = client.into_split();
    client_writer.write_all(b"hello, world".to_vec()).await.0.unwrap();
    // Reads a part only: the rest may be inside the TLS session that moves.
    let (result, hello) = server.read(Vec::with_capacity(5)).await;
    assert_eq!((5, b"hello".to_vec()), (result.unwrap(), hello));
    let moved = server.detach().unwrap();
    let thread = driver::start_core("other", move || async move {
        let mut server = moved.attach().unwrap();
        let (result, rest) = server.read(Vec::with_capacity(100)).await;
        result.unwrap();
        server.write_all(rest).await.0.unwrap();
    })
    .unwrap();
    let (result, echo) = client_reader.read(Vec::with_capacity(100)).await;
    result.unwrap();
    assert_eq!(b", world".to_vec(), echo);
    driver::unblock(move || thread.join()).await.unwrap().unwrap();
}

async fn garbage_is_no_handshake() {
    let (mut client, server) = pair(&None).await;
    client.write_all(vec![b'x'; 10_000]).await.0.unwrap();
    let result = server.upgrade_server(tls().0).await;
    assert_eq!(Some(io::ErrorKind::InvalidData), result.err().map(|error| error.kind()));
}

async fn a_closer_ends_a_waiting_read() {
    let (client, _server) = pair(&None).await;
    let closer = client.closer();
    let (mut reader, _writer) = client.into_split();
    let read = spawn(async move { reader.read(Vec::with_capacity(10)).await });
    driver::sleep(Duration::from_millis(5)).await;
    closer.close();
    assert_eq!(0, read.await.0.unwrap());
}

async fn wake_ups_arrive() {
    let before = driver::now();
    assert!(timeout(Duration::from_millis(20), std::future::pending::<()>()).await.is_none());
    assert!(driver::now().since(before) >= Duration::from_millis(20));

    let bell = EventFd::new().unwrap();
    let waiter = bell.waiter().unwrap();
    assert!(timeout(Duration::from_millis(1), waiter.wait()).await.is_none());
    let ringer = bell.clone();
    let thread = std::thread::spawn(move || {
        ringer.ring();
        ringer.ring();
    });
    let mut count = 0;
    while count < 2 {
        count += waiter.wait().await.unwrap();
    }
    thread.join().unwrap();

    let mut signals = Signals::catch(&[libc::SIGUSR1, libc::SIGUSR2]).unwrap();
    // SAFETY: sends a signal to this thread, which has a handler.
    unsafe { libc::raise(libc::SIGUSR1) };
    assert_eq!(vec![libc::SIGUSR1], signals.wait().await.unwrap());

    let event = Rc::new(Event::new());
    let value = Rc::new(std::cell::Cell::new(0));
    let waiters: Vec<_> = (1..=3)
        .map(|target| {
            let (event, value) = (event.clone(), value.clone());
            spawn(async move { event.until(|| (value.get() >= target).then(|| value.get())).await })
        })
        .collect();
    for next in 1..=3 {
        value.set(next);
        event.set();
        driver::sleep(Duration::ZERO).await;
    }
    for waiter in waiters {
        waiter.await;
    }

    let (sender, receiver) = driver::oneshot::channel();
    let thread = std::thread::spawn(move || sender.send(7).unwrap());
    assert_eq!(Ok(7), receiver.await);
    thread.join().unwrap();

    let calls: Vec<_> = (0..300u32).map(|i| spawn(driver::unblock(move || i))).collect();
    let mut sum = 0;
    for call in calls {
        sum += call.await;
    }
    assert_eq!((0..300).sum::<u32>(), sum);
    io::stdout().flush().unwrap();
}
