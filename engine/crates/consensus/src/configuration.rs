//! The membership configuration: who counts for a majority.

use alloc::{string::String, vec::Vec};

use pgtypes::{DiskId, Generation, MemberId};

/// One safekeeper of a configuration.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Member {
    /// Its number; unique in the configuration.
    pub member: MemberId,
    /// The disk that may vote under this number.
    pub disk: DiskId,
    /// `host:port` of its append protocol, for proposers and for peers that fetch WAL.
    pub address: String,
}

/// The safekeepers of a log. Changed by one member at a time through a joint configuration.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Configuration {
    /// Raised by 1 at each change.
    pub generation: Generation,
    /// 1, 3 or 5 members.
    pub members: Vec<Member>,
    /// In a joint configuration, the members to be: a quorum then needs a majority of both sets.
    pub new_members: Option<Vec<Member>>,
}
