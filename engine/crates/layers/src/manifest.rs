//! The manifest: all that is kept of a shard beside its layers. Bytes: `docs/formats/manifest.md`.
//!
//! Whoever opens a shard reads its newest manifest, builds the [`crate::LayerMap`] from it and asks for WAL from
//! [`Manifest::through`] on. Knows nothing about where manifests lie: see `remote-storage`.

use alloc::vec::Vec;

use pgtypes::{BranchId, ClusterId, FrameSummary, LogId, Lsn, PgTimeline, SystemId};
use thiserror::Error;

use crate::{
    error::LayerError,
    format::{Fields, kind_number, kind_of_number, put},
    identity::{LayerDescription, LayerId, LayerKind, LsnRange, ShardGeneration, ShardId},
    key::{HashRange, KEY_BYTES, Key, KeyRange},
};

/// Version that is written, and the only one that is read.
pub const MANIFEST_VERSION: u16 = 1;
/// The most layers that a manifest names: 120 MB of manifest, far above what compaction leaves of a shard. A shard
/// with more has to be compacted or split before it can write another.
pub const MANIFEST_LAYERS_MAX: usize = 1 << 20;

const MAGIC: &[u8; 8] = b"LBMANIF\0";
const HEADER_BYTES: usize = 160;
const LAYER_BYTES: usize = 112;
const CHECKSUM_BYTES: usize = 4;

/// State of a shard that is durable in the object store: which layers it consists of, and up to where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// Lakebase and branch.
    pub log: LogId,
    /// The shard.
    pub shard: ShardId,
    /// The owner that wrote it.
    pub generation: ShardGeneration,
    /// Counts the manifests of that owner, from 1. The highest (generation, sequence) is the shard's state.
    pub sequence: u64,
    /// The shard's part of the hash space.
    pub range: HashRange,
    /// [`crate::Striping::stripe_blocks`] of the lakebase: a power of two.
    pub stripe_blocks: u32,
    /// Of PostgreSQL's `pg_control`.
    pub system_id: SystemId,
    /// Bytes of a WAL segment of PostgreSQL: a power of two from 1 MiB to 1 GiB.
    pub segment_bytes: u32,
    /// Whether pages carry checksums (`data_checksum_version` is not 0).
    pub checksums: bool,
    /// The oldest LSN that pages can be had as of. Never above the end of `through`.
    pub horizon: Lsn,
    /// The log up to here is in the layers; the feed resumes from it.
    pub through: FrameSummary,
    /// Number of the next layer of this owner: above those of all that it ever wrote, named or not.
    pub next_layer: u64,
    /// The layers, those that other shards wrote before a split or merge among them; each once. In the order of their
    /// identities after [`Manifest::decode`].
    pub layers: Vec<LayerDescription>,
}

