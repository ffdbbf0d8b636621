//! One shard of a page server: what a record is to its keys, how long relations are, and a page out of its values.
//!
//! [`Ingest`] takes the records of the shard's feed in order and says which values to put under which keys; it holds the
//! lengths of all stripes and, on the shard of hash 0, the metadata that later records build on. [`rebuild`] makes a page
//! (or another value) of the values of its key. [`StripeSize`], [`Advisory`] and [`MetadataListing`] read values.
//!
//! Knows nothing about layers' files, feeds, clocks or object stores. What the values are:
//! `docs/design/2026-11-27-page-service.md`, "Values of a shard". Read next: `ingest.rs`, `rebuild.rs`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod advisory;
mod copy;
mod error;
mod ingest;
mod lengths;
mod listing;
mod metadata_state;
mod rebuild;
mod stripe_size;
mod values;

pub use advisory::{ADVISORY_BYTES_MAX, Advisory, AdvisoryError};
pub use copy::{CopiedBlock, DatabaseCopy};
pub use error::{IngestCause, IngestFault, PoisonCause, RebuildError};
pub use ingest::{AttachCause, AttachError, Done, Ingest};
pub use lengths::StripeOf;
pub use listing::{ListingError, MetadataListing};
pub use metadata_state::LoadError;
pub use rebuild::{Presence, Rebuilt, poison, rebuild, rebuild_page};
pub use stripe_size::{STRIPE_SIZE_BYTES, StripeSize, StripeSizeError, stripe_size_key_of};
pub use values::Put;
