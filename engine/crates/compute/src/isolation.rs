//! `compute-init`: the process between the agent and PostgreSQL that holds PostgreSQL's processes together.
//!
//! A fresh, single-threaded execution of our binary. With a PID namespace it is that namespace's process 1: when it ends, the
//! kernel kills everything in it. Without one it is the subreaper of the tree, and parent-death signals do the rest: the
//! postmaster's is SIGKILL, and the library turns those that backends set into SIGKILL, too (`docs/design`, B6: backends
//! are process groups of their own and outlive the postmaster otherwise).
//!
//! Protocol over one inherited socket, agent to init: the length (u32, native) and JSON of an [`InitSpec`], then single
//! bytes [`FAST`], [`IMMEDIATE`], [`KILL`]; end of file means that the agent is gone. Init to agent: lines `init PID`, `postmaster PID`, `exit STATUS`, `signal NUMBER`,
//! `failed TEXT`.

use std::{
    ffi::{CStr, CString},
    io::{self, Write},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

/// Ask PostgreSQL to end its sessions and write a shutdown checkpoint (SIGINT).
pub const FAST: u8 = b'f';
/// End without a checkpoint (SIGQUIT).
pub const IMMEDIATE: u8 = b'i';
/// Kill every process.
pub const KILL: u8 = b'k';

/// Longest start order: the agent sends it before anybody reads, so it must fit into the socket's buffer (208 KiB by default).
pub const SPEC_BYTES_MAX: usize = 64 << 10;

/// Exit status of the init when PostgreSQL could not be started.
const STATUS_FAILED: i32 = 125;

/// Rounds of looking for and killing descendants, 5 ms apart: 10 s. Each round kills all that exist; only processes stuck
/// in the kernel outlast a few.
const KILL_ROUNDS_MAX: u32 = 2000;

/// How PostgreSQL's processes are held together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// A PID and an IPC namespace.
    PidNamespace,
    /// The same inside a user namespace, for an unprivileged agent.
    UserNamespace,
    /// The process tree.
    ProcessTree,
}

/// Whom PostgreSQL runs as.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct User {
    /// Name, for the supplementary groups.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
}

/// What to run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InitSpec {
    /// How to hold it together.
    pub isolation: Isolation,
    /// Drop to this user first.
    pub user: Option<User>,
    /// The program.
    pub program: PathBuf,
    /// Its arguments, without the program's name.
    pub arguments: Vec<String>,
    /// Its environment beside that of the init.
    pub environment: Vec<(String, String)>,
    /// Its working directory.
    pub directory: PathBuf,
}

/// Entry of the hidden subcommand `lakebase compute-init`; returns the exit status.
///
/// Must run before the process has a second thread: it forks.
pub fn init_main(arguments: &[String]) -> i32 {
    match arguments {
        [probe, isolation] if probe == "probe" => match parse_isolation(isolation) {
            Some(isolation) => i32::from(probe_here(isolation).is_err()),
            None => STATUS_FAILED,
        },
        [control] => {
            let Ok(control) = control.parse().map(Control) else { return STATUS_FAILED };
            match control.receive_spec() {
                Ok(spec) => start(&spec, &control),
                Err(error) => {
                    eprintln!("compute-init: {error}");
                    STATUS_FAILED
                }
            }
        }
        _ => {
            eprintln!("compute-init is started by `lakebase compute`");
            STATUS_FAILED
        }
    }
}

/// Name in arguments, status and logs.
pub fn isolation_name(isolation: Isolation) -> &'static str {
    match isolation {
        Isolation::PidNamespace => "pid_namespace",
        Isolation::UserNamespace => "user_namespace",
        Isolation::ProcessTree => "process_tree",
    }
}

fn parse_isolation(text: &str) -> Option<Isolation> {
    [Isolation::PidNamespace, Isolation::UserNamespace, Isolation::ProcessTree]
        .into_iter()
        .find(|isolation| isolation_name(*isolation) == text)
}

/// Whether a process 1 can be made this way, by making one that ends at once.
fn probe_here(isolation: Isolation) -> io::Result<()> {
    enter(isolation)?;
    match fork()? {
        // SAFETY: ends the process without running anything of the parent's.
        0 => unsafe { libc::_exit(0) },
        child => match wait_for(child)? {
            Ended::Exited(0) => Ok(()),
            _ => Err(io::Error::other("process 1 of the namespace failed")),
        },
    }
}

