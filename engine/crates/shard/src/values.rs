//! The values that one record makes, each key once and in the order of the keys.

use alloc::vec::Vec;

use layers::{Key, ValueKind};
use pgtypes::Lsn;

use crate::stripe_size::StripeSize;

/// Takes a value: its key, the end of its record, its kind, its bytes. A record puts at most one value under a key.
pub type Put<'a> = &'a mut dyn FnMut(Key, Lsn, ValueKind, Vec<u8>);

/// Values of the record in progress.
#[derive(Debug, Default)]
pub(crate) struct Values(Vec<(Key, ValueKind, Vec<u8>)>);

impl Values {
    pub fn push(&mut self, key: Key, kind: ValueKind, value: Vec<u8>) {
        self.0.push((key, kind, value));
    }

    pub fn image(&mut self, key: Key, value: Vec<u8>) {
        self.push(key, ValueKind::Image, value);
    }

    pub fn absent(&mut self, key: Key) {
        self.push(key, ValueKind::Absent, Vec::new());
    }

    pub fn stripe_size(&mut self, key: Key, size: StripeSize) {
        self.image(key, size.to_bytes());
    }

    /// Puts them all. Of two under one key the later one counts: a stripe can grow twice in one record.
    pub fn put_all(&mut self, lsn: Lsn, put: Put<'_>) {
        // Stable, so that the last of a key is the newest.
        self.0.sort_by_key(|(key, ..)| *key);
        let mut values = self.0.drain(..).peekable();
        while let Some((key, kind, value)) = values.next() {
            if values.peek().is_none_or(|(next, ..)| *next != key) {
                put(key, lsn, kind, value);
            }
        }
    }
}
