//! `lakebase log`.

use std::path::{Path, PathBuf};

use pgtypes::{Lsn, PgTimeline, SystemId};
use reqwest::Method;
use safekeeper::api::{ConfigurationJson, CreateLog, LogStatus, MemberJson};

use crate::{
    CommandResult, LogArguments,
    http::{Client, TlsArguments, host_of},
    quorum::{Safekeeper, ask_all},
    store,
};

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Create a log on all its safekeepers, from what `lakebase import` wrote or from a cleanly shut down PGDATA
    ///
    /// After an import the log begins where `cluster.json` says; with a base backup, with the WAL segment in which that ends.
    /// Creating it again with the same contents changes nothing, so the command may be repeated when a safekeeper did not
    /// answer.
    Create {
        /// Admin URL of each safekeeper (1, 3 or 5 of them), as in https://sk-1:7003
        #[arg(long = "safekeeper", value_name = "URL", required = true, num_args = 1..)]
        safekeepers: Vec<String>,
        #[command(flatten)]
        log: LogArguments,
        /// Object storage that the lakebase was imported to, as in `lakebase import --object-storage`
        #[arg(long, value_name = "URL", required_unless_present = "base_backup", conflicts_with = "base_backup")]
        from_store: Option<String>,
        /// A cleanly shut down PGDATA, which the first writer starts from; for a lakebase without page servers
        #[arg(long, value_name = "DIR")]
        base_backup: Option<PathBuf>,
        #[command(flatten)]
        tls: TlsArguments,
    },
}

pub(crate) fn run(command: &Command) -> CommandResult {
    let Command::Create { safekeepers, log, from_store, base_backup, tls } = command;
    let beginning = match (from_store, base_backup) {
        (Some(url), _) => Beginning::of_store(url, *log)?,
        (None, Some(directory)) => Beginning::of_base_backup(directory)?,
        (None, None) => return Err("where does the log begin? Give --from-store or --base-backup".into()),
    };
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
    let body = CreateLog {
        system_id: beginning.system_id.0,
        segment_bytes: beginning.segment_bytes,
        start_lsn: beginning.start_lsn,
        timeline: beginning.timeline.0,
        max_full_xid: beginning.next_full_xid.saturating_sub(1),
        configuration: ConfigurationJson { generation: 1, members, new_members: None },
        shards: beginning.shards,
    };
    let path = format!("/v1/logs/{}/{}", log.cluster, log.branch);
    for safekeeper in &answers {
        let status: LogStatus = client.call(Method::PUT, safekeeper.url, &path, Some(&body))?;
        println!("member {}: log begins at {}", safekeeper.status.member, status.start_lsn);
    }
    Ok(())
}

/// What a log begins with.
struct Beginning {
    system_id: SystemId,
    /// Of PostgreSQL's WAL.
    segment_bytes: u64,
    start_lsn: Lsn,
    timeline: PgTimeline,
    next_full_xid: u64,
    /// On object storage; none with a base backup.
    shards: Vec<u32>,
}

impl Beginning {
    fn of_base_backup(directory: &Path) -> Result<Beginning, Box<dyn std::error::Error>> {
        let base = compute::inspect_base(directory)?;
        Ok(Beginning {
            system_id: base.control.system_id,
            segment_bytes: base.segment_bytes(),
            start_lsn: base.start_lsn,
            // Not the checkpoint's: the segment may begin before a promotion that it holds, and the log begins with the segment.
            timeline: base.start_timeline,
            next_full_xid: base.control.checkpoint.next_full_xid,
            shards: Vec::new(),
        })
    }

    fn of_store(url: &str, log: LogArguments) -> Result<Beginning, Box<dyn std::error::Error>> {
        let description = store::read_cluster(url, log)?;
        Ok(Beginning {
            system_id: description.system_id,
            segment_bytes: u64::from(description.segment_bytes),
            start_lsn: description.start_lsn,
            timeline: description.timeline,
            next_full_xid: description.next_full_xid,
            shards: description.shards.iter().map(|shard| shard.shard).collect(),
        })
    }
}

/// The safekeeper as a member: its append port on the host that its admin URL names.
pub(crate) fn member_of(safekeeper: &Safekeeper<'_>) -> Result<MemberJson, String> {
    let address = format!("{}:{}", host_of(safekeeper.url)?, safekeeper.status.append_port);
    Ok(MemberJson { member: safekeeper.status.member, disk: safekeeper.status.disk, address })
}
