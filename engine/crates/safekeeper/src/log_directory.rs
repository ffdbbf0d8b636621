//! Logs come and go: recovery at start, creation, deletion.

use std::{
    fs::File,
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use consensus::{AcceptorIdentity, Configuration};
use layers::{ShardGeneration, ShardId};
use logstore::Log;
use pgtypes::{FrameSummary, LogId, Lsn, PgTimeline, SystemId};

use crate::{
    api::{CreateLog, DamagedLog, LogStatus},
    archive::ARCHIVE,
    core::Core,
    files::{LogFiles, RecoveryReader},
    log::LogDriver,
    process::Process,
};

/// How long a creation waits for the disk before it says so.
const CREATE_LIMIT: Duration = Duration::from_secs(10);

/// The consumer that keeps the WAL from the base backup on: without it the next writer could not replay.
pub const BASE_BACKUP: &str = "base_backup";

/// Why a log was not created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// With other contents.
    #[error("the log exists with another beginning, system or configuration")]
    Exists,
    /// It is being created or deleted.
    #[error("the log is being created or deleted")]
    Busy,
    /// What is on the disk is no usable log.
    #[error("the log exists and is damaged: {0}")]
    Damaged(String),
    /// The configuration does not name this safekeeper.
    #[error("the configuration does not list member {member} with disk {disk}, which this safekeeper is")]
    NotAMember {
        /// Of this safekeeper.
        member: u32,
        /// Of this safekeeper.
        disk: pgtypes::DiskId,
    },
    /// This disk held it before, and does not any more.
    #[error(
        "this disk has held the log before: an empty one would vote without what the lost one has promised; \
         replace the member by one with another disk"
    )]
    Lost,
    /// The request contradicts itself.
    #[error("{0}")]
    Invalid(String),
    /// It exists, but takes part only when space returns.
    #[error("the disk is full; the creation is finished when space returns")]
    DiskFull,
    /// The file system failed.
    #[error("create the log: {0}")]
    Io(#[from] io::Error),
}

/// Opens those of `logs` that `core` owns. What cannot be opened is reported and takes part in nothing. Blocks: used at
/// start.
pub fn recover_all(core: &Rc<Core>, logs: &[LogId]) {
    for log in logs.iter().copied().filter(|log| core.process.core_of(*log) == core.index) {
        if let Err(message) = recover(core, log) {
            tracing::error!(%log, message, "log cannot be opened: it takes part in nothing");
            core.process.damaged().push(DamagedLog { cluster: log.cluster, branch: log.branch, message });
        }
    }
}

fn recover(core: &Rc<Core>, log: LogId) -> Result<(), String> {
    let process = &core.process;
    let directory = process.data_dir.log(log);
    let files = LogFiles::new(log, directory.clone(), process.direct_io);
    let [control_0, control_1] = files.read_control().map_err(|error| format!("read the control file: {error}"))?;
    if control_0.is_none() && control_1.is_none() {
        // A creation or a deletion was cut short, if there is no WAL either; else somebody lost the control file.
        return remove_empty(&directory).map_err(|error| format!("there is no control file: {error}"));
    }
    let mut reader = RecoveryReader::new(&files);
    let recovered =
        Log::recover(log, process.disk(), control_0.as_deref(), control_1.as_deref(), &mut reader, driver::now())
            .map_err(|error| error.to_string())?;
    if recovered.control_repaired {
        tracing::warn!(%log, "one copy of the control file was unusable or older; it is written again");
    }
    remember(&known_path(process, log)).map_err(|error| format!("remember the log: {error}"))?;
    let status = recovered.log.status();
    tracing::info!(
        %log,
        flush_lsn = %status.acceptor.flush.record_end,
        commit_lsn = %status.acceptor.commit_lsn,
        ballot = %status.acceptor.ballot,
        "log opened"
    );
    LogDriver::start(core, log, recovered.log, files);
    Ok(())
}

