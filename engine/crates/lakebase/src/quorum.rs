//! What several safekeepers say about one log.

use consensus::Configuration;
use pgtypes::DiskId;
use safekeeper::api::{LogStatus, Status};

use crate::{LogArguments, http::Client};

/// One safekeeper that answered.
pub(crate) struct Safekeeper<'a> {
    pub(crate) url: &'a str,
    pub(crate) status: Status,
}

impl Safekeeper<'_> {
    /// What it says about the log, if it has it.
    pub(crate) fn log(&self, log: LogArguments) -> Option<&LogStatus> {
        self.status.logs.iter().find(|status| status.cluster == log.cluster && status.branch == log.branch)
    }
}

/// Asks all; those that do not answer are reported on standard error.
///
/// # Errors
/// Two URLs lead to one safekeeper, or none answers.
pub(crate) fn ask_all<'a>(client: &Client, urls: &'a [String]) -> Result<Vec<Safekeeper<'a>>, String> {
    let mut safekeepers: Vec<Safekeeper<'_>> = Vec::new();
    for url in urls {
        match client.get::<Status>(url, "/v1/status") {
            Ok(status) => {
                if let Some(same) = safekeepers.iter().find(|other| other.status.disk == status.disk) {
                    return Err(format!("{url} and {} are one safekeeper", same.url));
                }
                safekeepers.push(Safekeeper { url, status });
            }
            Err(error) => eprintln!("{error}"),
        }
    }
    if safekeepers.is_empty() { Err("no safekeeper answers".to_owned()) } else { Ok(safekeepers) }
}

/// The newest configuration of the log that any of them knows.
///
/// # Errors
/// None of them has the log.
pub(crate) fn newest_configuration(safekeepers: &[Safekeeper<'_>], log: LogArguments) -> Result<Configuration, String> {
    let known = safekeepers.iter().filter_map(|safekeeper| safekeeper.log(log));
    let newest = known.max_by_key(|status| status.configuration.generation);
    match newest {
        Some(status) => Ok(status.configuration.clone().into()),
        None => Err(format!("no safekeeper that answers has the log {}/{}", log.cluster, log.branch)),
    }
}

/// Whether the disks in `done` are a majority (of both sets in a joint configuration).
pub(crate) fn is_majority(configuration: &Configuration, done: &[DiskId]) -> bool {
    configuration.is_quorum(|member| done.contains(&member.disk))
}
