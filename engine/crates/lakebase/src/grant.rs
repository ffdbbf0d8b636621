//! `lakebase grant`.

use pgtypes::WriterId;
use reqwest::Method;

use crate::{
    CommandResult,
    http::{Client, TlsArguments},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Admin URL of the compute agent
    #[arg(long, value_name = "URL")]
    compute: String,
    /// The term, as fenced before
    #[arg(long)]
    term: u64,
    /// UUID of the writer; without it, the one that the agent says it is
    #[arg(long, value_name = "UUID")]
    writer: Option<WriterId>,
    #[command(flatten)]
    tls: TlsArguments,
}

pub(crate) fn run(arguments: &Arguments) -> CommandResult {
    let client = Client::new(&arguments.tls)?;
    let writer = match arguments.writer {
        Some(writer) => writer.to_string(),
        None => {
            let status: serde_json::Value = client.get(&arguments.compute, "/v1/status")?;
            status["writer"]
                .as_str()
                .ok_or_else(|| format!("{}: no compute agent answers there", arguments.compute))?
                .to_owned()
        }
    };
    let body = serde_json::json!({"term": arguments.term, "writer": writer});
    let answer: serde_json::Value = client.call(Method::POST, &arguments.compute, "/v1/grant", Some(&body))?;
    // As the agent has it.
    println!("term {} is granted to writer {}", answer["term"], answer["writer"].as_str().unwrap_or("unknown"));
    Ok(())
}
