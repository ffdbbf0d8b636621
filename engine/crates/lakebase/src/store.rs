//! What object storage says about a lakebase.

use remote_storage::{ClusterDescription, ClusterError, RemoteStorage, block_on};

use crate::LogArguments;

/// `cluster.json` of a lakebase.
///
/// # Errors
/// Object storage does not answer, there is no such lakebase, or it has another branch.
pub(crate) fn read_cluster(url: &str, log: LogArguments) -> Result<ClusterDescription, Box<dyn std::error::Error>> {
    let storage = RemoteStorage::open(url)?;
    let description = match block_on(ClusterDescription::get(&storage, log.cluster)) {
        Err(ClusterError::Storage(error)) if error.is_not_found() => {
            return Err(format!("{url}: no lakebase {} there; `lakebase import` makes one", log.cluster).into());
        }
        description => description?,
    };
    if description.branch != log.branch {
        return Err(
            format!("{url}: lakebase {} has branch {}, not {}", log.cluster, description.branch, log.branch).into()
        );
    }
    Ok(description)
}
