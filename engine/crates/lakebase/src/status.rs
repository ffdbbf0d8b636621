//! `lakebase status`.

use safekeeper::api::{LogState, Status};
use serde_json::Value;

use crate::{
    CommandResult,
    http::{Client, TlsArguments},
};

#[derive(clap::Args)]
#[group(id = "whom", required = true, multiple = true, args = ["safekeepers", "pageservers", "compute"])]
pub(crate) struct Arguments {
    /// Admin URL of a safekeeper; may be repeated
    #[arg(long = "safekeeper", value_name = "URL", num_args = 1..)]
    safekeepers: Vec<String>,
    /// Admin URL of a page server; may be repeated
    #[arg(long = "pageserver", value_name = "URL", num_args = 1..)]
    pageservers: Vec<String>,
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
    for url in &arguments.pageservers {
        match client.get::<pageserver::api::Status>(url, "/v1/status") {
            Ok(status) if arguments.json => {
                answers.insert(url.clone(), serde_json::to_value(&status)?);
            }
            Ok(status) => print_page_server(url, &status),
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
            Ok(status) => print_compute(url, &status)?,
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

/// The agent's status (`docs/compute.md`), what matters first.
fn print_compute(url: &str, status: &Value) -> Result<(), String> {
    let text = |value: &Value| match value {
        Value::Null => "none".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let field = |key: &str| text(&status[key]);
    let Some(state) = status["state"].as_str() else {
        return Err(format!("{url}: no compute agent answers there"));
    };
    println!(
        "compute {url}: {state}, writer {}, term {}, attempt {}, version {}, I/O {}",
        field("writer"),
        field("term"),
        field("attempt"),
        field("version"),
        field("driver"),
    );
    println!(
        "  {}/{}: commit {}, end {}, x {}, quorum {}, lease {} ms",
        field("cluster"),
        field("branch"),
        field("commit_lsn"),
        field("record_end"),
        field("x"),
        field("quorum"),
        field("lease_remaining_ms"),
    );
    println!(
        "  PostgreSQL {}: pid {}, isolation {}, recovery {}",
        field("postgres_version"),
        field("postgres_pid"),
        field("isolation"),
        field("recovery"),
    );
    for safekeeper in status["safekeepers"].as_array().into_iter().flatten() {
        let follows = if safekeeper["follows"] == true { "follows" } else { "does NOT follow" };
        print!("  member {} {follows}: flush {}", text(&safekeeper["member"]), text(&safekeeper["flush_lsn"]));
        match safekeeper["trouble"].as_str() {
            Some(trouble) => println!(", trouble: {trouble}"),
            None => println!(),
        }
    }
    for key in ["last_error", "unsupported_record"] {
        if !status[key].is_null() {
            println!("  {key}: {}", field(key));
        }
    }
    Ok(())
}

fn print_page_server(url: &str, status: &pageserver::api::Status) {
    println!(
        "page server {url}: shard {}, generation {}, version {}, I/O {}",
        status.shard, status.generation, status.version, status.driver
    );
    println!(
        "  {}/{} {} to {}: ingested {}, durable {}, horizon {}, lag {} bytes, WAL from {}",
        status.cluster,
        status.branch,
        status.begin,
        status.end,
        status.ingested_lsn,
        status.durable_lsn,
        status.horizon_lsn,
        status.lag_bytes,
        if status.source.is_empty() { "nobody" } else { &status.source }
    );
    println!(
        "  layers: {} image, {} level 0, {} level 1, {} bytes; {} bytes not in object storage",
        status.image_layers, status.level0_layers, status.level1_layers, status.layer_bytes, status.backlog_bytes
    );
    for (layer, cause) in &status.lost_layers {
        println!("  LOST layer {layer}: {cause}");
    }
    for fault in &status.first_faults {
        println!("  fault: {fault}");
    }
    for (what, cause) in &status.troubles {
        println!("  trouble: {what}: {cause}");
    }
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
            "  {}/{} {}: term {}.{} writer {}, generation {}, commit {}, flush {}, oldest {}, timeline {}",
            log.cluster,
            log.branch,
            match log.state {
                LogState::Serving => "serving",
                LogState::Failed => "state failed",
            },
            log.term,
            log.attempt,
            if log.term == 0 { "none yet".to_owned() } else { log.writer.to_string() },
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
