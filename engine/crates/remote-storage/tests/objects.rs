//! Objects: what every store has to do, with and without faults.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "each test uses a part of it")]
mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Barrier,
    thread,
    time::Duration,
};

use remote_storage::{
    Faults, ObjectInfo, Operation, OperationMetrics, PARTS_ABOVE_BYTES, PutNew, RemoteStorage, RetryPolicies,
    StorageError, block_on,
};
use support::{Scratch, faulty, impatient, stores};

fn info(key: &str, bytes: u64) -> ObjectInfo {
    ObjectInfo { key: key.to_owned(), bytes }
}

fn counts(storage: &RemoteStorage, operation: Operation) -> OperationMetrics {
    storage.metrics().snapshot()[operation as usize]
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut x = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn objects_are_read_as_they_were_written() {
    let (_scratch, urls) = stores();
    for url in urls {
        let storage = RemoteStorage::open(&url).unwrap();
        block_on(async {
            assert!(storage.get("a/b/one").await.unwrap_err().is_not_found(), "{url}");
            assert_eq!(Vec::<ObjectInfo>::new(), storage.list("a").await.unwrap());
            storage.put("a/b/one", "first").await.unwrap();
            storage.put("a/b/one", "second, longer").await.unwrap();
            assert_eq!("second, longer", storage.get("a/b/one").await.unwrap());
            assert_eq!("cond", storage.get_range("a/b/one", 2..6).await.unwrap());
            assert_eq!("", storage.get_range("a/b/one", 3..3).await.unwrap());
            assert!(matches!(storage.get_range("a/b/one", 10..20).await, Err(StorageError::Rejected { .. })), "{url}");
            assert_eq!(PutNew::Created, storage.put_new("a/c", "new").await.unwrap());
            assert_eq!(PutNew::AlreadyThere { same: true }, storage.put_new("a/c", "new").await.unwrap());
            assert_eq!(PutNew::AlreadyThere { same: false }, storage.put_new("a/c", "other").await.unwrap());
            assert_eq!("new", storage.get("a/c").await.unwrap());
            storage.put_new("ab/c", "").await.unwrap();
            assert_eq!("", storage.get("ab/c").await.unwrap());
            // A directory is not the beginning of a name.
            assert_eq!(vec![info("a/b/one", 14), info("a/c", 3)], storage.list("a").await.unwrap());
            assert_eq!(3, storage.list("").await.unwrap().len());
            assert_eq!(vec!["a", "ab"], storage.list_directories("").await.unwrap());
            assert_eq!(vec!["b"], storage.list_directories("a").await.unwrap());
            storage.delete(vec!["a/c".to_owned(), "a/never".to_owned(), "ab/c".to_owned()]).await.unwrap();
            storage.delete(vec!["a/c".to_owned()]).await.unwrap();
            assert_eq!(vec![info("a/b/one", 14)], storage.list("").await.unwrap());
        });
        let puts = counts(&storage, Operation::Put);
        assert_eq!((2, 0, 19), (puts.calls, puts.failures, puts.bytes));
        assert_eq!(2, puts.latency_buckets.iter().sum::<u64>());
        // A missing object is an answer, no failure of the store.
        assert_eq!(0, counts(&storage, Operation::Get).failures - 1, "the range that is not all there");
    }
}

#[test]
fn more_objects_are_deleted_and_listed_than_one_request_names() {
    let (_scratch, urls) = stores();
    for url in urls {
        let storage = RemoteStorage::open(&url).unwrap();
        let keys: Vec<String> = (0..1100).map(|number| format!("many/{number:05}")).collect();
        block_on(async {
            for some in keys.chunks(50) {
                let puts = some.iter().map(|key| storage.put(key, "x"));
                futures_util::future::try_join_all(puts).await.unwrap();
            }
            let listed = storage.list("many").await.unwrap();
            assert!(listed.iter().map(|object| &object.key).eq(&keys), "{url}");
            storage.delete(keys.clone()).await.unwrap();
            assert_eq!(Vec::<ObjectInfo>::new(), storage.list("many").await.unwrap());
        });
    }
}

/// The claim of a shard rests on this. Each has a storage of its own, as processes have.
#[test]
fn of_eight_who_create_at_once_exactly_one_wins() {
    const ROUNDS: usize = 40;
    let (_scratch, urls) = stores();
    for url in urls {
        let barrier = Barrier::new(8);
        let winners: Vec<Vec<usize>> = thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|racer| {
                    let (barrier, url) = (&barrier, &url);
                    scope.spawn(move || {
                        let storage = RemoteStorage::open(url).unwrap();
                        let won = |round: &usize| {
                            barrier.wait();
                            let key = format!("race/{round}/claim");
                            let put = storage.put_new(&key, format!("racer {racer}"));
                            block_on(put).unwrap() == PutNew::Created
                        };
                        (0..ROUNDS).filter(won).collect::<Vec<_>>()
                    })
                })
                .collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        let storage = RemoteStorage::open(&url).unwrap();
        for round in 0..ROUNDS {
            let won: Vec<usize> = (0..8).filter(|racer| winners[*racer].contains(&round)).collect();
            assert_eq!(1, won.len(), "{url}: round {round} was won by {won:?}");
            let found = block_on(storage.get(&format!("race/{round}/claim"))).unwrap();
            assert_eq!(format!("racer {}", won[0]), found);
        }
    }
}

