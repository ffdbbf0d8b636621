//! Starts PostgreSQL, tells what becomes of it, and ends every process of it.
//!
//! `isolation.rs` is the other end. Proof that all processes are gone is a pipe whose write end each of them inherits: its end
//! of file. Knows nothing about WAL or terms.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

use crate::{
    area::{owned, pipe},
    config::{IsolationChoice, PostgresLog},
    isolation::{FAST, IMMEDIATE, InitSpec, Isolation, KILL, SPEC_BYTES_MAX, User, isolation_name},
    postgres_log::{self, LOG_BYTES_MAX},
    process_tree,
};

/// How long every process may take to be gone after SIGKILL before the log says which are not.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What becomes of PostgreSQL, in this order; `Gone` is always the last.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PostgresEvent {
    /// The postmaster runs under this process id.
    Postmaster(i32),
    /// It could not be started.
    Failed(String),
    /// The postmaster ended.
    Ended(Ended),
    /// No process of it exists any more.
    Gone,
}

/// How the postmaster ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// With this status; 0 after a shutdown that wrote its checkpoint.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Our own binary.
    pub helper: PathBuf,
    /// How the processes are held together.
    pub isolation: Isolation,
    /// Whom PostgreSQL runs as, when not as the agent.
    pub user: Option<User>,
    /// The `postgres` program.
    pub program: PathBuf,
    /// PGDATA.
    pub pgdata: PathBuf,
    /// Arguments behind `-D PGDATA`.
    pub arguments: Vec<String>,
    /// Environment beside the agent's own.
    pub environment: Vec<(String, String)>,
    /// Descriptors that it inherits.
    pub inherited: Vec<RawFd>,
    /// Where its standard output and error go.
    pub log: LogTarget,
}

/// Where PostgreSQL's standard output and error go.
#[derive(Clone, Debug)]
pub enum LogTarget {
    /// Appended to a file of bounded size.
    File(PathBuf),
    /// The agent's standard error.
    Stderr,
}

impl LogTarget {
    /// As configured; `file` is where a file would be.
    pub fn new(choice: PostgresLog, file: PathBuf) -> Self {
        match choice {
            PostgresLog::File => LogTarget::File(file),
            PostgresLog::Stderr => LogTarget::Stderr,
        }
    }
}

/// One run of PostgreSQL.
pub struct Postgres {
    child: Child,
    killer: KillSwitch,
}

/// Kills PostgreSQL from any thread, at once.
#[derive(Clone)]
pub struct KillSwitch(Arc<Processes>);

struct Processes {
    isolation: Isolation,
    helper: u32,
    helper_fd: OwnedFd,
    init: OnceLock<OwnedFd>,
    control: UnixStream,
}