fn remove_empty(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir(directory.join("wal")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::remove_dir(directory)
}

/// Creates a log, durably; `true` when it is new.
///
/// # Errors
/// [`CreateError`].
pub async fn create(core: &Rc<Core>, log: LogId, body: CreateLog) -> Result<(bool, LogStatus), CreateError> {
    let process = &core.process;
    let damaged =
        process.damaged().iter().find(|known| (known.cluster, known.branch) == (log.cluster, log.branch)).cloned();
    if let Some(damaged) = damaged {
        return Err(CreateError::Damaged(damaged.message));
    }
    let identity = AcceptorIdentity {
        log,
        system: SystemId(body.system_id),
        member: process.member(),
        disk: process.disk(),
        segment_bytes: body.segment_bytes,
        start: FrameSummary {
            record_end: body.start_lsn,
            record_start: Lsn::INVALID,
            timeline: PgTimeline(body.timeline),
            max_full_xid: body.max_full_xid,
            commit_timestamp: 0,
        },
    };
    let configuration = Configuration::from(body.configuration);
    let known = known_path(process, log);
    if let Some(existing) = core.log(log) {
        let same = existing.with(|machine| {
            let known = &machine.acceptor().state().configuration;
            *machine.acceptor().identity() == identity
                && (known.generation > configuration.generation || *known == configuration)
        });
        if !same {
            return Err(CreateError::Exists);
        }
        // Whoever created it may have ended before that.
        driver::unblock(move || remember(&known)).await?;
        return Ok((false, existing.api_status()));
    }
    check(&identity, &configuration)?;
    if !configuration.contains(identity.member, identity.disk) {
        return Err(CreateError::NotAMember { member: identity.member.0, disk: identity.disk });
    }
    // Who joins has no vote yet: what it promised as an earlier member was counted with a configuration that is over.
    let joins = configuration.members.iter().all(|member| member.disk != identity.disk);
    let looked_up = known.clone();
    if !joins && driver::unblock(move || looked_up.try_exists()).await? {
        return Err(CreateError::Lost);
    }
    let Some(_busy) = core.begin(log) else { return Err(CreateError::Busy) };
    let directory = process.data_dir.log(log);
    make_directories(&directory).await?;
    let machine =
        Log::create(identity, configuration, driver::now()).map_err(|error| CreateError::Invalid(error.to_string()))?;
    let files = LogFiles::new(log, directory, process.direct_io);
    let created = LogDriver::start(core, log, machine, files);
    for shard in &body.shards {
        let registered = created.register_shard(ShardId(*shard), ShardGeneration(0));
        registered.map_err(|error| CreateError::Invalid(error.to_string()))?;
    }
    if body.shards.is_empty() {
        created.set_consumer(BASE_BACKUP, body.start_lsn).map_err(|error| CreateError::Invalid(error.to_string()))?;
    }
    if process.config.archive.is_some() {
        // Before anybody lets WAL go: the archive has no gap.
        created.set_consumer(ARCHIVE, body.start_lsn).map_err(|error| CreateError::Invalid(error.to_string()))?;
    }
    let version = created.with(|machine| machine.consumers_version());
    let durable = created.until(|machine| {
        let durable = machine.is_ready() && machine.consumers_durable(version);
        (durable || machine.is_failed()).then_some(durable)
    });
    match driver::timeout(CREATE_LIMIT, durable).await {
        Some(true) => {
            driver::unblock(move || remember(&known)).await?;
            tracing::info!(%log, start_lsn = %body.start_lsn, "log created");
            Ok((true, created.api_status()))
        }
        Some(false) => Err(io::Error::other("a disk operation failed; see the log").into()),
        None => Err(CreateError::DiskFull),
    }
}

fn check(identity: &AcceptorIdentity, configuration: &Configuration) -> Result<(), CreateError> {
    let invalid = |message: String| Err(CreateError::Invalid(message));
    configuration.check().map_err(|error| CreateError::Invalid(error.to_string()))?;
    if !wal::segment_bytes_valid(identity.segment_bytes) {
        return invalid(format!(
            "segment_bytes {}: must be a power of two from 1 MiB to 1 GiB",
            identity.segment_bytes
        ));
    }
    let start = identity.start.record_end;
    if !start.is_valid() || start.offset_in(identity.segment_bytes) != 0 || start.0 >= 1 << 62 {
        return invalid(format!("start_lsn {start}: must be the start of a WAL segment"));
    }
    if identity.start.timeline.0 == 0 {
        return invalid("timeline 0 does not exist".to_owned());
    }
    if identity.system.0 == 0 {
        return invalid("system_id 0 does not exist".to_owned());
    }
    Ok(())
}

/// Where the disk remembers that it has held `log`. Outlives the log: one that was lost or deleted has voted under this
/// disk's identity, and an empty one in its place could elect a log without what it had acknowledged.
fn known_path(process: &Process, log: LogId) -> PathBuf {
    process.data_dir.root().join("known").join(format!("{}.{}", log.cluster, log.branch))
}

/// Makes sure that `path` exists, durably. Blocks.
fn remember(path: &Path) -> io::Result<()> {
    if path.try_exists()? {
        return Ok(());
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    File::create(path)?.sync_all()?;
    for directory in directory.ancestors().take(2) {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

async fn make_directories(directory: &Path) -> io::Result<()> {
    let directory = directory.to_owned();
    driver::unblock(move || {
        std::fs::create_dir_all(directory.join("wal"))?;
        // From the inside out: the log's own, its cluster's, and the one of all.
        for path in directory.ancestors().take(3) {
            std::fs::File::open(path)?.sync_all()?;
        }
        Ok(())
    })
    .await
}

/// Deletes a log, damaged or not; `false` when there is none.
///
/// # Errors
/// The file system failed; what is left is deleted when this is called again.
pub async fn delete(core: &Rc<Core>, log: LogId) -> io::Result<bool> {
    let process = &core.process;
    let Some(_busy) = core.begin(log) else { return Err(io::Error::other("the log is being created or deleted")) };
    let open = core.remove(log);
    if let Some(open) = &open {
        open.close(wire::append::ErrorCode::UnknownLog, "the log was deleted").await;
        open.files().close_all();
    }
    core.followers.forget(log);
    let directory = process.data_dir.log(log);
    let existed = driver::unblock({
        let directory = directory.clone();
        move || -> io::Result<bool> {
            if !directory.exists() {
                return Ok(false);
            }
            // Control files last: what is left of an interrupted deletion is a damaged log, which can be deleted again.
            let wal = directory.join("wal");
            if wal.exists() {
                std::fs::remove_dir_all(&wal)?;
                std::fs::File::open(&directory)?.sync_all()?;
            }
            std::fs::remove_dir_all(&directory)?;
            let cluster = directory.parent().unwrap_or(Path::new("/"));
            std::fs::File::open(cluster)?.sync_all()?;
            Ok(true)
        }
    })
    .await?;
    process.damaged().retain(|known| (known.cluster, known.branch) != (log.cluster, log.branch));
    if existed {
        tracing::info!(%log, "log deleted");
    }
    Ok(existed)
}
