//! `lakebase pageserver`.

use std::path::PathBuf;

use pageserver::config::{Config, LogFormat};

use crate::{CommandResult, start_log};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Configuration file (pageserver.toml)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Read and check the configuration (not the files that it names), then end
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(arguments: &Arguments) -> CommandResult {
    let config = Config::load(&arguments.config)?;
    if arguments.check {
        println!("{}: no mistakes found", arguments.config.display());
        return Ok(());
    }
    start_log(config.log_format == LogFormat::Json)?;
    Ok(pageserver::run(config)?)
}