impl Postgres {
    /// Starts PostgreSQL; `on_event` is called on a thread of its own.
    ///
    /// Must be called by a thread that lives as long as the agent: the kernel ties the death signal to it.
    ///
    /// # Errors
    /// The helper process cannot be started.
    pub fn launch(launch: &Launch, mut on_event: impl FnMut(PostgresEvent) + Send + 'static) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let (alive_read, alive_write) = pipe()?;
        let mut arguments = vec!["-D".to_owned(), launch.pgdata.display().to_string()];
        arguments.extend_from_slice(&launch.arguments);
        let spec = InitSpec {
            isolation: launch.isolation,
            user: launch.user.clone(),
            program: launch.program.clone(),
            arguments,
            environment: launch.environment.clone(),
            directory: launch.pgdata.clone(),
        };
        // Through the socket, not as an argument: `ps` shows arguments to everyone.
        let spec = serde_json::to_vec(&spec).map_err(io::Error::other)?;
        if spec.len() > SPEC_BYTES_MAX {
            return Err(io::Error::other("postgres.parameters: too long"));
        }
        (&ours).write_all(&(spec.len() as u32).to_ne_bytes())?;
        (&ours).write_all(&spec)?;
        let (stdout, stderr) = match &launch.log {
            LogTarget::File(path) => {
                // The thread ends with PostgreSQL's last process.
                let (write, _thread) = postgres_log::start(path, LOG_BYTES_MAX)?;
                (Stdio::from(write.try_clone()?), Stdio::from(write))
            }
            LogTarget::Stderr => {
                // SAFETY: no pointers.
                let copy = owned(unsafe { libc::fcntl(2, libc::F_DUPFD_CLOEXEC, 3) })?;
                (Stdio::from(copy.try_clone()?), Stdio::from(copy))
            }
        };
        let mut passed = launch.inherited.clone();
        passed.extend([theirs.as_raw_fd(), alive_write.as_raw_fd()]);
        let mut command = Command::new(&launch.helper);
        command
            .arg0("lakebase")
            .args(["compute-init", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr);
        for (name, _) in std::env::vars_os() {
            // What would reach PostgreSQL's own libpq, or the library.
            if name.as_encoded_bytes().starts_with(b"PG") || name.as_encoded_bytes().starts_with(b"LAKEBASE_") {
                command.env_remove(name);
            }
        }
        // SAFETY: the closure only calls fcntl, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(move || {
                for fd in &passed {
                    if libc::fcntl(*fd, libc::F_SETFD, 0) == -1 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn()?;
        drop((theirs, alive_write));
        let processes = Processes {
            isolation: launch.isolation,
            helper: child.id(),
            helper_fd: pidfd(child.id() as i32)?,
            init: OnceLock::new(),
            control: ours.try_clone()?,
        };
        let killer = KillSwitch(Arc::new(processes));
        let watched = killer.clone();
        thread::Builder::new()
            .name("postgres-watch".into())
            .spawn(move || watch(BufReader::new(ours), alive_read, &watched, &mut on_event))?;
        Ok(Self { child, killer })
    }

    /// Asks for a shutdown that ends sessions and writes a checkpoint.
    pub fn stop(&self) {
        self.killer.0.wish(FAST);
    }

    /// Asks for an end without a checkpoint.
    pub fn stop_immediately(&self) {
        self.killer.0.wish(IMMEDIATE);
    }

    /// Kills from any thread.
    pub fn killer(&self) -> KillSwitch {
        self.killer.clone()
    }

    /// Collects the helper process after [`PostgresEvent::Gone`].
    ///
    /// # Errors
    /// Those of `waitpid(2)`.
    pub fn reap(mut self) -> io::Result<()> {
        self.child.wait().map(|_| ())
    }
}

impl KillSwitch {
    /// Sends SIGKILL to every process of PostgreSQL. [`PostgresEvent::Gone`] tells when they are gone.
    pub fn kill(&self) {
        let processes = &*self.0;
        match processes.isolation {
            Isolation::PidNamespace | Isolation::UserNamespace => {
                // The end of process 1 is the end of its namespace; the helper's end is the end of process 1.
                if let Some(init) = processes.init.get() {
                    send_sigkill(init);
                }
                send_sigkill(&processes.helper_fd);
            }
            Isolation::ProcessTree => {
                // The head of the tree stays: orphans become its children, and it reaps and kills them.
                processes.wish(KILL);
                for process in process_tree::descendants(processes.helper as i32) {
                    // SAFETY: no pointers. A process that ended meanwhile is no error.
                    unsafe { libc::kill(process.pid, libc::SIGKILL) };
                }
            }
        }
    }
}

impl Processes {
    /// One byte to the init. If it is gone already, its end is on its way as an event.
    fn wish(&self, byte: u8) {
        if let Err(error) = (&self.control).write_all(&[byte]) {
            tracing::debug!(%error, "PostgreSQL's init is gone");
        }
    }
}

impl Processes {
    /// The agent's number for the postmaster, which the init calls `pid`.
    fn outside_pid(&self, pid: i32) -> i32 {
        if self.isolation == Isolation::ProcessTree {
            return pid;
        }
        // helper, process 1 of the namespace, postmaster: each is the only child at this moment.
        let found = process_tree::descendants(self.helper as i32);
        let init = found.iter().find(|process| process.parent == self.helper as i32);
        let postmaster = init.and_then(|init| found.iter().find(|process| process.parent == init.pid));
        postmaster.map_or(pid, |process| process.pid)
    }
}

fn watch(
    mut control: BufReader<UnixStream>,
    alive: OwnedFd,
    killer: &KillSwitch,
    on_event: &mut dyn FnMut(PostgresEvent),
) {
    let mut line = String::new();
    loop {
        line.clear();
        match control.read_line(&mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let (word, rest) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
        match (word, rest.parse::<i32>()) {
            ("init", Ok(pid)) => match pidfd(pid) {
                Ok(fd) => drop(killer.0.init.set(fd)),
                Err(error) => tracing::debug!(%error, pid, "PostgreSQL's init has ended already"),
            },
            ("postmaster", Ok(pid)) => on_event(PostgresEvent::Postmaster(killer.0.outside_pid(pid))),
            ("exit", Ok(status)) => on_event(PostgresEvent::Ended(Ended::Exited(status))),
            ("signal", Ok(number)) => on_event(PostgresEvent::Ended(Ended::Signaled(number))),
            ("failed", _) => on_event(PostgresEvent::Failed(rest.to_owned())),
            _ => tracing::warn!(line = line.trim_end(), "PostgreSQL's init says something unknown"),
        }
    }
    wait_until_gone(alive, killer);
    on_event(PostgresEvent::Gone);
}

/// Returns when the last process that inherited the other end is gone; kills what stays behind.
fn wait_until_gone(alive: OwnedFd, killer: &KillSwitch) {
    let mut alive = fs::File::from(alive);
    let started = Instant::now();
    let mut complained = false;
    loop {
        let mut polled = libc::pollfd { fd: alive.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid entry.
        let ready = unsafe { libc::poll(&raw mut polled, 1, 100) };
        if ready > 0 && matches!(alive.read(&mut [0; 1]), Ok(0)) {
            return;
        }
        killer.kill();
        if !complained && started.elapsed() > KILL_LIMIT {
            complained = true;
            let left = process_tree::descendants(killer.0.helper as i32);
            tracing::error!(?left, "processes of PostgreSQL do not end although they were killed");
        }
    }
}

fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd as libc::c_int)
}

fn send_sigkill(process: &OwnedFd) {
    // SAFETY: a null siginfo is allowed. A process that has ended is no error.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        );
    }
}

/// The way to hold PostgreSQL together on this machine, found by trying.
///
/// # Errors
/// A PID namespace was asked for and the kernel does not allow one.
pub fn choose_isolation(helper: &Path, choice: IsolationChoice) -> io::Result<Isolation> {
    // SAFETY: no pointers.
    let root = unsafe { libc::geteuid() } == 0;
    let namespace = if root { Isolation::PidNamespace } else { Isolation::UserNamespace };
    // As process 1 of a container the agent's own end is the end of all.
    let wanted = match choice {
        IsolationChoice::ProcessTree => return Ok(Isolation::ProcessTree),
        IsolationChoice::Auto if std::process::id() == 1 => return Ok(Isolation::ProcessTree),
        IsolationChoice::Auto | IsolationChoice::PidNamespace => namespace,
    };
    let status = Command::new(helper)
        .args(["compute-init", "probe", isolation_name(wanted)])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    match (status.success(), choice) {
        (true, _) => Ok(wanted),
        (false, IsolationChoice::Auto) => Ok(Isolation::ProcessTree),
        (false, _) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "postgres.isolation = \"pid_namespace\": the kernel does not allow a PID namespace here",
        )),
    }
}

