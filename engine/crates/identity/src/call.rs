//! Which role may call what: the table of `docs/certificates.md`.

use pgtypes::ClusterId;

use crate::{Peer, PeerError, Role, peer_of};

/// Anything that one component asks of another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Call {
    /// Append protocol: propose (vote, elect, append).
    Propose,
    /// Append protocol: fetch WAL and ask for ballots as a peer.
    Peer,
    /// Append protocol: read committed WAL.
    ReadWal,
    /// Append protocol: be sent the records of a shard, and decide by it what WAL is kept.
    Feed,
    /// PostgreSQL's replication protocol.
    Replicate,
    /// Safekeeper: see the state of the process and of logs.
    SafekeeperStatus,
    /// Safekeeper: create a log.
    CreateLog,
    /// Safekeeper: delete a log.
    DeleteLog,
    /// Safekeeper: fence to a term and writer.
    Fence,
    /// Safekeeper: change the membership configuration.
    ChangeMembership,
    /// Compute: see the state of the agent.
    ComputeStatus,
    /// Compute: hand over a writer grant.
    Grant,
    /// Compute: say which page servers own which shards.
    ReplaceShards,
    /// Compute: stop PostgreSQL and the agent.
    StopCompute,
    /// Page server: read pages, lengths and metadata; hold leases.
    ReadPages,
    /// Page server: leave files of the cluster that are outside WAL.
    PutAdvisory,
    /// Page server: see the state of the process and of its layers.
    PageServerStatus,
    /// Page server: freeze, upload and compact at once.
    TendLayers,
}

impl Call {
    /// Every call, in the order of the table.
    pub const ALL: [Call; 18] = [
        Call::Propose,
        Call::Peer,
        Call::ReadWal,
        Call::Feed,
        Call::Replicate,
        Call::SafekeeperStatus,
        Call::CreateLog,
        Call::DeleteLog,
        Call::Fence,
        Call::ChangeMembership,
        Call::ComputeStatus,
        Call::Grant,
        Call::ReplaceShards,
        Call::StopCompute,
        Call::ReadPages,
        Call::PutAdvisory,
        Call::PageServerStatus,
        Call::TendLayers,
    ];

    /// Name in the table, in errors and in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Call::Propose => "propose",
            Call::Peer => "peer",
            Call::ReadWal => "read WAL",
            Call::Feed => "feed",
            Call::Replicate => "replicate",
            Call::SafekeeperStatus => "safekeeper status",
            Call::CreateLog => "create log",
            Call::DeleteLog => "delete log",
            Call::Fence => "fence",
            Call::ChangeMembership => "change membership",
            Call::ComputeStatus => "compute status",
            Call::Grant => "grant",
            Call::ReplaceShards => "replace shards",
            Call::StopCompute => "stop compute",
            Call::ReadPages => "read pages",
            Call::PutAdvisory => "put advisory",
            Call::PageServerStatus => "page server status",
            Call::TendLayers => "tend layers",
        }
    }
}

/// Whether `role` may make `call`, in its own cluster.
pub const fn allowed(role: Role, call: Call) -> bool {
    match call {
        Call::Propose => matches!(role, Role::Compute),
        Call::Peer => matches!(role, Role::Safekeeper),
        Call::ReadWal => matches!(role, Role::Compute | Role::PageServer),
        Call::Feed => matches!(role, Role::PageServer),
        Call::Replicate => matches!(role, Role::Safekeeper | Role::Compute | Role::Follower),
        Call::SafekeeperStatus => {
            matches!(role, Role::Operator | Role::Safekeeper | Role::Compute | Role::PageServer)
        }
        Call::ComputeStatus => matches!(role, Role::Operator | Role::Compute),
        Call::ReadPages => matches!(role, Role::Operator | Role::Compute | Role::PageServer),
        Call::PutAdvisory => matches!(role, Role::Compute),
        Call::PageServerStatus => matches!(role, Role::Operator | Role::Compute | Role::PageServer),
        Call::CreateLog
        | Call::DeleteLog
        | Call::Fence
        | Call::ChangeMembership
        | Call::Grant
        | Call::ReplaceShards
        | Call::StopCompute
        | Call::TendLayers => matches!(role, Role::Operator),
    }
}

/// A call was refused; the text is for the caller.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotAllowed {
    /// The role may not do this.
    #[error("a certificate with role {role} may not call {call}", call = call.as_str())]
    Role {
        /// The caller's.
        role: Role,
        /// What it asked.
        call: Call,
    },
    /// The certificate is of another lakebase.
    #[error("the certificate belongs to cluster {theirs}, this call is about cluster {ours}")]
    Cluster {
        /// The certificate's.
        theirs: ClusterId,
        /// The one of the log or process that the call is about.
        ours: ClusterId,
    },
    /// The certificate names nobody.
    #[error(transparent)]
    Certificate(#[from] PeerError),
    /// A certificate is required.
    #[error("a client certificate is required")]
    NoCertificate,
}

