//! `lakebase status`.

use safekeeper::api::Status;

use crate::{
    CommandResult,
    http::{Client, TlsArguments},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Admin URL of a safekeeper; may be repeated
    #[arg(long = "safekeeper", value_name = "URL", num_args = 1.., required_unless_present = "compute")]
    safekeepers: Vec<String>,
    /// Admin URL of a compute agent
    #[arg(long, value_name = "URL")]
    compute: Option<String>,
    /// Print the answers as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    tls: TlsArguments,
}

pub(crate) fn run(arguments: &Arguments) -> CommandResult {
    let client = Client::new(&arguments.tls)?;
    let mut failed = 0;
    let mut answers = serde_json::Map::new();
    for url in &arguments.safekeepers {
        match client.get::<Status>(url, "/v1/status") {
            Ok(status) if arguments.json => {
                answers.insert(url.clone(), serde_json::to_value(&status)?);
            }
            Ok(status) => print_safekeeper(url, &status),
            Err(error) => {
                failed += 1;
                eprintln!("{error}");
            }
        }
    }
    if let Some(url) = &arguments.compute {
        match client.get::<serde_json::Value>(url, "/v1/status") {
            Ok(status) if arguments.json => {
                answers.insert(url.clone(), status);
            }
            Ok(status) => {
                println!("compute {url}");
                for (key, value) in status.as_object().into_iter().flatten() {
                    println!("  {key:20} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
                }
            }
            Err(error) => {
                failed += 1;
                eprintln!("{error}");
            }
        }
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&answers)?);
    }
    if failed > 0 { Err(format!("{failed} did not answer").into()) } else { Ok(()) }
}

fn print_safekeeper(url: &str, status: &Status) {
    println!(
        "safekeeper {} {url}: disk {}, version {}, I/O {}{}{}",
        status.member,
        status.disk,
        status.version,
        status.driver,
        if status.direct_io { ", direct" } else { "" },
        if status.disk_full { ", DISK FULL" } else { "" },
    );
    for log in &status.logs {
        println!(
            "  {}/{} {:?}: term {}.{} writer {}, generation {}, commit {}, flush {}, oldest {}, timeline {}",
            log.cluster,
            log.branch,
            log.state,
            log.term,
            log.attempt,
            log.writer,
            log.configuration.generation,
            log.commit_lsn,
            log.flush_lsn,
            log.oldest_lsn,
            log.timeline
        );
    }
    for log in &status.damaged {
        println!("  {}/{} DAMAGED: {}", log.cluster, log.branch, log.message);
    }
}