/// State of a running postmaster as it says itself in line 8 of `postmaster.pid` (`miscadmin.h`, LOCK_FILE_LINE_PM_STATUS):
/// `starting`, `stopping`, `ready`, `standby`.
pub fn postmaster_status(pgdata: &Path) -> Option<String> {
    let text = fs::read_to_string(pgdata.join("postmaster.pid")).ok()?;
    text.lines().nth(7).map(|line| line.trim().to_owned())
}

/// Major and minor version that `postgres --version` reports.
///
/// # Errors
/// It cannot be run or says something unknown.
pub fn version(program: &Path) -> io::Result<(u32, u32)> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", program.display())))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text)
        .ok_or_else(|| io::Error::other(format!("{}: unknown answer to --version: {text:?}", program.display())))
}

/// `postgres (PostgreSQL) 17.11 (Debian 17.11-0+deb13u1)`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let number = text.split_once("(PostgreSQL) ")?.1.split_ascii_whitespace().next()?;
    let (major, minor) = number.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(Some((17, 11)), parse_version("postgres (PostgreSQL) 17.11 (Debian 17.11-0+deb13u1)\n"));
        assert_eq!(Some((17, 0)), parse_version("postgres (PostgreSQL) 17.0\n"));
        assert_eq!(None, parse_version("postgres (PostgreSQL) 18beta1\n"));
        assert_eq!(None, parse_version(""));
    }

    #[test]
    fn postmaster_status_is_the_eighth_line() {
        let directory = std::env::temp_dir().join(format!("lakebase-pmstatus-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("created");
        assert_eq!(None, postmaster_status(&directory));
        fs::write(directory.join("postmaster.pid"), "2\n/d\n1\n5432\n/s\n\n  1 2\nready   \n").expect("written");
        assert_eq!(Some("ready".to_owned()), postmaster_status(&directory));
        fs::remove_dir_all(directory).expect("removed");
    }
}
