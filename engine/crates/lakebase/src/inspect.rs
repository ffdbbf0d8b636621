//! `lakebase inspect`.

use layers::ShardId;
use pageserver::api::{Layer, LayerDump};
use pgtypes::{BranchId, ClusterId, LogId};
use remote_storage::{RemoteStorage, ShardStore, block_on};

use crate::{
    CommandResult,
    http::{Client, TlsArguments},
};

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Print the layers of a shard: as its page server has them, or as object storage has them
    #[command(group = clap::ArgGroup::new("source").required(true).args(["pageserver", "object_storage"]))]
    Layers(LayersArguments),
}

#[derive(clap::Args)]
pub(crate) struct LayersArguments {
    /// Admin URL of its page server
    #[arg(long, value_name = "URL")]
    pageserver: Option<String>,
    /// Object storage of the lakebase: its newest manifest is read
    #[arg(long, value_name = "URL", requires_all = ["cluster", "branch", "shard"])]
    object_storage: Option<String>,
    /// UUID of the lakebase
    #[arg(long, value_name = "UUID")]
    cluster: Option<ClusterId>,
    /// UUID of its branch
    #[arg(long, value_name = "UUID")]
    branch: Option<BranchId>,
    /// Number of the shard
    #[arg(long, value_name = "N")]
    shard: Option<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    tls: TlsArguments,
}

pub(crate) fn run(command: &Command) -> CommandResult {
    let Command::Layers(arguments) = command;
    let dump = dump(arguments)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&dump)?);
    } else {
        print!("{}", text(&dump));
    }
    Ok(())
}

fn dump(arguments: &LayersArguments) -> Result<LayerDump, Box<dyn std::error::Error>> {
    if let Some(url) = &arguments.pageserver {
        return Ok(Client::new(&arguments.tls)?.get(url, "/v1/layers")?);
    }
    let LayersArguments {
        object_storage: Some(url),
        cluster: Some(cluster),
        branch: Some(branch),
        shard: Some(shard),
        ..
    } = arguments
    else {
        return Err("which shard? Give --pageserver, or --object-storage with --cluster, --branch and --shard".into());
    };
    let log = LogId { cluster: *cluster, branch: *branch };
    let store = ShardStore::new(RemoteStorage::open(url)?, log, ShardId(*shard));
    let manifest = block_on(store.newest_manifest())?
        .ok_or_else(|| format!("{url}: shard {shard} of {log} has no manifest there"))?;
    let mut layers = manifest.layers;
    layers.sort_by_key(|layer| (layer.lsns.through, layer.lsns.after, layer.keys.begin));
    Ok(LayerDump {
        horizon_lsn: manifest.horizon,
        durable_lsn: manifest.through.record_end,
        layers: layers.iter().map(|layer| Layer::new(layer, (false, true))).collect(),
    })
}

/// One line for each layer, and how many there are of each kind.
fn text(dump: &LayerDump) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, "readable from {} on, in object storage up to {}", dump.horizon_lsn, dump.durable_lsn);
    let _ = writeln!(
        text,
        "{:<42} {:>5} {:>5} {:>13} {:>13} {:>12} {:>10} {:>5}  first key to last",
        "layer", "kind", "level", "after", "through", "bytes", "values", "chain"
    );
    for layer in &dump.layers {
        let place = match (layer.is_local, layer.is_uploaded) {
            (_, false) => "  not uploaded",
            (true, true) => "  local copy",
            (false, true) => "",
        };
        let _ = writeln!(
            text,
            "{:<42} {:>5} {:>5} {:>13} {:>13} {:>12} {:>10} {:>5}  {}..{}{place}",
            layer.id,
            layer.kind,
            layer.level,
            layer.after.to_string(),
            layer.through.to_string(),
            layer.bytes,
            layer.values,
            layer.chain_max,
            // The place in the hash space tells where a key is; the rest is for `--json`.
            layer.begin.get(..8).unwrap_or(&layer.begin),
            layer.end.get(..8).unwrap_or(&layer.end),
        );
    }
    for (name, kind, level) in [("image", "image", 1), ("level 0", "delta", 0), ("level 1", "delta", 1)] {
        let of_kind = dump.layers.iter().filter(|layer| layer.kind == kind && layer.level == level);
        let (count, bytes) = of_kind.fold((0, 0), |(count, bytes), layer| (count + 1, bytes + layer.bytes));
        let _ = writeln!(text, "{name}: {count} layers, {bytes} bytes");
    }
    text
}

#[cfg(test)]
mod tests {
    use pgtypes::Lsn;

    use super::*;

    #[test]
    fn a_layer_has_a_line_and_each_kind_a_sum() {
        let layer = |kind: &str, level, bytes| Layer {
            id: "00000000/0000000000000001-0000000000000002".to_owned(),
            kind: kind.to_owned(),
            level,
            begin: "00".repeat(22),
            end: "ff".repeat(22),
            after: Lsn(0x10),
            through: Lsn(0x20),
            bytes,
            values: 3,
            chain_max: 1,
            is_local: true,
            is_uploaded: level == 1,
        };
        let layers = vec![layer("image", 1, 100), layer("delta", 0, 20), layer("delta", 1, 3), layer("delta", 1, 4)];
        let text = text(&LayerDump { horizon_lsn: Lsn(0x10), durable_lsn: Lsn(0x20), layers });
        for line in ["image: 1 layers, 100 bytes", "level 0: 1 layers, 20 bytes", "level 1: 2 layers, 7 bytes"] {
            assert!(text.contains(line), "{text}");
        }
        assert_eq!(9, text.lines().count());
        assert_eq!(1, text.matches("not uploaded").count());
    }
}