/// As before, with requests that fail before and after they were done.
#[test]
fn of_eight_who_create_at_once_exactly_one_wins_on_a_bad_day() {
    const ROUNDS: usize = 25;
    let (_scratch, urls) = stores();
    for url in urls {
        let faults: Vec<Faults> =
            (0..8).map(|seed| Faults::seeded(seed).fail(10).throttle(10).fail_after(30).delay(3)).collect();
        let barrier = Barrier::new(8);
        let winners: Vec<Vec<usize>> = thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|racer| {
                    let (barrier, url, faults) = (&barrier, &url, &faults[racer]);
                    scope.spawn(move || {
                        let storage = faulty(url, faults);
                        let won = |round: &usize| {
                            barrier.wait();
                            let key = format!("bad-race/{round}");
                            let put = storage.put_new(&key, format!("racer {racer}"));
                            block_on(put).unwrap() == PutNew::Created
                        };
                        (0..ROUNDS).filter(won).collect::<Vec<_>>()
                    })
                })
                .collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        assert!(faults.iter().all(|faults| faults.injected() > 0), "no faults happened");
        for round in 0..ROUNDS {
            let won: Vec<usize> = (0..8).filter(|racer| winners[*racer].contains(&round)).collect();
            assert_eq!(1, won.len(), "{url}: round {round} was won by {won:?}");
        }
    }
}

#[test]
fn a_create_that_was_done_although_it_answered_an_error_is_ours() {
    let (_scratch, urls) = stores();
    for url in urls {
        let faults = Faults::seeded(11).fail_after(60);
        let storage = faulty(&url, &faults);
        for number in 0..30 {
            let key = format!("mine/{number}");
            let put = storage.put_new(&key, format!("bytes {number}"));
            assert_eq!(PutNew::Created, block_on(put).unwrap(), "{url} {number}");
        }
        assert!(faults.injected() > 10 && counts(&storage, Operation::PutNew).retries > 10);
        // The first attempt meets an object of the same bytes: nobody knows whose, and none of ours failed before.
        let calm = RemoteStorage::open(&url).unwrap();
        assert_eq!(PutNew::AlreadyThere { same: true }, block_on(calm.put_new("mine/0", "bytes 0")).unwrap());
    }
}

#[test]
fn an_outage_is_waited_out_within_the_budget_and_reported_beyond_it() {
    let (_scratch, urls) = stores();
    for url in urls {
        let faults = Faults::seeded(1);
        faults.set_outage(true);
        let mut policies = impatient();
        policies.write.budget = Duration::from_millis(200);
        let storage = RemoteStorage::open_faulty(&url, policies, faults.clone()).unwrap();
        match block_on(storage.put("down", "x")).unwrap_err() {
            StorageError::Unavailable { attempts, cause, .. } => {
                assert!(attempts > 3 && cause.contains("outage"), "{attempts} {cause}");
            }
            other => panic!("{other}"),
        }
        let patient = faulty(&url, &faults);
        thread::scope(|scope| {
            let put = scope.spawn(|| block_on(patient.put("up", "x")));
            // The fault has to have happened before it ends.
            let before = faults.injected();
            while faults.injected() < before + 3 {
                thread::yield_now();
            }
            faults.set_outage(false);
            put.join().unwrap().unwrap();
        });
        assert_eq!("x", block_on(patient.get("up")).unwrap());
    }
}

