//! Identities: clusters, branches, disks, members, PostgreSQL timelines.

use core::{fmt, str::FromStr};

/// The text is not a UUID in the form `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParseIdError;

impl fmt::Display for ParseIdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a UUID: expected xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx in hexadecimal")
    }
}

impl core::error::Error for ParseIdError {}

pub(crate) fn format_uuid(bytes: &[u8; 16], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            f.write_str("-")?;
        }
        write!(f, "{byte:02x}")?;
    }
    Ok(())
}

pub(crate) fn parse_uuid(text: &str) -> Result<[u8; 16], ParseIdError> {
    let text = text.as_bytes();
    if text.len() != 36 {
        return Err(ParseIdError);
    }
    let mut bytes = [0u8; 16];
    let mut at = 0;
    for (i, byte) in bytes.iter_mut().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            if text[at] != b'-' {
                return Err(ParseIdError);
            }
            at += 1;
        }
        let digit = |c: u8| (c as char).to_digit(16).map(|d| d as u8).ok_or(ParseIdError);
        *byte = digit(text[at])? << 4 | digit(text[at + 1])?;
        at += 2;
    }
    Ok(bytes)
}

/// Text form, parsing and debug output of a 16-byte identity, the same for all of them.
macro_rules! uuid_text {
    ($name:ident) => {
        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                $crate::ids::format_uuid(&self.0, f)
            }
        }
        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                $crate::ids::format_uuid(&self.0, f)
            }
        }
        impl core::str::FromStr for $name {
            type Err = $crate::ids::ParseIdError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                $crate::ids::parse_uuid(text).map($name)
            }
        }
    };
}
pub(crate) use uuid_text;

/// Identity of a lakebase (`LakebaseCluster`): in every handshake, path, certificate and object key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ClusterId(pub [u8; 16]);
uuid_text!(ClusterId);

/// Identity of one history of a lakebase. A branch has one log; PostgreSQL timelines are sections of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BranchId(pub [u8; 16]);
uuid_text!(BranchId);

/// Random identity that a safekeeper's disk is born with. A replaced disk has another, and so cannot vote again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DiskId(pub [u8; 16]);
uuid_text!(DiskId);

/// Which log: written `cluster/branch` in paths, messages and metrics.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct LogId {
    /// The lakebase.
    pub cluster: ClusterId,
    /// Its branch.
    pub branch: BranchId,
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cluster, self.branch)
    }
}

impl FromStr for LogId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (cluster, branch) = text.split_once('/').ok_or(ParseIdError)?;
        Ok(LogId { cluster: cluster.parse()?, branch: branch.parse()? })
    }
}

/// Number of a safekeeper in the membership configuration; its place, not its disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct MemberId(pub u32);

/// PostgreSQL's `system_identifier` of `pg_control`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct SystemId(pub u64);

/// A PostgreSQL timeline (`TimeLineID`). Changes at a promotion; not the term.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct PgTimeline(pub u32);

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn uuid_text_round_trips() {
        let id = ClusterId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 254, 255]);
        assert_eq!("00010203-0405-0607-0809-0a0b0c0dfeff", id.to_string());
        assert_eq!(Ok(id), id.to_string().parse());
    }

    #[test]
    fn malformed_uuid_is_refused() {
        for text in ["", "00010203", "00010203-0405-0607-0809-0a0b0c0dfef", "00010203x0405-0607-0809-0a0b0c0dfeff"] {
            assert_eq!(Err(ParseIdError), text.parse::<ClusterId>(), "{text:?}");
        }
    }
}
