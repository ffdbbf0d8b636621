//! `lakebase`: the engine's processes and the commands of its operator, in one binary.
//!
//! The command line only: a process is the crate of its name, a command is one call or a few of the admin ports.

mod ca;
mod compute_command;
mod export_command;
mod fence;
mod grant;
mod http;
mod import_command;
mod inspect;
mod log_command;
mod membership;
mod pageserver_command;
mod quorum;
mod safekeeper_command;
mod status;
mod store;
mod transfer_progress;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pgtypes::{BranchId, ClusterId};

/// PostgreSQL whose WAL lives on a quorum of safekeepers, and whose pages live in object storage.
#[derive(Parser)]
#[command(version, max_term_width = 120, subcommand_required = true, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a safekeeper: stores the WAL of many logs, votes, serves followers
    Safekeeper(safekeeper_command::Arguments),
    /// Run a page server: one shard of a lakebase's pages, kept as layers in object storage
    Pageserver(pageserver_command::Arguments),
    /// Run a compute agent: supervises one PostgreSQL and brings its WAL to the safekeepers
    Compute(compute_command::Arguments),
    /// Development certificates
    #[command(subcommand)]
    Ca(ca::Command),
    /// Make a new lakebase of a stopped PGDATA: its pages become the first layers on object storage
    Import(import_command::Arguments),
    /// Write a lakebase, as of now or earlier, to an ordinary PGDATA that stock PostgreSQL 17 starts
    Export(export_command::Arguments),
    /// Logs on safekeepers
    #[command(subcommand)]
    Log(log_command::Command),
    /// Grant a term to one writer on a majority of safekeepers, so that no other writer gets an acknowledgement any more
    Fence(fence::Arguments),
    /// Tell a compute agent that a term is its own (after `fence`)
    Grant(grant::Arguments),
    /// Show safekeepers, their logs, page servers and a compute agent
    Status(status::Arguments),
    /// Look into page servers and object storage
    #[command(subcommand)]
    Inspect(inspect::Command),
    /// Show or change the members of a log
    #[command(subcommand)]
    Membership(membership::Command),
}

/// Which log.
#[derive(clap::Args, Clone, Copy)]
struct LogArguments {
    /// UUID of the lakebase
    #[arg(long, value_name = "UUID")]
    cluster: ClusterId,
    /// UUID of its branch
    #[arg(long, value_name = "UUID")]
    branch: BranchId,
}

/// Why a command failed, for people.
type CommandResult = Result<(), Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    // The agent's own helper, not a command for people: it forks, so nothing may run before it.
    let words: Vec<String> = std::env::args().collect();
    if let [_, command, arguments @ ..] = words.as_slice()
        && command == "compute-init"
    {
        return ExitCode::from(u8::try_from(compute::init_main(arguments)).unwrap_or(u8::MAX));
    }
    let result = match Arguments::parse().command {
        Command::Safekeeper(arguments) => safekeeper_command::run(&arguments),
        Command::Pageserver(arguments) => pageserver_command::run(&arguments),
        Command::Import(arguments) => import_command::run(&arguments),
        Command::Export(arguments) => export_command::run(&arguments),
        Command::Compute(arguments) => compute_command::run(&arguments),
        Command::Ca(command) => ca::run(&command),
        Command::Log(command) => log_command::run(&command),
        Command::Fence(arguments) => fence::run(&arguments),
        Command::Grant(arguments) => grant::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Inspect(command) => inspect::run(&command),
        Command::Membership(command) => membership::run(&command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lakebase: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Sends log lines to standard error: `LAKEBASE_LOG` is a filter as in `info,safekeeper=debug`.
fn start_log(json: bool) -> CommandResult {
    let filter = match std::env::var("LAKEBASE_LOG") {
        Ok(filter) => tracing_subscriber::EnvFilter::try_new(&filter)
            .map_err(|error| format!("LAKEBASE_LOG={filter:?}: {error}"))?,
        Err(_) => tracing_subscriber::EnvFilter::new("info"),
    };
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(terminal);
    if json {
        builder.json().init()
    } else {
        builder.init()
    }
    Ok(())
}
