//! A PostgreSQL server with the library loaded, in a directory of its own.

use crate::{PATIENCE, agent::Agent, client::Client, within};
use std::{
    env,
    ffi::{CString, OsString},
    fs::{self, File},
    os::{
        fd::{AsRawFd, RawFd},
        unix::{fs::chown, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
};
use vfs_abi::{ENV_AGENT_FD, ENV_AREA, ENV_DOORBELL, ENV_PGDATA, ENV_TRUST, LIBRARY_FILE, TRUST_FILE};

/// Small segments, so that a test crosses many.
pub const SEGMENT_BYTES: u64 = 1 << 20;

pub const TRUST: &str = "6f1e/3/1/nonce";

/// Directory of PostgreSQL's programs.
pub fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        if let Some(directory) = env::var_os("LAKEBASE_TEST_PG") {
            return directory.into();
        }
        let output = Command::new("pg_config").arg("--bindir").output();
        let output =
            output.expect("set LAKEBASE_TEST_PG to PostgreSQL 17's program directory, or put pg_config on PATH");
        PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
    })
}

/// User and group to run PostgreSQL as, when we are root, which it refuses.
fn unprivileged() -> Option<(u32, u32)> {
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        return None;
    }
    let name = env::var("LAKEBASE_TEST_USER").unwrap_or_else(|_| "postgres".to_owned());
    let c_name = CString::new(name.clone()).unwrap();
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = LOCK.lock().unwrap();
    // SAFETY: a C string; the static result is read under the lock.
    unsafe {
        let entry = libc::getpwnam(c_name.as_ptr());
        assert!(!entry.is_null(), "no user {name}: set LAKEBASE_TEST_USER");
        Some(((*entry).pw_uid, (*entry).pw_gid))
    }
}

/// A command that runs as the server's user, without the settings of the caller's own PostgreSQL.
pub fn command(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    if let Some((user, group)) = unprivileged() {
        command.uid(user).gid(group);
    }
    for (name, _) in env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PG")) {
        command.env_remove(name);
    }
    // The build's environment names the library's path, which would look like a leak of the library itself.
    command.env_remove("LAKEBASE_VFS");
    // libpq looks for certificates in HOME, which the other user may not read.
    command.env("LC_ALL", "C").env("HOME", "/nonexistent").current_dir("/");
    command
}

/// Runs a command to its end and asserts success.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// A directory of the server's user, removed at the end.
pub struct Directory(pub PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, SeqCst);
        let path = env::temp_dir().join(format!("lakebase-vfs-{}-{number}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        if let Some((user, group)) = unprivileged() {
            chown(&path, Some(user), Some(group)).unwrap();
        }
        Directory(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let removed = fs::remove_dir_all(&self.0);
        assert!(removed.is_ok() || std::thread::panicking(), "{}: {removed:?}", self.0.display());
    }
}

/// Runs `initdb` into `pgdata`.
fn initialise(pgdata: &Path) {
    run(command(programs().join("initdb"))
        .args(["-U", "postgres", "-A", "trust", "--no-sync", "--data-checksums", "--wal-segsize=1", "-E", "UTF8"])
        .arg("-D")
        .arg(pgdata));
}

/// The library that this build made; it lies beside this test program.
pub fn library() -> PathBuf {
    let program = env::current_exe().unwrap();
    let path = program.parent().unwrap().join(LIBRARY_FILE);
    assert!(path.exists(), "{} was not built", path.display());
    path
}

/// A server to be started.
pub struct Cluster {
    pub agent: Agent,
    pub directory: Directory,
    pub settings: Vec<String>,
    pub environment: Vec<(OsString, OsString)>,
    pub inherited: Vec<RawFd>,
    prepare: Option<fn() -> std::io::Result<()>>,
}

/// A server that was started.
pub struct Server {
    pub process: Child,
    pub port: u16,
    pub cluster: Cluster,
}

impl Cluster {
    pub fn new(name: &str, role: u32) -> Cluster {
        let directory = Directory::new(name);
        initialise(&directory.0.join("data"));
        Self::in_directory(directory, role)
    }