/// A page that somebody waits for does not wait behind uploads.
#[test]
fn files_come_back_as_they_went_and_do_not_stand_in_the_way_of_small_objects() {
    let (scratch, urls) = stores();
    for url in urls {
        let storage = RemoteStorage::open(&url).unwrap();
        let sizes = [0, 1, 4096, PARTS_ABOVE_BYTES as usize, PARTS_ABOVE_BYTES as usize + 12_345];
        block_on(async {
            storage.put("small", "page").await.unwrap();
            for (number, size) in sizes.into_iter().enumerate() {
                let (file, back) = (scratch.path().join("file"), scratch.path().join("back"));
                let bytes = noise(number as u64 + 1, size);
                fs::write(&file, &bytes).unwrap();
                let key = format!("files/{size}");
                let uploads = futures_util::future::join_all((0..3).map(|_| storage.upload_new(&key, &file)));
                let (uploads, small) = futures_util::join!(uploads, storage.get("small"));
                small.unwrap();
                let created = uploads.into_iter().filter(|put| *put.as_ref().unwrap() == PutNew::Created).count();
                // Those in parts are joined by whoever comes.
                assert!(created == 1 || size > PARTS_ABOVE_BYTES as usize && created >= 1, "{url} {size}: {created}");
                assert_eq!(
                    PutNew::AlreadyThere { same: true },
                    storage.upload_new(&key, &file).await.unwrap(),
                    "{url} {size}"
                );
                assert_eq!(size as u64, storage.download(&key, &back).await.unwrap());
                assert!(bytes == fs::read(&back).unwrap(), "{url} {size}");
                fs::write(&file, noise(99, size.max(1))).unwrap();
                assert_eq!(PutNew::AlreadyThere { same: false }, storage.upload_new(&key, &file).await.unwrap());
            }
        });
        assert_eq!(
            2,
            fs::read_dir(scratch.path())
                .unwrap()
                .filter(|entry| { entry.as_ref().unwrap().file_type().unwrap().is_file() })
                .count(),
            "temporary files stay"
        );
        fs::remove_file(scratch.path().join("back")).unwrap();
        fs::remove_file(scratch.path().join("file")).unwrap();
    }
}

#[test]
fn files_get_through_on_a_bad_day() {
    let (scratch, urls) = stores();
    for url in urls {
        let faults = Faults::seeded(5).fail(20).throttle(10).fail_after(15);
        let storage = faulty(&url, &faults);
        let (file, back) = (scratch.path().join("file"), scratch.path().join("back"));
        for round in 0..4 {
            let bytes = noise(round + 1, PARTS_ABOVE_BYTES as usize + (round as usize) * 7_000_000 + 1);
            fs::write(&file, &bytes).unwrap();
            let key = format!("bad/{round}");
            assert_eq!(PutNew::Created, block_on(storage.upload_new(&key, &file)).unwrap(), "{url}");
            block_on(storage.download(&key, &back)).unwrap();
            assert!(bytes == fs::read(&back).unwrap(), "{url} {round}");
        }
        assert!(faults.injected() > 5);
        fs::remove_file(back).unwrap();
    }
}

#[test]
fn a_missing_file_and_a_missing_directory_are_not_the_stores_fault() {
    let (scratch, urls) = stores();
    for url in urls {
        let storage = RemoteStorage::open(&url).unwrap();
        let nowhere = scratch.path().join("no/such/file");
        assert!(matches!(block_on(storage.upload_new("k", &nowhere)), Err(StorageError::File { .. })));
        block_on(storage.put("there", "x")).unwrap();
        assert!(matches!(block_on(storage.download("there", &nowhere)), Err(StorageError::File { .. })));
        let here = scratch.path().join("here");
        assert!(block_on(storage.download("not-there", &here)).unwrap_err().is_not_found());
        assert!(!here.exists());
    }
}