/// Bytes are not a manifest, or a manifest cannot be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum ManifestError {
    /// The magic number is missing.
    #[error("not a manifest")]
    NotAManifest,
    /// Another version wrote it.
    #[error(
        "manifest format {found} is not known: this engine reads {MANIFEST_VERSION}; \
         use a version of lakebase that reads format {found}"
    )]
    UnknownVersion {
        /// What it says.
        found: u16,
    },
    /// Damaged.
    #[error("manifest: checksum mismatch")]
    Checksum,
    /// Cut off, or something follows.
    #[error("manifest: {found} bytes, expected {expected}")]
    Length {
        /// Bytes there are.
        found: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// The contents make no sense: a faulty program.
    #[error("manifest: {0}")]
    Malformed(&'static str),
    /// Above [`MANIFEST_LAYERS_MAX`].
    #[error("manifest: {0} layers are too many, {MANIFEST_LAYERS_MAX} is the most: compact or split the shard")]
    TooManyLayers(usize),
}

impl From<LayerError> for ManifestError {
    fn from(error: LayerError) -> Self {
        match error {
            LayerError::Malformed(what) => ManifestError::Malformed(what),
            // `Fields` and the numbers of kinds know no other.
            _ => ManifestError::Malformed("field"),
        }
    }
}

impl Manifest {
    /// The bytes: the same for the same manifest, in whatever order its layers stand.
    ///
    /// # Errors
    /// It breaks a rule that [`Manifest::decode`] checks: the caller's fault. Too many layers: see
    /// [`MANIFEST_LAYERS_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        let mut layers: Vec<&LayerDescription> = self.layers.iter().collect();
        layers.sort_unstable_by_key(|layer| layer.id);
        self.check(layers.iter().copied())?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + layers.len() * LAYER_BYTES + CHECKSUM_BYTES);
        bytes.extend_from_slice(MAGIC);
        put(&mut bytes, MANIFEST_VERSION);
        put(&mut bytes, u8::from(self.checksums));
        put(&mut bytes, 0u8);
        put(&mut bytes, self.shard.0);
        bytes.extend_from_slice(&self.log.cluster.0);
        bytes.extend_from_slice(&self.log.branch.0);
        put(&mut bytes, self.generation.0);
        put(&mut bytes, self.sequence);
        put(&mut bytes, self.range.begin);
        put(&mut bytes, self.range.end);
        put(&mut bytes, self.system_id.0);
        put(&mut bytes, self.stripe_blocks);
        put(&mut bytes, self.segment_bytes);
        put(&mut bytes, self.horizon.0);
        put(&mut bytes, self.through.record_end.0);
        put(&mut bytes, self.through.record_start.0);
        put(&mut bytes, self.through.max_full_xid);
        put(&mut bytes, self.through.commit_timestamp as u64);
        put(&mut bytes, self.through.timeline.0);
        put(&mut bytes, layers.len() as u32);
        put(&mut bytes, self.next_layer);
        bytes.resize(HEADER_BYTES, 0);
        for layer in layers {
            put_layer(&mut bytes, layer);
        }
        let crc = wal::crc32c(0, &bytes);
        put(&mut bytes, crc);
        Ok(bytes)
    }

    /// Reads the bytes of a manifest.
    ///
    /// # Errors
    /// It is damaged, of another version, cut off, or breaks a rule.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let expected = |bytes: usize| bytes as u64;
        if bytes.len() < 10 || &bytes[..8] != MAGIC {
            return Err(ManifestError::NotAManifest);
        }
        // Before length and checksum: a later version may have both elsewhere.
        let found = u16::from_le_bytes([bytes[8], bytes[9]]);
        if found != MANIFEST_VERSION {
            return Err(ManifestError::UnknownVersion { found });
        }
        let least = HEADER_BYTES + CHECKSUM_BYTES;
        if bytes.len() < least {
            return Err(ManifestError::Length { found: bytes.len() as u64, expected: expected(least) });
        }
        let (summed, crc) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
        if crc != wal::crc32c(0, summed).to_le_bytes() {
            return Err(ManifestError::Checksum);
        }
        let (header, described) = summed.split_at(HEADER_BYTES);
        let (mut manifest, count) = decode_header(header)?;
        // The number of layers is believed only once the bytes are there.
        let length = (count as u64).saturating_mul(LAYER_BYTES as u64);
        if described.len() as u64 != length {
            return Err(ManifestError::Length {
                found: bytes.len() as u64,
                expected: length.saturating_add(expected(least)),
            });
        }
        manifest.layers = described.chunks_exact(LAYER_BYTES).map(decode_layer).collect::<Result<_, _>>()?;
        manifest.check(manifest.layers.iter())?;
        Ok(manifest)
    }

    /// The rules of a manifest, for layers in the order of their identities.
    fn check<'a>(&self, layers: impl ExactSizeIterator<Item = &'a LayerDescription>) -> Result<(), ManifestError> {
        let malformed = |what| Err(ManifestError::Malformed(what));
        if layers.len() > MANIFEST_LAYERS_MAX {
            return Err(ManifestError::TooManyLayers(layers.len()));
        }
        if self.range.begin >= self.range.end || self.range.end > HashRange::ALL.end {
            return malformed("range of hashes");
        }
        if !self.stripe_blocks.is_power_of_two() {
            return malformed("blocks of a stripe");
        }
        if !self.segment_bytes.is_power_of_two() || !(1 << 20..=1 << 30).contains(&self.segment_bytes) {
            return malformed("bytes of a segment");
        }
        if self.horizon > self.through.record_end {
            return malformed("the horizon is ahead of the log");
        }
        let mut before: Option<LayerId> = None;
        for layer in layers {
            if before.is_some_and(|before| before >= layer.id) {
                return malformed("layers are out of order or named twice");
            }
            before = Some(layer.id);
            let (keys, lsns) = (layer.keys, layer.lsns);
            let image = layer.kind == LayerKind::Image;
            if keys.is_empty() || !(lsns.after < lsns.through || image && lsns.after == lsns.through) {
                return malformed("ranges of a layer");
            }
            if layer.lsns.through > self.through.record_end {
                return malformed("a layer is ahead of the log");
            }
            let own = layer.id.shard == self.shard && layer.id.generation == self.generation;
            if own && layer.id.number >= self.next_layer {
                return malformed("number of the next layer");
            }
        }
        Ok(())
    }
}

