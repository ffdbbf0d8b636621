//! Feeds: a page server is sent its shard's records, from committed WAL only.
//!
//! [`serve`] is one subscriber's conversation: its generation is made durable, then batches go out and progress comes in.
//! What all subscribers of a log share is in [`Feeds`]: near the end of the log, records are decoded once for all of
//! them ([`filter::Window`]); one that is behind decodes for itself ([`source`]) until it reaches the window. Memory per
//! subscriber: one batch and one frame of it, whether it reads or not. `docs/formats/append-protocol.md`.

mod conversation;
mod feeds;
mod source;

use layers::{HashRange, ShardGeneration, ShardId, Striping};
use pgtypes::FrameSummary;

pub(crate) use self::conversation::serve;
pub use self::feeds::{Feeds, Subscriber};

/// What a page server asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subscription {
    pub(crate) shard: ShardId,
    pub(crate) generation: ShardGeneration,
    pub(crate) range: HashRange,
    pub(crate) striping: Striping,
    pub(crate) from: FrameSummary,
}