/// The engine's cores run another runtime than the store.
#[test]
fn futures_run_on_a_core_of_the_engine() {
    let (_scratch, urls) = stores();
    for url in urls {
        let storage = RemoteStorage::open(&url).unwrap();
        let answer = driver::run_core(async move {
            let tasks: Vec<_> = (0..200)
                .map(|number| {
                    let storage = storage.clone();
                    driver::spawn(async move {
                        let key = format!("core/{number}");
                        storage.put(&key, key.clone()).await.unwrap();
                        assert_eq!(key, storage.get(&key).await.unwrap());
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            storage.list("core").await.unwrap().len()
        });
        assert_eq!(200, answer.unwrap());
    }
}

/// A process that died in a write leaves it beside its place.
#[test]
fn what_is_on_its_way_is_no_object() {
    let scratch = Scratch::new();
    let url = format!("file://{}", scratch.path().display());
    let storage = RemoteStorage::open(&url).unwrap();
    block_on(storage.put("a/b", "x")).unwrap();
    fs::write(scratch.path().join("a/b#123456789"), "half").unwrap();
    assert_eq!(vec![info("a/b", 1)], block_on(storage.list("a")).unwrap());
    block_on(storage.put_new("a/c", "y")).unwrap();
    let mut names: Vec<_> =
        fs::read_dir(scratch.path().join("a")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(["b", "b#123456789", "c"].map(std::ffi::OsString::from)[..], names[..]);
}

#[test]
fn only_urls_of_stores_are_opened_and_none_with_credentials() {
    let table = [
        "",
        "store",
        "file://relative",
        "ftp://host/x",
        "s3://",
        "s3://user:password@bucket/prefix",
        "s3://bucket?x=1",
        "gs://bucket/#fragment",
        "memory:///",
        "http://host/bucket",
    ];
    for url in table {
        assert!(RemoteStorage::open(url).is_err(), "{url}");
    }
    let error = RemoteStorage::open("s3://bucket/x?faults=nonsense").unwrap_err();
    assert!(error.to_string().contains("faults: nonsense: expected seed:N"), "{error}");
}

/// Runs one test of this file again with another environment.
fn again(test: &str, environment: &[(&str, &str)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .envs(environment.iter().copied())
        .env("LAKEBASE_STORE_TEST_CHILD", test)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    text
}

fn is_child(test: &str) -> bool {
    std::env::var("LAKEBASE_STORE_TEST_CHILD").is_ok_and(|child| child == test)
}

#[test]
fn credentials_that_are_refused_are_said_so_and_not_repeated() {
    const TEST: &str = "credentials_that_are_refused_are_said_so_and_not_repeated";
    let Ok(url) = std::env::var("LAKEBASE_TEST_S3_URL") else {
        eprintln!("S3 is not tested: LAKEBASE_TEST_S3_URL is not set");
        return;
    };
    if is_child(TEST) {
        let storage = RemoteStorage::open_with(&url, impatient()).unwrap();
        let errors = [
            block_on(storage.get("x")).map(drop).unwrap_err(),
            block_on(storage.put("x", "y")).unwrap_err(),
            block_on(storage.list("x")).map(drop).unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, StorageError::Denied { .. }), "{error:?}");
            println!("{error} {error:?} {storage:?}");
        }
        return;
    }
    // versitygw answers the second with 404, which is not to be taken for a missing object.
    for (name, value) in [("AWS_SECRET_ACCESS_KEY", "very-secret-word"), ("AWS_ACCESS_KEY_ID", "unknown-key-word")] {
        let text = again(TEST, &[(name, value)]);
        assert_eq!(3, text.matches("check credentials and rights").count(), "{text}");
        assert!(!text.contains("secret-word") && !text.contains("key-word"), "{text}");
    }
}

#[test]
fn a_bucket_that_is_not_there_is_no_empty_store() {
    let Ok(url) = std::env::var("LAKEBASE_TEST_S3_URL") else {
        eprintln!("S3 is not tested: LAKEBASE_TEST_S3_URL is not set");
        return;
    };
    let missing = url.replace("s3://", "s3://missing-");
    let storage = RemoteStorage::open_with(&missing, impatient()).unwrap();
    for error in [
        block_on(storage.list("x")).unwrap_err(),
        block_on(storage.get("x")).map(drop).unwrap_err(),
        block_on(storage.put_new("x", "y")).map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, StorageError::Rejected { .. }) && error.to_string().contains("bucket"), "{error:?}");
    }
}

/// The services that no server can be had for here: their settings make a client.
#[test]
fn other_services_are_opened_with_their_settings() {
    const TEST: &str = "other_services_are_opened_with_their_settings";
    if is_child(TEST) {
        RemoteStorage::open("gs://bucket/prefix").unwrap();
        RemoteStorage::open("az://container/prefix").unwrap();
        return;
    }
    let key = "a2V5";
    again(TEST, &[("AZURE_STORAGE_ACCOUNT_NAME", "account"), ("AZURE_STORAGE_ACCOUNT_KEY", key)]);
}

/// Nobody listens there, and then nobody answers.
#[test]
fn a_server_that_is_not_there_is_unavailable_in_time() {
    const TEST: &str = "a_server_that_is_not_there_is_unavailable_in_time";
    if is_child(TEST) {
        let mut policies = RetryPolicies::default();
        policies.read.budget = Duration::from_secs(2);
        policies.read.attempt_timeout = Duration::from_millis(500);
        let storage = RemoteStorage::open_with("s3://bucket", policies).unwrap();
        let error = block_on(storage.get("x")).unwrap_err();
        assert!(error.is_temporary(), "{error:?}");
        println!("{error}");
        return;
    }
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ports =
        [(silent.local_addr().unwrap(), "no answer in 500ms"), (closed.local_addr().unwrap(), "Connection refused")];
    drop(closed);
    for (address, cause) in ports {
        let endpoint = format!("http://{address}");
        // As in a container without the system's root certificates.
        let text = again(
            TEST,
            &[
                ("AWS_ENDPOINT_URL", endpoint.as_str()),
                ("AWS_ALLOW_HTTP", "true"),
                ("AWS_ACCESS_KEY_ID", "k"),
                ("AWS_SECRET_ACCESS_KEY", "s"),
                ("SSL_CERT_FILE", "/nonexistent"),
                ("SSL_CERT_DIR", "/nonexistent"),
            ],
        );
        assert!(text.contains("object store did not get x in") && text.contains(cause), "{text}");
    }
}

#[test]
fn an_endpoint_without_encryption_is_used_only_when_that_is_said() {
    const TEST: &str = "an_endpoint_without_encryption_is_used_only_when_that_is_said";
    if is_child(TEST) {
        println!("{}", RemoteStorage::open("s3://bucket").unwrap_err());
        return;
    }
    let text = again(TEST, &[("AWS_ENDPOINT_URL", "http://127.0.0.1:1"), ("AWS_ALLOW_HTTP", "false")]);
    assert!(text.contains("set AWS_ALLOW_HTTP=true if that is meant"), "{text}");
}

/// What `strace` saw of a process: file names stand behind descriptors.
fn calls_of(test: &str, directory: &Path) -> Vec<String> {
    let trace = directory.join("trace");
    let output = Command::new("strace")
        .args(["--follow-forks", "--decode-fds=path", "-qq", "--trace=fsync,fdatasync,rename,link,linkat,renameat2"])
        .arg(format!("--output={}", trace.display()))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("LAKEBASE_STORE_TEST_CHILD", test)
        .env("LAKEBASE_STORE_TEST_DIRECTORY", directory)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    fs::read_to_string(trace).unwrap().lines().map(str::to_owned).collect()
}

/// An object that a caller was told of survives a power cut: the file was synced before it got its name, its directory
/// behind it, and those above, which another process may have made without a sync.
#[test]
fn an_object_in_a_directory_is_synced_and_so_is_all_above_it() {
    const TEST: &str = "an_object_in_a_directory_is_synced_and_so_is_all_above_it";
    if is_child(TEST) {
        let root = std::env::var("LAKEBASE_STORE_TEST_DIRECTORY").unwrap();
        let storage = RemoteStorage::open(&format!("file://{root}/store")).unwrap();
        block_on(storage.put_new("made/new", "x")).unwrap();
        block_on(storage.put("made/over", "x")).unwrap();
        block_on(storage.put("made/over", "y")).unwrap();
        block_on(storage.upload_new("file/layer", &PathBuf::from(root).join("local"))).unwrap();
        return;
    }
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.path().join("store/made")).unwrap();
    fs::write(scratch.path().join("local"), "layer").unwrap();
    let calls = calls_of(TEST, scratch.path());
    let store = scratch.path().join("store").display().to_string();
    let at = |from: usize, pattern: [&str; 2]| {
        let found = calls[from..].iter().position(|call| pattern.iter().all(|part| call.contains(part)));
        from + found.unwrap_or_else(|| panic!("no {pattern:?} from {from} in {calls:#?}"))
    };
    for (object, named) in
        [("made/new", "link"), ("made/over", "rename"), ("made/over", "rename"), ("file/layer", "link")]
    {
        let (directory, _) = object.split_once('/').unwrap();
        let synced = at(0, ["fsync(", &format!("{store}/{object}#")]);
        let placed = at(synced, [named, &format!("{store}/{object}\"")]);
        at(placed, ["fsync(", &format!("{store}/{directory}>")]);
        // Once, before the first object in it is reported: the root's entry for the directory.
        assert!(at(0, ["fsync(", &format!("{store}>")]) < placed);
    }
    let root_synced =
        calls.iter().filter(|call| call.contains(&format!("{store}>")) && call.contains("fsync(")).count();
    assert!((3..=4).contains(&root_synced), "once at the opening, once for each directory: {calls:#?}");
}
