//! `lakebase fence`.

use pgtypes::WriterId;
use reqwest::Method;
use safekeeper::api::{Fence, Fenced};

use crate::{
    CommandResult, LogArguments,
    http::{CallError, Client, TlsArguments},
    quorum::{ask_all, is_majority, newest_configuration},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Admin URL of each safekeeper
    #[arg(long = "safekeeper", value_name = "URL", required = true, num_args = 1..)]
    safekeepers: Vec<String>,
    #[command(flatten)]
    log: LogArguments,
    /// The term to grant: higher than any before
    #[arg(long)]
    term: u64,
    /// UUID of the writer that gets it
    #[arg(long, value_name = "UUID")]
    writer: WriterId,
    /// Print the answers as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    tls: TlsArguments,
}

pub(crate) fn run(arguments: &Arguments) -> CommandResult {
    let client = Client::new(&arguments.tls)?;
    let safekeepers = ask_all(&client, &arguments.safekeepers)?;
    let path = format!("/v1/logs/{}/{}/fence", arguments.log.cluster, arguments.log.branch);
    let body = Fence { term: arguments.term, writer: arguments.writer };
    let mut answers: Vec<(u32, Fenced)> = Vec::new();
    let mut fenced = Vec::new();
    let mut taken = false;
    for safekeeper in &safekeepers {
        match client.call::<Fenced>(Method::POST, safekeeper.url, &path, Some(&body)) {
            Ok(answer) => {
                fenced.push((safekeeper.status.disk, answer.generation));
                answers.push((safekeeper.status.member, answer));
            }
            Err(error) => {
                if let CallError::Refused { failure, .. } = &error {
                    taken |= matches!(failure.error.as_str(), "fenced" | "other_writer");
                }
                eprintln!("{error}");
            }
        }
    }
    // Asked again: a configuration that an acceptor adopted meanwhile decides about the majority.
    let configuration = newest_configuration(&ask_all(&client, &arguments.safekeepers)?, arguments.log)?;
    if arguments.json {
        let answers: Vec<_> =
            answers.iter().map(|(member, answer)| serde_json::json!({"member": member, "fenced": answer})).collect();
        println!("{}", serde_json::to_string(&answers)?);
    } else {
        for (member, answer) in &answers {
            println!(
                "member {member}: fenced to term {}, log ends at {} (written by {}), lease runs {} ms more",
                answer.term, answer.flush_lsn, answer.last_ballot, answer.promise_remaining_ms
            );
        }
    }
    // A fence under an older configuration does not count for majorities of a newer one.
    let counted: Vec<_> = fenced
        .into_iter()
        .filter_map(|(disk, generation)| (generation >= configuration.generation.0).then_some(disk))
        .collect();
    if !is_majority(&configuration, &counted) {
        let advice = if taken {
            "it belongs to another writer or is over: take one more than any term in `lakebase status`"
        } else {
            "repeat the command with the same term and writer, and --safekeeper for every member"
        };
        let members: Vec<String> = configuration.all_members().map(|member| member.member.0.to_string()).collect();
        return Err(format!(
            "term {} is NOT granted: {} fenced, no majority of members {} (generation {}); {advice}",
            arguments.term,
            counted.len(),
            members.join(", "),
            configuration.generation.0
        )
        .into());
    }
    Ok(())
}
