//! Every process of PostgreSQL ends when it must, however it was started, whoever dies first.
//!
//! Real processes: a script plays the postmaster, and its children play backends, each in a session of its own, as
//! PostgreSQL's are. This program plays three parts: the test, the agent that is killed, and the helper (`compute-init`).

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::mpsc::{Receiver, channel},
    thread::sleep,
    time::{Duration, Instant},
};

use compute::{
    IsolationChoice,
    isolation::{Isolation, isolation_name},
    postgres::{Ended, Launch, LogTarget, Postgres, PostgresEvent, choose_isolation},
};

/// The issue allows a second from the agent's end to the end of the last backend; a loaded machine gets ten.
const LIMIT: Duration = Duration::from_secs(10);

/// A postmaster with two backends, one of them started by another.
const SERVER: &str = "setsid sleep MARK & (setsid sleep MARK &) ; trap 'exit 0' INT; sleep MARK & wait";
/// A postmaster that ends and leaves a backend behind.
const LEAVING: &str = "setsid sleep MARK & sleep 0.2; exit 3";
/// A postmaster that does not care about signals.
const DEAF: &str = "trap '' INT QUIT TERM; setsid sleep MARK & while :; do sleep 1; done";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("compute-init") => ExitCode::from(u8::try_from(compute::init_main(&arguments[1..])).unwrap_or(u8::MAX)),
        Some("play-agent") => play_agent(&arguments[1], Path::new(&arguments[2])),
        // The harness is asked to list its tests by tools that run them one by one.
        Some("--list") => {
            println!("isolation: test");
            ExitCode::SUCCESS
        }
        _ => run_all(),
    }
}

fn run_all() -> ExitCode {
    let own = PathBuf::from("/proc/self/exe");
    let found = choose_isolation(&own, IsolationChoice::Auto).expect("one way is always there");
    let mut ways = vec![Isolation::ProcessTree];
    if found != Isolation::ProcessTree {
        ways.push(found);
    }
    for way in ways {
        println!("isolation: {}", isolation_name(way));
        killed_at_once(way);
        gone_with_the_agent(way);
        nothing_is_left_behind(way);
        graceful_stop(way);
        a_missing_program_is_reported(way);
    }
    ExitCode::SUCCESS
}

/// The fence.
fn killed_at_once(way: Isolation) {
    for script in [SERVER, DEAF] {
        let server = Script::new("kill", script);
        let (postgres, events) = server.launch(way);
        server.wait_for_backends();

        let started = Instant::now();
        postgres.killer().kill();

        assert_eq!(Some(PostgresEvent::Gone), last(&events));
        assert_eq!(0, server.processes(), "{way:?}");
        println!("  killed in {:?}", started.elapsed());
        postgres.reap().expect("reaped");
    }
}

/// `kill -9` of the agent: nobody is left to do anything, so the kernel and the helper must.
fn gone_with_the_agent(way: Isolation) {
    let server = Script::new("agent", SERVER);
    let mut agent: Child = Command::new("/proc/self/exe")
        .args(["play-agent", isolation_name(way)])
        .arg(&server.directory)
        .stdin(Stdio::null())
        .spawn()
        .expect("spawned");
    server.wait_for_backends();

    let started = Instant::now();
    agent.kill().expect("killed");
    agent.wait().expect("reaped");

    wait_until("all processes to end", || server.processes() == 0);
    println!("  gone {:?} after the agent", started.elapsed());
}

/// PGDATA is restored after the end is reported: a backend that still writes would write into the copy.
fn nothing_is_left_behind(way: Isolation) {
    let server = Script::new("leaving", LEAVING);
    let (postgres, events) = server.launch(way);

    let all: Vec<PostgresEvent> = events.iter().collect();

    assert!(all.contains(&PostgresEvent::Ended(Ended::Exited(3))), "{all:?}");
    assert_eq!(Some(&PostgresEvent::Gone), all.last());
    assert_eq!(0, server.processes(), "{way:?}");
    postgres.reap().expect("reaped");
}

fn graceful_stop(way: Isolation) {
    let server = Script::new("stop", SERVER);
    let (postgres, events) = server.launch(way);
    server.wait_for_backends();

    postgres.stop();

    let all: Vec<PostgresEvent> = events.iter().collect();
    assert!(all.contains(&PostgresEvent::Ended(Ended::Exited(0))), "{all:?}");
    assert_eq!(0, server.processes(), "{way:?}");
    postgres.reap().expect("reaped");
}

fn a_missing_program_is_reported(way: Isolation) {
    let server = Script::new("missing", SERVER);
    fs::remove_file(server.program()).expect("removed");
    let (postgres, events) = server.launch(way);

    let all: Vec<PostgresEvent> = events.iter().collect();

    assert!(
        all.iter().any(|event| matches!(event, PostgresEvent::Failed(why) if why.contains("No such file"))),
        "{all:?}"
    );
    assert_eq!(Some(&PostgresEvent::Gone), all.last());
    postgres.reap().expect("reaped");
}

/// A postmaster as a script; its processes are known by a number in their arguments.
struct Script {
    directory: PathBuf,
    mark: String,
}

impl Script {
    fn new(name: &str, text: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("lakebase-isolation-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir(&directory).expect("created");
        let elapsed = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("after 1970");
        let script =
            Self { directory, mark: format!("{}.{}", 100_000 + elapsed.subsec_nanos() % 900_000, std::process::id()) };
        fs::write(script.program(), format!("#!/bin/sh\n{}\n", text.replace("MARK", &script.mark))).expect("written");
        fs::set_permissions(script.program(), fs::Permissions::from_mode(0o755)).expect("executable");
        script
    }

    fn program(&self) -> PathBuf {
        self.directory.join("server")
    }

    fn launch(&self, way: Isolation) -> (Postgres, Receiver<PostgresEvent>) {
        let (sender, events) = channel();
        let postgres = Postgres::launch(&launch(&self.directory, way), move |event| {
            // The receiver may have seen enough.
            let _unheard = sender.send(event);
        });
        (postgres.expect("launched"), events)
    }

    fn processes(&self) -> usize {
        let entries = fs::read_dir("/proc").expect("/proc").flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()))
            .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
            .filter(|line| String::from_utf8_lossy(line).contains(&self.mark))
            .count()
    }

    fn wait_for_backends(&self) {
        wait_until("the backends to start", || self.processes() >= 1);
        sleep(Duration::from_millis(100));
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).expect("removed");
    }
}

fn launch(directory: &Path, way: Isolation) -> Launch {
    Launch {
        helper: PathBuf::from("/proc/self/exe"),
        isolation: way,
        user: None,
        program: directory.join("server"),
        pgdata: directory.to_owned(),
        arguments: Vec::new(),
        environment: Vec::new(),
        inherited: Vec::new(),
        log: LogTarget::Stderr,
    }
}

fn play_agent(way: &str, directory: &Path) -> ExitCode {
    let ways = [Isolation::ProcessTree, Isolation::PidNamespace, Isolation::UserNamespace];
    let way = ways.into_iter().find(|known| isolation_name(*known) == way).expect("a known way");
    let _postgres = Postgres::launch(&launch(directory, way), |_| {}).expect("launched");
    loop {
        sleep(LIMIT);
    }
}

fn last(events: &Receiver<PostgresEvent>) -> Option<PostgresEvent> {
    let mut last = None;
    while let Ok(event) = events.recv_timeout(LIMIT) {
        last = Some(event);
    }
    last
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for {what}");
        sleep(Duration::from_millis(5));
    }
}
