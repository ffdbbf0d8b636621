//! `lakebase membership`.

use std::time::{Duration, Instant};

use consensus::Configuration;
use pgtypes::{Generation, Lsn};
use reqwest::Method;
use safekeeper::api::{ConfigurationJson, CreateLog, LogStatus, MembershipChanged};

use crate::{
    CommandResult, LogArguments,
    http::{Client, TlsArguments},
    log_command::member_of,
    quorum::{Safekeeper, ask_all, is_majority, newest_configuration},
};

/// Time between two attempts of the final step, while the writer has not picked the joint configuration up.
const RETRY: Duration = Duration::from_millis(200);

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Print the newest configuration that the safekeepers know
    Show {
        /// Admin URL of each safekeeper
        #[arg(long = "safekeeper", value_name = "URL", required = true, num_args = 1..)]
        safekeepers: Vec<String>,
        #[command(flatten)]
        log: LogArguments,
        #[command(flatten)]
        tls: TlsArguments,
    },
    /// Add, remove or replace one member, through a joint configuration
    ///
    /// A new member gets an empty log and fetches its WAL from the others. A writer must run: the change is final once a
    /// commit was counted with both sets. Repeat the command when it was interrupted.
    Change {
        /// Admin URL of each safekeeper, present members and the new one
        #[arg(long = "safekeeper", value_name = "URL", required = true, num_args = 1..)]
        safekeepers: Vec<String>,
        #[command(flatten)]
        log: LogArguments,
        /// Numbers of the members to be
        #[arg(long, value_name = "MEMBER", required = true, num_args = 1.., value_delimiter = ',')]
        to: Vec<u32>,
        /// Seconds to wait for the writer
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        wait: u64,
        #[command(flatten)]
        tls: TlsArguments,
    },
}

pub(crate) fn run(command: &Command) -> CommandResult {
    match command {
        Command::Show { safekeepers, log, tls } => {
            let client = Client::new(tls)?;
            let configuration = newest_configuration(&ask_all(&client, safekeepers)?, *log)?;
            println!("{}", serde_json::to_string_pretty(&ConfigurationJson::from(&configuration))?);
            Ok(())
        }
        Command::Change { safekeepers, log, to, wait, tls } => {
            let client = Client::new(tls)?;
            change(&client, safekeepers, *log, to, Duration::from_secs(*wait))
        }
    }
}

fn change(client: &Client, urls: &[String], log: LogArguments, to: &[u32], wait: Duration) -> CommandResult {
    let safekeepers = ask_all(client, urls)?;
    let mut configuration = newest_configuration(&safekeepers, log)?;
    let mut members = Vec::new();
    for number in to {
        let known = configuration.all_members().find(|member| member.member.0 == *number).cloned();
        let answering = safekeepers.iter().find(|safekeeper| safekeeper.status.member == *number);
        members.push(match (known, answering) {
            // The known entry keeps its address; a safekeeper with another disk is another member.
            (Some(known), Some(answering)) if known.disk == answering.status.disk => known,
            (Some(known), None) => known,
            (Some(_), Some(answering)) => {
                return Err(format!("{}: member {number} has another disk than the configuration says; a replaced disk needs a new number", answering.url).into());
            }
            (None, Some(answering)) => member_of(answering)?.into(),
            (None, None) => return Err(format!("no safekeeper that answers has member number {number}").into()),
        });
    }
    members.sort_by_key(|member| member.member);
    if configuration.new_members.as_ref().is_some_and(|new| *new != members) {
        return Err("another change is under way: finish it first, with its own --to".into());
    }
    if configuration.new_members.is_none() {
        if configuration.members == members {
            println!("generation {}: nothing to change", configuration.generation.0);
            return Ok(());
        }
        let joint = Configuration {
            generation: Generation(configuration.generation.0 + 1),
            members: configuration.members.clone(),
            new_members: Some(members.clone()),
        };
        joint.check().map_err(|error| error.to_string())?;
        create_on_new_members(client, &safekeepers, log, &joint)?;
        set(client, &safekeepers, log, &joint)?;
        println!("generation {}: joint", joint.generation.0);
        configuration = joint;
    }
    let next = Configuration { generation: Generation(configuration.generation.0 + 1), members, new_members: None };
    let deadline = Instant::now() + wait;
    loop {
        match set(client, &safekeepers, log, &next) {
            Ok(()) => break,
            Err(error) if Instant::now() >= deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(RETRY),
        }
    }
    println!("generation {}: done", next.generation.0);
    Ok(())
}

/// Gives an empty log to each member that joins with `joint` and has none. A member of the old set that has none has lost it,
/// and with it what it had promised: an empty one there would vote.
fn create_on_new_members(
    client: &Client,
    safekeepers: &[Safekeeper<'_>],
    log: LogArguments,
    joint: &Configuration,
) -> Result<(), Box<dyn std::error::Error>> {
    // From what everyone can still give, the new member fetches on.
    let donor = safekeepers.iter().filter_map(|safekeeper| safekeeper.log(log)).max_by_key(|status| status.oldest_lsn);
    let donor = donor.ok_or("no safekeeper that answers has the log")?;
    let start_lsn = Lsn(donor.oldest_lsn.0.next_multiple_of(donor.segment_bytes));
    let section = donor.timelines.iter().rev().find(|section| section.start_lsn <= start_lsn);
    let body = CreateLog {
        system_id: donor.system_id,
        segment_bytes: donor.segment_bytes,
        start_lsn,
        timeline: section.ok_or("the log has no timeline")?.timeline,
        // Of a later position: larger than true until the new member has caught up, and never smaller.
        max_full_xid: donor.max_full_xid,
        configuration: ConfigurationJson::from(joint),
        shards: donor.shards.iter().map(|shard| shard.shard).collect(),
    };
    let path = format!("/v1/logs/{}/{}", log.cluster, log.branch);
    for safekeeper in safekeepers {
        let is_old = joint.members.iter().any(|member| member.disk == safekeeper.status.disk);
        let is_new = joint.new_members.iter().flatten().any(|member| member.disk == safekeeper.status.disk);
        if is_new && !is_old && safekeeper.log(log).is_none() {
            let _: LogStatus = client.call(Method::PUT, safekeeper.url, &path, Some(&body))?;
            println!("member {}: log begins at {}", safekeeper.status.member, body.start_lsn);
        }
    }
    Ok(())
}

/// Makes `configuration` durable on a majority of its sets.
fn set(
    client: &Client,
    safekeepers: &[Safekeeper<'_>],
    log: LogArguments,
    configuration: &Configuration,
) -> Result<(), String> {
    let path = format!("/v1/logs/{}/{}/membership", log.cluster, log.branch);
    let body = ConfigurationJson::from(configuration);
    let mut done = Vec::new();
    let mut errors = Vec::new();
    for safekeeper in safekeepers {
        if !configuration.all_members().any(|member| member.disk == safekeeper.status.disk) {
            continue;
        }
        match client.call::<MembershipChanged>(Method::PUT, safekeeper.url, &path, Some(&body)) {
            Ok(_) => done.push(safekeeper.status.disk),
            Err(error) => errors.push(error.to_string()),
        }
    }
    if is_majority(configuration, &done) {
        Ok(())
    } else {
        Err(format!("generation {} is not on a majority: {}", configuration.generation.0, errors.join("; ")))
    }
}
