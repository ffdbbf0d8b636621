//! `lakebase log`.

use std::path::{Path, PathBuf};

use pgformat::{ControlFile, DatabaseState};
use pgtypes::Lsn;
use reqwest::Method;
use safekeeper::api::{ConfigurationJson, CreateLog, LogStatus, MemberJson};

use crate::{
    CommandResult, LogArguments,
    http::{Client, TlsArguments, host_of},
    quorum::{Safekeeper, ask_all},
};

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Create a log on all its safekeepers, from a cleanly shut down PGDATA
    ///
    /// The log begins with the WAL segment in which the base backup ends. Creating it again with the same contents changes
    /// nothing, so the command may be repeated when a safekeeper did not answer.
    Create {
        /// Admin URL of each safekeeper (1, 3 or 5 of them), as in https://sk-1:7003
        #[arg(long = "safekeeper", value_name = "URL", required = true, num_args = 1..)]
        safekeepers: Vec<String>,
        #[command(flatten)]
        log: LogArguments,
        /// A cleanly shut down PGDATA, which the first writer starts from
        #[arg(long, value_name = "DIR")]
        base_backup: PathBuf,
        #[command(flatten)]
        tls: TlsArguments,
    },
}

/// Bytes of a shut-down checkpoint record: header 24, data header 2, `CheckPoint` 88, aligned to 8.
const CHECKPOINT_RECORD_BYTES: u64 = 120;
/// `XLOG_BLCKSZ`.
const WAL_PAGE_BYTES: u64 = 8192;
/// `SizeOfXLogShortPHD` and `SizeOfXLogLongPHD` (`access/xlog_internal.h`).
const PAGE_HEADER_BYTES: (u64, u64) = (24, 40);

pub(crate) fn run(command: &Command) -> CommandResult {
    let Command::Create { safekeepers, log, base_backup, tls } = command;
    let control = read_control(base_backup)?;
    let client = Client::new(tls)?;
    let answers = ask_all(&client, safekeepers)?;
    if answers.len() < safekeepers.len() {
        return Err("a log is created on all its safekeepers, and not all of them answer".into());
    }
    if answers.len() % 2 == 0 {
        return Err(format!(
            "{} safekeepers: an even number survives no more losses than one less; give 1, 3 or 5",
            answers.len()
        )
        .into());
    }
    let mut members: Vec<MemberJson> = answers.iter().map(member_of).collect::<Result<_, _>>()?;
    members.sort_by_key(|member| member.member);
    if let Some(pair) = members.windows(2).find(|pair| pair[0].member == pair[1].member) {
        return Err(format!("two of the safekeepers have member number {}", pair[0].member).into());
    }
    let segment_bytes = u64::from(control.segment_bytes);
    let body = CreateLog {
        system_id: control.system_id.0,
        segment_bytes,
        start_lsn: end_of_checkpoint(control.checkpoint_lsn, segment_bytes).floor(segment_bytes),
        timeline: control.checkpoint.timeline.0,
        max_full_xid: control.checkpoint.next_full_xid.saturating_sub(1),
        configuration: ConfigurationJson { generation: 1, members, new_members: None },
    };
    let path = format!("/v1/logs/{}/{}", log.cluster, log.branch);
    for safekeeper in &answers {
        let status: LogStatus = client.call(Method::PUT, safekeeper.url, &path, Some(&body))?;
        println!("member {}: log begins at {}", safekeeper.status.member, status.start_lsn);
    }
    Ok(())
}

/// The safekeeper as a member: its append port on the host that its admin URL names.
pub(crate) fn member_of(safekeeper: &Safekeeper<'_>) -> Result<MemberJson, String> {
    let address = format!("{}:{}", host_of(safekeeper.url)?, safekeeper.status.append_port);
    Ok(MemberJson { member: safekeeper.status.member, disk: safekeeper.status.disk, address })
}

/// The `pg_control` of a cleanly shut down PGDATA.
fn read_control(pgdata: &Path) -> Result<ControlFile, String> {
    let path = pgdata.join("global/pg_control");
    let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let control = ControlFile::parse(&bytes).map_err(|error| format!("{}: {error}", path.display()))?;
    if control.state != DatabaseState::ShutDown {
        let state = control.state;
        return Err(format!(
            "{}: not shut down cleanly ({state:?}): stop PostgreSQL with `pg_ctl stop -m fast`",
            pgdata.display()
        ));
    }
    if pgdata.join("postmaster.pid").exists() {
        return Err(format!("{}: PostgreSQL runs on it (postmaster.pid exists)", pgdata.display()));
    }
    Ok(control)
}

/// Where the shut-down checkpoint that starts at `start` ends: the last record of the backup.
fn end_of_checkpoint(start: Lsn, segment_bytes: u64) -> Lsn {
    let in_page = WAL_PAGE_BYTES - start.offset_in(WAL_PAGE_BYTES);
    if in_page >= CHECKPOINT_RECORD_BYTES {
        return start.advance(CHECKPOINT_RECORD_BYTES);
    }
    let next_page = start.advance(in_page);
    let (short, long) = PAGE_HEADER_BYTES;
    let header = if next_page.offset_in(segment_bytes) == 0 { long } else { short };
    next_page.advance(header + CHECKPOINT_RECORD_BYTES - in_page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgtypes::{PgTimeline, SystemId};
    use wal::{RecordSpec, WalWriter, main_data, rmgr};

    /// Wherever the record lies: in a page, over the border of two pages, over the border of two segments.
    #[test]
    fn end_of_checkpoint_is_where_the_writer_ends_it() {
        const SEGMENT_BYTES: u64 = 1 << 20;
        let checkpoint = main_data(&[0; 88]);
        for before in (0..400).chain(130_600..131_000) {
            let start = Lsn(SEGMENT_BYTES * 2 - 131_072 - 8192);
            let mut writer = WalWriter::new(start, Lsn::INVALID, SEGMENT_BYTES, SystemId(1), PgTimeline(1));
            let filler = main_data(&vec![0; 8000 + before]);
            writer.append(RecordSpec { rmgr: rmgr::XLOG, info: 0x20, xid: 0, payload: &filler });
            let (start, end) = writer.append(RecordSpec { rmgr: rmgr::XLOG, info: 0, xid: 0, payload: &checkpoint });
            assert_eq!(end, end_of_checkpoint(start, SEGMENT_BYTES), "{start}");
        }
    }
}
