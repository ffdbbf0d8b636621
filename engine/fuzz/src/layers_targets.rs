//! Manifests of shards.

use layers::Manifest;

/// First byte: whether the checksum is made to match, which chance never does. The rest is the manifest.
///
/// Rule: what can be read is written byte for byte as it was.
pub fn fuzz_manifest(data: &[u8]) {
    let Some((mode, manifest)) = data.split_first() else { return };
    let mut bytes = manifest.to_vec();
    if mode & 1 != 0
        && let Some(end) = bytes.len().checked_sub(4)
    {
        let crc = wal::crc32c(0, &bytes[..end]);
        bytes[end..].copy_from_slice(&crc.to_le_bytes());
    }
    if let Ok(manifest) = Manifest::decode(&bytes) {
        assert_eq!(Ok(bytes), manifest.encode());
    }
}