/// Everything but the layers, and how many of them there should be.
fn decode_header(header: &[u8]) -> Result<(Manifest, u32), ManifestError> {
    let mut fields = Fields(&header[10..]);
    let checksums = match fields.u8()? {
        0 => false,
        1 => true,
        _ => return Err(ManifestError::Malformed("flags")),
    };
    let reserved = fields.u8()?;
    let shard = ShardId(fields.u32()?);
    let log = LogId { cluster: ClusterId(fields.array()?), branch: BranchId(fields.array()?) };
    let generation = ShardGeneration(fields.u64()?);
    let sequence = fields.u64()?;
    let range = HashRange { begin: fields.u64()?, end: fields.u64()? };
    let system_id = SystemId(fields.u64()?);
    let stripe_blocks = fields.u32()?;
    let segment_bytes = fields.u32()?;
    let horizon = Lsn(fields.u64()?);
    let mut through = FrameSummary {
        record_end: Lsn(fields.u64()?),
        record_start: Lsn(fields.u64()?),
        max_full_xid: fields.u64()?,
        commit_timestamp: fields.u64()? as i64,
        ..FrameSummary::default()
    };
    through.timeline = PgTimeline(fields.u32()?);
    let count = fields.u32()?;
    let next_layer = fields.u64()?;
    if reserved != 0 || fields.0.iter().any(|byte| *byte != 0) {
        return Err(ManifestError::Malformed("reserved bytes"));
    }
    let manifest = Manifest {
        log,
        shard,
        generation,
        sequence,
        range,
        stripe_blocks,
        system_id,
        segment_bytes,
        checksums,
        horizon,
        through,
        next_layer,
        layers: Vec::new(),
    };
    Ok((manifest, count))
}

fn put_layer(bytes: &mut Vec<u8>, layer: &LayerDescription) {
    put(bytes, layer.id.shard.0);
    put(bytes, kind_number(layer.kind));
    put(bytes, layer.level);
    put(bytes, 0u8);
    put(bytes, 0u8);
    put(bytes, layer.id.generation.0);
    put(bytes, layer.id.number);
    put(bytes, layer.lsns.after.0);
    put(bytes, layer.lsns.through.0);
    put(bytes, layer.file_bytes);
    put(bytes, layer.values);
    put(bytes, layer.chain_max);
    bytes.extend_from_slice(&layer.keys.begin.to_bytes());
    bytes.extend_from_slice(&layer.keys.end.to_bytes());
    bytes.extend_from_slice(&[0; 8]);
}

fn decode_layer(bytes: &[u8]) -> Result<LayerDescription, ManifestError> {
    let mut fields = Fields(bytes);
    let shard = ShardId(fields.u32()?);
    let kind = kind_of_number(fields.u8()?)?;
    let level = fields.u8()?;
    let reserved: [u8; 2] = fields.array()?;
    let id = LayerId { shard, generation: ShardGeneration(fields.u64()?), number: fields.u64()? };
    let lsns = LsnRange { after: Lsn(fields.u64()?), through: Lsn(fields.u64()?) };
    let (file_bytes, values) = (fields.u64()?, fields.u64()?);
    let chain_max = fields.u32()?;
    let mut key = || fields.array::<KEY_BYTES>().map(Key::from_bytes);
    let keys = KeyRange { begin: key()?, end: key()? };
    if reserved != [0; 2] || fields.0.iter().any(|byte| *byte != 0) {
        return Err(ManifestError::Malformed("reserved bytes"));
    }
    Ok(LayerDescription { id, kind, level, keys, lsns, file_bytes, values, chain_max })
}
