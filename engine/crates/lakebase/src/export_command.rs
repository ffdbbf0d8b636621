//! `lakebase export`.

use std::path::PathBuf;

use identity::{Tls, TlsFiles};
use layers::{HashRange, ShardGeneration, ShardId, Striping};
use pageclient::{ClientConfig, ShardAddress};
use remote_storage::ClusterDescription;
use transfer::export::{self, Export, Moment};
use wire::page::ReaderRole;

use crate::{CommandResult, LogArguments, http::TlsArguments, store, transfer_progress};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where to: an empty directory, or one that does not exist yet
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// As of when: a position (1/5A28D0) or a time with its zone (2026-11-27T18:30:00Z); without it, the newest that all
    /// page servers have
    #[arg(long, value_name = "LSN|TIME")]
    at: Option<Moment>,
    /// Object storage of the lakebase, as in `lakebase import`: its cluster.json is read
    #[arg(long, value_name = "URL")]
    object_storage: String,
    #[command(flatten)]
    log: LogArguments,
    /// Page port of each shard's page server, as in 0=ps-0:7101
    #[arg(long = "shard", value_name = "N=HOST:PORT", required = true, num_args = 1.., value_parser = parse_shard)]
    shards: Vec<(u32, String)>,
    /// Reads of up to 64 pages in flight at once
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    requests: u16,
    #[command(flatten)]
    tls: TlsArguments,
}

fn parse_shard(text: &str) -> Result<(u32, String), String> {
    let wrong = || "expected N=HOST:PORT, as in 0=ps-0:7101".to_owned();
    let (shard, address) = text.split_once('=').ok_or_else(wrong)?;
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    let is_address = !host.is_empty() && port.parse::<u16>().is_ok();
    let shard = shard.parse().ok().filter(|_| is_address).ok_or_else(wrong)?;
    Ok((shard, address.to_owned()))
}

pub(crate) fn run(arguments: &Arguments) -> CommandResult {
    let cluster = store::read_cluster(&arguments.object_storage, arguments.log)?;
    let export = Export {
        to: arguments.to.clone(),
        at: arguments.at,
        client: ClientConfig {
            log: cluster.log(),
            system_id: cluster.system_id,
            role: ReaderRole::Tool,
            striping: Striping { stripe_blocks: cluster.stripe_blocks },
            shards: addresses(&cluster, &arguments.shards)?,
            tls: tls(&arguments.tls)?,
        },
        segment_bytes: u64::from(cluster.segment_bytes),
        timeline: cluster.timeline,
        has_checksums: cluster.checksums,
        requests_max: usize::from(arguments.requests),
    };
    // A core on the thread of the work: the one that waits for signals is another.
    let exported =
        transfer_progress::with_progress(move |progress| driver::run_core(export::run(&export, progress)))???;
    println!("as of {}", exported.at);
    eprintln!("lakebase: {} pages are in {} files of relations", exported.pages, exported.files);
    Ok(())
}

/// Every shard of the lakebase with the address that was given for it.
fn addresses(cluster: &ClusterDescription, given: &[(u32, String)]) -> Result<Vec<ShardAddress>, String> {
    if let Some((unknown, _)) = given.iter().find(|(shard, _)| cluster.shards.iter().all(|known| known.shard != *shard))
    {
        return Err(format!("--shard {unknown}=…: this lakebase has no shard {unknown}"));
    }
    let address_of = |shard: u32| {
        let mut of_shard = given.iter().filter(|(number, _)| *number == shard);
        match (of_shard.next(), of_shard.next()) {
            (Some((_, address)), None) => Ok(address.clone()),
            (None, _) => Err(format!("shard {shard} is missing: give its page server as --shard {shard}=HOST:PORT")),
            (Some(_), Some(_)) => Err(format!("--shard {shard}=… is given twice")),
        }
    };
    let shards = cluster.shards.iter().map(|shard| {
        Ok(ShardAddress {
            shard: ShardId(shard.shard),
            // Whoever owns the shard now.
            generation: ShardGeneration(0),
            range: HashRange { begin: shard.begin, end: shard.end },
            address: address_of(shard.shard)?,
        })
    });
    shards.collect()
}

fn tls(arguments: &TlsArguments) -> Result<Option<Tls>, Box<dyn std::error::Error>> {
    let files: Option<TlsFiles> = arguments.files();
    Ok(files.map(Tls::load).transpose()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_of_the_command_line() {
        assert_eq!(Ok((3, "[::1]:7101".to_owned())), parse_shard("3=[::1]:7101"));
        for text in ["", "3", "ps-0:7101", "3=ps-0", "3=:7101", "x=ps-0:7101", "3=ps-0:x"] {
            assert!(parse_shard(text).is_err(), "{text}");
        }
    }
}
