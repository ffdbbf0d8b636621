//! `lakebase log`.

use std::path::PathBuf;

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

pub(crate) fn run(command: &Command) -> CommandResult {
    let Command::Create { safekeepers, log, base_backup, tls } = command;
    let base = compute::inspect_base(base_backup)?;
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
        system_id: base.control.system_id.0,
        segment_bytes: base.segment_bytes(),
        start_lsn: base.start_lsn,
        // Not the checkpoint's: the segment may begin before a promotion that it holds, and the log begins with the segment.
        timeline: base.start_timeline.0,
        max_full_xid: base.control.checkpoint.next_full_xid.saturating_sub(1),
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
