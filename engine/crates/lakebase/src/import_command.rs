//! `lakebase import`.

use std::path::PathBuf;

use layers::Striping;
use pgtypes::{BranchId, ClusterId, LogId};
use remote_storage::RemoteStorage;
use transfer::{
    PgData,
    import::{self, Import},
};

use crate::{CommandResult, transfer_progress};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A cleanly shut down PGDATA of PostgreSQL 17; it is read only
    #[arg(long, value_name = "DIR")]
    from_pgdata: PathBuf,
    /// Where the lakebase keeps its pages: file:///DIR, s3://BUCKET/PREFIX, gs://… or az://…, with credentials from the
    /// usual environment
    #[arg(long, value_name = "URL")]
    object_storage: String,
    /// UUID of the new lakebase; a random one without it
    #[arg(long, value_name = "UUID")]
    cluster: Option<ClusterId>,
    /// UUID of its branch; a random one without it
    #[arg(long, value_name = "UUID")]
    branch: Option<BranchId>,
    /// Page servers that the pages are divided among
    #[arg(long, value_name = "N", default_value_t = 1)]
    shards: u32,
    /// Blocks of a relation that stay together on one page server; it can never be changed
    #[arg(long, value_name = "N", default_value_t = Striping::DEFAULT.stripe_blocks, value_parser = parse_stripe_blocks)]
    stripe_blocks: u32,
    /// Directory for files that are not uploaded yet, at most 1 GiB
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    scratch: PathBuf,
}

fn parse_stripe_blocks(text: &str) -> Result<u32, String> {
    // A stripe never crosses the end of a relation's file of 131,072 blocks.
    let number = text.parse().ok().filter(|blocks: &u32| blocks.is_power_of_two() && *blocks <= 131_072);
    number.ok_or_else(|| "expected a power of two from 1 to 131072".to_owned())
}

pub(crate) fn run(arguments: &Arguments) -> CommandResult {
    let pgdata = PgData::open(&arguments.from_pgdata)?;
    for what in &pgdata.left_out {
        eprintln!("lakebase: left out: {what}");
    }
    let log = LogId {
        cluster: arguments.cluster.unwrap_or_else(|| ClusterId(*uuid::Uuid::new_v4().as_bytes())),
        branch: arguments.branch.unwrap_or_else(|| BranchId(*uuid::Uuid::new_v4().as_bytes())),
    };
    let import = Import {
        pgdata,
        log,
        shards: arguments.shards,
        striping: Striping { stripe_blocks: arguments.stripe_blocks },
        scratch: arguments.scratch.clone(),
    };
    let storage = RemoteStorage::open(&arguments.object_storage)?;
    let imported = transfer_progress::with_progress(move |progress| import::run(&import, &storage, progress))??;
    let cluster = &imported.cluster;
    println!("cluster {}", cluster.cluster);
    println!("branch {}", cluster.branch);
    println!("log begins at {}", cluster.start_lsn);
    for shard in &cluster.shards {
        println!("shard {}: {} to {}", shard.shard, shard.begin, shard.end);
    }
    eprintln!(
        "lakebase: {} pages of {} forks are in {} layers of {:.1} MiB",
        imported.pages,
        imported.forks,
        imported.layers,
        imported.layer_bytes as f64 / f64::from(1 << 20)
    );
    Ok(())
}
