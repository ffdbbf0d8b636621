//! A real S3 server behind a wire that breaks: requests that never arrive, answers that are lost, in the middle of anything.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "each test uses a part of it")]
mod support;

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use remote_storage::{Operation, PARTS_ABOVE_BYTES, PutNew, RemoteStorage, block_on};
use support::{Scratch, impatient};

/// Forwards to `server` and cuts every connection after a number of bytes, in whatever direction. Ends with the process.
fn breaking_wire(server: String) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let cuts = Arc::new(AtomicU64::new(0));
    let counted = cuts.clone();
    thread::spawn(move || {
        for (number, client) in listener.incoming().enumerate() {
            let (client, server) = (client.unwrap(), TcpStream::connect(&server).unwrap());
            // Some are cut within the first request, most within some small ones; some carry a part of a large file.
            let bytes = [300, 2_500, 40_000, 700, 20_000_000, 5_000, 1_000_000, 25_000_000][number % 8];
            let left = Arc::new(AtomicI64::new(bytes + (number as i64 * 37) % 200));
            for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)] {
                let (left, cuts) = (left.clone(), counted.clone());
                thread::spawn(move || {
                    let mut buffer = vec![0; 16 << 10];
                    while let Ok(length @ 1..) = from.read(&mut buffer) {
                        let before = left.fetch_sub(length as i64, Relaxed);
                        let passes = (length as i64).min(before.max(0)) as usize;
                        if to.write_all(&buffer[..passes]).is_err() {
                            break;
                        }
                        if passes < length {
                            cuts.fetch_add(1, Relaxed);
                            break;
                        }
                    }
                    // Either end may have closed it.
                    let _ = from.shutdown(Shutdown::Both);
                    let _ = to.shutdown(Shutdown::Both);
                });
            }
        }
    });
    (address, cuts)
}

#[test]
fn everything_gets_through_a_wire_that_breaks_and_nothing_is_mistaken_for_anothers() {
    const CHILD: &str = "LAKEBASE_STORE_WIRE_CHILD";
    const TEST: &str = "everything_gets_through_a_wire_that_breaks_and_nothing_is_mistaken_for_anothers";
    let (Ok(url), Ok(endpoint)) = (std::env::var("LAKEBASE_TEST_S3_URL"), std::env::var("AWS_ENDPOINT_URL")) else {
        eprintln!("S3 is not tested: LAKEBASE_TEST_S3_URL is not set");
        return;
    };
    if std::env::var(CHILD).is_ok() {
        return through_the_wire(&format!("{url}/wire-{:016x}", getrandom::u64().unwrap()));
    }
    let Some(server) = endpoint.strip_prefix("http://") else {
        eprintln!("the wire is not tested: the server talks TLS, and a cut is a cut there, too");
        return;
    };
    let (address, cuts) = breaking_wire(server.trim_end_matches('/').to_owned());
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture"])
        .env(CHILD, "1")
        .env("AWS_ENDPOINT_URL", format!("http://{address}"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(cuts.load(Relaxed) > 30, "the wire broke {} times only", cuts.load(Relaxed));
}

fn through_the_wire(url: &str) {
    let storage = RemoteStorage::open_with(url, impatient()).unwrap();
    let scratch = Scratch::new();
    let (file, back) = (scratch.path().join("file"), scratch.path().join("back"));
    block_on(async {
        for number in 0..60usize {
            let (key, bytes) = (format!("small/{number}"), vec![number as u8; number * 97]);
            assert_eq!(PutNew::Created, storage.put_new(&key, bytes.clone()).await.unwrap(), "{number}");
            assert_eq!(bytes, storage.get(&key).await.unwrap());
            let other = storage.put_new(&key, "another's").await.unwrap();
            assert_eq!(PutNew::AlreadyThere { same: false }, other, "{number}");
        }
        assert_eq!(60, storage.list("small").await.unwrap().len());
        for (number, length) in [3 << 20, PARTS_ABOVE_BYTES + 5].into_iter().enumerate() {
            let bytes: Vec<u8> = (0..length).map(|at| ((at * 31) >> 3) as u8).collect();
            fs::write(&file, &bytes).unwrap();
            let key = format!("large/{number}");
            assert_eq!(PutNew::Created, storage.upload_new(&key, &file).await.unwrap());
            assert_eq!(length, storage.download(&key, &back).await.unwrap());
            assert!(bytes == fs::read(&back).unwrap());
        }
        storage.delete((0..60).map(|number| format!("small/{number}")).collect()).await.unwrap();
        assert!(storage.list("small").await.unwrap().is_empty());
    });
    let retries: u64 = storage.metrics().snapshot().iter().map(|of| of.retries).sum();
    let parts = storage.metrics().snapshot()[Operation::PutPart as usize];
    assert!(retries > 20 && parts.calls > 2, "{retries} retries, {} parts", parts.calls);
}
