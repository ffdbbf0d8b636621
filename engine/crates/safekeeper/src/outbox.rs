//! What waits to be sent on one connection.

use std::cell::{Cell, RefCell};

use driver::{Closer, Event, Writer};
use wire::append::{Message, encode};

/// Bytes that may wait. Replies have a few dozen bytes each, so a peer above it has stopped reading for good: its
/// connection is closed.
const WAITING_BYTES_MAX: usize = 4 << 20;

/// Capacity that is kept between sends.
const KEPT_BYTES: usize = 4 << 10;

/// Messages for one connection. Everything that is ready leaves with one write.
pub struct Outbox {
    waiting: RefCell<Vec<u8>>,
    changed: Event,
    closed: Cell<bool>,
    closer: Closer,
}

impl Outbox {
    /// An empty one for the connection of `closer`.
    pub fn new(closer: Closer) -> Self {
        Self { waiting: RefCell::default(), changed: Event::new(), closed: Cell::new(false), closer }
    }

    /// Queues a message. On a closed connection nothing happens.
    pub fn push(&self, message: &Message<'_>) {
        if self.closed.get() {
            return;
        }
        let mut waiting = self.waiting.borrow_mut();
        let result = encode(message, &mut waiting);
        let overflow = waiting.len() > WAITING_BYTES_MAX;
        drop(waiting);
        match result {
            // A configuration or a history too large for a frame: nothing smaller would be true.
            Err(error) => tracing::error!(%error, "reply cannot be encoded; closing the connection"),
            Ok(()) if overflow => {
                tracing::warn!(bytes = WAITING_BYTES_MAX, "peer does not read its replies; closing the connection");
            }
            Ok(()) => return self.changed.set(),
        }
        self.abort();
    }

    /// Sends what is queued, then lets [`Outbox::send_all`] end.
    pub fn close(&self) {
        self.closed.set(true);
        self.changed.set();
    }

    /// Ends the connection at once.
    pub fn abort(&self) {
        self.closed.set(true);
        self.closer.close();
        self.changed.set();
    }

    /// Sends messages until [`Outbox::close`], or until the connection fails; it is of no use to writers afterwards.
    pub async fn send_all(&self, writer: &mut Writer) {
        let mut spare = Vec::new();
        loop {
            let ready = self
                .changed
                .until(|| {
                    let mut waiting = self.waiting.borrow_mut();
                    match waiting.is_empty() {
                        false => Some(Some(std::mem::replace(&mut *waiting, std::mem::take(&mut spare)))),
                        true => self.closed.get().then_some(None),
                    }
                })
                .await;
            let Some(ready) = ready else { return };
            let (result, mut sent) = writer.write_all(ready).await;
            if result.is_err() {
                // The reading side notices, too, and says so once.
                self.abort();
                return;
            }
            if sent.capacity() <= KEPT_BYTES {
                sent.clear();
                spare = sent;
            }
        }
    }
}