/// Makes the *next* forked process the first of a namespace, with System V shared memory of its own.
fn enter(isolation: Isolation) -> io::Result<()> {
    // SAFETY: no pointers in these calls.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let flags = match isolation {
        // Shared memory that outlives its processes ends with the IPC namespace (`shared_memory.rs`).
        Isolation::PidNamespace => libc::CLONE_NEWPID | libc::CLONE_NEWIPC,
        Isolation::UserNamespace => libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWIPC,
        Isolation::ProcessTree => {
            // SAFETY: no pointers. Orphans become our children, where the kill finds them.
            return check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) });
        }
    };
    // SAFETY: no pointers.
    check(unsafe { libc::unshare(flags) })?;
    if isolation == Isolation::UserNamespace {
        // Everyone keeps his own number: PostgreSQL must not look like root, and PGDATA must look like its own.
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
        std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    }
    Ok(())
}

fn start(spec: &InitSpec, control: &Control) -> i32 {
    // PostgreSQL inherits the descriptors of the area and the pipe, not this one. The session is its own, so that a
    // Ctrl-C at the agent's terminal reaches the agent only.
    // SAFETY: no pointers.
    unsafe {
        libc::fcntl(control.0, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::setsid();
    }
    reset_signals();
    let result = match spec.isolation {
        Isolation::ProcessTree => enter(spec.isolation).and_then(|()| supervise(spec, control)),
        Isolation::PidNamespace | Isolation::UserNamespace => outside(spec, control),
    };
    result.unwrap_or_else(|error| {
        control.tell(&format!("failed {error}"));
        let _unread = writeln!(io::stderr(), "compute-init: {error}");
        STATUS_FAILED
    })
}

/// The parent of process 1: lives in the agent's namespace and ends with it.
fn outside(spec: &InitSpec, control: &Control) -> io::Result<i32> {
    die_with_parent()?;
    enter(spec.isolation)?;
    match fork()? {
        0 => {
            let status = die_with_parent().and_then(|()| supervise(spec, control)).unwrap_or_else(|error| {
                control.tell(&format!("failed {error}"));
                STATUS_FAILED
            });
            // SAFETY: ends process 1, and with it everything in the namespace.
            unsafe { libc::_exit(status) }
        }
        init => {
            control.tell(&format!("init {init}"));
            Ok(match wait_for(init)? {
                Ended::Exited(status) => status,
                Ended::Signaled(signal) => 128 + signal,
            })
        }
    }
}

/// Process 1, or the head of the tree: starts PostgreSQL, passes the agent's wishes on, reaps, reports.
fn supervise(spec: &InitSpec, control: &Control) -> io::Result<i32> {
    let children = block_sigchld()?;
    let postmaster = fork()?;
    if postmaster == 0 {
        let error = execute(spec);
        control.tell(&format!("failed start {}: {error}", spec.program.display()));
        // SAFETY: ends the forked process without running anything of the parent's.
        unsafe { libc::_exit(STATUS_FAILED) }
    }
    control.tell(&format!("postmaster {postmaster}"));
    loop {
        let mut polled = [
            libc::pollfd { fd: children, events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: control.0, events: libc::POLLIN, revents: 0 },
        ];
        // SAFETY: two valid entries.
        if unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        if polled[1].revents != 0 {
            match control.next_wish() {
                Some(FAST) => signal(postmaster, libc::SIGINT),
                Some(IMMEDIATE) => signal(postmaster, libc::SIGQUIT),
                Some(KILL) | None => {
                    // In a namespace our own end kills all, at once; in a tree each is killed here.
                    signal(postmaster, libc::SIGKILL);
                    end_the_rest(spec);
                    control.tell("signal 9");
                    return Ok(128 + libc::SIGKILL);
                }
                Some(_) => {}
            }
        }
        if polled[0].revents != 0 {
            drain(children);
            while let Some((child, ended)) = reap()? {
                if child != postmaster {
                    continue;
                }
                // Whatever PostgreSQL left behind ends before the report: the agent may restore PGDATA right after it.
                end_the_rest(spec);
                return Ok(match ended {
                    Ended::Exited(status) => {
                        control.tell(&format!("exit {status}"));
                        status
                    }
                    Ended::Signaled(number) => {
                        control.tell(&format!("signal {number}"));
                        128 + number
                    }
                });
            }
        }
    }
}

/// Kills all descendants, reaps them, and removes their shared memory; does nothing in a namespace, where the kernel does it
/// when we end.
fn end_the_rest(spec: &InitSpec) {
    if spec.isolation != Isolation::ProcessTree {
        return;
    }
    kill_descendants();
    // Here, because the agent may be the one that was killed.
    if let Err(error) = crate::shared_memory::remove_left_behind(&spec.directory) {
        // Nobody reads it where the agent is gone, and that is no reason to fail.
        let _unread = writeln!(io::stderr(), "compute-init: PostgreSQL's shared memory stays behind: {error}");
    }
}

fn kill_descendants() {
    let me = std::process::id() as i32;
    for _ in 0..KILL_ROUNDS_MAX {
        for process in crate::process_tree::descendants(me) {
            signal(process.pid, libc::SIGKILL);
        }
        loop {
            match reap() {
                Ok(Some(_)) => {}
                Ok(None) => break,
                // No children are left at all.
                Err(_) => return,
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Becomes PostgreSQL; returns only the reason why not.
fn execute(spec: &InitSpec) -> io::Error {
    let prepare = || -> io::Result<(CString, Vec<CString>, Vec<CString>, CString)> {
        let text = |text: &[u8]| CString::new(text).map_err(io::Error::from);
        let program = text(spec.program.as_os_str().as_encoded_bytes())?;
        let mut arguments = vec![program.clone()];
        for argument in &spec.arguments {
            arguments.push(text(argument.as_bytes())?);
        }
        let mut environment = Vec::new();
        for (name, value) in std::env::vars_os() {
            if !spec.environment.iter().any(|(added, _)| name == added.as_str()) {
                environment.push(text(&[name.as_encoded_bytes(), b"=", value.as_encoded_bytes()].concat())?);
            }
        }
        for (name, value) in &spec.environment {
            environment.push(text(format!("{name}={value}").as_bytes())?);
        }
        Ok((program, arguments, environment, text(spec.directory.as_os_str().as_encoded_bytes())?))
    };
    let (program, arguments, environment, directory) = match prepare() {
        Ok(prepared) => prepared,
        Err(error) => return error,
    };
    if let Some(user) = &spec.user
        && let Err(error) = become_user(user)
    {
        return error;
    }
    // After the change of user, which clears it. In a namespace the kernel's kill covers this, too.
    if let Err(error) = die_with_parent() {
        return error;
    }
    let pointers = |texts: &[CString]| -> Vec<*const libc::c_char> {
        texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(&arguments), pointers(&environment));
    // SAFETY: an all-zero signal set is valid storage; the arrays end with a null pointer and outlive the call.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        // An ignored signal stays ignored in the executed program.
        for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE] {
            libc::signal(number, libc::SIG_DFL);
        }
        libc::umask(0o077);
        if libc::chdir(directory.as_ptr()) == 0 {
            libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
        }
    }
    io::Error::last_os_error()
}

fn become_user(user: &User) -> io::Result<()> {
    let name = CString::new(user.name.as_str())?;
    // SAFETY: a string with its closing zero byte; no other pointers.
    unsafe {
        check(libc::initgroups(name.as_ptr(), user.gid))?;
        check(libc::setgid(user.gid))?;
        check(libc::setuid(user.uid))
    }
}

/// The system user called `name`, `None` when there is none.
///
/// # Errors
/// The user database cannot be read.
pub fn find_user(name: &str) -> io::Result<Option<User>> {
    let c_name = CString::new(name)?;
    let mut buffer = vec![0 as libc::c_char; 16 << 10];
    // SAFETY: all-zero is valid for this struct of pointers and numbers.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: the buffer's length is given; all pointers are valid for the call.
    let error =
        unsafe { libc::getpwnam_r(c_name.as_ptr(), &raw mut entry, buffer.as_mut_ptr(), buffer.len(), &raw mut found) };
    match (error, found.is_null()) {
        (0, true) => Ok(None),
        (0, false) => {
            // SAFETY: the call succeeded, so the name points into `buffer`.
            let name = unsafe { CStr::from_ptr(entry.pw_name) }.to_string_lossy().into_owned();
            Ok(Some(User { name, uid: entry.pw_uid, gid: entry.pw_gid }))
        }
        (error, _) => Err(io::Error::from_raw_os_error(error)),
    }
}

/// The socket to the agent.
struct Control(i32);

impl Control {
    /// The first message. The agent has sent it before it started this process.
    fn receive_spec(&self) -> io::Result<InitSpec> {
        let mut length = [0; 4];
        self.receive(&mut length)?;
        let length = u32::from_ne_bytes(length) as usize;
        if length > SPEC_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a start order of impossible length"));
        }
        let mut json = vec![0; length];
        self.receive(&mut json)?;
        serde_json::from_slice(&json).map_err(io::Error::other)
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<()> {
        // SAFETY: the buffer is writable for its length.
        let count = unsafe { libc::recv(self.0, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_WAITALL) };
        match usize::try_from(count) {
            Ok(count) if count == buffer.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// One line to the agent. When the agent is gone there is nobody to tell, and the next wish says so.
    fn tell(&self, line: &str) {
        let line = format!("{}\n", line.replace('\n', " "));
        // SAFETY: the bytes are readable for their length.
        unsafe { libc::send(self.0, line.as_ptr().cast(), line.len(), libc::MSG_NOSIGNAL) };
    }

    /// The next byte from the agent, `None` when it is gone.
    fn next_wish(&self) -> Option<u8> {
        let mut byte = 0u8;
        // SAFETY: one writable byte.
        match unsafe { libc::recv(self.0, (&raw mut byte).cast(), 1, libc::MSG_DONTWAIT) } {
            1 => Some(byte),
            0 => None,
            _ => match io::Error::last_os_error().kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Some(0),
                _ => None,
            },
        }
    }
}

/// How a process ended.
enum Ended {
    Exited(i32),
    Signaled(i32),
}

fn ended(status: i32) -> Ended {
    if libc::WIFSIGNALED(status) {
        Ended::Signaled(libc::WTERMSIG(status))
    } else {
        Ended::Exited(libc::WEXITSTATUS(status))
    }
}

fn wait_for(child: i32) -> io::Result<Ended> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is writable.
        if unsafe { libc::waitpid(child, &raw mut status, 0) } == child {
            return Ok(ended(status));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// One child that has ended; `None` when all others run.
fn reap() -> io::Result<Option<(i32, Ended)>> {
    let mut status = 0;
    // SAFETY: `status` is writable.
    match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } {
        0 => Ok(None),
        child if child > 0 => Ok(Some((child, ended(status)))),
        _ => Err(io::Error::last_os_error()),
    }
}

fn fork() -> io::Result<i32> {
    // SAFETY: the process has one thread (see `init_main`), so the child may use everything.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        child => Ok(child),
    }
}

/// SIGKILL for this process when its parent ends. A parent that ended just before is noticed by the control socket.
fn die_with_parent() -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) })
}

/// Default actions and an empty mask: the agent's own choices must not reach PostgreSQL.
fn reset_signals() {
    // SAFETY: plain calls with valid or null pointers; SIGKILL and SIGSTOP refuse, which is fine.
    unsafe {
        for number in 1..=31 {
            libc::signal(number, libc::SIG_DFL);
        }
        // As process 1, signals without a handler are ignored anyway; outside, the agent alone decides when we end.
        for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE] {
            libc::signal(number, libc::SIG_IGN);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// A descriptor that is readable when a child has ended.
fn block_sigchld() -> io::Result<i32> {
    // SAFETY: an all-zero signal set is valid storage, filled before use.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))?;
        match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(fd),
        }
    }
}

fn drain(fd: i32) {
    let mut buffer = [0u8; 1024];
    // SAFETY: the buffer is writable for its length; the descriptor does not block.
    while unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) } > 0 {}
}

fn signal(pid: i32, number: i32) {
    // A process that has ended meanwhile is no error: it was to end.
    // SAFETY: no pointers.
    unsafe { libc::kill(pid, number) };
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