    /// A cluster whose PGDATA is an empty directory, for starts that are refused before PostgreSQL looks at it.
    pub fn bare(name: &str, role: u32) -> Cluster {
        let directory = Directory::new(name);
        run(command("mkdir").arg(directory.0.join("data")));
        Self::in_directory(directory, role)
    }

    /// A cluster with a copy of the data of another one, whose server is stopped.
    pub fn copy_of(other: &Cluster, name: &str, role: u32) -> Cluster {
        let directory = Directory::new(name);
        run(command("cp").arg("-a").arg(other.pgdata()).arg(directory.0.join("data")));
        Self::in_directory(directory, role)
    }

    fn in_directory(directory: Directory, role: u32) -> Cluster {
        let agent = Agent::new(role, SEGMENT_BYTES);
        let pgdata = directory.0.join("data");
        // A copy, readable for the server's user, and not rebuilt under its feet.
        let library_copy = directory.0.join(LIBRARY_FILE);
        fs::copy(library(), &library_copy).unwrap();
        let settings = [
            "listen_addresses=",
            "fsync=on",
            "wal_sync_method=fdatasync",
            "full_page_writes=off",
            "wal_init_zero=off",
            "restart_after_crash=off",
            "autovacuum=off",
            "max_connections=20",
            "shared_buffers=32MB",
            "max_wal_size=16MB",
            "min_wal_size=2MB",
            "allow_in_place_tablespaces=on",
            "log_line_prefix=",
        ];
        let mut cluster = Cluster {
            inherited: vec![agent.memory.as_raw_fd(), agent.doorbell.as_raw_fd(), agent.pipe.as_raw_fd()],
            environment: vec![],
            settings: settings.map(str::to_owned).to_vec(),
            agent,
            directory,
            prepare: None,
        };
        cluster.write_trust(Some(TRUST));
        let environment: [(&str, OsString); 6] = [
            ("LD_PRELOAD", library_copy.into()),
            (ENV_AREA, cluster.inherited[0].to_string().into()),
            (ENV_DOORBELL, cluster.inherited[1].to_string().into()),
            (ENV_AGENT_FD, cluster.inherited[2].to_string().into()),
            (ENV_PGDATA, pgdata.into()),
            (ENV_TRUST, TRUST.into()),
        ];
        cluster.environment = environment.map(|(name, value)| (name.into(), value)).to_vec();
        cluster
    }

    pub fn pgdata(&self) -> PathBuf {
        self.directory.0.join("data")
    }

    /// Writes a file into PGDATA that the server may read and write.
    pub fn write_file(&self, name: &str, text: &str) {
        let path = self.pgdata().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        if let Some((user, group)) = unprivileged() {
            chown(&path, Some(user), Some(group)).unwrap();
        }
    }

    /// Writes the trust file, or removes it.
    pub fn write_trust(&self, text: Option<&str>) {
        match text {
            Some(text) => self.write_file(TRUST_FILE, text),
            None => fs::remove_file(self.pgdata().join(TRUST_FILE)).unwrap(),
        }
    }

    pub fn set(mut self, setting: &str) -> Cluster {
        self.settings.push(setting.to_owned());
        self
    }

    /// Changes one environment variable, or removes it.
    pub fn set_environment(&mut self, name: &str, value: Option<&str>) {
        self.environment.retain(|(known, _)| known != name);
        if let Some(value) = value {
            self.environment.push((name.into(), value.into()));
        }
    }

    /// Runs `prepare` in the new process before PostgreSQL.
    pub fn prepare(mut self, prepare: fn() -> std::io::Result<()>) -> Cluster {
        self.prepare = Some(prepare);
        self
    }

