//! `lakebase ca`: the development certificate authority.

use std::path::PathBuf;

use identity::Role;
use pgtypes::ClusterId;

use crate::CommandResult;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Create an authority for one lakebase: DIR/ca.pem and DIR/ca.key
    Init {
        /// Directory, created when absent
        dir: PathBuf,
        /// UUID of the lakebase
        #[arg(long, value_name = "UUID")]
        cluster: ClusterId,
    },
    /// Issue a certificate: DIR/NAME.pem and DIR/NAME.key
    Issue {
        /// Directory of the authority
        dir: PathBuf,
        /// operator, safekeeper, compute, pageserver, follower or client: what its bearer may call
        #[arg(long)]
        role: Role,
        /// Who it is for
        #[arg(long)]
        name: String,
        /// DNS name or IP address that it is reached by; may be repeated; servers (safekeeper, compute, pageserver) need one
        #[arg(long = "host", value_name = "HOST", num_args = 1..)]
        hosts: Vec<String>,
    },
}

pub(crate) fn run(command: &Command) -> CommandResult {
    match command {
        Command::Init { dir, cluster } => {
            identity::ca::init(dir, *cluster)?;
            println!("{}", dir.join("ca.pem").display());
        }
        Command::Issue { dir, role, name, hosts } => {
            if hosts.is_empty() && matches!(role, Role::Safekeeper | Role::Compute | Role::PageServer) {
                return Err(format!(
                    "a {role} is a server: give each name or address that it is reached by with --host"
                )
                .into());
            }
            if !dir.join("ca.pem").exists() {
                return Err(format!("{}: no authority here; `lakebase ca init` makes one", dir.display()).into());
            }
            let files = identity::ca::issue(dir, *role, name, hosts)?;
            println!("{}", files.certificate.display());
        }
    }
    Ok(())
}
