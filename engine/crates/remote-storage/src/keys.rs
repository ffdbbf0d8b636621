//! Keys of objects: `docs/formats/object-store.md`.

use layers::{LayerId, ShardGeneration, ShardId};
use pgtypes::{ClusterId, LogId, Lsn};

pub(crate) fn cluster(cluster: ClusterId) -> String {
    format!("{cluster}/cluster.json")
}

pub(crate) fn wal(log: LogId) -> String {
    format!("{log}/wal")
}

pub(crate) fn segment(log: LogId, start: Lsn) -> String {
    format!("{}/{:016x}", wal(log), start.0)
}

/// What lies in the directory of a shard.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Claims,
    Manifests,
    Layers,
}

pub(crate) fn directory(log: LogId, shard: ShardId, kind: Kind) -> String {
    let kind = match kind {
        Kind::Claims => "claims",
        Kind::Manifests => "manifests",
        Kind::Layers => "layers",
    };
    format!("{log}/shards/{:08x}/{kind}", shard.0)
}

pub(crate) fn claim(log: LogId, shard: ShardId, generation: ShardGeneration) -> String {
    format!("{}/{:016x}", directory(log, shard, Kind::Claims), generation.0)
}

pub(crate) fn manifest(log: LogId, shard: ShardId, version: ManifestVersion) -> String {
    let ManifestVersion { generation, sequence } = version;
    format!("{}/{:016x}-{sequence:016x}", directory(log, shard, Kind::Manifests), generation.0)
}

pub(crate) fn layer(log: LogId, id: LayerId) -> String {
    format!("{}/{:016x}-{:016x}", directory(log, id.shard, Kind::Layers), id.generation.0, id.number)
}

/// Which manifest of a shard; the highest is its state.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ManifestVersion {
    /// Of the owner that wrote it.
    pub generation: ShardGeneration,
    /// Counts the manifests of that owner.
    pub sequence: u64,
}

/// The number that 16 lower-case hexadecimal digits are.
pub(crate) fn number(text: &str) -> Option<u64> {
    let digits = text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    digits.then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

/// Two of them, with a dash between.
pub(crate) fn pair(text: &str) -> Option<(u64, u64)> {
    let (left, right) = text.split_once('-')?;
    Some((number(left)?, number(right)?))
}

/// The last part of a key.
pub(crate) fn name(key: &str) -> &str {
    key.rsplit('/').next().unwrap_or(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgtypes::BranchId;

    const LOG: LogId = LogId { cluster: ClusterId([0x11; 16]), branch: BranchId([0x22; 16]) };

    /// Every object of a lakebase is lost if this changes.
    #[test]
    fn keys_are_for_ever() {
        let root = "11111111-1111-1111-1111-111111111111";
        let branch = format!("{root}/22222222-2222-2222-2222-222222222222");
        let (shard, generation) = (ShardId(0xABC), ShardGeneration(0x1F));
        assert_eq!(format!("{root}/cluster.json"), cluster(LOG.cluster));
        assert_eq!(format!("{branch}/wal/0000000a0b000000"), segment(LOG, Lsn(0xA_0B00_0000)));
        let of_shard = |rest: &str| format!("{branch}/shards/00000abc/{rest}");
        assert_eq!(of_shard("claims/000000000000001f"), claim(LOG, shard, generation));
        let version = ManifestVersion { generation, sequence: 2 };
        assert_eq!(of_shard("manifests/000000000000001f-0000000000000002"), manifest(LOG, shard, version));
        let id = LayerId { shard, generation, number: 3 };
        assert_eq!(of_shard("layers/000000000000001f-0000000000000003"), layer(LOG, id));
    }

    #[test]
    fn only_names_that_we_give_are_read() {
        assert_eq!(Some((0x1F, 2)), pair("000000000000001f-0000000000000002"));
        for text in ["", "-", "1f-2", "000000000000001F-0000000000000002", "+00000000000001f-0000000000000002"] {
            assert_eq!(None, pair(text), "{text}");
        }
        assert_eq!("c", name("a/b/c"));
    }
}
