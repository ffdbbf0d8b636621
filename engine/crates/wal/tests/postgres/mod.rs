//! Real PostgreSQL 17 for tests: its programs, and servers on throw-away data.
//!
//! Programs are found in `LAKEBASE_TEST_PG` (a bin directory), else by `pg_config` on PATH; a test that needs them fails
//! when there are none. As root they run as the user `LAKEBASE_PG_USER` (default `postgres`), because PostgreSQL refuses
//! root.
#![allow(dead_code, reason = "each test crate uses its own part")]

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

pub struct Postgres {
    bin: PathBuf,
    user: Option<String>,
}

impl Postgres {
    pub fn find() -> Postgres {
        let bin = match env::var_os("LAKEBASE_TEST_PG") {
            Some(bin) => PathBuf::from(bin),
            None => {
                let output = Command::new("pg_config").arg("--bindir").output().expect(
                    "this test needs PostgreSQL 17: put pg_config on PATH or set LAKEBASE_TEST_PG to its bin directory",
                );
                PathBuf::from(String::from_utf8(output.stdout).expect("a path").trim())
            }
        };
        let postgres = Postgres { user: is_root().then(user_name), bin };
        let version = output(postgres.command("postgres").arg("--version"));
        assert!(version.contains(") 17."), "this test needs PostgreSQL 17, {:?} is {version}", postgres.bin);
        postgres
    }

    /// One of PostgreSQL's programs, as a user that it accepts.
    pub fn command(&self, program: &str) -> Command {
        let program = self.bin.join(program);
        let mut command = match &self.user {
            Some(user) => {
                let mut command = Command::new("runuser");
                command.args(["-u", user, "--"]).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.current_dir("/").env("LC_ALL", "C").env("TZ", "UTC").stdin(Stdio::null());
        command
    }

    /// One of PostgreSQL's programs that do not mind root, as the user who runs the test.
    pub fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.env("LC_ALL", "C").env("TZ", "UTC").stdin(Stdio::null());
        command
    }

    /// A new directory that PostgreSQL may write to, removed with everything in it at the end.
    pub fn directory(&self) -> Directory {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("lakebase-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = env::temp_dir().join(name);
        fs::create_dir(&path).expect("a new directory");
        self.own(&path);
        Directory(path)
    }

    /// Gives a file that the test made to the user who runs PostgreSQL.
    pub fn own(&self, path: &Path) {
        if let Some(user) = &self.user {
            output(Command::new("chown").arg(user).arg(path));
        }
    }

    /// A new data directory `name` in `directory`.
    pub fn initdb(&self, directory: &Directory, name: &str, arguments: &[&str]) -> Server<'_> {
        let data = directory.0.join(name);
        let mut command = self.command("initdb");
        command.args(["--no-sync", "--auth=trust", "--locale=C", "--encoding=UTF8", "--username=postgres"]);
        output(command.args(arguments).arg("-D").arg(&data));
        self.server(directory, &data)
    }

    /// A server on a data directory that exists.
    pub fn server(&self, directory: &Directory, data: &Path) -> Server<'_> {
        Server { postgres: self, data: data.to_owned(), sockets: directory.0.clone(), running: false }
    }
}

fn is_root() -> bool {
    output(Command::new("id").arg("-u")).trim() == "0"
}

fn user_name() -> String {
    env::var("LAKEBASE_PG_USER").unwrap_or_else(|_| "postgres".to_owned())
}

/// What a program prints; the test fails when the program does.
pub fn output(command: &mut Command) -> String {
    let result = command.output().unwrap_or_else(|error| panic!("run {command:?}: {error}"));
    assert!(result.status.success(), "{command:?}: {}: {}", result.status, String::from_utf8_lossy(&result.stderr));
    String::from_utf8_lossy(&result.stdout).into_owned()
}

pub struct Directory(pub PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("remove {:?}: {error}", self.0);
        }
    }
}

/// A server without TCP, on a socket beside its data; stopped at the latest when it is dropped.
pub struct Server<'a> {
    postgres: &'a Postgres,
    pub data: PathBuf,
    sockets: PathBuf,
    running: bool,
}

impl Server<'_> {
    pub fn append_configuration(&self, lines: &str) {
        let path = self.data.join("postgresql.conf");
        let text = fs::read_to_string(&path).expect("readable configuration");
        fs::write(&path, text + "\n" + lines + "\n").expect("writable configuration");
    }

    pub fn start(&mut self) {
        let options = format!("-c listen_addresses= -c unix_socket_directories={}", self.sockets.display());
        let mut command = self.postgres.command("pg_ctl");
        command.args(["-w", "-s", "-t", "60", "-o", &options, "-l"]).arg(self.data.join("server.log"));
        // The server would keep a pipe open for as long as it runs.
        let status =
            command.arg("-D").arg(&self.data).arg("start").stdout(Stdio::null()).stderr(Stdio::null()).status();
        let log = || fs::read_to_string(self.data.join("server.log")).unwrap_or_default();
        assert!(status.expect("pg_ctl runs").success(), "PostgreSQL does not start: {}", log());
        self.running = true;
    }

    pub fn stop(&mut self, mode: &str) {
        self.running = false;
        output(self.postgres.command("pg_ctl").args(["-w", "-s", "-m", mode, "-D"]).arg(&self.data).arg("stop"));
    }

    /// One of PostgreSQL's client programs, connecting here.
    pub fn client(&self, program: &str) -> Command {
        let mut command = self.postgres.command(program);
        command.env("PGHOST", &self.sockets).env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        command
    }

    pub fn psql(&self, sql: &str) -> String {
        output(self.client("psql").args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql]))
    }

    /// Runs a script whose statements are transactions of their own.
    pub fn script(&self, sql: &str) {
        let mut command = self.client("psql");
        command.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-"]).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("psql starts");
        child.stdin.take().expect("a pipe").write_all(sql.as_bytes()).expect("psql reads");
        let result = child.wait_with_output().expect("psql ends");
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    }

    /// What `pg_controldata` says under `label`.
    pub fn control_data(&self) -> ControlData {
        ControlData::of(self.postgres, &self.data)
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        if self.running {
            self.stop("immediate");
        }
    }
}

/// The lines of `pg_controldata`.
pub struct ControlData(Vec<(String, String)>);

impl ControlData {
    pub fn of(postgres: &Postgres, data: &Path) -> ControlData {
        ControlData::parse(&output(postgres.command("pg_controldata").arg("-D").arg(data)))
    }

    pub fn parse(text: &str) -> ControlData {
        let pair = |line: &str| line.split_once(':').map(|(label, value)| (label.to_owned(), value.trim().to_owned()));
        ControlData(text.lines().filter_map(pair).collect())
    }

    pub fn get(&self, label: &str) -> &str {
        let found = self.0.iter().find(|(l, _)| l == label);
        found.map(|(_, value)| value.as_str()).unwrap_or_else(|| panic!("pg_controldata prints no {label:?}"))
    }
}