impl Peer {
    /// Refuses a call that this peer may not make. `cluster` is the one that the call is about: the log's, or the
    /// process's own.
    ///
    /// # Errors
    /// The caller's fault: see [`NotAllowed`].
    pub fn authorize(&self, call: Call, cluster: ClusterId) -> Result<(), NotAllowed> {
        if self.cluster != cluster {
            return Err(NotAllowed::Cluster { theirs: self.cluster, ours: cluster });
        }
        if !allowed(self.role, call) {
            return Err(NotAllowed::Role { role: self.role, call });
        }
        Ok(())
    }
}

/// Who is at the other end of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Caller {
    /// The handshake verified this peer's certificate.
    Certified(Peer),
    /// TLS is off by the development flag: everyone may do everything.
    Unchecked,
}

impl Caller {
    /// The caller behind a certificate; a connection without one is refused.
    ///
    /// # Errors
    /// [`NotAllowed::NoCertificate`], [`NotAllowed::Certificate`].
    pub fn of_certificate(der: Option<&[u8]>) -> Result<Caller, NotAllowed> {
        Ok(Caller::Certified(peer_of(der.ok_or(NotAllowed::NoCertificate)?)?))
    }

    /// As [`Peer::authorize`]; an unchecked caller may do everything.
    ///
    /// # Errors
    /// As there.
    pub fn authorize(&self, call: Call, cluster: ClusterId) -> Result<(), NotAllowed> {
        match self {
            Caller::Certified(peer) => peer.authorize(call, cluster),
            Caller::Unchecked => Ok(()),
        }
    }

    /// Refuses a server that is not what the client meant to reach: checked by the side that connected.
    ///
    /// # Errors
    /// [`NotAllowed::Cluster`], or [`NotAllowed::Role`] with the call that a `role` would serve.
    pub fn expect_server(&self, role: Role, cluster: ClusterId, call: Call) -> Result<(), NotAllowed> {
        match self {
            Caller::Unchecked => Ok(()),
            Caller::Certified(peer) if peer.cluster != cluster => {
                Err(NotAllowed::Cluster { theirs: peer.cluster, ours: cluster })
            }
            Caller::Certified(peer) if peer.role != role => Err(NotAllowed::Role { role: peer.role, call }),
            Caller::Certified(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The table in the documentation is the rule; every pair of role and call is compared, so neither can drift.
    #[test]
    fn allowed_is_the_table_in_the_documentation() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../docs/certificates.md");
        let document = std::fs::read_to_string(path).unwrap();
        let rows: Vec<Vec<&str>> = document
            .lines()
            .skip_while(|line| !line.starts_with("| call |"))
            .take_while(|line| line.starts_with('|'))
            .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
            .collect();
        let roles: Vec<Role> = rows[0][1..=Role::ALL.len()].iter().map(|name| name.parse().unwrap()).collect();
        assert_eq!(Role::ALL.to_vec(), roles);

        let mut table = BTreeMap::new();
        for row in &rows[2..] {
            for (role, cell) in roles.iter().zip(&row[1..]) {
                let yes = match *cell {
                    "yes" => true,
                    "no" => false,
                    other => panic!("{}/{role}: {other:?} is neither yes nor no", row[0]),
                };
                assert_eq!(None, table.insert((row[0].to_owned(), *role), yes), "{} appears twice", row[0]);
            }
        }
        assert_eq!(Call::ALL.len() * Role::ALL.len(), table.len());
        for call in Call::ALL {
            for role in Role::ALL {
                assert_eq!(table[&(call.as_str().to_owned(), role)], allowed(role, call), "{role} {}", call.as_str());
            }
        }
    }

    #[test]
    fn grants_fences_and_membership_are_the_operators_alone() {
        for call in [Call::Grant, Call::Fence, Call::ChangeMembership, Call::CreateLog, Call::DeleteLog] {
            for role in Role::ALL {
                assert_eq!(role == Role::Operator, allowed(role, call));
            }
        }
    }

    #[test]
    fn certificate_of_another_cluster_may_call_nothing() {
        let (ours, theirs) = (ClusterId([1; 16]), ClusterId([2; 16]));
        for role in Role::ALL {
            let peer = Peer { cluster: theirs, role, name: "a".to_owned() };
            for call in Call::ALL {
                let refused = Err(NotAllowed::Cluster { theirs, ours });
                assert_eq!(refused, Caller::Certified(peer.clone()).authorize(call, ours));
            }
        }
    }

    #[test]
    fn client_refuses_a_server_of_another_role_or_cluster() {
        let cluster = ClusterId([1; 16]);
        let caller = Caller::Certified(Peer { cluster, role: Role::Follower, name: "a".to_owned() });
        assert_eq!(
            Err(NotAllowed::Role { role: Role::Follower, call: Call::Propose }),
            caller.expect_server(Role::Safekeeper, cluster, Call::Propose)
        );
        assert!(caller.expect_server(Role::Follower, ClusterId([3; 16]), Call::Propose).is_err());
        assert_eq!(Ok(()), caller.expect_server(Role::Follower, cluster, Call::Propose));
    }
}