    fn log_path(&self) -> PathBuf {
        self.directory.0.join("log")
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// Starts a program of PostgreSQL with the library and its environment.
    pub fn spawn(&self, program: &str, arguments: &[&str]) -> Child {
        let mut command = command(programs().join(program));
        command.args(arguments).envs(self.environment.iter().cloned());
        command.stdin(std::process::Stdio::null());
        let log = File::options().append(true).create(true).open(self.log_path()).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let (inherited, prepare) = (self.inherited.clone(), self.prepare);
        // SAFETY: only async-signal-safe calls between fork and exec; `prepare` promises the same.
        unsafe {
            command.pre_exec(move || {
                for fd in &inherited {
                    if libc::fcntl(*fd, libc::F_SETFD, 0) != 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                prepare.map_or(Ok(()), |prepare| prepare())
            });
        }
        command.spawn().unwrap()
    }

    /// Starts the server without waiting for it.
    pub fn launch(self) -> Server {
        let pgdata = self.pgdata();
        // The socket lies in PGDATA, so that its lock file is one of the files there.
        let directory = pgdata.to_str().unwrap().to_owned();
        let port = free_port();
        let mut arguments = vec!["-D".to_owned(), pgdata.to_str().unwrap().to_owned(), "-k".to_owned(), directory];
        for setting in self.settings.iter().chain([&format!("port={port}")]) {
            arguments.extend(["-c".to_owned(), setting.clone()]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let process = self.spawn("postgres", &arguments);
        Server { process, port, cluster: self }
    }

    /// Starts the server and waits until it takes connections.
    pub fn start(self) -> Server {
        let mut server = self.launch();
        let ready = within(PATIENCE, || {
            assert!(server.process.try_wait().unwrap().is_none(), "the server ended");
            Client::try_connect(&server.socket()).is_ok()
        });
        assert!(ready, "the server does not take connections");
        server
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Server {
    pub fn agent(&self) -> &Agent {
        &self.cluster.agent
    }

    pub fn socket(&self) -> PathBuf {
        self.cluster.pgdata().join(format!(".s.PGSQL.{}", self.port))
    }

    pub fn connect(&self) -> Client {
        Client::try_connect(&self.socket()).unwrap()
    }

    /// Starts the same cluster again, under the same agent, after its server has ended.
    pub fn restart(self) -> Server {
        self.into_cluster().start()
    }

    /// The cluster of a server that has ended.
    pub fn into_cluster(self) -> Cluster {
        let old = std::mem::ManuallyDrop::new(self);
        // SAFETY: `old` is never dropped, and its fields are taken once; the process has been waited for.
        let (process, cluster) = unsafe { (std::ptr::read(&old.process), std::ptr::read(&old.cluster)) };
        drop(process);
        cluster
    }

    /// Stops the server in order (`pg_ctl stop -m fast`).
    pub fn stop(&mut self) {
        signal(self.process.id(), libc::SIGINT);
        assert!(self.wait().success(), "{}", self.cluster.log());
    }

    /// Waits for the postmaster's end.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        within(PATIENCE, || {
            status = self.process.try_wait().unwrap();
            status.is_some()
        });
        status.expect("the server still runs")
    }

    pub fn runs(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    pub fn log_has(&self, text: &str) -> bool {
        self.cluster.log().contains(text)
    }

    /// Process ids of the postmaster's children.
    pub fn children(&self) -> Vec<u32> {
        let path = format!("/proc/{0}/task/{0}/children", self.process.id());
        fs::read_to_string(path).unwrap().split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }
}

pub fn signal(pid: u32, signal: libc::c_int) {
    // SAFETY: integer arguments; the pid is that of a process that this test started.
    assert_eq!(0, unsafe { libc::kill(pid as libc::pid_t, signal) }, "{}", std::io::Error::last_os_error());
}

/// Whether a process exists and is no zombie.
pub fn lives(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(text) => !text.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')),
        Err(_) => false,
    }
}

/// Removes the System V segment that a killed server leaves behind, named in its `postmaster.pid` (line 7: key, id).
pub fn remove_segment(postmaster_pid: &str) {
    let segment = postmaster_pid.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    if let Some(segment) = segment {
        // SAFETY: integer arguments; after a clean end the segment is gone, and the call fails.
        unsafe { libc::shmctl(segment, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of the server:\n{}", self.cluster.log());
        }
        // Read first: the server removes the file.
        let identity = fs::read_to_string(self.cluster.pgdata().join("postmaster.pid")).unwrap_or_default();
        if self.process.try_wait().is_ok_and(|status| status.is_none()) {
            signal(self.process.id(), libc::SIGQUIT);
            if !within(PATIENCE / 4, || self.process.try_wait().is_ok_and(|status| status.is_some())) {
                signal(self.process.id(), libc::SIGKILL);
            }
            let ended = self.process.wait();
            assert!(ended.is_ok() || std::thread::panicking());
        }
        remove_segment(&identity);
    }
}
